"""The `state_dict` of a `PrunedMLP`: the tensors of the module it stands for, under that one's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError, check
from ..model.patterns import Pattern
from .quantisation import cast, channel_scales, check_fits, dequantise

NO_PROJECTION = (
    "the FFNs of an accelerated model have their projections in one record, which can be neither adapted nor quantised "
    "by itself: add adapters to the model before pyprune.accelerate, and merge them; then accelerate it"
)


def fitting(
    state_dict: dict[str, Tensor],
    prefix: str,
    shapes: Mapping[str, torch.Size],
    missing_keys: list[str],
    error_msgs: list[str],
) -> dict[str, Tensor]:
    """The tensors of `shapes` that are in a `state_dict` below `prefix`; the two lists are told of the others."""
    found = {}
    for name, shape in shapes.items():
        new = state_dict.get(prefix + name)
        if new is None:
            missing_keys.append(prefix + name)
        elif new.shape != shape:
            error_msgs.append(f"{prefix}{name} must have shape {tuple(shape)}; got {tuple(new.shape)}")
        else:
            found[name] = new
    return found


class FamilyState(nn.Module):
    """What a `PrunedMLP` keeps, and how it is saved and loaded as its family's own projections; see there."""

    record: nn.Parameter
    neuron_bias: Tensor | None
    down_bias: Tensor | None
    scales: Tensor | None
    channel_scales: Tensor | None
    plain_down: Tensor | None  # the record's own down rows while others are in their place (`PrunedMLP.set_width`)
    plain_scales: Tensor | None
    pattern: Pattern
    transposed: bool
    hidden_size: int
    dtype: torch.dtype

    @property
    def _parts(self) -> int:
        return 3 if self.pattern.gated else 2

    @property
    def _part_columns(self) -> int:
        return self.record.shape[1] // self._parts

    def _projection_tensors(self) -> dict[str, Tensor]:
        """Tensors under the family's own names; weights are views of the record where layout and dtype allow it."""
        bias = self.neuron_bias
        record = dequantise(self.record, self.scales, self._parts, self.dtype)
        *inputs, down = record.split(self.hidden_size, dim=1)
        if self.plain_down is not None:
            plain = dequantise(self.plain_down, self.plain_scales, 1, self.dtype)
            down = torch.cat([plain, down[len(plain) :]])
        down_bias = self.down_bias
        if self.channel_scales is not None:
            down = down * self.channel_scales
            down_bias = None if down_bias is None else down_bias * self.channel_scales
        columns = [] if bias is None else list(bias.unbind(1))
        names = [name for name, _ in self.pattern.inputs]
        if self.pattern.fused:
            inputs, columns = [torch.cat(inputs)], [torch.cat(columns)] if columns else []
        tensors = {}
        for name, weight in zip(names, inputs, strict=True):
            tensors[f"{name}.weight"] = weight.t() if self.transposed else weight
        tensors.update({f"{n}.bias": b for n, b in zip(names, columns, strict=False)})
        tensors[f"{self.pattern.down}.weight"] = down if self.transposed else down.t()
        if down_bias is not None:
            tensors[f"{self.pattern.down}.bias"] = down_bias
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
        known = self._projection_tensors()
        shapes = {name: old.shape for name, old in known.items() if name.partition(".")[0] in projections}
        found = fitting(state_dict, root, shapes, missing_keys, error_msgs)
        if strict:
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k[len(root) :] not in known)
        if self.record.is_meta:
            rule = "have memory before values are loaded, and assign gives it none (module.to_empty first)"
            check(all(new.is_meta for new in found.values()), f"{prefix}record", rule, "meta")
            return
        tensors = {name: new.to(self.record.device) for name, new in found.items()}
        with torch.no_grad():
            self._check_all_fit(tensors, root)
            borrowed = self.plain_down is not None
            if borrowed:
                self._exchange_down()
            try:
                self._assign(tensors)
            finally:
                if borrowed:
                    self._exchange_down()

    def _check_all_fit(self, tensors: dict[str, Tensor], root: str) -> None:
        """Raise `InputError` before anything changes where a weight is not finite in the record's own dtype."""
        if self.record.dtype == self.dtype:
            return
        for name, tensor in tensors.items():
            if name.endswith(".weight"):
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                check_fits(local, self.record.dtype, root + name)

    def _exchange_down(self) -> None:
        """Swap the first down rows of the record with `plain_down`."""
        pairs = [(self.record.detach()[:, -self._part_columns :], self.plain_down)]
        if self.scales is not None:
            pairs.append((self.scales[:, -1:], self.plain_scales))
        for column, other in pairs:
            assert other is not None
            rows = column[: len(other)]
            own = rows.clone()
            rows.copy_(other)
            other.copy_(own)

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        """Take over those of the family's tensors that are there."""
        part = 0
        for name, blocks in self.pattern.inputs:
            weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
            for block in range(blocks):
                if weight is not None:
                    rows = weight.t() if self.transposed else weight
                    self._set_part(part, rows.chunk(blocks)[block])
                if bias is not None and self.neuron_bias is not None:
                    self.neuron_bias[:, part] = bias.chunk(blocks)[block]
                part += 1
        down, bias = tensors.get(f"{self.pattern.down}.weight"), tensors.get(f"{self.pattern.down}.bias")
        if down is not None:
            self._set_down(part, down if self.transposed else down.t())
        if bias is not None and self.down_bias is not None:
            self.down_bias.copy_(bias if self.channel_scales is None else bias / self.channel_scales)

    def _set_down(self, part: int, rows: Tensor) -> None:
        own = self.channel_scales
        # Compensated rows that wait for their turn are of the scales that are there.
        if own is not None and self.plain_down is None:
            scales = channel_scales(rows.to(own.dtype))
            if self.down_bias is not None:
                self.down_bias.mul_(own / scales)
            own.copy_(scales)
        self._set_part(part, rows if own is None else rows / own)

    def _set_part(self, part: int, weight: Tensor) -> None:
        columns = slice(part * self._part_columns, (part + 1) * self._part_columns)
        own = self.record.dtype == self.dtype
        self.record[:, columns], scales = (weight, None) if own else cast(weight, 1, self.record.dtype)
        if scales is not None and self.scales is not None:
            self.scales[:, part : part + 1] = scales


class NoProjectionError(UnsupportedModelError, AttributeError):
    """To `hasattr` a projection in a record has no weight; whoever goes on without asking reads why."""


class Packed(nn.Linear):
    """Stands in a `PrunedMLP` for a projection of its family, whose weights are part of the record.

    Adapters and quantisers look for linear modules by class and by name, and would pass over the FFN without a word.
    Here they find one, and its error. It has no tensors, and nothing calls it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise NoProjectionError(NO_PROJECTION)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """Never computes; raises `UnsupportedModelError`."""
        raise NoProjectionError(NO_PROJECTION)

    def _load_from_state_dict(self, *args: Any) -> None:
        """The `PrunedMLP` loads what stands under this name, and says what does not fit."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, in the record"


class DownStandIn(nn.Identity):
    """In the place of an in-layer FFN's down projection: hands on what its `PrunedMLP` computed, owns its names."""

    def __init__(self, mlp: FamilyState) -> None:
        super().__init__()
        self.__dict__["mlp"] = mlp  # past nn.Module, whose child it is not

    def _save_to_state_dict(self, *args: Any) -> None:
        self.__dict__["mlp"]._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["mlp"]._load_from_state_dict(*args)
