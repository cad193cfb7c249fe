"""Text -> token ids of prompts and what follows them, and a model's logits where they are needed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ...base.windows import check_windows, plain_ids, start_ids

Row = tuple[int, ...]


def prompt_ids(tokenizer: Any, prompt: str) -> Row:
    """A prompt as the model meets it: with the tokenizer's start, without an end."""
    return (*start_ids(tokenizer), *plain_ids(tokenizer, prompt))


def joined_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[Row, Row]:
    """Token ids of a prompt, and of an answer that follows it after a space.

    Both are encoded as one text, as a model has read such text; the answer is what that adds to the prompt's own
    tokens. Where the seam is not between two tokens (the two merge across it), they are encoded apart. The space is
    left out where there is one already.

    Raises:
        InputError: an answer, or a prompt, without a token.
    """
    space = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
    start, own = start_ids(tokenizer), plain_ids(tokenizer, prompt)
    whole = plain_ids(tokenizer, prompt + space + answer)
    apart = whole[: len(own)] != own or len(whole) == len(own)
    rest = plain_ids(tokenizer, space + answer) if apart else whole[len(own) :]
    check(bool(start or own), "prompt", "have a token", prompt)
    check(bool(rest), "answer", "have a token", answer)
    return (*start, *own), tuple(rest)


def check_rows(model: Any, rows: Sequence[Row], what: str, more: int = 0) -> None:
    """Raise `InputError` naming `what` unless every row, and `more` tokens after it, suit the model.

    Raises:
        InputError: a row longer than the model's context, or with a token that the model does not know.
    """
    check_windows(model, torch.empty(1, max(map(len, rows)) + more), what)
    known = getattr(model.config, "vocab_size", None)
    largest = max(map(max, rows))
    fits = not isinstance(known, int) or largest < known
    check(fits, "tokenizer", f"give tokens below the model's vocabulary of {known}", largest)


def batches(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Numbers of rows, `size` at a time, rows of like lengths together: little is padded."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    for i in range(0, len(order), size):
        yield order[i : i + size]


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """`[B, L]` ids, filled up on the right with 0, and `[B, L]` of 1 where there is a token.

    What stands on the right of a token changes nothing for it in a causal model, so any id serves.
    """
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@torch.no_grad()
def logits_at(model: Any, rows: Sequence[Row], places: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of some positions of each row, in one pass.

    Args:
        model: a causal LM of Transformers, in eval mode.
        rows: B rows of token ids, of any lengths.
        places: for each row the positions P_i whose logits are wanted.

    Returns:
        For each row `[P_i, V]`, as the model gives them, on the CPU.

    Raises:
        InputError: logits that are not finite.
    """
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in padded(rows))
    wanted = torch.tensor(sorted({p for row in places for p in row}))
    # The head is a large part of a small model: only where some row asks for it, if the model can be told.
    can_choose = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    chosen = {"logits_to_keep": wanted.to(device)} if can_choose else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **chosen).logits
    if not can_choose:
        logits = logits[:, wanted.to(device)]
    at = {int(p): i for i, p in enumerate(wanted)}
    found = [logits[i, torch.tensor([at[p] for p in row], device=device)].cpu() for i, row in enumerate(places)]
    for values in found:
        check(bool(values.isfinite().all()), "model", "give finite logits on every prompt", "NaN or infinity")
    return found
