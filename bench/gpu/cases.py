"""What run.py measures: FFNs by shape, M and keep, in the order in which they are worth the time of a GPU.

A case's `kind` says which goal it is for, and `wants` which ways to run it are timed besides the dense paths and ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.shapes import BY_NAME, Shape

LARGE = ("llama-3-8b", "opt-6.7b")
SMALL = ("gpt2", "smollm2-135m")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        kind: decode, small, few, medium, prefill, int8: FFNs; model; inductor: what torch.compile makes of
            the dense FFNs of earlier cases, in a process of its own.
        shape: of `shapes.SHAPES`.
        tokens: M.
        keep: share of neurons that stay.
        seconds: what it is expected to take; not begun when less is left.
        configs: most configurations of one backend that are timed besides its default.
        plans: as many of the native kernels'.
        wants: rivals by name, see rivals.py.
    """

    kind: str
    shape: Shape
    tokens: int = 1
    keep: float = 0.5
    seconds: float = 12.0
    configs: int = 0
    plans: int = 0
    wants: tuple[str, ...] = ()

    @property
    def neurons(self) -> int:
        """K, the neurons that stay."""
        return max(1, round(self.keep * self.shape.intermediate_size))

    @property
    def name(self) -> str:
        """What results and goals call it; unique."""
        if self.kind in ("model", "inductor"):
            return self.kind
        words = " int8" if self.kind == "int8" else ""
        return f"{self.shape.name}{words} M {self.tokens} keep {self.keep:g}"

    @property
    def weights(self) -> str:
        """Dtype of the records that the case is about."""
        return "int8" if self.kind == "int8" else "bfloat16"


def _large(kind: str, tokens: int, keep: float, **more: object) -> list[Case]:
    return [Case(kind, BY_NAME[name], tokens, keep, **more) for name in LARGE]  # type: ignore[arg-type]


# What a GPU is measured for before its time is spent on anything else.
FIRST = ("decode", "small")
# So many configurations of the native kernels come first for a reason: overlap, by pieces, early, two passes, those
# overlapping and split more finely.
PLANS = 6
# The shapes and M that torch.compile is tried on, in this order; the first two belong to a goal.
INDUCTOR = (("gpt2", 1), ("smollm2-135m", 1), ("llama-3-8b", 1), ("opt-6.7b", 1))


def all_cases() -> list[Case]:
    """Every case, the most important first."""
    small = [Case("small", BY_NAME[name], 1, 0.5, 9, configs=2, plans=PLANS) for name in SMALL]
    return [
        *_large("decode", 1, 0.5, seconds=12, configs=5, plans=PLANS, wants=("two-kernel gather", "2:4", "liger")),
        *_large("decode", 1, 1.0, seconds=8, configs=3, plans=PLANS),
        *small,
        *_large("decode", 1, 0.25, seconds=8, configs=1, plans=PLANS, wants=("two-kernel gather",)),
        *_large("few", 16, 0.5, seconds=6, configs=2),
        *_large("few", 4, 0.5, seconds=6, configs=2, plans=PLANS),
        *_large("few", 64, 0.5, seconds=6, configs=2),
        Case("model", BY_NAME["llama-3-8b"], 1, 0.5, seconds=30),
        *_large("prefill", 4096, 0.5, seconds=8, configs=1, wants=("2:4", "liger")),
        *_large("int8", 1, 0.5, seconds=8, configs=2, plans=PLANS),
        *_large("medium", 512, 0.5, seconds=6),
        Case("inductor", BY_NAME[SMALL[0]], seconds=30),
        *_large("few", 8, 0.5, seconds=6),
        *_large("int8", 1, 1.0, seconds=6),
        *_large("few", 16, 0.25, seconds=6),
        *_large("few", 4, 0.25, seconds=6),
        *_large("few", 64, 0.25, seconds=6),
    ]


def dry_cases() -> list[Case]:
    """Every case shrunk to what a CPU does in no time: the same code, no number worth keeping."""

    def shrink(case: Case) -> Case:
        size = {4096: 64, 768: 32, 576: 48}[case.shape.hidden_size]
        shape = replace(case.shape, hidden_size=size, intermediate_size=2 * size)
        tokens = {64: 17, 512: 18, 4096: 19}.get(case.tokens, case.tokens)
        return replace(case, shape=shape, tokens=tokens, seconds=0.0)

    found = {case.name: case for case in map(shrink, all_cases())}
    return list(found.values())


def choose(names: str, cases: list[Case]) -> list[Case]:
    """The cases whose name holds one of these words (by commas); all for an empty string."""
    words = [word.strip() for word in names.split(",") if word.strip()]
    return [case for case in cases if not words or any(word in f"{case.kind} {case.name}" for word in words)]
