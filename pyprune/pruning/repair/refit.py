"""Gate, up and down rows of the kept neurons, fitted together to the dense FFN's output by gradient.

Least squares repairs the down projection alone; here the rows that make the activations move too. Layer by layer, as in
block-wise reconstruction after quantisation (Li et al. 2021, BRECQ, arXiv 2102.05426, section 3.2), with the squared
error of the FFN's output as the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...base import reference
from ...base.errors import UnsupportedModelError, check
from ...model.described import Described
from ...model.families import FFN
from ...model.units import OWN
from .base import REPAIRS, Fitted, Layer
from .least_squares import Fit

# From trials on layers of SmolLM2-135M (bench/notes/quality.md): larger steps did harm in the first layer.
EPOCHS = 4
BATCH = 1024  # tokens in a step
STEP = 5e-3  # Adam's step at the start, in root mean squares of the weights it moves


def _activations(x: Tensor, rows: list[Tensor], biases: list[Tensor | None], activation: str) -> Tensor:
    """`[T, K]`: what enters the down projection."""
    act = reference.ACTIVATIONS[activation]
    parts = [torch.nn.functional.linear(x, row, bias) for row, bias in zip(rows, biases, strict=True)]
    return act(parts[0]) if len(parts) == 1 else act(parts[0]) * parts[1]


@torch.enable_grad()
def refit(
    ffn: FFN, keep: Tensor, down: Tensor, x: Tensor, more: Tensor | None, *, target: float = 0.0, seed: int = 0
) -> Fitted:
    """Fit the rows of the kept neurons to the dense output, starting from `down`.

    Adam over shuffled tokens, with a step that falls to zero (half a cosine). The last quarter of the tokens is held
    out: where the fit is no better there than the start, the start is what is returned.

    Args:
        ffn: the FFN with all its neurons.
        keep: `[K]` the neurons that stay.
        down: `[K, D]` their down rows by least squares.
        x: `[T, D]` what enters the FFN.
        more: `[T, D]` what the dense hidden state has more than this layer's output, or None.
        target: share of `more` in the target.
        seed: of the order of the tokens.
    """
    dense = ffn.weights()
    names = dense.parts[:-1]
    with torch.no_grad():
        wanted = _outputs(x, list(names), list(dense.input_biases), dense.down, ffn.activation)
        if more is not None and target:
            wanted += target * more
        rows = [part[keep].float().clone() for part in names]
        biases = [None if b is None else b[keep].float().clone() for b in dense.input_biases]
        start = [*rows, *[b for b in biases if b is not None], down.float().clone()]
    moving = [t.clone().requires_grad_() for t in start]

    def unpack(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
        given = iter(tensors[len(rows) : -1])
        return tensors[: len(rows)], [None if b is None else next(given) for b in biases], tensors[-1]

    seen = len(x) - max(1, len(x) // 4)
    held_x, held_y = x[seen:], wanted[seen:]

    def error(tensors: list[Tensor]) -> float:
        with torch.no_grad():
            out = _outputs(held_x, *unpack(tensors), ffn.activation)
            return float((out - held_y).square().sum() / held_y.square().sum().clamp_min(1e-30))

    before = error(start)
    _descend(moving, start, x[:seen], wanted[:seen], lambda u: _project(u, *unpack(moving), ffn.activation), seed)
    after = error(moving)
    best = moving if after < before else start
    found, found_biases, found_down = unpack([t.detach() for t in best])
    return Fitted(tuple(found), tuple(found_biases), found_down, error_refit=min(before, after))


def _project(x: Tensor, rows: list[Tensor], biases: list[Tensor | None], down: Tensor, activation: str) -> Tensor:
    """`[T, D]`: the FFN's output without the down bias."""
    return _activations(x, rows, biases, activation) @ down


def _outputs(x: Tensor, rows: list[Tensor], biases: list[Tensor | None], down: Tensor, activation: str) -> Tensor:
    """The same over many tokens, a few at a time, in float32."""
    parts = [r.float() for r in rows], [None if b is None else b.float() for b in biases], down.float()
    return torch.cat([_project(piece, *parts, activation) for piece in x.split(4 * BATCH)])


def _descend(moving: list[Tensor], start: list[Tensor], x: Tensor, y: Tensor, run, seed: int) -> None:  # type: ignore[no-untyped-def]
    """Adam on the squared error of `run(x)` against `y`, relative to the mean square of `y`."""
    batch = min(BATCH, len(x))
    steps = EPOCHS * (len(x) // batch)
    sizes = [float(t.square().mean().sqrt()) for t in start]
    adam = torch.optim.Adam([{"params": [p], "lr": STEP * max(s, 1e-8)} for p, s in zip(moving, sizes, strict=True)])
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda k: 0.5 * (1 + math.cos(math.pi * k / max(1, steps))))
    unit = float(y.square().mean().clamp_min(1e-30))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for i in range(0, len(x) - batch + 1, batch):
            chosen = order[i : i + batch]
            loss = (run(x[chosen]) - y[chosen]).square().mean() / unit
            adam.zero_grad()
            torch.autograd.backward(loss, inputs=moving)
            adam.step()
            schedule.step()


@REPAIRS.add
@dataclass(frozen=True, kw_only=True)
class Refit(Fit):
    """Least squares, then gate, up and down rows of the kept neurons together by gradient. Fields: see `Fit`."""

    NAME = "refit"
    SUMMARY = "least squares, then gate, up and down rows of the kept neurons together by gradient"
    SOURCE = "Li et al. 2021 (BRECQ), arXiv 2102.05426, section 3.2"

    def check_model(self, described: Described) -> None:
        super().check_model(described)
        if own := [ffn.name for ffn in described.ffns if ffn.activation == OWN]:
            raise UnsupportedModelError(
                f"repair 'refit' needs activations of {', '.join(reference.ACTIVATIONS)}, in modules of their own; "
                f"{own[0]} is an expert, or has another: use repair 'least-squares'"
            )

    def check(self, sequential: bool) -> None:
        super().check(sequential)
        check(sequential, "sequential", "be True with repair 'refit'", False)

    def fit(self, layer: Layer) -> Fitted:
        start = self.solve(layer)
        x, more = layer.inputs()
        found = refit(layer.ffn, layer.kept, start.down, x, more, target=self.share, seed=layer.seed)
        return replace(found, error_cut=start.error_before, error_repaired=start.error_after, damping=start.damping)
