"""Two processes that train and prune one model do what one does with the batches of both."""

import json

import pytest
import rank_cases
import torch
import training_rank_cases as cases
from safetensors.torch import load_file

from pyprune import InputError
from pyprune.training import resume


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which two processes left what became of every case."""
    out = tmp_path_factory.mktemp("training")
    run = rank_cases.launched([cases.__file__, str(out)])
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def found(folder, name):
    """What rank 0 has, and rank 1 too."""
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return first


def same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        if key.startswith("keep"):
            assert torch.equal(got[key], value), key
        else:
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", cases.METHODS)
def test_two_processes_train_as_one(name, done):
    """Masks come from gradients, products and statistics of all batches, whoever saw them."""
    want = cases.trained(cases.METHODS[name])
    assert want["keep.0"].numel() < 96
    same(found(done, name), want)


def test_training_goes_on_from_a_checkpoint(done):
    """To the bit, in each process."""
    whole, resumed = found(done, "movement"), found(done, "resumed")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    with pytest.raises(InputError, match="resume must be of as many processes as go on; this is rank 2"):
        resume.load_random_state(done / "state", 2)


def test_the_trainer_prunes_in_two_processes(done, tmp_path):
    same(found(done, "trainer"), cases.by_trainer(tmp_path, 4))
    assert (done / "trainer" / "checkpoint-4" / "pruning.safetensors").is_file()


def test_weights_cut_over_processes_train_as_whole_ones(done):
    """FSDP2: the same masks and weights, put together on the first process; and on from a checkpoint, to the bit."""
    whole, resumed = (load_file(done / f"fsdp-{name}-0.safetensors") for name in ("whole", "cut"))
    for method in ("movement", "platon", "magnitude"):
        want = cases.trained(method)
        del want["losses"]
        same(whole if method == "movement" else load_file(done / f"fsdp-{method}-0.safetensors"), want)
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_the_trainer_prunes_weights_that_are_cut(done, tmp_path):
    """FSDP2 by accelerate: one mask on all processes, one cut, and on from the Trainer's checkpoint to the bit."""
    whole, resumed = (load_file(done / f"fsdp-trainer-{name}-0.safetensors") for name in ("whole", "cut"))
    same(whole, cases.by_cut_trainer(-1, tmp_path))
    for name in ("whole", "cut"):
        other = load_file(done / f"fsdp-trainer-{name}-1.safetensors")
        assert other and all(torch.equal(whole[key], keep) for key, keep in other.items())
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    assert (done / "fsdp-trainer" / "checkpoint-4" / "pruning.safetensors").is_file()


def test_what_cut_weights_cannot(done):
    first, second = (json.loads((done / f"refused-{rank}.json").read_text()) for rank in (0, 1))
    rule = "InputError: into must be a whole model of the same config where weights are cut (FSDP2); got None"
    assert first[0] == rule and second[0] == rule.replace("into", "rank 0: into", 1)
    assert "checkpoint must be left out where weights are cut over processes (FSDP2)" in first[1]
    assert first[2] == rule and second[2] == rule.replace("into", "rank 0: into", 1)  # before any step
    assert "method must be one without a criterion where weights are cut" in first[3]
    rule = "Trainer must give every process the whole model (DistributedDataParallel), or cut it by FSDP2; got "
    assert first[6] == second[6] and first[6].startswith(
        "InputError: ranks must be given the same; they differ in config ("
    )
    assert f"{rule}'FSDP1'" in first[4] and f"{rule}'weights cut otherwise'" in first[5]
