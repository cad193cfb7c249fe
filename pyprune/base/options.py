"""Options as objects: frozen dataclasses that check themselves, each with a short form `NAME:key=value,key=value`."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

from .errors import InputError, check, check_choice

_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}


class Option:
    """Base of what the user can choose, a frozen dataclass; `str` gives its short form.

    Attributes:
        NAME: in short forms and in files.
        SUMMARY: what it does, in one line.
        SOURCE: the paper, with section; empty where there is none.
    """

    NAME: ClassVar[str]
    SUMMARY: ClassVar[str]
    SOURCE: ClassVar[str] = ""

    def values(self) -> dict[str, Any]:
        """Its fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The short form: what differs from the defaults."""
        default = {field.name: field.default for field in fields(self)}  # type: ignore[arg-type]
        return self._form({name: value for name, value in self.values().items() if value != default[name]})

    @property
    def in_full(self) -> str:
        """The short form with every field, which later defaults do not change."""
        return self._form(self.values())

    def _form(self, values: dict[str, Any]) -> str:
        parts = [f"{name}={_write(value)}" for name, value in values.items()]
        return self.NAME + (":" + ",".join(parts) if parts else "")

    @classmethod
    def keywords(cls) -> list[str]:
        """The names of its fields."""
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]


T = TypeVar("T", bound=Option)


class Registry(Generic[T]):
    """All options of one kind, by name.

    Args:
        argument: what errors call it, such as `allocation`.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self._known: dict[str, type[T]] = {}

    def add(self, option: type[T]) -> type[T]:
        """Register a class, as a decorator."""
        if option.NAME in self._known:
            raise RuntimeError(f"two options of {self.argument} are called {option.NAME!r}")
        self._known[option.NAME] = option
        return option

    def remove(self, option: type[T]) -> None:
        """Take a class out again."""
        del self._known[option.NAME]

    def __getitem__(self, name: str) -> type[T]:
        return self._known[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._known)

    def __iter__(self) -> Iterator[type[T]]:
        return iter([self._known[name] for name in self.names()])

    def help(self) -> str:
        """One line: the names with their keys, as for `--help`."""
        forms = [option.NAME + (f":{','.join(option.keywords())}" if option.keywords() else "") for option in self]
        return "; ".join(forms) + "; as NAME or NAME:key=value,key=value"

    def parse(self, value: T | str, /, **more: Any) -> T:
        """The option that `value` says, an object or a short form.

        Args:
            value: an option, or its short form.
            more: fields that win over those of `value`; text is read as in a short form.

        Raises:
            InputError: an unknown name or key, text that is no short form, or a value that breaks its rule.
        """
        if not isinstance(value, str):
            check(type(value) in self._known.values(), self.argument, "be an option or its short form", value)
            return replace(value, **self._read(type(value), more)) if more else value  # type: ignore[type-var]
        name, colon, rest = value.partition(":")
        check_choice(name, self.argument, self.names())
        option = self._known[name]
        given: dict[str, Any] = {}
        for part in re.split(r",(?=\s*\w+=)", rest) if colon else []:
            key, equals, text = part.strip().partition("=")
            check(bool(equals and text), self.argument, "be like NAME:key=value,key=value", value)
            check(key not in given, self.argument, f"give {key} once", value)
            given[key] = text
        return option(**self._read(option, {**given, **more}))

    def parse_all(self, text: str) -> list[T]:
        """Several short forms with commas between, such as `none,least-squares:damping=auto,target=0.5`.

        Raises:
            InputError: as `parse`, none at all, or one twice.
        """
        forms = [form.strip() for form in re.split(r",(?=\s*[A-Za-z][\w-]*\s*(?:[:,]|$))", text) if form.strip()]
        found = [self.parse(form) for form in forms]
        check(0 < len(found) == len(set(found)), self.argument, "be names that differ, separated by commas", text)
        return found

    def _read(self, option: type[T], given: dict[str, Any]) -> dict[str, Any]:
        for key in given:
            if key not in option.keywords():
                has = ", ".join(option.keywords()) or "none"
                raise InputError(f"{key} is no option of {self.argument} {option.NAME!r}; it has {has}")
        kinds = get_type_hints(option)
        return {k: _value(v) if isinstance(v, str) and kinds[k] is not str else v for k, v in given.items()}


def import_all(path: Iterable[str], package: str) -> None:
    """Import every module of a package, so that what registers itself there is found."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_write, value))
    return next((word for word, meaning in _WORDS.items() if value is meaning), str(value))


def _value(text: str) -> Any:
    """A number, a word for None, True or False, several of them with commas between, or else the text itself."""
    if "," in text:
        return tuple(_value(part.strip()) for part in text.split(","))
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text
