"""Tiny models of several towers, hybrids and encoder-decoders, in eval mode, with weights of random size."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}
_SIDES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 96,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# name -> (class, model type, config)
TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_EYES, "model_type": "clip_vision_model"},
            "image_token_index": 127,
            "image_token_id": 127,
            "vision_feature_layer": -1,
        },
    ),
    "bart": ("BartForConditionalGeneration", "bart", _SIDES),
    "marian": ("MarianMTModel", "marian", _SIDES),
    "t5": (
        "T5ForConditionalGeneration",
        "t5",
        {
            "d_model": 32,
            "d_ff": 96,
            "d_kv": 8,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "vocab_size": 128,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
    ),
    # layers of attention, of a state space and of an FFN each
    "nemotron_h": (
        "NemotronHForCausalLM",
        "nemotron_h",
        {
            **_TEXT,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
        },
    ),
    # one block that several layers run
    "zamba": (
        "ZambaForCausalLM",
        "zamba",
        {
            **_TEXT,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 2,
        },
    ),
    "bloom": ("BloomForCausalLM", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "mpt": ("MptForCausalLM", "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 128}),
    "ctrl": ("CTRLLMHeadModel", "ctrl", {"n_embd": 32, "dff": 96, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "apertus": ("ApertusForCausalLM", "apertus", {**_TEXT, "hidden_act": "xielu"}),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        "gpt_neox_japanese",
        {**{k: v for k, v in _TEXT.items() if k != "intermediate_size"}, "intermediate_multiple_size": 3},
    ),
    # layers that also get inputs of the tokens
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        "gemma3n_text",
        {
            **_TEXT,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
        },
    ),
}


def make_tower(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of `TOWERS`."""
    class_name, kind, config = TOWERS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(AutoConfig.for_model(kind, **{**config, **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if (
                (parameter.ndim == 2 or key.endswith("bias"))
                and "conv" not in key
                and "positions" not in key
                and "A_log" not in key
            ):
                parameter.normal_(std=0.15)
    return model


def call(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model for text."""
    words = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **words).logits
