"""What changes the modules of a model in place: cuts, new weights, fewer layers; and the config that says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError, check
from ..base.memory import release
from . import depth, families
from .families import FFN
from .heterogeneous import exchange, layer_widths, narrow, neurons_of, note_sizes, note_width, select
from .mask import KeepIndex
from .towers import config_at, config_path, copies, stacks
from .units import Expert
from .weights import all_finite
from .widths import forget_nested, set_widths


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
    _check_cut(ffn, keep, down, bias_shift)
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
    for _, twin in ffn.twins:
        note_sizes(twin, ffn.pattern.inputs, ffn.pattern.down, len(keep))
    for holder in (ffn.holder, *(twin for _, twin in ffn.twins)):
        known: Any = holder
        if hasattr(known, "intermediate_size"):
            known.intermediate_size = len(keep)
    return cuts


def _check_cut(ffn: FFN, keep: KeepIndex, down: Tensor | None, bias_shift: Tensor | None) -> None:
    size = ffn.intermediate_size
    check(keep.intermediate_size == size, "keep", f"refer to {size} neurons", keep.intermediate_size)
    for argument, new in (("down", down), ("bias_shift", bias_shift)):
        if new is not None:
            dtype = ffn.weights().down.dtype
            bad = 0 if all_finite(new.to(dtype)) else int((~new.to(dtype).isfinite()).sum())
            check(bad == 0, f"{argument} of layer {ffn.layer}", f"be finite in {dtype}", f"{bad} values that are not")


@torch.inference_mode(False)
@torch.no_grad()
def cut_experts(
    experts: Sequence[Expert],
    keeps: Sequence[KeepIndex],
    downs: Sequence[Tensor | None],
    bias_shifts: Sequence[Tensor | None],
) -> None:
    """Remove neurons from all experts of a bank at once, in place: as many from each, not the same ones.

    Args:
        experts: all of one bank, in order.
        keeps: the neurons of each that stay, as many of each.
        downs, bias_shifts: of each, as for `cut`.

    Raises:
        InputError: another number of neurons in one expert than in the first; and see `cut`. The bank is unchanged.
    """
    bank = experts[0].of_bank
    for expert, keep, down, shift in zip(experts, keeps, downs, bias_shifts, strict=True):
        _check_cut(expert, keep, down, shift)
        width = len(keeps[0])
        check(len(keep) == width, f"width of {expert.name}", f"be that of the bank's first expert ({width})", len(keep))
    full, device = bank.size, bank.tensor(bank.layout.down).device
    chosen = torch.stack([keep.neurons.long() for keep in keeps])  # [E, K]
    for name, dim, blocks, interleaved in bank.sides():
        parameter: Any = bank.tensor(name)
        rows = neurons_of(1 if bank.layout.flat else blocks, full, interleaved)[:, chosen]  # [blocks, E, K]
        if bank.layout.flat:
            index = (rows[0] + full * torch.arange(bank.experts)[:, None]).reshape(-1)
            select(parameter, 0, index.to(device))
            continue
        order = rows.permute(1, 2, 0) if interleaved else rows.permute(1, 0, 2)
        exchange(parameter, _selected(parameter.detach(), dim, order.reshape(bank.experts, -1).to(device)))
    note_width(bank.module, full, len(keeps[0]))
    object.__setattr__(bank, "size", len(keeps[0]))
    every = bank.all_weights()
    for i, (down, shift) in enumerate(zip(downs, bias_shifts, strict=True)):
        if down is not None:
            every.down[i].copy_(down)
        if shift is not None:
            assert every.down_bias is not None
            every.down_bias[i] += shift.to(every.down_bias.dtype)


def _selected(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Of each of the `index` tensor's rows (`[E, N]`), these slices of the expert's own part along `dim`."""
    # Banks may have more rows than experts: those of experts that do nothing go on with the first ones.
    own = [index[min(e, len(index) - 1)] for e in range(len(tensor))]
    return torch.stack([part.index_select(dim - 1, i) for part, i in zip(tensor, own, strict=True)])


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
        bad = 0 if all_finite(new.to(dtype)) else int((~new.to(dtype).isfinite()).sum())
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
    without = [ffn for ffn in ffns if ffn.weights().down_bias is None]
    if not without:
        return None
    if experts := [ffn.name for ffn in without if isinstance(ffn, Expert)]:
        raise UnsupportedModelError(
            f"repair 'bias' needs a bias on the down projection, and {experts[0]} is an expert without one, as its "
            "format has none; use repair 'least-squares' or 'none'"
        )
    where = config_path(model, stacks(model)[0][0])
    key = families.bias_key(config_at(model.config, where))
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
        if isinstance(ffn, Expert):
            continue
        for name in [n for n, _ in ffn.pattern.inputs] + [ffn.pattern.down]:
            projection: Any = ffn.holder.get_submodule(name)
            if projection.bias is None:
                weight = projection.weight
                projection.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
    for config in copies(model, config_path(model, stacks(model)[0][0])):
        setattr(config, key, True)


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
