"""Repair after whole experts were removed: those that are left take over what the mixture gave.

Symbols: Y `[T, D]` what the dense bank gives for the tokens that reach it; w_te the router's weight of expert e for
token t among the experts that are left; a_te `[F]` the activations that enter its down rows V_e `[F, D]`.

    min  sum_t |Y_t - sum_e w_te a_te V_e|^2 + sum_e rho_e |V_e - V_e before|^2,
    rho_e = damping * mean over neurons of sum_t (w_te a_te)^2

One expert after the other is solved for with the others as they are (block coordinate descent): no step raises the
sum, and a system is `[F, F]` however many experts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base.errors import UnsupportedModelError, check
from ..model.described import Described
from ..model.experts import Bank, find_bank
from ..model.units import Expert
from .moments import split
from .repair import REPAIRS, Repair
from .repair.least_squares import DAMPINGS, Fit

STRUCTURE = "experts"
# Of a trained mixture (bench/experiments/mixture.py) the second lowered errors by up to 8 %, the third by 1 % at most.
SWEEPS = 3


@dataclass
class Mended:
    """What a repair did to one bank.

    Attributes:
        error_cut, error_repaired: squared error of the bank's output over the calibration tokens, relative to that of
            the dense bank, before and after.
        damping: ridge of the fit; None where there was none.
        few: experts that saw too few tokens and stay as they are, by name.
    """

    error_cut: float
    error_repaired: float
    damping: float | None
    few: dict[str, int] = field(default_factory=dict)


@dataclass
class _Part:
    """One expert in the fit: to rows `rows` `[n]` of the output it adds `inputs` `[n, K]` times `old` `[K, D]`."""

    rows: Tensor
    inputs: Tensor
    old: Tensor


def check_repair(repair: Repair, described: Described, banks: Sequence[Sequence[Expert]]) -> None:
    """Raise `InputError` or `UnsupportedModelError` for what cannot repair a mixture that loses experts."""
    if not repair.needs:
        return
    able = " or ".join(repr(one.NAME) for one in REPAIRS if STRUCTURE in one.STRUCTURES)
    check(STRUCTURE in repair.STRUCTURES, "repair", f"be {able} with structure {STRUCTURE!r}", repair.NAME)
    check(repair.share == 0, "target", f"be 0 with structure {STRUCTURE!r}", repair.share)
    repair.check_model(described)
    for bank in banks:
        if getattr(bank[0].of_bank.module, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{bank[0].group} has a norm behind each expert, through which nothing is fitted: use repair 'none'"
            )


def outputs(stream: Any, group: Sequence[Expert], see: Callable[..., None] | None = None) -> list[Tensor]:
    """`[T, D]` float32 of each call: what the bank of a group gives for the stream's text.

    Args:
        stream: in front of the group's layer.
        group: all experts of the bank, as they are now.
        see: as `observing.See`, with the number of tokens of all earlier calls as one more argument.
    """
    bank = group[0].of_bank
    found: list[Tensor] = []

    def after(module: Any, args: Any, output: Tensor) -> None:
        hidden = output.shape[-1]
        out = output.detach().reshape(-1, hidden).float()
        found.append(out.view(bank.experts, -1, hidden).sum(0) if bank.layout.sorted_rows else out)

    def seen(ffn: Any, a: Tensor, weights: Tensor, tokens: Tensor) -> None:
        if see is not None:
            see(ffn, a, weights, tokens, sum(map(len, found)))

    handle = bank.module.register_forward_hook(after)
    try:
        stream.see_all(list(group), seen)
    finally:
        handle.remove()
    return found


def of_bank(bank: Bank, like: Expert) -> list[Expert]:
    """The experts of a bank from which others were removed."""
    now = find_bank(bank.name, bank.module)
    assert now is not None
    return [Expert.of(now, number, like.layer + number, like.stack, like.block) for number in range(now.experts)]


@torch.no_grad()
def mend(
    stream: Any, group: Sequence[Expert], dense: list[Tensor], repair: Repair, sources: list[int], least: int
) -> Mended:
    """Fit the experts that are left to what the dense bank gave, and write what was found.

    Args:
        stream: in front of the group's layer, which has lost experts already.
        group: the experts that are left.
        dense: what `outputs` gave before.
        repair: as `check_repair` takes it.
        sources: which source each window is from.
        least: tokens that an expert must have seen; at least as many as it has neurons for least squares.

    Raises:
        InputError: activations, or new rows, that are not finite.
    """
    bank = group[0].of_bank
    every, squares = bank.all_weights(), isinstance(repair, Fit)
    gathered: list[list[tuple[Tensor, Tensor]]] = [[] for _ in group]

    def see(ffn: Expert, a: Tensor, weights: Tensor, tokens: Tensor, before: int) -> None:
        inputs = a.float() * weights[:, None].float() if squares else weights[:, None].float()
        gathered[ffn.number].append((before + tokens, inputs))

    found = outputs(stream, group, see)
    wanted, residual = torch.cat(dense), torch.cat(dense) - torch.cat(found)
    parts, few = [], {}
    touched = torch.zeros(len(wanted), dtype=torch.bool, device=wanted.device)
    for expert, calls in zip(group, gathered, strict=True):
        rows, inputs = torch.cat([r for r, _ in calls]), torch.cat([i for _, i in calls])
        touched[rows] = True
        calls.clear()
        if len(rows) < max(least, inputs.shape[1]):
            few[expert.name] = len(rows)
        own = every.down if squares else every.down_bias
        assert own is not None
        old = own[expert.number].double().view(-1, own.shape[-1])
        parts.append(_Part(rows, inputs, old))
    residual[~touched] = 0  # padded positions, and tokens that no expert here is for
    total = float(wanted[touched].double().square().sum()) or 1.0
    cut = float(residual.double().square().sum())
    check(cut < float("inf"), f"outputs of {bank.name}", "be finite", cut)
    moving = [i for i, expert in enumerate(group) if expert.name not in few]
    damping = None
    if squares:
        assert isinstance(repair, Fit)
        damping = repair.fixed if repair.fixed is not None else _chosen(parts, moving, residual, found, sources)
    new = _descend(parts, moving, residual, damping or 0.0)
    places = [every.down[i] if squares else every.down_bias[i] for i in moving]  # type: ignore[index]
    for i, place in zip(moving, places, strict=True):
        fits = bool(new[i].to(place.dtype).isfinite().all())
        check(fits, f"fitted rows of {group[i].name}", f"be finite in {place.dtype}", "NaN or infinity")
    for i, place in zip(moving, places, strict=True):
        place.copy_(new[i].view(place.shape))
    return Mended(cut / total, float(residual.double().square().sum()) / total, damping, few)


def _descend(
    parts: list[_Part], moving: list[int], residual: Tensor, damping: float, fitted: Tensor | None = None
) -> list[Tensor]:
    """`[K, D]` float64 of each part, after some sweeps; `residual` `[T, D]` becomes what they leave.

    Args:
        moving: parts that may change.
        fitted: `[T]`, which rows count; None for all.
    """
    new = [part.old.clone() for part in parts]
    systems: dict[int, tuple[Tensor, Tensor, float]] = {}
    for i in moving:
        part = parts[i]
        mine = (torch.ones_like(part.rows, dtype=torch.bool) if fitted is None else fitted[part.rows]).nonzero()[:, 0]
        inputs = part.inputs[mine].double()
        gram = inputs.T @ inputs
        if (mean := float(gram.diagonal().mean())) == 0:
            continue  # an expert that gives nothing
        gram.diagonal().add_(damping * mean)
        triangle, failed = torch.linalg.cholesky_ex(gram)
        rule = "be large enough to make the second moment positive definite"
        check(not failed, "damping", rule, damping)
        systems[i] = mine, triangle, damping * mean
    for _ in range(SWEEPS):
        for i, (mine, triangle, ridge) in systems.items():
            part = parts[i]
            slope = part.inputs[mine].double().T @ residual[part.rows[mine]].double() - ridge * (new[i] - part.old)
            step = torch.cholesky_solve(slope, triangle)
            new[i] += step
            residual.index_add_(0, part.rows, -(part.inputs @ step.float()))
    return new


def _chosen(parts: list[_Part], moving: list[int], residual: Tensor, calls: list[Tensor], sources: list[int]) -> float:
    """That of `DAMPINGS` whose fit to all but the last quarter of each source's windows errs least on those."""
    seen, *held = split(sources, True)
    per = len(calls) // len(sources)
    window = torch.cat([torch.full((len(c),), i // per, device=c.device) for i, c in enumerate(calls)])
    chosen = [torch.isin(window, torch.tensor(numbers, device=window.device)) for numbers in (seen, *held)]

    def error(damping: float) -> float:
        left = residual.clone()
        _descend(parts, moving, left, damping, chosen[0])
        return sum(float(left[rows].double().square().sum(1).mean()) for rows in chosen[1:])

    return min(DAMPINGS, key=error)
