"""Timing, ceilings, the bench verb on tiny models, and the README's tables. No test depends on how fast it runs."""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from pyprune import InputError, UnsupportedModelError, accelerate, prune
from pyprune.base import clock, machine
from pyprune.base.record import described
from pyprune.ffn import native
from pyprune.model.families import find_ffns
from pyprune.speed import roofline, timing
from pyprune.speed.benchmark import benchmark, compare

BENCH = Path(__file__).parent.parent / "bench"
SETTINGS: dict[str, Any] = {
    "batches": (1, 2),
    "prompt_tokens": 4,
    "new_tokens": 3,
    "prefill_tokens": 16,
    "repeats": 2,
}


def _load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH.parent))
    return importlib.import_module(name)


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "buffer_bytes", lambda device: 1 << 22)


def _forms(dense: Any) -> dict[str, Any]:
    """The dense model pruned to half its neurons, in every form."""
    narrow = copy.deepcopy(dense)
    mask = prune(narrow, keep=0.5, method="random", allocation="uniform:multiple=16", repair=None).mask
    return {
        "narrow": narrow,
        "compact": accelerate(copy.deepcopy(narrow)),
        "gather": accelerate(copy.deepcopy(dense), mode="gather", mask=mask),
    }


class FakeClock:
    """A clock that jobs move by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


# --- arithmetic by hand


def test_amdahl_by_hand() -> None:
    assert roofline.amdahl(0.5, 2) == pytest.approx(4 / 3)
    assert roofline.amdahl(0.0, 10) == 1
    assert roofline.amdahl(1.0, 4) == pytest.approx(4)
    with pytest.raises(InputError, match=r"share must lie in \[0, 1\]; got 1.5"):
        roofline.amdahl(1.5, 2)
    with pytest.raises(InputError, match="speedup"):
        roofline.amdahl(0.5, 0)


def test_bytes_of_a_record_by_hand() -> None:
    def nbytes(gated: bool, dtype: torch.dtype, **more: Any) -> int:
        return described(10, 7, gated=gated, activation="relu", dtype=dtype, **more).nbytes

    half, whole = torch.bfloat16, torch.float32
    assert nbytes(False, whole) == 7 * 2 * 10 * 4
    assert nbytes(True, half) == 7 * 3 * 10 * 2
    assert nbytes(False, half, neuron_bias=True) == 7 * (2 * 10 + 1) * 2
    assert nbytes(True, half, neuron_bias=True) == 7 * (3 * 10 + 2) * 2
    assert nbytes(False, whole, down_bias=True) == (7 * 2 * 10 + 10) * 4
    assert nbytes(True, half, kept=5) == 5 * 3 * 10 * 2 + 5 * 4
    int8 = nbytes(True, half, weights=torch.int8, neuron_bias=True, down_bias=True)
    assert int8 == 7 * (3 * 10 + 3 * 4 + 2 * 2) + 10 * 2
    assert nbytes(False, half, weights=torch.int8) == 7 * (2 * 10 + 2 * 4)


def test_bytes_of_an_int8_unit(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2").to(torch.bfloat16)  # plain, biased, D 32, F 96
    unit = timing.ffn_units(accelerate(model, weights="int8"))[0]
    assert unit.bytes == 96 * (2 * 32 + 2 * 4 + 2) + 32 * 2


def test_quantiles_by_hand() -> None:
    found = clock.quantiles([5.0, 1.0, 4.0, 2.0, 3.0], scale=10)
    assert found == pytest.approx({"p10": 14, "p25": 20, "p50": 30, "p75": 40, "p90": 46})
    assert clock.median([4.0, 1.0, 3.0, 2.0]) == 2.5


def test_timed_by_a_fake_clock() -> None:
    now = FakeClock()
    steps = iter([3.0, 6.0])

    def run() -> None:
        now.seconds += next(steps)

    assert clock.timed(run, now, passes=2, share=3)() == [1.0, 2.0]


def test_interleave_takes_turns_and_drops_the_first_round() -> None:
    order: list[str] = []
    steps: list[tuple[int, int]] = []

    def job(name: str) -> clock.Job:
        def run() -> list[float]:
            order.append(name)
            return [float(len(order))]

        return run

    found = clock.interleave({"dense": job("dense"), "a": job("a")}, 2, lambda *step: steps.append(step))
    assert order == ["dense", "a"] * 3
    assert found == {"dense": [3.0, 5.0], "a": [4.0, 6.0]}
    assert steps == [(0, 3), (1, 3), (2, 3)]


def test_compare_takes_each_models_faster_path() -> None:
    samples = {
        "dense": {"eager": [4.0, 4.0], "compiled": [2.0, 2.0]},
        "half": {"eager": [1.0, 2.0], "compiled": [3.0, 3.0]},
    }
    found = compare(samples, {"dense": 1.0, "half": 0.5}, share=0.5, unit="step_ms", scale=1e3)
    assert found["dense"]["path"] == "compiled" and found["half"]["path"] == "eager"
    assert found["half"]["paths"] == {"eager": 1500.0, "compiled": 3000.0}
    assert found["half"]["ratio"] == pytest.approx(2 / 1.5)
    assert found["half"]["ceiling"] == pytest.approx(4 / 3)
    assert found["half"]["share_of_ceiling"] == pytest.approx(1.0)
    assert found["dense"]["ratio"] == found["dense"]["ceiling"] == 1.0
    assert found["half"]["samples"] == 2


# --- the machine


def test_bandwidth_is_positive_and_sane(small_buffer: None) -> None:
    found = roofline.read_bandwidth("cpu", rounds=2)
    assert 0 < found.gb_s < 10_000
    assert found.buffer_bytes == 1 << 22
    assert found.loop in ("sum", "amax", "matrix-vector", "native")
    json.dumps(found.to_json())


def test_buffer_is_larger_than_the_cache_but_a_quarter_of_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "free_memory", lambda device: 64 << 30)
    monkeypatch.setattr(roofline, "cache_bytes", lambda device: 480 << 20)
    assert roofline.buffer_bytes("cpu") == 4 * 480 << 20
    monkeypatch.setattr(roofline, "cache_bytes", lambda device: 8 << 20)
    assert roofline.buffer_bytes("cpu") == 1 << 30
    monkeypatch.setattr(roofline, "free_memory", lambda device: 2 << 30)
    assert roofline.buffer_bytes("cpu") == 1 << 29


def test_facts_name_versions_but_neither_host_nor_place() -> None:
    facts = machine.facts()
    text = json.dumps(facts)
    assert facts["cores"] >= 1 and facts["torch_threads"] >= 1 and facts["memory_bytes"] > 0
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) == {"python", "torch", "transformers", "triton", "pyprune"}
    assert str(Path.home()) not in text and str(BENCH.parent) not in text
    assert platform.node() not in text.replace('"', " ").split()
    assert facts["date"].endswith("+00:00")


def test_facts_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.source() == {"commit": None, "dirty": None}


def test_the_native_loop_reads_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.full((3, 5), 2.0)
    loops = roofline.read_loops(matrix)
    assert ("native" in loops) == (native.load() is None)
    if "native" in loops:
        assert loops["native"]() == 30.0
    monkeypatch.setattr(native, "load", lambda: "no compiler")
    assert set(roofline.read_loops(matrix)) == {"sum", "amax", "matrix-vector"}


# --- what is timed


def test_decode_steps_are_those_of_generate(tiny: Callable[..., Any], family: str) -> None:
    """The timed loop feeds the tokens that greedy `generate` gives, and times every step but the first."""
    model = tiny(family)
    prompt = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    fed: list[torch.Tensor] = []
    if family == "openai-gpt":
        with pytest.raises(UnsupportedModelError, match="openai-gpt keeps none"):
            timing.Decode(model, prompt, steps=4)()
        return
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    assert len(timing.Decode(model, prompt, steps=4)()) == 3
    hook.remove()
    model.generation_config.eos_token_id = None  # or it would stop at one
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert [t.shape for t in fed] == [(2, 5)] + [(2, 1)] * 4
    assert torch.equal(torch.cat(fed[1:], 1), wanted[:, 5:])


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "llama", "nemotron", "xglm"])
def test_units_compute_the_ffns_of_every_form(tiny: Callable[..., Any], name: str) -> None:
    dense = tiny(name)
    forms = _forms(dense)
    units = {form: timing.ffn_units(model) for form, model in {"dense": dense, **forms}.items()}
    assert [u.neurons for u in units["dense"]] == [96] * 3
    assert all(u.neurons == 48 for form in forms for u in units[form])
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        for a, b, c in zip(*(units[form] for form in forms), strict=True):
            assert torch.allclose(a.run(x), b.run(x), atol=1e-5)
            assert torch.allclose(a.run(x), c.run(x), atol=1e-5)
    weights = [sum(p.numel() for p in ffn.parameters()) for ffn in find_ffns(dense)]
    assert [u.bytes for u in units["dense"]] == [4 * n for n in weights]
    assert all(a.bytes == b.bytes for a, b in zip(units["narrow"], units["compact"], strict=True))
    assert all(a.bytes + 4 * 48 == b.bytes for a, b in zip(units["compact"], units["gather"], strict=True))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_probe_sees_every_pass_and_leaves_no_hook(tiny: Callable[..., Any], name: str) -> None:
    model = tiny(name)
    with timing.ffn_probe(model) as shares:
        timing.Decode(model, torch.ones(1, 4, dtype=torch.long), steps=3)()
    assert len(shares) == 4
    assert all(0 < share < 1 for share in shares)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- the verb


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_report(tiny: Callable[..., Any], small_buffer: None, name: str) -> None:
    dense = tiny(name)
    stages: list[str] = []
    forms = _forms(dense)
    report = benchmark(dense, forms, **SETTINGS, progress=lambda stage, done, total: stages.append(stage))
    result = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(result) == {"machine", "settings", "bandwidth_gb_s", "bandwidth", "share", "models"}
    assert list(result["models"]) == ["dense", *forms]
    assert set(result["share"]["decode"]) == {"1", "2"} and set(result["share"]["prefill"]) == {"16"}
    assert result["settings"]["intermediate_size"] == 96 and result["settings"]["layers"] == 3
    for model, entry in result["models"].items():
        assert entry["keep"] == (1.0 if model == "dense" else 0.5)
        assert set(entry["decode"]) == {"1", "2"}
        assert set(entry["prefill"]) == {"16"}
        assert set(entry["ffn"]) == {"1", "2", "16"}
        for kind, key, unit in (("decode", "2", "step_ms"), ("prefill", "16", "pass_ms"), ("ffn", "1", "us_quantiles")):
            value = entry[kind][key]
            assert list(value[unit]) == ["p10", "p25", "p50", "p75", "p90"]
            assert list(value[unit].values()) == sorted(value[unit].values())
            assert value["path"] == "eager" and value["ratio"] > 0
            assert value["share_of_ceiling"] == pytest.approx(value["ratio"] / value["ceiling"])
        assert entry["decode"]["1"]["samples"] == 2 * 2 and entry["prefill"]["16"]["samples"] == 2
        assert entry["decode"]["2"]["tokens_per_s"] == pytest.approx(2e3 / entry["decode"]["2"]["step_ms"]["p50"])
        assert entry["prefill"]["16"]["tokens_per_s"] == pytest.approx(16e3 / entry["prefill"]["16"]["pass_ms"]["p50"])
        ffn = entry["ffn"]["1"]
        assert ffn["gb_s"] == pytest.approx(entry["ffn_bytes"] / ffn["us"] / 1e3)
        assert ffn["ceiling"] == pytest.approx(1 / entry["keep"])
        share = result["share"]["decode"]["1"]
        assert entry["decode"]["1"]["ceiling"] == pytest.approx(roofline.amdahl(share, 1 / entry["keep"]))
    models = {"dense": dense, **forms}
    for model, entry in result["models"].items():
        assert entry["bytes"] == sum(4 * p.numel() for p in models[model].parameters())
    assert {"measuring memory bandwidth", "timing prefill", "timing decode, batch 2"} <= set(stages)


def test_a_given_keep_sets_the_ceiling(tiny: Callable[..., Any], small_buffer: None) -> None:
    dense = tiny("llama")
    result = benchmark(dense, {"same": copy.deepcopy(dense)}, keep=0.25, **SETTINGS).to_json()
    assert result["models"]["same"]["keep"] == 1.0
    assert result["models"]["same"]["ffn"]["1"]["ceiling"] == pytest.approx(4.0)
    assert result["models"]["dense"]["ffn"]["1"]["ceiling"] == 1.0


def test_ceilings_of_weights_in_another_dtype_are_ratios_of_bytes(
    tiny: Callable[..., Any], small_buffer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gated FFN of D 32: a dense neuron takes 3 * 32 * 4 bytes, one in int8 3 * 32 and three scales of 4."""
    monkeypatch.setattr("pyprune.speed.benchmark._FEW_TOKENS", 8)
    dense = tiny("llama")
    narrow = _forms(dense)["narrow"]
    candidates = {"int8": accelerate(copy.deepcopy(narrow), weights="int8"), "same": accelerate(narrow)}
    result = benchmark(dense, candidates, **SETTINGS).to_json()
    gain = 2 * (3 * 32 * 4) / (3 * 32 + 3 * 4)
    share = result["share"]
    for name, few in (("int8", gain), ("same", 2.0)):
        entry = result["models"][name]
        assert entry["ffn"]["1"]["ceiling"] == pytest.approx(few)
        assert entry["decode"]["2"]["ceiling"] == pytest.approx(roofline.amdahl(share["decode"]["2"], few))
        assert entry["ffn"]["16"]["ceiling"] == pytest.approx(2.0)
        assert entry["prefill"]["16"]["ceiling"] == pytest.approx(roofline.amdahl(share["prefill"]["16"], 2.0))
    given = benchmark(dense, {"int8": candidates["int8"]}, keep=0.25, **SETTINGS).to_json()
    assert given["models"]["int8"]["ffn"]["1"]["ceiling"] == pytest.approx(2 * gain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": {}}, "candidates must hold at least one model"),
        ({"keep": 0.0}, r"keep must lie in \(0, 1\]; got 0.0"),
        ({"batches": (0,)}, "batches must be"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"prefill_tokens": 65}, r"prefill_tokens must lie in \[1, 64\]"),
        ({"prompt_tokens": 62}, "prompt_tokens"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(tiny: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    dense = tiny("llama")
    arguments = {"candidates": {"same": dense}, **SETTINGS, **changes}
    with pytest.raises(InputError, match=message):
        benchmark(dense, arguments.pop("candidates"), **arguments)


def test_models_in_training_mode_and_a_second_dense_are_refused(tiny: Callable[..., Any]) -> None:
    dense = tiny("llama")
    with pytest.raises(InputError, match="other must be in eval mode"):
        benchmark(dense, {"other": copy.deepcopy(dense).train()}, **SETTINGS)
    with pytest.raises(InputError, match="not use the name 'dense'"):
        benchmark(dense, {"dense": dense}, **SETTINGS)


# --- the scripts of bench/


def test_shapes_are_sane(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune.base.reference import ACTIVATIONS

    shapes = _load("bench.shapes", monkeypatch)
    assert len(shapes.BY_NAME) == len(shapes.SHAPES) >= 10
    assert set(shapes.DEFAULT) <= set(shapes.BY_NAME)
    assert all(s.activation in ACTIVATIONS and s.source in "dcp" for s in shapes.SHAPES)


def _ffn_row(form: str, backend: str, keep: float, us: float) -> dict[str, Any]:
    shape = {"model": "toy", "hidden_size": 8, "intermediate_size": 32, "dtype": "float32", "tokens": 1}
    return {**shape, "form": form, "backend": backend, "keep": keep, "us": us, "gb_s": 7.0, "ceiling": 1 / keep}


def _results(folder: Path) -> Path:
    facts = machine.facts()
    rows = [
        _ffn_row("linear", "torch", 1.0, 1200.0),
        _ffn_row("compact", "cpu", 1.0, 1000.0),
        _ffn_row("linear", "torch", 0.5, 800.0),
        _ffn_row("compact", "torch", 0.5, 900.0),
        _ffn_row("compact", "cpu", 0.5, 500.0),
    ]
    folder.mkdir()
    (folder / "ffn.json").write_text(json.dumps({"machine": facts, "bandwidth_gb_s": 30.0, "rows": rows}))
    (folder / "ffn-second.json").write_text(json.dumps({"machine": facts, "bandwidth_gb_s": 31.0, "rows": rows[:3]}))
    (folder / "ffnx.json").write_text("not for this table")
    return folder


def test_readme_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = _load("bench.tables.readme", monkeypatch)
    readme, results = tmp_path / "README.md", _results(tmp_path / "results")
    text = "# Title\n\n<!-- table:ffn -->\nold\n<!-- /table -->\n\n<!-- table:model -->\n<!-- /table -->\nend\n"
    readme.write_text(text)
    with pytest.raises(typer.Exit):
        tables.main(check=True, readme=[readme], results=results)
    assert readme.read_text() == text
    tables.main(check=False, readme=[readme], results=results)
    made = readme.read_text()
    assert "old" not in made and made.startswith("# Title\n") and made.endswith("<!-- /table -->\nend\n")
    # The dense path is the fastest on all neurons; compact by its faster backend, twice as fast.
    line = "| toy 8 x 32 | float32 | 1 | 50% | 1,000 | 800 (1.25x, 7 GB/s) | 500 (2.00x, 7 GB/s) | - | 2.00x |"
    assert line in made.splitlines()
    assert "memory read at 30.0 GB/s" in made and "memory read at 31.0 GB/s" in made
    assert "<!-- table:model -->\n<!-- /table -->" in made
    tables.main(check=True, readme=[readme], results=results)
    tables.main(check=False, readme=[readme], results=results)
    assert readme.read_text() == made


def test_model_table_from_a_report(
    tiny: Callable[..., Any], small_buffer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = _load("bench.tables.readme", monkeypatch)
    dense = tiny("llama")
    report = benchmark(dense, {"same": copy.deepcopy(dense)}, **SETTINGS).to_json()
    lines = tables.model_table({"machine": machine.facts(), "rows": [{"model": "toy", "report": report}]})
    assert sum(line.startswith("| decode, batch 2 | same | 100% |") for line in lines) == 1
    # One header, one rule, and a line for each of two models and 2 + 1 + 3 measurements.
    assert sum(line.startswith("|") for line in lines) == 2 + 2 * 6


def test_a_marker_without_a_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = _load("bench.tables.readme", monkeypatch)
    with pytest.raises(typer.BadParameter, match="'nothing'"):
        tables.render("<!-- table:nothing -->\n<!-- /table -->", tmp_path)


def test_rows_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _load("bench.model.run", monkeypatch)
    case = {"extra_info": {"model": "toy", "calls": 2}, "stats": {"data": [2e-6, 4e-6, 6e-6]}, "machine_info": "no"}
    found = run.row(case)
    assert found["us"] == pytest.approx(2.0) and found["samples"] == 3 and found["model"] == "toy"
    assert run.row({"extra_info": {"report": 1}, "stats": {}}) == {"report": 1}


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n", "AMD EPYC (family 25, model 17)"),
        ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9654\n", "AMD EPYC 9654"),
        ("model name\t: Some CPU\n\nmodel name\t: another\ncpu family\t: 1\nmodel\t: 2\n", "Some CPU"),
        ("", platform.processor() or platform.machine()),
    ],
)
def test_generations_of_one_brand_have_names_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, name: str
) -> None:
    (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == name


def test_a_change_in_any_room_makes_the_source_dirty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (machine._PACKAGE / "base" / "machine.py").samefile(machine.__file__)
    package = tmp_path / "pyprune"
    for file in ("__init__.py", "base/machine.py", "model/x.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "_PACKAGE", package)
    assert machine.source()["dirty"] is False
    (package / "model" / "x.py").write_text("changed")
    assert machine.source()["dirty"] is True
