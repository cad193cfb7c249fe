"""The cuBLAS backend, run on CPU tensors: its algebra, its scratch record, and what it refuses."""

import dataclasses
import gc
import itertools

import pytest
import torch

from pyprune import BackendError
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn import backends, dispatch, scratch
from pyprune.ffn.backends import Problem, cublas
from pyprune.ffn.quantisation import widened

PROBLEM = Problem("cuda", torch.float32, 512, 8, 12, 12, True, False, "silu")


@pytest.fixture(autouse=True)
def no_leftovers():
    before = dict(scratch._KEPT)
    yield
    if before != scratch._KEPT:
        gc.collect()
    assert before == scratch._KEPT, "rows are kept whose record is gone"


def operands(gated, gather, activation, biases, dtype=torch.float64, m=5, d=8, f=12):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    parts = 3 if gated else 2
    index = torch.randperm(f, generator=generator)[: f // 2].sort().values.int() if gather else None
    bias, down_bias = (randn(f, parts - 1), randn(d)) if biases else (None, None)
    return randn(m, d), Record(randn(f, parts * d), gated, activation, None, bias, down_bias, index)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize(("gated", "gather"), list(itertools.product((False, True), (False, True))))
@pytest.mark.parametrize("biases", [False, True])
def test_equals_the_reference_in_every_configuration(activation, gated, gather, biases):
    x, record = operands(gated, gather, activation, biases)
    want = reference.ffn(x, record)
    problem = dataclasses.replace(PROBLEM, gated=gated, gather=gather, activation=activation)
    configs = cublas.candidate_configs(problem)
    assert configs[0] == cublas.default_config(problem)
    for config in (None, *configs):
        torch.testing.assert_close(cublas.run(x, record, config), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("m", "d", "f"), [(0, 8, 12), (1, 1, 1), (3, 7, 2), (129, 31, 65)])
@pytest.mark.parametrize("gated", [False, True])
def test_odd_sizes(m, d, f, gated):
    x, record = operands(gated, True, "relu", True, m=m, d=d, f=f)
    for config in cublas.candidate_configs(dataclasses.replace(PROBLEM, gated=gated, activation="relu")):
        torch.testing.assert_close(cublas.run(x, record, config), reference.ffn(x, record))


@pytest.mark.parametrize("gated", [False, True])
def test_no_operand_is_written(gated):
    x, record = operands(gated, True, "silu", True)
    given = {"x": x} | {name: t for name, t in vars(record).items() if isinstance(t, torch.Tensor)}
    before = {name: t.clone() for name, t in given.items()}
    cublas.run(x, record)
    assert len(given) == 5 and all(torch.equal(given[name], t) for name, t in before.items())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_torch(gated, dtype):
    x, record = operands(gated, False, "silu", True, m=64, d=64, f=256)
    exact = reference.ffn(x, record)
    half = x.to(dtype), widened(record, dtype)
    allowed = (reference.ffn(*half).double() - exact).norm()
    for config in cublas.candidate_configs(dataclasses.replace(PROBLEM, gated=gated)):
        assert (cublas.run(*half, config).double() - exact).norm() <= 2 * allowed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "needs tensors on a CUDA device, not on cpu"),
        ({"dtype": torch.float64}, r"no products for torch\.float64"),
        ({"weights": torch.int8}, r"no products of torch\.int8 weights with x of torch\.float32"),
        ({"batch_invariant": True}, "cuBLAS chooses its order of sums by the number of tokens"),
    ],
)
def test_refusals(changes, reason):
    with pytest.raises(BackendError, match=f"cublas: {reason}$"):
        dispatch.choose(dataclasses.replace(PROBLEM, **changes), "cublas")
    assert dispatch.choose(PROBLEM, "cublas").backend is backends.load_all()["cublas"]


def record_and_index():
    return torch.randn(12, 24), torch.tensor([1, 3, 8], dtype=torch.int32)


def test_scratch_is_kept_once_for_each_mask():
    record, index = record_and_index()
    rows = scratch.compacted(record, index)
    assert torch.equal(rows, record[index.long()]) and rows.is_contiguous()
    assert scratch.compacted(record, index) is rows
    other = torch.tensor([0, 3, 8], dtype=torch.int32)
    assert torch.equal(scratch.compacted(record, other), record[other.long()])
    assert scratch.kept_bytes(record.device) == 2 * rows.nbytes
    del other
    assert scratch.kept_bytes(record.device) == rows.nbytes
    del record
    assert scratch.kept_bytes(index.device) == 0


@pytest.mark.parametrize("which", [0, 1])
def test_scratch_follows_a_write_in_the_same_memory(which):
    tensors = record_and_index()
    rows = scratch.compacted(*tensors)
    tensors[which][0] = 2
    again = scratch.compacted(*tensors)
    assert again is rows
    assert torch.equal(rows, tensors[0][tensors[1].long()])


def test_scratch_of_a_parameter_that_wants_gradients():
    record, index = torch.nn.Parameter(torch.randn(12, 24)), torch.tensor([1, 3], dtype=torch.int32)
    assert not scratch.compacted(record, index).requires_grad
    with torch.no_grad():
        record += 1
    assert torch.equal(scratch.compacted(record, index), record[index.long()])


def test_scratch_first_taken_in_inference_mode_follows_a_write_outside_it():
    record, index = record_and_index()
    with torch.inference_mode():
        rows = scratch.compacted(record, index)
    record += 1
    assert scratch.compacted(record, index) is rows
    assert torch.equal(rows, record[index.long()])


def test_scratch_follows_a_parameter_into_other_memory():
    """By `module.to`, and by `data` that goes back and forth between two places; nothing of the past is kept."""
    record, index = torch.nn.Parameter(torch.randn(12, 24)), torch.tensor([1, 3, 8], dtype=torch.int32)
    module = torch.nn.Module()
    module.rows = record
    scratch.compacted(record, index)
    module.bfloat16().float()
    assert torch.equal(scratch.compacted(record, index), record[index.long()])
    places = torch.randn(12, 24), torch.randn(12, 24)
    for turn in range(6):
        places[turn % 2].mul_(2)
        record.data = places[turn % 2]
        assert torch.equal(scratch.compacted(record, index), record[index.long()])
    assert len(scratch._KEPT) == len(scratch._ENDS) == 1
    for _ in range(5):
        scratch.compacted(record, index.clone())
    assert len(scratch._KEPT) == len(scratch._ENDS) == 1


def test_scratch_of_new_indices_leaves_nothing_on_the_record(monkeypatch):
    made = []
    real = scratch.weakref.finalize
    monkeypatch.setattr(scratch.weakref, "finalize", lambda *given: made.append(real(*given)) or made[-1])
    record, _ = record_and_index()
    for start in range(4):
        scratch.compacted(record, torch.tensor([start, 9], dtype=torch.int32))
    assert len(made) == 8 and not any(one.alive for one in made)


def test_scratch_is_bounded(monkeypatch):
    record, index = record_and_index()
    monkeypatch.setattr(scratch, "_CPU_BYTES", 3 * 24 * 4)
    rows = scratch.compacted(record, index)
    other = torch.tensor([0], dtype=torch.int32)
    assert torch.equal(scratch.compacted(record, other), record[:1])
    assert scratch.kept_bytes(record.device) == rows.nbytes
    assert scratch.compacted(record, index) is rows


def test_inference_tensors_are_copied_at_every_call():
    with torch.inference_mode():
        record, index = record_and_index()
        scratch.compacted(record, index)
        record[1] = 7
        assert torch.equal(scratch.compacted(record, index), record[index.long()])
    assert scratch.kept_bytes(record.device) == 0


def test_a_capture_keeps_nothing_new(monkeypatch):
    record, index = record_and_index()
    monkeypatch.setattr(scratch, "_capturing", lambda device: True)
    with pytest.warns(UserWarning, match=r"call pyprune\.ffn\.warming\.warmup before the capture"):
        scratch.compacted(record, index)
    assert scratch.kept_bytes(record.device) == 0
    monkeypatch.undo()
    rows = scratch.compacted(record, index)
    monkeypatch.setattr(scratch, "_capturing", lambda device: True)
    assert scratch.compacted(record, index) is rows
    record[1] = 5  # the graph takes the rows anew at each replay, and an eager call does not rely on its having done so
    scratch.compacted(record, index)
    monkeypatch.undo()
    rows.zero_()
    assert torch.equal(scratch.compacted(record, index), record[index.long()])
