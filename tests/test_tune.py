"""Tuning on this machine's CPU: what is timed, checked, written and taken up again, and what `auto` does afterwards."""

import dataclasses
import itertools
import json
import os
import time
import types
import weakref

import pytest
import torch
from moe_cases import make_mixture
from typer.testing import CliRunner

from pyprune import PrunedMLP, accelerate
from pyprune.base import reference
from pyprune.base.errors import BackendError, InputError, UnsupportedModelError
from pyprune.cli.commands import app
from pyprune.ffn import backends, contest, contest_experts, dispatch, first_use, native, tune, tuned
from pyprune.model.families import find_ffns

PLAIN = {"gated": False, "activation": "relu", "dtype": torch.float32}
GATED = {"gated": True, "activation": "silu", "dtype": torch.float32}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "cache"))
    tuned.reload()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tuned.reload()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Little memory, and Triton's interpreter left out: it runs here, but its speed says nothing."""
    monkeypatch.setattr(contest, "CAREFUL", contest.Effort(copy_bytes=1 << 16, sample=1e-4))
    monkeypatch.setattr(dispatch.backends()["triton"], "why_not", lambda problem: "is asleep")
    dispatch.choose.cache_clear()


@pytest.fixture
def fake_clock(monkeypatch):
    """`fake_clock(seconds)`: time passes only in backends, as `seconds(backend, config, tokens)` says."""

    def install(seconds):
        passed = [0.0]
        for name, backend in dispatch.backends().items():
            run = backend.run

            def slow(x, record, config=None, batch_invariant=False, name=name, run=run):
                passed[0] += seconds(name, config, len(x))
                return run(x, record)

            monkeypatch.setattr(backend, "run", slow)
        monkeypatch.setattr(contest, "clock", lambda device: lambda: passed[0])

    return install


@pytest.fixture
def native_library(monkeypatch):
    """The native kernel as there, whether or not it was built; the reference computes for it."""
    cpu, torch_backend = dispatch.backends()["cpu"], dispatch.backends()["torch"]
    monkeypatch.setattr(cpu, "why_not", lambda problem: "needs a CPU" if problem.device != "cpu" else None)
    run = torch_backend.run
    monkeypatch.setattr(cpu, "run", lambda x, record, config=None, batch_invariant=False: run(x, record))
    tuned.reload()


def test_problems_of_a_layer():
    found = tune.layer_problems(32, 96, **GATED)
    assert [p.tokens for p in found] == [1, 2, 4, 8, 16, 32, 64, 128, 512]
    assert {(p.intermediate_size, p.kept, p.gather) for p in found} == {(96, 96, False)}
    assert [p.tokens for p in tune.layer_problems(32, 96, **GATED, device="cuda")][-1] == 8192
    one = tune.layer_problems(32, 96, **GATED, keep=0.5, tokens=[3], weights=torch.int8)
    assert one == [backends.Problem("cpu", torch.float32, 3, 32, 48, 48, True, False, "silu", torch.int8)]
    (one,) = tune.layer_problems(32, 96, **GATED, keep=0.5, tokens=[3], mode="gather")
    assert (one.intermediate_size, one.kept, one.gather) == (96, 48, True)
    (one,) = tune.layer_problems(32, 96, **GATED, keep=1e-9, tokens=[3], mode="gather")
    assert one.kept == 1


def test_problems_of_a_model(tiny):
    found = tune.model_problems(tiny("gpt2"), tokens=[1, 8])
    assert {(p.gated, p.activation, p.hidden_size, p.kept, p.tokens) for p in found} == {
        (False, "gelu_tanh", 32, 96, 1),
        (False, "gelu_tanh", 32, 96, 8),
    }
    with pytest.raises(UnsupportedModelError):
        tune.model_problems(torch.nn.Linear(2, 2))


def test_experts_of_a_model_are_problems_on_a_gpu():
    model = make_mixture("deepseek_v3")
    found = tune.model_problems(model, tokens=[1, 4], device="cuda", keep=0.5, mode="gather")
    mixed = [p for p in found if p.experts]
    assert {(p.experts, p.picked, p.hidden_size, p.intermediate_size, p.kept, p.tokens) for p in mixed} == {
        (4, 2, 32, 48, 24, 1),
        (4, 2, 32, 48, 24, 4),
    }
    assert {p.intermediate_size for p in found if not p.experts} == {96}
    assert all(tuned.key(p).startswith("experts 2 of 4 D32 K64 M") for p in mixed)
    assert not any(p.experts for p in tune.model_problems(model, tokens=[1]))  # the first accelerate measures them
    assert tune.model_problems(make_mixture("gpt_oss"), tokens=[1], device="cuda") == []


def test_fastest_is_written_and_taken(native_library, fake_clock):
    fake_clock(lambda name, config, tokens: {"cpu": 1e-6 * tokens, "torch": 5e-6}[name])
    problems = tune.layer_problems(32, 96, **GATED)
    stages = []
    report = tune.tune(problems, progress=lambda *told: stages.append(told))
    assert stages == [("problems timed", i, 9) for i in range(9)]
    best = {one.problem.tokens: one.entries[0].backend for one in report.tuned}
    assert best == {m: "cpu" if m <= 4 else "torch" for m in tune.TOKENS["cpu"]}
    for one in report.tuned:
        seconds = {entry.backend: entry.seconds for entry in one.entries}
        assert seconds["torch"] == pytest.approx(5e-6)
        assert seconds["cpu"] == pytest.approx(1e-6 * one.problem.tokens)
        assert one.before.backend == ("cpu" if one.problem.tokens <= 64 else "torch")
        assert one.speedup == pytest.approx(seconds[one.before.backend] / min(seconds.values()))
    assert dispatch.native_tokens(torch.float32, torch.float32, 32, False, "cpu", 96, True, "silu") == 4
    for problem in problems:
        chosen = dispatch.choose(problem)
        assert (chosen.backend.NAME, chosen.source) == (best[problem.tokens], "tuned")
    json.dumps(report.to_json())


def test_the_best_configuration_is_found(native_library, fake_clock, monkeypatch):
    cpu = dispatch.backends()["cpu"]
    offered = [{"tile": 8}, {"tile": 16}, {"tile": 32}]
    monkeypatch.setattr(cpu, "candidate_configs", lambda problem: offered)
    monkeypatch.setattr(cpu, "default_config", lambda problem: offered[0])
    fake_clock(lambda name, config, tokens: {8: 3e-6, 16: 1e-6, 32: 2e-6}[config["tile"]] if name == "cpu" else 4e-6)
    (one,) = tune.tune(tune.layer_problems(32, 96, **GATED, tokens=[1])).tuned
    assert [(e.backend, dict(e.config)) for e in one.entries] == [("cpu", {"tile": 16}), ("torch", {})]
    assert (one.before.config, one.speedup) == ({"tile": 8}, pytest.approx(3))
    assert dispatch.choose(one.problem, "cpu").config == {"tile": 16}
    assert dispatch.native_tokens(torch.float32, torch.float32, 32, False, "cpu", 96, True, "silu") == 0


@pytest.mark.filterwarnings("ignore:a tuned choice of backend torch is skipped")
@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_what_is_wrong_or_fails_is_refused_and_named(fault, native_library, monkeypatch):
    run = dispatch.backends()["torch"].run

    def faulty(x, record, config=None, batch_invariant=False):
        if fault == "raises":
            raise RuntimeError("out of\nresources")
        return run(x, record) * (1.001 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(dispatch.backends()["cpu"], "run", faulty)
    (one,) = tune.tune(tune.layer_problems(32, 96, **GATED, tokens=[16])).tuned
    assert [entry.backend for entry in one.entries] == ["torch"]
    assert (one.before, one.speedup) == (None, None)
    expected = "cpu {}: RuntimeError: out of resources" if fault == "raises" else "cpu {}: error "
    assert len(one.refused) == 1 and one.refused[0].startswith(expected)
    monkeypatch.setattr(dispatch.backends()["torch"], "why_not", lambda problem: "is asleep")
    with pytest.raises(BackendError, match=r"no backend for Problem.*: cpu \{\}: "):
        tune.tune(tune.layer_problems(32, 96, **GATED, tokens=[16]), again=True)


@pytest.mark.parametrize("mode", tune.MODES)
@pytest.mark.parametrize("weights", [None, torch.int8, torch.uint8])
@pytest.mark.parametrize("form", [PLAIN, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_timings_of_every_form(mode, weights, form, dtype):
    options = {**form, "dtype": dtype, "weights": weights, "mode": mode, "keep": 0.5}
    report = tune.tune(tune.layer_problems(64, 200, **options, tokens=[1, 33]))
    expected = ["torch"] if native.load() else ["cpu", "torch"]
    for one in report.tuned:
        assert sorted(entry.backend for entry in one.entries) == expected, one.refused
        assert not one.refused
        assert one.before is not None and one.speedup > 0
        assert [e.seconds for e in one.entries] == sorted(e.seconds for e in one.entries)
    with torch.no_grad():
        for one in report.tuned:
            x, records = contest._operands(one.problem, 1 << 16)
            chosen = dispatch.choose(one.problem)
            assert chosen.source == "tuned"
            assert chosen.backend.run(x, records[0], chosen.config).shape == x.shape


def test_every_refused_sum_is_seen_in_large_problems():
    """Only some rows are compared; the first and the last are among them."""
    problem = tune.layer_problems(16, 32, **GATED, tokens=[512])[0]
    x, (record, *_) = contest._operands(problem, 1 << 16)
    judge = contest._Judge(x, record)
    out = backends.torch_eager.run(x, record)
    assert judge.why_wrong(out) is None
    assert {0, 511} <= set(judge.rows.tolist()) and len(judge.rows) == 8
    out[511, 3] += 1
    assert "is allowed" in judge.why_wrong(out)


def test_copies_are_counted_by_what_is_read_and_fill_twice_the_cache(monkeypatch):
    """Of a gather each reads rows that no other reads, which costs no more memory than copies of a compact record."""
    form = {**GATED, "keep": 0.25, "mode": "gather", "tokens": [1]}
    (problem,) = tune.layer_problems(32, 384, **form)
    rows, read = 384 * 3 * 32 * 4, 96 * 3 * 32 * 4
    _, records = contest._operands(problem, 2 * rows)
    places = [(r.rows.data_ptr(), neuron) for r in records for neuron in r.index.tolist()]
    assert len(records) == 8 and len({r.rows.data_ptr() for r in records}) == 2
    assert len(set(places)) == len(places) == 8 * 96
    facts = types.SimpleNamespace(L2_cache_size=5 * read)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert contest._copies(dataclasses.replace(problem, device="cuda"), rows, 1) == 10
    assert contest._copies(dataclasses.replace(problem, tokens=512), rows, 1 << 30) == 1


def test_what_a_graph_reads_is_there_when_it_is_replayed(monkeypatch):
    """A CUDA graph holds addresses, and not the call that was captured."""
    held, seen, operands = [], [], contest._operands

    def watched(*given):
        x, records = operands(*given)
        held.extend(weakref.ref(tensor) for tensor in (x, *(record.rows for record in records)))
        return x, records

    monkeypatch.setattr(contest, "_operands", watched)
    monkeypatch.setattr(contest, "graphed", lambda run, device: lambda: seen.extend(one() is not None for one in held))
    contest.try_all(tune.layer_problems(32, 96, **GATED, tokens=[2])[0], lambda: None)
    assert len(seen) > 4 and all(seen)


def test_experts_are_compared_in_the_call_that_is_timed(monkeypatch):
    problem = backends.Problem("cpu", torch.float32, 20, 32, 48, 48, True, False, "silu", experts=4, picked=2)

    def wrong_from_nine_tokens_on(x, experts, index, weights):
        out = reference.moe(x, experts, index, weights)
        out[-1] *= 1 if len(x) <= 8 else 1.001
        return out

    ways = [("torch", {}, reference.moe), ("triton", {}, wrong_from_nine_tokens_on)]
    monkeypatch.setattr(contest_experts, "_ways", lambda problem: ways)
    found = contest_experts.try_all(problem, lambda: None)
    assert [entry.backend for entry in found.entries] == ["torch"]
    assert len(found.refused) == 1 and "is allowed" in found.refused[0]


def test_a_second_call_goes_on_where_the_first_stopped(native_library, fake_clock, monkeypatch):
    ticks = itertools.count()
    fake_clock(lambda name, config, tokens: 1e-6)
    with monkeypatch.context() as slow:
        slow.setattr(tune.time, "monotonic", lambda: next(ticks))
        first = tune.tune(tune.layer_problems(32, 96, **GATED), budget=20)
    assert len(first.tuned) >= 2 and len(first.left) >= 2 and not first.skipped
    assert [one.problem.tokens for one in first.tuned] == list(tune.TOKENS["cpu"][: len(first.tuned)])
    second = tune.tune(tune.layer_problems(32, 96, **GATED))
    assert second.skipped == [tuned.key(one.problem) for one in first.tuned]
    assert [tuned.key(one.problem) for one in second.tuned] == first.left
    third = tune.tune(tune.layer_problems(32, 96, **GATED), again=True)
    assert len(third.tuned) == 9 and not third.skipped


def test_layers_of_one_bucket_are_timed_once(fake_clock):
    fake_clock(lambda name, config, tokens: 1e-6)
    problems = [p for k in (1030, 1100, 1280) for p in tune.layer_problems(8, k, **GATED, tokens=[1, 33])]
    report = tune.tune(problems)
    assert [(one.problem.kept, one.problem.tokens) for one in report.tuned] == [(1280, 1), (1280, 64)]


def test_the_module_follows_what_was_tuned(native_library, fake_clock, tiny):
    ffn = find_ffns(tiny("llama"))[0]
    assert PrunedMLP.from_dense(ffn).native_tokens == 64
    fake_clock(lambda name, config, tokens: 2e-6 if name == "cpu" else 1e-6)
    tune.tune(tune.model_problems(tiny("llama")))
    assert PrunedMLP.from_dense(ffn).native_tokens == 0
    assert PrunedMLP.from_dense(ffn, weights="int8").native_tokens > 0, "not what was timed"


def test_accelerate_measures_each_shape_once_on_a_cpu(native_library, fake_clock, tiny, own_cache, monkeypatch):
    accelerate(tiny("llama"), measure=False)
    assert not own_cache.exists()
    fake_clock(lambda name, config, tokens: 1e-6 * (tokens if name == "cpu" else 20))
    model = accelerate(tiny("llama"))
    assert PrunedMLP.from_dense(find_ffns(tiny("llama"))[0]).native_tokens == 16
    assert {m.native_tokens for m in model.modules() if isinstance(m, PrunedMLP)} == {16}
    monkeypatch.setattr(first_use, "tune", lambda *args, **kwargs: pytest.fail("timed again"))
    accelerate(tiny("llama"))
    accelerate(tiny("gpt2"), backend="torch")


def test_accelerate_without_a_folder_for_what_it_measures_goes_by_predictions(native_library, tiny, monkeypatch):
    monkeypatch.setenv("PYPRUNE_CACHE", os.devnull)
    monkeypatch.setattr(first_use, "tune", lambda *args, **kwargs: pytest.fail("timed for nothing"))
    model = accelerate(tiny("llama"))
    assert {m.native_tokens for m in model.modules() if isinstance(m, PrunedMLP)} == {64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1; got 0"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 1; got -1"),
        ({"keep": 0.0}, r"keep must be in \(0, 1\]; got 0\.0"),
        ({"keep": float("nan")}, r"keep must be in \(0, 1\]; got nan"),
        ({"activation": "swish"}, "activation must be one of gelu"),
        ({"mode": "sparse"}, "mode must be one of compact, gather"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
        ({"tokens": []}, r"tokens must be one or more numbers of at least 1; got \(\)"),
        ({"tokens": [1, 0]}, r"tokens must be one or more numbers of at least 1; got \(1, 0\)"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tune.layer_problems(**{"hidden_size": 8, "intermediate_size": 8, **GATED, **changes})


def test_bad_calls_are_refused():
    problems = tune.layer_problems(8, 8, **GATED, tokens=[1])
    with pytest.raises(InputError, match="budget must be more than 0 seconds; got 0"):
        tune.tune(problems, budget=0)
    with pytest.raises(InputError, match=r"problems must be on one device; got \[\]"):
        tune.tune([])
    both = [*problems, dataclasses.replace(problems[0], device="cuda", tokens=2)]
    with pytest.raises(InputError, match=r"problems must be on one device; got \['cpu', 'cuda'\]"):
        tune.tune(both)


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


SIZES = ("--hidden-size", 32, "--intermediate-size", 96, "--device", "cpu")


def test_command_line(own_cache, tiny_checkpoint):
    start = time.monotonic()
    result = run(*SIZES, "--tokens", "1,16", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["key"].split()[2] for one in found["tuned"]] == ["M1", "M16"]
    assert (own_cache / found["table"]).is_file()
    shown = run(*SIZES, "--tokens", "1,16,64", "--plain", "--activation", "relu", "--weights", "int8")
    assert shown.exit_code == 0 and "3 timed, 0 known before, 0 left" in " ".join(shown.stdout.split())
    assert "2 known before" in " ".join(run(*SIZES, "--tokens", "1,16").stdout.split())
    model = run(tiny_checkpoint, "--tokens", "1", "--keep", 0.5, "--mode", "gather", "--device", "cpu", "--json")
    assert model.exit_code == 0, model.output
    (one,) = json.loads(model.stdout)["tuned"]
    assert one["key"] == "D32 K64 M1 float32 float32-weights gated gather silu"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "MODEL, or hidden_size and intermediate_size, must be given; got neither"),
        (("--hidden-size", 8), "MODEL, or hidden_size and intermediate_size, must be given"),
        (("x/y", *SIZES), "hidden_size must be left out with MODEL, which has its own; got 32"),
        (("x/y", "--mode", "dense", "--device", "cpu"), "mode must be one of compact, gather; got 'dense'"),
        ((*SIZES, "--tokens", "1,two"), "tokens must be numbers separated by commas; got '1,two'"),
        ((*SIZES, "--tokens", "0"), "tokens must be one or more numbers of at least 1; got (0,)"),
        ((*SIZES, "--budget", "-1"), "budget must be more than 0 seconds; got -1.0"),
        ((*SIZES, "--dtype", "float64"), "dtype must be one of float32"),
        ((*SIZES, "--weights", "in8"), "weights must be one of float32"),
        ((*SIZES[:4], "--device", "tpu"), "device must be one of cpu, cuda; got 'tpu'"),
        ((*SIZES[:4], "--device", "cpu:0"), "device must be cpu, cuda or auto; got 'cpu:0'"),
    ],
)
def test_command_line_refuses(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert " ".join(result.stderr.split()).startswith(f"error: {message}")
