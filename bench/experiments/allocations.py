"""Widths by `predictor` against widths by `sensitivity`, `global` and `uniform`: one criterion, one repair, one text.

    python -m bench.experiments.allocations --data FOLDER         what is missing, then the table
    python -m bench.experiments.allocations --show                the table of what is there

A row is perplexity on the six domains, window by window, and the processor time of pruning; what an allocation costs
is its row's less that of `uniform`. `predictor` has three draws of its samples. Each row is written when it is there,
so it can be stopped and started at will.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import by_line
from bench.tables.predictor import predictor_table
from pyprune import prune
from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.cli.screen import verb
from pyprune.evaluation.domains import domain_windows, read_material
from pyprune.evaluation.perplexity import window_losses
from pyprune.model.loading import DEMO, load_model, load_tokenizer
from pyprune.pruning.mixture import DEFAULT, mix
from pyprune.pruning.options import METHOD, REPAIR
from pyprune.pruning.text import TOKENS, WINDOW

OUT = Path(__file__).parents[1] / "results" / "predictor.json"
KEEPS = (0.7, 0.5)
# Label -> short form. The first is what the others' time is counted from.
ALLOCATIONS = {
    "uniform": "uniform:multiple=16",
    "sensitivity": "sensitivity:multiple=16",
    "predictor": "predictor:multiple=16",
    "global": "global:multiple=16",
    "predictor, draw 1": "predictor:multiple=16,draws=1",
    "predictor, draw 2": "predictor:multiple=16,draws=2",
}
Result = dict[str, Any]


def load(path: Path) -> Result:
    """The result at `path`, or an empty one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}  # type: ignore[no-any-return]


def save(path: Path, result: Result) -> None:
    """One row a line."""
    with new_file(path) as temporary:
        temporary.write_text(by_line.dumps(result, ("rows",)), encoding="utf-8")


@verb
def main(
    data: Annotated[Path | None, typer.Option(help="Folder of the evaluation texts, as for eval --suite.")] = None,
    model: Annotated[str, typer.Option(help="The dense model.")] = DEMO,
    tokens: Annotated[int, typer.Option(help="Of the calibration text, the first.")] = TOKENS,
    evaluation_tokens: Annotated[int, typer.Option(help="Of each domain.")] = 4096,
    only: Annotated[str, typer.Option(help="Part of a row's name, as in 'global at 0.5'; default: all rows.")] = "",
    seconds: Annotated[float, typer.Option(help="Start no row later than this.")] = float("inf"),
    out_file: Annotated[Path, typer.Option("--out", help="The result.")] = OUT,
    show_only: Annotated[bool, typer.Option("--show", help="Run nothing.")] = False,
) -> None:
    """Measure the rows that are missing, and show the table."""
    result = load(out_file)
    if not show_only:
        check(data is not None, "data", "be the folder of the evaluation texts", data)
        began, dense, tokenizer = time.perf_counter(), load_model(model, "bfloat16"), load_tokenizer(model)
        domains = domain_windows(tokenizer, read_material(data, 1).domains, evaluation_tokens, WINDOW)
        text = mix(DEFAULT, dense, tokenizer, max(tokens, TOKENS), WINDOW).first(tokens // WINDOW)
        facts = {
            "model": model,
            "method": METHOD,
            "repair": REPAIR,
            "calibration": text.facts(),
            "domains": {name: ids.numel() for name, ids in domains.items()},
        }
        old = {key: result[key] for key in facts if key in result}
        check(old in ({}, facts), "out", f"hold rows of the same model and texts: {facts}", old)
        result = {**facts, "machine": machine.facts(), "rows": result["rows"]}

        def losses(of: Any) -> dict[str, list[float]]:
            return {name: (window_losses(of, ids) / (ids.shape[1] - 1)).tolist() for name, ids in domains.items()}

        if "dense" not in result["rows"]:
            result["rows"]["dense"] = {"losses": losses(dense)}
            save(out_file, result)
        for keep in KEEPS:
            for label, allocation in ALLOCATIONS.items():
                key = f"{label} at {keep:g}"
                if key in result["rows"] or only not in key or time.perf_counter() - began > seconds:
                    continue
                pruned, started = copy.deepcopy(dense), time.process_time()
                report = prune(pruned, keep, METHOD, allocation=allocation, repair=REPAIR, text=text)
                spent = time.process_time() - started
                result["rows"][key] = {
                    "label": label,
                    "keep": keep,
                    "allocation": report.options.facts()["allocation"],
                    "kept": report.mask.keep,
                    "widths": list(report.mask.widths),
                    "cpu_seconds": spent,
                    "losses": losses(pruned),
                    "commit": machine.source()["commit"],
                }
                save(out_file, result)
                typer.echo(f"{key}: {spent:.0f} s of CPU time")
    typer.echo("\n".join(predictor_table(result)))


if __name__ == "__main__":
    typer.run(main)
