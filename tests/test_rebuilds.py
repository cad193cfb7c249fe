"""Models whose result could not be saved are refused before any of the work, not after it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig

from pyprune import UnsupportedModelError, prune
from pyprune.model import checkpoint, loading
from pyprune.model.families import find_ffns

BARE = {"method": "magnitude-l2-product", "repair": None, "allocation": "uniform:multiple=1"}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def gemma3n():
    return AutoConfig.for_model(
        "gemma3n_text",
        **SMALL,
        **GROUPED,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        laurel_rank=4,
        layer_types=["full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 3,
    )


def recurrent():
    return AutoConfig.for_model("recurrent_gemma", **SMALL, lru_width=32)


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def refused(model, config, message, monkeypatch):
    """Before a layer is looked at, and with everything as it was."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model.config.to_dict()
    monkeypatch.setattr("pyprune.pruning.prune.Pruner", lambda *a: pytest.fail("too late"))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        prune(model, **config)
    assert "\n" not in str(caught.value)
    assert model.config.to_dict() == before
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_width_that_is_half_of_what_the_config_says(monkeypatch):
    model = build(recurrent())
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == [48] * 3
    message = r"RecurrentGemmaForCausalLM cannot be saved with a width of 34, so it is not pruned: .*config builds"
    refused(model, BARE, message, monkeypatch)


@pytest.mark.parametrize("allocation", ["global", "sensitivity"])
def test_differing_widths_of_a_family_that_lists_them(allocation, ids, monkeypatch):
    model = build(gemma3n())
    message = r"Gemma3nForCausalLM cannot be saved with widths that differ by layer, so it is not pruned: "
    if allocation == "global":
        refused(model, {**BARE, "allocation": f"{allocation}:multiple=1"}, message, monkeypatch)
    else:
        with pytest.raises(UnsupportedModelError, match=message):
            prune(model, **{**BARE, "allocation": f"{allocation}:multiple=1"}, text=ids)


def test_equal_widths_of_that_family_go_through(ids, tmp_path):
    model = build(gemma3n())
    prune(model, **BARE)
    checkpoint.save(model, tmp_path / "out")
    assert checkpoint.verify(tmp_path / "out")["widths"] == [67] * 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_class_of_ones_own_is_pruned_all_the_same(tiny):
    """It cannot be saved by pyprune, which is known; its user may have other plans."""
    model = tiny("llama")
    model.__class__ = type("MyModel", (type(model),), {})
    prune(model, **BARE)
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == [67] * 3


# What is no list of decoder layers, in words


class DistributedDataParallel(torch.nn.Module):
    """As torch's: the model is a child, and nothing else of it shows."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_wrapper_says_what_to_pass_instead(tiny):
    with pytest.raises(UnsupportedModelError, match=r"Parallel wraps a LlamaForCausalLM: pass .* model\.module"):
        find_ffns(DistributedDataParallel(tiny("llama")))


def test_a_model_of_images_too_is_named_as_such():
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(text_config={"model_type": "llama", **SMALL, **GROUPED}, vision_config=vision)
    with pytest.raises(UnsupportedModelError, match=r"\(vision_config\): its text tower is not supported yet"):
        find_ffns(AutoModelForImageTextToText.from_config(config))


def test_no_model_of_transformers():
    with pytest.raises(UnsupportedModelError, match="Linear is no model of Transformers: it has no config"):
        find_ffns(torch.nn.Linear(2, 2))


def test_a_family_that_derives_its_width_takes_it_as_it_stands(tiny, tmp_path):
    model = tiny("lfm2", block_auto_adjust_ff_dim=True, intermediate_size=144)
    before = find_ffns(model)[0].intermediate_size
    prune(model, keep=0.5, **BARE)
    assert before != 144 and model.config.intermediate_size == before // 2
    again = loading.load_model(str(checkpoint.save(model, tmp_path / "lfm2")))
    assert {ffn.intermediate_size for ffn in find_ffns(again)} == {before // 2}
