"""A gathered FFN for one to four tokens as contextual-sparsity systems run it, in two Triton kernels.

The first takes blocks of the chosen neurons, computes their hidden values and clears the output; the second takes
blocks of neurons and of channels, and adds its part of the down projection to the float32 output by atomics, so the
order of its sums changes from run to run. Weights are neuron-major, in an array a part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_K, BLOCK_D = 16, 256
DOWN_K, DOWN_D = 64, 512


@triton.jit
def _hidden_kernel(
    x, gate, up, bias, index, hidden, out, K, D,
    M: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.load(index + k, mask=k < K, other=0).to(tl.int64)
    for m in tl.static_range(M):
        u = tl.zeros([BLOCK_K], tl.float32)
        g = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (k < K)[:, None] & (d < D)[None, :]
            values = tl.load(x + m * D + d, mask=d < D, other=0.0).to(tl.float32)
            u += tl.sum(tl.load(up + rows[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32) * values, 1)
            if GATED:
                g += tl.sum(
                    tl.load(gate + rows[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32) * values, 1
                )
        if BIAS:
            u += tl.load(bias + rows, mask=k < K, other=0.0).to(tl.float32)
        u = g * tl.sigmoid(g) * u if ACT == "silu" else tl.maximum(u, 0.0)
        tl.store(hidden + m * K + k, u, mask=k < K)
    # Every program clears its share of the sums that the second kernel adds to.
    share = tl.cdiv(M * D, tl.num_programs(0))
    for start in range(0, share, BLOCK_D):
        at = block * share + start + tl.arange(0, BLOCK_D)
        tl.store(out + at, tl.zeros([BLOCK_D], tl.float32), mask=(at < (block + 1) * share) & (at < M * D))


@triton.jit
def _down_kernel(
    hidden, down, index, out, K, D, M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.load(index + k, mask=k < K, other=0).to(tl.int64)
    inside = (k < K)[:, None] & (d < D)[None, :]
    weights = tl.load(down + rows[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        values = tl.load(hidden + m * K + k, mask=k < K, other=0.0)
        tl.atomic_add(out + m * D + d, tl.sum(weights * values[:, None], 0), mask=d < D)


def two_kernel_gather(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    last: Tensor | None,
    index: Tensor,
    activation: str,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, or plain with `gate` None, over the rows `index` of every part.

    Args:
        x: `[M, D]`, M at most 4, contiguous.
        gate, up, down: `[F, D]`, contiguous.
        bias: `[F]`, of `up`, or None.
        last: `[D]`, or None.
        index: `[K]` int32.
        activation: "silu" if gated, else "relu".

    Returns:
        `[M, D]` in the dtype of x.
    """
    (m, d), k = x.shape, len(index)
    hidden = torch.empty(m, k, dtype=torch.float32, device=x.device)
    out = torch.empty(m, d, dtype=torch.float32, device=x.device)
    _hidden_kernel[(triton.cdiv(k, BLOCK_K),)](
        x, up if gate is None else gate, up, up if bias is None else bias, index, hidden, out, k, d,
        M=m, GATED=gate is not None, BIAS=bias is not None, ACT=activation, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    grid = (triton.cdiv(k, DOWN_K), triton.cdiv(d, DOWN_D))
    _down_kernel[grid](hidden, down, index, out, k, d, M=m, BLOCK_K=DOWN_K, BLOCK_D=DOWN_D)
    return (out if last is None else out + last).to(x.dtype)
