"""The chosen widths of a sorted model, and the file that keeps their down rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...base.errors import CheckpointError, InputError, check
from ...ffn.mlp import PrunedMLP
from ...model import families
from ...model.provenance import read
from ..allocation import bounds

FILE = "nested.safetensors"
_FORMAT = "pyprune-nested-1"
CLOSE = 1e-9  # shares that differ by less are one share

Rows = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Nested:
    """The chosen widths of a model whose neurons are sorted.

    Attributes:
        shares: of all neurons, one for each chosen width.
        widths: for each share, the neurons of every layer.
        rows: for each share and layer the compensated down rows `[K, D]`, or None for the model's own.
        fingerprint: of the dense sorted model they belong to (see `families.fingerprint`).
    """

    shares: tuple[float, ...]
    widths: tuple[tuple[int, ...], ...]
    rows: Rows | None
    fingerprint: str

    def entry(self) -> dict[str, Any]:
        """The `nested` entry of the config's `pyprune` block."""
        return {
            "shares": list(self.shares),
            "widths": [list(w) for w in self.widths],
            "file": None if self.rows is None else FILE,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: Path) -> None:
        """Write the rows into `folder`."""
        assert self.rows is not None
        tensors = {_name(n, i): r.cpu().contiguous() for n, rows in enumerate(self.rows) for i, r in enumerate(rows)}
        save_file(tensors, folder / FILE, {"format": _FORMAT, "fingerprint": self.fingerprint})

    def counts(self, share: float) -> tuple[int, ...] | None:
        """The widths that were chosen for a share, or None."""
        return next((w for s, w in zip(self.shares, self.widths, strict=True) if abs(s - share) < CLOSE), None)

    def rows_of(self, layer: int, count: int, counts: Sequence[int]) -> Tensor | None:
        """Compensated rows of a layer at `count` neurons: those fitted for all of `counts` if there are, else any."""
        fitting = [n for n, w in enumerate(self.widths) if w[layer] == count]
        whole = [n for n in fitting if list(self.widths[n]) == list(counts)]
        chosen = whole or fitting
        return self.rows[chosen[0]][layer] if self.rows is not None and chosen else None


def _name(share: int, layer: int) -> str:
    return f"shares.{share}.layers.{layer}"


def each(values: Sequence[Any], sizes: Sequence[int], argument: str) -> Sequence[Any]:
    check(len(values) == len(sizes), argument, f"hold one width for each of {len(sizes)} layers", len(values))
    return values


def count_of(keep: Any, size: int, argument: str = "keep") -> int:
    """How many of `size` neurons: a float is a share, an integer above 1 a count."""
    number = isinstance(keep, Real) and not isinstance(keep, bool)
    if number and isinstance(keep, Integral):
        rule = f"be a share, as a float (1.0 is all), or a count from 2 to {size}"
        check(2 <= int(keep) <= size, argument, rule, keep)
        return int(keep)
    check(number and math.isfinite(keep) and 0 < keep <= 1, argument, "lie in (0, 1]", keep)
    return bounds.round_width(float(keep) * size, 1, size)


def entry_of(model: nn.Module) -> dict[str, Any] | None:
    found: dict[str, Any] | None = read(getattr(model, "config", None)).get("nested")
    return found


def layers_of(model: nn.Module) -> list[PrunedMLP]:
    return [module for module in model.modules() if isinstance(module, PrunedMLP)]


def _read(folder: Path, entry: dict[str, Any], sizes: Sequence[int], hidden_size: int) -> Nested:
    """What `entry` says, checked against the layers, with the rows of the file it names."""
    shares, widths = entry["shares"], entry["widths"]
    fit = len(shares) == len(widths) > 0 and all(isinstance(s, float | int) and 0 < s <= 1 for s in shares)
    fit = fit and all(len(w) == len(sizes) for w in widths)
    fit = fit and all(isinstance(c, int) and 1 <= c <= f for w in widths for c, f in zip(w, sizes, strict=True))
    if not fit:
        raise CheckpointError(
            f"the entry `nested` of the config in {folder} does not fit the model's {len(sizes)} FFNs"
        )
    rows: list[tuple[Tensor, ...]] | None = None
    if entry["file"] is not None:
        if entry["file"] != FILE:
            raise CheckpointError(f"the config's entry `nested` must name {FILE}; it names {entry['file']!r}")
        if not (folder / FILE).is_file():
            raise CheckpointError(f"{FILE}, which config.json names, is missing from {folder}")
        rows = []
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != entry["fingerprint"]:
                raise CheckpointError(f"{folder / FILE} does not belong to the checkpoint's config.json")
            for n, counts in enumerate(widths):
                for i, count in enumerate(counts):
                    shape = file.get_slice(_name(n, i)).get_shape()
                    if list(shape) != [count, hidden_size]:
                        raise CheckpointError(
                            f"{_name(n, i)} of {FILE} must have shape {[count, hidden_size]}; it has {shape}"
                        )
                found = tuple(file.get_tensor(_name(n, i)) for i in range(len(counts)))
                bad = [i for i, r in enumerate(found) if not (r.is_floating_point() and bool(r.isfinite().all()))]
                if bad:
                    raise CheckpointError(f"{_name(n, bad[0])} of {FILE} must hold finite floating-point values")
                rows.append(found)
    names = tuple(float(s) for s in shares)
    return Nested(names, tuple(map(tuple, widths)), None if rows is None else tuple(rows), str(entry["fingerprint"]))


def attach(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a model that was loaded from `folder` the compensated rows that lie there; returns `model`.

    Args:
        model: as `loading.load_model` or Transformers loaded it, accelerated or not.
        folder: the checkpoint.

    Raises:
        InputError: the checkpoint was not made by `prune_nested`.
        CheckpointError: the rows are missing, damaged, or of another model.
    """
    entry, folder = entry_of(model), Path(folder)
    if entry is None:
        raise InputError(
            f"{folder} must be a nested checkpoint (`pyprune prune --nested`); its config has no such entry"
        )
    accelerated = layers_of(model)
    if accelerated:
        sizes, hidden_size = [m.intermediate_size for m in accelerated], accelerated[0].hidden_size
    else:
        ffns = families.find_ffns(model)
        sizes, hidden_size = [ffn.intermediate_size for ffn in ffns], ffns[0].hidden_size
    try:
        nested = _read(folder, entry, sizes, hidden_size)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise CheckpointError(f"the nested widths of {folder} cannot be read: {error}") from error
    holder: Any = model
    holder.pyprune_nested = nested
    return model
