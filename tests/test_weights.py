"""Weights that are not there, not plain, or not finite: one error that says so, before anything changes."""

import copy

import accelerate as hf_accelerate
import pytest
import torch
from conftest import make_model
from torch import nn
from torch.nn.utils import prune as unstructured
from transformers import AutoModelForCausalLM

from pyprune import InputError, UnsupportedModelError, accelerate, prune, prune_blocks
from pyprune.model import checkpoint, surgery
from pyprune.model.families import find_ffns
from pyprune.model.weights import all_finite, leave_inference, sketch
from pyprune.training.recovery import RecoverConfig, recover

BARE = {"keep": 0.5, "method": "magnitude-l2-both", "allocation": "uniform:multiple=8", "repair": None}


def refused(model, message, error=UnsupportedModelError):
    """Both verbs say the same, and leave the modules alone."""
    before = [(name, id(module)) for name, module in model.named_modules()]
    for verb in (lambda: accelerate(model), lambda: prune(model, **BARE)):
        with pytest.raises(error, match=message):
            verb()
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_weights_on_the_meta_device(tiny_config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    refused(model, r"LlamaForCausalLM: model.embed_tokens.weight is on the meta device.*load the weights first")


def test_weights_that_are_not_finite(tiny):
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    refused(model, "model must have finite weights; got 'NaN or infinity in model.layers.1.mlp.up_proj", InputError)


# --- hooks of the package accelerate


def dispatched(model, folder, **places):
    """`model` under hooks: every part on the CPU, but where `places` says otherwise."""
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    where = dict.fromkeys(names, "cpu") | {f"model.layers.{k[1:]}": v for k, v in places.items()}
    return hf_accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=folder, force_hooks=True)


def test_hooks_are_worked_through_and_the_checkpoint_is_whole(tiny, ids, tmp_path):
    plain, hooked = tiny("llama"), dispatched(tiny("llama"), tmp_path / "unused")
    assert all(hasattr(layer.mlp.up_proj, "_hf_hook") for layer in hooked.model.layers)
    config = {"keep": 0.5, "method": "taylor-neuron", "allocation": "uniform:multiple=8", "repair": "refit"}
    for model in (plain, hooked):
        prune(model, **config, text=ids.repeat(8, 1))
    assert torch.equal(hooked(ids).logits, plain(ids).logits)
    checkpoint.save(hooked, tmp_path / "pruned")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")(ids).logits, plain(ids).logits)
    with torch.no_grad():
        torch.testing.assert_close(accelerate(hooked)(ids).logits, plain(ids).logits)
    checkpoint.save(hooked, tmp_path / "fast")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fast")(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("how", ["cpu", "disk", "one layer"])
def test_offloaded_weights_are_refused_and_not_lost(how, tiny, ids, tmp_path):
    model = tiny("llama")
    want, state = model(ids).logits, {k: v.clone() for k, v in model.state_dict().items()}
    if how == "one layer":
        model = dispatched(model, tmp_path / "weights", _2="disk")
    elif how == "cpu":
        hf_accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        hf_accelerate.disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    with pytest.raises(
        UnsupportedModelError, match=r"keep weights elsewhere \(model\..* is offloaded\): prune it as it"
    ):
        accelerate(model)  # `prune` takes it: see test_offloaded.py
    assert torch.equal(model(ids).logits, want)
    hf_accelerate.hooks.remove_hook_from_submodules(model)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    prune(model, **BARE)


def test_a_forward_that_was_set_on_the_module_itself(tiny, ids):
    """As kernel libraries patch models: it is looked at with the miniature's weights, not with the module's."""
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = type(mlp).forward.__get__(mlp)
    assert find_ffns(model)[0].activation == "silu"
    mlp.forward = (lambda self, x: 2 * type(self).forward(self, x)).__get__(mlp)
    with pytest.raises(UnsupportedModelError, match="does not compute a gated FFN"):
        find_ffns(model)


# --- quantised, sharded, computed


class Wrapped(torch.Tensor):
    """An ordinary dtype outside, int8 inside, as torchao's and quanto's weights are."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data):
        self.data_int8 = data

    def __tensor_flatten__(self):
        return ["data_int8"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(function))


Wrapped.__module__ = "torchao.quantization"


class Parameter4bit(nn.Parameter):
    """As bitsandbytes' weights are."""


Parameter4bit.__module__ = "bitsandbytes.nn"


class QuantLinear(nn.Module):
    """As GPTQ's and AWQ's modules are: no `weight`, packed integers in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 96, dtype=torch.int32))


QuantLinear.__module__ = "gptqmodel.nn"


def with_weight(make):
    def change(mlp):
        mlp.up_proj._parameters["weight"] = make(mlp.up_proj.weight)

    return change


def marked(mlp):
    mlp.up_proj.quantization_scheme = "W8A16"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (with_weight(lambda w: nn.Parameter(Wrapped(w.detach().to(torch.int8)), False)), r"int8 \(torchao\)"),
        (with_weight(lambda w: Parameter4bit(w.detach().to(torch.uint8), False)), r"uint8 \(bitsandbytes\)"),
        (with_weight(lambda w: Parameter4bit(w.detach())), r"float32 \(bitsandbytes\)"),  # before its first use
        (
            with_weight(lambda w: nn.Parameter(w.detach().to(torch.float8_e4m3fn), False)),
            r"float8_e4m3fn \(torch Linear\)",
        ),
        (lambda mlp: mlp.register_module("up_proj", QuantLinear()), r"int32 \(gptqmodel\)"),
        (marked, r"quantised at every call \(torch Linear\)"),
    ],
)
def test_quantised_weights(change, what, tiny, ids):
    model = tiny("llama")
    change(model.model.layers[1].mlp)
    message = rf"model.layers.1.mlp.up_proj: weights are {what}: load the model unquantised, prune it, then quantise"
    refused(model, message)
    with pytest.raises(UnsupportedModelError, match=message):
        recover(model, tiny("llama"), ids, RecoverConfig(steps=1, batch=2))


def test_the_config_names_a_quantiser_that_nothing_else_does(tiny):
    model = tiny("llama")
    with_weight(lambda w: nn.Parameter(w.detach().to(torch.float8_e4m3fn), False))(model.model.layers[0].mlp)
    model.config.quantization_config = {"quant_method": "fp8"}
    refused(model, r"weights are float8_e4m3fn \(fp8\)")


def test_weights_that_are_computed_or_sharded(tiny):
    model = tiny("llama")
    up = model.model.layers[0].mlp.up_proj
    unstructured.l1_unstructured(up, "weight", 0.5)
    refused(model, r"model.layers.0.mlp.up_proj.weight is computed from other tensors: make it permanent first")
    unstructured.remove(up, "weight")
    find_ffns(model)
    torch.nn.utils.parametrizations.spectral_norm(up)
    refused(model, r"up_proj.weight is computed from other tensors")
    lazy = tiny("llama")
    lazy.model.layers[2].mlp.up_proj.weight = nn.UninitializedParameter()
    refused(lazy, r"model.layers.2.mlp.up_proj.weight is a UninitializedParameter: load the model with plain tensors")


# --- inference mode

TEACHER = make_model("llama", seed=1)


@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model, ids: prune(model, **BARE),
        lambda model, ids: prune(
            model, keep=0.5, method="taylor-neuron", allocation="uniform:multiple=8", text=ids.repeat(8, 1)
        ),
        lambda model, ids: prune(
            model, keep=0.5, allocation="uniform:multiple=8", repair="refit", text=ids.repeat(8, 1)
        ),
        lambda model, ids: prune_blocks(model, "ffn", repair="bias", text=ids),
        lambda model, ids: accelerate(model),
        lambda model, ids: surgery.drop_layers(model, [0, 2]) or find_ffns(model),
        lambda model, ids: recover(model, TEACHER, ids.repeat(8, 1), RecoverConfig(steps=2, batch=2)),
    ],
    ids=["magnitude", "gradients", "refit", "blocks", "accelerate", "layers", "recover"],
)
def test_what_was_done_in_inference_mode_can_be_trained(change, inside, tiny, ids):
    want, model = tiny("llama", mlp_bias=True), tiny("llama", mlp_bias=True)
    change(want, ids)
    with torch.inference_mode():
        if inside:
            model = tiny("llama", mlp_bias=True)
            assert all(p.is_inference() for p in model.parameters())
        change(model, ids.clone())
    state = want.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 6  # key biases, and rows of removed FFNs, have no gradient


def test_tied_weights_stay_tied_when_they_leave_inference_mode(tiny):
    with torch.inference_mode():
        model = tiny("llama", tie_word_embeddings=True)
    model.lm_head.weight.requires_grad_(False)
    leave_inference(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert not any(t.is_inference() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_finite_sees_one_bad_value_anywhere(dtype):
    values = torch.randn(70, 33).to(dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(torch.tensor([1]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in ((0, 0), (69, 32), (40, 5)):
            other = values.clone()
            other[place] = bad
            assert not all_finite(other), (bad, place)


def test_a_sketch_tells_fine_tunes_apart_and_not_dtypes(tiny):
    model = tiny("llama")
    other = copy.deepcopy(model)
    assert sketch(other.bfloat16()) == sketch(model)
    with torch.no_grad():
        other.model.layers[2].self_attn.q_proj.weight.mul_(1.1)
    assert sketch(other) != sketch(model)
