"""The stages of `make gpu` before the bench: what each runs, and what is recorded of it. Standard library only."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from boxed import TIMED_OUT, Box, tail

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Most seconds of each stage.
PROBE, BUILD, WARM, TESTS, SANITIZER = 60.0, 170.0, 100.0, 150.0, 100.0
WARMERS, TESTERS = 6, 8
SANITIZER_FOUND = 9
_ARCHITECTURES = {8: "80", 9: "90a", 10: "100a"}

_ASK = """
import importlib.util, json, sys
facts = {"python": sys.version.split()[0]}
for name in ("pytest", "xdist", "pytest_timeout", "hypothesis", "triton", "transformers"):
    facts[name] = importlib.util.find_spec(name) is not None
try:
    import torch
    facts["torch"] = torch.__version__
    facts["sees"] = torch.cuda.is_available()
    facts["capability"] = torch.cuda.get_device_capability() if facts["sees"] else None
except Exception as error:
    facts["torch"], facts["why"] = None, f"{type(error).__name__}: {error}"
try:
    import pyprune
    import pyprune.backends.triton
    facts["pyprune"] = pyprune.__file__ is not None
    facts["triton kernels"] = str(importlib.util.find_spec("pyprune.triton_kernels") is not None)
except Exception as error:
    facts["pyprune"], facts["why"] = False, f"{type(error).__name__}: {error}"
print(json.dumps(facts))
"""

_BUILD = """
import sys
sys.path.insert(0, "csrc")
import build_native
build_native.build(build_native.ROOT / "pyprune", build_native.ROOT)
"""


def devices() -> int:
    """NVIDIA GPUs as the driver counts them, or nvidia-smi where the driver's library is not found; 0 for none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    except (OSError, AttributeError):
        pass
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in said.splitlines())


def environment(**more: str) -> dict[str, str]:
    """That of the stages: the checkout's own packages, and the bench's folder for the plugin."""
    places = [str(HERE / "checkout"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1", **more}


# With the result's, as many files as machines that lend a GPU may hand back.
_HANDED = ("bench.log", "build.log", "tests.log", "sanitizer.log", "outcomes.jsonl", "warm.log")


def fresh_logs() -> Path:
    """The folder of the logs, without those of an earlier run."""
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    for file in logs.iterdir():
        file.unlink()
    return logs


def hand_over(logs: Path, outside: str | None) -> None:
    """Copy the logs that there are into the folder `outside`, if there is one."""
    for name in _HANDED if outside else ():
        if (logs / name).is_file():
            shutil.copyfile(logs / name, Path(str(outside)) / name)


def probe(logs: Path) -> dict[str, Any]:
    """What this Python has: versions, whether torch sees the GPU, which of pytest's plugins there are."""
    log = logs / "probe.log"
    code = Box.start([sys.executable, "-c", _ASK], log, PROBE, environment()).wait()
    for line in reversed(tail(log, 5).splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    return {"torch": None, "pyprune": False, "why": f"the probe ended with {code}: {tail(log, 2)}"}


def build(logs: Path, capability: list[int] | None) -> Box:
    """Both native libraries; the CUDA one, which is required, for this device alone unless told otherwise."""
    more = {"PYPRUNE_CUDA": "require"}
    if capability and not os.environ.get("PYPRUNE_CUDA_ARCHS") and capability[0] in _ARCHITECTURES:
        more["PYPRUNE_CUDA_ARCHS"] = _ARCHITECTURES[capability[0]]
    os.chdir(ROOT)
    return Box.start([sys.executable, "-c", _BUILD], logs / "build.log", BUILD, environment(**more))


def build_facts(box: Box, code: int) -> dict[str, Any]:
    """What is recorded of the build."""
    try:
        record = json.loads((ROOT / "pyprune" / "native.json").read_text(encoding="utf-8")).get("cuda", {})
    except (OSError, ValueError):
        record = {}
    record.pop("sources", None)
    log = ROOT / "pyprune" / "native_cuda.log"
    said = tail(log, 30) if log.is_file() else tail(box.log)
    return {"code": code, "seconds": box.seconds, "cuda": record, **({"said": said} if code else {})}


def warm(logs: Path, dry: bool) -> list[Box]:
    """Processes that compile the bench's Triton kernels into Triton's cache."""
    boxes = []
    for i in range(WARMERS if not dry else 1):
        plan = logs / f"warm-{i}.plan"
        plan.write_text(json.dumps({"dry": dry, "share": i, "of": WARMERS if not dry else 1}), encoding="utf-8")
        command = [sys.executable, str(HERE / "gpu_warm.py"), str(plan)]
        boxes.append(Box.start(command, logs / "warm.log", WARM, environment()))
    return boxes


def test_files(dry: bool) -> list[str]:
    """Files that hold tests for a GPU, the backends' own first."""
    if dry:
        return ["tests/test_gpu.py"]
    own = ["tests/test_gpu.py"]
    found = (p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8"))
    return [*own, *(f"tests/{p.name}" for p in found if f"tests/{p.name}" not in own and p.name != "test_bench_gpu.py")]


def tests(logs: Path, facts: dict[str, Any], dry: bool) -> Box:
    """All tests marked `gpu`, in several processes where pytest can."""
    outcomes = logs / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", *test_files(dry), "-m", "not gpu" if dry else "gpu", "-q"]
    command += ["-p", "no:cacheprovider", "-p", "gpu_outcomes", "--continue-on-collection-errors", "--tb=short"]
    command += ["--timeout=90", "--timeout-method=thread"] if facts.get("pytest_timeout") else []
    command += ["-n", str(1 if dry else TESTERS)] if facts.get("xdist") else []
    return Box.start(command, logs / "tests.log", TESTS, environment(PYPRUNE_OUTCOMES=str(outcomes)))


def tests_facts(box: Box, code: int) -> dict[str, Any]:
    """How many passed, and which did not; of a run that was ended, as far as it came."""
    lines = []
    file = box.log.with_name("outcomes.jsonl")
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        lines.append(json.loads(line))
    wrong = [line for line in lines if line["outcome"] in ("failed", "not collected")]
    skipped = Counter(line["message"].splitlines()[-1][:160] for line in lines if line["outcome"] == "skipped")
    return {
        "code": code,
        "timed_out": code == TIMED_OUT,
        "seconds": box.seconds,
        "counts": dict(Counter(line["outcome"] for line in lines)),
        "failed": [{key: line[key] for key in ("id", "message")} for line in wrong][:40],
        "skipped": dict(skipped),
        "slowest": [[line["id"], line["seconds"]] for line in sorted(lines, key=lambda x: -x["seconds"])[:8]],
    }


def sanitizer(logs: Path) -> Box | None:
    """memcheck over the tests named `sanitized`; None where there is no such tool."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return None
    command = [tool, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_FOUND), sys.executable, "-m", "pytest"]
    command += ["tests/test_gpu.py", "-m", "gpu", "-k", "sanitized", "-q", "-p", "no:cacheprovider"]
    # Without torch's cache every tensor is an allocation of its own, so that a read behind its end shows.
    return Box.start(command, logs / "sanitizer.log", SANITIZER, environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


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
