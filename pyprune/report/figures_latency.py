"""Width against latency: one checkpoint at every width, and widths chosen for a speed-up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .facts import Facts
from .parts import Figure, Section, Table, figure
from .plots import legend, log_scale, mark, number_axis, percents
from .svg import DENSE, FAST, PRUNED, SOFT, VIOLET, WARM
from .words import model_name, percent, plural, short, times

_COLOURS = (PRUNED, FAST, WARM, VIOLET)


def narrowest(nested: dict[str, Any]) -> dict[str, Any]:
    """The row of the smallest share."""
    found: dict[str, Any] = min(nested["rows"], key=lambda row: row["share"])
    return found


def own(row: dict[str, Any]) -> float:
    """Perplexity with compensated rows where there are some, else with the bare prefix."""
    found: float = row["perplexity_compensated"] or row["perplexity"]
    return found


def _quality(nested: dict[str, Any]) -> Figure:
    rows, dense = sorted(nested["rows"], key=lambda row: row["share"]), nested["dense"]["perplexity"]
    least = rows[0]
    caption = f"With {percent(least['share'])} of the neurons, perplexity is {short(own(least))} (dense {short(dense)})"
    if least["perplexity_compensated"] is not None:
        caption += f"; without compensated down rows it would be {short(least['perplexity'])}"

    def paint(axes: Any) -> None:
        shares = [row["share"] for row in rows]
        axes.plot(shares, [row["perplexity"] for row in rows], color=WARM, marker="s", label="prefix")
        axes.plot(shares, [own(row) for row in rows], color=PRUNED, marker="o", label="compensated")
        mark(axes, dense, "dense", "y", DENSE)
        log_scale(axes, [dense, *(v for row in rows for v in (row["perplexity"], own(row)))])
        axes.set_xlabel("share of neurons that runs")
        axes.set_ylabel("token perplexity")
        percents(axes, "x")
        legend(axes)

    return figure("nested-quality", "One checkpoint, every width: quality", caption + ".", paint)


def _steps(nested: dict[str, Any]) -> Figure:
    rows, dense = sorted(nested["rows"], key=lambda row: row["share"]), nested["dense"]["decode_ms"]["p50"]
    least, most = rows[0]["decode_ms"]["p50"], rows[-1]["decode_ms"]["p50"]
    caption = (
        f"A token takes {short(least)} ms with {percent(rows[0]['share'])} of the neurons and {short(most)} ms with "
        f"{percent(rows[-1]['share'])}; the dense model takes {short(dense)} ms, so {times(dense / least)} to "
        f"{times(dense / most)} as fast."
    )

    def paint(axes: Any) -> None:
        shares = [row["share"] for row in rows]
        axes.plot(shares, [row["decode_ms"]["p50"] for row in rows], color=FAST, marker="o", label="median")
        if all("p10" in row["decode_ms"] and "p90" in row["decode_ms"] for row in rows):
            low, high = ([row["decode_ms"][key] for row in rows] for key in ("p10", "p90"))
            axes.fill_between(shares, low, high, color=FAST, alpha=0.18, linewidth=0, label="p10 to p90")
        mark(axes, dense, "dense", "y", DENSE)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share of neurons that runs")
        axes.set_ylabel("ms a token")
        percents(axes, "x")
        legend(axes)

    return figure("nested-latency", "One checkpoint, every width: latency", caption, paint)


def _promises(found: dict[str, Any]) -> Figure:
    rows = sorted(found["rows"], key=lambda row: row["promised"])
    off = max(rows, key=lambda row: abs(row["measured"] / row["promised"] - 1))
    last = rows[-1]
    caption = (
        f"What was promised was measured to within {percent(abs(off['measured'] / off['promised'] - 1))}; "
        f"{times(last['measured'])} over the accelerated dense model takes {percent(last['keep'])} of the neurons and "
        f"perplexity from {short(found['dense_perplexity'])} to {short(last['perplexity'])}."
    )

    def paint(axes: Any) -> None:
        axes.plot(
            [1.0, *(r["measured"] for r in rows)],
            [found["dense_perplexity"], *(r["perplexity"] for r in rows)],
            color=PRUNED,
            marker="o",
            label="measured",
        )
        axes.plot(
            [r["promised"] for r in rows],
            [r["perplexity"] for r in rows],
            "D",
            color=WARM,
            markersize=7,
            fillstyle="none",
            markeredgewidth=1.6,
            label="promised",
        )
        for row in rows:
            spread = row.get("measured_spread") or {}
            if "p10" in spread and "p90" in spread:
                axes.hlines(row["perplexity"], spread["p10"], spread["p90"], color=PRUNED, alpha=0.5, linewidth=2)
        mark(axes, found["dense_perplexity"], "dense", "y", DENSE)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:.4g}x")
        axes.set_xlabel("speed-up over dense, both accelerated")
        axes.set_ylabel("token perplexity")
        legend(axes)

    return figure("targets", "Widths chosen for a speed-up", caption, paint)


def _chosen(found: dict[str, Any]) -> Figure:
    rows = found["rows"]
    last = rows[-1]["widths"]
    full = max(found["table"].get("sizes") or [max(found["table"]["widths"])])
    caption = (
        f"For {times(rows[-1]['target'])}, layers keep from {min(last):,} (layer {last.index(min(last))}) to "
        f"{max(last):,} (layer {last.index(max(last))}) of {full:,} neurons."
    )

    def paint(axes: Any) -> None:
        mark(axes, full, "dense", "y", DENSE)
        for turn, row in enumerate(rows):
            label = f"{row['target']:g}x"
            axes.step(range(len(row["widths"])), row["widths"], where="mid", color=_COLOURS[turn % 4], label=label)
        axes.set_ylim(0, 1.06 * full)
        axes.set_ylabel("neurons")
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        number_axis(axes, "layer", len(last))
        legend(axes)

    return figure("chosen", "The widths it chose", caption, paint)


def _alone(found: dict[str, Any]) -> Figure:
    table = found["table"]
    widths, us = table["widths"], [1e6 * seconds for seconds in table["alone"]]
    pairs = sorted(zip(widths, us, strict=True))
    (low, at_low), (high, at_high) = pairs[0], pairs[-1]
    caption = (
        f"One FFN takes {short(at_low)} us with {low:,} neurons and {short(at_high)} us with {high:,}: "
        f"{short(high / low)} times the neurons take {short(at_high / at_low)} times the time."
    )

    def paint(axes: Any) -> None:
        axes.plot([w for w, _ in pairs], [t for _, t in pairs], color=FAST, marker="o", label="measured")
        axes.plot((0, high), (0, at_high), "--", color=SOFT, linewidth=1.3, label="in proportion")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.set_xlabel("neurons of an FFN")
        axes.set_ylabel("microseconds")
        legend(axes)

    return figure("latency-table", "Time of one FFN over its width", caption, paint)


def _figures(nested: dict[str, Any] | None, found: dict[str, Any] | None) -> Iterator[Figure]:
    if nested is not None:
        yield _quality(nested)
        yield _steps(nested)
    if found is not None:
        yield _promises(found)
        yield _chosen(found)
        yield _alone(found)


def _targets(found: dict[str, Any]) -> Table:
    rows = [
        (
            times(row["target"]),
            times(row["promised"]),
            times(row["measured"]),
            times(row["over_plain"]) if "over_plain" in row else "-",
            percent(row["keep"]),
            short(row["perplexity"]),
        )
        for row in found["rows"]
    ]
    columns = (">asked for", ">promised", ">measured", ">over plain dense", ">neurons kept", ">perplexity")
    return Table("Widths chosen for a speed-up", columns, rows)


def _widths(nested: dict[str, Any]) -> Table:
    dense = nested["dense"]
    rows = [
        (
            percent(row["share"]),
            short(row["perplexity"]),
            "-" if row["perplexity_compensated"] is None else short(row["perplexity_compensated"]),
            *(
                cell
                for key in ("decode_ms", "prefill_ms")
                for cell in (short(row[key]["p50"]), times(dense[key]["p50"] / row[key]["p50"]))
            ),
        )
        for row in nested["rows"]
    ]
    ms = (">decode, ms", ">over dense", ">prefill, ms", ">over dense")
    return Table("One checkpoint, every width", (">neurons", ">perplexity", ">compensated", *ms), rows)


def section(facts: Facts) -> Section | None:
    """Width against latency; None without `nested.json` and `latency-aware.json`."""
    nested, found = facts.get("nested"), facts.get("latency-aware")
    figures = tuple(_figures(nested, found))
    if not figures:
        return None
    parts = []
    if nested is not None:
        parts.append(f"One checkpoint of {model_name(nested['model'])} runs at {plural(len(nested['rows']), 'width')}.")
    if found is not None:
        load = found["table"]["workload"]
        parts.append(
            f"For {model_name(found['model'])}, widths were chosen on this machine's own times ({load['kind']}, "
            f"{plural(load['tokens'], 'token')} at once)."
        )
    tables = ([_widths(nested)] if nested is not None else []) + ([_targets(found)] if found is not None else [])
    return Section("latency", "Width against latency", " ".join(parts), figures, tuple(tables))
