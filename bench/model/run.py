"""Run the benches and write bench/results/NAME.json.

    python -m bench.model.run                          the quick selection of every suite
    python -m bench.model.run ffn --name ffn-bf16 -- --dtype bfloat16 --tokens 1,4 --shapes all
    python -m bench.model.run model -- --keeps 0.5,0.25 --compiled

What follows `--` goes to pytest (options: bench/conftest.py). A result holds the machine's facts, taken before the run,
and one row a case with the quantiles of its samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from pyprune.base import machine
from pyprune.base.clock import quantiles
from pyprune.base.errors import check, check_choice
from pyprune.base.files import new_file
from pyprune.speed import roofline

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
SUITES = ("ffn", "model")


def measure(suite: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Run one suite in a fresh process; the cases as pytest-benchmark reports them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "pytest", str(HERE / f"model/bench_{suite}.py"), "--benchmark-only", "-q", "-o"),
            *("timeout=0", f"--benchmark-json={report}", "--benchmark-columns=median,iqr,rounds", *arguments),
        ]
        done = subprocess.run(command, cwd=HERE.parent, check=False)
        # No speed is reported from a red run.
        if done.returncode != 0:
            raise typer.Exit(done.returncode)
        found: list[dict[str, Any]] = json.loads(report.read_text())["benchmarks"]
        return found


def row(case: dict[str, Any]) -> dict[str, Any]:
    """One case as a result's row: its `extra_info`, and microseconds of one call where rounds were timed."""
    facts = case["extra_info"]
    if "calls" not in facts:
        return dict(facts)
    us = quantiles(case["stats"]["data"], 1e6 / facts["calls"])
    return {**facts, "us": us["p50"], "us_quantiles": us, "samples": len(case["stats"]["data"])}


def run_suite(suite: str, name: str, arguments: list[str]) -> Path:
    """Measure one suite and write its result."""
    facts: dict[str, Any] = {"suite": suite, "machine": machine.facts(), "arguments": arguments}
    if suite == "ffn":
        device = "cuda" if facts["machine"]["gpu"] and "--device=cpu" not in arguments else "cpu"
        bandwidth = roofline.read_bandwidth(device)
        facts |= {"bandwidth_gb_s": bandwidth.gb_s, "bandwidth": bandwidth.to_json()}
    facts["rows"] = [row(case) for case in measure(suite, arguments)]
    path = RESULTS / f"{name}.json"
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return path


def main(
    suite: Annotated[str, typer.Argument(help=f"{', '.join(SUITES)} or all.")] = "all",
    pytest_arguments: Annotated[list[str] | None, typer.Argument(help="After --: options of the benches.")] = None,
    name: Annotated[str, typer.Option(help="Of the results file; default: the suite's.")] = "",
) -> None:
    """Run one suite or all of them."""
    check_choice(suite, "suite", (*SUITES, "all"))
    check(not name or suite != "all", "name", "be given for one suite only", name)
    for one in SUITES if suite == "all" else (suite,):
        typer.echo(f"wrote {run_suite(one, name or one, pytest_arguments or []).relative_to(HERE.parent)}")


if __name__ == "__main__":
    typer.run(main)
