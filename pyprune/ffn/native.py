"""The native libraries, for CPU and CUDA: each loaded once, or why not. `csrc/build_native.py` writes them and their
record.

PYPRUNE_CPU_LIBRARY and PYPRUNE_CUDA_LIBRARY name another library to load instead; PYPRUNE_CPU_ISA, which the CPU
library reads, forces an ISA, or is refused.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..base.errors import InputError

_PACKAGE = Path(__file__).parents[1]


class _Native(NamedTuple):
    title: str
    file: str
    variable: str
    built: tuple[str, ...]  # what its record says of how it was built


_NATIVE = {
    "cpu": _Native(
        "CPU",
        "libpyprune_cpu.dylib" if sys.platform == "darwin" else "libpyprune_cpu.so",
        "PYPRUNE_CPU_LIBRARY",
        ("isas", "compiler", "torch", "taken"),
    ),
    "cuda": _Native(
        "CUDA",
        "libpyprune_cuda.so",
        "PYPRUNE_CUDA_LIBRARY",
        ("architectures", "left_out", "nvcc", "compiler", "torch", "taken"),
    ),
}
_ISA = "PYPRUNE_CPU_ISA"
_SOURCES = (".cpp", ".h", ".cu", ".cuh")
_INTERFACE = 4  # that of csrc/building.py


def library(which: str = "cpu") -> Path:
    """The file of the library `which`, cpu or cuda, that is loaded; it need not exist."""
    named = os.environ.get(_NATIVE[which].variable)
    return Path(named).absolute() if named else _PACKAGE / _NATIVE[which].file


def _record(which: str) -> dict[str, Any]:
    """What the build recorded beside the library; empty where it did not."""
    try:
        record = json.loads((library(which).with_name("native.json")).read_text(encoding="utf-8"))[which]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def _why_missing(which: str) -> str:
    native, reason = _NATIVE[which], _record(which).get("reason")
    if os.environ.get(native.variable) and not reason:
        return f"{native.variable} must name an existing file; got {library(which)}"
    how = "run `make native` in a checkout, or reinstall pyprune"
    return f"native {native.title} library not built: {reason or how}"


def _load(which: str) -> str | None:
    title, record = _NATIVE[which].title, _record(which)
    try:
        if not library(which).is_file():
            return _why_missing(which)
        # Its kernels would read operands that are not there.
        if record.get("built") and record.get("interface") != _INTERFACE:
            return f"native {title} library was built for other operators: run `make native`, or reinstall pyprune"
        torch.ops.load_library(library(which))
        return _why_no_isa() if which == "cpu" else None
    except Exception as error:
        return f"native {title} library cannot be loaded: {' '.join(str(error).split())}"


def _why_no_isa() -> str | None:
    """Let the loaded CPU library take the ISA that it will use; None, or why it has none."""
    try:
        torch.ops.pyprune.cpu_isa("")
    except RuntimeError:
        names = torch.ops.pyprune.cpu_isas().replace(",", ", ")
        return f"{_ISA} must be one of {names}; got {os.environ.get(_ISA)!r}"
    return None


@functools.cache
def load() -> str | None:
    """Load the CPU library, at the first call only; None, or in one line why it cannot be used. Never raises."""
    return _load("cpu")


def check_isa() -> None:
    """Raise `InputError` where PYPRUNE_CPU_ISA names what this machine or the CPU library has not.

    For whoever else would go on without the library, and so without what was asked for.
    """
    reason = load() if os.environ.get(_ISA) else None
    if reason is not None and reason.startswith(_ISA):
        raise InputError(reason)


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA library, as `load` does. It needs neither a device nor a torch with CUDA: `None` promises none."""
    return _load("cuda")


def _changed(which: str) -> list[str]:
    """Sources in a checkout, as paths below csrc, that are not those the library was built from."""
    csrc, built_from = _PACKAGE.parent / "csrc", _record(which).get("sources")
    if not isinstance(built_from, dict) or not (csrc / which).is_dir():
        return []
    files = [p for folder in (which, "common") for p in (csrc / folder).glob("*") if p.suffix in _SOURCES]
    found = {p.relative_to(csrc).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return sorted({name for name, _ in found.items() ^ built_from.items()})


def isa() -> str | None:
    """The instruction set in use, as the CPU library calls it."""
    try:
        name: str = torch.ops.pyprune.cpu_isa("")
    except (AttributeError, RuntimeError):
        return None
    return name


def facts(which: str = "cpu") -> dict[str, Any]:
    """JSON values of the library `which`, cpu or cuda: `state` (`usable`, or why not) and `path`; of a usable one also
    what it was built by, with and for (cpu: `isas`, `compiler`, `torch`; cuda: `architectures`, those `left_out`,
    `nvcc`, `compiler`, `torch`), `taken` (true where the build took it as it had been built before), `changed` (sources
    edited since; it is used all the same), and `isa` (cpu: in use).
    """
    reason = load_cuda() if which == "cuda" else load()
    if reason:
        return {"state": reason, "path": str(library(which))}
    record = _record(which)
    used = {"isa": isa()} if which == "cpu" else {}
    built = {key: record.get(key) for key in _NATIVE[which].built}
    return {"state": "usable", "path": str(library(which)), **used, **built, "changed": _changed(which)}


def _codes(architectures: list[str], kind: str) -> list[int]:
    """The numbers of a record's machine code (`sm`) or PTX (`compute`): 80, 90 and so on."""
    return [int(found[1]) for name in architectures if (found := re.fullmatch(rf"{kind}_(\d+)", str(name)))]


def code_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Which of a library's `architectures` a device of this compute capability runs, or None.

    Machine code of the device's own major number and no later minor one, else the newest PTX that is not newer than
    the device (CUDA programming guide, compatibility of binaries and of PTX).
    """
    device = capability[0] * 10 + capability[1]
    own = [n for n in _codes(architectures, "sm") if device // 10 * 10 <= n <= device]
    general = [n for n in _codes(architectures, "compute") if n <= device]
    return f"sm_{max(own)}" if own else f"compute_{max(general)}" if general else None


def _runs(code: str | None) -> str:
    """What it is for a device to run `code`: clusters are compiled for 9.0 and newer, as csrc/cuda/start.h asks."""
    if code is None:
        return "nothing: the library has no code for it"
    kind, _, number = code.partition("_")
    given = f"machine code of {code}" if kind == "sm" else f"PTX of {code}, compiled at the first call"
    return f"{given}, {'with' if int(number) >= 90 else 'without'} clusters and dependent launch"


def cuda_devices() -> dict[str, str]:
    """What runs of the CUDA library, in words: by the name of each device here, and by compute capability of any."""
    built = _record("cuda").get("architectures")
    if load_cuda() or not isinstance(built, list):
        return {}
    found = {}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        found[f"{torch.cuda.get_device_name(i)} ({major}.{minor})"] = _runs(code_for((major, minor), built))
    for number in sorted(_codes(built, "sm")):
        found[f"{number / 10} to {number // 10}.9"] = _runs(f"sm_{number}")
    general = sorted(_codes(built, "compute"))
    for number, newer in itertools.zip_longest(general, general[1:]):
        found[f"any other from {number / 10}" + (f" to {(newer - 1) / 10}" if newer else "")] = _runs(
            f"compute_{number}"
        )
    return found


def describe(which: str = "cpu") -> str:
    """`facts` in one line."""
    found = facts(which)
    if found["state"] != "usable":
        return str(found["state"])
    how = "taken as built before" if found["taken"] else "built"
    if which == "cpu":
        built = ", ".join(found["isas"] or ["no ISA but the portable one"])
        line = f"native CPU library: {found['isa'] or 'an unknown ISA'} in use ({how}: {built}; {found['compiler']}, "
    else:
        built = ", ".join(found["architectures"] or ["unknown architectures"])
        line = f"native CUDA library: loaded ({how}: {built}; nvcc {found['nvcc']}, {found['compiler']}, "
    line += f"torch {found['torch']})"
    if found["changed"]:
        line += f"; older than {', '.join(found['changed'])}: run `make native`"
    return line
