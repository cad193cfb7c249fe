"""Two processes recover a pruned model as one does with their batches together, and fail together."""

import json

import pytest
import rank_cases
import recovery_rank_cases as cases
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pyprune.base.text import default_text
from pyprune.cli.commands import app
from pyprune.model import checkpoint
from pyprune.training.recovery import STATE, recover


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder in which two processes left what became of every case."""
    out = tmp_path_factory.mktemp("recovery")
    run = rank_cases.launched([cases.__file__, str(out)])
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def found(folder, name):
    """What rank 0 has, and rank 1 too: weights to the bit, and what was decided by them."""
    (first, facts), (second, other) = (
        (load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text()))
        for rank in (0, 1)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for key in ("train", "held_out", "teacher_ce", "best", "stopped", "tokens", "passed_over"):
        assert facts[key] == other[key], key
    return first, facts


def close(got, want):
    """Sums differ in their order: losses by 1e-5 of them; AdamW divides a gradient by its size, so of a step of 1e-2
    a weight may differ by more, as its gradient is near 0.
    """
    (weights, facts), (own, report) = got, want
    assert [m["step"] for m in facts["held_out"]] == [m["step"] for m in report["held_out"]]
    rows = ([*made["train"], *made["held_out"]] for made in (facts, report))
    for mine, theirs in zip(*rows, strict=True):
        for key in theirs.keys() - {"sources", "rate"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), key
    assert facts["best"] == report["best"] and facts["tokens"] == report["tokens"]
    for name, tensor in own.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", cases.CASES)
def test_two_processes_recover_as_one(name, done):
    """Batches that two share evenly and not, adapters that begin at random, and a clock that is the first one's."""
    weights, report = cases.recovered(cases.config(**cases.CASES[name]))
    close(found(done, name), (weights, report))
    assert (report["best"] > 0) == (name != "odd")  # in which one source gets better at the cost of the other


def test_recovery_goes_on_from_the_first_ones_state(done):
    """To the bit; as many or fewer processes may go on."""
    whole, resumed = found(done, "even"), found(done, "resumed")
    assert all(torch.equal(resumed[0][key], value) for key, value in whole[0].items())
    assert resumed[1]["train"] == whole[1]["train"] and resumed[1]["held_out"] == whole[1]["held_out"]
    assert (done / "state-0" / STATE).is_file() and not (done / "state-1").exists()
    student, teacher = cases.pair()
    report = recover(student, teacher, cases.text(), cases.config(batch=4, save_every=5), folder=done / "state-0")
    assert report.train == whole[1]["train"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batch", "InputError: batch must hold a window for each of 2 processes; got 1"),
        ("config", "they differ in learning_rate (0.001 on rank 0, 0.002 on rank 1)"),
        ("teacher", "they differ in teacher ("),
        ("text", "InputError: ranks must be given the same; they differ in text ("),
        ("folder", "folder must be one for the state that can be made and written; got "),
        ("full", "no space left"),
        ("damaged", "recovery.safetensors is damaged"),
        ("loss", "loss must be finite at step 0; lower the learning_rate; got nan"),
    ],
)
def test_an_error_of_one_is_an_error_of_both(name, message, done):
    first, second = ((done / f"{name}-{rank}.txt").read_text() for rank in (0, 1))
    assert message in first and message in second, (first, second)
    kinds = [said.split(":")[0] for said in (first, second)]
    assert kinds == ["OSError", "PypruneError"] if name == "full" else kinds[0] == kinds[1] != "RuntimeError"


def test_the_command_line_recovers_together(tiny_checkpoint, tmp_path):
    """Both verbs: only the first process writes and prints; weights are those that one process writes."""
    text = tmp_path / "text.txt"
    text.write_text(default_text()[:30_000])
    common = ["--text", str(text), "--device", "cpu", "--json", "--window", "32", "--tokens", "640"]
    pruned = tmp_path / "pruned"
    cut = ["--out", str(pruned), "--keep", "0.5", "--multiple", "8", "--recover", "0.1"]
    run = rank_cases.launched(["-m", "pyprune", "prune", str(tiny_checkpoint), *cut, *common])
    assert run.returncode == 0, run.stderr[-4000:]
    taught = json.loads(run.stdout)["recovery"]
    assert 1 <= taught["steps"] <= 3 and taught["stopped"] in ("steps", "minutes")
    assert checkpoint.verify(pruned)["widths"] == [48] * 3
    common = [str(pruned), "--teacher", str(tiny_checkpoint), *common, "--steps", "4", "--batch", "4"]
    common += ["--also-tokens", "64", "--held-out", "0", "--precision", "float32"]
    one = CliRunner().invoke(app, ["recover", *common, "--out", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    two = rank_cases.launched(["-m", "pyprune", "recover", *common, "--out", str(tmp_path / "two")])
    assert two.returncode == 0, two.stderr[-4000:]
    made = [(load_file(tmp_path / name / "model.safetensors"), json.loads(run.stdout))  # one object, of one process
            for name, run in (("one", one), ("two", two))]  # fmt: skip
    close(made[1], made[0])
    assert checkpoint.verify(tmp_path / "two")
