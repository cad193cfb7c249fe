"""Methods of pruning during training, each an object of its options. One a file; a file dropped in here is found.

>>> from pyprune.training.methods import Gum, parse
>>> parse("gum:similarity=0.5,optimizer=adam") == Gum(similarity=0.5, optimizer="adam")
True
"""

from __future__ import annotations

from ...base.options import import_all
from .base import METHODS, Gathered, Method, Moment, State
from .ema import Ema
from .gum import Gum
from .l0 import L0
from .magnitude import Magnitude
from .movement import Movement
from .movement_soft import MovementSoft
from .platon import Platon
from .random import Random
from .smoothed import Smoothed

import_all(__path__, __name__)

__all__ = [
    "L0",
    "METHODS",
    "Ema",
    "Gathered",
    "Gum",
    "Magnitude",
    "Method",
    "Moment",
    "Movement",
    "MovementSoft",
    "Platon",
    "Random",
    "Smoothed",
    "State",
    "names",
    "parse",
]


def names() -> list[str]:
    """The names of all methods, sorted."""
    return METHODS.names()


def parse(method: str | Method) -> Method:
    """The method that a short form means, as `gum` or `gum:similarity=0.5`; a method is given back as it is.

    Raises:
        InputError: an unknown name or option (the message has the nearest ones), or a value that breaks its rule.
    """
    return METHODS.parse(method)
