"""Schedule, configuration, selection by share or threshold, and moving averages: by hand, and bad input."""

from dataclasses import fields, replace

import pytest
import torch

from pyprune import InputError
from pyprune.training import EMA, CubicSchedule, TrainingConfig, methods
from pyprune.training.ema import smooth
from pyprune.training.selection import global_widths, layer_widths, threshold_widths, top


def test_cubic_schedule_by_hand():
    schedule = CubicSchedule(keep=0.2, steps=10, warmup=2, cooldown=4)
    # between 2 and 6: 0.2 + 0.8 * (1 - k/4)^3
    want = [1.0, 1.0, 1.0, 0.2 + 0.8 * 27 / 64, 0.2 + 0.8 * 8 / 64, 0.2 + 0.8 / 64, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert [schedule(t) for t in range(11)] == pytest.approx(want)
    assert [schedule.progress(t) for t in (0, 2, 4, 6, 9)] == pytest.approx([0, 0, 7 / 8, 1, 1])
    assert schedule(6) == 0.2
    assert schedule.end == 6


def test_schedule_from_a_pruned_start_and_without_pruning():
    assert CubicSchedule(0.25, 2, initial=0.75)(0) == 0.75
    assert CubicSchedule(0.25, 2, initial=0.75)(1) == pytest.approx(0.25 + 0.5 / 8)
    still = CubicSchedule(1.0, 5)
    assert [still(t) for t in range(6)] == [1.0] * 6
    assert still.progress(0) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"warmup": 6, "cooldown": 4},
            r"warmup \+ cooldown must be less than steps \(10\), .*ends before it begins; got 10",
        ),
        ({"keep": 0.0}, r"keep must lie in \(0, 1\]; got 0.0"),
        ({"keep": 1.2}, r"keep must lie in \(0, 1\]; got 1.2"),
        ({"keep": float("nan")}, "keep must lie"),
        ({"keep": True}, "keep must lie"),
        ({"initial": 0.3}, r"initial must lie in \[keep, 1\] = \[0.5, 1\]; got 0.3"),
        ({"steps": 0}, "steps must be an integer of at least 1; got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"warmup": -1}, "warmup must be an integer of at least 0; got -1"),
        ({"cooldown": True}, "cooldown must be an integer"),
    ],
)
def test_bad_schedules(values, message):
    good = {"keep": 0.5, "steps": 10}
    with pytest.raises(InputError, match=message):
        CubicSchedule(**{**good, **values})
    with pytest.raises(InputError, match=message):
        TrainingConfig(**{**good, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "movment"}, "method must be one of .*nearest: movement"),
        ({"method": "gum:simlarity=1"}, "simlarity is no option of method 'gum'; it has .*similarity"),
        ({"method": "random:beta=0.5"}, "beta is no option of method 'random'; it has none"),
        ({"method": methods.Gum}, "method must be an option or its short form"),
        ({"scope": "model"}, "scope must be one of layer, global"),
        ({"floor": 0.6}, r"floor must lie in \[0, keep\] = \[0, 0.5\]; got 0.6"),
        ({"multiple": 0}, "multiple must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_bad_configurations(values, message):
    with pytest.raises(InputError, match=message):
        TrainingConfig(**{"keep": 0.5, "steps": 10, **values})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (methods.Movement, {"optimizer": "adamw"}, "optimizer must be one of sgd, adam"),
        (methods.MovementSoft, {"score_rate": 0}, "score_rate must be positive"),
        (methods.Gum, {"penalty": -1.0}, "penalty must be non-negative"),
        (methods.Gum, {"similarity": float("inf")}, "similarity must be non-negative and finite"),
        (methods.MovementSoft, {"threshold": 1.0}, "threshold must lie in"),
        (methods.L0, {"score_rate": 0.0}, "score_rate must be positive and finite"),
        (methods.L0, {"hold": -1.0}, "hold must be non-negative and finite"),
        (methods.L0, {"stretch": 0}, "stretch must be positive and finite"),
        (methods.L0, {"temperature": float("nan")}, "temperature must be positive and finite"),
        (methods.L0, {"initial": 1.0}, r"initial must lie in \(0, 1\); got 1.0"),
        (methods.L0, {"tolerance": 1.5}, r"tolerance must lie in \(0, 1\]; got 1.5"),
        (methods.Ema, {"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        (methods.Smoothed, {"beta": -0.1}, r"beta must lie in \[0, 1\)"),
        (methods.Platon, {"beta": 1.0}, r"^beta must lie in \[0, 1\)"),
        (methods.Platon, {"uncertainty_beta": True}, "uncertainty_beta must lie"),
        (methods.Gum, {"similarity_beta": "x"}, "similarity_beta must lie"),
        (methods.Gum, {"uniqueness_form": "loss"}, "uniqueness_form must be one of penalty, gradient"),
        (methods.Gum, {"inverted": 1}, "inverted must be true or false"),
        (methods.Gum, {"criterion": "wandda"}, "criterion must be one of .*wanda"),
        (methods.Movement, {"spread": -1.0}, "spread must be non-negative and finite"),
    ],
)
def test_bad_options(kind, values, message):
    with pytest.raises(InputError, match=message):
        kind(**values)


def test_configuration_takes_what_is_open_from_the_method():
    gum, movement, soft = (TrainingConfig(method=m, steps=3) for m in ("gum", "movement", "movement-soft"))
    assert (gum.scope, gum.method.optimizer, gum.method.penalty) == ("global", "sgd", 2.0)
    assert (movement.scope, movement.method.optimizer, movement.method.penalty) == ("layer", "sgd", 0.0)
    assert (soft.method.optimizer, soft.method.penalty) == ("adam", 10.0)
    assert TrainingConfig(steps=3) == movement
    assert TrainingConfig(method="gum:penalty=0.5", steps=3, scope="layer").scope == "layer"


@pytest.mark.parametrize("method", methods.names())
def test_configuration_goes_through_json_and_short_forms(method):
    option = methods.METHODS[method]()
    assert str(option) == method
    config = TrainingConfig(method=option, steps=7, warmup=1, keep=0.3, floor=0.1)
    assert config == TrainingConfig(method=method, steps=7, warmup=1, keep=0.3, floor=0.1)
    assert TrainingConfig.from_json(config.to_json()) == config
    for field in fields(option):  # every option is written and read with its type
        other = {float: 0.25, bool: True, str: None, type(None): "wanda"}[type(value := getattr(option, field.name))]
        other = {"sgd": "adam", "adam": "sgd", "penalty": "gradient", "taylor-neuron": "wanda"}.get(value, other)
        changed = replace(option, **{field.name: other})
        assert methods.parse(str(changed)) == changed != option
        changed = TrainingConfig(method=changed, steps=7)
        assert TrainingConfig.from_json(changed.to_json()) == changed
    with pytest.raises(InputError, match=r"key of the training configuration must be one of .*got 'kep'"):
        TrainingConfig.from_json({"steps": 7, "kep": 0.3})
    with pytest.raises(InputError, match="training configuration must have steps"):
        TrainingConfig.from_json({"keep": 0.3})


def test_every_method_says_what_it_does():
    assert methods.names() == [
        *("ema", "gum", "l0", "magnitude", "movement", "movement-soft", "platon", "random", "smoothed")
    ]
    for kind in methods.METHODS:
        assert kind.SUMMARY
        assert "arXiv" in kind.SOURCE


def test_same_share_in_every_layer():
    scores = [torch.arange(10.0), torch.arange(5.0)]
    assert layer_widths(scores, 0.5) == [5, 3]  # 2.5 rounds up
    assert layer_widths(scores, 0.01) == [1, 1]
    assert layer_widths(scores, 0.5, multiple=4) == [4, 4]
    assert layer_widths(scores, 1.0, multiple=4) == [10, 5]
    assert layer_widths(scores, 0.2, floor=0.5) == [5, 3]


def test_global_cut_takes_the_highest_anywhere():
    scores = [torch.tensor([9.0, 8.0, 7.0, 0.0]), torch.tensor([1.0, 6.0, -1.0, -2.0])]
    assert global_widths(scores, 0.5) == [3, 1]
    assert global_widths(scores, 0.25) == [1, 1]  # 9 and 8 are the highest, but no layer goes empty
    assert global_widths(scores, 0.5, floor=0.5) == [2, 2]
    assert global_widths(scores, 1.0) == [4, 4]
    assert global_widths(scores, 1e-9) == [1, 1]


def test_global_cut_in_multiples_keeps_the_total():
    scores = [torch.linspace(1, 2, 64), torch.linspace(0, 1.2, 64), torch.linspace(-1, 1.4, 64)]
    exact = global_widths(scores, 0.5)
    rounded = global_widths(scores, 0.5, multiple=16)
    assert sum(exact) == 96
    assert sum(rounded) == 96
    assert all(w % 16 == 0 for w in rounded)
    assert all(abs(a - b) < 16 for a, b in zip(exact, rounded, strict=True))
    assert global_widths(scores, 1.0, multiple=48) == [64, 64, 64]
    assert min(global_widths(scores, 0.4, floor=0.3, multiple=16)) >= 32  # 0.3 * 64 = 19.2, up to a multiple


def test_threshold_on_sigmoids():
    scores = [torch.tensor([0.0, -3.0, 2.0]), torch.tensor([-9.0, -8.0, -7.0])]
    assert threshold_widths(scores, 0.5) == [1, 1]  # sigmoid(0) is not above one half
    assert threshold_widths(scores, 0.1) == [2, 1]
    assert threshold_widths(scores, 0.0) == [3, 3]


def test_top_breaks_ties_by_number():
    assert top(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


def test_moving_average_by_hand():
    values = iter([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])])
    smoothed = EMA(lambda: next(values), beta=0.75)
    assert smoothed().tolist() == [1.0, 0.0]
    assert smoothed().tolist() == [0.75, 2.0]
    state: dict = {}
    assert smooth(state, "x", torch.tensor(2.0), 0.5) == 1.0
    assert smooth(state, "x", torch.tensor(2.0), 0.5) == state["x"] == 1.5


def test_uncertainty_by_hand():
    values = iter([torch.tensor(4.0), torch.tensor(8.0)])
    platon = EMA(lambda: next(values), beta=0.5, uncertainty_beta=0.75)
    # mean 2, uncertainty (4 - 2) / 4 = 0.5; then mean 5, uncertainty 0.75 * 0.5 + (8 - 5) / 4 = 1.125
    assert [float(platon()), float(platon())] == [1.0, 5.625]


def test_moving_average_goes_on_from_its_state():
    def score(x):
        return x.abs()

    one, other = EMA(score, 0.9, 0.5), EMA(score, 0.9, 0.5)
    one(torch.tensor([1.0, -2.0]))
    other.load_state_dict(one.state_dict())
    x = torch.tensor([3.0, 5.0])
    assert torch.equal(one(x), other(x))


def test_moving_average_refuses():
    with pytest.raises(InputError, match="beta must lie in"):
        EMA(torch.abs, beta=1.0)
    with pytest.raises(InputError, match="uncertainty_beta must lie in"):
        EMA(torch.abs, uncertainty_beta=-0.1)
    average = EMA(torch.abs)
    with pytest.raises(InputError, match="score must be finite; got '1 values"):
        average(torch.tensor([1.0, float("nan")]))
    average(torch.ones(2))
    with pytest.raises(InputError, match="score must have one shape"):
        average(torch.ones(3))
    with pytest.raises(InputError, match="state must hold"):
        average.load_state_dict({"mean": torch.ones(2), "uncertainty": torch.ones(2)})
