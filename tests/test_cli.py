"""The command line: every verb on a tiny model, JSON, exit codes, and one line for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moe_cases import make_mixture
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from pyprune import Mask
from pyprune.base.text import default_text
from pyprune.cli.commands import app
from pyprune.model import checkpoint
from pyprune.speed import roofline

VERBS = (
    *(
        "doctor",
        "inspect",
        "prune",
        "compare",
        "recover",
        "diagnose",
        "report",
        "eval",
        "generate",
        "bench",
        "tune",
        "verify",
        "demo",
    ),
)
SMALL = ("--tokens", "256", "--window", "64")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def as_json(*arguments: object) -> dict[str, Any]:
    """Run with --json; standard output must be one JSON object and nothing else."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(code: int, *arguments: object) -> str:
    """Run; the verb must end with `code`, one error line, and no traceback. Returns the message."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    message = " ".join(result.stderr.split())
    assert message.startswith("error: ")
    with_json = call(*arguments, "--json")
    assert with_json.exit_code == code
    told = " ".join(json.loads(with_json.stdout)["error"]["message"].split())
    assert told == message.removeprefix("error: ")
    return message


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "half"
    result = call("prune", tiny_checkpoint, "--out", out, "--keep", 0.5, "--multiple", 8, *SMALL)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_help_names_every_criterion() -> None:
    from pyprune.pruning import importance

    text = "".join(call("prune", "--help").stdout.split()).replace("│", "")
    assert all(name in text for name in importance.names())


def test_doctor_says_usable_or_why_not() -> None:
    facts = as_json("doctor")
    assert facts["backends"]["torch"]["cpu"] == "usable"
    assert set(facts["backends"]) == {"torch", "cpu", "triton", "cuda", "cublas"}
    assert facts["native"]["state"] == facts["backends"]["cpu"]["cpu"], "two stories of the native CPU library"
    assert all(
        isinstance(reason, str) and "\n" not in reason for by in facts["backends"].values() for reason in by.values()
    )
    assert all(choice["backend"] in ("torch", "cpu") for choice in facts["choices"] if choice["device"] == "cpu")
    assert {"bfloat16", "bfloat16, int8 weights", "bfloat16, int4 weights"} <= {c["dtype"] for c in facts["choices"]}


def test_inspect_lists_the_ffns(tiny_checkpoint: Path) -> None:
    facts = as_json("inspect", tiny_checkpoint)
    assert [f["layer"] for f in facts["ffns"]] == [0, 1, 2]
    first = facts["ffns"][0]
    assert (first["kind"], first["hidden_size"], first["intermediate_size"]) == ("gated", 32, 96)
    assert (first["activation"], first["bias"], first["parameters"]) == ("silu", False, 3 * 32 * 96)
    assert first["share_of_bytes"] == pytest.approx(3 * 32 * 96 * 4 / facts["bytes"])
    assert call("inspect", tiny_checkpoint).exit_code == 0


def test_recovery_follows_where_it_is_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("prune", tiny_checkpoint, "--keep", 0.5, "--multiple", 8, "--text", "builtin:prose")
    size = ("--tokens", 1024, "--window", 64, "--recover", 5)
    found = as_json(*arguments, *size, "--out", tmp_path / "m")
    taught = found["recovery"]
    assert taught["steps"] > 0 and taught["held_out"][-1]["ce"] < taught["held_out"][0]["ce"]
    facts = json.loads((tmp_path / "m" / "config.json").read_text())["pyprune"]["recovery"]
    assert [f["best"] for f in facts] == [taught["best"]] and taught["best"] > 0
    text = " ".join(call(*arguments, *size, "--dry-run").stdout.split())
    assert "recovery:" in text and "perplexity on held-out windows" in text
    message = "recover must be 0 minutes or more, and finite; got -1.0"
    assert message in refused(2, *arguments, "--dry-run", "--recover", -1)
    with_nested = refused(2, "prune", tiny_checkpoint, "--dry-run", "--nested", "--recover", 1)
    assert "recover must be left out with --nested; got 1.0" in with_nested


def test_prune_writes_a_checkpoint(tiny_checkpoint: Path, pruned: Path, tmp_path: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(pruned).config.intermediate_size == 48
    manifest = as_json("verify", pruned, "--base", tiny_checkpoint)
    assert manifest["verified"] and manifest["base_checked"] and manifest["widths"] == [48, 48, 48]
    provenance = json.loads((pruned / "config.json").read_text())["pyprune"]["provenance"]
    assert provenance["config"]["method"] == "obs" and provenance["tokens"] == 256
    assert str(tmp_path.parent) not in json.dumps(provenance), "a path of this machine went into the checkpoint"


def test_prune_dry_run_writes_the_mask_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    facts = as_json(
        "prune",
        tiny_checkpoint,
        "--out",
        tmp_path / "x",
        "--save-mask",
        tmp_path / "m",
        "--dry-run",
        "--multiple",
        8,
        *SMALL,
    )
    assert facts["widths"] == [80, 80, 80] and facts["out"] is None
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    assert list(Mask.load(tmp_path / "m").widths) == [80, 80, 80]


def test_prune_by_mask_gives_the_same_neurons(tiny_checkpoint: Path, tmp_path: Path) -> None:
    mask, first, second = tmp_path / "mask.safetensors", tmp_path / "a", tmp_path / "b"
    common = ("--repair", "none", "--keep", 0.4, "--multiple", 1)
    as_json("prune", tiny_checkpoint, "--out", first, "--allocation", "global", "--save-mask", mask, *common, *SMALL)
    as_json("prune", tiny_checkpoint, "--out", second, "--mask", mask, "--repair", "none")
    assert checkpoint.read_manifest(first)["widths"] == checkpoint.read_manifest(second)["widths"]
    weights = [checkpoint.read_manifest(f)["files"]["model.safetensors"]["sha256"] for f in (first, second)]
    assert weights[0] == weights[1]


def test_prune_without_text_needs_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    facts = as_json(
        "prune",
        tiny_checkpoint,
        "--out",
        tmp_path / "x",
        "--method",
        "random",
        "--repair",
        "none",
    )
    assert facts["text"] is None and facts["tokens"] == 0


def test_eval_reports_token_perplexity(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:20_000])
    facts = as_json("eval", tiny_checkpoint, "--text", text, *SMALL)
    assert facts["tokens"] == 256 and facts["window"] == 64 and facts["predicted"] == 4 * 63
    assert 1 < facts["perplexity"] < 100_000
    assert not facts["calibrated_on_this_text"]


def test_eval_says_when_the_text_was_calibrated_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:20_000])
    as_json("prune", tiny_checkpoint, "--out", tmp_path / "x", "--multiple", 8, "--text", text, *SMALL)
    assert as_json("eval", tmp_path / "x", "--text", text, *SMALL)["calibrated_on_this_text"]
    assert "flatters" in call("eval", tmp_path / "x", "--text", text, *SMALL).stderr
    assert not as_json("eval", tmp_path / "x", *SMALL)["calibrated_on_this_text"]


def test_generate_shows_both_models(tiny_checkpoint: Path, pruned: Path) -> None:
    facts = as_json("generate", pruned, "--against", tiny_checkpoint, "--prompt", "The list", "--new-tokens", 4)
    assert set(facts["texts"]) == {str(tiny_checkpoint), str(pruned)}
    assert call("generate", pruned, "--prompt", "The list [bold]", "--new-tokens", 2).exit_code == 0


def test_weights_of_another_dtype(tiny_checkpoint: Path) -> None:
    found = {
        w: as_json("eval", tiny_checkpoint, *SMALL, "--weights", w)["perplexity"] for w in ("float32", "int8", "int4")
    }
    assert found["float32"] == pytest.approx(as_json("eval", tiny_checkpoint, *SMALL)["perplexity"], rel=1e-4)
    assert found["int8"] != found["float32"] and found["int8"] == pytest.approx(found["float32"], rel=0.05)
    assert len(set(found.values())) == 3 and found["int4"] == pytest.approx(found["float32"], rel=0.2)
    facts = as_json("generate", tiny_checkpoint, "--prompt", "The list", "--new-tokens", 2, "--weights", "bfloat16")
    assert set(facts["texts"]) == {str(tiny_checkpoint)}
    for verb in (("eval",), ("generate", "--prompt", "x"), ("bench",)):
        message = refused(2, verb[0], tiny_checkpoint, *verb[1:], "--weights", "in8")
        assert "weights must be one of float32" in message and "nearest: int8" in message


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests look at does not depend on a true memory bandwidth, which takes seconds to measure."""
    monkeypatch.setattr(roofline, "buffer_bytes", lambda device: 1 << 24)


@pytest.mark.usefixtures("small_buffer")
@pytest.mark.parametrize("mode", ["compact", "gather"])
def test_bench_of_a_dense_model(tiny_checkpoint: Path, mode: str) -> None:
    facts = as_json("bench", tiny_checkpoint, "--mode", mode, "--prefill", 32, "--repeats", 1)
    assert set(facts["models"]) == {"dense", "narrow modules", f"PrunedMLP {mode}"}
    assert facts["models"]["narrow modules"]["keep"] == 0.5


@pytest.mark.usefixtures("small_buffer")
def test_bench_of_int8_weights(tiny_checkpoint: Path) -> None:
    facts = as_json("bench", tiny_checkpoint, "--weights", "int8", "--prefill", 32, "--repeats", 1)
    narrow, swapped = (facts["models"][name] for name in ("narrow modules", "PrunedMLP compact int8"))
    assert swapped["ffn_bytes"] == 48 * 3 * (32 + 4)
    assert narrow["bytes"] - swapped["bytes"] == 3 * (narrow["ffn_bytes"] - swapped["ffn_bytes"])


@pytest.mark.usefixtures("small_buffer")
def test_bench_of_a_mixture(tmp_path: Path) -> None:
    make_mixture("qwen3_moe").save_pretrained(tmp_path / "x")
    facts = as_json("bench", tmp_path / "x", "--prefill", 32, "--repeats", 1)
    assert set(facts["models"]) == {"dense", "narrow modules", "PrunedMoE compact"}
    assert {entry["keep"] for entry in facts["models"].values()} == {1.0, 0.5}
    facts = as_json("bench", tmp_path / "x", "--prefill", 32, "--repeats", 1, "--mode", "gather")
    assert facts["models"]["PrunedMoE gather"]["keep"] == 0.5


@pytest.mark.usefixtures("small_buffer")
def test_bench_against_dense(tiny_checkpoint: Path, pruned: Path) -> None:
    result = call("bench", pruned, "--against", tiny_checkpoint, "--prefill", 32, "--repeats", 1)
    assert result.exit_code == 0, result.output
    assert "ceiling" in result.stdout


def test_wrong_use_is_refused(tiny_checkpoint: Path, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    assert "keep must lie in (0, 1]; got 1.5" in refused(2, "prune", tiny_checkpoint, "--out", out, "--keep", 1.5)
    assert "nearest: wanda" in refused(2, "prune", tiny_checkpoint, "--out", out, "--method", "wander")
    assert "out must be given" in refused(2, "prune", tiny_checkpoint)
    assert "not empty" in refused(2, "prune", tiny_checkpoint, "--out", pruned)
    assert "text must be an existing file" in refused(2, "eval", tiny_checkpoint, "--text", tmp_path / "none.txt")
    assert "at least one window" in refused(2, "eval", tiny_checkpoint, "--tokens", 10, "--window", 64)
    assert "windows of at most 512 tokens" in refused(2, "eval", tiny_checkpoint, "--tokens", 1024, "--window", 1024)
    assert "no file or folder" in refused(2, "inspect", tmp_path / "none")
    assert "mode must be" in refused(2, "bench", pruned, "--against", tiny_checkpoint, "--mode", "gather")
    assert "prompt must not be empty" in refused(2, "generate", tiny_checkpoint, "--prompt", "")
    assert "chat must" in refused(2, "generate", tiny_checkpoint, "--prompt", "x", "--chat")
    assert not out.exists()


def test_failures_exit_with_one(tiny_checkpoint: Path, pruned: Path, tmp_path: Path) -> None:
    assert "not written by pyprune" in refused(1, "verify", tiny_checkpoint)
    other = tmp_path / "other"
    as_json("prune", pruned, "--out", other, "--method", "random", "--repair", "none", "--keep", 0.5, "--multiple", 1)
    assert "fingerprint" in refused(1, "verify", other, "--base", tiny_checkpoint)
    data = other / "model.safetensors"
    data.write_bytes(data.read_bytes()[:-100])
    assert "model.safetensors must have" in refused(1, "verify", other)
    assert "model.safetensors must have" in refused(1, "eval", other, *SMALL)


def test_the_installed_command(tmp_path: Path) -> None:
    """The entry point itself, in a process of its own: exit codes, and nothing but JSON on standard output."""
    command = [str(Path(sys.executable).with_name("pyprune"))]
    done = subprocess.run([*command, "verify", str(tmp_path), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "CheckpointError"
    unknown = subprocess.run([*command, "prunes"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "Traceback" not in unknown.stderr


def test_nested_checkpoint_runs_at_any_width(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "nested"
    made = as_json("prune", tiny_checkpoint, "--out", out, "--nested", "--shares", "0.75,0.5", *SMALL)
    assert made["shares"] == [0.75, 0.5]
    assert made["widths"] == [[72] * 3, [48] * 3]
    whole = as_json("eval", out, *SMALL)["perplexity"]
    assert whole == pytest.approx(as_json("eval", tiny_checkpoint, *SMALL)["perplexity"], rel=1e-3)
    half = as_json("eval", out, "--width", 0.5, *SMALL)["perplexity"]
    assert half != pytest.approx(whole, rel=1e-4)
    as_json("verify", out)
    refused = call("eval", tiny_checkpoint, "--width", 0.5, *SMALL)
    assert refused.exit_code != 0
    assert "nested" in refused.output


def test_whole_layers_go(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "short"
    made = as_json("prune-blocks", tiny_checkpoint, "--out", out, "--structure", "layer", "--keep", 0.67, *SMALL)
    assert len(made["kept"]) == 2
    assert as_json("eval", out, *SMALL)["perplexity"] > 1
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
