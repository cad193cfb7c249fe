"""The FFNs of a loaded model swapped for `PrunedMLP`, its experts for `PrunedMoE`, and the originals freed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..base.errors import UnsupportedModelError, check, check_choice
from ..base.memory import Room, release
from ..model import families
from ..model.families import FFN, Expert
from ..model.mask import Mask
from ..model.surgery import set_widths
from ..model.units import OWN
from ..model.weights import check_finite
from . import accelerate_experts, dispatch, first_use, native, sharded
from .mlp import MODES, PrunedMLP, check_biases
from .mlp_state import DownStandIn
from .quantisation import WEIGHTS, check_fits, check_width, row_bytes


@torch.inference_mode(False)
def accelerate(
    model: nn.Module,
    mode: str = "compact",
    backend: str = "auto",
    mask: Mask | None = None,
    weights: str | None = None,
    batch_invariant: bool = False,
    measure: bool = True,
) -> nn.Module:
    """Swap every FFN of a loaded model, pruned or not, for a `PrunedMLP`, layer by layer, freeing the originals.

    Experts that lie in tensors become a `PrunedMoE` a layer, those in a list of modules a `PrunedMLP` each. What cannot
    run from records stays as it is, with a warning that says why; so do experts in tensors for which Transformers' own
    path was measured to be faster.

    Of a model that Transformers loaded tensor-parallel (`tp_plan="auto"`), every rank calls this, and each of its
    `PrunedMLP` holds the rank's own neurons and sums its output over the ranks. A mask then wants `gather`.

    The FFNs' parameters are others afterwards: an optimizer or adapters made before do not know them.

        >>> model, tokenizer = load("demo")
        >>> model = accelerate(model, weights="int8")
        >>> ids = tokenizer("Rain is", return_tensors="pt")["input_ids"]
        >>> text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])

    Args:
        model: a causal LM of Transformers; changed in place.
        mode: `compact`, or `gather`, which keeps all weights and reads those of the neurons in `mask`.
        backend: `auto`, or a backend that is then used or refused.
        mask: the neurons to keep; required by `gather`; with `compact` the others are removed for good.
        weights: dtype to keep FFN weights in, a key of `quantisation.WEIGHTS`; None for as they are. The model saves
            weights of its own dtype all the same, rounded as they are kept.
        batch_invariant: make each FFN's result for a token independent, to the bit, of the tokens beside it; slower
            where there are many.
        measure: on a CPU, time once which kernel is faster for layers of these shapes, in two seconds at most, and some
            more for each shape of experts, of which one layer is there twice meanwhile; what was found is kept for this
            machine. False: by prediction, or as `pyprune tune` found. Counts for `auto` alone.

    Returns:
        `model`.

    Raises:
        InputError: unknown mode, backend or weights, a mask that is missing or belongs to another model, weights that
            are not finite, or not in the dtype asked for, a hidden_size that int4 cannot have (see
            `quantisation.check_width`), a PYPRUNE_CPU_ISA that is not here; the model is unchanged then.
        UnsupportedModelError: an FFN that pyprune does not know, or a model that is accelerated already; a mask, a
            mode, a backend or batch_invariant for a model of which some FFNs cannot run from records, or `compact` with
            a mask for one with experts, which `prune(model, mask=mask)` takes.
    """
    check_choice(mode, "mode", MODES)
    check_choice(backend, "backend", dispatch.names())
    check_choice(weights or "float32", "weights", WEIGHTS)
    check(mask is not None or mode == "compact", "mask", "be given in gather mode", mask)
    native.check_isa()
    parts = sharded.find(model)
    every = families.find_ffns(model) if parts is None else parts.ffns
    ffns = [ffn for ffn in every if ffn.activation != OWN and not ffn.shared]
    banks = accelerate_experts.banks_of(every)
    reasons = {bank.name: accelerate_experts.why_not(bank, backend, weights) for bank in banks}
    banks = [bank for bank in banks if reasons[bank.name] is None]
    left = [_why_left(ffn, reasons) for ffn in every if ffn not in ffns]
    _check_all(
        model, [one for one in left if one], bool(banks) and mode == "compact", mask, (mode, backend, batch_invariant)
    )
    keeps = accelerate_experts.keeps_of(every, mask if parts is None else None)
    if parts is None and mask is not None:
        mask.check_fits([f.intermediate_size for f in every], families.fingerprint(model, every))
    del every  # originals are freed one by one
    if parts is not None:
        rule = "be False on more than two ranks: their outputs are added up in an order that depends on the place"
        check(not batch_invariant or parts.shards[0].mesh.size() <= 2, "batch_invariant", rule, batch_invariant)
        mask = parts.own(mask, mode)
    check_finite(model)
    if weights is not None:
        _check_fits(ffns, WEIGHTS[weights])
        accelerate_experts.check_finite(banks, WEIGHTS[weights])
    for ffn in ffns if parts is None else []:
        check_biases(ffn.weights())
    if measure and backend == "auto" and not batch_invariant:
        first_use.measure(first_use.problems(ffns, mode, mask, weights))
        accelerate_experts.measure(model, banks, weights, keeps)
    if backend == "auto" and not keeps and not batch_invariant:
        banks = accelerate_experts.not_slower(model, banks, weights)
    own = _record_bytes(ffns, mask if mode == "compact" else None, weights)
    room = Room(own + accelerate_experts.record_bytes(banks, weights))
    if mask is not None and mode == "compact":
        set_widths(model, families.ffn_block(model, ffns), list(mask.widths))
    ffns.reverse()
    while ffns:
        ffn = ffns.pop()
        keep = mask.layers[ffn.layer] if mask else None
        kind = PrunedMLP if parts is None else sharded.ShardedMLP
        group = None if parts is None else parts.shards[ffn.layer].mesh.get_group()
        module = kind.from_dense(ffn, keep, mode, backend, weights, room, batch_invariant, group)
        if isinstance(module, sharded.ShardedMLP) and parts is not None:
            module.shard_as(parts.shards[ffn.layer])
        _swap(model, ffn, module)
        del ffn  # nothing else holds the original
        release()
    accelerate_experts.swap(model, banks, keeps, backend, weights, room, batch_invariant)
    return model


def _why_left(ffn: FFN, reasons: dict[str, str | None]) -> tuple[FFN, str] | None:
    """An FFN that will not run from a record of its own, and why; None for an expert that will."""
    if isinstance(ffn, Expert):
        reason = reasons[ffn.group]
        return None if reason is None else (ffn, reason)
    return ffn, "several layers run it" if ffn.shared else "an activation of its own"


def _check_all(
    model: nn.Module, left: list[tuple[FFN, str]], experts: bool, mask: Mask | None, asked: tuple[str, str, bool]
) -> None:
    """Say which FFNs stay as they are, or refuse what was asked for all of them.

    Args:
        left: those, with their reasons.
        experts: whether some will run from records without a choice of neurons.
        asked: mode, backend and batch_invariant.

    Raises:
        UnsupportedModelError: a mask, a mode, a backend or batch_invariant is given, and not all FFNs can follow it.
    """
    kind = type(model).__name__
    if left:
        number = sum(ffn.expert for ffn, _ in left)
        what = f"{number} experts and {len(left) - number} FFNs of {kind}"
        first: dict[str, str] = {}
        for ffn, reason in left:
            first.setdefault(reason, ffn.group if ffn.expert else ffn.name)
        why = "; ".join(f"{name}: {reason}" for reason, name in first.items())
        if mask is not None or asked != ("compact", "auto", False):
            raise UnsupportedModelError(f"{what} cannot run from a record ({why}), and all were asked for")
        warnings.warn(f"{what} stay as they are, in torch ({why})", stacklevel=3)
    if experts and mask is not None:
        raise UnsupportedModelError(
            f"{kind} has experts, which are pruned in place: prune(model, mask=mask), then accelerate(model)"
        )


def _record_bytes(ffns: list[FFN], mask: Mask | None, weights: str | None) -> int:
    """Bytes of the records of all layers on the CPU, each rounded up to whole cache lines."""
    total = 0
    for ffn in ffns:
        dense = ffn.weights()
        if dense.down.device.type != "cpu":
            continue
        rows = len(mask.layers[ffn.layer]) if mask else ffn.intermediate_size
        dtype = WEIGHTS[weights] if weights else dense.down.dtype
        total += Room.rounded(rows * row_bytes(len(dense.parts), dense.down.shape[1], dtype))
    return total


def _check_fits(ffns: list[FFN], dtype: torch.dtype) -> None:
    for ffn in ffns:
        check_width(ffn.hidden_size, dtype)
        for part in ffn.weights().parts:
            check_fits(part, dtype, f"weights of layer {ffn.layer}")


def _swap(model: nn.Module, ffn: FFN, module: PrunedMLP) -> None:
    if ffn.pattern.in_layer:
        holder: Any = ffn.holder
        setattr(holder, ffn.pattern.up, module)
        holder.activation_fn = nn.Identity()
        setattr(holder, ffn.pattern.down, DownStandIn(module))
        if hasattr(holder, "activation_dropout"):
            holder.activation_dropout = 0.0  # it would now fall on the FFN's output
        return
    parent, _, name = ffn.name.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
