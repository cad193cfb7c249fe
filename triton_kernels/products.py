"""What the kernels of the two matrix products share: which tile is whose, and how the second product is written."""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import unfold


@triton.jit
def tile_of(
    pid,  # program number
    rows,  # row blocks of the output
    columns,  # column blocks of the output
    GROUP: tl.constexpr,  # row blocks that share column blocks before the next column block comes
):
    """Program number -> (row block, column block), in bands of GROUP row blocks: operands stay in the L2 cache."""
    band = pid // (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    within = pid % (GROUP * columns)
    return band * GROUP + within % height, within // height


@triton.jit
def split_of(
    split,  # number of the split
    splits,  # number of splits
    K,  # number of kept neurons
    BLOCK_K: tl.constexpr,  # neurons taken at once
):
    """Neurons [begin, end) of a split; whole blocks, but for the last."""
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    return split * share, tl.minimum((split + 1) * share, K)


@triton.jit
def store_down(
    total,  # [BLOCK_N, BLOCK_M] float32, sums over the neurons of this program
    tokens,  # [BLOCK_M] int32, token numbers
    d,  # [BLOCK_N] int32, channels
    split,  # number of the split
    scales,  # see unfold
    down_bias,  # [D] or None
    partial,  # out [splits, M, D] float32, or None
    out,  # out [M, D] where there is no partial
    M,  # number of tokens
    D,  # hidden_size
):
    """Writes the partial result of a split, or bias and the sum of all."""
    total = unfold(total, scales)
    inside = (d < D)[:, None]
    mask = inside & (tokens < M)[None, :]
    rows = tokens.to(tl.int64)[None, :]
    if partial is None:
        if down_bias is not None:
            total += tl.load(down_bias + d, mask=d < D, other=0.0).to(tl.float32)[:, None]
        tl.store(out + rows * D + d[:, None], total.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + (split.to(tl.int64) * M + rows) * D + d[:, None], total, mask=mask)
