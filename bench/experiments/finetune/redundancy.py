"""How redundant the neurons of a model are on text of the task: the two measures of the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyprune.model import families
from pyprune.pruning import gradients
from pyprune.pruning.importance.uniqueness import uniqueness

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@torch.no_grad()
def grams(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """For each layer `[F, F]`: sum over the tokens of `ids` (`[N, W]`) of a a^T, float64."""
    ffns = families.find_ffns(model)
    found: list[Tensor] = []

    def add(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            a = args[0].reshape(-1, args[0].shape[-1]).double()
            found[layer] += a.t() @ a

        return hook

    device = next(model.parameters()).device
    found += [torch.zeros(f.intermediate_size, f.intermediate_size, dtype=torch.float64, device=device) for f in ffns]
    handles = [ffn.down.register_forward_pre_hook(add(ffn.layer)) for ffn in ffns]
    try:
        for window in ids:
            model(input_ids=window[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def redundancy(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Uniqueness and sensitivity of all neurons of a model.

    Args:
        model: the compact model: removed neurons do not count.
        ids: `[N, W]` tokens; a window is a sample.

    Returns:
        `unique`: threshold -> share of neurons that no other is as alike to (by layer, weighted by width);
        `sensitivity`: mean over neurons of the mean over samples of abs(sum over its parameters of w * dL/dw).
    """
    model.eval()
    found = grams(model, ids)
    total = sum(len(gram) for gram in found)
    unique = {f"{t:g}": sum(uniqueness(gram, t) * len(gram) for gram in found) / total for t in THRESHOLDS}
    taylor = [stats.sample_taylor for stats in gradients.collect(model, families.find_ffns(model), ids, parts=False)]
    return {"unique": unique, "sensitivity": float(torch.cat(taylor).mean())}
