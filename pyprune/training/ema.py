"""Scores smoothed over training steps by an exponential moving average, whatever the score is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from .schedule import is_number


def check_beta(value: object, argument: str) -> None:
    """Raise `InputError` unless `value` lies in [0, 1)."""
    check(is_number(value) and 0 <= value < 1, argument, "lie in [0, 1)", value)  # type: ignore[operator]


def smooth(state: dict[str, Tensor], name: str, value: Tensor, beta: float) -> Tensor:
    """state[name] <- beta * state[name] + (1 - beta) * value, starting from zero; returns it."""
    old = state.get(name)
    state[name] = (1 - beta) * value if old is None else beta * old + (1 - beta) * value
    return state[name]


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

    Raises:
        InputError: a beta outside [0, 1); when called, a score that is not finite, or of another shape than before.
    """

    def __init__(self, score: Callable[..., Tensor], beta: float = 0.85, uncertainty_beta: float | None = None) -> None:
        check_beta(beta, "beta")
        if uncertainty_beta is not None:
            check_beta(uncertainty_beta, "uncertainty_beta")
        self.score, self.beta, self.uncertainty_beta = score, beta, uncertainty_beta
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        value = self.score(*args, **kwargs).detach()
        check(
            bool(value.isfinite().all()), "score", "be finite", f"{int((~value.isfinite()).sum())} values that are not"
        )
        old = self._state.get("mean")
        check(old is None or old.shape == value.shape, "score", "have one shape at every step", tuple(value.shape))
        return smoothed_score(self._state, value, self.beta, self.uncertainty_beta).clone()

    def state_dict(self) -> dict[str, Tensor]:
        """What the past left: flat tensors, `mean` and perhaps `uncertainty`; empty before the first call."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            InputError: it is not the state of such an average.
        """
        names = {"mean"} if self.uncertainty_beta is None else {"mean", "uncertainty"}
        check(set(state) in (set(), names), "state", f"hold {sorted(names)}", sorted(state))
        self._state = {name: tensor.clone() for name, tensor in state.items()}
