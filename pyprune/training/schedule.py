"""How many neurons are kept at which step of training."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.errors import check, is_number


def check_whole(value: object, argument: str, least: int) -> None:
    """Raise `InputError` unless `value` is an integer of at least `least`."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    check(whole, argument, f"be an integer of at least {least}", value)


@dataclass(frozen=True)
class CubicSchedule:
    """The share of neurons kept, as a function of the optimizer step t: `schedule(t)`.

    v(t) = v_f + (v_0 - v_f) * (1 - (t - t_i) / (t_f - t_i))^3 between t_i = warmup and t_f = steps - cooldown; v_0
    before, v_f after (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1; Sanh et al. 2020, arXiv 2005.07683, section 5).

    Attributes:
        keep: v_f, share of neurons kept at the end, in (0, 1].
        steps: optimizer steps of the whole training.
        warmup: steps before anything is removed.
        cooldown: steps at the end, at the final share. Scores still learn there, so neurons may still change places.
        initial: v_0, the share kept at the start, in [keep, 1].

    Raises:
        InputError: a value breaks its rule; among them a schedule that would end before it begins.
    """

    keep: float
    steps: int
    warmup: int = 0
    cooldown: int = 0
    initial: float = 1.0

    def __post_init__(self) -> None:
        check(is_number(self.keep) and 0 < self.keep <= 1, "keep", "lie in (0, 1]", self.keep)
        fits = is_number(self.initial) and self.keep <= self.initial <= 1
        check(fits, "initial", f"lie in [keep, 1] = [{self.keep}, 1]", self.initial)
        check_whole(self.steps, "steps", 1)
        check_whole(self.warmup, "warmup", 0)
        check_whole(self.cooldown, "cooldown", 0)
        rule = f"be less than steps ({self.steps}), or the schedule ends before it begins"
        check(self.warmup + self.cooldown < self.steps, "warmup + cooldown", rule, self.warmup + self.cooldown)

    @property
    def end(self) -> int:
        """t_f, the first step at which the final share is kept."""
        return self.steps - self.cooldown

    def __call__(self, step: int) -> float:
        """v(t), the share kept at step t = `step`, counted from 0."""
        if step >= self.end:
            return self.keep
        left = 1 - max(0, step - self.warmup) / (self.end - self.warmup)
        return self.keep + (self.initial - self.keep) * left**3

    def progress(self, step: int) -> float:
        """The share already removed, of all that is to be removed: (v_0 - v(t)) / (v_0 - v_f), from 0 to 1."""
        if self.initial == self.keep:
            return 1.0
        return (self.initial - self(step)) / (self.initial - self.keep)
