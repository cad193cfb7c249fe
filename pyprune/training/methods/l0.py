"""L0 gates: a hard-concrete gate on every neuron, learned with the weights, their expected number held to the target.

A gate is drawn anew at every step, by the reparametrisation of Louizos et al. 2018, section 2.2. With u uniform in
(0, 1), temperature b, and (l, r) = (-stretch, 1 + stretch):

    s = sigmoid((log u - log(1 - u) + log_alpha) / b);   z = min(1, max(0, l + (r - l) s));   a' = z a
    P(z > 0) = sigmoid(log_alpha - b log(-l / r))

The score is log_alpha. It descends the loss through z, and the Lagrangian of Wang et al. 2020, section 3, whose
multipliers ascend it, both by Adam:

    c (lambda_1 (e - v) + lambda_2 (e - v)^2),   e the mean of P(z > 0) over the neurons, v = v(t) the share to keep

In the paper c is 1, and the rate of the multipliers has to fit the loss. Here c is sum_j abs(dL/dz_j), smoothed over
steps: a bound on the loss's slope as all gates close together. So loss and constraint have one unit whatever the loss
is; with c = 1 the constraint drowns what gates learn where that slope is small, and comes too late where it is large.

From the end of the schedule on nothing is drawn: the highest scores are kept, their number the share, and scores rest.

The neuron form. The paper writes W as the product P Q of two factors and gates the rank-1 components,
W = P diag(z) Q = sum_j z_j p_j q_j. An FFN is such a product already, with an activation between its factors:
down(act(up(x))) = sum_j z_j V_j act(U_j x) (a gated one likewise), so a neuron takes the place of a component: with z_j
zero its row of `up` and `gate` and its column of `down` go, and nothing has to be factorised. The factorised attention
matrices and embeddings are left out. What else differs: the published cut counts the components of each matrix that are
expected open, and leaves the factor sigmoid(0.8 log_alpha / b) in those that stay; here the count is the share itself,
a kept neuron counts in full, and the cool-down trains that way. The target follows the schedule of all methods instead
of a straight line, lambda_2 starts above zero (`hold`), and the gates of a step are the same for all its batches.
Temperature and stretch are those of Louizos et al., section 4, and of CoFi (Xia et al. 2022, arXiv 2204.00408); the
public code of Wang et al. has a temperature of 1 by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...base.errors import check, is_number
from ...model.families import FFN
from ..ema import corrected
from .base import METHODS, Gathered, Method, Moment, State, check_amount
from .movement import adam

_SMOOTH = 0.9  # weight of the past in c
_NOISE = 0.01  # of the first scores, as published: without it all neurons would be alike to the cut


@METHODS.add
@dataclass(frozen=True)
class L0(Method):
    """The highest log_alpha stays.

    Attributes:
        score_rate: learning rate of log_alpha.
        multiplier_rate: of lambda_1 and lambda_2.
        hold: lambda_2 before the first step; lambda_1 is 0. Published runs start from 0 and have thousands of steps
            for the share to settle; with some hundreds it swings past the target. Below 150 steps of the schedule or
            so it takes higher rates.
        temperature: b, positive.
        stretch: how far the gates reach below 0 and above 1 before they are clamped, positive.
        initial: P(z > 0) before the first step, in (0, 1). Near 1 a trained model starts nearly as it was.
        tolerance: how far the expected share may be from the target when the schedule ends, in (0, 1].
    """

    NAME: ClassVar[str] = "l0"
    SUMMARY: ClassVar[str] = "a' = z a, z hard concrete; log_alpha by descent, mean P(z > 0) held at v by a Lagrangian"
    SOURCE: ClassVar[str] = (
        "Wang, Wohlwend and Lei 2020, arXiv 1910.04732, section 3; gates of Louizos et al. 2018, arXiv 1712.01312, "
        "section 2.2"
    )
    NEEDS: ClassVar[frozenset[str]] = frozenset({"gradient"})
    SCOPE: ClassVar[str] = "global"
    LEARNED: ClassVar[bool] = True

    score_rate: float = 0.1
    multiplier_rate: float = 0.1
    hold: float = 30.0
    temperature: float = 2 / 3
    stretch: float = 0.1
    initial: float = 0.99
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        for name in ("score_rate", "multiplier_rate", "temperature", "stretch"):
            check_amount(getattr(self, name), name, zero=False)
        check_amount(self.hold, "hold")
        check(is_number(self.initial) and 0 < self.initial < 1, "initial", "lie in (0, 1)", self.initial)
        check(is_number(self.tolerance) and 0 < self.tolerance <= 1, "tolerance", "lie in (0, 1]", self.tolerance)

    @property
    def _shift(self) -> float:
        """b log(-l / r), which is negative."""
        return self.temperature * math.log(self.stretch / (1 + self.stretch))

    def chance(self, scores: Tensor) -> Tensor:
        """`[F]`, P(z > 0)."""
        return (scores - self._shift).sigmoid()

    def draw(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """`[F]`, the gates z that `uniform` (`[F]`, in [0, 1)) gives."""
        s = ((uniform.logit() + scores) / self.temperature).sigmoid()
        return (s * (1 + 2 * self.stretch) - self.stretch).clamp(0, 1)

    def slope(self, gates: Tensor) -> Tensor:
        """`[F]`, dz/dlog_alpha at z = `gates`: (r - l) s (1 - s) / b, and zero where z is clamped."""
        s = (gates + self.stretch) / (1 + 2 * self.stretch)
        slope = s * (1 - s) * ((1 + 2 * self.stretch) / self.temperature)
        return torch.where((gates > 0) & (gates < 1), slope, torch.zeros_like(slope))

    def start(self, ffn: FFN, generator: torch.Generator) -> State:
        state = super().start(ffn, generator)
        zeros, mean = state["scores"], math.log(self.initial / (1 - self.initial)) + self._shift
        noise = torch.randn(zeros.shape, generator=generator).to(zeros)
        seed = torch.tensor(generator.initial_seed())
        multipliers = zeros.new_tensor([0.0, self.hold])
        return {"scores": mean + _NOISE * noise, "multipliers": multipliers, "slope": zeros.new_zeros(()), "seed": seed}

    def prepare(self, states: Sequence[State], moment: Moment, scope: str) -> list[Tensor] | None:
        """The gates of step t; and every state learns of all that competes the expected share, the size, and c.

        Raises:
            InputError: the schedule has ended, and the expected share is not near its target.
        """
        for first, group in enumerate([states] if scope == "global" else [[state] for state in states]):
            count = sum(state["scores"].numel() for state in group)
            share = sum(float(self.chance(state["scores"]).sum(dtype=torch.float64)) for state in group) / count
            where = "the model" if scope == "global" else f"layer {first}"
            rule = (
                f"be reached by the gates of {where} within {self.tolerance} when they are cut: at step {moment.step} "
                f"the share expected open is {share:.4f}; more steps, a higher score_rate or a higher multiplier_rate "
                "hold it better"
            )
            check(not moment.final or abs(share - moment.keep) <= self.tolerance, "keep", rule, moment.keep)
            unit = sum(float(state["slope"]) for state in group)
            for state in group:
                for name, value in (("share", share), ("count", count), ("unit", unit)):
                    state[name] = state["scores"].new_tensor(value)
        if moment.final:
            return None
        for state in states:
            # Seeded by the step, so that a resumed run draws the same without keeping a generator.
            generator = torch.Generator().manual_seed((int(state["seed"]) * 1_000_003 + moment.step) % 2**63)
            uniform = torch.rand(state["scores"].shape, generator=generator)
            state["gates"] = self.draw(state["scores"], uniform.to(state["scores"]))
        return [state["gates"] for state in states]

    def update(self, state: State, gathered: Gathered, moment: Moment) -> None:
        assert gathered.gradient is not None
        if moment.final:
            return
        chance, gap = self.chance(state["scores"]), state["share"] - moment.keep
        first, second = state["multipliers"]
        pull = state["unit"] * (first + 2 * second * gap) / state["count"] * chance * (1 - chance)
        loss = gathered.gradient.float()
        state["slope"] = corrected(state, loss.abs().sum(), _SMOOTH)
        gradient = loss * self.slope(state["gates"]) + pull
        ascent = adam(state, torch.stack([gap, gap.square()]), moment.step + 1, "multipliers_")
        state["multipliers"] = state["multipliers"] + self.multiplier_rate * ascent
        state["scores"] = state["scores"] - self.score_rate * adam(state, gradient, moment.step + 1)
