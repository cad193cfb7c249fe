"""A checkpoint with one width for all layers, filled up with zero neurons: for every engine that reads the family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import check, is_count
from ..model import checkpoint, families, provenance, surgery
from ..model.towers import config_at, copies
from ..model.widths import built, has_width
from .agreement import check_same, exact_logits
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


def check_multiple(multiple: int) -> None:
    """Raise `InputError` unless `multiple` is a positive integer."""
    check(is_count(multiple) and multiple > 0, "multiple", "be a positive integer", multiple)


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
        model: a pruned causal LM of Transformers; its FFNs are widened in place, and nothing else of it changes. Logits
            are those of copies in float32, or float64 where it is.
        out: the folder (see `checkpoint.save`).
        tokens: `[N, L]` prompts on which it must give the logits that it gave before.
        tokenizer: saved along.
        multiple: the width is a multiple of this, as tensor parallelism and blocks of a quantisation need it.
        overwrite: replace a checkpoint of pyprune's.
        max_shard_size: as for `checkpoint.save`.

    Raises:
        InputError: as `checkpoint.save`; `multiple` is no positive integer; or the family has one width, which its
            config does not say (GPT-1), and the layers are not filled up to it.
        UnsupportedModelError: an FFN that pyprune does not know.
        CheckpointError: its logits changed.
    """
    check_multiple(multiple)
    checkpoint.check_out(out, overwrite, max_shard_size)
    ffns = families.find_plain(model, "the padded export")
    neurons = [ffn.intermediate_size for ffn in ffns]
    width = -(-max(neurons) // multiple) * multiple
    block = families.ffn_block(model, ffns)
    fixed = _fixed_width(model, ffns[0], block)
    one = f"fill up to {fixed} neurons, the width of {type(model).__name__} where its config says none"
    check(fixed in (None, width), "multiple", one, multiple)
    before = exact_logits(model, tokens)
    for ffn in ffns:
        widen(ffn, width)
    surgery.set_widths(model, block, [width] * len(ffns))
    if fixed is not None:
        _say_no_widths(model, block)
    apart = check_same(before, exact_logits(model, tokens), Path(out))
    facts = {"padded_from": neurons}
    checkpoint.save(model, out, tokenizer, overwrite, facts=facts, max_shard_size=max_shard_size)
    return Padded(str(out), width, neurons, 1 - sum(neurons) / (width * len(neurons)), apart)


def _fixed_width(model: nn.Module, ffn: families.FFN, block: dict[str, Any]) -> int | None:
    """The width of every layer in a family whose config has no key for it, or None."""
    where = block.get("config", "")
    if has_width(config_at(model.config, where)):
        return None
    stock = built(model, where, {"per_layer_config": None})
    return replace(ffn, holder=stock.get_submodule(ffn.name)).intermediate_size


def _say_no_widths(model: nn.Module, block: dict[str, Any]) -> None:
    """Let the model's config say what the family's own says."""
    for config in copies(model, block.get("config", "")):
        config.per_layer_config = None
        provenance.set_ffn(config, None)
