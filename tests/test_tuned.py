"""Buckets, keys, tables of choices and what a damaged or outdated one does: nothing, and one warning."""

import dataclasses
import itertools
import json
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyprune import PrunedMLP
from pyprune.base.errors import InputError
from pyprune.base.files import cache_folder
from pyprune.base.record import Record
from pyprune.ffn import backends, dispatch, ops, tuned
from pyprune.ffn.tuned import Entry
from pyprune.model.families import find_ffns

PROBLEM = backends.Problem("cpu", torch.float32, 1, 32, 96, 96, True, False, "silu")
CPU, TORCH = Entry("cpu", {}, 2e-6), Entry("torch", {}, 1e-6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty folder for the user's tables."""
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "cache"))
    tuned.reload()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tuned.reload()


@pytest.fixture
def all_usable(monkeypatch):
    for backend in dispatch.backends().values():
        monkeypatch.setattr(backend, "why_not", lambda problem: None)


def stored(table, device="cpu"):
    file = tuned.store(device, table)
    tuned.reload()
    return file


def silent():
    return warnings.catch_warnings(action="error")


def test_token_buckets():
    found = [tuned.token_bucket(m) for m in (0, 1, 2, 3, 4, 5, 9, 33, 64, 65, 129, 513, 2049, 8192, 10**6)]
    assert found == [1, 1, 2, 4, 4, 8, 16, 64, 64, 128, 512, 2048, 8192, 8192, 8192]


def test_neuron_buckets_are_four_to_the_octave():
    assert [tuned.neuron_bucket(k) for k in (0, 1, 64)] == [64] * 3
    assert [tuned.neuron_bucket(k) for k in (65, 80, 81, 96, 97, 112, 113, 128)] == [
        80,
        80,
        96,
        96,
        112,
        112,
        128,
        128,
    ]
    for width in (768, 1536, 3072, 7168, 14336, 4096, 8192, 16384):
        assert tuned.neuron_bucket(width) == width
    every = sorted({tuned.neuron_bucket(k) for k in range(1, 20000)})
    assert all(a < b <= 1.25 * a for a, b in itertools.pairwise(every))
    assert all(tuned.neuron_bucket(b) == b for b in every)
    assert len([b for b in every if 1024 < b <= 2048]) == 4


def test_layers_of_nearby_widths_share_a_choice():
    widths = (1030, 1100, 1279, 1280)
    assert len({tuned.key(dataclasses.replace(PROBLEM, intermediate_size=k, kept=k)) for k in widths}) == 1
    gather = dataclasses.replace(PROBLEM, gather=True)
    assert len({tuned.key(dataclasses.replace(gather, intermediate_size=4096, kept=k)) for k in widths}) == 1


DIFFERENT = [
    {"hidden_size": 33},
    {"dtype": torch.bfloat16},
    {"weights": torch.int8},
    {"tokens": 2},
    {"kept": 200, "intermediate_size": 200},
    {"gated": False},
    {"gather": True},
    {"activation": "gelu"},
    {"batch_invariant": True},
]


def test_everything_else_has_its_own_key():
    keys = {tuned.key(dataclasses.replace(PROBLEM, **changes)) for changes in ({}, *DIFFERENT)}
    assert len(keys) == len(DIFFERENT) + 1
    assert tuned.key(PROBLEM) == tuned.key(dataclasses.replace(PROBLEM, weights=torch.float32))
    assert tuned.key(PROBLEM) == "D32 K96 M1 float32 float32-weights gated compact silu"


@pytest.mark.parametrize("changes", [{}, *DIFFERENT])
def test_a_representative_stands_for_itself(changes):
    one = tuned.representative(dataclasses.replace(PROBLEM, **changes))
    assert tuned.representative(one) == one
    assert tuned.key(one) == tuned.key(dataclasses.replace(PROBLEM, **changes))
    assert one.kept <= one.intermediate_size and (one.gather or one.kept == one.intermediate_size)


def test_nothing_is_known_at_first(own_cache):
    with silent():
        assert tuned.find(PROBLEM) == []
    assert not own_cache.exists()


def test_tuned_choice_is_taken_and_the_forced_backend_keeps_its_name(all_usable):
    assert dispatch.choose(PROBLEM).backend.NAME == "cpu"
    stored({tuned.key(PROBLEM): [CPU, TORCH]})
    chosen = dispatch.choose(PROBLEM)
    assert (chosen.backend.NAME, chosen.config, chosen.source) == ("torch", {}, "tuned")
    assert dispatch.choose(PROBLEM, "cpu").backend.NAME == "cpu"
    assert dispatch.choose(dataclasses.replace(PROBLEM, tokens=2)).source == "predicted"


def test_store_adds_to_what_is_there(own_cache):
    stored({"a": [CPU]})
    file = stored({"b": [TORCH], "c": []})
    assert set(tuned.known("cpu")) == {"a", "b", "c"}
    assert {f.name for f in own_cache.iterdir()} - {".lock"} == {file.name}, "left something beside it"


def test_writers_at_the_same_time_lose_nothing(monkeypatch):
    pytest.importorskip("fcntl")
    read = tuned._read

    def slow(*given):
        table = read(*given)
        time.sleep(0.05)
        return table

    monkeypatch.setattr(tuned, "_read", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: tuned.store("cpu", {name: [CPU]}), "abcd"))
    tuned.reload()
    assert set(tuned.known("cpu")) == set("abcd")


def test_another_machine_or_version_has_another_table(monkeypatch):
    before, versions = tuned.path("cpu"), dict.fromkeys(tuned.machine.versions())
    for name, value in (
        ("cpu_name", lambda: "another"),
        ("versions", lambda: versions),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(tuned.machine, name, value)
            assert tuned.path("cpu") != before
    monkeypatch.setattr(tuned, "_kernels", lambda device: "edited")
    assert tuned.path("cpu") != before
    monkeypatch.undo()


def test_there_is_no_table_for_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tuned.reload()
    assert tuned.find(dataclasses.replace(PROBLEM, device="cuda")) == []
    with pytest.raises(InputError, match="device must be one that is here; got 'cuda'"):
        tuned.path("cuda")


ENTRY = {"backend": "torch", "config": {}, "seconds": 1e-6}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\udcff",
        "[" * 100_000,
        {"format": 2},
        {"identity": {"device": "another"}},
        {"entries": []},
        {"entries": {"a": None}},
        {"entries": {"a": [3]}},
        {"entries": {"a": [{**ENTRY, "seconds": 0}]}},
        {"entries": {"a": [{**ENTRY, "seconds": True}]}},
        {"entries": {"a": [{**ENTRY, "seconds": "fast"}]}},
        {"entries": {"a": [{**ENTRY, "seconds": 10**400}]}},
        {"entries": {"a": [{**ENTRY, "backend": 3}]}},
        {"entries": {"a": [{**ENTRY, "config": []}]}},
        {"entries": {"a": [{**ENTRY, "config": {"warps": 1.5}}]}},
        {"entries": {"a": [{"backend": "torch"}]}},
    ],
    ids=lambda text: str(text)[:40].encode("ascii", "replace").decode(),
)
def test_a_corrupt_table_is_one_warning_and_no_choice(text):
    file = stored({tuned.key(PROBLEM): [TORCH]})
    if isinstance(text, dict):
        text = json.dumps({**json.loads(file.read_text()), **text})
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    tuned.reload()
    with pytest.warns(UserWarning, match=f"choices in .*{file.name} are ignored") as told:
        assert dispatch.choose(PROBLEM).source == "predicted"
    assert len(told) == 1
    with silent():
        dispatch.choose(dataclasses.replace(PROBLEM, tokens=3))
    with pytest.warns(UserWarning, match="are ignored"):
        stored({tuned.key(PROBLEM): [TORCH]})
    with silent():
        assert tuned.find(PROBLEM) == [TORCH]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry("cudnn", {}, 1e-9), "backend cudnn is skipped: there is no backend of that name"),
        (Entry("cublas", {}, 1e-9), "backend cublas is skipped: needs tensors on a CUDA device"),
        (Entry("torch", {"warps": 4}, 1e-9), r"torch is skipped: it does not offer the configuration \{\"warps\": 4\}"),
    ],
)
def test_an_outdated_choice_is_skipped_with_a_warning(entry, reason):
    stored({tuned.key(PROBLEM): [entry, TORCH, CPU]})
    with pytest.warns(UserWarning, match=reason) as told:
        chosen = dispatch.choose(PROBLEM)
    assert len(told) == 1
    assert (chosen.backend.NAME, chosen.config) == ("torch", {})
    with silent():
        dispatch.choose(dataclasses.replace(PROBLEM, kept=90, intermediate_size=90))


def test_a_value_of_another_type_is_another_configuration(monkeypatch, all_usable):
    torch_backend = dispatch.backends()["torch"]
    monkeypatch.setattr(torch_backend, "candidate_configs", lambda problem: [{"fused": True}])
    stored({tuned.key(PROBLEM): [Entry("torch", {"fused": 1}, 1e-9)]})
    with pytest.warns(UserWarning, match="does not offer"):
        assert dispatch.choose(PROBLEM).source == "predicted"
    stored({tuned.key(PROBLEM): [Entry("torch", {"fused": True}, 1e-9)]})
    for forced in ("auto", "torch"):
        assert dispatch.choose(PROBLEM, forced).config == {"fused": True}


def test_a_configuration_reaches_its_backend(monkeypatch, all_usable):
    torch_backend, seen = dispatch.backends()["torch"], []
    run = torch_backend.run
    monkeypatch.setattr(torch_backend, "candidate_configs", lambda problem: [{}, {"fused": True}])
    monkeypatch.setattr(torch_backend, "run", lambda x, record, config, _: seen.append(config) or run(x, record))
    stored({tuned.key(PROBLEM): [Entry("torch", {"fused": True}, 1e-9)]})
    record = Record(torch.randn(96, 96), True, "silu")
    for tokens, backend in ((1, "auto"), (1, "torch"), (9, "torch")):
        ops.ffn(torch.randn(tokens, 32), record, backend=backend)
    assert seen == [{"fused": True}, {"fused": True}, None]


def measured(bests):
    """A table in which, for each number of tokens, one backend is the best."""
    pair = {"cpu": [CPU, dataclasses.replace(TORCH, seconds=1)], "torch": [TORCH, CPU]}
    return {tuned.key(dataclasses.replace(PROBLEM, tokens=m)): pair[best] for m, best in bests.items()}


@pytest.mark.parametrize(
    ("bests", "tokens"),
    [
        ({}, 32),
        ({1: "torch"}, 0),
        ({1: "cpu"}, 32),
        ({1: "cpu", 8: "torch"}, 4),
        ({8: "torch"}, 4),
        ({1: "cpu", 64: "cpu"}, 64),
        ({64: "cpu", 128: "torch"}, 64),
        ({128: "torch"}, 32),
        ({1: "cpu", 2: "torch", 4: "cpu"}, 1),
        ({64: "cpu", 512: "cpu"}, dispatch._ANY),
        ({64: "cpu", 512: "cpu", 2048: "torch"}, 512),
    ],
)
def test_measured_crossover_of_the_native_kernel(bests, tokens, all_usable, monkeypatch, tiny):
    monkeypatch.setitem(dispatch._NATIVE_TOKENS, (torch.float32, False), (32, 24))
    stored(measured(bests))
    layer = (torch.float32, torch.float32, 32, False, "cpu", 96, True, "silu")
    assert dispatch.native_tokens(*layer) == tokens
    assert dispatch.native_tokens(*layer[:5], 3000, True, "silu") == 32, "another layer"
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0])
    assert pruned.native_tokens == tokens
    for number, best in bests.items():
        chosen = dispatch.choose(dataclasses.replace(PROBLEM, tokens=number))
        assert best == chosen.backend.NAME
    far = dispatch.choose(dataclasses.replace(PROBLEM, tokens=10**5)).backend.NAME
    assert far == ("cpu" if tokens == dispatch._ANY else "torch")


@pytest.mark.parametrize(("plan", "tokens"), [({}, 1), ({"stages": 3}, 0)])
def test_crossover_on_cuda_counts_only_what_the_kernel_does_by_itself(plan, tokens, all_usable, monkeypatch):
    cuda = dispatch.backends()["cuda"]
    monkeypatch.setattr(cuda, "default_config", lambda problem: {})
    monkeypatch.setattr(cuda, "candidate_configs", lambda problem: [{}, {"stages": 3}])
    problem = dataclasses.replace(PROBLEM, device="cuda")
    monkeypatch.setattr(tuned, "known", lambda device: {tuned.key(problem): [Entry("cuda", plan, 1e-6)]})
    for cached in tuned.DEPENDENT:
        cached()
    layer = (torch.float32, torch.float32, 32, False, "cuda", 96, True, "silu")
    assert dispatch.native_tokens(*layer) == tokens
    assert dispatch.choose(problem).config == plan
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("platform", "variables", "end"),
    [
        ("linux", {"PYPRUNE_CACHE": "/a/b"}, "a/b"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "x/pyprune"),
        ("linux", {}, ".cache/pyprune"),
        ("darwin", {}, "Library/Caches/pyprune"),
        ("win32", {"LOCALAPPDATA": "/local"}, "local/pyprune/Cache"),
    ],
)
def test_folder_of_each_system(platform, variables, end, monkeypatch):
    for name in ("PYPRUNE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pyprune.base.files.sys.platform", platform)
    assert cache_folder().as_posix().endswith(end)
