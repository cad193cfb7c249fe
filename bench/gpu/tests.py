"""The tests that `bench/gpu/job.py` runs on the GPU, by several processes, and the memory checker over the fewest.

Standard library only.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from bench.boxed import TIMED_OUT, Box, tail
from bench.gpu.stages import ROOT, environment

# Most seconds of each.
TESTS, CHECK, SANITIZER = 150.0, 45.0, 100.0
TESTERS = 12
SANITIZER_FOUND = 9
# pytest's exit code where no test is left to run, as in a share of few tests.
_NONE_LEFT = 5
# A handful for each kernel: against float64 in every form, and calls that the memory checker runs too.
_HANDFUL = "sanitized or (float64 and bfloat16)"


def test_files(few: bool) -> list[str]:
    """Files that hold tests for a GPU, the backends' own first; these only where few will do."""
    own = ["tests/test_gpu.py"]
    if few:
        return own
    found = (p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8"))
    return [*own, *(f"tests/{p.name}" for p in found if f"tests/{p.name}" not in own)]


def tests(logs: Path, facts: dict[str, Any], dry: bool, limit: float, few: bool = False) -> list[Box]:
    """The tests marked `gpu`, shared out among processes; with `few` a handful for each kernel.

    A rehearsal runs those of the handful that need no GPU, in one process.
    """
    of = 1 if dry else TESTERS
    command = [sys.executable, "-m", "pytest", *test_files(dry or few), "-m", "not gpu" if dry else "gpu", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "bench.gpu.outcomes", "--continue-on-collection-errors", "--tb=short"]
    command += ["-k", "sanitized" if dry else _HANDFUL] if dry or few else []
    command += ["--timeout=90", "--timeout-method=thread"] if facts.get("pytest_timeout") else []
    boxes = []
    for i in range(of):
        more = {"PYPRUNE_OUTCOMES": str(logs / "outcomes.jsonl"), "PYPRUNE_SHARE": f"{i} {of}"}
        boxes.append(Box.start(command, logs / f"tests-{i}.log", limit, environment(**more)))
    return boxes


def _placeless(message: str) -> str:
    """A message without the folders of this machine."""
    return message.replace(f"{sys.prefix}/", "").replace(f"{ROOT}/", "")


def tests_facts(boxes: list[Box], codes: list[int]) -> dict[str, Any]:
    """How many passed, and which did not; of a run that was ended, as far as it came."""
    lines = []
    codes = [0 if code == _NONE_LEFT and len(codes) > 1 else code for code in codes]
    file = boxes[0].log.with_name("outcomes.jsonl")
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        lines.append(json.loads(line))
    wrong = [line for line in lines if line["outcome"] in ("failed", "not collected")]
    left = [_placeless(line["message"]) for line in lines if line["outcome"] == "skipped"]
    skipped = Counter(message.splitlines()[-1][:160] for message in left)
    return {
        "code": max(codes, key=abs),
        "timed_out": codes.count(TIMED_OUT),
        "processes": len(codes),
        "counts": dict(Counter(line["outcome"] for line in lines)),
        "failed": [{"id": line["id"], "message": _placeless(line["message"])} for line in wrong][:40],
        "skipped": dict(skipped),
        "slowest": [[line["id"], line["seconds"]] for line in sorted(lines, key=lambda x: -x["seconds"])[:8]],
    }


def sanitizer(logs: Path, limit: float = SANITIZER) -> Box | None:
    """memcheck over the tests named `sanitized`; None where there is no such tool."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_FOUND), sys.executable, "-m", "pytest"]
    command += ["tests/test_gpu.py", "-m", "gpu", "-k", "sanitized", "-q", "-p", "no:cacheprovider"]
    # Without torch's cache every tensor is an allocation of its own, so that a read behind its end shows.
    return Box.start(command, logs / "sanitizer.log", limit, environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def sanitizer_facts(box: Box | None, code: int | None) -> dict[str, Any]:
    """The verdict: clean, errors, or none, with the reason."""
    if box is None or code is None:
        return {"verdict": "none", "why": "there is no compute-sanitizer here"}
    said = tail(box.log, 25)
    if code == 0:
        return {"verdict": "clean", "seconds": box.seconds, "said": tail(box.log, 3)}
    if code == TIMED_OUT:
        return {"verdict": "none", "why": f"ended after {box.limit:.0f} s", "said": said}
    if "not supported" in said.lower():
        return {"verdict": "none", "why": "compute-sanitizer does not work on this device", "said": said}
    return {"verdict": "errors", "code": code, "seconds": box.seconds, "said": said}
