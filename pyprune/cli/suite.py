"""`pyprune eval MODEL --suite`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..base import machine
from ..base.errors import InputError
from ..evaluation.domains import Suite, read_material, suite
from ..evaluation.domains.suite import NEW_TOKENS
from ..model import loading
from ..report.words import Format, estimate, model_name, short, times
from .options import check_same_tokenizer
from .screen import Bars, show, table

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="With --suite: a folder with wikitext-2/valid.txt, e2e-nlg/testset_w_refs.csv, gsm8k/test.jsonl, "
        "webtext/wine.txt and piqa/valid.jsonl with valid-labels.lst. Without, only what CPython carries is measured.",
        show_default=False,
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="With --suite: the dense MODEL, or a .json file with its result, to compare with.",
        show_default=False,
    ),
]
ItemsOption = Annotated[
    int | None, typer.Option("--items", help="With --suite: questions of PIQA at most.", show_default="all")
]
NewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--new-tokens",
        help="With --suite: tokens to write at each prompt; 0 for no writing.",
        show_default=str(NEW_TOKENS),
    ),
]


def _reference(path: str) -> Suite:
    """An earlier result of the dense model, in a file."""
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"against must be a model, or JSON of the suite; {path} is not JSON ({error})") from error
    return Suite.of(facts, "against")


def judge(
    model: str,
    load: Callable[[str, bool], Any],
    data: Path | None,
    against: str | None,
    tokens: int,
    window: int,
    start: str,
    items: int,
    new_tokens: int,
    as_json: bool,
) -> None:
    """Measure a model, and the dense one unless a file has its numbers, and show them.

    Args:
        model: its name.
        load: gives the model of a name; True: for the dense one.
        against: the dense model, or a `.json` file with its result; None for neither.
        data, tokens, window, start, items, new_tokens: as for `evaluation.domains.suite`.
    """
    material = read_material(data, items)  # complains before a long load
    file = against is not None and against.endswith(".json") and Path(against).is_file()
    reference = _reference(str(against)) if file else None
    tokenizer = loading.load_tokenizer(model)
    dense = None
    if against is not None and not file:
        check_same_tokenizer(loading.load_tokenizer(against), tokenizer, "against")
        dense = load(against, True)
    options: dict[str, Any] = {"tokens": tokens, "window": window, "start": start, "new_tokens": new_tokens}
    with Bars() as bars:
        own = load(model, False)
        found = suite(own, tokenizer, material, dense=dense, reference=reference, **options, progress=bars)
    facts = {"model": model, "dense": against, "machine": machine.facts(), **found.to_json()}
    show(facts, as_json, *tables(facts))


def _cells(found: dict[str, Any] | None, form: Format) -> tuple[str, str]:
    """A value, and its interval."""
    if found is None or found.get("value") is None:
        return "-", ""
    low, high = found.get("interval") or (None, None)
    return form(found["value"]), "" if low is None or high is None else f"{form(low)}-{form(high)}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def tables(facts: dict[str, Any]) -> list[Table | str]:
    """A suite's JSON values as one table, and what could not be measured."""
    against, text = facts["against"], facts["generation"]
    dense = against["dense"] if against else {"domains": {}, "perplexity": None, "generation": None}
    ratios, tasks = (against[key] or {} if against else {} for key in ("ratios", "piqa"))
    rows: list[tuple[str, ...]] = []

    def add(what: str, mine: Any, theirs: Any, compared: Any, form: Format = short, ratio: Format = times) -> None:
        beside = (_cells(theirs, form)[0], *_cells(compared, ratio)) if against else ()
        rows.append((what, *_cells(mine, form), *beside))

    for name, found in facts["domains"].items():
        add(name, found, dense["domains"].get(name), ratios.get(name))
    add("geometric mean", facts["perplexity"], dense["perplexity"], against and against["ratio"])
    for key, name in (("accuracy", "PIQA"), ("accuracy_byte", "PIQA, by bytes")):
        if facts["piqa"] is not None:
            metric = tasks.get(key) or {"dense": None, "retained": None}
            add(name, facts["piqa"][key], metric["dense"], metric["retained"], _share, _share)
    if text is not None:
        other = dense["generation"] or {"repetition": None, "distinct2": None, "perplexity": None}
        add("repeated 4-grams", text["repetition"], other["repetition"], None, _share)
        for key, name, form in (
            ("distinct2", "distinct bigrams", _share),
            ("perplexity", "its texts, perplexity", short),
        ):
            add(name, {"value": text[key]}, {"value": other[key]}, None, form)
    beside = (">dense", ">ratio", ">95 %") if against else ()
    title = f"{escape(model_name(facts['model']))}: token perplexity by domain, and tasks"
    shown: list[Table | str] = [table(title, ("what", ">model", ">95 %", *beside), rows)]
    if against:
        worst = estimate(against["worst"], times)
        told = "; of PIQA, the ratio is of what is above chance" if tasks else ""
        shown.append(f"worst domain {against['worst']['domain']}: {worst} of dense{told}")
    if facts["missing"]:
        shown.append(f"not measured, for want of --data: {', '.join(facts['missing'])}, PIQA")
    return shown
