"""Config of a LLaMA-shaped model whose FFN widths differ by layer, as engines read DeciLM's.

A copy of this file goes along with a checkpoint; it needs Transformers only.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A part of a config whose keys are attributes, as engines ask for them, and that JSON can write."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError as error:
            raise AttributeError(name) from error
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """LLaMA's config, and `block_configs`: for each layer `attention` and `ffn`, with `ffn.intermediate_size`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **values: Any) -> None:
        super().__init__(**values)
        self.block_configs = [Block(block) for block in block_configs or []]
