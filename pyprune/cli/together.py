"""Verbs that several processes of a launcher (`torchrun`) do together: only the first writes and prints."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from ..base.ranks import joining, launched
from .options import choose_device
from .screen import err, out


def together(function: Callable[..., None]) -> Callable[..., None]:
    """A verb with the option `device`, run by every process in one group; an error that all know is printed once."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if launched() == 1:
            function(*args, **kwargs)
            return
        with joining(choose_device(kwargs["device"])) as ranks:
            if ranks.rank == 0:
                function(*args, **kwargs)
                return
            quiet, out.quiet, err.quiet = (out.quiet, err.quiet), True, True
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(*args, **kwargs)
            finally:
                out.quiet, err.quiet = quiet

    wrapped.together = True  # type: ignore[attr-defined]
    return wrapped
