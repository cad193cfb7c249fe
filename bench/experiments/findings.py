"""What pruning does to a model's representations, to its text and to its tasks: many ways to prune, each diagnosed.

    python -m bench.experiments.findings --text FILE [--minutes 60]     run what is missing, write the document
    python -m bench.experiments.findings --show                         write the document from what is there

Calibrates on the first half of the text and diagnoses on the second. The result, NAME.json in bench/results, is written
after every row: a run that was stopped goes on where it was. The document is docs/findings.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import by_line
from bench.experiments.findings_text import document
from pyprune import prune
from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.cli.screen import Bars, err, out, verb
from pyprune.evaluation.diagnose import Budget, diagnose
from pyprune.model.loading import DEMO, load_model, load_tokenizer

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
DOCUMENT = HERE.parent / "docs" / "findings.md"
# (label, criterion, repair, allocation): several criteria, with and without repair.
WAYS = (
    ("wanda", "wanda", "none", "uniform"),
    ("wanda + least squares", "wanda", "least-squares", "uniform"),
    ("flap", "flap", "none", "global"),
    ("flap + bias", "flap", "bias", "global"),
    ("taylor", "taylor-neuron", "none", "uniform"),
    ("taylor + least squares", "taylor-neuron", "least-squares", "uniform"),
    ("random + least squares", "random", "least-squares", "uniform"),
)
KEEPS = (0.8, 0.7, 0.5)
SPACES = ("embedding", "logits", "centred", "probabilities")
DRIFT = ("instantaneous", "accumulated", "exposure", "growth")
Facts = dict[str, Any]


def rows() -> Iterator[tuple[str, float, str, str, str]]:
    """Label, share kept, criterion, repair and allocation of every row, way by way: where a run is stopped, the ways
    that are there have all shares.
    """
    for label, *way in WAYS:
        for keep in KEEPS:
            yield label, keep, *way


def key_of(label: str, keep: float) -> str:
    return f"{label} at {keep:g}"


def _figure(found: Facts) -> Facts:
    """A mean or a value with its interval."""
    return {k: found[k] for k in ("mean", "value", "interval") if k in found}


def _drift(found: Facts) -> Facts:
    means = {k: {"probabilities": _figure(found[k]["probabilities"])} for k in DRIFT}
    repetition = _figure(found["repetition_difference"])
    return {**means, "median_divergence": found["median_divergence"], "repetition_difference": repetition}


def _task(task: Facts) -> Facts:
    metric, deviations = task["metrics"][task["main"]], task.get("deviations")
    figures = {k: _figure(metric[k]) for k in ("dense", "difference", "retained") if metric.get(k)}
    return {
        "name": task["name"],
        "metric": {"chance": metric["chance"], **figures},
        "deviations": deviations
        and {k: {"total_variation": _figure(deviations[k]["total_variation"])} for k in ("full", "restricted")},
    }


def slim(facts: Facts) -> Facts:
    """What of a diagnosis `findings_text` reads; `pyprune diagnose` gives all of it."""
    hierarchy = facts["hierarchy"]
    spaces: Facts = {k: {"cosine": _figure(hierarchy[k]["cosine"])} for k in SPACES}
    spaces["probabilities"] |= {k: _figure(hierarchy["probabilities"][k]) for k in ("kl", "top1")}
    amplification = {k: hierarchy["amplification"][k] for k in ("exact", "estimate")}
    perplexity = {k: hierarchy["perplexity"][k] for k in ("dense", "pruned")}
    orders = [{"tasks": o["tasks"], "difference": _figure(o["difference"])} for o in facts["tasks"]["orders"]]
    return {
        "hierarchy": {**spaces, "amplification": amplification, "perplexity": perplexity},
        "drift": {name: _drift(found) for name, found in facts["drift"].items()},
        "tasks": {"tasks": [_task(task) for task in facts["tasks"]["tasks"]], "orders": orders},
        "seconds": facts["seconds"],
        "peak_bytes": facts["peak_bytes"],
    }


def _load(path: Path, settings: Facts) -> Facts:
    if not path.exists():
        return {"settings": settings, "machine": machine.facts(), "rows": {}}
    found: Facts = json.loads(path.read_text(encoding="utf-8"))
    check(found["settings"] == settings, "settings", f"be those of {path.name}, or --name another", settings)
    return found


def _write(path: Path, facts: Facts) -> None:
    with new_file(path) as temporary:
        temporary.write_text(by_line.dumps(facts, ("rows",)), encoding="utf-8")


def _write_document(facts: Facts) -> None:
    DOCUMENT.parent.mkdir(exist_ok=True)
    with new_file(DOCUMENT) as temporary:
        temporary.write_text(document(facts), encoding="utf-8")


@verb
def main(
    model: Annotated[str, typer.Option(help="The dense model.")] = DEMO,
    text: Annotated[str | None, typer.Option(help="A text; default: CPython's prose.")] = None,
    tokens: Annotated[int, typer.Option(help="To calibrate on.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 1024,
    diagnosed: Annotated[int, typer.Option(help="Tokens to compare representations on, in windows of 256.")] = 4096,
    minutes: Annotated[float, typer.Option(help="Start no row later than this.")] = float("inf"),
    name: Annotated[str, typer.Option(help="Of the results file.")] = "findings",
    show: Annotated[bool, typer.Option("--show", help="Run nothing; write the document.")] = False,
) -> None:
    """Diagnose every way to prune, and say what holds."""
    path = RESULTS / f"{name}.json"
    if show:
        check(path.is_file(), "name", "be that of a result", name)
        _write_document(json.loads(path.read_text(encoding="utf-8")))
        out.print(f"wrote {DOCUMENT.name}")
        return
    started = time.perf_counter()
    tokenizer = load_tokenizer(model)
    (first, calibrated), (second, judged) = (load_text(text and f"{text}:{half}", half) for half in ("first", "second"))
    calibration = token_windows(tokenizer, first, tokens, window)
    windows = token_windows(tokenizer, second, diagnosed, 256)
    budget = Budget(items=None)
    settings = {
        "model": "SmolLM2-135M-Instruct" if model == DEMO else Path(model).name,
        "calibration": {"text": calibrated, "tokens": calibration.numel(), "window": window},
        "text": {"text": judged, "tokens": windows.numel(), "window": 256},
        "budget": vars(budget),
    }
    facts = _load(path, settings)
    dense = load_model(model)
    for label, keep, method, repair, allocation in rows():
        key = key_of(label, keep)
        if key in facts["rows"] or time.perf_counter() - started > 60 * minutes:
            continue
        err.print(key)
        pruned = load_model(model)
        begun = time.perf_counter()
        with Bars() as bars:
            spread = f"{allocation}:multiple=16"
            report = prune(pruned, keep, method, allocation=spread, repair=repair, text=calibration, progress=bars)
            seconds = time.perf_counter() - begun
            found = diagnose(dense, pruned, tokenizer, windows, budget, progress=bars).to_json()
        facts["rows"][key] = {
            "label": label,
            "keep": keep,
            "kept": report.mask.keep,
            "method": method,
            "compensate": repair,
            "allocation": allocation,
            "commit": machine.facts()["commit"],
            "prune_seconds": seconds,
            **slim(found),
        }
        _write(path, facts)
        del pruned
    _write_document(facts)


if __name__ == "__main__":
    typer.run(main)
