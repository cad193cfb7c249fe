"""Builds the native libraries from csrc; standard library only: pip runs it where nothing else is installed.

    python csrc/build_native.py [--out FOLDER] [--sanitize]

writes libpyprune_cpu.so (.dylib on macOS), libpyprune_cuda.so and native.json into the package's folder, or FOLDER, and
the simulator of the CUDA kernels, which only tests use, into build/simulator (sanitized: into FOLDER). A library that
cannot be built is no error, and does not keep another from being built: native.json says why, in one line. For the CPU
library PYPRUNE_NATIVE=0 skips the build, =require makes it an error; PYPRUNE_CUDA does so for the CUDA library. Called
so, rather than by pip, it does fail where there is a compiler and the sources do not compile.

A library that was built before, here or elsewhere, need not be built again: PYPRUNE_PREBUILT=FOLDER names the folder
where its build left it with native.json (`pyprune` itself, or another --out; FOLDER may be where this build writes). It
is taken, without a compiler or nvcc, where it was built from the very sources that lie here, holds the architectures
that PYPRUNE_CUDA_ARCHS wants, and torch loads it in a process of its own; native.json then says `taken: true`. Else it
is compiled, and what was against it is printed. So a machine with a GPU gets what `make native` built on one without:

    PYPRUNE_PREBUILT=pyprune PYPRUNE_CUDA_ARCHS=90 python csrc/build_native.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import build_cpu
import build_cuda
import build_simulator
import building
from building import NotBuilt

ROOT = Path(__file__).resolve().parent.parent
RECORD = "native.json"


class Native(NamedTuple):
    """A library of the package."""

    title: str
    library: str
    log: str
    variable: str
    compile: Callable[[Path, bool], tuple[Path, dict[str, Any]]]
    lacks: Callable[[dict[str, Any]], str]

    def wanted(self) -> str:
        value = os.environ.get(self.variable) or "1"
        if value not in ("0", "1", "require"):
            raise SystemExit(f"{self.variable} must be 0, 1 or require; got {value}")
        return value


NATIVE = {
    "cpu": Native(
        "CPU", build_cpu.LIBRARY, build_cpu.LOG, "PYPRUNE_NATIVE", build_cpu.compile_library, build_cpu.lacks
    ),
    "cuda": Native(
        "CUDA", build_cuda.LIBRARY, build_cuda.LOG, "PYPRUNE_CUDA", build_cuda.compile_library, build_cuda.lacks
    ),
}

_LOAD = "import sys, torch; torch.ops.load_library(sys.argv[1])"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _against(library: Path, record: Any, native: Native, sources: dict[str, str]) -> str:
    """Why the library that was built before cannot be taken, in one line, or nothing."""
    if not isinstance(record, dict) or not record.get("built"):
        return "native.json there records none"
    if record.get("sources") != sources:
        return "it was built from other sources"
    if reason := native.lacks(record):
        return reason
    if not library.is_file() or _sha256(library) != record.get("sha256"):
        return f"{library.name} there is not the one that was recorded"
    ask = [sys.executable, "-c", _LOAD, str(library)]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=170, check=False)
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"it cannot be loaded: {said[-1]}" if done.returncode else ""


def _prebuilt(part: str, native: Native, root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The library in $PYPRUNE_PREBUILT with its record, where it can be taken; prints why not."""
    if not (named := os.environ.get("PYPRUNE_PREBUILT")):
        return None
    folder = Path(named).absolute()
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))[part]
        reason = _against(folder / native.library, record, native, building.hashes(root, part))
    except (OSError, ValueError, LookupError, TypeError, subprocess.TimeoutExpired) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if reason:
        print(f"native {native.title} library in PYPRUNE_PREBUILT={named} not taken: {reason}", flush=True)
        return None
    return folder / native.library, {**record, "taken": True}


def _settle(out: Path, library: str, log: str, compiled: Callable[[], tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Compile and place `library` in `out`, or in its stead `log`, where a compiler said something; the record."""
    out.mkdir(parents=True, exist_ok=True)
    (out / log).unlink(missing_ok=True)
    try:
        built, record = compiled()
        building.place(built, out / library)
        record["sha256"] = _sha256(out / library)
        return record
    except (NotBuilt, OSError, subprocess.SubprocessError) as error:
        # An older library would tell another story than the reason.
        (out / library).unlink(missing_ok=True)
        if isinstance(error, NotBuilt) and error.log:
            building.place(error.log, out / log)
        return {"built": False, "reason": " ".join(str(error).split())}


def build(out: Path, root: Path, sanitize: bool = False) -> dict[str, Any]:
    """Build the libraries of `root`/csrc into the folder `out`; returns what native.json records: `cpu` and `cuda`.

    Raises SystemExit with the reason where `require` was said and there is no library.
    """
    wanted = {name: native.wanted() for name, native in NATIVE.items()}
    records = {}
    for name, native in NATIVE.items():

        def compiled(name: str = name, native: Native = native) -> tuple[Path, dict[str, Any]]:
            if wanted[name] == "0":
                raise NotBuilt(f"{native.variable}=0 was set at the build")
            return (None if sanitize else _prebuilt(name, native, root)) or native.compile(root, sanitize)

        records[name] = _settle(out, native.library, native.log, compiled)
    building.place(json.dumps(records, indent=2) + "\n", out / RECORD)
    for name, native in NATIVE.items():
        if wanted[name] == "require" and not records[name]["built"]:
            raise SystemExit(f"native {native.title} library: {records[name]['reason']}")
    return records


def build_for_tests(out: Path, root: Path, sanitize: bool = False) -> str:
    """Build the simulator into `out`; returns what to print of it."""
    compiled = build_simulator.compile_library
    record = _settle(out, build_simulator.LIBRARY, build_simulator.LOG, lambda: (compiled(root, sanitize), {}))
    return record.get("reason") or "built"


def outputs(folder: Path) -> list[str]:
    """What `build` left in `folder`."""
    names = [RECORD, *(name for native in NATIVE.values() for name in (native.library, native.log))]
    return [str(folder / name) for name in names if (folder / name).is_file()]


def preload() -> str:
    """What LD_PRELOAD must hold for a sanitized library: the runtime, and libstdc++ so that it sees exceptions."""
    compiler = building.find_compiler()
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        ask = [*compiler.command, f"-print-file-name={name}"]
        path = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute() or "clang" in compiler.version:
            raise SystemExit(f"{compiler.version} has no {name} to preload; set CXX to a g++ that has")
        found.append(str(path.resolve()))
    return " ".join(found)


def _say(record: dict[str, Any]) -> str:
    if not record["built"]:
        return str(record["reason"])
    parts = record["isas"] if "isas" in record else record["architectures"]
    return f"{'taken as built before' if record.get('taken') else 'built'}, {', '.join(parts) or 'no ISA files'}"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the native libraries.")
    parser.add_argument("--out", type=Path, default=ROOT / "pyprune", help="folder for the libraries and their record")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined behaviour sanitizers")
    parser.add_argument("--preload", action="store_true", help="only print LD_PRELOAD for a sanitized library")
    arguments = parser.parse_args(given)
    if arguments.preload:
        print(preload())
        return
    out = arguments.out.resolve()
    simulator = out if arguments.sanitize else ROOT / "build" / "simulator"
    for name, record in build(out, ROOT, arguments.sanitize).items():
        print(f"native {NATIVE[name].title} library: {_say(record)}")
    print(f"simulator of the CUDA kernels: {build_for_tests(simulator, ROOT, arguments.sanitize)}")
    logs = [*(out / native.log for native in NATIVE.values()), simulator / build_simulator.LOG]
    said = [log.read_text(encoding="utf-8") for log in logs if log.is_file()]
    if said:
        # To a developer a source that does not compile is an error: the tests of its kernels would only be skipped.
        raise SystemExit("\n".join(said))


if __name__ == "__main__":
    main()
