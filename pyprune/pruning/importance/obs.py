"""Optimal Brain Surgeon on the down projection: remove the neuron whose loss the others can make up for best, repeat.

A neuron's removal costs min ||A (V - V')||^2 over all V' without it: norm(V_j)^2 / [H^-1]_jj, with A the activations
and H = A^T A / T + damping. The rows that stay take over what they can (V <- V - H^-1[:, j] V_j / [H^-1]_jj), H loses
row and column j, and the next neuron is the cheapest of what is left. Source: Hassibi and Stork 1992 (OBS); for layers,
with blocks removed at once, Frantar and Alistarh 2022 (OBC, arXiv 2208.11580, section 4) and Kurtic et al. 2023 (ZipLM,
arXiv 2302.04089, section 3.1), whose structures are neurons here.

The score of a neuron is the whole squared output error, a token, at the step that removes it: the higher, the later.
The least-squares compensation with the same damping gives the kept neurons the rows that the steps would have left.
"""

import torch
from torch import Tensor

from ...base.statistics import ActivationStats
from ...model.patterns import FFNWeights
from .base import criterion

# Share of the mean diagonal of the second moment; the default of `repair.LeastSquares.damping` too.
DAMPING = 1e-2
# Neurons removed at once: F / STEPS. Few lose little against one at a time, and take a fraction of the time.
STEPS = 96


@criterion(
    "obs",
    summary="squared output error when its turn comes in greedy removal by norm(V_j)^2 / [H^-1]_jj, V updated",
    source="Frantar and Alistarh 2022, arXiv 2208.11580, section 4; Kurtic et al. 2023, arXiv 2302.04089, section 3.1",
    needs=("activations", "gram"),
)
def obs(weights: FFNWeights, stats: ActivationStats, generator: torch.Generator) -> Tensor:
    assert stats.gram is not None
    return removal_errors(weights.down.to(stats.gram.device), stats.gram / stats.tokens)


def removal_errors(down: Tensor, second_moment: Tensor, damping: float = DAMPING, steps: int = STEPS) -> Tensor:
    """`[F]` float64: the squared output error, a token, at the step that removes a neuron.

    Args:
        down: `[F, D]`.
        second_moment: `[F, F]`, mean over tokens of a a^T, float64.
        damping: ridge, as a share of its mean diagonal.
        steps: about how many; F // steps neurons go at once, one where that is less.
    """
    size = len(down)
    scale = float(second_moment.diagonal().mean())
    if scale == 0:
        return torch.zeros(size, dtype=torch.float64)  # nothing is active, and nothing is lost
    ridged = second_moment / scale
    ridged.diagonal().add_(damping)
    # In float32 from here: each step passes over all of it, and the order is all that is wanted.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ridged)).float()
    rows = down.float().clone()
    alive = torch.ones(size, dtype=torch.bool, device=rows.device)
    errors = torch.zeros(size, dtype=torch.float64, device=rows.device)
    spent, left, block = 0.0, size, max(1, size // steps)
    while left:
        cost = torch.where(alive, rows.square().sum(1) / inverse.diagonal(), torch.inf)
        count = min(block, left)
        # The first of equals, on every machine.
        gone = cost.argsort(stable=True)[:count]
        own = torch.linalg.inv(inverse[gone][:, gone].double()).float()
        moved = own @ rows[gone]
        spent += float((rows[gone] * moved).sum()) * scale
        errors[gone] = spent
        alive[gone] = False
        left -= count
        columns = inverse[:, gone].contiguous()
        rows.addmm_(columns, moved, alpha=-1)
        inverse.addmm_(columns, own @ columns.t(), alpha=-1)
        rows[gone] = 0.0
        inverse[gone] = 0.0
        inverse[:, gone] = 0.0
        inverse[gone, gone] = 1.0
    return errors
