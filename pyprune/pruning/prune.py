"""The verb `prune`: scores, widths, repairs and cuts of FFN neurons, streamed layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check
from ..base.memory import PeakMemory
from ..base.progress import Progress, quiet
from ..base.ranks import Ranks
from ..model import checkpoint, surgery
from ..model.attention import in_blocks
from ..model.described import Described
from ..model.mask import Mask
from ..model.offloaded import OffloadedLayers, is_offloaded
from ..model.probe import evaluating
from ..model.units import ROW, check_tied, groups, tied
from .allocation import Allocation, Plan
from .offloaded import OffloadedPruner, check_offloaded, present
from .options import ALLOCATION, KEEP, METHOD, REPAIR, PruneOptions
from .pruner import LayerReport, Pruner
from .repair import Repair
from .run import Run, Totals
from .sensitivity import SensitivityCurves
from .text import Text, describe


@dataclass(kw_only=True)
class PruneReport(Totals):
    """What `prune` did.

    Attributes:
        options: as given.
        mask: the keep indices, with the fingerprint of the dense model.
        layers: one entry an FFN.
        promise: with allocation `latency`, the speed-up that the chosen widths should have (see `latency`); else None.

    The others: see `run.Totals`.
    """

    options: PruneOptions
    mask: Mask
    layers: list[LayerReport]
    promise: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the mask as widths and fingerprint."""
        return {
            **{k: v for k, v in vars(self).items() if k not in ("options", "mask")},
            "config": self.options.facts(),
            "keep": self.mask.keep,
            "widths": list(self.mask.widths),
            "fingerprint": self.mask.fingerprint,
            "layers": [vars(layer) for layer in self.layers],
        }


def check_rebuilds(described: Described, options: PruneOptions, mask: Mask | None) -> None:
    """Refuse before any work what could not be saved: with the widths there will be, or else with differing ones."""
    sizes = described.sizes
    widths = list(mask.widths) if mask is not None else options.allocation.known(sizes, options.keep)
    if widths is None:
        narrower = [group[0].layer for group in groups(described.ffns)][1::2]
        widths = [max(1, size - (ROW if i in narrower else 0)) for i, size in enumerate(sizes)]
    if mask is not None:
        check_tied(described.ffns, widths)
    else:
        widths = tied(described.ffns, widths)
    checkpoint.check_narrows(described.model, described.block, widths)


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    keep: float = KEEP,
    method: str = METHOD,
    *,
    allocation: Allocation | str = ALLOCATION,
    repair: Repair | str | None = REPAIR,
    text: Text = None,
    tokenizer: Any = None,
    seed: int = 0,
    sequential: bool = True,
    precision: str = "float32",
    mask: Mask | None = None,
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
    together: bool = True,
) -> PruneReport:
    """Remove FFN neurons from a causal LM of Transformers, in place.

    The model keeps its own modules, only narrower, and its config says so; `checkpoint.save` writes it. Where neurons
    compete within a layer only, each layer is scored when it is reached, on what the already pruned layers before it
    produce (`sequential`); gradients and everything that compares layers come from the dense model.

        >>> model, tokenizer = load("demo")
        >>> spread = Sensitivity(floor=0.2)  # or "sensitivity:floor=0.2"
        >>> mend = LeastSquares(damping="auto", target=0.5)
        >>> report = prune(model, keep=0.7, allocation=spread, repair=mend, tokenizer=tokenizer)
        >>> report.parameters_after < report.parameters_before
        True

    Args:
        model: a causal LM of Transformers, dense or pruned before.
        keep: share of all FFN neurons that stays, in (0, 1].
        method: the importance criterion (`pyprune.pruning.importance.names()`).
        allocation: how many neurons each layer keeps: one of `pruning.allocation`, or its short form, such as
            `sensitivity:floor=0.2`.
        repair: what kept neurons take over from removed ones: one of `pruning.repair`, or its short form, such as
            `least-squares:damping=auto,target=0.5`; None for nothing.
        text: calibration tokens, `[N, W]` or an iterable of `[W]` / `[B, W]` integer tensors, all of one W; or prose,
            with `tokenizer` (see `text.calibration`); or a list of batches of keyword tensors, as the model's forward
            takes them (`input_ids`, perhaps `attention_mask`, pictures as a processor makes them). Needed by whatever
            looks at activations or gradients.
        tokenizer: the model's, for text that is not cut into tokens; alone, it reads prose that CPython carries.
        seed: of everything random.
        sequential: later layers are scored and repaired on what the already pruned earlier ones produce; False: on
            what the dense model produces.
        precision: of matrix products while calibration text runs through float32 layers: `float32`, `bfloat16`, or
            `auto` for bfloat16 where the device multiplies it fast. Statistics and fits stay as they are.
        mask: neurons to keep, instead of scoring; `keep`, `method` and `allocation` are not used then.
        progress: called as `(stage, done, total)`.
        provenance: facts about the run (text, versions) that go into the mask and the checkpoint.
        together: in an initialised `torch.distributed` group of several processes every one makes this call with the
            same model and arguments: calibration text is shared out among them, and each gets the whole result (see
            docs/scale.md). False: this process works by itself.

    Raises:
        InputError: a value breaks its rule, calibration text is missing or too short, weights are not finite, or the
            mask belongs to another model; processes that work together have other models or arguments, or are more than
            the windows of text; the model is unchanged then. Also where scores or activations are not
            finite: if that shows only after some layers were pruned, the message says so, and the model must be loaded
            again.
        UnsupportedModelError: an FFN that pyprune does not know, a repair that its format cannot hold, or widths
            that its config cannot say; the model is unchanged then.
    """
    ranks = Ranks.joined(together)
    with ranks.working():
        options = PruneOptions.of(keep, method, allocation, repair, sequential, seed, precision)
        return _prune(model, options, text, tokenizer, mask, progress, provenance, ranks)


def _prune(
    model: nn.Module,
    options: PruneOptions,
    text: Text,
    tokenizer: Any,
    mask: Mask | None,
    progress: Progress,
    provenance: dict[str, Any] | None,
    ranks: Ranks,
) -> PruneReport:
    given = mask is not None
    layers = OffloadedLayers(model) if is_offloaded(model) else None
    known = None
    if layers is not None:
        check(
            not ranks.several, "model", "be on each rank's device whole, not offloaded, with several ranks", ranks.size
        )
        check_offloaded(options)
        known = layers.described
    needed, seed = options.needs_text(given), options.seed
    same = {**options.facts(), "precision": options.precision, "mask": describe(mask and [*map(hash, mask.layers)])}
    run = Run(
        model, text, tokenizer, needed, options.purpose, provenance, seed, progress, known, ranks=ranks, same=same
    )
    described = run.described
    if layers is not None:
        check(run.batches is None, "text", "be windows of token ids where layers are offloaded", "batches")
        described.fingerprint = layers.fingerprint()
    with present(layers):
        options = options.suited(described, run.batches is None)
    shares = run.batches is not None and options.repair.share > 0
    check(not shares, "target", "be 0 with batches of keyword tensors", options.repair.share)
    with present(layers):
        options.repair.check_model(described)
    fingerprint = described.fingerprint
    if mask is not None:
        mask.check_fits(described.sizes, fingerprint)
    check_rebuilds(described, options, mask)
    device = next(model.parameters()).device
    # Statistics and fits have their own precision, whatever the caller's autocast multiplies in.
    there = next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")
    plainly = torch.autocast(there, enabled=False, cache_enabled=False)
    with evaluating(model), PeakMemory(device=device) as memory, in_blocks(model), plainly:
        chosen = options, run.windows, progress, run.batches
        pruner = Pruner(described, *chosen, ranks) if layers is None else OffloadedPruner(layers, *chosen)
        try:
            plan = Plan(list(mask.layers)) if mask else pruner.agreed(options.allocation.plan(pruner, options.keep))
            keeps = pruner.run(plan.layers)
        finally:
            if layers is not None:
                layers.drop_all()
        surgery.set_widths(model, described.block, [len(k) for k in keeps])
        facts = run.facts(options.facts(given), **({} if mask is None else {"mask": mask.provenance}))
        totals = run.finish(facts, memory)
        made = Mask(tuple(keeps), fingerprint, facts)
        return PruneReport(options=options, mask=made, layers=pruner.reports, promise=plan.promise, **totals)


def _pruner(model: nn.Module, options: PruneOptions, needed: bool, text: Text, tokenizer: Any, p: Progress) -> Pruner:
    run = Run(model, text, tokenizer, needed, options.purpose, None, options.seed, p)
    return Pruner(run.described, options, run.windows, p, run.batches)


@torch.inference_mode(False)
@torch.no_grad()
def score(
    model: nn.Module,
    method: str = METHOD,
    *,
    text: Text = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> list[Tensor]:
    """The scores of all neurons of a dense model by `method`, one `[F]` a layer, higher = keep; changes nothing.

    Args and errors as `prune`.
    """
    options = PruneOptions.of(1.0, method, repair=None, seed=seed)
    with evaluating(model), in_blocks(model):
        return _pruner(model, options, options.needs_text(), text, tokenizer, progress).scores()


@torch.inference_mode(False)
@torch.no_grad()
def curves(
    model: nn.Module,
    method: str = METHOD,
    *,
    multiple: int = 64,
    repair: Repair | str | None = REPAIR,
    text: Text = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> SensitivityCurves:
    """How much the loss of a dense model grows when one layer alone is narrowed; changes nothing.

    Args:
        multiple: widths are multiples of it.

    The others, and errors, as `prune`.
    """
    options = PruneOptions.of(1.0, method, repair=repair, seed=seed)
    with evaluating(model), in_blocks(model):
        return _pruner(model, options, True, text, tokenizer, progress).curves(multiple)
