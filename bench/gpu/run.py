"""FFNs and a whole model on a GPU against every rival and the speed of its memory: one run, one JSON file.

    python -m bench.gpu.run                            all cases in 7 minutes; writes bench/results/gpu.json
    python -m bench.gpu.run --cases decode --budget 90 --out decode.json
    python -m bench.gpu.run --dry-run --out dry.json   the same code on a CPU, tiny; its numbers mean nothing

This process only schedules: worker.py measures, case after case in the order of cases.py, and what it tells is
in the file at once. A worker that loses the device or hangs is replaced, without the variant that brought it down. What
the budget does not allow is left out and listed.

Ways to run an FFN (`:NAME` is the backend that was forced; without it, what `auto` takes):

    dense, dense fused                    torch (cuBLAS), gate and up apart or in one product
    compact cublas, compact cublas fused  the same over contiguous weights of the kept neurons
    compact, gather, int8                 PrunedMLP
    liger, 2:4, two-kernel gather         see rivals.py

Each is replayed in one CUDA graph over rotating weights that the L2 cannot hold; `eager_us` is a call launched by the
host, `host_us` the host's own part.

A kernel may begin before the one before it has ended (`overlap`). In such a graph that one is the same FFN's last call,
as in a model only the kernel of another layer of ours would be: `apart_us` is a call behind a small kernel of torch,
both together, and `between_us` of the case that kernel alone. What overlapping is worth in a model is seen there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from bench.boxed import Box, tail
from bench.gpu import goals, output, tables
from bench.gpu.cases import Case, all_cases, choose, dry_cases
from bench.gpu.lines import Lines

HERE = Path(__file__).parents[1]
RESULT = HERE / "results" / "gpu.json"
BUDGET = 420.0
# A variant that says nothing for so long hangs; compilers are slower than kernels.
PATIENCE, START, INDUCTOR, MODEL = 60.0, 120.0, 150.0, 120.0
MOST_WORKERS = 8
# What the case under way may take beyond the end, in seconds.
GRACE = 20.0


class Report:
    """The result as it grows; every change is on disk at once."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.result: dict[str, Any] = {
            "suite": "gpu",
            "state": "running",
            **facts,
            "rows": [],
            "models": [],
            "inductor": {},
            "left_out": [],
            "broken": {},
        }
        self.doing = ["start", ""]
        self.done: set[str] = set()
        self.lost = False

    def take(self, line: dict[str, Any]) -> bool:
        """Take over one line of a worker; whether the result is another one now."""
        result = self.result
        self.doing = line.pop("doing", self.doing)
        self.lost = line.pop("lost", False)
        if not line:
            return False
        if name := line.pop("done", None):
            self.done.add(name)
        if row := line.pop("row", None):
            result["rows"].append(row)
        if row := line.pop("model", None):
            result["models"].append(row)
        result["inductor"] |= line.pop("inductor", {})
        if name := line.pop("left_out", None):
            result["left_out"].append(name)
        if broken := line.pop("broken", None):
            result["broken"][broken[0]] = broken[1]
            if not self.lost:
                self.done.add(broken[0])
        if "machine" in line and "machine" in result:
            return False  # of a later worker
        result |= line
        if read := result.get("ceilings", {}).get("read"):
            result["bandwidth_gb_s"] = read["gb_s"]
        return True

    def write(self, last: bool = False) -> None:
        """Put the result as it is now into the file; the last time so that people can read it."""
        try:
            self.result["goals"] = goals.judge(self.result)
        except Exception as problem:  # what was measured is worth more than what is made of it
            self.result |= {"goals": [], "goals_failed": f"{type(problem).__name__}: {problem}"}
        output.place(json.dumps(self.result, indent=1 if last else None) + "\n", self.path)


def patience(doing: list[str]) -> float:
    """Seconds that a worker may be silent."""
    return {"start": START, "ceilings": START, "inductor": INDUCTOR}.get(
        doing[0], MODEL if "model" in doing[0] else PATIENCE
    )


Command = Callable[[Path, Path], list[str]]


def worker_command(lines: Path, plan: Path) -> list[str]:
    """How a worker is started."""
    return [sys.executable, "-m", "bench.gpu.worker", str(lines), str(plan)]


class Schedule:
    """Workers, one after the other, until all cases are done or time is up."""

    def __init__(
        self,
        report: Report,
        cases: list[Case],
        dry: bool,
        log: Path,
        command: Command = worker_command,
        tick: Callable[[], object] = lambda: None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Of `cases` for `report`; workers write to `log`, and `tick` is called ten times a second."""
        # What a rehearsal computes is too small for several threads, which would wait for each other.
        self.environment = {**(environment or os.environ), **({"OMP_NUM_THREADS": "1"} if dry else {})}
        self.report, self.dry, self.command, self.log, self.tick = report, dry, command, log, tick
        self.cases, self.until = cases, 0.0
        self.skip: dict[str, list[str]] = {}
        self._numbers = itertools.count()

    def left(self, kinds: Container[str] | None = None) -> list[str]:
        """Cases (of these kinds) that nobody has answered for."""
        answered = self.report.done | set(self.report.result["left_out"])
        return [c.name for c in self.cases if c.name not in answered and (kinds is None or c.kind in kinds)]

    def run(self, folder: Path, until: float, kinds: Container[str] | None = None) -> str:
        """Measure the cases (of these kinds) until then, by time.time(); the state that the result is in thereafter.

        What an earlier run left out for lack of time is tried again.
        """
        result, self.until = self.report.result, until
        result["left_out"] = []
        for _ in range(MOST_WORKERS):
            wanted = self.left(kinds)
            if not wanted:
                break
            if time.time() > until:
                result["left_out"] += wanted
                break
            problem = self._worker(folder, wanted)
            if problem is None:
                continue
            self._blame(problem)
            if self.report.doing == ["start", ""]:
                return f"no worker comes to work: {problem}; {tail(self.log, 3)}"
        return "complete" if not self.left(kinds) else f"stopped after {MOST_WORKERS} workers"

    def _worker(self, folder: Path, cases: list[str]) -> str | None:
        """Run one worker; what went wrong, or None."""
        number = next(self._numbers)
        lines, plan = folder / f"lines-{number}.jsonl", folder / f"plan-{number}.json"
        wanted = {
            "cases": cases,
            "skip": self.skip,
            "until": self.until,
            "dry": self.dry,
            "ceilings": "ceilings" not in self.report.result,
        }
        plan.write_text(json.dumps(wanted), encoding="utf-8")
        self.report.doing = ["start", ""]
        limit = max(30.0, self.until + GRACE - time.time())
        box = Box.start(self.command(lines, plan), self.log, limit, self.environment)
        reader, heard = Lines(lines), time.monotonic()
        while True:
            code = box.poll()
            new = reader.new()
            heard = time.monotonic() if new else heard
            changed = [self.report.take(line) for line in new]
            if any(changed):
                self.report.write()
            if code is not None:
                return None if code == 0 else f"ended with {code}"
            if time.monotonic() - heard > patience(self.report.doing):
                box.end()
                return f"silent for {patience(self.report.doing):.0f} s"
            self.tick()
            time.sleep(0.1)

    def _blame(self, problem: str) -> None:
        """Remember what the worker was doing, so that the next one does not do it."""
        case, variant = self.report.doing
        said = self.report.result["broken"].get(case, "")
        self.report.result["broken"][f"{case}: {variant}"] = f"{problem} {said}".strip()
        self.skip.setdefault(case, []).append(variant)
        whole = variant in ("", "timing") or case in ("inductor", "model", "start", "ceilings")
        if case == "ceilings":
            self.report.result.setdefault("ceilings", {})
        elif whole:
            self.report.done.add(case)


def show(result: dict[str, Any]) -> str:
    """What the terminal shows at the end."""
    rows = [tables.cells(row, result) for row in result["rows"]]
    parts = [tables.text_table(tables.HEADER, rows)]
    if result["models"]:
        parts.append(tables.text_table(tables.MODEL_HEADER, map(tables.model_cells, result["models"])))
    failed = [f"{row['case']}: {name}: {why}" for row in result["rows"] for name, why in row["failed"].items()]
    failed += [f"{name}: {why}" for name, why in result["broken"].items()]
    unusable = {name.partition(":")[2]: why for row in result["rows"] for name, why in row["unusable"].items()}
    failed += [f"backend {name}, at least in one case: {why}" for name, why in unusable.items()]
    if overlapping := tables.overlap_rows(result):
        parts.append(tables.text_table(tables.OVERLAP_HEADER, overlapping))
    if failed:
        parts.append("Not measured, for a reason:\n" + "\n".join(f"  {line[:200]}" for line in failed))
    if result["left_out"]:
        parts.append("Left out for lack of time: " + ", ".join(result["left_out"]) + ".")
    parts.append(tables.text_table(goals.HEADER, map(goals.cells, result["goals"])))
    parts.append(f"{tables.ceilings_line(result)} {result['seconds']:.0f} s in all; {result['state']}.")
    return "\n\n".join(parts)


def facts(dry: bool, budget: float) -> dict[str, Any]:
    """What a result says of how it was made."""
    settings = {"budget_seconds": budget, "weights": "rotated over sets that the L2 cannot hold"}
    return {**({"dry_run": True} if dry else {}), "settings": settings}


def main(given: list[str] | None = None, command: Command = worker_command) -> int:
    """Measure, print, write; 1 where it could not be brought to an end."""
    parser = argparse.ArgumentParser(description="Bench the GPU kernels.")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file; default: that of the results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; what they do not allow is left out")
    parser.add_argument("--cases", default="", help="words, by commas: only cases whose kind or name has one")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, to try the bench itself")
    arguments = parser.parse_args(given)
    if arguments.dry_run and arguments.out is None:
        parser.error("--dry-run must come with --out: its numbers mean nothing")
    start = time.time()
    cases = choose(arguments.cases, dry_cases() if arguments.dry_run else all_cases())
    report = Report(arguments.out or RESULT, facts(arguments.dry_run, arguments.budget))
    report.write()
    with tempfile.TemporaryDirectory() as folder:
        schedule = Schedule(report, cases, arguments.dry_run, report.path.with_suffix(".log"), command)
        report.result["state"] = schedule.run(Path(folder), start + arguments.budget)
    report.result["seconds"] = time.time() - start
    report.write(last=True)
    print(show(report.result))
    return 0 if report.result["state"] == "complete" else 1


if __name__ == "__main__":
    sys.exit(main())
