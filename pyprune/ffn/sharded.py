"""FFNs of a model that Transformers loaded tensor-parallel: each process holds the record of its own neurons.

A record cut by neurons is a record, and an FFN's output is the sum over its neurons. So every rank computes with its
rows, and the outputs are added up. Widths need not divide by the number of ranks: the last ones hold fewer rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError, check
from ..model import families
from ..model.families import FFN
from ..model.mask import KeepIndex, Mask
from ..model.patterns import Pattern, match, projections
from ..model.probe import detect_activation
from ..model.towers import stacks
from ..model.weights import is_sharded
from .mlp import PrunedMLP

PLAN = "load it with the plan that Transformers has for the model (tp_plan='auto'), by torch.distributed.tensor"


@dataclass(frozen=True)
class Shard:
    """The neurons of one FFN that a rank holds.

    Attributes:
        mesh: of the ranks, one dimension.
        size: F, of all ranks.
        bias: `[D]` of the down projection, which is added once, or None.
    """

    mesh: Any
    size: int
    bias: Tensor | None

    @property
    def each(self) -> int:
        """Neurons of every rank but the last ones."""
        return -(-self.size // self.mesh.size())

    def kept(self, keep: KeepIndex, layer: int) -> KeepIndex:
        """The part of an index of all neurons that lies here, by this rank's numbers.

        Raises:
            InputError: a rank has none; on every rank.
        """
        own = keep.neurons.long()
        counts = torch.bincount(own // self.each, minlength=self.mesh.size()).tolist()
        rule = f"keep a neuron of each of {self.mesh.size()} ranks in layer {layer}"
        check(min(counts) > 0, "mask", rule, counts)
        start = self.mesh.get_local_rank() * self.each
        width = min(self.each, self.size - start)
        return KeepIndex(own[own // self.each == self.mesh.get_local_rank()] - start, width)


class _Given(torch.autograd.Function):
    """What every rank gets: its gradient is the sum of what each rank's neurons say."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, on each: every rank's part has the gradient of the whole."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ShardedMLP(PrunedMLP):
    """A `PrunedMLP` of a part of the neurons, whose output is summed over the ranks.

    Attributes:
        shard: which part, of what.
        shared_bias: `[D]` parameter, added after the sum; or None.
    """

    shard: Shard
    shared_bias: Tensor | None

    def shard_as(self, shard: Shard) -> None:
        """Let it be the part that `shard` says."""
        self.shard = shard
        wanted = self.record.requires_grad
        bias = None if shard.bias is None else nn.Parameter(shard.bias.detach().clone(), requires_grad=wanted)
        self.register_parameter("shared_bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`, the same on every rank that gets the same x; errors as `PrunedMLP.forward`."""
        group = self.shard.mesh.get_group()
        if torch.is_grad_enabled() and self._needs_grad(x):
            out: Tensor = _Sum.apply(super().forward(_Given.apply(x, group)), group)
        else:
            out = super().forward(x)
            dist.all_reduce(out, group=group)
        bias = self._parameters["shared_bias"]
        return out if bias is None else out + bias

    def _projection_tensors(self) -> dict[str, Tensor]:
        """As DTensors of the whole FFN, as they were loaded."""
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor import Shard as Place

        found: dict[str, Tensor] = {}
        mesh = self.shard.mesh
        for name, local in super()._projection_tensors().items():
            dim = 1 if name == f"{self.pattern.down}.weight" else 0
            shape = [*local.shape]
            shape[dim] = self.shard.size
            stride = (shape[1], 1) if len(shape) == 2 else (1,)
            whole: dict[str, Any] = {"shape": torch.Size(shape), "stride": stride}
            found[name] = DTensor.from_local(local.contiguous(), mesh, [Place(dim)], run_check=False, **whole)
        if self.shared_bias is not None:
            bias = DTensor.from_local(self.shared_bias.detach(), mesh, [Replicate()], run_check=False)
            found[f"{self.pattern.down}.bias"] = bias
        return found

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        local = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in tensors.items()}
        bias = local.get(f"{self.pattern.down}.bias")
        if bias is not None and self.shared_bias is not None:
            self.shared_bias.copy_(bias)
        super()._assign(local)


@dataclass(frozen=True)
class Parts:
    """The FFNs of a tensor-parallel model.

    Attributes:
        ffns: with this rank's neurons, in modules of their own over the model's tensors.
        shards: which neurons those are, one an FFN.
    """

    model: nn.Module
    ffns: list[FFN]
    shards: list[Shard]

    def own(self, mask: Mask | None, mode: str) -> Mask | None:
        """The part of a mask that is this rank's.

        Raises:
            InputError: compact mode, a mask of another model, or one that leaves a rank nothing.
        """
        if mask is None:
            return None
        rule = "be gather with a mask on a tensor-parallel model; or prune the model, save it, and load that"
        check(mode == "gather", "mode", rule, mode)
        fingerprint = families.fingerprint_of(self.model, self._samples())
        mask.check_fits([shard.size for shard in self.shards], fingerprint)
        pairs = zip(mask.layers, self.shards, strict=True)
        keeps = tuple(shard.kept(keep, layer) for layer, (keep, shard) in enumerate(pairs))
        return Mask(keeps, fingerprint, mask.provenance)

    def _samples(self) -> Iterator[bytes]:
        for ffn in self.ffns:
            whole = projections(self.model.get_submodule(ffn.name), ffn.pattern)
            yield families.sample_of(ffn.layer, ffn.gated, whole)


def _is_shard(tensor: Any, dim: int) -> bool:
    """Whether a tensor is cut along `dim`, and no other way, over a mesh of one dimension."""
    places: Any = getattr(tensor, "placements", ())
    return len(places) == 1 and type(places[0]).__name__ == "Shard" and places[0].dim % tensor.ndim == dim


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A projection over the local part of these very tensors."""
    own = weight.to_local()
    made: Any = nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
    made.bias = None if bias is None else nn.Parameter(bias.to_local(), requires_grad=bias.requires_grad)
    linear: nn.Linear = made
    return linear


def _part(where: str, holder: nn.Module, pattern: Pattern) -> tuple[nn.Module, Shard]:
    """A copy of an FFN module with this rank's neurons, and which those are."""
    down: Any = holder.get_submodule(pattern.down)
    inputs: list[Any] = [holder.get_submodule(name) for name, _ in pattern.inputs]
    right = not pattern.in_layer and not pattern.fused and _is_shard(down.weight, 1)
    right = right and all(_is_shard(t, 0) for m in inputs for t in (m.weight, m.bias) if t is not None)
    if not right or any("." in name for name, _ in pattern.inputs):
        raise UnsupportedModelError(f"{where} ({pattern.name}) is not cut by neurons over one row of ranks: {PLAN}")
    local = copy.copy(holder)
    local._modules = dict(holder._modules)
    for (name, _), module in zip(pattern.inputs, inputs, strict=True):
        local._modules[name] = _linear(module.weight, module.bias)
    local._modules[pattern.down] = _linear(down.weight, None)
    bias = down.bias
    shard = Shard(down.weight.device_mesh, down.weight.shape[1], bias.to_local() if hasattr(bias, "to_local") else bias)
    ranks, here = shard.mesh.size(), local._modules[pattern.down].in_features  # type: ignore[union-attr]
    check((ranks - 1) * shard.each < shard.size, where, f"have a neuron for each of {ranks} ranks", shard.size)
    expected = min(shard.each, shard.size - shard.mesh.get_local_rank() * shard.each)
    if here != expected:
        raise UnsupportedModelError(f"{where} has {here} of {shard.size} neurons here, not {expected}: {PLAN}")
    return local, shard


@torch.no_grad()
def find(model: nn.Module) -> Parts | None:
    """The FFNs of a model whose layers are tensor-parallel; None for a model that is whole in this process.

    Raises:
        UnsupportedModelError: FFNs that are cut in another way than by neurons, or are of several forms.
        InputError: fewer neurons than ranks.
    """
    if not is_sharded(model):
        ranks = getattr(model, "tp_size", None) or 1
        if ranks > 1:
            raise UnsupportedModelError(f"{type(model).__name__} is tensor-parallel without DTensors: {PLAN}")
        return None
    kind = type(model).__name__
    ffns: list[FFN] = []
    shards: list[Shard] = []
    for number, (list_name, layers) in enumerate(stacks(model)):
        for i, layer in enumerate(layers):
            if any(hasattr(m, "record") for m in layer.modules()):
                raise UnsupportedModelError(f"{list_name}.{i} is accelerated already")
            found = [(n, m, p) for n, m in layer.named_modules() if (p := match(m, in_layer=not n)) is not None]
            if len(found) != 1 or number:
                raise UnsupportedModelError(
                    f"{kind}: {list_name}.{i} has {len(found)} FFNs; tensor-parallel, one is taken"
                )
            name, holder, pattern = found[0]
            where = f"{list_name}.{i}.{name}"
            local, shard = _part(where, holder, pattern)
            activation = detect_activation(local, pattern)
            if activation is None:
                raise UnsupportedModelError(f"{kind}: {where} computes no FFN with an activation that records know")
            ffns.append(FFN(len(ffns), where, local, pattern, activation, number, i, where))
            shards.append(shard)
    return Parts(model, ffns, shards)
