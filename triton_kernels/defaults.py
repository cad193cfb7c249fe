"""The analytic choice of a configuration: a problem's sizes go in. No autotuning, no timing.

Widths enter through a few buckets only, so that layers of slightly different width share compiled kernels.
Few of these numbers have been measured on a GPU; the others follow from the sizes named beside them.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from .config import Config, DecodeConfig, PrefillConfig, TileConfig
from .hardware import INTERPRETER, MULTIPROCESSORS, multiplies_from_shared, shared_limit

# Above, the partial results of the single pass cost more than a second launch. A slab of S neurons writes and reads
# 8 bytes a channel and token, beside 2 * P * S bytes of weights a channel: for 8 tokens, P = 3 and S = 64 a sixth.
DECODE_MAX_TOKENS = 8
# Wider layers take two products for any number of tokens, where these have tiles of their own for few: with one token
# 47.8 us and 55.4 on an H200 (LLaMA-3-8B's layer at half its width).
DECODE_MAX_CHANNELS = 1024

# Tokens of one launch where there are partial results: bounds them.
MAX_TOKENS = 64

# Three programs for every two multiprocessors of an A100 (108), H100 (132) or B200 (148), roughly: memory is kept busy
# by the bytes in flight, which a program has 16 to 48 KiB of.
_ENOUGH_PROGRAMS = 192


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least `n`, held between `low` and `high`."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))


def least_tokens(num_warps: int) -> int:
    """Fewest tokens of a decode program: of 8, Triton 3.6 makes other matrix instructions than of more.

    Those add in another order, and a row must not show beside how many it was. Below 4 warps there is one kind only, as
    there is for float32.
    """
    return 16 if num_warps >= 4 else 8


@functools.lru_cache(maxsize=4096)
def decode_config(
    m: int, k: int, d: int, dtype: torch.dtype, gated: bool, aligned: bool, int8: bool = False
) -> DecodeConfig:
    """Configuration of the single pass for `k` kept neurons of width `d`; a row has the same bits for every `m`.

    A wide slab writes fewer partials (8 bytes a channel and token, against 2 or 3 record parts of `slab` elements),
    a narrow one gives every multiprocessor work: the widest that still makes enough programs wins.

    Args:
        m: tokens.
        k, d, dtype, gated: kept neurons, channels, dtype of x, form of the record.
        aligned: see `Operands.aligned`.
        int8: the record is int8. From 64 rows on sm_90 takes it into registers by 8 bytes, not 16.
    """
    half = dtype != torch.float32
    widths = () if not half else (32,) if int8 else (64, 32)
    slab = next((s for s in widths if _ceil_div(k, s) >= _ENOUGH_PROGRAMS), 16)
    # Elements of one record part in a stage: 4096 half-precision ones, so that three stages of a gated record take
    # less than 64 KiB. Unaligned rows come in element by element through registers, with an address each.
    elements = 4096 if half else 1024
    widest = min(128, (elements if aligned else elements // 4) // slab)
    warps = 4 if slab > 16 or not half else 2
    # Operands that come in through registers leave room for few accumulators, and so do few warps.
    most = (slab if aligned else 16) if half else 8
    return DecodeConfig(
        block_m=_power_of_two(m, min(least_tokens(warps), most), most),
        slab=slab,
        block_d=_power_of_two(d, 16, widest),
        num_warps=warps,
        # Less to load in a stage, one stage more.
        num_stages=4 if half and aligned and (int8 or not gated) else 3,
    )


# (block_m, block_n, warps), large to small, by (half precision, aligned). A thread holds 64 accumulators of a product
# at most, or twice 32 of a pair. Operands that come in through registers, as all float32 and all unaligned ones do,
# leave room for less. In half precision a tile has 64 weight rows at least: what the warp-group instructions work on.
_TILES = {
    (True, True): ((128, 128, 8), (128, 64, 8), (64, 64, 4), (32, 64, 4), (16, 64, 4)),
    (True, False): ((64, 64, 8), (32, 64, 4), (16, 64, 4)),
    (False, True): ((64, 64, 8), (32, 64, 8), (16, 64, 4)),
    (False, False): ((32, 64, 8), (16, 64, 4)),
}
_BLOCK_K = {(True, True): 64, (True, False): 32, (False, True): 16, (False, False): 16}


# Bytes of weights in flight on a multiprocessor: 4.3 TB/s times 0.7 us over 132 of them are 23 KB, a lead. One more
# stage is being multiplied, and the next copy starts behind it, so that of 64 KB a stage less is always in flight.
_IN_FLIGHT = 64 * 1024


def most_stages(parts: int, block_n: int, architecture: int) -> int:
    """Of the first product: with more of a single part, compilers for 10.x spill a register (Triton 3.6 and 3.9)."""
    return 4 if parts == 1 and block_n >= 64 and 100 <= architecture < 120 else 8


def chained(stages: int) -> int:
    """Stages to ask for where a load waits for an index: Triton shares them out between the two loads of the chain."""
    return 2 * stages - 1


def shared_bytes(tile: TileConfig, parts: int, element: int, chain: bool = False) -> int:
    """Shared memory that the stages of a product take; what Triton takes is at most 2 KiB more.

    Args:
        tile: its configuration.
        parts: of the record that are multiplied.
        element: bytes of an element of x, as which a weight is counted also where it is int8.
        chain: see `chained`.
    """
    stages = (tile.num_stages + 1) // 2 if chain else tile.num_stages
    return stages * tile.block_k * ((tile.block_n * parts + tile.block_m) * element + (4 if chain else 0))


def fits(config: Config, gated: bool, gather: bool, dtype: torch.dtype, architecture: int) -> bool:
    """Whether an architecture has the shared memory for the stages of both products; for slabs, always."""
    if isinstance(config, DecodeConfig):
        return True
    parts = 2 if gated else 1
    if config.hidden.num_stages > most_stages(parts, config.hidden.block_n, architecture):
        return False
    first = shared_bytes(config.hidden, parts, dtype.itemsize)
    second = shared_bytes(config.down, 1, dtype.itemsize, chain=gather)
    return max(first, second) + 2048 <= shared_limit(architecture)


def _deepest(
    tile: TileConfig, parts: int, programs: int, architecture: int, most: int = 8, chain: bool = False
) -> TileConfig:
    """`tile`, of one stage, with those that keep `_IN_FLIGHT` bytes of weights coming, or as many as fit."""
    together = 1 if programs <= MULTIPROCESSORS else 2
    wanted = 1 + _ceil_div(_IN_FLIGHT, together * tile.block_n * tile.block_k * parts * 2)
    room = (shared_limit(architecture, together) - 2048) // shared_bytes(tile, parts, 2, chain)
    stages = max(2, min(wanted, room, most))
    return replace(tile, num_stages=chained(stages) if chain else stages)


def _has_few(dtype: torch.dtype, aligned: bool, int8: bool) -> bool:
    """Whether `_few` has tiles for such operands."""
    return aligned and dtype != torch.float32 and not int8


def _few(m: int, k: int, d: int, gated: bool, gather: bool, batch_invariant: bool, architecture: int) -> PrefillConfig:
    """Up to 64 tokens in half precision, with aligned records of the same: enough bytes must be in flight.

    Only the tokens of a tile and the depth of a pipeline may follow `m` where a row must have the same bits for every
    `m`; so all else is chosen for the most tokens there.
    """
    parts = 2 if gated else 1
    block_m = _power_of_two(m, 16, MAX_TOKENS)
    most = MAX_TOKENS if batch_invariant else block_m
    # Fewer neurons for each program of a narrow layer; but no more bytes of x than of weights, which the L2 cache has
    # to deliver as well.
    block_n = 32 if _ceil_div(k, 64) < MULTIPROCESSORS * 2 // 3 and most <= 32 * parts else 64
    most_hidden = most_stages(parts, block_n, architecture)
    block_k = _power_of_two(d, 16, 64 if gated or (block_n == 64 and most_hidden > 4) else 128)
    hidden = TileConfig(block_m, block_n, block_k, 4, 1)
    down = TileConfig(block_m, 64, 64, 4, 1)
    # Every column of channels reads all hidden activations: as many bytes as weights with 64 tokens and 64 channels.
    wide = replace(down, block_n=128, num_warps=8)
    if (
        multiplies_from_shared(architecture)
        and most > 16
        and _ceil_div(d, 128) * _splits(k, d, wide) >= MULTIPROCESSORS * 2 // 3
    ):
        down = wide
    splits = _splits(k, d, down)
    hidden = _deepest(hidden, parts, _ceil_div(k, block_n), architecture, most_hidden)
    down = _deepest(down, 1, _ceil_div(d, down.block_n) * splits, architecture, chain=gather)
    return PrefillConfig(hidden, down, group=8, splits=splits)


def _tile(m: int, n: int, depth: int, dtype: torch.dtype, aligned: bool, products: int, stages: int) -> TileConfig:
    """The largest tile of an `m` by `n` product, no taller than `m` asks for, that makes enough programs.

    Where none does, the smallest: but not below 64 tokens without need, since those read the weights more often.
    """
    kind = (dtype != torch.float32, aligned)
    tallest = min(_power_of_two(m, 16, 128), _TILES[kind][0][0])
    tiles = [
        (block_m, block_n, warps)
        for block_m, block_n, warps in _TILES[kind]
        if min(64, tallest) <= block_m <= tallest and products * block_m * block_n <= 128 * 128
    ]
    enough = (t for t in tiles if _ceil_div(m, t[0]) * _ceil_div(n, t[1]) >= _ENOUGH_PROGRAMS * 2 // 3)
    block_m, block_n, warps = next(enough, tiles[-1])
    return TileConfig(block_m, block_n, _power_of_two(depth, 16, _BLOCK_K[kind]), warps, stages)


def _splits(k: int, d: int, tile: TileConfig) -> int:
    """Into how many parts to split the neurons of the second product: enough programs, but two blocks for each.

    Of wide tiles half as many programs have as many bytes in flight.
    """
    columns = _ceil_div(d, tile.block_n)
    wanted = _power_of_two(_ceil_div(_ENOUGH_PROGRAMS * 64 // max(64, tile.block_n), columns), 1, 16)
    while wanted > 1 and k < wanted * 2 * tile.block_k:
        wanted //= 2
    return wanted


@functools.lru_cache(maxsize=4096)
def prefill_config(
    m: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    gated: bool,
    gather: bool,
    aligned: bool,
    batch_invariant: bool = False,
    int8: bool = False,
    architecture: int = INTERPRETER,
) -> PrefillConfig:
    """Configuration of the two products for `m` tokens.

    Args:
        m: tokens.
        k, d, dtype, gated, gather: as in `ffn`.
        aligned: see `Operands.aligned`.
        int8: the record is int8.
        architecture: see `hardware`.
        batch_invariant: a row must have the same bits for every `m`: of the choice only the tokens of a tile may
            follow `m`, as that of the widest tile for few tokens would.
    """
    stages = 3 if dtype != torch.float32 else 2
    few = m <= MAX_TOKENS or batch_invariant
    tokens = min(m, MAX_TOKENS) if batch_invariant else m
    if few and _has_few(dtype, aligned, int8):
        return _few(tokens, k, d, gated, gather, batch_invariant, architecture)
    down = _tile(tokens, d, k, dtype, aligned, products=1, stages=chained(stages) if gather else stages)
    return PrefillConfig(
        hidden=_tile(tokens, k, d, dtype, aligned, products=2 if gated else 1, stages=stages),
        down=down,
        group=8,
        splits=_splits(k, d, down) if few else 1,
    )


@functools.lru_cache(maxsize=4096)
def default_config(
    m: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    gated: bool,
    gather: bool,
    aligned: bool,
    batch_invariant: bool = False,
    int8: bool = False,
    architecture: int = INTERPRETER,
) -> Config:
    """The analytic choice between `decode_config` and `prefill_config`; arguments as there."""
    few = m <= DECODE_MAX_TOKENS and not batch_invariant
    if k == 0 or (few and (d <= DECODE_MAX_CHANNELS or not _has_few(dtype, aligned, int8))):
        return decode_config(m, k, d, dtype, gated, aligned, int8)
    return prefill_config(m, k, d, dtype, gated, gather, aligned, batch_invariant, int8, architecture)
