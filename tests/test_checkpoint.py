"""Checkpoints: what stands in them, and that damaged or hostile ones are refused quickly and by name."""

import json
import re
import shutil
import struct
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pyprune import CheckpointError, InputError, accelerate, prune
from pyprune.model import checkpoint, families

BARE = {"repair": None}


def make(tiny, random_mask, folder, name="llama", widths=(40, 40, 40), **changes):
    model = tiny(name, **changes)
    prune(model, **BARE, mask=random_mask(model, widths), provenance={"text": "none"})
    return checkpoint.save(model, folder)


@pytest.fixture
def uniform(tiny, random_mask, tmp_path):
    return make(tiny, random_mask, tmp_path / "out")


@pytest.fixture
def differing(tiny, random_mask, tmp_path):
    return make(tiny, random_mask, tmp_path / "out", widths=(40, 24, 96))


def edit_config(folder, **changes):
    """Change config.json, and the manifest so that its hash is right again."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))
    manifest = json.loads((folder / "pyprune.json").read_text())
    manifest["files"]["config.json"] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
    (folder / "pyprune.json").write_text(json.dumps(manifest))


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "pyprune.json").read_text())
    (folder / "pyprune.json").write_text(json.dumps({**manifest, **changes}))


def test_uniform_config_differs_in_the_width_and_the_pyprune_block_only(family, tiny, random_mask, tmp_path):
    tiny(family).save_pretrained(tmp_path / "dense")
    folder = make(tiny, random_mask, tmp_path / "out", family)
    dense, pruned = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "dense", folder))
    key = families.width_key(tiny(family).config)
    if key not in dense:  # a multiple of the hidden size; narrower layers are told one by one
        assert [layer[key] for layer in pruned["per_layer_config"].values()] == [40] * 3
        return
    assert pruned.pop("pyprune").keys() == {"base_fingerprint", "provenance"}
    assert pruned == {**dense, key: 40}
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["pyprune.json", *(p.name for p in (tmp_path / "dense").iterdir())]
    )


def test_only_safetensors_json_and_the_loader_are_written(differing):
    assert {p.suffix for p in differing.rglob("*") if p.is_file()} == {".safetensors", ".json", ".py"}
    assert [p.name for p in differing.glob("*.py")] == ["modeling_pyprune.py"]


def test_manifest(differing):
    manifest = checkpoint.verify(differing)
    assert manifest == json.loads((differing / "pyprune.json").read_text())
    assert manifest["widths"] == [40, 24, 96]
    assert manifest["model_type"] == "llama"
    assert re.fullmatch("[0-9a-f]{64}", manifest["base_fingerprint"])
    assert manifest["files"].keys() == {p.name for p in differing.iterdir()} - {"pyprune.json"}


def test_facts_cannot_replace_what_the_manifest_says(tiny, tmp_path):
    checkpoint.save(tiny("llama"), tmp_path / "out", facts={"files": {}, "widths": [], "note": "kept"})
    assert checkpoint.verify(tmp_path / "out")["note"] == "kept"


def test_tokenizer_is_saved_along(tiny, tokenizer, tmp_path):
    checkpoint.save(tiny("llama"), tmp_path / "out", tokenizer)
    assert "tokenizer.json" in checkpoint.verify(tmp_path / "out")["files"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_weights_and_shards(name, tiny, random_mask, tmp_path, ids):
    folder = make(tiny, random_mask, tmp_path / "one", name, (40, 24, 96), tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint.save(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(checkpoint.tensor_shapes(folder)), "tied weights are written once"
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "shards").glob("*.safetensors")}
    assert "model.safetensors.index.json" in checkpoint.verify(tmp_path / "shards")["files"]
    assert checkpoint.check_fits(tmp_path / "shards") == [40, 24, 96]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")(ids).logits, model(ids).logits)


def test_checkpoint_of_the_bare_decoder_fits(tiny, tmp_path):
    model = tiny("gpt2")
    model.transformer.save_pretrained(tmp_path)  # names without `transformer.`, as in GPT-2's own checkpoint
    assert checkpoint.check_fits(tmp_path) == [96, 96, 96]
    edit = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**edit, "n_inner": 95}))
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.mlp\.c_fc.* in the file, but config.json says"):
        checkpoint.check_fits(tmp_path)


def test_accelerated_model_saves_the_same_tensors(uniform, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(uniform)
    checkpoint.save(accelerate(model), tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (uniform, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_widths_that_become_equal_drop_the_loader(differing, tmp_path, random_mask):
    model = AutoModelForCausalLM.from_pretrained(differing)
    prune(model, **BARE, mask=random_mask(model, (24, 24, 24)))
    checkpoint.save(model, tmp_path / "again")
    assert not (tmp_path / "again" / "modeling_pyprune.py").exists()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert not {"auto_map", "per_layer_config"} & config.keys()
    assert config["intermediate_size"] == 24


# Damage


def test_every_flipped_byte_is_found(differing):
    for path in sorted(differing.iterdir()):
        if path.name == "pyprune.json":
            continue
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=rf"{path.name} was altered: its SHA-256"):
                checkpoint.verify(differing)
        path.write_bytes(whole)
    checkpoint.verify(differing)


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_tensors(cut, uniform):
    path = uniform / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=rf"model.safetensors must have {size + cut} bytes; it has {size}"):
        checkpoint.verify(uniform)
    with pytest.raises(CheckpointError, match=rf"model.safetensors must have {size + cut} bytes; it has {size}"):
        checkpoint.check_fits(uniform)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged header"),
        (b"\x01\x02", "damaged header"),
        (struct.pack("<Q", 2**60) + b"{}", "is truncated: its header says"),
        (struct.pack("<Q", 2) + b"[]", "damaged header"),
        (struct.pack("<Q", 2) + b"\xff\xff", "damaged header"),
        (struct.pack("<Q", 7) + b'{"a":1}', "damaged header"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "damaged header"),
        (struct.pack("<Q", 2) + b"{}", "no tensor of the file belongs to the model"),
    ],
)
def test_damaged_headers(content, message, uniform):
    (uniform / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_fits(uniform)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_missing_file(name, uniform):
    (uniform / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing from"):
        checkpoint.verify(uniform)


@pytest.mark.parametrize("name", ["extra.safetensors", "pytorch_model.bin", "modeling_evil.py", "adapter_config.json"])
def test_added_file(name, uniform):
    (uniform / "README.md").write_text("notes are welcome")
    checkpoint.verify(uniform)
    (uniform / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name} lies in .*, but pyprune.json does not list it"):
        checkpoint.verify(uniform)


def test_folders_that_are_none_of_ours(tmp_path, tiny):
    with pytest.raises(InputError, match=r"checkpoint must be an existing folder; got .*nowhere"):
        checkpoint.verify(tmp_path / "nowhere")
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"was not written by pyprune \(it has no pyprune.json\)"):
        checkpoint.verify(tmp_path / "dense")
    assert checkpoint.check_fits(tmp_path / "dense") == [96, 96, 96]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        checkpoint.check_fits(tmp_path / "empty")
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no safetensors file"):
        checkpoint.check_fits(tmp_path / "dense")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("{}", "is damaged: 'format'"),
        ('{"format": 9, "files": {}, "widths": []}', "has format 9; this version reads 1"),
        ('{"format": 1, "files": {}}', "is damaged: 'widths'"),
        ('{"format": 1, "files": {"a": 3}, "widths": []}', "is damaged"),
        ('{"format": 1, "files": {"a": {"bytes": "x", "sha256": ""}}, "widths": []}', "is damaged"),
        ("\ud800", "is damaged"),
    ],
)
def test_damaged_manifest(content, message, uniform):
    (uniform / "pyprune.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.verify(uniform)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_manifest_cannot_point_outside(name, uniform):
    edit_manifest(uniform, files={name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        checkpoint.verify(uniform)


def test_manifest_and_config_must_agree(uniform):
    edit_manifest(uniform, widths=[40, 40, 41])
    with pytest.raises(
        CheckpointError, match=r"pyprune.json says widths \[40, 40, 41\], config.json says \[40, 40, 40\]"
    ):
        checkpoint.verify(uniform)


# Hostile configs

WIDTHS = [
    ({"intermediate_size": 41}, r"has shape \(32, 40\) in the file, but config.json says \(32, 41\)"),
    ({"intermediate_size": 0}, r"intermediate_size of layer 0 must lie in \[1, 16777216\]; got 0"),
    ({"intermediate_size": -40}, r"intermediate_size of layer 0 must lie in \[1, 16777216\]; got -40"),
    ({"intermediate_size": 10**12}, r"intermediate_size of layer 0 must lie in \[1, 16777216\]; got 1000000000000"),
    ({"intermediate_size": 1 << 24}, r"has shape \(32, 40\) in the file, but config.json says \(32, 16777216\)"),
    ({"intermediate_size": "40"}, "config intermediate_size must be an integer; got '40'"),
    ({"intermediate_size": 40.0}, "config intermediate_size must be an integer; got 40.0"),
    ({"intermediate_size": True}, "config intermediate_size must be an integer; got True"),
    ({"intermediate_size": {}}, "config intermediate_size must be an integer; got {}"),
    ({"intermediate_size": None}, "not a usable config: .*intermediate_size"),
    ({"intermediate_size": [40]}, "not a usable config: .*intermediate_size"),
    ({"num_hidden_layers": 10**9}, r"num_hidden_layers must lie in \[1, 1000\]; got 1000000000"),
    ({"num_hidden_layers": -1}, r"num_hidden_layers must lie in \[1, 1000\]; got -1"),
    ({"num_hidden_layers": 0}, r"num_hidden_layers must lie in \[1, 1000\]; got 0"),
    ({"num_hidden_layers": "3"}, "not a usable config|must lie in"),
    ({"model_type": "no_such_family"}, "not a usable config"),
    ({"model_type": None}, "not a usable config"),
    ({"hidden_size": 64}, "in the file, but config.json says"),
    ({"vocab_size": 10**11}, "in the file, but config.json says"),
]
PER_LAYER = [
    ({"per_layer_config": {"0": {"intermediate_size": 41}}}, "must lie in|in the file, but config.json says|builds no"),
    ({"per_layer_config": {"99": {"intermediate_size": 8}}}, "not a usable config"),
    ({"per_layer_config": {"-1": {"intermediate_size": 8}}}, "not a usable config"),
    ({"per_layer_config": {"x": {"intermediate_size": 8}}}, "not a usable config"),
    ({"per_layer_config": [1, 2]}, "not a usable config"),
    ({"per_layer_config": {"1": {"intermediate_size": 10**12}}}, r"of layer 1 must lie in .*; got 1000000000000"),
    ({"per_layer_config": {"1": {"intermediate_size": -8}}}, r"of layer 1 must lie in .*; got -8"),
    ({"pyprune": {"ffn": {"width_key": "intermediate_size"}}}, "builds no model: KeyError"),
    ({"pyprune": {"ffn": 7}}, "builds no model"),
    ({"pyprune": "x"}, "builds no model"),
    ({"pyprune": {"ffn": {"width_key": "intermediate_size", "layers": "x", "in": [], "out": "y"}}}, "builds no model"),
    (
        {"pyprune": {"ffn": {"width_key": "intermediate_size", "layers": "layers", "in": [["a", 10**9]], "out": "b"}}},
        r"must stack 1 or 2 blocks in a; got 1000000000",
    ),
]


def refused_cheaply(folder, changes, message):
    edit_config(folder, **changes)
    started, before = time.process_time(), psutil.Process().memory_info().rss
    for look in (checkpoint.check_fits, checkpoint.verify):
        with pytest.raises(CheckpointError, match=message) as caught:
            look(folder)
        assert "\n" not in str(caught.value)
    assert time.process_time() - started < 5
    assert psutil.Process().memory_info().rss - before < 100 << 20


@pytest.mark.parametrize(("changes", "message"), WIDTHS)
def test_hostile_config(changes, message, uniform):
    refused_cheaply(uniform, changes, message)


@pytest.mark.parametrize(("changes", "message"), PER_LAYER)
def test_hostile_per_layer_config(changes, message, differing):
    refused_cheaply(differing, changes, message)


@pytest.mark.parametrize(
    ("name", "key"), [("gpt2", "n_layer"), ("gpt_neo", "num_layers"), ("qwen2", "num_hidden_layers")]
)
def test_enormous_depth_is_refused_under_every_name(name, key, tiny, random_mask, tmp_path):
    folder = make(tiny, random_mask, tmp_path / "out", name)
    refused_cheaply(folder, {key: 10**9}, rf"config {key} must lie in \[1, 1000\]; got 1000000000")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\udcff"])
def test_config_that_is_no_json_object(content, uniform):
    (uniform / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config.json is not a usable config"):
        checkpoint.check_fits(uniform)


def test_widths_swapped_between_layers_are_refused(differing):
    edit_config(differing, per_layer_config={"0": {"intermediate_size": 24}, "1": {"intermediate_size": 40}, "2": {}})
    with pytest.raises(CheckpointError, match=r"in the file, but config.json says"):
        checkpoint.verify(differing)


def test_foreign_tensors_are_refused(uniform, tiny):
    tensors = {k.replace("model.", "other."): v for k, v in load_file(uniform / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    save_file(tensors, uniform / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor of the file belongs to the model that config.json builds"):
        checkpoint.check_fits(uniform)


# Refusals of save


def test_model_that_its_config_does_not_build_is_refused(tiny, tmp_path):
    model = tiny("llama")
    model.config.intermediate_size = 95
    with pytest.raises(CheckpointError, match=r"gate_proj.weight|down_proj.weight.*has shape .*nothing was written"):
        checkpoint.save(model, tmp_path / "out")
    model = tiny("qwen2")
    model.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.bias has shape \(32,\) .* builds None"):
        checkpoint.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_class_of_ones_own_is_refused(tiny, tmp_path):
    model = tiny("llama")
    model.__class__ = type("MyModel", (type(model),), {})
    with pytest.raises(InputError, match="model must be of a class that Transformers has; got 'MyModel'"):
        checkpoint.save(model, tmp_path / "out")


def test_existing_folder_is_refused_before_anything(uniform, tiny, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_rebuilds", lambda model: pytest.fail("too late"))
    with pytest.raises(
        InputError, match=r"out must not exist yet; .*out is not empty \(pass overwrite to replace it\)"
    ):
        checkpoint.save(tiny("llama"), uniform)
    with pytest.raises(InputError, match=r"out must be a folder; .*config.json is a file"):
        checkpoint.save(tiny("llama"), uniform / "config.json")
    checkpoint.verify(uniform)


def test_overwrite_replaces_everything(uniform, tiny, ids):
    model = tiny("gpt2")
    checkpoint.save(model, uniform, overwrite=True)
    assert checkpoint.verify(uniform)["model_type"] == "gpt2"
    assert torch.equal(AutoModelForCausalLM.from_pretrained(uniform)(ids).logits, model(ids).logits)
    assert [p.name for p in uniform.parent.iterdir()] == ["out"]


def test_overwriting_shards_leaves_none_behind(tiny, tmp_path):
    """One file instead of many, and many instead of one: no index or shard of before stays to be read."""
    for size in ("20KB", 10**9, "20KB"):
        checkpoint.save(tiny("llama"), tmp_path / "out", overwrite=True, max_shard_size=size)
        checkpoint.verify(tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").exists() == (size == 10**9)
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("size", ["", "5", "GB", "-5GB", "0GB", "5 PB", 0, -1, 1.5, True, None])
def test_shard_size_is_checked_before_anything(size, tiny, tmp_path):
    with pytest.raises(InputError, match="max_shard_size must be a number of bytes, or one with KB, MB, GB or TB"):
        checkpoint.save(tiny("llama"), tmp_path / "out", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_a_copied_checkpoint_verifies(uniform, tmp_path):
    shutil.copytree(uniform, tmp_path / "copy")
    checkpoint.verify(tmp_path / "copy")
