"""Tiny random models of Transformers' types: the type's own config, shrunk, in several ways until one runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Parameters of a tiny model; a larger one means that its config was not shrunk.
MOST = 40_000_000

# Keys that say a size, and what it becomes where a config has it as a number, or as None.
SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "embed_dim"), 64),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "projection_dim", "output_dim", "emb_dim"), 64),
    **dict.fromkeys(("encoder_hidden_size", "vision_output_dim", "lm_hidden_size", "audio_hidden_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 160),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "d_ff", "dim_ff", "intermediate_size_mlp", "mlp_dim", "block_ff_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "expert_dim"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "moe_n_group", "moe_topk_group"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "hidden_size_per_layer_input", "sliding_window"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"), 128),
    **dict.fromkeys(("image_size", "img_size"), 32),
    **dict.fromkeys(("rotary_dim", "patch_size", "num_query_tokens", "qformer_hidden_size"), 8),
    **dict.fromkeys(("index_n_heads", "index_head_dim"), 16),
    **dict.fromkeys(("swa_head_dim", "v_head_dim", "swa_v_head_dim"), 16),
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "first_k_dense_replace": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "lru_width": 64,
    "zero_expert_num": 2, "mamba_expand": 2,
}  # fmt: skip
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth",
         "num_decoder_layers", "vision_depth", "encoder_layers_count")  # fmt: skip
# Attention with keys and values of low rank. Rotary embeddings reach the whole of `qk_rope_head_dim`.
MLA = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
# Lists with an entry a layer that name its kind: one of each kind first.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "ffn_types", "hybrid_override_pattern")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# What no rule gives, by type.
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlstm": {"num_heads": 4, "head_dim": None},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "dots1": {"n_shared_experts": 1},
    "hunyuan_vl_text": {"rope_parameters": ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": 96,
    },
    "gemma4_text": {"num_kv_shared_layers": 0},
    **{
        name: {"rope_parameters": ROPE}
        for name in (
            "qwen2_vl_text",
            "qwen2_5_vl_text",
            "glm4v_text",
            "glm46v_text",
            "glm_ocr_text",
            "glmga_text",
            "qwen2_5_omni_text",
        )
    },
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
}


def _kinds(value: Any, layers: int) -> Any:
    found = [*dict.fromkeys(value)]
    return (found * layers)[: max(layers, 1)]


def _rotary(value: Any, head: int) -> Any:
    """Rotary settings: sections of a multimodal embedding in proportion to half a head."""
    if isinstance(value, dict):
        return {k: _sections(v, head) if k == "mrope_section" else _rotary(v, head) for k, v in value.items()}
    return value


def _sections(value: Any, head: int) -> Any:
    if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
        return value
    total = sum(value)
    small = [max(1, head // 2 * v // total) for v in value]
    small[0] += head // 2 - sum(small)
    return small


def shrunk(config: PreTrainedConfig, layers: int, mla: dict[str, Any], drop: tuple[str, ...]) -> dict[str, Any]:
    """Keywords that make the config's class build a small one like it."""
    given = config.to_dict()
    want = {**SMALL, **mla}
    words: dict[str, Any] = {}
    for key, value in given.items():
        if key in drop:
            continue
        if key == "per_layer_config":
            words[key] = None
        if key in DEPTH and isinstance(value, int):
            words[key] = layers
        elif key in want and (value is None or type(value) is int):
            words[key] = want[key]
        elif key in KINDS and isinstance(value, list) and value:
            words[key] = _kinds(value, layers)
        elif key.startswith("rope") and isinstance(value, dict):
            words[key] = _rotary(value, words.get("head_dim", SMALL["head_dim"]))
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and key in config.sub_configs:
            words[key] = {**value.to_dict(), **shrunk(value, 2 if "text" in key or "llm" in key else 1, mla, drop)}
            words[key] |= OWN.get(value.model_type, {})
    return words | OWN.get(config.model_type, {})


def configs(kind: str) -> Iterator[PreTrainedConfig | Exception]:
    """Tiny configs to try, most likely first; an exception where a way fails."""
    make: Any = CONFIG_MAPPING[kind]
    rope = {**MLA, "head_dim": 8}
    for layers, mla, drop in (
        (2, {}, ()),
        (4, {}, ()),
        (2, MLA, ("head_dim",)),
        (2, rope, ()),
        (4, rope, ()),
        (2, MLA, ()),
        (2, {"num_key_value_heads": 4}, ()),
        (2, {**rope, "num_key_value_heads": 4}, ()),
        (8, {}, ()),
        (2, {}, ("head_dim",)),
    ):
        try:
            whole = make(**copy.deepcopy(shrunk(make(), layers, mla, drop)))
            yield whole
            if (text := whole.get_text_config(decoder=True)) is not whole:
                yield text  # what a class for text alone takes
        except Exception as error:
            yield error


def built(kind: str, class_name: str) -> tuple[Any, dict[str, Tensor], str]:
    """A tiny model of a type that runs, what it was run on (`[2, 12]` tokens), and why not if there is none.

    Args:
        kind: model type.
        class_name: of the class of Transformers.
    """
    cls: Any = getattr(transformers, class_name)
    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    why = "no config"
    for config in configs(kind):
        if isinstance(config, Exception):
            why = f"config: {config}"
            continue
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if size > MOST:
                why = f"not shrunk: {size:,} parameters"
                continue
            torch.manual_seed(0)
            model = cls(config).eval()
            spread(model)
            with torch.no_grad():
                words = inputs(model, ids)
                logits = model(**words).logits
            if logits.isfinite().all():
                return model, words, ""
            why = "logits are not finite"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    return None, {"input_ids": ids}, why


def inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the model's forward takes to run on text alone."""
    words = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        words["decoder_input_ids"] = ids
    return words


def spread(model: nn.Module) -> None:
    """Give weights that were left empty, or all alike, random values: every neuron and every expert counts."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2 and (not parameter.isfinite().all() or float(parameter.detach().float().std()) == 0):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
