"""Least squares and biases after whole experts were removed: against the joint solution, and what is refused."""

import copy

import pytest
import torch
from moe_cases import MIXTURES, make_mixture
from torch.nn import functional as F

from pyprune import InputError, UnsupportedModelError, prune_experts, save
from pyprune.pruning import expert_repair

TEXT = torch.randint(3, 128, (24, 40), generator=torch.Generator().manual_seed(0))


def observed(model, text=TEXT, layer=0):
    """What a bank gets and gives: rows `[T, D]`, experts and weights `[T, K]`, outputs `[T, D]`; window by window."""
    found = []
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_hook(lambda m, args, out: found.append((*args[:3], out)))
    with torch.no_grad():
        for window in text:
            model(window[None])
    handle.remove()
    return [torch.cat(parts).double() for parts in zip(*found, strict=True)]


def test_passes_over_experts_lead_to_the_joint_solution(monkeypatch):
    """One system over all experts that are left, 3 of 48 neurons each, with the same ridge."""
    monkeypatch.setattr(expert_repair, "SWEEPS", 60)
    dense = make_mixture("mixtral")
    cut, model = copy.deepcopy(dense), copy.deepcopy(dense)
    *_, wanted = observed(dense)
    bare = prune_experts(cut, 0.75, "reap", text=TEXT)
    report = prune_experts(model, 0.75, "reap", repair="least-squares:damping=0.05", text=TEXT)
    x, index, weights, given = observed(cut)
    bank = cut.model.layers[0].mlp.experts.requires_grad_(False)
    gate, up = bank.gate_up_proj.double().chunk(2, 1)
    down = bank.down_proj.double().transpose(1, 2)  # [3, 48, 32]
    columns, ridges = [], []
    for expert in range(3):
        share = (weights * (index == expert)).sum(1, keepdim=True)
        columns.append(F.silu(x @ gate[expert].T) * (x @ up[expert].T) * share)
        ridges.append((0.05 * columns[-1].square().sum(0).mean()).repeat(48))
    a, ridge = torch.cat(columns, 1), torch.cat(ridges)
    change = torch.linalg.solve(a.T @ a + ridge.diag(), a.T @ (wanted - given))
    got = model.model.layers[0].mlp.experts.down_proj.double().transpose(1, 2).reshape(144, 32)
    torch.testing.assert_close(got, down.reshape(144, 32) + change, rtol=1e-3, atol=1e-4)
    facts, total = report.layers[0], wanted.square().sum()
    assert facts["kept"] == bare.layers[0]["kept"] and facts["damping"] == 0.05
    assert facts["error_cut"] == pytest.approx(float((wanted - given).square().sum() / total), rel=1e-4)
    assert facts["error_repaired"] == pytest.approx(
        float((wanted - given - a @ change).square().sum() / total), rel=1e-4
    )
    *_, now = observed(model)
    assert float((wanted - now).square().sum() / total) == pytest.approx(facts["error_repaired"], rel=1e-3)


@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_every_layout_is_mended_and_loads_again(kind, ids, tmp_path):
    model = make_mixture(kind)
    report = prune_experts(model, 0.5, "frequency", repair="least-squares:damping=auto", text=TEXT)
    for layer in report.layers:
        assert layer["error_repaired"] < layer["error_cut"] and layer["damping"] in expert_repair.DAMPINGS
    assert report.repair == "least-squares"
    facts = model.config.pyprune["provenance"]["config"]
    assert (facts["compensate"], facts["damping"], facts["target"]) == ("least-squares", "auto", 0.0)
    want = model(ids).logits
    save(model, tmp_path / "x")
    assert torch.equal(type(model).from_pretrained(tmp_path / "x").eval()(ids).logits, want)


def test_a_later_layer_is_fitted_on_what_the_ones_before_give_then():
    """Its target is what its dense experts give for the input that it gets in the repaired model."""
    model, dense = make_mixture("mixtral"), make_mixture("mixtral")
    report = prune_experts(model, 0.5, "reap", repair="least-squares", text=TEXT)
    entering, *_, given = observed(model, layer=1)
    block = dense.model.layers[1].mlp
    with torch.no_grad():
        got = block(entering.float()[None])
    wanted = (got[0] if isinstance(got, tuple) else got)[0].double()
    error = float((wanted - given).square().sum() / wanted.square().sum())
    assert error == pytest.approx(report.layers[1]["error_repaired"], rel=1e-3)


def test_biases_take_the_weighted_mean_of_what_is_missing(monkeypatch):
    monkeypatch.setattr(expert_repair, "SWEEPS", 60)
    model = make_mixture("gpt_oss")
    dense = copy.deepcopy(model)
    report = prune_experts(model, 0.5, "reap", repair="bias", text=TEXT)
    assert all(layer["error_repaired"] < layer["error_cut"] and layer["damping"] is None for layer in report.layers)
    *_, wanted = observed(dense)
    _, index, weights, given = observed(model)
    for expert in range(2):  # nothing is left that an expert's bias could make up for
        share = (weights * (index == expert)).sum(1)
        assert float((share[:, None] * (wanted - given)).sum(0).abs().max()) < 1e-3 * float(wanted.abs().sum(0).max())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_positions_do_not_count(side):
    """Batches of ragged texts give what the same texts give one by one."""
    text, lengths = TEXT[:12], [40, 31, 25, 40, 33, 40, 22, 40, 40, 38, 40, 29]
    one_by_one = [{"input_ids": row[None, :n]} for row, n in zip(text, lengths, strict=True)]
    ids, mask = torch.zeros(12, 40, dtype=torch.long), torch.zeros(12, 40, dtype=torch.long)
    for i, n in enumerate(lengths):
        place = slice(40 - n, 40) if side == "left" else slice(0, n)
        ids[i, place], mask[i, place] = text[i, :n], 1
    together = [{"input_ids": ids, "attention_mask": mask}]
    found = []
    for batches in (one_by_one, together):
        model = make_mixture("qwen3_moe", output_router_logits=True)
        prune_experts(model, 0.75, "reap", repair="least-squares", text=batches)
        found.append(model.state_dict())
    assert all(torch.allclose(found[0][name], found[1][name], atol=2e-4) for name in found[0])


def test_experts_that_saw_too_few_tokens_keep_their_rows():
    dense = make_mixture("mixtral")
    model, bare = copy.deepcopy(dense), copy.deepcopy(dense)
    with pytest.warns(UserWarning, match=r"experts that are left saw too few calibration tokens for a repair"):
        prune_experts(model, 0.75, "random", repair="least-squares", text=TEXT[:2, :16])
    prune_experts(bare, 0.75, "random")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))


def test_where_nothing_is_removed_nothing_changes():
    model = make_mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    report = prune_experts(model, 1.0, "reap", repair="least-squares", text=TEXT)
    assert all(torch.allclose(before[name], tensor, atol=1e-6) for name, tensor in model.state_dict().items())
    assert all(layer["error_cut"] < 1e-10 for layer in report.layers)


@pytest.mark.parametrize(
    ("repair", "more", "error", "message"),
    [
        (
            "refit",
            {},
            InputError,
            "repair must be 'bias' or 'least-squares' or 'none' with structure 'experts'; got 'refit'",
        ),
        ("least-squares:target=0.5", {}, InputError, "target must be 0 with structure 'experts'; got 0.5"),
        (
            "least-squares",
            {"text": None},
            InputError,
            "text must be given for method 'random' and repair 'least-squares'",
        ),
        ("bias", {}, UnsupportedModelError, "is an expert without one"),
        ("none at all", {}, InputError, "repair must be one of"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(repair, more, error, message):
    model = make_mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as found:
        prune_experts(model, 0.5, "random", repair=repair, **{"text": TEXT, **more})
    assert message in str(found.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_experts_behind_a_norm_and_activations_that_are_not_finite_are_refused():
    model = make_mixture("mixtral")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    model.model.layers[0].mlp.experts.post_expert_norm = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="has a norm behind each expert"):
        prune_experts(model, 0.5, "random", repair="least-squares", text=TEXT)
    model = make_mixture("mixtral")
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *_: _[2] * 1e38)
    with pytest.raises(InputError, match=r"be finite.*; experts are removed already, so load the model again"):
        prune_experts(model, 0.5, "random", repair="least-squares", text=TEXT)


def test_rows_that_half_precision_cannot_hold_are_refused(monkeypatch):
    """Two weak experts that are to stand in for two loud ones: finite in float64, not in float16."""
    model = make_mixture("mixtral", num_hidden_layers=1).half()
    own = model.model.layers[0].mlp.experts
    with torch.no_grad():
        own.gate_up_proj.mul_(0.05)
        own.gate_up_proj[2:].mul_(12)
        own.down_proj.mul_(1000 / own.down_proj.abs().max())
    monkeypatch.setattr("pyprune.pruning.experts.choose", lambda scores, count, groups=1: [0, 1])
    text = torch.randint(3, 120, (12, 32), generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"fitted rows of .* must be finite in torch.float16"):
        prune_experts(model, 0.5, "frequency", repair="least-squares:damping=0.001", text=text)
    assert all(p.isfinite().all() for p in model.parameters())
