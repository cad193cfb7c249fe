"""A LLaMA-shaped checkpoint as DeciLM, whose config gives every layer a width of its own: for vLLM without a plugin."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..base.errors import CheckpointError, UnsupportedModelError
from ..base.files import new_folder
from ..model import checkpoint, families, remote_code
from ..model.manifest import strangers
from . import deci_config

# Families that are LLaMA's, and what their configs leave unsaid: whether queries, keys and values have a bias.
SHAPED = {"llama": None, "mistral": None, "qwen2": True}


@dataclass(frozen=True)
class Deci:
    """What an export wrote.

    Attributes:
        path: the folder.
        widths: neurons of each layer.
    """

    path: str
    widths: list[int]


def _check_shaped(config: Any) -> None:
    kind = config.model_type
    reason = None
    if kind not in SHAPED:
        reason = f"is {kind}, and only {', '.join(SHAPED)} are"
    elif config.hidden_act != "silu":
        reason = f"has the activation {config.hidden_act}, and DeciLM's is silu"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        reason = "has a sliding window, and DeciLM has none"
    if reason:
        raise UnsupportedModelError(f"DeciLM must be LLaMA-shaped; the checkpoint {reason}: export it with --to padded")


def to_deci(
    model: nn.Module,
    out: str | Path,
    tokenizer: Any = None,
    overwrite: bool = False,
    max_shard_size: int | str = checkpoint.MAX_SHARD_SIZE,
) -> Deci:
    """Write a LLaMA-shaped model as a DeciLM checkpoint: the same tensors, and `block_configs` in its config.

    Args:
        model: a pruned causal LM of Transformers.
        out: the folder; made whole beside its place, then renamed.
        tokenizer: saved along.
        overwrite: replace a checkpoint of pyprune's.
        max_shard_size: as for `checkpoint.save`.

    Raises:
        InputError: the folder may not be written (see `checkpoint.save`).
        UnsupportedModelError: the model is not LLaMA-shaped.
        CheckpointError: the tensors that were written do not have the widths in the config.
    """
    plain: Any = model
    config = plain.config
    _check_shaped(config)
    checkpoint.check_out(out, overwrite, max_shard_size)
    ffns = families.find_plain(model, "the export as DeciLM")
    widths = [ffn.intermediate_size for ffn in ffns]
    with new_folder(out, overwrite, strangers) as folder:
        plain.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        values = {**json.loads((folder / "config.json").read_text()), **_deci(config, widths)}
        values.pop("per_layer_config", None)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (folder / remote_code.FILE).write_text(inspect.getsource(deci_config), encoding="utf-8")
        shapes = checkpoint.tensor_shapes(folder)
        for ffn, width in zip(ffns, widths, strict=True):
            name = f"{ffn.name}.{ffn.pattern.down}.weight"
            if shapes.get(name) != (config.hidden_size, width):
                raise CheckpointError(f"{name} has shape {shapes.get(name)} where {width} neurons were to be written")
    return Deci(str(out), widths)


def _deci(config: Any, widths: list[int]) -> dict[str, Any]:
    """What a DeciLM config says otherwise."""
    attention = {"no_op": False, "n_heads_in_group": config.num_attention_heads // config.num_key_value_heads}
    blocks = [{"attention": attention, "ffn": {"no_op": False, "intermediate_size": width}} for width in widths]
    bias = SHAPED[config.model_type]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": deci_config.DeciLMConfig.model_type,
        "auto_map": {"AutoConfig": f"{Path(remote_code.FILE).stem}.DeciLMConfig"},
        "intermediate_size": max(widths),
        "block_configs": blocks,
        **({} if bias is None else {"qkv_bias": bias}),
    }
