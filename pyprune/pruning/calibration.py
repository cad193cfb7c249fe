"""Streamed calibration: hidden states of all windows move through the decoder one layer at a time.

Only the hidden states of one point of the model are held (`[N, W, D]`), and the statistics of one layer, so memory
stays near the size of the model whatever its depth. Knows no pruning method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import UnsupportedModelError, check
from ..base.ranks import ALONE, Ranks
from ..base.statistics import ActivationStats
from ..model.families import FFN, Expert, decoder_layers
from ..model.narrowing import replaced
from ..model.probe import evaluating
from .moments import Gathered, in_order, shares, split
from .observing import See, observing
from .residual import adds_output, constant_output


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass whose rest nobody needs
    pass


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple | list) else output


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, tuple | list) else []


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """`[W]` float64 cosines between the rows of two `[W, D]`; 1 where both rows are zero, 0 where one is."""
    a, b = a.double(), b.double()
    norms = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(norms == 0, (a == b).all(1).double(), (a * b).sum(1) / norms)


def _absent(layer: nn.Module) -> bool:
    return any(p.is_meta for p in layer.parameters())


class LayerStream:
    """The hidden states of all windows in front of one decoder layer.

    Layers whose weights are on the meta device need not be there before the stream reaches them; the first must be.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ffns: its FFNs, as `families.find_ffns` gives them; their order is the order of the layers.
        ids: `[N, W]` token ids.
        twin: also carry the hidden states that the dense model would have (see `advance_twin`).
        sources: `[N]`, which source each window is from; None for one.
        products: bfloat16: float32 layers multiply matrices in it (autocast), between hidden states in float32.
        ranks: processes that each carry a part of the windows (`moments.shares`).

    Raises:
        UnsupportedModelError: the layers do not simply hand one hidden state to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: list[FFN],
        ids: Tensor,
        twin: bool = False,
        sources: Tensor | None = None,
        products: torch.dtype = torch.float32,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._products, self._ranks = model, products, ranks
        self._sources = [0] * len(ids) if sources is None else sources.tolist()
        self._mine = shares(self._sources, ranks.size)[ranks.rank]  # the windows that are carried here, by number
        self._layers: list[nn.Module] = list(decoder_layers(model)[1])
        self._device = next(p.device for p in model.parameters() if not p.is_meta)
        self._position = 0
        with torch.no_grad():
            self._calls = self._record_calls(ids[:1])
            other = (ids != ids[:1]).any(1).nonzero()
            if len(other):
                self._check_independent(self._record_calls(ids[int(other[0])][None]))
            self._hidden = self._embed(ids[self._mine] if ranks.several else ids)
        self._twin = self._begin_twin() if twin else None
        self._twin_position = 0

    def _begin_twin(self) -> Tensor:
        """`[N, W, D]`: the twin's states where the others are."""
        return self._room("twin", tuple(self._hidden.shape), self._hidden).copy_(self._hidden)

    def _room(self, what: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory for the hidden states `what` of all windows, of the dtype and device of `like`."""
        return like.new_empty(shape)

    def _onward(self, what: str, states: Tensor) -> Tensor:
        """Where the hidden states `what` go that come out of a layer: in the place of those that went in."""
        return states

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
            check(bool(hidden.isfinite().all()), f"what enters layer {len(calls)}", "be finite", "NaN or infinity")
            if previous and not torch.equal(hidden, previous[0]):
                raise UnsupportedModelError(
                    f"{type(self._model).__name__}: the input of decoder layer {len(calls)} is not the output "
                    f"of layer {len(calls) - 1}, so the model cannot be calibrated layer by layer"
                )
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            calls.append((args[1:], rest))

        more: list[int | None] = []  # how many other things a layer gives with its hidden state; None: no tuple

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            previous[:] = [_first(output)]
            more.append(len(output) - 1 if isinstance(output, tuple) else None)
            if layer is self._layers[-1]:
                raise _Stop

        def passing(*args: Any, **kwargs: Any) -> Any:
            """In the place of a layer that is not there: other values than it got, as finite."""
            hidden = (args[0] if args else kwargs["hidden_states"]).roll(1, -1)
            return hidden if more[0] is None else (hidden, *[None] * more[0])

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self._layers]
        handles += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            with ExitStack() as stack:
                for layer in filter(_absent, self._layers):
                    stack.enter_context(replaced(layer, passing))
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
                    hidden = self._room("hidden", (len(ids), *window.shape[1:]), window)
                hidden[i] = window[0]
            assert hidden is not None
            return hidden
        finally:
            handle.remove()

    def _layer_on(self, hidden: Tensor) -> Tensor:
        args, kwargs = self._calls[self._position]
        lower = self._products != torch.float32 and hidden.dtype == torch.float32
        # Inside another autocast the cache of narrow weights would outlive a cut of the weights.
        with torch.autocast(hidden.device.type, self._products, enabled=lower, cache_enabled=False):
            return _first(self._layers[self._position](hidden, *args, **kwargs))

    def _window(self, states: Tensor, window: int, device: torch.device | None = None) -> Tensor:
        """`[1, W, D]`, where text comes in unless told otherwise; the states of all windows may be in main memory."""
        return states[window : window + 1].to(device or self._device, non_blocking=True)

    def _forward(self, window: int) -> Tensor:
        return self._layer_on(self._window(self._hidden, window))

    def _run_to(
        self, module: nn.Module, see: Callable[[Tensor], None], window: int, stop: bool = True
    ) -> Tensor | None:
        """Run the layer on one window and show `see` what enters `module`; the layer's output unless it stops there."""

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(args[0].reshape(-1, args[0].shape[-1]))
            if stop:
                raise _Stop

        handle = module.register_forward_pre_hook(before)
        try:
            return self._forward(window)
        except _Stop:
            return None
        finally:
            handle.remove()

    def statistics(self, ffn: FFN, gram: bool, held_out: bool = False) -> ActivationStats:
        """As `group_statistics`, of an FFN that stands alone."""
        return self.group_statistics([ffn], gram, held_out)[0]

    @torch.no_grad()
    def group_statistics(self, group: list[FFN], gram: bool, held_out: bool = False) -> list[ActivationStats]:
        """Moments of what enters the down projections of a group, over all windows; the stream stays where it is.

        Args:
            group: FFNs of the layer the stream stands in front of, as `units.groups` gives them.
            gram: also collect the `[F, F]` second moment; float32 products within a window, float64 sums over windows.
                With a twin, which must be one layer ahead, also the `[F, D]` cross moment with what it has more.
            held_out: also give apart the second moments of the last quarter of each source's windows, and of the rest.

        Raises:
            InputError: activations that are not finite, or a router that names an expert there is not.
        """
        assert group[0].block == self._position
        twin = self._twin is not None
        found = [Gathered(ffn, ffn.weights().down.device, gram, twin, held_out, self._ranks) for ffn in group]
        by_name = {ffn.name: one for ffn, one in zip(group, found, strict=True)}
        places = {window: place for place, window in enumerate(self._mine)}
        # Experts of a bank come in order; modules in a list when they are called.
        stops = not twin and (len(group) == 1 or isinstance(group[0], Expert))
        seen: list[Tensor] = []

        def see(ffn: FFN, a: Tensor, weights: Tensor | None, tokens: Tensor | None) -> None:
            if twin:
                seen.append(a)
                return
            by_name[ffn.name].add(a, weights)
            if stops and ffn is group[-1]:
                raise _Stop

        for windows in split(self._sources, held_out):
            for one in found:
                one.open()
            for window in (places[w] for w in windows if w in places):
                with observing(group, see):
                    try:
                        out = self._forward(window)
                    except _Stop:
                        continue
                if self._twin is not None:
                    found[0].moments.add(seen.pop(), self._window(self._twin, window, out.device)[0] - out[0])
            for one in found:
                one.close()
        return [one.stats() for one in found]

    @torch.no_grad()
    def see_all(self, group: list[FFN], see: See) -> None:
        """Show `see` what a group's FFNs get, of all windows; the stream stays where it is."""
        assert group[0].block == self._position
        for window in range(len(self._hidden)):
            with observing(group, see):
                self._forward(window)

    @torch.no_grad()
    def inputs(self, ffn: FFN) -> tuple[Tensor, Tensor | None]:
        """What enters `ffn` and, with a twin, what the twin's hidden state has more than the layer's output.

        Returns:
            `[T, D]` and `[T, D]` or None, float32; T tokens of all windows.
        """
        assert ffn.block == self._position
        entrance = ffn.holder.get_submodule(ffn.pattern.inputs[0][0])
        entering: list[Tensor] = []
        more: list[Tensor] = []
        for window in range(len(self._hidden)):
            out = self._run_to(entrance, lambda x: entering.append(x.float()), window, stop=self._twin is None)
            if self._twin is not None and out is not None:
                more.append((self._window(self._twin, window, out.device)[0] - out[0]).float())
        entering = in_order(self._ranks, self._mine, entering)
        if self._twin is not None:
            more = in_order(self._ranks, self._mine, more)
        return torch.cat(entering), torch.cat(more) if more else None

    @torch.no_grad()
    def advance(self) -> None:
        """Move every window through the layer, with the weights it has now."""
        into = self._onward("hidden", self._hidden)
        for window in range(len(self._hidden)):
            into[window] = self._forward(window)[0]
        self._hidden = into
        self._position += 1
        self._calls[self._position - 1] = ((), {})

    def reach(self, ffn: FFN) -> None:
        """Move every window to the front of an FFN's layer, through the layers with the weights they have now.

        A twin goes one layer further, so before that is cut.
        """
        while self._position < ffn.block:
            self._twin_through()
            self.advance()
        self._twin_through()

    def _twin_through(self) -> None:
        if self._twin is not None and self._twin_position == self._position:
            self.advance_twin()

    def skip(self) -> None:
        """Leave the layer out: every window stays as it is."""
        self._position += 1

    @torch.no_grad()
    def compare(self, ffn: FFN | None = None) -> float:
        """Mean over tokens of the cosine between the layer's output and its input; moves every window through it.

        Args:
            ffn: instead of the layer's input, take what the layer would give if this FFN of it gave nothing.

        Raises:
            InputError: activations that are not finite.
        """
        total = 0.0
        for window in range(len(self._hidden)):
            before = self._hidden[window].clone()
            if ffn is not None:
                with constant_output(ffn):
                    before = self._forward(window)[0]
            self._hidden[window] = self._forward(window)[0]
            total += float(_cosines(before, self._hidden[window]).sum())
        check(math.isfinite(total), f"activations of layer {self._position}", "be finite", total)
        self.skip()
        return total / (self._hidden.shape[0] * self._hidden.shape[1])

    @torch.no_grad()
    def advance_twin(self) -> None:
        """Move the twin's windows through the layer, with the weights it has now: to be called before it is cut."""
        assert self._twin is not None
        into = self._onward("twin", self._twin)
        for window in range(len(self._twin)):
            into[window] = self._layer_on(self._window(self._twin, window))[0]
        self._twin = into
        self._twin_position += 1


def adds_ffn(model: nn.Module, ffns: list[FFN]) -> bool:
    """Whether layers add what their FFN puts out to the hidden state as it is: no norm, no multiplier between.

    Errors as `LayerStream`.
    """
    vocabulary = getattr(model.config, "vocab_size", None) or 2
    ids = torch.randint(vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        stream = LayerStream(model, ffns, ids)
        return adds_output(ffns[0].down, lambda: stream._forward(0))
