"""The experts of a layer: two grouped products over the pairs of token and expert, and the sum of each token's.

    hidden  [pairs, F]          act(x @ gate.T) * (x @ up.T), of the expert of each pair
    partial [splits, pairs, D]  hidden @ down
    out     [T, D]              sum over a token's pairs of weight * partial

An expert's rows are read once for up to BLOCK_M of its pairs, see `routing`; with one token every pair is a tile of its
own, and there is no table. The order of every sum is fixed: two calls give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import ACTIVATIONS
from .checks import DTYPES, INTERPRETED, require, require_device, why_no_int8
from .config import PrefillConfig
from .experts_config import experts_config
from .hardware import INTERPRETER, architecture, multiplies_from_shared
from .launch import Launch, device_of
from .products import split_of, tile_of
from .routing import combine, pairs_at, route, slots, tile_at
from .tile import down_tile, hidden_tile, record_rows, unfold

# Tokens of one round of launches: bounds hidden activations and partial results, which every pair has.
_MOST_TOKENS = 16384
# Up to so many the partial results are float32; of more they are rounded to the dtype of x, as torch's are.
_EXACT_TOKENS = 64


@triton.jit
def kept_of(
    expert,  # number of the expert
    kept,  # [E, K] int32, or None
    counts,  # [E] int32, or None
    K,  # most neurons of an expert
):
    """The rows of an expert that are used (None for all, in order), and how many."""
    if kept is None:
        return None, K
    else:
        return kept + expert.to(tl.int64) * K, tl.load(counts + expert)


@triton.jit(do_not_specialize=["slots", "F", "K", "width", "E"])
def expert_hidden_kernel(
    x,  # [T, D] tokens
    x_stride,  # elements between tokens
    rows,  # [E, K, P*D] rows [up | down] or [gate | up | down] of each expert
    expert_stride,  # elements between experts
    row_stride,  # elements between rows
    scales,  # [E, K, P] float32, contiguous, of int8 rows, or None
    scales_stride,  # P
    kept,  # [E, K] int32, rows of the neurons that are kept, or None for all
    counts,  # [E] int32, how many of those each expert has, or None
    index,  # [pairs] integers, expert of each pair
    order,  # see routing
    table,  # see routing
    hidden,  # out [pairs, width], by place in order
    hidden_stride,  # elements between hidden rows
    slots,  # tiles that there can be
    picked,  # pairs of a token
    E,  # number of experts
    F,  # neurons of an expert in memory
    K,  # most neurons of an expert
    width,  # K rounded up to whole blocks, of this product and of the next
    D,  # hidden_size
    GATED: tl.constexpr,  # rows have a gate part
    ACTIVATION: tl.constexpr,  # name of the activation
    BF16_BITS: tl.constexpr,  # bfloat16 values stored as float32
    BLOCK_M: tl.constexpr,  # pairs of a program
    BLOCK_N: tl.constexpr,  # neurons of a program
    BLOCK_D: tl.constexpr,  # channels of x taken at once
    BLOCK_WHOLE: tl.constexpr,  # neurons of whole blocks of this product and of the next
    GROUP: tl.constexpr,  # see tile_of
):
    slot, column = tile_of(tl.program_id(0), slots, width // BLOCK_N, GROUP)
    expert, first, size = tile_at(slot, index, table, E)
    if size == 0:
        return
    own, mine = kept_of(expert, kept, counts, K)
    if kept is not None:  # noqa: SIM102 - of what is None there is no code
        # The next product reads whole blocks of what this one writes.
        if column * BLOCK_N >= tl.cdiv(mine, BLOCK_WHOLE) * BLOCK_WHOLE:
            return
    m = tl.arange(0, BLOCK_M)
    present = m < size
    places = first + m
    tokens = pairs_at(order, places, present) // picked
    neurons = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if scales is not None:
        scales += expert.to(tl.int64) * F * scales_stride
    tile = hidden_tile(
        x, x_stride, tokens, present, rows + expert.to(tl.int64) * expert_stride, row_stride,
        record_rows(own, neurons, mine), neurons < mine, scales, scales_stride, None, 0, D, GATED, ACTIVATION,
        BF16_BITS, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    target = hidden + places.to(tl.int64)[None, :] * hidden_stride + neurons[:, None]
    tl.store(target, tile.to(hidden.dtype.element_ty), mask=present[None, :])


@triton.jit(do_not_specialize=["slots", "K", "pairs", "splits", "E"])
def expert_down_kernel(
    hidden,  # [pairs, width] by place in order, zero in columns K to the end of their block
    hidden_stride,  # elements between hidden rows
    down,  # [E, K, D] view of the down part of the rows
    expert_stride,  # elements between experts
    row_stride,  # elements between rows
    scales,  # of int8 rows, or None
    kept,  # see expert_hidden_kernel
    counts,  # see expert_hidden_kernel
    index,  # [pairs] integers, expert of each pair
    order,  # see routing
    table,  # see routing
    partial,  # out [splits, pairs, D], by pair
    slots,  # tiles that there can be
    pairs,  # number of pairs
    E,  # number of experts
    K,  # most neurons of an expert
    D,  # hidden_size
    splits,  # programs that share the neurons
    BLOCK_M: tl.constexpr,  # pairs of a program
    BLOCK_N: tl.constexpr,  # channels of a program
    BLOCK_K: tl.constexpr,  # neurons taken at once; divides the width of hidden
    TOKENS_LEFT: tl.constexpr,  # see down_tile
    GROUP: tl.constexpr,  # see tile_of
):
    split = tl.program_id(0) % splits
    slot, column = tile_of(tl.program_id(0) // splits, slots, tl.cdiv(D, BLOCK_N), GROUP)
    expert, first, size = tile_at(slot, index, table, E)
    if size == 0:
        return
    m = tl.arange(0, BLOCK_M)
    present = m < size
    places = first + m
    own, mine = kept_of(expert, kept, counts, K)
    begin, end = split_of(split, splits, mine, BLOCK_K)
    d = column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = down_tile(
        hidden, hidden_stride, places, present, down + expert.to(tl.int64) * expert_stride, row_stride, own, d,
        begin, end, mine, D, BLOCK_M, BLOCK_N, BLOCK_K, TOKENS_LEFT,
    )  # fmt: skip
    total = unfold(total, scales)
    row = split.to(tl.int64) * pairs + pairs_at(order, places, present)
    mask = (d < D)[:, None] & present[None, :]
    tl.store(partial + row[None, :] * D + d[:, None], total.to(partial.dtype.element_ty), mask=mask)


class ExpertOperands(NamedTuple):
    """Those of one call, with contiguous routing.

    Args:
        x: `[T, D]`.
        rows: `[E, F, P*D]`.
        gated: P is 3.
        activation: one of `ACTIVATIONS`.
        index: `[T, K]` int64 or int32.
        weights: `[T, K]` floating point.
        scales: `[E, F, P]` float32 with int8 rows, else None.
        kept, counts: int32, of a gather; see `moe`.
        bf16_bits: the tensors hold bfloat16 values in float32, see `round_like`.
        architecture: where it runs, see `hardware`.
    """

    x: Tensor
    rows: Tensor
    gated: bool
    activation: str
    index: Tensor
    weights: Tensor
    scales: Tensor | None = None
    kept: Tensor | None = None
    counts: Tensor | None = None
    bf16_bits: bool = False
    architecture: int = INTERPRETER

    @property
    def most(self) -> int:
        """Most neurons of an expert that are computed."""
        return self.rows.shape[1] if self.kept is None else self.kept.shape[1]

    @property
    def aligned(self) -> bool:
        """As of `launch.Operands`."""
        strides_fit = all(size % 16 == 0 for size in (self.x.shape[1], *self.rows.stride()[:2]))
        return strides_fit and self.rows.data_ptr() % 16 == 0

    def default_config(self, batch_invariant: bool = False) -> PrefillConfig:
        """The analytic configuration, see `experts_config`."""
        (tokens, picked), experts = self.index.shape, len(self.rows)
        return experts_config(
            tokens, picked, experts, self.most, self.x.shape[1], self.x.dtype, self.gated, self.aligned,
            batch_invariant, self.scales is not None, self.architecture, self.kept is not None,
        )  # fmt: skip

    def tokens(self, start: int, stop: int) -> ExpertOperands:
        """Those of tokens `start` to `stop`."""
        own = slice(start, stop)
        return self._replace(x=self.x[own], index=self.index[own], weights=self.weights[own])


def launches(p: ExpertOperands, out: Tensor, config: PrefillConfig, exact: bool = True) -> list[Launch]:
    """The launches that write `out` `[T, D]`; needs at least one token, one choice and one neuron.

    Args:
        exact: partial results are float32, not of the dtype of x.
    """
    (tokens, picked), (experts, f, _), d, most = p.index.shape, p.rows.shape, p.x.shape[1], p.most
    up, down, pairs = config.hidden, config.down, tokens * picked
    index, device = p.index.view(-1), p.x.device
    whole = max(up.block_n, down.block_k)
    width = triton.cdiv(most, whole) * whole
    hidden = torch.empty((pairs, width), dtype=p.x.dtype, device=device)
    kind = torch.float32 if exact or config.splits > 1 else p.x.dtype
    partial = torch.empty((config.splits, pairs, d), dtype=kind, device=device)
    plan: list[Launch] = []
    tiles, order, table = pairs, None, None
    if tokens > 1:
        launch, order, table = route(index, experts, up.block_m)
        plan.append(launch)
        tiles = slots(pairs, experts, up.block_m)
    shared: dict[str, Any] = {
        "hidden": hidden,
        "hidden_stride": width,
        "expert_stride": p.rows.stride(0),
        "row_stride": p.rows.stride(1),
        "scales": p.scales,
        "kept": p.kept,
        "counts": p.counts,
        "index": index,
        "order": order,
        "table": table,
        "slots": tiles,
        "E": experts,
        "K": most,
        "D": d,
        "BLOCK_M": up.block_m,
        "GROUP": config.group,
    }
    first = {
        **shared,
        "x": p.x,
        "x_stride": p.x.stride(0),
        "rows": p.rows,
        "scales_stride": 3 if p.gated else 2,
        "F": f,
        "picked": picked,
        "width": width,
        "GATED": p.gated,
        "ACTIVATION": p.activation,
        "BF16_BITS": p.bf16_bits,
        "BLOCK_N": up.block_n,
        "BLOCK_D": up.block_k,
        "BLOCK_WHOLE": whole,
    }
    second = {
        **shared,
        "down": p.rows[:, :, -d:],
        "partial": partial,
        "pairs": pairs,
        "splits": config.splits,
        "BLOCK_N": down.block_n,
        "BLOCK_K": down.block_k,
        "TOKENS_LEFT": p.x.dtype != torch.float32 and not multiplies_from_shared(p.architecture),
    }
    grids = (tiles * (width // up.block_n), tiles * triton.cdiv(d, down.block_n) * config.splits)
    plan.append(Launch(expert_hidden_kernel, (grids[0],), first, up.num_warps, up.num_stages))
    plan.append(Launch(expert_down_kernel, (grids[1],), second, down.num_warps, down.num_stages))
    plan.append(combine(partial, index, p.weights.view(-1), out, experts, picked, p.bf16_bits))
    return plan


def _check(p: ExpertOperands) -> None:
    """Raise ValueError, naming argument, rule and value, for what the kernels would turn into wrong numbers."""
    parts = 3 if p.gated else 2
    require(p.activation in ACTIVATIONS, "activation", f"be one of {', '.join(ACTIVATIONS)}", p.activation)
    require(p.x.dtype in DTYPES, "x", "be float32, float16 or bfloat16", p.x.dtype)
    require(p.x.dim() == 2 and p.x.shape[1] >= 1, "x", "have shape [T, D] of at least one channel", tuple(p.x.shape))
    (tokens, d), shape, strides = p.x.shape, tuple(p.rows.shape), p.rows.stride()
    fits = len(shape) == 3 and shape[0] >= 1 and shape[2] == parts * d
    require(fits, "rows", f"have shape [E, F, {parts}*{d}]", shape)
    separate = (shape[1] <= 1 or strides[1] >= shape[2]) and (shape[0] <= 1 or strides[0] >= shape[1] * strides[1])
    require(strides[2] == 1 and separate, "rows", "have contiguous rows that do not overlap", f"strides {strides}")
    integers = (torch.int64, torch.int32)
    require(p.index.dtype in integers, "index", "be int64 or int32", p.index.dtype)
    fits = p.index.dim() == 2 and p.index.shape[0] == tokens
    require(fits, "index", f"have shape [{tokens}, K]", tuple(p.index.shape))
    require(p.weights.is_floating_point(), "weights", "be floating point", p.weights.dtype)
    own = tuple(p.index.shape)
    require(tuple(p.weights.shape) == own, "weights", f"have shape {own}, as index has", tuple(p.weights.shape))
    if p.scales is None:
        require(p.rows.dtype == p.x.dtype, "rows", f"be {p.x.dtype}, or int8 with scales", p.rows.dtype)
    else:
        reason = why_no_int8(p.x.dtype, p.x.device.type)
        require(reason is None, "scales", f"be None here: {reason}", tuple(p.scales.shape))
        require(p.rows.dtype == torch.int8, "rows", "be torch.int8 with scales", p.rows.dtype)
        wanted = (*shape[:2], parts)
        require(tuple(p.scales.shape) == wanted, "scales", f"have shape {wanted}", tuple(p.scales.shape))
        require(p.scales.dtype == torch.float32, "scales", "be torch.float32", p.scales.dtype)
    both = (p.kept is None) == (p.counts is None)
    require(both, "counts", "be given with kept, and there alone", None if p.counts is None else tuple(p.counts.shape))
    if p.kept is not None and p.counts is not None:
        fits = p.kept.dim() == 2 and len(p.kept) == shape[0]
        require(fits, "kept", f"have shape [{shape[0]}, K]", tuple(p.kept.shape))
        require(tuple(p.counts.shape) == shape[:1], "counts", f"have shape {shape[:1]}", tuple(p.counts.shape))
        for name, tensor in (("kept", p.kept), ("counts", p.counts)):
            require(tensor.dtype == torch.int32, name, "be torch.int32", tensor.dtype)
    for name in ("rows", "index", "weights", "scales", "kept", "counts"):
        tensor = getattr(p, name)
        here = tensor is None or tensor.device == p.x.device
        require(here, name, f"be on the device of x, {p.x.device}", tensor is not None and tensor.device)


def moe(
    x: Tensor,
    rows: Tensor,
    index: Tensor,
    weights: Tensor,
    *,
    gated: bool,
    activation: str,
    scales: Tensor | None = None,
    kept: Tensor | None = None,
    counts: Tensor | None = None,
    config: PrefillConfig | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """`out[t] = sum over k of weights[t, k] * ffn(x[t], rows[index[t, k]])`: a mixture after its router.

    Nothing waits for the device, and what is allocated depends on shapes alone. Two calls give the same bits.

    Args:
        x: `[T, D]` float32, float16 or bfloat16, any strides.
        rows: `[E, F, P*D]` in x's dtype or int8, rows `[up | down]` or `[gate | up | down]` of each expert, contiguous
            along a row.
        index: `[T, K]` int64 or int32, experts of each token. What it holds is not read by the host: a token for which
            it names an expert that there is not becomes NaN.
        weights: `[T, K]` floating point.
        gated: P is 3, not 2.
        activation: one of `ACTIVATIONS`.
        scales: `[E, F, P]` float32 with int8 rows, else None.
        kept: `[E, K]` int32, rows of each expert that are used, or None for all; they are not read by the host.
        counts: `[E]` int32, how many of its line of `kept` count for each expert.
        config: None chooses analytically, see `experts_config`.
        batch_invariant: without `config`, choose such that a token has the same bits whatever the tokens beside it.

    Returns:
        `[T, D]` in the dtype of `x`, contiguous. Products and sums are float32; with more than 64 tokens, and not batch
        invariant, what an expert gives is rounded to the dtype of x before it is weighted.

    Raises:
        ValueError: a shape, dtype, device, stride or name breaks the rules above, the tokens of both tiles of `config`
            differ, or the device cannot run Triton.
    """
    p = ExpertOperands(x, rows, gated, activation, index, weights, scales, kept, counts)
    _check(p)
    require_device(x, "x")
    (tokens, d), picked = x.shape, index.shape[1]
    if tokens == 0 or picked == 0 or p.most == 0:
        return torch.zeros((tokens, d), dtype=x.dtype, device=x.device)
    if INTERPRETED:
        # See `checks.INTERPRETED`; torch's other dtypes of weights are as well widened here.
        p = p._replace(weights=weights.float())
        if x.dtype == torch.bfloat16:
            p = p._replace(x=x.float(), rows=rows.float() if scales is None else rows, bf16_bits=True)
    p = p._replace(
        x=p.x if p.x.stride(1) == 1 else p.x.contiguous(),
        index=index.contiguous(),
        weights=p.weights.contiguous(),
        scales=None if scales is None else scales.contiguous(),
        kept=None if kept is None else kept.contiguous(),
        counts=None if counts is None else counts.contiguous(),
        architecture=architecture(x.device),
    )
    if config is None:
        config = p.default_config(batch_invariant)
    up, down = config.hidden.block_m, config.down.block_m
    require(up == down, "config", "have as many tokens in both tiles", (up, down))
    out = torch.empty((tokens, d), dtype=p.x.dtype, device=x.device)
    exact = batch_invariant or tokens <= _EXACT_TOKENS
    with device_of(x):
        for start in range(0, tokens, _MOST_TOKENS):
            stop = min(start + _MOST_TOKENS, tokens)
            for launch in launches(p.tokens(start, stop), out[start:stop], config, exact):
                launch.run()
    return out.to(x.dtype)
