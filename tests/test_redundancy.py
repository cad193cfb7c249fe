"""Redundancy of neurons: of hand-made activations, and of models into which copies were put."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import InputError
from pyprune.evaluation.analysis import neuron_redundancy
from pyprune.evaluation.analysis.redundancy import clusters
from pyprune.model import families
from pyprune.pruning import importance
from pyprune.pruning.importance.uniqueness import uniqueness

Tiny = Callable[..., Any]


def duplicated(model: Any, layer: int, pairs: list[tuple[int, int]], sign: float = 1.0) -> Any:
    """Makes the second neuron of each pair put out what the first does, times `sign`."""
    ffn = families.find_ffns(model)[layer]
    with torch.no_grad():
        for a, b in pairs:
            for name, factor in (("gate_proj", 1.0), ("up_proj", sign)):
                weight = ffn.holder.get_submodule(name).weight
                weight[b] = factor * weight[a]
    return model


def test_clusters_by_hand() -> None:
    cosine = torch.zeros(7, 7)
    for i, j in ((0, 3), (3, 6), (1, 2)):  # a chain of three, and a pair
        cosine[i, j] = cosine[j, i] = 0.9
    cosine[4, 5] = cosine[5, 4] = 0.7
    assert clusters(cosine, 0.8) == [[0, 3, 6], [1, 2]]
    assert clusters(cosine, 0.6) == [[0, 3, 6], [1, 2], [4, 5]]
    assert clusters(cosine, 0.95) == []


def test_a_long_chain_is_one_cluster() -> None:
    cosine = torch.zeros(50, 50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    cosine[order[:-1], order[1:]] = cosine[order[1:], order[:-1]] = 1.0
    assert clusters(cosine, 0.5) == [list(range(50))]


def test_copies_are_found(tiny: Tiny, ids: Tensor) -> None:
    model = duplicated(tiny("llama"), 1, [(3, 40), (3, 41), (7, 90)])
    before = neuron_redundancy(tiny("llama"), ids, threshold=0.999)
    found = neuron_redundancy(model, ids, threshold=0.999)
    assert [layer["clusters"]["count"] for layer in before.layers] == [0, 0, 0]
    assert [layer["clusters"]["count"] for layer in found.layers] == [0, 2, 0]
    assert found.layers[1]["clusters"]["largest"] == [
        {"size": 3, "neurons": [3, 40, 41]},
        {"size": 2, "neurons": [7, 90]},
    ]
    # Of n alike neurons one is unique: 3 of 96 are not.
    assert found.layers[1]["uniqueness"] == pytest.approx(1 - 3 / 96) and before.layers[1]["uniqueness"] == 1.0
    assert found.all["uniqueness"] == pytest.approx(1 - 3 / 288) and found.all["clusters"] == {"count": 2, "neurons": 5}


def test_mirrors_are_redundant_by_the_absolute_cosine_alone(tiny: Tiny, ids: Tensor) -> None:
    layer = neuron_redundancy(duplicated(tiny("llama"), 0, [(5, 6)], sign=-1.0), ids, threshold=0.999).layers[0]
    assert layer["uniqueness"] == pytest.approx(1 - 1 / 96) and layer["uniqueness_signed"] == 1.0


def test_it_is_the_uniqueness_of_the_library(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("gpt2")
    found = neuron_redundancy(model, ids, threshold=0.4)
    seen: list[Tensor] = []
    ffn = families.find_ffns(model)[0]
    handle = ffn.down.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 96).double()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    gram = seen[0].T @ seen[0]
    assert found.layers[0]["uniqueness"] == pytest.approx(uniqueness(gram, 0.4), abs=1.5 / 96)
    assert sum(found.layers[0]["highest"]) == 96
    curve = [point["uniqueness"] for point in found.layers[0]["curve"]]
    assert curve == sorted(curve) and curve[0] < 1


def test_sensitivity_is_the_papers(tiny: Tiny, ids: Tensor) -> None:
    """mean over windows of abs(sum over the neuron's parameters of w dL/dw), here by autograd."""
    model = tiny("llama")
    found = neuron_redundancy(model, ids)
    ffn = families.find_ffns(model)[1]
    total = torch.zeros(96, dtype=torch.float64)
    for window in ids:
        model.zero_grad()
        model(input_ids=window[None], labels=window[None]).loss.backward()
        modules = [ffn.holder.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
        parts = [(m.weight * m.weight.grad).double() for m in modules]
        total += (parts[0].sum(1) + parts[1].sum(1) + parts[2].sum(0)).detach().abs()
    expected = total / len(ids)
    spread = found.layers[1]["sensitivity"]
    assert spread["mean"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert spread["largest"] == pytest.approx(float(expected.max()), rel=1e-4)
    assert spread["top_tenth"] == pytest.approx(float(expected.topk(9).values.sum() / expected.sum()), rel=1e-4)


def test_after_pruning(tiny: Tiny, ids: Tensor) -> None:
    model = duplicated(tiny("llama"), 1, [(i, i + 48) for i in range(48)])
    found = neuron_redundancy(model, ids, 0.999, ("random", "sensitivity", "wanda-unique"), keep=0.5)
    layer = found.layers[1]["after"]
    assert found.layers[1]["uniqueness"] == 0.5
    assert layer["wanda-unique"]["uniqueness"] == 1.0 > layer["random"]["uniqueness"]
    shares = {
        name: entry["after"]["sensitivity"]["sensitivity"] for name, entry in zip("abc", found.layers, strict=True)
    }
    assert all(0.5 < share < 1 for share in shares.values())
    parts = [entry["sensitivity"]["mean"] for entry in found.layers]
    pooled = sum(share * part for share, part in zip(shares.values(), parts, strict=True)) / sum(parts)
    assert found.after["sensitivity"]["sensitivity"] == pytest.approx(pooled)
    for entry in found.layers:
        best = entry["after"]["sensitivity"]["sensitivity"]
        assert best >= max(after["sensitivity"] for after in entry["after"].values())
    assert neuron_redundancy(model, ids, keep=1.0, criteria=("wanda",)).after["wanda"]["sensitivity"] == pytest.approx(
        1
    )
    assert json.loads(json.dumps(found.to_json()))["keep"] == 0.5


def test_every_criterion_and_family(tiny: Tiny, family: str, ids: Tensor) -> None:
    names = [name for name in importance.names() if name != "obs"] if family == "llama" else ["wanda"]
    found = neuron_redundancy(tiny(family), ids, criteria=names)
    assert set(found.after) == set(names) and len(found.layers) == 3
    assert all(0 < entry["uniqueness"] <= 1 for entry in found.after.values())


def test_permuted_neurons_change_nothing(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama")
    other = copy.deepcopy(model)
    for ffn in families.find_ffns(other):
        order = torch.randperm(96)
        for name in ("gate_proj", "up_proj"):
            module = ffn.holder.get_submodule(name)
            module.weight.data = module.weight.data[order]
        ffn.down.weight.data = ffn.down.weight.data[:, order]
    a, b = (neuron_redundancy(m, ids, 0.999, ("wanda",)) for m in (model, other))
    assert b.all["sensitivity"] == pytest.approx(a.all["sensitivity"], rel=1e-4)
    assert b.all["highest"] == a.all["highest"] and b.all["uniqueness"] == a.all["uniqueness"]


def test_bad_input(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match=r"threshold must lie in \(0, 1\]; got 1.5"):
        neuron_redundancy(model, ids, threshold=1.5)
    with pytest.raises(InputError, match=r"keep must lie in \(0, 1\]; got 0"):
        neuron_redundancy(model, ids, keep=0)
    with pytest.raises(InputError, match="method must be one of"):
        neuron_redundancy(model, ids, criteria=("wandaa",))
    with pytest.raises(InputError, match="windows must have windows of at most 64 tokens"):
        neuron_redundancy(model, torch.ones(1, 65, dtype=torch.long))
