"""Mixtures in the bench verb: their units by hand, and ceilings as ratios of the experts' bytes."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from moe_cases import listed, make_mixture
from tower_cases import make_tower

from pyprune import UnsupportedModelError, accelerate, prune, prune_experts
from pyprune.speed import roofline, timing
from pyprune.speed.benchmark import benchmark

SETTINGS = {"batches": (1, 2), "prompt_tokens": 4, "new_tokens": 3, "prefill_tokens": 16, "repeats": 1}
ONE = 3 * 32 * 4  # bytes of a gated neuron
# kind -> neurons for a token, and bytes read for one token and for two: 2 of 4 experts of 48 neurons.
MIXED = {
    "qwen3_moe": ([96, 96], [[96 * ONE] * 2, [144 * ONE] * 2]),
    # a dense layer; shared experts of 2 * 48 neurons beside the others
    "deepseek_v3": ([96, 192], [[96 * ONE, 192 * ONE], [96 * ONE, 240 * ONE]]),
    # a dense layer of 96; every expert sees every row, beside a shared one of 48
    "llama4_text": ([96, 240], [[96 * ONE, 240 * ONE]] * 2),
}
MIXED["a list of modules"] = MIXED["qwen3_moe"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "buffer_bytes", lambda device: 1 << 22)


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.filterwarnings("ignore:.* stay as they are")
def test_mixtures(kind: str) -> None:
    dense = make_mixture(kind) if kind != "a list of modules" else listed(make_mixture("mixtral"))
    neurons, read = MIXED[kind]
    units = timing.ffn_units(dense)
    assert [u.neurons for u in units] == neurons
    assert [[u.read(tokens) for u in units] for tokens in (1, 2)] == read
    narrow = copy.deepcopy(dense)
    prune(narrow, 2 / 3, "random", allocation="uniform:multiple=8", repair=None)
    swapped = accelerate(copy.deepcopy(narrow), measure=False)
    for a, b in zip(timing.ffn_units(narrow), timing.ffn_units(swapped), strict=True):
        assert (a.neurons, a.read(1), a.read(5)) == (b.neurons, b.read(1), b.read(5))
    with timing.ffn_probe(dense) as shares:
        timing.Prefill(dense, torch.ones(1, 4, dtype=torch.long))()
    assert len(shares) == 1 and 0 < shares[0] < 1
    result = benchmark(dense, {"narrow": narrow, "swapped": swapped}, **SETTINGS).to_json()
    assert (result["settings"]["experts"], result["settings"]["layers"]) == (4, 2)
    for name in ("narrow", "swapped"):
        entry = result["models"][name]
        assert entry["keep"] == pytest.approx(2 / 3) and entry["ffn_bytes"] == pytest.approx(sum(read[0]) / 3)
        assert [ffn["ceiling"] for ffn in entry["ffn"].values()] == pytest.approx([1.5] * 3)
        two = entry["ffn"]["2"]
        assert two["gb_s"] == pytest.approx(sum(read[1]) / 3 / two["us"] / 1e3)


def test_fewer_experts_are_fewer_bytes_for_several_tokens_alone() -> None:
    """A token still goes to 2; two tokens name 8/3 of 3 experts, and 3 of 4."""
    dense = make_mixture("mixtral")
    few = copy.deepcopy(dense)
    prune_experts(few, 0.75, "random")
    found = benchmark(dense, {"few": few}, **SETTINGS).to_json()["models"]["few"]
    assert found["keep"] == 1.0 and found["ffn"]["1"]["ceiling"] == pytest.approx(1.0)
    assert found["ffn"]["2"]["ceiling"] == pytest.approx(3 / (8 / 3))


def test_every_call_goes_to_other_experts() -> None:
    routed = timing.ffn_units(make_mixture("qwen3_moe"))[0].routed[0]
    seen: list[torch.Tensor] = []
    spy = replace(routed, call=lambda x, index: seen.append(index))
    for _ in range(3):
        spy(torch.zeros(1, 7, 32))
    assert all(index.shape == (7, 2) and bool((index[:, 0] != index[:, 1]).all()) for index in seen)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    named = [len(index.unique()) for index in routed.draw(64, 8, 3, torch.device("cpu"))]  # type: ignore[attr-defined]
    assert sum(named) / len(named) == pytest.approx(replace(routed, experts=64, picked=8).active(3), rel=0.1)


def test_experts_that_are_modules_get_their_own_rows() -> None:
    routed = timing.ffn_units(listed(make_mixture("mixtral")))[0].routed[0]
    visits = routed.draw(4, 2, 5, torch.device("cpu"))
    for step in visits:
        counts = torch.zeros(5, dtype=torch.long)
        for _, tokens in step:  # type: ignore[attr-defined]
            counts[tokens] += 1
        assert counts.tolist() == [2] * 5
    given = routed.call(torch.randn(1, 5, 32), visits[0])
    assert [len(out) for out in given] == [len(tokens) for _, tokens in visits[0]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("bloom", "takes those with one of the"), ("bart", "an encoder beside its decoder")],
)
def test_ffns_that_cannot_run_alone_are_refused(kind: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        timing.ffn_units(make_tower(kind))
