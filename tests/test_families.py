"""Families: what is recognised, what is refused and how, and the whole way from dense to a reloaded checkpoint."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from pyprune import UnsupportedModelError, accelerate, prune
from pyprune.base import reference
from pyprune.model import checkpoint, families, patterns, probe
from pyprune.model.families import find_ffns
from pyprune.model.units import OWN

BARE = {"repair": None}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}
LOOKALIKES = ("relu6", "gelu_10", "leaky_relu", "mish", "sigmoid", "tanh", "linear")


@pytest.mark.parametrize("widths", [(40, 40, 40), (64, 1, 96)], ids=["uniform", "differing"])
def test_prune_save_reload_generate(family, widths, tiny, ids, random_mask, masked, tmp_path, same_logits):
    model = tiny(family)
    mask = random_mask(model, widths)
    want = masked(model, mask)(ids).logits
    prune(model, **BARE, mask=mask)
    got = model(ids).logits
    same_logits(got, want)

    checkpoint.save(model, tmp_path / "out")
    checkpoint.verify(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert [ffn.intermediate_size for ffn in find_ffns(loaded)] == list(widths)
    assert torch.equal(loaded(ids).logits, got)
    assert loaded.generate(ids[:1], max_new_tokens=3, do_sample=False, min_new_tokens=3).shape == (1, 19)


def test_every_layer_is_found_as_built(family, tiny):
    model = tiny(family)
    ffns = find_ffns(model)
    assert [f.layer for f in ffns] == [0, 1, 2]
    assert {(f.hidden_size, f.intermediate_size) for f in ffns} == {(model.config.hidden_size, 96)}


def test_weights_are_views_of_the_model(family, tiny):
    model = tiny(family)
    ffn = find_ffns(model)[1]
    own = {p.untyped_storage().data_ptr() for p in ffn.parameters()}
    tensors = [*ffn.weights().parts, *ffn.weights().input_biases, ffn.weights().down_bias]
    assert {t.untyped_storage().data_ptr() for t in tensors if t is not None} == own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_dead_weights_do_not_blur_detection(family, dtype, tiny):
    model = tiny(family)
    want = [ffn.activation for ffn in find_ffns(model)]
    model.to(dtype)
    assert [ffn.activation for ffn in find_ffns(model)] == want
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert [ffn.activation for ffn in find_ffns(model)] == want


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("family_of_act", ["llama", "phi", "opt"])
def test_activation_is_named_by_behaviour(name, family_of_act, tiny):
    key = {"opt": "activation_function"}.get(family_of_act, "hidden_act")
    assert {f.activation for f in find_ffns(tiny(family_of_act, **{key: name}))} == {ACTIVATIONS[name]}
    assert set(ACTIVATIONS.values()) == set(reference.ACTIVATIONS)


@pytest.mark.parametrize("name", LOOKALIKES)
@pytest.mark.parametrize("family_of_act", ["llama", "phi"])
def test_lookalike_activation_is_never_named(name, family_of_act, tiny):
    assert {f.activation for f in find_ffns(tiny(family_of_act, hidden_act=name))} == {OWN}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalike_activation_of_an_in_layer_ffn_is_refused(name, tiny):
    with pytest.raises(UnsupportedModelError, match=r"layers\.0.*does not compute a plain FFN with one of gelu"):
        find_ffns(tiny("opt", activation_function=name))


def test_nothing_depends_on_names(tiny, tiny_config):
    class Unheard(LlamaForCausalLM):
        pass

    model = Unheard(tiny_config("llama"))
    model.config.model_type = "unheard"
    for layer in model.model.layers:
        layer.mlp.__class__ = type("Other", (LlamaMLP,), {})
    assert {f.pattern.name for f in find_ffns(model)} == {"gate_proj/up_proj/down_proj"}


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        (
            "bitnet",
            {"intermediate_size": 48, "num_attention_heads": 4},
            r"layers\.0\.mlp .*ffn_sub_norm, a norm over all",
        ),
        ("mamba", {}, r"no FFN that pyprune knows; found norm .*MambaMixer.*no FFN neurons to prune"),
        ("rwkv", {"attention_hidden_size": 32}, r"blocks\.0 has no FFN that pyprune knows; found .*feed_forward"),
    ],
)
def test_unknown_shape_is_refused_by_what_was_found(model_type, config, message):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small, **config))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        prune(model, method="random", repair=None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class NormedMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.intermediate_size)

    def forward(self, x):
        return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class BareNormMLP(LlamaMLP):
    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.normalize(inner, dim=-1))


class ScaledMLP(LlamaMLP):
    def forward(self, x):
        return 0.98 * super().forward(x)


class ResidualMLP(LlamaMLP):
    def forward(self, x):
        return x + super().forward(x)


class SwappedMLP(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class NormalisingMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(nn.functional.normalize(x, dim=-1))


class RoutedMLP(LlamaMLP):
    def forward(self, x, routing):
        return super().forward(x) * routing


@pytest.mark.parametrize("odd", [NormedMLP, BareNormMLP, ScaledMLP, ResidualMLP, RoutedMLP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_that_only_looks_familiar_is_refused(odd, dtype, tiny):
    model = tiny("llama")
    model.model.layers[2].mlp = odd(model.config)
    with pytest.raises(UnsupportedModelError, match=rf"model\.layers\.2\.mlp \({odd.__name__}, gate_proj/up_proj"):
        find_ffns(model.to(dtype))


@pytest.mark.parametrize("odd", [SwappedMLP, NormalisingMLP])
def test_ffn_of_a_form_of_its_own_is_pruned_and_left_by_accelerate(odd, tiny, ids, random_mask, masked, same_logits):
    model = tiny("llama")
    for layer in model.model.layers:
        copied = odd(model.config)
        copied.load_state_dict(layer.mlp.state_dict())
        layer.mlp = copied.eval()
    mask = random_mask(model, (64, 1, 96))
    want = masked(model, mask)(ids).logits
    prune(model, **BARE, mask=mask)
    got = model(ids).logits
    same_logits(got, want)
    with pytest.warns(UserWarning, match=r"0 experts and 3 FFNs of LlamaForCausalLM stay as they are"):
        accelerate(model)
    assert torch.equal(model(ids).logits, got)
    with pytest.raises(UnsupportedModelError, match="all were asked for"):
        accelerate(model, backend="torch")


def test_in_layer_ffn_with_a_norm_over_its_neurons_is_refused(tiny):
    model = tiny("opt")
    model.model.decoder.layers[1].ffn_layernorm = nn.LayerNorm(96)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 has a norm over its neurons, ffn_layernorm"):
        find_ffns(model)


def test_two_ffns_in_one_layer_are_both_found(tiny, ids):
    model = tiny("llama")
    model.model.layers[0].second = LlamaMLP(model.config)
    assert [(f.layer, f.block, f.name.rpartition(".")[2]) for f in find_ffns(model)] == [
        (0, 0, "mlp"),
        (1, 0, "second"),
        (2, 1, "mlp"),
        (3, 2, "mlp"),
    ]
    with pytest.raises(UnsupportedModelError, match=r"cannot be saved.*second"):
        prune(model, text=ids)


@pytest.mark.parametrize("whole", [True, False], ids=["one module", "tied weights"])
def test_shared_ffn_is_pruned_once(whole, tiny, ids, random_mask, masked, same_logits):
    model = tiny("llama")
    layers = model.model.layers
    if whole:
        layers[2].mlp = layers[0].mlp
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layers[2].mlp, name).weight = getattr(layers[0].mlp, name).weight
    ffns = find_ffns(model)
    assert [(f.name, f.shared) for f in ffns] == [("model.layers.0.mlp", True), ("model.layers.1.mlp", False)]
    mask = random_mask(model, (40, 24))
    want = masked(model, mask)(ids).logits
    prune(model, **BARE, mask=mask)
    same_logits(model(ids).logits, want)
    assert layers[2].mlp.down_proj.in_features == 40 and layers[2].mlp.down_proj.weight.shape[1] == 40


def test_decoder_layers_are_never_guessed(tiny):
    with pytest.raises(UnsupportedModelError, match="Linear is no model of Transformers: it has no config"):
        find_ffns(nn.Linear(2, 2))
    model = tiny("llama")
    model.model.towers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(UnsupportedModelError, match=r"does not have one list of 3.*layers \(3\), model\.towers \(3\)"):
        find_ffns(model)
    model = tiny("llama")
    model.config.num_hidden_layers = 2
    with pytest.raises(UnsupportedModelError, match=r"a list of 2 decoder layers .*found model\.layers \(3\)"):
        find_ffns(model)


def test_width_key_and_bias_key(tiny_config):
    assert families.width_key(tiny_config("gpt2")) == "n_inner"
    assert families.width_key(tiny_config("opt")) == "ffn_dim"
    assert families.width_key(tiny_config("falcon")) == "ffn_hidden_size"
    assert families.width_key(tiny_config("llama")) == "intermediate_size"
    assert families.bias_key(tiny_config("llama")) == "mlp_bias"
    assert families.bias_key(tiny_config("qwen2")) is None
    for model_type in ("bloom", "openai-gpt"):  # 4 x hidden: widths go into per_layer_config
        config = AutoConfig.for_model(model_type)
        assert families.width_key(config) == "intermediate_size" and not families.has_width(config)
    assert families.has_width(tiny_config("gpt2"))


def test_evaluating_restores_every_mode(tiny):
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    with probe.evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes


def test_fingerprint_names_the_dense_model(tiny, tmp_path):
    def of(model):
        return families.fingerprint(model, find_ffns(model))

    model = tiny("llama")
    model.save_pretrained(tmp_path)
    loads = [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=d) for d in (torch.float32, torch.bfloat16)]
    assert {of(m) for m in loads} == {of(model)}
    assert of(tiny("llama", seed=1)) != of(tiny("llama"))
    assert of(tiny("mistral")) != of(tiny("llama"))  # the same weights in another family
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] += 1
    assert of(model) != of(loads[0])


def test_every_activation_of_transformers_is_named_rightly_or_not_at_all(tiny):
    model = tiny("llama")
    layer = model.model.layers[0].mlp
    x = torch.linspace(-9, 9, 181, dtype=torch.float64)
    for name in sorted(ACT2FN):
        try:
            layer.act_fn = ACT2FN[name]
        except (ImportError, TypeError):
            continue  # needs arguments or a package
        pattern = patterns.match(layer)
        if (found := probe.detect_activation(layer, pattern)) is not None:
            torch.testing.assert_close(layer.act_fn(x), reference.ACTIVATIONS[found](x), rtol=1e-6, atol=1e-6)
