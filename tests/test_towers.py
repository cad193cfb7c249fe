"""Text towers, hybrids, shared blocks, encoder-decoders and FFNs of their own kind: the whole way, and refusals."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from tower_cases import TOWERS, call, make_tower
from transformers import AutoConfig, AutoModelForCausalLM

from pyprune import KeepIndex, Mask, UnsupportedModelError, accelerate, load, prune, prune_blocks, save
from pyprune.model import checkpoint, families, towers
from pyprune.model.families import find_ffns
from pyprune.model.units import OWN

WIDTHS = {
    "llava": [96, 96],
    "bart": [64, 96, 96],
    "marian": [64, 96, 96],
    "t5": [96] * 4,
    "nemotron_h": [96, 96],
    "zamba": [96],
    "bloom": [128, 128],
    "mpt": [128, 128],
    "ctrl": [96, 96],
    "apertus": [96, 96],
    "gpt_neox_japanese": [96, 96],
    "gemma3n_text": [96, 96],
}


@pytest.fixture(params=sorted(TOWERS))
def name(request):
    return request.param


def mask_of(model, share, seed=0):
    """Random neurons of every FFN: `share` of each, a little less of every second."""
    generator = torch.Generator().manual_seed(seed)
    ffns = find_ffns(model)
    keeps = []
    for i, ffn in enumerate(ffns):
        size = ffn.intermediate_size
        count = int(share[i % len(share)] * size)
        keeps.append(KeepIndex(torch.randperm(size, generator=generator)[:count].sort().values, size))
    return Mask(tuple(keeps), families.fingerprint(model, ffns))


@pytest.mark.parametrize("share", [(0.5,), (0.5, 0.25)], ids=["uniform", "differing"])
def test_the_whole_way(name, share, ids, masked, tmp_path):
    model = make_tower(name)
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == WIDTHS[name]
    mask = mask_of(model, share)
    want = call(masked(model, mask), ids)
    prune(model, repair=None, mask=mask)
    got = call(model, ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    save(model, tmp_path / "x")
    checkpoint.verify(tmp_path / "x")
    again = type(model).from_pretrained(tmp_path / "x").eval()
    assert [ffn.intermediate_size for ffn in find_ffns(again)] == list(mask.widths)
    assert torch.equal(call(again, ids), got)
    accelerate(again, measure=False)
    torch.testing.assert_close(call(again, ids), got, rtol=1e-4, atol=1e-4 * float(got.abs().max()))
    save(again, tmp_path / "y")
    assert torch.equal(call(type(model).from_pretrained(tmp_path / "y").eval(), ids), got)


def test_scores_repairs_and_widths_on_text(name, more_ids):
    bare, mended = make_tower(name), make_tower(name)
    dense = call(bare, more_ids)
    options = {"keep": 0.5, "method": "wanda", "allocation": "uniform:multiple=8", "text": more_ids}
    prune(bare, repair=None, **options)
    report = prune(mended, repair="least-squares:damping=0.01", **options)
    assert all(layer.error_repaired < layer.error_cut for layer in report.layers)
    off = [float((call(model, more_ids) - dense).square().mean()) for model in (bare, mended)]
    assert off[1] < off[0]


@pytest.mark.parametrize(("name", "key"), [("llava", "text_config"), ("bart", None), ("t5", None), ("zamba", None)])
def test_uniform_widths_stand_in_the_configs_own_keys(name, key, tmp_path):
    model = make_tower(name)
    prune(model, repair=None, mask=mask_of(model, (0.5,)))
    config = getattr(model.config, key) if key else model.config
    assert "ffn" not in (getattr(config, "pyprune", None) or {})
    said = {"llava": ["intermediate_size"], "bart": ["encoder_ffn_dim", "decoder_ffn_dim"], "t5": ["d_ff"]}
    wanted = {"llava": [48], "bart": [32, 48], "t5": [48], "zamba": [48]}[name]
    assert [getattr(config, k) for k in said.get(name, ["intermediate_size"])] == wanted
    save(model, tmp_path / "x")
    assert not (tmp_path / "x" / "modeling_pyprune.py").exists()


def test_only_the_text_tower_of_a_model_with_eyes_is_pruned(ids, tmp_path):
    model = make_tower("llava")
    eyes = copy.deepcopy(model.model.vision_tower.state_dict())
    prune(model, keep=0.5, method="wanda", repair=None, allocation="global:multiple=1", text=ids)
    assert all(torch.equal(eyes[k], v) for k, v in model.model.vision_tower.state_dict().items())
    assert model.config.text_config.pyprune["ffn"]["layers"] == "layers"
    assert "provenance" in model.config.pyprune and "ffn" not in model.config.pyprune
    save(model, tmp_path / "x")
    again, _ = load(tmp_path / "x", dtype="float32")
    assert type(again) is type(model) and torch.equal(call(again, ids), call(model, ids))


SCRIPT = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoModelForSeq2SeqLM
assert "pyprune" not in sys.modules
for way, folder in zip((AutoModelForImageTextToText, AutoModelForSeq2SeqLM), sys.argv[1:]):
    model = way.from_pretrained(folder, trust_remote_code=True).eval()
    case = torch.load(folder + "/logits.pt", weights_only=True)
    words = {"decoder_input_ids": case["ids"]} if model.config.is_encoder_decoder else {}
    assert torch.equal(model(input_ids=case["ids"], **words).logits, case["logits"]), folder
print("loaded", len(sys.argv) - 1)
"""


def test_differing_widths_load_where_there_is_no_pyprune(ids, tmp_path):
    folders = []
    for name in ("llava", "bart"):
        model = make_tower(name)
        prune(model, repair=None, mask=mask_of(model, (0.5, 0.25, 0.75)))
        save(model, tmp_path / name)
        torch.save({"ids": ids, "logits": call(model, ids)}, tmp_path / name / "logits.pt")
        folders.append(str(tmp_path / name))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.stdout.strip() == "loaded 2", run.stderr[-2000:]


def test_a_layer_without_an_ffn_is_passed_over_and_an_unknown_one_is_not():
    model = make_tower("nemotron_h")
    assert [(ffn.layer, ffn.block) for ffn in find_ffns(model)] == [(0, 1), (1, 3)]
    holder = find_ffns(model)[1].holder
    holder.down_proj = nn.Sequential(holder.down_proj)
    with pytest.raises(UnsupportedModelError, match=r"layers\.3 has no FFN that pyprune knows; found .*mixer"):
        model.model.layers[3].mlp = holder
        find_ffns(model)


def test_a_shared_block_is_pruned_once_and_counts_every_call(more_ids):
    model = make_tower("zamba")
    ffns = find_ffns(model)
    assert [ffn.shared for ffn in ffns] == [True]
    report = prune(model, keep=0.5, method="wanda", repair=None, allocation="uniform:multiple=8", text=more_ids)
    assert len(report.layers) == 1 and model.config.intermediate_size == 48


def test_an_ambiguous_text_tower_is_refused_with_both_names():
    model = make_tower("llava")
    text = model.model.language_model
    model.model.second = copy.deepcopy(text)
    with pytest.raises(
        UnsupportedModelError,
        match=r"several lists of layers .*model\.language_model\.layers \(2\) and model\.second\.layers \(2\); pass",
    ):
        find_ffns(model)


def test_the_tower_is_found_by_structure_not_by_size_alone():
    eyes = {**TOWERS["llava"][2]["vision_config"], "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 6}
    model = make_tower("llava", vision_config=eyes)
    path, layers = towers.decoder_layers(model)
    assert path == "model.language_model.layers" and len(layers) == 2
    assert towers.config_path(model, path) == "text_config"


@pytest.mark.parametrize("name", ["bloom", "mpt", "apertus", "gemma3n_text"])
def test_an_activation_of_its_own_runs_in_its_own_module(name):
    kinds = {ffn.activation for ffn in find_ffns(make_tower(name))}
    assert kinds == ({OWN} if name != "gemma3n_text" else kinds)


@pytest.mark.parametrize("structure", ["ffn", "layer"])
@pytest.mark.parametrize("name", ["nemotron_h", "bart", "zamba"])
def test_whole_blocks_need_one_ffn_a_layer(name, structure, ids):
    with pytest.raises(UnsupportedModelError, match=f"structure '{structure}' needs a model whose layers each have"):
        prune_blocks(make_tower(name), structure=structure, keep=0.5, text=ids)


def test_gradients_of_an_encoder_decoder_are_refused(ids):
    with pytest.raises(UnsupportedModelError, match=r"method 'fisher' needs gradients.*BartForConditionalGeneration"):
        prune(make_tower("bart"), keep=0.5, method="fisher", repair=None, text=ids)


def test_a_mixer_alone_has_nothing_to_prune():
    config = AutoConfig.for_model(
        "mamba2", hidden_size=32, num_hidden_layers=2, vocab_size=64, num_heads=4, head_dim=16
    )
    with pytest.raises(UnsupportedModelError, match="where a mixer is all that a layer has, there are no FFN neurons"):
        find_ffns(AutoModelForCausalLM.from_config(config))
