"""Every backend on a GPU against float64, and what only a GPU can show: graphs, streams, no waiting for the host.

What has a meaning on a CPU also runs there, by the backends that need no GPU, so that the tests themselves are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import KeepIndex, PrunedMLP, accelerate
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn import dispatch, ops
from pyprune.ffn.backends import Problem
from pyprune.ffn.quantisation import widened
from pyprune.model.patterns import PATTERNS

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
ON_CPU, ON_GPU = ("torch", "cpu"), ("torch", "triton", "cuda", "cublas")
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, INT8)]
FORMS = ("compact", "gather", "prefix")
TOKENS = (*range(1, 9), 16, 64, 300)
ODD = [(1, 1, 1), (1, 7, 3), (3, 1, 7), (2, 13, 31), (5, 129, 65), (17, 33, 257), (1, 300, 1028), (70, 65, 130)]
# Of one version to the next of torch, sums differ in their order.
FLOOR = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}

needs_gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def places(*more: str) -> pytest.MarkDecorator:
    """`device` and `backend`: those of a CPU, which need no GPU, and all that a GPU has."""
    found = [pytest.param("cpu", name, id=f"cpu-{name}") for name in (*more, *ON_CPU)]
    found += [pytest.param("cuda", name, marks=needs_gpu, id=f"cuda-{name}") for name in (*more, *ON_GPU)]
    return pytest.mark.parametrize(("device", "backend"), found)


devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


@dataclass(frozen=True)
class Layer:
    """Operands of one call."""

    x: Tensor
    record: Tensor
    scales: Tensor | None
    neuron_bias: Tensor | None
    down_bias: Tensor | None
    gated: bool
    activation: str
    keep: KeepIndex | None = None

    @property
    def own(self) -> Record:
        """Its record."""
        index = None if self.keep is None else self.keep.neurons.to(self.x.device)
        return Record(self.record, self.gated, self.activation, self.scales, self.neuron_bias, self.down_bias, index)

    def problem(self) -> Problem:
        return Problem.of(self.own, self.x.dtype, len(self.x))

    def run(self, backend: str) -> Tensor:
        return ops.ffn(self.x, self.own, backend=backend)

    def exact(self) -> Tensor:
        """In float64."""
        return reference.ffn(self.x.double(), widened(self.own))

    def module(self, backend: str = "auto", batch_invariant: bool = False) -> PrunedMLP:
        pattern = next(p for p in PATTERNS if p.gated == self.gated and not (p.in_layer or p.fused))
        how: dict[str, Any] = {"backend": backend, "batch_invariant": batch_invariant}
        return PrunedMLP(self.own, pattern=pattern, dtype=self.x.dtype, **how).requires_grad_(False)


def layer(
    device: str,
    m: int,
    f: int = 352,
    d: int = 256,
    *,
    dtype: torch.dtype = F32,
    weights: torch.dtype | None = None,
    gated: bool = True,
    form: str = "compact",
    activation: str = "",
    bias: bool = True,
) -> Layer:
    """Operands of which activations are near 1."""
    generator, parts = torch.Generator().manual_seed(7), 3 if gated else 2
    weights = weights or dtype

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    if weights == INT8:
        record = torch.randint(-127, 128, (f, parts * d), generator=generator).to(device, INT8)
        scales = (torch.rand(f, parts, generator=generator) + 0.5).to(device) * d**-0.5 / 100
    else:
        record, scales = normal(f, parts * d, scale=d**-0.5), None
    keep = None
    if form == "gather":
        keep = KeepIndex.from_scores(torch.rand(f, generator=generator), (f + 1) // 2)
    rows = max(1, f // 2) if form == "prefix" else f  # the first rows of a longer record
    record, scales = record[:rows], None if scales is None else scales[:rows]
    biases = (normal(f, parts - 1)[:rows], normal(d)) if bias else (None, None)
    chosen = activation or ("silu" if gated else "gelu_tanh")
    return Layer(normal(m, d), record, scales, *biases, gated, chosen, keep)


def usable(given: Layer, backend: str) -> None:
    """Skip, with the reason, what a backend does not do here."""
    reason = dispatch.backends()[backend].why_not(given.problem())
    if reason is not None:
        pytest.skip(reason)


def error(found: Tensor, exact: Tensor) -> float:
    value = float((found.double() - exact).norm() / exact.norm())
    return value if value == value else float("inf")


def same(found: Tensor, wanted: Tensor, backend: str) -> bool:
    """To the bit, but for cuBLAS, which may choose otherwise under capture or on another stream."""
    if backend in ("auto", "cublas"):
        return error(found, wanted.double()) < 1e-2
    return torch.equal(found, wanted)


def meets(given: Layer, found: Tensor, exact: Tensor | None = None) -> None:
    """Twice the error of torch in the same dtype is allowed, and no more."""
    exact = given.exact() if exact is None else exact
    assert found.shape == given.x.shape and found.dtype == given.x.dtype and found.device == given.x.device
    allowed = 2 * max(error(given.run("torch"), exact), FLOOR[given.x.dtype] / 2)
    assert error(found, exact) <= allowed


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda p: f"{p[0]}-{p[1]}".replace("torch.", ""))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [False, True])
@places()
def test_float64_is_met(
    device: str, backend: str, gated: bool, form: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    dtype, weights = dtypes
    tried = 0
    for m in TOKENS if device == "cuda" else (1, 3, 16):
        given = layer(device, m, dtype=dtype, weights=weights, gated=gated, form=form)
        if m == TOKENS[0]:
            usable(given, backend)
        elif dispatch.backends()[backend].why_not(given.problem()) is not None:
            continue
        meets(given, given.run(backend))
        tried += 1
    assert tried


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@places()
def test_every_activation(device: str, backend: str, activation: str) -> None:
    for m in (1, 20):
        for gated in (False, True):
            given = layer(device, m, 96, 64, dtype=F32, gated=gated, activation=activation, bias=False)
            usable(given, backend)
            meets(given, given.run(backend))


@pytest.mark.parametrize("shape", ODD, ids=str)
@places()
def test_odd_shapes(device: str, backend: str, shape: tuple[int, int, int]) -> None:
    for gated in (False, True):
        for form in ("compact", "gather"):
            given = layer(device, *shape, dtype=BF16 if device == "cuda" else F32, gated=gated, form=form)
            usable(given, backend)
            meets(given, given.run(backend))


def _unaligned(tensor: Tensor | None) -> Tensor | None:
    """The same numbers one element behind an aligned address."""
    if tensor is None:
        return None
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("weights", [None, INT8])
@pytest.mark.parametrize("m", [1, 5, 40])
@places()
def test_unaligned_addresses(device: str, backend: str, m: int, weights: torch.dtype | None) -> None:
    given = layer(device, m, 96, 64, dtype=BF16, weights=weights, form="gather")
    usable(given, backend)
    names = ("x", "record", "scales", "neuron_bias", "down_bias")
    shifted = replace(given, **{name: _unaligned(getattr(given, name)) for name in names})
    meets(given, shifted.run(backend))


@pytest.mark.parametrize("m", [1, 4, 16, 64])
@places("auto")
def test_runs_repeat_to_the_bit(device: str, backend: str, m: int) -> None:
    given = layer(device, m, 700, dtype=BF16, form="gather")
    if backend != "auto":
        usable(given, backend)
    first = given.run(backend)
    assert all(torch.equal(given.run(backend), first) for _ in range(20))


@pytest.mark.parametrize("gather", [False, True])
@places("auto")
def test_batch_invariance(device: str, backend: str, gather: bool) -> None:
    given = layer(device, 70, dtype=BF16, form="gather" if gather else "compact")
    if backend != "auto":
        usable(given, backend)
        reason = dispatch.backends()[backend].why_not(replace(given.problem(), batch_invariant=True))
        if reason is not None:
            pytest.skip(reason)
    module = given.module(backend, batch_invariant=True)
    alone = torch.cat([module(given.x[i : i + 1]) for i in range(70)])
    for m in (2, 5, 8, 16, 33, 70):
        assert torch.equal(module(given.x[:m]), alone[:m])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Whatever torch allocates, in Python or C++, holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("form", ["compact", "gather"])
@places()
def test_nothing_unwritten_is_read(device: str, backend: str, form: str, poisoned: None) -> None:
    assert bool(torch.empty(8, device=device).isnan().all())
    for m, f, d in ((1, 352, 256), (4, 33, 40), (8, 129, 72), (17, 65, 96), (80, 100, 64)):
        given = layer(device, m, f, d, dtype=BF16, form=form)
        usable(given, backend)
        meets(given, given.run(backend))


# --- what only a GPU has


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("m", [1, 4])
def test_a_call_waits_for_nothing(backend: str, m: int) -> None:
    given = layer("cuda", m, 200, 64, dtype=BF16, form="gather")
    if backend != "auto":
        usable(given, backend)
    module = given.module(backend)
    module(given.x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = module(given.x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    meets(given, found)


@needs_gpu
@pytest.mark.parametrize("form", ["compact", "gather"])
@pytest.mark.parametrize("m", [1, 4, 16, 64, 300])
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda", "cublas"])
def test_a_graph_replays_on_new_input(backend: str, m: int, form: str) -> None:
    given = layer("cuda", m, dtype=BF16, form=form)
    if backend != "auto":
        usable(given, backend)
    module = given.module(backend)
    module(given.x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(given.x)
    for _ in range(3):
        given.x.normal_()
        graph.replay()
        assert same(out, module(given.x), backend)


@needs_gpu
@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("backend", ["triton", "cuda", "cublas"])
def test_the_current_stream_is_used(backend: str, m: int) -> None:
    given = layer("cuda", m, dtype=BF16)
    usable(given, backend)
    module = given.module(backend)
    wanted = module(given.x)
    x = given.x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        given.x.zero_()
        torch.cuda._sleep(20_000_000)  # what ran on another stream would see the zeros
        given.x.copy_(x)
        found = module(given.x)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(found, wanted, backend)


@needs_gpu
@pytest.mark.parametrize("form", ["compact", "gather"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_every_plan_of_the_cuda_kernels(m: int, gated: bool, form: str) -> None:
    """All that `pyprune tune` and the bench try, and bulk copies with every ring, where the device has them."""
    cuda = dispatch.backends()["cuda"]
    for weights, f, d in ((None, 352, 256), (INT8, 700, 1040)):
        given = layer("cuda", m, f, d, dtype=BF16, weights=weights, gated=gated, form=form)
        usable(given, "cuda")
        plans = [dict(config) for config in cuda.candidate_configs(given.problem())]
        if m <= 4 and torch.cuda.get_device_capability()[0] >= 9:
            rings = ({"step": step, "stages": stages} for step in (1, 2) for stages in (2, 3, 6))
            plans += [{"algorithm": "single_pass", "bulk": True, "teams": 1, **ring} for ring in rings]
        for plan in plans:
            meets(given, cuda.run(given.x, given.own, plan))


DEPENDENT = (
    {"algorithm": "single_pass", "overlap": True},
    {"algorithm": "single_pass", "overlap": True, "early": True},
    {"algorithm": "single_pass", "overlap": True, "early": True, "bulk": True},
    {"algorithm": "two_pass", "overlap": True},
)


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("plan", DEPENDENT, ids=str)
def test_kernels_that_begin_before_the_one_before_has_ended(plan: dict[str, Any], captured: bool) -> None:
    """Two layers in turn, 200 calls back to back, each on what the one before gives and over the same scratch memory,
    are bitwise one call after another.
    """
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("dependent launch needs compute capability 9.0")
    cuda = dispatch.backends()["cuda"]
    # A small layer, whose blocks share a multiprocessor with the next kernel's, and one that fills it.
    for f, d in ((1536, 768), (5504, 2048)):
        layers = [layer("cuda", 2, f, d, dtype=BF16, bias=False).own] * 2
        layers[1] = replace(layers[1], rows=layers[1].rows.flip(0).contiguous())
        starts = [torch.randn(2, d, device="cuda", dtype=BF16) for _ in range(50)]

        def all_calls(config: dict[str, Any], wait: bool) -> list[Tensor]:
            outs = []
            for x in starts:  # noqa: B023 - called at once
                for step in range(4):
                    x = cuda.run(x, layers[step % 2], config)  # noqa: B023
                    outs.append(x)
                    if wait:
                        torch.cuda.synchronize()
            return outs

        alone = {"algorithm": plan["algorithm"]}
        wanted = all_calls(alone, wait=True)
        assert all(bool(out.isfinite().all()) for out in wanted) and bool(wanted[-1].any())
        if not captured:
            found = all_calls(plan, wait=False)
        else:
            all_calls(plan, wait=False)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = all_calls(plan, wait=False)
            for _ in range(3):
                graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@needs_gpu
def test_what_doctor_says_of_the_device_is_what_the_library_plans() -> None:
    given = layer("cuda", 1, 352, 4096, dtype=BF16)
    usable(given, "cuda")
    planned = dispatch.backends()["cuda"].default_config(given.problem())
    clusters = torch.cuda.get_device_capability()[0] >= 9
    assert (planned["algorithm"] == "single_pass") == clusters and (int(planned.get("cluster", 1)) > 1) == clusters


@devices
@pytest.mark.parametrize("m", [1, 20])
def test_compiled_without_a_break(device: str, m: int) -> None:
    given = layer(device, m, 96, 64, form="gather")
    module = given.module()
    run = torch.compile(module, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    with torch.no_grad():
        assert torch.allclose(run(given.x), module(given.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("device", "compiled"),
    [("cpu", False), *(pytest.param("cuda", c, marks=needs_gpu) for c in (False, True))],
)
def test_generate_with_a_static_cache(device: str, compiled: bool, tiny: Callable[..., Any], ids: Tensor) -> None:
    model = tiny("llama").to(device)
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    prompt = ids[:1].to(device)
    dense = model.generate(prompt, **settings, disable_compile=True)
    fast = accelerate(model).generate(prompt, **settings, disable_compile=not compiled)
    assert torch.equal(dense, fast)


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "cublas"])
def test_the_device_of_the_tensors_is_used(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    given = layer("cuda:1", 2, dtype=BF16)
    usable(given, backend)
    meets(given, given.run(backend))


@pytest.mark.parametrize("weights", [None, INT8])
@places()
def test_sanitized_calls(device: str, backend: str, weights: torch.dtype | None) -> None:
    """Few and small: `make gpu` runs these under a memory checker."""
    for m, f, d in ((1, 33, 72), (4, 40, 136), (20, 17, 64)):
        for gated in (False, True):
            for form in FORMS:
                given = layer(device, m, f, d, dtype=BF16, weights=weights, gated=gated, form=form)
                usable(given, backend)
                assert bool(given.run(backend).isfinite().all())
