"""Text that a model writes itself: calibration tokens of its own distribution, where nobody has any of the user's.

In a chat template (`chat`) it writes what a user would say first, then the answer to it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from ..base.errors import InputError, check
from ..base.files import cache_folder, new_file
from ..base.machine import fast_bfloat16
from ..base.progress import Progress, quiet
from ..base.windows import plain_ids, start_ids
from ..model.decode import end_tokens, plain

KINDS = ("plain", "chat")
# Tokens of a document, and of what a user says, at most; documents that are written at once, and at most on a GPU.
LENGTH, _ASKED, AT_ONCE, _ON_GPU = 256, 64, 64, 1024
_FORMAT = 2
_MARK = "\x00what is said\x00"


def seed_ids(tokenizer: Any) -> list[int]:
    """What a model writes from: the start of a text, or else the token that stands between texts.

    Raises:
        InputError: the tokenizer has neither start nor end token.
    """
    start = start_ids(tokenizer)
    token = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    check(bool(start) or token is not None, "text", "not be 'self' with a tokenizer without start and end token", None)
    return start or [int(token)]  # type: ignore[arg-type]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The chat template in front of what a user says, and between that and the answer.

    Raises:
        InputError: the template fails, or does not repeat what is said.
    """
    check(bool(getattr(tokenizer, "chat_template", None)), "text", "not be 'self:chat' without a chat template", None)
    try:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template raises: it is a program of the model's
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"text 'self:chat' needs a chat template that works; this one fails ({said})") from error
    before, found, after = str(whole).partition(_MARK)
    check(bool(found), "text", "not be 'self:chat' with a chat template that drops what a user says", None)
    return plain_ids(tokenizer, before), plain_ids(tokenizer, after)


@torch.no_grad()
def _continued(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, ends: list[int]) -> list[list[int]]:
    """What the model writes after each prompt, sampled at temperature 1, without the end token."""
    longest = max(map(len, prompts))
    pad = ends[0] if ends else 0
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens, eos_token_id=ends or None,
        pad_token_id=pad,
    )  # fmt: skip
    rows = plain(model).generate(ids, attention_mask=mask, generation_config=how)[:, longest:].tolist()
    stops = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


def _documents(model: Any, tokenizer: Any, kind: str, count: int, length: int) -> list[list[int]]:
    """`count` documents with their starts, as a model reads them."""
    ends = end_tokens(model)
    end = ends[:1]
    if kind == "plain":
        head = seed_ids(tokenizer)
        return [[*head, *row] for row in _continued(model, [head] * count, length, ends) if row]
    before, between = _frame(tokenizer)
    asked = [row for row in _continued(model, [before] * count, min(_ASKED, length), ends) if row]
    if not asked:
        return []
    prompts = [[*before, *row, *between] for row in asked]
    answers = _continued(model, prompts, length, ends)
    return [[*prompt, *row, *end] for prompt, row in zip(prompts, answers, strict=True) if row]


def _writer(model: nn.Module) -> nn.Module:
    """The model, or a copy in bfloat16 where that is nearly twice as fast: what it samples is its own all the same."""
    weight = next(model.parameters())
    fast = weight.dtype == torch.float32 and fast_bfloat16(weight.device)
    return copy.deepcopy(model).bfloat16() if fast else model


def _at_once(model: Any, length: int) -> int:
    """Documents of a batch: on a GPU, which a step of a few leaves idle, as many as fill an eighth of its memory.

    The device's whole memory counts and not what is free now, so that a seed gives the same text each time.
    """
    weight, config = next(model.parameters()), model.config.get_text_config()
    if weight.device.type != "cuda":
        return AT_ONCE
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    document = 2 * config.num_hidden_layers * heads * size * weight.itemsize * (length + _ASKED)
    room = torch.cuda.get_device_properties(weight.device).total_memory // 8 // document
    return max(AT_ONCE, min(_ON_GPU, 1 << max(0, room.bit_length() - 1)))


def write(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    kind: str = "plain",
    seed: int = 0,
    before: tuple[int, ...] = (),
    progress: Progress = quiet,
) -> list[list[int]]:
    """Texts that a model samples from itself at temperature 1, in batches, until there are `tokens` tokens in all.

    What a batch says depends on its number, its size and the seed alone, so more tokens begin as fewer do.

    Args:
        model: a causal LM of Transformers, dense, in eval mode.
        tokenizer: its own.
        tokens: how many are wanted.
        kind: `plain`, from the start of a text; `chat`, inside the chat template, the user's words too (Xu et al. 2024,
            arXiv 2406.08464).
        seed: of the sampling; torch's own generators stay as they are.
        before: tokens of each batch that is there already, and is not written again.
        progress: called as `(stage, done, total)`.

    Returns:
        Token ids, one row a batch.

    Raises:
        InputError: a model that writes nothing but its end token, a template that fails, or no token to start from.
    """
    found: list[list[int]] = []
    total, context = sum(before), getattr(model.config, "max_position_embeddings", None)
    length = min(LENGTH, context // 2) if isinstance(context, int) else LENGTH
    writer = _writer(model)
    at_once = _at_once(model, length)
    with torch.random.fork_rng():
        while total < tokens:
            progress("writing calibration text", total, tokens)
            torch.manual_seed(seed * 1_000_003 + len(before) + len(found))
            made = [token for row in _documents(writer, tokenizer, kind, at_once, length) for token in row]
            check(bool(made), "text", "not be 'self' for a model that writes nothing but its end token", kind)
            found.append(made)
            total += len(made)
    progress("writing calibration text", tokens, tokens)
    return found


def _cached(facts: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps({"format": _FORMAT, **facts}, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "written" / f"{name[:24]}.safetensors"


def _kept(file: Path) -> list[list[int]]:
    """The batches of a file; none where there is no such file, or it is damaged: it is only a cache."""
    try:
        found: dict[str, Tensor] = load_file(file)
        return [row.tolist() for row in found["ids"].split(found["batches"].tolist())]
    except Exception:  # whatever is wrong with it
        return []


def stream(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    kind: str = "plain",
    seed: int = 0,
    fingerprint: str = "",
    progress: Progress = quiet,
) -> list[int]:
    """As `write`, in one row, kept in the user's cache by `fingerprint`, tokenizer, seed and kind.

    A file of too few tokens is written further; without a folder for it, or a fingerprint, nothing is kept.
    """
    words = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    template = str(getattr(tokenizer, "chat_template", None) if kind == "chat" else "")
    file = _cached({"model": fingerprint, "tokenizer": words, "template": template, "seed": seed, "kind": kind})
    rows = _kept(file) if fingerprint else []
    if sum(map(len, rows)) < tokens:
        rows += write(model, tokenizer, tokens, kind, seed, tuple(map(len, rows)), progress)
        if fingerprint:
            _keep(file, rows)
    return [token for row in rows for token in row]


def _keep(file: Path, rows: list[list[int]]) -> None:
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as temporary:
            save_file({"ids": ids, "batches": torch.tensor([len(row) for row in rows])}, temporary)
    except OSError:
        return  # no folder for it: the text is written anew the next time
