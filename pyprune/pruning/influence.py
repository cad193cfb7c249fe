"""Block influence: how much an FFN block or a decoder layer turns the residual stream.

It is 1 minus the mean over tokens of the cosine between a hidden state before and after the block: a block that hardly
turns the residual stream is thought to do little (ShortGPT, Men et al. 2024, arXiv 2403.03853; there for layers, one
shot, from the dense model).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..base.progress import Progress, quiet
from ..model.families import FFN
from ..model.probe import evaluating
from .calibration import LayerStream
from .residual import constant_output


@torch.no_grad()
def influence(
    model: nn.Module,
    ffns: list[FFN],
    ids: Tensor,
    structure: str,
    removed: Collection[int] = (),
    progress: Progress = quiet,
) -> dict[int, float]:
    """1 - mean over tokens of cos(before, after) for each block; see the module's source.

    For a layer that is what enters it and what leaves it. For an FFN, after is what its decoder layer gives, and before
    what it would give if the FFN gave nothing: where the FFN is a layer's last step and has its own residual, that is
    what enters the step, as in the paper; this form holds for FFNs beside the attention and in front of a norm, too.

    Args:
        model: a causal LM of Transformers; unchanged.
        ffns: its FFNs (`families.find_ffns`).
        ids: `[N, W]` token ids.
        structure: `ffn` or `layer`.
        removed: numbers of blocks to do without; they get no entry.
        progress: called as `(stage, done, total)`.

    Returns:
        In [0, 2], by the block's number, in order.

    Raises:
        InputError: activations that are not finite.
        UnsupportedModelError: the layers do not simply hand one hidden state to the next.
    """
    with evaluating(model):
        stream = LayerStream(model, ffns, ids)
        found = {}
        for ffn in ffns:
            progress(f"measuring the influence of each {structure}", ffn.layer, len(ffns))
            if ffn.layer not in removed:
                found[ffn.layer] = max(0.0, 1.0 - stream.compare(ffn if structure == "ffn" else None))
            elif structure == "layer":
                stream.skip()
            else:
                with constant_output(ffn):
                    stream.advance()
        progress(f"measuring the influence of each {structure}", len(ffns), len(ffns))
        return found
