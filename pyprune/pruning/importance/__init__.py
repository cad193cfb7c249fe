"""Importance criteria: a score per neuron, higher = keep. One criterion a file; a file dropped in here is found."""

from __future__ import annotations

import importlib
import pkgutil

from ...base.errors import check_choice
from .base import CRITERIA, Criterion, criterion

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["CRITERIA", "Criterion", "criterion", "get", "names"]


def names() -> list[str]:
    """The names of all criteria, sorted."""
    return sorted(CRITERIA)


def get(name: str) -> Criterion:
    """The criterion called `name`.

    Raises:
        InputError: unknown name; the message has the nearest ones.
    """
    check_choice(name, "method", names())
    return CRITERIA[name]
