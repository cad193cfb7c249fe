"""One call of `recover`, step by step."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from .config import RecoverReport
from .lesson import Lesson
from .order import rows
from .sources import UNNAMED


class Run:
    """One call of `recover`: what is trained, the optimizer, and the best state so far."""

    def __init__(self, lesson: Lesson, report: RecoverReport) -> None:
        self.lesson, self.report, self.config = lesson, report, lesson.config
        self.named = {n: p for n, p in lesson.student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=0.0, weight_decay=self.config.weight_decay, betas=(0.9, 0.95), fused=True
        )
        self.best: dict[str, Tensor] | None = None
        self.stale = 0
        self.before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._started

    def share(self) -> float:
        """Of the run that is over, by steps or by time, the larger; the next step lies half in the past."""
        by_time = 0.0 if self.config.minutes is None else self.seconds / (60 * self.config.minutes)
        return min(1.0, max((self.report.steps + 0.5) / self.config.steps, by_time))

    def step(self) -> None:
        """One optimizer step.

        Raises:
            InputError: the loss is not finite.
        """
        report, config = self.report, self.config
        rate = config.rate(self.share())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 1_000_003 + report.steps)
        loss = self.lesson.loss(rows(report.steps, report.windows, config.batch, config.seed))
        value = float(loss.total.detach())
        check(math.isfinite(value), "loss", f"be finite at step {report.steps}; lower the learning_rate", value)
        loss.total.backward()
        if config.max_norm:
            torch.nn.utils.clip_grad_norm_(self.named.values(), config.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        report.steps += 1
        report.tokens += config.batch * report.window
        parts = {"loss": value, "ce": loss.ce, "kl": loss.kl, "hidden": loss.hidden}
        report.train.append({"step": report.steps, "rate": rate, **parts})

    def measured(self, model: Any) -> dict[str, Any]:
        """Nats a token on the held-out text: `ce`, the mean over its sources, and each of them if they have names."""
        assert self.lesson.held_out is not None
        found, names = self.lesson.measure(model), self.lesson.held_out.names
        mean = {"ce": sum(found) / len(found)}
        return mean if names == UNNAMED else {**mean, "sources": dict(zip(names, found, strict=True))}

    def measure(self) -> None:
        """Measure on the held-out text, and remember the weights if they are the best so far.

        A state in which a source is worse than it was at first is not the best, whatever it bought with that. But
        training goes on while the mean falls: what a source lost at a high learning rate can come back.
        """
        if self.lesson.held_out is None:
            return
        report = self.report
        found = {"step": report.steps, **self.measured(self.lesson.student)}
        earlier = {m["step"]: m["ce"] for m in report.held_out}
        report.held_out.append(found)
        lowest = not earlier or found["ce"] < min(earlier.values())
        better = not earlier or (found["ce"] < earlier[report.best] and not report.worse(found))
        self.stale = 0 if lowest or better else self.stale + 1
        if better:
            report.best = report.steps
            self.best = {n: p.detach().to("cpu", copy=True) for n, p in self.named.items()}

    def finished(self) -> str | None:
        """Why training ends here, or None."""
        config = self.config
        if self.report.steps >= config.steps:
            return "steps"
        if config.minutes is not None and self.seconds >= 60 * config.minutes:
            return "minutes"
        return "patience" if config.patience and self.stale >= config.patience else None

    def restore_best(self) -> None:
        if self.best is None:
            self.report.best = self.report.steps
            return
        for name, parameter in self.named.items():
            parameter.data.copy_(self.best[name])
