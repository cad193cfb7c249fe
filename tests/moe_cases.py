"""Tiny mixtures of experts, in each of the ways that Transformers lays experts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune.model.experts import find_bank

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

# model type -> config; widths of experts 48 everywhere.
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_COMMON, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4},
    "mixtral": {**_COMMON, "intermediate_size": 48, "num_local_experts": 4},
    # inputs first, gate and up in turns, biases, an activation of its own
    "gpt_oss": {**_COMMON, "intermediate_size": 48, "num_local_experts": 4, "sliding_window": 16},
    # a dense layer first, shared experts beside the others
    "deepseek_v3": {
        **_COMMON,
        **_MLA,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    # no gate
    "nemotron_h": {
        **_COMMON,
        "layers_block_type": ["moe", "attention"],
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "moe_shared_expert_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
    },
    # rows sorted by expert
    "llama4_text": {
        **_COMMON,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
}
BANKS = {"qwen3_moe": 2, "mixtral": 2, "gpt_oss": 2, "deepseek_v3": 1, "nemotron_h": 1, "llama4_text": 1}


def make_mixture(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random mixture, in eval mode, with weights large enough that every neuron and expert counts."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**MIXTURES[kind], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or name.endswith("bias"):
                parameter.normal_(std=0.15)
    return model


class One(nn.Module):
    """One expert as a module."""

    def __init__(self, w):
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(32, 48, False), nn.Linear(32, 48, False), nn.Linear(48, 32, False))
        for own, part in ((self.w1, w.gate), (self.w3, w.up), (self.w2, w.down.t())):
            own.weight = nn.Parameter(part.detach().clone())

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Listed(nn.Module):
    """A mixture whose experts are a list of modules, as in older code."""

    def __init__(self, block, weights):
        super().__init__()
        self.gate, self.experts = block.gate, nn.ModuleList(One(w) for w in weights)

    def forward(self, x):
        rows = x.reshape(-1, 32)
        _, scores, index = self.gate(rows)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = (index == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(rows[token]) * scores[token, place, None])
        return out.view_as(x)


def listed(model):
    """The same mixture with lists of expert modules."""
    for layer in model.model.layers:
        bank = find_bank("", layer.mlp.experts)
        assert bank is not None
        layer.mlp = Listed(layer.mlp, [bank.weights(number) for number in range(bank.experts)])
    model.__class__ = type("OlderMixtral", (type(model),), {})  # of code that Transformers does not have
    return model
