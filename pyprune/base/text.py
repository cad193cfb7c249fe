"""Text -> token windows. Local files come first; where the user gives none, prose that every CPython carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, check

DEFAULT_TEXT = "pydoc_data.topics"


def default_text() -> str:
    """English technical prose that ships with CPython (the topics of `help()`), in a fixed order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, or the `text` fields of a `.jsonl` file joined by blank lines.

    Raises:
        InputError: missing file, not UTF-8, a line that is no JSON object with a string `text`.
    """
    file = Path(path)
    check(file.is_file(), "text", "be an existing file", str(path))
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text must be UTF-8; {file} is not ({error})") from error
    if file.suffix != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"text must be JSON lines; {file}:{number} is not JSON ({error})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise InputError(f"text must have a string field 'text' in every line; {file}:{number} has none")
        texts.append(entry["text"])
    return "\n\n".join(texts)


def halves(text: str) -> tuple[str, str]:
    """Split at the first paragraph break after the middle, or else the last before it, or else in the middle."""
    middle = len(text) // 2
    breaks = text.find("\n\n", middle), text.rfind("\n\n", 0, middle + 1)
    cut = next((cut for cut in breaks if cut >= 0), middle)
    return text[:cut], text[cut:]


def load_text(path: str | Path | None, part: str) -> tuple[str, str]:
    """The text to use and its name in reports.

    Args:
        path: a file, whole; a file with `:first` or `:second` appended for half of it; or None for the default text,
            of which calibration takes the first half and evaluation the second.
        part: `first` or `second`, the half of the default text.

    Raises:
        InputError: see `read_text`.
    """
    if path is None:
        text = default_text()
        return halves(text)[part == "second"], f"{DEFAULT_TEXT} ({part} half)"
    name, _, half = str(path).rpartition(":")
    if half in ("first", "second"):
        return halves(read_text(name))[half == "second"], f"{Path(name).name} ({half} half)"
    return read_text(path), Path(path).name


def token_windows(tokenizer: Any, text: str, tokens: int, window: int, argument: str = "text") -> Tensor:
    """Cut text into windows of equal length, from its start.

    Args:
        tokenizer: a Transformers tokenizer.
        text: the text.
        tokens: how many tokens to use at most; 0 for all.
        window: tokens in a window, at least 2.

    Returns:
        `[N, window]` int64, N = min(tokens, tokens in text) // window.

    Raises:
        InputError: window below 2, `tokens` below one window, or a text shorter than one window.
    """
    check(window >= 2, "window", "be at least 2 tokens", window)
    check(tokens == 0 or tokens >= window, "tokens", f"be at least one window ({window}), or 0 for all", tokens)
    # A token is at least one byte, and hardly ever more than 16 characters: read no more text than can be needed.
    excerpt = text[: tokens * 16] if tokens else text
    ids = tokenizer(excerpt, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < tokens and len(excerpt) < len(text):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids), tokens or len(ids)) // window
    check(count > 0, argument, f"hold at least one window of {window} tokens", f"{len(ids)} tokens")
    return torch.tensor(ids[: count * window], dtype=torch.int64).view(count, window)
