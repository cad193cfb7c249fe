"""Two tensor-parallel processes with their FFNs in records, against one process."""

import json

import pytest
import rank_cases
import tensor_parallel_cases
import torch
from safetensors.torch import load_file

import pyprune
from pyprune.model import loading

WIDTHS = (77, 61, 48)  # of which two do not divide


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a pruned model, a mask of it, and what two processes made of them."""
    from conftest import make_model

    from pyprune.model import families

    out = tmp_path_factory.mktemp("parallel")
    model = make_model("llama", intermediate_size=96)
    generator = torch.Generator().manual_seed(0)

    def mask(sizes, widths):
        keeps = [
            torch.randperm(size, generator=generator)[:width].sort().values
            for size, width in zip(sizes, widths, strict=True)
        ]
        ffns = families.find_ffns(model)
        made = [pyprune.KeepIndex(keep, size) for keep, size in zip(keeps, sizes, strict=True)]
        return pyprune.Mask(tuple(made), families.fingerprint(model, ffns))

    pyprune.prune(model, repair=None, mask=mask([96] * 3, WIDTHS))
    pyprune.save(model, out / "model")
    mask(WIDTHS, (40, 33, 20)).save(out / "mask.safetensors")
    pyprune.save(make_model("llama", intermediate_size=1), out / "narrow")
    script = tensor_parallel_cases.__file__
    run = rank_cases.launched([script, *(str(out / name) for name in ("model", "mask.safetensors", "."))])
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def test_every_rank_holds_its_rows(done):
    facts = [json.loads((done / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert [f["rows"] for f in facts] == [[39, 31, 24], [38, 30, 24]]
    kept = torch.tensor([f["index"] for f in facts])
    assert kept.sum(0).tolist() == [40, 33, 20] and kept.unique().numel() > 1  # cut where the neurons are, not evenly


def test_two_processes_compute_what_one_does(done, same_logits):
    """With all neurons, with those of a mask, and in int8, which is rounded by neuron."""
    found = [load_file(done / f"logits-{rank}.safetensors") for rank in (0, 1)]
    for name, values in found[0].items():
        assert torch.equal(values, found[1][name]), name
    ids = rank_cases.text()[:, :12]
    mask = pyprune.Mask.load(done / "mask.safetensors")

    def one(**options):
        model = pyprune.accelerate(loading.load_model(str(done / "model"), "auto", "cpu"), **options)
        return model, model(ids).logits.detach()

    model, want = one()
    same_logits(found[0]["sharded"], want)
    same_logits(found[0]["compact"], want)
    same_logits(found[0]["one"], want[:1])
    same_logits(found[0]["gather"], one(mode="gather", mask=mask)[1])
    same_logits(found[0]["quantised"], one(weights="int8")[1])
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().sum().backward()
    torch.testing.assert_close(found[0]["gradient"], x.grad, rtol=1e-4, atol=1e-4 * float(x.grad.abs().max()))


def test_a_sharded_model_saves_what_was_loaded(done):
    saved, dense = (load_file(done / folder / "model.safetensors") for folder in ("saved", "model"))
    assert saved.keys() == dense.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in dense.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compact mask", "InputError: mode must be gather with a mask on a tensor-parallel model"),
        ("lopsided mask", "InputError: mask must keep a neuron of each of 2 ranks in layer 0; got [8, 0]"),
        (
            "save",
            "InputError: model must have whole weights; where they are cut over processes, each calls model.save_",
        ),
        ("twice", "UnsupportedModelError: model.layers.0 is accelerated already"),
        ("narrow", "model.layers.0.mlp must have a neuron for each of 2 ranks; got 1"),
        ("prune", "DTensor: load the model with plain tensors, whole in one process"),
    ],
)
def test_what_a_sharded_model_cannot(name, message, done):
    for rank in (0, 1):
        assert message in json.loads((done / f"facts-{rank}.json").read_text())[name]
