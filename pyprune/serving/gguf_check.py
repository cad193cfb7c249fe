"""Whether a GGUF file that was written is the model: by its tensors, and by llama.cpp's logits where that is here."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..base.errors import CheckpointError, check, one_line
from ..model.families import FFN
from .gguf_base import Base, dequantise, heads_apart

# A rounding to each type lies no further from the values than this, root mean square over root mean square.
_ROUNDED = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-8, "Q8_0": 0.02, "Q4_0": 0.2}
# Mean Kullback-Leibler divergence, in nats, of llama.cpp's next token from Transformers' in float32, at most: llama.cpp
# rounds what it multiplies with a weight to eight bits where the weight has no more.
_DIVERGENCE = {"f32": 0.02, "f16": 0.02, "bf16": 0.02, "q8_0": 0.03, "q4_0": 0.5}


def read_back(path: Path, base: Base, ffns: list[FFN], arch: str, widths: list[int]) -> dict[str, Any]:
    """Read a file that was written and compare every tensor: with the base's bytes, or with the model's FFNs.

    Returns:
        `tensors`, how many; and `apart`, how far the FFNs' lie from the model's at most, root mean square over root
        mean square.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    found = Base(path)
    own = {
        f"blk.{ffn.layer}.ffn_{part}.{kind}": (ffn, part, kind)
        for ffn in ffns
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }
    length = found.value(f"{arch}.feed_forward_length")
    if found.arch != arch or (length if isinstance(length, list) else [length] * len(widths)) != widths:
        raise CheckpointError(f"{path.name} reads back as {found.arch} with widths {length}")
    apart = 0.0
    for name, tensor in found.tensors.items():
        if name in own:
            ffn, part, kind = own[name]
            distance = _distance(ffn, part, kind, dequantise(tensor), name, found)
            if not distance <= _ROUNDED[tensor.tensor_type.name]:
                raise CheckpointError(f"{name} reads back {distance:.3g} from the model's, nothing was written")
            apart = max(apart, distance)
        elif not _same_bytes(base, name, tensor, turned=arch != base.arch):
            raise CheckpointError(f"{name} does not read back as it is in {base.path.name}, nothing was written")
    lost = sorted(set(base.tensors) - set(found.tensors))
    if lost:
        raise CheckpointError(f"{path.name} lacks {lost[0]} of {base.path.name}, nothing was written")
    return {"tensors": len(found.tensors), "apart": apart}


def _same_bytes(base: Base, name: str, tensor: Any, turned: bool) -> bool:
    theirs = base.tensors[name].data
    if np.array_equal(theirs.view(np.uint8), tensor.data.view(np.uint8)):
        return True
    if not turned or not (".attn_q." in name or ".attn_k." in name):
        return False
    return np.array_equal(theirs[heads_apart(len(theirs), base.heads(name))], tensor.data)


def _distance(ffn: FFN, part: str, kind: str, values: np.ndarray, name: str, found: Base) -> float:
    """How far a tensor of one FFN lies from the model's, whose neurons must be followed by zeros only."""
    own = ffn.weights()
    fused = part == "up" and name.replace("ffn_up", "ffn_gate") not in found.tensors and ffn.gated
    blocks = [own.gate, own.up] if kind == "weight" else [own.gate_bias, own.up_bias]
    if part == "down":
        blocks = [own.down if kind == "weight" else own.down_bias]
    elif not fused:
        blocks = [blocks[part == "up"]]
    if part == "down" and kind == "weight":
        values = values.T
    error = size = 0.0
    for got, wanted in zip(np.split(values, len(blocks)), blocks, strict=True):
        if wanted is None:
            return float("inf")
        exact = wanted.detach().to("cpu", torch.float64).numpy()
        error += float(((got[: len(exact)] - exact) ** 2).sum()) + float((got[len(exact) :].astype(float) ** 2).sum())
        size += float((exact**2).sum())
    return float(np.sqrt(error / size)) if size else float(np.sqrt(error))


def has_llama_cpp() -> bool:
    """Whether the package llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def needed() -> None:
    """Raise `InputError` where llama-cpp-python is not installed."""
    check(has_llama_cpp(), "check", "be 'tensors' where llama-cpp-python is not installed", "logits")


@torch.no_grad()
def logits(path: Path, model: nn.Module, tokens: Tensor, kind: str = "bf16") -> dict[str, Any]:
    """Compare llama.cpp's logits of a file with the model's own, in float32, on the same tokens.

    Args:
        path: the file.
        model: the model, on whatever device.
        tokens: `[N, L]` token ids.
        kind: type of the FFNs' matrices, which says how far they may lie apart.

    Returns:
        `positions`, how many; `divergence`, the mean Kullback-Leibler divergence of a next token in nats; and `agree`,
        the share of positions with the same likeliest token.

    Raises:
        InputError: llama-cpp-python is not installed.
        CheckpointError: llama.cpp does not load the file, or its logits are another model's.
    """
    needed()
    import llama_cpp

    given: Any = model
    wide = given if given.dtype == torch.float32 else copy.deepcopy(given).float()
    divergences, same = [], []
    try:
        # Its default cache of keys and values is float16.
        runner = llama_cpp.Llama(str(path), n_ctx=tokens.shape[1], logits_all=True, verbose=False)
    except Exception as error:
        raise CheckpointError(f"llama.cpp does not load what was written: {one_line(error)}") from error
    with contextlib.closing(runner):
        for row in tokens:
            runner.reset()
            runner.eval(row.tolist())
            theirs = torch.from_numpy(np.array(runner.scores[: len(row)])).double().log_softmax(-1)
            own = wide(row[None].to(wide.device)).logits[0].cpu().double().log_softmax(-1)[:, : theirs.shape[1]]
            divergences.append((own.exp() * (own - theirs)).sum(-1))
            same.append(own.argmax(-1) == theirs.argmax(-1))
    divergence, agree = float(torch.cat(divergences).mean()), float(torch.cat(same).double().mean())
    if not divergence <= _DIVERGENCE[kind]:
        raise CheckpointError(
            f"llama.cpp's next tokens diverge by {divergence:.3g} nats from the model's, {_DIVERGENCE[kind]:g} at most "
            "for this type; nothing was written"
        )
    return {"positions": tokens.numel(), "divergence": divergence, "agree": agree}
