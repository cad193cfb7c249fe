"""ELBO, reconstruction and KL of every held-out string, and intervals over strings and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyprune.base.errors import check
from pyprune.model.probe import evaluating

from .model import TextVAE, gaussian_kl

# A latent dimension is active when its posterior mean varies by more than this over the text (Burda et al. 2016, arXiv
# 1509.00519, section 5.2).
ACTIVE = 0.01
_AT_ONCE = 256
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model makes of the held-out strings.

    Attributes:
        reconstruction: `[S]` float64, -log p(x | z) in nats a string, mean over samples of z.
        kl: `[S]` float64, in nats a string.
        shuffled: the mean of `reconstruction` with the z of another string: as much higher as the decoder uses z.
        active: latent dimensions whose posterior mean varies over the strings.
    """

    reconstruction: Tensor
    kl: Tensor
    shuffled: float
    active: int

    @property
    def elbo(self) -> Tensor:
        """`[S]`, -(reconstruction + KL), a lower bound of log p(x)."""
        return -(self.reconstruction + self.kl)


@torch.no_grad()
def measure(model: TextVAE, strings: Tensor, samples: int = 2, seed: int = 0) -> Measured:
    """The true ELBO: whole KL, no free bits, no word dropout. The noise depends on the seed alone, not on the model.

    Args:
        model: in any mode.
        strings: `[S, W]`.
        samples: of z for each string.
        seed: of the noise.
    """
    check(samples >= 1, "samples", "be at least 1", samples)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, len(strings), model.sizes.latent, generator=generator)
    with evaluating(model):
        encoded = [model.encode(part) for part in strings.split(_AT_ONCE)]
        mean, log_variance = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        z = mean + (log_variance / 2).exp() * noise
        lost = torch.stack([_reconstruction(model, strings, one) for one in z]).mean(0)
        shuffled = float(_reconstruction(model, strings, z[0].roll(1, 0)).mean())
    kl = gaussian_kl(mean.double(), log_variance.double()).sum(1)
    active = int((mean.double().var(0) > ACTIVE).sum())
    return Measured(lost, kl, shuffled, active)


def _reconstruction(model: TextVAE, strings: Tensor, z: Tensor) -> Tensor:
    pairs = zip(strings.split(_AT_ONCE), z.split(_AT_ONCE), strict=True)
    return torch.cat([model.reconstruction(part, own) for part, own in pairs]).double()


def interval(values: Tensor, seed: int = 0) -> dict[str, float]:
    """Mean of `values` `[seeds, S]` with its 95 % bootstrap interval, seeds and strings both drawn with replacement.

    For two models, give the differences on the same strings with the same seeds: the interval is a paired one. With few
    seeds it is too narrow, for it can hold no seed but those.

    Returns:
        `value`, `low`, `high`.

    Raises:
        InputError: no value.
    """
    check(values.ndim == 2 and values.numel() > 0, "values", "be [seeds, strings], at least one", tuple(values.shape))
    table = values.double().numpy()
    seeds, strings = (_shares(n, seed + i) for i, n in enumerate(table.shape))
    drawn = ((seeds @ table) * strings).sum(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(table.mean()), "low": float(low), "high": float(high)}


@cache
def _shares(count: int, seed: int) -> Any:
    """`[resamples, count]` float64: the share that each of `count` has in a sample of as many, drawn from them."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count
