"""Redundancy: cosine similarity of neurons over calibration tokens, and a Wanda score that counts alike neurons once.

`wanda-unique` ranks neurons by Wanda and discounts each by 1 - s^2, s its highest similarity to a neuron ranked above
it: the share of its energy, sum_t a_tj^2, that no single such neuron, rescaled, can stand for. So of two alike neurons
the more important keeps its score. This is the greedy form of maximal marginal relevance with the ranking fixed
beforehand; no paper publishes it for neurons in this form.
"""

import torch
from torch import Tensor

from ...base.errors import check
from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion
from .wanda import wanda


def similarity(gram: Tensor, signed: bool = False) -> Tensor:
    """`[F, F]` cosine similarities abs(C_ij) / sqrt(C_ii C_jj), not centred; zero diagonal, dead neurons alike to none.

    Args:
        gram: `[F, F]`, C = sum over t of a a^T.
        signed: leave the absolute value out.

    Source: Santacroce et al. 2023, arXiv 2302.03773 (the similarity of GUM).
    """
    norm = gram.diagonal().sqrt()
    scale = torch.where(norm > 0, 1 / norm, 0.0)
    cosine = ((gram * scale[:, None]) * scale).clamp_(-1.0, 1.0).fill_diagonal_(0.0)
    return cosine if signed else cosine.abs_()


def uniqueness(gram: Tensor, threshold: float = 0.8, signed: bool = False) -> float:
    """The share of neurons that have no other neuron of similarity >= `threshold`, each pair counted at one of its two.

    A neuron is redundant if one with a higher number is that similar to it, so of n alike neurons one is unique. Dead
    neurons are alike to none and count as unique.

    Args:
        gram: `[F, F]`, C = sum over t of a a^T.
        threshold: in (0, 1].
        signed: by the signed cosine, as the paper's public code counts; by its absolute value otherwise, since a neuron
            that mirrors another is as redundant to a linear down projection.

    Raises:
        InputError: a threshold out of range.

    Source: Santacroce et al. 2023, arXiv 2302.03773, section on redundancy (uniqueness).
    """
    check(0 < threshold <= 1, "threshold", "lie in (0, 1]", threshold)
    redundant = (similarity(gram, signed).triu_(1) >= threshold).any(1)
    return 1.0 - float(redundant.double().mean())


@criterion(
    "wanda-unique",
    summary="Wanda score * (1 - s^2), s = highest abs(cosine) of a_j to a neuron of a higher Wanda score",
    source="similarity of Santacroce et al. 2023, arXiv 2302.03773; greedy discount after maximal marginal relevance, "
    "Carbonell and Goldstein 1998, doi 10.1145/290941.291025",
    needs=("activations", "gram"),
)
def wanda_unique(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    importance = wanda(weights, stats, generator)
    assert stats.gram is not None
    order = importance.argsort(descending=True, stable=True).to(stats.gram.device)
    above = similarity(stats.gram)[order][:, order].tril_(-1).amax(1).cpu()
    scores = torch.empty_like(importance)
    scores[order.cpu()] = importance[order.cpu()] * (1 - above.square())
    return scores
