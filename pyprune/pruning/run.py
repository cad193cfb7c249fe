"""What `prune` and `prune_blocks` share: checks before anything changes, totals, provenance."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check
from ..base.memory import PeakMemory
from ..base.progress import Progress, quiet
from ..base.ranks import ALONE, Ranks
from ..model import provenance
from ..model.described import Described
from ..model.weights import check_finite, checksum
from .batches import IDS, Batch
from .text import Text, agreed, batches, describe


@dataclass(kw_only=True)
class Totals:
    """What a run cost and left.

    Attributes:
        parameters_before, parameters_after: of the whole model, tied weights once.
        bytes_before, bytes_after: of those parameters.
        tokens, window: calibration tokens used, and tokens in a window; 0 where no text was needed.
        sources: of those tokens: `source`, `tokens`, and their `share`.
        seconds: wall time.
        peak_bytes: growth of the process's memory while pruning, over what it held before.
        device_peak_bytes: most that its tensors held at once on a GPU while pruning, the model's included; else 0.
    """

    parameters_before: int = 0
    parameters_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    tokens: int = 0
    window: int = 0
    sources: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0


def _sizes(model: nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())  # yields tied weights once
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


class Run:
    """One run, before which a model is checked and after which its config says what happened.

    Args:
        model: a causal LM of Transformers.
        text, tokenizer: see `text.calibration`.
        needed: whether text is.
        purpose: what for, in the error where it is missing.
        given: provenance from outside.
        seed, progress: of text that the model writes.
        described: the model, where that is known and its weights are checked when they come.
        ranks: processes that do this together, each with the same model and text.
        same: what else must be the same for all of them.

    Attributes:
        described: the model, dense.
        windows: of calibration tokens, or None where none are needed, or text is given as batches.
        batches: of keyword tensors, where text is given so.

    Raises:
        InputError: text is missing, or weights are not finite.
        UnsupportedModelError: an FFN that pyprune does not know.
    """

    def __init__(
        self,
        model: nn.Module,
        text: Text,
        tokenizer: Any,
        needed: bool,
        purpose: str,
        given: dict[str, Any] | None,
        seed: int = 0,
        progress: Progress = quiet,
        described: Described | None = None,
        ranks: Ranks = ALONE,
        same: dict[str, Any] | None = None,
    ) -> None:
        there = text is not None or tokenizer is not None
        check(there or not needed, "text", f"be given for {purpose}", None)
        self._given = provenance.check_json(given)
        self.described = Described(model) if described is None else described
        if described is None:
            check_finite(model)
        if ranks.several:
            place = {"device": self.described.device.type, "torch": torch.__version__}
            ranks.check_same({"checkpoint": checksum(model), **place, **(same or {}), "text": describe(text)})
        self.batches: list[Batch] | None = batches(model, text) if needed else None
        self.windows = None
        if needed and self.batches is None:
            self.windows = agreed(ranks, model, text, tokenizer, seed, progress)
        if ranks.several and needed:
            ranks.check_same({"text": describe(self.windows or self.batches)})
            count = len(self.batches or ()) if self.windows is None else len(self.windows.ids)
            ranks.check_enough(count, "text", "a window" if self.windows else "a batch")
        if self.windows is not None and any(self.windows.names):
            self._given = {"text": self.windows.name, "sources": self.windows.facts(), **self._given}
        self._before, self._started = _sizes(model), time.perf_counter()

    @property
    def size(self) -> tuple[int, int]:
        """Calibration tokens, and tokens in a window, or at most in one where they differ."""
        if self.batches is not None:
            return sum(len(b.tokens) for b in self.batches), max(b.words[IDS].shape[1] for b in self.batches)
        return (0, 0) if self.ids is None else (self.ids.numel(), self.ids.shape[1])

    @property
    def ids(self) -> Tensor | None:
        """`[N, W]` calibration tokens, or None where none are needed."""
        return None if self.windows is None else self.windows.ids

    def facts(self, chosen: dict[str, Any], **more: Any) -> dict[str, Any]:
        """What mask and checkpoint say of a run with the options `chosen`."""
        tokens, window = self.size
        return {"config": chosen, "tokens": tokens, "window": window, **self._given, **more}

    def finish(self, facts: dict[str, Any], memory: PeakMemory) -> dict[str, Any]:
        """Write provenance into the model's config; returns the fields of `Totals`."""
        provenance.write(self.described.model, self.described.fingerprint, facts)
        after = _sizes(self.described.model)
        tokens, window = self.size
        return vars(
            Totals(
                parameters_before=self._before[0],
                parameters_after=after[0],
                bytes_before=self._before[1],
                bytes_after=after[1],
                tokens=tokens,
                window=window,
                sources=[] if self.windows is None or not any(self.windows.names) else self.windows.facts(),
                seconds=time.perf_counter() - self._started,
                peak_bytes=memory.growth,
                device_peak_bytes=memory.device_peak,
            )
        )
