"""Methods of pruning during training. One method a file; a file dropped in here is found."""

from __future__ import annotations

import importlib
import pkgutil

from ...base.errors import check_choice
from .base import METHODS, Gathered, Method, Moment, State, method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Gathered", "Method", "Moment", "State", "get", "method", "names"]


def names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted(METHODS)


def get(name: str) -> type[Method]:
    """The method called `name`.

    Raises:
        InputError: unknown name; the message has the nearest ones.
    """
    check_choice(name, "method", names())
    return METHODS[name]
