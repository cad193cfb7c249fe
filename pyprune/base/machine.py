"""Facts about the machine and the versions, for the provenance of measured numbers."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from .errors import check

_PACKAGES = ("torch", "transformers", "triton", "pyprune")
_PACKAGE = Path(__file__).parents[1]
_CPUINFO = Path("/proc/cpuinfo")
# What runs, apart from the package itself: a commit names the numbers only if these are as committed.
_SOURCES = (":(top)csrc", ":(top)triton_kernels", ":(top)setup.py")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def cpu_name() -> str:
    """The CPU's model name, or its architecture where the system does not say.

    Virtual machines often name no more than the brand, `AMD EPYC`; such a name is followed by the numbers that tell
    generations apart: `AMD EPYC (family 25, model 17)`.
    """
    try:
        first = _CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    name = known.get("model name") or platform.processor() or platform.machine()
    if re.search(r"\d", name) or not {"cpu family", "model"} <= known.keys():
        return name
    return f"{name} (family {known['cpu family']}, model {known['model']})"


def usable_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _git(*arguments: str) -> str | None:
    """Output of a git command in the package's folder, or None when it fails; never touches the index."""
    command = ["git", "--no-optional-locks", "-C", str(_PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def source() -> dict[str, Any]:
    """`commit` of the source tree and whether it is `dirty`; both None for an installed package.

    Dirty means that code which runs differs from the commit: results, README and tests do not count.
    """
    # A package installed inside somebody else's repository is not tracked by it.
    if not _git("ls-files", "--error-unmatch", "__init__.py"):
        return {"commit": None, "dirty": None}
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--", ".", *_SOURCES))}


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def place_of(device: str | torch.device) -> torch.device:
    """A device that torch sees here, with its number.

    Raises:
        InputError: another one.
    """
    rule = "be cpu or cuda"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        check(False, "device", rule, device)
        raise
    check(place.type in ("cpu", "cuda"), "device", rule, str(device))
    if place.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    check(count > 0, "device", "be cpu, for torch sees no CUDA device here", str(device))
    check((place.index or 0) < count, "device", f"be one of the {count} that torch sees", str(device))
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def name_of(device: torch.device) -> str:
    """What results may depend on of a device: `cpu`, or which GPU."""
    return device.type if device.type != "cuda" else f"cuda ({torch.cuda.get_device_name(device)})"


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply bfloat16; where it has none, that is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in every build
    return bool(supported and supported() and torch.cpu._is_avx512_bf16_supported())


PRECISIONS = ("auto", "float32", "bfloat16")


def products(precision: str, device: torch.device) -> torch.dtype:
    """The dtype in which matrices are multiplied: `auto` is bfloat16 where the device has instructions for it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    return torch.bfloat16 if fast_bfloat16(device) else torch.float32


def facts() -> dict[str, Any]:
    """What a reader needs to judge a number: plain JSON values; no host name, no user name, no paths.

    Keys: `cpu`, `instructions` (what torch was able to pick), `cores` (usable by this process), `torch_threads`,
    `memory_bytes`, `load` (mean of runnable processes over the last minute: well above 0 before a bench starts means
    noise), `gpu` (None, or `name`, `memory_bytes`, `capability`, `cuda`), `system`, `versions`, `commit`, `dirty`,
    `date` (UTC).
    """
    return {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "load": round(psutil.getloadavg()[0], 2),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        **source(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
