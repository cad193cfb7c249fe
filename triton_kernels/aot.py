"""Compile the kernels for GPUs that are not there, and read the machine code: registers, spills, matrix instructions.

The launches are those that the launchers would make, planned on meta tensors, so what is compiled here is what runs.

    python -m pyprune.triton_kernels.aot --architecture 90          a line for each kernel
    python -m pyprune.triton_kernels.aot --architecture 90 --json   the same as JSON
    ... --offered    the configurations that are offered for tuning, not every branch
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .checks import INTERPRETED
from .expert_variants import ExpertVariant
from .hardware import has_descriptors
from .launch import Launch
from .variants import Variant, offered, variants

Either = Variant | ExpertVariant

ARCHITECTURES = (80, 90, 100)

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}
# Opcodes that spill, and that multiply. FFMA is what a float32 product is made of.
_OPCODE = re.compile(r"\s(HGMMA|HMMA|UTC[A-Z]*MMA|LDL|STL|FFMA2?)[.\s]")
# Loads from global memory: into registers, into shared memory, and of whole tiles by the copy engine.
_LOAD = re.compile(r"\s(LDG|LDGSTS|UTMALDG|UBLKCP)((?:\.\w+)*)[\s;]")


def _loads(assembly: str) -> dict[str, int]:
    """Counts of load instructions: `loads_128` (tiles among them), `loads_narrow`, `copies_128` and `copies_narrow`."""
    counts: Counter[str] = Counter()
    for opcode, suffixes in _LOAD.findall(assembly):
        wide = ".128" in suffixes or opcode in ("UTMALDG", "UBLKCP")
        counts[f"{'loads' if opcode == 'LDG' else 'copies'}_{'128' if wide else 'narrow'}"] += 1
    counts["loads_128"] += counts["copies_128"]
    return {name: counts[name] for name in ("loads_128", "loads_narrow", "copies_128", "copies_narrow")}


def _source(launch: Launch) -> ASTSource:
    """The specialisation that Triton would make at this launch, with every tensor on a 16-byte boundary."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0 and not fixed
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _tool(path: str, *arguments: str) -> str:
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def machine_code(launch: Launch, architecture: int) -> dict[str, Any]:
    """Compile one launch; sizes from its resource usage, counts from its disassembly.

    Returns:
        registers, stack_bytes, ldl and stl (spill loads and stores), mma (most frequent kind of matrix instruction,
        FFMA where there are none), mma_count, mma_kinds (all of them), shared_bytes; loads_128 (loads from global
        memory of 16 bytes, or of tiles), loads_narrow (narrower ones into registers), copies_128 (those of loads_128
        that go to shared memory, past the registers), copies_narrow (narrower ones that do).
    """
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        assembly = _tool(triton.knobs.nvidia.nvdisasm.path, "-ndf", "-c", str(cubin))
    opcodes = Counter(_OPCODE.findall(assembly))
    spills = {name.lower(): opcodes.pop(name, 0) for name in ("LDL", "STL")}
    matrix = {name: count for name, count in opcodes.items() if "MMA" in name}
    kind, count = max((matrix or opcodes or {"none": 0}).items(), key=lambda item: item[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        **spills,
        "mma": kind,
        "mma_count": count,
        "mma_kinds": "+".join(sorted(matrix)) or kind,
        "shared_bytes": compiled.metadata.shared,
        **_loads(assembly),
    }


def fingerprint() -> str:
    """Of the code of all files here with a compiled function, comments and layout aside: what a table is made of."""
    sources = (file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py")))
    code = [ast.unparse(ast.parse(source)) for source in sources if "\n@triton.jit" in source]
    # Python 3.12 began to write the quotes inside of f-strings otherwise.
    return hashlib.sha256("\n".join(code).replace('"', "'").encode()).hexdigest()


def distinct_launches(variants: Iterable[Either]) -> list[tuple[Either, Launch]]:
    """The launches of `variants` that Triton would compile separately."""
    found: dict[tuple[str, ...], tuple[Either, Launch]] = {}
    for variant in variants:
        for launch in variant.launches():
            source = _source(launch)
            parts = (source.name, source.signature, source.constants, source.attrs, launch.options())
            found.setdefault(tuple(map(str, parts)), (variant, launch))
    return list(found.values())


def described(variant: Either, launch: Launch, architecture: int) -> dict[str, Any]:
    """What a row of the table is about: kernel, architecture, dtype, int8, gated, gather, activation (None where
    the kernel has no such branch), extras (biases), aligned, blocks, num_warps, num_stages.
    """
    given = launch.arguments
    rows = "kept" if "E" in given else "index"  # of experts, whose `index` is the routing
    return {
        "kernel": launch.kernel.__name__,
        "architecture": f"sm_{architecture}",
        "dtype": variant.dtype,
        "int8": variant.int8,
        "gated": given.get("GATED"),
        "gather": given[rows] is not None if rows in given else None,
        "activation": given.get("ACTIVATION"),
        "extras": variant.extras,
        "aligned": variant.d % 16 == 0,
        "blocks": {name: size for name, size in given.items() if name.startswith(("BLOCK", "SLAB"))},
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def distinct_rows(variants: Iterable[Either], architecture: int) -> list[tuple[Either, Launch]]:
    """`distinct_launches` without descriptors where the hardware has none."""
    found = distinct_launches(variants)
    return [row for row in found if has_descriptors(architecture) or "descriptor" not in row[1].kernel.__name__]


def static_table(variants: Iterable[Either], architecture: int) -> list[dict[str, Any]]:
    """Compile `variants` for sm_`architecture`, each distinct kernel once.

    Returns:
        One row a kernel, see `described`, with what `machine_code` finds.

    Raises:
        RuntimeError: the kernels were imported for the interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("static_table compiles; TRITON_INTERPRET must not be set when the kernels are imported")
    return [
        {**described(variant, launch, architecture), **machine_code(launch, architecture)}
        for variant, launch in distinct_rows(variants, architecture)
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="aot", description="compile the Triton kernels without a GPU")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, default=90)
    parser.add_argument("--offered", action="store_true", help="what is offered for tuning, not every branch")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    wanted = (offered if given.offered else variants)(given.architecture)
    rows = static_table(wanted, given.architecture)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
