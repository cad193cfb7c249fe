"""Errors that a user can meet. Each message names the argument, the rule and the value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class PypruneError(Exception):
    """Base of every error that pyprune raises on purpose."""


class InputError(PypruneError, ValueError):
    """A value given by the caller breaks a rule. The command line exits with 2."""


class UnsupportedModelError(PypruneError):
    """The model's FFNs are of a shape that pyprune cannot prune."""


class CheckpointError(PypruneError):
    """A checkpoint is corrupt, foreign, or does not fit its own configuration."""


class RecoverError(PypruneError):
    """Training made a pruned model no better, so there is nothing to write."""


class BackendError(PypruneError):
    """No backend, or not the forced one, can run a problem."""


def check(condition: bool, argument: str, rule: str, value: Any) -> None:
    """Raise `InputError` naming `argument`, `rule` and `value` unless `condition` holds."""
    if not condition:
        raise InputError(f"{argument} must {rule}; got {value!r}")


def check_choice(value: str, argument: str, choices: Iterable[str]) -> None:
    """Raise `InputError` with the nearest names unless `value` is one of `choices`."""
    names = list(choices)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.4)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise InputError(f"{argument} must be one of {', '.join(names)}; got {value!r}{hint}")


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of another library says, as one line of at most `most` characters; its type if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether `value` is a number, neither NaN nor infinite."""
    return is_number(value) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether `value` is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
