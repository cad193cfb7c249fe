"""Build, measure, test and check memory accesses on this machine's GPU in nine minutes, into one JSON file.

    python3 -m bench.gpu.job [--minutes 9] [--out FILE]
    python3 -m bench.gpu.job --quick            3 minutes: a handful of tests, then decode and small layers
    python3 -m bench.gpu.job --dry-run --out FILE       all of it on a CPU, tiny, without building; numbers mean nothing

Any Python that has torch will do; pyprune need not be installed in it. Without a GPU nothing is done at all, and the
exit code is 2. A stage that fails is recorded, the others run all the same, and the exit code is then 1.

Order: a look at this Python; the libraries, taken where `make native` built them from these sources elsewhere, else
compiled for this device alone; decode and small layers; all tests marked `gpu`, beside the memory checker; all other
cases, as far as time goes. The result is whole and on disk after every case and every stage. Where the variable OUT
names a folder, as on machines from which only that comes back, result and logs are put there, seven files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from bench import boxed
from bench.gpu import run as bench_gpu
from bench.gpu import stages, tables
from bench.gpu import tests as testing
from bench.gpu.cases import FIRST, all_cases, choose, dry_cases
from bench.gpu.output import Handed

REFUSED = 2
MINUTES, QUICK = 9.0, 3.0
# Seconds kept for the case under way and the last lines; the most of the first cases, so that tests have their turn.
AFTER, FIRST_CASES = 20.0, 150.0


def refusal(dry: bool) -> str | None:
    """Why nothing is done here, in one line, or None."""
    if dry or stages.devices():
        return None
    return "bench/gpu/job.py needs an NVIDIA GPU, and the driver shows none here; nothing was built, nothing was run."


def unfit(facts: dict[str, Any], dry: bool) -> str | None:
    """Why this Python cannot do it, in one line, or None."""
    if facts.get("torch") is None:
        return f"the bench needs a Python with torch; {sys.executable} has none that can be imported ({facts['why']})."
    if not facts.get("sees") and not dry:
        return f"bench/gpu/job.py needs a torch that sees the GPU; torch {facts['torch']} does not."
    if not facts.get("pyprune"):
        return f"pyprune cannot be imported by {sys.executable}: {facts['why']}."
    return None


class Run:
    """All stages, each recorded in the result when it begins and when it ends."""

    def __init__(self, report: bench_gpu.Report, logs: Path, outside: Path | None, seconds: float, dry: bool) -> None:
        self.report, self.logs, self.dry, self.seconds = report, logs, dry, seconds
        self.handed = Handed(logs, outside)
        self.start = time.monotonic()
        self.stages: dict[str, dict[str, Any]] = report.result.setdefault("stages", {})
        # The committed result is not replaced before it is known that there will be another.
        self.writes = report.path != bench_gpu.RESULT

    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - AFTER - (time.monotonic() - self.start)

    def save(self, last: bool = False) -> None:
        """Put on disk what there is."""
        self.report.result["seconds"] = time.monotonic() - self.start
        if self.writes:
            self.report.write(last)
        self.handed.now()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A stage: what is put into the yielded dict is recorded of it."""
        began = time.monotonic() - self.start
        facts = self.stages[name] = {"began": began}
        self.report.result["state"] = f"running: {name}"
        self.save()
        try:
            yield facts
        finally:
            facts["seconds"] = time.monotonic() - self.start - began
            self.save()
            print(f"{began:5.0f} s  {name}: {facts['seconds']:.1f} s, {outcome(facts)}", flush=True)

    def look(self) -> dict[str, Any]:
        """The probe."""
        with self.stage("probe") as facts:
            box = stages.probe(self.logs)
            facts |= stages.probe_facts(box, box.wait(self.handed.tick))
        return facts

    def prepare(self, probe: dict[str, Any]) -> None:
        """The libraries, beside compiling the Triton kernels that the first cases want."""
        warming = stages.warm(self.logs, self.dry, FIRST, "warm-first")
        if self.dry:
            with self.stage("plans") as facts:
                box = stages.plans(self.logs)
                facts |= stages.plans_facts(box, box.wait(self.handed.tick))
        else:
            with self.stage("build") as facts:
                box = stages.build(self.logs, probe.get("capability"))
                facts |= stages.build_facts(box, box.wait(self.handed.tick))
        with self.stage("warm") as facts:
            facts["codes"] = boxed.wait_all(warming, self.handed.tick)

    def test(self, probe: dict[str, Any], limit: float, few: bool) -> None:
        """The tests, beside the memory checker and compiling what the rest of the cases wants; `few` of them alone."""
        with self.stage("tests") as facts:
            if not probe.get("pytest"):
                facts |= {"code": None, "why": "this Python has no pytest"}
                return
            boxes = testing.tests(self.logs, probe, self.dry, limit, few)
            checking = None if self.dry or few else testing.sanitizer(self.logs, limit)
            warming = [] if few else stages.warm(self.logs, self.dry, REST, "warm-rest", limit)
            facts |= testing.tests_facts(boxes, boxed.wait_all(boxes, self.handed.tick))
        if few:
            return
        with self.stage("sanitizer") as facts:
            code = None if checking is None else checking.wait(self.handed.tick)
            facts |= testing.sanitizer_facts(checking, code)
            boxed.wait_all(warming, self.handed.tick)

    def measure(self, schedule: bench_gpu.Schedule, name: str, seconds: float, kinds: tuple[str, ...] | None) -> None:
        """The cases of these kinds that are not done yet, in so many seconds."""
        with self.stage(name) as facts, tempfile.TemporaryDirectory() as folder:
            before = len(self.report.done)
            facts["outcome"] = schedule.run(Path(folder), time.time() + max(30.0, seconds), kinds)
            facts["code"] = int(facts["outcome"] != "complete")
            facts["cases"] = len(self.report.done) - before

    def all(self, cases: list[bench_gpu.Case], quick: bool) -> str | None:
        """Everything; why it was not begun, or None."""
        probe = self.look()
        if reason := unfit(probe, self.dry):
            return reason
        self.writes = True
        self.prepare(probe)
        log = self.logs / "bench.log"
        schedule = bench_gpu.Schedule(
            self.report, cases, self.dry, log, tick=self.handed.tick, environment=stages.environment()
        )
        if quick:
            self.test(probe, min(testing.CHECK, max(10.0, self.left() / 3)), few=True)
            self.measure(schedule, "first cases", self.left(), FIRST)
            return None
        self.measure(schedule, "first cases", min(FIRST_CASES, self.left()), FIRST)
        self.test(probe, min(testing.TESTS, max(30.0, self.left() / 2)), few=False)
        self.measure(schedule, "other cases", self.left(), None)
        return None


REST = tuple(dict.fromkeys(c.kind for c in all_cases() if c.kind not in (*FIRST, "model", "inductor")))


def outcome(facts: dict[str, Any]) -> str:
    """A stage's outcome in a few words."""
    if "taken" in facts:
        how = ", ".join(f"{name} {'taken' if taken else 'compiled'}" for name, taken in facts["taken"].items())
        return f"code {facts['code']}, {how or 'no library'}"
    for key in ("outcome", "why", "counts", "verdict", "device", "codes"):
        if facts.get(key):
            return str(facts[key])[:150]
    return f"{len(facts['cases'])} cases" if isinstance(facts.get("cases"), dict) else "done"


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    """The stages that went wrong."""
    wrong = [name for name, facts in found.items() if facts.get("code", 0) != 0 and facts.get("code") is not None]
    return wrong + (["sanitizer"] if found.get("sanitizer", {}).get("verdict") == "errors" else [])


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(given: list[str] | None = None) -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description="Build, measure and test on this machine's GPU.")
    parser.add_argument(
        "--minutes", type=float, default=None, help=f"for everything; {MINUTES:g}, {QUICK:g} with --quick"
    )
    parser.add_argument("--quick", action="store_true", help="a handful of tests, decode and small layers only")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file; default: that of the results")
    parser.add_argument("--cases", default="", help="words, by commas: only cases whose kind or name has one")
    parser.add_argument("--dry-run", action="store_true", help="the same on a CPU, tiny, without building")
    arguments = parser.parse_args(given)
    dry, outside = arguments.dry_run, os.environ.get("OUT")
    if dry and not (arguments.out or outside):
        parser.error("--dry-run must come with --out, or with OUT set: its numbers mean nothing")
    if reason := refusal(dry):
        print(reason)
        return REFUSED
    result = (arguments.out or (Path(outside) / "gpu.json" if outside else bench_gpu.RESULT)).absolute()
    folder = Path(outside).absolute() if outside else None
    os.chdir(stages.ROOT)
    seconds = 60 * (arguments.minutes or (QUICK if arguments.quick else MINUTES))
    report = bench_gpu.Report(result, bench_gpu.facts(dry, seconds))
    run = Run(report, stages.fresh_logs(dry), folder, seconds, dry)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        reason = run.all(choose(arguments.cases, dry_cases() if dry else all_cases()), arguments.quick)
    except BaseException as problem:
        report.result["state"] = f"{report.result['state']}; ended by {type(problem).__name__}: {problem}"
        raise
    finally:
        run.save()
        boxed.end_all()
    wrong = failures(run.stages)
    report.result["state"] = reason or (f"wrong: {', '.join(wrong)}" if wrong else "complete")
    run.save(last=True)
    if reason:
        print(reason)
        return REFUSED
    print(bench_gpu.show(report.result))
    print(tables.text_table(("stage", ">began, s", ">took, s", "outcome"), map(_line, run.stages.items())))
    print(f"{report.result['seconds']:.0f} s in all; {result}; {report.result['state']}")
    return 1 if wrong else 0


def _line(item: tuple[str, dict[str, Any]]) -> list[str]:
    name, facts = item
    return [name, f"{facts['began']:.1f}", f"{facts['seconds']:.1f}", outcome(facts)]


if __name__ == "__main__":
    sys.exit(main())
