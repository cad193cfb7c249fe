"""FFN: what is pruned as one, a module of a layer or one expert of a bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.errors import UnsupportedModelError, check
from .experts import Bank
from .patterns import FFNWeights, Pattern, projections

# Of an FFN whose activation is none of `reference.ACTIVATIONS`: it runs in its own module only.
OWN = "own"
# Transformers' grouped products of experts want rows of whole 16 bytes: of bfloat16, as many neurons as this.
ROW = 8


@dataclass(frozen=True, eq=False)
class FFN:
    """One FFN found in a model.

    Attributes:
        layer: its number among the model's FFNs; where every decoder layer has one, the layer's.
        name: dotted path, in the model, of the module that holds the projections.
        holder: that module.
        pattern: the row of `PATTERNS` it matched.
        activation: a key of `reference.ACTIVATIONS`, or `OWN`.
        stack, block: which of the model's lists of layers (`towers.stacks`), and which layer of it.
        group: what all FFNs have in common that must keep the same width, as the experts of a layer; else its name.
        shared: several layers run it.
        twins: (path, module) of FFNs elsewhere that hold the same parameters.
    """

    layer: int
    name: str
    holder: nn.Module
    pattern: Pattern
    activation: str
    stack: int = 0
    block: int = 0
    group: str = ""
    shared: bool = False
    twins: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def down(self) -> nn.Module:
        return self.holder.get_submodule(self.pattern.down)

    @property
    def downs(self) -> list[nn.Module]:
        """Its down projection, and those of its twins."""
        return [h.get_submodule(self.pattern.down) for h in (self.holder, *(twin for _, twin in self.twins))]

    @property
    def gated(self) -> bool:
        return self.pattern.gated

    @property
    def expert(self) -> bool:
        """Whether it is one of several that tokens are routed to."""
        return bool(self.group) and self.group != self.name

    @property
    def hidden_size(self) -> int:
        return self.weights().down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.weights().down.shape[0]

    @property
    def dropout(self) -> float:
        """Dropout probability that the FFN module applies to its output while training."""
        if self.pattern.in_layer:
            return 0.0  # the decoder layer applies its own
        found = [m.p for m in self.holder.children() if isinstance(m, nn.Dropout)]
        return float(found[0] if found else getattr(self.holder, "residual_dropout", 0.0))

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the FFN's projections."""
        names = [name for name, _ in self.pattern.inputs] + [self.pattern.down]
        return [p for name in names for p in self.holder.get_submodule(name).parameters()]

    def weights(self) -> FFNWeights:
        """Views of the projections, neuron-major; they share memory with the model."""
        return projections(self.holder, self.pattern)


@dataclass(frozen=True, eq=False)
class Expert(FFN):
    """One expert of a bank: its weights are slices of the bank's tensors, no module of its own runs it.

    Attributes:
        bank: the bank.
        number: of the expert in it.
    """

    bank: Bank | None = None
    number: int = 0

    @classmethod
    def of(cls, bank: Bank, number: int, layer: int, stack: int, block: int) -> Expert:
        """Expert `number` of a bank."""
        gate = bank.layout.gate or bank.layout.up if bank.layout.fused or bank.layout.gate else None
        pattern = Pattern("experts", up=bank.layout.up, down=bank.layout.down, gate=gate)
        where = {"stack": stack, "block": block, "group": bank.name, "bank": bank, "number": number}
        return cls(layer, f"{bank.name}.{number}", bank.module, pattern, OWN, **where)  # type: ignore[arg-type]

    @property
    def of_bank(self) -> Bank:
        """The bank."""
        assert self.bank is not None
        return self.bank

    @property
    def down(self) -> nn.Module:
        raise UnsupportedModelError(
            f"{self.name} is an expert whose weights lie in a tensor with the others': `prune` with allocation "
            "'uniform', 'global', 'sensitivity' or 'predictor' and `prune_experts` take it, nothing else does"
        )

    @property
    def dropout(self) -> float:
        return 0.0

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the bank."""
        found: Any = self.of_bank.module.parameters()
        return list(found)

    def weights(self) -> FFNWeights:
        return self.of_bank.weights(self.number)


def tied(ffns: list[FFN], widths: list[int]) -> list[int]:
    """Widths, one an FFN, as they can be: all experts of a group have their mean, and banks a multiple of `ROW`."""
    found = list(widths)
    for group in groups(ffns):
        mean = sum(widths[ffn.layer] for ffn in group) / len(group)
        size, own = group[0].intermediate_size, max(1, round(mean))
        if isinstance(group[0], Expert) and mean < size:
            own = min(size, max(ROW, round(mean / ROW) * ROW))
        for ffn in group:
            found[ffn.layer] = own
    return found


def whole_rows(widths: list[int]) -> list[int]:
    """Those of ascending widths that a bank may have: multiples of `ROW`, and the last, its own."""
    return [width for width in widths if width % ROW == 0 or width == widths[-1]]


def check_tied(ffns: list[FFN], widths: list[int]) -> None:
    """Raise `InputError` where a mask does not keep experts of a group at one width that can be."""
    wanted = tied(ffns, widths)
    for ffn in ffns:
        if widths[ffn.layer] != wanted[ffn.layer]:
            rule = f"keep as many neurons of every expert of {ffn.group}, a multiple of {ROW}"
            check(False, "mask", rule, sorted({widths[f.layer] for f in ffns if f.group == ffn.group}))


def groups(ffns: list[FFN]) -> list[list[FFN]]:
    """FFNs by group, in order: the experts of a layer together, every other FFN alone."""
    found: dict[str, list[FFN]] = {}
    for ffn in ffns:
        found.setdefault(ffn.group or ffn.name, []).append(ffn)
    return list(found.values())
