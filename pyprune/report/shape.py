"""What a JSON value must look like, and one line on where it does not.

A shape is a function of a place (such as `diagnose.json: hierarchy.layers[3].kept`) and of the value there; it raises
`InputError` where the value is something else. Keys that no shape names are let through.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ..base.errors import InputError, is_count, is_finite

Shape = Callable[[str, Any], None]


def at(place: str, key: str) -> str:
    """The place of a key."""
    return f"{place} {key}" if place.endswith(":") else f"{place}.{key}"


def _refuse(place: str, rule: str, value: Any) -> None:
    raise InputError(f"{place} must {rule}; got {reprlib.repr(value)}")


def number(place: str, value: Any) -> None:
    """A finite number."""
    if not is_finite(value):
        _refuse(place, "be a finite number", value)


def positive(place: str, value: Any) -> None:
    """A finite number above 0."""
    if not (is_finite(value) and value > 0):
        _refuse(place, "be a number above 0", value)


def count(place: str, value: Any) -> None:
    """An integer of at least 0."""
    if not is_count(value):
        _refuse(place, "be an integer of at least 0", value)


def text(place: str, value: Any) -> None:
    """A string."""
    if not isinstance(value, str):
        _refuse(place, "be a text", value)


def flag(place: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        _refuse(place, "be true or false", value)


def anything(place: str, value: Any) -> None:
    """Any value."""


def maybe(shape: Shape) -> Shape:
    """The shape, or null."""

    def found(place: str, value: Any) -> None:
        if value is not None:
            shape(place, value)

    return found


def only(wanted: Any) -> Shape:
    """One value."""

    def found(place: str, value: Any) -> None:
        if value != wanted:
            _refuse(place, f"be {wanted!r}, which this version reads", value)

    return found


def many(shape: Shape, least: int = 0) -> Shape:
    """A list of at least `least` values of one shape."""

    def found(place: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) < least:
            _refuse(place, f"be a list of at least {least}" if least else "be a list", value)
        for i, entry in enumerate(value):
            shape(f"{place}[{i}]", entry)

    return found


def pair(place: str, value: Any) -> None:
    """Two finite numbers, such as an interval."""
    many(number)(place, value)
    if len(value) != 2:
        _refuse(place, "be two numbers", value)


def named(shape: Shape, least: int = 0) -> Shape:
    """An object with at least `least` entries, whose keys are names and whose values have one shape."""

    def found(place: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) < least:
            _refuse(place, f"be an object with {least} or more entries" if least else "be an object", value)
        for name, entry in value.items():
            shape(at(place, name), entry)

    return found


def counted(shape: Shape, least: int = 0) -> Shape:
    """The same, with numbers of tokens or sequences for keys."""

    def found(place: str, value: Any) -> None:
        named(shape, least)(place, value)
        for key in value:
            if not (key.isascii() and key.isdecimal() and len(key) <= 12):
                _refuse(f"{place}, each key,", "be a number of tokens or sequences", key)

    return found


def record(needed: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None) -> Shape:
    """An object with the keys `needed`, and maybe some of `optional`."""

    def found(place: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(place, "be an object", value)
        missing = [name for name in needed if name not in value]
        if missing:
            raise InputError(f"{place} must have {', '.join(missing)}; got {', '.join(list(value)[:12]) or 'nothing'}")
        for name, shape in {**needed, **(optional or {})}.items():
            if name in value:
                shape(at(place, name), value[name])

    return found
