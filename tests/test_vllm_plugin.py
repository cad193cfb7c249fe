"""vLLM's plugin beside a stand-in for vLLM: its classes' arguments and names, nothing else of it."""

from __future__ import annotations

import logging
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from pyprune import prune
from pyprune.model import checkpoint
from pyprune.serving import vllm_plugin

DIFFERING = (64, 96, 32)


class Column:
    def __init__(self, input_size: int, output_size: int, bias: bool = True, prefix: str = "", *, disable_tp=False):
        self.sizes = (input_size, output_size)


class Merged(Column):
    """As vLLM's, it calls the constructor that it inherits, with the sum of its sizes and the same name."""

    def __init__(
        self, input_size: int, output_sizes: list[int], bias: bool = True, prefix: str = "", *, disable_tp=False
    ):
        self.output_sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), bias, prefix, disable_tp=disable_tp)


class Row:
    def __init__(self, input_size: int, output_size: int, bias: bool = True, prefix: str = "", *, disable_tp=False):
        self.sizes = (input_size, output_size)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tree of modules named as vLLM's; `.config` is the model's, `.degree` that of tensor parallelism."""
    for kind in (Column, Merged, Row):
        monkeypatch.setattr(kind, "__init__", kind.__init__)  # put back afterwards
    monkeypatch.setattr(
        PreTrainedConfig, vllm_plugin._ALLOWED, getattr(PreTrainedConfig, vllm_plugin._ALLOWED), raising=False
    )
    state = types.SimpleNamespace(config=None, degree=1)
    linear: Any = types.ModuleType("vllm.model_executor.layers.linear")
    linear.ColumnParallelLinear, linear.MergedColumnParallelLinear, linear.RowParallelLinear = Column, Merged, Row
    config: Any = types.ModuleType("vllm.config")

    def current() -> Any:
        assert state.config is not None
        return types.SimpleNamespace(model_config=types.SimpleNamespace(hf_text_config=state.config))

    config.get_current_vllm_config = current
    distributed: Any = types.ModuleType("vllm.distributed")
    distributed.get_tensor_model_parallel_world_size = lambda: state.degree
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (linear, config, distributed):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    state.linear = linear
    yield state


@pytest.fixture
def pruned(tiny: Callable[..., Any], random_mask: Callable[..., Any], tmp_path: Path) -> Callable[[str], Any]:
    """`pruned(family)` -> the config of a checkpoint whose widths are `DIFFERING`, as vLLM reads it."""

    def make(family: str) -> Any:
        model = tiny(family)
        prune(model, mask=random_mask(model, DIFFERING), repair=None)
        return AutoConfig.from_pretrained(checkpoint.save(model, tmp_path / family))

    return make


def test_vllm_finds_it() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    place = project["entry-points"]["vllm.general_plugins"]["pyprune"]
    assert EntryPoint("pyprune", place, "vllm.general_plugins").load() is vllm_plugin.register


def test_each_layer_takes_its_own_width(vllm: Any, pruned: Callable[[str], Any], caplog: Any) -> None:
    for _ in range(2):  # vLLM may call it more than once
        vllm_plugin.register()
    assert not caplog.records
    vllm.config = config = pruned("llama")
    config.__dict__.pop(vllm_plugin._ALLOWED)
    full = config.intermediate_size  # which Transformers refuses to tell where widths differ
    assert full == 96
    for layer, width in enumerate(DIFFERING):
        name = f"model.layers.{layer}.mlp"
        merged = Merged(32, [full] * 2, prefix=f"{name}.gate_up_proj")
        assert (merged.output_sizes, merged.sizes) == ([width] * 2, (32, 2 * width))
        assert Row(full, 32, prefix=f"{name}.down_proj").sizes == (width, 32)
        assert Row(width, 32, prefix=f"{name}.down_proj").sizes == (width, 32)  # Transformers' modules have it already
        assert Row(full, 32, prefix=f"model.layers.{layer}.self_attn.o_proj").sizes == (full, 32)
    assert Column(32, full, prefix="lm_head").sizes == (32, full)
    vllm.config = None  # a layer outside of any model
    assert Row(full, 32, prefix="model.layers.0.mlp.down_proj").sizes == (full, 32)


@pytest.mark.parametrize(
    ("family", "up", "down", "size"),
    [
        ("gpt2", "transformer.h.2.mlp.c_fc", "transformer.h.2.mlp.c_proj", 96),
        ("opt", "model.decoder.layers.2.fc1", "model.decoder.layers.2.fc2", 96),
        ("phi3", "model.layers.2.mlp.gate_up_proj", "model.layers.2.mlp.down_proj", 192),
    ],
)
def test_names_of_other_families(
    family: str, up: str, down: str, size: int, vllm: Any, pruned: Callable[[str], Any]
) -> None:
    vllm_plugin.register()
    vllm.config = pruned(family)
    assert Column(32, size, prefix=up).sizes == (32, size // 3)
    assert Row(96, 32, prefix=down).sizes == (32, 32)


def test_widths_that_tensor_parallelism_cannot_divide(vllm: Any, pruned: Callable[[str], Any]) -> None:
    vllm_plugin.register()
    vllm.config, vllm.degree = pruned("llama"), 5
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj has 64 neurons, .* of 5 must divide: prune with --mult"
    ):
        Row(96, 32, prefix="model.layers.0.mlp.down_proj")
    Row(96, 32, prefix="model.layers.0.mlp.down_proj", disable_tp=True)


def test_another_vllm_goes_on_without_it(vllm: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    class Renamed:
        def __init__(self, features: int, prefix: str = ""):
            self.features = features

    for change, reason in (
        (lambda: monkeypatch.setattr(vllm.linear, "RowParallelLinear", Renamed), "Renamed takes no input_size"),
        (lambda: monkeypatch.delattr(vllm.linear, "RowParallelLinear"), "no attribute 'RowParallelLinear'"),
        (lambda: monkeypatch.setitem(sys.modules, "vllm.config", None), "vllm.config"),
    ):
        change()
        caplog.clear()
        vllm_plugin.register()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "\n" not in record.getMessage() and reason in record.getMessage()
        assert not hasattr(Column.__init__, "_pyprune") and Renamed(3).features == 3
