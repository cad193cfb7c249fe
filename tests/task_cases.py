"""Models and tokenizers made by hand, whose scores are known without running them."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig


class Letters:
    """A tokenizer with a token for each character."""

    eos_token_id = 0
    pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i) for i in ids if i)


class Marked(Letters):
    """It puts token 1 before a text and token 2 after it."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


class Merging(Letters):
    """A space and a `b` after it are one token."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text.replace(" b", "\x7f")]}


class Words(Letters):
    """A token for each word with the space before it, numbered as they come, and for each other character."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        pieces = re.findall(r" ?\w+|\W", text)
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}

    def decode(self, ids: list[int], **_: Any) -> str:
        names = {number: piece for piece, number in self.known.items()}
        return "".join(names.get(i, "?") for i in ids)


class Bigrams(nn.Module):
    """The logits of the next token depend on the last one only: row `table[token]`."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(max_position_embeddings=256, vocab_size=len(table))
        self.eval()

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


class Says(nn.Module):
    """It answers known prompts, a character a token, and ends with token 0."""

    def __init__(self, answers: dict[str, str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=64, vocab_size=128)
        self.generation_config = GenerationConfig(eos_token_id=0)
        self.answers = answers
        self.eval()

    def generate(self, ids: Tensor, generation_config: GenerationConfig, **_: Any) -> Tensor:
        prompts = ["".join(map(chr, row)) for row in ids.tolist()]
        texts = [[ord(c) for c in self.answers[prompt]][: generation_config.max_new_tokens] for prompt in prompts]
        longest = max(map(len, texts))
        return torch.cat([ids, torch.tensor([text + [0] * (longest - len(text)) for text in texts])], dim=1)
