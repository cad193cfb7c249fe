"""Options as objects: frozen dataclasses that check themselves, with strings as short forms, `NAME[:key=value,...]`.

`parse("gum:similarity=0.5,optimizer=adam", METHODS, "method")` is `Gum(similarity=0.5, optimizer="adam")`, and `str`
of that gives the text back. A value is read by the type of its field: whole or decimal numbers, `true`, `false`,
`none`, plain text, or several of them with commas between (`protect=1,2`). Text may hold `:` and `=`, but no `,key=`.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from .errors import InputError, check, check_choice

_PLAIN = {"none": None, "true": True, "false": False}


@dataclass(frozen=True)
class Option:
    """Base of options: a subclass is a frozen dataclass that checks its fields when it is made.

    Attributes:
        NAME: what short forms call it.
    """

    NAME: ClassVar[str] = ""

    def __str__(self) -> str:
        """The short form: the fields that differ from their defaults."""
        return self._text([f.name for f in fields(self) if getattr(self, f.name) != f.default])

    @property
    def in_full(self) -> str:
        """The short form with every field, which later defaults do not change."""
        return self._text([f.name for f in fields(self)])

    def _text(self, names: list[str]) -> str:
        values = [f"{name}={_written(getattr(self, name))}" for name in names]
        return self.NAME + (":" + ",".join(values) if values else "")


AnOption = TypeVar("AnOption", bound=Option)


def parse(text: str | AnOption, table: Mapping[str, type[AnOption]], what: str) -> AnOption:
    """The option that the short form `text` means; an option is given back as it is.

    Args:
        text: the short form.
        table: the classes there are, by name.
        what: what the option is for, in errors: `method`, `allocation`.

    Raises:
        InputError: an unknown name or key (with the nearest ones), no `key=value`, a key twice, a value that is not of
            its field's type or breaks its rule.
    """
    if isinstance(text, Option):
        kinds = tuple(table.values())
        check(isinstance(text, kinds), what, f"be one of {', '.join(sorted(table))}", text)
        return text
    check(isinstance(text, str), what, "be an object of options, or its short form NAME[:key=value,...]", text)
    name, _, rest = text.partition(":")
    check_choice(name, what, sorted(table))
    values: dict[str, str] = {}
    for item in re.split(r",(?=\w+=)", rest) if rest else ():
        key, equals, value = item.partition("=")
        check(bool(equals), f"{what} {text!r}", "be NAME[:key=value,...]", item)
        check(key not in values, f"{what} {text!r}", "give each key once", key)
        values[key] = value
    kind = table[name]
    read = _read_all(kind, what, values)
    for field in fields(kind):
        open_ = field.init and field.default is MISSING and field.default_factory is MISSING
        check(not open_ or field.name in read, f"{what} {text!r}", f"be given {field.name}=...", text)
    return kind(**read)


def with_values(option: AnOption, what: str, values: Mapping[str, Any]) -> AnOption:
    """`option` with other `values` of its fields; strings are read as in short forms.

    Raises:
        InputError: it has no such field, or a value is not of the field's type or breaks its rule.
    """
    return replace(option, **_read_all(type(option), what, values))


def _read_all(kind: type[Option], what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the fields of `kind` have them."""
    hints = _hints(kind)
    what = f"{what} {kind.NAME!r}"
    for key in values:
        check(bool(hints), what, "have no options", key)
        check_choice(key, f"option of {what}", hints)
    return {k: _read(v, hints[k], f"{k} of {what}") if isinstance(v, str) else v for k, v in values.items()}


def _hints(kind: type[Option]) -> dict[str, Any]:
    known = typing.get_type_hints(kind)
    return {f.name: known[f.name] for f in fields(kind) if f.init}


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    return next((word for word, plain in _PLAIN.items() if value is plain), str(value))


def _read(text: str, hint: Any, argument: str) -> Any:
    """`text` as the first of the types in `hint` that it can be; plain text comes last."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in sorted(kinds, key=lambda k: k is str):
        if kind in (bool, type(None)):
            if text in _PLAIN and isinstance(_PLAIN[text], kind):
                return _PLAIN[text]
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            items = text.split(",")
            if len(inner) == 2 and inner[1] is Ellipsis:
                inner = (inner[0],) * len(items)
            if len(items) == len(inner):
                return tuple(_read(item, one, argument) for item, one in zip(items, inner, strict=True))
        else:
            try:
                return kind(text)
            except ValueError:
                pass
    named = " or ".join("none" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds)
    raise InputError(f"{argument} must be {named}; got {text!r}")
