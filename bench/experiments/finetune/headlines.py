"""The questions of the experiment, each answered in one sentence from the comparisons and correlations of a result."""

from __future__ import annotations

from typing import Any

from .answers import NONE_SHOWN, ONE_SEED, PERPLEXITY, UNIQUE, comparisons, correlations, label
from .table import coefficient, difference

# (question, its comparisons as left and right)
QUESTIONS = (
    ("Is random as good as the established methods?", "random", ("magnitude", "movement", "l0")),
    ("Does GUM help?", "gum", ("random", "movement")),
)
EXPLAINS = "Does uniqueness explain it?"


def _against(entry: dict[str, Any]) -> str:
    """For example `BLEU no difference shown` or `perplexity worse, x1.05 [x1.03, x1.07]`."""
    name = label(entry["metric"])
    if entry["verdict"] == NONE_SHOWN:
        return f"{name} {NONE_SHOWN}"
    if entry["verdict"] == ONE_SEED:
        return f"{name} {difference(entry)} in one seed"
    return f"{name} {entry['verdict']}, {difference(entry)}"


def contradictions(found: list[dict[str, Any]]) -> str:
    """Where one task and model says better and another says worse, of the same metric."""
    words = []
    for what, metric in sorted({(entry["what"], entry["metric"]) for entry in found}):
        said = {e["verdict"] for e in found if (e["what"], e["metric"]) == (what, metric)}
        if {"better", "worse"} <= said:
            words.append(f"{what} by {label(metric)}")
    return f" Models contradict each other in {', '.join(words)}." if words else ""


def _compared(found: list[dict[str, Any]], left: str, rights: tuple[str, ...]) -> str:
    """Each model's verdicts, and where they contradict each other."""
    own = [e for e in found if e["left"] == left and e["right"] in rights and e["metric"] != UNIQUE]
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in own:
        place = places.setdefault((entry["task"], entry["model"]), {})
        place.setdefault(entry["right"], []).append(_against(entry))
    words = []
    for (task, model), place in places.items():
        each = (f"against {right} {', '.join(said)}" for right, said in place.items())
        words.append(f"*{task}, {model}*: {'; '.join(each)}")
    return f"{'. '.join(words)}.{contradictions(own)}"


def _explained(found: list[dict[str, Any]]) -> str:
    words = []
    for entry in found:
        within = entry["within"]
        if entry["of"] == UNIQUE and within["value"] is not None:
            shown = within["low"] > 0 or within["high"] < 0
            verdict = "" if shown else ", which shows nothing"
            quality = "low perplexity" if entry["metric"] == PERPLEXITY else label(entry["metric"])
            words.append(f"*{entry['task']}, {entry['model']}*: {quality} {coefficient(within)}{verdict}")
    if not words:
        return "Too few cells for a correlation."
    of = "Rank correlation of quality with the share of unique neurons, at one share kept, distilled or not"
    return f"{of}: {'; '.join(words)}."


def answers_table(results: dict[str, Any]) -> list[str]:
    """Lines for a document, from the results by file name."""
    return headlines(results["finetune"])


def headlines(result: dict[str, Any]) -> list[str]:
    """Lines for the top of a document: a bullet for each question."""
    found = comparisons(result)
    lines = [f"- **{question}** {_compared(found, left, rights)}" for question, left, rights in QUESTIONS]
    return [*lines, f"- **{EXPLAINS}** {_explained(correlations(result))}"]
