"""The suite: its texts and questions, numbers by hand, what it refuses, and its place in `eval` and `compare`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import as_json, call, refused
from test_comparison import _result, plain, rows, stop_before

from pyprune import InputError
from pyprune.base.text import default_text, halves
from pyprune.cli.suite import tables
from pyprune.evaluation import perplexity
from pyprune.evaluation.comparison import compare, goals
from pyprune.evaluation.domains import Losses, Suite, Tasks, Writing, domain_windows, read_material, suite, write
from pyprune.evaluation.domains.texts import MODULES, NAMES
from pyprune.evaluation.domains.writing import prompts
from pyprune.evaluation.summary import MEAN, comparison_lines, judged_texts
from pyprune.model.decode import decode

CARRIED = ["python-docs", "python-source"]
SMALL: dict[str, Any] = {"tokens": 256, "window": 64, "new_tokens": 4}


def fill(folder: Path) -> Path:
    """A data folder of made-up texts, laid out as the real ones."""
    prose = default_text()[:24_000]
    references = [f"{name} serves {food} food, number {i}." for i in range(40) for name, food in (("Aromi", "Thai"),)]
    sums = [{"question": f"What is {i} and {i + 1}?", "answer": f"{i} + {i + 1} = {2 * i + 1}"} for i in range(60)]
    questions = [{"goal": f"Open jar {i}", "sol1": f"turn lid {i}", "sol2": f"sing to lid {i}"} for i in range(6)]
    texts = {
        "wikitext-2/valid.txt": f"{prose}\n\n{prose[::-1]}",
        "e2e-nlg/testset_w_refs.csv": '"mr","ref"\n' + "".join(f'"x","{r}"\n' for r in references * 2),
        "gsm8k/test.jsonl": "\n".join(map(json.dumps, sums)) + "\n",
        "webtext/wine.txt": "Big, fat Chardonnay at \u00a35. ***\n" * 200,
        "piqa/valid.jsonl": "\n".join(map(json.dumps, questions)),
        "piqa/valid-labels.lst": "0\n1\n0\n0\n1\n0\n",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("latin-1" if "wine" in name else "utf-8"))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return fill(tmp_path / "data")


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Callable[[int], Any]:
    """`model(seed)` -> a tiny LLaMA for the tests' tokenizer."""
    return lambda seed=0: tiny("llama", seed, vocab_size=1024, max_position_embeddings=512)


def test_what_cpython_carries() -> None:
    found = read_material()
    assert [d.name for d in found.domains] == CARRIED and not found.questions
    assert list(found.missing) == [name for name in NAMES if name not in CARRIED]
    docs, source = found.domains
    assert docs.documents == (halves(default_text())[1],)
    first = source.documents[: len(MODULES) - 2]  # one of every module in turn, before a second one of any
    assert len(set(first)) == len(first) and all(len(text) >= 2400 for text in first)
    assert sum("def " in text for text in first) > len(first) / 2 and read_material() == found


def test_a_data_folder(data: Path) -> None:
    found = read_material(data, items=4)
    by = {domain.name: domain.documents for domain in found.domains}
    assert tuple(by) == NAMES and not found.missing
    assert by["wikipedia"] == (halves((data / "wikitext-2/valid.txt").read_text("utf-8"))[1],)
    assert len(by["restaurants"]) == len(set(by["restaurants"])) == 40 and "number 39." in " ".join(by["restaurants"])
    assert "What is 7 and 8?\n7 + 8 = 15" in by["mathematics"] and len(by["mathematics"]) == 60
    assert by["mathematics"][0] != "What is 0 and 1?\n0 + 1 = 1", "in the order of the file"
    assert "\u00a35" in by["wine"][0]
    assert len(found.questions) == 4 and len(read_material(data).questions) == 6
    question = found.questions[1]
    assert question.prompt == "Question: Open jar 1\nAnswer:" and question.answer == 1
    assert question.choices == ("turn lid 1", "sing to lid 1")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gsm8k/test.jsonl", None, "data must be a folder that holds gsm8k/test.jsonl; got"),
        ("piqa/valid-labels.lst", None, "data must be a folder that holds piqa/valid-labels.lst; got"),
        ("piqa/valid-labels.lst", b"0\n1\n", "valid-labels.lst must hold a label for each of 6 questions; got 2"),
        ("piqa/valid-labels.lst", b"0\n1\n2\n0\n0\n1", "valid-labels.lst must hold labels that are 0 or 1; got '2'"),
        (
            "piqa/valid.jsonl",
            b'{"goal": "a", "sol1": "b", "sol2": " "}',
            "valid.jsonl:1 must be an object with goal",
        ),
        ("piqa/valid.jsonl", b"", "data must hold a question of PIQA"),
        ("gsm8k/test.jsonl", b'{"question": "a", "answer": "b"}\n{"q', r"test.jsonl:2 must be JSON \("),
        ("gsm8k/test.jsonl", b'{"question": "", "answer": "b"}', "test.jsonl:1 must be an object with question and"),
        ("gsm8k/test.jsonl", b"", "mathematics must have a text; got 'gsm8k/test.jsonl'"),
        ("e2e-nlg/testset_w_refs.csv", b"a,b\n1,2\n", r"testset_w_refs.csv must be CSV with a column 'ref'; got \['a'"),
        ("e2e-nlg/testset_w_refs.csv", b"mr,ref\nx,\n", "restaurants must hold documents that are not empty"),
        ("webtext/wine.txt", b" \n", "wine must hold documents that are not empty"),
        ("wikitext-2/valid.txt", b"\xff", "data must be UTF-8"),
    ],
)
def test_bad_data(data: Path, name: str, text: bytes | None, message: str) -> None:
    (data / name).unlink() if text is None else (data / name).write_bytes(text)
    with pytest.raises(InputError, match=message):
        read_material(data)


def test_bad_calls(model: Callable[..., Any], tokenizer: Any, data: Path) -> None:
    for folder in (data / "none", data / "webtext/wine.txt"):
        with pytest.raises(InputError, match="data must be an existing folder; got"):
            read_material(folder)
    with pytest.raises(InputError, match=r"items must be 0 \(for all\) or more; got -1"):
        read_material(data, -1)
    (data / "webtext/wine.txt").write_text("Thin.")
    with pytest.raises(InputError, match="wine must hold at least one window of 64 tokens"):
        suite(model(), tokenizer, data, **SMALL)
    with pytest.raises(InputError, match="new_tokens must be 0"):
        suite(model(), tokenizer, **{**SMALL, "new_tokens": -1})
    with pytest.raises(InputError, match="windows of at most 512 tokens"):
        suite(model(), tokenizer, tokens=1024, window=1024, new_tokens=0)


def test_the_suite_is_its_parts(model: Callable[..., Any], tokenizer: Any, data: Path) -> None:
    pruned, dense = model(0), model(1)
    found = suite(pruned, tokenizer, data, dense=dense, **SMALL)
    facts = json.loads(json.dumps(found.to_json()))
    windows = domain_windows(tokenizer, read_material(data).domains, 256, 64)
    for name in NAMES:
        mine, theirs = (perplexity(m, windows[name]).perplexity for m in (pruned, dense))
        assert facts["domains"][name]["value"] == pytest.approx(mine, rel=1e-12)
        ratio = facts["against"]["ratios"][name]
        assert ratio["value"] == pytest.approx(mine / theirs, rel=1e-12)
        assert ratio["interval"][0] < ratio["value"] < ratio["interval"][1]
        assert len(facts["domains"][name]["losses"]) == 4 and facts["domains"][name]["tokens"] == 256
    values = [facts["domains"][name]["value"] for name in NAMES]
    assert facts["perplexity"]["value"] == pytest.approx(math.prod(values) ** (1 / 6))
    assert facts["piqa"]["items"] == 6 and len(facts["piqa"]["accuracy"]["correct"]) == 6
    assert [len(facts["generation"]["texts"]), facts["generation"]["new_tokens"]] == [32, 4]
    # Against a file: the same, but for what needs the dense model itself.
    alone = suite(dense, tokenizer, data, **SMALL)
    again = suite(pruned, tokenizer, data, reference=json.loads(json.dumps(alone.to_json())), **SMALL).to_json()
    again = json.loads(json.dumps(again))
    assert alone.to_json() == facts["against"]["dense"] and again["generation"].pop("perplexity") is None
    assert facts["generation"].pop("perplexity") > 0 and again == facts
    with_judge = suite(pruned, tokenizer, data, reference=alone, dense=dense, **SMALL)
    assert with_judge.to_json() == found.to_json()


def made(losses: dict[str, list[float]], right: str = "", dense: Suite | None = None, share: float = 0.0) -> Suite:
    """A suite of made-up numbers."""
    domains = {name: Losses("a text", tuple(of), 8, name) for name, of in losses.items()}
    answers = tuple(map(int, right))
    writing = Writing(8, False, ("a",) * 32, (share,) * 32, 0.5, 2.0)
    return Suite(domains, (), {"accuracy": answers, "accuracy_byte": answers} if right else {}, writing, dense)


def test_numbers_by_hand() -> None:
    log = math.log
    dense = made({"a": [log(10), log(40)], "b": [log(5), log(5)]}, "1111111100" * 4)
    facts = made({"a": [log(20), log(80)], "b": [log(20), log(20)]}, "1111111000" * 4, dense, 0.25).to_json()
    assert [d["value"] for d in facts["domains"].values()] == pytest.approx([40, 20])
    assert facts["domains"]["a"]["interval"] == pytest.approx([20, 80])
    against = facts["against"]
    assert facts["perplexity"]["value"] == pytest.approx(math.sqrt(800))
    assert against["dense"]["perplexity"]["value"] == pytest.approx(10)
    # Every window of a is twice as bad: nothing is left to chance once windows are paired.
    assert against["ratios"]["a"] == {"value": pytest.approx(2), "interval": pytest.approx([2, 2])}
    assert against["ratio"] == {"value": pytest.approx(math.sqrt(8)), "interval": pytest.approx([math.sqrt(8)] * 2)}
    assert against["worst"] == {"domain": "b", "value": pytest.approx(4), "interval": pytest.approx([4, 4])}
    assert against["piqa"]["accuracy"]["retained"]["value"] == pytest.approx((0.7 - 0.5) / (0.8 - 0.5))
    assert facts["piqa"]["accuracy"]["value"] == 0.7 and facts["generation"]["repetition"]["value"] == 0.25
    assert Suite.of(facts).to_json() == {**facts, "against": None}
    shown = tables({"model": "m", **facts})
    assert shown[1] == "worst domain b: 4.00x (4.00x to 4.00x) of dense; of PIQA, the ratio is of what is above chance"


def test_a_loss_that_no_float_holds_is_null() -> None:
    facts = made({"a": [800.0, 1.0], "b": [math.inf, 1.0]}).to_json()
    assert facts["domains"]["b"]["value"] is None and facts["domains"]["b"]["losses"] == [None, 1.0]
    assert facts["perplexity"] == {"value": None, "interval": None}
    json.dumps(facts, allow_nan=False)


def test_a_reference_of_something_else(model: Callable[..., Any], tokenizer: Any, data: Path) -> None:
    facts = suite(model(), tokenizer, data, **SMALL).to_json()

    def measured(*_: Any) -> None:
        raise AssertionError("something was measured first")

    for change, message in (
        ({"tokens": 128}, "reference must be measured on the same windows of wikipedia; got 'others'"),
        ({"window": SMALL["window"] * 2}, "reference must be measured on the same windows of wikipedia; got 'others'"),
        ({"items": 3}, "reference must have answered the same 3 questions of PIQA; got 6"),
        ({"new_tokens": 5}, r"reference must have written as many tokens .* as \(5, False\); got \(4, False\)"),
    ):
        with pytest.raises(InputError, match=message):
            suite(model(), tokenizer, data, reference=facts, progress=measured, **{**SMALL, **change})
    for damaged in ({}, {**facts, "format": 2}, {**facts, "domains": {}}, {**facts, "domains": {"a": 1}}):
        with pytest.raises(InputError, match="reference must be a result of the suite"):
            suite(model(), tokenizer, data, reference=damaged, **SMALL)
    with pytest.raises(InputError, match="dense must be measured on the same windows of b; got 'none'"):
        made({"a": [1.0], "b": [1.0]}, dense=made({"a": [1.0]}))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma3_text", "falcon", "lfm2"])
def test_padded_prompts_give_what_single_ones_give(tiny: Callable[..., Any], family: str) -> None:
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randint(3, 128, (n,), generator=generator) for n in (3, 9, 5, 9, 14)]
    single, together = (decode(tiny(family), starts, 6, padded=padded) for padded in (False, True))
    assert [row.tolist() for row in single] == [row.tolist() for row in together]


def test_writing(model: Callable[..., Any], tokenizer: Any) -> None:
    assert len(prompts()) == len({p.text for p in prompts()}) == 32 and len({p.kind for p in prompts()}) >= 7
    looping, dense = model(0), model(1)
    with torch.no_grad():  # the same token always: 9 4-grams, the first of them new
        looping.lm_head.weight.zero_()
        looping.model.norm.weight.zero_()
    looping.generation_config.eos_token_id = looping.config.eos_token_id = 5
    found = write(looping, tokenizer, 12, dense)
    assert found.repetition == (pytest.approx(8 / 9),) * 32 and not found.chat
    assert found.distinct2 == pytest.approx(1 / (32 * 11))
    sums = []
    for prompt in prompts():
        start = tokenizer(prompt.text)["input_ids"]
        with torch.no_grad():
            logits = dense(input_ids=torch.tensor([start + [0] * 12])).logits[0, len(start) - 1 : -1]
        sums.append(float(logits.log_softmax(-1)[:, 0].sum()))
    assert math.log(found.perplexity or 0) == pytest.approx(-sum(sums) / (32 * 12), rel=1e-4)
    first = write(looping, tokenizer, 12)
    assert first.perplexity is None and first.texts == found.texts
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}</s>"
    answered = write(dense, chat, 4, dense)
    assert answered.chat and answered.texts != write(dense, tokenizer, 4, dense).texts


def test_the_verb(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    small = ("--suite", "--data", data, "--tokens", 256, "--window", 64, "--new-tokens", 4, "--items", 4)
    facts = as_json("eval", tiny_checkpoint, "--against", tiny_checkpoint, *small)
    assert set(facts["machine"]) >= {"cpu", "versions"} and facts["piqa"]["items"] == 4
    assert [ratio["value"] for ratio in facts["against"]["ratios"].values()] == [1.0] * 6
    file = tmp_path / "suite.json"
    file.write_text(json.dumps(facts))
    shown = call("eval", tiny_checkpoint, "--against", file, *small)
    assert shown.exit_code == 0, shown.output
    for part in (*NAMES, "geometric mean", "PIQA", "repeated", "worst domain"):
        assert part in shown.stdout
    alone = call("eval", tiny_checkpoint, "--suite", *small[3:])
    assert alone.exit_code == 0 and "dense" not in alone.stdout and "not measured, for want of --data" in alone.stdout


def test_wrong_use_of_the_verb(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    for given, message in (
        (("--suite", "--text", data / "webtext/wine.txt"), "text must be left out with --suite"),
        (("--data", data), f"data must be given with --suite only; got '{data}'"),
        (("--new-tokens", 4), "new_tokens must be given with --suite only; got 4"),
        (("--suite", "--data", tmp_path / "no"), "data must be an existing folder"),
        (("--suite", "--against", tmp_path / "x.json"), "against must be a model, or JSON of the suite"),
        (("--suite", "--window", 1), "window must be at least 2 tokens; got 1"),
    ):
        assert message in refused(2, "eval", tiny_checkpoint, *given)


def test_compare_with_a_suite(model: Callable[..., Any], tokenizer: Any, data: Path, tmp_path: Path) -> None:
    material = read_material(data)
    texts = domain_windows(tokenizer, material.domains, 128, 64)
    calibration = torch.randint(3, 1024, (4, 16), generator=torch.Generator().manual_seed(1))
    tasks, wanted, path = Tasks(tokenizer, material.questions, 4), rows("wanda", "random", keeps=(0.5,)), tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        compare(model(), wanted, calibration, texts, path, tasks=tasks, progress=stop_before(1))
    found = compare(model(), wanted, calibration, texts, path, tasks=tasks)
    whole = compare(model(), wanted, calibration, texts, tasks=tasks)
    assert found.found == 1 and list(map(plain, found.rows)) == list(map(plain, whole.rows))
    result = json.loads(path.read_text())
    assert result == found.to_json() and len(result["dense_tasks"]["piqa"]["accuracy"]["correct"]) == 6
    row = result["rows"][0]
    assert set(row["piqa"]["accuracy"]) == {"value", "interval", "retained"} and "texts" not in row["generation"]
    assert judged_texts(result) == [MEAN, *NAMES] and [g["text"] for g in result["goals"]][::2] == [MEAN, *NAMES]
    (line,) = [line for line in comparison_lines(result, MEAN) if line.label == "wanda"]
    assert line.points[0].perplexity == pytest.approx(math.prod(row["perplexity"].values()) ** (1 / 6))
    with pytest.raises(InputError, match="suite must be the one of"):
        compare(model(), wanted, calibration, texts, path, tasks=Tasks(tokenizer, material.questions[:2], 4))
    with pytest.raises(InputError, match="suite must be the one of"):
        compare(model(), wanted, calibration, texts, path)


def test_goals_on_the_mean_by_hand() -> None:
    """On a ours loses by little, on b it wins by much."""
    result = _result(wanda=[32.0, 41.0, 90.0], ours=[28.0, 33.0, 40.5])
    for row in result["rows"]:
        row["perplexity"]["b"] = 100.0 if row["group"] == "published" else 81.0
    assert all(goal["text"] != MEAN for goal in goals(result))
    first, second, *each = goals({**result, "suite": {"items": 0}})
    assert first["text"] == second["text"] == MEAN
    assert first["published"]["perplexity"] == pytest.approx(math.sqrt(3200))
    assert first["ours"]["perplexity"] == pytest.approx(math.sqrt(33 * 81)) and first["met"]
    assert (first["domains_met"], first["domains"], second["domains_met"]) == (1, 2, 2)
    assert [goal["met"] for goal in each] == [False, True, True, True]


def test_the_verb_compare(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    grid = ("--preset", "grid", "--criteria", "wanda", "--repair", "none", "--allocation", "uniform", "--keep", 0.5)
    small = ("--tokens", 256, "--evaluation-tokens", 128, "--window", 64, "--new-tokens", 4, "--multiple", 8)
    done = call("compare", tiny_checkpoint, "--suite", "--data", data, "--out", tmp_path / "c.json", *grid, *small)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "c.json").read_text())
    assert list(result["evaluation"]) == list(NAMES) and result["suite"]["items"] == 6
    for given, message in (
        (("--suite", "--also", data / "webtext/wine.txt"), "also must be left out with --suite"),
        (("--items", 3), "items must be given with --suite only; got 3"),
    ):
        assert message in refused(2, "compare", tiny_checkpoint, "--out", tmp_path / "d.json", *given)
