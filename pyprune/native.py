"""The native CPU library: loaded once, or why there is none. `csrc/build_native.py` writes it and its record.

PYPRUNE_CPU_LIBRARY names another library to load instead; PYPRUNE_CPU_ISA, which the library reads, forces an ISA.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_NAME = "libpyprune_cpu.dylib" if sys.platform == "darwin" else "libpyprune_cpu.so"


def library() -> Path:
    """The file that `load` takes; it need not exist."""
    named = os.environ.get("PYPRUNE_CPU_LIBRARY")
    return Path(named).absolute() if named else _PACKAGE / _NAME


def _record() -> dict[str, Any]:
    """What the build recorded beside the library; empty where it did not."""
    try:
        record = json.loads((library().with_name("native.json")).read_text(encoding="utf-8"))["cpu"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def _why_missing() -> str:
    reason = _record().get("reason")
    if os.environ.get("PYPRUNE_CPU_LIBRARY") and not reason:
        return f"PYPRUNE_CPU_LIBRARY must name an existing file; got {library()}"
    return f"native CPU library not built: {reason or 'run `make native` in a checkout, or reinstall pyprune'}"


@functools.cache
def load() -> str | None:
    """Load the library, at the first call only; None, or in one line why it cannot be used. Never raises."""
    try:
        if not library().is_file():
            return _why_missing()
        torch.ops.load_library(library())
    except Exception as error:
        return f"native CPU library cannot be loaded: {' '.join(str(error).split())}"
    return None


def _changed() -> list[str]:
    """Sources in a checkout that are not those the library was built from."""
    folder, built_from = _PACKAGE.parent / "csrc" / "cpu", _record().get("sources")
    if not isinstance(built_from, dict) or not folder.is_dir():
        return []
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*") if p.suffix in (".cpp", ".h")}
    return sorted({name for name, _ in found.items() ^ built_from.items()})


def isa() -> str | None:
    """The instruction set in use, as the library calls it."""
    try:
        name: str = torch.ops.pyprune.cpu_isa("")
    except (AttributeError, RuntimeError):
        return None
    return name


def facts() -> dict[str, Any]:
    """JSON values: `state` (`usable`, or why not), `path`; of a usable library also `isa` (in use), `isas`, `compiler`
    and `torch` (built for, by, with), and `changed` (sources edited since; the library is used all the same).
    """
    reason = load()
    if reason:
        return {"state": reason, "path": str(library())}
    record = _record()
    built = {key: record.get(key) for key in ("isas", "compiler", "torch")}
    return {"state": "usable", "path": str(library()), "isa": isa(), **built, "changed": _changed()}


def describe() -> str:
    """`facts` in one line."""
    found = facts()
    if found["state"] != "usable":
        return str(found["state"])
    built = ", ".join(found["isas"] or ["no ISA but the portable one"])
    line = f"native CPU library: {found['isa'] or 'an unknown ISA'} in use (built: {built}; {found['compiler']}, "
    line += f"torch {found['torch']})"
    if found["changed"]:
        line += f"; older than {', '.join(found['changed'])}: run `make native`"
    return line
