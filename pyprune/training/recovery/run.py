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
    """One call of `recover`: what is trained, the optimizer, and the best state so far.

    Of several processes each takes its share of a step's windows. Gradients are added up over them, and so are losses
    and measurements, so all decide alike and have the same weights.
    """

    def __init__(self, lesson: Lesson, report: RecoverReport) -> None:
        self.lesson, self.report, self.config = lesson, report, lesson.config
        self.named = {n: p for n, p in lesson.student.named_parameters() if p.requires_grad}
        self._ranks = lesson.ranks
        if self._ranks.several and self.config.mode == "lora":  # adapters begin at random
            self._take_over()
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=0.0, weight_decay=self.config.weight_decay, betas=(0.9, 0.95), fused=True
        )
        self.best: dict[str, Tensor] | None = None
        self.stale = 0
        self.before = 0.0
        self._started = time.perf_counter()

    @torch.no_grad()
    def _take_over(self) -> None:
        """The first rank's weights."""
        found = self._ranks.exchange(self.named if self._ranks.rank == 0 else {}, self.lesson.device)
        for name, parameter in self.named.items():
            parameter.copy_(found[name])

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self._started

    def _time(self) -> float:
        """The share of the minutes that is over, by the first rank's clock; 0 where time has no end."""
        if self.config.minutes is None:
            return 0.0
        first: float = self._ranks.gather(self.seconds)[0]
        return first / (60 * self.config.minutes)

    def share(self) -> float:
        """Of the run that is over, by steps or by time, the larger; the next step lies half in the past."""
        by_time = self._time()
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
        torch.manual_seed(config.seed * 1_000_003 + report.steps + (self._ranks.rank << 40))  # dropout: each its own
        mine = self._ranks.share(rows(report.steps, report.windows, config.batch, config.seed))
        loss, weight = self.lesson.loss(mine), len(mine) / config.batch
        parts = torch.tensor([float(loss.total.detach()), loss.ce, loss.kl, loss.hidden], dtype=torch.float64) * weight
        self._ranks.add(parts)
        value, *means = parts.tolist()
        check(math.isfinite(value), "loss", f"be finite at step {report.steps}; lower the learning_rate", value)
        (loss.total * weight).backward()
        self._add_gradients()
        if config.max_norm:
            torch.nn.utils.clip_grad_norm_(self.named.values(), config.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        report.steps += 1
        report.tokens += config.batch * report.window
        named = dict(zip(("ce", "kl", "hidden"), means, strict=True))
        report.train.append({"step": report.steps, "rate": rate, "loss": value, **named})

    def _add_gradients(self) -> None:
        """Over the ranks; what none of them has stays None, as in one process."""
        if not self._ranks.several:
            return
        parameters = list(self.named.values())
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
        self._ranks.add(there)
        found = [p for p, count in zip(parameters, there.tolist(), strict=True) if count]
        for parameter in found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._ranks.add(*(p.grad for p in found if p.grad is not None))

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
        if self._time() >= 1:
            return "minutes"
        return "patience" if config.patience and self.stale >= config.patience else None

    def restore_best(self) -> None:
        if self.best is None:
            self.report.best = self.report.steps
            return
        with torch.no_grad():  # and not through `data`, by which nobody would know that the weights are others
            for name, parameter in self.named.items():
                parameter.copy_(self.best[name])
