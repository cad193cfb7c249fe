"""Streamed calibration: hidden states of all windows move through the decoder one layer at a time.

Only the hidden states of one point of the model are held (`[N, W, D]`), and the statistics of one layer, so memory
stays near the size of the model whatever its depth. Knows no pruning method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError, check
from .families import FFN, decoder_layers
from .importance import ActivationStats

Progress = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass whose rest nobody needs
    pass


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def stack_batches(batches: Iterable[Tensor] | Tensor, vocabulary: int | None) -> Tensor:
    """Collect token batches into `[N, W]` int64.

    Args:
        batches: a `[N, W]` tensor or an iterable of `[W]` or `[B, W]` tensors, all of one window length.
        vocabulary: number of token ids the model knows, or None.

    Raises:
        InputError: no batch, windows of different lengths, not integers, or ids out of range.
    """
    given = [batches] if isinstance(batches, Tensor) else list(batches)
    strange = [type(b).__name__ for b in given if not isinstance(b, Tensor) or b.ndim == 0]
    check(not strange, "batches", "hold tensors of shape [W] or [N, W]", strange[:3])
    check(bool(given) and all(b.numel() for b in given), "batches", "hold at least one window", len(given))
    rows = [b.reshape(-1, b.shape[-1]) for b in given]
    lengths = sorted({r.shape[1] for r in rows})
    check(len(lengths) == 1, "batches", "have windows of one length", lengths)
    ids = torch.cat(rows)
    fractional = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    check(not fractional, "batches", "hold token ids", ids.dtype)
    ids = ids.long().cpu()
    low, high = int(ids.min()), int(ids.max())
    check(low >= 0 and (vocabulary is None or high < vocabulary), "batches", f"lie in [0, {vocabulary})", (low, high))
    return ids


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def check_windows(model: nn.Module, windows: Tensor, argument: str) -> None:
    """Raise `InputError` when windows (`[N, W]`) are longer than the model's context."""
    longest = getattr(model.config, "max_position_embeddings", None)
    fits = not isinstance(longest, int) or windows.shape[1] <= longest
    check(fits, argument, f"have windows of at most {longest} tokens (max_position_embeddings)", windows.shape[1])


class LayerStream:
    """The hidden states of all windows in front of one decoder layer.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ffns: its FFNs, as `families.find_ffns` gives them; their order is the order of the layers.
        ids: `[N, W]` token ids.

    Raises:
        UnsupportedModelError: the layers do not simply hand one hidden state to the next.
    """

    def __init__(self, model: nn.Module, ffns: list[FFN], ids: Tensor) -> None:
        self._model = model
        self._layers: list[nn.Module] = list(decoder_layers(model)[1])
        self._device = next(model.parameters()).device
        self._position = 0
        with torch.no_grad():
            self._calls = self._record_calls(ids[:1])
            other = (ids != ids[:1]).any(1).nonzero()
            if len(other):
                self._check_independent(self._record_calls(ids[int(other[0])][None]))
            self._hidden = self._embed(ids)

    def _run(self, ids: Tensor) -> None:
        try:
            self._model(input_ids=ids.to(self._device), use_cache=False)
        except _Stop:
            return
        raise UnsupportedModelError(f"{type(self._model).__name__} never called its decoder layers")

    def _record_calls(self, ids: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """With what each layer is called (masks, positions); each must get what the one before gave."""
        previous: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if previous and not torch.equal(hidden, previous[0]):
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: the input of decoder layer {len(calls)} is not the output "
                    f"of layer {len(calls) - 1}, so the model cannot be calibrated layer by layer"
                )
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            calls.append((args[1:], rest))

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            previous[:] = [_first(output)]
            if layer is self._layers[-1]:
                raise _Stop

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        handles += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            self._run(ids)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _check_independent(self, others: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """What layers get beside the hidden state is noted once, so it must not depend on the tokens."""
        for i, (call, other) in enumerate(zip(self._calls, others, strict=True)):
            pairs = zip(_tensors(call), _tensors(other), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: decoder layer {i} gets more from the tokens than its hidden "
                    "state, so the model cannot be calibrated layer by layer"
                )

    def _embed(self, ids: Tensor) -> Tensor:
        """`[N, W, D]`: what the first layer gets, for every window."""
        caught: list[Tensor] = []

        def stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self._layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            hidden = None
            for i in range(len(ids)):
                self._run(ids[i : i + 1])
                window = caught.pop()
                if hidden is None:
                    hidden = window.new_empty((len(ids), *window.shape[1:]))
                hidden[i] = window[0]
            assert hidden is not None
            return hidden
        finally:
            handle.remove()

    def _forward(self, window: int) -> Tensor:
        args, kwargs = self._calls[self._position]
        return _first(self._layers[self._position](self._hidden[window : window + 1], *args, **kwargs))

    @torch.no_grad()
    def statistics(self, ffn: FFN, gram: bool) -> ActivationStats:
        """Moments of what enters `ffn`'s down projection, over all windows; the stream stays where it is.

        Args:
            ffn: the FFN of the layer the stream stands in front of.
            gram: also collect the `[F, F]` second moment; float32 products within a window, float64 sums over windows.

        Raises:
            InputError: activations that are not finite.
        """
        assert ffn.layer == self._position
        size = ffn.intermediate_size
        zeros = torch.zeros(3, size, dtype=torch.float64, device=self._device)
        total, absolute, square = zeros
        second = torch.zeros(size, size, dtype=torch.float64, device=self._device) if gram else None
        tokens = 0

        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal tokens
            a = args[0].reshape(-1, size).float()
            tokens += len(a)
            total.add_(a.sum(0, dtype=torch.float64))
            absolute.add_(a.abs().sum(0, dtype=torch.float64))
            square.add_(a.double().square().sum(0))
            if second is not None:
                second.add_(a.t() @ a)
            raise _Stop

        handle = ffn.down.register_forward_pre_hook(collect)
        try:
            for window in range(len(self._hidden)):
                try:
                    self._forward(window)
                except _Stop:
                    continue
        finally:
            handle.remove()
        bad = (~square.isfinite()).nonzero()
        message = f"be finite; {len(bad)} of {size} neurons are not, the first is"
        check(len(bad) == 0, f"activations of layer {ffn.layer}", message, bad[:1].flatten().tolist())
        return ActivationStats(tokens, total / tokens, absolute / tokens, square, second)

    @torch.no_grad()
    def advance(self) -> None:
        """Move every window through the layer, with the weights it has now."""
        for window in range(len(self._hidden)):
            self._hidden[window] = self._forward(window)[0]
        self._position += 1
        self._calls[self._position - 1] = ((), {})
