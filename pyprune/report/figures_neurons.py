"""Importance and redundancy of neurons: how the loss depends on them, and how many say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .facts import Facts
from .parts import Figure, Section, Table, figure
from .plots import height, legend, log_scale, mark, number_axis, percents, rows, shares_up_to_one
from .svg import DENSE, FAST, PRUNED, SOFT, VIOLET
from .words import clip, percent, plural, short

Layers = list[dict[str, Any]]


def _sensitivity(layers: Layers) -> Figure:
    means = [layer["sensitivity"]["mean"] for layer in layers]
    most = max(layers, key=lambda layer: layer["sensitivity"]["mean"])
    least = min(layers, key=lambda layer: layer["sensitivity"]["mean"])
    caption = (
        f"The loss depends most on a neuron of layer {most['layer']} ({short(most['sensitivity']['mean'])} on average) "
        f"and least on one of layer {least['layer']} ({short(least['sensitivity']['mean'])})."
    )

    def paint(axes: Any) -> None:
        numbers = [layer["layer"] for layer in layers]
        lines = (("p90", "90th percentile", SOFT), ("mean", "mean", PRUNED), ("median", "median", FAST))
        for key, label, colour in lines:
            values = [layer["sensitivity"][key] for layer in layers]
            axes.plot(numbers, values, color=colour, marker="o", markersize=3.2, label=label)
        log_scale(axes, [layer["sensitivity"][key] for layer in layers for key, _, _ in lines] + means)
        axes.set_ylabel("sensitivity of a neuron")
        number_axis(axes, "layer", len(layers))
        legend(axes)

    return figure("sensitivity", "Importance, by layer", caption, paint)


def _top_tenth(layers: Layers, whole: dict[str, Any]) -> Figure:
    most = max(layers, key=lambda layer: layer["sensitivity"]["top_tenth"])
    caption = (
        f"The tenth of neurons that matter most hold {percent(whole['sensitivity']['top_tenth'])} of all sensitivity, "
        f"in layer {most['layer']} {percent(most['sensitivity']['top_tenth'])} of its own; if all mattered alike it "
        f"would be 10%."
    )

    def paint(axes: Any) -> None:
        shares = [layer["sensitivity"]["top_tenth"] for layer in layers]
        axes.bar([layer["layer"] for layer in layers], shares, 0.8, color=PRUNED, label="held by the top tenth")
        mark(axes, 0.1, "all alike", "y")
        axes.set_ylabel("share of the layer's sum")
        axes.set_ylim(0, max(0.12, min(1.0, 1.08 * max(shares))))
        percents(axes)
        number_axis(axes, "layer", len(layers))
        legend(axes)

    return figure("top-tenth", "How few neurons carry a layer", caption, paint)


def _uniqueness(layers: Layers, whole: dict[str, Any], threshold: float) -> Figure:
    least = min(layers, key=lambda layer: layer["uniqueness"])
    caption = (
        f"{percent(whole['uniqueness'])} of {whole['neurons']:,} neurons are unique: of two whose activations have a "
        f"cosine of {threshold:g} or more, one counts"
    )
    caption += f"; in layer {least['layer']}, {percent(least['uniqueness'])}." if least["uniqueness"] < 1 else "."

    def paint(axes: Any) -> None:
        numbers, shares = ([layer[key] for layer in layers] for key in ("layer", "uniqueness"))
        axes.plot(numbers, shares, color=PRUNED, marker="o", markersize=3.2, label="unique neurons")
        mark(axes, whole["uniqueness"], "all layers", "y")
        axes.set_ylabel("share of the layer's neurons")
        shares_up_to_one(axes, [*shares, whole["uniqueness"]])
        number_axis(axes, "layer", len(layers))
        legend(axes)

    return figure("uniqueness", "Unique neurons, by layer", caption, paint)


def _curve(layers: Layers, whole: dict[str, Any]) -> Figure:
    curve = whole["curve"]
    first, last = curve[0], curve[-1]
    caption = (
        f"Unique are {percent(first['uniqueness'])} where a cosine of {first['threshold']:g} makes two neurons alike, "
        f"and {percent(last['uniqueness'])} where it takes {last['threshold']:g}; the band spans the layers."
    )

    def paint(axes: Any) -> None:
        places = [point["threshold"] for point in curve]
        by_layer = [[point["uniqueness"] for point in layer["curve"]] for layer in layers]
        if all(len(values) == len(places) for values in by_layer):
            low, high = ([choose(column) for column in zip(*by_layer, strict=True)] for choose in (min, max))
            axes.fill_between(places, low, high, color=PRUNED, alpha=0.18, linewidth=0, label="from layer to layer")
        axes.plot(places, [point["uniqueness"] for point in curve], color=PRUNED, marker="o", label="all layers")
        axes.set_xlabel("cosine from which two are alike")
        axes.set_ylabel("unique neurons")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        shares_up_to_one(axes, [value for values in [*by_layer, [p["uniqueness"] for p in curve]] for value in values])
        legend(axes)

    return figure("thresholds", "Uniqueness over thresholds", caption, paint)


def _highest(whole: dict[str, Any], threshold: float) -> Figure:
    counts = whole["highest"]
    total, bins = max(1, sum(counts)), len(counts)
    above = sum(n for i, n in enumerate(counts) if (i + 0.5) / bins >= threshold) / total
    half = next(i for i in range(bins) if 2 * sum(counts[: i + 1]) >= total)
    caption = (
        f"Half of the neurons have a highest similarity to another of at most {(half + 1) / bins:g}; "
        f"{percent(above) if above else 'none'} lie beyond the threshold of {threshold:g}."
    )

    def paint(axes: Any) -> None:
        shares = [n / total for n in counts]
        axes.bar([(i + 0.5) / bins for i in range(bins)], shares, 0.92 / bins, color=PRUNED)
        mark(axes, threshold, "threshold")
        axes.set_xlim(0, 1)
        axes.set_xlabel("highest cosine to another neuron")
        axes.set_ylabel("neurons")
        percents(axes)
        legend(axes)

    return figure("similarity", "How alike the nearest neuron is", caption, paint)


def _after(found: dict[str, Any]) -> Figure | None:
    after = sorted(found["after"].items(), key=lambda entry: -entry[1]["sensitivity"])
    if not after:
        return None
    (best, at_best), (worst, at_worst) = after[0], after[-1]
    caption = (
        f"Keeping {percent(found['keep'])} of every layer, {clip(best, 30)} keeps most of the sensitivity "
        f"({percent(at_best['sensitivity'])})"
    )
    if len(after) > 1:
        caption += f" and {clip(worst, 30)} least ({percent(at_worst['sensitivity'])})"
    before = found["all"]["uniqueness"]
    caption += f"; {percent(at_best['uniqueness'])} of what {clip(best, 30)} keeps is unique, before {percent(before)}."

    def paint(axes: Any) -> None:
        rows(axes, [clip(name, 20) for name, _ in after])
        for i, (_, left) in enumerate(after):
            axes.barh(i, left["sensitivity"], 0.5, color=PRUNED, label=None if i else "sensitivity kept")
            shown = None if i else "unique of what stays"
            axes.plot(left["uniqueness"], i, "D", color=VIOLET, markersize=6, label=shown)
        mark(axes, before, "unique before", colour=DENSE)
        axes.set_xlim(0, 1.03)
        percents(axes, "x")
        legend(axes)

    return figure("criteria", "What each criterion leaves", caption, paint, height(len(after)))


def _table(layers: Layers) -> Table:
    columns = (
        ">layer",
        ">neurons",
        ">unique",
        ">clusters",
        ">neurons in them",
        ">never active",
        ">sensitivity",
        ">of the top tenth",
    )
    cells = [
        (
            str(layer["layer"]),
            f"{layer['neurons']:,}",
            percent(layer["uniqueness"]),
            *(f"{layer['clusters'][key]:,}" for key in ("count", "neurons")),
            f"{layer['dead']:,}",
            short(layer["sensitivity"]["mean"]),
            percent(layer["sensitivity"]["top_tenth"]),
        )
        for layer in layers
    ]
    return Table("Every layer", columns, cells, folded=True)


def _figures(found: dict[str, Any]) -> Iterator[Figure]:
    layers, whole, threshold = found["layers"], found["all"], found["threshold"]
    yield _sensitivity(layers)
    yield _top_tenth(layers, whole)
    yield _uniqueness(layers, whole, threshold)
    yield _curve(layers, whole)
    yield _highest(whole, threshold)
    after = _after(found)
    if after is not None:
        yield after


def section(facts: Facts) -> Section | None:
    """Importance and redundancy; None without `redundancy.json`."""
    found = facts.part("redundancy", "redundancy")
    if found is None:
        return None
    whole = found["all"]
    groups = whole["clusters"]
    lead = (
        f"Of {whole['neurons']:,} neurons, {groups['neurons']:,} belong to {plural(groups['count'], 'cluster')} of "
        f"near duplicates and {whole['dead']:,} never fire, on {found['windows'] * found['window']:,} tokens of "
        f"{found['text']}."
    )
    return Section("neurons", "Importance and redundancy", lead, tuple(_figures(found)), (_table(found["layers"]),))
