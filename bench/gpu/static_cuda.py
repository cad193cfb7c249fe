"""Registers, spills and 16-byte loads of every CUDA kernel, read from the machine code in the built library.

    PYPRUNE_CUDA_ARCHS="80 90 100 120" make native
    python -m bench.gpu.static_cuda          prints the table and writes its rows into bench/results/static.json

No GPU is needed; Triton's package brings the disassembler. `make test` compiles one architecture, compares it with the
table, and reads the others there.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import by_line
from pyprune.base.files import new_file
from pyprune.ffn import native

RESULT = Path(__file__).parents[1] / "results" / "static.json"
CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")

# By compute capability: most shared memory that a block may ask for, in bytes (CUDA programming guide, technical
# specifications).
SHARED_LIMIT = {
    **dict.fromkeys(("8.0", "8.7"), 163 * 1024),
    **dict.fromkeys(("8.6", "8.9", "12.0", "12.1"), 99 * 1024),
    **dict.fromkeys(("9.0", "10.0", "10.3", "11.0"), 227 * 1024),
}
REGISTERS = 64 * 1024  # of a multiprocessor

_WEIGHTS = ("float32", "bfloat16", "float16", "int8")  # in the order of Type in csrc/common/problem.h
_NAME = re.compile(
    r"pyprune\d+(single_pass_bulk|single_pass|hidden_pass|down_pass|widen|expert_hidden|expert_down|expert_combine)"
    r"(?:ILNS_4TypeE(\d)ELi(\d)(?:ELb(\d))?)?"
)
_INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
_OPCODE = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
# A copy to a shared address with a uniform register in it: see `CopyAddress` in csrc/cuda/device.h.
_UNIFORM, _UNIFORM_COPY = "LDGSTS to a uniform register", re.compile(r"LDGSTS\S*\s+\[[^]]*\bUR")


def most_threads(kernel: str, tokens: int) -> int:
    """Threads of a block for which the kernel is compiled, as in csrc/cuda/params.h, layout.h and before.h."""
    if not kernel.startswith("single_pass"):
        return 256
    return 512 if tokens <= 2 else 256


def _tool(path: str, *arguments: str, folder: Path) -> str:
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True, cwd=folder).stdout


def _functions(assembly: str) -> Iterator[tuple[str, Counter[str]]]:
    """Name and opcodes of each function of a disassembly."""
    for section in re.split(r"^\.text\.", assembly, flags=re.MULTILINE)[1:]:
        name = section.partition(":")[0]
        yield name, Counter({**Counter(_OPCODE.findall(section)), _UNIFORM: len(_UNIFORM_COPY.findall(section))})


def _count(opcodes: Counter[str], pattern: str) -> int:
    return sum(n for name, n in opcodes.items() if re.fullmatch(pattern, name))


def _row(name: str, architecture: str, opcodes: Counter[str], usage: dict[str, tuple[int, int]]) -> dict[str, Any]:
    found = _NAME.search(name)
    if found is None:
        raise RuntimeError(f"{name} is no kernel that this table knows")
    kernel, weights, tokens, gated = found.groups()
    registers, stack = usage[name]
    named = None if weights is None else _WEIGHTS[int(weights)]
    return {
        "kernel": kernel,
        "architecture": architecture,
        "weights": named,
        "tokens": None if tokens is None else int(tokens),
        "gated": None if gated is None else gated == "1",
        "threads": most_threads(kernel, int(tokens or 0)),
        "registers": registers,
        "stack_bytes": stack,
        "ldl": _count(opcodes, r"LDL\..*|LDL"),
        "stl": _count(opcodes, r"STL\..*|STL"),
        "copies_128": _count(opcodes, r"LDGSTS\..*128.*"),
        "copies_narrow": _count(opcodes, r"LDGSTS\.(?!.*128).*"),
        "copies_uniform": opcodes.pop(_UNIFORM, 0),
        "copies_bulk": _count(opcodes, r"UBLKCP.*"),
        "loads_128": _count(opcodes, r"LDG\..*128.*"),
        "instructions": opcodes.total(),
    }


def rows(library: Path) -> list[dict[str, Any]]:
    """One row for each kernel and architecture in `library`.

    Returns:
        kernel, architecture, weights, tokens, gated, threads (most of a block), registers (of a thread), stack_bytes,
        ldl and stl (spill loads and stores), copies_128 and copies_narrow (asynchronous copies to shared memory of 16
        bytes, and of fewer), copies_uniform (those to an address that Hopper refuses), copies_bulk (of whole neurons),
        loads_128 (to registers), instructions.
    """
    cuobjdump, nvdisasm = triton.knobs.nvidia.cuobjdump.path, triton.knobs.nvidia.nvdisasm.path
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _tool(cuobjdump, "-xelf", "all", str(library.absolute()), folder=folder)
        for cubin in sorted(folder.glob("*.cubin")):
            architecture = next(a for a in ARCHITECTURES if f".{a}." in cubin.name)
            said = _tool(cuobjdump, "-res-usage", cubin.name, folder=folder)
            usage = {n: (int(r), int(s)) for n, r, s in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", said)}
            assembly = _tool(nvdisasm, "-ndf", "-c", cubin.name, folder=folder)
            table += [_row(n, architecture, opcodes, usage) for n, opcodes in _functions(assembly)]
    return sorted(
        table, key=lambda row: [str(row[n]) for n in ("architecture", "kernel", "weights", "tokens", "gated")]
    )


def _sources() -> set[Path]:
    """What nvcc compiles, and all that it includes of ours."""
    found: set[Path] = set()
    waiting = [*(CSRC / "cuda").glob("*.cu")]
    while waiting:
        file = waiting.pop().resolve()
        if file not in found and file.parent.name != "simulator":
            found.add(file)
            waiting += [file.parent / name for name in _INCLUDE.findall(file.read_text(encoding="utf-8"))]
    return found


def fingerprint() -> str:
    """A hex number of what the kernels are made from."""
    digest = hashlib.sha256()
    for file in sorted(_sources()):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()} ".encode())
    return digest.hexdigest()


def main() -> None:
    """Read, print, write."""
    reason = native.load_cuda()
    if reason:
        raise SystemExit(reason)
    if missing := sorted(set(ARCHITECTURES) - set(native.facts("cuda")["architectures"] or ())):
        raise SystemExit(
            f"the library is not built for {', '.join(missing)}: see python -m bench.gpu.static_cuda's top"
        )
    found = rows(native.library("cuda"))
    table = Table(title="CUDA kernels as machine code", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in found[0]:
        table.add_column(name.replace("_", "\n"), no_wrap=True)
    for row in found:
        spilled = row["stack_bytes"] or row["ldl"] or row["stl"]
        table.add_row(*("-" if v is None else str(v) for v in row.values()), style="red" if spilled else None)
    console = Console()
    console.width = max(console.width, 160)  # into a pipe rich would fold the columns at 80
    console.print(table)
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    built = {"nvcc": native.facts("cuda").get("nvcc"), "fingerprint": fingerprint()}
    with new_file(RESULT) as temporary:
        temporary.write_text(by_line.dumps({**known, "cuda_built": built, "cuda": found}, ("kernels", "cuda")))


if __name__ == "__main__":
    main()
