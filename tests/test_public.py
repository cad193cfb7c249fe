"""The public face: what `import pyprune` gives, examples that run, and texts whose links and lengths hold."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import FAMILIES

import pyprune
from pyprune.cli.commands import app
from pyprune.pruning.nested import prune_nested

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("examples/**/*.md")]
BLOCKS = [
    pytest.param(block, id=f"{file.name}-{number}")
    for file in TEXTS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", file.read_text("utf-8"), re.M | re.S))
]

# Files that commands make, and that are not committed.
MADE = ("bench/results/gpu.json", "pyprune/native.json")


def _plain(name: str) -> bool:
    """Whether a public name is neither an error nor an option, whose examples are those of `prune`."""
    thing = getattr(pyprune, name)
    errors = inspect.isclass(thing) and issubclass(thing, Exception)
    return not errors and not hasattr(thing, "NAME")


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The public names in an empty folder, where `demo` is a tiny model, and `nested` one made from it."""
    load = pyprune.load

    def small(model: str, *args: Any, **kwargs: Any) -> Any:
        if model == "nested":
            made, tokenizer = load(str(tiny_checkpoint))
            prune_nested(made, shares=[0.5], tokenizer=tokenizer)
            pyprune.save(made, "nested", tokenizer)
        return load(str(tiny_checkpoint) if model == "demo" else model, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyprune.pruning.text.TOKENS", 2048)
    monkeypatch.setattr(pyprune, "load", small)
    yield {"Path": Path, **{name: getattr(pyprune, name) for name in pyprune.__all__}}


def _run(text: str, name: str, names: dict[str, Any]) -> None:
    example = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not said, "".join(said)


DOCUMENTED = {"pyprune": pyprune, **{name: getattr(pyprune, name) for name in filter(_plain, pyprune.__all__)}}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_of_every_docstring(name: str, public: dict[str, Any]) -> None:
    _run(inspect.getdoc(DOCUMENTED[name]) or "", name, public)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_python_of_every_text(block: str, public: dict[str, Any]) -> None:
    exec(compile(block, "text", "exec"), {})


def test_there_is_python_in_readme() -> None:
    assert any("README" in str(block.id) for block in BLOCKS)


def test_public_names() -> None:
    errors = {"BackendError", "CheckpointError", "InputError", "PypruneError", "UnsupportedModelError"}
    verbs = {"load", "save", "prune", "prune_blocks", "prune_checkpoint", "prune_experts", "accelerate", "set_width"}
    options = {"Uniform", "Global", "Sensitivity", "Predicted", "Latency", "MeanBias", "LeastSquares", "Refit"}
    assert set(pyprune.__all__) == errors | verbs | options | {"PrunedMLP", "PrunedMoE", "Mask", "KeepIndex"}
    assert all(inspect.getdoc(getattr(pyprune, name)) for name in pyprune.__all__)


def test_readme_is_one_screen_and_links() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    first = lines[:20]
    assert all(
        any(word in line for line in first) for word in ("make demo", "make test", "make style", "pyprune.prune(")
    )


def test_readme_counts_the_families_that_are_tested() -> None:
    said = re.search(r"(\d+) model types are tested", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said and int(said[1]) == len(FAMILIES)


def _anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), f"{file.name}: {target}"
        assert there.is_relative_to(ROOT), f"{file.name}: {target} leads out of the repository"
        if anchor:
            assert anchor in _anchors(there.read_text(encoding="utf-8")), f"{file.name}: {target}"


def test_every_page_is_linked_from_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    others = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8") + text
    assert [page.name for page in ROOT.glob("docs/*.md") if f"docs/{page.name}" not in others] == []


def test_every_path_that_a_page_names_exists() -> None:
    """Files of the repository between backticks: `pyprune/...`, `csrc/...`, `bench/...`, `tests/...`."""
    named = re.compile(r"`((?:pyprune|csrc|bench|tests|triton_kernels|examples|docs)/[\w./-]*[\w/])`")
    gone = {
        f"{file.name}: {path}"
        for file in TEXTS
        for path in named.findall(file.read_text(encoding="utf-8"))
        if not (ROOT / path).exists() and path not in MADE and not re.search("[A-Z]{4}", path)
    }
    assert not gone


def test_cli_page_names_every_verb() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    verbs: Any = typer.main.get_command(app)
    assert set(verbs.commands) == set(re.findall(r"^    pyprune ([\w-]+)", page, re.M))
