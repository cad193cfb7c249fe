"""Configurations worth timing against the analytic one: few, and only such as compile without spills."""

from __future__ import annotations

from dataclasses import replace

import torch

from .config import (
    MAX_TOKENS,
    Config,
    DecodeConfig,
    PrefillConfig,
    TileConfig,
    decode_config,
    default_config,
    least_tokens,
    prefill_config,
)

# Single pass and two products both make sense up to so many tokens.
_EITHER = 16
_MOST_SPLITS = 32


def _decode(base: DecodeConfig, d: int, int8: bool) -> list[Config]:
    """Slabs wider and narrower, with as many bytes of a record part in a stage, and deeper pipelines."""
    found: list[Config] = []
    for slab, block_d, warps in ((64, 64, 4), (32, 128, 4), (16, 128, 2)):
        if int8 and slab == 64:
            continue  # see decode_config
        block_m = max(min(base.block_m, slab), least_tokens(warps))
        block_d = block_d if d >= block_d else base.block_d
        sized = replace(base, block_m=block_m, slab=slab, block_d=block_d, num_warps=warps)
        found.append(sized)
        if slab > 16:  # with two warps more stages spill
            found.append(replace(sized, num_stages=base.num_stages + 1))
    return found


def _deeper(base: PrefillConfig, gather: bool) -> PrefillConfig:
    """One more stage of every load; a chain of two loads shares them, see `prefill_config`."""
    return replace(
        base,
        hidden=replace(base.hidden, num_stages=base.hidden.num_stages + 1),
        down=replace(base.down, num_stages=base.down.num_stages + (2 if gather else 1)),
    )


def _few(base: PrefillConfig, gather: bool) -> list[Config]:
    """Up to 64 tokens: more splits or fewer, deeper pipelines."""
    deeper = _deeper(base, gather)
    splits = [s for s in (base.splits * 2, base.splits // 2) if 1 <= s <= _MOST_SPLITS]
    return [base, deeper, *(replace(c, splits=s) for s in splits for c in (base, deeper))]


def _many(base: PrefillConfig, gated: bool, recent: bool) -> list[Config]:
    """More tokens: the tiles that use the matrix units well."""
    shapes = [(128, 64, 8), (64, 64, 4)] if gated else [(128, 128, 8), (128, 64, 8)]
    found: list[Config] = [base]
    for block_m, block_n, warps in shapes:
        for stages in (3, 4):
            found.append(replace(base, hidden=TileConfig(block_m, block_n, base.hidden.block_k, warps, stages)))
    if recent:
        # 128 accumulators a thread: on sm_80, where operands pass through registers too, these spill.
        hidden = TileConfig(128 if gated else 256, 128, base.hidden.block_k, 8, 3)
        found.append(replace(base, hidden=hidden, down=TileConfig(256, 128, base.down.block_k, 8, 3)))
    return found


def candidates(
    m: int,
    k: int,
    d: int,
    dtype: torch.dtype,
    gated: bool,
    gather: bool,
    aligned: bool,
    per_token: bool = False,
    batch_invariant: bool = False,
    int8: bool = False,
    recent: bool = False,
) -> list[Config]:
    """At most 12 configurations to time, the analytic one first; arguments as in `default_config`.

    Args:
        batch_invariant: there is one answer for every `m`, so nothing to time.
        int8: the record is int8, which takes other tiles through registers.
        recent: for compute capability 9.0 and newer, which have descriptors, and matrix units that read shared memory.
    """
    half = dtype != torch.float32
    first = default_config(m, k, d, dtype, gated, gather, aligned, per_token, batch_invariant, int8)
    found: list[Config] = [first]
    if batch_invariant or k == 0:
        return found
    wide = half and aligned
    if per_token or m <= _EITHER:
        single = decode_config(1 if per_token else m, k, d, dtype, gated, aligned, int8)
        found += _decode(single, d, int8) if wide else [single]
    if not per_token:
        base = prefill_config(m, k, d, dtype, gated, gather, aligned)
        if not wide:
            more: list[Config] = [base]
        elif m <= MAX_TOKENS:
            more = _few(base, gather)
        else:
            more = [base, _deeper(base, gather)] if int8 else _many(base, gated, recent and not gather)
        if recent and wide and not gather and not int8:
            more += [replace(c, descriptors=True) for c in more if isinstance(c, PrefillConfig)]
        found += more
    return list(dict.fromkeys(found))[:12]
