"""The native CPU library: every csrc/cpu/*.cpp, each file of an instruction set with that set's flags."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import building
from building import Compiler, NotBuilt, Torch

LIBRARY = "libpyprune_cpu.dylib" if sys.platform == "darwin" else "libpyprune_cpu.so"
LOG = "native.log"

_FLAGS = ("-ffp-contract=fast", "-fno-math-errno")
_OPTIMIZE = ("-O3",)


class Isa(NamedTuple):
    """Flags of `isa_NAME.cpp`, and an instruction by which to see whether compiler and assembler know them."""

    flags: tuple[str, ...]
    instruction: str


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
X86 = {
    "avx2": Isa(_AVX2, "vpaddd %ymm0, %ymm0, %ymm0"),
    "avx512": Isa(_AVX512, "vpaddd %zmm0, %zmm0, %zmm0"),
    "avx512_bf16": Isa(_AVX512_BF16, "vdpbf16ps %zmm0, %zmm0, %zmm0"),
    "amx": Isa((*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}


def choose_isas(folder: Path, compiler: Compiler) -> tuple[list[str], list[str]]:
    """Those of X86 that have a file: the ones that this compiler can build, and the ones left out."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    present = [name for name in X86 if (folder / f"isa_{name}.cpp").is_file()]
    built = [n for n in present if x86 and compiler.accepts(f'asm("{X86[n].instruction}");', *X86[n].flags)]
    return built, [n for n in present if n not in built]


def units(root: Path, compiler: Compiler, torch: Torch, isas: list[str], sanitize: bool = False) -> building.Units:
    """What is compiled, and how."""
    every = (
        *building.host_flags(root, torch, compiler),
        *_FLAGS,
        *(building.SANITIZE if sanitize else _OPTIMIZE),
        *(f"-DPYPRUNE_HAS_{name.upper()}" for name in isas),
    )
    sources = sorted((root / "csrc" / "cpu").glob("*.cpp"))
    known = {f"isa_{name}": name for name in X86}
    used = [s for s in sources if known.get(s.stem) in (None, *isas)]
    return {s: (*every, *(X86[known[s.stem]].flags if s.stem in known else ())) for s in used}


def ninja_file(compiler: Compiler, torch: Torch, compiled: building.Units, sanitize: bool) -> str:
    """The text of build.ninja."""
    lines = [
        *building.compile_lines(compiler, compiled),
        "rule link",
        f"  command = $cxx -shared -pthread {building.quoted(building.SANITIZE) if sanitize else ''} $in -o $out "
        + building.quoted(building.link_flags(LIBRARY, torch, sanitize)),
    ]
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(map(building.object_of, compiled))}", ""])


def lacks(record: dict[str, Any]) -> str:
    """What a library with this record lacks of what is wanted, or nothing."""
    return "it is sanitized" if record.get("sanitized") else ""


def compile_library(root: Path, sanitize: bool) -> tuple[Path, dict[str, Any]]:
    """The library, in the folder of its objects, and what is recorded of it. Raises NotBuilt."""
    sources = root / "csrc" / "cpu"
    recorded = building.hashes(root, "cpu")
    if sys.platform == "win32":
        raise NotBuilt("there is no build for Windows yet")
    if not any(sources.glob("*.cpp")):
        raise NotBuilt("csrc/cpu has no sources")
    compiler, torch = building.find_compiler(), building.find_torch()
    isas, left_out = choose_isas(sources, compiler)
    work = root / "build" / ("asan-objects" if sanitize else "objects")
    text = ninja_file(compiler, torch, units(root, compiler, torch, isas, sanitize), sanitize)
    building.run_ninja(work, text, root, torch, f"{LOG} beside native.json")
    facts = {"compiler": compiler.version, "torch": torch.version, "isas": isas, "left_out": left_out}
    return work / LIBRARY, {
        "built": True,
        "interface": building.INTERFACE,
        **facts,
        "sanitized": sanitize,
        "sources": recorded,
    }
