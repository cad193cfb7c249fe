"""What each type of task lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .facts import Facts
from .parts import Figure, Section, Table, figure
from .plots import dot, height, legend, mark, percents, rail, rows
from .svg import DENSE, PRUNED, SOFT, VIOLET
from .words import clip, estimate, listed, percent, plural, short

# kind -> what a reader calls it, in the order in which kinds are told
KINDS = {
    "choice": "multiple choice",
    "categorical": "answer tokens",
    "retrieval": "retrieval",
    "generation": "generation",
}
# Of `analysis.deviation`, as a reader calls them.
_NAMES = {"total_variation": "total variation", "cosine": "1 - cos", "kl": "KL, nats", "js": "Jensen-Shannon, nats"}

Tasks = list[dict[str, Any]]


def main_of(task: dict[str, Any]) -> dict[str, Any]:
    """The metric that stands for a task."""
    found: dict[str, Any] = task["metrics"][task["main"]]
    return found


def retained(facts: Facts) -> dict[str, float]:
    """Kind of task -> the share kept of what dense has above chance, over the tasks where it has.

    Sums over sums: of a task that dense hardly answers the share alone may be anything.
    """
    found: dict[str, float] = {}
    tasks: Tasks = facts.part("diagnose", "tasks", "tasks") or []
    for kind in KINDS:
        known = [entry for task in tasks if task["kind"] == kind and (entry := main_of(task)).get("retained")]
        if known:
            dense, pruned = (
                sum(e[who]["value"] - (e.get("chance") or 0.0) for e in known) for who in ("dense", "pruned")
            )
            found[kind] = pruned / dense
    return found


def _label(task: dict[str, Any]) -> str:
    return clip(task["name"], 22)


def _scores(tasks: Tasks) -> Figure:
    worst = max(tasks, key=lambda task: (main_of(task).get("difference") or {"value": 0.0})["value"])
    entry = main_of(worst)
    caption = (
        f"Most is lost on {clip(worst['name'], 40)} ({worst['main']}): from {estimate(entry['dense'], percent)} to "
        f"{estimate(entry.get('pruned'), percent)}; bars are 95% intervals over {plural(worst['items'], 'item')}."
    )

    def paint(axes: Any) -> None:
        rows(axes, [_label(task) for task in tasks])
        for i, task in enumerate(tasks):
            one = main_of(task)
            dot(axes, one["dense"], i - 0.14, DENSE, None if i else "dense")
            dot(axes, one.get("pruned"), i + 0.14, PRUNED, None if i else "pruned")
        guessed = [(i, main_of(task).get("chance")) for i, task in enumerate(tasks)]
        known = [(i, c) for i, c in guessed if c]
        for turn, (i, chance) in enumerate(known):
            axes.vlines(chance, i - 0.33, i + 0.33, color=SOFT, linewidth=1.6, label=None if turn else "chance")
        axes.set_xlim(left=0)
        percents(axes, "x")
        axes.set_xlabel("score")
        legend(axes)

    return figure("scores", "Scores, dense and pruned", caption, paint, height(len(tasks)))


def _retained(tasks: Tasks) -> Figure | None:
    known = [task for task in tasks if main_of(task).get("retained")]
    if not known:
        return None
    order = sorted(known, key=lambda task: -main_of(task)["retained"]["value"])
    best, worst = (main_of(order[i])["retained"] for i in (0, -1))
    caption = (
        f"Of what dense scores above chance, {clip(order[0]['name'], 30)} keeps {estimate(best, percent)} and "
        f"{clip(order[-1]['name'], 30)} {estimate(worst, percent)}."
        if len(order) > 1
        else f"Of what dense scores above chance, {clip(order[0]['name'], 30)} keeps {estimate(best, percent)}."
    )

    def paint(axes: Any) -> None:
        rows(axes, [_label(task) for task in order])
        for i, task in enumerate(order):
            entry = main_of(task)["retained"]
            rail(axes, i, min(1.0, entry["value"]), max(1.0, entry["value"]))
            dot(axes, entry, i, PRUNED, None if i else "kept (95%)")
        mark(axes, 1.0, "all of it", colour=DENSE)
        axes.set_xlim(left=min(0.0, *(main_of(task)["retained"]["value"] for task in order)))
        percents(axes, "x")
        axes.set_xlabel("kept of the score above chance")
        legend(axes)

    return figure("retained", "What each type of task keeps", caption, paint, height(len(order)))


def _deviations(task: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    found = task.get("deviations") or {}
    full, few = found.get("full"), found.get("restricted")
    return (
        {"full": full, "restricted": few}
        if full and few and "total_variation" in full and "total_variation" in few
        else None
    )


def _categorical(tasks: Tasks) -> Figure | None:
    known = [(task, found) for task in tasks if (found := _deviations(task)) is not None]
    if not known:
        return None
    pairs = [tuple(found[side]["total_variation"] for side in ("restricted", "full")) for _, found in known]
    parts = [
        f"{clip(task['name'], 30)} {short(few['mean'])} against {short(full['mean'])}"
        for (task, _), (few, full) in zip(known, pairs, strict=True)
    ]
    less = sum(few["mean"] < full["mean"] for few, full in pairs)
    caption = (
        f"Total variation among the answers alone, renormalised, against that of the whole vocabulary: "
        f"{listed(parts)}; they move less in {less} of {plural(len(pairs), 'task')}."
    )

    def paint(axes: Any) -> None:
        rows(axes, [_label(task) for task, _ in known])
        for i, (few, full) in enumerate(pairs):
            dot(axes, full, i - 0.13, DENSE, None if i else "whole vocabulary")
            dot(axes, few, i + 0.13, VIOLET, None if i else "answers")
        axes.set_xlim(left=0)
        axes.set_xlabel("total variation against dense")
        legend(axes)

    return figure("categorical", "The answers among themselves", caption, paint, height(len(known)))


def _subspaces(tasks: Tasks) -> Table | None:
    cells = [
        (task["name"], name, estimate(found["restricted"][key]), estimate(found["full"][key]))
        for task in tasks
        if (found := _deviations(task)) is not None
        for key, name in _NAMES.items()
        if key in found["restricted"] and key in found["full"]
    ]
    columns = ("task", "deviation", ">answers", ">whole vocabulary")
    return Table("Answers and whole vocabulary", columns, cells, folded=True) if cells else None


def _cells(entry: dict[str, Any]) -> list[str]:
    return [estimate(entry.get(key), percent) for key in ("dense", "pruned", "difference", "retained")]


_COLUMNS = (">dense", ">pruned", ">lost", ">kept of what was above chance")


def _tables(tasks: Tasks, orders: list[dict[str, Any]]) -> Iterator[Table]:
    main = [
        (task["name"], KINDS.get(task["kind"], task["kind"]), f"{task['items']:,}", *_cells(main_of(task)))
        for task in tasks
    ]
    yield Table("Tasks, 95 % intervals", ("task", "type", ">items", *_COLUMNS), main)
    if orders:
        verdicts = {"first": 0, "second": 1}
        cells = [
            (
                *order["tasks"][:2],
                f"{order['facts']:,}",
                percent(order["first"]),
                percent(order["second"]),
                estimate(order["difference"], percent),
                order["tasks"][verdicts[order["suffers_more"]]] if order["suffers_more"] in verdicts else "undecided",
            )
            for order in orders
        ]
        columns = ("asked as", "and as", ">facts", ">first keeps", ">second keeps", ">difference", "suffers more")
        yield Table("The same facts, asked in two ways", columns, cells)
    subspaces = _subspaces(tasks)
    if subspaces is not None:
        yield subspaces
    every = [(task["name"], name, *_cells(entry)) for task in tasks for name, entry in task["metrics"].items()]
    yield Table("Every metric", ("task", "metric", *_COLUMNS), every, folded=True)


def section(facts: Facts) -> Section | None:
    """Tasks; None where none was asked."""
    found = facts.part("diagnose", "tasks")
    if not found or not found["tasks"]:
        return None
    tasks: Tasks = found["tasks"]
    figures = [figure for figure in (_scores(tasks), _retained(tasks), _categorical(tasks)) if figure is not None]
    shares = retained(facts)
    lead = "Each task is asked of both models, item by item."
    if shares:
        told = [f"{KINDS[kind]} {percent(share)}" for kind, share in shares.items()]
        lead += f" Kept of what dense scores above chance: {listed(told)}."
    return Section("tasks", "Tasks", lead, tuple(figures), tuple(_tables(tasks, found.get("orders", []))))
