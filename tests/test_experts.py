"""Neurons within experts: how banks are found and read, pruned, repaired, saved, and what is refused."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from moe_cases import BANKS, MIXTURES, listed, make_mixture
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from pyprune import InputError, KeepIndex, Mask, UnsupportedModelError, accelerate, prune, save
from pyprune.base.progress import quiet
from pyprune.base.statistics import ActivationStats
from pyprune.ffn.mlp import PrunedMLP
from pyprune.model import experts, families
from pyprune.model.described import Described
from pyprune.model.families import find_ffns
from pyprune.model.narrowing import replaced
from pyprune.model.units import Expert, groups
from pyprune.pruning import gradients
from pyprune.pruning.calibration import LayerStream
from pyprune.pruning.options import PruneOptions
from pyprune.pruning.pruner import Pruner
from pyprune.pruning.repair.least_squares import least_squares

BARE = {"repair": None}


@pytest.fixture(params=sorted(MIXTURES))
def kind(request):
    return request.param


def banks(model):
    return [group for group in groups(find_ffns(model)) if isinstance(group[0], Expert)]


def mask_of(model, width, seed=0):
    """Random neurons of every FFN: `width` of each expert, half of the others."""
    generator = torch.Generator().manual_seed(seed)
    ffns = find_ffns(model)
    keeps = []
    for ffn in ffns:
        size = ffn.intermediate_size
        count = width if isinstance(ffn, Expert) else size // 2
        keeps.append(KeepIndex(torch.randperm(size, generator=generator)[:count].sort().values, size))
    return Mask(tuple(keeps), families.fingerprint(model, ffns))


def test_banks_are_found_and_compute_what_their_layout_says(kind, ids):
    model = make_mixture(kind)
    found = banks(model)
    assert len(found) == BANKS[kind] and {len(bank) for bank in found} == {4}
    assert {expert.intermediate_size for bank in found for expert in bank} == {48}
    assert {expert.hidden_size for bank in found for expert in bank} == {32}
    want = model(ids).logits
    for bank in found:
        of = bank[0].of_bank
        with replaced(of.module, of.forward):
            torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_layout_that_only_looks_familiar_is_refused(monkeypatch):
    model = make_mixture("mixtral")
    module = type(model.model.layers[1].mlp.experts)
    own = module.forward.__wrapped__
    monkeypatch.setattr(module, "forward", lambda self, x, index, weights: 0.9 * own(self, x, index, weights))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts \(MixtralExperts\).*does not compute"):
        find_ffns(model)


def test_pruned_experts_compute_what_masked_ones_do(kind, ids, masked, same_logits):
    model = make_mixture(kind)
    mask = mask_of(model, 24)
    first = [keep for ffn, keep in zip(find_ffns(model), mask.layers, strict=True) if isinstance(ffn, Expert)][:2]
    assert first[0] != first[1]  # not the same neurons
    want = masked(model, mask)(ids).logits
    prune(model, **BARE, mask=mask)
    same_logits(model(ids).logits, want)
    assert {e.intermediate_size for bank in banks(model) for e in bank} == {24}


def test_widths_of_one_kind_stand_in_the_configs_own_keys(kind, ids, tmp_path):
    model = make_mixture(kind)
    prune(model, keep=0.5, method="wanda", repair=None, allocation="uniform:multiple=8", text=ids)
    assert "ffn" not in model.config.pyprune and not model.config.is_heterogeneous
    want = model(ids).logits
    save(model, tmp_path / "x")
    assert not (tmp_path / "x" / "modeling_pyprune.py").exists()
    again = type(model).from_pretrained(tmp_path / "x").eval()
    assert torch.equal(again(ids).logits, want)
    assert again.generate(ids[:1], max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 18)


def test_widths_that_differ_stand_module_by_module(kind, ids, tmp_path):
    model = make_mixture(kind)
    prune(model, keep=0.6, method="wanda", repair=None, allocation="global:multiple=1", text=ids)
    for bank in banks(model):
        assert len({e.intermediate_size for e in bank}) == 1 and bank[0].intermediate_size % 8 == 0
    want = model(ids).logits
    save(model, tmp_path / "x")
    again = type(model).from_pretrained(tmp_path / "x").eval()
    assert torch.equal(again(ids).logits, want)
    found = [f.intermediate_size for f in find_ffns(model)]
    assert [f.intermediate_size for f in find_ffns(again)] == found
    prune(again, keep=0.7, method="wanda", repair=None, allocation="uniform:multiple=8", text=ids)
    assert sum(f.intermediate_size for f in find_ffns(again)) < sum(found)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts that stay as they are
        want = again(ids).logits
        torch.testing.assert_close(accelerate(again)(ids).logits, want, rtol=1e-4, atol=1e-5)


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "pyprune" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=folder.endswith("differ")).eval()
    case = torch.load(folder + "/logits.pt", weights_only=True)
    assert torch.equal(model(case["ids"]).logits, case["logits"]), folder
print("loaded", len(sys.argv) - 1)
"""


def test_checkpoints_load_where_there_is_no_pyprune(ids, tmp_path):
    folders = []
    for kind, way, spread in (
        ("qwen3_moe", "same", "uniform:multiple=8"),
        ("mixtral", "same", "uniform:multiple=8"),
        ("qwen3_moe", "differ", "global:multiple=1"),
    ):
        model = make_mixture(kind)
        prune(model, keep=0.5, method="wanda", repair=None, allocation=spread, text=ids)
        folder = tmp_path / f"{kind}-{way}"
        save(model, folder)
        torch.save({"ids": ids, "logits": model(ids).logits.detach()}, folder / "logits.pt")
        folders.append(str(folder))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.stdout.strip() == "loaded 3", run.stderr[-2000:]


def routed(model, ids, layer):
    """What the bank of a layer gets: hidden states, experts and weights."""
    got = {}
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, args: got.update(x=args[0], index=args[1], weights=args[2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return got["x"], got["index"], got["weights"]


def test_statistics_are_of_the_tokens_routed_and_weighted(ids):
    model = make_mixture("mixtral")
    bank = banks(model)[1]
    with torch.no_grad():
        stream = LayerStream(model, find_ffns(model), ids)
        stream.reach(bank[0])
        found = stream.group_statistics(bank, gram=True)
    x, index, weights = routed(model, ids, 1)
    assert sum(stats.tokens for stats in found) == 2 * ids.numel()
    for number, (expert, stats) in enumerate(zip(bank, found, strict=True)):
        token, place = (index == number).nonzero(as_tuple=True)
        w, r = expert.weights(), weights[token, place].double()
        a = (F.silu(F.linear(x[token], w.gate)) * F.linear(x[token], w.up)).double()
        assert stats.tokens == len(token) > 0
        torch.testing.assert_close(stats.abs_mean, a.abs().mean(0), rtol=1e-4, atol=1e-6)
        a = a * r[:, None]
        torch.testing.assert_close(stats.mean, a.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.square_sum, a.square().sum(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stats.gram, a.t() @ a, rtol=1e-3, atol=1e-5)
        assert stats.routed == pytest.approx(float(r.mean()), rel=1e-5)


def test_least_squares_mends_every_expert(more_ids):
    text = torch.cat((more_ids, more_ids.flip(1)))
    bare, mended = make_mixture("mixtral"), make_mixture("mixtral")
    dense, bank = copy.deepcopy(bare), banks(bare)[0]
    with torch.no_grad():
        stats = LayerStream(bare, find_ffns(bare), text).group_statistics(bank, gram=True)
    options = {"keep": 0.5, "method": "wanda", "allocation": "uniform:multiple=8", "text": text}
    before, after = prune(bare, repair=None, **options), prune(mended, repair="least-squares:damping=0.01", **options)
    wanted = []
    for expert, one, keep in zip(banks(dense)[0], stats, after.mask.layers[:4], strict=True):
        solved = least_squares(expert.weights().down.detach(), one, keep.neurons.long(), 0.01)
        wanted.append(solved.down.float())
    torch.testing.assert_close(
        banks(mended)[0][0].of_bank.all_weights().down, torch.stack(wanted), rtol=1e-3, atol=1e-5
    )
    assert before.mask.layers[:4] == after.mask.layers[:4]
    for layer in after.layers:
        assert layer.tokens > 32 and layer.error_repaired < 0.8 * layer.error_cut
    want = dense.model(text).last_hidden_state
    off = [float((m.model(text).last_hidden_state - want).square().mean()) for m in (bare, mended)]
    assert off[1] < 0.8 * off[0]


def test_bias_keeps_the_weighted_mean_of_every_experts_output(more_ids):
    dense = make_mixture("gpt_oss", num_hidden_layers=1)
    model = copy.deepcopy(dense)
    prune(model, keep=0.5, method="magnitude-l2-both", repair="bias", allocation="uniform:multiple=8", text=more_ids)
    x, index, weights = routed(dense, more_ids, 0)
    for number, (old, new) in enumerate(zip(banks(dense)[0], banks(model)[0], strict=True)):
        token, place = (index == number).nonzero(as_tuple=True)
        r = weights[token, place, None]
        given = [(e.of_bank.outputs(number, e.of_bank.activations(number, x[token])) * r).sum(0) for e in (old, new)]
        torch.testing.assert_close(given[1], given[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"repair 'bias'.*layers\.0\.mlp\.experts\.0 is an expert without"):
        prune(make_mixture("mixtral"), repair="bias", text=more_ids)


def starved(kind="mixtral"):
    """A mixture whose router never chooses the last expert of its first layer."""
    model = make_mixture(kind)
    gate = model.model.layers[0].mlp.gate
    own = type(gate).forward

    def forward(x):
        with torch.no_grad():
            kept, gate.weight.data = gate.weight.data, gate.weight.data[:3]
        try:
            return own(gate, x)
        finally:
            gate.weight.data = kept

    gate.forward = forward
    return model


def test_an_expert_that_no_token_reaches_is_named_and_ranked_by_its_weights(more_ids):
    model = starved()
    dense = find_ffns(copy.deepcopy(model))[3].weights()
    with pytest.warns(UserWarning, match=r"1 experts saw too few .*model\.layers\.0\.mlp\.experts\.3 \(0\)"):
        report = prune(
            model, keep=0.5, method="wanda", allocation="uniform:multiple=8", repair="least-squares", text=more_ids
        )
    norm = sum(part.double().square().sum(1) for part in dense.parts)
    want = KeepIndex.from_scores(norm, 24)
    assert report.layers[3].tokens == 0 and report.mask.layers[3] == want
    torch.testing.assert_close(find_ffns(model)[3].weights().down, dense.down[want.neurons.long()])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("number", [-1, 99])
def test_a_router_that_names_an_expert_there_is_not_is_refused(number, ids):
    model = make_mixture("mixtral")
    gate = model.model.layers[1].mlp.gate

    def wrong(module, args, out):
        return (*out[:-1], torch.full_like(out[-1], number))

    gate.register_forward_hook(wrong)
    before = copy.deepcopy(model.state_dict())
    rule = rf"router of model\.layers\.1\.mlp\.experts must name experts in \[0, 4\); got \({number}, {number}\)"
    with pytest.raises(InputError, match=rule):
        prune(model, keep=0.5, method="wanda", allocation="global:multiple=1", repair=None, text=ids)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_mask_whose_experts_differ_in_width_is_refused(ids):
    model = make_mixture("qwen3_moe")
    mask = mask_of(model, 24)
    layers = (KeepIndex(range(32), 48), *mask.layers[1:])
    rule = r"as many neurons of every expert of model\.layers\.0\.mlp\.experts, a multiple of 8; got \[24, 32\]"
    with pytest.raises(InputError, match=rule):
        prune(model, **BARE, mask=Mask(layers, mask.fingerprint))
    with pytest.raises(InputError, match=r"a multiple of 8; got \[20\]"):
        prune(model, **BARE, mask=mask_of(model, 20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"allocation": "latency:target_speedup=1.5"},
            r"'latency' does not take experts .*\.0\.mlp\.experts",
        ),
        ({"repair": "refit"}, r"repair 'refit' needs activations .*experts\.0 is an expert"),
        ({"repair": "least-squares:target=0.5"}, "target above 0 needs a model whose layers each have one FFN"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_anything_changes(options, message, more_ids):
    model = make_mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=message):
        prune(model, keep=0.5, text=more_ids, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_gradients_of_experts_are_those_of_their_slices(kind, ids):
    model = make_mixture(kind)
    ffns = find_ffns(model)
    found = gradients.collect(model, ffns, ids, parts=True, parts_square=True)
    assert len(found) == len(ffns)
    sums = [torch.zeros_like(part) for ffn in ffns for part in ffn.weights().parts]
    products, squares = [0.0] * len(ffns), [torch.zeros_like(s) for s in sums]
    for window in ids:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        F.cross_entropy(logits, window[1:]).backward()
        i = 0
        for j, ffn in enumerate(ffns):
            if isinstance(ffn, Expert):
                own = ffn.of_bank.of_gradients().weights(ffn.number).parts
            else:
                own = gradients.neuron_major(ffn, lambda p: p.grad)[0]
            down = ffn.weights().down.detach()
            products[j] = products[j] + (down * own[-1]).sum(1).square()
            for g in own:
                sums[i] += g
                squares[i] += g.square()
                i += 1
    i = 0
    for stats, product in zip(found, products, strict=True):
        torch.testing.assert_close(stats.mask_square.float(), product / len(ids), rtol=1e-2, atol=1e-9)
        most = stats.neuron_taylor * ids.shape[1] * len(ids) ** 0.5  # a sum is no more than that of the sizes
        assert bool((stats.mask_square.sqrt() <= 1.001 * most).all()) and float(most.sum()) > 0
        for part, square in zip(stats.parts, stats.parts_square, strict=True):
            torch.testing.assert_close(part, sums[i] / len(ids), rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(square, squares[i] / len(ids), rtol=1e-3, atol=1e-9)
            i += 1


@pytest.mark.parametrize("method", ["taylor-neuron", "obs", "flap", "wanda-unique", "random", "fisher", "activation"])
def test_every_kind_of_criterion_ranks_neurons_of_experts(method, more_ids):
    from pyprune.pruning import importance

    name = method if method in importance.names() else next(n for n in importance.names() if method in n)
    model = make_mixture("qwen3_moe")
    report = prune(model, keep=0.5, method=name, allocation="uniform:multiple=8", repair=None, text=more_ids)
    assert set(report.mask.widths) == {24}
    assert len(set(report.mask.layers)) == len(report.mask.layers)


def test_lists_of_expert_modules_keep_one_width(ids):
    model = make_mixture("mixtral")
    want = model(ids).logits
    listed(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    found = groups(find_ffns(model))
    assert [len(group) for group in found] == [4, 4]
    assert {ffn.group for ffn in found[0]} == {"model.layers.0.mlp.experts"}


@pytest.mark.parametrize("mode", ["compact", "gather"])
def test_lists_of_expert_modules_run_from_records(mode, ids, random_mask):
    """Each expert has a record of its own, whatever number of tokens it gets."""
    model = listed(make_mixture("mixtral"))
    mask = random_mask(model, [24] * 8)
    pruned = copy.deepcopy(model)
    prune(pruned, mask=mask, **BARE)
    want, names = pruned(ids).logits, set(pruned.state_dict())
    accelerate(model, mode, mask=mask)
    assert sum(isinstance(m, PrunedMLP) for m in model.modules()) == 8
    assert set(model.state_dict()) == names
    for rows in (ids, ids[:1, :1]):  # of one token, most experts get none
        torch.testing.assert_close(model(rows).logits, pruned(rows).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_lists_of_expert_modules_of_transformers(ids, tmp_path):
    config = AutoConfig.for_model(
        "switch_transformers", vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_experts=4,
        num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    words = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    prune(model, 0.5, "magnitude-l2-both", allocation="uniform:multiple=8", **BARE)
    want = model(**words).logits
    accelerate(model)
    assert sum(isinstance(m, PrunedMLP) for m in model.modules()) == 2 * 4 + 2  # and the dense layers
    assert model.config.d_ff == 24
    torch.testing.assert_close(model(**words).logits, want, rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "x")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "x").eval()
    torch.testing.assert_close(again(**words).logits, want, rtol=1e-4, atol=1e-5)


def test_layouts_are_told_by_shapes_where_nothing_says_them():
    module = nn.Module()
    module.num_experts = 3
    module.gate_up_proj = nn.Parameter(torch.zeros(3, 10, 16))  # inputs first
    module.down_proj = nn.Parameter(torch.zeros(3, 8, 10))
    module.act_fn = nn.SiLU()
    bank = experts.find_bank("x", module)
    assert bank.transposed and bank.size == 8 and bank.experts == 3
    module.down_proj = nn.Parameter(torch.zeros(3, 8, 11))
    assert experts.find_bank("x", module) is None


def test_the_config_says_how_a_bank_was_cut(tmp_path):
    model = make_mixture("gpt_oss")
    layers = (24,) * 4 + (32,) * 4
    keeps = tuple(KeepIndex(range(width), 48) for width in layers)
    prune(model, **BARE, mask=Mask(keeps, mask_of(model, 24).fingerprint))
    save(model, tmp_path / "x")
    config = json.loads((Path(tmp_path) / "x" / "config.json").read_text())
    entries = config["pyprune"]["ffn"]["modules"]
    assert [entry["at"] for entry in entries] == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    assert [entry["width"] for entry in entries] == [24, 32]
    assert entries[0]["tensors"][0] == ["gate_up_proj", 2, 2, True] and config["intermediate_size"] == 48


@pytest.mark.parametrize(("share", "enough"), [(0, False), (1, True), (4, False)])
def test_damping_is_chosen_only_with_tokens_on_both_sides(share, enough):
    """Of an expert whose tokens all lie in the windows held out, or none of them, it would be chosen by nothing."""
    model = make_mixture("mixtral")
    described = Described(model)
    pruner = Pruner(described, PruneOptions.of(0.5, repair="least-squares:damping=auto"), None, quiet)
    stats = ActivationStats(4 * 4096, *[torch.ones(96)] * 3, seen=ActivationStats(share * 4096, *[torch.ones(96)] * 3))
    assert pruner._enough(described.ffns[0], stats, 8) == enough and bool(pruner.few) != enough
