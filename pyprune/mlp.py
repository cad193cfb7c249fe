"""PrunedMLP: the drop-in FFN over a neuron-major record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import dispatch, operators, ops
from .errors import UnsupportedModelError, check, check_choice
from .families import FFN
from .mask import KeepIndex
from .memory import Room
from .mlp_state import FamilyState
from .patterns import FFNWeights, Pattern, match
from .probe import detect_activation
from .quantisation import WEIGHTS, cast

MODES = ("compact", "gather")


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
    biases = weights.input_biases
    columns = [b for b in biases if b is not None]
    if not columns:
        return record, None
    if len(columns) < len(biases):
        raise UnsupportedModelError("an FFN must have a bias on both gate and up, or on neither; it has one on one")
    bias = torch.stack(columns, dim=1)
    return record, bias if keep is None else bias[keep]


class PrunedMLP(FamilyState):
    """An FFN whose kept neurons are rows of one record: `y = down(act(up(x)))` or `down(act(gate(x)) * up(x))`.

    It takes the place of a Transformers FFN module, and its `state_dict` has the names, shapes and dtype of the module
    it stands for, so a model that holds it saves and loads as its family does.

    Attributes:
        record: `[F, P*D]` parameter, rows [up | down] or [gate | up | down]; int8, or any dtype that mixes with `dtype`
            (see `ops.check_operands`). `module.to(dtype)` casts it as every parameter, unless it is int8.
        scales: `[F, P]` float32 buffer with an int8 record, which no cast of the module changes, else None.
        neuron_bias: `[F, P-1]` parameter or None.
        down_bias: `[D]` parameter or None.
        index: `[K]` int32 buffer in gather mode, else None.
        dtype: of x, of the biases, and of the tensors in the `state_dict`.
        batch_invariant: whether a row of the result is independent, to the bit, of the rows beside it, at the price
            of speed with many rows. Two calls give the same bits either way.
    """

    index: Tensor | None

    def __init__(
        self,
        record: Tensor,
        neuron_bias: Tensor | None,
        down_bias: Tensor | None,
        *,
        pattern: Pattern,
        activation: str,
        scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        keep: KeepIndex | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        check_choice(backend, "backend", dispatch.names())
        self.pattern = pattern
        self.gated = pattern.gated
        self.activation = activation
        self.transposed = transposed
        self.dropout = dropout
        self.backend = backend
        self.batch_invariant = batch_invariant
        self.hidden_size = record.shape[1] // (3 if self.gated else 2)
        self.intermediate_size = record.shape[0]
        check(dtype is not None or record.is_floating_point(), "dtype", "be given with an int8 record", dtype)
        self.dtype = dtype or record.dtype
        x = torch.empty(0, self.hidden_size, dtype=self.dtype, device=record.device)
        ops.check_operands(x, record, scales, neuron_bias, down_bias, None, self.gated, activation)
        self.record = nn.Parameter(record, requires_grad=record.is_floating_point())
        self.register_parameter("neuron_bias", None if neuron_bias is None else nn.Parameter(neuron_bias))
        self.register_parameter("down_bias", None if down_bias is None else nn.Parameter(down_bias))
        self.register_buffer("scales", scales, persistent=False)
        if keep is not None:
            check(
                keep.intermediate_size == len(record), "keep", f"refer to {len(record)} neurons", keep.intermediate_size
            )
        self.register_buffer("index", None if keep is None else keep.neurons.to(record.device), persistent=False)
        self._set_dtype(self.dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        """Remember `dtype`, and what follows from it and is too slow to find at every call."""
        self.dtype = dtype
        self._native = self.record.device.type  # the name of the native backend there
        neurons = self.intermediate_size if self.index is None else len(self.index)
        layer = (self.hidden_size, self.index is not None, self._native, neurons, self.gated, self.activation)
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

        Raises:
            InputError: unknown mode, backend or weights, `gather` without `keep`, `keep` of another width, or a weight
                that is not finite in the dtype asked for.
            UnsupportedModelError: `mlp` is no FFN that pyprune knows.
        """
        check_choice(mode, "mode", MODES)
        check(keep is not None or mode == "compact", "keep", "be given in gather mode", keep)
        check_choice(weights or "float32", "weights", WEIGHTS)
        ffn = mlp if isinstance(mlp, FFN) else _describe(mlp)
        dense, scales = ffn.weights(), None
        if keep is not None:
            size = dense.down.shape[0]
            check(keep.intermediate_size == size, "keep", f"refer to {size} neurons", keep.intermediate_size)
        with torch.no_grad():
            rows = keep.neurons if keep is not None and mode == "compact" else None
            record, neuron_bias = pack(dense, rows)
            down_bias = None if dense.down_bias is None else dense.down_bias.clone()
            if weights is not None:
                record, scales = cast(record, len(dense.parts), WEIGHTS[weights])
            if room is not None:
                record = room.keep(record)
        module = cls(
            record,
            neuron_bias,
            down_bias,
            pattern=ffn.pattern,
            activation=ffn.activation,
            scales=scales,
            dtype=dense.down.dtype,
            transposed=isinstance(ffn.down, Conv1D),
            keep=keep if mode == "gather" else None,
            dropout=ffn.dropout,
            backend=backend,
            batch_invariant=batch_invariant,
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
        # Decode calls this for every layer of every token: nn.Module.__getattr__ and ops.check_operands cost more than
        # the operator itself.
        parameters: dict[str, Any] = self._parameters
        buffers = self._buffers
        record, native_tokens = parameters["record"], self.native_tokens
        if x.ndim == 0 or x.shape[-1] != self.hidden_size or x.dtype != self.dtype or x.device != record.device:
            self._check(x)
            native_tokens = 0  # those are of another dtype
        backend = self.backend
        if torch.is_grad_enabled() and self._needs_grad(x):
            out = self._forward_with_grad(x)
        else:
            operands = (
                x,
                record,
                buffers["index"],
                buffers["scales"],
                parameters["neuron_bias"],
                parameters["down_bias"],
                None,
                self.gated,
                self.activation,
                backend,
            )
            if self.batch_invariant:
                out = operators.FFN_BATCH_INVARIANT(*operands)
            # What another backend has to refuse would lose its words on its way through the native library.
            elif native_tokens and (backend == "auto" or backend == self._native):
                out = operators.FFN(*operands, native_tokens)
            else:
                out = operators.FFN_BY_DISPATCH(*operands)
        return nn.functional.dropout(out, self.dropout, self.training) if self.dropout else out

    def _check(self, x: Tensor) -> None:
        rest = (self.scales, self.neuron_bias, self.down_bias, None)
        ops.check_operands(x, self.record, *rest, self.gated, self.activation)

    def _needs_grad(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self._parameters.values() if p is not None)

    def _forward_with_grad(self, x: Tensor) -> Tensor:
        if self.batch_invariant:
            biases = (self.neuron_bias, self.down_bias, None)
            form_of = (self.gated, self.activation, self.backend)
            return operators.FFN_BATCH_INVARIANT(x, self.record, self.index, self.scales, *biases, *form_of)
        form = self.gated, self.index is not None
        operands = [x, self.record] if self.index is None else [x, self.record, self.index]
        rest = (self.neuron_bias, self.down_bias, None)
        if self.backend == "auto":
            # Training differentiates plain torch itself, which saves what the backward pass needs.
            return operators.TWINS[form](*operands, *rest, scales=self.scales, activation=self.activation)
        out: Tensor = operators.OPERATORS[form](*operands, self.scales, *rest, self.activation, self.backend)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedMLP:
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None and self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        self._set_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.record.device)).dtype)
        return self

    def extra_repr(self) -> str:
        kind = "gated" if self.gated else "plain"
        kept = "" if self.index is None else f", gather {len(self.index)}"
        own = self.record.dtype
        weights = "" if own == self.dtype else f", {str(own).removeprefix('torch.')} weights"
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
