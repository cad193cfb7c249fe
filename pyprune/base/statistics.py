"""What was measured of a layer: what calibration hands to the criteria."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GradientStats:
    """How the dense model's loss depends on one FFN's neurons and weights (see `gradients.collect`).

    L is the mean next-token cross entropy of a sample (a window), in nats; a_tj is what enters the down projection.

    Attributes:
        samples, tokens: windows, and tokens in all of them.
        neuron_taylor: `[F]`, mean over tokens of abs(a_tj * dL/da_tj).
        mask_square: `[F]`, mean over samples of (sum_t a_tj * dL/da_tj) squared.
        sample_taylor: `[F]`, mean over samples of abs(sum over the neuron's parameters of w * dL/dw), biases included.
        parts: (gate, up, down) or (up, down), each `[F, D]`: dL/dw of the mean loss over samples; () if nobody asked.
        parts_square: the same of the squared dL/dw of each sample, mean over samples; () if nobody asked.
    """

    samples: int
    tokens: int
    neuron_taylor: Tensor
    mask_square: Tensor
    sample_taylor: Tensor
    parts: tuple[Tensor, ...] = ()
    parts_square: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ActivationStats:
    """Moments over calibration tokens of what enters the down projection: a_tj, token t, neuron j.

    Of an expert: over the tokens routed to it, and a is what the neuron contributes, its activation times the router's
    weight; but for `abs_mean`, which is of the activation alone.

    Attributes:
        tokens: T.
        mean, abs_mean: `[F]`, means over t of a and of abs(a).
        square_sum: `[F]`, sum over t of a squared.
        gram: `[F, F]`, sum over t of a a^T, or None when nobody asked for it. Float64 like the rest.
        gradients: of the dense model, or None when nobody asked for them.
        cross: `[F, D]`, sum over t of a e^T, where e is what the dense model's hidden state after the layer has more
            than this one's with all its neurons; None when nobody asked for it.
        held_out: the last quarter of each source's windows: `gram` and `cross`, those of a source over the energy of
            the dense output on it, so that sources count alike; None as above.
        seen: all other windows: `gram` and `cross`, and how many tokens; None as above.
        routed: mean over t of the router's weight; 1 where there is no router.
    """

    tokens: int
    mean: Tensor
    abs_mean: Tensor
    square_sum: Tensor
    gram: Tensor | None = None
    gradients: GradientStats | None = None
    cross: Tensor | None = None
    held_out: ActivationStats | None = None
    seen: ActivationStats | None = None
    routed: float = 1.0

    @property
    def norm(self) -> Tensor:
        """`[F]`, L2 norm over tokens."""
        return self.square_sum.sqrt()

    @property
    def variance(self) -> Tensor:
        """`[F]`, population variance over tokens."""
        return (self.square_sum / max(1, self.tokens) - self.mean.square()).clamp_min(0.0)
