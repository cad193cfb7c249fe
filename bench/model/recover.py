"""What recovery gave back: the dense model, a pruned one, and that one after recovery, by the suite of six domains.

    pyprune prune demo --keep 0.7 --out PRUNED --tokens 131072
    pyprune recover PRUNED --teacher demo --out RECOVERED --minutes 10
    python -m bench.model.recover demo PRUNED RECOVERED --data DATA

No text of the suite was read by pruning or recovery. The JSON goes to bench/results/NAME.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from pyprune.base import machine
from pyprune.base.files import new_file
from pyprune.cli.screen import Bars
from pyprune.evaluation.domains import Suite, read_material, suite
from pyprune.model.loading import DEMO, load_model, load_tokenizer
from pyprune.model.provenance import read

RESULTS = Path(__file__).parents[1] / "results"


def main(
    dense: Annotated[str, typer.Argument(help="MODEL, as for the command line.")],
    pruned: Annotated[str, typer.Argument(help="The checkpoint that was recovered.")],
    recovered: Annotated[str, typer.Argument(help="The same after recovery.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the suite's texts.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each domain.")] = 8192,
    items: Annotated[int, typer.Option(help="Questions of PIQA; 0 for all.")] = 0,
    new_tokens: Annotated[int, typer.Option(help="Of an answer at most.")] = 96,
    dtype: Annotated[str, typer.Option(help="Of the weights of all of them.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Where they run.")] = "cpu",
    name: Annotated[str, typer.Option(help="Of the results file.")] = "recover",
) -> None:
    """Measure the models and write what was found."""
    started = time.perf_counter()
    tokenizer, material = load_tokenizer(dense), read_material(data, items)
    teacher = load_model(dense, dtype, device)
    size: dict[str, Any] = {"tokens": tokens, "new_tokens": new_tokens}
    models: dict[str, Any] = {}
    facts: list[Any] = []
    of_dense: Suite | None = None
    with Bars() as bars:
        for called, path in (("dense", dense), ("pruned", pruned), ("recovered", recovered)):
            model = teacher if called == "dense" else load_model(path, dtype, device)
            found = suite(model, tokenizer, material, dense=teacher, reference=of_dense, **size, progress=bars)
            of_dense = of_dense or found
            parameters = sum(p.numel() for p in model.parameters())
            models[called] = {"parameters": parameters, **found.to_json()}
            (models[called]["against"] or {}).pop("dense", None)
            facts = read(model.config).get("recovery", [])
    result = {
        "machine": machine.facts(),
        "model": dense if dense == DEMO else Path(dense).name,
        "recovery": facts,
        "models": models,
        "seconds": time.perf_counter() - started,
    }
    with new_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
