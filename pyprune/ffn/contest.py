"""Times every way to compute one problem on this machine, each compared with float64 first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import reference
from ..base.clock import Job, clock, graphed, interleave, median, timed
from ..base.errors import BackendError
from ..base.record import Record
from . import dispatch, tuned
from .backends import Backend, Config, Problem
from .quantisation import cast, widened
from .tuned import Entry

_MOST_COPIES = 64
_CHECKED_ROWS = 8
# int4 rows that are made, and then repeated: to round all of a wide layer would take longer than to time it.
_INT4_ROWS = 512
# A candidate this much slower than its backend's best at the first sample is not timed again.
_HOPELESS = 1.5


@dataclass(frozen=True)
class Effort:
    """How well a problem is timed.

    Attributes:
        copy_bytes: of weights that calls in turn read, so that each finds its own where a model's step does: in memory.
            On a GPU at least twice its L2 cache.
        rounds: fewest and most, of all candidates in turn.
        sample: seconds of one sample, about.
        problem: seconds of all rounds, about.
    """

    copy_bytes: int = 256 << 20
    rounds: tuple[int, int] = (3, 7)
    sample: float = 2e-3
    problem: float = 1.0


CAREFUL = Effort()


@dataclass(frozen=True)
class Tuned:
    """One problem's outcome.

    Attributes:
        problem: what was timed, the representative of its bucket.
        entries: the best of each backend, the fastest first.
        before: what `auto` took until now.
        refused: candidates that failed or were wrong, and why, in one line each.
    """

    problem: Problem
    entries: list[Entry]
    before: Entry | None
    refused: list[str]

    @property
    def speedup(self) -> float | None:
        """Of the best over `before`; None where that did not run."""
        return None if self.before is None else self.before.seconds / self.entries[0].seconds

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "key": tuned.key(self.problem),
            "before": None if self.before is None else self.before.to_json(),
            "entries": [entry.to_json() for entry in self.entries],
            "speedup": self.speedup,
            "refused": self.refused,
        }


def _copies(problem: Problem, nbytes: int, copy_bytes: int) -> int:
    """How many records are read in turn, each of rows of `nbytes`, by what a call reads of them. On a GPU so many, if
    the most there are allow it, that its L2 cache holds no more than half.
    """
    if problem.tokens > 256:
        return 1
    if problem.device == "cuda":
        copy_bytes = max(copy_bytes, 2 * torch.cuda.get_device_properties(problem.device).L2_cache_size)
    read = nbytes * problem.kept // problem.intermediate_size
    return min(_MOST_COPIES, -(-copy_bytes // max(read, 1)))


def _operands(problem: Problem, copy_bytes: int) -> tuple[Tensor, list[Record]]:
    """Random x, and records alike, each read in turn; plain FFNs have biases, as the families' have. Those of a gather
    share rows where they read others.
    """
    device, d, f, dtype = problem.device, problem.hidden_size, problem.intermediate_size, problem.dtype
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    parts = 3 if problem.gated else 2
    made = min(f, _INT4_ROWS) if problem.weights == torch.uint8 else f
    rows, scales = cast(randn(made, parts * d).mul_(d**-0.5), parts, problem.weights or dtype)
    rows = rows.repeat(-(-f // made), 1)[:f] if made < f else rows
    indices: list[Tensor | None] = [None]
    if problem.gather:
        order = torch.randperm(f, generator=generator, device=device)[: f // problem.kept * problem.kept]
        indices = [some.sort().values.int() for some in order.split(problem.kept)]
    bias, down_bias = (None, None) if problem.gated else (randn(f, 1).to(dtype), randn(d).to(dtype))
    copies = _copies(problem, rows.nbytes, copy_bytes)
    records: list[Record] = []
    while len(records) < copies:
        own = rows.clone() if records else rows
        form = (problem.gated, problem.activation, scales, bias, down_bias)
        records += [Record(own, *form, index) for index in indices[: copies - len(records)]]
    return randn(problem.tokens, d).to(dtype), records


def checked_rows(x: Tensor) -> Tensor:
    """Which rows of a result of `x` are compared with float64: some, with the first and the last among them."""
    return torch.linspace(0, len(x) - 1, min(_CHECKED_ROWS, len(x))).round().long().unique().to(x.device)


class _Judge:
    """Compares some rows of a result with float64: at most twice the error of torch is allowed."""

    def __init__(self, x: Tensor, record: Record) -> None:
        self.rows = checked_rows(x)
        few = x[self.rows]
        self.exact = reference.ffn(few.double(), widened(record))
        error = (reference.ffn(few, record).double() - self.exact).norm()
        self.allowed = float(2 * error + 1e-6 * self.exact.norm())

    def why_wrong(self, out: Tensor) -> str | None:
        error = float((out[self.rows].double() - self.exact).norm())
        return None if error <= self.allowed else f"error {error:.3g} where {self.allowed:.3g} is allowed"


@dataclass
class Candidate:
    """A way that is right: `run` makes `calls` calls; `seconds` of one of them, `again` runs in a sample."""

    backend: str
    config: Config
    run: Callable[[], object]
    calls: int
    seconds: float = 0.0
    again: int = 1

    def sample(self, now: Callable[[], float]) -> list[float]:
        def repeated() -> None:
            for _ in range(self.again):
                self.run()

        return list(timed(repeated, now, share=self.again * self.calls)())

    def entry(self) -> Entry:
        return Entry(self.backend, self.config, self.seconds)


def _candidate(
    backend: Backend, config: Config, x: Tensor, records: Sequence[Record], batch_invariant: bool
) -> Candidate:
    def run() -> None:
        for record in records:
            backend.run(x, record, config, batch_invariant)

    return Candidate(backend.NAME, config, graphed(run, x.device), len(records))


def _candidates(
    problem: Problem, x: Tensor, records: Sequence[Record], check_time: Callable[[], None]
) -> tuple[list[Candidate], list[str]]:
    """Those that are right, each with a first time, and why the others are not there."""
    judge, now = _Judge(x, records[0]), clock(problem.device)
    found: list[Candidate] = []
    refused: list[str] = []
    for name, backend in dispatch.backends().items():
        if backend.why_not(problem) is not None:
            continue
        for config in backend.candidate_configs(problem):
            check_time()
            try:
                reason = judge.why_wrong(backend.run(x, records[0], config, problem.batch_invariant))
                if reason is None:
                    candidate = _candidate(backend, config, x, records, problem.batch_invariant)
                    candidate.run()
                    candidate.seconds = candidate.sample(now)[0]
                    found.append(candidate)
                    continue
            except Exception as error:  # whatever a compiler or a launch has against it
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            refused.append(f"{name} {dict(config)}: {reason}")
    return found, refused


def _used_now(problem: Problem) -> tuple[str, Config] | None:
    try:
        chosen = dispatch.choose(problem)
    except BackendError:
        return None
    backend = chosen.backend
    return backend.NAME, backend.default_config(problem) if chosen.config is None else chosen.config


@torch.no_grad()
def try_all(problem: Problem, check_time: Callable[[], None], effort: Effort | None = None) -> Tuned:
    """Time every candidate of every backend that can run `problem`, the representative of its bucket.

    Args:
        problem: what to time.
        check_time: called before every candidate; raises to stop.
        effort: how well; None for `CAREFUL`.

    Raises:
        BackendError: nobody computes it rightly.
    """
    before, effort = _used_now(problem), effort or CAREFUL
    # Held until all are timed: a CUDA graph holds only the addresses of what it reads.
    x, records = _operands(problem, effort.copy_bytes)
    found, refused = _candidates(problem, x, records, check_time)
    return race(problem, before, found, refused, check_time, effort)


def race(
    problem: Problem,
    before: tuple[str, Config] | None,
    found: Sequence[Candidate],
    refused: list[str],
    check_time: Callable[[], None],
    effort: Effort,
) -> Tuned:
    """Time candidates in turns, those that are hopeless no more than once.

    Args:
        problem: what they compute, whose key has the outcome.
        before: backend and configuration that `auto` takes until now.
        found: each with a first time.
        refused: what is said of others.
        check_time, effort: see `try_all`.

    Raises:
        BackendError: there is none.
    """
    if not found:
        raise BackendError(f"no backend for {problem}: {'; '.join(refused)}")
    fastest: dict[str, float] = {}
    for one in found:
        fastest[one.backend] = min(one.seconds, fastest.get(one.backend, one.seconds))
    kept = {
        str(i): one
        for i, one in enumerate(found)
        if one.seconds <= _HOPELESS * fastest[one.backend] or (one.backend, one.config) == before
    }
    check_time()
    for one in kept.values():
        one.again = max(1, min(200, round(effort.sample / max(one.seconds * one.calls, 1e-9))))
    now = clock(problem.device)
    round_seconds = sum(one.seconds * one.calls * one.again for one in kept.values())
    fewest, most = effort.rounds
    rounds = max(fewest, min(most, int(effort.problem / max(round_seconds, 1e-9))))
    jobs: dict[str, Job] = {i: functools.partial(one.sample, now) for i, one in kept.items()}
    for i, samples in interleave(jobs, rounds).items():
        kept[i].seconds = median(samples)
    entries: dict[str, Entry] = {}
    for one in sorted(kept.values(), key=lambda one: one.seconds):
        entries.setdefault(one.backend, one.entry())
    used = [one.entry() for one in kept.values() if (one.backend, one.config) == before]
    return Tuned(problem, list(entries.values()), used[0] if used else None, refused)
