"""A checkpoint pruned from its shards: to the bit as in memory, after every interruption; bad input by name."""

from __future__ import annotations

import errno
import json
import runpy
import shutil
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model
from moe_cases import MIXTURES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from pyprune import CheckpointError, InputError, UnsupportedModelError, prune, prune_checkpoint
from pyprune.base.files import sha256_of
from pyprune.base.ranks import Ranks
from pyprune.cli.commands import app
from pyprune.model import checkpoint, loading
from pyprune.model.shard_writer import Planned, ShardWriter
from pyprune.model.shards import WEIGHTS
from pyprune.pruning.streaming.state import State, folder_of

MAGNITUDE = {"method": "magnitude-l2-both", "repair": None}
WANDA = {"method": "wanda", "repair": "least-squares:target=auto"}


def dense(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint of several shards, of a width that is odd in every sense."""
    width = {"gpt2": "n_inner"}.get(family, "intermediate_size")
    model = make_model(family, **{width: 91, **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return dense(tmp_path / "dense")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def stream(source: Path, out: Path, text: Any = None, **how: Any) -> Any:
    return prune_checkpoint(source, out, 0.6, text=text, **{"max_shard_size": "20KB", **MAGNITUDE, **how})


def same(folder: Path, other: Path) -> bool:
    a, b = tensors(folder), tensors(other)
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, other)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and configs[0] == configs[1]


CASES = [
    ("llama", torch.float32, True, {**WANDA, "spill": True}),
    ("llama", torch.bfloat16, False, {**WANDA, "method": "obs"}),
    ("llama", torch.bfloat16, True, MAGNITUDE),
    ("llama", torch.float32, False, {**WANDA, "allocation": "global:multiple=5"}),
    ("llama", torch.float32, True, {"method": "flap", "repair": "bias", "sequential": False}),
    ("gpt2", torch.float32, True, {"method": "wanda", "repair": "refit", "spill": True}),
    ("gemma2", torch.float32, True, WANDA),
]


@pytest.mark.parametrize(
    ("family", "dtype", "tied", "how"), CASES, ids=lambda c: str(c) if isinstance(c, str) else None
)
def test_the_same_as_in_memory(
    family: str, dtype: torch.dtype, tied: bool, how: Any, tmp_path: Path, more_ids: torch.Tensor
) -> None:
    source = dense(tmp_path / "dense", family, dtype, tie_word_embeddings=tied)
    how = {"allocation": "uniform:multiple=7", **how}
    text = None if how is MAGNITUDE else more_ids
    spill = tmp_path / "spill" if how.pop("spill", False) else None
    model = loading.load_model(str(source), "auto")
    made = prune(model, 0.6, text=text, **how)
    checkpoint.save(model, tmp_path / "memory")
    report = stream(source, tmp_path / "out", text, spill=spill, **how)
    assert same(tmp_path / "out", tmp_path / "memory")
    assert report.mask == made.mask and report.layers == made.layers
    counts = ("parameters_before", "parameters_after", "bytes_before", "bytes_after", "tokens")
    assert all(getattr(report, name) == getattr(made, name) for name in counts)
    manifest = checkpoint.verify(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and {s.name for s in shards} <= manifest["files"].keys()
    assert all(sum(t.nbytes for t in load_file(s).values()) <= 20_000 or len(load_file(s)) == 1 for s in shards)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    left = {p.name for p in tmp_path.iterdir()} - {"dense", "memory", "out", "spill"}
    assert not left and not (spill and list(spill.iterdir()))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("how", [WANDA, {**WANDA, "spill": True, "allocation": "global:multiple=5"}, MAGNITUDE])
def test_a_run_goes_on_from_wherever_it_was_stopped(
    how: Any, source: Path, tmp_path: Path, more_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"allocation": "uniform:multiple=7", **how}
    how["spill"] = tmp_path / "spill" if how.get("spill") else None
    text = None if how["method"] != "wanda" else more_ids
    stream(source, tmp_path / "whole", text, **how)
    save, every = State.save, []
    monkeypatch.setattr(State, "save", lambda state: (save(state), every.append(1)))
    stream(source, tmp_path / "out", text, **how)
    shutil.rmtree(tmp_path / "out")
    assert len(every) >= 7
    layers: list[int] = []

    def stopping(state: State) -> None:
        """Stop before the state says what was done, and the next time behind it."""
        layers.append(state.progress.layers)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        save(state)
        if left[0] == 1 and len(layers) % 2:
            left[0] = 0
            raise Killed

    monkeypatch.setattr(State, "save", stopping)
    for stop in range(1, 2 * len(every)):
        left = [2 if stop > 1 else 1]
        try:
            stream(source, tmp_path / "out", text, **how)
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    assert layers == sorted(layers) and stop > 4
    assert same(tmp_path / "out", tmp_path / "whole") and not folder_of(tmp_path / "out").exists()


def begun(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """A run that was stopped after its second layer."""
    with monkeypatch.context() as patch:
        note = State.note_layer

        def stopping(state: State, layer: int, *what: Any) -> None:
            note(state, layer, *what)
            if layer == 1:
                raise Killed

        patch.setattr(State, "note_layer", stopping)
        with pytest.raises(Killed):
            stream(source, out, **how)


def test_other_settings_are_refused_by_name(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    begun(source, out, monkeypatch)
    with pytest.raises(InputError, match=r"method must be 'magnitude-l2-both', as in the run .* begun in .*stream"):
        stream(source, out, method="magnitude-l1-both")
    with pytest.raises(InputError, match="max_shard_size must be 20000"):
        stream(source, out, max_shard_size="30KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match=f"{shard.name} must be"):
        stream(source, out)
    kept = State(out, json.loads((folder_of(out) / "state.json").read_text())["settings"])
    with pytest.raises(InputError, match="two processes"):
        State(out, kept.settings)
    kept.close()
    (folder_of(out) / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json is damaged: remove"):
        stream(source, out)
    assert not out.exists()


def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"not finished: .*; what is done is kept in .*: once that is mended") as told:
            stream(source, out, max_shard_size="1GB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert told.value.errno == errno.EFBIG and not out.exists()
    done = json.loads((folder_of(out) / "state.json").read_text())["progress"]
    assert done["layers"] == 1
    opened = ShardWriter._open
    first: list[int] = []
    monkeypatch.setattr(
        ShardWriter, "_open", lambda self, file, number: (first.append(number), opened(self, file, number))
    )
    stream(source, out, max_shard_size="1GB")
    assert first == [done["tensors"]]
    stream(source, tmp_path / "whole", max_shard_size="1GB")
    assert same(out, tmp_path / "whole")
    assert checkpoint.verify(out)["files"] == checkpoint.verify(tmp_path / "whole")["files"]


def test_shards_are_hashed_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces may lie in memory that the next one overwrites; a write that fails leaves no thread at work in it."""
    shape, room = (3, 1 << 18), torch.empty(1 << 18, dtype=torch.int64)
    writer = ShardWriter(tmp_path, [Planned("a", torch.int64, shape), Planned("b", torch.int64, (5,))], 10**9)

    def pieces() -> Iterator[Tensor]:
        for i in range(shape[0]):
            yield room.copy_(torch.arange(i, i + shape[1]))

    writer.write("a", pieces())
    writer.write("b", [torch.arange(5)])
    writer.finish()
    assert writer.hashes == {WEIGHTS: sha256_of(tmp_path / WEIGHTS)}
    found = load_file(tmp_path / WEIGHTS)
    assert torch.equal(found["a"][2], torch.arange(2, 2 + shape[1])) and torch.equal(found["b"], torch.arange(5))
    working, busy = threading.Event(), threading.Event()

    class Slow:
        def update(self, raw: bytes) -> None:
            busy.set()
            time.sleep(0.2)
            working.set()

    class Full:
        def write(self, rest: memoryview) -> int:
            assert busy.wait(10)  # so both go on at once
            raise OSError(errno.ENOSPC, "no space")

    writer = ShardWriter(tmp_path, [Planned("a", torch.int64, shape)], 10**9)
    monkeypatch.setattr(writer, "_stream", Full())
    monkeypatch.setattr(writer, "_digest", Slow())
    with pytest.raises(OSError, match="no space"):
        writer.write("a", pieces())
    assert working.is_set() and writer.done == 0


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _missing(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _truncated(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])


def _altered(folder: Path, change: Any) -> None:
    for shard in sorted(folder.glob("*.safetensors")):
        held = load_file(shard)
        if "model.layers.1.mlp.up_proj.weight" in held:
            held["model.layers.1.mlp.up_proj.weight"] = change(held["model.layers.1.mlp.up_proj.weight"])
            save_file(held, shard, metadata={"format": "pt"})


def _nan(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 2] = torch.nan
    return weight


def _outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**said, "model.norm.weight": "../model.safetensors"})


def _unindexed(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={k: v for k, v in said.items() if k != "model.layers.1.mlp.up_proj.weight"})


BROKEN = {
    "a shard is missing": (_missing, CheckpointError, "safetensors is missing from"),
    "a shard is truncated": (_truncated, CheckpointError, "must have .* bytes; it has"),
    "another dtype": (lambda f: _altered(f, torch.Tensor.bfloat16), CheckpointError, "up_proj.weight is BF16 in"),
    "another shape": (lambda f: _altered(f, lambda w: w[:90].clone()), CheckpointError, r"\(90, 32\) in the file"),
    "not finite": (
        lambda f: _altered(f, _nan),
        InputError,
        "NaN or infinity in model.layers.1.mlp.up",
    ),
    "outside": (_outside, CheckpointError, "puts model.norm.weight into '../model.safetensors'"),
    "not in the index": (_unindexed, CheckpointError, "lacks 1 tensors in the folder, the first is .*1.mlp.up_proj"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={}), UnsupportedModelError, "is quantised"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case: str, source: Path, tmp_path: Path) -> None:
    spoil, kind, said = BROKEN[case]
    spoil(source)
    with pytest.raises(kind, match=said):
        stream(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if case == "outside":
        with pytest.raises(CheckpointError, match="must name files in its own folder"):
            loading.load_model(str(source))


REFUSED = {
    "text": ({"text": {"self": 1.0}, **WANDA}, "text must be a file, builtin or token ids with stream"),
    "batches": ({"text": [{"input_ids": torch.ones(1, 8).long()}], **WANDA}, "text must be windows of token ids"),
    "allocation": ({"allocation": "sensitivity"}, "allocation must be uniform or global with stream"),
    "method": ({"method": "taylor-element"}, "method must need no gradients with stream"),
    "model": ({"model": "demo"}, "model must be a folder with a checkpoint of safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, source: Path, tmp_path: Path) -> None:
    how, said = REFUSED[case]
    with pytest.raises(InputError, match=said):
        stream(**{"source": how.pop("model", source), "out": tmp_path / "out", **how})  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_a_mixture_and_a_mask_of_another_model(tmp_path: Path, random_mask: Any, source: Path) -> None:
    name = sorted(MIXTURES)[0]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **MIXTURES[name])).save_pretrained(tmp_path / "experts")
    with pytest.raises(UnsupportedModelError, match="experts"):
        stream(tmp_path / "experts", tmp_path / "out")
    model = loading.load_model(str(source), "auto")
    mask = random_mask(model, (40, 24, 91))
    stream(source, tmp_path / "out", mask=mask)
    prune(model, mask=mask, repair=None)
    checkpoint.save(model, tmp_path / "memory")
    assert same(tmp_path / "out", tmp_path / "memory")
    other = dense(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="mask must belong to this model"):
        stream(other, tmp_path / "out2", mask=mask)
    assert not (tmp_path / "out2").exists()


BY_VERB = {
    "recover": ["--recover", "1"],
    "nested": ["--nested"],
    "dry_run": ["--dry-run"],
    "dtype": ["--dtype", "bfloat16"],
}


@pytest.mark.parametrize("name", BY_VERB)
def test_the_verb_refuses_what_cannot_be_streamed(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app, ["prune", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--stream", *BY_VERB[name]]
    )
    assert run.exit_code == 2 and f"{name} must be left out with --stream" in run.stderr
    assert not list(tmp_path.iterdir())


def test_the_verb_streams_by_itself(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(out: str, *more: str) -> Any:
        how = ["--method", "wanda", "--tokens", "2048", "--window", "128"]
        return CliRunner().invoke(app, ["prune", str(tiny_checkpoint), "--out", str(tmp_path / out), *how, *more])

    memory = verb("memory", "--text", "builtin", "--json")
    assert memory.exit_code == 0 and "note" not in memory.stderr
    monkeypatch.setattr("pyprune.cli.streamed.available", lambda: 1000)
    run = verb("out", "--json")
    assert run.exit_code == 0, run.stderr
    assert "larger than the free memory (0.0 GB); they are streamed" in run.stderr and "builtin" in run.stderr
    assert same(tmp_path / "out", tmp_path / "memory") and (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads(run.stdout)["widths"] == json.loads(memory.stdout)["widths"]
    assert "all are loaded" in verb("nested", "--nested", "--text", "builtin").stderr
    assert "spill must be left out" in verb("whole", "--no-stream", "--spill", str(tmp_path / "s")).stderr


def test_a_shard_altered_after_pruning(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("not one that can be read")
    stream(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "not one that can be read"
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=f"{shard.name} was altered"):
        checkpoint.verify(tmp_path / "out")


def test_a_shard_is_verified_in_small_pieces(tmp_path: Path) -> None:
    source = dense(tmp_path / "large", vocab_size=100_000)
    stream(source, tmp_path / "out", max_shard_size="1GB")
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 20 << 20
    tracemalloc.start()
    try:
        checkpoint.verify(tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_python_m_pyprune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pyprune", "verify", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pyprune", run_name="__main__")
    assert ended.value.code == 0 and "verify" in capsys.readouterr().out


def test_several_processes_of_one_group_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(Ranks, "joined", lambda: SimpleNamespace(several=True))
    with pytest.raises(InputError, match="prune_checkpoint must be called by one process alone"):
        prune_checkpoint(tmp_path, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_two_outputs_of_one_name_share_a_spill_folder(tmp_path: Path) -> None:
    kept = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        kept.append(State(tmp_path / place / "pruned", {"of": place}, tmp_path / "spill"))
        kept[-1].keep_states("hidden", 1, torch.ones(2, 3), False)
    files = [state.states_file("hidden", 1) for state in kept]
    assert files[0] != files[1] and all(file.is_file() for file in files)
    kept[1].remove()
    assert files[0].is_file() and not files[1].is_file()
    kept[0].close()
    (tmp_path / "a").rename(tmp_path / "moved")  # goes on where it is now, with the states that it has
    again = State(tmp_path / "moved" / "pruned", {"of": "a"}, tmp_path / "spill")
    assert again.resumed and again.states_file("hidden", 1) == files[0]
    again.close()


def test_a_head_of_its_own_is_not_dropped(tmp_path: Path) -> None:
    """By the config it is tied; Transformers keeps both where they differ, and a stream says so."""
    source = dense(tmp_path / "dense", "llama", torch.float32, tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight and lm_head.weight are one tensor by the config"):
        stream(source, tmp_path / "out", None, **MAGNITUDE)
