"""How the encoder is pruned: the ways that are compared, and the cut, after which training goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyprune import Mask
from pyprune.model.families import find_ffns
from pyprune.training import TrainingConfig, TrainingPruner
from pyprune.training.methods import Smoothed

from .model import TextVAE

SCORES = {"magnitude": "magnitude-l2-both", "activation x gradient": "taylor-neuron"}
EMA, LAST, ONCE = "EMA, gradual", "last batch, gradual", "EMA, one shot"


@dataclass(frozen=True)
class Way:
    """One way to choose the neurons that go.

    Attributes:
        score: of a row of the table: a key of `SCORES`, or `random`.
        kind: `EMA`, `LAST`, `ONCE`, or empty for random.
    """

    score: str
    kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.score}: {self.kind}" if self.kind else self.score

    def config(self, keep: float, steps: int, beta: float, multiple: int, seed: int) -> TrainingConfig:
        """What `TrainingPruner` is to do in `steps` steps; the final share is reached by the cut after the last.

        One shot trains as many steps before its cut as the others take to prune.
        """
        return TrainingConfig(
            method=Smoothed(SCORES.get(self.score, self.score), beta=0.0 if self.kind == LAST else beta),
            keep=keep,
            steps=steps,
            warmup=steps - 1 if self.kind == ONCE else steps // 10,
            multiple=multiple,
            seed=seed,
        )


# Each differs from the EMA in one thing: no smoothing, or no schedule.
WAYS = (*(Way(score, kind) for score in SCORES for kind in (EMA, LAST, ONCE)), Way("random"))


def adam(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """The optimizer of every parameter that trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)


def cut(model: TextVAE, pruner: TrainingPruner, old: torch.optim.AdamW) -> tuple[Mask, torch.optim.AdamW]:
    """Cut the encoder by the library's surgery, in place, and give an optimizer that goes on where `old` stood.

    Adam's moments of a neuron that stays stay with it. A fresh start would move every weight of the model, those of the
    decoder too, by a whole learning rate along the sign of one batch's gradient.

    Returns:
        The mask, and an optimizer over the parameters that the model has now.
    """
    before = dict(model.named_parameters())
    names = {f"encoder.{ffn.name}.": ffn.layer for ffn in find_ffns(model.encoder)}
    mask = pruner.finish()
    new = adam(model, old.param_groups[0]["lr"])
    for name, parameter in model.named_parameters():
        layer = next((i for prefix, i in names.items() if name.startswith(prefix)), None)
        neurons = None if layer is None else mask.layers[layer].neurons.long()
        state = old.state.get(before[name], {})
        if state:
            new.state[parameter] = {key: narrowed(value, parameter, neurons) for key, value in state.items()}
    return mask, new


def narrowed(moment: Tensor, parameter: Tensor, neurons: Tensor | None) -> Tensor:
    """What `moment`, of the shape that `parameter` had, holds of `neurons`; all of it where nothing was cut."""
    if moment.ndim == 0 or moment.shape == parameter.shape or neurons is None:
        return moment.clone()
    (dim,) = (i for i, (a, b) in enumerate(zip(moment.shape, parameter.shape, strict=True)) if a != b)
    return moment.index_select(dim, neurons)
