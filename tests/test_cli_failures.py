"""When it cannot be done: one clear line, the right exit code, nothing half written, on any screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from pyprune.cli import commands
from pyprune.cli.commands import app
from pyprune.model import checkpoint

SMALL = ("--tokens", "256", "--window", "64", "--multiple", "8")
NO_TEXT = ("--method", "magnitude-l2-product", "--repair", "none", "--multiple", "8")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(code: int, *arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and result.stdout == "", result.output
    return lines[0]


def process(
    *arguments: object, limit: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """The installed command in a process of its own, whose files may not grow past `limit` KiB."""
    command = [str(Path(sys.executable).with_name("pyprune")), *map(str, arguments)]
    if limit:
        command = ["sh", "-c", f'ulimit -f {limit * 2}; exec "$@"', "sh", *command]
    return subprocess.run(
        command, capture_output=True, timeout=300, check=False, env={**os.environ, **(environment or {})}
    )


def without_tokenizer(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tokenizer*")))


def test_full_disk(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for out in (tmp_path / "new", tmp_path / "old"):
        done = process("prune", tiny_checkpoint, "--out", out, *NO_TEXT, limit=16)
        last = done.stderr.decode().splitlines()[-1]
        assert done.returncode == 1 and b"Traceback" not in done.stderr and done.stdout == b""
        assert last.startswith(f"error: {out} could not be written, and nothing was changed: ")
        assert "File too large" in last
    assert [p.name for p in tmp_path.iterdir()] == ["old"] and list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("width", [None, "abc", 1.5, True, [96]])
def test_config_with_a_width_that_is_none(width: object, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bad"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": width}))
    for verb in (
        ("inspect",),
        ("eval",),
        ("generate", "--prompt", "x"),
        ("prune", "--out", tmp_path / "x"),
        ("bench",),
    ):
        message = refused(1, verb[0], folder, *verb[1:])
        assert "intermediate_size" in message and repr(width) in message
    assert not (tmp_path / "x").exists()


def test_a_broken_model_is_no_mistake_of_the_users(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """1 where there is a model that cannot be read, 2 where there is none."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bad"))
    (folder / "tokenizer.json").write_text("{")
    assert "the tokenizer of" in refused(1, "eval", folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refused(1, "inspect", folder)
    (folder / "config.json").write_text("{")
    assert "config.json' is not a valid JSON file" in refused(1, "generate", folder, "--prompt", "x")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert "bad.gguf" in refused(1, "inspect", tmp_path / "bad.gguf")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(2, "inspect", tmp_path / "empty")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("prune X --out Y --nested --keep 0.7", "keep must be left out with --nested, which removes nothing; got 0.7"),
        ("prune X --out Y --nested --precision auto", "precision must be left out with --nested"),
        ("prune X --out Y --shares 0.5", "shares must be given with --nested only; got '0.5'"),
        ("prune X --out Y --mask Z --keep 0.7", "keep must be left out with --mask, which says what stays; got 0.7"),
        ("prune X --out Y --mask Z --multiple 8", "multiple must be left out with --mask"),
        ("prune X --out Y.gguf --max-shard-size 5GB", "max_shard_size must be left out where --out is a GGUF file"),
        ("inspect X --threshold 0.8", "threshold must be given with --redundancy only; got 0.8"),
        ("inspect X --text Z", "text must be given with --redundancy only; got 'Z'"),
        ("bench X --against Y --keep 0.5", "keep must be left out with --against or --width"),
        ("bench X --width 0.5 --seed 0", "seed must be left out with --against or --width"),
        ("diagnose X Y --prompts-file Z --prompts 3", "prompts must be left out with --prompts-file; got 3"),
        ("diagnose X Y --parts hierarchy --new-tokens 3", "new_tokens must be left out where --parts lacks drift"),
        ("diagnose X Y --parts drift --shots 1", "shots must be left out where --parts lacks tasks; got 1"),
        ("recover X --teacher Y --out Z --rank 4", "rank must be left out unless --mode is lora; got 4"),
        ("compare X --criteria obs", "criteria must be left out unless --preset has grid; got 'obs'"),
        ("tune X --plain", "gated must be left out with MODEL, which has its own; got False"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(command: str, said: str) -> None:
    """At once, whatever its value: also the default's."""
    assert said in refused(2, *command.split())


def test_help_tells_the_exit_codes() -> None:
    text = " ".join(call("--help").stdout.split())
    assert "0 done" in text and "2 a mistake in what was asked for" in text and "1 it could not be done" in text


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}], ids=["ascii", "C"]
)
def test_screens_that_cannot_show_everything(
    environment: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Prompts, texts and folders with letters that the encoding lacks, tables too wide for the screen, error lines."""
    narrow = {**environment, "COLUMNS": "40"}
    names = "LC_ALL" not in environment  # else the command cannot know what the bytes of a name mean, and says so
    place = Path(shutil.copytree(tiny_checkpoint, tmp_path / ("modèle-λ" if names else "model")))
    generated = process("generate", place, "--prompt", "naïve λ 語", "--new-tokens", "4", environment=narrow)
    pruned = process("prune", place, "--out", tmp_path / "é", *SMALL, environment=narrow)
    for done, code in ((generated, 0), (pruned, 0 if names else 2)):
        assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr.decode()[-2000:]
        done.stdout.decode("ascii")
    assert b"na?ve ? ?" in generated.stdout
    if names:
        assert checkpoint.verify(tmp_path / "é")["widths"] == [80] * 3
    else:
        assert b"out must be a path in UTF-8, and the locale of UTF-8" in pruned.stderr


def test_a_prompt_that_is_no_text(tiny_checkpoint: Path) -> None:
    assert "prompt must be UTF-8" in refused(2, "generate", tiny_checkpoint, "--prompt", "a\udcffb")


def test_names_in_brackets_are_no_markup(tiny_checkpoint: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(tiny_checkpoint, tmp_path / "a[/bold]"))
    assert "a[/bold]" in "".join(call("inspect", place).stdout.split())
    assert call("prune", place, "--out", tmp_path / "x", *SMALL).exit_code == 0
    assert "x[bold]" in refused(2, "eval", place, "--text", "x[bold]")


def test_a_tokenizer_is_asked_for_only_by_what_reads_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    place = without_tokenizer(tiny_checkpoint, tmp_path / "bare")
    result = call("prune", place, "--out", tmp_path / "out", *NO_TEXT)
    assert result.exit_code == 0, result.output
    assert "note: no tokenizer is saved: model" in result.stderr and "has no tokenizer" in result.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    message = refused(2, "prune", place, "--out", tmp_path / "y", *SMALL)
    assert "has no tokenizer, which is needed here: put its files there" in message
    call("prune", tiny_checkpoint, "--out", tmp_path / "with", *NO_TEXT)
    AutoTokenizer.from_pretrained(tmp_path / "with")  # what is there is saved along


def test_out_is_checked_before_any_work(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyprune.model.loading.load_model", lambda *a, **k: pytest.fail("too late"))
    monkeypatch.setattr("pyprune.model.loading.load_tokenizer", lambda *a, **k: pytest.fail("too late"))
    (tmp_path / "notes.txt").write_text("x")
    for verb in (("prune",), ("recover", "--teacher", tiny_checkpoint)):
        start = (verb[0], tiny_checkpoint, *verb[1:], "--overwrite", "--out")
        assert "holds notes.txt" in refused(2, *start, tmp_path)
        assert "max_shard_size must be" in refused(2, *start, tmp_path / "x", "--max-shard-size", "5")
        with monkeypatch.context() as inside:
            inside.chdir(tmp_path)
            assert "out must not be the working folder" in refused(2, *start, ".")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_shards(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = call("prune", tiny_checkpoint, "--out", tmp_path / "x", *NO_TEXT, "--max-shard-size", "100KB")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file()
    assert call("verify", tmp_path / "x").exit_code == 0


def test_a_lack_of_memory_is_one_line(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: object, **options: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr("pyprune.model.loading.load_model", load)
    assert "DefaultCPUAllocator" in refused(
        1,
        "eval",
        tiny_checkpoint,
    )


def test_a_model_beside_itself_keeps_its_weights(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL is quantised, what it is held against is not, though both have one name."""
    seen: list[object] = []
    real = commands._load

    def load(model: str, dtype: str, device: str, weights: str | None, width: float | None = None) -> object:
        seen.append(weights)
        return real(model, dtype, device, weights, width)

    monkeypatch.setattr(commands, "_load", load)
    both = tiny_checkpoint, "--against", tiny_checkpoint
    done = call("generate", *both, "--weights", "int8", "--prompt", "a", "--json")
    assert done.exit_code == 0, done.output
    assert seen == [None, "int8"] and len(json.loads(done.stdout)["texts"]) == 2
