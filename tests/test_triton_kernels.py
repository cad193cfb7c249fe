"""The Triton FFN kernels against float64, on a GPU (`-m gpu`) or in Triton's interpreter where there is none."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from triton_cases import PATHS, twin

from pyprune import triton_kernels as kernels
from pyprune.base import reference
from pyprune.triton_kernels import tile
from pyprune.triton_kernels.activations import round_like

if not kernels.INTERPRETED and not torch.cuda.is_available():
    raise RuntimeError("the kernels were imported before TRITON_INTERPRET=1 was set: no test here would run")

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Fill what the launchers allocate with NaN; the shapes they asked for."""
    asked = []
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        tensor = empty(*args, **options)
        if tensor.is_floating_point():
            asked.append(tuple(tensor.shape))
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    return asked


def problem(
    m: int,
    f: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = False,
    activation: str = "gelu",
    gather: bool = False,
    neuron_bias: bool = True,
    down_bias: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ffn`: weights of the size that keeps activations near 1; every other row or so is gathered."""
    generator = torch.Generator().manual_seed(seed)
    parts = 3 if gated else 2

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)

    kept = torch.randperm(f, generator=generator)[: (f + 1) // 2].sort().values
    return {
        "x": normal(m, d),
        "record": normal(f, parts * d, scale=d**-0.5),
        "gated": gated,
        "activation": activation,
        "neuron_bias": normal(f, parts - 1, scale=0.5) if neuron_bias else None,
        "down_bias": normal(d) if down_bias else None,
        "index": kept.int().to(DEVICE) if gather else None,
    }


def check(out: Tensor, p: dict[str, Any]) -> None:
    """Largest and mean square error: at most twice torch's own, or a few units in the last place of the output."""
    dtype = p["x"].dtype
    assert out.shape == p["x"].shape
    assert out.dtype == dtype
    if out.numel() == 0:
        return
    truth = twin(p, torch.float64)
    error = (out.double() - truth).abs()
    torch_error = (twin(p, dtype).double() - truth).abs()
    # Rounding the output alone costs half a unit; float32 may also lose some in the activation, and more of them where
    # exp and erf are a GPU's own (up to 6.7 units seen on an H200, with one channel or one neuron).
    units = 1 if dtype != torch.float32 else 8 if out.is_cuda else 4
    floor = truth.abs().max() * torch.finfo(dtype).eps * units
    allowed = torch.maximum(2 * torch_error.max(), floor)
    worst = error.nan_to_num(float("inf")).argmax().item()
    assert error.max() <= allowed, (
        f"error {error.max():.3g} > {allowed:.3g} at {divmod(worst, out.shape[-1])}: "
        f"got {out.flatten()[worst]}, want {truth.flatten()[worst]}"
    )
    rms, allowed_rms = error.square().mean().sqrt(), torch.maximum(2 * torch_error.square().mean().sqrt(), floor / 2)
    assert rms <= allowed_rms, f"rms error {rms:.3g} > {allowed_rms:.3g}"


def pairwise(**factors: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Cases that hold every pair of values of every two factors, greedily few."""
    names = list(factors)
    missing = {
        ((a, x), (b, y)): None for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in (n for n in names if n not in case):
            chosen = list(case.items())
            case[name] = max(
                factors[name],
                key=lambda v, n=name, c=chosen: sum(((n, v), o) in missing or (o, (n, v)) in missing for o in c),
            )
        for pair in itertools.combinations([(name, case[name]) for name in names], 2):
            missing.pop(pair, None)
        cases.append(case)
    return cases


CASES = pairwise(
    m=(0, 1, 2, 7, 16, 33, 70),
    f=(1, 7, 63, 65, 127, 260),
    d=(1, 7, 63, 65, 127, 260),
    path=tuple(PATHS),
    dtype=DTYPES,
    activation=kernels.ACTIVATIONS,
    gated=(False, True),
    gather=(False, True),
    neuron_bias=(False, True),
    down_bias=(False, True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c.values()))
def test_odd_shapes_and_every_pair_of_options(case: dict[str, Any]) -> None:
    options = dict(case)
    ffn = PATHS[options.pop("path")]
    p = problem(**options)
    check(ffn(**p), p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("gather", [False, True], ids=["compact", "gather"])
def test_every_branch(path: str, activation: str, gated: bool, gather: bool) -> None:
    p = problem(3, 65, 63, gated=gated, activation=activation, gather=gather, seed=1)
    check(PATHS[path](**p), p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 192])
def test_aligned_widths(path: str, dtype: torch.dtype, d: int) -> None:
    p = problem(5, 130, d, dtype, gated=True, activation="silu", gather=True, seed=2)
    check(PATHS[path](**p), p)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20),
    f=st.integers(1, 80),
    d=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(sorted(PATHS)),
    activation=st.sampled_from(kernels.ACTIVATIONS),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 99),
)
def test_any_shape(
    m: int, f: int, d: int, dtype: torch.dtype, path: str, activation: str, flags: tuple[bool, ...], seed: int
) -> None:
    names = ("gated", "gather", "neuron_bias", "down_bias")
    p = problem(m, f, d, dtype, activation=activation, seed=seed, **dict(zip(names, flags, strict=True)))
    check(PATHS[path](**p), p)


def test_ffn_takes_decode_for_few_tokens_and_prefill_for_many() -> None:
    few = problem(kernels.DECODE_MAX_TOKENS, 21, 17)
    assert torch.equal(kernels.ffn(**few), PATHS["decode"](**few))
    many = problem(kernels.DECODE_MAX_TOKENS + 1, 21, 17)
    assert torch.equal(kernels.ffn(**many), PATHS["prefill"](**many))


def test_launchers_allocate_through_the_poisoned_function(poison: list[tuple[int, ...]]) -> None:
    p = problem(3, 40, 33)
    poison.clear()
    PATHS["decode"](**p)
    assert poison == [(3, 33), (3, 3, 33)]
    poison.clear()
    PATHS["prefill"](**p)
    assert poison == [(3, 33), (3, 64)]
    poison.clear()
    PATHS["prefill"](**problem(3, 400, 33))
    assert poison == [(3, 33), (3, 448), (8, 3, 33)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [False, True], ids=["no_rows", "empty_index"])
@pytest.mark.parametrize("down_bias", [False, True])
def test_no_neuron_leaves_the_bias(path: str, dtype: torch.dtype, gather: bool, down_bias: bool) -> None:
    p = problem(18, 9, 65, dtype, gated=True, gather=True, down_bias=down_bias)
    if gather:
        p["index"] = p["index"][:0]
    else:
        p.update(record=p["record"][:0], neuron_bias=p["neuron_bias"][:0], index=None)
    wanted = p["down_bias"] if down_bias else torch.zeros(65, dtype=dtype, device=DEVICE)
    assert torch.equal(PATHS[path](**p), wanted.expand(18, -1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
def test_no_token_gives_an_empty_result(path: str, shape: tuple[int, ...]) -> None:
    p = problem(1, 4, 5)
    empty = torch.zeros(shape, device=DEVICE)
    out = PATHS[path](**{**p, "x": empty})
    assert out.shape == shape


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_second_channel": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(1)[:, ::2],
    "slice_of_wider": lambda t: torch.cat([t, torch.full_like(t, float("nan"))], 1)[:, : t.shape[1]],
    "off_alignment": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    "every_second_token": lambda t: t.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_tokens_give_the_same_bits(path: str, view: str) -> None:
    p = problem(6, 21, 48)
    strided = {**p, "x": VIEWS[view](p["x"])}
    assert strided["x"].stride() != p["x"].stride()
    assert torch.equal(PATHS[path](**strided), PATHS[path](**p))


@pytest.mark.parametrize("path", PATHS)
def test_leading_dimensions_are_tokens(path: str) -> None:
    p = problem(6, 21, 17)
    flat = PATHS[path](**p)
    shaped = {**p, "x": p["x"].view(2, 3, 17)}
    assert torch.equal(PATHS[path](**shaped), flat.view(2, 3, 17))
    assert torch.equal(PATHS[path](**{**shaped, "x": shaped["x"].transpose(0, 1)}), flat.view(2, 3, 17).transpose(0, 1))
    vector = {**p, "x": p["x"][0]}
    check(PATHS[path](**vector), vector)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_rows_outside_the_index_and_padding_are_never_read(path: str, dtype: torch.dtype, gated: bool) -> None:
    p = problem(5, 40, 33, dtype, gated=gated, gather=True, seed=3)
    clean = PATHS[path](**p)
    nan = float("nan")
    record = torch.full((40, p["record"].shape[1] + 5), nan, dtype=dtype, device=DEVICE)
    bias = torch.full((40, p["neuron_bias"].shape[1] + 2), nan, dtype=dtype, device=DEVICE)
    kept = p["index"].long()
    record[kept, : p["record"].shape[1]] = p["record"][kept]
    bias[kept, : p["neuron_bias"].shape[1]] = p["neuron_bias"][kept]
    p["record"] = record[:, : p["record"].shape[1]]
    p["neuron_bias"] = bias[:, : p["neuron_bias"].shape[1]]
    assert torch.equal(PATHS[path](**p), clean)


# Every tensor, read or written, ends where a page begins that may not be touched.
GUARDED = """
import ctypes, mmap, torch
from triton_cases import PATHS

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
pages = []

def fenced(like):
    size = like.numel() * like.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages.append(mmap.mmap(-1, room + mmap.PAGESIZE))
    fence = ctypes.addressof(ctypes.c_char.from_buffer(pages[-1])) + room
    assert libc.mprotect(fence, mmap.PAGESIZE, 0) == 0
    if size == 0:
        return like
    flat = torch.frombuffer(pages[-1], dtype=like.dtype, count=like.numel(), offset=room - size)
    flat.copy_(like.flatten())
    return flat.view(like.shape)

empty = torch.empty
torch.empty = lambda *shape, **options: fenced(empty(*shape, **options))
for ffn in PATHS.values():
    for gated in (False, True):
        for d in (33, 48):
            parts = 3 if gated else 2
            index = torch.tensor([0, 3, 18, 19, 20], dtype=torch.int32)
            tensors = (torch.randn(s) for s in ((5, d), (21, parts * d), (21, parts - 1), (d,)))
            x, record, neuron_bias, down_bias = map(fenced, tensors)
            for kept in (None, fenced(index)):
                out = ffn(
                    x, record, gated=gated, activation="silu", neuron_bias=neuron_bias, down_bias=down_bias,
                    index=kept,
                )
                assert out.isfinite().all()
print(len(pages))
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton's interpreter; on a device compute-sanitizer does it")
def test_nothing_is_read_or_written_past_the_end_of_a_tensor(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", GUARDED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    assert int(done.stdout) > 60


def test_many_blocks_in_bands() -> None:
    p = problem(600, 250, 130, neuron_bias=False)
    check(PATHS["prefill"](**p), p)


@pytest.mark.parametrize("path", PATHS)
def test_the_index_may_repeat_and_be_strided(path: str) -> None:
    p = problem(4, 9, 12)
    wide = torch.tensor([8, 0, 0, 0, 8, 0, 3, 0], dtype=torch.int32, device=DEVICE)
    p["index"] = wide[::2]
    check(PATHS[path](**p), p)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_give_the_same_bits(path: str, dtype: torch.dtype) -> None:
    p = problem(9, 130, 65, dtype, gated=True, gather=True, activation="silu")
    assert torch.equal(PATHS[path](**p), PATHS[path](**p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_decoded_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, gated: bool) -> None:
    p = problem(70, 40, 33, dtype, gated=gated, activation="gelu_tanh")
    together = PATHS["decode"](**p)
    for rows in (slice(0, 1), slice(3, 5), slice(15, 18), slice(60, 70)):
        apart = {**p, "x": p["x"][rows]}
        assert torch.equal(PATHS["decode"](**apart), together[rows])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("path", PATHS)
def test_nan_and_infinity_stay_in_their_row(path: str) -> None:
    p = problem(5, 21, 17, activation="silu")
    clean = PATHS[path](**p)
    spoiled = p["x"].clone()
    spoiled[1], spoiled[3] = float("nan"), float("inf")
    out = PATHS[path](**{**p, "x": spoiled})
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gather", [False, True], ids=["compact", "gather"])
def test_padded_neurons_stay_silent_for_infinite_tokens(path: str, gather: bool) -> None:
    # Every kept neuron is switched off by minus infinity; an unguarded padding neuron would add 0 * infinity.
    p = problem(2, 21, 17, activation="relu", gather=gather, neuron_bias=False)
    p["record"] = p["record"].abs() + 0.1
    p["x"] = torch.full_like(p["x"], float("-inf"))
    assert torch.equal(PATHS[path](**p), p["down_bias"].expand(2, -1))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activation_over_its_whole_range(activation: str) -> None:
    # One neuron of one channel with unit weights: the result is the activation itself.
    small = torch.linspace(-12, 12, 121)
    large = torch.tensor([-1e30, -1e4, -104.0, -88.8, -30.0, 0.0, 1e-30, 1e-6, 30.0, 88.8, 104.0, 1e4, 1e30])
    z = torch.cat([small, large]).to(DEVICE)
    out = PATHS["prefill"](z[:, None], torch.ones(1, 2, device=DEVICE), gated=False, activation=activation)[:, 0]
    act = reference.ACTIVATIONS[activation]
    truth, mine = act(z.double()), act(z).double()
    finite = truth.abs() < torch.finfo(torch.float32).max
    # Relative to the argument, which bounds the result: tails that vanish need no relative accuracy.
    scale = torch.maximum(z.double().abs(), truth.abs())
    unit = torch.finfo(torch.float32).eps * scale
    error = (out.double() - truth).abs()
    allowed = 2 * (mine - truth).abs() + 2 * unit
    assert (error <= allowed)[finite].all(), (z[finite & (error > allowed)], out[finite & (error > allowed)])
    assert torch.equal(out[~finite].double(), mine[~finite])
    odd = torch.tensor([[float("nan")], [float("inf")]], device=DEVICE)
    out = PATHS["prefill"](odd, torch.ones(1, 2, device=DEVICE), gated=False, activation=activation)
    assert out[0].isnan()
    assert out[1] == float("inf")


@triton.jit
def _round_kernel(
    source,  # [N] float32
    target,  # out [N] float32
    N,  # number of values
    BLOCK: tl.constexpr,  # values of the program
):
    i = tl.arange(0, BLOCK)
    v = tl.load(source + i, mask=i < N, other=0.0)
    tl.store(target + i, round_like(v, tl.float32, True), mask=i < N)


def test_rounding_by_bits_is_the_rounding_of_bfloat16() -> None:
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0)).int()
    # Ties, their neighbours, the largest finite numbers, infinities, NaN, subnormal numbers, zeros.
    edges = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F817FFF,
        0x7F7FFFFF,
        0x7F7F7FFF,
        0x7F800000,
        0x7FC00000,
        1,
        0x8000,
        0,
    ]
    edges = torch.tensor(edges, dtype=torch.int64).int()
    source = torch.cat([bits, edges, edges | torch.tensor(-(2**31), dtype=torch.int32)]).view(torch.float32).to(DEVICE)
    target = torch.zeros_like(source)
    _round_kernel[(1,)](source, target, source.numel(), BLOCK=4096)
    wanted = source.bfloat16().float()
    assert torch.equal(target.isnan(), wanted.isnan())
    assert torch.equal(target[~wanted.isnan()].view(torch.int32), wanted[~wanted.isnan()].view(torch.int32))


@triton.jit
def _offset_kernel(
    index,  # [K] int32 or None
    stride,  # elements between rows
    target,  # out [K] int64
    K,  # number of rows
    BLOCK: tl.constexpr,  # rows of the program
):
    k = tl.arange(0, BLOCK)
    tl.store(target + k, tile.record_rows(index, k, K) * stride, mask=k < K)


@pytest.mark.parametrize("gather", [False, True], ids=["compact", "gather"])
def test_record_offsets_pass_two_to_the_31(gather: bool) -> None:
    rows = torch.tensor([0, 2, 5, 2**20] if gather else [0, 1, 2, 3], dtype=torch.int32, device=DEVICE)
    target = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    stride = 2**30 + 7
    _offset_kernel[(1,)](rows if gather else None, stride, target, 4, BLOCK=16)
    assert target.tolist() == [row * stride for row in rows.tolist()]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "gelu_new"}, r"activation must be one of gelu, .*; got gelu_new"),
    "x_dtype": ({"x": torch.zeros(3, 8, dtype=torch.float64)}, r"x must be float32, .*; got torch.float64"),
    "x_channels": ({"x": torch.zeros(3, 0)}, r"x must have at least one channel; got \(3, 0\)"),
    "x_width": ({"x": torch.zeros(3, 7)}, r"record must have shape \[F, 2\*7\]; got \(5, 16\)"),
    "gated": ({"gated": True}, r"record must have shape \[F, 3\*8\]; got \(5, 16\)"),
    "record_rank": ({"record": torch.zeros(16)}, r"record must have shape \[F, 2\*8\]; got \(16,\)"),
    "record_columns": (
        {"record": torch.zeros(16, 5).t()},
        r"record must have contiguous rows .*; got strides \(1, 5\)",
    ),
    "record_overlap": (
        {"record": torch.zeros(99, device=DEVICE).as_strided((5, 16), (4, 1))},
        r"record must have contiguous rows that do not overlap; got strides \(4, 1\)",
    ),
    "record_dtype": ({"record": torch.zeros(5, 16).half()}, r"record must be torch.float32; got torch.float16"),
    "neuron_bias": ({"neuron_bias": torch.zeros(5)}, r"neuron_bias must have shape \(5, 1\); got \(5,\)"),
    "down_bias": ({"down_bias": torch.zeros(7)}, r"down_bias must have shape \(8,\); got \(7,\)"),
    "index_rank": ({"index": torch.zeros(1, 1, dtype=torch.int32)}, r"index must have shape \[K\]; got \(1, 1\)"),
    "index_dtype": ({"index": torch.zeros(1, dtype=torch.int64)}, r"index must be torch.int32; got torch.int64"),
    "device": ({"record": torch.zeros(5, 16, device="meta")}, r"record must be on the device of x, .*; got meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_with_rule_and_value(name: str) -> None:
    change, message = BAD[name]
    here = {key: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for key, v in change.items()}
    p = problem(3, 5, 8)
    with pytest.raises(ValueError, match=message):
        kernels.ffn(**{**p, "index": None, **here})


def test_a_device_without_triton_is_refused() -> None:
    p = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in problem(3, 5, 8).items()}
    with pytest.raises(ValueError, match="x must be where the Triton kernels run; got meta"):
        kernels.ffn(**p)
    assert kernels.why_unavailable(DEVICE) is None
    assert isinstance(kernels.why_unavailable("mps"), str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("aligned", [False, True])
def test_configurations_are_few_and_fit_together(dtype: torch.dtype, aligned: bool) -> None:
    widths = range(1, 30000, 97)
    decode = {kernels.decode_config(m, k, 4096, dtype, True, aligned) for k in widths for m in range(1, 65)}
    assert len(decode) <= 12
    prefill = set()
    for m, k, gated, gather in itertools.product((1, 17, 40, 300, 5000), widths, (False, True), (False, True)):
        config = kernels.prefill_config(m, k, 4096, dtype, gated, gather, aligned)
        prefill |= {("hidden", gated, config.hidden), ("down", config.down)}
    assert len(prefill) <= 64
    assert "block_m=" in repr(config)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    d, f = 4096, 2**31 // (2 * 4096) + 64
    p = problem(2, 8, d, torch.float16)
    record = torch.zeros(f, 2 * d, dtype=torch.float16, device=DEVICE)
    record[-8:] = p["record"]
    bias = torch.zeros(f, 1, dtype=torch.float16, device=DEVICE)
    bias[-8:] = p["neuron_bias"]
    index = torch.arange(f - 8, f, dtype=torch.int32, device=DEVICE)
    for ffn in PATHS.values():
        far = ffn(**{**p, "record": record, "neuron_bias": bias, "index": index})
        assert torch.equal(far, ffn(**p))


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_a_graph_replays_the_call(path: str) -> None:
    p = problem(4, 300, 256, torch.bfloat16, gated=True, gather=True)
    wanted = PATHS[path](**p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = PATHS[path](**p)
    graph.replay()
    assert torch.equal(out, wanted)
