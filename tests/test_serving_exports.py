"""`pyprune export --to padded` and `--to deci`: the same logits, ordinary configs, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from pyprune import prune
from pyprune.cli.commands import app
from pyprune.model import checkpoint

DIFFERING = (64, 90, 32)

# A config as an engine reads it, and what it builds of it; without pyprune.
READ = """
import json, sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
blocks = [(b.attention.no_op, b.attention.n_heads_in_group, b.ffn.no_op, b.ffn.intermediate_size,
           hasattr(b.ffn, "ffn_mult")) for b in config.block_configs]
assert "pyprune" not in sys.modules
again = json.loads(config.to_json_string())["block_configs"][0]["ffn"]["intermediate_size"]
print(json.dumps([config.model_type, config.architectures, blocks, again, getattr(config, "qkv_bias", None)]))
"""


@pytest.fixture
def pruned(tiny: Callable[..., Any], random_mask: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`pruned(family, **config_changes)` -> a checkpoint whose widths are `DIFFERING`."""

    def make(family: str, **changes: Any) -> Path:
        model = tiny(family, **changes)
        prune(model, mask=random_mask(model, DIFFERING), repair=None)
        return checkpoint.save(model, tmp_path / f"pruned-{family}")

    return make


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gemma3_text"])
def test_padded_gives_the_same_without_pyprune_s_file(
    family: str, pruned: Callable[..., Path], ids: torch.Tensor, same_logits: Callable[..., None], tmp_path: Path
) -> None:
    folder, out = pruned(family), tmp_path / "out"
    done = export(folder, "--to", "padded", "--out", out, "--multiple", 16, "--max-shard-size", "20KB", "--json")
    assert done.exit_code == 0, done.output
    assert len(list(out.glob("model-*.safetensors"))) > 2
    facts = json.loads(done.stdout)
    assert facts["width"] == 96 and facts["neurons"] == list(DIFFERING) and facts["apart"] < 1e-5
    assert facts["added"] == pytest.approx(1 - sum(DIFFERING) / 288)
    config = json.loads((out / "config.json").read_text())
    assert "per_layer_config" not in config and "auto_map" not in config and not list(out.glob("*.py"))
    assert checkpoint.verify(out)["padded_from"] == list(DIFFERING)
    with torch.no_grad():
        old, new = (AutoModelForCausalLM.from_pretrained(place).eval()(ids).logits for place in (folder, out))
    same_logits(new, old)


def test_deci_is_read_without_pyprune(pruned: Callable[..., Path], tmp_path: Path) -> None:
    for family, bias in (("llama", None), ("qwen2", True)):
        out = tmp_path / f"out-{family}"
        words = (pruned(family), "--to", "deci", "--out", out, "--max-shard-size", "20KB")
        done = export(*words)
        assert done.exit_code == 0, done.output
        assert len(list(out.glob("model-*.safetensors"))) > 2
        assert "overwrite" in export(*words).stderr and export(*words, "--overwrite").exit_code == 0
        read = subprocess.run(
            [sys.executable, "-c", READ, out], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        blocks = [[False, 2, False, width, False] for width in DIFFERING]
        assert json.loads(read.stdout) == ["nemotron-nas", ["DeciLMForCausalLM"], blocks, DIFFERING[0], bias]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, "is gpt2, and only llama, mistral, qwen2 are: export it with --to padded"),
        ("mistral", {"sliding_window": 16}, "has a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu"),
    ],
)
def test_deci_of_what_is_not_llama_shaped(
    family: str, changes: dict[str, Any], message: str, pruned: Callable[..., Path], tmp_path: Path
) -> None:
    done = export(pruned(family, **changes), "--to", "deci", "--out", tmp_path / "out")
    assert done.exit_code == 1 and message in done.stderr and not (tmp_path / "out").exists()


def test_options_of_another_target(pruned: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = pruned("llama"), tmp_path / "out"
    for message, words in {
        "to must be one of gguf, padded, deci; got 'onnx'": ("--to", "onnx"),
        "type must be left out unless --to is gguf": ("--to", "deci", "--type", "bf16"),
        "max_shard_size must be left out unless": ("--to", "gguf", "--max-shard-size", "1GB"),
        "multiple must be left out unless --to is padded": ("--to", "deci", "--multiple", 4),
        "multiple must be a positive integer; got -1": ("--to", "padded", "--multiple", -1),
    }.items():
        done = export(folder, "--out", out, *words)
        assert done.exit_code == 2 and message in done.stderr, done.output
    assert not out.exists()
