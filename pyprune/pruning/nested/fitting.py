"""Sorts the neurons of a dense model, and fits the down rows of the chosen widths."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check
from ...base.memory import release
from ...base.progress import Progress, quiet
from ...ffn.quantisation import check_fits
from ...model import families, surgery
from ...model.described import Described
from ...model.mask import check_scores
from ...model.probe import evaluating
from ...model.provenance import write
from ..allocation import Allocation, Uniform
from ..calibration import LayerStream
from ..options import PruneOptions
from ..pruner import Pruner
from ..repair import REPAIRS, LeastSquares, NoRepair, Repair
from ..repair.least_squares import least_squares, warn_of_dead
from ..run import Run
from ..text import Text, calibration
from .chosen import CLOSE, Nested, Rows, count_of, each

SHARES = (0.8, 0.7, 0.5)

Share = float | Sequence[int]
# For each share and layer (bare prefix, compensated), see `NestedReport`.
Errors = list[list[tuple[float, float]]]


@dataclass
class NestedReport:
    """What `prune_nested` did.

    Attributes:
        options: as given; of them `method`, `repair`, `seed`, and of the allocation what spreads shares.
        shares, widths: as in `Nested`.
        errors: for each share and layer the squared error of the FFN's output over the calibration tokens, relative to
            the squared dense output, as (bare prefix, compensated); empty without compensation.
        tokens, window: calibration tokens used, and tokens in a window; 0 where no text was needed.
        seconds: wall time.
    """

    options: PruneOptions
    shares: list[float]
    widths: list[list[int]]
    errors: Errors = field(default_factory=list)
    tokens: int = 0
    window: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rest = {k: v for k, v in vars(self).items() if k != "options"}
        errors = [[list(e) for e in es] for es in self.errors]
        return {**rest, "config": _facts(self.options), "errors": errors}


@torch.no_grad()
def sort_neurons(model: nn.Module, order: Sequence[Tensor]) -> None:
    """Permute the neurons of every layer in place: what the model computes stays, up to the order of its sums.

    Args:
        model: a causal LM of Transformers.
        order: one `[F]` permutation a layer: neuron `order[i]` becomes neuron i; by falling importance, if prefixes are
            to be good.

    Raises:
        InputError: not one permutation a layer; earlier layers are sorted already if a later one is wrong.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    ffns = families.find_plain(model, "nested widths")
    check(len(order) == len(ffns), "order", f"hold one permutation for each of {len(ffns)} layers", len(order))
    for ffn, permutation in zip(ffns, order, strict=True):
        surgery.permute(ffn, permutation)
    surgery.forget_nested(model)


def _chosen(shares: Sequence[Share], sizes: Sequence[int]) -> tuple[list[float], list[list[int]]]:
    """Shares, and the widths of every layer for each."""
    check(len(shares) > 0, "shares", "hold at least one share", list(shares))
    names: list[float] = []
    widths: list[list[int]] = []
    for share in shares:
        if isinstance(share, Sequence):
            counts = [count_of(c, size, "shares") for c, size in zip(each(share, sizes, "shares"), sizes, strict=True)]
            share = sum(counts) / sum(sizes)
        else:
            counts = [count_of(share, size, "shares") for size in sizes]
        check(all(abs(float(share) - s) >= CLOSE for s in names), "shares", "hold each share once", float(share))
        names.append(float(share))
        widths.append(counts)
    return names, widths


@torch.no_grad()
def compensate(
    model: nn.Module,
    text: Iterable[Tensor] | Tensor,
    shares: Sequence[Share] = SHARES,
    repair: LeastSquares | str = "least-squares",
    progress: Progress = quiet,
) -> tuple[Nested, Errors]:
    """Down rows of the first K neurons of every layer, fitted to the dense output for each share; changes nothing.

    Each width is fitted in its own pass of the text through the model, in which the layers before have that width and
    their new rows already: so every layer makes up for what really reaches it.

    Args:
        model: a causal LM of Transformers whose neurons are sorted.
        text: calibration tokens, as for `prune.prune`.
        shares: in (0, 1], or counts, one a layer.
        repair: with which damping and target.
        progress: called as `(stage, done, total)`.

    Returns:
        The rows, and the errors (see `NestedReport`).

    Raises:
        InputError: a value breaks its rule, too little text, or activations or new rows that are not finite.
    """
    fit = REPAIRS.parse(repair)
    check(isinstance(fit, LeastSquares), "repair", "be least-squares", str(fit))
    assert isinstance(fit, LeastSquares)
    described = Described(model)
    described.check_plain("nested widths")
    found = calibration(model, text)
    ids = None if found is None else found.ids
    assert ids is not None
    names, widths = _chosen(shares, described.sizes)
    fit.check_tokens(ids, max(map(max, widths)))
    rows, errors = _fit(described, ids, names, widths, fit, progress)
    return Nested(tuple(names), tuple(map(tuple, widths)), rows, described.fingerprint), errors


def _fit(
    described: Described,
    ids: Tensor,
    names: list[float],
    widths: list[list[int]],
    repair: LeastSquares,
    progress: Progress,
    sources: Tensor | None = None,
) -> tuple[Rows, Errors]:
    """`compensate` for shares and widths that are checked; `sources` of the windows, None for one."""
    model, ffns, target = described.model, described.ffns, repair.share
    dead: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    errors: Errors = []
    repair.check_model(described)
    with evaluating(model):
        for share, counts in zip(names, widths, strict=True):
            stream = LayerStream(model, ffns, ids, target > 0, sources)
            rows: list[Tensor] = []
            relative: list[tuple[float, float]] = []
            for ffn, count in zip(ffns, counts, strict=True):
                progress(f"fitting width {share:g}", ffn.layer, len(ffns))
                down = ffn.weights().down
                if target > 0:
                    stream.advance_twin()
                stats = stream.statistics(ffn, True, repair.fixed is None)
                if not found:  # in the first pass
                    dead.append(int((stats.square_sum == 0).sum()))
                kept = torch.arange(count, device=down.device)
                solved = least_squares(down, stats, kept, repair.fixed, target)
                check_fits(solved.down, down.dtype, f"compensated rows of layer {ffn.layer}")
                new = solved.down.to(down.dtype)
                with surgery.borrowed_down(ffn, new):
                    stream.advance()
                rows.append(new.cpu())
                relative.append((solved.error_before, solved.error_after))
                release()
            progress(f"fitting width {share:g}", len(ffns), len(ffns))
            found.append(tuple(rows))
            errors.append(relative)
    warn_of_dead(dead, sum(described.sizes))
    return tuple(found), errors


def _check(options: PruneOptions) -> None:
    rule, allocation, repair = "with nested widths", options.allocation, options.repair
    check(allocation.USES_KEEP, "allocation", f"spread a share that is given {rule}", allocation.NAME)
    check(allocation.protect == (0, 0), "protect", f"be (0, 0) {rule}", allocation.protect)
    fits = isinstance(repair, NoRepair | LeastSquares)
    check(fits, "repair", f"be none or least-squares {rule}", repair.NAME)


def _facts(options: PruneOptions) -> dict[str, Any]:
    """What had a say, flat, as in `PruneOptions.facts`."""
    idle = {"keep", "structure", "sequential"}
    if isinstance(options.allocation, Uniform):
        idle |= set(options.allocation.keywords())  # every share is rounded by itself
    return {k: v for k, v in options.facts().items() if k not in idle}


@torch.inference_mode(False)
@torch.no_grad()
def prune_nested(
    model: nn.Module,
    shares: Sequence[Share] = SHARES,
    method: str = "obs",
    *,
    allocation: Allocation | str = "uniform",
    repair: Repair | str | None = "least-squares",
    text: Text = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
) -> NestedReport:
    """Sort the neurons of a dense model by importance, in place, and fit the down rows of the chosen widths.

    The model computes what it did, at full width. `checkpoint.save` writes it with the rows; `accelerate` and
    `set_width` then run it at any width.

    Args:
        model: a causal LM of Transformers.
        shares: the widths to choose, in (0, 1], or counts, one a layer.
        method: the importance criterion.
        allocation: `uniform` gives every layer the same share, whatever its options; others spread each share over
            the layers.
        repair: `none` or `least-squares`, with its options.
        text, tokenizer, seed, progress, provenance: as for `prune.prune`.

    Raises:
        InputError: a value breaks its rule, calibration text is missing or too short, or scores, activations or new
            rows are not finite. Where that shows in the fit, the model is sorted already, which changes nothing else.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    options = PruneOptions.of(1.0, method, allocation, repair, seed=seed)
    started = time.perf_counter()
    _check(options)
    options = options.suited(model)
    run = Run(model, text, tokenizer, options.needs_text(), options.purpose, provenance, seed, progress)
    check(run.batches is None, "text", "be windows of token ids with nested widths", "batches")
    described, ids = run.described, run.ids
    described.check_plain("nested widths")
    names, widths = _chosen(shares, described.sizes)
    fit = options.repair if isinstance(options.repair, LeastSquares) else None
    if fit is not None and ids is not None:
        fit.check_tokens(ids, max(map(max, widths)))
    base = described.fingerprint
    with evaluating(model):
        layers = Pruner(described, options, run.windows, progress)
        scores = layers.scores()
        for i, s in enumerate(scores):
            check_scores(s, f"scores of layer {i}")
        for n, share in enumerate(shares):
            if not isinstance(options.allocation, Uniform) and not isinstance(share, Sequence):
                plan = options.allocation.plan(layers, names[n]).layers
                widths[n] = [item if isinstance(item, int) else len(item) for item in plan]
    sort_neurons(model, [s.double().argsort(descending=True, stable=True) for s in scores])
    sorted_model = Described(model)
    errors: Errors = []
    rows: Rows | None = None
    if fit is not None and ids is not None:
        sources = None if run.windows is None else run.windows.sources
        rows, errors = _fit(sorted_model, ids, names, widths, fit, progress, sources)
    nested = Nested(tuple(names), tuple(map(tuple, widths)), rows, sorted_model.fingerprint)
    write(model, base, run.facts(_facts(options)), nested=nested.entry())
    holder: Any = model
    holder.pyprune_nested = nested
    report = NestedReport(options, names, [list(w) for w in nested.widths], errors, *run.size)
    report.seconds = time.perf_counter() - started
    return report
