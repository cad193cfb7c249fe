"""What is timed, and the table of seconds that predicts a step of any widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ...base.clock import Job
from ...base.errors import InputError, check, check_choice
from ...ffn.quantisation import WEIGHTS
from ..timing import Decode, Prefill

KINDS = ("decode", "prefill")
# What a model saves over what its FFNs alone would; outside, a step was too short or the machine too busy to tell.
_FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        kind: `decode`, steps of one token with a KV cache, or `prefill`, one pass over a prompt.
        tokens: M of an FFN call: sequences decoded at once, or tokens of the prompt.
        prompt_tokens, new_tokens: of a decode run.
        weights: dtype that FFN weights are kept in, as for `accelerate`; None for as they are.

    Raises:
        InputError: a value breaks its rule.
    """

    kind: str = "decode"
    tokens: int = 1
    prompt_tokens: int = 32
    new_tokens: int = 16
    weights: str | None = None

    def __post_init__(self) -> None:
        check_choice(self.kind, "kind", KINDS)
        check(self.tokens >= 1, "tokens", "be at least 1", self.tokens)
        check(self.prompt_tokens >= 1, "prompt_tokens", "be at least 1", self.prompt_tokens)
        check(self.new_tokens >= 2, "new_tokens", "be at least 2, since the first step is never timed", self.new_tokens)
        check_choice(self.weights or "float32", "weights", WEIGHTS)

    @classmethod
    def parse(cls, text: str) -> Workload:
        """`decode:1`, `prefill:512` or `decode:1:int8`: kind, tokens, and the dtype of the weights.

        Raises:
            InputError: something else.
        """
        kind, _, rest = text.partition(":")
        tokens, _, weights = rest.partition(":")
        check(tokens.isdigit(), "workload", "be like decode:1, prefill:512 or decode:1:int8", text)
        return cls(kind, int(tokens), weights=weights or None)

    def job(self, model: Any) -> Job:
        """A run of `model` whose samples are the seconds of its steps."""
        generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        rows, length = (self.tokens, self.prompt_tokens) if self.kind == "decode" else (1, self.tokens)
        prompt = torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(device)
        return Decode(model, prompt, self.new_tokens) if self.kind == "decode" else Prefill(model, prompt)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one FFN at each width, and of a whole step of the dense model, on one machine.

    Attributes:
        machine: see `machine.facts`.
        workload: what was timed.
        hidden_size: D.
        sizes: F of each layer.
        widths: ascending; the widest is the largest F.
        alone: median seconds of one FFN alone at each width, reading weights that it has not just read, made to grow
            with the width (neighbours that do not are averaged).
        anchors: width -> median step of the accelerated model with every layer at that width (or its F, if less).
        factors: anchor's width -> what the model saved over what its FFNs alone would have.
        step: median step of the accelerated dense model, the baseline of every speed-up here.
        plain: median step of the Transformers model as it came.

    Raises:
        InputError: numbers that are not finite and positive, or lengths and widths that do not fit together.
    """

    machine: dict[str, Any]
    workload: Workload
    hidden_size: int
    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    alone: tuple[float, ...]
    anchors: dict[int, float]
    factors: dict[int, float]
    step: float
    plain: float

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0, *self.widths), self.widths, strict=False))
        check(rising and len(self.widths) > 0, "widths", "be positive and ascend", list(self.widths)[:8])
        check(len(self.alone) == len(self.widths), "alone", f"be {len(self.widths)} numbers", len(self.alone))
        check(len(self.sizes) > 0, "sizes", "hold at least one layer", 0)
        check(max(self.sizes) == self.widths[-1], "widths", f"end with {max(self.sizes)}", self.widths[-1])
        numbers = [*self.alone, *self.anchors.values(), *self.factors.values(), self.step, self.plain]
        bad = [v for v in numbers if not 0 < v < math.inf]
        check(not bad, "seconds", "be positive and finite", bad[:3])
        saved = sum(self.cost(size) - min(map(self.cost, self.widths)) for size in self.sizes)
        check(saved < self.step, "step", f"be more than the {saved:g} s that its FFNs can save", self.step)

    def cost(self, width: int) -> float:
        """Seconds of one FFN of this width in the model; between two widths of the table on a straight line.

        Raises:
            InputError: narrower than any width of the table, or wider than all.
        """
        within = self.widths[0] <= width <= self.widths[-1]
        check(within, "width", f"lie in [{self.widths[0]}, {self.widths[-1]}], the table's", width)
        alone = float(np.interp(width, self.widths, self.alone))
        factor = 1.0
        if self.factors:
            known = sorted(self.factors)
            factor = float(np.interp(width, known, [self.factors[w] for w in known]))
        return self.alone[-1] - factor * (self.alone[-1] - alone)

    @property
    def rest(self) -> float:
        """Seconds of a step of the dense model outside its FFNs."""
        return self.step - sum(self.cost(size) for size in self.sizes)

    def predict(self, widths: Sequence[int]) -> float:
        """Seconds of a step of the accelerated model with these widths.

        Raises:
            InputError: not one width a layer, or one that is wider than its layer or not in the table's range.
        """
        check(len(widths) == len(self.sizes), "widths", f"be given for {len(self.sizes)} layers", len(widths))
        wide = [(w, size) for w, size in zip(widths, self.sizes, strict=True) if w > size]
        check(not wide, "widths", "be at most F of the layer", wide[:1])
        return self.rest + sum(self.cost(width) for width in widths)

    def speedup(self, widths: Sequence[int]) -> float:
        """Of the accelerated model with these widths over the accelerated dense one."""
        return self.step / self.predict(widths)

    def largest(self, least: Sequence[int] | None = None) -> float:
        """The largest speed-up that any widths reach; with `least`, that are no narrower than it in any layer."""
        least = least or [self.widths[0]] * len(self.sizes)
        cheapest = [
            min((w for w in {*self.widths, size} if low <= w <= size), key=self.cost)
            for low, size in zip(least, self.sizes, strict=True)
        ]
        return self.speedup(cheapest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LatencyTable:
        """What `to_json` gave, also after a file made strings of its keys.

        Raises:
            InputError: something else.
        """
        try:
            return cls(
                **{
                    **values,
                    "workload": Workload(**values["workload"]),
                    **{name: tuple(values[name]) for name in ("sizes", "widths", "alone")},
                    **{name: {int(w): v for w, v in values[name].items()} for name in ("anchors", "factors")},
                }
            )
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"table must be as `to_json` gives it; {type(error).__name__}: {error}") from error


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by least squares, that never fall: neighbours that do are replaced by their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def factors(
    sizes: Sequence[int], widths: Sequence[int], alone: Sequence[float], anchors: Mapping[int, float], step: float
) -> dict[int, float]:
    """Anchor's width -> seconds that the model saved over those that its FFNs alone would have, within `_FACTORS`.

    Where FFNs alone save nothing it is 1: there is nothing to compare.
    """
    found = {}
    for width, seconds in anchors.items():
        saved = sum(
            float(np.interp(size, widths, alone) - np.interp(min(width, size), widths, alone)) for size in sizes
        )
        low, high = _FACTORS
        found[width] = min(high, max(low, (step - seconds) / saved)) if saved > 0 else 1.0
    return found
