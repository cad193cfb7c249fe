"""`pyprune export --to gguf`: what is written, read by another reader, and everything that is refused."""

from __future__ import annotations

import copy
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import ARCHITECTURES, write_dense
from typer.testing import CliRunner

from pyprune import Mask, prune
from pyprune.base.errors import CheckpointError, InputError, UnsupportedModelError
from pyprune.cli.commands import app
from pyprune.model import checkpoint, families, loading, provenance
from pyprune.serving import gguf_check, gguf_plan
from pyprune.serving.gguf_base import Base, heads_apart, heads_grouped
from pyprune.serving.gguf_export import plan_widths, to_gguf

DIFFERING, SAME = (64, 96, 32), (64, 64, 64)


@pytest.fixture
def pair(tiny: Callable[..., Any], random_mask: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`pair(family, widths, kind="f32")` -> a pruned model, and the file of the dense one."""

    def make(family: str, widths: tuple[int, ...], kind: str = "f32") -> tuple[Any, Path]:
        model = tiny(family)
        base = write_dense(model, tmp_path / "dense.gguf", kind)
        prune(model, mask=random_mask(model, widths), repair=None)
        return model, base

    return make


def values(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def test_transformers_reads_a_uniform_file(
    pair: Callable[..., Any], ids: torch.Tensor, same_logits: Callable[..., None], tmp_path: Path
) -> None:
    model, base = pair("llama", SAME)
    written = to_gguf(model, base, tmp_path / "out.gguf", "f32")
    assert (written.arch, written.widths, written.check["apart"]) == ("llama", [64, 64, 64], 0.0)
    same_logits(loading.load_model(str(tmp_path / "out.gguf"))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_only_the_ffns_differ_from_the_base(family: str, pair: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair(family, DIFFERING, "f16")
    out = tmp_path / "out.gguf"
    written = to_gguf(model, base, out, "f32", "padded")
    deci = family in ("llama", "qwen2")
    widths = list(DIFFERING) if deci else [96, 96, 96]
    assert (written.arch, written.widths) == ("deci" if deci else ARCHITECTURES[family], widths)
    old, new = Base(base), Base(out)
    assert new.value(f"{written.arch}.feed_forward_length") == (widths if deci else 96)
    for key in ("tokenizer.ggml.tokens", f"{old.arch}.rope.freq_base"):
        assert new.value(key.replace(old.arch, written.arch, 1)) == old.value(key) is not None
    assert json.loads(new.value("pyprune"))["base_fingerprint"] == model.config.pyprune["base_fingerprint"]
    got = values(out)
    for name, tensor in old.tensors.items():
        if "ffn_up" in name or "ffn_gate" in name or "ffn_down" in name:
            continue
        same = tensor.data
        if family == "qwen2" and (".attn_q." in name or ".attn_k." in name):  # each head in LLaMA's order
            same = same[heads_apart(len(same), 4 if "attn_q" in name else 2)]
        assert np.array_equal(new.tensors[name].data, same), name
    for ffn, width in zip(families.find_ffns(model), widths, strict=True):
        own, prefix, more = ffn.weights(), f"blk.{ffn.layer}.ffn_", width - ffn.intermediate_size
        rows = torch.nn.functional.pad(own.down, (0, 0, 0, more)).detach().numpy()
        assert np.array_equal(got[f"{prefix}down.weight"], rows.T)
        parts = [p for p in (own.gate, own.up) if p is not None]
        found = [got[f"{prefix}{p}.weight"] for p in ("gate", "up") if f"{prefix}{p}.weight" in got]
        wanted = [torch.nn.functional.pad(p, (0, 0, 0, more)).detach().numpy() for p in parts]
        assert np.array_equal(np.concatenate(found), np.concatenate(wanted))


def test_heads_of_qwen_turn_as_those_of_llama() -> None:
    """Turning neighbours after the reordering is turning halves before it."""
    order = heads_apart(16, 2)
    assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_queries_of_a_group_stand_before_its_key_and_value() -> None:
    """Two groups of two queries, as Falcon has them, and GPT-NeoX with one query in each."""
    assert heads_grouped(16, 4, 2).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]


@pytest.mark.parametrize(("kind", "apart"), [("f16", 5e-4), ("bf16", 3e-3), ("q8_0", 0.01), ("q4_0", 0.15)])
def test_types_round_as_they_should(kind: str, apart: float, pair: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair("llama", SAME)
    written = to_gguf(model, base, tmp_path / "out.gguf", kind)
    assert apart / 10 < written.check["apart"] < apart


def test_widths() -> None:
    assert plan_widths("gemma4", [64, 96], "bf16", "as-is") == ("gemma4", [64, 96])
    assert plan_widths("llama", [60, 96], "q8_0", "padded") == ("deci", [64, 96])
    assert plan_widths("gpt2", [60, 90], "bf16", "padded") == ("gpt2", [90, 90])
    with pytest.raises(InputError, match=r"type q4_0 must .* blocks of 32; layer 1 has 33: prune with --multiple 32"):
        plan_widths("llama", [32, 33], "q4_0", "as-is")
    with pytest.raises(
        InputError, match=r"widths must be the same in all layers for 'gpt2'.* 32 to 64: .*--widths padded"
    ):
        plan_widths("gpt2", [32, 64], "bf16", "as-is")


def test_a_base_of_another_model(pair: Callable[..., Any], tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair("llama", SAME)
    out = tmp_path / "out.gguf"
    cases = {
        r"dense.gguf token_embd.weight \(F32\) lies 1\.\d+ from": tiny("llama", seed=1),
        r"there are 2 layers, in the checkpoint 3": tiny("llama", num_hidden_layers=2),
        r"token_embd.weight is \[200, 32\], in the checkpoint \[128, 32\]": tiny("llama", vocab_size=200),
        r"base must have at least the checkpoint's 64 neurons in layer 0; got 48": None,
    }
    for message, other in cases.items():
        if other is None:
            other = tiny("llama")
            other.load_state_dict({k: v for k, v in model.state_dict().items() if ".mlp." not in k}, strict=False)
            for layer in other.model.layers:
                for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    part.weight.data = part.weight.data[:48]
                layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :48].contiguous()
        write_dense(other, base)
        with pytest.raises(InputError, match=message):
            to_gguf(model, base, out)
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == ["dense.gguf"]


def test_trained_attention_is_not_the_base_s(pair: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair("llama", SAME, "q8_0")
    to_gguf(model, base, tmp_path / "near.gguf")  # as far as a rounding to eight bits
    dense = copy.deepcopy(model)
    provenance.add_recovery(model, {"steps": 1})
    provenance.write(dense, "", {"training": {}, "steps": 1})  # as `TrainingPruner` does
    for trained in (model, dense):
        with pytest.raises(InputError, match=r"lies 0\.00\d+ from .* export --to padded, then convert_hf_to_gguf"):
            to_gguf(trained, base, tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_training_that_nothing_tells_of(kind: str, pair: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair("llama", SAME, kind)
    weight = model.model.layers[1].self_attn.v_proj.weight.data
    weight += 0.003 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        InputError, match=r"blk.1.attn_v.weight \(.*\) lies 0\.00\d+ from .*: further than \w+ rounds, so training"
    ):
        to_gguf(model, base, tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_rounding_to_another_type_is_no_training(kind: str, dtype: torch.dtype, tiny: Any, tmp_path: Path) -> None:
    for family in ("llama", "gemma"):
        model = tiny(family)
        for name, values in model.named_parameters():
            if "norm" in name:
                values.data.normal_(std=0.1)
        base = Base(write_dense(model, tmp_path / "dense.gguf", kind))
        assert base.check_belongs(model.to(dtype)) > 15
    read = {
        name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        for name, tensor in base.tensors.items()
    }
    model.model.embed_tokens.weight.data = read["token_embd.weight"].to(dtype)  # what was read from the file itself
    assert base.check_belongs(model) > 15


def test_an_order_that_is_not_known(pair: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair("lfm2", SAME)
    convolution = model.model.layers[1].conv.conv.weight
    convolution.data = convolution.data.flip(0)
    with pytest.raises(
        InputError, match=r"shortconv.* lies 1\.\d+ from .*: it is another model's, or in an order that"
    ):
        to_gguf(model, base, tmp_path / "out.gguf")
    convolution.data = convolution.data.reshape(16, 6)
    with pytest.raises(UnsupportedModelError, match=r"whether blk.1.shortconv.* is the checkpoint's cannot be told"):
        Base(base).check_belongs(model)


def test_an_ffn_that_the_base_spells_otherwise(
    pair: Callable[..., Any], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model, base = pair("llama", SAME)
    biased = tiny("llama", mlp_bias=True)
    biased.load_state_dict(tiny("llama").state_dict(), strict=False)
    write_dense(biased, base)
    with pytest.raises(UnsupportedModelError, match=r"of layer 0 otherwise: it has blk.0.ffn_down.bias, .* too"):
        to_gguf(model, base, tmp_path / "out.gguf")


def test_a_scale_beside_weights_that_are_replaced(
    pair: Callable[..., Any], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model, base = pair("llama", SAME)
    write_dense(tiny("llama"), base, more={"blk.1.ffn_up.scale": np.array([0.37], np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"blk.1.ffn_up.scale, which belongs to weights that are replaced"):
        to_gguf(model, base, tmp_path / "out.gguf")


def test_heads_that_stand_in_one_tensor_cannot_be_turned(pair: Callable[..., Any], tmp_path: Path) -> None:
    model, base = pair("qwen2", DIFFERING)
    dense = Base(base)
    dense.tensors["blk.0.attn_qkv.weight"] = dense.tensors.pop("blk.0.attn_q.weight")
    with pytest.raises(UnsupportedModelError, match=r"in one tensor, blk.0.attn_qkv.weight"):
        gguf_plan.plan(dense, families.find_ffns(model), list(DIFFERING), "f32", "deci")


def test_what_reads_back_otherwise_is_not_kept(
    pair: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = pair("llama", DIFFERING)
    good = gguf_plan.ffn_tensors

    def bad(*arguments: Any) -> Any:
        return ((name, -values if "up" in name else values) for name, values in good(*arguments))

    monkeypatch.setattr(gguf_plan, "ffn_tensors", bad)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight reads back 2 from the model's"):
        to_gguf(model, base, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["dense.gguf"]


@pytest.mark.parametrize("fails", [False, True])
def test_llama_cpp_is_closed_and_the_model_may_be_elsewhere(
    fails: bool, tiny: Callable[..., Any], ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, closed = tiny("llama"), []

    class Llama:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.reset, self.close = (lambda: None), (lambda: closed.append(True))

        def eval(self, row: list[int]) -> None:
            assert not fails, "llama_decode returned -1"
            self.scores = model(torch.tensor([row])).logits[0].detach().numpy()

    class Elsewhere:
        """A model on another device, to which tokens must be moved."""

        dtype, device = torch.float32, torch.device("meta")

        def __call__(self, tokens: torch.Tensor) -> Any:
            assert tokens.device == self.device
            return model(ids[: len(tokens)])

    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: True)
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    if fails:
        with pytest.raises(AssertionError, match="llama_decode"):
            gguf_check.logits(tmp_path, model, ids)
    else:
        found = gguf_check.logits(tmp_path, Elsewhere(), ids[:1])  # type: ignore[arg-type]
        assert found["agree"] == 1 and found["divergence"] < 1e-6
    assert closed == [True]


def test_the_command(pair: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = pair("llama", DIFFERING)
    folder, out = tmp_path / "pruned", tmp_path / "out.gguf"
    checkpoint.save(model, folder)
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["export", *map(str, arguments)])

    whole = (folder, "--to", "gguf", "--base", base, "--out", out)
    done = call(*whole, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["arch"] == "deci", done.output
    (tmp_path / "broken.gguf").write_bytes(base.read_bytes()[:3000])
    refused = {
        "out must not exist yet": whole,
        "type must be one of f32": (*whole, "--overwrite", "--type", "q5"),
        "check must be 'tensors' where llama-cpp-python is not installed": (*whole, "--overwrite", "--check", "logits"),
        "base must name the GGUF file of the dense model; without one, convert_hf_to_gguf.py": (*whole[:3], *whole[5:]),
        "base must be left out unless --to is gguf": (folder, "--to", "padded", "--base", base, "--out", out),
        "base must be a GGUF file": (*whole[:4], tmp_path, *whole[5:], "--overwrite"),
        "broken.gguf' cannot be read as GGUF": (*whole[:4], tmp_path / "broken.gguf", *whole[5:], "--overwrite"),
        "out must be another file than base": (*whole[:6], base, "--overwrite"),
    }
    before = out.read_bytes()
    for message, arguments in refused.items():
        result = call(*arguments)
        assert result.exit_code == (1 if "read as" in message else 2) and message in result.stderr, result.output
    assert out.read_bytes() == before


def test_a_gguf_file_is_pruned_into_another(pair: Callable[..., Any], tmp_path: Path) -> None:
    _, base = pair("llama", DIFFERING)
    out, mask = tmp_path / "out.gguf", tmp_path / "m.safetensors"
    plain = ("--keep", 0.5, "--method", "magnitude-l2-both", "--repair", "none", "--multiple", 16)

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["prune", *map(str, arguments), *map(str, plain)])

    done = call(base, "--out", out, "--save-mask", mask)
    assert done.exit_code == 0, done.output
    dense, written = values(base), values(out)
    kept = Mask.load(mask).layers[0].neurons.numpy()
    assert len(kept) == 48 and (written["blk.0.ffn_down.weight"].shape[-1], len(dense)) == (48, len(written))
    rounded = torch.tensor(dense["blk.0.ffn_up.weight"][kept]).bfloat16().float().numpy()
    assert np.array_equal(written["blk.0.ffn_up.weight"], rounded)
    assert np.array_equal(written["token_embd.weight"], dense["token_embd.weight"])
    before = out.read_bytes()
    for arguments, message in (
        ((base, "--out", out), "out must not exist yet"),
        ((base, "--out", tmp_path / "b.gguf", "--recover", 1), "out must be a folder with --recover"),
        ((tmp_path, "--out", tmp_path / "b.gguf"), "out must be a folder where MODEL is no GGUF file"),
    ):
        refused = call(*arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.output
    assert out.read_bytes() == before and not (tmp_path / "b.gguf").exists()
