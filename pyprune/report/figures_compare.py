"""Many ways to prune, side by side, and what recovery gave back."""

from __future__ import annotations

from math import log
from textwrap import fill
from typing import Any

from ..evaluation.summary import Line, comparison_lines, judged_texts, perplexity_on
from .facts import Facts
from .figures import apart
from .parts import Figure, Section, Table, figure
from .plots import legend as add_legend
from .plots import log_scale, mark, number_axis, percents
from .svg import DENSE, FAST, PRUNED, SOFT, WARM
from .words import clip, model_name, percent, plural, short

# Perplexities above this many times the dense model's leave the picture.
_TALLEST = 8.0
# Of the picture's height, between two names.
_GAP = 0.068


def best(lines: list[Line]) -> tuple[float, Line, float] | None:
    """At the largest share removed that two settings share, the one of least perplexity: share, setting, perplexity."""
    keeps = sorted({point.keep for one in lines for point in one.points})
    for keep in keeps:
        there = [(point.perplexity, one, point) for one in lines for point in one.points if point.keep == keep]
        if len(there) > 1:
            perplexity, one, point = min(there, key=lambda entry: entry[0])
            return 1 - point.kept, one, perplexity
    return None


def _first_two(lines: list[Line], keep: float) -> list[tuple[float, str]]:
    """Perplexity and name of the two best settings at a share."""
    return sorted((point.perplexity, one.label) for one in lines for point in one.points if point.keep == keep)[:2]


def _caption(lines: list[Line], dense: float, hidden: list[str]) -> str:
    keeps = sorted({point.keep for one in lines for point in one.points}, reverse=True)
    told = []
    for keep in keeps:
        ahead = [f"{short(value)} ({clip(label, 30)})" for value, label in _first_two(lines, keep)]
        told.append(f"at {percent(1 - keep)} removed the least is {', then '.join(ahead)}")
    caption = f"Dense has {short(dense)}; {'; '.join(told)}"
    return caption + (f" (beyond the picture: {', '.join(clip(name, 24) for name in hidden)})." if hidden else ".")


def _figure(name: str, lines: list[Line], dense: float, text: str) -> Figure:
    top = _TALLEST * dense
    shown = [one for one in lines if one.points[0].perplexity <= top]
    shown = shown or lines
    hidden = [one.label for one in lines if one not in shown]
    removed = max(1 - point.kept for one in shown for point in one.points)

    def paint(axes: Any) -> None:
        seen = [dense, *(p.perplexity for one in shown for p in one.points)]
        log_scale(axes, [v for v in seen if v <= top] if min(seen) <= top else seen)
        axes.set_xlim(0, removed)
        low, high = axes.get_ylim()
        ends = []
        for one in shown:
            ours = one.group == "ours"
            xs, ys = [0.0, *(1 - p.kept for p in one.points)], [dense, *(p.perplexity for p in one.points)]
            style = {"color": PRUNED, "linewidth": 2.6, "zorder": 3} if ours else {"color": SOFT, "linewidth": 1.3}
            axes.plot(xs, ys, "--" if one.group == "grid" else "-", marker="o", markersize=3.2, **style)
            inside = [(x, y) for x, y in zip(xs, ys, strict=True) if y <= high]
            ends.append((one, inside[-1] if len(inside) == len(xs) else (inside[-1][0], high)))
        places = apart([log(min(y, high) / low) / log(high / low) for _, (_, y) in ends], _GAP)
        for (one, end), y in zip(ends, places, strict=True):
            ours = one.group == "ours"
            if end[1] < high:
                at = axes.transData.transform
                start = axes.transAxes.inverted().transform(at(end))
                axes.plot(
                    (start[0], 1.02),
                    (start[1], y),
                    color=PRUNED if ours else SOFT,
                    linewidth=0.6,
                    transform=axes.transAxes,
                    clip_on=False,
                )
            axes.text(
                1.03,
                y,
                clip(one.label, 18),
                transform=axes.transAxes,
                va="center",
                fontsize=9.5,
                color=PRUNED if ours else SOFT,
                weight="bold" if ours else "normal",
            )
        mark(axes, dense, "dense", "y", DENSE)
        percents(axes, "x")
        axes.set_xlabel("neurons removed")
        axes.set_ylabel("token perplexity")

    return figure(name, f"On {clip(text, 48)}", _caption(lines, dense, hidden), paint)


def section(facts: Facts) -> Section | None:
    """Settings side by side; None without `compare.json`."""
    found = facts.get("compare")
    if found is None:
        return None
    figures, tables = [], []
    for i, text in enumerate(judged_texts(found)):
        lines = comparison_lines(found, text)
        if not lines:
            continue
        figures.append(_figure(f"compare-{i}", lines, perplexity_on(found["dense"], text), text))
        keeps = sorted({point.keep for one in lines for point in one.points}, reverse=True)
        rows = []
        for one in lines:
            by_keep = {point.keep: point for point in one.points}
            cells = [_cell(by_keep.get(keep)) for keep in keeps]
            rows.append((one.label, one.group, *cells))
        columns = ("setting", "group", *(f">{percent(1 - keep)} removed" for keep in keeps))
        tables.append(Table(f"Perplexity on {clip(text, 60)}", columns, rows, folded=True))
    if not figures:
        return None
    model = model_name(found.get("model", "one model"))
    lead = f"{plural(len(found['rows']), 'run')} on {model}, each measured on the same texts"
    calibrated = found.get("calibration")
    if calibrated is not None:
        lead += f"; calibrated on up to {calibrated['tokens']:,} tokens of {found.get('text', 'a text')}"
    return Section("compare", "Other ways to prune", lead + ".", tuple(figures), tuple(tables))


def _cell(point: Any) -> str:
    if point is None:
        return "-"
    spread = f" ({short(point.lowest)} to {short(point.highest)})" if point.seeds > 1 else ""
    return short(point.perplexity) + spread


def recovered(facts: Facts) -> dict[str, tuple[float, float, float]]:
    """Text -> perplexity before recovery, after it, and of the dense model."""
    found = facts.get("recover")
    if found is None:
        return {}
    if "models" in found:
        by = [found["models"][name]["domains"] for name in ("pruned", "recovered", "dense")]
        return {text: tuple(domains[text]["value"] for domains in by) for text in by[-1]}
    return {t: (e["before"], e["after"], e["teacher"]) for t, e in found["perplexity"].items()}


def recovery(facts: Facts) -> Section | None:
    """What `pyprune recover` gave back; None without `recover.json`."""
    by_text = recovered(facts)
    if not by_text:
        return None
    name, (before, after, dense) = next(iter(by_text.items()))
    change = "falls" if after < before else "goes"
    told = f"On {clip(name, 40)}, perplexity {change} from {short(before)} to {short(after)}; dense has {short(dense)}."

    def paint(axes: Any) -> None:
        names = (("pruned", PRUNED), ("recovered", FAST), ("dense", DENSE))
        for turn, (label, colour) in enumerate(names):
            places = [i + (turn - 1) * 0.27 for i in range(len(by_text))]
            values = [entry[turn] for entry in by_text.values()]
            axes.bar(places, values, 0.25, color=colour, label=label)
            for place, value in zip(places, values, strict=True):
                axes.annotate(short(value), (place, value), (0, 2), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(by_text)), [fill(clip(text, 48), 17) for text in by_text])
        axes.set_ylabel("token perplexity")
        axes.margins(y=0.12)
        add_legend(axes)

    figures = [figure("recovered", "Before and after recovery", told, paint)]
    curve = _learning(facts.get("recover") or {})
    rows = [(text, *(short(value) for value in entry)) for text, entry in by_text.items()]
    table = Table("Token perplexity", ("text", ">pruned", ">recovered", ">dense"), rows)
    lead = "The pruned model was trained for a while, taught by the dense one."
    return Section("recovery", "Recovery", lead, tuple(figures + ([curve] if curve is not None else [])), (table,))


def _learning(found: dict[str, Any]) -> Figure | None:
    train, held, teacher = found.get("train") or [], found.get("held_out") or [], found.get("teacher_ce")
    if not train or len(held) < 2:
        return None
    least = min(entry["ce"] for entry in held)
    caption = (
        f"On held-out text the loss goes from {short(held[0]['ce'])} to {short(least)} nats a token in "
        f"{plural(train[-1]['step'], 'step')}"
    )
    caption += f"; the teacher has {short(teacher)}." if teacher is not None else "."

    # With no weight on the text itself nobody measured its cross entropy: what is trained on is the KL to the teacher.
    key, label = ("ce", "trained on") if any(t["ce"] for t in train) else ("loss", "KL to the teacher")

    def paint(axes: Any) -> None:
        axes.plot([t["step"] for t in train], [t[key] for t in train], color=SOFT, linewidth=1, label=label)
        axes.plot([m["step"] for m in held], [m["ce"] for m in held], color=FAST, marker="o", label="held out")
        if teacher is not None:
            mark(axes, teacher, "teacher", "y", WARM)
        axes.set_ylabel("nats a token")
        number_axis(axes, "step", len(train))
        add_legend(axes)

    return figure("learning", "Loss while recovering", caption, paint)
