"""What a step learns from: student, teacher and text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...base.machine import products
from ...base.ranks import ALONE, Ranks
from ...model.probe import evaluating
from ...pruning.mixture import Windows
from ..distillation import (
    DistillationConfig,
    DistillationLoss,
    distillation_loss,
    distillation_loss_from_hidden,
    plain_head,
    shifted,
)
from .config import RecoverConfig
from .order import order
from .sources import of_source

_CACHE_BYTES = 2 << 30
_ONLY_TEXT = DistillationConfig(kl_weight=0.0, ce_weight=1.0)


class Lesson:
    """Student, teacher and text: the loss of a batch, and of the held-out windows, which `ranks` share out."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        windows: Tensor,
        held_out: Windows | None,
        config: RecoverConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.student, self.teacher, self.windows, self.held_out = student, teacher, windows, held_out
        self.config, self.ranks = config, ranks
        self.device = next(student.parameters()).device
        self.dtype = products(config.precision, self.device)
        self.teacher_seconds = self.held_out_seconds = 0.0
        heads = plain_head(student), plain_head(teacher)
        fits = None not in heads and not config.distillation.hidden_weight
        self._heads = heads if fits else None
        batches = order(len(windows), 0, config.seed).split(config.batch)
        self._groups = [part for rows in batches for part in rows.tensor_split(ranks.size) if len(part)]
        self._group_of = {int(row): n for n, group in enumerate(self._groups) for row in group}
        self._kept: dict[int, Tensor] = {}
        # In bfloat16 a copy of the teacher is no smaller than what the weights would be cast to at every step.
        width = teacher.config.get_text_config().hidden_size
        self._keeps = windows.numel() * width * self.dtype.itemsize <= _CACHE_BYTES

    @contextmanager
    def _casting(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    @torch.no_grad()
    def _teacher_states(self, rows: Tensor) -> Tensor:
        """`[B, W, D]`: the teacher's last hidden states.

        Windows go through the teacher in the groups in which the first pass meets them, so that a run and its
        continuation see the same bits, whichever windows a step needs.
        """
        started = time.perf_counter()
        if not self._keeps:
            states = self._base(self.teacher, self.windows[rows]).to(self.dtype)
        else:
            for row in rows.tolist():
                if row not in self._kept:
                    group = self._groups[self._group_of[row]]
                    found = self._base(self.teacher, self.windows[group]).to(self.dtype)
                    self._kept.update(zip(group.tolist(), found, strict=True))
            states = torch.stack([self._kept[row] for row in rows.tolist()])
        self.teacher_seconds += time.perf_counter() - started
        return states

    def _base(self, model: Any, ids: Tensor) -> Tensor:
        with self._casting():
            result: Tensor = model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return result

    def _full(self, model: Any, ids: Tensor, hidden: bool) -> tuple[Tensor, Any]:
        with self._casting():
            out = model(input_ids=ids.to(self.device), use_cache=False, output_hidden_states=hidden)
        return out.logits, out.hidden_states[1:] if hidden else None

    def loss(self, rows: Tensor) -> DistillationLoss:
        """The loss of some windows, differentiable in the student's weights."""
        ids, config = self.windows[rows], self.config.distillation
        labels = shifted(ids).to(self.device)
        if self._heads is not None:
            mine, theirs = self._heads
            assert mine is not None and theirs is not None
            taught = (self._teacher_states(rows), theirs) if config.kl_weight else None
            return distillation_loss_from_hidden(
                (self._base(self.student, ids), mine), taught, labels, config, self.dtype
            )
        hidden = bool(config.hidden_weight)
        logits, states = self._full(self.student, ids, hidden)
        started = time.perf_counter()
        with torch.no_grad():
            their_logits, their_states = self._full(self.teacher, ids, hidden)
        self.teacher_seconds += time.perf_counter() - started
        return distillation_loss(logits, their_logits, labels, config, states, their_states)

    @torch.no_grad()
    def measure(self, model: Any) -> list[float]:
        """Nats a token of student or teacher on the held-out windows of each source; the same bits on every rank."""
        assert self.held_out is not None
        started = time.perf_counter()
        with evaluating(model):
            texts = [of_source(self.held_out, i) for i in range(len(self.held_out.names))]
            sums = torch.tensor([self._nats(model, self.ranks.share(ids)) for ids in texts], dtype=torch.float64)
            self.ranks.add(sums)
        self.held_out_seconds += time.perf_counter() - started
        return [total / len(ids) for total, ids in zip(sums.tolist(), texts, strict=True)]

    def _nats(self, model: Any, windows: Tensor) -> float:
        """Nats a token of every window, added up."""
        total = 0.0
        head = None if self._heads is None else self._heads[model is self.teacher]
        for ids in windows.split(self.config.batch) if len(windows) else ():  # a rank may have none
            labels = shifted(ids).to(self.device)
            if head is not None:
                states = self._base(model, ids)
                loss = distillation_loss_from_hidden((states, head), None, labels, _ONLY_TEXT, self.dtype)
            else:
                loss = distillation_loss(self._full(model, ids, False)[0], None, labels, _ONLY_TEXT)
            total += loss.ce * len(ids)
        return total
