"""Scores smoothed over training steps by an exponential moving average, whatever the score is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import check
from .schedule import is_number


def check_beta(value: object, argument: str) -> None:
    """Raise `InputError` unless `value` lies in [0, 1)."""
    check(is_number(value) and 0 <= value < 1, argument, "lie in [0, 1)", value)  # type: ignore[operator]


def smooth(state: dict[str, Tensor], name: str, value: Tensor, beta: float) -> Tensor:
    """state[name] <- beta * state[name] + (1 - beta) * value, starting from zero; returns it."""
    old = state.get(name)
    state[name] = (1 - beta) * value if old is None else beta * old + (1 - beta) * value
    return state[name]


def corrected(state: dict[str, Tensor], value: Tensor, beta: float) -> Tensor:
    """One step of smoothing, divided by the weight that all values so far have in it: 1 - beta^t after t steps.

    So the first result is the first value, and none is pulled to the zero that the mean starts from (Kingma and Ba
    2015, arXiv 1412.6980, section 3). All values of a step are divided alike, so ranks are those of the mean alone.

    Args:
        state: holds `mean` and `weight` between steps.
        value: of this step.
        beta: weight of the past.
    """
    mean = smooth(state, "mean", value, beta)
    return mean / smooth(state, "weight", value.new_ones(()), beta)


def smoothed_score(state: dict[str, Tensor], value: Tensor, beta: float, uncertainty_beta: float | None) -> Tensor:
    """One step of smoothing: the mean alone, or mean times uncertainty as PLATON has it.

    mean <- b1 mean + (1 - b1) I;  uncertainty <- b2 uncertainty + (1 - b2) abs(I - mean), with the mean just updated
    (Zhang et al. 2022, arXiv 2206.12562, section 3; both start at zero, in the paper and in its public code).

    Args:
        state: holds `mean` and `uncertainty` between steps.
        value: I, this step's score.
        beta: b1.
        uncertainty_beta: b2, or None for the mean alone.
    """
    mean = smooth(state, "mean", value, beta)
    if uncertainty_beta is None:
        return mean
    return mean * smooth(state, "uncertainty", (value - mean).abs(), uncertainty_beta)


class EMA:
    """Wraps any per-step score: calling it computes the score, and returns it smoothed over all calls so far.

    Args:
        score: `(...) -> Tensor`, of one shape at every call.
        beta: weight of the past, in [0, 1); 0 gives the unsmoothed score of the last step.
        uncertainty_beta: None, or the weight of the past for the uncertainty that the mean is multiplied by (PLATON).
        debias: divide the mean by the weight of all values so far (see `corrected`); not with an uncertainty.

    An importance criterion is such a score: `EMA(importance.get("wanda"))(weights, stats)`. While a model trains,
    method `smoothed` of `TrainingConfig` does this with any criterion, and gathers the statistics.

    Raises:
        InputError: a beta outside [0, 1), or `debias` with an uncertainty; when called, a score that is not finite, or
            of another shape than before.
    """

    def __init__(
        self,
        score: Callable[..., Tensor],
        beta: float = 0.85,
        uncertainty_beta: float | None = None,
        debias: bool = False,
    ) -> None:
        check_beta(beta, "beta")
        if uncertainty_beta is not None:
            check_beta(uncertainty_beta, "uncertainty_beta")
        check(not (debias and uncertainty_beta is not None), "debias", "be off with uncertainty_beta", debias)
        self.score, self.beta, self.uncertainty_beta, self.debias = score, beta, uncertainty_beta, debias
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        value = self.score(*args, **kwargs).detach()
        check(
            bool(value.isfinite().all()), "score", "be finite", f"{int((~value.isfinite()).sum())} values that are not"
        )
        old = self._state.get("mean")
        check(old is None or old.shape == value.shape, "score", "have one shape at every step", tuple(value.shape))
        if self.debias:
            return corrected(self._state, value, self.beta)
        return smoothed_score(self._state, value, self.beta, self.uncertainty_beta).clone()

    def state_dict(self) -> dict[str, Tensor]:
        """What the past left: `mean` and perhaps `uncertainty` or `weight`; empty before the first call."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            InputError: it is not the state of such an average.
        """
        names = {"mean"} | ({"weight"} if self.debias else set())
        names |= set() if self.uncertainty_beta is None else {"uncertainty"}
        check(set(state) in (set(), names), "state", f"hold {sorted(names)}", sorted(state))
        self._state = {name: tensor.clone() for name, tensor in state.items()}
