"""Banks of experts: FFNs of one layer whose weights lie together in tensors, each run on the tokens routed to it.

How a bank lays its weights out is read from what Transformers says on the module (`is_transposed`, `is_concatenated`,
`has_gate`), else from the shapes; then it is tried out: a small copy of the module must compute, for a random routing,
what the layout says.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.errors import InputError, check
from .heterogeneous import SAYS_WIDTH
from .patterns import FFNWeights


@dataclass(frozen=True)
class Layout:
    """Names of a bank's tensors, and how they lie.

    Attributes:
        up, down: names; `up` holds gate and up together where `fused`.
        gate: of a tensor of its own, or None.
        fused: gate and up in one tensor, gate first.
        flat: `[E * F, D]` each instead of `[E, F, D]`.
        sorted_rows: the module gets the rows of every expert, one block of equal length an expert, weighted already.
    """

    up: str
    down: str
    gate: str | None = None
    fused: bool = False
    flat: bool = False
    sorted_rows: bool = False


LAYOUTS = (
    Layout("gate_up_proj", "down_proj", fused=True),
    Layout("gate_up_proj", "down_proj", fused=True, sorted_rows=True),
    Layout("up_proj", "down_proj"),
    Layout("mlp.v1", "mlp.w2", gate="mlp.w1", flat=True),
)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    holder: Any = module
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return holder if isinstance(holder, Tensor) else None


@dataclass(frozen=True, eq=False)
class Bank:
    """A module that holds the experts of one layer.

    Attributes:
        name: its dotted path.
        module: the module.
        layout: how its weights lie.
        transposed: inputs first: `[E, D, F]` into the experts.
        interleaved: rows of gate and up take turns.
        experts: how many.
        size: F, of each.
    """

    name: str
    module: Any
    layout: Layout
    transposed: bool
    interleaved: bool
    experts: int
    size: int

    def tensor(self, name: str) -> Tensor:
        """The parameter at `name`."""
        found = _tensor(self.module, name)
        assert found is not None
        return found

    def _rows(self, name: str, outward: bool) -> Tensor:
        """`[E, F or 2F, D]` view of a tensor."""
        tensor = self.tensor(name)
        if self.layout.flat:
            return tensor.view(self.experts, -1, tensor.shape[1])
        return tensor.transpose(1, 2) if self.transposed != outward else tensor

    def _split(self, tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        if not self.interleaved:
            gate, up = tensor.chunk(2, dim)
            return gate, up
        index = (slice(None),) * dim
        return tensor[(*index, slice(0, None, 2))], tensor[(*index, slice(1, None, 2))]

    def all_weights(self) -> FFNWeights:
        """Views of all experts: parts `[E, F, D]`, biases `[E, F]` and `[E, D]`."""
        layout = self.layout
        up, down = self._rows(layout.up, False), self._rows(layout.down, not layout.flat)
        up_bias, down_bias = (_tensor(self.module, f"{name}_bias") for name in (layout.up, layout.down))
        gate = gate_bias = None
        if layout.fused:
            gate, up = self._split(up, 1)
            if up_bias is not None:
                gate_bias, up_bias = self._split(up_bias, 1)
        elif layout.gate:
            gate = self._rows(layout.gate, False)
        return FFNWeights(up, down, gate, up_bias, gate_bias, down_bias)

    def sides(self) -> list[list[Any]]:
        """[name, dimension of the neurons, blocks of neurons along it, interleaved] of every tensor, `down` last."""
        layout = self.layout
        if layout.flat:
            return [[name, 0, self.experts, False] for name in (layout.gate, layout.up, layout.down)]
        blocks = 2 if layout.fused else 1
        found: list[list[Any]] = [[layout.up, 2 if self.transposed else 1, blocks, self.interleaved]]
        if _tensor(self.module, f"{layout.up}_bias") is not None:
            found.append([f"{layout.up}_bias", 1, blocks, self.interleaved])
        return [*found, [layout.down, 1 if self.transposed else 2, 1, False]]

    def weights(self, expert: int) -> FFNWeights:
        """Views of one expert, neuron-major: parts `[F, D]`, biases `[F]` and `[D]`."""
        every: dict[str, Any] = vars(self.all_weights())
        own: dict[str, Any] = {name: None if t is None else t[expert] for name, t in every.items()}
        return FFNWeights(**own)

    def activations(self, expert: int, x: Tensor) -> Tensor:
        """`[T, F]`: what enters the down projection of an expert for rows `x` `[T, D]`."""
        w = self.weights(expert)
        up = F.linear(x, w.up, w.up_bias)
        act: Any = self.module.mlp.activation_fn if self.layout.flat else getattr(self.module, "act_fn", None)
        if w.gate is None:
            return act(up)
        gate = F.linear(x, w.gate, w.gate_bias)
        if not hasattr(self.module, "_apply_gate"):
            return act(gate) * up
        both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        return self.module._apply_gate(both)

    def outputs(self, expert: int, a: Tensor) -> Tensor:
        """`[T, D]`: what an expert gives for activations `a` `[T, F]`."""
        w = self.weights(expert)
        out = F.linear(a, w.down.t(), w.down_bias)
        return self.module.post_expert_norm(out) if getattr(self.module, "has_post_expert_norm", False) else out

    def routed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(expert, its rows `[T, D]`, the router's weights `[T]`, the tokens `[T]`) of one call of the module.

        Tokens are numbered over all dimensions of the hidden state but the last. Numbers of experts beyond the bank's,
        as of experts that do nothing, are passed over.

        Raises:
            InputError: the number of an expert that there is not.
        """
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        hidden = given[0].reshape(-1, given[0].shape[-1])
        if self.layout.sorted_rows:
            for expert, rows in enumerate(hidden.view(self.experts, -1, hidden.shape[-1])):
                tokens = (rows != 0).any(-1).nonzero().flatten()
                yield expert, rows[tokens], rows.new_ones(len(tokens)), tokens
            return
        index, weights = (t.reshape(len(hidden), -1) for t in sorted(given[1:3], key=lambda t: t.is_floating_point()))
        # One more than there are says "none"; banks may name more that do nothing.
        most = max(self.experts, len(self.tensor(self.layout.up)) - 1 if not self.layout.flat else 0)
        low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
        check(low >= 0 and high <= most, f"router of {self.name}", f"name experts in [0, {self.experts})", (low, high))
        for expert in range(self.experts):
            tokens, place = (index == expert).nonzero(as_tuple=True)
            yield expert, hidden[tokens], weights[tokens, place], tokens

    def of_gradients(self) -> Bank | None:
        """The same over the gradients of the tensors; None where one has none yet."""
        grads = {name: self.tensor(name).grad for name, *_ in self.sides()}
        if any(gradient is None for gradient in grads.values()):
            return None
        return self.over(grads)  # type: ignore[arg-type]

    def over(self, tensors: dict[str, Tensor]) -> Bank:
        """The same over other tensors, by the names of its own; what is not among them is not there."""
        holder = SimpleNamespace()
        for name, tensor in tensors.items():
            *parents, last = name.split(".")
            place = holder
            for parent in parents:
                place = vars(place).setdefault(parent, SimpleNamespace())
            setattr(place, last, tensor)
        return replace(self, module=holder)

    def forward(self, *args: Any, see: Callable[[int, Tensor], None] | None = None, **kwargs: Any) -> Tensor:
        """What the module gives, written out with the words above; `see` gets every expert's activations `[T, F]`."""
        hidden = args[0]
        out = torch.zeros_like(hidden.reshape(-1, hidden.shape[-1]))
        blocks = out.view(self.experts, -1, out.shape[-1]) if self.layout.sorted_rows else None
        for expert, x, weights, tokens in self.routed(args, kwargs):
            a = self.activations(expert, x)
            if see is not None:
                see(expert, a)
            given = self.outputs(expert, a) * weights[:, None]
            (out if blocks is None else blocks[expert]).index_add_(0, tokens, given.to(out.dtype))
        return out.view_as(hidden)


def _shaped(name: str, module: Any, layout: Layout) -> Bank | None:
    """A bank of this layout whose shapes fit each other, or None."""
    up, down = _tensor(module, layout.up), _tensor(module, layout.down)
    if up is None or down is None or up.ndim != down.ndim or up.ndim != (2 if layout.flat else 3):
        return None
    if layout.flat:
        experts = getattr(module, "num_experts", 0)
        fits = experts and up.shape == down.shape and len(up) % experts == 0
        return Bank(name, module, layout, False, False, experts, len(up) // experts) if fits else None
    blocks = 2 if layout.fused else 1
    e, a, b = up.shape
    straight, turned = (
        (a, b) == (blocks * down.shape[2], down.shape[1]),
        (b, a) == (blocks * down.shape[1], down.shape[2]),
    )
    transposed = getattr(module, "is_transposed", turned and (layout.sorted_rows or not straight))
    if not (turned if transposed else straight) or e < len(down):
        return None
    interleaved = layout.fused and not getattr(module, "is_concatenated", True)
    return Bank(name, module, layout, transposed, interleaved, len(down), down.shape[1 if transposed else 2])


def find_bank(name: str, module: nn.Module) -> Bank | None:
    """The bank of experts that a module looks like, going by shapes (see `computes`), or None."""
    if not module._parameters and not hasattr(module, "num_experts"):
        return None
    forms = (b for layout in LAYOUTS if (b := _shaped(name, module, layout)))
    arguments = len(inspect.signature(type(module).forward).parameters) - 1
    return next((b for b in forms if b.layout.sorted_rows == (arguments == 1)), None)


def miniature(bank: Bank, experts: int, size: int) -> Bank:
    """A bank of few experts of few neurons, with random float64 weights; else the module's own."""
    generator = torch.Generator().manual_seed(0)
    sides = {name: (dim, blocks) for name, dim, blocks, _ in bank.sides()}
    hidden = bank.all_weights().down.shape[2]

    def shape(name: str, parameter: Tensor) -> list[int]:
        found = list(parameter.shape)
        if name not in sides and name != f"{bank.layout.down}_bias":
            return found
        # Banks may have more rows than experts, of some that do nothing.
        found[0] = experts + (0 if bank.layout.flat else found[0] - bank.experts)
        if name in sides:
            dim, blocks = sides[name]
            found[dim] = size * (experts if bank.layout.flat else blocks)
        return found

    def smaller(module: Any, path: str) -> Any:
        module = copy.copy(module)
        for key, value in list(vars(module).items()):
            if type(value) is int and value == bank.size and re.search(SAYS_WIDTH, key):
                vars(module)[key] = size
            elif type(value) is int and value == bank.experts and "expert" in key:
                vars(module)[key] = experts
        module._parameters = {
            name: None if p is None else random(shape(path + name, p)) for name, p in module._parameters.items()
        }
        return module

    def random(shape: list[int]) -> Tensor:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) / hidden**0.5)

    small = smaller(bank.module, "")
    inside = bank.module._modules.items()
    small._modules = {k: smaller(m, f"{k}.") if list(m.parameters(False)) else m for k, m in inside}
    return replace(bank, module=small, experts=experts, size=size)


@torch.no_grad()
def computes(bank: Bank) -> bool:
    """Whether the module does what its layout says: a small copy of it, on random rows with a random routing."""
    generator = torch.Generator().manual_seed(1)
    experts = min(3, bank.experts)
    try:
        small = miniature(bank, experts, 12)
        hidden = small.all_weights().down.shape[2]
        x = torch.randn(6 * experts, hidden, generator=generator, dtype=torch.float64)
        routing: tuple[Tensor, ...] = ()
        if not bank.layout.sorted_rows:
            index = torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in range(len(x))])
            routing = index, torch.rand(index.shape, generator=generator, dtype=torch.float64)
        want = small.forward(x, *routing)
        rows = x[None] if bank.layout.flat else x
        got = inspect.unwrap(type(small.module).forward)(small.module, rows, *routing)
    except (TypeError, ValueError, IndexError, RuntimeError, KeyError, AttributeError, InputError):
        return False
    if not isinstance(got, Tensor) or got.numel() != want.numel():
        return False
    # Some sum in float32 whatever they get.
    error = torch.linalg.vector_norm(got.view_as(want) - want, dim=-1)
    return bool((error <= 1e-5 * torch.linalg.vector_norm(want, dim=-1)).all())
