"""One forward pass with everything that passes between layers written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import UnsupportedModelError
from ...model.families import FFN, decoder_layers
from ...pruning.residual import adds_output


@dataclass(frozen=True, eq=False)
class Trace:
    """What one window made of a model.

    Attributes:
        entering, leaving: `[W, D]` for each decoder layer, the hidden state in front of it and behind it.
        ffn: `[W, D]` for each decoder layer, what its down projection put out; empty if nobody asked.
        final: `[W, D]`, what enters the LM head.
        logits: `[W, V]`.
        calls: what else each decoder layer was called with (masks, positions).
    """

    entering: list[Tensor]
    leaving: list[Tensor]
    ffn: list[Tensor]
    final: Tensor
    logits: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


def first_of(output: Any) -> Tensor:
    """The hidden state in what a decoder layer gives back."""
    return output[0] if isinstance(output, tuple | list) else output


def rows_of(hidden: Tensor) -> Tensor:
    """`[1, W, D]` or `[W, D]` as `[W, D]`."""
    return hidden.reshape(-1, hidden.shape[-1])


class Tracer:
    """Runs a model window by window and keeps a `Trace` of each.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ffns: its FFNs, to write down what they put out; () for the rest alone.

    Raises:
        UnsupportedModelError: no decoder layers, or no LM head.
    """

    def __init__(self, model: nn.Module, ffns: Sequence[FFN] = ()) -> None:
        self._model: Any = model
        self._layers: list[nn.Module] = list(decoder_layers(model)[1])
        self._downs = [ffn.down for ffn in ffns]
        self._device = next(model.parameters()).device
        find: Any = self._model.get_output_embeddings
        head = find()
        if head is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no LM head (get_output_embeddings)")
        self._head: nn.Module = head

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Trace:
        """The trace of one window of token ids, `[W]`."""
        entering: list[Tensor] = []
        leaving: list[Tensor] = []
        ffn: list[Tensor] = []
        final: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            entering.append(rows_of(hidden))
            calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            leaving.append(rows_of(first_of(output)))

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        handles += [layer.register_forward_hook(after) for layer in self._layers]
        # Copied: some families add the rest of the layer into the FFN's output in place.
        handles += [d.register_forward_hook(lambda m, args, out: ffn.append(rows_of(out).clone())) for d in self._downs]
        handles.append(self._head.register_forward_pre_hook(lambda m, args: final.append(rows_of(args[0]))))
        try:
            logits = self._model(input_ids=ids[None].to(self._device), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return Trace(entering, leaving, ffn, final[-1], logits, calls)

    @torch.no_grad()
    def layer(self, number: int, hidden: Tensor, trace: Trace) -> tuple[Tensor, Tensor]:
        """One layer alone, on another hidden state.

        Args:
            number: of the layer.
            hidden: `[W, D]`, to stand in front of it.
            trace: of this model on the same window: masks and positions.

        Returns:
            `[W, D]` twice: the hidden state behind it, and what its FFN put out.
        """
        seen: list[Tensor] = []
        args, kwargs = trace.calls[number]
        handle = self._downs[number].register_forward_hook(lambda m, args, out: seen.append(rows_of(out).clone()))
        try:
            out = first_of(self._layers[number](hidden[None], *args, **kwargs))
        finally:
            handle.remove()
        return rows_of(out), seen[-1]

    @torch.no_grad()
    def adds_ffn(self, trace: Trace) -> bool:
        """Whether the first layer adds what its FFN puts out to the hidden state as it is: no norm, no multiplier."""
        args, kwargs = trace.calls[0]
        return adds_output(self._downs[0], lambda: first_of(self._layers[0](trace.entering[0][None], *args, **kwargs)))
