"""The simulator of the CUDA kernels, for tests only: the same csrc/cuda/*.cu compiled as C++, what decides how they are
launched, and csrc/cuda/simulator/*.cpp, which runs a launch on the CPU. Never part of a package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import building
from building import Compiler, NotBuilt, Torch

LIBRARY = "libpyprune_simulator.so"
LOG = "simulator.log"

# Of csrc/cuda/*.cpp: these speak to CUDA itself, of streams and of memory.
_CUDA_ONLY = ("binding.cpp", "tickets.cpp")

# The host's sources that a simulated device needs too; the others ask CUDA.
_HOST = ("plan.cpp", "run.cpp")


def ninja_file(root: Path, compiler: Compiler, torch: Torch, sanitize: bool) -> str:
    """The text of build.ninja."""
    cuda = root / "csrc" / "cuda"
    every = (
        *building.host_flags(root, torch, compiler),
        *("-DPYPRUNE_SIMULATE", "-Wno-unknown-pragmas"),
        *(building.SANITIZE if sanitize else ("-O1",)),
    )
    lines = [
        f"cxx = {building.quoted(compiler.command)}",
        "rule compile",
        f"  command = $cxx -MD -MF $out.d {building.quoted(every)} -x c++ -c $in -o $out",
        *building.COMPILE,
        "rule link",
        f"  command = $cxx -shared -pthread {building.quoted(building.SANITIZE) if sanitize else ''} $in -o $out "
        + building.quoted(building.link_flags(LIBRARY, torch, sanitize)),
    ]
    objects = []
    shared = [cuda / name for name in _HOST if (cuda / name).is_file()]
    for source in sorted([*cuda.glob("*.cu"), *shared, *(cuda / "simulator").glob("*.cpp")]):
        objects.append(building.path(f"{source.name}.o"))
        lines += [f"build {objects[-1]}: compile {building.path(source)}"]
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def compile_library(root: Path, sanitize: bool) -> Path:
    """The library, in the folder of its objects. Raises NotBuilt."""
    if sys.platform == "win32":
        raise NotBuilt("there is no build for Windows yet")
    if not any((root / "csrc" / "cuda" / "simulator").glob("*.cpp")):
        raise NotBuilt("csrc/cuda/simulator has no sources")
    compiler, torch = building.find_compiler(), building.find_torch()
    work = root / "build" / ("asan-simulator-objects" if sanitize else "simulator-objects")
    building.run_ninja(work, ninja_file(root, compiler, torch, sanitize), root, torch, LOG)
    return work / LIBRARY
