"""What a `PrunedMLP` is left as by a `state_dict` that it cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyprune import InputError, PrunedMLP
from pyprune.ffn.quantisation import WEIGHTS
from pyprune.model.families import find_ffns


@pytest.fixture
def llama_ffn(tiny: Callable[..., Any]) -> nn.Module:
    return find_ffns(tiny("llama", mlp_bias=True))[0].holder


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in kept(module).items())


@pytest.mark.parametrize("weights", ["int8", "int4", "float16"])
@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("bad", ["gate_proj.weight", "down_proj.weight"])
def test_a_state_that_is_refused_changes_nothing(
    weights: str, compensated: bool, bad: str, llama_ffn: nn.Module
) -> None:
    pruned = PrunedMLP.from_dense(llama_ffn, weights=weights)
    state = {f"0.{name}": 2 * tensor for name, tensor in pruned.state_dict().items()}
    state["0.down_proj.weight"][3] *= 64  # other channel scales
    state[f"0.{bad}"][5, 0] = 1e30 if weights == "float16" else float("inf")
    if compensated:
        pruned.set_width(40, torch.randn(40, 32))
    before = kept(pruned)
    with pytest.raises(InputError, match=rf"^0\.{bad} must be finite in torch\.float"):
        nn.Sequential(pruned).load_state_dict(state)
    assert same(pruned, before)


@pytest.mark.parametrize("weights", sorted(WEIGHTS))
def test_compensated_rows_stay_in_place_whatever_ends_a_load(
    weights: str, llama_ffn: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = PrunedMLP.from_dense(llama_ffn, weights=weights)
    state = pruned.state_dict()
    pruned.set_width(40, torch.randn(40, 32))
    before = kept(pruned)

    def full(*given: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(pruned, "_set_part", full)
    with pytest.raises(MemoryError):
        pruned.load_state_dict(state)
    assert same(pruned, before)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_values_for_a_module_without_memory_are_refused(weights: str | None, llama_ffn: nn.Module) -> None:
    pruned = PrunedMLP.from_dense(llama_ffn, weights=weights)
    state = pruned.state_dict()
    pruned.to("meta")
    pruned.load_state_dict(pruned.state_dict())  # there is nothing to lose
    for assign in (False, True):
        with pytest.raises(InputError, match=r"record must have memory .* \(module\.to_empty first\); got 'meta'"):
            pruned.load_state_dict(state, assign=assign)
    pruned.to_empty(device="cpu").load_state_dict(state)
    assert all(torch.isfinite(t).all() for t in pruned.state_dict().values())
