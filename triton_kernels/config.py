"""Launch configurations: a problem's sizes go in, a printable configuration comes out. No autotuning, no timing.

Widths enter through a few buckets only, so that layers of slightly different width share compiled kernels.
None of these numbers has been measured on a GPU; they follow from the sizes named beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The matrix units work on 16 rows: up to here further tokens cost no time over the bytes of the weights.
DECODE_MAX_TOKENS = 16

# Two programs for each multiprocessor of an A100 (108), H100 (132) or B200 (148), roughly.
_ENOUGH_PROGRAMS = 256


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least `n`, held between `low` and `high`."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))


@dataclass(frozen=True)
class DecodeConfig:
    """Blocks of the decode pass.

    Args:
        block_m: tokens of a program.
        slab: neurons of a program. It fixes the order of the sums, so it must not depend on the number of tokens.
        block_d: channels taken at once.
        num_warps, num_stages: warps of a program and depth of its load pipeline.
        reduce_s, reduce_d: partials taken at once and channels of a program in the final sum.
        max_tokens: tokens of one launch; bounds the partials at `slabs * max_tokens * D` floats.
    """

    block_m: int
    slab: int
    block_d: int
    num_warps: int
    num_stages: int
    reduce_s: int
    reduce_d: int
    max_tokens: int


@dataclass(frozen=True)
class TileConfig:
    """Blocks of one matrix product `[M, K] x [K, N]`, its warps and the depth of its load pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles of the two prefill products.

    Args:
        hidden: `x @ up.T`; N is the neurons, K the channels.
        down: `hidden @ down`; N is the channels, K the neurons, and its block_k divides hidden's block_n.
        group: row blocks in a band, see `prefill._tile_of`.
    """

    hidden: TileConfig
    down: TileConfig
    group: int


def decode_config(k: int, d: int, dtype: torch.dtype, aligned: bool) -> DecodeConfig:
    """Configuration for `k` kept neurons of width `d`; the same for every number of tokens.

    A wide slab writes fewer partials (8 bytes a channel and token, against 2 or 3 record parts of `slab` elements),
    a narrow one gives every multiprocessor work: the widest that still makes enough programs wins.

    Args:
        k, d, dtype: kept neurons, channels, dtype of the tensors.
        aligned: see `Problem.aligned`.
    """
    half = dtype != torch.float32
    slab = next((s for s in (64, 32) if half and _ceil_div(k, s) >= _ENOUGH_PROGRAMS), 16)
    # Elements of one record part in a stage: 4096 half-precision ones, so that three stages of a gated record take
    # less than 64 KiB. Unaligned rows come in element by element through registers, with an address each.
    elements = 4096 if half else 1024
    widest = min(128, (elements if aligned else elements // 4) // slab)
    return DecodeConfig(
        block_m=16,
        slab=slab,
        block_d=_power_of_two(d, 16, widest),
        num_warps=4,
        num_stages=3,
        reduce_s=16,
        reduce_d=64,
        max_tokens=64,
    )


# (block_m, block_n, warps), large to small, by (half precision, aligned). A thread holds 64 accumulators of a product
# at most, or twice 32 of a pair. Operands that come in through registers, as all float32 and all unaligned ones do,
# leave room for less.
_TILES = {
    (True, True): ((128, 128, 8), (128, 64, 8), (64, 64, 4), (32, 64, 4), (16, 64, 4)),
    (True, False): ((64, 64, 8), (32, 64, 4), (16, 64, 4)),
    (False, True): ((64, 64, 8), (32, 64, 8), (16, 64, 4)),
    (False, False): ((32, 64, 8), (16, 64, 4)),
}
_BLOCK_K = {(True, True): 64, (True, False): 32, (False, True): 16, (False, False): 16}


def _tile(m: int, n: int, dtype: torch.dtype, aligned: bool, products: int, stages: int) -> TileConfig:
    """The largest tile of an `m` by `n` product, no taller than `m` asks for, that makes enough programs.

    Where none does, the smallest: but not below 64 rows without need, since shorter tiles read the weights more often.
    """
    kind = (dtype != torch.float32, aligned)
    tallest = min(_power_of_two(m, 16, 128), _TILES[kind][0][0])
    tiles = [
        (block_m, block_n, warps)
        for block_m, block_n, warps in _TILES[kind]
        if min(64, tallest) <= block_m <= tallest and products * block_m * block_n <= 128 * 128
    ]
    enough = (t for t in tiles if _ceil_div(m, t[0]) * _ceil_div(n, t[1]) >= _ENOUGH_PROGRAMS // 2)
    block_m, block_n, warps = next(enough, tiles[-1])
    return TileConfig(block_m, block_n, _BLOCK_K[kind], warps, stages)


def prefill_config(
    m: int, k: int, d: int, dtype: torch.dtype, gated: bool, gather: bool, aligned: bool
) -> PrefillConfig:
    """Configuration for `m` tokens.

    Args:
        m: tokens.
        k, d, dtype, gated, gather: as in `ffn`.
        aligned: see `Problem.aligned`.
    """
    stages = 3 if dtype != torch.float32 else 2
    return PrefillConfig(
        hidden=_tile(m, k, dtype, aligned, products=2 if gated else 1, stages=stages),
        # A load through the index waits for the index: Triton shares the stages out between the two loads of the chain.
        down=_tile(m, d, dtype, aligned, products=1, stages=2 * stages - 1 if gather else stages),
        group=8,
    )
