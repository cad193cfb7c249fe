"""Whole experts removed: what of a model is as long as there are experts, and what its config says of them.

Both are found by building the model from its config twice, with all experts and with fewer, without memory for
weights, and comparing the two: tensors that became shorter, and numbers that modules know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError, check
from .depth import differences
from .heterogeneous import exchange
from .towers import config_at, config_path, copies, stacks
from .units import Expert
from .widths import built

# How many experts a token goes to, and in how many groups a router sees them.
TOP_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts", "moe_top_k")
GROUP_KEYS = ("n_group", "num_expert_group", "moe_n_group")


class Removal:
    """How experts of a model can be removed, checked before anything is.

    Args:
        model: a mixture.
        banks: the experts of each of its banks.
        keep: share that stays.

    Attributes:
        experts, count: of every bank, before and after.
        groups: in which a router sees them; as many of each stay.
        configs: those that will be changed.

    Raises:
        InputError: fewer would be left than a token is routed to.
        UnsupportedModelError: banks of different numbers of experts, or no config key builds fewer.
    """

    def __init__(self, model: nn.Module, banks: Sequence[Sequence[Expert]], keep: float) -> None:
        self._model, self._banks, name = model, banks, type(model).__name__
        numbers = sorted({len(bank) for bank in banks})
        if len(numbers) > 1:
            raise UnsupportedModelError(f"{name} has banks of {numbers} experts, which no one key of its config says")
        self.experts = numbers[0]
        self._where = config_path(model, stacks(model)[0][0])
        self.configs = copies(model, self._where)
        config = self.configs[0]
        self.groups = next((g for k in GROUP_KEYS if isinstance(g := getattr(config, k, None), int) and g > 1), 1)
        self.count = max(1, int(keep * self.experts / self.groups + 0.5)) * self.groups
        top = next((t for k in TOP_KEYS if isinstance(t := getattr(config, k, None), int)), 1)
        rule = f"leave at least the {top} experts of {self.experts} that a token is routed to"
        check(self.count >= top, "keep", rule, f"{keep}, which leaves {self.count}")
        if self.groups > 1:
            rule = f"leave at least 2 experts in each of the {self.groups} groups of the router"
            check(self.count >= 2 * self.groups, "keep", rule, f"{keep}, which leaves {self.count}")
        self._key, self._shorter, self._numbers = self._plan()

    def _plan(self) -> tuple[str, dict[str, int], list[tuple[str, str, int]]]:
        """The config key, tensors by the dimension that has experts, and (module, attribute, new number)."""
        name = type(self._model).__name__
        config = config_at(self._model.config, self._where)
        keys = [k for k, v in config.to_dict().items() if v == self.experts and re.search("expert", k)]
        old = built(self._model, self._where, keep_block=True)
        before = _shapes(old)
        for key in keys:
            try:
                new = built(self._model, self._where, {key: self.count}, keep_block=True)
            except Exception:  # whatever a class makes of a number of experts: then it is not this key
                continue
            after = _shapes(new)
            banks = [f"{bank[0].group}.{bank[0].of_bank.layout.down}" for bank in self._banks]
            if self.count != self.experts and not all(after.get(b, (0,))[0] == self._rows(b, before) for b in banks):
                continue
            shorter = {}
            for tensor, shape in before.items():
                if shape == (now := after.get(tensor)):
                    continue
                differing = [] if now is None or len(now) != len(shape) else _differing(shape, now)
                if len(differing) != 1 or self._bank_of(tensor) is None:
                    raise UnsupportedModelError(
                        f"{name}: {tensor} would be {now} instead of {shape} with fewer experts"
                    )
                shorter[tensor] = differing[0]
            numbers = [
                (module, attribute, int(value))
                for module, attribute, was, value in differences(old, new)
                if type(was) is int and type(value) is int
            ]
            return key, shorter, numbers
        raise UnsupportedModelError(
            f"{name}: no key of {type(config).__name__} builds {self.count} experts instead of {self.experts} "
            f"(tried {', '.join(keys) or 'none'}); use structure 'neurons'"
        )

    def _rows(self, tensor: str, before: dict[str, tuple[int, ...]]) -> int:
        return before[tensor][0] // self.experts * self.count

    def _bank_of(self, tensor: str) -> int | None:
        """Which bank a tensor belongs to: that of its layer."""
        for i, bank in enumerate(self._banks):
            block = bank[0].group.rpartition(".")[0]
            if tensor.startswith(f"{block}."):
                return i
        return None

    @torch.no_grad()
    def cut(self, number: int, kept: Sequence[int]) -> None:
        """Remove all experts of one bank but these, sorted; the model is whole again after `finish`."""
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for name, dim in self._shorter.items():
            if self._bank_of(name) != number:
                continue
            tensor: Any = tensors[name]
            index = _rows_of(kept, self.experts, tensor.shape[dim], self._per(name, dim)).to(tensor.device)
            new = tensor.detach().index_select(dim, index)
            if isinstance(tensor, nn.Parameter):
                exchange(tensor, new)
            else:
                parent, _, last = name.rpartition(".")
                self._model.get_submodule(parent)._buffers[last] = new
        self._tell(number)

    def finish(self) -> None:
        """Tell the rest of the model, and its configs, after all banks were cut."""
        self._tell(None)
        self.say(self.count)

    @contextmanager
    def partly(self) -> Iterator[None]:
        """Inside, some banks may be cut and others not: no loss is taken over the routers of all layers."""
        asked = [config for config in self.configs if getattr(config, "output_router_logits", False)]
        for config in asked:
            config.output_router_logits = False
        try:
            yield
        finally:
            for config in asked:
                config.output_router_logits = True

    def say(self, count: int) -> None:
        """Have the configs say that there are so many experts, for routers that ask them at every call."""
        for config in self.configs:
            setattr(config, self._key, count)

    def _tell(self, number: int | None) -> None:
        """Set the numbers that modules of a bank's block know, or with None those of all other modules."""
        for module, attribute, value in self._numbers:
            if self._bank_of(f"{module}.") == number:
                setattr(self._model.get_submodule(module), attribute, value)

    def _per(self, name: str, dim: int) -> int:
        """Rows of a tensor that each expert has: more than one where experts lie flat behind each other."""
        bank = self._banks[self._bank_of(name) or 0][0].of_bank
        return bank.size if bank.layout.flat and name.startswith(bank.name) else 1


def _rows_of(kept: Sequence[int], experts: int, length: int, per: int) -> Tensor:
    """The slices of a dimension that stay: those of the experts, and what stands behind them."""
    own = (torch.tensor(kept)[:, None] * per + torch.arange(per)).flatten()
    return torch.cat((own, torch.arange(experts * per, length)))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named}


def _differing(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
    return [i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n]
