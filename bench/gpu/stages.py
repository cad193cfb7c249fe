"""What `bench/gpu/job.py` does before it measures: a look at this Python, the libraries, Triton's cache, plans.

Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.boxed import Box, tail
from bench.gpu import output

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent
# Most seconds of each. An import of torch on a machine that never did it takes a minute and more.
PROBE, BUILD, WARM, PLANS = 150.0, 170.0, 75.0, 60.0
WARMERS = 8

_ASK = """
import importlib.util, json, sys
facts = {"python": sys.version.split()[0]}
for name in ("pytest", "pytest_timeout", "hypothesis", "triton", "transformers"):
    facts[name] = importlib.util.find_spec(name) is not None
try:
    import torch
    facts["torch"] = torch.__version__
    facts["sees"] = torch.cuda.is_available()
    facts["capability"] = torch.cuda.get_device_capability() if facts["sees"] else None
    facts["device"] = torch.cuda.get_device_name() if facts["sees"] else None
except Exception as error:
    facts["torch"], facts["why"] = None, f"{type(error).__name__}: {error}"
try:
    import pyprune
    import pyprune.ffn.backends.triton
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
    places = [str(HERE / "checkout"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1", **more}


def fresh_logs(dry: bool) -> Path:
    """The folder of the logs, without those of an earlier run; a rehearsal has its own."""
    logs = output.WORK.with_name("gpu-dry") if dry else output.WORK
    logs.mkdir(parents=True, exist_ok=True)
    for file in logs.iterdir():
        file.unlink()
    return logs


def probe(logs: Path) -> Box:
    """Start to ask what this Python has: versions, whether torch sees the GPU, which of pytest's plugins there are."""
    return Box.start([sys.executable, "-c", _ASK], logs / "probe.log", PROBE, environment())


def probe_facts(box: Box, code: int) -> dict[str, Any]:
    """What it answered."""
    for line in reversed(tail(box.log, 5).splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    return {"torch": None, "pyprune": False, "why": f"the probe ended with {code}: {tail(box.log, 2)}"}


def architecture(capability: list[int] | None) -> str | None:
    """The name in build_cuda.ARCHITECTURES whose machine code a device of this compute capability runs, or None."""
    sys.path.insert(0, str(ROOT / "csrc"))
    from build_cuda import ARCHITECTURES

    found = None
    for name in ARCHITECTURES:
        number = int(name.rstrip("af"))
        if capability and number // 10 == capability[0] and number % 10 <= capability[1]:
            found = name
    return found


def build(logs: Path, capability: list[int] | None) -> Box:
    """Take the libraries that were built beforehand, or build them: the CUDA one, which is required, for this device
    alone unless told otherwise. Those beforehand lie in the package or where PYPRUNE_PREBUILT says.
    """
    more = {"PYPRUNE_CUDA": "require", "PYPRUNE_PREBUILT": os.environ.get("PYPRUNE_PREBUILT") or str(ROOT / "pyprune")}
    if not os.environ.get("PYPRUNE_CUDA_ARCHS") and (name := architecture(capability)):
        more["PYPRUNE_CUDA_ARCHS"] = name
    return Box.start([sys.executable, "-c", _BUILD], logs / "build.log", BUILD, environment(**more))


def build_facts(box: Box, code: int) -> dict[str, Any]:
    """What is recorded of the build; `taken` tells for each library whether it was built beforehand."""
    try:
        record = json.loads((ROOT / "pyprune" / "native.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    taken = {name: bool(facts.get("taken")) for name, facts in record.items()}
    cuda = {name: value for name, value in record.get("cuda", {}).items() if name != "sources"}
    log = ROOT / "pyprune" / "native_cuda.log"
    said = tail(log, 30) if log.is_file() else tail(box.log)
    refused = [line for line in tail(box.log, 40).splitlines() if "not taken" in line]
    return {"code": code, "taken": taken, "not_taken": refused, "cuda": cuda, **({"said": said} if code else {})}


def warm(logs: Path, dry: bool, kinds: tuple[str, ...], name: str, limit: float = WARM) -> list[Box]:
    """Processes that compile the Triton kernels of the cases of these kinds into Triton's cache."""
    boxes, of = [], 1 if dry else WARMERS
    for i in range(of):
        plan = logs / f"{name}-{i}.plan"
        plan.write_text(json.dumps({"dry": dry, "share": i, "of": of, "kinds": kinds}), encoding="utf-8")
        command = [sys.executable, "-m", "bench.gpu.warm", str(plan)]
        boxes.append(Box.start(command, logs / f"{name}.log", limit, environment()))
    return boxes


def plans(logs: Path) -> Box:
    """The plans of every case, where there is no GPU: by the simulator."""
    command = [sys.executable, "-m", "bench.gpu.plans", str(logs / "plans.json")]
    return Box.start(command, logs / "plans.log", PLANS, environment())


def plans_facts(box: Box, code: int) -> dict[str, Any]:
    """The plans by case, or why there are none."""
    file = box.log.with_name("plans.json")
    if code or not file.is_file():
        return {"code": code, "why": tail(box.log, 3)}
    return {"code": code, "cases": json.loads(file.read_text(encoding="utf-8"))}
