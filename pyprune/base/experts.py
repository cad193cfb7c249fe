"""Experts: the FFNs of one layer of a mixture as records, and the routing that a call of them takes."""

from __future__ import annotations

from collections.abc import Sequence
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
        index: `[E, K]` int32, the rows that a call uses of each expert, or None for all; see `ragged`.
        counts: `[E]` int32 in [0, K], how many of its line in `index` count for each expert; None without `index`.

    Raises:
        InputError: naming the first whose shape, dtype or device does not fit, or an index beyond the rows.
    """

    rows: Tensor
    gated: bool
    activation: str
    scales: Tensor | None = None
    index: Tensor | None = None
    counts: Tensor | None = None

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
        self._check_index()

    def _check_index(self) -> None:
        index, counts, device = self.index, self.counts, self.rows.device
        if index is None:
            check(counts is None, "counts", "be None without index", counts)
            return
        check(counts is not None, "counts", "be given with index", None)
        assert counts is not None
        experts, f = self.rows.shape[:2]
        check(index.ndim == 2 and len(index) == experts, "index", f"have shape [{experts}, K]", tuple(index.shape))
        check(tuple(counts.shape) == (experts,), "counts", f"have shape {(experts,)}", tuple(counts.shape))
        for name, tensor in (("index", index), ("counts", counts)):
            check(tensor.dtype == torch.int32, name, "have dtype torch.int32", tensor.dtype)
            check(tensor.device == device, name, f"be on the device of rows, {device}", str(tensor.device))
        if index.is_meta:
            return
        low, high = (int(n) for n in counts.aminmax())
        check(low >= 0 and high <= index.shape[1], "counts", f"lie in [0, {index.shape[1]}]", (low, high))
        used = index[torch.arange(index.shape[1], device=device) < counts[:, None]]
        if used.numel():
            low, high = (int(n) for n in used.aminmax())
            check(low >= 0 and high < f, "index", f"lie in [0, {f})", (low, high))

    @classmethod
    def unchecked(
        cls,
        rows: Tensor,
        gated: bool,
        activation: str,
        scales: Tensor | None = None,
        index: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Experts:
        """Those of parts that were checked before."""
        experts = object.__new__(cls)
        experts.__dict__.update(
            rows=rows, gated=gated, activation=activation, scales=scales, index=index, counts=counts
        )
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
        """F, of each, those in memory."""
        return self.rows.shape[1]

    @property
    def most(self) -> int:
        """K, the most neurons of an expert that a call computes."""
        return self.neurons if self.index is None else self.index.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert, which a call must read of each that it names; of what is kept the mean."""
        whole = self.rows[0].nbytes + (0 if self.scales is None else self.scales[0].nbytes)
        if self.counts is None or not self.neurons:
            return whole
        return round(float(self.counts.double().mean()) * (whole / self.neurons + 4))

    def one(self, expert: int) -> Record:
        """The record of an expert, as views."""
        scales = None if self.scales is None else self.scales[expert]
        index = None
        if self.index is not None and self.counts is not None:
            index = self.index[expert, : int(self.counts[expert])]
        return Record.unchecked(self.rows[expert], self.gated, self.activation, scales, index=index)

    def check_call(self, x: Tensor, index: Tensor, weights: Tensor) -> None:
        """Raise `InputError` unless these can be applied to x with this routing; which experts it names is not read.

        Args:
            x: `[T, D]`, on the same device, of a dtype that mixes with the rows' (see `Record.check_dtype`).
            index: `[T, K]` int64 or int32, the experts of each token.
            weights: `[T, K]` floating point, what their results are multiplied by.
        """
        check(x.ndim == 2, "x", "have two dimensions", tuple(x.shape))
        # Without its index: how many neurons it names is on the device, and a read would wait for it.
        scales = None if self.scales is None else self.scales[0]
        Record.unchecked(self.rows[0], self.gated, self.activation, scales).check_x(x)
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


def ragged(keeps: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """`index` and `counts` of `Experts` that keep these neurons, one vector of integers an expert, of any lengths.

    What no expert reads behind its own count is -1.
    """
    counts = torch.tensor([len(keep) for keep in keeps], dtype=torch.int32)
    index = torch.full((len(keeps), int(counts.max())), -1, dtype=torch.int32)
    for line, keep in zip(index, keeps, strict=True):
        line[: len(keep)] = keep
    return index.to(device), counts.to(device)
