"""The CUDA kernels of experts on a CPU, as tests/test_cuda_simulated.py has those of one FFN: their own source, thread
by thread, against the plain-torch twin, NaN in all that was not written.

The simulator runs every call twice, kernel after kernel and as a stream where kernels overlap, and wants the same bits.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ffn_cases import TYPES, embedded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from routed_cases import WHERE, Routed, check_error, exact, make, spoil
from test_cuda_simulated import LIBRARY, SHARED
from test_cuda_simulated import numbers as of_ffn
from torch import Tensor

from pyprune.base import reference
from pyprune.base.experts import Experts
from pyprune.ffn.backends import cuda

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the simulator of the CUDA kernels is not built")

WIDTHS = (1, 2, 7, 8, 16, 31, 33, 64, 65, 129, 257, 528)
OWN = [(x, w) for x, w in TYPES if x == w or w == torch.int8]


def simulate(
    case: Routed, plan: dict[str, int] | None = None, *, processors: int = 4, clusters: bool = True, order: int = 0
) -> Tensor:
    """The case by the kernels, on a device of so many multiprocessors."""
    e, numbers = case.experts, cuda.expert_plan(plan)
    out: Tensor = torch.ops.pyprune.moe_simulated(
        case.x, e.rows, e.scales, e.index, e.counts, case.index, case.weights, e.gated, e.activation, numbers,
        [processors, SHARED, clusters, order],
    )  # fmt: skip
    assert (out.shape, out.dtype, out.is_contiguous()) == (case.x.shape, case.x.dtype, True)
    return out


def check(case: Routed, plan: dict[str, int] | None = None, **device: Any) -> None:
    check_error(case, lambda *operands: simulate(Routed(*operands), plan, **device))


@st.composite
def cases(draw: st.DrawFn) -> Routed:
    experts = draw(st.sampled_from((1, 2, 3, 5, 8, 13)))
    tokens, width = draw(st.sampled_from((1, 2, 3, 5, 9, 17))), draw(st.sampled_from(WIDTHS))
    neurons = draw(st.sampled_from((1, 2, 3, 8, 31, 33, 64, 97)))
    # Over few roundings to half precision chance decides whose error is the smaller.
    few = neurons < 31 or tokens * width < 64
    return make(
        tokens,
        experts,
        min(experts, draw(st.sampled_from((1, 2, 3, 8)))),
        width,
        neurons,
        draw(st.sampled_from([t for t in TYPES if t[0] == torch.float32] if few else TYPES)),
        draw(st.booleans()),
        draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from((None, min(experts, 8)))),
        draw(st.booleans()),
    )


@given(
    case=cases(),
    tokens=st.sampled_from((0, 1, 4, 8)),
    splits=st.sampled_from((0, 1, 3)),
    processors=st.integers(1, 9),
    order=st.integers(0, 99),
)
@settings(
    max_examples=25,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_error_is_at_most_twice_that_of_torch(
    case: Routed, tokens: int, splits: int, processors: int, order: int
) -> None:
    check(case, {"tokens": tokens, "splits": splits}, processors=processors, order=order)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_error_of_all_dtypes(types: tuple[torch.dtype, torch.dtype]) -> None:
    """One token, some that share experts, aligned and not, compact and gather; experts that nobody names hold NaN."""
    for (tokens, experts, picked, width), gather in itertools.product(
        ((1, 6, 3, 64), (6, 5, 2, 35), (9, 4, 1, 48)), (False, True)
    ):
        case = make(tokens, experts, picked, width, 37, types, tokens != 6, "gelu", gather=gather, among=experts - 1)
        numbers = case.experts.rows if case.experts.scales is None else case.experts.scales
        numbers[0] = float("nan")
        if gather:
            case.spoil_what_no_index_names()
        check(case)


def test_more_pairs_than_a_launch_takes_and_one_expert_of_all() -> None:
    """In chunks, which share scratch memory; an expert of more tokens than a block computes together, and one that a
    token names twice.
    """
    check(make(180, 4, 3, 32, 9), {"tokens": 4})
    case = make(13, 5, 2, 32, 9)
    check(case.change(index=torch.full_like(case.index, 3)))


@pytest.mark.parametrize("types", OWN, ids=str)
def test_a_token_has_the_same_bits_whatever_is_beside_it(types: tuple[torch.dtype, torch.dtype]) -> None:
    case = make(11, 4, 2, 80, 70, types, gather=True)
    whole = simulate(case)
    for tokens in (1, 4, 8):
        assert torch.equal(simulate(case, {"tokens": tokens, "blocks": tokens}), whole)
    for some in ([10], [3, 7], list(range(5))):
        part = case.change(x=case.x[some], index=case.index[some], weights=case.weights[some])
        for order in (0, 1):
            assert torch.equal(simulate(part, order=order), whole[some])


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_number_that_names_no_expert_makes_its_token_nan(tokens: int) -> None:
    case = make(tokens, 5, 2, 48, 40, (torch.bfloat16, torch.bfloat16))
    want = simulate(case)
    for number in (-1, 5, 2**40):
        bad = case.index.clone()
        bad[tokens // 2, 1] = number
        got = simulate(case.change(index=bad))
        others = [t for t in range(tokens) if t != tokens // 2]
        assert got[tokens // 2].isnan().all() and torch.equal(got[others], want[others])


def test_nan_and_infinity_go_where_they_do_in_torch() -> None:
    for special, tokens in itertools.product((float("nan"), float("inf")), (1, 6)):
        for where in WHERE:
            case = make(tokens, 5, 2, 48, 40, (torch.float16, torch.float16))
            spoil(case, where, special)
            assert torch.equal(simulate(case).isfinite(), exact(case).isfinite())


@pytest.mark.parametrize("types", OWN, ids=str)
def test_nothing_around_operands_is_read(types: tuple[torch.dtype, torch.dtype]) -> None:
    for width, offset, apart in ((48, 16, 32), (35, 7, 3)):
        case = make(5, 4, 2, width, 21, types)
        want = simulate(case)
        e = case.experts
        far = torch.zeros(4, 30, e.rows.shape[2], dtype=e.rows.dtype)
        far[:, 21:] = 100 if e.scales is not None else float("nan")
        far[:, :21] = e.rows
        moved = Experts.unchecked(far[:, :21], True, "silu", e.scales)
        index, weights = embedded(case.index, offset, apart), embedded(case.weights, offset, apart)
        changed = case.change(x=embedded(case.x, offset, apart), experts=moved, index=index, weights=weights)
        assert torch.equal(simulate(changed), want)
        assert torch.equal(simulate(changed.change(weights=case.weights.float()), clusters=False), want)


def test_without_tokens_or_neurons() -> None:
    assert simulate(make(0, 4, 2, 16, 5)).shape == (0, 16)
    case = make(3, 4, 2, 16, 0)
    assert not simulate(case).any()
    kept, counts = torch.zeros(4, 2, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    named = Experts.unchecked(case.experts.rows, True, "silu", None, kept, counts)
    with pytest.raises(RuntimeError, match="kept must be empty beside experts without rows"):
        simulate(case.change(experts=named))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tokens of three": ({"plan": {"tokens": 3}}, "plan must have 1, 4 or 8 tokens"),
    "too many splits": ({"plan": {"splits": 1025}}, "plan must have 0 to 1024 splits"),
    "overlap without": ({"plan": {"overlap": 1}, "clusters": False}, "plan must not overlap on this device"),
    "no choices": ({"picked": 0}, "index must have 1 to 256 experts of each token"),
    "index of int32": ({"index": torch.zeros(5, 2, dtype=torch.int32)}, "index must have the dtype"),
    "weights of float64": ({"weights": torch.ones(5, 2).double()}, "weights must be float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_run_is_refused_by_name(name: str) -> None:
    changes, message = BAD[name]
    case = make(picked=changes.get("picked", 2))
    case = case.change(**{key: value for key, value in changes.items() if isinstance(value, Tensor)})
    with pytest.raises(RuntimeError, match=message):
        simulate(case, changes.get("plan"), clusters=changes.get("clusters", True))


def test_plans_are_numbers_in_the_order_of_the_library() -> None:
    assert cuda.expert_plan(None) == [0, 0, 0, -1, -1] and len(of_ffn({})) == 11
    assert cuda.expert_plan({"splits": 2, "overlap": False}) == [0, 0, 2, -1, 0]
