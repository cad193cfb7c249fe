"""The verb `prune`: what it does to a model, what it reports, what it refuses, and that a refusal changes nothing."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from pyprune import InputError, UnsupportedModelError, prune
from pyprune.model import checkpoint
from pyprune.model.families import find_ffns
from pyprune.pruning import importance

NAN, INF = float("nan"), float("inf")
SMALL = {"keep": 0.5, "allocation": "uniform:multiple=8"}


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()


def assert_untouched(model, before):
    state, config = before
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@torch.no_grad()
def entering_down(model, layer, ids):
    """What enters the down projection of one layer in full forward passes, `[tokens, F]`."""
    rows = []
    down = find_ffns(model)[layer].down
    handle = down.register_forward_pre_hook(lambda m, args: rows.append(args[0].reshape(-1, args[0].shape[-1])))
    for row in ids:
        model(row[None])
    handle.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("method", importance.names())
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_method_prunes_and_is_deterministic(method, allocation, tiny, ids):
    config = {"keep": 0.5, "method": method, "allocation": f"{allocation}:multiple=8", "seed": 4}
    models = [tiny("llama") for _ in range(2)]
    first, second = (prune(m, **config, text=ids) for m in models)
    assert first.mask == second.mask
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert sum(first.mask.widths) == pytest.approx(144, abs=8)
    assert all(w % 8 == 0 for w in first.mask.widths)
    if allocation == "uniform":
        assert first.mask.widths == (48, 48, 48)


def test_seed_changes_random_only(tiny, ids):
    for method, same in (("random", False), ("wanda", True)):
        masks = [prune(tiny("llama"), method=method, seed=s, **SMALL, text=ids).mask for s in (0, 1)]
        assert (masks[0] == masks[1]) is same
    assert len(set(masks[0].layers)) == 3


def test_layers_draw_different_random_neurons(tiny):
    mask = prune(tiny("llama"), method="random", repair=None, **SMALL).mask
    assert len(set(mask.layers)) == 3


@pytest.mark.parametrize("family_name", ["gpt2", "llama", "opt", "phi3"])
def test_scores_choose_the_neurons(family_name, tiny, ids):
    model = tiny(family_name)
    dense = copy.deepcopy(model)
    report = prune(model, method="wanda", repair=None, **SMALL, text=ids)
    a = entering_down(dense, 0, ids)
    down = find_ffns(dense)[0].weights().down.double()
    best = (down.abs().sum(1) * a.norm(dim=0)).argsort(descending=True)[:48]
    assert report.mask.layers[0].neurons.tolist() == sorted(best.tolist())


@pytest.mark.parametrize("family_name", ["gpt2", "llama", "opt", "phi3"])
def test_least_squares_is_sequential_and_exact(family_name, tiny, ids):
    model = tiny(family_name).double()
    report = prune(model, method="magnitude-l2-both", repair="least-squares:damping=0.001", **SMALL, text=ids)
    # Layer by layer: the layers before are pruned already, this one and those after are dense.
    stepped = tiny(family_name).double()
    for layer, (keep, line) in enumerate(zip(report.mask.layers, report.layers, strict=True)):
        a = entering_down(stepped, layer, ids)
        ffn, kept = find_ffns(stepped)[layer], keep.neurons.long()
        v = ffn.weights().down.detach().clone()
        ridge = 1e-3 * a.square().mean()
        top = torch.cat([a[:, kept] / len(a) ** 0.5, ridge.sqrt() * torch.eye(len(kept))])
        target = torch.cat([a @ v / len(a) ** 0.5, ridge.sqrt() * v[kept]])
        want = torch.linalg.lstsq(top, target).solution
        got = find_ffns(model)[layer].weights().down
        # The stream adds up its products over the tokens in float32, and the ridge lets the fit enlarge that error by
        # at most the inverse of its share: 4e-3. In another order than layer by layer the rows differ by 0.2 and more.
        off = len(a) * 2.0**-24 / 1e-3
        assert_close(got, want, rtol=off, atol=off * float(want.abs().max()))
        dense = (a @ v).square().sum()
        for error, new in ((line.error_cut, v[kept]), (line.error_repaired, want)):
            assert error == pytest.approx(float((a @ v - a[:, kept] @ new).square().sum() / dense), rel=1e-3)
        assert line.error_repaired < line.error_cut
        with torch.no_grad():
            ffn.weights().down.zero_()
            ffn.weights().down[kept] = got


@pytest.mark.parametrize("family_name", ["gpt2", "opt", "llama"])
def test_bias_compensation(family_name, tiny, ids, tmp_path):
    model = tiny(family_name)
    dense = copy.deepcopy(model)
    report = prune(model, method="magnitude-l2-both", repair="bias", **SMALL, text=ids)
    removed = torch.ones(96, dtype=torch.bool)
    removed[report.mask.layers[0].neurons.long()] = False
    weights = find_ffns(dense)[0].weights()
    old = torch.zeros(32) if weights.down_bias is None else weights.down_bias
    want = old + (entering_down(dense, 0, ids).mean(0)[removed] @ weights.down[removed].double()).float()
    assert_close(find_ffns(model)[0].weights().down_bias, want)
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    if family_name == "llama":
        assert loaded.config.mlp_bias is True


def test_an_error_before_the_first_cut_leaves_no_bias(tiny, ids):
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "pruning layers":
            raise KeyboardInterrupt

    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        prune(model, method="wanda", repair="bias", **SMALL, text=ids, progress=interrupted)
    assert_untouched(model, before)
    assert model.config.mlp_bias is False


def test_bias_compensation_where_the_format_has_none_is_refused_at_once(tiny, ids):
    model = tiny("qwen2")
    before = state_of(model)
    stages = []
    with pytest.raises(UnsupportedModelError, match=r"Qwen2Config has no config key .* use repair 'least-squares'"):
        prune(model, repair="bias", text=ids, progress=lambda *stage: stages.append(stage))
    assert_untouched(model, before)
    assert stages == []


def test_compensation_helps(tiny, ids):
    dense = tiny("llama")
    want = dense(ids).logits
    errors = {}
    for repair in ("none", "least-squares"):
        model = copy.deepcopy(dense)
        prune(model, method="random", repair=repair, **SMALL, text=ids)
        errors[repair] = (model(ids).logits - want).norm().item()
    assert errors["least-squares"] < 0.9 * errors["none"]


def test_report(tiny, ids):
    model = tiny("llama", tie_word_embeddings=True)
    stages = []
    count = sum(p.numel() for p in model.parameters())
    report = prune(
        model.to(torch.bfloat16), **SMALL, text=ids, progress=lambda *s: stages.append(s), provenance={"text": "t"}
    )
    removed = 3 * 48 * 3 * 32
    assert (report.parameters_before, report.parameters_after) == (count, count - removed)
    assert (report.bytes_before, report.bytes_after) == (2 * count, 2 * (count - removed))
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert (report.tokens, report.window) == (64, 16)
    assert [(line.layer, line.before, line.after) for line in report.layers] == [(i, 96, 48) for i in range(3)]
    assert report.seconds > 0
    assert report.peak_bytes >= 0
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["widths"] == [48, 48, 48]
    assert plain["keep"] == 0.5
    assert plain["fingerprint"] == report.mask.fingerprint == model.config.pyprune["base_fingerprint"]
    assert stages[-1] == ("pruning layers", 3, 3)
    assert model.config.pyprune["provenance"]["text"] == "t"


def test_provenance_says_only_what_had_a_say(tiny, ids, random_mask):
    model = tiny("llama")
    facts = prune(model, method="random", repair=None, **SMALL).mask.provenance
    assert facts["tokens"] == facts["window"] == 0
    assert facts["config"] == {
        "keep": 0.5,
        "method": "random",
        "structure": "neurons",
        "allocation": "uniform",
        "multiple": 8,
        "compensate": "none",
        "seed": 0,
    }
    model = tiny("llama")
    mask = random_mask(model, (8, 16, 24))
    facts = prune(model, text=ids, mask=mask).mask.provenance
    assert facts["config"] == {
        "compensate": "least-squares",
        "damping": 0.01,
        "sequential": True,
        "target": 0.5,
    }
    assert facts["mask"] == mask.provenance


def test_text_is_read_only_where_needed(tiny, ids):
    with pytest.raises(
        InputError,
        match="text must be given for method 'wanda', allocation 'uniform' and repair 'none'; got None",
    ):
        prune(tiny("llama"), method="wanda", repair=None)
    with pytest.raises(
        InputError, match="text must be given for method 'random', allocation 'uniform' and repair 'bias'"
    ):
        prune(tiny("gpt2"), method="random", repair="bias")
    assert prune(tiny("llama"), method="random", repair=None, text=ids).tokens == 0


REFUSED = [
    ({"text": None}, "text must be given"),
    ({"text": []}, "text must hold at least one window"),
    ({"text": [torch.zeros(4).long(), torch.zeros(5).long()]}, r"have windows of one length; got \[4, 5\]"),
    ({"text": torch.full((2, 8), 128)}, r"lie in \[0, 128\); got \(128, 128\)"),
    ({"text": torch.full((2, 8), -1)}, r"lie in \[0, 128\)"),
    ({"text": torch.zeros(1, 65).long()}, r"windows of at most 64 tokens \(max_position_embeddings\); got 65"),
    ({"provenance": {"file": object()}}, "provenance must hold JSON values only"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
@pytest.mark.parametrize("family_name", ["llama", "gpt2"])
def test_refusal_leaves_the_model_untouched(change, message, family_name, tiny, ids):
    model = tiny(family_name).train()
    before = state_of(model)
    with pytest.raises(InputError, match=message):
        prune(model, **SMALL, **{"text": ids, **change})
    assert_untouched(model, before)
    assert model.training


def test_foreign_mask_is_refused(tiny, ids, random_mask):
    model = tiny("llama")
    before = state_of(model)
    for other, message in (
        (tiny("llama", seed=2), r"mask must belong to this model \(fingerprint"),
        (tiny("llama", intermediate_size=64), "mask layer 0 must refer to 96 neurons; got 64"),
        (tiny("llama", num_hidden_layers=2), "mask must have 3 layers; got 2"),
    ):
        mask = random_mask(other, [8] * other.config.num_hidden_layers)
        with pytest.raises(InputError, match=message):
            prune(model, text=ids, mask=mask)
    assert_untouched(model, before)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("config", [SMALL, {"method": "random", "repair": None, **SMALL}])
def test_weights_that_are_not_finite_are_refused_before_anything(bad, config, tiny, ids):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[7, 7] = bad
    with pytest.raises(
        InputError, match=r"model must have finite weights; got 'NaN or infinity in model\.layers\.2\.mlp"
    ):
        prune(model, **config, text=ids)
    assert [f.intermediate_size for f in find_ffns(model)] == [96] * 3


@pytest.mark.parametrize(("allocation", "widths"), [("uniform", [48, 48, 96]), ("global", [96, 96, 96])])
def test_activations_that_overflow_say_how_far_pruning_went(allocation, widths, tiny, ids):
    model = tiny("gpt2").half()
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.weight[0, 11] = 60_000  # times a normalised value above 1.1: infinite
    match = r"activations of layer 2 must be finite; 1 of 96.*\[11\]"
    with pytest.raises(InputError, match=match) as caught:
        prune(model, keep=0.5, allocation=f"{allocation}:multiple=8", text=ids)
    assert [f.intermediate_size for f in find_ffns(model)] == widths
    assert ("load the model again" in str(caught.value)) is (allocation == "uniform")


def test_scores_that_are_not_finite_are_refused(tiny, ids, monkeypatch):
    bad = importance.Criterion("bad", "", "", frozenset(), lambda w, s, g: torch.full((len(w.down),), NAN))
    monkeypatch.setitem(importance.CRITERIA, "bad", bad)
    for allocation in ("uniform", "global"):
        model = tiny("llama")
        before = state_of(model)
        with pytest.raises(InputError, match="scores of layer 0 must be finite; 96 of 96"):
            prune(model, method="bad", allocation=allocation, text=ids)
        assert_untouched(model, before)


def test_model_without_decoder_layers_is_refused(ids):
    with pytest.raises(UnsupportedModelError, match="Linear is no model of Transformers"):
        prune(nn.Linear(2, 2), text=ids)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("repair", ["least-squares", "bias"])
def test_half_precision_models(dtype, repair, tiny, ids, more_ids, tmp_path):
    tiny("llama", mlp_bias=True).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    prune(model, keep=0.75, allocation="uniform:multiple=8", repair=repair, text=more_ids)
    assert {p.dtype for p in model.parameters()} == {dtype}
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_dead_layer_can_be_pruned(tiny, ids):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.zero_()
    report = prune(model, method="magnitude-l2-fan-out", **SMALL, text=ids)
    assert (report.layers[1].error_cut, report.layers[1].error_repaired) == (0, 0)
    assert model(ids).logits.isfinite().all()


def test_keep_one_changes_nothing(tiny, ids):
    model = tiny("gpt2")
    want = model(ids).logits
    report = prune(model, keep=1.0, text=ids)
    assert report.mask.widths == (96, 96, 96)
    assert_close(model(ids).logits, want)


def test_modes_are_restored_and_gradients_still_flow(tiny, ids):
    model = tiny("gpt2").train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.c_fc.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    prune(model, **SMALL, text=ids)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not model.transformer.h[0].mlp.c_fc.weight.requires_grad
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].mlp.c_proj.weight.grad.shape == (48, 32)


@pytest.mark.parametrize("first", ["uniform", "global"])
def test_pruned_checkpoint_can_be_pruned_again(first, tiny, ids, more_ids, tmp_path):
    model = tiny("llama", seed=3)
    mask = prune(model, keep=0.75, allocation=f"{first}:multiple=8", text=more_ids, provenance={"round": 1}).mask
    checkpoint.save(model, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again = prune(
        model, keep=0.5, method="random", allocation="global:multiple=4", text=more_ids, provenance={"round": 2}
    )
    assert [k.intermediate_size for k in again.mask.layers] == list(mask.widths)
    assert model.config.pyprune["provenance"]["round"] == 2
    checkpoint.save(model, tmp_path / "two")
    assert checkpoint.verify(tmp_path / "two")["widths"] == list(again.mask.widths)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_mask_of_a_run_repeats_it(tiny, ids, tmp_path):
    model, twin = tiny("llama"), tiny("llama")
    report = prune(model, keep=0.5, allocation="global:multiple=8", text=ids)
    report.mask.save(tmp_path / "mask")
    prune(twin, text=ids, mask=type(report.mask).load(tmp_path / "mask"))
    assert torch.equal(model(ids).logits, twin(ids).logits)
