"""The demo's own steps, on a tiny model: what it writes, and that the fresh process really compares."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pyprune import InputError, PypruneError
from pyprune.base.progress import quiet
from pyprune.cli import demo
from pyprune.evaluation.diagnose import Budget
from pyprune.model import checkpoint, loading
from pyprune.speed import roofline


@pytest.fixture
def chatty(
    tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A tiny model whose tokenizer has a chat template; the demo made small enough for it."""
    folder = tmp_path / "tiny"
    loading.load_model(str(tiny_checkpoint)).save_pretrained(folder)
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat.save_pretrained(folder)
    monkeypatch.setattr(demo, "_WINDOW", 64)
    monkeypatch.setattr(demo, "_EVALUATION_TOKENS", 128)
    monkeypatch.setattr(demo, "_WHY_WINDOW", 32)
    monkeypatch.setattr(demo, "_SUITE_TOKENS", 512)
    monkeypatch.setattr(demo, "_BUDGET", Budget(2, 8, 4, items=4))
    monkeypatch.setattr(roofline, "buffer_bytes", lambda device: 1 << 24)
    return str(folder)


def test_demo_writes_what_it_says(chatty: str, tmp_path: Path) -> None:
    stages = []
    out = tmp_path / "out"
    result = demo.run_demo(out, 0.7, None, 256, lambda stage, done, total: stages.append(stage), chatty)
    assert {p.name for p in out.iterdir()} == {
        *(
            "dense",
            "pruned",
            "results.json",
            "diagnose.json",
            "redundancy.json",
            "suite.json",
            "demo.png",
            "report.html",
        )
    }
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "results.json").read_text())
    assert facts["dense"]["difference"] == facts["pruned"]["difference"] == 0
    assert facts["pruned"]["neurons"] == 3 * 64 and facts["dense"]["neurons"] == 3 * 96
    assert facts["pruned"]["file_bytes"] < facts["dense"]["file_bytes"]
    assert facts["calibration"]["text"] != facts["evaluation"]["text"]
    assert checkpoint.verify(out / "pruned")["widths"] == [64, 64, 64]
    diagnosis = json.loads((out / "diagnose.json").read_text())
    assert diagnosis["hierarchy"]["perplexity"]["pruned"] > 0 and diagnosis["text"] == facts["evaluation"]["text"]
    assert json.loads((out / "redundancy.json").read_text())["redundancy"]["text"] == facts["calibration"]["text"]
    judged = json.loads((out / "suite.json").read_text())["against"]
    assert list(judged["ratios"]) == ["python-docs", "python-source"] and judged["ratio"]["value"] > 0
    assert "<!doctype html>" in (out / "report.html").read_text(encoding="utf-8").lower()
    assert len(result.tables()) == 4
    assert "pruning layers" in stages and "measuring perplexity" in stages


def test_the_fresh_process_would_notice_other_weights(chatty: str, tmp_path: Path) -> None:
    model = loading.load_model(chatty)
    checkpoint.save(model, tmp_path / "x", loading.load_tokenizer(chatty))
    with torch.no_grad():
        model.model.norm.weight[0] += 1.0
    assert demo._reload(tmp_path / "x", model, torch.arange(3, 20)[None])["difference"] > 1e-3


def test_a_fresh_process_that_fails_is_an_error(chatty: str, tmp_path: Path) -> None:
    model: Any = loading.load_model(chatty)
    checkpoint.save(model, tmp_path / "x")  # no tokenizer
    with pytest.raises(PypruneError, match="a fresh process could not use"):
        demo._reload(tmp_path / "x", model, torch.arange(3, 20)[None])


def test_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="folder of the demo's own"):
        demo.run_demo(tmp_path, 0.7, None, 256, quiet)
    assert (tmp_path / "pruned" / "thesis.tex").read_text() == "mine"
    (tmp_path / "other").mkdir()
    for place in (tmp_path / "other" / "results.json", tmp_path / "file"):
        place.write_text("mine")
        with pytest.raises(InputError, match="folder of the demo's own"):
            demo.run_demo(tmp_path / "other" if place.name == "results.json" else place, 0.7, None, 256, quiet)
        assert place.read_text() == "mine"
