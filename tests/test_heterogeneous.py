"""Widths that differ by layer: in this process, with `import pyprune` only, and where pyprune cannot be imported."""

import copy
import gc
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from pyprune import prune
from pyprune.model import checkpoint, families, heterogeneous, surgery
from pyprune.model.families import find_ffns

BARE = {"repair": None}
WIDTHS = (40, 24, 96)
ABROAD = ("gpt2", "opt", "falcon", "phi3", "llama", "gemma3_text", "lfm2")

# Loads every checkpoint named in the arguments, where `pyprune` cannot be imported.
WITHOUT_PYPRUNE = """
    import sys
    sys.modules["pyprune"] = None
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    for folder in sys.argv[2:]:
        expected = load_file(folder + ".expected")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=sys.argv[1] == "trust")
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
        model.generate(expected["ids"][:1], max_new_tokens=3)
        model.save_pretrained(folder + "-again")
        again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=sys.argv[1] == "trust")
        assert torch.equal(again(expected["ids"]).logits, expected["logits"]), folder
        print("loaded", model.config.model_type)
"""
WITH_PYPRUNE = """
    import sys
    import pyprune, torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    for folder in sys.argv[1:]:
        expected = load_file(folder + ".expected")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__module__.startswith("transformers."), type(model)
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder
        print("loaded", model.config.model_type)
"""


def run(code, arguments, cache):
    """Run `code` in a fresh interpreter, on one thread fewer surprises than here, away from this checkout."""
    program = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": ""}
    result = subprocess.run(
        program, capture_output=True, text=True, timeout=300, check=False, cwd=cache.parent, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [line.split()[1] for line in result.stdout.splitlines() if line.startswith("loaded")]


def save(tiny, random_mask, folder, name, widths, ids):
    model = tiny(name)
    prune(model, **BARE, mask=random_mask(model, widths))
    checkpoint.save(model, folder)
    save_file({"ids": ids, "logits": model(ids).logits.detach()}, f"{folder}.expected")
    return folder


def test_uniform_checkpoints_load_without_pyprune(tiny, random_mask, ids, tmp_path):
    names = [*ABROAD, "gpt_neox", "qwen3"]
    folders = [save(tiny, random_mask, tmp_path / name, name, (40, 40, 40), ids) for name in names]
    assert len(run(WITHOUT_PYPRUNE, ["plain", *folders], tmp_path / "cache")) == len(names)


def test_differing_widths_load_with_remote_code_without_pyprune(tiny, random_mask, ids, tmp_path):
    folders = [save(tiny, random_mask, tmp_path / name, name, WIDTHS, ids) for name in ABROAD]
    assert len(run(WITHOUT_PYPRUNE, ["trust", *folders], tmp_path / "cache")) == len(ABROAD)
    for folder in folders:  # what was saved again over there is whole
        assert checkpoint.check_fits(f"{folder}-again") == list(WIDTHS)
        assert (folder.parent / f"{folder.name}-again" / "modeling_pyprune.py").is_file()


def test_differing_widths_load_with_import_pyprune_only(tiny, random_mask, ids, tmp_path):
    folders = [save(tiny, random_mask, tmp_path / name, name, WIDTHS, ids) for name in ABROAD]
    assert len(run(WITH_PYPRUNE, folders, tmp_path / "cache")) == len(ABROAD)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_ways_in_one_process(name, tiny, random_mask, ids, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save(tiny, random_mask, tmp_path / name, name, WIDTHS, ids)
    want = load_file(f"{folder}.expected")["logits"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(ids).logits, want)
    checkpoint.save(model, tmp_path / "again")
    assert checkpoint.verify(tmp_path / "again")["widths"] == list(WIDTHS)


@pytest.fixture
def config(tiny, random_mask):
    model = tiny("llama")
    prune(model, **BARE, mask=random_mask(model, WIDTHS))
    return model.config


def test_config_is_the_same_after_a_model_was_built_from_it(config):
    before = config.to_dict()
    model = AutoModelForCausalLM.from_config(config)
    assert [f.intermediate_size for f in find_ffns(model)] == list(WIDTHS)
    assert config.to_dict() == before == model.config.to_dict()
    json.dumps(before["pyprune"])


def test_other_code_reads_the_widest_width(tiny, random_mask, ids, tmp_path):
    """As Trainer, PEFT and lm-eval read configs: by name, with a default, all of them, as copies, compared."""
    dense, model = tiny("llama"), tiny("llama")
    prune(model, **BARE, mask=random_mask(model, (64, 24, 80)))
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    alone = AutoConfig.from_pretrained(tmp_path / "out")
    for config in (model.config, loaded.config, alone):
        assert hasattr(config, "intermediate_size")
        assert getattr(config, "intermediate_size", 0) == config.to_dict()["intermediate_size"] == 80
        assert {key: getattr(config, key) for key in config.to_dict()}["intermediate_size"] == 80
        twin = copy.deepcopy(config)
        assert twin == config and config == twin and config != dense.config
        assert [layer.intermediate_size for layer in twin.per_layer_config] == [64, 24, 80]
    adapted = get_peft_model(loaded, LoraConfig(target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(adapted, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    surgery.set_widths(model, families.ffn_block(model, find_ffns(model)), [64, 64, 64])
    assert not model.config.is_heterogeneous and "allow_global" not in model.config.to_json_string()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "no_such_activation"},  # fails inside the model's own constructor
        {"pyprune": {"layers": "no.such.path"}},  # fails when layers are cut
    ],
)
def test_config_is_put_back_when_construction_fails(change, config):
    config.hidden_act = change.get("hidden_act", config.hidden_act)
    config.pyprune["ffn"].update(change.get("pyprune", {}))
    before = config.to_dict()
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    with pytest.raises((KeyError, AttributeError)):
        model_class(config)
    gc.collect()
    assert config.is_heterogeneous
    assert config.to_dict() == before


@pytest.mark.parametrize("width", [0, -1, 10**12])
def test_hostile_width_is_refused_before_a_layer_is_built(width, config):
    with pytest.raises(ValueError, match=r"per_layer_config\[1\].intermediate_size must lie in \[1, \d+\]; got"):
        config.per_layer_config = {0: {"intermediate_size": 96}, 1: {"intermediate_size": width}}
        AutoModelForCausalLM.from_config(config)


def test_other_heterogeneous_configs_are_left_alone(tiny_config):
    config = tiny_config("llama")
    config.per_layer_config = {1: {"intermediate_size": 40}}  # nobody told pyprune where the FFN is
    assert heterogeneous.layer_widths(config) is None
    config.pyprune = {"ffn": {"width_key": "intermediate_size"}}
    assert heterogeneous.layer_widths(config) == [96, 40, 96]
    config.per_layer_config = {1: {"hidden_act": "gelu"}}
    assert heterogeneous.layer_widths(config) is None


def test_installing_twice_wraps_once():
    init = PreTrainedModel.__init__
    heterogeneous.install()
    assert PreTrainedModel.__init__ is init


def test_remote_code_file_needs_only_torch_and_transformers(tiny, random_mask, ids, tmp_path):
    folder = save(tiny, random_mask, tmp_path / "llama", "llama", WIDTHS, ids)
    code = (folder / "modeling_pyprune.py").read_text()
    imports = [line for line in code.splitlines() if line.startswith(("import", "from"))]
    roots = {line.split()[1].partition(".")[0] for line in imports}
    assert roots == {"__future__", "functools", "re", "weakref", "typing", "torch", "transformers"}


def test_a_construction_that_fails_leaves_the_config_as_it_was(tiny, random_mask, monkeypatch):
    """Also while somebody holds the error, and with it the half-built model."""
    model = tiny("llama")
    prune(model, repair=None, mask=random_mask(model, (40, 48, 56)))
    config = model.config

    def fail(*given):
        raise ImportError("no such attention")

    monkeypatch.setattr(PreTrainedModel, "get_correct_attn_implementation", fail)
    with pytest.raises(ImportError) as held:
        type(model)(config)
    assert held.value is not None and heterogeneous.layer_widths(config) == [40, 48, 56]
