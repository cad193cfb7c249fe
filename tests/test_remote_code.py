"""The code that a checkpoint with differing widths carries, whoever saves it, and how it loads in other processes."""

import json
import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pyprune import prune
from pyprune.model import checkpoint, remote_code

WIDTHS = (40, 24, 96)
AUTO = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")

# Loads folders in every way they should load, compares hidden states, and saves them again by stock code.
ELSEWHERE = """
    import sys
    way, *folders = sys.argv[1:]
    if way == "import":
        import pyprune
    else:
        sys.modules["pyprune"] = None
    import torch, transformers
    from safetensors.torch import load_file
    trust = {"trust_remote_code": True} if way == "trust" else {}
    for folder in folders:
        expected = load_file(folder + "/../expected.safetensors")
        for name in ("AutoModelForSequenceClassification", "AutoModel", "AutoModelForCausalLM"):
            model = getattr(transformers, name).from_pretrained(folder, **trust).eval()
            found = model(expected["ids"], output_hidden_states=True).hidden_states[-1]
            assert torch.equal(found, expected["hidden"]), (folder, name)
        model.save_pretrained(folder + "-" + way)
"""


def elsewhere(way, folders, cache):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ELSEWHERE), way, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        cwd=cache.parent,
    )


@pytest.fixture
def differing(tiny, random_mask):
    def make(name="llama"):
        model = tiny(name, pad_token_id=0)
        prune(model, repair=None, mask=random_mask(model, WIDTHS))
        return model

    return make


def expect(model, ids, folder):
    hidden = model(ids, output_hidden_states=True).hidden_states[-1].detach()
    save_file({"ids": ids, "hidden": hidden}, folder / "expected.safetensors")


def test_saved_again_by_stock_code_it_loads_both_ways(differing, ids, tmp_path):
    """checkpoint.save, then plain save_pretrained here, with import pyprune and with trust: each loads as others."""
    places = [tmp_path / name for name in ("llama", "gpt2", "opt", "gemma3_text")]
    for place in places:
        model = differing(place.name)
        first = checkpoint.save(model, place / "first")
        AutoModelForCausalLM.from_pretrained(first).save_pretrained(place / "plain")
        model.save_pretrained(place / "at-once")  # never seen by checkpoint.save
        expect(model, ids, place)
    steps = (("import", "plain"), ("trust", "at-once"), ("trust", "plain-import"), ("import", "at-once-trust"))
    for way, name in steps:
        done = elsewhere(way, [place / name for place in places], tmp_path / "cache")
        assert done.returncode == 0, done.stderr[-3000:]
    for folder in [folder for place in places for folder in place.iterdir() if folder.is_dir()]:
        named = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(AUTO) <= named.keys()
        code = (folder / remote_code.FILE).read_text()
        assert all(f"\n{reference.partition('.')[2]} = pruned_class(" in code for reference in named.values())
        assert checkpoint.check_fits(folder) == list(WIDTHS)


def test_where_neither_is_there_nothing_wrong_is_loaded(differing, ids, tmp_path):
    """No code of ours runs there, so the error is Transformers' own; what counts is that no model comes out."""
    model = differing()
    folder = checkpoint.save(model, tmp_path / "out")
    expect(model, ids, tmp_path)
    done = elsewhere("neither", [folder], tmp_path / "cache")
    assert done.returncode == 1 and not (tmp_path / "out-neither").exists()
    assert "MISMATCH" in done.stderr and "Error" in done.stderr.splitlines()[-1]


def test_widths_that_became_equal_need_no_code_also_for_stock_code(differing, random_mask, tmp_path):
    folder = checkpoint.save(differing(), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    prune(model, repair=None, mask=random_mask(model, (24, 24, 24)))
    model.save_pretrained(tmp_path / "equal")
    assert "auto_map" not in json.loads((tmp_path / "equal" / "config.json").read_text())
    assert not (tmp_path / "equal" / remote_code.FILE).exists()


def test_code_of_others_is_left_alone(tiny, tmp_path):
    model = tiny("llama")
    theirs = model.config.auto_map = {"AutoModelForCausalLM": "modeling_theirs.Model"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == theirs
    assert [p.name for p in tmp_path.glob("*.py")] == []
