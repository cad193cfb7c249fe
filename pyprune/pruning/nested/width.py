"""Runs a sorted model at any width."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...base.errors import InputError, check
from ...ffn.accelerate import accelerate
from ...ffn.quantisation import check_fits
from ...model.loading import load_model
from .chosen import Nested, attach, count_of, each, entry_of, layers_of


def load(
    folder: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    weights: str | None = None,
    backend: str = "auto",
) -> Any:
    """Load a nested checkpoint, accelerated, at full width and ready for `set_width`.

    Args:
        folder: what `checkpoint.save` wrote after `prune_nested`.
        dtype, device: as for `loading.load_model`.
        weights, backend: as for `accelerate`.

    Raises:
        InputError, CheckpointError: as `loading.load_model` and `attach`.
    """
    model = attach(load_model(str(folder), dtype, device), folder)
    return accelerate(model, backend=backend, weights=weights)


def _wanted(keep: Any, sizes: Sequence[int], nested: Nested | None) -> list[int]:
    """Neurons of every layer for `keep`."""
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        return [count_of(k, size) for k, size in zip(each(keep, sizes, "keep"), sizes, strict=True)]
    counts = [count_of(keep, size) for size in sizes]
    chosen = nested.counts(float(keep)) if nested is not None and not isinstance(keep, Integral) else None
    return list(chosen or counts)


def set_width(
    model: nn.Module,
    keep: float | int | Sequence[float] | Sequence[int],
    layer: int | None = None,
    *,
    compensated: bool = True,
    unsorted: bool = False,
) -> list[int]:
    """Make an accelerated model run only the first neurons of its layers, at once and without a copy.

    All weights stay in memory, and `state_dict` and `save_pretrained` still give all of them; `set_width(model, 1.0)`
    is the way back. A share that the checkpoint was made for takes the widths chosen there. A layer at a width that has
    compensated down rows runs these: K x D values are copied into the record, and its own come back, to the bit, with
    the next width. CUDA graphs captured before must be captured again.

        >>> model, tokenizer = load("nested")  # made by `pyprune prune demo --out nested --nested`
        >>> counts = set_width(accelerate(model), 0.5)

    Args:
        model: a nested checkpoint's, after `accelerate` (see `load`).
        keep: a share of neurons in (0, 1], or, as an integer from 2 on, how many; or a list of these, one a layer.
        layer: only this layer, the others stay as they are; None for all.
        compensated: use compensated down rows where there are any.
        unsorted: insist on a model whose neurons nobody sorted by importance.

    Returns:
        Neurons that each layer now runs.

    Raises:
        InputError: a value breaks its rule, the model is not accelerated, in gather mode, not sorted, or its
            compensated rows were not loaded; nothing has changed then.
    """
    modules = layers_of(model)
    check(bool(modules), "model", "be accelerated first (pyprune.accelerate)", type(model).__name__)
    gathers = any(module.index is not None for module in modules)
    check(not gathers, "model", "be accelerated in mode 'compact'; an index says what runs", "gather")
    sizes = [module.intermediate_size for module in modules]
    entry, nested = entry_of(model), getattr(model, "pyprune_nested", None)
    _check_sorted(entry, nested, len(sizes), compensated, unsorted)
    counts = [module.neurons for module in modules]
    if layer is None:
        counts, changed = _wanted(keep, sizes, nested), list(range(len(sizes)))
    else:
        whole = isinstance(layer, Integral) and not isinstance(layer, bool)
        check(whole and 0 <= layer < len(sizes), "layer", f"lie in [0, {len(sizes)})", layer)
        counts[layer], changed = count_of(keep, sizes[layer]), [layer]
    rows: list[Tensor | None] = [None] * len(sizes)
    for i in changed if compensated else ():
        down = None if nested is None else nested.rows_of(i, counts[i], counts)
        if down is not None:
            check_fits(down.to(modules[i].dtype), modules[i].record.dtype, f"compensated rows of layer {i}")
        rows[i] = down
    for i in changed:
        modules[i].set_width(counts[i], rows[i])
    return counts


def _check_sorted(
    entry: dict[str, Any] | None, nested: Nested | None, layers: int, compensated: bool, unsorted: bool
) -> None:
    if entry is None and not unsorted:
        raise InputError(
            "model must have its neurons sorted by importance (`pyprune prune --nested`, or nested.prune_nested); the "
            "first neurons of this one are no better than any others. unsorted=True insists"
        )
    named = (entry or {}).get("file")
    if compensated and named and nested is None:
        raise InputError(
            f"model must have its compensated rows: call pyprune.pruning.nested.attach(model, the folder of {named}) "
            "first, or "
            "set compensated=False"
        )
    fits = nested is None or all(len(w) == layers for w in nested.widths)
    check(fits, "model", "have the layers that its nested widths were made for", layers)


def narrowed(model: nn.Module, folder: str | Path, width: float | None) -> nn.Module:
    """What `--width` means: `model`, loaded from `folder`, accelerated if it is not yet and set to `width` if not None.

    Raises:
        InputError, CheckpointError: as `attach` and `set_width`.
    """
    if width is None:
        return model
    check(isinstance(width, float) and 0 < width <= 1, "width", "lie in (0, 1]", width)
    if getattr(model, "pyprune_nested", None) is None:
        attach(model, folder)
    if not layers_of(model):
        accelerate(model)
    set_width(model, width)
    return model
