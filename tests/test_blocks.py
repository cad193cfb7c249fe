"""Whole FFN blocks and whole decoder layers: what is measured, what goes, and that the rest still is the model."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from pyprune import InputError, UnsupportedModelError, prune, prune_blocks
from pyprune.ffn.accelerate import accelerate
from pyprune.model import checkpoint, surgery
from pyprune.model.families import find_ffns
from pyprune.pruning.blocks import kept_count
from pyprune.pruning.influence import influence
from pyprune.pruning.residual import constant_output

WINDOW = 24  # longer than every sliding or local window of the tiny models
# A layer's norms stand elsewhere, its attention runs beside the FFN, or its config lists its layers.
DIFFERENT = ("gpt2", "gpt_neo", "gptj", "falcon", "opt", "llama", "gemma2", "lfm2")


@pytest.fixture
def text():
    return torch.randint(3, 128, (3, WINDOW), generator=torch.Generator().manual_seed(3))


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict(), numbers_of(model)


def numbers_of(model):
    keys = ("layer_idx", "layer_id")
    return [(n, vars(m)[k]) for n, m in model.named_modules() for k in keys if k in vars(m)]


def assert_untouched(model, before):
    state, config, numbers = before
    assert model.config.to_dict() == config
    assert numbers_of(model) == numbers
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def cosine(a, b):
    """Mean over tokens, in plain float64 arithmetic."""
    a, b = a.detach().double().reshape(-1, a.shape[-1]), b.detach().double().reshape(-1, b.shape[-1])
    values = [float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in zip(a, b, strict=True)]
    return sum(values) / len(values)


def layers_of(model):
    """The decoder layers of a tiny model; all of them have three."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def outputs_of(model, text):
    """What each decoder layer gives in one full forward pass, `[N, W, D]`, after what the first one gets."""
    seen = []
    layers = layers_of(model)
    handles = [layer.register_forward_hook(lambda m, args, out: seen.append(first(out))) for layer in layers]
    before = lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
    model(text, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def identity(layer):
    """Zero what a LLaMA layer adds to the residual stream."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


@torch.no_grad()
def silent(model, numbers):
    """A copy of the model in which these FFNs give nothing."""
    model = copy.deepcopy(model)
    for ffn in find_ffns(model):
        if ffn.layer in numbers:
            ffn.weights().down.zero_()
            if ffn.weights().down_bias is not None:
                ffn.weights().down_bias.zero_()
    return model


def generate(model, text, cache=True):
    """Greedy tokens after the first 14, beyond every window of the tiny models."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(text[:1, :14], max_new_tokens=6, use_cache=cache, **options)


def influences(model, structure, text):
    return list(influence(model, find_ffns(model), text, structure).values())


@pytest.mark.parametrize("name", DIFFERENT)
def test_layer_influence_by_hand(name, tiny, text):
    model = tiny(name)
    before = state_of(model)
    got = influences(model, "layer", text)
    seen = outputs_of(model, text)
    want = [1 - cosine(a, b) for a, b in itertools.pairwise(seen)]
    assert got == pytest.approx(want, abs=1e-6)
    assert all(0 < value < 2 for value in got)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", DIFFERENT)
def test_ffn_influence_by_hand(name, tiny, text):
    model = tiny(name)
    before = state_of(model)
    got = influences(model, "ffn", text)
    seen = outputs_of(model, text)[1:]
    want = [1 - cosine(outputs_of(silent(model, [i]), text)[i + 1], seen[i]) for i in range(3)]
    assert got == pytest.approx(want, abs=1e-6)
    assert all(0 < value < 2 for value in got)
    assert_untouched(model, before)


@torch.no_grad()
def test_ffn_influence_is_that_of_its_residual_step(tiny, text):
    """Where the FFN is a layer's last step, with a residual of its own: cos(x_in, x_out) of that step."""
    model = tiny("llama")
    entering = []
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    handles = [norm.register_forward_pre_hook(lambda m, args: entering.append(args[0])) for norm in norms]
    leaving = outputs_of(model, text)[1:]
    for handle in handles:
        handle.remove()
    want = [1 - cosine(a, b) for a, b in zip(entering, leaving, strict=True)]
    assert influences(model, "ffn", text) == pytest.approx(want, abs=1e-6)


def test_influence_of_tokens_without_a_hidden_state(tiny, text):
    """Zero embeddings: a layer that leaves them zero has no influence, not an undefined one."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert influences(model, "layer", text) == [0, 0, 0]


def test_influence_of_activations_that_are_not_finite_is_refused(tiny, text):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    before = model.config.to_dict()
    for structure in ("ffn", "layer"):
        with pytest.raises(InputError, match="activations of layer 2 must be finite; got nan"):
            influence(model, find_ffns(model), text, structure)
        with pytest.raises(InputError, match="model must have finite weights"):
            prune_blocks(model, structure, text=text)
    assert model.config.to_dict() == before
    assert len(find_ffns(model)) == 3


def test_layer_that_does_nothing_goes_first(tiny, text):
    model = tiny("llama")
    identity(model.model.layers[1])
    want = model(text).logits
    report = prune_blocks(model, "layer", 2 / 3, text=text)
    assert (report.removed, report.kept) == ([1], [0, 2])
    assert report.influence[1] == pytest.approx(0, abs=1e-12)
    assert min(report.influence[0], report.influence[2]) > 0.01
    assert torch.equal(model(text).logits, want)
    assert report.mask is None
    found = {"structure": "layer", "influence": report.influence, "removed": [1], "kept": [0, 2]}
    assert json.loads(json.dumps(report.to_json())).items() >= found.items()
    assert report.parameters_after < report.parameters_before
    facts = model.config.pyprune["provenance"]
    assert facts["blocks"] == found and facts["tokens"] == report.tokens == text.numel()
    config = {"keep": 2 / 3, "structure": "layer", "iterative": False, "compensate": "none"}
    assert facts["config"] == report.to_json()["config"] == config


@pytest.mark.parametrize(
    ("keep", "blocks_", "count"),
    [(1.0, 30, 30), (0.75, 30, 23), (0.7, 30, 21), (0.5, 3, 2), (0.49, 3, 1), (0.01, 30, 1), (1e-9, 1, 1)],
)
def test_kept_count(keep, blocks_, count):
    assert kept_count(keep, blocks_) == count


@pytest.mark.parametrize("structure", ["ffn", "layer"])
def test_at_least_one_block_stays(structure, tiny, text):
    model = tiny("llama")
    report = prune_blocks(model, structure, 0.001, text=text)
    assert len(report.kept) == 1
    assert report.kept == [max(range(3), key=report.influence.__getitem__)]
    assert model(text).logits.isfinite().all()


@pytest.mark.parametrize("structure", ["ffn", "layer"])
def test_keeping_all_changes_nothing(structure, tiny, text):
    model = tiny("llama")
    before = model(text).logits
    report = prune_blocks(model, structure, 1.0, text=text)
    assert report.removed == []
    assert torch.equal(model(text).logits, before)
    assert [f.intermediate_size for f in find_ffns(model)] == [96] * 3


def test_ties_by_number_and_protected_layers(tiny, text):
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            identity(layer)
    assert prune_blocks(copy.deepcopy(model), "layer", 0.6, text=text).removed == [0]
    assert prune_blocks(copy.deepcopy(model), "layer", 0.6, protect=(1, 0), text=text).removed == [1]
    assert prune_blocks(copy.deepcopy(model), "ffn", 0.4, protect=(0, 1), text=text).removed == [0, 1]
    before = state_of(model)
    with pytest.raises(InputError, match=r"protect must leave 2 of 3 blocks to remove; got \(1, 1\)"):
        prune_blocks(model, "layer", 0.4, protect=(1, 1), text=text)
    assert_untouched(model, before)


@pytest.mark.parametrize("structure", ["ffn", "layer"])
def test_iterative_measures_again_without_what_is_gone(structure, tiny, text):
    """Step by step by hand."""
    model = tiny("llama", num_hidden_layers=5)
    with torch.no_grad():
        for layer, share in zip(model.model.layers, (0.1, 0.3, 0.5, 0.7, 1.0), strict=True):
            layer.self_attn.o_proj.weight.mul_(share)
            layer.mlp.down_proj.weight.mul_(share)
    stepped, left, want, influence = copy.deepcopy(model), list(range(5)), [], {}
    for _ in range(3):
        values = influences(stepped, structure, text)
        if structure == "ffn":
            values = {i: v for i, v in enumerate(values) if i not in want}
        else:
            values = dict(zip(left, values, strict=True))
        influence |= values
        want.append(min(values, key=values.__getitem__))
        left.remove(want[-1])
        stepped = silent(stepped, want) if structure == "ffn" else copy.deepcopy(model)
        if structure == "layer":
            surgery.drop_layers(stepped, left)
    once = prune_blocks(copy.deepcopy(model), structure, 0.4, text=text)
    report = prune_blocks(model, structure, 0.4, text=text, iterative=True)
    assert report.removed == sorted(want) != once.removed
    assert report.influence == pytest.approx([influence[i] for i in range(5)], abs=1e-6)
    assert_close(model(text).logits, stepped(text).logits)


def test_every_family_drops_a_middle_layer(family, tiny, text, tmp_path):
    model = tiny(family)
    dense = copy.deepcopy(model)
    surgery.drop_layers(model, [0, 2])
    del layers_of(dense)[1]  # the dense model's own forward pass, without a cache, over the layers that stay
    dense.config.num_hidden_layers = 2
    for key in ("layer_types", "no_rope_layers"):
        if isinstance(getattr(dense.config, key, None), list):
            setattr(dense.config, key, getattr(dense.config, key)[::2])
    want = dense(text, use_cache=False).logits
    assert torch.equal(model(text, use_cache=False).logits, want)
    assert model.config.num_hidden_layers == 2
    assert {number for _, number in numbers_of(model)} == ({0, 1} if numbers_of(dense) else set())
    checkpoint.save(model, tmp_path / "out")
    checkpoint.verify(tmp_path / "out")
    assert not (tmp_path / "out" / "modeling_pyprune.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(text, use_cache=False).logits, want)
    tokens = generate(model, text)
    assert torch.equal(generate(model, text, cache=False), tokens)
    assert torch.equal(generate(loaded, text), tokens)


@pytest.mark.parametrize("keep", [[2], [1, 2]])
def test_layers_of_different_kinds_keep_their_own(keep, tiny, text, tmp_path):
    """Attention and convolution, local and global attention, with and without rotation: all stay what they were."""
    for name, changes in (("lfm2", {}), ("gpt_neo", {}), ("gemma2", {}), ("smollm3", {"no_rope_layers": [1, 0, 1]})):
        model = tiny(name, **changes)
        kinds = {
            key: [getattr(model.config, key)[i] for i in keep]
            for key in ("layer_types", "attention_layers", "no_rope_layers")
            if getattr(model.config, key, None)
        }
        assert kinds, name
        surgery.drop_layers(model, keep)
        for key, value in kinds.items():
            assert getattr(model.config, key) == value, name
        checkpoint.save(model, tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(loaded(text).logits, model(text).logits), name
        assert torch.equal(generate(loaded, text), generate(model, text, cache=False)), name


def test_config_lists_that_are_not_about_layers_stay(tiny, text):
    model = tiny("llama")
    model.config.eos_token_id = [2, 5, 7]  # as many as layers
    surgery.drop_layers(model, [0, 1])
    assert model.config.eos_token_id == [2, 5, 7]
    model = tiny("lfm2")
    model.config.full_attn_idxs = [0, 2]
    surgery.drop_layers(model, [1, 2])
    assert model.config.full_attn_idxs == [1]
    model = tiny("gpt_neo", attention_types=[[["global", "local"], 1], [["local"], 1]])
    surgery.drop_layers(model, [0, 2])
    assert model.config.attention_types == [[["global"], 1], [["local"], 1]]


def test_layers_that_compute_with_their_number_are_refused(tiny, text):
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"without 1 of its layers: transformer.h.2.attn.scaling is"):
        surgery.drop_layers(model, [0, 2])
    assert_untouched(model, before)
    want = outputs_of(model, text)[2]
    surgery.drop_layers(model, [0, 1])  # those that stay keep their numbers
    assert_close(model.transformer(text).last_hidden_state, model.transformer.ln_f(want))


def test_model_without_attention_is_refused(tiny):
    """Transformers cannot count the tokens in its cache."""
    model = tiny("lfm2")
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="builds no model of 1: ValueError: `get_seq_length` can only be"):
        surgery.drop_layers(model, [1])
    assert_untouched(model, before)


def test_config_that_builds_no_shorter_model_is_refused(tiny, monkeypatch):
    model = tiny("llama")
    before = state_of(model)
    build = AutoModelForCausalLM.from_config

    def fail(config):
        if config.num_hidden_layers < 3:
            raise ValueError("three layers or none")
        return build(config)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(UnsupportedModelError, match="builds no model of 2: ValueError: three layers or none"):
        surgery.drop_layers(model, [0, 2])
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "keep must keep at least one neuron"),
        ([0, 3], r"keep must lie in \[0, 3\)"),
        ([-1], r"keep must lie in \[0, 3\)"),
        ([1, 0], "keep must be sorted"),
        ([0, 0], "keep must hold no duplicate"),
        ([0.5], "keep must hold integers"),
    ],
)
def test_bad_layer_numbers_are_refused(keep, message, tiny):
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(InputError, match=message.replace("neuron", "layer")):
        surgery.drop_layers(model, keep)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("name", "keep", "widths"),
    [
        ("llama", [0, 2], [40, 96]),
        ("llama", [0, 1], [40, 24]),  # the widest goes
        ("gpt2", [1], [24]),
        ("lfm2", [1, 2], [24, 96]),
    ],
)
def test_widths_that_differ_go_with_their_layers(name, keep, widths, tiny, random_mask, text, tmp_path):
    model = tiny(name)
    prune(model, repair=None, mask=random_mask(model, (40, 24, 96)))
    surgery.drop_layers(model, keep)
    assert [f.intermediate_size for f in find_ffns(model)] == widths
    checkpoint.save(model, tmp_path / "out")
    assert checkpoint.verify(tmp_path / "out")["widths"] == widths
    assert (tmp_path / "out" / "modeling_pyprune.py").exists() == (len(widths) > 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(text).logits, model(text).logits)
    assert torch.equal(generate(loaded, text), generate(model, text, cache=False))


@pytest.mark.parametrize("name", [*DIFFERENT, "phi3", "olmo2"])
def test_removed_ffn_is_no_ffn(name, tiny, text, tmp_path):
    model = tiny(name)
    dense = copy.deepcopy(model)
    report = prune_blocks(model, "ffn", 2 / 3, text=text)
    (gone,) = report.removed
    widths = [1 if i == gone else 96 for i in range(3)]
    assert gone == min(range(3), key=report.influence.__getitem__)
    assert list(report.mask.widths) == [f.intermediate_size for f in find_ffns(model)] == widths
    want = silent(dense, [gone])(text).logits
    assert_close(model(text).logits, want, rtol=1e-5, atol=1e-5)
    checkpoint.save(model, tmp_path / "out")
    assert checkpoint.verify(tmp_path / "out")["widths"] == widths
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(text).logits, model(text).logits)


def test_mask_of_removed_ffns_belongs_to_the_dense_model(tiny, text):
    model = tiny("llama")
    dense = copy.deepcopy(model)
    mask = prune_blocks(model, "ffn", 0.4, text=text).mask
    prune(dense, repair=None, mask=mask)  # refuses a mask of another model
    assert [f.intermediate_size for f in find_ffns(dense)] == list(mask.widths)
    (down,) = {f.layer: f.weights().down for f in find_ffns(model) if f.layer == mask.widths.index(1)}.values()
    assert not down.any()


def test_all_ffns_but_one_accelerated(tiny, text):
    """A width of 1 goes through the kernels like any other."""
    model = tiny("llama")
    prune_blocks(model, "ffn", 0.001, text=text)
    want = model(text).logits
    with torch.no_grad():
        assert_close(accelerate(model)(text).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("sequential", [True, False])
def test_bias_takes_the_mean_output(name, sequential, tiny, text, tmp_path):
    model = tiny(name)
    dense = copy.deepcopy(model)
    report = prune_blocks(model, "ffn", 0.4, repair="bias", sequential=sequential, text=text)
    means, stepped = {}, copy.deepcopy(dense)
    for gone in report.removed:
        ffn, rows = find_ffns(stepped)[gone], []
        handle = ffn.down.register_forward_hook(lambda m, args, out, r=rows: r.append(out.reshape(-1, out.shape[-1])))
        with torch.no_grad():
            stepped(text)
        handle.remove()
        means[gone] = torch.cat(rows).double().mean(0).float()
        if sequential:
            weights = find_ffns(stepped := silent(stepped, [gone]))[gone]
            if weights.weights().down_bias is None:
                weights.down.bias = nn.Parameter(means[gone])
            else:
                with torch.no_grad():
                    weights.weights().down_bias.copy_(means[gone])
    assert len(means) == 2
    for gone, mean in means.items():
        weights = find_ffns(model)[gone].weights()
        assert weights.down.shape[0] == 1
        assert not weights.down.any()
        assert_close(weights.down_bias, mean, rtol=1e-4, atol=1e-5)
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(text).logits, model(text).logits)


def refused(model, text, error, message, **choice):
    before = state_of(model)
    with pytest.raises(error, match=message):
        prune_blocks(model, **choice, text=text)
    assert_untouched(model, before)


def test_what_is_refused(tiny, text):
    model = tiny("llama")
    for repair in ("least-squares", "refit"):
        rule = f"repair must be 'bias' or 'none' with structure 'ffn'; got '{repair}'"
        refused(model, text, InputError, rule, structure="ffn", repair=repair)
    rule = "repair must be 'none' with structure 'layer'; got 'bias'"
    refused(model, text, InputError, rule, structure="layer", repair="bias")
    for argument, value, rule in (
        ("keep", 0, r"keep must lie in \(0, 1\]; got 0"),
        ("protect", (1,), r"protect must be two counts of blocks, first and last; got \(1,\)"),
        ("iterative", 1, "iterative must be True or False; got 1"),
        ("sequential", None, "sequential must be True or False; got None"),
    ):
        refused(model, text, InputError, rule, **{argument: value})
    refused(model, None, InputError, "text must be given for structure 'ffn'; got None")
    refused(model, text, InputError, "structure must be one of ffn, layer; got 'neurons'", structure="neurons")
    rule = "Qwen2Config has no config key"
    refused(tiny("qwen2"), text, UnsupportedModelError, rule, structure="ffn", repair="bias")


@pytest.mark.parametrize("structure", ["ffn", "layer"])
def test_accelerated_model_is_refused(structure, tiny, text):
    model = accelerate(tiny("llama"))
    want = model(text).logits
    with pytest.raises(UnsupportedModelError, match="accelerated already"):
        prune_blocks(model, structure, text=text)
    assert torch.equal(model(text).logits, want)


def test_progress_and_modes(tiny, text):
    model = tiny("llama")
    model.train()
    model.model.layers[0].eval()
    stages = []
    prune_blocks(model, "layer", 0.6, text=text, progress=lambda *stage: stages.append(stage))
    assert stages[0] == ("measuring the influence of each layer", 0, 3)
    assert stages[-1] == ("measuring the influence of each layer", 3, 3)
    assert model.training
    assert [layer.training for layer in model.model.layers].count(True) >= 1


@torch.no_grad()
def test_constant_output_ends_with_its_block(tiny, text):
    model = tiny("gpt2")
    want = model(text).logits
    value = torch.arange(32.0)
    ffn = find_ffns(model)[1]
    seen = []
    with constant_output(ffn, value):
        handle = ffn.down.register_forward_hook(lambda m, args, out: seen.append(out))
        model(text)
    handle.remove()
    assert torch.equal(seen[0], value.expand_as(seen[0]))
    assert torch.equal(model(text).logits, want)
