"""Two processes that prune together do what one does alone, and an error of one is an error of both."""

import json
import re

import pytest
import rank_cases
import torch
from safetensors.torch import load_file

from pyprune import InputError, prune
from pyprune.base.ranks import Ranks

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
            r"^ranks must be given the same; they differ in checkpoint .*; keep \(0.5 on rank 0, 0.75 on rank 1",
        ),
        ("words", 0, r"^ranks must be given the same; they differ in text \([^;]*$"),
        ("few", 0, r"^text must hold a window for each of 2 processes; got 1$"),
        ("invalid", 0, r"^rank 1: keep must lie in \(0, 1\]; got 1.5$"),
        ("broken", 0, r"^rank 1: OSError: no space left$"),
        ("broken", 1, r"^no space left$"),
    ],
)
def test_an_error_of_one_is_an_error_of_both(name, rank, message, done):
    found = facts_of(done, name, rank)
    assert re.search(message, found["error"]), found
    assert found["kind"] == ("InputError" if name != "broken" else ("PypruneError", "OSError")[rank])
    if name in ("other", "words", "few"):
        assert facts_of(done, name, 1) == found


def test_processes_without_a_group_are_refused(tiny, ids, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torch.distributed must be initialised .*; got 'WORLD_SIZE=2'"):
        prune(tiny("llama"), method="random", repair=None)
    assert not Ranks.joined(together=False).several
    prune(tiny("llama"), method="random", repair=None, together=False)
