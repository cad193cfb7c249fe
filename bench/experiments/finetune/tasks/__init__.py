"""Tasks by name; each is a file with `load(data, lexical) -> Task`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import e2e, g2p, wikitext
from .base import Example, Task

TASKS: dict[str, Callable[[Path | None, bool], Task]] = {"e2e": e2e.load, "g2p": g2p.load, "wikitext": wikitext.load}

__all__ = ["TASKS", "Example", "Task"]
