"""Whole experts: scores by hand, what is left computes as it should, checkpoints, and what is refused."""

import copy

import pytest
import torch
from moe_cases import MIXTURES, make_mixture
from torch.nn import functional as F

from pyprune import InputError, UnsupportedModelError, prune, prune_experts, save
from pyprune.model.families import find_ffns
from pyprune.model.units import Expert, groups
from pyprune.pruning.experts import METHODS, choose


def banks(model):
    return [group for group in groups(find_ffns(model)) if isinstance(group[0], Expert)]


def routing(model, ids, layer):
    got = {}
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, args: got.update(x=args[0], index=args[1], weights=args[2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return got["x"], got["index"], got["weights"]


def test_scores_by_hand(ids):
    model = make_mixture("mixtral")
    dense = copy.deepcopy(model)
    found = prune_experts(copy.deepcopy(model), 0.5, "reap", text=ids)
    counted = prune_experts(model, 0.5, "frequency", text=ids)
    for layer in range(2):
        x, index, weights = routing(dense, ids, layer)
        for number, expert in enumerate(banks(dense)[layer]):
            token, place = (index == number).nonzero(as_tuple=True)
            w = expert.weights()
            out = F.linear(F.silu(F.linear(x[token], w.gate)) * F.linear(x[token], w.up), w.down.t())
            reap = float((weights[token, place] * out.norm(dim=1)).mean())
            assert found.layers[layer]["scores"][number] == pytest.approx(reap, rel=1e-4)
            assert found.layers[layer]["tokens"][number] == len(token) == counted.layers[layer]["scores"][number]
        best = sorted(range(4), key=lambda e: -found.layers[layer]["scores"][e])[:2]
        assert found.layers[layer]["kept"] == sorted(best)


def test_what_is_left_is_routed_among_itself(ids):
    dense = make_mixture("qwen3_moe", norm_topk_prob=True)
    model = copy.deepcopy(dense)
    report = prune_experts(model, 0.75, "reap", text=ids)
    assert model.config.num_experts == 3 and len(banks(model)[1]) == 3
    block, kept = dense.model.layers[1].mlp, report.layers[1]["kept"]
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        got = model.model.layers[1].mlp(x[None])
        got = (got[0] if isinstance(got, tuple) else got)[0]
        shares = F.linear(x, block.gate.weight[kept]).softmax(-1)
        top, place = shares.topk(2, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        want = torch.zeros_like(x)
        for i, number in enumerate(kept):
            w = banks(dense)[1][number].weights()
            out = F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), w.down.t())
            want += out * (top * (place == i)).sum(-1, keepdim=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_reloads_with_as_many_experts(kind, ids, tmp_path):
    model = make_mixture(kind)
    report = prune_experts(model, 0.5, "frequency", text=ids)
    assert all(len(layer["kept"]) == 2 for layer in report.layers)
    assert report.parameters_after < report.parameters_before
    want = model(ids).logits
    assert want.isfinite().all()
    save(model, tmp_path / "x")
    assert not (tmp_path / "x" / "modeling_pyprune.py").exists()
    again = type(model).from_pretrained(tmp_path / "x").eval()
    assert torch.equal(again(ids).logits, want)
    again.generate(ids[:1], max_new_tokens=2, do_sample=False)


def test_fewer_experts_of_fewer_neurons(ids, tmp_path):
    model = make_mixture("deepseek_v3")
    prune(model, keep=0.6, method="magnitude-l2-both", repair=None, allocation="global:multiple=1")
    widths = {f.group: f.intermediate_size for f in find_ffns(model)}
    prune_experts(model, 0.5, "random", seed=1)
    assert {f.group: f.intermediate_size for f in find_ffns(model)} == widths
    want = model(ids).logits
    save(model, tmp_path / "x")
    again = type(model).from_pretrained(tmp_path / "x").eval()
    assert torch.equal(again(ids).logits, want) and again.config.n_routed_experts == 2


def test_groups_of_a_router_keep_as_many_each(ids):
    assert choose(torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0]), 4, 2) == [0, 1, 6, 7]
    assert choose(torch.tensor([1.0, 1.0, 1.0]), 2) == [0, 1]
    model = make_mixture("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1)
    report = prune_experts(model, 0.5, "random")
    kept = report.layers[0]["kept"]
    assert sum(number < 4 for number in kept) == 2 == sum(number >= 4 for number in kept)
    assert model(ids).logits.isfinite().all()
    with pytest.raises(InputError, match="keep must leave at least 2 experts in each of the 2 groups"):
        prune_experts(model, 0.5, "random")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"keep": 0.2, "method": "random"},
            "keep must leave at least the 2 experts of 4 that a token is routed to; got",
        ),
        ({"keep": 0.0}, r"keep must lie in \(0, 1\]; got 0.0"),
        ({"method": "reaper"}, "method must be one of reap, frequency, random.*nearest: reap"),
        ({"method": "reap"}, "text must be given for method 'reap'"),
        ({"method": "random", "seed": -1}, "seed must be a non-negative integer; got -1"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(arguments, message):
    model = make_mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prune_experts(model, **arguments)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_experts_is_refused(tiny):
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts whose weights lie in tensors"):
        prune_experts(tiny("llama"), 0.5, "random")


def test_methods_say_what_they_are():
    assert "arXiv 2510.13999" in METHODS["reap"] and set(METHODS) == {"reap", "frequency", "random"}


def test_on_the_command_line(tmp_path, tokenizer):
    import json

    from typer.testing import CliRunner

    from pyprune.cli.commands import app

    model = make_mixture("qwen3_moe", vocab_size=1024)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    words = [
        "--keep",
        "0.5",
        "--repair",
        "least-squares",
        "--text",
        "builtin:prose",
        "--tokens",
        "256",
        "--window",
        "32",
        "--json",
    ]
    run = CliRunner().invoke(app, ["prune-experts", str(tmp_path / "dense"), "--out", str(tmp_path / "x"), *words])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert [len(layer["kept"]) for layer in found["layers"]] == [2, 2] and found["structure"] == "experts"
    assert found["repair"] == "least-squares" and found["layers"][0]["error_repaired"] < found["layers"][0]["error_cut"]
    again = type(model).from_pretrained(tmp_path / "x")
    assert again.config.num_experts == 2 and again.config.pyprune["provenance"]["config"]["method"] == "reap"
