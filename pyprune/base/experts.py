"""Experts: the FFNs of one layer of a mixture as records, and the routing that a call of them takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .errors import check, check_choice
from .record import Record


@dataclass(frozen=True, eq=False)
class Experts:
    """A record for each expert, all of one width and form. Checked once, when it is made.

    Attributes:
        rows: `[E, F, P*D]`, each [up | down] (P = 2) or [gate | up | down] (P = 3); floating point or int8.
        gated: P = 3 if true, else 2.
        activation: a key of `ACTIVATIONS`.
        scales: `[E, F, P]` float32 with int8 rows (weight = row * scale), else None.

    Raises:
        InputError: naming the first whose shape, dtype or device does not fit.
    """

    rows: Tensor
    gated: bool
    activation: str
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        rows, scales = self.rows, self.scales
        check_choice(self.activation, "activation", ACTIVATIONS)
        check(rows.ndim == 3, "rows", "have three dimensions", tuple(rows.shape))
        check(len(rows) > 0, "rows", "hold one expert at least", tuple(rows.shape))
        check(rows.dtype == torch.int8 or rows.is_floating_point(), "rows", "be floating point or int8", rows.dtype)
        if scales is not None:
            shape = (*rows.shape[:2], self.parts)
            check(tuple(scales.shape) == shape, "scales", f"have shape {shape}", tuple(scales.shape))
        Record(rows[0], self.gated, self.activation, None if scales is None else scales[0])

    @classmethod
    def unchecked(cls, rows: Tensor, gated: bool, activation: str, scales: Tensor | None = None) -> Experts:
        """Those of parts that were checked before."""
        experts = object.__new__(cls)
        experts.__dict__.update(rows=rows, gated=gated, activation=activation, scales=scales)
        return experts

    @property
    def parts(self) -> int:
        """P."""
        return 3 if self.gated else 2

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.rows.shape[2] // self.parts

    @property
    def neurons(self) -> int:
        """F, of each."""
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert, which a call must read of each that it names."""
        scales = 0 if self.scales is None else self.scales[0].nbytes
        return self.rows[0].nbytes + scales

    def one(self, expert: int) -> Record:
        """The record of an expert, as views."""
        scales = None if self.scales is None else self.scales[expert]
        return Record.unchecked(self.rows[expert], self.gated, self.activation, scales)

    def check_call(self, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """Raise `InputError` unless these can be applied to x with this routing; which experts it names is not read.

        Args:
            x: `[T, D]`, on the same device, of a dtype that mixes with the rows' (see `Record.check_dtype`).
            index: `[T, K]` int64 or int32, the experts of each token.
            weights: `[T, K]` floating point, what their results are multiplied by.
        """
        check(x.ndim == 2, "x", "have two dimensions", tuple(x.shape))
        self.one(0).check_x(x)
        integers = (torch.int64, torch.int32)
        check(index.dtype in integers, "index", "be int64 or int32", index.dtype)
        shape = (x.shape[0], index.shape[-1] if index.ndim else 0)
        check(tuple(index.shape) == shape, "index", f"have shape [{x.shape[0]}, K]", tuple(index.shape))
        check(weights.is_floating_point(), "weights", "be floating point", weights.dtype)
        check(weights.shape == index.shape, "weights", f"have shape {shape}, as index has", tuple(weights.shape))
        for name, tensor in (("index", index), ("weights", weights)):
            check(tensor.device == x.device, name, f"be on the device of x, {x.device}", str(tensor.device))

    def check_index(self, index: Tensor) -> None:
        """Raise `InputError` where `index` names an expert that there is not."""
        if index.numel():
            low, high = (int(n) for n in index.aminmax())
            check(low >= 0 and high < len(self.rows), "index", f"name experts in [0, {len(self.rows)})", (low, high))
