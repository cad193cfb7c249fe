"""The latency table: what it predicts, how whole steps calibrate it, and the widths that meet a target."""

import dataclasses
import importlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import InputError, accelerate
from pyprune.ffn.mlp import PrunedMLP
from pyprune.model.families import find_ffns
from pyprune.pruning.allocation.by_latency import choose_widths
from pyprune.pruning.sensitivity import SensitivityCurves
from pyprune.speed import latency
from pyprune.speed.latency import LatencyTable, Workload, factors, measure, part, rising


def make_table(sizes=(8, 8), widths=(2, 4, 6, 8), alone=(1.0, 2.0, 3.0, 4.0), step=20.0, **more):
    values = {"machine": {"cpu": "none"}, "workload": Workload(), "hidden_size": 4, "anchors": {}, "factors": {}}
    return LatencyTable(sizes=sizes, widths=widths, alone=alone, step=step, plain=30.0, **{**values, **more})


def make_curves(sizes, losses, widths=None):
    widths = widths or tuple((size // 2,) for size in sizes)
    rows = {"widths": widths, "losses": tuple((value,) for value in losses)}
    return SensitivityCurves(kind="loss", sizes=tuple(sizes), tokens=10, fingerprint="f", **rows)


def test_predictions_by_hand():
    table = make_table()
    assert table.rest == 12.0
    assert table.predict([8, 8]) == 20.0
    assert table.predict([2, 6]) == 16.0
    assert table.predict([3, 5]) == 16.0  # 1.5 + 2.5, between the table's widths
    assert table.speedup([2, 2]) == pytest.approx(20 / 14)
    assert table.largest() == pytest.approx(20 / 14)
    assert table.largest([8, 4]) == pytest.approx(20 / 18)


def test_calibrated_by_hand():
    # At width 4 two FFNs alone save 4 s, the model saved 6; at width 2 alone 6, the model 6.
    sizes, widths, alone = (8, 8), (2, 4, 6, 8), (1.0, 2.0, 3.0, 4.0)
    found = factors(sizes, widths, alone, {4: 14.0, 2: 14.0}, 20.0)
    assert found == {4: 1.5, 2: 1.0}
    table = make_table(factors=found)
    assert table.predict([4, 4]) == pytest.approx(14.0)
    assert table.predict([2, 2]) == pytest.approx(14.0)
    assert table.cost(3) == pytest.approx(4 - 1.25 * 2.5)  # the factor half-way between
    assert table.cost(6) == pytest.approx(4 - 1.5 * 1.0)  # beyond the last anchor its factor
    assert table.predict([8, 8]) == 20.0


def test_layers_of_different_width():
    # The second layer has 4 neurons only: at anchor 6 it saves nothing.
    assert factors((8, 4), (4, 6, 8), (2.0, 3.0, 4.0), {6: 18.5}, 20.0) == {6: 1.5}
    table = make_table(sizes=(8, 4))
    assert table.rest == 14.0
    assert table.predict([6, 2]) == 18.0
    assert choose_widths(make_curves((8, 4), (1.0, 100.0)), table, 20 / 18) == [4, 4]


def test_a_factor_that_only_noise_can_explain_is_limited():
    alone = ((8,), (4, 8), (1.0, 2.0))
    assert factors(*alone, {4: 25.0}, 20.0) == {4: 0.5}
    assert factors(*alone, {4: 5.0}, 20.0) == {4: 2.0}
    assert factors((8,), (4, 8), (2.0, 2.0), {4: 19.0}, 20.0) == {4: 1.0}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rising(values):
    found = rising(values)
    assert len(found) == len(values)
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    assert rising(found) == found


def test_rising_by_hand():
    assert rising([1.0, 3.0, 2.0, 5.0]) == [1.0, 2.5, 2.5, 5.0]
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_widths_that_meet_a_target_lose_least():
    table = make_table()
    # 4 s must go: from the first layer alone they cost less than shared out.
    assert choose_widths(make_curves((8, 8), (0.001, 10.0)), table, 20 / 17) == [2, 8]
    assert sum(choose_widths(make_curves((8, 8), (1.0, 1.0)), table, 20 / 16)) == 8
    assert choose_widths(make_curves((8, 8), (1.0, 1.0)), table, 1.0) == [8, 8]
    assert choose_widths(make_curves((8, 8), (1.0, 1.0)), table, table.largest()) == [2, 2]
    assert choose_widths(make_curves((8, 8), (1.0, 10.0)), table, 20 / 18, protect=(1, 0)) == [8, 4]
    assert choose_widths(make_curves((8, 8), (0.001, 10.0)), table, 20 / 17, floor=0.5) == [4, 6]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_promise_holds_by_the_table(data):
    layers = data.draw(st.integers(1, 6))
    widths = tuple(range(8, 65, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    alone = tuple(torch.rand(8, generator=generator).double().cumsum(0).add(0.1).tolist())
    table = make_table(
        (64,) * layers, widths, alone, step=1.5 * layers * alone[-1], factors={8: 1.2, 32: 0.9}, anchors={}
    )
    curves = make_curves((64,) * layers, torch.rand(layers, generator=generator).tolist())
    target = 1 + (table.largest() - 1) * data.draw(st.floats(0, 1))
    chosen = choose_widths(curves, table, target)
    assert set(chosen) <= set(widths)
    assert table.speedup(chosen) >= target * (1 - 1e-9)
    # No single layer can grow by one step within the target: widths are not given away.
    for i, width in enumerate(chosen):
        wider = [*chosen[:i], width + 8, *chosen[i + 1 :]]
        if width < 64 and curves.at(i, [width])[0] > curves.at(i, [width + 8])[0]:
            assert table.speedup(wider) < target * (1 + 1e-3)


@pytest.mark.parametrize("target", [0.9, 0.0, -1.0, math.inf, math.nan])
def test_a_target_that_is_none(target):
    with pytest.raises(InputError, match="target_speedup must be a number of at least 1"):
        choose_widths(make_curves((8, 8), (1.0, 1.0)), make_table(), target)


def test_an_unreachable_target_says_the_largest():
    curves, table = make_curves((8, 8), (1.0, 1.0)), make_table()
    with pytest.raises(InputError, match=r"target_speedup must be at most 1\.428, the largest .*; got 1\.5"):
        choose_widths(curves, table, 1.5)
    with pytest.raises(InputError, match=r"at most 1\.250"):
        choose_widths(curves, table, 1.3, floor=0.5)
    with pytest.raises(InputError, match=r"at most 1\.000"):
        choose_widths(curves, table, 1.1, protect=(1, 1))


def test_a_table_of_another_model_is_refused():
    with pytest.raises(InputError, match=r"table must be of a model with widths \[8, 6\]"):
        choose_widths(make_curves((8, 6), (1.0, 1.0)), make_table(), 1.1)
    with pytest.raises(InputError, match="widths must be given for 2 layers; got 3"):
        make_table().predict([8, 8, 8])
    with pytest.raises(InputError, match="widths must be at most F of the layer"):
        make_table(sizes=(8, 4)).predict([8, 8])
    with pytest.raises(InputError, match=r"width must lie in \[2, 8\], the table's; got 1"):
        make_table().predict([1, 8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": math.nan}, "seconds must be positive and finite"),
        ({"alone": (1.0, 2.0, math.inf, 4.0)}, "seconds must be positive and finite"),
        ({"alone": (0.0, 2.0, 3.0, 4.0)}, "seconds must be positive"),
        ({"alone": (1.0, 2.0)}, "alone must be 4 numbers; got 2"),
        ({"widths": (4, 2, 6, 8)}, "widths must be positive and ascend"),
        ({"sizes": (9, 8)}, "widths must end with 9; got 8"),
        ({"step": 5.0}, "step must be more than the 6 s that its FFNs can save; got 5"),
        ({"sizes": ()}, "sizes must hold at least one layer"),
    ],
)
def test_tables_that_break_a_rule(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(make_table(), **change)


def test_a_table_survives_json():
    table = make_table(anchors={4: 15.0}, factors={4: 1.25}, workload=Workload("prefill", 64, weights="bfloat16"))
    again = LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    for damage in ({"sizes": 3}, {"workload": {"speed": 1}}, {"factors": {"x": 1.0}}, {"more": 1}):
        with pytest.raises(InputError, match="table must be as `to_json` gives it"):
            LatencyTable.from_json({**table.to_json(), **damage})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sleep"}, "kind must be one of decode, prefill"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"weights": "float3"}, "weights must be one of"),
    ],
)
def test_workloads_that_break_a_rule(options, message):
    with pytest.raises(InputError, match=message):
        Workload(**options)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_part_computes_its_neurons_over_the_same_memory(name, weights, tiny):
    model = tiny(name)
    accelerate(model, weights=weights)
    module = next(m for m in model.modules() if isinstance(m, PrunedMLP))
    parts = [part(module, 0, 40), part(module, 40, 96)]
    assert parts[1].record.data_ptr() == module.record[40:].data_ptr()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        total = sum(p(x) for p in parts)
        if module.down_bias is not None:
            total = total - module.down_bias  # both parts have added it
        torch.testing.assert_close(total, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "workload"),
    [
        ("llama", Workload(prompt_tokens=4, new_tokens=3)),
        ("opt", Workload(tokens=2, prompt_tokens=4, new_tokens=3, weights="bfloat16")),
        ("gpt2", Workload("prefill", 8)),
    ],
)
def test_a_real_measurement_is_plausible_and_changes_nothing(name, workload, tiny, ids):
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    places = [parameter.data_ptr() for parameter in model.parameters()]
    stages = []
    table = measure(model, [16, 32, 64], workload, 1, lambda stage, done, total: stages.append((stage, done, total)))
    assert table.widths == (16, 32, 64, 96)
    assert table.sizes == (96, 96, 96)
    assert set(table.anchors) == set(table.factors) == {16, 32, 64}
    assert all(0.5 <= f <= 2 for f in table.factors.values())
    assert 0 < table.alone[0] <= table.alone[-1] < 1
    assert table.predict([96] * 3) == pytest.approx(table.step)
    assert {stage for stage, _, _ in stages} == {"timing whole steps", "timing FFNs of every width"}
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    find_ffns(model)  # not accelerated
    LatencyTable.from_json(json.loads(json.dumps(table.to_json())))


def test_steps_at_a_width_run_only_its_neurons(tiny):
    model = tiny("llama")
    fast = latency.measuring._accelerated(model, None)
    seen = []

    def job():
        with torch.no_grad():
            seen.append(fast(torch.arange(5)[None]).logits)
        return [1.0]

    latency.measuring._at_width(fast, 32, job)()
    assert [module for module in fast.modules() if "forward" in vars(module)] == []
    with torch.no_grad():
        for ffn in find_ffns(model):
            ffn.weights().down[32:] = 0.0
        torch.testing.assert_close(seen[0], model(torch.arange(5)[None]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "repeats", "message"),
    [
        ([], 1, "widths must be one or more"),
        ([0, 8], 1, r"widths must be one or more numbers in \[1, 96\]; got \[0\]"),
        ([97], 1, r"got \[97\]"),
        ([8.5], 1, r"got \[8\.5\]"),
        ([8], 0, "repeats must be at least 1"),
    ],
)
def test_bad_input(widths, repeats, message, tiny):
    with pytest.raises(InputError, match=message):
        measure(tiny("llama"), widths, None, repeats)


def test_a_model_in_training_mode_is_refused(tiny):
    with pytest.raises(InputError, match="model must be in eval mode"):
        measure(tiny("llama").train(), [8])


def test_with_a_fake_clock_the_model_is_found_again(tiny, monkeypatch):
    # Alone an FFN costs 1 ms + 1 us a neuron; in the model neurons cost 1.5 times as much, and the rest 10 ms.
    def decode(model, prompt, steps):
        def job():
            neurons = [m.forward.__self__.intermediate_size for m in model.modules() if isinstance(m, PrunedMLP)]
            return [10e-3 + sum(1e-3 + 1.5e-6 * n for n in neurons)] * 3 if neurons else [20e-3]

        return job

    monkeypatch.setattr(latency.table, "Decode", decode)
    monkeypatch.setattr(latency.measuring, "_alone", lambda modules, width, x: lambda: [1e-3 + 1e-6 * width])
    table = measure(tiny("llama"), [16, 32, 48, 64, 80], None, 1)
    assert table.plain == 20e-3
    assert table.step == pytest.approx(13e-3 + 3 * 96 * 1.5e-6)
    assert list(table.factors.values()) == pytest.approx([1.5] * len(table.factors))
    assert table.predict([16, 40, 96]) == pytest.approx(13e-3 + 152 * 1.5e-6)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # as when the script is run
    return importlib.import_module("bench.model.latency_aware")


def test_promised_against_measured_by_hand(bench):
    found = {"plain": [4.0] * 4, "dense": [3.0, 3.0, 3.2, 3.2], "1.5": [2.0, 2.0, 2.0, 2.0]}
    entry = bench.compare(found, 2, {"1.5": 1.5})["1.5"]
    assert entry["measured"] == pytest.approx(1.55)
    assert entry["error"] == pytest.approx(1.55 / 1.5 - 1)
    assert entry["over_plain"] == 2.0
    assert entry["measured_spread"]["p50"] == pytest.approx(1.55)  # of the rounds 1.5 and 1.6
    assert entry["step_ms"]["p50"] == 2000.0


def test_the_bench_runs_and_its_table_can_be_made(bench, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(
        model=str(tiny_checkpoint),
        targets="1",
        tokens=512,
        evaluation_tokens=128,
        window=32,
        repeats=1,
        rounds=2,
        batch=2,
        multiple=32,
        **{"text": None, "method": "wanda", "dtype": "float32", "weights": None},
        **{"workload": "decode", "device": "cpu", "name": "result"},
    )
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["rows"]
    assert row["promised"] >= 1
    assert row["measured"] > 0
    assert row["keep"] == sum(row["widths"]) / 288
    LatencyTable.from_json(result["table"])
    lines = importlib.import_module("bench.tables.latency_aware").latency_aware_table(result)
    assert lines[0].startswith("tiny-llama, decode, 2 at once, float32: a step of the accelerated dense model takes")
    assert lines[-1].startswith(f"| 1.00x | {row['promised']:.3f}x | {row['measured']:.3f}x (")


def test_the_bench_refuses_a_target_below_one(bench):
    with pytest.raises(typer.Exit):
        bench.main(targets="0.5,1.2")
