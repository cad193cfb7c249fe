"""The cases of bench/cpu/run.py: one FFN each, by shape, dtype of x and of the record, M and keep."""

from __future__ import annotations

from dataclasses import dataclass

from bench.shapes import BY_NAME, DEFAULT, Shape
from pyprune.base.errors import check_choice

# The layer of the plot, which has one more keep.
PLOTTED = ("llama-3.2-1b", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One FFN: `dtype` is that of x and of torch's weights, `weights` that of the record."""

    shape: Shape
    dtype: str
    weights: str
    tokens: int
    keep: float

    @property
    def neurons(self) -> int:
        return max(1, round(self.keep * self.shape.intermediate_size))


_FLOAT_POINTS = ((1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5), (64, 0.5), (128, 0.5), (512, 0.5))
# (dtype of x, dtype of the record) -> (M, keep)
POINTS: dict[tuple[str, str], tuple[tuple[int, float], ...]] = {
    ("bfloat16", "bfloat16"): _FLOAT_POINTS,
    ("bfloat16", "int8"): ((1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5)),
    ("bfloat16", "int4"): ((1, 1.0), (1, 0.5), (1, 0.25), (4, 0.5), (16, 0.5), (128, 0.5)),
    ("float32", "float32"): _FLOAT_POINTS,
    ("float16", "float16"): ((1, 1.0), (1, 0.5)),
}


def all_cases() -> list[Case]:
    """Every case, those of one dtype next to each other."""
    cases = []
    for (dtype, weights), points in POINTS.items():
        for name in DEFAULT if dtype != "float16" else PLOTTED[:1]:
            more = ((1, 0.75),) if (name, weights) == PLOTTED else ()
            cases += [Case(BY_NAME[name], dtype, weights, tokens, keep) for tokens, keep in (*points, *more)]
    return cases


QUICK = tuple(Case(BY_NAME["smollm2-135m"], "bfloat16", weights, 1, 0.5) for weights in ("bfloat16", "int8"))


def choose(shapes: str, weights: str, tokens: str) -> list[Case]:
    """The cases whose shape, weights and M are listed; an empty list means all."""
    wanted = [[v for v in text.split(",") if v] for text in (shapes, weights, tokens)]
    known = (DEFAULT, tuple(w for _, w in POINTS), tuple(str(c.tokens) for c in all_cases()))
    for values, option, allowed in zip(wanted, ("shapes", "weights", "tokens"), known, strict=True):
        for value in values:
            check_choice(value, option, tuple(dict.fromkeys(allowed)))
    names, dtypes, counts = (values or list(allowed) for values, allowed in zip(wanted, known, strict=True))
    return [c for c in all_cases() if c.shape.name in names and c.weights in dtypes and str(c.tokens) in counts]
