"""Writing over a folder: a checkpoint of ours is replaced, what is anybody else's is never touched."""

import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyprune import InputError, prune, training
from pyprune.model import checkpoint

BARE = {"keep": 0.5, "method": "magnitude-l2-product", "allocation": "uniform:multiple=8", "repair": None}


@pytest.fixture
def pruned(tiny):
    model = tiny("llama")
    prune(model, **BARE)
    return model


@pytest.fixture
def ours(pruned, tokenizer, tmp_path):
    return checkpoint.save(pruned, tmp_path / "out", tokenizer)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def add_strangers(folder):
    (folder / "notes.txt").write_text("of a week")
    (folder / "other" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "link").symlink_to(folder / "config.json")


def refused(model, folder, named):
    before = contents(folder)
    with pytest.raises(
        InputError, match=f"out must hold nothing but what pyprune wrote, .* holds {named}: name another"
    ):
        checkpoint.save(model, folder, overwrite=True)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_strangers_in_a_checkpoint_are_named_and_stay(ours, pruned):
    add_strangers(ours)
    (ours / "pytorch_model.bin").write_bytes(b"x")
    refused(pruned, ours, "empty/, link, notes.txt, other/, pytorch_model.bin")


def test_a_folder_of_models_is_no_checkpoint(ours, pruned, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    shutil.move(ours, models / "a")
    refused(pruned, models, "a")


def test_a_dense_checkpoint_of_the_users_is_not_ours(pruned, tiny, tokenizer, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "out")
    refused(pruned, tmp_path / "out", "config.json, generation_config.json, model.safetensors")
    (tmp_path / "out" / "pyprune.json").write_text("{")  # a manifest that says nothing claims nothing
    refused(pruned, tmp_path / "out", "config.json, generation_config.json, model.safetensors, pyprune.json")


def test_the_tokenizer_is_kept_when_none_is_given(ours, pruned, tokenizer):
    """Whoever put it there; and it is part of the new manifest."""
    tokenizer.save_pretrained(ours)
    (ours / "chat_template.jinja").write_text("{{ messages }}")
    (ours / "additional_chat_templates").mkdir()
    (ours / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    theirs = {k: v for k, v in contents(ours).items() if "token" in k or k.endswith(".jinja")}
    assert len(theirs) >= 4
    pruned.lm_head.weight.data.zero_()
    checkpoint.save(pruned, ours, overwrite=True)
    after = contents(ours)
    assert {k: after[k] for k in theirs} == theirs
    assert set(theirs) <= set(checkpoint.verify(ours)["files"])
    assert AutoModelForCausalLM.from_pretrained(ours).lm_head.weight.abs().max() == 0
    assert AutoTokenizer.from_pretrained(ours).get_vocab() == tokenizer.get_vocab()
    checkpoint.save(pruned, ours, tokenizer, overwrite=True)  # one that is given comes in the place of all of it
    assert "additional_chat_templates/tool.jinja" not in contents(ours)


def test_a_pruned_checkpoint_that_others_saved_again_is_ours(ours, pruned, tokenizer, tmp_path):
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(again, max_shard_size="20KB")
    tokenizer.save_pretrained(again)
    assert not (again / "pyprune.json").exists()
    checkpoint.save(pruned, again, overwrite=True)
    names = set(contents(again))
    assert names == set(checkpoint.verify(again)["files"]) | {"pyprune.json"}
    assert "tokenizer.json" in names and "model.safetensors.index.json" not in names


def test_files_of_a_checkpoint_are_as_open_as_others(ours, tmp_path):
    (tmp_path / "file").touch()
    assert {p.stat().st_mode for p in ours.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_a_state_of_training_does_not_take_the_place_of_anything_else(tiny, ids, tmp_path):
    import torch

    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    batches = [{"input_ids": ids, "labels": ids}]
    (tmp_path / "notes.txt").write_text("of a week")
    with pytest.raises(InputError, match=r"holds notes\.txt: name another"):
        training.train(model, batches, optimizer, steps=1, checkpoint=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    for _ in range(2):
        training.train(model, batches, optimizer, steps=1, checkpoint=tmp_path / "state")
    assert sorted(p.suffix for p in (tmp_path / "state").iterdir()) == [".safetensors"] * 3
