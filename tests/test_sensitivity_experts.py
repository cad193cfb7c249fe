"""Curves of banks of experts: against the formula, budgets, and allocation `sensitivity` of whole mixtures."""

import copy

import pytest
import torch
from moe_cases import MIXTURES, listed, make_mixture
from torch.nn import functional as F

from pyprune import InputError, UnsupportedModelError, prune, save
from pyprune.model.described import Described
from pyprune.model.families import find_ffns
from pyprune.model.units import Expert, groups
from pyprune.pruning import importance
from pyprune.pruning.allocation.by_sensitivity import choose_widths
from pyprune.pruning.sensitivity import SensitivityCurves, curves, output_gradients

TEXT = torch.randint(3, 128, (12, 32), generator=torch.Generator().manual_seed(0))
WEIGHT = importance.get("magnitude-l2-both")


def score(ffn, stats):
    return WEIGHT(ffn.weights())


def test_a_banks_curve_adds_up_what_its_experts_cost():
    """Half the mean square of g . e over the tokens of each expert, e what its removed neurons gave."""
    model = make_mixture("mixtral")
    ffns = find_ffns(model)
    found = curves(Described(model), TEXT, score, kind="fisher", shares=(0.5,), multiple=8, windows=12, seed=3)
    assert (found.sizes, found.members, found.widths) == ((48, 48), (4, 4), ((24,), (24,)))
    gradients = output_gradients(model, ffns, TEXT, seed=3)
    assert [g.shape for g in gradients] == [(12 * 32, 32)] * 2
    got = []
    module = model.model.layers[1].mlp.experts
    handle = module.register_forward_pre_hook(lambda m, args: got.append(args))
    with torch.no_grad():
        for window in TEXT:
            model(window[None])
    handle.remove()
    x, index, weights = (torch.cat(parts) for parts in zip(*got, strict=True))
    total = 0.0
    for number, expert in enumerate(groups(ffns)[1]):
        w = expert.weights()
        gone = WEIGHT(w).argsort(descending=True, stable=True)[24:]
        tokens, place = (index == number).nonzero(as_tuple=True)
        a = F.silu(F.linear(x[tokens], w.gate)) * F.linear(x[tokens], w.up) * weights[tokens, place, None]
        e = a[:, gone] @ w.down[gone]
        total += float(0.5 * (gradients[1][tokens] * e.detach()).sum(1).double().square().sum())
    assert found.losses[1][0] == pytest.approx(total / (12 * 31), rel=1e-3)
    assert SensitivityCurves.from_json(found.to_json()) == found


def test_gradients_are_those_at_the_banks_output():
    model = make_mixture("qwen3_moe").double()
    model.config._experts_implementation = "eager"  # the grouped products know no float64
    gradient = output_gradients(model, find_ffns(model), TEXT[:1], seed=7)[1]
    generator = torch.Generator().manual_seed(7)
    labels = torch.multinomial(model(TEXT[:1]).logits[0, :-1].float().softmax(-1), 1, generator=generator)[:, 0]
    direction = torch.randn(32, 32, generator=generator, dtype=torch.float64)

    def loss(step):
        handle = model.model.layers[1].mlp.experts.register_forward_hook(lambda m, a, out: out + step * direction)
        with torch.no_grad():
            logits = model(TEXT[:1]).logits[0, :-1]
        handle.remove()
        return float(F.cross_entropy(logits, labels, reduction="sum"))

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert float((gradient.double() * direction).sum()) == pytest.approx(slope, rel=1e-3)


def test_a_budget_counts_every_expert():
    """A bank of 8 of 32 neurons, and an FFN of 64: at half of 320 neurons the cheap bank goes down to 8 each first."""
    rows = {"widths": ((8, 16), (16, 32)), "losses": ((0.02, 0.01), (9.0, 5.0))}
    found = SensitivityCurves(kind="fisher", sizes=(32, 64), tokens=1, fingerprint="f", members=(8, 1), **rows)
    assert choose_widths(found, 0.5, multiple=4) == [8, 64]  # 12 is no width of a bank, 16 and 32 are not worth it
    with pytest.raises(InputError, match="members must be counts for 2 layers, or none"):
        SensitivityCurves(kind="fisher", sizes=(32, 64), tokens=1, fingerprint="f", members=(8,), **rows)


@pytest.mark.filterwarnings("ignore:.* experts saw too few")
@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_the_whole_way(kind, ids, tmp_path):
    model = make_mixture(kind)
    whole = sum(ffn.intermediate_size for ffn in find_ffns(model))
    report = prune(
        model, 0.5, "wanda", allocation="sensitivity:multiple=8,floor=0.1", repair="least-squares", text=TEXT
    )
    ffns = find_ffns(model)
    assert 0.4 * whole < sum(ffn.intermediate_size for ffn in ffns) <= 0.5 * whole
    assert [ffn.intermediate_size for ffn in ffns] == [layer.after for layer in report.layers]
    assert all(f.intermediate_size % 8 == 0 for f in ffns if isinstance(f, Expert))
    want = model(ids).logits
    save(model, tmp_path / "x")
    assert torch.equal(type(model).from_pretrained(tmp_path / "x").eval()(ids).logits, want)


def test_what_has_no_curves_is_refused_before_anything_changes():
    model = listed(make_mixture("mixtral"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="allocation 'sensitivity' needs one list of layers, and experts"):
        prune(model, 0.5, "wanda", allocation="sensitivity", repair=None, text=TEXT)
    with pytest.raises(UnsupportedModelError, match="curves of kind 'loss' are not measured of experts"):
        curves(Described(make_mixture("mixtral")), TEXT, score, kind="loss")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
