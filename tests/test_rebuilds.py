"""Models whose config says their widths in ways of its own: what is pruned is saved and loads again."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune import UnsupportedModelError, prune
from pyprune.model import checkpoint, loading
from pyprune.model.families import find_ffns

BARE = {"keep": 0.7, "method": "magnitude-l2-product", "repair": None, "allocation": "uniform:multiple=1"}
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


def survives(model, ids, folder):
    """Saved, and loaded again, it gives the same logits."""
    checkpoint.save(model, folder)
    again = loading.load_model(str(folder))
    assert [f.intermediate_size for f in find_ffns(again)] == [f.intermediate_size for f in find_ffns(model)]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_a_width_that_is_half_of_what_the_config_says(ids, tmp_path):
    model = build(recurrent())
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == [48] * 3
    prune(model, **BARE)
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == [34] * 3
    survives(model, ids, tmp_path / "out")


def test_differing_widths_of_a_family_that_lists_them(ids, tmp_path):
    model = build(gemma3n())
    prune(model, **{**BARE, "allocation": "global:multiple=1"})
    assert len({ffn.intermediate_size for ffn in find_ffns(model)}) > 1
    survives(model, ids, tmp_path / "out")


def test_curves_of_a_family_whose_layers_read_the_tokens_are_refused(ids):
    model = build(gemma3n())
    message = r"Gemma3nForCausalLM: decoder layer 0 gets more from the tokens .* cannot be calibrated layer by layer"
    with pytest.raises(UnsupportedModelError, match=message):
        prune(model, **{**BARE, "allocation": "sensitivity:multiple=1"}, text=ids)
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == [96] * 3


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


def test_no_model_of_transformers():
    with pytest.raises(UnsupportedModelError, match="Linear is no model of Transformers: it has no config"):
        find_ffns(torch.nn.Linear(2, 2))


def test_a_family_that_derives_its_width_takes_it_as_it_stands(tiny, tmp_path):
    model = tiny("lfm2", block_auto_adjust_ff_dim=True, intermediate_size=144)
    before = find_ffns(model)[0].intermediate_size
    prune(model, **{**BARE, "keep": 0.5})
    assert before != 144 and model.config.intermediate_size == before // 2
    again = loading.load_model(str(checkpoint.save(model, tmp_path / "lfm2")))
    assert {ffn.intermediate_size for ffn in find_ffns(again)} == {before // 2}
