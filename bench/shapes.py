"""The FFN shapes of real models: the one table that benches iterate.

Where the figures come from: (d) the defaults of the family's config class in Transformers, (c) public copies of the
model's `config.json`, (p) commonly stated sizes, not checked against a file: GPT-2 XL is 1600 wide, OPT-1.3B and
Pythia-1.4B are 2048 and OPT-6.7B is 4096 wide, each with an FFN of four times that.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model's FFN.

    Attributes:
        name: the model.
        hidden_size, intermediate_size: D and F.
        activation: a key of `pyprune.base.reference.ACTIVATIONS`.
        gated: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        bias: every projection has one.
        source: d, c or p, see above.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool
    bias: bool
    source: str


SHAPES: tuple[Shape, ...] = (
    Shape("gpt2", 768, 3072, "gelu_tanh", gated=False, bias=True, source="d"),
    Shape("gpt2-xl", 1600, 6400, "gelu_tanh", gated=False, bias=True, source="p"),
    Shape("opt-1.3b", 2048, 8192, "relu", gated=False, bias=True, source="p"),
    Shape("opt-6.7b", 4096, 16384, "relu", gated=False, bias=True, source="p"),
    Shape("pythia-1.4b", 2048, 8192, "gelu", gated=False, bias=True, source="p"),
    Shape("phi-2", 2560, 10240, "gelu_tanh", gated=False, bias=True, source="c"),
    Shape("smollm2-135m", 576, 1536, "silu", gated=True, bias=False, source="c"),
    Shape("smollm2-1.7b", 2048, 8192, "silu", gated=True, bias=False, source="c"),
    Shape("qwen2.5-0.5b", 896, 4864, "silu", gated=True, bias=False, source="c"),
    Shape("llama-3.2-1b", 2048, 8192, "silu", gated=True, bias=False, source="c"),
    Shape("gemma-2-2b", 2304, 9216, "gelu_tanh", gated=True, bias=False, source="d"),
    Shape("llama-3-8b", 4096, 14336, "silu", gated=True, bias=False, source="c"),
)
BY_NAME = {shape.name: shape for shape in SHAPES}
# One plain, one small gated and one middle-sized gated FFN: what a bench runs unless told otherwise.
DEFAULT = ("gpt2", "smollm2-135m", "llama-3.2-1b")
