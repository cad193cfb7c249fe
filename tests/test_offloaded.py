"""Models loaded with a device_map whose layers accelerate's hooks keep elsewhere: pruned as they are, to the bit."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyprune import InputError, UnsupportedModelError, accelerate, prune
from pyprune.model import checkpoint, loading
from pyprune.model.offloaded import is_offloaded
from pyprune.pruning.prune import score

hf_accelerate = pytest.importorskip("accelerate")

HOW: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude-l2-both", "repair": None},
    "fit": {"method": "wanda", "repair": "least-squares:target=auto"},
    "global, bias": {"method": "wanda", "repair": "bias", "allocation": "global:multiple=5"},
    "not sequential": {"method": "obs", "repair": "least-squares", "sequential": False},
}
WHERE = {
    "first": {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "cpu"},
    "last": {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
    "all": {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk"},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_model("llama", intermediate_size=91).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(source: Path, places: dict[str, Any], elsewhere: str | int = "cpu", folder: str | None = "offloaded") -> Any:
    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), elsewhere)
    folder = None if folder is None else source.parent / folder
    model = AutoModelForCausalLM.from_pretrained(source, device_map={**outside, **places}, offload_folder=folder)
    return model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def check_same(model: Any, whole: Any, ids: torch.Tensor, folder: Path) -> None:
    """Weights as saved, and what both compute."""
    checkpoint.save(whole, folder / "whole")
    checkpoint.save(model, folder / "pruned")
    a, b = tensors(folder / "pruned"), tensors(folder / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (folder / "pruned" / "config.json").read_bytes() == (folder / "whole" / "config.json").read_bytes()
    with torch.no_grad():
        assert torch.equal(model(ids).logits.cpu(), whole(ids.to(whole.device)).logits.cpu())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("how", HOW)
def test_pruned_as_they_are(how: str, where: str, source: Path, tmp_path: Path, more_ids: torch.Tensor) -> None:
    whole, model = loading.load_model(str(source)), load(source, WHERE[where])
    assert is_offloaded(model) and not is_offloaded(whole)
    text, before = None if how == "magnitude" else more_ids, {f: f.read_bytes() for f in source.iterdir()}
    a, b = (prune(one, 0.6, text=text, **HOW[how]) for one in (model, whole))
    assert a.mask == b.mask and a.layers == b.layers and a.parameters_after == b.parameters_after
    assert before == {file: file.read_bytes() for file in source.iterdir()}
    absent = {name for name, p in model.named_parameters() if p.is_meta}
    assert absent and all(p.shape == model.get_parameter(name).shape for name, p in whole.named_parameters())
    check_same(model, whole, more_ids, tmp_path)
    assert {name for name, p in model.named_parameters() if p.is_meta} == absent
    bare: dict[str, Any] = {"method": "magnitude-l2-both", "repair": None, "allocation": "uniform:multiple=5"}
    assert prune(model, 0.5, **bare).mask == prune(whole, 0.5, **bare).mask
    gc.collect()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_as_accelerate_offloads_by_itself(where: str, source: Path, tmp_path: Path, more_ids: torch.Tensor) -> None:
    whole, place = loading.load_model(str(source)), torch.device("cpu")
    model = loading.load_model(str(source))
    if where == "memory":
        hf_accelerate.cpu_offload(model, place)
    else:
        hf_accelerate.disk_offload(model, tmp_path / "offloaded", place)
    a, b = (prune(one, 0.6, text=more_ids, **HOW["fit"]) for one in (model, whole))
    assert a.mask == b.mask and a.layers == b.layers
    with torch.no_grad():
        assert torch.equal(model(more_ids).logits, whole(more_ids).logits)


def test_what_is_refused(source: Path, more_ids: torch.Tensor) -> None:
    model = load(source, WHERE["last"])
    for how, said in (
        ({"allocation": "sensitivity"}, "allocation must be uniform or global where accelerate's hooks"),
        ({"method": "taylor-element"}, "method must need no gradients where accelerate's hooks"),
        ({"text": [{"input_ids": more_ids}]}, "text must be windows of token ids where layers are offloaded"),
    ):
        with pytest.raises(InputError, match=said):
            prune(model, 0.6, **{"text": more_ids, "method": "wanda", **how})
    for other in (lambda: score(model, "wanda", text=more_ids), lambda: accelerate(model)):
        with pytest.raises(UnsupportedModelError, match=r"is offloaded\): prune it as it is .* --stream"):
            other()
    prune(model, 0.6, "magnitude-l2-both", repair=None)
    model = load(source, WHERE["last"], folder=None)
    with pytest.raises(UnsupportedModelError, match=r"load it with offload_folder=, or .* --stream"):
        prune(model, 0.6, "magnitude-l2-both", repair=None)


def test_weights_that_are_not_finite(source: Path, tmp_path: Path) -> None:
    dense = make_model("llama", intermediate_size=91)
    dense.model.layers[2].mlp.up_proj.weight.data[3, 2] = torch.nan
    dense.save_pretrained(tmp_path / "nan")
    model = load(tmp_path / "nan", WHERE["last"])
    with pytest.raises(InputError, match=r"finite weights; got 'NaN .* model\.layers\.2\.mlp\.up_proj\.weight"):
        prune(model, 0.6, "magnitude-l2-both", repair=None)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (91, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["magnitude", "fit"])
@pytest.mark.parametrize("beside", ["cpu", "disk"])
def test_beside_a_gpu(how: str, beside: str, source: Path, tmp_path: Path, more_ids: torch.Tensor) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    whole = loading.load_model(str(source), device="cuda")
    model = load(source, {"model.layers.0": 0, "model.layers.1": beside, "model.layers.2": beside}, 0)
    text = None if how == "magnitude" else more_ids
    a, b = (prune(one, 0.6, text=text, **HOW[how]) for one in (model, whole))
    assert a.mask == b.mask and a.layers == b.layers
    check_same(model, whole, more_ids, tmp_path)


@pytest.mark.gpu
def test_two_devices_at_once(source: Path, tmp_path: Path, more_ids: torch.Tensor) -> None:
    """One layer computes on the GPU, the others on the CPU: nothing is offloaded, sums are where a layer is."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from accelerate import dispatch_model

    outside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places = {**outside, "model.layers.0": "cpu", "model.layers.1": 0, "model.layers.2": "cpu"}
    model = dispatch_model(loading.load_model(str(source)), places, main_device="cpu")
    assert not is_offloaded(model)
    report = prune(model, 0.6, text=more_ids, **HOW["fit"])
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "cuda"
    whole = loading.load_model(str(source))
    wanted = prune(whole, 0.6, text=more_ids, **HOW["fit"])
    for found, one in zip(report.layers, wanted.layers, strict=True):
        assert found.after == one.after and found.error_repaired == pytest.approx(one.error_repaired, rel=1e-2)
