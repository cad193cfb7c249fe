"""What changes the modules of a model in place: cuts, new weights, fewer layers; and the config that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError, check
from ..base.memory import release
from . import depth, families, provenance
from .families import FFN
from .heterogeneous import layer_widths, narrow
from .mask import KeepIndex


@torch.inference_mode(False)
@torch.no_grad()
def cut(
    ffn: FFN, keep: KeepIndex, down: Tensor | None = None, bias_shift: Tensor | None = None
) -> list[tuple[nn.Parameter, int, Tensor, torch.Size]]:
    """Remove the neurons outside `keep` from an FFN, in place; modules and parameters stay, only narrower.

    Args:
        ffn: the FFN.
        keep: the neurons that stay.
        down: `[K, D]` new down rows for them (from a compensation), or None to keep the old ones.
        bias_shift: `[D]` to add to the down bias, which must exist, or None.

    Returns:
        What became smaller, as `heterogeneous.narrow`.

    Raises:
        InputError: `keep` is of another width, or a new value is not finite in the dtype of the weights; the FFN is
            unchanged then.
    """
    size = ffn.intermediate_size
    check(keep.intermediate_size == size, "keep", f"refer to {size} neurons", keep.intermediate_size)
    for argument, new in (("down", down), ("bias_shift", bias_shift)):
        if new is not None:
            dtype = ffn.weights().down.dtype
            bad = int((~new.to(dtype).isfinite()).sum())
            check(bad == 0, f"{argument} of layer {ffn.layer}", f"be finite in {dtype}", f"{bad} values that are not")
    index = keep.neurons.long()
    cuts = []
    for name, blocks in ffn.pattern.inputs:
        stacked = torch.cat([index + block * size for block in range(blocks)])
        cuts += narrow(ffn.holder.get_submodule(name), stacked, "out")
    cuts += narrow(ffn.down, index, "in")
    if down is not None:
        ffn.weights().down.copy_(down)
    if bias_shift is not None:
        bias = ffn.weights().down_bias
        assert bias is not None
        bias += bias_shift.to(bias.dtype)
    holder: Any = ffn.holder
    if hasattr(holder, "intermediate_size"):
        holder.intermediate_size = len(keep)
    return cuts


@torch.inference_mode(False)
@torch.no_grad()
def set_inputs(ffn: FFN, rows: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    """Write new weights into the projections that lead into an FFN.

    Args:
        ffn: the FFN.
        rows: `[F, D]` each, (gate, up) or (up,).
        biases: `[F]` each, in the same order; None leaves what is there.

    Raises:
        InputError: a value is not finite in the dtype of the weights; the FFN is unchanged then.
    """
    weights = ffn.weights()
    for new in [*rows, *[b for b in biases if b is not None]]:
        dtype = weights.down.dtype
        bad = int((~new.to(dtype).isfinite()).sum())
        check(bad == 0, f"input rows of layer {ffn.layer}", f"be finite in {dtype}", f"{bad} values that are not")
    pairs = zip([*weights.parts[:-1], *weights.input_biases], [*rows, *biases], strict=True)
    for old, values in pairs:
        if old is not None and values is not None:
            old.copy_(values)


@torch.inference_mode(False)
@torch.no_grad()
def permute(ffn: FFN, order: Tensor) -> None:
    """Put the neurons of an FFN into another order, in place; it computes the same, up to the order of its sums.

    Args:
        ffn: the FFN.
        order: `[F]` integers, each neuron once: neuron `order[i]` becomes neuron i.

    Raises:
        InputError: `order` is no permutation of the FFN's neurons; the FFN is unchanged then.
    """
    size = ffn.intermediate_size
    argument = f"order of layer {ffn.layer}"
    whole = not order.is_floating_point() and not order.is_complex() and order.dtype != torch.bool
    check(whole and tuple(order.shape) == (size,), argument, f"hold {size} integers", (order.dtype, *order.shape))
    each = torch.equal(order.sort().values.cpu().long(), torch.arange(size))
    check(each, argument, f"hold every number in [0, {size}) once", order[:8].tolist())
    weights = ffn.weights()
    order = order.to(weights.down.device)
    for tensor in (*weights.parts, *weights.input_biases):
        if tensor is not None:
            tensor.copy_(tensor[order])


def forget_nested(model: nn.Module) -> None:
    """Drop what the model's config says of nested widths: its layers are not those any more."""
    provenance.forget_nested(model.config)
    model.__dict__.pop("pyprune_nested", None)


@contextmanager
def borrowed_down(ffn: FFN, down: Tensor) -> Iterator[None]:
    """Inside the block, the first K neurons of an FFN have the down rows `down` (`[K, D]`), and the others none.

    So it computes what it would after a cut to these K; afterwards it has its own rows again, to the bit.
    """
    rows = ffn.weights().down
    own = rows.detach().clone()
    with torch.no_grad():
        rows[: len(down)] = down.to(rows)
        rows[len(down) :] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            rows.copy_(own)


def check_biases(model: nn.Module, ffns: list[FFN]) -> str | None:
    """The config key that must be set to give every down projection a bias, or None where all have one.

    Raises:
        UnsupportedModelError: the family's checkpoint format has no FFN bias.
    """
    if all(ffn.weights().down_bias is not None for ffn in ffns):
        return None
    key = families.bias_key(model.config)
    if key is None:
        raise UnsupportedModelError(
            f"repair 'bias' needs a bias on the down projection, and {type(model.config).__name__} has no config "
            f"key for one (looked for {', '.join(families.BIAS_KEYS)}); use repair 'least-squares' or 'none'"
        )
    return key


@torch.inference_mode(False)
@torch.no_grad()
def give_biases(model: nn.Module, ffns: list[FFN]) -> None:
    """Make sure every down projection has a bias, with zeros where the family's format allows one to be added.

    Raises:
        UnsupportedModelError: as `check_biases`.
    """
    key = check_biases(model, ffns)
    if key is None:
        return
    for ffn in ffns:
        for name in [n for n, _ in ffn.pattern.inputs] + [ffn.pattern.down]:
            projection: Any = ffn.holder.get_submodule(name)
            if projection.bias is None:
                weight = projection.weight
                projection.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
    setattr(model.config, key, True)


def set_widths(model: nn.Module, block: dict[str, Any], widths: list[int]) -> None:
    """Write FFN widths into the model's config: the family's own key, and `per_layer_config` where they differ.

    Args:
        model: the model.
        block: what `families.ffn_block` gave for it.
        widths: neurons of each layer.
    """
    config: Any = model.config
    key = block["width_key"]
    config.per_layer_config = None
    for name, value in families.WIDTH_AS_IT_STANDS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    told = families.has_width(config)
    if told:
        setattr(config, key, max(widths))
    forget_nested(model)
    differ = len(set(widths)) > 1 or not told
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    if differ:
        config.per_layer_config = {i: {key: width} for i, width in enumerate(widths)}
        # Code of others that asks for the one width gets the widest, not an error.
        config.allow_global_per_layer_attribute_access = True
    provenance.set_ffn(config, block if differ else None)


@torch.inference_mode(False)
def drop_layers(model: nn.Module, keep: Sequence[int]) -> None:
    """Remove whole decoder layers, in place; those that stay are numbered anew, in the model and in its config.

    Args:
        model: a causal LM of Transformers.
        keep: numbers of the layers that stay, strictly increasing.

    Raises:
        InputError: `keep` is empty, unsorted, out of range or has duplicates; the model is unchanged then.
        UnsupportedModelError: the family's config cannot say which layers stayed; the model is unchanged then.
    """
    layers = families.decoder_layers(model)[1]
    check(len(keep) > 0, "keep", "keep at least one layer", list(keep))
    kept: list[int] = KeepIndex(keep, len(layers), "keep").neurons.tolist()
    config: Any = model.config
    widths = layer_widths(config)
    for path, attribute, value in depth.renumbering(model, kept):
        setattr(model.get_submodule(path), attribute, value)
    for i in reversed(range(len(layers))):
        if i not in kept:
            del layers[i]
    depth.keep_layers(config, kept)
    forget_nested(model)
    if widths is not None:
        set_widths(model, config.pyprune["ffn"], [widths[i] for i in kept])
    release()
