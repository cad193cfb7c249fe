"""The verb `prune_blocks`: whole FFN blocks, or whole decoder layers, removed by block influence (see `influence`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check, check_choice, is_count, is_number
from ..base.memory import PeakMemory, release
from ..base.progress import Progress, quiet
from ..model import checkpoint, surgery
from ..model.described import Described
from ..model.families import FFN
from ..model.mask import KeepIndex, Mask
from ..model.probe import evaluating
from .calibration import LayerStream
from .influence import influence
from .repair import REPAIRS, Repair
from .repair import parse as parse_repair
from .repair.mean_bias import mean_bias
from .residual import constant_output
from .run import Run, Totals
from .text import Text

STRUCTURES = ("ffn", "layer")


@dataclass(frozen=True)
class BlockOptions:
    """How to remove whole blocks; see `prune_blocks` for the fields.

    Raises:
        InputError: a value breaks its rule.
    """

    structure: str
    keep: float
    protect: tuple[int, int]
    repair: Repair
    iterative: bool = False
    sequential: bool = True

    def __post_init__(self) -> None:
        check_choice(self.structure, "structure", STRUCTURES)
        check(is_number(self.keep) and 0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        pair = isinstance(self.protect, tuple | list) and len(self.protect) == 2 and all(map(is_count, self.protect))
        check(pair, "protect", "be two counts of blocks, first and last", self.protect)
        object.__setattr__(self, "protect", tuple(self.protect))
        able = " or ".join(repr(r.NAME) for r in REPAIRS if self.structure in r.STRUCTURES)
        fits = self.structure in self.repair.STRUCTURES
        check(fits, "repair", f"be {able} with structure {self.structure!r}", self.repair.NAME)
        check(isinstance(self.iterative, bool), "iterative", "be True or False", self.iterative)
        check(isinstance(self.sequential, bool), "sequential", "be True or False", self.sequential)

    @classmethod
    def of(
        cls,
        structure: str = "ffn",
        keep: float = 0.7,
        protect: tuple[int, int] = (0, 0),
        repair: Repair | str | None = None,
        iterative: bool = False,
        sequential: bool = True,
    ) -> BlockOptions:
        """From options or their short forms."""
        return cls(structure, keep, protect, parse_repair(repair), iterative, sequential)

    def facts(self) -> dict[str, Any]:
        """What had a say, flat, as checkpoints and reports keep it."""
        chosen = {"keep": self.keep, "structure": self.structure, "compensate": self.repair.NAME}
        protect = {} if self.protect == (0, 0) else {"protect": list(self.protect)}
        order = {"sequential": self.sequential} if self.repair.needs else {}
        return {**chosen, "iterative": self.iterative, **protect, **order}


@dataclass(kw_only=True)
class BlockReport(Totals):
    """What `prune_blocks` did.

    Attributes:
        options: as given.
        influence: of every block of the dense model, in [0, 2]; of one that iterative removal took away, or left for
            last, as it was measured last.
        removed, kept: numbers of the blocks, in the dense model, in order.
        mask: structure `ffn` only: all neurons of a kept FFN, one of a removed one (its down row is zero in the model).

    The others: see `run.Totals`.
    """

    options: BlockOptions
    influence: list[float]
    removed: list[int]
    kept: list[int]
    mask: Mask | None = None

    @property
    def structure(self) -> str:
        """`ffn` or `layer`."""
        return self.options.structure

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the mask as widths and fingerprint."""
        mask = self.mask
        return {
            **{k: v for k, v in vars(self).items() if k not in ("options", "mask")},
            "structure": self.structure,
            "config": self.options.facts(),
            "widths": None if mask is None else list(mask.widths),
            "fingerprint": None if mask is None else mask.fingerprint,
        }


def kept_count(keep: float, blocks: int) -> int:
    """How many of `blocks` stay: the nearest number to the share `keep`, halves up, at least one."""
    return max(1, int(keep * blocks + 0.5))


def _choose(
    described: Described, options: BlockOptions, ids: Tensor, progress: Progress
) -> tuple[list[float], list[int]]:
    """The influence of every block, and the numbers of those to remove, in order."""
    ffns, count = described.ffns, _count(options, len(described.ffns))
    first, last = options.protect
    free = range(first, len(ffns) - last)
    removed: list[int] = []
    found = influence(described.model, ffns, ids, options.structure, removed, progress=progress)
    while len(removed) < count:
        if options.iterative and removed:
            found |= influence(described.model, ffns, ids, options.structure, removed, progress=progress)
        ranked = sorted((i for i in free if i not in removed), key=found.__getitem__)  # stable: ties by number
        removed += ranked[: 1 if options.iterative else count]
    return [found[ffn.layer] for ffn in ffns], sorted(removed)


def _count(options: BlockOptions, blocks: int) -> int:
    """How many of `blocks` are removed."""
    count = blocks - kept_count(options.keep, blocks)
    check(
        count <= max(0, blocks - sum(options.protect)),
        "protect",
        f"leave {count} of {blocks} blocks to remove",
        options.protect,
    )
    return count


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
    described: Described, options: BlockOptions, ids: Tensor, removed: list[int], progress: Progress
) -> Mask:
    model, ffns, block, fingerprint = described.model, described.ffns, described.block, described.fingerprint
    means: dict[int, Tensor] = {}
    if options.repair.needs and removed:
        means = _mean_outputs(model, ffns, ids, removed, options.sequential, progress)
        options.repair.prepare(described)
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
    model: nn.Module,
    structure: str = "ffn",
    keep: float = 0.7,
    protect: tuple[int, int] = (0, 0),
    repair: Repair | str | None = None,
    *,
    iterative: bool = False,
    sequential: bool = True,
    text: Text = None,
    tokenizer: Any = None,
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
) -> BlockReport:
    """Remove the FFN blocks or decoder layers of least influence, in place, until the share `keep` stays.

    A removed FFN keeps one neuron, whose down row is zero: no format has a width of 0.

        >>> model, tokenizer = load("demo")
        >>> report = prune_blocks(model, structure="layer", keep=0.5, tokenizer=tokenizer)
        >>> len(report.kept) == model.config.num_hidden_layers
        True

    Args:
        model: a causal LM of Transformers, dense or pruned before.
        structure: `ffn` for FFN blocks, `layer` for decoder layers.
        keep: share of them that stays, in (0, 1]: the nearest number, at least one.
        protect: how many (first, last) of them stay whatever their influence.
        repair: None; for FFNs also `MeanBias()` or `bias`, which puts the mean output of a removed FFN into its down
            bias.
        iterative: measure all influences again after each removal; False: once, on the dense model, as published.
        sequential: mean outputs are those with the earlier FFNs removed; False: of the dense model.
        text, tokenizer, progress, provenance: as for `prune.prune`; text must be given.

    Raises:
        InputError: a value breaks its rule, text is missing, or activations or weights are not finite; the model is
            unchanged then.
        UnsupportedModelError: an FFN that pyprune does not know, an accelerated model, or a family whose checkpoint
            format cannot hold the result; the model is unchanged then.
    """
    options = BlockOptions.of(structure, keep, protect, repair, iterative, sequential)
    run = Run(model, text, tokenizer, True, f"structure {structure!r}", provenance, progress=progress)
    described, ids = run.described, run.ids
    described.check_plain(f"structure {structure!r}")
    check(ids is not None, "text", f"be windows of token ids with structure {structure!r}", "batches")
    assert ids is not None
    _count(options, len(described.ffns))
    options.repair.check_model(described)
    described.fingerprint  # noqa: B018 - of the dense model
    if structure == "ffn":
        # What is removed is not known yet: can the config say differing widths at all?
        widths = [max(1, size - i % 2) for i, size in enumerate(described.sizes)]
        checkpoint.check_narrows(model, described.block, widths)
    with evaluating(model), PeakMemory(device=next(model.parameters()).device) as memory:
        found, removed = _choose(described, options, ids, progress)
        kept = [i for i in range(len(described.ffns)) if i not in removed]
        mask = None
        if structure == "ffn":
            mask = _remove_ffns(described, options, ids, removed, progress)
        else:
            surgery.drop_layers(model, kept)
        blocks = {"structure": structure, "influence": found, "removed": removed, "kept": kept}
        facts = run.facts(options.facts(), blocks=blocks)
        totals = run.finish(facts, memory)
    if mask is not None:
        mask = replace(mask, provenance=facts)
    return BlockReport(options=options, influence=found, removed=removed, kept=kept, mask=mask, **totals)
