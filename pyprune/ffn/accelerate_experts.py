"""What `accelerate` does with experts: which banks become a `PrunedMoE`, and why the others stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base.experts import Experts, ragged
from ..base.memory import Room, release
from ..model.expert_form import activation, why_no_record
from ..model.expert_removal import TOP_KEYS
from ..model.experts import Bank
from ..model.families import FFN, Expert
from ..model.mask import KeepIndex, Mask
from ..model.units import groups
from . import moe_choice
from .moe import BACKENDS, PrunedMoE
from .moe_operator import why_no_kernel
from .quantisation import WEIGHTS, check_fits


def banks_of(ffns: list[FFN]) -> list[Bank]:
    """The banks whose experts are among these."""
    return [group[0].of_bank for group in groups(ffns) if isinstance(group[0], Expert)]


def picked(model: nn.Module, experts: int) -> int:
    """How many of so many experts a token goes to, as a config says; 2 where none does."""
    config: Any = model.config
    found = (getattr(part, name, None) for part in (config.get_text_config(), config) for name in TOP_KEYS)
    return min(experts, next((k for k in found if isinstance(k, int) and k > 0), 2))


def why_not(bank: Bank, backend: str, weights: str | None) -> str | None:
    """Why a bank cannot become a `PrunedMoE`, in one line, or None; arguments as of `accelerate`."""
    if backend not in BACKENDS:
        return f"backend {backend} has no kernel of experts"
    if weights == "int4":
        return "experts have no int4 records yet"
    if reason := why_no_record(bank):
        return reason
    down = bank.tensor(bank.layout.down)
    dtype = WEIGHTS[weights] if weights else down.dtype
    kernel = None if backend == "auto" else backend
    return None if backend == "torch" else why_no_kernel(down.device.type, down.dtype, dtype, kernel)


# Of each bank, by its name, what stays of its experts; empty for all.
Keeps = Mapping[str, list[KeepIndex]]


def keeps_of(ffns: Sequence[FFN], mask: Mask | None) -> dict[str, list[KeepIndex]]:
    """What a mask keeps of the banks among these."""
    found = [group for group in groups(list(ffns)) if isinstance(group[0], Expert)] if mask is not None else []
    return {group[0].group: [mask.layers[ffn.layer] for ffn in group] for group in found if mask is not None}


def described(bank: Bank, weights: str | None, keep: list[KeepIndex] | None = None) -> tuple[Experts, torch.dtype]:
    """The records that a bank would have, on the meta device, and the dtype of x."""
    given, name = bank.all_weights(), activation(bank)
    e, f, d = given.down.shape
    dtype = WEIGHTS[weights] if weights else given.down.dtype
    rows = torch.empty(e, f, len(given.parts) * d, dtype=dtype, device="meta")
    assert name is not None
    index, counts = (None, None) if keep is None else (t.to("meta") for t in ragged([one.neurons for one in keep]))
    return Experts.unchecked(rows, given.gate is not None, name, None, index, counts), given.down.dtype


def _on_cpu(bank: Bank) -> bool:
    return bank.tensor(bank.layout.down).device.type == "cpu"


def measure(model: nn.Module, banks: Sequence[Bank], weights: str | None, keeps: Keeps) -> None:
    """Time the banks of each shape on a CPU once, over records that are freed again."""
    seen = set()
    for bank in filter(_on_cpu, banks):
        keep = keeps.get(bank.name)
        records, dtype = described(bank, weights, keep)
        k = picked(model, bank.experts)
        known = moe_choice.key(records, dtype, k, 1)
        if known in seen or not moe_choice.unknown(records, dtype, k):
            continue
        seen.add(known)
        trial = PrunedMoE.from_bank(bank, keep, "gather" if keep else "compact", weights=weights, picked=k)
        with torch.random.fork_rng(devices=[]):
            moe_choice.measure(trial.experts, bank.module, dtype, k)
        del trial
        release()


def not_slower(model: nn.Module, banks: Sequence[Bank], weights: str | None) -> list[Bank]:
    """Without those on a CPU for which `auto` leaves the module as it is, as was measured; says so."""
    reasons = [
        moe_choice.why_slower(*described(bank, weights), picked(model, bank.experts)) if _on_cpu(bank) else None
        for bank in banks
    ]
    left = [f"{bank.name}: {reason}" for bank, reason in zip(banks, reasons, strict=True) if reason]
    if left:
        warnings.warn(f"experts of {len(left)} layers stay as they are (such as {left[0]})", stacklevel=3)
    return [bank for bank, reason in zip(banks, reasons, strict=True) if reason is None]


def record_bytes(banks: Sequence[Bank], weights: str | None) -> int:
    """Bytes of the records on the CPU, each rounded up to whole cache lines."""
    total = 0
    for bank in banks:
        given = bank.all_weights()
        if given.down.device.type == "cpu":
            dtype = WEIGHTS[weights] if weights else given.down.dtype
            total += Room.rounded(sum(part.numel() for part in given.parts) * dtype.itemsize)
    return total


def check_finite(banks: Sequence[Bank], dtype: torch.dtype) -> None:
    """Raise `InputError` naming a bank with a weight that is not finite in `dtype`."""
    for bank in banks:
        for part in bank.all_weights().parts:
            check_fits(part, dtype, f"weights of {bank.name}")


def swap(
    model: nn.Module,
    banks: list[Bank],
    keeps: Keeps,
    backend: str,
    weights: str | None,
    room: Room,
    batch_invariant: bool,
) -> None:
    """Put a `PrunedMoE` in the place of each bank; the list is emptied, so that originals are freed one by one."""
    banks.reverse()
    while banks:
        bank = banks.pop()
        k = picked(model, bank.experts)
        keep = keeps.get(bank.name)
        mode = "gather" if keep else "compact"
        module = PrunedMoE.from_bank(bank, keep, mode, backend, weights, room, batch_invariant, k)
        parent, _, name = bank.name.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
        del bank
        release()
