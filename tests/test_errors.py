"""Errors name the argument, the rule and the value."""

import pytest

from pyprune import BackendError, CheckpointError, InputError, PypruneError, UnsupportedModelError
from pyprune.base.errors import check, check_choice


def test_every_error_has_one_base():
    for error in (InputError, UnsupportedModelError, CheckpointError, BackendError):
        assert issubclass(error, PypruneError)
    assert issubclass(InputError, ValueError)


def test_check():
    check(True, "width", "be odd", 2)
    with pytest.raises(InputError, match=r"^width must be odd; got 2$"):
        check(False, "width", "be odd", 2)


def test_check_choice():
    check_choice("a", "letter", ["a", "b"])
    with pytest.raises(InputError, match=r"^scope must be one of layer, global; got 'golbal' \(nearest: global\)$"):
        check_choice("golbal", "scope", ["layer", "global"])
    with pytest.raises(InputError, match=r"^scope must be one of layer, global; got 'zzz'$"):
        check_choice("zzz", "scope", ["layer", "global"])
