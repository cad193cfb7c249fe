"""A Triton kernel that reads memory and does next to nothing else: one of the loops behind the read ceiling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLLED = 4096, 4


@triton.jit
def _read_kernel(source, sums, steps, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int32)
    at = program * steps * BLOCK * UNROLLED + tl.arange(0, BLOCK)
    for _ in range(0, steps):
        for part in tl.static_range(UNROLLED):
            total ^= tl.load(source + at + part * BLOCK, eviction_policy="evict_first")
        at += BLOCK * UNROLLED
    tl.store(sums + tl.program_id(0), tl.xor_sum(total, 0))


def reader(buffer: Tensor, programs: int) -> tuple[Tensor, int]:
    """Read `buffer` (contiguous, of any dtype) once by so many programs; their sums, and the bytes that were read."""
    words = buffer.view(torch.int32)
    steps = len(words) // (programs * BLOCK * UNROLLED)
    sums = torch.empty(programs, dtype=torch.int32, device=buffer.device)
    _read_kernel[(programs,)](words, sums, steps, BLOCK=BLOCK, UNROLLED=UNROLLED, num_warps=8)
    return sums, programs * steps * BLOCK * UNROLLED * 4
