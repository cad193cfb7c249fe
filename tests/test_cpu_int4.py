"""int4 records in the native CPU kernels, on every instruction set: errors, layouts, special values, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import ffn_cases
import pytest
import torch
from ffn_cases import FLOATS, FORMS, Case, cases, embedded, exact, make
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pyprune.base import int4, reference
from pyprune.ffn import native
from pyprune.ffn.backends import cpu
from pyprune.ffn.quantisation import cast

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load() or "the native library is there")

INT4 = torch.uint8
# Below, at and above a vector of each instruction set (32, 64, 128 weights), and with every last block.
WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256, 352, 576, 896)
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 17, 33, 64, 65, 130)
NEURONS = (1, 2, 3, 4, 5, 7, 31, 33, 65, 131, 257)


def kernel(case: Case) -> Tensor:
    """The rows as they are."""
    return cpu.run(case.x, case.own(), {})


def written(case: Case) -> Tensor:
    """The rows written out, some at a time."""
    return cpu.run(case.x, case.own(), {"written": True})


def check_error(case: Case) -> None:
    for run in (kernel, written):
        out = run(case)
        assert (out.shape, out.dtype) == (case.x.shape, case.x.dtype)
        ffn_cases.check_error(case, run)


@given(case=cases(TOKENS, WIDTHS, NEURONS, [(dtype, INT4) for dtype in FLOATS]))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_error_is_at_most_twice_that_of_torch(isa: str, case: Case) -> None:
    check_error(case)


@pytest.mark.parametrize("dtype", FLOATS)
def test_error_of_every_width_and_many_slabs(isa: str, dtype: torch.dtype) -> None:
    for width, tokens in itertools.product(WIDTHS, (1, 2, 5)):
        check_error(make(tokens, width, 13, (dtype, INT4)))
    for tokens in (1, 9, 70):
        check_error(make(tokens, 576, 1031, (dtype, INT4), form="gather", kept=1000))
    check_error(make(7, 4128, 35, (dtype, INT4)))  # wider than what is written out at once


def test_many_neurons_are_written_out_in_turn(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_WRITTEN_BYTES", 1)  # 64 at a time
    for dtype, form in itertools.product(FLOATS, FORMS):
        ffn_cases.check_error(make(6, 96, 200, (dtype, INT4), form=form, kept=150), written)
    none = make(3, 96, 20, (torch.float32, INT4), form="gather", kept=0)
    assert none.down_bias is not None and torch.equal(written(none), none.down_bias.expand(3, -1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_written_out_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    for width, parts, neurons in ((32, 2, 1), (96, 3, 7), (576, 3, 40), (224, 2, 33)):
        rows, _ = cast(torch.randn(2 * neurons, parts * width), parts, INT4)
        for some in (rows, rows[::2], torch.cat([rows, rows], 1)[:, : rows.shape[1]]):
            out = torch.full((len(some), parts * width), math.nan, dtype=dtype)
            torch.ops.pyprune.cpu_write_out(some, parts, out)
            assert torch.equal(out, int4.unpack(some, parts, dtype))


@pytest.mark.parametrize("tokens", [1, 5, 20, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_around_operands_is_read_and_every_layout_gives_the_same_bits(
    isa: str, dtype: torch.dtype, tokens: int
) -> None:
    for offset, gated, form in ((0, True, "gather"), (1, False, "compact"), (7, True, "compact"), (15, True, "prefix")):
        case = make(tokens, 96, 21, (dtype, INT4), gated, form=form)
        moved: dict[str, Any] = {k: embedded(v, offset) for k, v in case.tensors().items()}
        apart = {"record": embedded(case.record, offset, 5), "x": embedded(case.x, offset, 3)}
        for changed in (case.change(**moved), case.change(**moved | apart)):
            assert torch.equal(kernel(changed), kernel(case))
            # torch's own sums may depend on where x starts.
            torch.testing.assert_close(written(changed), written(case))
        assert torch.equal(kernel(case.change(record=case.record.t().contiguous().t())), kernel(case))


@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_outside_the_index_are_not_read(isa: str, dtype: torch.dtype, tokens: int) -> None:
    case = make(tokens, 96, 50, (dtype, INT4), form="gather", kept=23)
    assert case.index is not None and case.neuron_bias is not None
    want = kernel(case), written(case)
    others = torch.ones(50, dtype=torch.bool)
    others[case.index.long()] = False
    case.record[others] = 255  # scales of NaN
    case.neuron_bias[others] = math.nan
    assert torch.equal(kernel(case), want[0]) and torch.equal(written(case), want[1])
    assert want[0].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gather_prefix_and_pruned_before_equal_copied_rows_in_bits(isa: str, dtype: torch.dtype) -> None:
    for (tokens, width, neurons), gated in itertools.product(
        ((1, 576, 500), (6, 96, 50), (70, 576, 90)), (False, True)
    ):
        whole = make(tokens, width, neurons, (dtype, INT4), gated)
        for kept in (1, neurons // 2 + 1, neurons):
            gather = make(tokens, width, neurons, (dtype, INT4), gated, form="gather", kept=kept)
            assert gather.index is not None
            copied = whole.rows(gather.index.long())
            prefix = make(tokens, width, neurons, (dtype, INT4), gated, form="prefix", kept=kept)
            for run in (kernel, written):
                assert torch.equal(run(gather), run(copied))
                assert torch.equal(run(prefix), run(whole.rows(slice(kept))))
    weights = torch.randn(50, 3 * 96, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(0, 50, 3)
    assert torch.equal(cast(weights, 3, INT4)[0][keep], cast(weights[keep], 3, INT4)[0])


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_go_where_they_do_in_torch(isa: str, dtype: torch.dtype, activation: str) -> None:
    """In x, and in the scale of the first and of the last group of each part."""
    for tokens, gated in itertools.product((1, 6, 20), (False, True)):
        for special in (math.nan, math.inf, -math.inf):
            case = make(tokens, 96, 40, (dtype, INT4), gated, activation)
            case.x[tokens // 2, 95] = special
            ffn_cases.check_special(case, kernel)
        for part, (neuron, group) in itertools.product(range(3 if gated else 2), ((0, 0), (39, 2))):
            case = make(tokens, 96, 40, (dtype, INT4), gated, activation)
            scale = part * 54 + 48 + 2 * group
            case.record[neuron, scale : scale + 2] = 255
            ffn_cases.check_special(case, kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fixed_point_holds_every_mantissa_of_the_largest_token_value(isa: str, dtype: torch.dtype) -> None:
    digits, smallest = (128, 1e-9) if dtype == torch.bfloat16 else (1024, 2.0**-24)
    weights = torch.zeros(1, 64)
    weights[0, [0, 1, 32, 33]] = torch.tensor([-8.0, 7.0, -8.0, 7.0])
    record, _ = cast(weights, 2, INT4)
    for digit in range(0, digits, 1 if dtype == torch.bfloat16 else 7):
        value = 1 + digit / digits
        x = torch.zeros(1, 32, dtype=dtype)
        x[0, :2] = torch.tensor([value, value / 3])
        for signed in (x, -x):
            case = Case(signed, record, gated=False, activation="quick_gelu")
            rtol = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(kernel(case).double(), exact(case), rtol=rtol, atol=smallest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_large_token_value_and_extreme_integers(isa: str, dtype: torch.dtype) -> None:
    case = make(1, 160, 65, (dtype, INT4), activation="relu")
    case.x[0, 77] = 3000
    check_error(case)
    # Every integer -8, every element of x the same: the sums of products are as large as they can be.
    whole = make(1, 896, 5, (dtype, INT4), activation="relu", gated=False)
    whole.record[:, : 896 // 2] = 0x88
    for sign in (1, -1):
        check_error(whole.change(x=torch.full((1, 896), sign * 1.7, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_and_repetition_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for tokens, width, neurons in ((1, 576, 1401), (5, 96, 700), (33, 1056, 45)):
            case = make(tokens, width, neurons, (dtype, INT4))
            torch.set_num_threads(1)
            want = kernel(case)
            for number in (1, 2, 3, 8):
                torch.set_num_threads(number)
                assert torch.equal(kernel(case), want)
    finally:
        torch.set_num_threads(before)


def test_wrong_operands_are_refused_by_name() -> None:
    rows, out = torch.zeros(4, 54, dtype=INT4), torch.zeros(4, 96)
    torch.ops.pyprune.cpu_write_out(rows, 3, out)
    for packed, parts, into, message in (
        (rows.float(), 3, out, "rows must be uint8"),
        (rows[0], 3, out, "rows must be uint8 of two dimensions"),
        (rows.t().contiguous().t(), 3, out, "rows must be uint8 of two dimensions on the CPU, contiguous"),
        (rows, 4, out, "parts must be 2 or 3"),
        (rows, 3, out[:3], "out must have the shape"),
        (rows, 2, out, "out must have the shape"),
        (rows, 3, torch.zeros(4, 192)[:, ::2], "out must be contiguous"),
        (rows, 3, out.to(torch.int8), "out must be floating point"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.pyprune.cpu_write_out(packed, parts, into)
    case = make(2, 64, 5, (torch.float32, INT4))
    for changes, message in (
        ({"record": case.record[:, :-1]}, "record must have two dimensions"),
        ({"x": torch.zeros(2, 40)}, "x must have a multiple of 32 columns beside an int4 record"),
        ({"scales": torch.ones(5, 3)}, "scales must be given for int8 records only"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(case.change(**changes))
