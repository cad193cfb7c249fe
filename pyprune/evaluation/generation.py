"""Greedy or sampled continuation of a prompt."""

from __future__ import annotations

from typing import Any

import torch

from ..base.errors import check


def chat_prompt(tokenizer: Any, prompt: str) -> str:
    """A prompt as a user's message in the tokenizer's chat template, with the start of an answer after it.

    Raises:
        InputError: no chat template.
    """
    check(bool(tokenizer.chat_template), "chat", "be used with a tokenizer that has a chat template", None)
    message = {"role": "user", "content": prompt}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Continue `prompt`; returns the continuation alone.

    Args:
        model: a causal LM of Transformers.
        tokenizer: its tokenizer.
        prompt: the text to continue.
        new_tokens: at most this many tokens.
        temperature: 0 decodes greedily; above 0 samples with `seed`.
        seed: of the sampling.
        chat: put the prompt into the tokenizer's chat template as a user's message.

    Raises:
        InputError: an empty prompt, a count below 1, a negative temperature, or no chat template.
    """
    check(bool(prompt), "prompt", "not be empty", prompt)
    check(new_tokens >= 1, "new_tokens", "be at least 1", new_tokens)
    check(temperature >= 0, "temperature", "be 0 or more", temperature)
    if chat:
        prompt = chat_prompt(tokenizer, prompt)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    device = next(model.parameters()).device
    ids = encoded["input_ids"].to(device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
