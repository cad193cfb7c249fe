"""The two models: a GPT-2 made here, of random weights, and SmolLM2-135M as the demo package carries it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pyprune.model.loading import DEMO, load_model, load_tokenizer

from .recipes import Recipe

MODELS = ("scratch", "smol")
_CONTEXT = 256


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, trained on `texts`."""
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")


def scratch(recipe: Recipe, tokenizer: Any, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 of the recipe's size with random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=_CONTEXT,
        n_embd=recipe.hidden_size,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        n_inner=recipe.width,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function in one kernel instead of eight
        attn_pdrop=0.0,  # a tenth of a step's time on a CPU; the other dropouts stay
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def smol() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, padding other than the end."""
    model, tokenizer = load_model(DEMO), load_tokenizer(DEMO)
    model.set_attn_implementation("eager")  # of short texts on a CPU, in bfloat16, the fused one's backward is slower
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token
    return model, tokenizer
