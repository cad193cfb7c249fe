"""Timing: a clock that waits for the device, quantiles, interleaved rounds, and the work that is timed.

The work: KV-cached decode, prefill, and FFNs alone or inside a forward pass of their model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..base.clock import clock, graphed
from ..base.errors import UnsupportedModelError
from ..base.record import described
from ..ffn.mlp import PrunedMLP
from ..model import families
from ..model.families import FFN


class Decode:
    """A job: prefill a prompt, then steps of one token, greedy, with a KV cache; each step but the first is a sample.

    Args:
        model: a causal LM of Transformers.
        prompt: `[B, P]` token ids.
        steps: of one token for every sequence; at least 2.
        compiled: run the steps by `torch.compile` over a static cache, as `generate` does with one; otherwise the
            cache is the one that the model makes.
    """

    def __init__(self, model: Any, prompt: Tensor, steps: int, compiled: bool = False) -> None:
        self.model, self.prompt, self.steps = model, prompt, steps
        self.now = clock(prompt.device)
        # On CUDA as `generate` compiles by itself: with CUDA graphs, so that launches cost nothing.
        mode = "reduce-overhead" if prompt.is_cuda else None
        self.step = torch.compile(model.forward, dynamic=False, mode=mode) if compiled else model
        # One cache for all runs: new addresses would make CUDA graphs record again.
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps) if compiled else None

    @torch.no_grad()
    def __call__(self) -> list[float]:
        if self.cache is not None and self.cache.get_seq_length() > 0:
            self.cache.reset()
        out = self.model(input_ids=self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if getattr(out, "past_key_values", None) is None:
            kind = self.model.config.model_type
            raise UnsupportedModelError(f"decode steps are timed over a KV cache; {kind} keeps none: time its prefill")
        token = out.logits[:, -1:].argmax(-1)
        batch, length = self.prompt.shape
        seconds = []
        for i in range(self.steps):
            # Given as `generate` gives it: some families would read it from the cache, which breaks a compiled graph.
            position = torch.full((batch, 1), length + i, device=token.device)
            start = self.now()
            out = self.step(
                input_ids=token,
                position_ids=position,
                past_key_values=out.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
            token = out.logits[:, -1:].argmax(-1)
            seconds.append(self.now() - start)
        return seconds[1:]


class Prefill:
    """A job: one forward pass over `prompt` (`[B, P]`) that fills a KV cache and gives the last token's logits."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.now = clock(prompt.device)

    @torch.no_grad()
    def __call__(self) -> list[float]:
        start = self.now()
        self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
        return [self.now() - start]


@dataclass(frozen=True)
class FFNUnit:
    """One FFN as it stands in a model, ready to be run alone.

    Attributes:
        run: `[..., D]` -> `[..., D]`.
        hidden_size: D.
        neurons: those it computes; in gather mode those of its index.
        bytes: of weights that one call must read.
    """

    run: Callable[[Tensor], Tensor]
    hidden_size: int
    neurons: int
    bytes: int


def pruned_unit(module: PrunedMLP) -> FFNUnit:
    return FFNUnit(module, module.hidden_size, module.neurons, module.running.nbytes)


def _module_unit(ffn: FFN) -> FFNUnit:
    weights = ffn.weights()
    neurons, hidden_size = weights.down.shape
    record = described(
        hidden_size,
        neurons,
        gated=ffn.gated,
        activation=ffn.activation,
        dtype=weights.down.dtype,
        neuron_bias=any(bias is not None for bias in weights.input_biases),
        down_bias=weights.down_bias is not None,
    )
    run: Callable[[Tensor], Tensor] = ffn.holder
    if ffn.pattern.in_layer:
        # No module stands for the FFN; these three are what the decoder layer calls.
        up, act, down = (ffn.holder.get_submodule(n) for n in (ffn.pattern.up, "activation_fn", ffn.pattern.down))

        def run(x: Tensor) -> Tensor:
            return down(act(up(x)))

    return FFNUnit(run, hidden_size, neurons, record.nbytes)


def ffn_units(model: nn.Module) -> list[FFNUnit]:
    """The FFN of every layer, accelerated or not, in order.

    Raises:
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    pruned = [module for module in model.modules() if isinstance(module, PrunedMLP)]
    if pruned:
        return [pruned_unit(module) for module in pruned]
    return [_module_unit(ffn) for ffn in families.find_plain(model, "timing of FFNs")]


def ffn_pass(units: Sequence[FFNUnit], x: Tensor, compiled: bool = False) -> Callable[[], object]:
    """One call of every FFN in turn, so that each reads its weights from where a real step would find them.

    Args:
        units: the FFNs of one model.
        x: `[1, M, D]`, the input of each.
        compiled: by `torch.compile`.
    """
    runs = [torch.compile(unit.run, dynamic=False) if compiled else unit.run for unit in units]

    @torch.no_grad()
    def run() -> None:
        for ffn in runs:
            ffn(x)

    return graphed(run, x.device)


@contextmanager
def ffn_probe(model: nn.Module) -> Iterator[list[float]]:
    """Yield a list that receives, for every forward pass of `model`, the share of its time spent in FFNs.

    On a CPU only: a GPU runs behind the host's clock.
    """
    shares: list[float] = []
    spent = started = entered = 0.0

    def begin(*_: Any) -> None:
        nonlocal spent, started
        spent, started = 0.0, time.perf_counter()

    def enter(*_: Any) -> None:
        nonlocal entered
        entered = time.perf_counter()

    def leave(*_: Any) -> None:
        nonlocal spent
        spent += time.perf_counter() - entered

    def end(*_: Any) -> None:
        shares.append(spent / (time.perf_counter() - started))

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    for ffn in families.find_plain(model, "timing of FFNs"):
        first = ffn.holder.get_submodule(ffn.pattern.up) if ffn.pattern.in_layer else ffn.holder
        last = ffn.down if ffn.pattern.in_layer else ffn.holder
        hooks += [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
