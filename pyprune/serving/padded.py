"""A checkpoint with one width for all layers, filled up with zero neurons: for every engine that reads the family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check, is_count
from ..model import checkpoint, families, surgery
from .agreement import check_same
from .padding import widen


@dataclass(frozen=True)
class Padded:
    """What an export wrote.

    Attributes:
        path: the folder.
        width: neurons of every layer in it.
        neurons: of each layer, in the model.
        added: share of zero neurons among all.
        apart: distance of its logits from the model's in float32, over the largest.
    """

    path: str
    width: int
    neurons: list[int]
    added: float
    apart: float


@torch.no_grad()
def to_padded(
    model: nn.Module,
    out: str | Path,
    tokens: Tensor,
    tokenizer: Any = None,
    multiple: int = 1,
    overwrite: bool = False,
    max_shard_size: int | str = checkpoint.MAX_SHARD_SIZE,
) -> Padded:
    """Write a model whose FFN widths differ by layer as an ordinary checkpoint of its family, at the widest width.

    Args:
        model: a pruned causal LM of Transformers; its FFNs are widened in place.
        out: the folder (see `checkpoint.save`).
        tokens: `[N, L]` prompts on which it must give the logits that it gave before.
        tokenizer: saved along.
        multiple: the width is a multiple of this, as tensor parallelism and blocks of a quantisation need it.
        overwrite: replace a checkpoint of pyprune's.
        max_shard_size: as for `checkpoint.save`.

    Raises:
        InputError: as `checkpoint.save`, or `multiple` is no positive integer.
        UnsupportedModelError: an FFN that pyprune does not know.
        CheckpointError: its logits changed.
    """
    check(is_count(multiple) and multiple > 0, "multiple", "be a positive integer", multiple)
    checkpoint.check_out(out, overwrite, max_shard_size)
    wide: Any = model
    dtype = wide.dtype
    ffns = families.find_plain(model, "the padded export")
    neurons = [ffn.intermediate_size for ffn in ffns]
    width = -(-max(neurons) // multiple) * multiple
    block = families.ffn_block(model, ffns)
    before = wide.float()(tokens).logits
    for ffn in ffns:
        widen(ffn, width)
    surgery.set_widths(model, block, [width] * len(ffns))
    apart = check_same(before, wide, tokens, Path(out))
    facts = {"padded_from": neurons}
    checkpoint.save(wide.to(dtype), out, tokenizer, overwrite, facts=facts, max_shard_size=max_shard_size)
    return Padded(str(out), width, neurons, 1 - sum(neurons) / (width * len(neurons)), apart)
