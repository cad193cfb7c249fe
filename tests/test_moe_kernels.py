"""The native CPU kernel of experts, on every instruction set of the machine: errors, layouts, special values, bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from ffn_cases import FLOATS, TYPES, embedded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from routed_cases import WHERE, Routed, check_error, exact, make, spoil
from torch import Tensor

from pyprune.base import reference
from pyprune.base.experts import Experts
from pyprune.ffn import native
from pyprune.ffn.moe_operator import moe, why_no_kernel

_REASON = native.load() or why_no_kernel("cpu", torch.float32, torch.float32)
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON or "the native library is there")

OWN = [(x, w) for x, w in TYPES if x == w or w == torch.int8]


def kernel(x: Tensor, experts: Experts, index: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = torch.ops.pyprune.moe_cpu.default(
        x, experts.rows, experts.scales, experts.index, experts.counts, index, weights.float(), experts.gated,
        experts.activation,
    )  # fmt: skip
    assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, x.dtype, True)
    return out


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets the number of torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@st.composite
def cases(draw: st.DrawFn) -> Routed:
    experts = draw(st.sampled_from((1, 2, 3, 5, 8, 13)))
    return make(
        draw(st.sampled_from((0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 70))),
        experts,
        min(experts, draw(st.sampled_from((1, 2, 3, 8)))),
        draw(st.sampled_from((1, 2, 3, 7, 15, 17, 31, 33, 63, 65, 129, 257, 515, 588))),
        draw(st.sampled_from((1, 2, 3, 7, 31, 33, 63, 65, 131))),
        draw(st.sampled_from(TYPES)),
        draw(st.booleans()),
        draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from((None, min(experts, 8)))),
        draw(st.booleans()),
    )


@given(case=cases())
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_error_is_at_most_twice_that_of_torch(isa: str, case: Routed) -> None:
    check_error(case, kernel)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_error_of_all_dtypes(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    """One token (a call an expert), some that share experts, and more of one expert than one pass takes."""
    for (tokens, experts, picked), gated in itertools.product(((1, 6, 3), (9, 4, 2), (150, 2, 1)), (False, True)):
        check_error(make(tokens, experts, picked, 67, 97, types, gated, "gelu"), kernel)


@pytest.mark.parametrize("types", OWN, ids=str)
def test_many_slabs_and_many_pairs(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    for tokens, experts, picked, width, neurons in ((1, 2, 1, 576, 1031), (700, 4, 3, 33, 40)):
        check_error(make(tokens, experts, picked, width, neurons, types), kernel)


@pytest.mark.parametrize("types", OWN, ids=str)
def test_threads_and_repetition_change_no_bit(
    isa: str, threads: Callable[[int], None], types: tuple[torch.dtype, torch.dtype]
) -> None:
    for tokens, experts, picked, width, neurons in ((1, 1, 1, 576, 1401), (5, 8, 4, 130, 257), (70, 3, 2, 33, 300)):
        case = make(tokens, experts, picked, width, neurons, types)
        threads(1)
        want = case.of(kernel)
        for number in (1, 2, 3, 8):
            threads(number)
            assert torch.equal(case.of(kernel), want)


@pytest.mark.parametrize("types", OWN, ids=str)
def test_the_order_of_a_routers_choices_changes_no_bit(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    case = make(9, 8, 4, 67, 65, types)
    turned = case.change(index=case.index.flip(1), weights=case.weights.flip(1))
    assert torch.equal(turned.of(kernel), case.of(kernel))


@pytest.mark.parametrize("types", OWN, ids=str)
def test_batch_invariant_rows_do_not_see_each_other(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    case = make(12, 4, 2, 67, 65, types)
    whole = moe(case.x, case.experts, case.index, case.weights, backend="cpu", batch_invariant=True)
    for t in range(12):
        one = case.change(x=case.x[t : t + 1], index=case.index[t : t + 1], weights=case.weights[t : t + 1])
        assert torch.equal(one.of(kernel)[0], whole[t])


@pytest.mark.parametrize("types", OWN, ids=str)
def test_nothing_around_operands_is_read(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    """Nor experts that nobody names, which hold NaN; rows and x lie apart, and neither starts on a line."""
    for tokens, offset in ((1, 1), (6, 7), (20, 0)):
        case = make(tokens, 5, 2, 35, 21, types, among=3)
        want, rows, scales = case.of(kernel), case.experts.rows.clone(), case.experts.scales
        if scales is None:
            rows[:2] = float("nan")
        else:
            scales = scales.clone()
            scales[:2] = float("nan")
        for apart in (0, 5):
            moved = Experts.unchecked(embedded(rows, offset, apart), True, "silu", scales)
            index = embedded(case.index, offset, apart)
            changed = case.change(x=embedded(case.x, offset, apart), experts=moved, index=index)
            assert torch.equal(changed.change(weights=embedded(case.weights, offset, apart)).of(kernel), want)
        strided = Experts.unchecked(rows.repeat_interleave(2, 0)[::2], True, "silu", scales)
        assert torch.equal(case.change(experts=strided, x=case.x.t().contiguous().t()).of(kernel), want)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_a_gather_reads_the_rows_of_its_index_and_no_others(
    isa: str, threads: Callable[[int], None], types: tuple[torch.dtype, torch.dtype]
) -> None:
    """Any number of each expert, none included, for one token and for several, whatever the threads."""
    for (tokens, experts, picked), gated in itertools.product(((1, 6, 3), (9, 4, 2), (150, 2, 1)), (False, True)):
        case = make(tokens, experts, picked, 67, 97, types, gated, "gelu", gather=True)
        check_error(case, kernel)
        want = case.of(kernel)
        case.spoil_what_no_index_names()
        for number in (1, 3):
            threads(number)
            assert torch.equal(case.of(kernel), want)


def test_scratch_that_holds_nan_changes_nothing(isa: str) -> None:
    """A call that leaves NaN everywhere in the memory that a thread keeps, then smaller ones."""
    poison = make(70, 8, 4, 600, 80)
    poison.x.fill_(float("nan"))
    for types in OWN:
        case = make(7, 5, 2, 131, 33, types)
        before = case.of(kernel)
        assert poison.of(kernel).isnan().all()
        assert torch.equal(case.of(kernel), before) and before.isfinite().all()


def test_nan_and_infinity_go_where_they_do_in_torch(isa: str) -> None:
    for dtype, special, tokens in itertools.product(FLOATS, (math.nan, math.inf), (1, 6, 20)):
        for where in WHERE:
            case = make(tokens, 5, 2, 35, 40, (dtype, dtype))
            spoil(case, where, special)
            want, got = exact(case), case.of(kernel)
            assert torch.equal(got.isnan(), want.isnan())
            infinite = want.isinf()
            assert torch.equal(got.isinf(), infinite) and torch.equal(got[infinite].double(), want[infinite])


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_no_tokens_neurons_columns_or_choices(isa: str, types: tuple[torch.dtype, torch.dtype]) -> None:
    assert make(0, 4, 2, 35, 21, types).of(kernel).numel() == 0
    assert make(3, 4, 2, 0, 21, (types[0], torch.float32)).of(kernel).shape == (3, 0)
    for tokens in (1, 6):
        assert not make(tokens, 4, 2, 35, 0, (types[0], torch.float32)).of(kernel).any()
        assert not make(tokens, 4, 0, 35, 21, types).of(kernel).any()


KEPT, COUNTS = torch.tensor([[0, 2]] * 4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
BAD = {
    "index past the experts": ({"index": torch.tensor([[0, 4]] * 5)}, "index must name experts that rows has"),
    "index below zero": ({"index": torch.tensor([[0, -1]] * 5)}, "index must name experts that rows has"),
    "index of int32": ({"index": torch.zeros(5, 2, dtype=torch.int32)}, "index must have the dtype"),
    "index of another length": ({"index": torch.zeros(4, 2, dtype=torch.int64)}, "index must have the shape"),
    "weights too narrow": ({"weights": torch.ones(5, 1)}, "weights must have the shape"),
    "weights of float64": ({"weights": torch.ones(5, 2).double()}, "weights must have the dtype"),
    "x of float64": ({"x": torch.zeros(5, 24).double()}, "x must be float32, bfloat16 or float16"),
    "x of int8": ({"x": torch.zeros(5, 24).char()}, "x must be floating point"),
    "x of one dimension": ({"x": torch.zeros(24)}, "x must have two dimensions"),
    "rows of two": ({"rows": torch.zeros(6, 72)}, "rows must have three dimensions"),
    "no experts": ({"rows": torch.zeros(0, 6, 72)}, "rows must have three dimensions, the first of one"),
    "rows of another width": ({"rows": torch.zeros(4, 6, 71)}, "rows must be 2 .gated: 3. times as wide as x"),
    "rows transposed": ({"rows": torch.zeros(4, 72, 6).transpose(1, 2)}, "rows must hold each neuron in one run"),
    "int8 without scales": ({"rows": torch.zeros(4, 6, 72).char()}, "scales must be given for int8 rows only"),
    "scales without int8": ({"scales": torch.ones(4, 6, 3)}, "scales must be given for int8 rows only"),
    "unknown activation": ({"activation": "swish"}, "activation must be gelu, gelu_tanh"),
    "kept without counts": ({"kept": KEPT}, "counts must be given with kept"),
    "counts alone": ({"counts": COUNTS}, "counts must be given with kept"),
    "kept of another expert": ({"kept": KEPT[:3], "counts": COUNTS}, "kept must have the shape"),
    "kept of int64": ({"kept": KEPT.long(), "counts": COUNTS}, "kept must have the dtype"),
    "kept past the rows": ({"kept": KEPT + 4, "counts": COUNTS}, "kept must hold rows of the experts"),
    "counts too many": ({"kept": KEPT, "counts": COUNTS + 1}, "kept must hold rows of the experts, as many as counts"),
    "counts too few": ({"kept": KEPT, "counts": COUNTS[:3]}, "counts must have the shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_operands_are_refused_by_name(name: str) -> None:
    changes, message = BAD[name]
    operands = {
        "x": torch.zeros(5, 24),
        "rows": torch.zeros(4, 6, 72),
        "scales": None,
        "kept": None,
        "counts": None,
        "index": torch.zeros(5, 2, dtype=torch.int64),
        "weights": torch.ones(5, 2),
        "gated": True,
        "activation": "silu",
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyprune.moe_cpu.default(*{**operands, **changes}.values())
