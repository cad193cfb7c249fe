"""Facts that a report refuses, each with one line that names the file and the place; and odd ones that it draws."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_cases as cases

from pyprune import report
from pyprune.base.errors import InputError
from pyprune.report import parts
from pyprune.report.facts import KINDS
from pyprune.report.traced import Trail, below


@pytest.fixture(autouse=True)
def _not_drawn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Figures take a tenth of a second each: only tests that look at them draw them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(parts, "draw", cases.undrawn)


@pytest.fixture
def drawn() -> None:
    """The test looks at figures."""


DAMAGED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "results.json must be JSON in UTF-8; Expecting property name"),
    "a list": ("[]", "results.json: must be an object; got []"),
    "NaN": ('{"model": NaN}', "results.json must be JSON in UTF-8; NaN is no JSON number"),
    "deep": ("[" * 100_000, "results.json must be JSON in UTF-8"),
    "long": ('{"keep": 1' + "0" * 40 + "}", "results.json must be JSON in UTF-8; an integer of 41 digits is too long"),
    "empty": ("{}", "results.json: must have model, keep, evaluation, prune, dense, pruned, bench; got nothing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match="^" + re.escape(message)):
        report.build(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes('{"a": "ü"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"bench.json must be JSON in UTF-8; .*decode"):
        report.build(tmp_path)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in items:
        yield from _paths(entry, (*path, key))


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = _with(copied[path[0]], path[1:], new)
    return copied


def _place(name: str, path: tuple[Any, ...]) -> str:
    place = f"{name}:"
    for key in path:
        place = f"{place}[{key}]" if isinstance(key, int) else below(place, key)
    return place


@pytest.mark.parametrize("name", KINDS)
def test_any_value_may_be_wrong_and_is_named_or_harmless(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places of every file in turn hold something else: a named error or a page, never a traceback."""
    content = cases.FILES[name]()
    (tmp_path / name).write_text(json.dumps(content))
    read, at = set(), Trail.at
    monkeypatch.setattr(Trail, "at", lambda self, place, value: (read.add(place), at(self, place, value))[1])
    report.build(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(parts, "draw", cases.undrawn)
    # What the page does not read may be anything.
    every = [path for path in _paths(content) if not path or _place(name, path) in read]
    places = every[:: 1 + len(every) // 120]
    refusals = 0
    for i, path in enumerate(places):
        (tmp_path / name).write_text(json.dumps(_with(content, path, (None, "x", -1, [], {}, True, 1e300)[i % 7])))
        try:
            report.build(tmp_path)
        except InputError as error:
            refusals += 1
            assert str(error).startswith(name), path
    assert refusals > len(places) / 3


@pytest.mark.parametrize("number", [-1, 1e300])
def test_numbers_that_nobody_expects_can_be_drawn(number: float, tmp_path: Path, drawn: None) -> None:
    counts = {"layer", "neurons", "dead", "count", "step", "items", "facts", "windows", "window", "tokens", "prompts"}
    counts |= {"new_tokens", "highest", "median_divergence", "seed", "machine", "perplexity", "memory", "parameters"}

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: entry if key in counts else replaced(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [replaced(entry) for entry in value]
        return number if isinstance(value, int | float) and not isinstance(value, bool) else value

    found = {name: replaced(make()) for name, make in (("diagnose", cases.diagnose), ("redundancy", cases.redundancy))}
    for part in ("budget", "tasks"):
        found["diagnose"][part] = cases.diagnose()[part]
    page = report.build(cases.fill(tmp_path, **found))
    assert len(cases.captions(page)) == page.count("</svg>") == 17


def test_what_no_figure_can_use_is_named(tmp_path: Path) -> None:
    place = ("hierarchy", "layers", 1, "ffn", "cosine", "mean")
    for path, new, message in (
        (place, "far", "hierarchy.layers[1].ffn.cosine.mean must be what this version of pyprune writes; got 'far' (T"),
        (("drift", "greedy", "survival"), [], "drift.greedy.survival must have an entry -1; got 0"),
        (("tasks", "tasks", 0, "main"), "none", "tasks.tasks[0].metrics must have none; got accuracy_token"),
        (("parameters", "dense"), 0, "parameters.dense must be what this version of pyprune writes; got 0 (ZeroDiv"),
    ):
        cases.fill(tmp_path, diagnose=_with(cases.diagnose(), path, new))
        with pytest.raises(InputError, match="^" + re.escape(f"diagnose.json: {message}")):
            report.build(tmp_path)
    cases.fill(tmp_path, diagnose=cases.diagnose(), compare={**cases.compare(), "format": 2})
    with pytest.raises(InputError, match=re.escape("compare.json: format must be 1, which this version reads; got 2")):
        report.build(tmp_path)
    (tmp_path / "compare.json").unlink()
    cases.fill(
        tmp_path, bench=_with(cases.bench(), ("models", "pruned", "decode"), {"8": cases._timed(1, 1, tokens_per_s=1)})
    )
    with pytest.raises(InputError, match=re.escape("bench.json: models.pruned.decode must have 1; got 8")):
        report.build(tmp_path)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder must be an existing folder; got .*nowhere"):
        report.build(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match=r"folder must hold at least one of results.json, diagnose.json, .* has none of them"
    ):
        report.build(tmp_path)
