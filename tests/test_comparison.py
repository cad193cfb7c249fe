"""`compare`: rows against `prune` itself, what survives a kill, which files are refused, goals by hand, the picture."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from pyprune import InputError, Uniform, prune
from pyprune.base import machine
from pyprune.base.text import default_text
from pyprune.cli.compare import compare as compare_verb
from pyprune.evaluation import perplexity, recipes
from pyprune.evaluation.comparison import GOALS, STAGE, compare, goals
from pyprune.evaluation.recipes import OURS, PUBLISHED, Recipe, Setting, grid, settings
from pyprune.evaluation.summary import comparison_lines
from pyprune.pruning.allocation import ALLOCATIONS
from pyprune.pruning.options import PruneOptions
from pyprune.report.figures import apart, compare_figure
from pyprune.training.recovery import RecoverConfig

CALIBRATION = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
TEXTS = {"a": CALIBRATION.flip(0, 1), "b": CALIBRATION.roll(3, 1)}
UNTIMED = ("prune_seconds", "evaluation_seconds", "peak_bytes", "source")


def rows(*methods: str, keeps: tuple[float, ...] = (0.7, 0.5), **options: Any) -> list[Setting]:
    made = [Recipe(name, {"method": name, "repair": "none", **options}) for name in methods]
    return settings(made, keeps, 3, multiple=8, seeds=2)


def stop_before(row: int) -> Callable[[str, int, int], None]:
    """A progress callback that is a Ctrl-C in front of a row."""

    def progress(stage: str, done: int, total: int) -> None:
        if (stage, done) == (STAGE, row):
            raise KeyboardInterrupt

    return progress


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in UNTIMED}


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collects the options that are really pruned with."""
    seen: list[dict[str, Any]] = []

    def counting(model: Any, keep: float, **options: Any) -> Any:
        seen.append(options)
        return prune(model, keep, **options)

    monkeypatch.setattr(recipes, "prune", counting)
    return seen


def test_a_row_is_what_prune_and_perplexity_give(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compare(model, rows("wanda", keeps=(0.5,)), CALIBRATION, TEXTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert found.dense == {name: perplexity(model, ids).perplexity for name, ids in TEXTS.items()}
    (row,) = found.rows
    report = prune(model, 0.5, "wanda", allocation="uniform:multiple=8", repair=None, text=CALIBRATION)
    assert row["perplexity"] == {name: perplexity(model, ids).perplexity for name, ids in TEXTS.items()}
    assert row["widths"] == [48, 48, 48] and row["kept"] == 0.5 and row["tokens"] == 64
    assert (row["parameters"], row["config"]) == (report.parameters_after, report.options.facts())


def test_a_setting_with_recovery_is_pruned_and_then_taught(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "c.json"
    plain, more = (
        {"method": "wanda", "repair": "none"},
        RecoverConfig(steps=3, batch=2, learning_rate=1e-2, held_out=0),
    )
    wanted = settings([Recipe("cut", plain), Recipe("taught", plain, recovery=more)], [0.5], 3, multiple=8)
    cut, taught = compare(model, wanted, CALIBRATION, TEXTS, path).rows
    assert "recovery" not in cut and taught["recovery"]["tokens"] == 3 * 2 * 16
    assert cut["widths"] == taught["widths"] and cut["perplexity"] != taught["perplexity"]
    other = settings([Recipe("taught", plain, recovery=replace(more, steps=4))], [0.5], 3, multiple=8)
    assert compare(model, wanted, CALIBRATION, TEXTS, path).found == 2
    assert compare(model, other, CALIBRATION, TEXTS, path).found == 0, "another recovery is another row"


def test_settings_are_recipes_by_keeps_by_seeds() -> None:
    made = rows("random", "wanda", keeps=(0.8, 0.5))
    assert [s.name for s in made] == [
        ("random", 0.8, 0),
        ("random", 0.8, 1),
        ("random", 0.5, 0),
        ("random", 0.5, 1),
        ("wanda", 0.8, 0),
        ("wanda", 0.5, 0),
    ]
    assert made[1].chosen() == PruneOptions.of(0.8, "random", "uniform:multiple=8", None, seed=1)
    combined = grid(["wanda", "obs"], ["none", "least-squares"], ["uniform"])
    assert len(combined) == len({r.label for r in combined}) == 4


@pytest.mark.parametrize(("layers", "protect"), [(32, (4, 2)), (30, (4, 2)), (12, (2, 1)), (3, (0, 0))])
def test_protected_layers_keep_their_share_of_the_depth(layers: int, protect: tuple[int, int]) -> None:
    (recipe,) = [r for r in PUBLISHED if r.protected]
    assert ALLOCATIONS.parse(recipe.fitted(layers, 8)["allocation"]) == Uniform(multiple=8, protect=protect)


@pytest.mark.parametrize("recipe", [*PUBLISHED, *OURS], ids=lambda r: r.label)
def test_every_setting_of_the_tables_runs(tiny: Callable[..., Any], recipe: Recipe) -> None:
    model = tiny("llama", num_hidden_layers=6)
    ids = torch.randint(3, 128, (12, 32), generator=torch.Generator().manual_seed(2))
    found = compare(model, settings([recipe], [2 / 3], 6, multiple=8, seeds=1), ids, TEXTS)
    assert "error" not in found.rows[0], found.rows[0]["error"]
    assert found.rows[0]["kept"] == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipes": []}, "settings must be some"),
        ({"recipes": [*OURS, *OURS]}, "labels that differ"),
        ({"keeps": []}, r"keep must be shares in \(0, 1\] that differ; got \[\]"),
        ({"keeps": [0.5, 0.5]}, "that differ"),
        ({"keeps": [1.5]}, r"got \[1.5\]"),
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
    ],
)
def test_bad_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**{"recipes": OURS, "keeps": [0.5], "layers": 3, **given})


def test_bad_calls(tiny: Callable[..., Any]) -> None:
    model, some = tiny("llama"), rows("wanda")
    with pytest.raises(InputError, match="rows must be some, each once"):
        compare(model, [], CALIBRATION, TEXTS)
    with pytest.raises(InputError, match="rows must be some, each once"):
        compare(model, some + some, CALIBRATION, TEXTS)
    with pytest.raises(InputError, match="evaluation must hold at least one text"):
        compare(model, some, CALIBRATION, {})
    with pytest.raises(InputError, match="b must have windows of at most 64 tokens"):
        compare(model, some, CALIBRATION, {"a": CALIBRATION, "b": torch.ones(1, 65, dtype=torch.int64)})


def test_killed_after_two_rows_it_goes_on(
    tiny: Callable[..., Any], tmp_path: Path, pruned: list[dict[str, Any]]
) -> None:
    model, path, wanted = tiny("llama"), tmp_path / "c.json", rows("wanda", "flap")
    whole = compare(model, wanted, CALIBRATION, TEXTS)
    assert len(pruned) == 4
    with pytest.raises(KeyboardInterrupt):
        compare(model, wanted, CALIBRATION, TEXTS, path, progress=stop_before(2))
    assert len(json.loads(path.read_text())["rows"]) == 2 and list(tmp_path.iterdir()) == [path]
    pruned.clear()
    resumed = compare(model, wanted, CALIBRATION, TEXTS, path)
    assert [c["method"] for c in pruned] == ["flap", "flap"] and resumed.found == 2
    assert list(map(plain, resumed.rows)) == list(map(plain, whole.rows)) and resumed.dense == whole.dense
    assert json.loads(path.read_text()) == resumed.to_json()
    pruned.clear()
    assert compare(model, wanted[:1], CALIBRATION, TEXTS, path).found == 1
    assert not pruned and len(json.loads(path.read_text())["rows"]) == 4, "rows that were not asked for are gone"


def test_only_the_same_measurement_is_skipped(
    tiny: Callable[..., Any], tmp_path: Path, pruned: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny("llama"), tmp_path / "c.json"
    compare(model, rows("wanda"), CALIBRATION, TEXTS, path)
    pruned.clear()
    assert compare(model, rows("wanda", sequential=False), CALIBRATION, TEXTS, path).found == 0
    versions = {**machine.versions(), "torch": "9.9"}
    monkeypatch.setattr(machine, "versions", lambda: versions)
    assert compare(model, rows("wanda", sequential=False), CALIBRATION, TEXTS, path).found == 0
    assert len(pruned) == 4 and len(json.loads(path.read_text())["rows"]) == 2


def test_a_failing_setting_is_a_row_and_is_tried_again(
    tiny: Callable[..., Any], tmp_path: Path, pruned: list[dict[str, Any]]
) -> None:
    """Biases that the format of the family does not have, and options that break a rule."""
    model, path = tiny("gemma"), tmp_path / "c.json"
    made = [*grid(["flap"], ["bias"], ["uniform"]), *grid(["wander", "wanda"], ["none"], ["uniform"])]
    wanted = settings(made, [0.5], 3, multiple=8)
    found = compare(model, wanted, CALIBRATION, TEXTS, path)
    bias, name, good = found.rows
    assert bias["error"]["kind"] == "UnsupportedModelError" and "bias" in bias["error"]["message"]
    assert name["error"]["kind"] == "InputError" and "nearest: wanda" in name["error"]["message"]
    assert good["kept"] == 0.5 and [line.label for line in comparison_lines(found.to_json(), "a")] == [good["label"]]
    pruned.clear()
    assert compare(model, wanted, CALIBRATION, TEXTS, path).found == 1
    assert [c["repair"] for c in pruned] == ["bias"]


def test_a_perplexity_that_is_no_number_is_an_error(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    (row,) = rows("wanda", keeps=(0.5,))

    def breaking(model: Any, *arguments: Any, **options: Any) -> Any:
        report = prune(model, *arguments, **options)
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        return report

    monkeypatch.setattr(recipes, "prune", breaking)
    error = compare(model, [row], CALIBRATION, TEXTS).rows[0]["error"]
    assert error["message"].startswith("model must give numbers for logits on this text")


def test_files_of_something_else_are_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, path, wanted = tiny("llama"), tmp_path / "c.json", rows("wanda", keeps=(0.5,))
    compare(model, wanted, CALIBRATION, TEXTS, path)
    content = path.read_text()
    with pytest.raises(InputError, match=r"model must be the one of .*c.json, or out another file; its fingerprint"):
        compare(tiny("llama", seed=1), wanted, CALIBRATION, TEXTS, path)
    with pytest.raises(InputError, match="its dtype is \"float32\"; got 'bfloat16'"):
        compare(tiny("llama").bfloat16(), wanted, CALIBRATION, TEXTS, path)
    with pytest.raises(InputError, match="calibration text must be the one of"):
        compare(model, wanted, CALIBRATION[:2], TEXTS, path)
    with pytest.raises(InputError, match="evaluation texts must be the one of"):
        compare(model, wanted, CALIBRATION, {"a": TEXTS["a"]}, path)
    assert path.read_text() == content
    for damaged in ("{", "[]", "{}", '{"format": 1}', content.replace('"format": 1', '"format": 2')):
        path.write_text(damaged)
        with pytest.raises(InputError, match="out must be a result of compare"):
            compare(model, wanted, CALIBRATION, TEXTS, path)
        assert path.read_text() == damaged


def _result(**perplexities: list[float]) -> dict[str, Any]:
    """A made-up result at 80, 70 and 50 % kept; labels that begin with `our` are ours."""
    made = [
        {
            "label": label.partition("_")[0],
            "group": "ours" if label.startswith("our") else "published",
            "keep": keep,
            "seed": int(label.partition("_")[2] or 0),
            "perplexity": {"a": value, "b": 100.0},
            "kept": keep + 0.002,
            "prune_seconds": 4.0,
            "source": {"commit": "c" * 40, "dirty": False, "date": "2026-11-21T10:37:35+00:00"},
        }
        for label, values in perplexities.items()
        for keep, value in zip((0.8, 0.7, 0.5), values, strict=True)
    ]
    facts = {"cpu": "a CPU", "torch_threads": 2, "gpu": None, "commit": "c" * 40, "dirty": False}
    facts |= {"versions": {"torch": "2.13"}, "date": "2026-11-21"}
    text = {"tokens": 64, "window": 16, "sha256": "0"}
    result = {"machine": facts, "model": "toy", "text": "valid", "calibration": text, "rows": made}
    result |= {"evaluation": {"a": text, "b": text}, "dense": {"a": 24.0, "b": 90.0}}
    return {**result, "goals": goals(result)}


def test_goals_by_hand() -> None:
    found = goals(_result(wanda=[32.0, 41.0, 90.0], flap=[33.0, 40.0, 80.0], ours=[28.0, 31.0, 40.5]))
    first, second = (goal for goal in found if goal["text"] == "a")
    assert [(g["published_keep"], g["our_keep"]) for g in (first, second)] == list(GOALS) == [(0.8, 0.7), (0.7, 0.5)]
    assert (first["published"]["label"], first["published"]["perplexity"]) == ("wanda", 32.0)
    assert (first["ours"]["perplexity"], first["met"]) == (31.0, True)
    assert (second["published"]["label"], second["ours"]["perplexity"], second["met"]) == ("flap", 40.5, False)
    assert [goal["met"] for goal in found if goal["text"] == "b"] == [True, True], "not worse is enough"
    lonely = goals(_result(wanda=[32.0, 41.0, 90.0]))
    assert [goal["met"] for goal in lonely] == [None] * 4 and lonely[0]["ours"] is None


def test_seeds_are_averaged() -> None:
    (line,) = comparison_lines(_result(random_0=[100.0, 1.0, 1.0], random_1=[140.0, 1.0, 1.0]), "a")
    point = line.points[0]
    assert (point.perplexity, point.lowest, point.highest, point.seeds) == (120.0, 100.0, 140.0, 2)
    assert [p.keep for p in line.points] == [0.8, 0.7, 0.5]


def test_names_do_not_overlap() -> None:
    assert apart([0.5, 0.2, 0.9], 0.1) == pytest.approx([0.5, 0.2, 0.9])
    assert apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert apart([0.52, 0.5, 0.9], 0.1) == pytest.approx([0.56, 0.46, 0.9])
    assert apart([0.5, 0.5, 0.5, 0.62], 0.1) == pytest.approx([0.38, 0.48, 0.58, 0.68])
    assert apart([], 0.1) == []


def test_figure_names_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "c.svg"
    result = _result(
        random=[140.0, 2780.0, 9e3], magnitude=[1e6, 2e6, 3e6], wanda=[32.0, 41.0, 90.0], ours=[28, 31, 40]
    )
    compare_figure(result, path)
    content = path.read_text()
    assert all(f">{name}<" in content for name in ("random", "magnitude", "wanda", "ours", "40%"))
    assert len(content) < 40_000 and "nan" not in content
    compare_figure(result, path)
    assert path.read_text() == content, "another picture at every run"
    with pytest.raises(InputError, match="result must have a row that was measured"):
        compare_figure({**result, "rows": []}, path)


def test_readme_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    tables = importlib.import_module("bench.tables.readme")
    result = _result(random_0=[100.0, 9.0, 9.0], random_1=[140.0, 9.0, 9.0], ours=[28.0, 31.0, 40.5])
    lines = tables.TABLES["compare"](result)
    assert "| random (2 seeds) | published | 120.00 (100.00 to 140.00) | 9.00 (9.00" in " ".join(lines).replace(
        "**", ""
    )
    assert any("ours at 30% removed" in line and "31.00" in line and "120.00" in line for line in lines)


def call(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(compare_verb)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(default_text()[:30_000])
    return path


SMALL = ("--tokens", 256, "--evaluation-tokens", 128, "--window", 64, "--keep", "0.7,0.5", "--multiple", 8)
GRID = ("--preset", "grid", "--criteria", "wanda,random", "--repair", "none", "--allocation", "uniform")


def test_the_verb(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "c.json", tmp_path / "c.svg"
    common = (tiny_checkpoint, "--text", text, "--out", out, *SMALL, *GRID)
    done = call(*common, "--seeds", 2, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    assert list(result["evaluation"]) == ["text.txt (second half)", "pydoc_data.topics (second half)"]
    assert (result["text"], result["model"]) == ("text.txt (first half)", "tiny-llama")
    assert [row["seed"] for row in result["rows"]] == [0, 0, 0, 1, 0, 1]
    one = call(*common, "--only", "wanda | none | uniform")
    assert one.exit_code == 0 and "2 rows, 2 of them measured before" in " ".join(one.stdout.split())
    again = call(*common, "--seeds", 2, "--figure", figure)
    assert again.exit_code == 0 and "6 of them measured before" in " ".join(again.stdout.split())
    assert "50% of the neurons removed" in again.stdout and figure.is_file()


def test_wrong_use_of_the_verb(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--preset", "publish"), "preset must be one of published, ours, grid; got 'publish'"),
        (("--preset", "ours", "--only", "FLAP"), "only must be one of pyprune, pyprune --best"),
        (("--preset", "grid", "--criteria", "wander"), "nearest: wanda"),
        (("--preset", "grid", "--repair", "none,none"), "repair must be names that differ"),
        (("--preset", "grid", "--allocation", "even"), "allocation must be one of"),
        (("--keep", "half"), "keep must be numbers"),
        (("--keep", "1.2"), "keep must be shares"),
        (("--figure", tmp_path / "x.png"), "figure must be an .svg file"),
        (("--also", text), "also must be other files than text"),
    ):
        done = call(tiny_checkpoint, "--text", text, "--out", tmp_path / "c.json", *options)
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output
    assert not (tmp_path / "c.json").exists()
