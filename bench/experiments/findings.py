"""What pruning does to a model's representations, to its text and to its tasks: many ways to prune, each diagnosed.

    python -m bench.experiments.findings --text FILE [--minutes 60]     run what is missing, write the document
    python -m bench.experiments.findings --text FILE --model GGUF --dtype bfloat16 --name findings-gemma
    python -m bench.experiments.findings --text FILE --checkpoint LABEL=FOLDER --name findings-recovered
    python -m bench.experiments.findings --show                         write the document from what is there

Calibrates on the first half of the text and diagnoses on the second; checkpoints are diagnosed as they are. The result,
NAME.json in bench/results, is written after every row: a run that was stopped goes on where it was. The document,
docs/findings.md, is of all results that are there (`BLOCKS`).
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import by_line
from bench.experiments.findings_text import document
from pyprune import prune
from pyprune.base import machine
from pyprune.base.errors import check, check_choice
from pyprune.base.files import new_file
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.cli.screen import Bars, err, out, verb
from pyprune.evaluation.diagnose import Budget, diagnose
from pyprune.model.checkpoint import read_config
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
# Results that the document is of, in its order; and that of the attempts at a strategy for generation.
BLOCKS = {
    "findings": "SmolLM2-135M",
    "findings-gemma": "Gemma 3 270M",
    "findings-recovered": "SmolLM2-135M after recovery",
}
STRATEGY = "findings-generation.json"
SPACES = ("embedding", "logits", "centred", "probabilities")
DRIFT = ("instantaneous", "accumulated", "exposure", "growth")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One row to diagnose: pruned in the way `method`, `compensate`, `allocation`, or the checkpoint in `folder`."""

    label: str
    keep: float
    method: str = ""
    compensate: str = "none"
    allocation: str = "uniform"
    folder: str = ""

    @property
    def key(self) -> str:
        return f"{self.label} at {self.keep:g}"


def ways(chosen: Sequence[str], keeps: Sequence[float]) -> list[Work]:
    """Every row to prune, way by way: where a run is stopped, the ways that are there have all shares.

    Args:
        chosen: labels of `WAYS`; none for all.
        keeps: shares kept.

    Raises:
        InputError: a label that is not there, or a share that is not above 0 and below 1.
    """
    for label in chosen:
        check_choice(label, "way", [way[0] for way in WAYS])
    for keep in keeps:
        check(0 < keep < 1, "keep", "lie between 0 and 1", keep)
    return [Work(way[0], keep, *way[1:]) for way in WAYS if not chosen or way[0] in chosen for keep in keeps]


def given(checkpoints: Sequence[str]) -> list[Work]:
    """Rows for checkpoints that were pruned before, each as LABEL=FOLDER.

    Raises:
        InputError: no label, or a folder whose config does not say how it was pruned.
    """
    found = []
    for word in checkpoints:
        label, _, folder = word.partition("=")
        check(bool(label and folder), "checkpoint", "be LABEL=FOLDER", word)
        provenance: Facts = (getattr(read_config(folder), "pyprune", None) or {}).get("provenance") or {}
        check(bool(provenance), "checkpoint", "hold a model that pyprune pruned", Path(folder).name)
        made = provenance["config"]
        how = made["method"], made["compensate"], made["allocation"]
        found.append(Work(label, made["keep"], *how, folder))
    keys = [work.key for work in found]
    check(len(set(keys)) == len(keys), "checkpoint", "have a label of its own for each share kept", keys)
    return found


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


def command(module: str) -> str:
    """What was typed, without folders, and without a limit of time, which decides only how much of it is done."""
    words = shlex.join(["python", "-m", f"bench.experiments.{module}", *(_bare(word) for word in sys.argv[1:])])
    return re.sub(r" --minutes[ =]\S+", "", words)


def _bare(word: str) -> str:
    return re.sub(r"[^=]*/", "", word.rstrip("/"))


def _load(path: Path, settings: Facts) -> Facts:
    """The result so far, or a new one.

    Raises:
        InputError: one of other settings, or of another CPU: rows of one table are of one machine.
    """
    here = machine.facts()
    if not path.exists():
        return {"settings": settings, "command": command("findings"), "machine": here, "rows": {}}
    found: Facts = json.loads(path.read_text(encoding="utf-8"))
    check(found["settings"] == settings, "settings", f"be those of {path.name}, or --name another", settings)
    check(found["machine"]["cpu"] == here["cpu"], "CPU", f"be that of {path.name}, or --name another", here["cpu"])
    return found


def _write(path: Path, facts: Facts) -> None:
    with new_file(path) as temporary:
        temporary.write_text(by_line.dumps(facts, ("rows",)), encoding="utf-8")


def blocks(folder: Path) -> list[tuple[str, str, Facts]]:
    """Title, file and result of what is there, in the order of `BLOCKS`."""
    paths = [(title, folder / f"{name}.json") for name, title in BLOCKS.items()]
    return [(title, path.name, json.loads(path.read_text("utf-8"))) for title, path in paths if path.is_file()]


def text_of(folder: Path) -> str:
    """docs/findings.md from the results in a folder."""
    attempts = folder / STRATEGY
    return document(blocks(folder), json.loads(attempts.read_text("utf-8")) if attempts.is_file() else None)


def write_document() -> None:
    """docs/findings.md from what is there."""
    DOCUMENT.parent.mkdir(exist_ok=True)
    with new_file(DOCUMENT) as temporary:
        temporary.write_text(text_of(RESULTS), encoding="utf-8")
    out.print(f"wrote {DOCUMENT.name}")


def _pruned(work: Work, dense: Any, source: str, dtype: str, text: Any, progress: Bars) -> tuple[Any, Facts]:
    """The model of a row, and what its result says of how it came to be."""
    if work.folder:
        pruned = load_model(work.folder, dtype)
        made = pruned.config.pyprune
        recovery = [{k: step[k] for k in ("text", "tokens", "steps")} for step in made.get("recovery", [])]
        kept = pruned.config.intermediate_size / dense.config.intermediate_size
        read = {k: made["provenance"][k] for k in ("text", "tokens")}
        return pruned, {"kept": kept, "calibration": read, "recovery": recovery}
    pruned = load_model(source, dtype)
    begun = time.perf_counter()
    how = {"allocation": f"{work.allocation}:multiple=16", "repair": work.compensate}
    report = prune(pruned, work.keep, work.method, text=text, progress=progress, **how)  # type: ignore[arg-type]
    return pruned, {"kept": report.mask.keep, "prune_seconds": time.perf_counter() - begun}


@verb
def main(
    model: Annotated[str, typer.Option(help="The dense model.")] = DEMO,
    text: Annotated[str | None, typer.Option(help="A text; default: CPython's prose.")] = None,
    tokens: Annotated[int, typer.Option(help="To calibrate on.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 1024,
    diagnosed: Annotated[int, typer.Option(help="Tokens to compare representations on, in windows of 256.")] = 4096,
    prompts: Annotated[int, typer.Option(help="Texts to continue.")] = 24,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    keep: Annotated[list[float] | None, typer.Option(help="Shares kept.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Only these ways, by label.")] = None,
    checkpoint: Annotated[list[str] | None, typer.Option(help="LABEL=FOLDER: in place of ways to prune.")] = None,
    minutes: Annotated[float, typer.Option(help="Start no row later than this.")] = float("inf"),
    name: Annotated[str, typer.Option(help="Of the results file.")] = "findings",
    show: Annotated[bool, typer.Option("--show", help="Run nothing; write the document.")] = False,
) -> None:
    """Diagnose every way to prune, and say what holds."""
    check_choice(name, "name", BLOCKS)
    if show:
        write_document()
        return
    started = time.perf_counter()
    work = given(checkpoint) if checkpoint else ways(way or (), keep or KEEPS)
    tokenizer = load_tokenizer(model)
    (first, calibrated), (second, judged) = (load_text(text and f"{text}:{half}", half) for half in ("first", "second"))
    calibration = token_windows(tokenizer, first, tokens, window)
    windows = token_windows(tokenizer, second, diagnosed, 256)
    budget = Budget(prompts=prompts, items=None)
    read = {"text": calibrated, "tokens": calibration.numel(), "window": window}
    settings = {
        "model": "SmolLM2-135M-Instruct" if model == DEMO else Path(model).name,
        "dtype": dtype,
        "calibration": None if checkpoint else read,
        "text": {"text": judged, "tokens": windows.numel(), "window": 256},
        "budget": vars(budget),
    }
    path = RESULTS / f"{name}.json"
    facts = _load(path, settings)
    dense = load_model(model, dtype)
    for row in work:
        if row.key in facts["rows"] or time.perf_counter() - started > 60 * minutes:
            continue
        err.print(row.key)
        with Bars() as bars:
            pruned, made = _pruned(row, dense, model, dtype, calibration, bars)
            found = diagnose(dense, pruned, tokenizer, windows, budget, progress=bars).to_json()
        how = {k: v for k, v in vars(row).items() if k != "folder"}
        facts["rows"][row.key] = {**how, **made, "commit": machine.facts()["commit"], **slim(found)}
        _write(path, facts)
        del pruned
    write_document()


if __name__ == "__main__":
    typer.run(main)
