"""Recovery on tiny models: it learns, repeats, resumes bit for bit, and leaves an ordinary checkpoint.

With text of several sources: each is measured alone, they count alike, and none may be worse than at first.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from tower_cases import make_tower
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pyprune import CheckpointError, InputError, prune
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.cli import recover as cli
from pyprune.evaluation import perplexity
from pyprune.model import checkpoint, families
from pyprune.pruning.mixture import Windows
from pyprune.training import adapters, persist
from pyprune.training.distillation import DistillationConfig, distillation_loss_from_hidden, shifted
from pyprune.training.recovery import ONLY_TEACHER, STATE, RecoverConfig, RecoverReport, lesson, order, recover

TEXT = DistillationConfig(kl_weight=0.0, ce_weight=1.0)
SHORT = {"steps": 6, "batch": 2, "learning_rate": 1e-3, "held_out": 0.2, "every": 2, "precision": "float32"}


def config(**changes: Any) -> RecoverConfig:
    return RecoverConfig(**{**SHORT, **changes})


@pytest.fixture
def pair(tiny: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """`pair(family="llama")` -> a model without two thirds of its neurons, and the dense one."""

    def make(family: str = "llama", **changes: Any) -> tuple[Any, Any]:
        teacher = tiny(family, **changes)
        student = copy.deepcopy(teacher)
        prune(student, keep=1 / 3, method="random", allocation="uniform:multiple=1", repair=None)
        return student, teacher

    return make


@pytest.fixture
def windows() -> Tensor:
    """`[12, 16]`: a text with a rule, so that there is something to learn."""
    starts = torch.randint(3, 60, (12, 1), generator=torch.Generator().manual_seed(2))
    return 3 + (starts + 7 * torch.arange(16)) % 60


@pytest.fixture
def mixed(windows: Tensor) -> Windows:
    """`[12, 16]` of two sources, 9 and 3 windows: the rule, and the rule backwards."""
    sources = torch.tensor([0, 0, 1, 0] * 3)
    return Windows(torch.where(sources[:, None] == 1, windows.flip(1), windows), sources, ("rule", "backwards"))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_student_learns(pair: Callable[..., Any], windows: Tensor, mode: str) -> None:
    student, teacher = pair()
    before, dense = weights(student), weights(teacher)
    facts = config(steps=40, learning_rate=1e-2, mode=mode, rank=8, every=20, distillation=DistillationConfig())
    report = recover(student, teacher, windows, facts, provenance={"text": "a rule"})
    assert [entry["step"] for entry in report.train] == list(range(1, 41))
    losses = [entry["loss"] for entry in report.train]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert report.held_out[-1]["ce"] < 0.7 * report.held_out[0]["ce"]
    assert (report.windows, report.held_out_windows, report.tokens) == (10, 2, 40 * 2 * 16)
    after = weights(student)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert {name.split(".")[3] for name in changed} >= {"mlp", "self_attn"}
    assert all(name.startswith("model.layers.") for name in changed)
    assert same(weights(teacher), dense), "the teacher changed"
    assert not student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    block = student.config.pyprune
    assert block["base_fingerprint"] and block["recovery"][0]["text"] == "a rule"
    assert block["recovery"][0]["config"]["learning_rate"] == 1e-2
    json.dumps(report.to_json())


@pytest.mark.parametrize("loss", [ONLY_TEACHER, DistillationConfig(2.0, 0.5, 0.5)])
def test_the_loss_is_that_of_the_formula(pair: Callable[..., Any], windows: Tensor, loss: DistillationConfig) -> None:
    """The first step's, worked out again; so the chunked path and what is kept of the teacher are right."""
    student, teacher = pair()
    rows = windows[order.rows(0, 12, 2, 0)]
    with torch.no_grad():
        z, q = (m(input_ids=rows).logits[:, :-1].double() for m in (student, teacher))
    T = loss.temperature
    soft = torch.softmax(q / T, -1)
    kl = (soft * (soft.log() - torch.log_softmax(z / T, -1))).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), rows[:, 1:].flatten())
    report = recover(student, teacher, windows, config(held_out=0.0, steps=1, distillation=loss))
    wanted = loss.ce_weight * ce + loss.kl_weight * T**2 * kl
    assert report.train[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert report.train[0]["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert RecoverConfig().distillation == DistillationConfig(1.0, 1.0, 0.0) == ONLY_TEACHER


def test_sources_by_hand(pair: Callable[..., Any], mixed: Windows) -> None:
    """The last third of every source is held out; each counts alike, though one is three times as long."""
    student, teacher = pair()
    held = {"rule": mixed.ids[mixed.sources == 0][6:], "backwards": mixed.ids[mixed.sources == 1][2:]}
    wanted = []
    for model in (student, teacher):
        with torch.no_grad():
            z = {n: model(input_ids=ids).logits[:, :-1].double().flatten(0, 1) for n, ids in held.items()}
        ce = torch.nn.functional.cross_entropy
        wanted.append({n: float(ce(z[n], ids[:, 1:].flatten())) for n, ids in held.items()})
    before = copy.deepcopy(student)
    report = recover(student, teacher, mixed, config(held_out=1 / 3, steps=4))
    assert (report.windows, report.held_out_windows) == (8, 4)
    assert report.sources == [
        {"source": "rule", "tokens": 96, "share": 0.75},
        {"source": "backwards", "tokens": 32, "share": 0.25},
    ]
    assert student.config.pyprune["recovery"][0]["sources"] == report.sources
    first = report.held_out[0]
    assert first["sources"] == pytest.approx(wanted[0], rel=1e-5)
    assert first["ce"] == (first["sources"]["rule"] + first["sources"]["backwards"]) / 2
    assert report.teacher_sources == pytest.approx(wanted[1], rel=1e-5)
    assert report.teacher_ce == pytest.approx(sum(wanted[1].values()) / 2, rel=1e-5)
    mean, found = report.perplexities, report.source_perplexities
    assert mean is not None
    for when in ("before", "after", "teacher"):
        assert math.sqrt(found["rule"][when] * found["backwards"][when]) == pytest.approx(mean[when])
    assert found["rule"]["before"] == pytest.approx(math.exp(wanted[0]["rule"]), rel=1e-4)
    json.dumps(report.to_json())
    # The same held-out windows, given apart, under a name that is there twice.
    given = Windows(torch.cat(list(held.values())), torch.tensor([0, 0, 0, 1]), ("a", "a"))
    apart = recover(before, teacher, mixed.ids[[0, 1, 2, 3, 4, 5, 6, 7]], config(steps=4), held_out=given)
    assert apart.sources == [] and list(apart.teacher_sources) == ["a #1", "a #2"]
    assert [m["ce"] for m in apart.held_out] == [m["ce"] for m in report.held_out]
    assert same(weights(before), weights(student))


def test_a_source_that_gets_worse_is_seen(
    pair: Callable[..., Any], mixed: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of one source alone, learnt by heart, worsens the other; a state like that is never the best."""
    student, teacher = pair()
    held = Windows(mixed.ids[-4:], mixed.sources[-4:], mixed.names)
    asked = config(steps=40, learning_rate=1e-2, every=20, distillation=TEXT)
    report = recover(student, teacher, mixed.ids[mixed.sources == 0], asked, held_out=held)
    assert report.worse(report.held_out[-1]) == ["backwards"] and not report.worse(report.held_out[0])
    assert report.held_out[-1]["sources"]["rule"] < report.held_out[0]["sources"]["rule"]
    assert not report.worse(next(m for m in report.held_out if m["step"] == report.best))
    # While a mean that was bought falls, training goes on; but its state is not kept.
    told = iter([[1.0, 1.0], [5.0, 5.0], [4.0, 5.0], [1.5, 5.5], [1.0, 5.5], [3.0, 4.5], [3.0, 6.0], [4.0, 4.0]])
    student, teacher = pair()
    seen: list[dict[str, Tensor]] = []

    def measure(self: Any, model: Any) -> list[float]:
        seen.append(weights(student))
        return next(told)

    monkeypatch.setattr(lesson.Lesson, "measure", measure)
    report = recover(student, teacher, mixed, config(steps=50, every=1, patience=2))
    assert (report.best, report.steps, report.stopped) == (4, 6, "patience")
    assert same(weights(student), seen[5])
    lowest = {"step": 3, "ce": 3.25, "sources": {"rule": 1.0, "backwards": 5.5}, "worse": ["backwards"]}
    assert report.passed_over == report.to_json()["passed_over"] == lowest


def test_token_ids_without_a_source_are_as_ever(pair: Callable[..., Any], windows: Tensor, tmp_path: Path) -> None:
    """The same bits as before there were sources: the text's name in the state, and what is measured."""
    student, teacher = pair()
    training, held = windows[:-5], windows[-5:]
    total, head = 0.0, student.get_output_embeddings()
    with torch.no_grad():
        for ids in held.split(2):
            states = student.base_model(input_ids=ids, use_cache=False).last_hidden_state
            total += distillation_loss_from_hidden((states, head), None, shifted(ids), TEXT).ce * len(ids)
    report = recover(student, teacher, windows, config(held_out=0.4), folder=tmp_path)
    assert report.held_out[0] == {"step": 0, "ce": total / 5}
    assert report.sources == [] and report.source_perplexities == {} and report.passed_over is None
    name = hashlib.sha256()
    for part in (training, held):
        name.update(repr(tuple(part.shape)).encode() + part.numpy().tobytes())
    assert persist.read(tmp_path / STATE, "pyprune-recovery-1")[1]["text"] == name.hexdigest()


def test_every_window_is_seen_once_a_pass() -> None:
    seen = torch.cat([order.rows(step, 7, 3, seed=1) for step in range(14)]).tolist()
    passes = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes) and passes[0] != passes[1]


def test_both_paths_to_the_loss_agree(
    pair: Callable[..., Any], windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for fast in (True, False):
        student, teacher = pair()
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(lesson, "plain_head", lambda model: None)
            reports.append(recover(student, teacher, windows, config(train="all")))
    a, b = ([*(e["loss"] for e in r.train), *(m["ce"] for m in r.held_out), r.teacher_ce] for r in reports)
    assert a == pytest.approx(b, rel=1e-4)


def test_a_teacher_too_large_to_keep_runs_every_time(
    pair: Callable[..., Any], windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for kept in (2 << 30, 0):
        student, teacher = pair()
        monkeypatch.setattr(lesson, "_CACHE_BYTES", kept)
        count: list[int] = []
        teacher.base_model.register_forward_hook(lambda *_, n=count: n.append(1))
        report = recover(student, teacher, windows, config(steps=10, held_out=0.0))
        calls.append((len(count), [e["loss"] for e in report.train]))
    assert calls[1][0] - calls[0][0] == 4, "10 steps of 2 windows, of which there are 12"
    assert calls[0][1] == pytest.approx(calls[1][1], rel=1e-4)


@pytest.mark.parametrize(("mode", "by_source"), [("full", False), ("lora", True), ("full", True)])
def test_resume_goes_on_bit_for_bit(
    pair: Callable[..., Any], mixed: Windows, tmp_path: Path, mode: str, by_source: bool
) -> None:
    """Stopped in the second pass and in between two states: the continuation is the run that was never stopped."""
    asked = config(steps=9, save_every=4, mode=mode, patience=0)
    windows = mixed if by_source else mixed.ids
    whole, teacher = pair()
    wanted = recover(whole, teacher, windows, asked)
    broken, _ = pair()

    def stop(stage: str, done: int, total: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(broken, teacher, windows, asked, folder=tmp_path, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == [STATE]
    again, _ = pair()
    found = recover(again, teacher, windows, asked, folder=tmp_path)
    assert (found.train, found.held_out, found.best) == (wanted.train, wanted.held_out, wanted.best)
    assert found.teacher_ce == wanted.teacher_ce and found.perplexities == wanted.perplexities
    assert found.source_perplexities == wanted.source_perplexities and bool(wanted.source_perplexities) == by_source
    assert same(weights(again), weights(whole))
    finished, _ = pair()
    assert recover(finished, teacher, windows, asked, folder=tmp_path).train == wanted.train
    assert same(weights(finished), weights(whole)), "a run that is over gives its result again"


def test_resume_refuses_another_run(pair: Callable[..., Any], windows: Tensor, tmp_path: Path) -> None:
    student, teacher = pair()
    recover(student, teacher, windows, config(steps=2), folder=tmp_path)
    for changes, message in (
        ({"steps": 3}, "steps of the state to resume must be 3, as asked for now; got 2"),
        ({"learning_rate": 1.0}, "learning_rate of the state to resume must be 1.0"),
        ({"distillation": TEXT}, "distillation of the state to resume"),
    ):
        with pytest.raises(InputError, match=message):
            recover(pair()[0], teacher, windows, config(**{"steps": 2, **changes}), folder=tmp_path)
    with pytest.raises(InputError, match="text of the state to resume"):
        recover(pair()[0], teacher, windows.flip(0), config(steps=2), folder=tmp_path)
    named = Windows(windows, torch.zeros(len(windows)), ("a",))
    with pytest.raises(InputError, match="text of the state to resume"):
        recover(pair()[0], teacher, named, config(steps=2), folder=tmp_path)
    other = copy.deepcopy(teacher)
    prune(other, keep=0.5, method="random", allocation="uniform:multiple=1", repair=None)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.gate_proj.weight of the state to resume"):
        recover(other, teacher, windows, config(steps=2), folder=tmp_path)
    file = tmp_path / STATE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        recover(pair()[0], teacher, windows, config(steps=2), folder=tmp_path)


def test_the_best_state_is_kept(pair: Callable[..., Any], windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends after `patience` measurements that are no better, with the weights of the best."""
    student, teacher = pair()
    told = iter([2.0, 5.0, 4.0, 3.0, 3.5, 3.0, 9.0, 1.0])  # the teacher's first
    seen: list[dict[str, Tensor]] = []

    def measure(self: Any, model: Any) -> list[float]:
        seen.append(weights(student))
        return [next(told)]

    monkeypatch.setattr(lesson.Lesson, "measure", measure)
    report = recover(student, teacher, windows, config(steps=50, every=1, patience=3))
    assert (report.stopped, report.best, report.steps) == ("patience", 2, 5)
    assert [m["ce"] for m in report.held_out] == [5.0, 4.0, 3.0, 3.5, 3.0, 9.0]
    assert same(weights(student), seen[3]) and not same(seen[3], seen[6])
    found = report.perplexities
    assert found is not None
    assert [math.log(found[name]) for name in ("before", "after", "teacher")] == pytest.approx([5, 3, 2])


def test_time_ends_a_run_with_its_schedule(
    pair: Callable[..., Any], windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    student, teacher = pair()
    report = recover(student, teacher, windows, config(steps=10_000, minutes=1.0, held_out=0.0, patience=0))
    assert report.stopped == "minutes" and 2 < report.steps < 60
    rates = [entry["rate"] for entry in report.train]
    assert max(rates) == pytest.approx(1e-3, rel=0.2) and rates[-1] < 0.1 * max(rates)


def test_rates() -> None:
    half = {"learning_rate": 2.0, "warmup": 0.5}
    assert [RecoverConfig(decay="linear", **half).rate(s) for s in (0, 0.25, 0.5, 0.75, 1)] == [0, 1, 2, 1, 0]
    cosine = [RecoverConfig(decay="cosine", **half).rate(s) for s in (0.5, 0.75, 1)]
    assert cosine == pytest.approx([2, 1, 0])
    assert RecoverConfig(decay="none", **half).rate(1) == 2.0


@pytest.mark.parametrize("train", ["ffn", "all"])
def test_what_is_trained(pair: Callable[..., Any], windows: Tensor, train: str) -> None:
    student, teacher = pair("gpt2")
    before = weights(student)
    recover(student, teacher, windows, config(train=train, held_out=0.0))
    changed = {name for name, p in weights(student).items() if not torch.equal(p, before[name])}
    ffns = {n for n in before if ".mlp." in n}
    assert changed == ffns if train == "ffn" else changed > ffns | {"transformer.wte.weight"}


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_adapters_are_merged(pair: Callable[..., Any], windows: Tensor, family: str, tmp_path: Path) -> None:
    """Transposed projections, and ones that lie in the layer; the checkpoint is as any other."""
    student, teacher = pair(family)
    before, kinds = weights(student), [type(m) for m in student.modules()]
    recover(student, teacher, windows, config(mode="lora", train="ffn", rank=2, held_out=0.0, learning_rate=1e-2))
    assert [type(m) for m in student.modules()] == kinds
    changed = {name for name, p in weights(student).items() if not torch.equal(p, before[name])}
    ffn = {id(p) for f in families.find_ffns(student) for p in f.parameters() if p.ndim == 2}
    assert changed == {name for name, p in student.named_parameters() if id(p) in ffn}
    folder = checkpoint.save(student, tmp_path / "x")
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(input_ids=windows).logits, student(input_ids=windows).logits)


def test_mode_lora_says_what_it_needs(
    pair: Callable[..., Any], windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair()
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"mode 'lora' needs the package peft: pip install 'pyprune\[recover\]'"):
        recover(student, teacher, windows, config(mode="lora"))


def test_dtypes_come_back(pair: Callable[..., Any], windows: Tensor) -> None:
    """Weights are float32 while they are trained, so that small steps add up; then bfloat16 again, as are buffers."""
    student, teacher = pair()
    student.model.register_buffer("mine", torch.ones(3))
    student, teacher = student.to(torch.bfloat16), teacher.to(torch.bfloat16)
    before = weights(student)
    report = recover(student, teacher, windows, config(precision="bfloat16", learning_rate=1e-2))
    assert report.precision == "bfloat16"
    assert {t.dtype for t in (*student.parameters(), student.model.mine)} == {torch.bfloat16}
    assert not same(weights(student), before)


def test_adapters_begin_by_the_seed_alone(pair: Callable[..., Any], windows: Tensor) -> None:
    found = []
    for state in (1, 2):
        student, teacher = pair()
        torch.manual_seed(state)
        recover(student, teacher, windows, config(mode="lora", steps=2))
        found.append(weights(student))
    assert same(*found)


def test_what_the_loss_does_not_depend_on_is_resumed(windows: Tensor, tmp_path: Path) -> None:
    """A vision tower that no text goes through has no state of the optimizer."""
    found = []
    for _ in range(2):
        student, teacher = make_tower("llava"), make_tower("llava", seed=1)
        found.append(recover(student, teacher, windows, config(train="all", steps=2), folder=tmp_path))
    assert found[0].train == found[1].train and found[1].steps == 2


def test_hidden_states_are_distilled(pair: Callable[..., Any], windows: Tensor) -> None:
    student, teacher = pair()
    asked = DistillationConfig(kl_weight=0.0, ce_weight=0.0, hidden_weight=1.0)
    report = recover(student, teacher, windows, config(steps=30, learning_rate=3e-3, every=30, distillation=asked))
    found = [entry["hidden"] for entry in report.train]
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    assert report.train[0]["loss"] == pytest.approx(report.train[0]["hidden"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer; got 0"),
        ({"batch": True}, "batch must be a positive integer"),
        ({"learning_rate": -1e-3}, "learning_rate must be positive and finite; got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\)"),
        ({"held_out": 0.6}, "held_out must lie in"),
        ({"minutes": 0}, "minutes must be positive, or None"),
        ({"decay": "cosin"}, "decay must be one of .*nearest: cosine"),
        ({"train": "head"}, "train must be one of ffn, layers, all"),
        ({"mode": "lora", "train": "all"}, "train must be ffn or layers with mode 'lora'"),
        ({"precision": "float16"}, "precision must be one of"),
        ({"patience": -1}, "patience must be a non-negative integer"),
        ({"max_norm": -1.0}, "max_norm must be 0 or more"),
    ],
)
def test_a_config_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecoverConfig(**values)


def test_bad_input_changes_nothing(pair: Callable[..., Any], tiny: Callable[..., Any], windows: Tensor) -> None:
    student, teacher = pair()
    before = weights(student)
    several = torch.zeros(12, dtype=torch.int64)
    one = torch.cat([several[:11], several[:1] + 1])
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (tiny("llama", vocab_size=96), windows, {}, r"vocabulary of the teacher must be .* \(128\); got 96"),
        (student, windows, {}, "teacher must be another model"),
        (teacher, windows[:2], {}, r"text must hold at least 2 windows \(batch\); got 1"),
        (teacher, windows + 100, {}, r"batches must lie in \[0, 128\)"),
        (teacher, windows[:, :1], {}, "windows must have at least 2 tokens"),
        (teacher, windows.repeat(1, 5), {}, "windows must have windows of at most 64 tokens"),
        (teacher, windows, {"held_out": windows.repeat(1, 5)}, "held_out must have windows of at most 64"),
        (teacher, Windows(windows, one, ("a", "b")), {}, "text b must hold at least 2 windows, one held out; got 1"),
        (teacher, Windows(windows, several[:9], ("a",)), {}, r"sources of windows must give each of 12 .*; got \(9,\)"),
        (teacher, Windows(windows, several, ("a", "b")), {}, r"one of 2 names, and each name a window; got \[0\]"),
        (teacher, windows, {"held_out": Windows(windows, one - 1, ("a",))}, r"sources of held_out .*; got \[-1, 0\]"),
        (teacher, Windows(windows + 100, several, ("a",)), {}, r"batches must lie in \[0, 128\)"),
    ]
    for other, text, more, message in cases:
        with pytest.raises(InputError, match=message):
            recover(student, other, text, config(), **more)
    assert same(weights(student), before) and "recovery" not in student.config.pyprune


def test_a_loss_that_is_not_finite_is_refused(pair: Callable[..., Any], windows: Tensor) -> None:
    student, teacher = pair()
    before = weights(student)
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="loss must be finite at step 0"):
        recover(student, teacher, windows, config())
    assert same(weights(student), before)


# The command line: the verb alone, as `pyprune` registers it.


def call(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(cli.recover)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    prune(model, keep=0.5, method="random", allocation="uniform:multiple=8", repair=None)
    return checkpoint.save(model, tmp_path_factory.mktemp("recover") / "half", tokenizer)


QUICK = ("--steps", 8, "--batch", 2, "--window", 32, "--tokens", 640, "--also-tokens", 64)
PROSE = ("--text", "builtin:prose")


def test_the_verb_writes_a_checkpoint(pruned: Path, tiny_checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    out, figure = tmp_path / "x", tmp_path / "loss.png"
    done = call(
        pruned,
        "--teacher",
        tiny_checkpoint,
        "--out",
        out,
        "--figure",
        figure,
        *QUICK,
        *PROSE,
        "--held-out",
        0,
        "--json",
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["steps"] == facts["best"] == 8 and facts["tokens"] == 512
    found = facts["perplexity"]["pydoc_data.topics (second half)"]
    text = token_windows(tokenizer, load_text(None, "second")[0], 64, 32)
    for when, folder in (("before", pruned), ("after", out), ("teacher", tiny_checkpoint)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert found[when] == pytest.approx(perplexity(model, text).perplexity, rel=1e-5)
    assert found["after"] != found["before"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    manifest = checkpoint.verify(out)
    assert manifest["widths"] == checkpoint.read_manifest(pruned)["widths"]
    assert manifest["base_fingerprint"] == checkpoint.read_manifest(pruned)["base_fingerprint"]
    block = json.loads((out / "config.json").read_text())["pyprune"]
    (run,) = block["recovery"]
    assert run["teacher"]["model"] == "tiny-llama" and run["config"]["steps"] == 8 and run["tokens"] == 512
    assert str(tmp_path.parent) not in json.dumps(block), "a path of this machine went into the checkpoint"
    assert block["provenance"] == json.loads((pruned / "config.json").read_text())["pyprune"]["provenance"]


def test_the_verb_dry_and_resumed(pruned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    quick = (*QUICK, *PROSE, "--learning-rate", 0.1)
    done = call(pruned, "--teacher", tiny_checkpoint, "--dry-run", "--resume", state, *quick)
    assert done.exit_code == 0 and "nothing (dry run)" in done.stdout, done.output
    assert "held out" in done.stdout and "weights of step" in done.stdout and "gap closed" in done.stdout
    assert "geometric mean" not in done.stdout, "of one source"
    assert list(tmp_path.iterdir()) == []
    common = (pruned, "--teacher", tiny_checkpoint, "--resume", state, *quick, "--json")
    first, second = (json.loads(call(*common, "--out", tmp_path / name).stdout) for name in "ab")
    assert first["train"] == second["train"]
    weights = [checkpoint.read_manifest(tmp_path / n)["files"]["model.safetensors"]["sha256"] for n in "ab"]
    assert weights[0] == weights[1]


def test_the_verb_writes_nothing_that_is_no_better(pruned: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = call(pruned, "--teacher", tiny_checkpoint, "--out", tmp_path / "x", *QUICK, *PROSE, "--learning-rate", 1e-12)
    assert done.exit_code == 1 and list(tmp_path.iterdir()) == [], done.output
    said = " ".join(done.stderr.split())
    assert "no state was better on the held-out text than the model as it came" in said
    assert "nothing was written; try a lower --learning-rate than 1e-12" in said


def test_the_verb_reads_several_sources(pruned: Path, tiny_checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    """By default what the teacher writes, and CPython's; with files, by weight; each is shown, behind the mean."""
    dense = tmp_path / "calm"  # a teacher that has something to teach about any text: to be less sure of it
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.norm.weight *= 0.1
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    common = (pruned, "--teacher", dense, *QUICK, "--train", "all", "--learning-rate", 0.01)
    done = call(*common, "--out", tmp_path / "x", "--figure", tmp_path / "loss.png", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    prose = "pydoc_data.topics (first half)"
    assert [(s["source"], s["tokens"]) for s in facts["sources"]] == [
        ("self:plain", 448), (prose, 64), ("builtin:code", 32)
    ]  # fmt: skip
    assert facts["windows"] == 17 and facts["held_out_windows"] == 3
    mean, *sources, also = facts["perplexity"]
    assert mean == "geometric mean, held out" and also == "pydoc_data.topics (second half)"
    assert sources == [f"{name}, held out" for name in ("self:plain", prose, "builtin:code")]
    for when in ("before", "after", "teacher"):
        of = [facts["perplexity"][name][when] for name in sources]
        assert facts["perplexity"][mean][when] == pytest.approx(math.prod(of) ** (1 / 3))
    (run,) = json.loads((tmp_path / "x" / "config.json").read_text())["pyprune"]["recovery"]
    assert run["sources"] == facts["sources"] and "self:plain 75%" in run["text"]
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("The list has some words, and they are many. " * 60)
    second.write_text("A name of a module is a string of its own. " * 60)
    files = ("--text", f"{first}@3", "--text", second, "--start-token", "always", "--dry-run")
    done = call(*common, *files)
    assert done.exit_code == 0, done.output
    assert "first.txt, held out" in done.stdout and "geometric mean, held out" in done.stdout
    facts = json.loads(call(*common, *files, "--json").stdout)
    assert [s["tokens"] for s in facts["sources"]] == [14 * 32, 4 * 32] and facts["held_out_windows"] == 2
    text = token_windows(tokenizer, load_text(None, "second")[0], 64, 32, start="always")
    found = facts["perplexity"]["pydoc_data.topics (second half)"]["teacher"]
    assert found == pytest.approx(perplexity(model, text).perplexity)


def test_a_source_that_was_paid_with_is_named() -> None:
    report = RecoverReport(RecoverConfig())
    report.held_out = [
        {"step": 0, "ce": 4.0, "sources": {"a": 4.0, "b": 4.0}},
        {"step": 25, "ce": 3.0, "sources": {"a": 1.0, "b": 5.0}},
        {"step": 50, "ce": 3.5, "sources": {"a": 3.0, "b": 4.0}},
    ]
    said = str(cli.none_better(report))
    assert "the best after it 3.0000, at step 25, but worse than at first on b): nothing was written" in said
    assert cli.closed({"before": 8.0, "after": 4.0, "teacher": 2.0}) == "50%"
    assert cli.closed({"before": 2.0, "after": 1.0, "teacher": 2.0}) == "-"


def test_the_verb_refuses_wrong_use(pruned: Path, tiny_checkpoint: Path, tmp_path: Path, tokenizer: Any) -> None:
    def refused(*arguments: object) -> str:
        done = call(*arguments)
        assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
        return " ".join(done.stderr.split())

    out = ("--out", tmp_path / "x")
    common = (pruned, "--teacher", tiny_checkpoint)
    assert "out must be given" in refused(*common)
    assert "not empty" in refused(*common, "--out", pruned)
    assert "steps must be a positive integer; got 0" in refused(*common, *out, "--steps", 0)
    assert "save_every must be given with --resume" in refused(*common, *out, "--save-every", 2)
    assert "text must be an existing file" in refused(*common, *out, "--text", tmp_path / "none.txt")
    short = tmp_path / "short.txt"
    short.write_text("The list has some words. " * 40)
    assert "text must hold at least 8 windows" in refused(*common, *out, "--text", short, "--window", 64, "--batch", 8)
    assert "text short.txt must hold at least 2 windows, one held out; got 1" in refused(
        *common, *out, "--text", short, "--text", "builtin:code", "--window", 32, "--tokens", 64
    )
    assert "have weights that do not sum to zero" in refused(*common, *out, "--text", f"{short}@0")
    assert "start_token must be one of auto, always, never" in refused(*common, *out, "--start-token", "yes")
    assert "tokens must be given with text 'self'" in refused(*common, *out, "--tokens", 0)
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(other)
    changed = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = changed["model"]["vocab"]
    a, b = sorted(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    save_tokenizer(tokenizer, changed, other)
    assert "teacher must have the other model's tokenizer; 2 tokens differ" in refused(pruned, "--teacher", other, *out)
    changed = json.loads(tokenizer.backend_tokenizer.to_str())
    changed["pre_tokenizer"]["add_prefix_space"] = True
    save_tokenizer(tokenizer, changed, other)
    assert "these parts differ; got ['pre_tokenizer']" in refused(pruned, "--teacher", other, *out)
    assert not (tmp_path / "x").exists()


def save_tokenizer(tokenizer: Any, content: dict[str, Any], folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
