"""The analytic choice of tiles for experts: sizes go in. None of it has been timed on a GPU yet.

Both products have tiles of the same pairs of token and expert, since one table says which pairs are together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from .config import PrefillConfig, TileConfig
from .defaults import (
    _BLOCK_K,
    _ENOUGH_PROGRAMS,
    _TILES,
    MAX_TOKENS,
    _ceil_div,
    _deepest,
    _has_few,
    _power_of_two,
    chained,
    fits,
    most_stages,
)
from .hardware import INTERPRETER, MULTIPROCESSORS


def _tallest(dtype: torch.dtype, aligned: bool, int8: bool, batch_invariant: bool) -> int:
    """Most pairs of a tile; under batch invariance such that nothing else of the tiles follows from it."""
    if batch_invariant:
        return MAX_TOKENS if _has_few(dtype, aligned, int8) else 16
    return _TILES[dtype != torch.float32, aligned][0][0]


def _pairs(tokens: int, picked: int, experts: int, tallest: int) -> int:
    """Pairs of a tile: half as many again as an expert has on average, so that most experts are one tile."""
    mean = _ceil_div(3 * tokens * picked, 2 * experts)
    return _power_of_two(min(tokens, mean), 16, tallest)


def _tile(block_m: int, depth: int, dtype: torch.dtype, aligned: bool, int8: bool, products: int) -> TileConfig:
    """The widest tile of so many pairs whose accumulators fit; see `defaults._TILES`."""
    kind = (dtype != torch.float32, aligned)
    _, block_n, warps = next(t for t in _TILES[kind] if t[0] == block_m and products * t[0] * t[1] <= 128 * 128)
    if int8 and not kind[0]:
        warps = 8  # with four, a program for sm_80 spills a register
    stages = 3 if kind[0] else 2
    return TileConfig(block_m, block_n, _power_of_two(depth, 16, _BLOCK_K[kind]), warps, stages)


@functools.lru_cache(maxsize=4096)
def experts_config(
    tokens: int,
    picked: int,
    experts: int,
    f: int,
    d: int,
    dtype: torch.dtype,
    gated: bool,
    aligned: bool,
    batch_invariant: bool = False,
    int8: bool = False,
    architecture: int = INTERPRETER,
    gather: bool = False,
) -> PrefillConfig:
    """Tiles of the two grouped products.

    Args:
        tokens, picked, experts: T, K, E.
        f, d: most neurons of an expert that are computed, channels.
        dtype: of x.
        gated: the rows have a gate part.
        aligned: see `ExpertOperands.aligned`.
        batch_invariant: a token must have the same bits for every `tokens`: only the pairs of a tile and the depth of
            a pipeline may follow them.
        int8: the rows are int8.
        architecture: see `hardware`.
        gather: rows are found by an index.
    """
    parts = 2 if gated else 1
    block_m = _pairs(tokens, picked, experts, _tallest(dtype, aligned, int8, batch_invariant))
    hidden, down = (_tile(block_m, depth, dtype, aligned, int8, n) for depth, n in ((d, parts), (f, 1)))
    # Experts that a call is expected to read at the least, each a tile.
    tiles = min(experts, picked if batch_invariant else tokens * picked)
    deep = _has_few(dtype, aligned, int8) and block_m <= MAX_TOKENS
    if deep and (batch_invariant or block_m <= 32) and tiles * _ceil_div(f, 64) < MULTIPROCESSORS:
        # Fewer neurons for each program, so that every multiprocessor has one.
        hidden = replace(hidden, block_n=32)
    columns = tiles * _ceil_div(d, down.block_n)
    splits = _power_of_two(_ceil_div(_ENOUGH_PROGRAMS * 2 // 3, columns), 1, 16)
    while splits > 1 and f < splits * 2 * down.block_k:
        splits //= 2
    if deep:
        most = most_stages(parts, hidden.block_n, architecture)
        programs = tiles * _ceil_div(f, hidden.block_n)
        hidden = _deepest(replace(hidden, num_stages=1), parts, programs, architecture, most)
        down = _deepest(replace(down, num_stages=1), 1, columns * splits, architecture, chain=gather)
    elif gather:
        down = replace(down, num_stages=chained(down.num_stages))
    return PrefillConfig(hidden, down, group=8, splits=splits)


def experts_candidates(
    tokens: int,
    picked: int,
    experts: int,
    f: int,
    d: int,
    dtype: torch.dtype,
    gated: bool,
    aligned: bool,
    architecture: int = INTERPRETER,
    gather: bool = False,
) -> list[PrefillConfig]:
    """Configurations worth timing against the analytic one, which is first; arguments as of `experts_config`."""
    sizes = (tokens, picked, experts, f, d, dtype, gated, aligned)
    base = experts_config(*sizes, architecture=architecture, gather=gather)
    if not _has_few(dtype, aligned, int8=False):
        return [base]
    found = [base, *_others(base, f)]
    return list(dict.fromkeys(c for c in found if fits(c, gated, gather, dtype, architecture)))


def _others(base: PrefillConfig, f: int) -> Iterator[PrefillConfig]:
    up, down = base.hidden, base.down
    yield replace(
        base, hidden=replace(up, num_stages=up.num_stages + 1), down=replace(down, num_stages=down.num_stages + 1)
    )
    if up.block_n in (32, 64) and up.block_m <= 32:
        # Neurons of a program, channels at once, channels of the second product's programs.
        yield replace(base, hidden=replace(up, block_n=96 - up.block_n))
        yield replace(base, hidden=replace(up, block_k=128, num_stages=max(2, up.num_stages // 2 + 1)))
        yield replace(base, down=replace(down, block_n=128, num_warps=8, num_stages=max(3, down.num_stages - 1)))
        yield replace(base, down=replace(down, block_k=128, num_stages=max(2, down.num_stages // 2 + 1)))
    if f >= 4 * down.block_k and up.block_m <= 32:
        yield replace(base, splits=base.splits * 2)
    if up.block_m < 128 and up.block_m > 16:
        block_m, warps = (up.block_m * 2, 8 if up.block_m == 64 else 4)
        yield replace(
            base,
            hidden=replace(up, block_m=block_m, num_warps=warps, num_stages=3),
            down=replace(down, block_m=block_m, num_warps=warps, num_stages=3),
        )
    if up.block_m > 16:
        block_m = up.block_m // 2
        yield replace(
            base,
            hidden=replace(up, block_m=block_m, block_n=64, num_warps=4, num_stages=min(4, up.num_stages + 1)),
            down=replace(down, block_m=block_m, block_n=64, num_warps=4, num_stages=min(5, down.num_stages + 1)),
        )
