"""The CUDA kernels' own source on a CPU: block by block, thread by thread, against the plain-torch twin.

The simulator runs every thread as a fiber, in an order that a seed shuffles, and holds NaN in all that was not written:
scratch memory, shared memory, and the places of copies that were not waited for.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import ffn_cases
import pytest
import torch
from ffn_cases import TYPES, Case, embedded, exact, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyprune.base import reference

LIBRARY = Path(
    os.environ.get("PYPRUNE_SIMULATOR_LIBRARY")
    or Path(__file__).parent.parent / "build" / "simulator" / "libpyprune_simulator.so"
)
if LIBRARY.is_file():
    torch.ops.load_library(LIBRARY)
pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the simulator of the CUDA kernels is not built")

SINGLE, BULK, TWO = {"algorithm": 0}, {"algorithm": 0, "bulk": 1}, {"algorithm": 1}
ALGORITHMS = [
    pytest.param(SINGLE, id="single pass"),
    pytest.param(BULK, id="single pass in bulk"),
    pytest.param(TWO, id="two passes"),
]
# In the order of `PlanOptions`, with what leaves each to the analysis.
SIZES = {"blocks": 0, "cluster": 0, "teams": 0, "step": 0, "stages": 0, "splits": 0}
UNSET = {"algorithm": -1, **SIZES, "evict_first": -1, "overlap": -1, "early": -1, "bulk": -1}
SHARED = 227 * 1024

WIDTHS = (1, 2, 7, 8, 9, 16, 31, 32, 33, 48, 64, 65, 112, 127, 129, 144, 255, 256, 257, 272, 528)
NEURONS = (1, 2, 3, 5, 8, 13, 31, 33, 37, 64, 97)


def numbers(plan: dict[str, int]) -> list[int]:
    assert plan.keys() <= UNSET.keys()
    return list((UNSET | plan).values())


def simulate(
    case: Case,
    plan: dict[str, int] | None = None,
    *,
    processors: int = 4,
    shared: int = SHARED,
    clusters: bool = True,
    order: int = 0,
) -> Tensor:
    """The case by the kernels, on a device of so many multiprocessors."""
    if plan and plan.get("algorithm") == 0 and not on_16_bytes(case):
        plan = None  # as chosen, which is two passes
    out: Tensor = torch.ops.pyprune.ffn_simulated(
        case.x, case.record, case.index, case.scales, case.neuron_bias, case.down_bias,
        case.gated, case.activation, numbers(plan or {}), [processors, shared, clusters, order],
    )  # fmt: skip
    assert (out.shape, out.dtype, out.is_contiguous()) == (case.x.shape, case.x.dtype, True)
    return out


def planned(tokens: int, hidden_size: int, neurons: int, weights: str = "bfloat16", **given: Any) -> dict[str, int]:
    """The plan of a compact gated FFN on a device like an H100, as chosen by its sizes."""
    device = [given.pop("processors", 132), given.pop("shared", SHARED), given.pop("clusters", True), 0]
    form = [given.pop(name, default) for name, default in (("gated", True), ("indexed", False))]
    found = torch.ops.pyprune.plan_simulated(tokens, hidden_size, neurons, *form, weights, numbers(given), device)
    return json.loads(found)


def on_16_bytes(case: Case) -> bool:
    rows = (case.x.shape[-1], case.record.stride(0))
    return all(n * case.record.element_size() % 16 == 0 for n in rows) and case.record.data_ptr() % 16 == 0


def has_single_pass(case: Case) -> bool:
    """It needs rows on 16 bytes, and has no registers for the sums of more than four tokens."""
    return on_16_bytes(case) and case.x.shape[0] <= 4


@st.composite
def cases(draw: st.DrawFn) -> Case:
    neurons = draw(st.sampled_from(NEURONS))
    return make(
        draw(st.integers(1, 9)),
        draw(st.sampled_from(WIDTHS)),
        neurons,
        draw(st.sampled_from(TYPES)),
        draw(st.booleans()),
        draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        draw(st.tuples(st.booleans(), st.booleans())),
        draw(st.sampled_from(ffn_cases.FORMS)),
        draw(st.sampled_from(sorted({1, max(1, neurons - 1), neurons, (neurons + 1) // 2}))),
        draw(st.integers(0, 1000)),
    )


@given(case=cases(), way=st.sampled_from([SINGLE, BULK, TWO]), processors=st.integers(1, 9), order=st.integers(0, 99))
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_error_is_at_most_twice_that_of_torch(case: Case, way: dict[str, int], processors: int, order: int) -> None:
    plan = way if has_single_pass(case) else TWO
    ffn_cases.check_error(case, lambda c: simulate(c, plan, processors=processors, order=order))


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_error_of_all_dtypes_and_forms(types: tuple[torch.dtype, torch.dtype], plan: dict[str, int]) -> None:
    for tokens, form, gated in itertools.product((1, 2, 3), ffn_cases.FORMS, (False, True)):
        case = make(tokens, 264, 37, types, gated, "gelu", form=form)
        ffn_cases.check_error(case, lambda c: simulate(c, plan))


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8)], ids=str)
def test_widths_of_real_models(types: tuple[torch.dtype, torch.dtype]) -> None:
    for width, tokens in ((576, 1), (768, 2), (2048, 1), (4096, 1)):
        case = make(tokens, width, 19, types, form="gather", kept=11)
        for plan in (SINGLE, BULK, TWO):
            ffn_cases.check_error(case, lambda c, plan=plan: simulate(c, plan, processors=8))


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("dtype", ffn_cases.FLOATS)
def test_activations_at_every_size(dtype: torch.dtype, activation: str, plan: dict[str, int]) -> None:
    """One neuron with weights of one, so that every output is the activation of one input, from -1e4 to 1e4."""
    sizes = torch.cat([torch.logspace(-6, 4, 60), torch.linspace(0, 15, 30)])
    x = torch.cat([sizes, -sizes, torch.zeros(1)])[:, None].to(dtype)
    case = Case(x, torch.ones(1, 2), gated=False, activation=activation)
    got, want = simulate(case, plan, processors=1), exact(case)
    if dtype == torch.float16:
        want = want.to(dtype).double()  # with what exceeds it
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite])
    relative = (got.double() - want).abs()[finite] / (want.abs()[finite] + 1e-7)
    assert relative.max() < max(64 * torch.finfo(torch.float32).eps, 1.1 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("types", [t for t in TYPES if t[0] == t[1] or t[1] == torch.int8], ids=str)
def test_nothing_around_operands_is_read(types: tuple[torch.dtype, torch.dtype], plan: dict[str, int]) -> None:
    """All around is NaN; under the address sanitizer, what is not allocated is seen too."""
    layouts = [(64, 0, 16), (48, 16, 32)]  # width, elements before the first and between rows
    for width, offset, between in layouts if plan["algorithm"] == 0 else [*layouts, (35, 0, 5), (35, 7, 3), (64, 1, 1)]:
        for gated, form in ((True, "gather"), (False, "compact")):
            case = make(3, width, 21, types, gated, form=form)
            want = simulate(case, plan)
            assert want.isfinite().all()
            moved = {k: embedded(v, offset) for k, v in case.tensors().items()}
            apart = {"record": embedded(case.record, offset, between), "x": embedded(case.x, offset, between)}
            assert torch.equal(simulate(case.change(**moved), plan), want)
            assert torch.equal(simulate(case.change(**moved | apart), plan), want)


@pytest.mark.parametrize("plan", ALGORITHMS)
def test_rows_outside_the_index_are_not_read(plan: dict[str, int]) -> None:
    case = make(3, 64, 50, form="gather", kept=23)
    assert case.index is not None and case.neuron_bias is not None
    want = simulate(case, plan)
    others = torch.ones(50, dtype=torch.bool)
    others[case.index.long()] = False
    for tensor in (case.record, case.neuron_bias):
        tensor[others] = float("nan")
    assert torch.equal(simulate(case, plan), want)


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("types", [(d, d) for d in ffn_cases.FLOATS], ids=str)
def test_nan_and_infinity_go_where_they_do_in_torch(
    types: tuple[torch.dtype, torch.dtype], plan: dict[str, int]
) -> None:
    width = 40 if plan["algorithm"] == 0 else 35
    for special, activation in itertools.product((math.nan, math.inf, -math.inf), sorted(reference.ACTIVATIONS)):
        case = make(2, width, 9, types, True, activation)
        case.x[1, width - 1] = special
        ffn_cases.check_special(case, lambda c: simulate(c, plan))
        for part in range(3):
            case = make(2, width, 9, types, True, activation)
            case.record[8, part * width + width - 2] = special
            ffn_cases.check_special(case, lambda c: simulate(c, plan))


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_without_tokens_neurons_or_columns(types: tuple[torch.dtype, torch.dtype], plan: dict[str, int]) -> None:
    assert simulate(make(0, 35, 21, types), plan).numel() == 0
    assert simulate(make(3, 0, 21, (types[0], torch.float32)), plan).shape == (3, 0)
    for form, width in itertools.product(ffn_cases.FORMS, (1, 35, 64)):
        case = make(2, width, 21, types, form=form, kept=0)
        case = case.rows(slice(0)) if form == "compact" else case
        assert case.down_bias is not None
        assert torch.equal(simulate(case, plan), case.down_bias.expand(len(case.x), -1))
        assert not simulate(case.change(down_bias=None), plan).any()
    ffn_cases.check_error(make(3, 1, 1, types), lambda c: simulate(c, plan))


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.int8)], ids=str)
def test_repeats_to_the_bit_in_every_order_of_execution(
    types: tuple[torch.dtype, torch.dtype], plan: dict[str, int]
) -> None:
    """Who comes last, and who is ahead of whom, changes nothing: in a cluster, in a team of several warps."""
    ring = {"teams": 1, "step": 1, "stages": 2} if plan["algorithm"] == 0 else {}
    for width, processors, more in ((264, 16, {}), (1040, 2, ring)):
        case = make(3, width, 61, types, form="gather", kept=47 if processors == 16 else 13)
        want = simulate(case, plan | more, processors=processors)
        ffn_cases.check_error(case, lambda c, want=want: want)
        for order in range(1, 9 if processors == 16 else 5):
            assert torch.equal(simulate(case, plan | more, processors=processors, order=order), want)


BITS = [
    ("single pass", 264, SINGLE, 4),
    ("in bulk", 264, BULK, 4),
    ("two passes", 264, TWO, 9),
    ("two passes, wide", 1032, TWO, 3),
]


@pytest.mark.parametrize(("name", "width", "plan", "most"), BITS, ids=[b[0] for b in BITS])
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(
    types: tuple[torch.dtype, torch.dtype], name: str, width: int, plan: dict[str, int], most: int
) -> None:
    for form, gated in itertools.product(("compact", "gather"), (False, True)):
        case = make(most, width, 53, types, gated, form=form)
        whole = simulate(case, plan, processors=8)
        for rows in (slice(0, 1), slice(1, 3), slice(0, most - 1), slice(most - 1, most)):
            part = case.change(x=case.x[rows])
            assert torch.equal(simulate(part, plan, processors=8), whole[rows]), (rows, form, gated)


@pytest.mark.parametrize("plan", ALGORITHMS)
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.float16, torch.int8)], ids=str)
def test_gather_and_prefix_equal_copied_rows_in_bits(
    types: tuple[torch.dtype, torch.dtype], plan: dict[str, int]
) -> None:
    for gated, kept in itertools.product((False, True), (1, 26, 50)):
        whole = make(3, 65, 50, types, gated)
        gather = make(3, 65, 50, types, gated, form="gather", kept=kept)
        assert gather.index is not None
        assert torch.equal(simulate(gather, plan), simulate(whole.rows(gather.index.long()), plan))
        prefix = make(3, 65, 50, types, gated, form="prefix", kept=kept)
        assert torch.equal(simulate(prefix, plan), simulate(whole.rows(slice(kept)), plan))


# Whole neurons are asked for when their place is free: in bulk that takes two stages.
RINGS = [
    (way, step, stages)
    for way, step, stages in itertools.product((SINGLE, BULK), (1, 2, 3, 4), (1, 2, 3, 4, 6))
    if way == SINGLE or stages > 1
]


def test_every_step_stage_cluster_and_split_gives_a_right_result() -> None:
    case = make(1, 136, 101, (torch.float32, torch.float32), form="gather", kept=77)
    for way, step, stages in RINGS:
        plan = way | {"step": step, "stages": stages, "blocks": 3, "teams": 1}
        ffn_cases.check_error(case, lambda c, plan=plan: simulate(c, plan))
    for way, (teams, blocks) in itertools.product((SINGLE, BULK), ((1, 2), (2, 3), (3, 1), (8, 2), (15, 5))):
        plan = way | {"teams": teams, "blocks": blocks, "stages": 2}
        ffn_cases.check_error(case, lambda c, plan=plan: simulate(c, plan, order=3))
    for cluster, blocks in ((1, 7), (2, 8), (4, 4), (4, 12), (8, 16)):
        plan = SINGLE | {"cluster": cluster, "blocks": blocks}
        ffn_cases.check_error(case, lambda c, plan=plan: simulate(c, plan, processors=16, order=3))
    for splits, blocks in itertools.product((1, 2, 7, 90), (1, 3)):
        plan = TWO | {"splits": splits, "blocks": blocks}
        ffn_cases.check_error(case, lambda c, plan=plan: simulate(c, plan, order=3))


def test_the_ring_does_not_change_bits() -> None:
    """How weights come, and when, does not decide which sums are made in which order."""
    case = make(1, 136, 101)
    want = simulate(case, SINGLE | {"blocks": 4, "cluster": 2, "teams": 2, "stages": 2})
    for way, step, stages in RINGS:
        if step * stages > 8:
            continue  # more than shared memory holds
        ring = {"blocks": 4, "cluster": 2, "teams": 2, "step": step, "stages": stages}
        assert torch.equal(simulate(case, way | ring), want)


OVERLAPPING = {
    "single pass": SINGLE,
    "single pass, early": SINGLE | {"early": 1},
    "in bulk": BULK,
    "in bulk, early": BULK | {"early": 1},
    "two passes": TWO,
}


@pytest.mark.parametrize("plan", OVERLAPPING.values(), ids=OVERLAPPING)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_kernels_that_begin_before_the_one_before_has_ended(plan: dict[str, int], gated: bool) -> None:
    """Dependent launch: two layers in turn on one stream, over the same scratch memory, each on what the one before
    gives, are bitwise one call after another, however far a kernel comes before those before it.
    """
    generator = torch.Generator().manual_seed(1)
    parts, width, calls = 3 if gated else 2, 72, 4
    tokens = 11 if plan == TWO else 2  # in chunks, over the same memory too
    first, second = (torch.randn(21, parts * width, generator=generator) * 1.4 * width**-0.5 for _ in range(2))
    # Beside float32 weights x is widened, by a kernel of its own that does not overlap.
    for dtype, weights in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x = torch.randn(tokens, width, generator=generator).to(dtype)
        records = [t.to(weights) for t in (first, second)]
        for index in (None, torch.tensor([0, 3, 4, 9, 11, 12, 20], dtype=torch.int32)):

            def chain(order: int, stream: bool, **more: int) -> Tensor:
                form = (x, *records, index, gated, "silu", calls, stream)  # noqa: B023 - called at once
                chosen = numbers(plan | {"cluster": 2, "blocks": 4} | more)
                return torch.ops.pyprune.ffn_chain_simulated(*form, chosen, [8, SHARED, 1, order])

            want = chain(0, False, early=0)
            assert want.isfinite().all() and want.abs().max() > 1e-7
            for order in (0, 1, 2, 3, 4):
                assert torch.equal(chain(order, True, overlap=1), want), (order, dtype)


def test_chunks_share_scratch_memory_and_leave_nothing_to_each_other() -> None:
    """The simulator refuses a call that takes memory for each."""
    case = make(27, 40, 21, form="gather", kept=9)
    apart = [simulate(case.change(x=x)) for x in case.x.split(8)]
    assert torch.equal(simulate(case), torch.cat(apart))


@pytest.mark.parametrize("plan", ALGORITHMS)
def test_a_row_that_is_none_gives_nan_and_reads_nothing(plan: dict[str, int]) -> None:
    case = make(2, 64, 41)
    for foreign in (-1, 41, 2**31 - 1):
        index = torch.tensor([3, foreign, 5], dtype=torch.int32)
        assert simulate(case.change(index=index), plan).isnan().all()


def test_plans_for_layers_of_real_models() -> None:
    llama = planned(1, 4096, 14336)
    assert llama["algorithm"] == 0 and llama["threads"] == 512 and llama["blocks"] == 128 and llama["cluster"] == 8
    # What an H200 did fastest: two teams, two neurons a step or more, in bulk.
    assert (llama["teams"], llama["step"], llama["stages"], llama["bulk"]) == (2, 2, 2, 1)
    opt = planned(1, 4096, 8192, gated=False)
    assert (opt["teams"], opt["step"], opt["stages"], opt["bulk"]) == (2, 2, 3, 1)
    assert 64 * 1024 < llama["shared_bytes"] <= SHARED
    # Four tokens still fit; eight need more sums than a multiprocessor has registers.
    assert planned(4, 4096, 14336)["algorithm"] == 0
    assert planned(8, 4096, 14336)["algorithm"] == 1
    assert planned(1, 8192, 28672)["algorithm"] == 0
    assert planned(4, 4096, 14336, "int8")["algorithm"] == 0
    assert planned(1, 16384, 53248)["algorithm"] == 1
    assert planned(1, 4096, 14336, clusters=False)["algorithm"] == 1
    narrow = planned(1, 768, 3072, gated=False)
    assert (narrow["algorithm"], narrow["overlap"]) == (1, 1)
    small = planned(1, 768, 3072, gated=False, algorithm=0)
    assert (small["blocks"], small["threads"], small["teams"]) == (128, 256, 4)
    # All weights of a block at once, and room beside it for a block of the next kernel.
    for width, neurons, gated, weights in ((768, 1536, False, "bfloat16"), (576, 768, True, "bfloat16")):
        for bulk in (0, 1):
            small = planned(1, width, neurons, weights, gated=gated, bulk=bulk, algorithm=0)
            own = -(-neurons // (small["blocks"] * small["teams"]))
            assert (small["step"], small["stages"]) == (own, 1) and 2 * small["shared_bytes"] < SHARED
    # A kernel is the same for a token as for two in all but its sums; in bulk nothing is padded.
    assert llama["shared_bytes"] <= planned(1, 4096, 14336, bulk=0)["shared_bytes"] + 256
    assert planned(1, 64, 5)["blocks"] <= 5


def test_sums_of_two_passes_do_not_depend_on_tokens() -> None:
    """What batch-invariant calls take."""
    assert len({planned(m, 4096, 14336, algorithm=1)["splits"] for m in range(1, 9)}) == 1


REFUSED = [
    ({"algorithm": 2}, "plan must have algorithm 0"),
    ({"algorithm": 0, "step": 9}, "plan must have a step of 1..4 neurons"),
    ({"algorithm": 0, "stages": 5}, "stages that fit"),
    ({"cluster": 3}, "plan must have clusters of 1, 2, 4 or 8"),
    ({"cluster": 8, "blocks": 12}, "plan must have whole clusters"),
    ({"teams": 16}, "plan must have 0 to 15 teams"),
    ({"early": 1}, "plan must be early only with overlap"),
    ({"bulk": 1, "clusters": False}, "plan must not copy in bulk on this device"),
]


@pytest.mark.parametrize(("plan", "message"), REFUSED, ids=lambda p: str(p))
def test_what_cannot_be_planned_is_refused(plan: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        planned(1, 4096, 14336, **plan)
    clusters = bool(plan.get("clusters", True))
    with pytest.raises(RuntimeError, match=message):
        simulate(make(1, 64, 9), {k: v for k, v in plan.items() if k != "clusters"}, clusters=clusters)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RuntimeError, match="plan must have at most 2 teams for this problem"):
        planned(1, 4096, 14336, algorithm=0, teams=3)
    with pytest.raises(RuntimeError, match="plan must have algorithm 1 for this problem: its sums of 4 tokens"):
        planned(4, 8192, 14336, algorithm=0)
    with pytest.raises(RuntimeError, match="plan must have algorithm 1 for this problem: rows of the record"):
        planned(1, 4095, 14336, algorithm=0)
    with pytest.raises(RuntimeError, match="plan must have algorithm 1 for this problem: registers do not hold"):
        planned(8, 64, 99, algorithm=0)
    with pytest.raises(RuntimeError, match="plan must have clusters of 1 block on this device"):
        planned(1, 4096, 14336, algorithm=0, cluster=2, blocks=8, clusters=False)
    with pytest.raises(RuntimeError, match=r"plan must have a step .* that fit in"):
        planned(1, 4096, 14336, algorithm=0, stages=1, bulk=1)
    case = make(3, 64, 9)
    none = case.rows(slice(0)).change(index=torch.zeros(2).int())
    with pytest.raises(RuntimeError, match="index must be empty beside a record without rows"):
        simulate(none)
    with pytest.raises(RuntimeError, match="index must have one dimension"):
        simulate(case.change(index=torch.zeros(2, 4).int()))
    with pytest.raises(RuntimeError, match="scales must be given for int8 records only"):
        simulate(case.change(scales=torch.ones(9, 3)))
