"""Short forms of options: what they mean, that they go round, and what is refused."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from pyprune import InputError
from pyprune.base.errors import check
from pyprune.base.options import Option, parse, with_values


@dataclass(frozen=True)
class Fit(Option):
    NAME: ClassVar[str] = "fit"
    damping: float | str = 0.01
    rounds: int = 1
    fast: bool = False
    kind: str | None = None
    ends: tuple[int, int] = (0, 0)
    workloads: tuple[str, ...] = ("decode:1",)

    def __post_init__(self):
        check(self.rounds > 0, "rounds", "be positive", self.rounds)


@dataclass(frozen=True)
class Bare(Option):
    NAME: ClassVar[str] = "bare"


@dataclass(frozen=True)
class Aim(Option):
    NAME: ClassVar[str] = "aim"
    target: float


TABLE = {kind.NAME: kind for kind in (Fit, Bare, Aim)}


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("fit", Fit()),
        ("bare", Bare()),
        ("fit:damping=auto", Fit(damping="auto")),
        ("fit:damping=0.1,rounds=3", Fit(damping=0.1, rounds=3)),
        ("fit:fast=true,kind=fisher", Fit(fast=True, kind="fisher")),
        ("fit:kind=a:b=c", Fit(kind="a:b=c")),
        (
            "fit:ends=1,2,workloads=decode:1:int8,prefill:512",
            Fit(ends=(1, 2), workloads=("decode:1:int8", "prefill:512")),
        ),
        ("aim:target=1.3", Aim(1.3)),
    ],
)
def test_short_forms_go_round(text, option):
    assert parse(text, TABLE, "repair") == option
    assert parse(option, TABLE, "repair") is option
    if text != "aim:target=1.3":
        assert str(option) == text
    assert parse(option.in_full, TABLE, "repair") == option
    assert parse(str(option), TABLE, "repair") == option


def test_in_full_holds_what_is_left_open():
    assert Fit(rounds=2, fast=True).in_full == (
        "fit:damping=0.01,rounds=2,fast=true,kind=none,ends=0,0,workloads=decode:1"
    )
    assert parse("fit:kind=none,fast=false", TABLE, "repair") == Fit()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fti", "repair must be one of aim, bare, fit; got 'fti' .nearest: fit"),
        ("", "repair must be one of"),
        (3, "repair must be an object of options, or its short form"),
        ("fit:damp=1", "option of repair 'fit' must be one of damping, .*got 'damp' .nearest: damping"),
        ("bare:damping=1", "repair 'bare' must have no options; got 'damping'"),
        ("fit:fast", "repair 'fit:fast' must be NAME.*; got 'fast'"),
        ("fit:rounds=1,rounds=2", "must give each key once; got 'rounds'"),
        ("fit:rounds=1.5", "rounds of repair 'fit' must be int; got '1.5'"),
        ("fit:fast=1", "fast of repair 'fit' must be bool; got '1'"),
        ("fit:ends=1", "ends of repair 'fit' must be .*; got '1'"),
        ("fit:rounds=0", "rounds must be positive; got 0"),
        ("aim", "repair 'aim' must be given target="),
    ],
)
def test_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse(text, TABLE, "repair")


def test_an_option_of_another_table_is_refused():
    with pytest.raises(InputError, match="allocation must be one of bare; got Fit"):
        parse(Fit(), {"bare": Bare}, "allocation")


def test_with_values_reads_text_and_takes_objects():
    assert with_values(Fit(), "repair", {"damping": "auto", "ends": (1, 0)}) == Fit(damping="auto", ends=(1, 0))
    with pytest.raises(InputError, match="repair 'bare' must have no options; got 'floor'"):
        with_values(Bare(), "repair", {"floor": 0.1})
