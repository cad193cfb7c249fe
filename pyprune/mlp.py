"""PrunedMLP: the drop-in FFN over a neuron-major record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import dispatch, ops
from .errors import UnsupportedModelError, check, check_choice
from .families import FFN
from .mask import KeepIndex
from .patterns import FFNWeights, Pattern, match
from .probe import detect_activation

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


class PrunedMLP(nn.Module):
    """An FFN whose kept neurons are rows of one record: `y = down(act(up(x)))` or `down(act(gate(x)) * up(x))`.

    It takes the place of a Transformers FFN module, and its `state_dict` has the names and shapes of the module it
    stands for, so a model that holds it saves and loads as its family does.

    Attributes:
        record: `[F, P*D]` parameter, rows [up | down] or [gate | up | down].
        neuron_bias: `[F, P-1]` parameter or None.
        down_bias: `[D]` parameter or None.
        index: `[K]` int32 buffer in gather mode, else None.
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
        transposed: bool = False,
        keep: KeepIndex | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice(backend, "backend", dispatch.names())
        self.pattern = pattern
        self.gated = pattern.gated
        self.activation = activation
        self.transposed = transposed
        self.dropout = dropout
        self.backend = backend
        self.hidden_size = record.shape[1] // (3 if self.gated else 2)
        self.intermediate_size = record.shape[0]
        self.record = nn.Parameter(record)
        self.neuron_bias = None if neuron_bias is None else nn.Parameter(neuron_bias)
        self.down_bias = None if down_bias is None else nn.Parameter(down_bias)
        if keep is not None:
            check(
                keep.intermediate_size == len(record), "keep", f"refer to {len(record)} neurons", keep.intermediate_size
            )
        self.register_buffer("index", None if keep is None else keep.neurons.to(record.device), persistent=False)

    @classmethod
    def from_dense(
        cls,
        mlp: nn.Module | FFN,
        keep: KeepIndex | None = None,
        mode: str = "compact",
        backend: str = "auto",
    ) -> PrunedMLP:
        """Build one from an FFN of a Transformers model, which stays as it is.

        Args:
            mlp: an FFN module (any row of `patterns.PATTERNS`), or what `families.find_ffns` found.
            keep: the neurons that stay; None for all.
            mode: `compact` copies the kept neurons; `gather` copies all and reads only the kept ones.
            backend: `auto` or a backend's name, which is then used or refused.

        Raises:
            InputError: unknown mode or backend, `gather` without `keep`, or `keep` of another width.
            UnsupportedModelError: `mlp` is no FFN that pyprune knows.
        """
        check_choice(mode, "mode", MODES)
        check(keep is not None or mode == "compact", "keep", "be given in gather mode", keep)
        ffn = mlp if isinstance(mlp, FFN) else _describe(mlp)
        weights = ffn.weights()
        if keep is not None:
            size = weights.down.shape[0]
            check(keep.intermediate_size == size, "keep", f"refer to {size} neurons", keep.intermediate_size)
        with torch.no_grad():
            rows = keep.neurons if keep is not None and mode == "compact" else None
            record, neuron_bias = pack(weights, rows)
            down_bias = None if weights.down_bias is None else weights.down_bias.clone()
        module = cls(
            record,
            neuron_bias,
            down_bias,
            pattern=ffn.pattern,
            activation=ffn.activation,
            transposed=isinstance(ffn.down, Conv1D),
            keep=keep if mode == "gather" else None,
            dropout=ffn.dropout,
            backend=backend,
        )
        for parameter in module.parameters():
            parameter.requires_grad_(any(p.requires_grad for p in ffn.parameters()))
        return module.train(ffn.holder.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`.

        Raises:
            InputError: x has another width, dtype or device than the record.
            BackendError: the forced backend cannot run this problem.
        """
        ops.check_operands(x, self.record, None, None, None, self.gated, self.activation)
        operands = [x, self.record] if self.index is None else [x, self.record, self.index]
        rest = (self.neuron_bias, self.down_bias, None)
        if self.backend == "auto" and torch.is_grad_enabled() and (x.requires_grad or self.record.requires_grad):
            # Training differentiates plain torch itself, which saves what the backward pass needs.
            out = ops.TWINS[self.gated, self.index is not None](*operands, *rest, activation=self.activation)
        else:
            out = ops.OPERATORS[self.gated, self.index is not None](*operands, *rest, self.activation, self.backend)
        return nn.functional.dropout(out, self.dropout, self.training) if self.dropout else out

    def extra_repr(self) -> str:
        kind = "gated" if self.gated else "plain"
        kept = "" if self.index is None else f", gather {len(self.index)}"
        return f"{kind}, D={self.hidden_size}, F={self.intermediate_size}{kept}, {self.activation}, {self.backend}"

    def _projection_tensors(self) -> dict[str, Tensor]:
        """Tensors under the family's own names; weights are views of the record where the layout allows it."""
        d, bias = self.hidden_size, self.neuron_bias
        parts = [self.record[:, i * d : (i + 1) * d] for i in range(3 if self.gated else 2)]
        *inputs, down = parts
        columns = [] if bias is None else list(bias.unbind(1))
        names = [name for name, _ in self.pattern.inputs]
        if self.pattern.fused:
            inputs, columns = [torch.cat(inputs)], [torch.cat(columns)] if columns else []
        tensors = {}
        for name, weight in zip(names, inputs, strict=True):
            tensors[f"{name}.weight"] = weight.t() if self.transposed else weight
        tensors.update({f"{n}.bias": b for n, b in zip(names, columns, strict=False)})
        tensors[f"{self.pattern.down}.weight"] = down if self.transposed else down.t()
        if self.down_bias is not None:
            tensors[f"{self.pattern.down}.bias"] = self.down_bias
        return tensors

    def _split(self, prefix: str) -> tuple[str, tuple[str, ...]]:
        """Where the family's names start, and the projections to save or load under `prefix`.

        An in-layer FFN sits in the place of `up`; a `DownStandIn` in the place of `down` answers for that one.
        """
        up, down = self.pattern.up, self.pattern.down
        for name in (up, down) if self.pattern.in_layer else ():
            if prefix.endswith(f"{name}."):
                return prefix[: -len(name) - 1], (name,)
        return prefix, (*(name for name, _ in self.pattern.inputs), down)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        root, projections = self._split(prefix)
        for name, tensor in self._projection_tensors().items():
            if name.partition(".")[0] in projections:
                tensor = tensor if keep_vars else tensor.detach()
                destination[root + name] = tensor.clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        root, projections = self._split(prefix)
        tensors = self._projection_tensors()
        for name, old in list(tensors.items()):
            if name.partition(".")[0] not in projections:
                continue
            new = state_dict.get(root + name)
            if new is None:
                missing_keys.append(root + name)
            elif new.shape != old.shape:
                error_msgs.append(f"{root}{name} must have shape {tuple(old.shape)}; got {tuple(new.shape)}")
            else:
                tensors[name] = new
        if strict:
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k[len(root) :] not in tensors)
        with torch.no_grad():
            self._assign({name: tensor.to(self.record.device, copy=True) for name, tensor in tensors.items()})

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        names = [name for name, _ in self.pattern.inputs]
        down = tensors[f"{self.pattern.down}.weight"]
        weights = [tensors[f"{n}.weight"] for n in names] + [down.t()]
        if self.transposed:
            weights = [w.t() for w in weights]
        if self.pattern.fused:
            weights = [*weights[0].chunk(2), weights[1]]
        for i, weight in enumerate(weights):
            self.record[:, i * self.hidden_size : (i + 1) * self.hidden_size] = weight
        if self.neuron_bias is not None:
            biases = [tensors[f"{n}.bias"] for n in names]
            self.neuron_bias.copy_(torch.stack(biases[0].chunk(2) if self.pattern.fused else biases, dim=1))
        if self.down_bias is not None:
            self.down_bias.copy_(tensors[f"{self.pattern.down}.bias"])


class DownStandIn(nn.Identity):
    """In the place of an in-layer FFN's down projection: hands on what its `PrunedMLP` computed, owns its names."""

    def __init__(self, mlp: PrunedMLP) -> None:
        super().__init__()
        self.__dict__["mlp"] = mlp  # past nn.Module, whose child it is not

    def _save_to_state_dict(self, *args: Any) -> None:
        self.__dict__["mlp"]._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["mlp"]._load_from_state_dict(*args)


def _describe(mlp: nn.Module) -> FFN:
    """Recognise a lone FFN module."""
    pattern = match(mlp)
    with torch.no_grad():
        activation = detect_activation(mlp, pattern) if pattern else None
    if pattern is None or activation is None:
        children = ", ".join(n for n, _ in mlp.named_children()) or "no children"
        raise UnsupportedModelError(f"{type(mlp).__name__} is no FFN that pyprune knows (it has {children})")
    return FFN(0, "", mlp, pattern, activation)
