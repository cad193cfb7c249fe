"""Compile the kernels for GPUs that are not there, and read the machine code: registers, spills, matrix instructions.

The launches are those that the launchers would make, planned on meta tensors, so what is compiled here is what runs.

    python -m pyprune.triton_kernels.aot          a line for each kernel
    python -m pyprune.triton_kernels.aot --json   the same as JSON
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import INTERPRETED, decode, prefill
from .launch import Launch, Problem

ARCHITECTURES = (80, 90, 100)

# Most shared memory that a block may ask for, in bytes (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Opcodes that spill, and that multiply. FFMA is what a float32 product is made of.
_OPCODE = re.compile(r"\s(HGMMA|HMMA|UTC[A-Z]*MMA|LDL|STL|FFMA2?)[.\s]")


@dataclass(frozen=True)
class Variant:
    """One FFN problem to compile for.

    Args:
        m, k, d: tokens, kept neurons, channels. They choose blocks, and whether addresses are aligned.
        dtype: "float32", "float16" or "bfloat16".
        gated, gather, activation: see `ffn`.
        phase: "decode" or "prefill".
    """

    m: int
    k: int
    d: int
    dtype: str
    gated: bool
    gather: bool
    activation: str
    phase: str

    def launches(self) -> list[Launch]:
        """What the launchers would do, with bias and residual."""
        parts = 3 if self.gated else 2
        dtype = _DTYPES[self.dtype]

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        problem = Problem(
            x=empty(self.m, self.d),
            record=empty(self.k, parts * self.d),
            gated=self.gated,
            activation=self.activation,
            neuron_bias=empty(self.k, parts - 1),
            down_bias=empty(self.d),
            residual=empty(self.m, self.d),
            index=empty(self.k, dtype=torch.int32) if self.gather else None,
        )
        out = empty(self.m, self.d)
        if self.phase == "decode":
            return decode.launches(problem, out, problem.decode_config())
        return prefill.launches(problem, out, problem.prefill_config())


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
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
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
        registers, stack_bytes, ldl and stl (spill loads and stores), mma (kind of matrix instruction, FFMA where there
        are none), mma_count, shared_bytes.
    """
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options())
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
        assembly = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", str(cubin))
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
        "shared_bytes": compiled.metadata.shared,
    }


def variants() -> Iterator[Variant]:
    """Every branch, dtype and kind of tile at least once."""
    for phase, m in (("decode", 1), ("prefill", 512)):
        for gated, activation in ((False, "gelu"), (True, "silu")):
            for gather in (False, True):
                yield Variant(m, 11008, 4096, "bfloat16", gated, gather, activation, phase)
        yield Variant(m, 1536, 576, "float16", True, True, "gelu_tanh", phase)
        yield Variant(m, 1536, 576, "float32", True, True, "gelu", phase)
        yield Variant(m, 11007, 4097, "bfloat16", True, True, "quick_gelu", phase)
    yield Variant(1, 28672, 8192, "bfloat16", True, True, "silu", "decode")
    yield Variant(33, 3072, 768, "float16", False, True, "relu2", "prefill")
    yield Variant(17, 587, 587, "float16", False, False, "relu", "prefill")
    # Sizes and strides of 1, which Triton makes constants.
    yield Variant(1, 1, 1, "float16", True, True, "relu2", "decode")
    yield Variant(1, 1, 1, "float16", True, True, "relu2", "prefill")


def distinct_launches(variants: Iterable[Variant]) -> list[tuple[Variant, Launch]]:
    """The launches of `variants` that Triton would compile separately."""
    found: dict[tuple[str, ...], tuple[Variant, Launch]] = {}
    for variant in variants:
        for launch in variant.launches():
            source = _source(launch)
            parts = (source.name, source.signature, source.constants, source.attrs, launch.options())
            found.setdefault(tuple(map(str, parts)), (variant, launch))
    return list(found.values())


def static_table(variants: Iterable[Variant], architectures: Iterable[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """Compile `variants` for `architectures`, each distinct kernel once.

    Returns:
        One row a kernel and architecture: kernel, architecture, dtype, gated, gather, activation (None where the kernel
        has no such branch), aligned, blocks, num_warps, and what `machine_code` finds.

    Raises:
        RuntimeError: the kernels were imported for the interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("static_table compiles; TRITON_INTERPRET must not be set when the kernels are imported")
    launches = distinct_launches(variants)
    rows = []
    for architecture in architectures:
        for variant, launch in launches:
            given = launch.arguments
            rows.append(
                {
                    "kernel": launch.kernel.__name__,
                    "architecture": f"sm_{architecture}",
                    "dtype": variant.dtype,
                    "gated": given.get("GATED"),
                    "gather": given["index"] is not None if "index" in given else None,
                    "activation": given.get("ACTIVATION"),
                    "aligned": variant.d % 16 == 0,
                    "blocks": {name: size for name, size in given.items() if name.startswith(("BLOCK_", "SLAB"))},
                    "num_warps": launch.num_warps,
                    **machine_code(launch, architecture),
                }
            )
    return rows


def main() -> None:
    """Print the table, as JSON with `--json`."""
    rows = static_table(variants())
    if "--json" in sys.argv[1:]:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
