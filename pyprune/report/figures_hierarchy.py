"""Where the pruned model differs: in hidden states, in logits, in probabilities (He et al. 2026, arXiv 2603.24652)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .facts import Facts
from .parts import Figure, Section, Table, figure
from .plots import legend, line, log_scale, number_axis, value_of
from .svg import DENSE, FAST, LIMIT, PRUNED, SOFT, VIOLET, WARM
from .words import estimate, percent, plural, short, span

Layers = list[dict[str, Any]]
_SERIES = {
    "hidden": ("hidden state", PRUNED),
    "ffn": ("its FFN", WARM),
    "rest": ("the rest", DENSE),
    "hidden_alone": ("the layer", PRUNED),
    "ffn_alone": ("its FFN", WARM),
}


def _of(layer: dict[str, Any], space: str) -> Any:
    return layer.get(space, {}).get("cosine")


def _largest(layers: Layers, space: str) -> dict[str, Any] | None:
    there = [layer for layer in layers if value_of(_of(layer, space)) is not None]
    return max(there, key=lambda layer: value_of(_of(layer, space)) or 0.0) if there else None


def _by_layer(name: str, title: str, caption: str, layers: Layers, spaces: Sequence[str]) -> Figure:
    def paint(axes: Any) -> None:
        numbers = [layer["layer"] for layer in layers]
        shown = [space for space in spaces if any(space in layer for layer in layers)]
        for space in shown:
            label, colour = _SERIES[space]
            line(axes, numbers, [_of(layer, space) for layer in layers], colour, label)
        log_scale(axes, [value_of(_of(layer, space)) for layer in layers for space in shown])
        axes.set_ylabel("1 - cos against dense")
        number_axis(axes, "layer", len(layers))
        legend(axes)

    return figure(name, title, caption, paint)


def _stream(layers: Layers) -> Figure:
    last, most = layers[-1], _largest(layers, "hidden")
    caption = f"Behind the last layer the hidden state is {estimate(_of(last, 'hidden'))} away from dense (1 - cos)"
    if most is not None and most is not last:
        caption += f"; it is furthest behind layer {most['layer']}, {short(value_of(_of(most, 'hidden')) or 0.0)}"
    ffn, rest = _largest(layers, "ffn"), _largest(layers, "rest")
    if ffn is not None:
        caption += f"; of what layers add, FFNs differ by up to {short(value_of(_of(ffn, 'ffn')) or 0.0)}"
    if ffn is not None and rest is not None:
        caption += f", all else by up to {short(value_of(_of(rest, 'rest')) or 0.0)}"
    title = "Along each model's own stream"
    return _by_layer("stream", title, caption + ".", layers, ("hidden", "ffn", "rest"))


def _alone(layers: Layers) -> Figure:
    most = _largest(layers, "ffn_alone")
    caption = "No layer could be looked at alone."
    if most is not None:
        caption = (
            f"On the dense model's own hidden states, the FFN of layer {most['layer']} differs most, by "
            f"{estimate(_of(most, 'ffn_alone'))}; its layer's output by {estimate(_of(most, 'hidden_alone'))}."
        )
    return _by_layer("alone", "Each layer alone", caption, layers, ("hidden_alone", "ffn_alone"))


def _spaces(found: dict[str, Any]) -> Figure:
    keys = (("embedding", "hidden\nstate"), ("logits", "logits"), ("centred", "logits,\ncentred"))
    entries = [found[key]["cosine"] for key, _ in keys] + [found["probabilities"]["cosine"]]
    names = [name for _, name in keys] + ["proba-\nbility"]
    ratio = found["amplification"]
    caption = (
        f"1 - cos is {estimate(entries[0])} in front of the LM head, {estimate(entries[1])} in its logits and "
        f"{estimate(entries[3])} in probabilities"
    )
    if ratio["exact"] is not None:
        second = f" (to second order {short(ratio['estimate'])})" if ratio["estimate"] is not None else ""
        caption += (
            f"; the median token's probabilities deviate {short(ratio['exact'])} times as much as its centred logits"
        )
        caption += second

    def paint(axes: Any) -> None:
        means = [value_of(entry) or 0.0 for entry in entries]
        colours = (PRUNED, FAST, FAST, VIOLET)
        axes.bar(range(4), means, 0.62, color=colours)
        for place, entry in enumerate(entries):
            if entry.get("interval"):
                axes.vlines(place, *entry["interval"], color=SOFT, linewidth=2)
            top = max([means[place], *(entry.get("interval") or [])])
            axes.annotate(
                short(means[place]), (place, top), (0, 3), textcoords="offset points", ha="center", va="bottom"
            )
        axes.set_xticks(range(4), names)
        axes.set_ylabel("1 - cos against dense")
        axes.margins(y=0.14)

    return figure("spaces", "Through the three spaces", caption + ".", paint)


def _temperatures(rows: list[dict[str, float]]) -> Figure | None:
    if len(rows) < 2:
        return None
    rows = sorted(rows, key=lambda row: row["temperature"])
    cold, warm = rows[0], rows[-1]
    one = min(rows, key=lambda row: abs(row["temperature"] - 1))
    caption = (
        f"Probabilities change by {short(cold['change'])} of their own norm at temperature {cold['temperature']:g} and "
        f"by {short(warm['change'])} at {warm['temperature']:g}; at {one['temperature']:g} the softmax Jacobian says "
        f"{short(one['change_estimate'])} where it is {short(one['change'])}, and no more than "
        f"{short(one['change_bound'])} was possible."
    )
    lines = (
        ("change_bound", "bound", LIMIT, "--"),
        ("change_estimate", "Jacobian", WARM, "--"),
        ("change", "exact", VIOLET, "-"),
    )

    def paint(axes: Any) -> None:
        places = [row["temperature"] for row in rows]
        for key, label, colour, style in lines:
            axes.plot(places, [row[key] for row in rows], style, color=colour, marker="o", label=label)
        log_scale(axes, [row[key] for row in rows for key, *_ in lines])
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlabel("temperature")
        axes.set_ylabel("change of p, over its norm")
        legend(axes)

    return figure("temperature", "Amplification over temperature", caption, paint)


def _breakdown(groups: list[dict[str, float]]) -> Figure | None:
    if len(groups) < 2:
        return None
    # Where the estimate is off by more than a quarter of what is there.
    off = [g for g in groups if abs(g["estimate"] - g["kl"]) > 0.25 * g["kl"]]
    last = groups[-1]
    caption = (
        f"Tokens in {len(groups)} equal groups: the second order says {short(last['estimate'])} nats for the most "
        f"changed ones where KL is {short(last['kl'])}; "
    )
    if off:
        first = min(g["kl"] for g in off)
        caption += f"it is off by more than a quarter in {plural(len(off), 'group')}, from {short(first)} nats on."
    else:
        caption += "in no group is it off by more than a quarter."

    def paint(axes: Any) -> None:
        xs, ys = ([g[key] for g in groups] for key in ("estimate", "kl"))
        both = [v for v in (*xs, *ys) if v > 0]
        if both:
            axes.plot((min(both), max(both)), (min(both), max(both)), "--", color=SOFT, linewidth=1.3, label="equal")
        axes.plot(xs, ys, color=VIOLET, marker="o", label="groups of tokens")
        for along in ("x", "y"):
            log_scale(axes, both, along=along)
        axes.grid(axis="x")
        axes.set_xlabel("KL by the second order, nats")
        axes.set_ylabel("KL, nats")
        legend(axes)

    return figure("breakdown", "Where the second order breaks down", caption, paint)


def _table(found: dict[str, Any]) -> Table:
    p, loss = found["probabilities"], found["perplexity"].get("loss")
    rows = [
        ("same likeliest token", estimate(p["top1"], percent)),
        ("of the five likeliest, shared", estimate(p["top5"], percent)),
        ("KL(dense, pruned), nats", estimate(p["kl"])),
        ("Jensen-Shannon divergence, nats", estimate(p["js"])),
        ("total variation", estimate(p["total_variation"])),
        ("entropy of dense, nats", estimate(p["entropy"])),
    ]
    if "entropy_pruned" in p:
        rows.append(("entropy of pruned, nats", estimate(p["entropy_pruned"])))
    if loss is not None:
        rows.append(("loss above dense, nats a token", estimate(loss)))
    for space in ("embedding", "logits"):
        if "angle" in found[space]:
            name = "hidden state" if space == "embedding" else space
            rows.append((f"angle of the {name}, degrees", estimate(found[space]["angle"])))
    return Table("What it does to predictions", ("mean over tokens", ">value (95 %)"), rows)


def _figures(found: dict[str, Any]) -> Iterator[Figure | None]:
    kept = [layer for layer in found["layers"] if layer["kept"] and "hidden" in layer]
    if kept:
        yield _stream(kept)
        yield _alone(kept)
    yield _spaces(found)
    yield _temperatures(found["temperatures"])
    yield _breakdown(found["breakdown"])


def section(facts: Facts) -> Section | None:
    """The representation hierarchy; None where it was not looked at."""
    found = facts.part("diagnose", "hierarchy")
    if found is None:
        return None
    p = found["probabilities"]
    top1 = value_of(p["top1"])
    lead = (
        f"Both models read the same {plural(found['windows'] * found['window'], 'token')} of "
        f"{facts.part('diagnose', 'text')}"
    )
    if top1 is not None:
        lead += f"; they agree on the likeliest next token in {percent(top1)} of places{span(p['top1'], percent)}"
    figures = tuple(f for f in _figures(found) if f is not None)
    return Section("hierarchy", "Where it differs", lead + ".", figures, (_table(found),))
