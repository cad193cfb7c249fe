"""The experts of real mixtures, as the benches run them: from public configs, and Transformers' modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

# What Transformers takes by itself, and its other implementations.
OWN = "grouped_mm"
OTHERS = ("eager", "batched_mm")


@dataclass(frozen=True)
class Shape:
    """A mixture's experts: from the defaults of its config class in Transformers, or its public config."""

    name: str
    kind: str
    module: type[nn.Module]
    hidden_size: int
    intermediate_size: int
    experts: int
    picked: int
    layers: int

    def config(self, keep: float, implementation: str) -> Any:
        """That of a layer of so many kept neurons."""
        width = round(keep * self.intermediate_size)
        given = {"intermediate_size": width, "moe_intermediate_size": width, "hidden_size": self.hidden_size}
        config = AutoConfig.for_model(self.kind, **given, num_experts=self.experts, num_experts_per_tok=self.picked)
        config._experts_implementation = implementation
        return config

    def empty(self, keep: float, device: torch.device | str) -> Any:
        """A layer's module in bfloat16 with weights that nobody wrote."""
        with torch.device("meta"):
            module: Any = self.module(self.config(keep, OWN))
        return module.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)


SHAPES = {
    s.name: s
    for s in (
        Shape("olmoe-1b-7b", "olmoe", OlmoeExperts, 2048, 1024, 64, 8, 2),
        Shape("qwen3-30b-a3b", "qwen3_moe", Qwen3MoeExperts, 2048, 768, 128, 8, 2),
    )
}
