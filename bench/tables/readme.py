"""Make the tables of README.md, docs/ and examples/ from bench/results/*.json; no number is typed by hand.

    python -m bench.tables.readme            rewrites what stands between <!-- table:NAME --> and <!-- /table -->
    python -m bench.tables.readme --check    exits with 1 when a file is stale

A table is a function from its results to Markdown lines, and an entry of `TABLES`. The results of table NAME are
NAME.json and NAME-*.json, by file name; the same table is made for each. What `_TOGETHER` names reads several results
at once.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from pyprune.base.files import new_file
from pyprune.model.loading import DEMO

HERE = Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

Result = dict[str, Any]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; a column whose name starts with `>` is aligned to the right."""
    names = list(header)
    rule = ["---:" if name.startswith(">") else "---" for name in names]
    lines = [[name.removeprefix(">") for name in names], rule, *map(list, rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def model_name(name: str) -> str:
    """What a model is called in the tables, where the command line has a short name for it."""
    return "SmolLM2-135M-Instruct" if name == DEMO else name


def provenance(result: Result) -> str:
    """One line that says where numbers come from."""
    facts = result["machine"]
    where = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['torch_threads']} threads"
    commit = f", commit {facts['commit'][:10]}{' with changes' if facts['dirty'] else ''}" if facts["commit"] else ""
    bandwidth = f", memory read at {result['bandwidth_gb_s']:.1f} GB/s" if "bandwidth_gb_s" in result else ""
    return f"{where}{bandwidth}, torch {facts['versions']['torch']}, {facts['date'][:10]}{commit}."


def _fastest(rows: list[Result], forms: tuple[str, ...], keep_all: bool) -> Result | None:
    fitting = [r for r in rows if r["form"] in forms and (r["keep"] == 1) == keep_all]
    return min(fitting, key=lambda r: r["us"]) if fitting else None


def ffn_table(result: Result) -> list[str]:
    """A line for each (model, dtype, M, keep): the dense path, and the fastest of each pruned form beside the ceiling.

    The dense path is the fastest that was measured on all neurons: torch eager or compiled, or PrunedMLP.
    """
    pruned_forms = {"narrow Linear": ("linear", "linear-compiled"), "compact": ("compact",), "gather": ("gather",)}
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for r in result["rows"]:
        groups.setdefault((r["model"], r["hidden_size"], r["intermediate_size"], r["dtype"], r["tokens"]), []).append(r)
    lines = []
    for (model, d, f, dtype, tokens), rows in groups.items():
        dense = _fastest(rows, ("linear", "linear-compiled", "compact"), keep_all=True)
        for keep in sorted({r["keep"] for r in rows if r["keep"] != 1}, reverse=True):
            if dense is None:
                continue
            cells = [f"{model} {d} x {f}", dtype, str(tokens), f"{keep:.0%}", f"{dense['us']:,.0f}"]
            ceiling = ""
            for forms in pruned_forms.values():
                best = _fastest([r for r in rows if r["keep"] == keep], forms, keep_all=False)
                if best is None:
                    cells.append("-")
                    continue
                ceiling = f"{best['ceiling']:.2f}x"
                cells.append(f"{best['us']:,.0f} ({dense['us'] / best['us']:.2f}x, {best['gb_s']:.0f} GB/s)")
            lines.append([*cells, ceiling])
    header = ["FFN", "dtype", ">M", ">kept", ">dense, us", *(f">{name}, us" for name in pruned_forms), ">ceiling"]
    return [f"One FFN, medians. {provenance(result)}", "", *markdown(header, lines)]


def model_table(result: Result) -> list[str]:
    """For each case of the end-to-end bench a line for each measurement and model."""
    labels = {"decode": "decode, batch {}", "prefill": "prefill, {} tokens", "ffn": "one FFN, M = {}"}
    lines = []
    for r in result["rows"]:
        models = r["report"]["models"]
        for kind, label in labels.items():
            for key in models["dense"][kind]:
                for name, entry in models.items():
                    value = entry[kind][key]
                    per_s = "tokens_per_s" in value
                    speed = f"{value['tokens_per_s']:,.1f} tokens/s" if per_s else f"{value['us']:,.0f} us"
                    ratio = "" if name == "dense" else f"{value['ratio']:.2f}x"
                    ceiling = "" if name == "dense" else f"{value['ceiling']:.2f}x"
                    lines.append([label.format(key), name, f"{entry['keep']:.0%}", speed, ratio, ceiling])
    header = ["what", "model", ">kept", ">speed", ">ratio", ">ceiling"]
    settings = result["rows"][0]["report"]["settings"]
    what = f"{model_name(result['rows'][0]['model'])}, {settings['dtype']}, medians of interleaved rounds."
    return [f"{what} {provenance(result)}", "", *markdown(header, lines)]


def _spans(rows: list[Result], key: str) -> str:
    values = sorted({r[key] for r in rows})
    return "-" if not values else str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"


def static_table(result: Result) -> list[str]:
    """A line for each kernel of bench/gpu/static_*.py: ranges over dtypes, forms and sizes."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for by, rows in (("CUDA", result.get("cuda", [])), ("Triton", result["kernels"])):
        for r in rows:
            groups.setdefault((r["kernel"], by), []).append(r)
    lines = []
    for (kernel, by), rows in sorted(groups.items(), key=lambda group: group[0][::-1]):
        of = {
            sm: [r for r in rows if r["architecture"].startswith(sm)] for sm in ("sm_80", "sm_90", "sm_100", "sm_120")
        }
        kinds = {kind for r in rows for kind in r.get("mma_kinds", "").split("+")} - {"", "none", "FFMA", "FFMA2"}
        spilling = sum(1 for r in rows if r["stack_bytes"] or r["ldl"] or r["stl"])
        registers = [_spans(found, "registers") for found in of.values()]
        lines.append([kernel, by, str(len(rows)), *registers, str(spilling), ", ".join(sorted(kinds))])
    header = ["kernel", "by", ">variants", ">sm_80", ">sm_90", ">sm_100", ">sm_120", ">spilling", "matrix instructions"]
    built = {**result["versions"], "nvcc": result.get("cuda_built", {}).get("nvcc", "none")}
    versions = ", ".join(f"{name} {version}" for name, version in built.items())
    return [f"Registers of a thread, by architecture. Compiled by {versions}.", "", *markdown(header, lines)]


CPU_HEADER = (
    "FFN",
    "weights",
    ">M",
    ">kept",
    ">torch dense",
    ">inductor dense",
    ">torch compact",
    ">inductor compact",
    ">compact",
    ">gather",
    ">read GB/s",
    ">GB/s",
    ">of read",
    ">vs torch dense",
    ">vs torch compact",
)
# For more tokens arithmetic counts, and GB/s say little.
_FEW_TOKENS = 16


def cpu_cells(row: Result) -> list[str]:
    """One case of bench/cpu/run.py: medians in us, how fast memory was read beside it, and `compact` against both."""
    found = row["variants"]

    def us(name: str) -> str:
        if name not in found:
            return "-"
        value = found[name]["us"]
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"

    compact = found["compact"]
    variants = ("dense", "inductor-dense", "torch-compact", "inductor-compact", "compact", "gather")
    rate = [f"{row['read']['gb_s']:.1f}", f"{compact['gb_s']:.1f}", f"{compact['share_of_bandwidth']:.0%}"]
    return [
        f"{row['model']} {row['hidden_size']} x {row['intermediate_size']}",
        row["weights"] + ("" if row["weights"] == row["dtype"] else f" ({row['dtype']} x)"),
        str(row["tokens"]),
        f"{row['keep']:.0%}",
        *map(us, variants),
        *(rate if row["tokens"] <= _FEW_TOKENS else [rate[0], "", ""]),
        f"{compact['vs_dense']:.2f}x",
        f"{compact['vs_torch_compact']:.2f}x",
    ]


CPU_MODEL_HEADER = (
    "model",
    "FFN weights",
    ">kept",
    ">FFN share",
    ">dense, tokens/s",
    ">tokens/s",
    ">ratio",
    ">ceiling",
    ">of ceiling",
)


def cpu_model_cells(row: Result) -> list[str]:
    """One form of the whole model in bench/cpu/run.py."""
    rates = [f"{row[key]:.1f}" for key in ("dense_tokens_per_s", "tokens_per_s")]
    ratios = [f"{row['ratio']:.2f}x", f"{row['ceiling']:.2f}x", f"{row['share_of_ceiling']:.0%}"]
    return [model_name(row["model"]), row["weights"], f"{row['keep']:.0%}", f"{row['ffn_share']:.0%}", *rates, *ratios]


GOAL_HEADER = ("goal", "rule", "met", ">worst", "at")


def goal_cells(goal: Result) -> list[str]:
    """One goal of bench/cpu/run.py: met in how many of its cases, and the worst of them."""
    if not goal["cases"]:
        return [goal["name"], goal["rule"], "not measured", "", ""]
    met = sum(case["met"] for case in goal["cases"])
    words = {None: "reported", True: "yes", False: f"no: {met} of {len(goal['cases'])}"}[goal["met"]]
    worst = goal["worst"]
    return [goal["name"], goal["rule"], words, f"{worst['value']:.3f}", worst["case"]]


def cpu_table(result: Result) -> list[str]:
    """The tables of bench/cpu/run.py: one FFN, the whole model, the goals."""
    start = f"One FFN, medians in us. {provenance(result)}"
    lines = [start, "", *markdown(CPU_HEADER, map(cpu_cells, result["rows"]))]
    if result["models"]:
        cells = map(cpu_model_cells, result["models"])
        lines += ["", "The whole model, decode at batch 1, medians.", "", *markdown(CPU_MODEL_HEADER, cells)]
    return [*lines, "", "Goals.", "", *markdown(GOAL_HEADER, map(goal_cells, result["goals"]))]


def gpu_table(result: Result) -> list[str]:
    """The tables of bench/gpu/run.py: one FFN, the whole model, the goals; of a run cut short, as far as it came."""
    from bench.gpu import goals as goals_gpu
    from bench.gpu import tables

    if "machine" not in result:
        return [f"Nothing was measured: {result['state']}."]
    start = f"One FFN in a CUDA graph over weights that the L2 does not hold, medians in us. {provenance(result)}"
    cells = [tables.cells(row, result) for row in result["rows"]]
    lines = [start, "", *markdown(tables.HEADER, cells), "", tables.ceilings_line(result)]
    if read := result.get("ceilings", {}).get("read", {}).get("gb_s"):
        lines += ["", "The fastest configuration of each of our backends, whatever `auto` took in that run.", ""]
        lines += markdown(tables.BACKEND_HEADER, filter(None, (tables.backend_cells(r, read) for r in result["rows"])))
    if result["models"]:
        rows = map(tables.model_cells, result["models"])
        lines += ["", "A whole model's decode step at batch 1, in a CUDA graph.", ""]
        lines += markdown(tables.MODEL_HEADER, rows)
    goals = map(goals_gpu.cells, goals_gpu.judge(result))
    return [*lines, "", "Goals.", "", *markdown(goals_gpu.HEADER, goals)]


def _elsewhere(module: str, function: str) -> Callable[[Result], list[str]]:
    """A table whose function stands elsewhere, in a module that is imported when the table is made."""

    def make(result: Result) -> list[str]:
        made: list[str] = getattr(importlib.import_module(module), function)(result)
        return made

    return make


TABLES: dict[str, Callable[[Result], list[str]]] = {
    "allocations": _elsewhere("bench.tables.methods", "allocations_table"),
    "answers": _elsewhere("bench.experiments.finetune.headlines", "answers_table"),
    "compare": _elsewhere("bench.tables.quality", "compare_table"),
    "compiled": _elsewhere("bench.tables.compiled", "compiled_table"),
    "cpu": cpu_table,
    "draft": _elsewhere("bench.tables.draft", "draft_table"),
    "ema-scores": _elsewhere("bench.tables.ema_scores", "ema_scores_table"),
    "engines": _elsewhere("bench.tables.engines", "engines_table"),
    "experts": _elsewhere("bench.tables.moe", "experts_table"),
    "families": _elsewhere("bench.tables.families", "families_table"),
    "ffn": ffn_table,
    "finetune": _elsewhere("bench.experiments.finetune.table", "finetune_table"),
    "glance": _elsewhere("bench.tables.glance", "glance_table"),
    "gpu": gpu_table,
    "killed": _elsewhere("bench.tables.scale", "killed_table"),
    "methods": _elsewhere("bench.tables.methods", "methods_table"),
    "latency-aware": _elsewhere("bench.tables.latency_aware", "latency_aware_table"),
    "model": model_table,
    "mixture": _elsewhere("bench.tables.families", "mixture_table"),
    "moe": _elsewhere("bench.tables.moe", "moe_table"),
    "nested": _elsewhere("bench.tables.nested", "nested_table"),
    "predictor": _elsewhere("bench.tables.predictor", "predictor_table"),
    "quality-tasks": _elsewhere("bench.tables.quality_tasks", "quality_tasks_table"),
    "ranks": _elsewhere("bench.tables.scale", "ranks_table"),
    "rates": _elsewhere("bench.tables.scale", "rates_table"),
    "repairs": _elsewhere("bench.tables.methods", "repairs_table"),
    "recover": _elsewhere("bench.tables.quality", "recover_table"),
    "static": static_table,
    "streamed": _elsewhere("bench.tables.scale", "streamed_table"),
    "streaming": _elsewhere("bench.tables.scale", "streaming_table"),
    "training": _elsewhere("bench.tables.methods", "training_table"),
    "vae": _elsewhere("bench.tables.vae", "vae_table"),
    "works": _elsewhere("bench.tables.families", "works_table"),
    "worth": _elsewhere("bench.tables.worth", "worth_table"),
}


ROOT = HERE.parent
# Tables that are made of what is registered, not of measurements; and those of several results, by file name.
_OF_CODE = ("allocations", "methods", "repairs", "training")
_TOGETHER = {
    "answers": ("finetune",),
    "glance": ("compare-suite", "model", "nested"),
    "quality-tasks": ("quality-tasks", "compare-suite"),
    "works": ("families",),
}


def texts() -> list[Path]:
    """Every file that may hold tables."""
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*.md"))]


def load_results(folder: Path, name: str) -> list[Result]:
    """The results of a table, by file name; one without any for a table that is made of the code alone."""
    if name in _OF_CODE:
        return [{}]
    if name in _TOGETHER:
        parts = {part: folder / f"{part}.json" for part in _TOGETHER[name]}
        there = all(file.is_file() for file in parts.values())
        return [{part: json.loads(file.read_text(encoding="utf-8")) for part, file in parts.items()}] if there else []
    files = sorted([*folder.glob(f"{name}.json"), *folder.glob(f"{name}-*.json")])
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def render(text: str, results: Path) -> str:
    """The text of a file with its tables made anew from the folder `results`.

    Raises:
        typer.BadParameter: a marker without an entry in `TABLES`.
    """

    def replace(match: re.Match[str]) -> str:
        opening, name, _, closing = match.groups()
        if name not in TABLES:
            raise typer.BadParameter(f"the text has a table {name!r}; known are {', '.join(TABLES)}")
        found = load_results(results, name)
        lines = [line for result in found for line in ["", *TABLES[name](result)]]
        return opening + "".join(f"{line}\n" for line in [*lines, ""] if found) + closing

    return _MARKED.sub(replace, text)


def main(
    check: Annotated[bool, typer.Option(help="Change nothing; exit with 1 when a file is stale.")] = False,
    readme: Annotated[
        list[Path] | None, typer.Option(help="Files with markers. Default: README, docs and examples.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of the results.")] = HERE / "results",
) -> None:
    """Rewrite the tables, or check them."""
    stale = []
    for file in readme or texts():
        old = file.read_text(encoding="utf-8")
        new = render(old, results)
        if new != old:
            stale.append(file)
            if not check:
                with new_file(file) as temporary:
                    temporary.write_text(new, encoding="utf-8")
    if check and stale:
        typer.echo(f"stale: {', '.join(map(str, stale))}; run: python -m bench.tables.readme", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
