"""Cutting, widths in the config, and accelerating whole models."""

import copy
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyprune import BackendError, InputError, KeepIndex, PrunedMLP, UnsupportedModelError, accelerate
from pyprune.ffn import accelerate as accelerate_module
from pyprune.model import checkpoint, families, surgery
from pyprune.model.families import find_ffns

IN_LAYER = ("opt", "biogpt", "xglm")


def pruned_mlps(model):
    return [m for m in model.modules() if isinstance(m, PrunedMLP)]


@torch.no_grad()
def test_accelerated_dense_model_is_the_model(family, tiny, ids, same_logits):
    model = tiny(family)
    want, names = model(ids).logits, list(model.state_dict())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert accelerate(model) is model
    assert len(pruned_mlps(model)) == 3
    same_logits(model(ids).logits, want)
    assert sorted(model.state_dict()) == sorted(names)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@torch.no_grad()
def test_compact_with_a_mask_equals_the_masked_dense_model(
    family, tiny, ids, random_mask, masked, tmp_path, same_logits
):
    model = tiny(family)
    mask = random_mask(model, (64, 24, 96))
    want = masked(model, mask)(ids).logits
    accelerate(model, mask=mask)
    got = model(ids).logits
    same_logits(got, want)
    assert [len(m.record) for m in pruned_mlps(model)] == [64, 24, 96]
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [f.intermediate_size for f in find_ffns(loaded)] == [64, 24, 96]
    same_logits(loaded(ids).logits, got)


@torch.no_grad()
def test_gated_ffn_with_biases(tiny, ids, random_mask, masked, tmp_path, same_logits):
    model = tiny("llama", mlp_bias=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mask = random_mask(model, (64, 24, 96))
    want = masked(model, mask)(ids).logits
    gather = accelerate(copy.deepcopy(model), mode="gather", mask=mask)
    same_logits(gather(ids).logits, want)
    assert all(torch.equal(state[k], v) for k, v in gather.state_dict().items())
    gather.load_state_dict(tiny("llama", seed=1, mlp_bias=True).state_dict())
    gather.load_state_dict(state)
    same_logits(gather(ids).logits, want)
    checkpoint.save(accelerate(model, mask=mask), tmp_path / "out")
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, want)


@torch.no_grad()
def test_gather_equals_the_masked_dense_model_and_saves_the_dense_one(
    family, tiny, ids, random_mask, masked, tmp_path, same_logits
):
    model = tiny(family)
    dense = model(ids).logits
    mask = random_mask(model, (64, 24, 96))
    want = masked(model, mask)(ids).logits
    accelerate(model, mode="gather", mask=mask)
    same_logits(model(ids).logits, want)
    assert [m.index.numel() for m in pruned_mlps(model)] == [64, 24, 96]
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, dense)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", *IN_LAYER])
def test_state_dict_loads_into_accelerated_models(name, tiny, ids):
    source, target = accelerate(tiny(name)), accelerate(tiny(name, seed=5))
    result = target.load_state_dict(tiny(name).state_dict())  # strict
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(source(ids).logits, target(ids).logits)
    down = next(k for k in target.state_dict() if k.endswith(f"{pruned_mlps(target)[0].pattern.down}.weight"))
    state = dict(tiny(name).state_dict())
    state[down.replace("weight", "strange")] = torch.zeros(1)
    assert target.load_state_dict(state, strict=False).unexpected_keys == [down.replace("weight", "strange")]
    del state[down]
    assert target.load_state_dict(state, strict=False).missing_keys == [down]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("mode", ["compact", "gather"])
@torch.no_grad()
def test_int8_weights(name, mode, tiny, ids, random_mask, masked, tmp_path):
    model = tiny(name)
    mask = random_mask(model, (64, 24, 96))
    want = masked(model, mask)(ids).logits
    accelerate(model, mode, mask=mask, weights="int8")
    assert all(m.record.dtype == torch.int8 for m in pruned_mlps(model))
    got = model(ids).logits
    assert 0 < (got - want).norm() < 0.03 * want.norm()
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    if mode == "compact":
        torch.testing.assert_close(loaded(ids).logits, got, rtol=1e-3, atol=1e-3)
    again = accelerate(loaded, weights="int8")
    for kept, saved in zip(pruned_mlps(model), pruned_mlps(again), strict=True):
        # The same integers; but a narrow checkpoint has lost the neurons that its channels' scales were found with.
        if mode == "gather" or torch.equal(kept.channel_scales, saved.channel_scales):
            assert torch.equal(kept.record, saved.record)
    low = model.to(torch.bfloat16)
    assert all(m.scales.dtype == torch.float32 for m in pruned_mlps(low))
    assert (low(ids).logits.float() - got).norm() < 0.05 * got.norm()


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
@torch.no_grad()
def test_state_dict_loads_into_other_weights(name, weights, tiny, ids):
    target = accelerate(tiny(name, seed=5), weights=weights)
    result = target.load_state_dict(tiny(name).state_dict())  # strict
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(accelerate(tiny(name), weights=weights)(ids).logits, target(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_originals_are_freed_layer_by_layer(name, mode, weights, tiny, random_mask, monkeypatch):
    model = tiny(name)
    mask = random_mask(model, (50, 50, 50))
    originals = [[weakref.ref(p) for p in f.parameters()] for f in find_ffns(model)]
    alive = []

    def count():
        alive.append(sum(any(ref() is not None for ref in layer) for layer in originals))

    monkeypatch.setattr(accelerate_module, "release", count)
    accelerate(model, mode=mode, mask=mask, weights=weights)
    assert alive == [2, 1, 0]  # without waiting for the garbage collector


def test_cut_frees_the_removed_neurons_and_keeps_the_parameters(tiny):
    model = tiny("llama")
    ffn = find_ffns(model)[0]
    parameters = ffn.parameters()
    surgery.cut(ffn, KeepIndex(range(10), 96))
    assert [id(p) for p in ffn.parameters()] == [id(p) for p in parameters]
    assert [tuple(p.shape) for p in parameters] == [(10, 32), (10, 32), (32, 10)]
    assert all(p.untyped_storage().nbytes() == 4 * 10 * 32 for p in parameters)


def test_accelerated_model_is_refused_by_name(tiny):
    model = accelerate(tiny("llama"))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0 is accelerated already"):
        accelerate(model)


def test_accelerate_refuses_before_it_changes_anything(tiny, random_mask):
    model = tiny("llama")
    with torch.no_grad():
        find_ffns(model)[2].weights().gate[95, 31] = 70000.0
    other = random_mask(tiny("llama", seed=3), (9, 9, 9))
    for arguments, message in (
        ({"mode": "gahter"}, r"mode must be one of compact, gather; got 'gahter' \(nearest: gather\)"),
        ({"mode": "gather"}, "mask must be given in gather mode; got None"),
        ({"backend": "cudnn"}, "backend must be one of auto"),
        ({"weights": "in8"}, r"weights must be one of float32, .*; got 'in8' \(nearest: int8"),
        ({"weights": "float16"}, r"weights of layer 2 must be finite in torch\.float16; got .*70000"),
        ({"mask": other}, "mask must belong to this model"),
        ({"mode": "gather", "mask": other}, "mask must belong to this model"),
    ):
        with pytest.raises(InputError, match=message):
            accelerate(model, **arguments)
    assert not pruned_mlps(model)
    assert model.config.intermediate_size == 96


def test_forced_backend_reaches_every_layer_and_never_falls_back(tiny, ids):
    model = accelerate(tiny("llama").double(), backend="triton")
    assert {m.backend for m in pruned_mlps(model)} == {"triton"}
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.float64"):
        model(ids)


@pytest.mark.parametrize("name", IN_LAYER)
def test_in_layer_training_has_no_dropout_in_the_wrong_place(name, tiny, ids):
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny(name, activation_dropout=0.5, hidden_dropout_prob=0.0, **quiet)
    want = model(ids).logits
    torch.testing.assert_close(accelerate(model).train()(ids).logits, want)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_accelerated_model_generates_and_trains(name, tiny, ids):
    model = tiny(name)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    accelerate(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
    model(ids, labels=ids).loss.backward()
    assert all(m.record.grad.abs().sum() > 0 for m in pruned_mlps(model))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_deepcopy_of_an_accelerated_model_is_independent(name, tiny, ids):
    model = accelerate(tiny(name))
    want, twin = model(ids).logits, copy.deepcopy(model)
    twin.load_state_dict(tiny(name, seed=4).state_dict())
    assert torch.equal(model(ids).logits, want)
    assert not torch.equal(twin(ids).logits, want)


def test_cut_updates_what_the_module_says_of_itself(tiny):
    for name in ("llama", "gpt2", "phi3"):
        ffn = find_ffns(tiny(name))[1]
        ffn.holder.requires_grad_(False)
        surgery.cut(ffn, KeepIndex([0, 2, 95], 96))
        assert ffn.intermediate_size == 3
        assert getattr(ffn.holder, "intermediate_size", 3) == 3
        assert (getattr(ffn.down, "in_features", None) or ffn.down.nx) == 3
        assert not any(p.requires_grad for p in ffn.parameters())


def test_cut_refuses_before_it_changes_anything(tiny):
    ffn = find_ffns(tiny("gpt2").half())[0]
    keep = KeepIndex([0, 1], 96)
    rows, huge = torch.zeros(2, 32, dtype=torch.float64), torch.full((32,), 1e6, dtype=torch.float64)
    rows[1, 3] = 1e9
    for arguments, message in (
        ((KeepIndex([0], 95),), "keep must refer to 96 neurons; got 95"),
        ((keep, rows), r"down of layer 0 must be finite in torch\.float16; got '1 values"),
        ((keep, None, huge), r"bias_shift of layer 0 must be finite in torch\.float16; got '32 values"),
    ):
        with pytest.raises(InputError, match=message):
            surgery.cut(ffn, *arguments)
        assert ffn.intermediate_size == 96


def test_give_biases(tiny, ids):
    model = tiny("llama")
    model.requires_grad_(False)
    want = model(ids).logits
    surgery.give_biases(model, find_ffns(model))
    assert model.config.mlp_bias is True
    assert torch.equal(model(ids).logits, want)
    assert all(f.weights().down_bias is not None and f.weights().gate_bias is not None for f in find_ffns(model))
    assert not any(p.requires_grad for p in model.parameters())
    surgery.give_biases(model, find_ffns(model))  # again: nothing to do
    for name in ("qwen2", "mistral", "gemma"):
        model = tiny(name)
        with pytest.raises(UnsupportedModelError, match=r"has no config key for one \(looked for mlp_bias\)"):
            surgery.give_biases(model, find_ffns(model))
        assert find_ffns(model)[0].weights().down_bias is None


def test_set_widths(tiny):
    model = tiny("opt")
    block = families.ffn_block(model, find_ffns(model))
    assert block == {"layers": "decoder.layers", "width_key": "ffn_dim", "in": [["fc1", 1]], "out": "fc2"}
    model.config.pyprune = {"note": 1}
    surgery.set_widths(model, block, [8, 16, 8])
    assert [c.ffn_dim for c in model.config.per_layer_config] == [8, 16, 8]
    assert model.config.pyprune == {"note": 1, "ffn": block}
    surgery.set_widths(model, block, [24, 24, 24])
    assert not model.config.is_heterogeneous
    assert model.config.ffn_dim == 24
    assert model.config.pyprune == {"note": 1}


def test_accelerated_records_lie_next_to_each_other(tiny):
    model = accelerate(tiny("llama"), weights="int8")
    records = [m.record for m in model.modules() if isinstance(m, PrunedMLP)]
    assert len({r.untyped_storage().data_ptr() for r in records}) == 1
