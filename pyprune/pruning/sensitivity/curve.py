"""The curves: what was found, the line between the points, and the widths that cost least by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...base.errors import InputError, check, check_choice

KINDS = ("loss", "error", "fisher")
_STEEPEST = 10.0  # exponent of a curve where nothing was tried


@dataclass(frozen=True)
class SensitivityCurves:
    """How much the loss grows when one layer alone is narrowed.

    Attributes:
        kind: one of `KINDS`.
        sizes: F of each layer.
        widths: of each layer, ascending, those that were tried; all below F.
        losses: of each layer and width, growth of the mean cross entropy in nats a token; as found, so noise may make
            it negative.
        tokens: that were predicted for it.
        fingerprint: of the dense model.
        members: of each layer, how many FFNs of its width it is: the experts of a bank; () for one each.

    Raises:
        InputError: NaN or infinite losses, widths out of range or not ascending, or lengths that differ.
    """

    kind: str
    sizes: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    tokens: int
    fingerprint: str
    members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice(self.kind, "kind", KINDS)
        layers = len(self.sizes)
        check(layers > 0 and len(self.widths) == layers, "widths", f"be given for {layers} layers", len(self.widths))
        check(len(self.losses) == layers, "losses", f"be given for {layers} layers", len(self.losses))
        right = len(self.members) in (0, layers) and all(n >= 1 for n in self.members)
        check(right, "members", f"be counts for {layers} layers, or none", list(self.members))
        for i, (size, widths, losses) in enumerate(zip(self.sizes, self.widths, self.losses, strict=True)):
            rising = all(a < b for a, b in zip((0, *widths), (*widths, size), strict=True)) and len(widths) > 0
            check(rising, f"widths of layer {i}", f"ascend between 1 and {size - 1}", list(widths))
            check(len(losses) == len(widths), f"losses of layer {i}", f"be {len(widths)} numbers", len(losses))
            check(all(map(math.isfinite, losses)), f"losses of layer {i}", "be finite", list(losses))

    @property
    def counts(self) -> tuple[int, ...]:
        """Of each layer, how many FFNs it is."""
        return self.members or (1,) * len(self.sizes)

    def at(self, layer: int, widths: Sequence[int]) -> list[float]:
        """Growth of the loss when `layer` keeps each of `widths` neurons: a power law between neighbours.

        What was found is first made to grow with what is removed. Between two points the curve is a straight line in
        the logarithms of loss and of removed share, so it is as convex as the points are; from nothing removed to the
        first point, and past the last, it goes on with the exponent of the nearest two, 1 to 10. Where
        a point is 0 there is no logarithm, and the line is straight in plain numbers.

        Raises:
            InputError: a width outside [1, F].
        """
        size = self.sizes[layer]
        strange = [width for width in widths if not 1 <= width <= size]
        check(not strange, "widths", f"lie in [1, {size}]", strange[:3])
        removed = [1 - width / size for width in reversed(self.widths[layer])]
        found = np.maximum.accumulate(np.maximum(self.losses[layer][::-1], 0.0)).tolist()
        return [_power_law(removed, found, 1 - width / size) for width in widths]

    def check_fits(self, sizes: Sequence[int], fingerprint: str | None = None) -> None:
        """Raise `InputError` unless these curves are of a model of such widths and, where given, this fingerprint."""
        check(list(sizes) == list(self.sizes), "curves", f"be of layers {list(sizes)[:4]}...", list(self.sizes)[:4])
        same = fingerprint is None or fingerprint == self.fingerprint
        check(same, "curves", f"belong to this model ({str(fingerprint)[:16]}...)", f"{self.fingerprint[:16]}...")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SensitivityCurves:
        """What `to_json` gave.

        Raises:
            InputError: something else.
        """
        try:
            return cls(
                kind=values["kind"],
                sizes=tuple(values["sizes"]),
                widths=tuple(map(tuple, values["widths"])),
                losses=tuple(map(tuple, values["losses"])),
                tokens=int(values["tokens"]),
                fingerprint=str(values["fingerprint"]),
                members=tuple(values.get("members", ())),
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"curves must be as `to_json` gives them; {type(error).__name__}: {error}") from error


def _exponent(r: Sequence[float], y: Sequence[float], i: int) -> float:
    """Of the power law through points i and i + 1; 2, as of a quadratic loss, where there is none."""
    if not 0 <= i < len(r) - 1 or y[i] <= 0:
        return 2.0
    power = (math.log(y[i + 1]) - math.log(y[i])) / (math.log(r[i + 1]) - math.log(r[i]))
    return min(_STEEPEST, max(1.0, power))


def _power_law(r: Sequence[float], y: Sequence[float], x: float) -> float:
    """Value at removed share x of the curve through the points (r, y); see `SensitivityCurves.at`."""
    i = int(np.searchsorted(r, x))
    if i < len(r) and r[i] == x:
        return y[i]
    if i == 0:
        return float(y[0] * (x / r[0]) ** _exponent(r, y, 0))
    if i == len(r):
        return float(y[-1] * (x / r[-1]) ** _exponent(r, y, i - 2))
    if y[i - 1] <= 0:
        return y[i] * (x - r[i - 1]) / (r[i] - r[i - 1])
    way = math.log(x / r[i - 1]) / math.log(r[i] / r[i - 1])
    return math.exp((1 - way) * math.log(y[i - 1]) + way * math.log(y[i]))
