"""PrunedMLP: the drop-in FFN over a neuron-major record."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base import reference
from ..base.errors import InputError, UnsupportedModelError, check, check_choice
from ..base.memory import Room
from ..base.record import Record
from ..model.families import FFN
from ..model.mask import KeepIndex
from ..model.patterns import FFNWeights, Pattern, match
from ..model.probe import detect_activation
from . import dispatch, native, operators
from .mlp_state import FamilyState, Packed
from .quantisation import WEIGHTS, cast, channel_scales, check_fits, name_of

MODES = ("compact", "gather")
_DIMENSIONS = 8  # most of x that the native libraries take


def check_biases(weights: FFNWeights) -> None:
    """Raise `UnsupportedModelError` where one of gate and up alone has a bias: a record has none for both, or two."""
    given = [bias is not None for bias in weights.input_biases]
    if any(given) and not all(given):
        raise UnsupportedModelError("an FFN must have a bias on both gate and up, or on neither; it has one on one")


def pack(weights: FFNWeights, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Copy an FFN into a neuron-major record.

    Args:
        weights: parts `[F, D]`.
        keep: `[K]` neurons to copy, or None for all.

    Returns:
        record `[K, P*D]`, and neuron_bias `[K, P-1]` or None.

    Raises:
        UnsupportedModelError: only one of gate and up has a bias, which a record cannot tell from a zero bias.
    """
    rows, d = weights.down.shape
    parts = weights.parts
    if keep is not None:
        keep, rows = keep.to(weights.down.device), len(keep)
    record = weights.down.new_empty((rows, len(parts) * d))
    for i, part in enumerate(parts):
        record[:, i * d : (i + 1) * d] = part if keep is None else part[keep]
    check_biases(weights)
    columns = [b for b in weights.input_biases if b is not None]
    if not columns:
        return record, None
    bias = torch.stack(columns, dim=1)
    return record, bias if keep is None else bias[keep]


class PrunedMLP(FamilyState):
    """An FFN whose kept neurons are rows of one record: `y = down(act(up(x)))` or `down(act(gate(x)) * up(x))`.

        >>> model, tokenizer = load("demo")
        >>> dense = model.model.layers[0].mlp
        >>> keep = KeepIndex(range(0, dense.down_proj.in_features, 2), dense.down_proj.in_features)
        >>> half = PrunedMLP.from_dense(dense, keep)
        >>> x = model.get_input_embeddings()(tokenizer("Rain", return_tensors="pt")["input_ids"])
        >>> half(x).shape == x.shape
        True

    It takes the place of a Transformers FFN module, and its `state_dict` has the names, shapes and dtype of the module
    it stands for, so a model that holds it saves and loads as its family does.

    Attributes:
        record: `[F, P*D]` parameter, rows [up | down] or [gate | up | down]; int8, int4 (see `base.int4`), or any dtype
            that mixes with `dtype` (see `Record.check_dtype`). `module.to(dtype)` casts it where it is floating point.
        scales: `[F, P]` float32 buffer with an int8 record, which no cast of the module changes, else None.
        neuron_bias: `[F, P-1]` parameter or None.
        down_bias: `[D]` parameter or None.
        channel_scales: `[D]` buffer that results are multiplied by, see `quantisation.channel_scales`; down rows and
            down_bias are divided by it. None without rows of integers.
        index: `[K]` int32 buffer in gather mode, else None.
        dtype: of x, of the biases, and of the tensors in the `state_dict`.
        batch_invariant: whether a row of the result is independent, to the bit, of the rows beside it, at the price
            of speed with many rows. Two calls give the same bits either way.

    `set_width` makes it run the first neurons of the record only; all of them stay in memory and in the `state_dict`.
    """

    index: Tensor | None
    # Of `set_width`: neurons that run, or None for all; and what inference keeps: the whole record, its address, and
    # the views of it that run.
    _width: int | None = None
    _views: tuple[Record, int, Record] | None = None

    def __init__(
        self,
        record: Record,
        *,
        pattern: Pattern,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
        batch_invariant: bool = False,
        channel_scales: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice(backend, "backend", dispatch.names())
        native.check_isa()
        self.pattern = pattern
        check(
            record.gated == pattern.gated,
            "record",
            f"be {'' if pattern.gated else 'not '}gated, as its pattern is",
            record.gated,
        )
        self.gated = record.gated
        self.activation = record.activation
        self.transposed = transposed
        self.dropout = dropout
        self.backend = backend
        self.batch_invariant = batch_invariant
        self.hidden_size = record.hidden_size
        self.intermediate_size = record.neurons
        rows = record.rows
        check(dtype is not None or rows.is_floating_point(), "dtype", "be given with rows of integers", dtype)
        self.dtype = dtype or rows.dtype
        record.check_dtype(self.dtype, "dtype")
        self.record = nn.Parameter(rows, requires_grad=rows.is_floating_point())
        for name, bias in (("neuron_bias", record.neuron_bias), ("down_bias", record.down_bias)):
            self.register_parameter(name, None if bias is None else nn.Parameter(bias))
        buffers = {"channel_scales": channel_scales, "scales": record.scales, "index": record.index}
        waiting = {"plain_down": None, "plain_scales": None}
        # torch.export counts those that are there as if they came first.
        for name, buffer in sorted({**buffers, **waiting}.items(), key=lambda item: item[1] is None):
            self.register_buffer(name, buffer, persistent=False)
        for name, blocks in pattern.inputs:
            self.add_module(name, Packed(self.hidden_size, blocks * self.intermediate_size))
        self.add_module(pattern.down, Packed(self.intermediate_size, self.hidden_size))
        self._width = None
        self._set_dtype(self.dtype)

    @property
    def neurons(self) -> int:
        """How many neurons a call computes."""
        if self.index is not None:
            return len(self.index)
        return self.intermediate_size if self._width is None else self._width

    def _set_dtype(self, dtype: torch.dtype) -> None:
        """Remember `dtype`, and what follows from it and is too slow to find at every call."""
        self.dtype = dtype
        self._native = self.record.device.type  # the name of the native backend there
        self._views = None
        layer = (self.hidden_size, self.index is not None, self._native, self.neurons, self.gated, self.activation)
        self.native_tokens = dispatch.native_tokens(dtype, self.record.dtype, *layer)

    @classmethod
    def from_dense(
        cls,
        mlp: nn.Module | FFN,
        keep: KeepIndex | None = None,
        mode: str = "compact",
        backend: str = "auto",
        weights: str | None = None,
        room: Room | None = None,
        batch_invariant: bool = False,
        group: Any = None,
    ) -> PrunedMLP:
        """Build one from an FFN of a Transformers model, which stays as it is.

        Args:
            mlp: an FFN module (any row of `patterns.PATTERNS`), or what `families.find_ffns` found.
            keep: the neurons that stay; None for all.
            mode: `compact` copies the kept neurons; `gather` copies all and reads only the kept ones.
            backend: `auto` or a backend's name, which is then used or refused.
            weights: dtype of the record, a key of `quantisation.WEIGHTS`; None for that of `mlp`, which biases keep.
            room: where the record is to lie, or None for anywhere.
            batch_invariant: see the attribute.
            group: of processes, each with some of the neurons of one FFN; None where they are all here.

        Raises:
            InputError: unknown mode, backend or weights, `gather` without `keep`, `keep` of another width, a weight
                that is not finite in the dtype asked for, or a PYPRUNE_CPU_ISA that is not here.
            UnsupportedModelError: `mlp` is no FFN that pyprune knows.
        """
        check_choice(mode, "mode", MODES)
        check(keep is not None or mode == "compact", "keep", "be given in gather mode", keep)
        check_choice(weights or "float32", "weights", WEIGHTS)
        ffn = mlp if isinstance(mlp, FFN) else _describe(mlp)
        dense, scales, channels = ffn.weights(), None, None
        if keep is not None:
            size = dense.down.shape[0]
            check(keep.intermediate_size == size, "keep", f"refer to {size} neurons", keep.intermediate_size)
        with torch.no_grad():
            rows = keep.neurons if keep is not None and mode == "compact" else None
            packed, neuron_bias = pack(dense, rows)
            down_bias = None if dense.down_bias is None else dense.down_bias.clone()
            if weights in ("int8", "int4"):
                channels = channel_scales(dense.down, group)
                packed[:, -len(channels) :] /= channels
                down_bias = None if down_bias is None else down_bias / channels
            if weights is not None:
                packed, scales = cast(packed, len(dense.parts), WEIGHTS[weights])
            if room is not None:
                packed = room.keep(packed)
        index = keep.neurons.to(packed.device) if keep is not None and mode == "gather" else None
        module = cls(
            Record(packed, ffn.gated, ffn.activation, scales, neuron_bias, down_bias, index),
            pattern=ffn.pattern,
            dtype=dense.down.dtype,
            transposed=isinstance(ffn.down, Conv1D),
            dropout=ffn.dropout,
            backend=backend,
            batch_invariant=batch_invariant,
            channel_scales=channels,
        )
        for parameter in module.parameters():
            wanted = any(p.requires_grad for p in ffn.parameters())
            parameter.requires_grad_(wanted and parameter.is_floating_point())
        return module.train(ffn.holder.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`.

        Raises:
            InputError: x has another width or device than the record, or a dtype that does not mix with its own.
            BackendError: the forced backend cannot run this problem.
        """
        # Decode calls this for every layer of every token: nn.Module.__getattr__ and Record.check_x cost more than the
        # operator itself.
        parameters: dict[str, Any] = self._parameters
        buffers = self._buffers
        rows, native_tokens = parameters["record"], self.native_tokens
        if (
            not 0 < x.ndim <= _DIMENSIONS
            or x.shape[-1] != self.hidden_size
            or x.dtype != self.dtype
            or x.device != rows.device
        ):
            self._whole().check_x(x)
            native_tokens = 0  # those are of another dtype; and dispatch flattens x
        backend, channels = self.backend, buffers["channel_scales"]
        if (torch.is_grad_enabled() and self._needs_grad(x)) or operators.dual():
            out = self._forward_with_grad(x)
            out = out if channels is None else out * channels.to(out.dtype)  # x may have another dtype
        else:
            scales, neuron_bias = buffers["scales"], parameters["neuron_bias"]
            if self._width is not None:
                running = self._first(rows, scales, neuron_bias)
                rows, scales, neuron_bias = running.rows, running.scales, running.neuron_bias
            # What another backend has to refuse would lose its words on its way through the native library.
            native = native_tokens and (backend == "auto" or backend == self._native) and not self.batch_invariant
            out = (operators.FFN if native else operators.FFN_BY_DISPATCH)(
                x,
                rows,
                buffers["index"],
                scales,
                neuron_bias,
                parameters["down_bias"],
                self.gated,
                self.activation,
                backend,
                native_tokens,
                self.batch_invariant,
            )
            out = out if channels is None else out.mul_(channels)
        return nn.functional.dropout(out, self.dropout, self.training) if self.dropout else out

    def _whole(self) -> Record:
        """All neurons in memory."""
        return Record.unchecked(
            self.record, self.gated, self.activation, self.scales, self.neuron_bias, self.down_bias, self.index
        )

    @property
    def running(self) -> Record:
        """What a call computes: after `set_width` views of the first rows."""
        whole = self._whole()
        return whole if self._width is None else whole.narrow(self._width)

    def _needs_grad(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self._parameters.values() if p is not None)

    def _forward_with_grad(self, x: Tensor) -> Tensor:
        if self.plain_down is not None and self.training and self.record.requires_grad:
            raise InputError(
                "a layer that runs compensated down rows cannot be trained, for what it learns would be lost at the "
                "next width; call set_width with compensated=False first"
            )
        operators.check_dual(self.backend, self.batch_invariant)
        if self.backend == "auto" and not self.batch_invariant:
            # Training differentiates plain torch itself, which saves what the backward pass needs.
            return reference.ffn(x, self.running)
        arguments = operators.arguments(x, self.running, self.backend, 0, self.batch_invariant)
        return operators.FFN_BY_DISPATCH(*arguments)

    def _first(self, rows: Tensor, scales: Tensor | None, neuron_bias: Tensor | None) -> Record:
        """`running` for inference, kept from call to call while it is views of these tensors."""
        if torch.compiler.is_compiling():
            return self.running
        if self._views is not None:
            owner, address, views = self._views
            same = owner.rows is rows and owner.scales is scales and owner.neuron_bias is neuron_bias
            if same and rows.data_ptr() == address:  # a parameter stays the same when its `data` is replaced
                return views
        with torch.no_grad():
            views = self.running
        self._views = self._whole(), rows.data_ptr(), views
        return views

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_width(self, neurons: int, down: Tensor | None = None) -> None:
        """Run only the first `neurons` rows of the record from now on; the rest stays where it is.

        What was compiled before is compiled again; a CUDA graph that was captured before keeps its number of rows, and
        must not be replayed where `down` is or was given.

        Args:
            neurons: in [1, F]; F is all again.
            down: `[neurons, D]` down rows to run with them (from a compensation). They are copied into the record, and
                its own come back, to the bit, at the next call.

        Raises:
            InputError: gather mode, `neurons` no integer or out of range, or `down` of another shape or not finite in
                the record's dtype; nothing has changed then.
        """
        check(self.index is None, "mode", "be compact, for in gather mode the index says what runs", "gather")
        size = self.intermediate_size
        check(isinstance(neurons, Integral) and not isinstance(neurons, bool), "neurons", "be an integer", neurons)
        check(1 <= neurons <= size, "neurons", f"lie in [1, {size}]", neurons)
        if down is not None:
            shape = (neurons, self.hidden_size)
            check(tuple(down.shape) == shape, "down", f"have shape {shape}", tuple(down.shape))
            down = down.to(self.record.device, self.dtype, copy=True)
            if self.channel_scales is not None:
                down /= self.channel_scales
            check_fits(down, self.record.dtype, "down")
        if self.plain_down is not None:
            self._exchange_down()
            self.plain_down = self.plain_scales = None
        self._width = None if neurons == size else int(neurons)
        if down is not None:
            self.plain_down, self.plain_scales = cast(down, 1, self.record.dtype)
            self._exchange_down()
        self._set_dtype(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedMLP:
        exact = {name: getattr(self, name) for name in ("scales", "plain_scales")}
        super()._apply(fn, recurse)
        for name, scales in exact.items():
            moved = getattr(self, name)
            if scales is not None and moved.dtype != torch.float32:
                setattr(self, name, scales.to(moved.device))
        self._set_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.record.device)).dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": None}  # a copy's record is another one

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # without the modules that only stand in for projections

    def extra_repr(self) -> str:
        kind = "gated" if self.gated else "plain"
        kept = "" if self.index is None else f", gather {len(self.index)}"
        if self._width is not None:
            kept = f", first {self._width}{' compensated' if self.plain_down is not None else ''}"
        own = self.record.dtype
        weights = "" if own == self.dtype else f", {name_of(own)} weights"
        size = f"D={self.hidden_size}, F={self.intermediate_size}{kept}"
        invariant = ", batch-invariant" if self.batch_invariant else ""
        return f"{kind}, {size}, {self.activation}, {self.backend}{weights}{invariant}"


def _describe(mlp: nn.Module) -> FFN:
    """Recognise a lone FFN module."""
    pattern = match(mlp)
    with torch.no_grad():
        activation = detect_activation(mlp, pattern) if pattern else None
    if pattern is None or activation is None:
        children = ", ".join(n for n, _ in mlp.named_children()) or "no children"
        raise UnsupportedModelError(f"{type(mlp).__name__} is no FFN that pyprune knows (it has {children})")
    return FFN(0, "", mlp, pattern, activation)
