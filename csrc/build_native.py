"""Builds the native libraries from csrc; standard library only: pip runs it where nothing else is installed.

    python csrc/build_native.py [--out FOLDER] [--sanitize]

writes libpyprune_cpu.so (.dylib on macOS), libpyprune_cuda.so and native.json into the package's folder, or FOLDER, and
the simulator of the CUDA kernels, which only tests use, into build/simulator (sanitized: into FOLDER). A library that
cannot be built is no error, and does not keep another from being built: native.json says why, in one line. For the CPU
library PYPRUNE_NATIVE=0 skips the build, =require makes it an error; PYPRUNE_CUDA does so for the CUDA library. Called
so, rather than by pip, it does fail where there is a compiler and the sources do not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
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

    def wanted(self) -> str:
        value = os.environ.get(self.variable) or "1"
        if value not in ("0", "1", "require"):
            raise SystemExit(f"{self.variable} must be 0, 1 or require; got {value}")
        return value


NATIVE = {
    "cpu": Native("CPU", build_cpu.LIBRARY, build_cpu.LOG, "PYPRUNE_NATIVE", build_cpu.compile_library),
    "cuda": Native("CUDA", build_cuda.LIBRARY, build_cuda.LOG, "PYPRUNE_CUDA", build_cuda.compile_library),
}


def _settle(out: Path, library: str, log: str, compiled: Callable[[], tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """Compile and place `library` in `out`, or in its stead `log`, where a compiler said something; the record."""
    out.mkdir(parents=True, exist_ok=True)
    (out / log).unlink(missing_ok=True)
    try:
        built, record = compiled()
        building.place(built, out / library)
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
            return native.compile(root, sanitize)

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
    return f"built, {', '.join(parts) or 'no ISA files'}"


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
