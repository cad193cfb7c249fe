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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from pyprune import prune
from pyprune.base.errors import CheckpointError, InputError
from pyprune.cli.commands import app
from pyprune.model import checkpoint
from pyprune.serving import padded
from pyprune.serving.padded import to_padded

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_padding_rounds_nothing(
    dtype: torch.dtype, tiny: Callable[..., Any], random_mask: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny("llama").to(dtype)
    model.model.norm.weight.data = model.model.norm.weight.data.float() + 1e-4  # parts that stay in float32
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float()
    prune(model, mask=random_mask(model, DIFFERING), repair=None)
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers()) if ".mlp." not in n}
    to_padded(model, tmp_path / "out", ids)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert model.model.layers[2].mlp.up_proj.weight.dtype == dtype
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[n], t) for n, t in model.named_parameters())


def test_a_failed_check_leaves_the_types(
    tiny: Callable[..., Any], random_mask: Any, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama").bfloat16()
    prune(model, mask=random_mask(model, DIFFERING), repair=None)
    monkeypatch.setattr(padded, "widen", lambda ffn, width: ffn.holder.down_proj.weight.data.mul_(2))
    with pytest.raises(CheckpointError, match=r"gives logits .* from the checkpoint's; nothing was written"):
        to_padded(model, tmp_path / "out", ids)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not (tmp_path / "out").exists()


def test_a_family_of_one_width(
    tiny: Callable[..., Any], random_mask: Any, ids: torch.Tensor, same_logits: Callable[..., None], tmp_path: Path
) -> None:
    model = tiny("openai-gpt")
    prune(model, mask=random_mask(model, DIFFERING), repair=None)
    with pytest.raises(
        InputError,
        match=r"multiple must fill up to 96 neurons, the width of OpenAIGPTLMHeadModel where its config says none",
    ):
        to_padded(model, tmp_path / "out", ids)
    with torch.no_grad():
        before = model(ids).logits
        to_padded(model, tmp_path / "out", ids, multiple=96)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert not {"per_layer_config", "auto_map"} & set(config) and not list((tmp_path / "out").glob("*.py"))
        same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits, before)


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
    done = export(tmp_path / "nowhere", "--out", out, "--to", "padded", "--multiple", 0)  # before a long load
    assert "multiple must be a positive integer; got 0" in done.stderr
