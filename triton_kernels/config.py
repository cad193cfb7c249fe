"""Launch configurations as data, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


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
        down: of `down.T @ hidden.T`, summed over neurons.
        group: token blocks in a band, see `products.tile_of`.
        splits: programs that share the neurons of a tile of the second product.
        descriptors: see `descriptors`; off until a device has run them, for nothing else shows whether they are faster.
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
    return _KINDS[kind](**made)
