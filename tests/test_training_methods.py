"""One or two steps of every method, computed by hand on a small layer."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyprune import InputError
from pyprune.model.families import FFN, find_ffns
from pyprune.model.patterns import PATTERNS
from pyprune.training import methods
from pyprune.training.methods import Gathered, Moment
from pyprune.training.methods.gum import similarity
from pyprune.training.methods.platon import sensitivity

PLAIN = next(p for p in PATTERNS if p.name == "up_proj/down_proj")
T = torch.tensor


def layer(neurons=2, hidden=2, bias=False):
    """A plain FFN with up weights of ones and down weights of twos."""
    holder = nn.Module()
    holder.up_proj = nn.Linear(hidden, neurons, bias=bias)
    holder.down_proj = nn.Linear(neurons, hidden, bias=bias)
    with torch.no_grad():
        for parameter in holder.up_proj.parameters():
            parameter.fill_(1.0)
        for parameter in holder.down_proj.parameters():
            parameter.fill_(2.0)
    return FFN(0, "mlp", holder, PLAIN, "gelu")


def make(name, **values):
    kind = methods.METHODS[name]
    return kind(**({"score_rate": 0.5} if issubclass(kind, methods.Movement) else {}) | values)


def run(method, gradients, *, products=None, moments=None, layers=1, start=None):
    state = {"scores": T(start or [0.0] * len(gradients[0]))}
    for i, gradient in enumerate(gradients):
        moment = moments[i] if moments else Moment(i, 1.0, 0.0)
        gathered = Gathered(layer(), layers, T(gradient), None if products is None else T(products[i]))
        method.update(state, gathered, moment)
    return state


def test_movement_descends_the_score_gradient():
    state = run(make("movement"), [[1.0, -2.0, 0.0], [0.5, -2.0, 0.0]])
    assert state["scores"].tolist() == [-0.75, 2.0, 0.0]


def test_movement_that_forgets():
    """s <- beta s - rate g: an EMA of the movement but for a factor, and with 0 the last batch alone."""
    gradients = [[1.0, -2.0], [0.5, 4.0]]
    assert run(make("movement", beta=0.5), gradients)["scores"].tolist() == [0.5 * -0.5 - 0.25, 0.5 * 1.0 - 2.0]
    assert run(make("movement", beta=0), gradients)["scores"].tolist() == [-0.25, -2.0]
    assert methods.parse("gum:beta=0.85").beta == 0.85 and methods.Gum().beta == 1
    for beta in (-0.1, 1.01, float("nan"), True):
        with pytest.raises(InputError, match=r"beta must lie in \[0, 1\]"):
            make("gum", beta=beta)


def test_movement_by_adam():
    """The first update of Adam is the sign of the gradient, times the rate."""
    method = make("movement", optimizer="adam")
    assert run(method, [[1e-3, -4.0]])["scores"].tolist() == pytest.approx([-0.5, 0.5], rel=1e-4)
    state = run(method, [[1.0, -4.0], [0.0, -4.0]])
    # second step of the first: m = 0.09 / (1 - 0.81), v = 0.000999 / (1 - 0.998001)
    step = 0.09 / 0.19 / math.sqrt(0.000999 / 0.001999)
    assert state["scores"].tolist() == pytest.approx([-0.5 - 0.5 * step, 1.0], rel=1e-5)


def test_movement_from_the_ranks_of_a_criterion():
    """Norms of the up rows 5, 1, 3: places 1/2, -1/2 and 0 times the spread, under what movement adds at each step."""
    method = make("movement", criterion="magnitude-l1-fan-in", spread=0.4)
    ffn = layer(neurons=3, hidden=1)
    state = method.start(ffn, torch.Generator().manual_seed(0))
    for step, norms in enumerate(([5.0, 1.0, 3.0], [-1.0, 1.0, 9.0], [9.0, 9.0, 0.0])):
        with torch.no_grad():
            ffn.holder.up_proj.weight.copy_(T(norms)[:, None])
        method.update(state, Gathered(ffn, 1, T([1.0, 0.0, -1.0])), Moment(step, 1.0, float(step == 2)))
        # Sums of norms: 5, 1, 3; then 6, 2, 12; once neurons go, the criterion has had its say.
        place = ([0.2, -0.2, 0.0], [0.0, -0.2, 0.2], [0.0, -0.2, 0.2])[step]
        moved = 0.5 * (step + 1)
        assert state["scores"].tolist() == pytest.approx([place[0] - moved, place[1], place[2] + moved])
    # What a criterion gives is on the host; the state is where the model is.
    there = {name: tensor.to("meta") for name, tensor in state.items()} | {"seed": state["seed"]}
    method.update(there, Gathered(ffn, 1, torch.zeros(3, device="meta")), Moment(3, 1.0, 0.0))
    assert there["judged"].is_meta and there["scores"].is_meta
    assert method.reads_weights and not make("movement").reads_weights
    assert make("gum", criterion="wanda").needs == {"gradient", "products", "activations"}


def test_movement_with_a_penalty_is_the_gradient_of_the_mean_soft_mask():
    """Against autograd: 3 * progress * mean over 4 layers of mean over neurons of sigmoid(s), one layer's part."""
    scores = T([0.3, -1.0, 2.0], requires_grad=True)
    (3.0 * 0.25 * scores.sigmoid().mean() / 4).backward()
    method = make("movement", penalty=3.0, score_rate=1.0)
    state = run(method, [[0.0, 0.0, 0.0]], moments=[Moment(0, 0.8, 0.25)], layers=4, start=[0.3, -1.0, 2.0])
    torch.testing.assert_close(state["scores"], (scores - scores.grad).detach())


def test_soft_movement_keeps_by_a_threshold_that_grows_with_the_schedule():
    method = make("movement-soft", threshold=0.2)
    assert method.cutoff(Moment(0, 1.0, 0.0)) == 0.0
    assert method.cutoff(Moment(5, 0.6, 0.5)) == 0.1
    assert method.cutoff(Moment(9, 0.5, 1.0)) == 0.2
    assert make("movement").cutoff(Moment(9, 0.5, 1.0)) is None
    # sigmoid' = 1/4: 0.5 * (gradient + 8 * 0.5 / 4 / 2 neurons)
    plain = make("movement-soft", optimizer="sgd", penalty=8.0)
    assert run(plain, [[1.0, -1.0]], moments=[Moment(5, 0.6, 0.5)])["scores"].tolist() == [-0.75, 0.25]


def test_similarity_by_hand():
    # three neurons over two tokens: (1, 0), (2, 0), (1, 1); cosines 1, 1/sqrt(2), 1/sqrt(2)
    a = T([[1.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    half = 1 / math.sqrt(2)
    want = T([1 + half, 1 + half, 2 * half]) / (3 * 0.5)
    torch.testing.assert_close(similarity(a.t() @ a, 0.5), want)
    a[:, 0] *= -1  # what speaks against is alike too
    torch.testing.assert_close(similarity(a.t() @ a, 0.5), want)


def test_a_silent_neuron_is_like_nothing():
    a = T([[1.0, 0.0, 1.0]])
    assert similarity(a.t() @ a, 1.0).tolist() == pytest.approx([1 / 3, 0.0, 1 / 3])
    assert similarity(torch.zeros(3, 3), 1.0).tolist() == [0.0, 0.0, 0.0]


def test_gum_multiplies_the_penalty_by_similarity():
    products = [[4.0, 2.0], [2.0, 1.0]]  # two neurons that always speak together
    method = make("gum", penalty=8.0, similarity=3.0, score_rate=1.0)
    moment = Moment(5, 0.5, 0.5)
    state = run(method, [[1.0, -1.0]], products=[products], moments=[moment])
    # penalty 8 * 0.5 / 4 / 2 = 0.5; similarity 1 / (2 * 0.5) = 1; 0.5 * (1 + 3) = 2
    assert state["scores"].tolist() == [-3.0, -1.0]


def test_gum_sums_are_weighted_over_batches():
    method = make("gum", similarity_beta=0.75)
    first, second = [[4.0, 0.0], [0.0, 4.0]], [[0.0, 8.0], [8.0, 0.0]]
    state = run(method, [[0.0, 0.0]] * 2, products=[first, second])
    assert state["products"].tolist() == [[0.75, 2.0], [2.0, 0.75]]


def test_gum_pushes_both_of_two_alike_and_the_one_less_needed_falls_lowest():
    """Neurons 0 and 1 are one; 2 is unique, and as sensitive as 1."""
    a = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    a[:, 1] = a[:, 0]
    gradient = [-0.3, -0.2, -0.2]
    moments = [Moment(0, 0.5, 0.5)]
    products = [(a.t() @ a).tolist()]
    gum = run(make("gum"), [gradient], products=products, moments=moments)["scores"]
    plain = run(make("gum", similarity=0.0), [gradient], products=products, moments=moments)["scores"]
    push = plain - gum
    assert push[0] == pytest.approx(float(push[1]))
    assert push[0] > 2 * push[2] > 0
    assert gum.argmin() == 1
    assert plain[1] == plain[2]


def test_gum_inverted_and_in_the_gradient():
    products = [[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]  # similarities 1/3, 1/3, 0 at v = 1
    moment = [Moment(0, 1.0, 1.0)]
    gradient = [[3.0, 0.0, 4.0]]
    common = {"similarity": 3.0, "score_rate": 1.0}
    inverted = run(make("gum", penalty=12.0, inverted=True, **common), gradient, products=products, moments=moment)
    assert inverted["scores"].tolist() == pytest.approx([-4.0, -1.0, -6.0])  # penalty 1 times 1, 1, 2
    form = make("gum", penalty=0.0, uniqueness_form="gradient", **common)
    assert run(form, gradient, products=products, moments=moment)["scores"].tolist() == pytest.approx(
        [-8.0, -5.0, -4.0]
    )


def prepared(method, scores, moment, scope="layer"):
    """States of layers with `scores`, ready for the step of `moment`, and their gates."""
    states = [
        {"scores": T(row), "multipliers": torch.zeros(2), "slope": T(1.5 + i), "seed": T(i)}
        for i, row in enumerate(scores)
    ]
    return states, method.prepare(states, moment, scope)


def test_hard_concrete_gates_by_hand():
    """With u = 1/2 s is sigmoid(log_alpha / b); b = 1, stretched to (-0.5, 1.5): z = 2 s - 0.5, clamped."""
    method = make("l0", temperature=1.0, stretch=0.5)
    scores, half = T([0.0, math.log(3.0), -2.0, 2.0]), torch.full((4,), 0.5)
    gates = method.draw(scores, half)
    assert gates.tolist() == pytest.approx([0.5, 1.0, 0.0, 1.0])  # s = 1/2, 3/4, 0.12, 0.88
    # u = 1/4: log u - log(1 - u) = -log 3, so log_alpha = log 3 stands where 0 stood
    assert method.draw(T([math.log(3.0)]), T([0.25])).tolist() == pytest.approx([0.5])
    assert method.slope(T([0.5, 1.0, 0.0])).tolist() == [0.5, 0.0, 0.0]  # 2 * 1/4; nothing where it is clamped
    # P(z > 0) = sigmoid(log_alpha - log(0.5 / 1.5))
    assert method.chance(T([0.0, -math.log(3.0)])).tolist() == pytest.approx([0.75, 0.5])
    assert method.draw(T([0.0, 9.0]), torch.zeros(2)).tolist() == [0.0, 0.0]  # the lowest u there is


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0, "stretch": 0.3}])
def test_hard_concrete_gates_against_their_definition(values):
    """The slope against autograd, and the expected share against the share of many draws that is open."""
    method = make("l0", **values)
    generator = torch.Generator().manual_seed(0)
    scores = torch.linspace(-4, 4, 400, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(2000, 400, dtype=torch.float64, generator=generator)
    gates = method.draw(scores, uniform)
    (slope,) = torch.autograd.grad(gates[0].sum(), scores)
    torch.testing.assert_close(method.slope(gates[0].detach()), slope)
    assert 0 < int((slope > 0).sum()) < 400
    # 800,000 draws: a deviation of 0.5 / sqrt(800,000) at most
    assert float((gates > 0).double().mean()) == pytest.approx(float(method.chance(scores.detach()).mean()), abs=2e-3)


def test_l0_starts_where_it_was_told():
    method = make("l0", initial=0.9)
    state = method.start(layer(500), torch.Generator().manual_seed(3))
    assert method.chance(state["scores"]).mean() == pytest.approx(0.9, abs=1e-3)
    assert 0 < state["scores"].std() < 0.02
    assert state["multipliers"].tolist() == [0.0, 30.0]
    assert torch.equal(method.start(layer(500), torch.Generator().manual_seed(3))["scores"], state["scores"])


def test_l0_descends_through_the_gates_and_the_lagrangian():
    """Against autograd: sum g_j z_j + c (lambda_1 (e - v) + lambda_2 (e - v)^2), with c = 1.5 + 2.5; lambdas ascend.

    One update of Adam from zero is the sign of the gradient times the rate; so its first moment is looked at.
    """
    method, moment = make("l0", multiplier_rate=2.0), Moment(0, 0.25, 0.5)
    states, gates = prepared(method, [[0.3, -1.0, -1.6], [0.2, 1.0, -2.0]], moment, "global")
    generator = torch.Generator().manual_seed(1 * 1_000_003 + 0)
    scores = [T([0.3, -1.0, -1.6], requires_grad=True), T([0.2, 1.0, -2.0], requires_grad=True)]
    z = method.draw(scores[1], torch.rand(3, generator=generator))
    assert torch.equal(gates[1], z.detach())
    assert (gates[1] < 1).any() and (gates[1] > 0).any()
    multipliers = T([0.7, -3.0], requires_grad=True)
    gap = method.chance(torch.cat(scores)).mean() - 0.25
    loss = (T([5.0, -4.0, 3.0]) * z).sum() + 4.0 * (multipliers[0] * gap + multipliers[1] * gap**2)
    loss.backward()
    states[1]["multipliers"] = multipliers.detach().clone()
    method.update(states[1], Gathered(layer(3), 2, T([5.0, -4.0, 3.0])), moment)
    torch.testing.assert_close(states[1]["first"], 0.1 * scores[1].grad)
    torch.testing.assert_close(states[1]["scores"], scores[1].detach() - 0.1 * scores[1].grad.sign(), rtol=1e-5, atol=0)
    torch.testing.assert_close(states[1]["multipliers_first"], 0.1 * multipliers.grad / 4.0)
    assert float(gap.detach()) > 0  # too many are open, so both multipliers rise
    assert states[1]["multipliers"].tolist() == pytest.approx([2.7, -1.0], rel=1e-5)
    assert float(states[1]["slope"]) == pytest.approx(12.0)  # abs of 5, -4 and 3; the first value has no past
    method.prepare(states, Moment(1, 0.25, 0.5), "global")
    assert [float(state["unit"]) for state in states] == pytest.approx([13.5, 13.5])
    method.update(states[1], Gathered(layer(3), 2, T([1.0, 0.0, -1.0])), Moment(1, 0.25, 0.5))
    assert float(states[1]["slope"]) == pytest.approx((0.09 * 12 + 0.1 * 2) / 0.19)


def test_l0_counts_what_is_expected_by_layer_or_over_the_model():
    """Chances of 3/4 and 1/2 by hand: a temperature of 1, a stretch of 1/2."""
    method, even = make("l0", temperature=1.0, stretch=0.5), -math.log(3.0)
    scores, moment = [[0.0, 0.0], [even, even, even, even]], Moment(3, 0.5, 0.5)
    states, _ = prepared(method, scores, moment, "layer")
    assert [float(s["share"]) for s in states] == pytest.approx([0.75, 0.5])
    assert [float(s["count"]) for s in states] == [2, 4]
    states, gates = prepared(method, scores, moment, "global")
    assert [float(s["share"]) for s in states] == pytest.approx([3.5 / 6] * 2)
    assert [float(s["count"]) for s in states] == [6, 6]
    _, same = prepared(method, scores, moment, "layer")
    _, later = prepared(method, scores, Moment(4, 0.5, 0.5), "layer")
    assert all(torch.equal(one, other) for one, other in zip(gates, same, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(gates, later, strict=True))
    assert not torch.equal(gates[0], gates[1][:2])


def test_l0_says_what_it_reached_when_that_is_not_the_target():
    method, even = make("l0", temperature=1.0, stretch=0.5, tolerance=0.1), -math.log(3.0)
    last = Moment(30, 0.5, 1.0, final=True)
    message = r"keep must be reached by the gates of layer 1 within 0.1 .* at step 30 the share expected open is 0.7500"
    with pytest.raises(InputError, match=message + r"; more steps, .*; got 0.5"):
        prepared(method, [[even, even], [0.0, 0.0]], last)
    with pytest.raises(InputError, match=r"the gates of the model within 0.1 .* expected open is 0.6250; .*got 0.5"):
        prepared(method, [[even, even], [0.0, 0.0]], last, "global")
    states, gates = prepared(method, [[even, even], [even]], last)
    assert gates is None  # nothing is drawn any more, and scores rest
    method.update(states[0], Gathered(layer(), 2, T([1.0, 2.0])), last)
    assert states[0]["scores"].tolist() == pytest.approx([even, even])


def test_magnitude_is_the_norm_of_the_neuron_now():
    ffn = layer(neurons=2, hidden=2, bias=True)
    method = make("magnitude")
    state = method.start(ffn, torch.Generator())
    assert state["scores"].tolist() == pytest.approx([math.sqrt(10)] * 2)  # 1 + 1 + 4 + 4
    with torch.no_grad():
        ffn.holder.down_proj.weight[:, 1] = 0.0
    method.update(state, Gathered(ffn, 1), Moment(0, 1.0, 0.0))
    assert state["scores"].tolist() == pytest.approx([math.sqrt(10), math.sqrt(2)])


def test_random_order_is_frozen_and_seeded():
    method = make("random")
    first = method.start(layer(50), torch.Generator().manual_seed(3))["scores"]
    again = method.start(layer(50), torch.Generator().manual_seed(3))["scores"]
    other = method.start(layer(50), torch.Generator().manual_seed(4))["scores"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = {"scores": first.clone()}
    method.update(state, Gathered(layer(50), 1), Moment(3, 0.5, 0.5))
    assert torch.equal(state["scores"], first)


def test_sensitivity_by_hand():
    ffn = layer(neurons=2, hidden=2, bias=True)
    up, down = ffn.holder.up_proj, ffn.holder.down_proj
    up.weight.grad = T([[1.0, -1.0], [0.0, 0.5]])  # weights 1: 2 and 0.5
    up.bias.grad = T([3.0, 0.0])  # bias 1: 3 and 0
    down.weight.grad = T([[1.0, 0.0], [-1.0, 2.0]])  # weights 2, neuron-major columns: 4 and 4
    down.bias.grad = T([7.0, 7.0])  # no neuron's
    assert sensitivity(ffn).tolist() == [9.0, 4.5]
    up.weight.grad = None
    with pytest.raises(InputError, match="weights of layer 0 must have gradients"):
        sensitivity(ffn)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "llama", "opt", "phi"])
def test_sensitivity_finds_every_parameter_of_a_neuron(name, tiny):
    """A neuron's parameters are those whose doubling changes only its sensitivity."""
    model = tiny(name)
    ffn = find_ffns(model)[1]
    generator = torch.Generator().manual_seed(0)
    for parameter in ffn.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    got = sensitivity(ffn)
    want = torch.zeros(ffn.intermediate_size)
    for projection, blocks in ffn.pattern.inputs:
        module = ffn.holder.get_submodule(projection)
        product = (module.weight * module.weight.grad).abs().detach()
        for row in range(blocks * ffn.intermediate_size):
            part = product[:, row] if isinstance(module, Conv1D) else product[row]
            want[row % ffn.intermediate_size] += part.sum()
            if module.bias is not None:
                want[row % ffn.intermediate_size] += (module.bias[row] * module.bias.grad[row]).abs().detach()
    for j in range(ffn.intermediate_size):
        weight, gradient = ffn.down.weight.detach(), ffn.down.weight.grad
        index = (j, slice(None)) if isinstance(ffn.down, Conv1D) else (slice(None), j)
        want[j] += (weight[index] * gradient[index]).abs().sum()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_platon_and_ema_by_hand():
    ffn = layer(neurons=1, hidden=1)
    platon, average = make("platon", beta=0.5, uncertainty_beta=0.75), make("ema", beta=0.5)
    states = [{"scores": torch.zeros(1)}, {"scores": torch.zeros(1)}]
    for sensitivity_now, product, mean in ((4.0, 1.0, 2.0), (8.0, 5.625, 5.0)):
        ffn.holder.up_proj.weight.grad = T([[sensitivity_now]])
        ffn.holder.down_proj.weight.grad = T([[0.0]])
        for method, state in zip((platon, average), states, strict=True):
            method.update(state, Gathered(ffn, 1), Moment(0, 1.0, 0.0))
        assert [float(s["scores"]) for s in states] == [product, mean]
