"""Calibration text from several sources, and text that a model writes itself."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from pyprune import InputError, prune
from pyprune.base.text import default_text
from pyprune.base.windows import token_windows
from pyprune.cli.commands import app
from pyprune.model.mask import Mask
from pyprune.pruning import mixture, written
from pyprune.pruning.mixture import Windows, mix, parse
from pyprune.pruning.options import PruneOptions

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def model(tiny, monkeypatch):
    monkeypatch.setattr(written, "LENGTH", 32)
    monkeypatch.setattr(written, "AT_ONCE", 16)
    return tiny("llama", vocab_size=1024, max_position_embeddings=512)


@pytest.fixture
def files(tmp_path):
    text = default_text()
    (tmp_path / "a.txt").write_text(text[:20_000], encoding="utf-8")
    (tmp_path / "b.txt").write_text(text[50_000:90_000], encoding="utf-8")
    (tmp_path / "small.txt").write_text(text[:300], encoding="utf-8")
    return tmp_path


def test_short_forms(tmp_path):
    assert parse(["self", "builtin@0.5", "notes.txt:first@2"]) == {"self": 1.0, "builtin": 0.5, "notes.txt:first": 2.0}
    (tmp_path / "a@b").write_text("x")
    assert parse([str(tmp_path / "a@b")]) == {str(tmp_path / "a@b"): 1.0}, "a file is a file"
    for words, message in (
        (["self@much"], r"text must be SOURCE or SOURCE@WEIGHT.*'self@much'"),
        (["self", "self@2"], "text must name each source once; got 'self'"),
    ):
        with pytest.raises(InputError, match=message):
            parse(words)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "text must name at least one source"),
        ({"self": -1.0}, "weight of self must be 0 or more, and finite; got -1.0"),
        ({"self": float("nan")}, "weight of self must be 0 or more"),
        ({"self": 0.0, "builtin": 0.0}, "text must have weights that do not sum to zero"),
        ({"nowhere.txt": 1.0}, "text must be an existing file, self or builtin; got 'nowhere.txt'"),
        ({"self:music": 1.0}, "text must be self, or of it plain, chat; got 'self:music'"),
    ],
)
def test_bad_mixtures_are_refused(weights, message, tokenizer, model):
    with pytest.raises(InputError, match=message):
        mix(weights, model, tokenizer, 1024, 64)


def test_windows_come_by_weight_and_lie_evenly(files, tokenizer):
    a, b = str(files / "a.txt"), str(files / "b.txt")
    found = mix({a: 1, b: 3}, None, tokenizer, 64 * 16, 64)
    assert found.sources.tolist() == [1, 0, 1, 1] * 4
    for i, path in enumerate((a, b)):
        text = token_windows(tokenizer, Path(path).read_text("utf-8"), 0, 64)
        own = found.ids[found.sources == i]
        assert torch.equal(own, text[: len(own)]), "each source from its start, nothing lost, nothing doubled"
    assert found.facts() == [
        {"source": "a.txt", "tokens": 256, "share": 0.25},
        {"source": "b.txt", "tokens": 768, "share": 0.75},
    ]
    assert found.name == "a.txt 25% + b.txt 75%"
    whole = mix([a], None, tokenizer, 0, 64)
    assert torch.equal(whole.ids, token_windows(tokenizer, Path(a).read_text("utf-8"), 0, 64))
    assert whole.name == "a.txt"


def test_a_source_gives_at_least_one_window_and_no_more_than_it_holds(files, tokenizer):
    a, b, small = (str(files / name) for name in ("a.txt", "b.txt", "small.txt"))
    found = mix({a: 1000, b: 1}, None, tokenizer, 64 * 8, 64)
    assert found.sources.bincount().tolist() == [7, 1]
    found = mix({small: 1, b: 1}, None, tokenizer, 64 * 20, 64)
    assert 1 <= int((found.sources == 0).sum()) < 10 == int((found.sources == 1).sum())
    with pytest.raises(InputError, match=r"text small.txt must hold at least one window of 512 tokens; got"):
        mix({small: 1}, None, tokenizer, 1024, 512)
    assert mix({a: 1, small: 0}, None, tokenizer, 1024, 512).names == ("a.txt",), "nothing of what weighs nothing"


def test_builtin_is_prose_and_code(tokenizer):
    found = mix(["builtin"], None, tokenizer, 64 * 10, 64)
    assert found.names == ("pydoc_data.topics (first half)", "builtin:code")
    assert found.sources.bincount().tolist() == [5, 5]
    assert "parser.add_argument" in tokenizer.decode(found.ids[found.sources == 1].flatten())


def test_a_model_writes_by_itself(model, tokenizer):
    state = torch.get_rng_state()
    rows = written.write(model, tokenizer, 1500, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(map(len, rows)) >= 1500 and all(row[0] == tokenizer.bos_token_id for row in rows)
    assert rows[:1] == written.write(model, tokenizer, 100, seed=1) != written.write(model, tokenizer, 100, seed=2)
    assert rows[1:] == written.write(model, tokenizer, 1500, seed=1, before=(len(rows[0]),)), "written further"
    counts = torch.tensor([token for row in rows for token in row]).bincount(minlength=1024)
    assert (counts > 0).sum() > 600, "sampled from the whole distribution, which is nearly flat here"


def test_a_model_that_follows_instructions_writes_in_its_template(model, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT
    before, between = (own(t, add_special_tokens=False)["input_ids"] for t in ("<user>", "</s><a>"))
    documents = written._documents(model, own, "chat", 16, 32)
    for document in documents:
        assert document[: len(before)] == before
        places = [i for i in range(len(document)) if document[i : i + len(between)] == between]
        assert places and places[0] > len(before), "something is asked, and then answered"
    found = mix(["self:plain", "self:chat"], model, own, 64 * 8, 64)
    assert found.names == ("self:plain", "self:chat") and found.sources.bincount().tolist() == [4, 4]
    assert mix(["self"], model, own, 64 * 8, 64).names == ("self:plain",)
    for template, message in (
        (None, "text must not be 'self:chat' without a chat template"),
        ("{{ raise_exception('no users') }}", r"text 'self:chat' needs a chat template that works; .*no users"),
        ("hello", "text must not be 'self:chat' with a chat template that drops what a user says"),
    ):
        own.chat_template = template
        with pytest.raises(InputError, match=message):
            mix(["self:chat"], model, own, 64 * 8, 64)


def test_what_cannot_be_written_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="tokens must be given with text 'self', which has no end; got 0"):
        mix(["self"], model, tokenizer, 0, 64)
    with pytest.raises(InputError, match="where there is no model to write 'self'"):
        mix(["self"], None, tokenizer, 1024, 64)
    own = copy.deepcopy(tokenizer)
    own.bos_token = own.eos_token = None
    with pytest.raises(InputError, match="text must not be 'self' with a tokenizer without start and end token"):
        mix(["self"], model, own, 1024, 64)
    with torch.no_grad():  # every hidden state gives the end token all its weight
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        head = torch.nn.Linear(model.config.hidden_size, 1024)
        head.weight.zero_()
        head.bias.zero_()[model.config.eos_token_id] = 1e4
        model.lm_head = head
    with pytest.raises(InputError, match="text must not be 'self' for a model that writes nothing but its end token"):
        mix(["self"], model, tokenizer, 1024, 64)


def test_what_was_written_is_kept_by_model_seed_and_tokenizer(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path))
    first = mix(["self"], model, tokenizer, 64 * 8, 64)
    (file,) = (tmp_path / "written").iterdir()
    called = []
    real = written.write
    monkeypatch.setattr(written, "write", lambda *args, **kwargs: called.append(args) or real(*args, **kwargs))
    assert torch.equal(mix(["self"], model, tokenizer, 64 * 8, 64).ids, first.ids)
    assert torch.equal(mix(["self"], model, tokenizer, 64 * 4, 64).ids, first.ids[:4]), "a shorter one is its start"
    assert not called
    mix(["self"], model, tokenizer, 64 * 8, 64, seed=1)
    longer = mix(["self"], model, tokenizer, 64 * 40, 64)
    assert torch.equal(longer.ids[:8], first.ids), "written further, not anew"
    assert len(called) == 2, "another seed, and more than was there"
    file.write_bytes(b"damaged")
    mix(["self"], model, tokenizer, 64 * 8, 64)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1.0)
    mix(["self"], model, tokenizer, 64 * 8, 64)
    assert len(called) == 4, "a damaged file, and another model"


def test_prune_says_what_it_read(tiny, tokenizer, files):
    model = tiny("llama", vocab_size=1024, max_position_embeddings=512)
    sources = {files / "a.txt": 1, "builtin:code": 1}
    windows = mix(sources, None, tokenizer, 64 * 8, 64)
    report = prune(model, 0.5, text=windows, repair="least-squares")
    assert report.sources == windows.facts() == report.to_json()["sources"]
    assert json.dumps(report.mask.provenance["sources"]) == json.dumps(windows.facts())
    assert report.mask.provenance["text"] == "a.txt 50% + builtin:code 50%"
    plain = prune(
        tiny("llama", vocab_size=1024, max_position_embeddings=512), 0.5, text=windows.ids, repair="least-squares"
    )
    assert plain.sources == [] and "text" not in plain.mask.provenance
    assert [k.neurons.tolist() for k in plain.mask.layers] == [k.neurons.tolist() for k in report.mask.layers]
    assert isinstance(plain.mask, Mask) and isinstance(windows, Windows)
    assert mixture.DEFAULT == {"self": 3.0, "builtin": 1.0}
    base, instruct = (SimpleNamespace(chat_template=template) for template in (None, "{{ messages }}"))
    assert mixture.lessons(base) == mixture.DEFAULT
    assert mixture.lessons(instruct) == {"self:plain": 2.0, "self:chat": 1.0, "builtin": 1.0}


def test_the_command_line_mixes_and_refuses(tiny_checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(written, "LENGTH", 32)
    small = ["--tokens", "1024", "--window", "64", "--method", "wanda", "--keep", "0.5", "--dry-run", "--json"]

    def run(*words):
        return CliRunner().invoke(app, ["prune", str(tiny_checkpoint), *small, *map(str, words)])

    mixed = run("--text", f"{files / 'a.txt'}:first@3", "--text", "self")
    facts = json.loads(mixed.stdout)
    assert [(part["source"], part["tokens"]) for part in facts["sources"]] == [
        ("a.txt (first half)", 768),
        ("self:plain", 256),
    ]
    plain = json.loads(run().stdout)
    assert [part["source"] for part in plain["sources"]] == [
        "self:plain",
        "pydoc_data.topics (first half)",
        "builtin:code",
    ]
    best = json.loads(run("--best").stdout)
    assert (best["config"]["target"], best["config"]["allocation"]) == (0.5, "uniform")
    for words, message in (
        (["--text", "self@-1"], "weight of self must be 0 or more"),
        (["--text", "self@0"], "text must have weights that do not sum to zero"),
        (["--text", "nothing.txt"], "text must be an existing file, self or builtin"),
        (["--start-token", "often"], "start_token must be one of auto, always, never"),
    ):
        refused = run(*words)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.stderr


def test_the_default_asks_for_no_more_than_a_family_can(tiny):
    options = PruneOptions.of()
    assert options.suited(tiny("llama")).repair.target == 0.5
    assert options.suited(tiny("gemma2")).repair.target == 0.0
    assert PruneOptions.of(sequential=False).suited(tiny("llama")).repair.target == 0.0
    forced = PruneOptions.of(repair="least-squares:target=0.5")
    assert forced.suited(tiny("gemma2")) == forced, "refused later, not replaced"


def test_a_gpu_writes_as_many_documents_at_once_as_an_eighth_of_its_memory_holds(monkeypatch, tiny):
    model = tiny("llama")
    weight = SimpleNamespace(device=SimpleNamespace(type="cuda"), itemsize=2)
    config = model.config
    on_gpu = SimpleNamespace(parameters=lambda: iter([weight]), config=config)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    document = 2 * config.num_hidden_layers * heads * size * 2 * (100 + 64)
    monkeypatch.setattr(written, "AT_ONCE", 4)
    for documents, wanted in ((1, 4), (40, 32), (64, 64), (1 << 20, 1024)):
        room = SimpleNamespace(total_memory=8 * document * documents)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, room=room: room)
        assert written._at_once(on_gpu, 100) == wanted
    assert written._at_once(model, 100) == 4
