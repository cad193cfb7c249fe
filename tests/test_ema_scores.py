"""The experiment on smoothed scores: a whole run on a tiny model, resumed, and its comparisons by hand."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
TEXTS = """mr,ref
"name[The Vaults], eatType[pub]","The Vaults is a pub."
"name[Cotto], area[riverside]","Cotto is by the riverside."
"name[Zizzi], eatType[bar]","Zizzi is a bar."
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The experiment in small: two cells, a tiny model, and a folder with texts."""
    pytest.importorskip("sacrebleu")
    monkeypatch.syspath_prepend(str(ROOT))
    experiment = importlib.import_module("bench.experiments.ema_scores")
    run = importlib.import_module("bench.experiments.finetune.run")
    recipes = importlib.import_module("bench.experiments.finetune.recipes")
    for name in ("devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text(TEXTS, encoding="utf-8")
    sizes = {"layers": 2, "hidden_size": 16, "heads": 2, "width": 32, "vocabulary": 300, "inputs": 2, "new_tokens": 3}
    tiny = recipes.Recipe(dense_steps=2, steps=4, dense_batch=2, decode=2, warmup=0.0, cooldown=0.25, **sizes)
    for module in (experiment, run):
        monkeypatch.setattr(module, "recipe", lambda *place: tiny)
    for name, value in {"PLACES": ((2, 4),), "KEEPS": (0.5,)}.items():
        monkeypatch.setattr(experiment, name, value)
    kept = {"movement": experiment.FORMS["movement"], "GUM": experiment.FORMS["GUM"]}
    monkeypatch.setattr(experiment, "FORMS", kept)
    return SimpleNamespace(experiment=experiment, table=importlib.import_module("bench.tables.ema_scores"))


def run(bench: SimpleNamespace, folder: Path, seeds: int = 2) -> dict[str, Any]:
    out = folder / "ema.json"
    bench.experiment.main(
        data=folder, seeds=seeds, places=1, models_folder=folder / "models", out_file=out, show_only=False
    )
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@pytest.mark.filterwarnings("ignore:.*never moved")
def test_a_whole_run_and_its_going_on(bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(bench, tmp_path)
    assert list(found["runs"]) == [r.key for r in bench.experiment.grid(2)] and len(found["runs"]) == 2 * (1 + 1 + 6)
    assert str(tmp_path) not in json.dumps(found)
    values = [r["perplexity"] for r in found["runs"].values()]
    assert all(math.isfinite(v) and v > 1 for v in values) and len(set(values)) > 4
    methods = {a: {r["form"]: r["method"] for r in found["runs"].values() if r["family"] == a} for a in ("GUM",)}
    assert methods["GUM"]["last batch"] == "gum:beta=0,similarity_beta=0"
    lines = "\n".join(bench.table.ema_scores_table(found))
    assert "| GUM | EMA | " in lines and "| random | no score | " in lines and "2 seeds, 16 runs" in lines
    monkeypatch.setattr(bench.experiment.Experiment, "__call__", None)  # a run measured twice would fail
    assert run(bench, tmp_path)["runs"] == found["runs"]


def test_bad_input(bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        run(bench, tmp_path, seeds=1)
    assert "seeds must be at least 2" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "ema.json").write_text(json.dumps({"dense": {}, "runs": {}, "setting": {"rate": 1.0}}))
    with pytest.raises(typer.Exit):
        run(bench, tmp_path)
    assert "out must hold runs of the same setting" in " ".join(capsys.readouterr().err.split())


def test_ratios_are_paired_by_seed_and_by_hand(bench: SimpleNamespace) -> None:
    """Three seeds, two cells: EMA has 0.9, 0.8, 0.9 and 0.9, 0.9, 0.8 of the last batch's perplexity."""
    runs = []
    for cell, shares in (((2, 40, 0.5), (0.9, 0.8, 0.9)), ((8, 40, 0.5), (0.9, 0.9, 0.8))):
        for seed, share in enumerate(shares):
            last = 4.0 + seed
            for form, value in (("last batch", last), ("EMA", last * share)):
                place = dict(zip(("batch", "steps", "keep"), cell, strict=True))
                runs.append({"family": "GUM", "form": form, "seed": seed, "perplexity": value, **place})
    (found,) = bench.table.answers({"runs": dict(enumerate(runs))})
    logs = [math.log(0.9), math.log(0.9 * 0.8) / 2, math.log(0.9 * 0.8) / 2]
    mean = sum(logs) / 3
    half = 4.303 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert found["ratio"]["mean"] == pytest.approx(math.exp(mean))
    assert found["ratio"]["high"] == pytest.approx(math.exp(mean + half)) and found["ratio"]["high"] < 1
    assert (found["verdict"], found["cells"], found["better"], found["worse"]) == ("better", 2, 0, 0)
    assert found["base"] == "last batch"
    # The sum is what the last batch was: the EMA has the same ratio to it, and it has 1 to the last batch.
    more = [{**r, "form": "sum"} for r in runs if r["form"] == "last batch"]
    same, ema, last = sorted(bench.table.answers({"runs": dict(enumerate([*runs, *more]))}), key=lambda a: a["form"])[
        ::-1
    ]
    assert (same["form"], same["ratio"]["mean"], same["verdict"]) == ("sum", 1.0, "no difference shown")
    assert {ema["base"], last["base"]} == {"last batch", "sum"} and ema["ratio"] == last["ratio"]
    # A seed that lacks a cell does not count; with one seed left there is no interval.
    few = [r for r in runs if r["seed"] == 0 or r["batch"] == 2]
    (found,) = bench.table.answers({"runs": dict(enumerate(few))})
    assert found["ratio"]["n"] == 1 and found["verdict"] == "one seed"
