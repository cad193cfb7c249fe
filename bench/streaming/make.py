"""A LLaMA checkpoint of random bfloat16 weights, of about a given size, written tensor by tensor.

python -m bench.streaming.make FOLDER --gb 15
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune.model.shard_writer import Planned, ShardWriter
from pyprune.model.transfer import Transfer

SHARD = 2 * 10**9
VOCABULARY = 32_000


def config_of(gigabytes: float, hidden: int, intermediate: int) -> Any:
    """A LLaMA config whose model has about so many GB (10^9 bytes) in bfloat16; grouped-query attention, untied."""
    attention, ffn = hidden * hidden * 2 + hidden * hidden // 2, 3 * hidden * intermediate
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * hidden) / (attention + ffn)))
    heads = hidden // 128
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


class _Unsynced(ShardWriter):
    """Leaves it to the system when files come to the disk."""

    def flush(self) -> None:
        pass


def make(
    folder: Path,
    gigabytes: float,
    hidden: int = 3072,
    intermediate: int = 8192,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
) -> Any:
    """Write the checkpoint; matrices are normal with a variance of 1 over their inputs, norms are ones.

    Random numbers are those of `device`.
    """
    config = config_of(gigabytes, hidden, intermediate)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    writer = _Unsynced(folder, [Planned(n, torch.bfloat16, s) for n, s in shapes.items()], SHARD)
    generator, move = torch.Generator(device).manual_seed(seed), Transfer(device)
    for name, shape in shapes.items():
        if len(shape) == 1:
            writer.write(name, [torch.ones(shape, dtype=torch.bfloat16)])
            continue
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        values.normal_(std=shape[1] ** -0.5, generator=generator)
        writer.write(name, move.leave(values, move.mark()))
    writer.finish()
    config.save_pretrained(folder)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=15.0)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--intermediate", type=int, default=8192)
    arguments = parser.parse_args()
    config = make(arguments.folder, arguments.gb, arguments.hidden, arguments.intermediate)
    held = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    print(f"{arguments.folder}: {config.num_hidden_layers} layers, {held / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
