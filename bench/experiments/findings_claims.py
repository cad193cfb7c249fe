"""Four claims on what pruning does, each judged row by row with intervals.

A claim holds in a row where the 95 % interval of what it says lies on its side of the line, fails where it lies on
the other, and is open where the interval has the line in it. The claims are those of He et al. 2026, arXiv 2603.24652,
which pruned layers and single weights of larger models; here neurons of small ones are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
# For each row what it says of a claim, as plain numbers: (value, how it is written).
Measures = dict[str, tuple[float | None, str]]
HOLDS, FAILS, OPEN = "holds", "fails", "open"


def majority(verdicts: Sequence[str]) -> str:
    """What more than half of the rows say; else open."""
    return next((word for word in (HOLDS, FAILS) if 2 * verdicts.count(word) > len(verdicts)), OPEN)


def verdict(interval: Sequence[float] | None, line: float = 0.0) -> str:
    """Whether an interval lies above the line, below it, or across."""
    if interval is None:
        return OPEN
    low, high = interval
    return HOLDS if low > line else FAILS if high < line else OPEN


def number(found: dict[str, Any], pattern: str = "{:.3f}") -> str:
    """A mean, or a value, with its interval."""
    value = found.get("mean", found.get("value"))
    if value is None:
        return "-"
    interval = found.get("interval")
    if interval is None:
        return pattern.format(value)
    return f"{pattern.format(value)} ({pattern.format(interval[0])} to {pattern.format(interval[1])})"


def _apart(above: dict[str, Any], below: dict[str, Any], times: float) -> str:
    """Whether one mean is more than `times` another, by intervals that are apart."""
    if above["interval"] is None or below["interval"] is None:
        return OPEN
    if above["interval"][0] > times * below["interval"][1]:
        return HOLDS
    return FAILS if above["interval"][1] < times * below["interval"][0] else OPEN


def amplified(row: Row) -> tuple[str, list[str]]:
    """(a) 1 - cos of the probabilities is more than twice that of hidden states and of logits."""
    spaces = {name: row["hierarchy"][name]["cosine"] for name in ("embedding", "logits", "centred", "probabilities")}
    single = {_apart(spaces["probabilities"], spaces[name], 2.0) for name in ("embedding", "centred")}
    found = HOLDS if single == {HOLDS} else FAILS if FAILS in single else OPEN
    ratio = row["hierarchy"]["amplification"]
    shown = [number(spaces[name]) for name in spaces]
    return found, [*shown, *("-" if ratio[k] is None else f"{ratio[k]:.1f}" for k in ("exact", "estimate"))]


def accumulates(row: Row) -> tuple[str, list[str]]:
    """(b) after the same number of tokens, probabilities deviate more along the model's own text than along dense's."""
    found, shown = [], []
    for name in ("greedy", "sampled"):
        drift = row["drift"][name]
        found.append(verdict(drift["accumulated"]["probabilities"]["interval"]))
        shown += [number(drift["instantaneous"]["probabilities"]), number(drift["accumulated"]["probabilities"])]
        shown += [number(drift[key]["probabilities"]) for key in ("exposure", "growth")]
    return found[0], shown  # greedy: sampling shows the same by other texts


def categorical(row: Row) -> list[Row]:
    return [task for task in row["tasks"]["tasks"] if task["deviations"]]


def _single(task: Row) -> bool:
    """Whether its answers are single tokens, all of them at one position of the vocabulary's distribution."""
    return bool(task["name"] != "choice")


def _known(task: Row) -> bool:
    """Whether the dense model answers above chance."""
    metric = task["metric"]
    return bool(metric["dense"]["interval"][0] > metric["chance"])


def stable(row: Row) -> tuple[str, list[str]]:
    """(c) over single-token answers, renormalised, probabilities deviate less than over the whole vocabulary."""
    found, shown = set(), []
    for task in categorical(row):
        full, restricted = (task["deviations"][space]["total_variation"] for space in ("full", "restricted"))
        if _single(task) and _known(task):
            found.add(_apart(full, restricted, 1.0))
        metric = task["metric"]
        shown += [number(full), number(restricted), f"{metric['dense']['value']:.1%}"]
        shown.append(number(metric["difference"], "{:.1%}"))
    return (HOLDS if found == {HOLDS} else FAILS if FAILS in found else OPEN), shown


def generation_first(row: Row) -> tuple[str, list[str]]:
    """(d) of what the dense model knows above chance, generation keeps a smaller share than choice by likelihood."""
    tasks = {task["name"]: task for task in row["tasks"]["tasks"]}
    shown = []
    for name in ("choice", "generation", "retrieval"):
        metric = tasks[name]["metric"] if name in tasks else {}
        shown.append(number(metric["retained"], "{:.0%}") if metric.get("retained") else "-")
    pair = [order for order in row["tasks"]["orders"] if order["tasks"] == ["choice", "generation"]]
    if not pair:
        return OPEN, [*shown, "-"]
    return verdict(pair[0]["difference"]["interval"]), [*shown, number(pair[0]["difference"], "{:.0%}")]


def _spaces(row: Row) -> Measures:
    names = {"hidden": "embedding", "centred logits": "centred", "probabilities": "probabilities"}
    found = {shown: (row["hierarchy"][name]["cosine"]["mean"], "{:.3f}") for shown, name in names.items()}
    return {**found, "amplified": (row["hierarchy"]["amplification"]["exact"], "{:.2f}x")}


def _steps(row: Row) -> Measures:
    return {
        f"{text}, {what}": (row["drift"][text][key]["probabilities"]["mean"], "{:.3f}")
        for text in ("greedy", "sampled")
        for what, key in (("one step", "instantaneous"), ("accumulated", "accumulated"), ("exposure", "exposure"))
    }


def _answers(row: Row) -> Measures:
    found: Measures = {}
    for task in filter(_known, categorical(row)):
        for shown, space in (("all tokens", "full"), ("answers", "restricted")):
            mean = task["deviations"][space]["total_variation"]["mean"]
            found[f"{task['name']}: {shown}"] = mean, "{:.3f}"
        found[f"{task['name']}: accuracy lost"] = task["metric"]["difference"]["value"], "{:.1%}"
    return found


def _of_options(rows: Sequence[Row]) -> str:
    """(c) what whole options say, which are no subspace of one distribution."""
    found = []
    for task in (task for row in rows for task in categorical(row) if not _single(task) and _known(task)):
        found.append(_apart(*(task["deviations"][space]["total_variation"] for space in ("full", "restricted")), 1.0))
    return f"over whole options the deviation is smaller in {found.count(HOLDS)} of {len(found)} rows"


def _retained(row: Row) -> Measures:
    tasks = {task["name"]: task["metric"].get("retained") for task in row["tasks"]["tasks"]}
    found = {name: tasks.get(name) for name in ("choice", "generation", "retrieval")}
    return {name: (kept["value"] if kept else None, "{:.0%}") for name, kept in found.items()}


def _exposed(rows: Sequence[Row]) -> str:
    """(b) whether single predictions err more on the pruned model's own text."""
    intervals = [row["drift"]["greedy"]["exposure"]["probabilities"]["interval"] for row in rows]
    above, below = sum(verdict(i) == HOLDS for i in intervals), sum(verdict(i) == FAILS for i in intervals)
    return f"on its own greedy text a single prediction errs more in {above} of {len(rows)} rows, less in {below}"


@dataclass(frozen=True)
class Claim:
    """One claim: its words, the columns that bear on it, the judge, the numbers that are summed up by share, and what
    else is to be said of all rows.
    """

    letter: str
    words: str
    rule: str
    columns: tuple[str, ...]
    judge: Callable[[Row], tuple[str, list[str]]]
    measures: Callable[[Row], Measures]
    aside: Callable[[Sequence[Row]], str] = lambda rows: ""


CLAIMS = (
    Claim(
        "a",
        "Embedding and logit deviations stay small while probability deviation grows",
        "holds where 1 - cos of the probabilities is more than twice that of the hidden state in front of the LM head "
        "and of the centred logits (less their mean, which no softmax sees), intervals apart; it fails where one of "
        "the two is clearly not so. Amplification is the median over tokens of the ratio to the centred logits, "
        "measured and to second order.",
        (">hidden", ">logits", ">centred logits", ">probabilities", ">amplified", ">estimate"),
        amplified,
        _spaces,
    ),
    Claim(
        "b",
        "Deviation accumulates over the steps of a generation",
        "holds where, over the last quarter of the steps of greedy text, 1 - cos of the probabilities is larger along "
        "the model's own text than along the dense model's. Most of it is that the texts have parted: two equal models "
        "would deviate as well behind different texts, so this says that generation leaves the dense model's path, not "
        "by itself that what it writes is worse. `exposure` compares both models on the pruned one's text: by how much "
        "a single prediction's error is larger there than on the dense model's text, over all steps. `growth` is what "
        "it gains from the first quarter to the last, on the dense model's text.",
        tuple(
            f">{text}, {what}"
            for text in ("greedy", "sampled")
            for what in ("one step", "accumulated", "exposure", "growth")
        ),
        accumulates,
        _steps,
        _exposed,
    ),
    Claim(
        "c",
        "The categorical subspace stays stable",
        "holds where total variation over answers of one token, renormalised, is smaller than over the whole "
        "vocabulary at the same position, intervals apart, for every such task that the dense model answers above "
        "chance (`choice, letters`: 25 %, `yesno`: 50 %, after solved examples); it fails where it is clearly larger "
        "for one. What a task says of a model that answers no better than chance is shown, and not judged. So is "
        "`choice`: its answers are whole options after the question alone, whose likelihoods, renormalised over four, "
        "stand beside the vocabulary at the options' first token, which is no subspace of it.",
        (),  # made from the tasks
        stable,
        _answers,
        _of_options,
    ),
    Claim(
        "d",
        "Generation suffers before multiple choice",
        "holds where, on the same facts, generation retains a smaller share of what was above chance than multiple "
        "choice by length-normalised likelihood; the last column is choice minus generation, paired.",
        (">choice", ">generation", ">retrieval", ">choice - generation"),
        generation_first,
        _retained,
    ),
)
