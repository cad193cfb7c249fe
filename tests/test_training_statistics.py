"""Statistics of single training steps, and any criterion smoothed over them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pyprune import InputError
from pyprune.base.statistics import ActivationStats, GradientStats
from pyprune.model.families import FFN, find_ffns
from pyprune.model.patterns import PATTERNS
from pyprune.pruning import gradients, importance
from pyprune.pruning.calibration import LayerStream
from pyprune.training import EMA, TrainingConfig, TrainingPruner
from pyprune.training.masks import NeuronMask
from pyprune.training.methods import Gathered, Moment, Smoothed

PLAIN = next(p for p in PATTERNS if p.name == "up_proj/down_proj")
ALL = frozenset({"activations", "gram", "gradients", "gradients2"})
STILL = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"), 0.0)


class Small(nn.Module):
    """y = V relu(U x) with two neurons on one channel."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.up_proj.weight.copy_(torch.tensor([[1.0], [2.0]]))
            self.down_proj.weight.copy_(torch.tensor([[3.0, -1.0]]))

    def forward(self, x):
        return self.down_proj(self.up_proj(x).relu())


def small_stats(keep, needs=ALL):
    """Two samples of two tokens; the loss of a sample is the sum of its outputs."""
    model = Small()
    mask = NeuronMask(FFN(0, "", model, PLAIN, "relu"), False, False, needs)
    mask.set(torch.tensor(keep))
    x = torch.tensor([[[1.0], [2.0]], [[-1.0], [3.0]]])
    model(x).sum(1).mean().backward()
    return mask.statistics()


def test_statistics_of_a_step_by_hand():
    """a = (1, 2), (2, 4) | (0, 0), (3, 6); dL/da = (3, -1) at every token; du passes where u > 0."""
    stats = small_stats([True, True])
    assert stats.tokens == 4
    assert stats.mean.tolist() == [1.5, 3.0]
    assert stats.abs_mean.tolist() == [1.5, 3.0]
    assert stats.square_sum.tolist() == [14.0, 56.0]
    assert stats.gram.tolist() == [[14.0, 28.0], [28.0, 56.0]]
    found = stats.gradients
    assert (found.samples, found.tokens) == (2, 4)
    assert found.neuron_taylor.tolist() == [4.5, 3.0]  # 3 * 6 / 4, 1 * 12 / 4
    assert found.mask_square.tolist() == [81.0, 36.0]  # 9 and 9; -6 and -6
    assert found.sample_taylor.tolist() == [18.0, 12.0]  # up row and down row give the same, relu being homogeneous
    up, down = found.parts
    assert (up.tolist(), down.tolist()) == ([[9.0], [-3.0]], [[3.0], [6.0]])
    up, down = found.parts_square
    assert (up.tolist(), down.tolist()) == ([[81.0], [9.0]], [[9.0], [36.0]])


def test_a_removed_neuron_is_judged_through_its_mask_but_has_no_weight_gradients():
    stats = small_stats([True, False])
    assert stats.square_sum.tolist() == [14.0, 56.0]
    assert stats.gradients.neuron_taylor.tolist() == [4.5, 3.0]
    assert stats.gradients.mask_square.tolist() == [81.0, 36.0]
    assert stats.gradients.sample_taylor.tolist() == [18.0, 0.0]
    assert [part[1].item() for part in (*stats.gradients.parts, *stats.gradients.parts_square)] == [0.0] * 4


def test_what_nobody_asked_for_is_not_there():
    plain = small_stats([True, True], frozenset({"activations"}))
    assert plain.gram is None and plain.gradients is None
    first = small_stats([True, True], frozenset({"gradients"}))
    assert first.mean.isnan().all() and first.gradients.parts_square == ()
    assert first.gradients.neuron_taylor.tolist() == [4.5, 3.0]


def expected(model, ids):
    """The same from the library's own passes over calibration text."""
    ffns = find_ffns(model)
    found = gradients.collect(model, ffns, ids, parts=True, parts_square=True)
    stream = LayerStream(model.eval(), ffns, ids)
    stats = []
    for ffn in ffns:
        stats.append(replace(stream.statistics(ffn, gram=True), gradients=found[ffn.layer]))
        stream.advance()
    return stats


def tensors(stats: ActivationStats) -> list[torch.Tensor]:
    g = stats.gradients
    assert isinstance(g, GradientStats)
    moments = [stats.mean, stats.abs_mean, stats.square_sum, stats.gram]
    return [*moments, g.neuron_taylor, g.mask_square, g.sample_taylor, *g.parts, *g.parts_square]


@pytest.mark.parametrize("name", ["gpt2", "phi3", "llama", "opt", "phi"])
def test_a_step_shows_what_calibration_shows(name, tiny, ids):
    """Over plain, fused, gated, in-layer and biased FFNs; the step in two backward passes of half the batch each."""
    model = tiny(name, **STILL)
    want = expected(model, ids)
    masks = [NeuronMask(ffn, False, False, ALL) for ffn in find_ffns(model)]
    model.train()
    for half in ids.split(2):
        (model(half, labels=half).loss / 2).backward()
    for mask, stats in zip(masks, want, strict=True):
        got = mask.statistics()
        assert (got.tokens, got.gradients.samples, got.gradients.tokens) == (64, 4, 64)
        for a, b in zip(tensors(got), tensors(stats), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=1e-6 * float(b.abs().max()))
        mask.remove()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("criterion", importance.names())
def test_every_criterion_is_smoothed_over_steps(criterion, tiny, ids, more_ids):
    """(0.25 s1 + 0.5 s2) / 0.75 after two steps with beta 0.5, s1 and s2 as calibration on either batch gives them."""
    model = tiny("llama")
    config = TrainingConfig(method=Smoothed(criterion, beta=0.5), steps=9, warmup=5, keep=0.5, seed=4)
    own = []
    for batch in (ids, more_ids):
        generators = [torch.Generator().manual_seed(4 * 1_000_003 + layer) for layer in range(3)]
        layers = zip(find_ffns(model), expected(model, batch), generators, strict=True)
        with torch.no_grad():
            own.append([importance.get(criterion)(ffn.weights(), stats, g) for ffn, stats, g in layers])
    pruner = TrainingPruner(model.train(), config)
    for step, batch in enumerate((ids, more_ids)):
        pruner.before_step(step)
        model(batch, labels=batch).loss.backward()
        pruner.step()
        model.zero_grad()
        if step == 0:
            for scores, first in zip(pruner.scores, own[0], strict=True):
                torch.testing.assert_close(scores.double(), first, rtol=1e-3, atol=1e-5 * float(first.max()))
    for scores, first, second in zip(pruner.scores, *own, strict=True):
        want = (first + 2 * second) / 3
        torch.testing.assert_close(scores.double(), want, rtol=1e-3, atol=1e-5 * float(want.max()))
    pruner.remove()


def test_without_a_past_it_is_the_last_batch(tiny, ids):
    model = tiny("llama").train()
    pruner = TrainingPruner(model, TrainingConfig(method=Smoothed(beta=0.0), steps=9, warmup=5))
    for step, batch in enumerate((ids, ids[:2])):
        pruner.before_step(step)
        model(batch, labels=batch).loss.backward()
        pruner.step()
        model.zero_grad()
    scores = pruner.scores
    pruner.remove()
    for got, stats in zip(scores, expected(model, ids[:2]), strict=True):
        assert pruner.config.method.criterion == "taylor-neuron"
        want = stats.gradients.neuron_taylor
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5 * float(want.max()))


def test_it_goes_on_from_its_state(tiny, ids, tmp_path):
    config = TrainingConfig(method=Smoothed("fisher", beta=0.9), steps=4, keep=0.5)

    def steps(model, pruner, numbers):
        model.train()
        for step in numbers:
            pruner.before_step(step)
            batch = ids.roll(step, 0)[:2]
            model(batch, labels=batch).loss.backward()
            pruner.step()
            model.zero_grad()

    model, other = tiny("llama"), tiny("llama")
    pruner, again = TrainingPruner(model, config), TrainingPruner(other, config)
    steps(model, pruner, range(2))
    pruner.save(tmp_path)
    again.load(tmp_path)
    steps(model, pruner, range(2, 4))
    steps(other, again, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(pruner.scores, again.scores, strict=True))
    assert pruner.finish().layers == again.finish().layers


def test_scores_by_hand_from_given_statistics():
    ffn = FFN(0, "", Small(), PLAIN, "relu")
    method = Smoothed(criterion="wanda", beta=0.5)
    state = method.start(ffn, torch.Generator().manual_seed(0))
    for square, want in ((4.0, [6.0, 2.0]), (16.0, [10.0, 10 / 3])):  # abs(V) * norm, V = (3, -1): 6, then (6 + 24) / 3
        stats = ActivationStats(1, *(torch.zeros(2) for _ in range(2)), torch.full((2,), square))
        method.update(state, Gathered(ffn, 1, statistics=stats), Moment(0, 1.0, 0.0))
        assert state["scores"].tolist() == pytest.approx(want)


def test_moving_average_without_bias_by_hand():
    values = iter([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0]), torch.tensor([0.0, 0.0])])
    average = EMA(lambda: next(values), beta=0.5, debias=True)
    assert average().tolist() == [4.0, 0.0]
    assert average().tolist() == pytest.approx([4 / 3, 16 / 3])  # (0.25 * 4, 0.5 * 8) / 0.75
    again = EMA(lambda: torch.zeros(2), beta=0.5, debias=True)
    again.load_state_dict(average.state_dict())
    assert again().tolist() == average().tolist() == pytest.approx([4 / 7, 16 / 7])
    with pytest.raises(InputError, match="state must hold"):
        EMA(torch.abs).load_state_dict(average.state_dict())
    with pytest.raises(InputError, match="debias must be off with uncertainty_beta"):
        EMA(torch.abs, uncertainty_beta=0.5, debias=True)


def test_a_criterion_is_a_score_to_average():
    ffn = FFN(0, "", Small(), PLAIN, "relu")
    average = EMA(importance.get("magnitude-l1-both"), beta=0.5, debias=True)
    assert average(ffn.weights()).tolist() == [4.0, 3.0]
    with torch.no_grad():
        ffn.holder.up_proj.weight.zero_()
    assert average(ffn.weights()).tolist() == pytest.approx([(4 + 2 * 3) / 3, (3 + 2 * 1) / 3])


def test_refusals(tiny, ids):
    with pytest.raises(InputError, match=r"criterion must be one of .*nearest: wanda"):
        Smoothed("wandas")
    with pytest.raises(InputError, match="criterion is no option of method 'platon'; it has beta"):
        TrainingConfig(method="platon:criterion=wanda", steps=3)
    model = tiny("llama").train()
    pruner = TrainingPruner(model, TrainingConfig(method="smoothed", steps=3))
    pruner.before_step(0)
    with pytest.raises(InputError, match="statistics of layer 0 must follow a pass of the model in training mode"):
        pruner.step()
    model(ids)
    with pytest.raises(InputError, match="weights of layer 0 must have gradients"):
        pruner.step()
    with torch.no_grad():
        find_ffns(model)[1].holder.up_proj.weight[0, 0] = torch.nan
    pruner.remove()
    pruner = TrainingPruner(model, TrainingConfig(method=Smoothed("wanda"), steps=3))
    pruner.before_step(0)
    model(ids)
    with pytest.raises(InputError, match=r"activations of layer 1 must be finite; .*got 1"):
        pruner.step()
    pruner.remove()
