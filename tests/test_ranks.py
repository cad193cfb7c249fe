"""Two processes that prune together do what one does alone, and an error of one is an error of both."""

import json
import re

import pytest
import rank_cases
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pyprune import InputError, prune
from pyprune.base.ranks import Ranks, local_device
from pyprune.base.text import default_text
from pyprune.cli.commands import app

CASES, WRONG = sorted(rank_cases.cases()), sorted(rank_cases.wrong())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which two processes left what became of every case."""
    out = tmp_path_factory.mktemp("ranks")
    run = rank_cases.launched([rank_cases.__file__, str(out), *CASES, *WRONG])
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def facts_of(folder, name, rank):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.mark.filterwarnings("ignore:.*never active", "ignore:.*experts saw too few")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_prune_as_one(name, done):
    """The same neurons; weights and errors but for the order in which float64 sums are added up."""
    weights, facts = rank_cases.pruned(*rank_cases.cases()[name]())
    both = [load_file(done / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    for own, first in zip(both[1].values(), both[0].values(), strict=True):
        assert torch.equal(own, first)
    found = facts_of(done, name, 0)
    assert found["neurons"] == facts["neurons"] == facts_of(done, name, 1)["neurons"]
    assert found["tokens"] == facts["tokens"]
    for name, own in weights.items():
        torch.testing.assert_close(both[0][name], own, rtol=2e-5, atol=2e-6)
    for report, own in zip(found["layers"], json.loads(json.dumps(facts["layers"])), strict=True):
        for key, value in own.items():
            assert report[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


@pytest.mark.parametrize(
    ("name", "rank", "message"),
    [
        (
            "other",
            0,
            r"^ranks must be given the same; they differ in checkpoint .*; keep \(0.5 on rank 0, 0.75 on ",
        ),
        ("words", 0, r"^ranks must be given the same; they differ in text \([^;]*$"),
        ("few", 0, r"^text must hold a window for each of 2 processes; got 1$"),
        ("invalid", 0, r"^rank 1: keep must lie in \(0, 1\]; got 1.5$"),
        ("broken", 0, r"^rank 1: OSError: no space left$"),
        ("broken", 1, r"^no space left$"),
        ("places", 0, r"^ranks came to different places \(add\): every rank must call the same, in one order$"),
    ],
)
def test_an_error_of_one_is_an_error_of_both(name, rank, message, done):
    found = facts_of(done, name, rank)
    assert re.search(message, found["error"]), found
    kinds = {"broken": ("PypruneError", "OSError"), "places": ("PypruneError",)}
    assert found["kind"] == kinds.get(name, ("InputError",))[rank]
    if name in ("other", "words", "few", "places"):
        assert facts_of(done, name, 1) == found


def test_processes_without_a_group_are_refused(tiny, ids, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torch.distributed must be initialised .*; got 'WORLD_SIZE=2'"):
        prune(tiny("llama"), method="random", repair=None)
    assert not Ranks.joined(together=False).several
    prune(tiny("llama"), method="random", repair=None, together=False)


def test_the_command_line_prunes_together(tiny_checkpoint, tmp_path):
    """Only the first process writes and prints; weights are those that one process writes."""
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:30_000])
    common = [str(tiny_checkpoint), "--keep", "0.7", "--multiple", "8", "--text", str(text), "--window", "64"]
    common += ["--tokens", "1024", "--device", "cpu", "--json"]
    one = CliRunner().invoke(app, ["prune", *common, "--out", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    run = rank_cases.launched(["-m", "pyprune", "prune", *common, "--out", str(tmp_path / "two")])
    assert run.returncode == 0, run.stderr[-4000:]
    facts = json.loads(run.stdout)  # one object, from one process
    assert facts["widths"] == json.loads(one.stdout)["widths"]
    own, found = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    for name, tensor in own.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-5, atol=2e-6)


def test_an_error_on_the_command_line_is_said_once(tiny_checkpoint, tmp_path):
    words = ["-m", "pyprune", "prune", str(tiny_checkpoint), "--out", str(tmp_path / "out"), "--device", "cpu"]
    run = rank_cases.launched([*words, "--text", "builtin:prose", "--tokens", "64", "--window", "64"])
    assert run.returncode != 0 and not (tmp_path / "out").exists()
    assert run.stderr.count("error: text must hold a window for each of 2 processes; got 1") == 1, run.stderr


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"gpus": 1}, "cuda", r"^device must be cpu where 2 processes do not have a GPU each .*; got 'cuda, of which"),
        ({"nccl": False}, "cuda", r"^device must be cpu where torch has no NCCL; got 'cuda'"),
        ({}, "cuda:1", r"^device must be cuda, for every process takes the GPU of its number"),
        ({"gloo": False}, "cpu", r"^torch must have torch.distributed with gloo"),
    ],
)
def test_devices_that_processes_cannot_have(change, device, message, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: change.get("gpus", 2))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: change.get("nccl", True))
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: change.get("gloo", True))
    assert local_device("cpu") == "cpu" and local_device("cuda") == "cuda:1" if not change else True
    with pytest.raises(InputError, match=message):
        local_device(device)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "demo"], "WORLD_SIZE must be 1 for evaluate, which runs in one process; got 2"),
        (["prune", "demo", "--out", "x"], "RANK must be a number where WORLD_SIZE is above 1"),
    ],
)
def test_a_launcher_that_said_too_little(words, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nested"], "WORLD_SIZE must be 1 with --nested; got 2"),
        (["--recover", "1"], "WORLD_SIZE must be at most 2 with --recover, which takes so many windows a step; got 3"),
        (["--stream"], "nproc_per_node must be left out with --stream; got '2'"),
    ],
)
def test_what_one_process_must_do(words, message, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("pyprune.cli.prune.launched", lambda: 3 if "--recover" in words else 2)
    result = CliRunner().invoke(app, ["prune", str(tiny_checkpoint), "--out", str(tmp_path / "out"), *words])
    assert result.exit_code == 2 and message in result.stderr
