"""The work that is timed: KV-cached decode, prefill, and FFNs alone or inside a forward pass of their model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from ..base.activations import ACTIVATIONS
from ..base.clock import clock, graphed
from ..base.errors import UnsupportedModelError
from ..ffn.accelerate_experts import picked
from ..ffn.mlp import PrunedMLP
from ..ffn.moe import PrunedMoE
from ..model import families
from ..model.experts import Bank
from ..model.families import FFN, Expert
from ..model.patterns import Pattern
from ..model.units import OWN
from . import routed
from .routed import Routed


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
    """The FFNs of one layer as they stand in a model, ready to be run alone: one, or experts and what is beside them.

    Attributes:
        run: `[1, M, D]` -> `[..., D]`, of several FFNs that of the last; experts get a routing by chance.
        hidden_size: D.
        neurons: those it computes for a token; in gather mode those of its index.
        bytes: of weights that every call must read.
        routed: banks of experts, of which a call reads those that its tokens go to.
    """

    run: Callable[[Tensor], object]
    hidden_size: int
    neurons: int
    bytes: int
    routed: tuple[Routed, ...] = ()

    def read(self, tokens: int) -> float:
        """Bytes of weights that a call with so many tokens must read, with experts in the mean over routings."""
        return self.bytes + sum(one.active(tokens) * one.bytes for one in self.routed)


def pruned_unit(module: PrunedMLP) -> FFNUnit:
    return FFNUnit(module, module.hidden_size, module.neurons, module.running.nbytes)


@dataclass(frozen=True, eq=False)
class _Part:
    """An FFN or the experts of a layer: as a unit, and the modules with which it begins and ends inside the model."""

    unit: FFNUnit
    ends: tuple[tuple[nn.Module, nn.Module], ...]


def _module_part(holder: Any, pattern: Pattern) -> _Part:
    ffn = FFN(0, "", holder, pattern, OWN)
    size = (ffn.hidden_size, ffn.intermediate_size, sum(p.nbytes for p in ffn.parameters()))
    if not pattern.in_layer:
        return _Part(FFNUnit(holder, *size), ((holder, holder),))
    # No module stands for the FFN; these three are what the decoder layer calls.
    up, act, down = (holder.get_submodule(n) for n in (pattern.up, "activation_fn", pattern.down))
    return _Part(FFNUnit(lambda x: down(act(up(x))), *size), ((up, down),))


def _routed_part(routed: Routed, modules: Sequence[nn.Module]) -> _Part:
    unit = FFNUnit(routed, routed.hidden_size, routed.picked * routed.size, 0, (routed,))
    return _Part(unit, tuple((module, module) for module in modules))


def _parts(model: Any) -> list[list[_Part]]:
    """The FFNs of every decoder layer that has some, as they are now.

    Raises:
        UnsupportedModelError: an FFN that pyprune does not know or that has an activation of its own, or an encoder
            beside the decoder.
    """
    _, layers = families.decoder_layers(model)
    if not any(hasattr(m, "record") for m in layers.modules()):
        _check_known(model)
    found = []
    for layer in layers:
        parts: list[_Part] = []
        lists: dict[str, list[_Part]] = {}
        for path, module, form in families.candidates(layer):
            parent = path.rpartition(".")[0]
            if isinstance(module, PrunedMoE):
                parts.append(_routed_part(routed.of_records(module, picked(model, module.num_experts)), [module]))
                continue
            if isinstance(form, Bank):
                parts.append(_routed_part(routed.of_bank(form, picked(model, form.experts)), [module]))
                continue
            if isinstance(form, Pattern):
                part = _module_part(module, form)
            else:
                assert isinstance(module, PrunedMLP)
                part = _Part(pruned_unit(module), ((module, module),))
            listed = parent and isinstance(layer.get_submodule(parent), nn.ModuleList | nn.ModuleDict)
            (lists.setdefault(parent, []) if listed else parts).append(part)
        for several in lists.values():
            parts += several if len(several) == 1 else [_listed(several, picked(model, len(several)))]
        if parts:
            found.append(parts)
    return found


def _listed(parts: list[_Part], picked: int) -> _Part:
    """Experts that are modules of their own."""
    modules, unit = [part.ends[0][0] for part in parts], parts[0].unit
    return _routed_part(routed.of_list(modules, picked, unit.hidden_size, unit.neurons, unit.bytes), modules)


def _check_known(model: nn.Module) -> None:
    own = [f.name for f in families.find_ffns(model) if f.activation == OWN and not isinstance(f, Expert)]
    if own:
        raise UnsupportedModelError(
            f"timing of FFNs takes those with one of the activations {', '.join(ACTIVATIONS)}, and experts in tensors; "
            f"{own[0]} of {type(model).__name__} has another"
        )


def ffn_units(model: nn.Module) -> list[FFNUnit]:
    """The FFNs of every layer that has some, accelerated or not, in order.

    Raises:
        UnsupportedModelError: an FFN that pyprune does not know or that has an activation of its own, or an encoder
            beside the decoder.
    """
    return [_together([part.unit for part in parts]) for parts in _parts(model)]


def _together(units: list[FFNUnit]) -> FFNUnit:
    if len(units) == 1:
        return units[0]
    run = _Several([unit.run for unit in units])
    sums = sum(unit.neurons for unit in units), sum(unit.bytes for unit in units)
    return FFNUnit(run, units[0].hidden_size, *sums, tuple(r for unit in units for r in unit.routed))


@dataclass(frozen=True)
class _Several:
    """FFNs of one layer in turn; the result is the last one's."""

    runs: list[Callable[[Tensor], object]]

    def __call__(self, x: Tensor) -> object:
        return [run(x) for run in self.runs][-1]


def _compiled(run: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    """`run` by `torch.compile`, but for the routing that experts get."""
    if isinstance(run, _Several):
        return _Several([_compiled(one) for one in run.runs])
    if isinstance(run, Routed):
        return replace(run, call=torch.compile(run.call, dynamic=False))
    return torch.compile(run, dynamic=False)


def ffn_pass(units: Sequence[FFNUnit], x: Tensor, compiled: bool = False) -> Callable[[], object]:
    """One call of every FFN in turn, so that each reads its weights from where a real step would find them.

    Args:
        units: the FFNs of one model.
        x: `[1, M, D]`, the input of each.
        compiled: by `torch.compile`.
    """
    runs = [_compiled(unit.run) if compiled else unit.run for unit in units]

    @torch.no_grad()
    def run() -> None:
        for ffn in runs:
            ffn(x)

    if any(unit.routed for unit in units):
        return run  # experts may ask the host what the router chose, which a CUDA graph cannot hold
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
    ends = {end: None for parts in _parts(model) for part in parts for end in part.ends}  # shared ones once
    for first, last in ends:
        hooks += [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()
