"""Record: the neurons of one FFN, in the layout that every backend reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import int4
from .activations import ACTIVATIONS
from .errors import check, check_choice

_MIXING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Record:
    """An FFN as one row per neuron. Checked once, when it is made.

    Attributes:
        rows: `[F, P*D]`, each [up | down] (P = 2) or [gate | up | down] (P = 3); floating point or int8, or int4 in
            uint8, whose parts have `int4.part_bytes(D)` columns.
        gated: P = 3 if true, else 2.
        activation: a key of `ACTIVATIONS`.
        scales: `[F, P]` float32 with int8 rows (weight = row * scale), else None.
        neuron_bias: `[F, P-1]`, bias of (up) or (gate, up), or None.
        down_bias: `[D]` or None.
        index: `[K]` int32, the rows that a call uses (as `KeepIndex.neurons` gives them), or None for all.

    Raises:
        InputError: naming the first whose shape, dtype or device does not fit, or an index beyond the rows.
    """

    rows: Tensor
    gated: bool
    activation: str
    scales: Tensor | None = None
    neuron_bias: Tensor | None = None
    down_bias: Tensor | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        rows, index, device = self.rows, self.index, self.rows.device
        check_choice(self.activation, "activation", ACTIVATIONS)
        check(rows.ndim == 2, "rows", "have two dimensions", tuple(rows.shape))
        f, parts, d = rows.shape[0], self.parts, self.hidden_size
        int8, packed = rows.dtype == torch.int8, rows.dtype == torch.uint8
        check(int8 or packed or rows.is_floating_point(), "rows", "be floating point, int8 or uint8 (int4)", rows.dtype)
        columns = parts * (int4.part_bytes(d) if packed else d)
        check(rows.shape[1] == columns, "rows", f"have shape {(f, columns)}", tuple(rows.shape))
        check(not int8 or self.scales is not None, "scales", "be given with int8 rows", None)
        given = None if self.scales is None else tuple(self.scales.shape)
        check(int8 or given is None, "scales", f"be None with rows of {rows.dtype}", given)
        for name, tensor, shape in (
            ("scales", self.scales, (f, parts)),
            ("neuron_bias", self.neuron_bias, (f, parts - 1)),
            ("down_bias", self.down_bias, (d,)),
            ("index", index, (0 if index is None else index.numel(),)),
        ):
            if tensor is None:
                continue
            check(tuple(tensor.shape) == shape, name, f"have shape {shape}", tuple(tensor.shape))
            check(tensor.device == device, name, f"be on the device of rows, {device}", str(tensor.device))
        if self.scales is not None:
            check(self.scales.dtype == torch.float32, "scales", "have dtype torch.float32", self.scales.dtype)
        if index is not None:
            check(index.dtype == torch.int32, "index", "have dtype torch.int32", index.dtype)
            if len(index) and not index.is_meta:
                low, high = (int(n) for n in index.aminmax())
                check(low >= 0 and high < f, "index", f"lie in [0, {f})", (low, high))

    @classmethod
    def unchecked(
        cls,
        rows: Tensor,
        gated: bool,
        activation: str,
        scales: Tensor | None = None,
        neuron_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Record:
        """One of parts that were checked before, for it costs a tenth."""
        record, put = object.__new__(cls), object.__setattr__
        # One by one: torch 2.11's compiler follows no `__dict__.update`.
        put(record, "rows", rows)
        put(record, "gated", gated)
        put(record, "activation", activation)
        put(record, "scales", scales)
        put(record, "neuron_bias", neuron_bias)
        put(record, "down_bias", down_bias)
        put(record, "index", index)
        return record

    @property
    def parts(self) -> int:
        """P."""
        return 3 if self.gated else 2

    @property
    def hidden_size(self) -> int:
        """D."""
        size = self.rows.shape[1] // self.parts
        return int4.width(size) if self.rows.dtype == torch.uint8 else size

    @property
    def neurons(self) -> int:
        """F, those in memory."""
        return self.rows.shape[0]

    @property
    def kept(self) -> int:
        """K, those that a call computes."""
        return self.neurons if self.index is None else self.index.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that a call must read whatever the kernel: of kept neurons, with their index, and of the down bias."""
        own = (t for t in (self.rows, self.scales, self.neuron_bias) if t is not None)
        neuron = sum(t.shape[1] * t.element_size() for t in own) + (0 if self.index is None else 4)
        return self.kept * neuron + (0 if self.down_bias is None else self.down_bias.nbytes)

    def narrow(self, neurons: int) -> Record:
        """The first neurons, as views; of an index, those that it names first."""
        if self.index is not None:
            return Record.unchecked(
                self.rows, self.gated, self.activation, self.scales, self.neuron_bias, self.down_bias,
                self.index[:neurons],
            )  # fmt: skip
        scales = None if self.scales is None else self.scales[:neurons]
        neuron_bias = None if self.neuron_bias is None else self.neuron_bias[:neurons]
        return Record.unchecked(self.rows[:neurons], self.gated, self.activation, scales, neuron_bias, self.down_bias)

    def check_dtype(self, dtype: torch.dtype, argument: str) -> None:
        """Raise `InputError` naming `argument` unless x may have `dtype`, given the biases and the rows.

        float32, bfloat16 and float16 mix with each other, and any floating dtype with int8 and int4.
        """
        rows = self.rows.dtype
        fits = rows in (torch.int8, torch.uint8, dtype) or (rows in _MIXING and dtype in _MIXING)
        check(fits, argument, f"be {rows}, as the rows are, or mix with it (float32, bfloat16, float16)", dtype)
        for name, bias in (("neuron_bias", self.neuron_bias), ("down_bias", self.down_bias)):
            if bias is not None:
                check(bias.dtype == dtype, argument, f"be {bias.dtype}, as {name} is", dtype)

    def check_x(self, x: Tensor) -> None:
        """Raise `InputError` unless this can be applied to x: `[..., D]`, on the same device, of a dtype that mixes."""
        d, device = self.hidden_size, self.rows.device
        check(x.ndim >= 1, "x", "have at least one dimension", tuple(x.shape))
        check(x.is_floating_point(), "x", "be floating point", x.dtype)
        check(x.shape[-1] == d, "x", f"have shape [..., {d}]", tuple(x.shape))
        check(x.device == device, "x", f"be on the device of the record, {device}", str(x.device))
        self.check_dtype(x.dtype, "dtype of x")


def described(
    hidden_size: int,
    neurons: int,
    *,
    gated: bool,
    activation: str,
    dtype: torch.dtype,
    weights: torch.dtype | None = None,
    neuron_bias: bool = False,
    down_bias: bool = False,
    kept: int | None = None,
) -> Record:
    """A record of meta tensors, to ask what one of this form would be.

    Args:
        hidden_size: D.
        neurons: F.
        gated, activation: the FFN.
        dtype: of the biases, which is that of x.
        weights: of the rows; None for `dtype`. Int8 rows have scales; uint8 is int4.
        neuron_bias, down_bias: which biases it has.
        kept: K, for an index of so many rows; None for no index.
    """
    parts, weights = 3 if gated else 2, weights or dtype

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    return Record(
        meta(neurons, parts * (int4.part_bytes(hidden_size) if weights == torch.uint8 else hidden_size), of=weights),
        gated,
        activation,
        meta(neurons, parts, of=torch.float32) if weights == torch.int8 else None,
        meta(neurons, parts - 1) if neuron_bias else None,
        meta(hidden_size) if down_bias else None,
        None if kept is None else meta(kept, of=torch.int32),
    )
