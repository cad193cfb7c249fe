"""Launch configurations: a problem's sizes go in, a printable configuration comes out. No autotuning, no timing.

Widths enter through a few buckets only, so that layers of slightly different width share compiled kernels.
None of these numbers has been measured on a GPU; they follow from the sizes named beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

# Above, the partial results of the single pass cost more than a second launch. A slab of S neurons writes and reads
# 8 bytes a channel and token, beside 2 * P * S bytes of weights a channel: for 8 tokens, P = 3 and S = 64 a sixth.
DECODE_MAX_TOKENS = 8

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


@dataclass(frozen=True)
class DecodeConfig:
    """Blocks of the decode pass.

    Args:
        block_m: tokens of a program.
        slab: neurons of a program. It fixes the order of the sums, so it must not depend on the number of tokens.
        block_d: channels taken at once.
        num_warps, num_stages: warps of a program and depth of its load pipeline.
    """

    block_m: int
    slab: int
    block_d: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TileConfig:
    """Blocks of one matrix product.

    Args:
        block_m: tokens of a program.
        block_n: weight rows of a program: neurons of the first product, channels of the second.
        block_k: taken at once of what is summed over.
        num_warps, num_stages: warps of a program and depth of its load pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles of the two matrix products.

    Args:
        hidden: of `up @ x.T`, summed over channels.
        down: of `down.T @ hidden.T`, summed over neurons; its block_k divides hidden's block_n.
        group: token blocks in a band, see `products.tile_of`.
        splits: programs that share the neurons of a tile of the second product.
        descriptors: see `descriptors`.
    """

    hidden: TileConfig
    down: TileConfig
    group: int
    splits: int = 1
    descriptors: bool = False


Config = DecodeConfig | PrefillConfig
_KINDS: dict[str, type[DecodeConfig] | type[PrefillConfig]] = {"decode": DecodeConfig, "prefill": PrefillConfig}


def to_json(config: Config) -> dict[str, int | str | bool]:
    """`config` as flat JSON values; `kind` is "decode" or "prefill", tiles are `hidden_block_m` and so on."""
    flat: dict[str, int | str | bool] = {"kind": "decode" if isinstance(config, DecodeConfig) else "prefill"}
    for name, value in asdict(config).items():
        flat.update(
            {f"{name}_{key}": size for key, size in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def _values(values: Mapping[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The values of `names` (field: key), checked: sizes are powers of two, counts positive, flags bool."""
    found = {}
    for name, key in names.items():
        value = values[key]
        if name == "descriptors":
            fits, rule = isinstance(value, bool), "be true or false"
        else:
            fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
            rule = "be a positive integer"
            if fits and (name.startswith(("block_", "slab")) or name == "num_warps"):
                low = {"block_m": 8, "num_warps": 1}.get(name, 16)
                fits, rule = value >= low and value & (value - 1) == 0, f"be a power of two, at least {low}"
        if not fits:
            raise ValueError(f"config[{key!r}] must {rule}; got {value!r}")
        found[name] = value
    return found


def from_json(values: Mapping[str, Any]) -> Config:
    """The configuration that `to_json` wrote.

    Raises:
        ValueError: a key is unknown or missing, or a value is not what it must be; with the key.
    """
    kind = values.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"config['kind'] must be one of {', '.join(_KINDS)}; got {kind!r}")
    tiles = ("hidden", "down") if kind == "prefill" else ()
    own = {field.name: field.name for field in fields(_KINDS[kind]) if field.name not in tiles}
    parts = {tile: {field.name: f"{tile}_{field.name}" for field in fields(TileConfig)} for tile in tiles}
    keys = {"kind", *own.values(), *(key for part in parts.values() for key in part.values())}
    for rule, wrong in (("hold", keys - values.keys()), ("not hold", values.keys() - keys)):
        if wrong:
            raise ValueError(f"config must {rule} the key {min(wrong)!r}; got {', '.join(sorted(values))}")
    made: dict[str, Any] = {tile: TileConfig(**_values(values, names)) for tile, names in parts.items()}
    made.update(_values(values, own))
    if tiles and made["hidden"].block_n % made["down"].block_k:
        wide = made["hidden"].block_n
        raise ValueError(f"config['down_block_k'] must divide hidden_block_n, {wide}; got {made['down'].block_k}")
    return _KINDS[kind](**made)


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
        m: tokens, or 1 where each has a list of its own.
        k, d, dtype, gated: kept neurons, channels, dtype of x, form of the record.
        aligned: see `Problem.aligned`.
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
    """Into how many parts to split the neurons of the second product: enough programs, but two blocks for each."""
    columns = _ceil_div(d, tile.block_n)
    wanted = _power_of_two(_ceil_div(_ENOUGH_PROGRAMS, columns), 1, 16)
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
) -> PrefillConfig:
    """Configuration of the two products for `m` tokens.

    Args:
        m: tokens.
        k, d, dtype, gated, gather: as in `ffn`.
        aligned: see `Problem.aligned`.
        batch_invariant: a row must have the same bits for every `m`: of the choice only the tokens of a tile may
            follow `m`, as that of the widest tile for few tokens would.
    """
    stages = 3 if dtype != torch.float32 else 2
    few = m <= MAX_TOKENS or batch_invariant
    tokens = min(m, MAX_TOKENS) if batch_invariant else m
    # A load through the index waits for the index: Triton shares the stages out between the two loads of the chain.
    down = _tile(tokens, d, k, dtype, aligned, products=1, stages=2 * stages - 1 if gather else stages)
    return PrefillConfig(
        hidden=_tile(tokens, k, d, dtype, aligned, products=2 if gated else 1, stages=stages),
        down=down,
        group=8,
        splits=_splits(k, d, down) if few else 1,
        # Off until a device has run them: nothing here can show that they are faster, or by how much.
        descriptors=False,
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
    per_token: bool = False,
    batch_invariant: bool = False,
    int8: bool = False,
) -> Config:
    """The analytic choice between `decode_config` and `prefill_config`; arguments as there.

    Args:
        per_token: every token has an index of its own, which only the single pass can follow.
    """
    if per_token:
        return decode_config(1, k, d, dtype, gated, aligned, int8)
    if k == 0 or (m <= DECODE_MAX_TOKENS and not batch_invariant):
        return decode_config(m, k, d, dtype, gated, aligned, int8)
    return prefill_config(m, k, d, dtype, gated, gather, aligned, batch_invariant)
