"""What pruning costs on paper: bytes, products and seconds, from a model's shape and a machine's rates.

    python -m bench.streaming.paper   measure this machine's products, into bench/results/rates.json

The formulas are the functions below, in plain words in docs/scale.md, whose tables `bench.tables` makes. A rate is
measured where a result says so; every other one is an assumption, and docs/scale.md names its source.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pyprune.base import machine
from pyprune.base.files import new_file

RESULTS = Path(__file__).parents[1] / "results"
KEEP, WEIGHT = 0.8, 2  # share of neurons that stays; bytes of a weight


@dataclass(frozen=True)
class Model:
    """A model's shape; experts of 1 are a dense FFN.

    Attributes:
        layers, hidden, width, attention: counts; D; F; weights of a layer outside its FFN.
        experts, active: of a layer, and how many see a token.
        other: weights in no such layer.
        tokens: of calibration text: at least `width` reach every FFN.
    """

    name: str
    layers: int
    hidden: int
    width: int
    attention: int
    tokens: int
    experts: int = 1
    active: int = 1
    other: int = 0

    @property
    def ffn(self) -> int:
        """Weights of one FFN, or one expert."""
        return 3 * self.hidden * self.width

    @property
    def weights(self) -> int:
        return self.other + self.layers * (self.attention + self.experts * self.ffn)

    @property
    def read(self) -> float:
        """Bytes read."""
        return WEIGHT * self.weights

    @property
    def written(self) -> float:
        """Bytes written: weights, and hidden states of both streams once a layer."""
        gone = (1 - KEEP) * self.layers * self.experts * self.ffn
        return WEIGHT * (self.weights - gone) + self.layers * 2 * WEIGHT * self.tokens * self.hidden

    @property
    def forward(self) -> float:
        """Products and sums, in the weights' dtype: the text goes three times through every layer."""
        return 3 * 2 * self.tokens * self.layers * (self.attention + self.active * self.ffn)

    @property
    def moments(self) -> float:
        """Products and sums in float32: the second moment [F, F] and the cross moment [F, D] of what an FFN sees."""
        return 2 * self.tokens * self.active * self.layers * self.width * (self.width + self.hidden)

    @property
    def fit(self) -> float:
        """Products and sums in float64: products with the old rows, Cholesky, its solution, the error of the cut."""
        f, d, k = self.width, self.hidden, KEEP * self.width
        one = 2 * f * f * d + k**3 / 3 + 2 * k * k * d + 2 * (f - k) ** 2 * d
        return one * self.layers * self.experts

    @property
    def memory(self) -> float:
        """Bytes at the peak: two layers, both moments of all experts, what a fit makes of them, hidden states twice."""
        f, d, k = self.width, self.hidden, KEEP * self.width
        layer = WEIGHT * (self.attention + self.experts * self.ffn)
        fit = 8 * (self.experts * f * (f + d) + f * d + k * max(2 * k + 3 * d, 5 * d))
        return 0.5e9 + 2 * layer + fit + 2 * WEIGHT * self.tokens * self.hidden

    @property
    def reduced(self) -> float:
        """Bytes that one process must add up with the others', for all layers: both moments, in float64."""
        return 8 * self.layers * self.experts * self.width * (self.width + self.hidden)


@dataclass(frozen=True)
class Machine:
    """Rates of a machine, all its processes together: bytes and products a second.

    Attributes:
        disk: bytes read and written a second; low, single, double: products in the weights' dtype, float32, float64.
        network: bytes a second that an all-reduce moves; 0 for one process.
    """

    name: str
    disk: float
    low: float
    single: float
    double: float
    network: float = 0.0

    def seconds(self, model: Model) -> dict[str, float]:
        """By what binds."""
        return {
            "disk": (model.read + model.written) / self.disk,
            "forwards": model.forward / self.low,
            "moments": model.moments / self.single,
            "fits": model.fit / self.double,
            "network": 2 * model.reduced / self.network if self.network else 0.0,
        }


# Shapes: the published configs of Llama 3.1 70B, and of Llama 4 Maverick (its 24 layers with 128 experts; the 24 dense
# ones, embeddings and the shared expert count as `other`).
MODELS = (
    Model("70B dense", 80, 8192, 28_672, 2 * 8192**2 + 2 * 8192 * 1024, 49_152, other=2 * 128_256 * 8192),
    Model("400B mixture", 24, 5120, 8192, 63_000_000, 1_048_576, experts=128, active=1, other=13_000_000_000),
)


def _rate(size: int, dtype: torch.dtype) -> float:
    """Products and sums a second of one thread in a square product, by its own clock, the best of some."""
    a, b = torch.randn(size, size, dtype=torch.float32).to(dtype), torch.randn(size, size).to(dtype)
    best = 0.0
    for _ in range(4):
        start = time.process_time()
        a @ b
        best = max(best, 2 * size**3 / (time.process_time() - start))
    return best


def measure() -> dict[str, object]:
    """This machine's rates, of one thread."""
    torch.set_num_threads(1)
    rates = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    return {"machine": machine.facts(), "products": {name: _rate(2048, dtype) for name, dtype in rates.items()}}


def machines(products: dict[str, float], cores: int) -> list[Machine]:
    """One workstation of 32 such cores, and nodes of 8 GPUs; see docs/scale.md for the source of every rate."""
    more = 32 / cores
    one = Machine("workstation", 3e9, *(more * products[d] for d in ("bfloat16", "float32", "float64")))
    node = Machine("8-GPU node", 10e9, 8 * 790e12, 8 * 67e12, 8 * 67e12, 450e9)
    return [one, node, Machine("16 nodes", 16 * 10e9, 16 * node.low, 16 * node.single, 16 * node.double, 50e9)]


def main() -> None:
    with new_file(RESULTS / "rates.json") as file:
        file.write_text(json.dumps(measure(), indent=2) + "\n")


if __name__ == "__main__":
    main()
