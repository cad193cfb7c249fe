"""Tables of a GPU result: cells for README and terminal, and plain text, for which the standard library is enough."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEADER = (
    "FFN",
    "weights",
    ">M",
    ">kept",
    ">dense",
    ">inductor",
    ">compact cuBLAS",
    ">compact",
    "by",
    ">gather",
    "by ",
    ">GB/s",
    ">of read",
)
MODEL_HEADER = ("model", ">kept", ">FFN share", ">dense, ms", ">narrow, ms", ">ms", ">ratio", ">ceiling", ">of ceiling")
BACKENDS = ("cuda", "triton", "cublas")
BACKEND_HEADER = ("FFN", ">M", ">kept", ">best dense", ">narrow torch", *(f">{name}" for name in BACKENDS), "by",
                  ">over dense", ">of read")  # fmt: skip
OVERLAP_HEADER = ("case", "variant", "way", ">us in turn", ">us with a kernel between", ">that kernel", ">early edges")
_FEW_TOKENS = 16


def text_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Columns of plain text; those whose name starts with `>` are aligned to the right."""
    names = list(header)
    lines = [[name.removeprefix(">") for name in names], *(list(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, ["-" * width for width in widths])
    aligned = (
        "  ".join(c.rjust(w) if n.startswith(">") else c.ljust(w) for c, w, n in zip(line, widths, names, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def _us(found: dict[str, Any] | None) -> str:
    if not found or "us" not in found:
        return "-"
    return f"{found['us']:,.0f}" if found["us"] >= 100 else f"{found['us']:.2f}"


def cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """One case: medians in us; rate and share of read bandwidth are those of `compact`, of int8 in its cases."""
    variants = row["variants"]
    form = "int8" if row["weights"] == "int8" else "compact"
    own, gather = variants.get(form), variants.get("gather")
    read = result.get("ceilings", {}).get("read", {}).get("gb_s")
    rate = ["", ""]
    if own and row["tokens"] <= _FEW_TOKENS:
        rate = [f"{own['gb_s']:,.0f}", f"{own['gb_s'] / read:.0%}" if read else ""]
    dense = [variants[name] for name in ("dense", "dense fused") if name in variants]
    narrow = [variants[name] for name in ("compact cublas", "compact cublas fused") if name in variants]
    words = f"{row['model']} {row['hidden_size']} x {row['intermediate_size']}"
    return [
        words,
        row["weights"],
        str(row["tokens"]),
        f"{row['keep']:.0%}",
        _us(min(dense, key=lambda d: d["us"], default=None)),
        _us(result.get("inductor", {}).get(f"{row['model']} M {row['tokens']}")),
        _us(min(narrow, key=lambda d: d["us"], default=None)),
        _us(own),
        own["backend"] if own else "",
        _us(gather),
        gather["backend"] if gather else "",
        *rate,
    ]


def backend_cells(row: dict[str, Any], read: float) -> list[str] | None:
    """One case: the fastest of all configurations that were timed of each backend, and of these all; None for none."""
    variants, form = row["variants"], "int8" if row["weights"] == "int8" else "compact"
    ours: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(variants.items(), key=lambda item: -item[1]["us"]):
        if name.startswith(f"{form}:"):
            ours[name.partition(":")[2].split()[0]] = entry

    def fastest(*names: str) -> dict[str, Any] | None:
        return min((variants[n] for n in names if n in variants), key=lambda e: e["us"], default=None)

    ours = {name: ours[name] for name in BACKENDS if name in ours}
    if not ours:
        return None
    by = min(ours, key=lambda name: ours[name]["us"])
    dense = fastest("dense", "dense fused")
    words = [row["model"] + (" int8" if form == "int8" else ""), str(row["tokens"]), f"{row['keep']:.0%}"]
    times = [dense, fastest("compact cublas", "compact cublas fused"), *map(ours.get, BACKENDS)]
    ratio = f"{dense['us'] / ours[by]['us']:.2f}x" if dense else "-"
    return [
        *words,
        *map(_us, times),
        by,
        ratio,
        f"{ours[by]['gb_s'] / read:.0%}" if row["tokens"] <= _FEW_TOKENS else "",
    ]


def model_cells(row: dict[str, Any]) -> list[str]:
    """The whole model."""
    steps = [f"{row['models'][name]['step_ms']:.3f}" for name in ("dense", "narrow", "accelerated")]
    ratios = [f"{row['ratio']:.2f}x", f"{row['ceiling']:.2f}x", f"{row['share_of_ceiling']:.0%}"]
    return [f"LLaMA, {row['layers']} layers", f"{row['keep']:.0%}", f"{row['ffn_share']:.0%}", *steps, *ratios]


def overlap_rows(result: dict[str, Any]) -> list[list[str]]:
    """What overlapping gains between calls of nothing but this FFN, and behind another kernel, as in a model."""
    rows = []
    for row in result["rows"]:
        for name, entry in row["variants"].items():
            if "apart_us" not in entry:
                continue
            plan = entry.get("plan") or entry.get("config") or {}
            ways = [way for way in ("overlap", "early", "bulk") if plan.get(way)]
            edges = entry.get("programmatic_edges")
            rows.append(
                [row["case"], name, ", ".join(ways) or "default", f"{entry['us']:.2f}", f"{entry['apart_us']:.2f}"]
            )
            rows[-1] += [f"{row['between_us']:.2f}", "-" if edges is None else str(edges)]
    return rows


def ceilings_line(result: dict[str, Any]) -> str:
    """The ceilings in words."""
    found = result.get("ceilings")
    if not found:
        return "No ceiling was measured."
    read, gemm = found["read"], found["gemm"]
    return (
        f"Memory read at {read['gb_s']:,.0f} GB/s ({read['loop']}); {gemm['dtype']} product of "
        f"{gemm['n']} x {gemm['n']} at {gemm['tflop_s']:,.0f} TFLOP/s."
    )
