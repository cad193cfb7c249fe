"""The native CPU kernels' numbers, on every instruction set of the machine: errors, layouts, special values, edges."""

from __future__ import annotations

import dataclasses
import itertools
import math

import ffn_cases
import pytest
import torch
from ffn_cases import FLOATS, FORMS, TYPES, Case, cases, embedded, exact, make
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pyprune.base import reference
from pyprune.ffn import native
from pyprune.ffn.quantisation import quantise

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load() or "the native library is there")

# Below, at and above what kernels take at once: 1, 4 tokens, 8 and 16 (tiles), 64 (one pass).
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130)
WIDTHS = (1, 2, 3, 5, 7, 13, 15, 17, 31, 33, 47, 63, 65, 97, 127, 129, 131, 257, 509, 515, 576, 768, 896)
NEURONS = (1, 2, 3, 4, 5, 7, 13, 31, 32, 33, 37, 63, 65, 67, 97, 131, 257, 389)


def kernel(case: Case) -> Tensor:
    """The case by the native kernel."""
    operands = [getattr(case, f.name) for f in dataclasses.fields(case)]
    out: Tensor = torch.ops.pyprune.ffn.default(*operands, "cpu", 0, False)
    assert (out.shape, out.dtype, out.is_contiguous()) == (case.x.shape, case.x.dtype, True)
    return out


def check_error(case: Case) -> None:
    ffn_cases.check_error(case, kernel)


def check_special(case: Case) -> None:
    ffn_cases.check_special(case, kernel)


@given(case=cases(TOKENS, WIDTHS, NEURONS, TYPES))
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_error_is_at_most_twice_that_of_torch(isa: str, case: Case) -> None:
    check_error(case)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_error_of_all_dtypes_and_forms(isa: str, gated: bool, types: tuple[torch.dtype, torch.dtype]) -> None:
    for tokens, form in itertools.product((1, 6, 19), FORMS):
        check_error(make(tokens, 67, 37, types, gated, "gelu", form=form))


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_error_of_many_slabs(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for tokens in (1, 9, 70):
        check_error(make(tokens, 576, 1031, types, form="gather", kept=1000))


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_error_of_rows_wider_than_are_written_out_at_once(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for tokens in (2, 7):
        check_error(make(tokens, 4131, 35, types, form="gather", kept=33))


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_at_every_size(isa: str, activation: str, dtype: torch.dtype) -> None:
    """One neuron with weights of one, so that every output is the activation of one input, from -1e4 to 1e4."""
    sizes = torch.cat([torch.logspace(-6, 4, 350), torch.linspace(0, 15, 162)])
    x = torch.cat([sizes, -sizes, torch.zeros(1)])[:, None].to(dtype)
    case = Case(x, torch.ones(1, 2), gated=False, activation=activation)
    got, want = kernel(case), exact(case)
    if dtype == torch.float16:
        want = want.to(dtype).double()  # with what exceeds it
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite])
    # Relative, also of tails far below one, where a rounded exponent of up to 16 counts; absolute below 1e-7.
    relative = (got.double() - want).abs()[finite] / (want.abs()[finite] + 1e-7)
    assert relative.max() < max(16 * torch.finfo(torch.float32).eps, 1.1 * torch.finfo(dtype).eps)


LAYOUT_TYPES = [(x, w) for x, w in TYPES if x == w or w == torch.int8]


@pytest.mark.parametrize("tokens", [1, 5, 20, 70])
@pytest.mark.parametrize("types", LAYOUT_TYPES, ids=str)
def test_nothing_around_operands_is_read(isa: str, types: tuple[torch.dtype, torch.dtype], tokens: int) -> None:
    for offset, gated, form in ((0, True, "gather"), (1, False, "compact"), (7, True, "compact"), (15, True, "gather")):
        case = make(tokens, 35, 21, types, gated, form=form)
        moved = {k: embedded(v, offset) for k, v in case.tensors().items()}
        apart = {"record": embedded(case.record, offset, 5), "x": embedded(case.x, offset, 3)}
        assert torch.equal(kernel(case.change(**moved)), kernel(case))
        assert torch.equal(kernel(case.change(**moved | apart)), kernel(case))


@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize("types", LAYOUT_TYPES, ids=str)
def test_rows_outside_the_index_are_not_read(isa: str, types: tuple[torch.dtype, torch.dtype], tokens: int) -> None:
    case = make(tokens, 35, 50, types, form="gather", kept=23)
    assert case.index is not None and case.neuron_bias is not None
    want = kernel(case)
    others = torch.ones(50, dtype=torch.bool)
    others[case.index.long()] = False
    for tensor in (case.record if case.scales is None else case.scales, case.neuron_bias):
        tensor[others] = float("nan")
    assert torch.equal(kernel(case), want)
    assert want.isfinite().all()


@pytest.mark.parametrize("types", LAYOUT_TYPES, ids=str)
def test_every_layout_gives_the_same_bits(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    case = make(12, 35, 21, types)
    want = kernel(case)
    x = case.x
    layouts = {
        "every other row": x.repeat_interleave(2, 0)[::2],
        "every other column": x.repeat_interleave(2, 1)[:, ::2],
        "transposed": x.t().contiguous().t(),
        "three dimensions": x.view(3, 4, 35),
        "three, permuted": x.view(3, 4, 35).transpose(0, 1).contiguous().transpose(0, 1),
        "three, cut": x.repeat(1, 2).view(3, 4, 70)[..., :35],
    }
    for name, layout in layouts.items():
        assert torch.equal(kernel(case.change(x=layout)).view(12, 35), want), name
    record = case.record
    for wider in (torch.cat([record, record], 1)[:, : record.shape[1]], record.repeat_interleave(2, 0)[::2]):
        assert torch.equal(kernel(case.change(record=wider)), want)
    assert torch.equal(kernel(case.change(record=record.t().contiguous().t())), want)
    assert case.neuron_bias is not None and case.down_bias is not None
    turned = case.neuron_bias.t().contiguous().t()
    spread = case.down_bias.repeat_interleave(3)[::3]
    assert torch.equal(kernel(case.change(neuron_bias=turned, down_bias=spread)), want)


def test_expanded_and_strided_operands(isa: str) -> None:
    case = make(1, 35, 21)
    for tokens in (3, 20):
        copies = case.change(x=case.x.repeat(tokens, 1))
        expanded = case.change(x=case.x.expand(tokens, -1))
        assert torch.equal(kernel(expanded), kernel(copies))
    single = case.change(x=case.x[0])
    assert torch.equal(kernel(single), kernel(case)[0])
    spaced = case.x[0].repeat_interleave(2)[::2]
    assert torch.equal(kernel(single.change(x=spaced)), kernel(case)[0])
    gather = make(4, 35, 21, form="gather")
    assert gather.index is not None
    assert torch.equal(kernel(gather.change(index=gather.index.repeat_interleave(2)[::2])), kernel(gather))
    eight = make(6, 35, 21)
    assert torch.equal(kernel(eight.change(x=eight.x.view(1, 2, 1, 3, 1, 1, 1, 35))).view(6, 35), kernel(eight))


@pytest.mark.parametrize("types", LAYOUT_TYPES, ids=str)
def test_inputs_stay_and_share_nothing_with_the_output(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for tokens in (1, 20):
        case = make(tokens, 35, 21, types, form="gather")
        before = {k: v.clone() for k, v in case.tensors().items()}
        out = kernel(case)
        out.fill_(float("nan"))
        assert all(torch.equal(before[k], v) for k, v in case.tensors().items())


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_nan_and_infinity_go_where_they_do_in_torch(
    isa: str, types: tuple[torch.dtype, torch.dtype], activation: str
) -> None:
    """In x; in each part of a record, or its scale; in a whole group of neurons, and in the last, partial one."""
    for special, tokens, gated in itertools.product((math.nan, math.inf, -math.inf), (1, 6, 20), (False, True)):
        case = make(tokens, 35, 40, types, gated, activation)
        case.x[tokens // 2, 34] = special
        check_special(case)
        for part, (neuron, column) in itertools.product(range(3 if gated else 2), ((0, 0), (39, 33))):
            case = make(tokens, 35, 40, types, gated, activation)
            if case.scales is None:
                case.record[neuron, part * 35 + column] = special
            elif math.isnan(special):  # infinite scales of zeros are NaN or not by the order of products
                case.scales[neuron, part] = special
            check_special(case)


@pytest.mark.parametrize("types", [t for t in TYPES if torch.float16 not in t], ids=str)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_large_pre_activations(isa: str, activation: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for tokens in (1, 6, 20):
        case = make(tokens, 65, 37, types, activation=activation)
        case = case.change(x=case.x * 1e4)
        assert kernel(case).isfinite().all()
        check_error(case)


@pytest.mark.parametrize("tokens", [1, 6, 20])
def test_denormals(isa: str, tokens: int) -> None:
    """Those of float16 are exact; those of float32 and bfloat16 are computed, or count as zeros."""
    ones = torch.ones(3, 2 * 35)
    for dtype, weights, size, scale in (
        (torch.float16, torch.float32, 1e-6, None),
        (torch.float16, torch.float16, 1e-6, None),
        (torch.float16, torch.int8, 1e-6, torch.ones(3, 2)),
        (torch.float32, torch.float32, 1e-40, None),
        (torch.bfloat16, torch.bfloat16, 1e-40, None),
        (torch.bfloat16, torch.int8, 1e-40, torch.ones(3, 2)),
    ):
        x = (torch.arange(1, tokens + 1)[:, None] * torch.full((tokens, 35), size)).to(dtype)
        case = Case(x, ones.to(weights), None, scale, gated=False, activation="relu")
        atol = 0.0 if dtype == torch.float16 else 3 * 35 * torch.finfo(torch.float32).tiny
        torch.testing.assert_close(kernel(case).double(), exact(case), rtol=1e-3, atol=atol)
        if dtype == torch.float16 and weights == dtype:
            swapped = Case(ones[:1, :35].half().repeat(tokens, 1), ones.half() * size, gated=False, activation="relu")
            swapped.record[:, 35:] = 1
            torch.testing.assert_close(kernel(swapped).double(), exact(swapped), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_with_every_mantissa_of_the_largest_token_value(isa: str, dtype: torch.dtype) -> None:
    """Fixed point must hold the largest magnitude of a token, whatever its digits and sign."""
    digits = 128 if dtype == torch.bfloat16 else 1024
    record, scales = torch.tensor([[127, 1, 127, 1]], dtype=torch.int8), torch.ones(1, 2)
    for digit in range(digits):
        value = 1 + digit / digits
        x = torch.tensor([[value, value / 3]], dtype=dtype)
        for signed in (x, -x):
            case = Case(signed, record, None, scales, gated=False, activation="quick_gelu")
            torch.testing.assert_close(kernel(case).double(), exact(case), rtol=2 * torch.finfo(dtype).eps, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_with_one_large_token_value(isa: str, dtype: torch.dtype) -> None:
    case = make(1, 131, 65, (dtype, torch.int8), activation="relu")
    case.x[0, 77] = 3000
    check_error(case)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_without_tokens_neurons_or_columns(isa: str, types: tuple[torch.dtype, torch.dtype], gated: bool) -> None:
    assert kernel(make(0, 35, 21, types, gated)).numel() == 0
    assert kernel(make(3, 0, 21, (types[0], torch.float32), gated)).shape == (3, 0)
    for tokens, form, width in itertools.product((1, 6, 20), FORMS, (1, 35, 600)):
        case = make(tokens, width, 21, types, gated, form=form, kept=0)
        case = case.rows(slice(0)) if form == "compact" else case
        assert case.down_bias is not None
        assert torch.equal(kernel(case), case.down_bias.expand(len(case.x), -1))
        assert not kernel(case.change(down_bias=None)).any()
    check_error(make(7, 1, 1, types, gated))


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_gather_and_prefix_equal_copied_rows_in_bits(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    """Slabs and the order of neurons depend on the number of kept neurons, and not on where these lie."""
    shapes = ((1, 576, 500), (6, 65, 50), (20, 65, 50), (70, 576, 300))
    for (tokens, width, neurons), gated in itertools.product(shapes, (False, True)):
        whole = make(tokens, width, neurons, types, gated)
        for kept in (1, neurons // 2 + 1, neurons):
            gather = make(tokens, width, neurons, types, gated, form="gather", kept=kept)
            assert gather.index is not None
            assert torch.equal(kernel(gather), kernel(whole.rows(gather.index.long())))
            prefix = make(tokens, width, neurons, types, gated, form="prefix", kept=kept)
            assert torch.equal(kernel(prefix), kernel(whole.rows(slice(kept))))


def test_int8_is_the_same_quantised_before_and_after_pruning(isa: str) -> None:
    record = torch.randn(50, 3 * 65, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(0, 50, 3)
    for tokens, dtype in itertools.product((1, 6, 20), FLOATS):
        x = torch.randn(tokens, 65, generator=torch.Generator().manual_seed(1)).to(dtype)
        (q, s), (kept_q, kept_s) = quantise(record, 3), quantise(record[keep], 3)
        want = kernel(Case(x, kept_q, None, kept_s))
        assert torch.equal(kernel(Case(x, q, keep.int(), s)), want)
        assert torch.equal(kernel(Case(x, q[keep], None, s[keep])), want)
