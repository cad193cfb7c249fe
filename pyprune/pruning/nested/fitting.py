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
from ...base.windows import check_windows, stack_batches
from ...ffn.quantisation import check_fits
from ...model import families, surgery
from ...model.families import FFN
from ...model.mask import check_scores
from ...model.probe import evaluating
from .. import prune
from ..allocation import by_sensitivity, ranked
from ..calibration import LayerStream
from ..config import PruneConfig
from ..repair.least_squares import check_tokens, least_squares, warn_of_dead
from .chosen import CLOSE, Nested, Rows, count_of, each

SHARES = (0.8, 0.7, 0.5)

Share = float | Sequence[int]
# For each share and layer (bare prefix, compensated), see `NestedReport`.
Errors = list[list[tuple[float, float]]]


@dataclass
class NestedReport:
    """What `prune_nested` did.

    Attributes:
        config: as given.
        shares, widths: as in `Nested`.
        errors: for each share and layer the squared error of the FFN's output over the calibration tokens, relative to
            the squared dense output, as (bare prefix, compensated); empty without compensation.
        tokens, window: calibration tokens used, and tokens in a window; 0 where no text was needed.
        seconds: wall time.
    """

    config: PruneConfig
    shares: list[float]
    widths: list[list[int]]
    errors: Errors = field(default_factory=list)
    tokens: int = 0
    window: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "config": self.config.to_json(), "errors": [[list(e) for e in es] for es in self.errors]}


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
    ffns = families.find_ffns(model)
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
    batches: Iterable[Tensor] | Tensor,
    shares: Sequence[Share] = SHARES,
    damping: float | None = 1e-2,
    progress: Progress = quiet,
    target: float = 0.0,
) -> tuple[Nested, Errors]:
    """Down rows of the first K neurons of every layer, fitted to the dense output for each share; changes nothing.

    Each width is fitted in its own pass of the text through the model, in which the layers before have that width and
    their new rows already: so every layer makes up for what really reaches it.

    Args:
        model: a causal LM of Transformers whose neurons are sorted.
        batches: calibration tokens, as for `prune.prune`.
        shares: in (0, 1], or counts, one a layer.
        damping, target: see `PruneConfig`.
        progress: called as `(stage, done, total)`.

    Returns:
        The rows, and the errors (see `NestedReport`).

    Raises:
        InputError: a value breaks its rule, too little text, or activations or new rows that are not finite.
    """
    ffns = families.find_ffns(model)
    ids = stack_batches(batches, getattr(model.config, "vocab_size", None))
    check_windows(model, ids, "batches")
    names, widths = _chosen(shares, [ffn.intermediate_size for ffn in ffns])
    check_tokens(ids, max(map(max, widths)), damping)
    rows, errors = _fit(model, ffns, ids, names, widths, damping, progress, target)
    fingerprint = families.fingerprint(model, ffns)
    return Nested(tuple(names), tuple(map(tuple, widths)), rows, fingerprint), errors


def _fit(
    model: nn.Module,
    ffns: list[FFN],
    ids: Tensor,
    names: list[float],
    widths: list[list[int]],
    damping: float | None,
    progress: Progress,
    target: float,
) -> tuple[Rows, Errors]:
    """`compensate` for shares and widths that are checked."""
    dead: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    errors: Errors = []
    with evaluating(model):
        for share, counts in zip(names, widths, strict=True):
            stream = LayerStream(model, ffns, ids, target > 0)
            if target > 0:
                stream.check_additive(ffns[0])
            rows: list[Tensor] = []
            relative: list[tuple[float, float]] = []
            for ffn, count in zip(ffns, counts, strict=True):
                progress(f"fitting width {share:g}", ffn.layer, len(ffns))
                down = ffn.weights().down
                if target > 0:
                    stream.advance_twin()
                stats = stream.statistics(ffn, True, damping is None)
                if not found:  # in the first pass
                    dead.append(int((stats.square_sum == 0).sum()))
                kept = torch.arange(count, device=down.device)
                repair = least_squares(down, stats, kept, damping, target)
                check_fits(repair.down, down.dtype, f"compensated rows of layer {ffn.layer}")
                new = repair.down.to(down.dtype)
                with surgery.borrowed_down(ffn, new):
                    stream.advance()
                rows.append(new.cpu())
                relative.append((repair.error_before, repair.error_after))
                release()
            progress(f"fitting width {share:g}", len(ffns), len(ffns))
            found.append(tuple(rows))
            errors.append(relative)
    warn_of_dead(dead, sum(ffn.intermediate_size for ffn in ffns))
    return tuple(found), errors


def _check_config(config: PruneConfig) -> None:
    rule = "with nested widths"
    check(config.structure == "neurons", "structure", f"be 'neurons' {rule}", config.structure)
    spread = config.allocation != "latency"
    check(spread, "allocation", f"be uniform, global or sensitivity {rule}", config.allocation)
    fits = config.compensate in ("none", "least-squares")
    check(fits, "compensate", f"be none or least-squares {rule}", config.compensate)
    check(config.sequential, "sequential", f"be True {rule}", False)
    check(config.protect == (0, 0), "protect", f"be (0, 0) {rule}", config.protect)


@torch.inference_mode(False)
@torch.no_grad()
def prune_nested(
    model: nn.Module,
    config: PruneConfig | None = None,
    batches: Iterable[Tensor] | Tensor | None = None,
    shares: Sequence[Share] = SHARES,
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
) -> NestedReport:
    """Sort the neurons of a dense model by importance, in place, and fit the down rows of the chosen widths.

    The model computes what it did, at full width. `checkpoint.save` writes it with the rows; `accelerate` and
    `set_width` then run it at any width.

    Args:
        model: a causal LM of Transformers.
        config: method, compensation (none or least-squares), damping, target and seed; with allocation `global` or
            `sensitivity` each share is spread over the layers, in steps of `multiple` and above `floor`. `keep` is not
            used.
        batches: calibration tokens, as for `prune.prune`.
        shares: the widths to choose, in (0, 1], or counts, one a layer.
        progress: called as `(stage, done, total)`.
        provenance: facts about the run (text, versions) that go into the checkpoint; JSON values.

    Raises:
        InputError: a value breaks its rule, calibration text is missing or too short, or scores, activations or new
            rows are not finite. Where that shows in the fit, the model is sorted already, which changes nothing else.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    config = config or PruneConfig()
    started = time.perf_counter()
    _check_config(config)
    ffns = families.find_ffns(model)
    sizes = [ffn.intermediate_size for ffn in ffns]
    names, widths = _chosen(shares, sizes)
    fitted = config.compensate == "least-squares"
    check(batches is not None or not fitted, "batches", "be given for compensate 'least-squares'", batches)
    ids = None
    if batches is not None and config.needs_text:
        ids = stack_batches(batches, getattr(model.config, "vocab_size", None))
        check_windows(model, ids, "batches")
    if fitted and ids is not None:
        check_tokens(ids, max(map(max, widths)), config.damping)
    base = families.fingerprint(model, ffns)
    scores = prune.score(model, config, ids, progress)
    for i, s in enumerate(scores):
        check_scores(s, f"scores of layer {i}")
    if config.allocation != "uniform":
        free = {n: names[n] for n, share in enumerate(shares) if not isinstance(share, Sequence)}
        for n, found in zip(free, _spread(model, config, ids, scores, list(free.values()), progress), strict=True):
            widths[n] = found
    sort_neurons(model, [s.double().argsort(descending=True, stable=True) for s in scores])
    errors: Errors = []
    rows: Rows | None = None
    if fitted and ids is not None:
        rows, errors = _fit(model, ffns, ids, names, widths, config.damping, progress, config.target)
    nested = Nested(tuple(names), tuple(map(tuple, widths)), rows, families.fingerprint(model, ffns))
    used = {k: v for k, v in config.to_json().items() if k not in _unused(config)}
    tokens, window = (0, 0) if ids is None else (ids.numel(), ids.shape[1])
    facts = {"config": used, "tokens": tokens, "window": window, **(provenance or {})}
    own = getattr(model.config, "pyprune", None) or {}
    settings: Any = model.config
    settings.pyprune = {**own, "base_fingerprint": base, "provenance": facts, "nested": nested.entry()}
    holder: Any = model
    holder.pyprune_nested = nested
    report = NestedReport(config, names, [list(w) for w in nested.widths], errors, tokens, window)
    report.seconds = time.perf_counter() - started
    return report


def _spread(
    model: nn.Module,
    config: PruneConfig,
    ids: Tensor | None,
    scores: Sequence[Tensor],
    shares: Sequence[float],
    progress: Progress,
) -> list[list[int]]:
    """The width of every layer for each share, where layers do not all keep the same."""
    rules = config.multiple, config.floor
    if config.allocation == "global":
        return [[len(keep) for keep in ranked.global_top(scores, share, *rules)] for share in shares]
    curves = prune.curves(model, config, ids, progress)
    return [by_sensitivity.choose_widths(curves, share, *rules) for share in shares]


def _unused(config: PruneConfig) -> set[str]:
    unused = {"keep", "structure", "iterative", "protect", "target_speedup", "workload", "sequential"}
    if config.allocation == "uniform":
        unused |= {"multiple", "floor"}
    return unused if config.compensate == "least-squares" else unused | {"damping", "target"}
