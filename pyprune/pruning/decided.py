"""What is decided for one FFN, and how the ranks that share out the FFNs of a group tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.ranks import Ranks
from ..model.mask import KeepIndex
from .repair import Fitted


@dataclass
class LayerReport:
    """What pruning did to one FFN.

    Attributes:
        layer: its number.
        before, after: neurons.
        error_cut, error_repaired: squared error of the FFN's output over the calibration tokens relative to the
            squared dense output, for the bare cut and after least squares; None where not measured.
        error_refit: after the rows were fitted by gradient, on the held-out quarter of the tokens; None as above.
        damping: ridge of the least-squares fit; None where there was none.
        dead: neurons that never were active on the calibration text; None where nobody looked.
        tokens: of an expert, calibration tokens that were routed to it; else None.
    """

    layer: int
    before: int
    after: int
    error_cut: float | None = None
    error_repaired: float | None = None
    error_refit: float | None = None
    damping: float | None = None
    dead: int | None = None
    tokens: int | None = None


@dataclass
class Decided:
    """What one FFN keeps, its new rows, and what is reported of it.

    Attributes:
        few: the tokens of an expert that saw too few of them; else None.
    """

    keep: KeepIndex
    fitted: Fitted
    report: LayerReport
    few: int | None = None


def same_keep(ranks: Ranks, keep: KeepIndex) -> KeepIndex:
    """The first rank's, on every one: scores from other hardware may differ in their last bits."""
    if not ranks.several:
        return keep
    found = ranks.exchange({"keep": keep.neurons} if ranks.rank == 0 else {})
    return KeepIndex(found["keep"], keep.intermediate_size)


def _packed(one: Decided) -> dict[str, Tensor]:
    """The tensors of what was decided."""
    fitted = one.fitted
    named: dict[str, Tensor | None] = {"keep": one.keep.neurons, "down": fitted.down, "shift": fitted.bias_shift}
    named |= {f"input{i}": t for i, t in enumerate(fitted.inputs or ())}
    named |= {f"bias{i}": t for i, t in enumerate(fitted.input_biases or ())}
    return {f"{one.report.layer}.{name}": tensor for name, tensor in named.items() if tensor is not None}


def everyone(ranks: Ranks, mine: list[Decided], sizes: Sequence[int], device: torch.device) -> list[Decided]:
    """What all ranks decided, in the order of the FFNs; of one that several decided, what the first of them did.

    Args:
        ranks: who.
        mine: decided here.
        sizes: F of all FFNs of the model.
        device: of the weights.
    """
    if not ranks.several:
        return mine
    facts: list[dict[str, Any]] = [
        {
            "report": vars(one.report),
            "few": one.few,
            "inputs": None if one.fitted.inputs is None else len(one.fitted.inputs),
        }
        for one in mine
    ]
    owners: dict[int, tuple[int, dict[str, Any]]] = {}
    for rank, rows in enumerate(ranks.gather(facts)):
        for fact in rows:
            owners.setdefault(fact["report"]["layer"], (rank, fact))
    own = [one for one in mine if owners[one.report.layer][0] == ranks.rank]
    found = ranks.exchange({name: t for one in own for name, t in _packed(one).items()}, device)
    decided = []
    for layer, (_, fact) in sorted(owners.items()):
        report, count = LayerReport(**fact["report"]), fact["inputs"]
        fitted = Fitted(
            inputs=None if count is None else tuple(found[f"{layer}.input{i}"] for i in range(count)),
            input_biases=None if count is None else tuple(found.get(f"{layer}.bias{i}") for i in range(count)),
            down=found.get(f"{layer}.down"),
            bias_shift=found.get(f"{layer}.shift"),
            error_cut=report.error_cut,
            error_repaired=report.error_repaired,
            error_refit=report.error_refit,
            damping=report.damping,
        )
        decided.append(Decided(KeepIndex(found[f"{layer}.keep"], sizes[layer]), fitted, report, fact["few"]))
    return decided
