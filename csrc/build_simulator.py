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

# The host's sources that a simulated device needs too; the others ask CUDA.
_HOST = ("experts.cpp", "plan.cpp", "run.cpp")


def units(root: Path, compiler: Compiler, torch: Torch, sanitize: bool = False) -> building.Units:
    """What is compiled, and how."""
    cuda = root / "csrc" / "cuda"
    every = (
        *building.host_flags(root, torch, compiler),
        *("-DPYPRUNE_SIMULATE", "-Wno-unknown-pragmas"),
        *(building.SANITIZE if sanitize else ("-O1",)),
        *("-x", "c++"),
    )
    shared = [cuda / name for name in _HOST if (cuda / name).is_file()]
    return dict.fromkeys(sorted([*cuda.glob("*.cu"), *shared, *(cuda / "simulator").glob("*.cpp")]), every)


def ninja_file(compiler: Compiler, torch: Torch, compiled: building.Units, sanitize: bool) -> str:
    """The text of build.ninja."""
    lines = [
        *building.compile_lines(compiler, compiled),
        "rule link",
        f"  command = $cxx -shared -pthread {building.quoted(building.SANITIZE) if sanitize else ''} $in -o $out "
        + building.quoted(building.link_flags(LIBRARY, torch, sanitize)),
    ]
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(map(building.object_of, compiled))}", ""])


def compile_library(root: Path, sanitize: bool) -> Path:
    """The library, in the folder of its objects. Raises NotBuilt."""
    if sys.platform == "win32":
        raise NotBuilt("there is no build for Windows yet")
    if not any((root / "csrc" / "cuda" / "simulator").glob("*.cpp")):
        raise NotBuilt("csrc/cuda/simulator has no sources")
    compiler, torch = building.find_compiler(), building.find_torch()
    work = root / "build" / ("asan-simulator-objects" if sanitize else "simulator-objects")
    text = ninja_file(compiler, torch, units(root, compiler, torch, sanitize), sanitize)
    building.run_ninja(work, text, root, torch, LOG)
    return work / LIBRARY
