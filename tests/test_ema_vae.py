"""The example of a text VAE with a pruned encoder: the ELBO by hand, the cut, and a whole run of tiny models."""

from __future__ import annotations

import copy
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

from pyprune import InputError
from pyprune.model.families import find_ffns
from pyprune.training import TrainingPruner, train
from pyprune.training.methods import Smoothed

EXAMPLES = Path(__file__).parent.parent / "examples"
LENGTH, LATENT, WIDTH = 8, 4, 24


class Example:
    """The example's modules."""

    def __init__(self) -> None:
        names = ("data", "experiment", "measure", "model", "pruning", "report", "speed")
        for name in names:
            setattr(self, name, importlib.import_module(f"vae.{name}"))

    data: ModuleType
    experiment: ModuleType
    measure: ModuleType
    model: ModuleType
    pruning: ModuleType
    report: ModuleType
    speed: ModuleType

    def sizes(self):
        return self.model.Sizes(length=LENGTH, hidden=8, width=WIDTH, layers=2, heads=2, latent=LATENT, decoder=8)

    def vae(self, **loss):
        torch.manual_seed(0)
        return self.model.TextVAE(self.sizes(), self.model.Loss(**loss))

    def plan(self, **values):
        small = {"steps": 4, "prune_steps": 3, "recover_steps": 2, "batch": 4, "seeds": 1, "samples": 1, "keep": 0.5}
        return self.experiment.Plan(**{**small, "sizes": self.sizes(), **values})


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Example:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return Example()


@pytest.fixture
def strings() -> torch.Tensor:
    return torch.randint(256, (6, LENGTH), generator=torch.Generator().manual_seed(3))


def test_kl_by_hand(example):
    kl = example.model.gaussian_kl
    assert kl(torch.tensor(0.0), torch.tensor(0.0)) == 0
    assert float(kl(torch.tensor(3.0), torch.tensor(0.0))) == 4.5
    assert float(kl(torch.tensor(0.0), torch.tensor(1.0))) == pytest.approx((math.e - 2) / 2)
    mean, log_variance = torch.randn(2, 50, dtype=torch.float64)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl(mean, log_variance), want)
    # var - 1 - log var = l^2 / 2 + l^3 / 6 + ... would be rounding alone if exp and 1 were subtracted in float32
    assert float(kl(torch.tensor(0.0), torch.tensor(1e-3))) == pytest.approx(1e-6 / 4, rel=1e-2)


def fixed(model, mean: float):
    """The model with a decoder that gives every byte the same chance, and q(z | x) = N(mean, 1) for every x."""
    with torch.no_grad():
        for parameter in (model.decoder.out.weight, model.decoder.out.bias, model.encoder.head.weight):
            parameter.zero_()
        model.encoder.head.bias.copy_(torch.tensor([mean] * LATENT + [0.0] * LATENT))
    return model


def test_elbo_of_a_known_gaussian(example, strings):
    found = example.measure.measure(fixed(example.vae(), 1.0), strings, samples=3)
    reconstruction, kl = LENGTH * math.log(256), LATENT / 2
    assert found.reconstruction.tolist() == pytest.approx([reconstruction] * 6)
    assert found.kl.tolist() == pytest.approx([kl] * 6)
    assert found.elbo.tolist() == pytest.approx([-reconstruction - kl] * 6)
    assert found.shuffled == pytest.approx(reconstruction)
    assert found.active == 0


def test_training_loss_of_a_known_gaussian(example, strings):
    """Free bits: a dimension costs what it takes, 0.5 nats here, or the free bits where those are more."""
    for free, cost in ((0.1, 0.5), (0.75, 0.75)):
        loss = fixed(example.vae(free_bits=free, word_dropout=0.5), 1.0).training_loss(strings, 0.25)
        assert loss.item() == pytest.approx(math.log(256) + 0.25 * LATENT * cost / LENGTH)


def test_reconstruction_reads_only_what_came_before(example, strings):
    model, z = example.vae(), torch.zeros(6, LATENT)
    before = torch.cat([torch.full((6, 1), example.model.START), strings[:, :-1]], 1)
    want = -model.decoder(before, z).log_softmax(-1).gather(-1, strings[..., None]).sum((1, 2))
    torch.testing.assert_close(model.reconstruction(strings, z), want)
    blind = model.decoder(torch.full_like(strings, example.model.DROPPED), z)
    want = -blind.log_softmax(-1).gather(-1, strings[..., None]).sum((1, 2))
    torch.testing.assert_close(model.reconstruction(strings, z, dropout=1.0), want)


def test_the_encoder_sees_both_ways_and_its_ffns_are_found(example, strings):
    model = example.vae()
    ffns = find_ffns(model.encoder)
    assert [(f.intermediate_size, f.hidden_size, f.activation) for f in ffns] == [(WIDTH, 8, "gelu_tanh")] * 2
    other = strings.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    states = [model.encoder(input_ids=ids).last_hidden_state[:, 0] for ids in (strings, other)]
    assert not torch.allclose(*states)
    mean, log_variance = model.encode(strings)
    assert mean.shape == log_variance.shape == (6, LATENT)


def test_active_dimensions_and_the_z_of_others_by_hand(example, strings, monkeypatch):
    """Two of four means vary; a decoder that is told its string by z loses nothing but with the z of another."""
    model = example.vae()
    means = torch.zeros(6, LATENT)
    means[:, 0], means[:, 2] = torch.arange(6.0), torch.arange(6.0) * 0.1
    monkeypatch.setattr(model, "encode", lambda ids: (means, torch.full_like(means, -40.0)))
    monkeypatch.setattr(model, "reconstruction", lambda ids, z: (z[:, 0].round() - torch.arange(6.0)).abs())
    found = example.measure.measure(model, strings)
    assert found.active == 2  # variances 3.5, 0, 0.035, 0
    assert found.reconstruction.tolist() == [0.0] * 6
    assert found.shuffled == pytest.approx(10 / 6)  # 5 for the first, 1 for the others


def test_intervals_by_hand(example):
    interval = example.measure.interval
    assert interval(torch.full((2, 5), 3.0)) == pytest.approx({"value": 3.0, "low": 3.0, "high": 3.0})
    # one value of two: means of two draws are 0, 1 or 2 with 1/4, 1/2, 1/4
    assert interval(torch.tensor([[0.0, 2.0]])) == {"value": 1.0, "low": 0.0, "high": 2.0}
    seeds = interval(torch.tensor([[0.0] * 4, [2.0] * 4]))
    assert seeds == {"value": 1.0, "low": 0.0, "high": 2.0}
    values = torch.randn(1, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, error = interval(values), 1.96 * float(values.std()) / 20
    assert found["high"] - found["low"] == pytest.approx(2 * error, rel=0.1)
    with pytest.raises(InputError, match=r"values must be \[seeds, strings\]"):
        interval(torch.zeros(0, 4))


def test_batches_come_again_and_the_kl_is_annealed(example):
    ids = torch.arange(40)
    batches = example.data.Batches(ids, LENGTH, 3, steps=5, seed=1, first=2, annealing=4)
    first, again = list(batches), list(batches)
    assert [weight for _, weight in first] == [0.5, 0.75, 1.0, 1.0, 1.0]
    for (a, _), (b, _) in zip(first, again, strict=True):
        assert torch.equal(a, b) and a.shape == (3, LENGTH)
        assert torch.equal(a - a[:, :1], torch.arange(LENGTH).expand(3, -1))
    assert [weight for _, weight in example.data.Batches(ids, LENGTH, 3, steps=2, seed=1)] == [1.0, 1.0]


def test_text_is_cut_into_halves(example, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 30 + "\n\n" + "bé" * 12, encoding="utf-8")
    found = example.data.load(path, LENGTH, 100)
    assert bytes(found.train.tolist()) == b"a" * 30
    # the break and 36 bytes: "é" takes two
    assert found.held_out.shape == (4, LENGTH) and bytes(found.held_out[0].tolist()) == "\n\nbébé".encode()
    assert found.name == "text.txt"
    assert len(example.data.load(None, LENGTH, 50).held_out) == 50
    path.write_text("too short")
    with pytest.raises(InputError, match="text must have more than 8 bytes in its first half; got 4"):
        example.data.load(path, LENGTH, 100)
    with pytest.raises(InputError, match="text must be an existing file"):
        example.data.load(tmp_path / "none.txt", LENGTH, 100)


def pruned(example, way, steps=3):
    """A model trained for some steps with a pruner, and the pruner and the optimizer."""
    model = example.vae()
    optimizer = example.pruning.adam(model, 1e-3)
    pruner = TrainingPruner(model.encoder, way.config(0.5, steps, 0.9, 4, 0))
    batches = example.data.Batches(torch.arange(200) % 256, LENGTH, 4, steps, 0)
    train(model, batches, optimizer, pruner, steps=steps, loss_fn=lambda m, batch: m.training_loss(*batch))
    return model, pruner, optimizer


@pytest.mark.parametrize("place", range(7))
def test_the_cut_is_the_mask_and_the_decoder_stays(example, place, strings, masked):
    way = example.pruning.WAYS[place]
    model, pruner, optimizer = pruned(example, way)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense = example.vae()
    dense.load_state_dict(weights)
    mask, _ = example.pruning.cut(model, pruner, optimizer)
    assert mask.widths == (12, 12)
    assert [f.intermediate_size for f in find_ffns(model.encoder)] == [12, 12]
    for name, parameter in model.named_parameters():
        if ".mlp." not in name or name.endswith("fc2.bias"):
            assert torch.equal(parameter, weights[name]), name
    dense.encoder = masked(dense.encoder, mask)
    for a, b in zip(model.encode(strings), dense.encode(strings), strict=True):
        torch.testing.assert_close(a, b)
    # In float64 throughout. A string's ELBO is a sum of LENGTH cross entropies of about log 256 = 5.5, so near 44; each
    # is the log of a sum of 256 terms. Of float32 terms it is worth (256 + LENGTH) * 2**-24 = 1.6e-5 at worst, and one
    # unit in the last place is 8e-8 of it: below that, which models agree depends on the order in which a CPU adds up.
    # In float64 the same count gives 3e-14; a neuron too many or too few changes it by 1e-2.
    found = [example.measure.measure(m.double(), strings).elbo for m in (model, dense)]
    torch.testing.assert_close(*found, rtol=(256 + LENGTH) * torch.finfo(torch.float64).eps / 2, atol=0.0)


def test_ways_differ_in_one_thing_from_the_average(example):
    configs = {way.name: way.config(0.25, 100, 0.9, 8, 0) for way in example.pruning.WAYS}
    for score, criterion in example.pruning.SCORES.items():
        average, last, once = (
            configs[f"{score}: {kind}"] for kind in ("EMA, gradual", "last batch, gradual", "EMA, one shot")
        )
        assert (average.method, average.warmup) == (Smoothed(criterion, beta=0.9), 10)
        assert replace(average, method=Smoothed(criterion, beta=0.0)) == last
        assert {**average.to_json(), "warmup": 99} == once.to_json()
        assert [once.schedule(t) for t in (0, 99, 100)] == [1.0, 1.0, 0.25]
    assert configs["random"].method.criterion == "random"


def test_the_optimizer_goes_on_with_what_is_left(example, strings):
    model, pruner, old = pruned(example, example.pruning.WAYS[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: copy.deepcopy(old.state[p]) for name, p in model.named_parameters() if p in old.state}
    mask, new = example.pruning.cut(model, pruner, old)
    kept = {i: keep.neurons.long() for i, keep in enumerate(mask.layers)}
    after = dict(model.named_parameters())
    for key in ("exp_avg", "exp_avg_sq"):
        for i, neurons in kept.items():
            name = f"encoder.encoder.layers.{i}.mlp."
            for part, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
                want = moments[name + part][key].index_select(dim, neurons)
                assert torch.equal(new.state[after[name + part]][key], want)
                assert after[name + part].shape == want.shape
        assert torch.equal(new.state[after["decoder.gru.weight_hh_l0"]][key], moments["decoder.gru.weight_hh_l0"][key])
    assert {float(state["step"]) for state in new.state.values()} == {3.0}
    model.training_loss(strings, 1.0).backward()
    new.step()
    assert {float(state["step"]) for state in new.state.values()} == {4.0}
    assert float(moments["decoder.out.bias"]["step"]) == 3.0
    assert not torch.equal(
        after["encoder.encoder.layers.0.mlp.fc1.weight"], before["encoder.encoder.layers.0.mlp.fc1.weight"][kept[0]]
    )


def test_a_run_is_its_seed(example):
    data, plan = example.data.load(None, LENGTH, 20), example.plan()
    one, same, other = (example.experiment.run(data, plan, seed) for seed in (1, 1, 2))
    name = example.pruning.WAYS[0].name
    for pick in (lambda r: r.before, lambda r: r.dense.recovered, lambda r: r.rows[name].recovered):
        assert torch.equal(pick(one).elbo, pick(same).elbo)
        assert not torch.equal(pick(one).elbo, pick(other).elbo)
    assert one.rows[name].widths == (16, 16) or one.rows[name].widths == (8, 8)  # half of 24 in multiples of 8
    assert [f.intermediate_size for f in find_ffns(one.compact.encoder)] == list(one.rows[name].widths)
    assert [f.intermediate_size for f in find_ffns(one.model.encoder)] == [WIDTH] * 2


def test_the_whole_example(example, tmp_path, capsys):
    module = importlib.import_module("ema_pruned_vae")
    out = tmp_path / "vae.json"
    options = {"steps": 4, "prune_steps": 3, "recover_steps": 2, "batch": 4, "seeds": 2, "keep": 0.5, "rounds": 1}
    sizes = {"length": LENGTH, "hidden": 8, "width": 32, "layers": 2, "latent": LATENT, "held_out": 20}
    module.main(**options, **sizes, out=out)
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["text"] == "pydoc_data.topics" and found["held_out"] == {"strings": 20, "length": LENGTH}
    assert found["plan"]["sizes"]["width"] == 32 and found["machine"]["versions"]["torch"]
    names = [way.name for way in example.pruning.WAYS]
    assert list(found["rows"]) == names and len(names) == 7
    stages = [found["before"], *found["dense"].values()]
    for row in found["rows"].values():
        assert row["widths"] == [[16, 16]] * 2
        stages += [row["after pruning"], row["recovered"]]
        for moment in ("after pruning", "recovered"):
            lost = found["dense"][moment]["elbo"]["value"] - row[moment]["elbo"]["value"]
            assert row[moment]["lost"]["value"] == pytest.approx(lost)
    for stage in stages:
        assert stage["elbo"]["value"] == pytest.approx(-stage["reconstruction"]["value"] - stage["kl"]["value"])
        assert stage["elbo"]["low"] <= stage["elbo"]["value"] <= stage["elbo"]["high"]
        assert len(stage["elbo_of_seeds"]) == 2
    assert len(found["comparisons"]) == 2 * 3 * 2
    first = found["comparisons"][0]
    want = [found["rows"][n]["after pruning"]["elbo"]["value"] for n in (names[0], first["against"])]
    assert first["value"] == pytest.approx(want[0] - want[1])
    assert found["speed"]["ffn_ceiling"] == 2.0 and set(found["speed"]["batches"]) == {"1", "32"}
    for batch in found["speed"]["batches"].values():
        assert 1 <= batch["ceiling"] < 2 and 0 <= batch["share"] < 1 and batch["encoders"]["dense"]["ratio"] == 1
        assert len(batch["encoders"]) == 4 and all(e["seconds"] > 0 for e in batch["encoders"].values())
    words = " ".join("".join(c if c.isalnum() else " " for c in printed).split())
    assert "random" in words and "seeds" in words and "json" in words
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 1.0}, r"keep must lie in \(0, 1\); got 1.0"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        ({"prune_steps": 1}, "prune_steps must be at least 2"),
        ({"seeds": 0}, "seeds must be an integer of at least 1"),
        ({"rate": 0.0}, "rate must be positive"),
    ],
)
def test_plan_refuses(example, values, message):
    with pytest.raises(InputError, match=message):
        example.plan(**values)


def test_other_refusals(example, tmp_path, capsys):
    with pytest.raises(InputError, match="hidden must be a multiple of the 4 heads; got 6"):
        example.model.Sizes(hidden=6)
    with pytest.raises(InputError, match=r"word_dropout must lie in \[0, 1\)"):
        example.model.Loss(word_dropout=1.0)
    with pytest.raises(InputError, match="samples must be at least 1"):
        example.measure.measure(example.vae(), torch.zeros(2, LENGTH).long(), samples=0)
    with pytest.raises(typer.Exit) as caught:
        importlib.import_module("ema_pruned_vae").main(keep=2.0, out=tmp_path / "x.json")
    assert caught.value.exit_code == 2 and not (tmp_path / "x.json").exists()
    assert "keep must lie in (0, 1); got 2.0" in capsys.readouterr().err
    for values, message in (({"out": tmp_path}, "out must be a file"), ({"rounds": -1}, "rounds must be at least 0")):
        with pytest.raises(typer.Exit):
            importlib.import_module("ema_pruned_vae").main(**values)
        assert message in capsys.readouterr().err
