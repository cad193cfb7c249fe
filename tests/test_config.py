"""PruneConfig: frozen, and every rule with its message."""

import dataclasses
import json

import pytest

from pyprune import InputError, PruneConfig

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *[("keep", v, r"keep must lie in \(0, 1\]; got") for v in (0, -0.1, 1.01, NAN, INF, True, "0.5", None)],
        *[("floor", v, r"floor must lie in \[0, 1\]; got") for v in (-0.1, 1.1, NAN, "0", None)],
        *[("multiple", v, "multiple must be a positive integer; got") for v in (0, -64, 1.5, "64")],
        *[("damping", v, "damping must be positive and finite, or None; got") for v in (0, -1.0, NAN, INF, "x")],
        *[("seed", v, "seed must be a non-negative integer; got") for v in (-1, 0.5, None)],
        (
            "allocation",
            "globally",
            r"allocation must be one of uniform, .*latency; got 'globally' \(nearest: global, latency\)",
        ),
        ("compensate", "least_squares", r"compensate must be one of none, bias.*\(nearest: least-squares\)"),
        ("method", "wands", r"method must be one of .*got 'wands' \(nearest: wanda"),
        ("method", "magnitude", r"got 'magnitude' \(nearest: magnitude-l"),
    ],
)
def test_bad_value_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        PruneConfig(**{argument: value})


def test_floor_must_leave_room_for_keep_with_global_allocation():
    with pytest.raises(InputError, match=r"floor must be at most keep \(0\.2\); got 0\.5"):
        PruneConfig(keep=0.2, floor=0.5, allocation="global")
    PruneConfig(keep=0.2, floor=0.5)  # not used with allocation uniform


def test_config_is_frozen_and_plain_json():
    config = PruneConfig(keep=1, seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep = 0.5
    assert PruneConfig(**json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("method", "compensate", "needed"),
    [
        ("random", "none", False),
        ("magnitude-l2-both", "none", False),
        ("random", "bias", True),
        ("magnitude-l1-both", "least-squares", True),
        ("wanda", "none", True),
        ("flap", "none", True),
        ("activation", "none", True),
    ],
)
def test_needs_text(method, compensate, needed):
    assert PruneConfig(method=method, compensate=compensate).needs_text is needed
