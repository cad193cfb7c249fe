"""vLLM's plugin beside a stand-in for vLLM: its classes' arguments and names, nothing else of it."""

from __future__ import annotations

import copy
import logging
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from pyprune import prune
from pyprune.base.errors import CheckpointError, InputError
from pyprune.model import checkpoint, heterogeneous
from pyprune.model.widths import width_key
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
    state = types.SimpleNamespace(config=None, degree=1, build=nn.Module)
    linear: Any = types.ModuleType("vllm.model_executor.layers.linear")
    linear.ColumnParallelLinear, linear.MergedColumnParallelLinear, linear.RowParallelLinear = Column, Merged, Row
    config: Any = types.ModuleType("vllm.config")

    def current() -> Any:
        assert state.config is not None
        return types.SimpleNamespace(model_config=types.SimpleNamespace(hf_text_config=state.config))

    config.get_current_vllm_config = current
    distributed: Any = types.ModuleType("vllm.distributed")
    distributed.get_tensor_model_parallel_world_size = lambda: state.degree
    loading = "vllm.model_executor.model_loader"
    loader: Any = types.ModuleType(f"{loading}.base_loader")
    loader.initialize_model = lambda vllm_config, *, model_config=None: state.build()
    loader.process_weights_after_loading = lambda model, model_config, target_device: state.packed.append(model)
    files: Any = types.ModuleType(f"{loading}.default_loader")

    class DefaultModelLoader:
        def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[Any]:
            yield from load_file(Path(model_config.model) / "model.safetensors").items()

    files.DefaultModelLoader = DefaultModelLoader
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", loading):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (linear, config, distributed, loader, files):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    state.linear, state.loader, state.files, state.packed = linear, loader, DefaultModelLoader(), []
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


def test_twice_a_width_may_be_the_widest(
    vllm: Any, pruned: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_plugin.register()
    vllm.config = pruned("llama")
    monkeypatch.setattr(vllm_plugin.heterogeneous, "layer_widths", lambda config: [48, 96, 32])
    made = Merged(32, [96, 96], prefix="model.layers.0.mlp.gate_up_proj")
    assert made.output_sizes == [48, 48] and made.sizes == (32, 96)


def test_widths_that_tensor_parallelism_cannot_divide(vllm: Any, pruned: Callable[[str], Any]) -> None:
    vllm_plugin.register()
    vllm.config, vllm.degree = pruned("llama"), 5
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj has 64 neurons, .* of 5 must divide: prune with --mult"
    ):
        Row(96, 32, prefix="model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_up_proj has .96, 96. neurons"):  # the widest too
        Merged(32, [96, 96], prefix="model.layers.1.mlp.gate_up_proj")
    Row(96, 32, prefix="model.layers.0.mlp.down_proj", disable_tp=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("widths", [DIFFERING, (64, 64, 64)])
def test_a_mask_that_is_chosen_at_start(
    family: str, widths: tuple[int, ...], vllm: Any, tiny: Callable[..., Any], random_mask: Any, tmp_path: Path
) -> None:
    vllm_plugin.register()
    model = tiny(family)
    model.save_pretrained(tmp_path / "dense")
    mask = random_mask(model, widths)
    mask.save(tmp_path / "mask.safetensors")
    prune(model, mask=mask, repair=None)
    wanted = load_file(checkpoint.save(model, tmp_path / "pruned") / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path / "dense")
    of_model = types.SimpleNamespace(model=str(tmp_path / "dense"), hf_text_config=config)
    additional = {"pyprune": {"mask": str(tmp_path / "mask.safetensors")}}
    ours = vllm.loader.initialize_model(types.SimpleNamespace(model_config=of_model, additional_config=additional))
    found = dict(vllm.files.get_all_weights(of_model, ours))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert heterogeneous.layer_widths(config) == (list(widths) if widths == DIFFERING else None)
    assert getattr(config, width_key(config)) == max(widths)
    vllm.loader.process_weights_after_loading(ours, of_model, torch.device("cpu"))
    assert vllm.packed == [ours]
    dense = vllm.loader.initialize_model(types.SimpleNamespace(model_config=of_model, additional_config={}))
    assert all(
        t.shape == u.shape
        for t, (_, u) in zip(
            load_file(tmp_path / "dense" / "model.safetensors").values(),
            vllm.files.get_all_weights(of_model, dense),
            strict=True,
        )
    )


def test_a_draft_is_not_the_model(
    vllm: Any, pruned: Callable[[str], Any], tiny: Callable[..., Any], random_mask: Any, tmp_path: Path
) -> None:
    """vLLM builds a draft of speculative decoding under the target's config, or under one of its own."""
    vllm_plugin.register()
    model = tiny("llama")
    model.save_pretrained(tmp_path / "dense")
    mask = random_mask(model, DIFFERING)
    mask.save(tmp_path / "mask.safetensors")
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 3)]  # EAGLE numbers its own after the target's

    class Built(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [Row(96, 32, prefix=name).sizes[0] for name in names]

    dense = AutoConfig.from_pretrained(tmp_path / "dense")
    target, draft = (
        types.SimpleNamespace(model=str(tmp_path / "dense"), hf_text_config=copy.deepcopy(dense)) for _ in range(2)
    )
    vllm.build = Built
    speculative = types.SimpleNamespace(draft_model_config=draft, target_model_config=target)
    given = {"pyprune": {"mask": str(tmp_path / "mask.safetensors")}}

    def make(of: Any, **more: Any) -> Any:
        config = types.SimpleNamespace(model_config=of, additional_config=given, speculative_config=speculative)
        vllm.config = of.hf_text_config
        return vllm.loader.initialize_model(config, **more)

    ours = make(target, model_config=target)
    assert ours._pyprune_cut is not None and ours.sizes == [DIFFERING[0], 96]
    for theirs in (make(target, model_config=draft), make(draft), make(draft, model_config=draft)):
        assert theirs._pyprune_cut is None and theirs.sizes == [96, 96]
    draft.hf_text_config = pruned("llama")  # a draft that is pruned itself
    assert make(target, model_config=draft).sizes == [DIFFERING[0], 96]
    speculative.draft_model_config = target  # as vLLM says where there is no draft model
    assert make(target)._pyprune_cut is not None
    beyond = ("model.layers.3.mlp.up_proj.weight", torch.zeros(7, 32))
    assert next(ours._pyprune_cut.narrow([beyond]))[1] is beyond[1]


def test_masks_that_do_not_fit(vllm: Any, tiny: Callable[..., Any], random_mask: Any, tmp_path: Path) -> None:
    vllm_plugin.register()
    model, other = tiny("llama"), tiny("llama", seed=1)
    for name, one in (("dense", model), ("other", other)):
        one.save_pretrained(tmp_path / name)
        random_mask(one, DIFFERING).save(tmp_path / f"{name}.safetensors")

    def start(folder: Path, mask: Path | str) -> Any:
        config = types.SimpleNamespace(model=str(folder), hf_text_config=AutoConfig.from_pretrained(folder))
        given = types.SimpleNamespace(model_config=config, additional_config={"pyprune": {"mask": str(mask)}})
        return vllm.loader.initialize_model(given)

    with pytest.raises(InputError, match=r"mask must belong to this model"):
        start(tmp_path / "dense", tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"mask must be a file; got '/nowhere'"):
        start(tmp_path / "dense", "/nowhere")
    prune(model, mask=random_mask(model, DIFFERING), repair=None)
    with pytest.raises(InputError, match=r"model must be the dense checkpoint, whose neurons the mask numbers"):
        start(checkpoint.save(model, tmp_path / "pruned"), tmp_path / "dense.safetensors")
    ours = start(tmp_path / "dense", tmp_path / "dense.safetensors")
    narrowed = ours._pyprune_cut.narrow
    with pytest.raises(CheckpointError, match=r"lacks 9 tensors of FFNs, the first is \(0, 'mlp.down_proj.weight'\)"):
        list(narrowed([]))
    with pytest.raises(CheckpointError, match=r"must have a side of 96; got \[7, 32\]"):
        list(narrowed([("model.layers.1.mlp.up_proj.weight", torch.zeros(7, 32))]))


def test_another_vllm_goes_on_without_it(vllm: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    class Renamed:
        def __init__(self, features: int, prefix: str = ""):
            self.features = features

    for change, reason in (
        (
            lambda: monkeypatch.setattr(vllm.loader, "initialize_model", Renamed),
            "initialize_model takes no vllm_config",
        ),
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
