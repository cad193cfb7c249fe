"""JSON that knows where it came from: objects and lists with their places, and a trail of what was read last.

The files of a report were written by this package, so nothing checks them value by value. What a figure cannot use
shows when the figure is made, and `named` turns that into one line with the file and the place.
"""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any, TypeVar

from ..base.errors import InputError, one_line

Made = TypeVar("Made")
# What wrong values raise in code that takes them for granted; the last two are of `next` on nothing.
_WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration, RuntimeError)


class Trail:
    """What was read last: its place, such as `diagnose.json: hierarchy.layers[3].kept`, and its value."""

    def __init__(self) -> None:
        self.place, self.value = "", None

    def at(self, place: str, value: Any) -> Any:
        """Remember `value`, and give it back."""
        self.place, self.value = place, value
        return value


class Object(dict[str, Any]):
    """A JSON object."""

    def __init__(self, entries: dict[str, Any], place: str, trail: Trail) -> None:
        super().__init__(entries)
        self._place, self._trail = place, trail

    def __getitem__(self, key: str) -> Any:
        return self._trail.at(below(self._place, key), super().__getitem__(key))

    def __missing__(self, key: str) -> Any:
        known = ", ".join(list(self)[:12]) or "nothing"
        raise InputError(f"{self._place} must have {key}; got {known}")

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict; what is there is remembered."""
        return self._trail.at(below(self._place, key), super().__getitem__(key)) if key in self else default

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]  # the views of a mapping ask `__getitem__`
        """As of a dict."""
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """As of a dict."""
        return ValuesView(self)


class Items(list[Any]):
    """A JSON list."""

    def __init__(self, entries: list[Any], place: str, trail: Trail) -> None:
        super().__init__(entries)
        self._place, self._trail = place, trail

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return super().__getitem__(index)
        if not -len(self) <= index < len(self):
            raise InputError(f"{self._place} must have an entry {index}; got {len(self)}")
        return self._trail.at(f"{self._place}[{index}]", super().__getitem__(index))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def below(place: str, key: str) -> str:
    """The place of a key."""
    return f"{place} {key}" if place.endswith(":") else f"{place}.{key}"


def traced(value: Any, place: str, trail: Trail) -> Any:
    """The same JSON with places, and texts without what no page can show: control characters, halves of a pair."""
    if isinstance(value, dict):
        entries = {traced(k, place, trail): traced(v, below(place, k), trail) for k, v in value.items()}
        return Object(entries, place, trail)
    if isinstance(value, list):
        return Items([traced(entry, f"{place}[{i}]", trail) for i, entry in enumerate(value)], place, trail)
    if isinstance(value, str):
        bad = {c for c in set(value) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff"}
        return "".join("\ufffd" if c in bad else c for c in value) if bad else value
    return value


def named(trail: Trail, make: Callable[[], Made]) -> Made:
    """What `make` makes of traced JSON.

    Raises:
        InputError: it cannot be made; the message has the place that was read last, and what is there.
    """
    try:
        return make()
    except InputError:
        raise
    except _WRONG as error:
        message = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(
            f"{trail.place} must be what this version of pyprune writes; got {reprlib.repr(trail.value)} ({message})"
        ) from error
