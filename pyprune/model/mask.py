"""Keep index (the neurons of one layer that stay) and mask (the keep indices of a whole model)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.errors import CheckpointError, InputError, check
from ..base.files import new_file

_FORMAT = "pyprune-mask-1"
_WIDEST = 2**31 - 1  # neuron numbers are int32


class KeepIndex:
    """The sorted, unique int32 numbers of the neurons that stay in one layer. Immutable; checked once, here.

        >>> keep = KeepIndex([0, 2, 3], intermediate_size=8)
        >>> len(keep), keep.intermediate_size
        (3, 8)

    Args:
        neurons: `[K]` integers, 1 <= K <= intermediate_size, strictly increasing, each in [0, intermediate_size).
        intermediate_size: F, the width of the layer the numbers refer to.
        argument: the name used in error messages.

    Raises:
        InputError: empty, out of range, duplicate, unsorted, or not integers.
    """

    __slots__ = ("_neurons", "intermediate_size")
    intermediate_size: int

    def __init__(self, neurons: Tensor | Iterable[int], intermediate_size: int, argument: str = "keep index") -> None:
        whole = isinstance(intermediate_size, int) and not isinstance(intermediate_size, bool)
        check(
            whole and 1 <= intermediate_size <= _WIDEST, argument, f"refer to 1 to {_WIDEST} neurons", intermediate_size
        )
        try:
            tensor = neurons.detach().cpu() if isinstance(neurons, Tensor) else torch.tensor(list(neurons))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"{argument} must hold integers; got {neurons!r:.80}") from error
        check(tensor.ndim == 1, argument, "have one dimension", tuple(tensor.shape))
        check(tensor.numel() > 0, argument, "keep at least one neuron", [])
        check(
            not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool,
            argument,
            "hold integers",
            tensor.dtype,
        )
        tensor = tensor.to(torch.int64)
        low, high = int(tensor.min()), int(tensor.max())
        check(low >= 0 and high < intermediate_size, argument, f"lie in [0, {intermediate_size})", (low, high))
        steps = tensor.diff()
        check(bool((steps != 0).all()), argument, "hold no duplicate", int(tensor[1:][steps == 0][:1].sum()))
        check(bool((steps > 0).all()), argument, "be sorted", tensor[:8].tolist())
        object.__setattr__(self, "_neurons", tensor.to(torch.int32, copy=True))
        object.__setattr__(self, "intermediate_size", intermediate_size)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a KeepIndex is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a KeepIndex is immutable")

    def __reduce__(self) -> tuple[type, tuple[Tensor, int]]:
        return KeepIndex, (self.neurons, self.intermediate_size)

    @property
    def neurons(self) -> Tensor:
        """`[K]` int32 on the CPU; a copy, so that nobody can change the index."""
        neurons: Tensor = object.__getattribute__(self, "_neurons")
        return neurons.clone()

    def __len__(self) -> int:
        return int(object.__getattribute__(self, "_neurons").numel())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, KeepIndex)
            and self.intermediate_size == other.intermediate_size
            and torch.equal(self.neurons, other.neurons)
        )

    def __hash__(self) -> int:
        return hash((self.intermediate_size, tuple(self.neurons.tolist())))

    def __repr__(self) -> str:
        return f"KeepIndex({len(self)} of {self.intermediate_size})"

    @classmethod
    def all(cls, intermediate_size: int) -> KeepIndex:
        """The index that keeps every neuron."""
        return cls(torch.arange(intermediate_size), intermediate_size)

    @classmethod
    def from_scores(cls, scores: Tensor, count: int, argument: str = "scores") -> KeepIndex:
        """Keep the `count` neurons with the highest `scores` (`[F]`); ties keep the lower number.

        Raises:
            InputError: NaN or infinite scores, or `count` outside [1, F].
        """
        check_scores(scores, argument)
        check(1 <= count <= scores.numel(), "count", f"lie in [1, {scores.numel()}]", count)
        order = scores.double().argsort(descending=True, stable=True)
        return cls(order[:count].sort().values, scores.numel())


def check_scores(scores: Tensor, argument: str = "scores") -> None:
    """Raise `InputError` unless `scores` is a finite `[F]` vector."""
    check(scores.ndim == 1, argument, "have one dimension", tuple(scores.shape))
    bad = (~torch.isfinite(scores)).nonzero()
    if bad.numel():
        first = int(bad[0])
        raise InputError(
            f"{argument} must be finite; {bad.numel()} of {scores.numel()} are not, "
            f"the first is {scores[first].item()} at neuron {first}"
        )


@dataclass(frozen=True)
class Mask:
    """Keep indices for all layers of one model.

        >>> model, tokenizer = load("demo")
        >>> mask = prune(model, keep=0.5, method="magnitude-l2-both", repair=None).mask
        >>> mask.save("half.safetensors")
        >>> Mask.load("half.safetensors") == mask
        True
        >>> dense, _ = load("demo")
        >>> model = accelerate(dense, mode="gather", mask=mask)  # all weights stay, the others are not read

    Attributes:
        layers: one `KeepIndex` a layer, in order.
        fingerprint: of the dense model the mask belongs to (see `families.fingerprint`).
        provenance: how the mask was made (method, seed, text, ...); JSON values only.
    """

    layers: tuple[KeepIndex, ...]
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check(len(self.layers) > 0, "mask", "hold at least one layer", 0)
        strange = [type(keep).__name__ for keep in self.layers if not isinstance(keep, KeepIndex)]
        check(not strange, "mask", "hold one KeepIndex a layer", strange)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Kept neurons of each layer."""
        return tuple(len(keep) for keep in self.layers)

    @property
    def keep(self) -> float:
        """Share of all neurons that stay."""
        return sum(self.widths) / sum(k.intermediate_size for k in self.layers)

    def check_fits(self, intermediate_sizes: Sequence[int], fingerprint: str) -> None:
        """Raise `InputError` unless the mask was made for a model of these widths and this fingerprint."""
        check(len(self.layers) == len(intermediate_sizes), "mask", f"have {len(intermediate_sizes)} layers", len(self))
        for i, (keep, size) in enumerate(zip(self.layers, intermediate_sizes, strict=True)):
            check(keep.intermediate_size == size, f"mask layer {i}", f"refer to {size} neurons", keep.intermediate_size)
        check(
            self.fingerprint == fingerprint,
            "mask",
            f"belong to this model (fingerprint {fingerprint[:16]}...)",
            f"{self.fingerprint[:16]}...",
        )

    def save(self, path: str | Path) -> None:
        """Write the mask as one safetensors file (int32 `layers.N`, facts in its metadata)."""
        tensors = {f"layers.{i}": keep.neurons for i, keep in enumerate(self.layers)}
        metadata = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "intermediate_sizes": json.dumps([k.intermediate_size for k in self.layers]),
            "provenance": json.dumps(self.provenance),
        }
        with new_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask; every index is checked again.

        Raises:
            InputError: no such file, or an index that breaks a rule.
            CheckpointError: not a mask file, or a damaged one.
        """
        check(Path(path).is_file(), "mask", "be an existing file", str(path))
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} is not a pyprune mask (format {metadata.get('format')!r})")
                sizes = json.loads(metadata["intermediate_sizes"])
                provenance = json.loads(metadata["provenance"])
                layers = tuple(
                    KeepIndex(file.get_tensor(f"layers.{i}"), size, f"mask layer {i}") for i, size in enumerate(sizes)
                )
                fingerprint = metadata["fingerprint"]
        except InputError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a readable mask: {error}") from error
        return cls(layers, fingerprint, provenance)
