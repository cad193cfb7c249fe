"""`make gpu`: build, test, check memory accesses and bench on this machine's GPU in nine minutes, into one JSON file.

    python bench/gpu.py [--minutes 9] [--out FILE]

Any Python that has torch will do; pyprune need not be installed in it. Without a GPU nothing is done at all, and the
exit code is 2. A stage that fails is recorded, the bench runs all the same, and the exit code is then 1.

Where the variable OUT names a folder, as on machines from which only that comes back, result and logs are put there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import gpu_stages as stages
from boxed import Box, tail

REFUSED = 2
RESULT = stages.HERE / "results" / "gpu.json"
# What the bench needs after its budget: the case under way, the last lines.
AFTER = 20.0


def refusal(dry: bool) -> str | None:
    """Why nothing is done here, in one line, or None."""
    if dry or stages.devices():
        return None
    return "make gpu needs an NVIDIA GPU, and the driver shows none here; nothing was built, nothing was run."


def unfit(facts: dict[str, Any], dry: bool) -> str | None:
    """Why this Python cannot do it, in one line, or None."""
    if facts.get("torch") is None:
        return f"make gpu needs a Python with torch; {sys.executable} has none that can be imported ({facts['why']})."
    if not facts.get("sees") and not dry:
        return f"make gpu needs a torch that sees the GPU; torch {facts['torch']} does not."
    if not facts.get("pyprune"):
        return f"pyprune cannot be imported by {sys.executable}: {facts['why']}."
    return None


def before_the_bench(logs: Path, facts: dict[str, Any], dry: bool, outside: str | None) -> dict[str, Any]:
    """Build beside compiling Triton's kernels, then tests beside the sanitizer; what is recorded of them."""
    found: dict[str, Any] = {"probe": facts}
    boxes = stages.warm(logs, dry)
    if not dry:
        building = stages.build(logs, facts.get("capability"))
        found["build"] = stages.build_facts(building, building.wait())
        stages.hand_over(logs, outside)
        print(f"build: {found['build']['code']} after {building.seconds:.0f} s", flush=True)
    found["warm"] = {"codes": [box.wait() for box in boxes], "seconds": max(box.seconds for box in boxes)}
    if facts.get("pytest"):
        testing = stages.tests(logs, facts, dry)
        checking = None if dry else stages.sanitizer(logs)
        found["tests"] = stages.tests_facts(testing, testing.wait())
        stages.hand_over(logs, outside)
        print(f"tests: {found['tests']['counts']} after {testing.seconds:.0f} s", flush=True)
        found["sanitizer"] = stages.sanitizer_facts(checking, None if checking is None else checking.wait())
        print(f"sanitizer: {found['sanitizer']['verdict']}", flush=True)
    else:
        found["tests"] = {"code": None, "why": "this Python has no pytest"}
        found["sanitizer"] = {"verdict": "none", "why": "this Python has no pytest"}
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """The stages that went wrong."""
    wrong = [name for name in ("build", "tests", "bench") if name in found and found[name].get("code") != 0]
    return wrong + (["sanitizer"] if found["sanitizer"]["verdict"] == "errors" else [])


def main(given: list[str] | None = None) -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description="Build, test and bench on this machine's GPU.")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file; default: that of the results")
    parser.add_argument("--cases", default="", help="as bench_gpu.py takes it")
    parser.add_argument("--dry-run", action="store_true", help="the same on a CPU, tiny, without building")
    arguments = parser.parse_args(given)
    start, dry = time.monotonic(), arguments.dry_run
    if reason := refusal(dry):
        print(reason)
        return REFUSED
    os.chdir(stages.ROOT)
    outside = os.environ.get("OUT")
    result = arguments.out or (Path(outside) / RESULT.name if outside else RESULT)
    logs = stages.fresh_logs()
    facts = stages.probe(logs)
    if reason := unfit(facts, dry):
        print(reason)
        return REFUSED
    found = before_the_bench(logs, facts, dry, outside)
    stages.hand_over(logs, outside)
    recorded = logs / "stages.json"
    recorded.write_text(json.dumps(found), encoding="utf-8")
    left = max(30.0, arguments.minutes * 60 - (time.monotonic() - start) - AFTER)
    command = [sys.executable, str(stages.HERE / "bench_gpu.py"), f"--budget={left:.0f}", f"--out={result}"]
    command += [f"--stages={recorded}", f"--cases={arguments.cases}", *(["--dry-run"] if dry else [])]
    benching = Box.start(command, logs / "bench.log", left + AFTER, stages.environment())
    found["bench"] = {"code": benching.wait(), "seconds": benching.seconds}
    stages.hand_over(logs, outside)
    print(tail(benching.log, 400))
    _finish(result, found, time.monotonic() - start, keep=bool(outside) and not dry and not arguments.out)
    wrong = failures(found)
    print(f"{time.monotonic() - start:.0f} s in all; {result}; " + (f"wrong: {', '.join(wrong)}" if wrong else "well"))
    return 1 if wrong else 0


def _finish(result: Path, found: dict[str, Any], seconds: float, keep: bool) -> None:
    """Add what only the end knows, and put a copy among the results."""
    try:
        whole = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        whole = {"suite": "gpu", "state": "the bench wrote nothing", "rows": [], "models": []}
    whole |= {"stages": found, "seconds_in_all": seconds}
    beside = result.with_name(f".{result.name}.new")
    beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    beside.replace(result)
    if keep:
        shutil.copyfile(result, RESULT)


if __name__ == "__main__":
    sys.exit(main())
