"""Configurations worth timing against the analytic one: few, and only such as compile without spills."""

from __future__ import annotations

from dataclasses import replace

import torch

from .config import Config, DecodeConfig, PrefillConfig, TileConfig
from .defaults import MAX_TOKENS, decode_config, default_config, fits, least_tokens, prefill_config
from .hardware import INTERPRETER, has_descriptors, multiplies_from_shared

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


def _few(base: PrefillConfig, gather: bool, widths: bool) -> list[Config]:
    """Up to 64 tokens: deeper pipelines, more splits or fewer, and with `widths` the other one of each tile."""
    splits = [s for s in (base.splits * 2, base.splits // 2) if 1 <= s <= _MOST_SPLITS]
    found = [base, _deeper(base, gather), *(replace(base, splits=s) for s in splits)]
    if widths:
        block_n, warps = {64: (128, 8), 128: (64, 4)}[base.down.block_n]
        found.append(replace(base, down=replace(base.down, block_n=block_n, num_warps=warps)))
        block_n = {64: 32, 32: 64}[base.hidden.block_n]
        found.append(replace(base, hidden=replace(base.hidden, block_n=block_n)))
    return list(found)


def _many(base: PrefillConfig, gated: bool, tallest: bool) -> list[Config]:
    """More tokens: the tiles that use the matrix units well."""
    shapes = [(128, 64, 8), (64, 64, 4)] if gated else [(128, 128, 8), (128, 64, 8)]
    found: list[Config] = [base]
    for block_m, block_n, warps in shapes:
        for stages in (3, 4):
            found.append(replace(base, hidden=TileConfig(block_m, block_n, base.hidden.block_k, warps, stages)))
    if tallest:
        # 128 accumulators a thread: where operands pass through registers too, these spill.
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
    batch_invariant: bool = False,
    int8: bool = False,
    architecture: int = INTERPRETER,
) -> list[Config]:
    """At most 12 configurations to time, the analytic one first; arguments as in `default_config`.

    Args:
        batch_invariant: there is one answer for every `m`, so nothing to time.
        int8: the record is int8, which takes other tiles through registers.
        architecture: see `hardware`; nothing is offered that does not fit there.
    """
    half = dtype != torch.float32
    form = (k, d, dtype, gated, gather, aligned)
    first = default_config(m, *form, batch_invariant, int8, architecture)
    found: list[Config] = [first]
    if batch_invariant or k == 0:
        return found
    wide = half and aligned
    if m <= _EITHER:
        single = decode_config(m, k, d, dtype, gated, aligned, int8)
        found += _decode(single, d, int8) if wide else [single]
    base = prefill_config(m, *form, int8=int8, architecture=architecture)
    from_shared = multiplies_from_shared(architecture)
    if not wide:
        more: list[Config] = [base]
    elif m <= MAX_TOKENS:
        more = _few(base, gather, from_shared and not int8)
    elif int8:
        more = [base, _deeper(base, gather)]
    else:
        more = _many(base, gated, from_shared and not gather)
    if has_descriptors(architecture) and wide and not gather and not int8:
        more += [replace(c, descriptors=True) for c in more if isinstance(c, PrefillConfig)]
    found += more
    return list(dict.fromkeys(c for c in found if fits(c, gated, gather, dtype, architecture)))[:12]
