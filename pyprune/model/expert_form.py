"""Whether the experts of a bank can run from records: which activation they have, or what stands against it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..base.activations import ACTIVATIONS
from .experts import Bank, miniature


def tensor_names(bank: Bank) -> list[str]:
    """The tensor that holds each part of a record: [up, down] or [gate, up, down]; the first two may be one."""
    layout = bank.layout
    gate = layout.gate or (layout.up if layout.fused else None)
    return [*([gate] if gate else []), layout.up, layout.down]


@torch.no_grad()
def activation(bank: Bank) -> str | None:
    """The key of `ACTIVATIONS` that the experts of a bank apply to gate (or up), or None where it is none of them.

    Tried on a small copy of the module, on small values, which tell smooth activations apart, and on large ones, which
    tell clipped ones from unclipped.
    """
    small = miniature(bank, min(2, bank.experts), 12)
    w = small.weights(0)
    x = torch.randn(16, w.down.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[8:] *= 16
    got = small.activations(0, x)
    first = F.linear(x, w.parts[0], w.input_biases[0])
    factor = 1.0 if w.gate is None else F.linear(x, w.up, w.up_bias)
    for name, act in ACTIVATIONS.items():
        want = act(first) * factor
        if bool(((got - want).norm(dim=-1) <= 1e-5 * want.norm(dim=-1)).all()):
            return name
    return None


def why_no_record(bank: Bank) -> str | None:
    """Why the experts of a bank cannot run from records, in one line, or None."""
    w = bank.all_weights()
    against = []
    if bank.layout.sorted_rows:
        against.append("rows that come sorted by expert")
    if w.up_bias is not None or w.down_bias is not None:
        against.append("biases")
    if getattr(bank.module, "has_post_expert_norm", False):
        against.append("a norm behind each expert")
    if len(bank.tensor(bank.layout.up)) > bank.experts and not bank.layout.flat:
        against.append("experts that do nothing")
    if getattr(bank.module, "_is_expert_parallel", False):
        against.append("parts on other devices")
    if activation(bank) is None:
        against.append("an activation of its own")
    return f"its experts have {' and '.join(against)}" if against else None
