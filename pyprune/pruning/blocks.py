"""Coarser structure: whole FFN blocks, or whole decoder layers, removed by block influence.

Block influence is 1 minus the mean over tokens of the cosine between a hidden state before and after a block: a block
that hardly turns the residual stream is thought to do little (ShortGPT, Men et al. 2024, arXiv 2403.03853; there for
layers, one shot, from the dense model).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check, check_choice
from ..base.memory import release
from ..base.progress import Progress, quiet
from ..model import families, surgery
from ..model.families import FFN
from ..model.mask import KeepIndex, Mask
from ..model.probe import evaluating
from .calibration import LayerStream, constant_output
from .config import PruneConfig
from .repair.mean_bias import mean_bias

STRUCTURES = ("ffn", "layer")


@dataclass(frozen=True)
class BlockReport:
    """What `prune_blocks` did.

    Attributes:
        structure: `ffn` or `layer`.
        influence: of every block of the dense model, in [0, 2]; of one that iterative removal took away, or left for
            last, as it was measured last.
        removed, kept: numbers of the blocks, in the dense model, in order.
        mask: structure `ffn` only: all neurons of a kept FFN, one of a removed one (its down row is zero in the model).
    """

    structure: str
    influence: list[float]
    removed: list[int]
    kept: list[int]
    mask: Mask | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the mask."""
        return {k: v for k, v in vars(self).items() if k != "mask"}


@torch.no_grad()
def _influence(
    model: nn.Module, ffns: list[FFN], ids: Tensor, structure: str, removed: Collection[int], progress: Progress
) -> dict[int, float]:
    """Influence of every block outside `removed`, in the model without those."""
    with evaluating(model):
        stream = LayerStream(model, ffns, ids)
        found = {}
        for ffn in ffns:
            progress(f"measuring the influence of each {structure}", ffn.layer, len(ffns))
            if ffn.layer not in removed:
                found[ffn.layer] = max(0.0, 1.0 - stream.compare(ffn if structure == "ffn" else None))
            elif structure == "layer":
                stream.skip()
            else:
                with constant_output(ffn):
                    stream.advance()
        progress(f"measuring the influence of each {structure}", len(ffns), len(ffns))
        return found


def layer_influence(model: nn.Module, ffns: list[FFN], ids: Tensor, progress: Progress = quiet) -> list[float]:
    """1 - mean over tokens of cos(x_in, x_out) for each decoder layer; see the module's source.

    Args:
        model: a causal LM of Transformers; unchanged.
        ffns: its FFNs (`families.find_ffns`).
        ids: `[N, W]` token ids.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: activations that are not finite.
        UnsupportedModelError: the layers do not simply hand one hidden state to the next.
    """
    return list(_influence(model, ffns, ids, "layer", (), progress).values())


def ffn_influence(model: nn.Module, ffns: list[FFN], ids: Tensor, progress: Progress = quiet) -> list[float]:
    """1 - mean over tokens of cos(x_without, x_out) for each FFN.

    x_out is what its decoder layer gives, x_without what it would give if the FFN gave nothing. Where the FFN is a
    layer's last step and has its own residual, x_without is what enters that step, as in the paper; this form holds for
    FFNs beside the attention and in front of a norm, too. Arguments and errors as `layer_influence`.
    """
    return list(_influence(model, ffns, ids, "ffn", (), progress).values())


def kept_count(keep: float, blocks: int) -> int:
    """How many of `blocks` stay: the nearest number to the share `keep`, halves up, at least one."""
    return max(1, int(keep * blocks + 0.5))


def _choose(
    model: nn.Module, ffns: list[FFN], config: PruneConfig, ids: Tensor, progress: Progress, iterative: bool
) -> tuple[list[float], list[int]]:
    """The influence of every block, and the numbers of those to remove, in order."""
    first, last = config.protect
    free = range(first, len(ffns) - last)
    count = len(ffns) - kept_count(config.keep, len(ffns))
    check(count <= len(free), "protect", f"leave {count} of {len(ffns)} blocks to remove", config.protect)
    removed: list[int] = []
    influence = _influence(model, ffns, ids, config.structure, removed, progress)
    while len(removed) < count:
        if iterative and removed:
            influence |= _influence(model, ffns, ids, config.structure, removed, progress)
        ranked = sorted((i for i in free if i not in removed), key=influence.__getitem__)  # stable: ties by number
        removed += ranked[: 1 if iterative else count]
    return [influence[ffn.layer] for ffn in ffns], sorted(removed)


@torch.no_grad()
def _mean_outputs(
    model: nn.Module, ffns: list[FFN], ids: Tensor, removed: list[int], sequential: bool, progress: Progress
) -> dict[int, Tensor]:
    """`[D]`, for each removed FFN: mean over tokens of what it gives, its bias aside.

    With `sequential` the removed FFNs before it give their mean already.
    """
    stream = LayerStream(model, ffns, ids)
    means = {}
    for ffn in ffns[: max(removed, default=-1) + 1]:
        progress("averaging removed FFNs", ffn.layer, len(ffns))
        if ffn.layer not in removed:
            stream.advance()
            continue
        weights = ffn.weights()
        stats = stream.statistics(ffn, gram=False)
        mean = mean_bias(weights.down, stats, torch.ones_like(stats.mean, dtype=torch.bool))
        means[ffn.layer] = mean
        bad = int((~mean.to(weights.down.dtype).isfinite()).sum())
        check(bad == 0, f"mean output of FFN {ffn.layer}", f"be finite in {weights.down.dtype}", f"{bad} that are not")
        if sequential:
            bias = 0.0 if weights.down_bias is None else weights.down_bias.double()
            with constant_output(ffn, mean + bias):
                stream.advance()
        else:
            stream.advance()
    return means


@torch.no_grad()
def _silence(ffn: FFN, mean: Tensor | None) -> KeepIndex:
    """Remove an FFN as far as checkpoint formats allow: one neuron stays, and its down row is zero.

    The one with the largest down row stays, for what training may later make of it. The down bias becomes zero, or with
    `mean` (`[D]`) the FFN's mean output.
    """
    weights = ffn.weights()
    keep = KeepIndex([int(weights.down.float().square().sum(1).argmax())], ffn.intermediate_size)
    shift = mean
    if mean is None and weights.down_bias is not None:
        shift = -weights.down_bias
    surgery.cut(ffn, keep, weights.down.new_zeros(1, weights.down.shape[1]), shift)
    return keep


def _remove_ffns(
    model: nn.Module, ffns: list[FFN], config: PruneConfig, ids: Tensor, removed: list[int], progress: Progress
) -> Mask:
    block, fingerprint = families.ffn_block(model, ffns), families.fingerprint(model, ffns)
    means: dict[int, Tensor] = {}
    if config.compensate == "bias" and removed:
        means = _mean_outputs(model, ffns, ids, removed, config.sequential, progress)
        surgery.give_biases(model, ffns)
    keeps = [
        _silence(ffn, means.get(ffn.layer)) if ffn.layer in removed else KeepIndex.all(ffn.intermediate_size)
        for ffn in ffns
    ]
    surgery.set_widths(model, block, [len(keep) for keep in keeps])
    release()
    return Mask(tuple(keeps), fingerprint)


@torch.inference_mode(False)
@torch.no_grad()
def prune_blocks(
    model: nn.Module, config: PruneConfig, ids: Tensor, progress: Progress = quiet, iterative: bool = False
) -> BlockReport:
    """Remove the FFN blocks or decoder layers of least influence, in place, until the share `config.keep` stays.

    A removed FFN keeps one neuron, whose down row is zero: no format has a width of 0.

    Args:
        model: a causal LM of Transformers, dense or pruned before.
        config: `structure`, `keep`, `protect` (those blocks stay), and for structure `ffn` `compensate`: `none`, or
            `bias`, which puts the mean output of a removed FFN into its down bias (`sequential`: with the earlier FFNs
            removed).
        ids: `[N, W]` token ids.
        progress: called as `(stage, done, total)`.
        iterative: measure all influences again after each removal; False: once, on the dense model, as published.

    Raises:
        InputError: a value breaks its rule, or activations are not finite; the model is unchanged then.
        UnsupportedModelError: an FFN that pyprune does not know, an accelerated model, or a family whose checkpoint
            format cannot hold the result; the model is unchanged then.
    """
    check_choice(config.structure, "structure", STRUCTURES)
    ffns = families.find_ffns(model)
    if config.structure == "ffn":
        families.ffn_block(model, ffns)
        if config.compensate == "bias":
            surgery.check_biases(model, ffns)
    with evaluating(model):
        influence, removed = _choose(model, ffns, config, ids, progress, iterative)
        kept = [i for i in range(len(ffns)) if i not in removed]
        mask = None
        if config.structure == "ffn":
            mask = _remove_ffns(model, ffns, config, ids, removed, progress)
        else:
            surgery.drop_layers(model, kept)
    return BlockReport(config.structure, influence, removed, kept, mask)
