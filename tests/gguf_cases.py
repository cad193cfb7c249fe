"""The GGUF file of a tiny dense model, written as llama.cpp's converter lays it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "gemma": "gemma",
    "gpt_neox": "gptneox",
    "lfm2": "lfm2",
}


def write_dense(model: Any, path: Path, kind: str = "f32", more: dict[str, np.ndarray] | None = None) -> Path:
    """`model` as a GGUF file: matrices in `kind`, the rest in float32; and `more` tensors."""
    config = model.config
    name = ARCHITECTURES[config.model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    for key, tensor in model.state_dict().items():
        told = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if told is None or (told == "output.weight" and config.tie_word_embeddings):
            continue
        values = tensor.detach().float().numpy()
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        if name == "llama" and told.endswith(("attn_q.weight", "attn_k.weight")):
            count = heads if "attn_q" in told else kv_heads
            shape = (count, 2, len(values) // count // 2, values.shape[1])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        if name == "gemma" and told.endswith("norm.weight"):
            values = values + 1
        if "query_key_value" in key:  # each head's query, key and value -> all queries, all keys, all values
            values = values.reshape(heads, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
        if "conv.conv" in key:
            values = values.squeeze(1)
        of = gguf.GGMLQuantizationType[kind.upper() if values.ndim == 2 else "F32"]
        values = np.ascontiguousarray(values)
        writer.add_tensor(told, gguf.quants.quantize(values, of), raw_dtype=of)
    for told, values in (more or {}).items():
        writer.add_tensor(told, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
