"""The Triton kernels of experts against float64, on a GPU (`-m gpu`) or in Triton's interpreter where there is none."""

from __future__ import annotations

import itertools
import json
import os
import re
from typing import Any

import pytest
import torch
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from moe_cases import make_mixture
from routed_cases import WHERE, Routed, check_error, exact, make, spoil

from pyprune import BackendError, InputError, PrunedMoE, accelerate
from pyprune import triton_kernels as kernels
from pyprune.base.experts import Experts
from pyprune.ffn import accelerate_experts, contest, moe_choice, tune, tuned
from pyprune.ffn.backends import Problem, triton
from pyprune.ffn.moe_operator import MOE, arguments, moe, why_no_kernel
from pyprune.ffn.warming import warmup
from pyprune.model.families import find_ffns
from pyprune.triton_kernels import defaults, routing
from pyprune.triton_kernels.experts_config import experts_candidates, experts_config

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
native = pytest.mark.skipif(kernels.INTERPRETED, reason="needs a CUDA device")
F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
# Module `experts` of the package, which has a function of another name in it only.
LAUNCHER = __import__("sys").modules["pyprune.triton_kernels.experts"]
EMPTY = torch.empty


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers allocate holds NaN, and numbers of nothing, at first."""

    def poisoned(*args: Any, **options: Any) -> Tensor:
        made = EMPTY(*args, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


def here(case: Routed) -> Routed:
    """The case on the device."""
    e = case.experts
    scales = None if e.scales is None else e.scales.to(DEVICE)
    kept = (None, None) if e.index is None or e.counts is None else (e.index.to(DEVICE), e.counts.to(DEVICE))
    moved = Experts.unchecked(e.rows.to(DEVICE), e.gated, e.activation, scales, *kept)
    return Routed(case.x.to(DEVICE), moved, case.index.to(DEVICE), case.weights.to(DEVICE))


def build(*args: Any, **options: Any) -> Routed:
    return here(make(*args, **options))


def run(x: Tensor, experts: Experts, index: Tensor, weights: Tensor, **options: Any) -> Tensor:
    form = {"gated": experts.gated, "activation": experts.activation, "scales": experts.scales}
    kept = {"kept": experts.index, "counts": experts.counts}
    out = kernels.moe(x, experts.rows, index, weights, **form, **kept, **options)
    assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, x.dtype, True)
    return out


# Tokens, experts, K, D, F: one of everything; one token; experts without one; unaligned; more than a tile of pairs.
ODD = [(1, 1, 1, 1, 1), (1, 6, 3, 48, 70), (3, 9, 2, 64, 16), (5, 6, 2, 67, 37), (40, 3, 2, 80, 33), (70, 2, 1, 33, 65)]


@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, INT8), (F32, INT8)], ids=str)
def test_error_is_at_most_twice_that_of_torch(shape: tuple[int, ...], types: tuple[torch.dtype, torch.dtype]) -> None:
    case = build(*shape, types, gated=shape[0] != 5)
    check_error(case, run)
    assert torch.equal(case.of(run), case.of(run))


@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, INT8), (F32, INT8)], ids=str)
def test_a_gather_reads_the_rows_of_its_index_and_no_others(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Any number of each expert, none and all included, over one and several blocks of neurons and splits of them."""
    for tokens, experts, picked, d, f in ((1, 6, 3, 48, 300), (5, 6, 2, 67, 37), (40, 3, 2, 80, 130)):
        case = build(tokens, experts, picked, d, f, types, tokens != 5, gather=True)
        check_error(case, run)
        want = case.of(run)
        invariant = run(case.x, case.experts, case.index, case.weights, batch_invariant=True)
        case.spoil_what_no_index_names()
        assert torch.equal(case.of(run), want)
        one = case.change(x=case.x[-1:], index=case.index[-1:], weights=case.weights[-1:])
        alone = run(one.x, one.experts, one.index, one.weights, batch_invariant=True)
        assert torch.equal(alone[0], invariant[-1])


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for gated in (False, True):
        check_error(build(4, 3, 2, 48, 33, (BF16, BF16), gated, activation), run)


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_ragged_groups(tokens: int) -> None:
    """An expert that all tokens name, and nobody else; one expert twice; ones that nobody names hold NaN."""
    case = build(tokens, 8, 3, 48, 40, (F16, F16), among=3)
    case.experts.rows[:5] = float("nan")
    check_error(case, run)
    check_error(case.change(index=torch.full_like(case.index, 7)), run)
    uneven = case.index.clone()
    uneven[: tokens * 3 // 4] = 6
    check_error(case.change(index=uneven), run)


@pytest.mark.parametrize("most", [16, 4096])
@pytest.mark.parametrize("block_m", [16, 64])
def test_the_table_has_every_pair_once_and_nothing_else(
    most: int, block_m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of numbers that name no expert, and of more pairs than a program looks at together."""
    monkeypatch.setattr(routing, "_MOST_PAIRS", most)
    generator = torch.Generator().manual_seed(block_m)
    for pairs, experts in itertools.product((1, 15, 64, 150), (1, 5, 40)):
        skewed = torch.rand(pairs, generator=generator).square()
        index = (skewed * (experts + 4)).long() - 2
        index[::7] = 2**40
        launch, order, table = routing.route(index.to(DEVICE), experts, block_m)
        launch.run()
        tiles = [row for row in table.cpu().tolist() if row[2]]
        assert all(0 < size <= block_m for _, _, size in tiles)
        found: dict[int, list[int]] = {}
        for expert, first, size in tiles:
            found.setdefault(expert, []).extend(order[first : first + size].tolist())
        named = [e for e in range(experts) if (index == e).any()]
        assert found == {e: (index == e).nonzero().flatten().tolist() for e in named}
        counts = [(index == e).sum().item() for e in named]
        assert len(tiles) == sum(-(-n // block_m) for n in counts)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_number_that_names_no_expert_makes_its_token_nan(tokens: int) -> None:
    case = build(tokens, 5, 2, 48, 40, (BF16, BF16))
    want = case.of(run)
    for number in (-1, 5, 2**40):
        bad = case.index.clone()
        bad[tokens // 2, 1] = number
        got = case.change(index=bad).of(run)
        others = [t for t in range(tokens) if t != tokens // 2]
        assert got[tokens // 2].isnan().all() and torch.equal(got[others], want[others])


def test_nan_and_infinity_go_where_they_do_in_torch() -> None:
    for special, tokens in itertools.product((float("nan"), float("inf")), (1, 20)):
        for where in WHERE:
            case = build(tokens, 5, 2, 48, 40, (F16, F16))
            spoil(case, where, special)
            want, got = exact(case), case.of(run)
            assert torch.equal(got.isfinite(), want.isfinite())


@pytest.mark.parametrize("types", [(BF16, BF16), (F16, INT8)], ids=str)
def test_batch_invariant_rows_do_not_see_each_other(types: tuple[torch.dtype, torch.dtype]) -> None:
    case = build(70, 4, 2, 64, 80, types)
    check_error(case, lambda *given: run(*given, batch_invariant=True))
    whole = run(case.x, case.experts, case.index, case.weights, batch_invariant=True)
    for some in ([3], [69, 1], list(range(20))):
        part = case.change(x=case.x[some], index=case.index[some], weights=case.weights[some])
        assert torch.equal(run(part.x, part.experts, part.index, part.weights, batch_invariant=True), whole[some])


def test_nothing_around_operands_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lie apart, within experts that do; every dtype of routing; tokens in several rounds."""
    case = build(9, 5, 2, 48, 21, (F16, F16))
    want, rows = case.of(run), case.experts.rows
    apart = torch.full((5, 30, 160), float("nan"), dtype=F16, device=DEVICE)
    apart[:, :21, :144] = rows
    moved = Experts.unchecked(apart[:, :21, :144], True, "silu")
    wide = torch.full((9, 100), float("nan"), dtype=F16, device=DEVICE)
    wide[:, :48] = case.x
    turned = case.change(experts=moved, x=wide[:, :48], index=case.index.int().t().contiguous().t())
    assert torch.equal(turned.of(run), want)
    assert torch.equal(case.change(weights=case.weights.double()).of(run), want)
    monkeypatch.setattr(LAUNCHER, "_MOST_TOKENS", 4)
    torch.testing.assert_close(case.of(run), want, rtol=1e-2, atol=1e-3)


def test_addresses_beyond_32_bits() -> None:
    """Of 2^31 elements and more between experts, of which only what is used is ever touched."""
    experts, f, width, apart = 2, 20, 2 * 32, (1 << 31) + 64
    numbers = EMPTY(apart + f * width, dtype=F16, device=DEVICE)
    rows = numbers.as_strided((experts, f, width), (apart, width, 1))
    case = build(3, experts, 1, 32, f, (F16, F16), gated=False)
    rows.copy_(case.experts.rows)
    index = torch.tensor([[1], [0], [1]], device=DEVICE)
    far = case.change(experts=Experts.unchecked(rows, False, "silu"), index=index)
    assert torch.equal(far.of(run), case.change(index=index).of(run))


def test_without_tokens_choices_or_neurons_nothing_is_launched() -> None:
    for tokens, picked, f in ((0, 2, 5), (3, 0, 5), (3, 2, 0)):
        case = build(tokens, 4, picked, 16, f)
        assert torch.equal(case.of(run), torch.zeros(tokens, 16, device=DEVICE))


KEPT, COUNTS = torch.tensor([[0, 2]] * 4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "swish"}, "activation must be one of gelu"),
    "x of float64": ({"x": torch.zeros(5, 24).double()}, "x must be float32, float16 or bfloat16; got torch.float64"),
    "x flat": ({"x": torch.zeros(24)}, "x must have shape [T, D] of at least one channel; got (24,)"),
    "rows too narrow": ({"rows": torch.zeros(4, 6, 71)}, "rows must have shape [E, F, 3*24]; got (4, 6, 71)"),
    "rows of none": ({"rows": torch.zeros(0, 6, 72)}, "rows must have shape [E, F, 3*24]; got (0, 6, 72)"),
    "rows turned": ({"rows": torch.zeros(4, 72, 6).mT}, "rows must have contiguous rows that do not overlap"),
    "rows of bytes": ({"rows": torch.zeros(4, 6, 72).char()}, "rows must be torch.float32, or int8 with scales"),
    "scales of floats": ({"scales": torch.ones(4, 6, 3)}, "rows must be torch.int8 with scales; got torch.float32"),
    "index of floats": ({"index": torch.zeros(5, 2)}, "index must be int64 or int32; got torch.float32"),
    "index too short": ({"index": torch.zeros(4, 2).long()}, "index must have shape [5, K]; got (4, 2)"),
    "weights too few": ({"weights": torch.ones(5, 1)}, "weights must have shape (5, 2), as index has; got (5, 1)"),
    "weights of integers": ({"weights": torch.ones(5, 2).long()}, "weights must be floating point; got torch.int64"),
    "kept without counts": ({"kept": KEPT}, "counts must be given with kept, and there alone; got None"),
    "kept of three experts": ({"kept": KEPT[:3], "counts": COUNTS}, "kept must have shape [4, K]; got (3, 2)"),
    "kept of int64": ({"kept": KEPT.long(), "counts": COUNTS}, "kept must be torch.int32; got torch.int64"),
    "counts too few": ({"kept": KEPT, "counts": COUNTS[:3]}, "counts must have shape (4,); got (3,)"),
    "two heights": (
        {
            "config": kernels.PrefillConfig(
                kernels.TileConfig(16, 64, 16, 4, 2), kernels.TileConfig(32, 64, 16, 4, 2), 8
            )
        },
        "config must have as many tokens in both tiles; got (16, 32)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_operands_are_refused_by_name(name: str) -> None:
    changes, message = BAD[name]
    given = {
        "x": torch.zeros(5, 24),
        "rows": torch.zeros(4, 6, 72),
        "index": torch.zeros(5, 2, dtype=torch.int64),
        "weights": torch.ones(5, 2),
        "gated": True,
        "activation": "silu",
        **changes,
    }
    placed = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in given.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.moe(**placed)


def test_tiles_fit_everywhere_and_agree() -> None:
    mixtures = ((8, 64, 1024, 2048), (8, 128, 384, 2048), (2, 8, 14336, 4096))
    sizes = itertools.product((1, 2, 16, 100, 256, 4096), mixtures)
    forms = itertools.product(((F32, False), (BF16, False), (F16, True)), (False, True), (False, True), (False, True))
    for (tokens, (k, e, f, d)), ((dtype, int8), gated, aligned, invariant) in itertools.product(sizes, forms):
        for architecture in (75, 80, 86, 90, 100, 120):
            given = (tokens, k, e, f, d, dtype, gated, aligned)
            config = experts_config(*given, invariant, int8, architecture)
            found = [config] if invariant or int8 else experts_candidates(*given, architecture)
            assert found[0] == config
            for one in found:
                assert defaults.fits(one, gated, False, dtype, architecture)
                assert one.hidden.block_m == one.down.block_m <= 128
                whole = max(one.hidden.block_n, one.down.block_k)
                assert whole % one.hidden.block_n == whole % one.down.block_k == 0


@pytest.mark.parametrize(("dtype", "aligned", "int8"), [(BF16, True, False), (F32, True, False), (F16, False, True)])
def test_under_batch_invariance_only_pairs_and_stages_follow_the_tokens(
    dtype: torch.dtype, aligned: bool, int8: bool
) -> None:
    def same(config: kernels.PrefillConfig) -> tuple[int, ...]:
        up, down = config.hidden, config.down
        tiles = (up.block_n, up.block_k, up.num_warps, down.block_n, down.block_k, down.num_warps)
        return (*tiles, config.splits)

    given = (8, 64, 1024, 2048, dtype, True, aligned, True, int8)
    assert len({same(experts_config(tokens, *given)) for tokens in (1, 2, 15, 16, 33, 64, 200, 5000)}) == 1


# --- the operator, and PrunedMoE


def bank(model: Any) -> Any:
    return accelerate_experts.banks_of(find_ffns(model))[0]


def test_the_operator_by_triton() -> None:
    case = build(6, 4, 2, 48, 40)
    for invariant in (False, True):
        out = moe(case.x, case.experts, case.index, case.weights, backend="triton", batch_invariant=invariant)
        torch.testing.assert_close(out, case.of(moe), rtol=1e-4, atol=1e-5)
    e = case.experts
    given = case.of(arguments, "triton")
    torch.library.opcheck(MOE, given, test_utils=("test_schema", "test_faketensor"))
    bad = case.index.clone()
    bad[2, 1] = 4
    if DEVICE == "cpu":
        with pytest.raises(InputError, match=r"index must name experts in \[0, 4\); got \(0, 4\)"):
            moe(case.x, e, bad, case.weights, backend="triton")
    else:
        assert moe(case.x, e, bad, case.weights, backend="triton").isnan().any(1).nonzero().tolist() == [[2]]
    narrow = Experts.unchecked(e.rows.bfloat16(), True, "silu")
    with pytest.raises(BackendError, match=r"triton: no kernel for torch\.bfloat16 weights beside x of torch\.float32"):
        moe(case.x, narrow, case.index, case.weights, backend="triton")


def test_a_forced_backend_is_used_or_refused(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_mixture("qwen3_moe")
    with torch.no_grad():
        want = model(ids).logits.to(DEVICE)
        accelerate(model.to(DEVICE), backend="triton")
        module = next(m for m in model.modules() if isinstance(m, PrunedMoE))
        assert module.backend == "triton"
        torch.testing.assert_close(model(ids.to(DEVICE)).logits, want, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(kernels, "why_unavailable", lambda device: "needs a CUDA device")
    assert why_no_kernel(DEVICE, F32, F32, "triton") == "needs a CUDA device"
    with torch.no_grad(), pytest.raises(BackendError, match="triton: needs a CUDA device"):
        model(ids.to(DEVICE))


def test_auto_takes_it_on_a_gpu_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of a record that says it is on a GPU, where the operator chooses; natively it is."""
    module = PrunedMoE.from_bank(bank(make_mixture("mixtral"))).to(DEVICE)
    seen = []
    real = MOE

    def spy(*args: Any) -> Tensor:
        seen.append(args[9])
        return real(*args)

    monkeypatch.setattr("pyprune.ffn.moe.MOE", spy)
    monkeypatch.setattr("pyprune.ffn.moe.kernel_on", lambda device: "triton")
    monkeypatch.setattr(moe_choice, "kernel_on", lambda device: "triton")
    reasons = iter([None, "no Triton here"])
    monkeypatch.setattr(moe_choice, "why_no_kernel", lambda *args: next(reasons))
    call = torch.randn(3, 32, device=DEVICE), torch.tensor([[0, 1]] * 3, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    for wanted in ("auto", "torch"):
        module._set_dtype(F32)
        assert module.native_pairs == (moe_choice.ALL if wanted == "auto" else 0)
        with torch.no_grad():
            module(*call)
        assert seen[-1] == wanted


def test_what_tune_found_best_is_what_calls_take(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations are timed, the best is stored, and calls of as many tokens run by it; others by their own."""
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path))
    tuned.reload()
    case = build(4, 4, 2, 64, 64, (BF16, BF16), gather=True)
    offered = triton.expert_configs(Problem.of_experts(case.experts, BF16, 2, 4, DEVICE))
    assert len(offered) > 2
    monkeypatch.setattr(triton, "expert_configs", lambda problem: [offered[0], offered[2]])
    problem = Problem.of_experts(case.experts, BF16, 2, 3, DEVICE)
    assert tuned.key(problem) == "experts 2 of 4 D64 K64 M4 bfloat16 bfloat16-weights gated gather silu"
    effort = contest.Effort(rounds=(1, 1), sample=1e-4, problem=1e-3)
    (one,) = tune.tune([problem], effort=effort).tuned
    by_name = {entry.backend: entry for entry in one.entries}
    assert dict(by_name["triton"].config) in (offered[0], offered[2]) and one.refused == []
    json.dumps(one.to_json())
    best = tuned.Entry("triton", offered[2], 1e-6)
    gone = tuned.Entry("no such kernel", {}, 1e-9)
    tuned.store(DEVICE, {tuned.key(problem): [gone, best]})
    tuned.reload()
    seen, real = [], kernels.moe

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(options["config"])
        return real(*args, **options)

    monkeypatch.setattr(kernels, "moe", spy)
    some = case.change(x=case.x[:3], index=case.index[:3], weights=case.weights[:3])
    chosen = kernels.from_json(offered[2])
    for given, backend, invariant, want in (
        (some, "triton", False, chosen),
        (some, "auto", False, chosen),
        (some, "triton", True, None),
        (case.change(x=case.x[:1], index=case.index[:1], weights=case.weights[:1]), "triton", False, None),
    ):
        out = MOE(*given.of(arguments, backend, invariant))
        assert seen[-1] == want
        torch.testing.assert_close(out, given.of(moe), rtol=2e-2, atol=2e-2)
    monkeypatch.undo()
    tuned.reload()


@native
@torch.no_grad()
def test_graphs_and_compilers_take_it_and_nothing_waits() -> None:
    model = accelerate(make_mixture("qwen3_moe").bfloat16().cuda())
    module = next(m for m in model.modules() if isinstance(m, PrunedMoE))
    assert module.backend == "auto" and module.native_pairs == moe_choice.ALL
    warmup(model, (1, 40))
    whole = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 40):
        x = torch.randn(tokens, 32, device="cuda", dtype=BF16)
        index = torch.rand(tokens, 4, device="cuda").argsort(1)[:, :2]
        weights = torch.rand(tokens, 2, device="cuda", dtype=BF16)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            want = module(x, index, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(whole(x, index, weights), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, index, weights)
        # Another routing at the same places: what is computed follows what they hold at the replay.
        x.normal_()
        index.copy_(index.flip(0).roll(1, 1))
        weights.uniform_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, module(x, index, weights))


@native
@torch.no_grad()
def test_sizes_of_real_mixtures() -> None:
    """As they are measured, with fewer experts: every kind of tile, with 16, 32, 64 and 128 pairs."""
    for tokens, experts, f in ((1, 8, 1024), (4, 16, 512), (16, 16, 384), (24, 16, 256), (64, 16, 256), (999, 16, 512)):
        check_error(build(tokens, experts, 8, 2048, f, (BF16, BF16)), run)
