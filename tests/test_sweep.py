"""The sweep over Transformers' model types, in short: one type of each kind, and that it tells faults."""

import importlib
import json
from pathlib import Path

import pytest
import torch

import pyprune
from pyprune import UnsupportedModelError

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1]))
    build, sweep = (importlib.import_module(f"bench.families.{name}") for name in ("build", "sweep"))
    tables = importlib.import_module("bench.tables.families")

# One of each: plain; experts in tensors, transposed, without a gate, beside a dense layer; a text tower; an encoder-
# decoder; a hybrid; a shared block; an activation of its own; inputs of tokens in layers.
WORKS = ["llama", "mixtral", "gpt_oss", "deepseek_v3", "qwen2_vl", "gemma4", "t5", "nemotron_h", "zamba", "apertus",
         "gemma3n_text", "qwen3_next", "llama4_text"]  # fmt: skip
REFUSED = {
    "mamba": "no FFN neurons to prune",
    "bitnet": "ffn_sub_norm, a norm over all neurons",
    "rwkv": "feed_forward",
}


@pytest.fixture(scope="module")
def classes():
    return {kind: name for kind, name, _ in sweep.types()}


@pytest.mark.parametrize("kind", WORKS)
def test_works(kind, classes):
    assert sweep.judged(kind, classes[kind]) == ("works", "")


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_with_what_was_found(kind, classes):
    state, message = sweep.judged(kind, classes[kind])
    assert state == "refused" and REFUSED[kind] in message


def test_all_types_are_of_three_tables(classes):
    assert len(classes) > 250 and {table for _, _, table in sweep.types()} == set(sweep.TABLES)


def test_faults_are_told(monkeypatch, classes):
    def wrong(model, **_):
        model.lm_head.weight.data.fill_(float("nan"))

    monkeypatch.setattr(pyprune, "prune", wrong)
    assert sweep.judged("llama", classes["llama"]) == ("CRASH", "prune: AssertionError: logits are not finite")

    def late(model, path):
        raise UnsupportedModelError("too late")

    monkeypatch.setattr(pyprune, "prune", lambda model, **_: None)
    monkeypatch.setattr(pyprune, "save", late)
    assert sweep.judged("llama", classes["llama"]) == ("refused late (save)", "too late")

    def broken(model, **_):
        raise KeyError("x")

    monkeypatch.setattr(pyprune, "prune", broken)
    assert sweep.judged("llama", classes["llama"]) == ("CRASH", "prune: KeyError: 'x'")
    monkeypatch.setattr(build, "MOST", 10)
    assert sweep.judged("llama", classes["llama"])[0] == "not built"


def test_the_result_meets_the_goals():
    """Of the last whole run: nothing crashes, nothing is refused late, and every refusal says what can be done."""
    types = json.loads(sweep.RESULT.read_text(encoding="utf-8"))["types"]
    states = [found["state"] for found in types.values()]
    assert states.count("works") >= 140
    assert not [kind for kind, found in types.items() if found["state"].startswith(("CRASH", "refused late"))]
    told = ("cannot be pruned by neurons", "no FFN neurons to prune", "may be added to", "pass the part that you mean")
    refused = {kind: found["message"] for kind, found in types.items() if found["state"] == "refused"}
    assert not [kind for kind, message in refused.items() if not any(words in message for words in told)]


def test_the_result_is_json(tmp_path, capsys):
    sweep.main(["gpt2", "mamba"], tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    found["types"]["x"] = {"state": "CRASH", "message": "", "class": "X", "table": "causal"}
    found["types"]["y"] = {"state": "not built", "message": "", "class": "Y", "table": "image-text"}
    (line,) = tables.works_table({"families": found})
    assert "Of 3 types of Transformers" in line and "[1 work](docs/families.md) (1 causal, 0 image-text)" in line
    assert "1 are refused before anything changes, 1 crash, and 0 are no decoders" in line
    assert found["counts"] == {"works": 1, "refused": 1} and found["types"]["gpt2"]["table"] == "causal"
    assert "works" in capsys.readouterr().out
    torch.set_num_threads(1)
