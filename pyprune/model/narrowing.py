"""One layer narrowed for a trial, and the loss of the model from it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .experts import Bank
from .families import FFN


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` inside; after it, also after an error, it is as it was."""
    own: Any = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


@contextmanager
def narrowed(ffn: FFN, keep: Tensor, down: Tensor | None = None) -> Iterator[None]:
    """Inside, `ffn` gives what it would give after `surgery.cut`; its weights stay as they are, to the bit.

    Args:
        ffn: of a model in eval mode.
        keep: `[K]` neurons that stay.
        down: `[K, D]` new down rows for them, or None for their own.
    """
    weights = ffn.weights()
    keep = keep.long().to(weights.down.device)
    rows = weights.down[keep] if down is None else down.to(weights.down.dtype)
    bias = weights.down_bias

    def forward(a: Tensor) -> Tensor:
        return nn.functional.linear(a.index_select(-1, keep), rows.t(), bias)

    with ExitStack() as stack:
        for place in ffn.downs:
            stack.enter_context(replaced(place, forward))
        yield


@contextmanager
def narrowed_bank(bank: Bank, keeps: Sequence[Tensor]) -> Iterator[None]:
    """Inside, a bank of experts gives what it would give after `surgery.cut_experts`; its weights stay as they are.

    Args:
        bank: of a model in eval mode.
        keeps: of each expert the neurons that stay.
    """
    gone = []
    for keep in keeps:
        own = torch.ones(bank.size, dtype=torch.bool)
        own[keep.long().cpu()] = False
        gone.append(own.to(bank.tensor(bank.layout.down).device))

    def remove(expert: int, a: Tensor) -> None:
        a[:, gone[expert]] = 0

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return bank.forward(*args, see=remove, **kwargs)

    with replaced(bank.module, forward):
        yield


class Rest:
    """The model from one decoder layer on.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ids: `[n, W]`, the windows whose loss is measured.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self._model, self._ids = model, ids.to(next(model.parameters()).device)
        self._layers = list(families.decoder_layers(model)[1])
        self._extra: list[int | None] = [None] * len(self._layers)

    def dense_loss(self) -> float:
        """Mean cross entropy of a predicted token, in nats; also notes how layers give their output."""

        def note(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._extra[i] = len(output) - 1 if isinstance(output, tuple) else None

            return hook

        handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(self._layers)]
        try:
            return self.loss(0, None)
        finally:
            for handle in handles:
                handle.remove()

    def _passing(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            extra = self._extra[i]
            return hidden if extra is None else (hidden, *([None] * extra))

        return forward

    @torch.no_grad()
    def loss(self, start: int, hidden: Tensor | None) -> float:
        """Mean cross entropy of a predicted token when layer `start` gets `hidden` (`[n, W, D]`)."""
        total = 0.0
        for i, window in enumerate(self._ids):
            with ExitStack() as stack:
                if hidden is not None:
                    for j in range(start):
                        stack.enter_context(replaced(self._layers[j], self._passing(j, hidden[i : i + 1])))
                logits = self._model(input_ids=window[None], use_cache=False).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
        return total / (self._ids.numel() - len(self._ids))
