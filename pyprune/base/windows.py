"""Documents -> windows of tokens, as a model meets them, and token ids from elsewhere, checked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, check, check_choice
from .text import Document, Exchange

# Whether windows begin with the start token: as the tokenizer begins a text, wherever it has one, never.
STARTS = ("auto", "always", "never")


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text alone, without what a tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def start_ids(tokenizer: Any, start: str = "auto") -> list[int]:
    """The tokens in front of a text, such as `<bos>`; most tokenizers put none.

    Args:
        start: one of `STARTS`; `auto` is what the tokenizer itself does, `always` its start token (`bos_token_id`).

    Raises:
        InputError: another word, or `always` with a tokenizer that has no start token.
    """
    check_choice(start, "start_token", STARTS)
    if start == "never":
        return []
    if start == "always":
        token: int | None = getattr(tokenizer, "bos_token_id", None)
        check(token is not None, "start_token", "be auto or never with a tokenizer that has no start token", start)
        return [] if token is None else [token]
    text = "a"
    plain, whole = plain_ids(tokenizer, text), list(tokenizer(text, verbose=False)["input_ids"])
    places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: places[0]] if places else []


def _rendered(tokenizer: Any, document: Exchange) -> str | None:
    """The conversation in the words of the model's chat template; None where there is no template, and none is needed.

    Raises:
        InputError: no template where one is needed, or one that fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        rule = "have 'text', or the tokenizer a chat template, to be calibration text"
        check(document.plain is not None, document.place, rule, "messages")
        return None
    try:
        return str(tokenizer.apply_chat_template(list(document.messages), tokenize=False))
    except Exception as error:  # whatever a template raises: it is a program of the model's
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{document.place}: the tokenizer's chat template fails on its messages ({said})") from error


def token_stream(tokenizer: Any, documents: Sequence[Document], start: Sequence[int], tokens: int = 0) -> list[int]:
    """All documents as one row of tokens, each behind the start tokens.

    Where there are none, neighbours of plain text are one text with a blank line between them. A chat template writes
    its own start and end.

    Args:
        start: see `start_ids`.
        tokens: about how many are wanted; 0 for all. Text that cannot be needed is not read.

    Raises:
        InputError: see `_rendered`.
    """
    found: list[int] = []
    waiting: list[str] = []

    def flush() -> None:
        if waiting:
            found.extend([*start, *_encoded(tokenizer, "\n\n".join(waiting), tokens - len(found) if tokens else 0)])
            waiting.clear()

    for document in documents:
        if tokens and len(found) >= tokens:
            break
        text = document if isinstance(document, str) else _rendered(tokenizer, document)
        if text is not None and isinstance(document, Exchange):
            flush()
            found.extend(plain_ids(tokenizer, text))
            continue
        waiting.append(document.plain or "" if isinstance(document, Exchange) else document)
        if start or (tokens and sum(map(len, waiting)) > _LONGEST * (tokens - len(found))):
            flush()
    flush()
    return found


# A token is at least one byte, and hardly ever more characters than this: read no more text than can be needed.
_LONGEST = 16


def _encoded(tokenizer: Any, text: str, tokens: int) -> list[int]:
    excerpt = text[: tokens * _LONGEST] if tokens > 0 else text
    ids = plain_ids(tokenizer, excerpt)
    return plain_ids(tokenizer, text) if len(ids) < tokens and len(excerpt) < len(text) else ids


def cut(stream: Sequence[int], window: int, start: Sequence[int] = (), most: int | None = None) -> Tensor:
    """A row of tokens as windows of equal length that follow each other, each with the start tokens in front.

    Args:
        stream: tokens; what is left at its end and fills no window is not used.
        window: tokens in a window, those of the start among them.
        start: see `start_ids`; not doubled where a document begins with them.
        most: windows at most; None for all.

    Returns:
        `[N, window]` int64; N may be 0.
    """
    head, place = list(start), 0
    rows: list[list[int]] = []
    while most is None or len(rows) < most:
        front = [] if list(stream[place : place + len(head)]) == head else head
        row = front + list(stream[place : place + window - len(front)])
        if len(row) < window:
            break
        rows.append(row)
        place += window - len(front)
    return torch.tensor(rows, dtype=torch.int64).view(-1, window)


def check_size(tokens: int, window: int) -> None:
    """Raise `InputError` unless `tokens` (0 for all) hold a window, and a window a prediction."""
    check(window >= 2, "window", "be at least 2 tokens", window)
    check(tokens == 0 or tokens >= window, "tokens", f"be at least one window ({window}), or 0 for all", tokens)


def token_windows(
    tokenizer: Any,
    text: str | Sequence[Document],
    tokens: int,
    window: int,
    argument: str = "text",
    start: str = "auto",
) -> Tensor:
    """Cut text into windows of equal length, from its start, each as the tokenizer begins a text.

    Args:
        tokenizer: a Transformers tokenizer.
        text: documents, or one.
        tokens: how many to use at most, start tokens among them; 0 for all.
        window: tokens in a window, at least 2.
        argument: what errors call the text.
        start: one of `STARTS`, see `start_ids`.

    Returns:
        `[N, window]` int64, N = min(tokens, tokens there) // window.

    Raises:
        InputError: window below 2, `tokens` below one window, a text shorter than one window; and see `start_ids`,
            `token_stream`.
    """
    check_size(tokens, window)
    head = start_ids(tokenizer, start)
    check(len(head) < window - 1, "window", f"be longer than the start of a text ({len(head)} tokens)", window)
    stream = token_stream(tokenizer, [text] if isinstance(text, str) else text, head, tokens)
    rows = cut(stream, window, head, tokens // window if tokens else None)
    check(len(rows) > 0, argument, f"hold at least one window of {window} tokens", f"{len(stream)} tokens")
    return rows


def stack_batches(batches: Iterable[Tensor] | Tensor, vocabulary: int | None, argument: str = "batches") -> Tensor:
    """Collect token batches into `[N, W]` int64.

    Args:
        batches: a `[N, W]` tensor or an iterable of `[W]` or `[B, W]` tensors, all of one window length.
        vocabulary: number of token ids the model knows, or None.
        argument: what errors call them.

    Raises:
        InputError: no batch, windows of different lengths, not integers, or ids out of range.
    """
    given = [batches] if isinstance(batches, Tensor) else list(batches)
    strange = [type(b).__name__ for b in given if not isinstance(b, Tensor) or b.ndim == 0]
    check(not strange, argument, "hold tensors of shape [W] or [N, W]", strange[:3])
    check(bool(given) and all(b.numel() for b in given), argument, "hold at least one window", len(given))
    rows = [b.reshape(-1, b.shape[-1]) for b in given]
    lengths = sorted({r.shape[1] for r in rows})
    check(len(lengths) == 1, argument, "have windows of one length", lengths)
    ids = torch.cat(rows)
    fractional = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    check(not fractional, argument, "hold token ids", ids.dtype)
    ids = ids.long().cpu()
    low, high = int(ids.min()), int(ids.max())
    check(low >= 0 and (vocabulary is None or high < vocabulary), argument, f"lie in [0, {vocabulary})", (low, high))
    return ids


def check_windows(model: nn.Module, windows: Tensor, argument: str) -> None:
    """Raise `InputError` when windows (`[N, W]`) are longer than the model's context."""
    config: Any = model.config
    of_text = getattr(config, "get_text_config", None)
    longest = getattr(of_text(decoder=True) if of_text else config, "max_position_embeddings", None)
    fits = not isinstance(longest, int) or windows.shape[1] <= longest
    check(fits, argument, f"have windows of at most {longest} tokens (max_position_embeddings)", windows.shape[1])
