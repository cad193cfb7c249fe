"""`pyprune compare`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ..base.errors import InputError, check, check_choice
from ..evaluation.comparison import STAGE
from ..evaluation.comparison import compare as compare_settings
from ..evaluation.domains import Tasks, domain_windows, read_material
from ..evaluation.domains.suite import NEW_TOKENS
from ..evaluation.recipes import OURS, PUBLISHED, Recipe, grid, settings
from ..evaluation.summary import comparison_lines, judged_texts
from ..model import loading
from ..pruning import importance
from ..pruning.allocation import ALLOCATIONS
from ..pruning.mixture import lessons, mix, unread
from ..pruning.repair import REPAIRS
from ..report.figures import compare_figure
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    StartOption,
    TextOption,
    TokensOption,
    WindowOption,
    check_left_out,
    check_sources,
    choose_device,
    text_windows,
)
from .screen import err, show, table, verb
from .suite import DataOption, ItemsOption, NewTokensOption

PRESETS = ("published", "ours", "grid")
DEFAULT = "default"
# Column -> where a row has it.
_TASKS = {"PIQA": ("piqa", "accuracy_byte"), "repeats": ("generation", "repetition")}


class _RowBars:
    """One bar for the rows, and one for what goes on in the row; a `progress.Progress` callback."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=err)
        self._rows = self._progress.add_task(STAGE, total=None)
        self._inner = self._progress.add_task("", total=None)
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == STAGE:
            self._progress.update(self._rows, completed=done, total=total)
            return
        if stage != self._stage or done == 0:
            self._stage = stage
            self._progress.reset(self._inner, description=stage)
        self._progress.update(self._inner, completed=done, total=total)

    def __enter__(self) -> _RowBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError as error:
        raise InputError(f"keep must be numbers separated by commas; got {text!r}") from error


def _recipes(presets: str, criteria: str, repair: str, allocation: str, only: list[str]) -> list[Recipe]:
    chosen = {"preset": _words(presets), "criteria": _words(criteria)}
    for (name, words), known in zip(chosen.items(), (PRESETS, importance.names()), strict=True):
        check(0 < len(words) == len(set(words)), name, "be names that differ, separated by commas", ",".join(words))
        for word in words:
            check_choice(word, name, known)
    repairs, allocations = ([str(o) for o in r.parse_all(t)] for r, t in ((REPAIRS, repair), (ALLOCATIONS, allocation)))
    of = {
        "published": PUBLISHED,
        "ours": OURS,
        "grid": grid(chosen["criteria"], repairs, allocations),
    }
    found = [recipe for name in chosen["preset"] for recipe in of[name]]
    for label in only:
        check_choice(label, "only", [recipe.label for recipe in found])
    return [recipe for recipe in found if not only or recipe.label in only]


def _evaluation(
    tokenizer: Any, text: str | None, also: list[str], tokens: int, window: int, start: str
) -> dict[str, Tensor]:
    """The second half of `text`, then each of `also`, by name."""
    evaluation: dict[str, Tensor] = {}
    for path in [text and f"{text}:second", *(None if path == DEFAULT else path for path in also)]:
        windows, name = text_windows(tokenizer, path, "second", tokens, window, start)
        twice = name in evaluation and path is not None
        check(not twice, "also", "be texts with names that differ", name)
        evaluation[name] = windows
    return evaluation


def _answered(result: dict[str, Any]) -> dict[tuple[str, float], tuple[str, ...]]:
    """Of a suite's tasks by label and share kept: PIQA by bytes, and repeated 4-grams; means over seeds."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if "error" not in row:
            found.setdefault((row["label"], row["keep"]), []).append(row)
    paths = [path for path in _TASKS.values() if path[0] in result.get("dense_tasks", {})]
    return {name: tuple(_mean(rows, *path) for path in paths) for name, rows in found.items()}


def _mean(rows: list[dict[str, Any]], task: str, key: str) -> str:
    return f"{fmean(row[task][key]['value'] for row in rows):.1%}"


def _tables(result: dict[str, Any]) -> list[Table | str]:
    """Settings by perplexity on the first text, one table for each share kept; then what failed, and the goals."""
    first, *others = judged_texts(result)
    tasks, asked = _answered(result), result.get("dense_tasks", {})
    titles = [f">{title}" for title, (task, _) in _TASKS.items() if task in asked]
    lines = comparison_lines(result, first)
    elsewhere = {
        (name, line.label, point.keep): f"{point.perplexity:.2f}"
        for name in others
        for line in comparison_lines(result, name)
        for point in line.points
    }
    columns = (
        "setting",
        "group",
        *(f">{escape(name)}" for name in (first, *others)),
        *titles,
        ">kept",
        ">pruning took",
    )
    shown: list[Table | str] = []
    for keep in sorted({p.keep for line in lines for p in line.points}, reverse=True):
        here = [(p.perplexity, line, p) for line in lines for p in line.points if p.keep == keep]
        rows = []
        for _, line, p in sorted(here, key=lambda entry: entry[0]):
            spread = f" ({p.lowest:.2f} to {p.highest:.2f})" if p.seeds > 1 else ""
            beside = [elsewhere[name, line.label, keep] for name in others]
            beside += tasks[line.label, keep]
            cells = (escape(line.label), line.group, f"{p.perplexity:.2f}{spread}", *beside, f"{p.kept:.1%}")
            rows.append((*cells, f"{p.seconds:.0f} s"))
        shown.append(table(f"{1 - keep:.0%} of the neurons removed: token perplexity", columns, rows))
    failed = [(row, escape(row["error"]["message"])) for row in result["rows"] if "error" in row]
    shown += [f"[yellow]no row:[/] {escape(row['label'])} at {row['keep']}: {message}" for row, message in failed]
    return shown + [_goal(goal) for goal in result["goals"] if goal["met"] is not None]


def _goal(goal: dict[str, Any]) -> str:
    ours, published = goal["ours"], goal["published"]
    each = f"; not worse on {goal['domains_met']} of {goal['domains']} by itself" if "domains" in goal else ""
    return escape(
        f"{goal['text']}: {ours['label']} at {1 - goal['our_keep']:.0%} removed {ours['perplexity']:.2f}, "
        f"best published ({published['label']}) at {1 - goal['published_keep']:.0%} {published['perplexity']:.2f}: "
        f"{'not worse' if goal['met'] else 'worse'}{each}"
    )


@verb
def compare(
    context: typer.Context,
    model: ModelArgument,
    text: TextOption = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Calibration text, SOURCE or SOURCE@WEIGHT as for prune; repeat to mix. Default: the first half of "
            "--text where that is given, else self and builtin.",
            show_default=False,
        ),
    ] = None,
    start_token: StartOption = "auto",
    also: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A further evaluation text; repeat for more. '{DEFAULT}' is CPython's prose, which is taken if none "
            "is given.",
            show_default=False,
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--suite", help="Evaluate on six domains, PIQA and 32 prompts, in place of --text and --also."),
    ] = False,
    data: DataOption = None,
    items: ItemsOption = None,
    new_tokens: NewTokensOption = None,
    keep: Annotated[str, typer.Option(help="Shares of neurons that stay.")] = "0.8,0.7,0.5",
    preset: Annotated[
        str,
        typer.Option(
            help=f"Any of {', '.join(PRESETS)}: methods as published, what pyprune recommends, every combination of "
            "the next three options."
        ),
    ] = "published,ours",
    criteria: Annotated[str, typer.Option(help="Of the grid.")] = "wanda,obs",
    repair: Annotated[
        str, typer.Option(help=f"Of the grid, one or more of {', '.join(REPAIRS.names())}; with keys as for prune.")
    ] = "none,least-squares",
    allocation: Annotated[
        str, typer.Option(help=f"Of the grid, one or more of {', '.join(ALLOCATIONS.names())}; as above.")
    ] = "uniform,sensitivity",
    only: Annotated[
        list[str] | None, typer.Option(help="A setting of these presets by name; repeat for more.", show_default=False)
    ] = None,
    multiple: Annotated[int, typer.Option(help="Round widths to multiples of this many neurons.")] = 16,
    seeds: Annotated[int, typer.Option(help="Runs of the random method.")] = 3,
    tokens: TokensOption = 16384,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of each evaluation text at most; 0 for all.")] = 16384,
    window: WindowOption = 1024,
    out: Annotated[
        Path, typer.Option("--out", help="The JSON file; rows that it has already are not measured again.")
    ] = Path("compare.json"),
    figure: Annotated[Path | None, typer.Option(help="Also draw this SVG file.", show_default=False)] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL in many ways and measure each on the same texts; stopped, it goes on where it was.

    The first half of --text calibrates unless --calibrate says otherwise, its second half and every --also evaluate.
    With --suite, --evaluation-tokens are those of each domain.
    """
    if "grid" not in _words(preset):
        check_left_out(context, "be left out unless --preset has grid", "criteria", "repair", "allocation")
    keeps = _shares(keep)
    recipes = _recipes(preset, criteria, repair, allocation, only or [])
    settings(recipes, keeps, 1, multiple, seeds)  # complains before a long load
    check(text is None or text not in (also or []), "also", "be other files than text, half of which calibrates", also)
    if whole:
        check_left_out(context, "be left out with --suite, which has its own texts", "also")
    material = read_material(data, items or 0) if whole else None
    if not whole:
        check_left_out(context, "be given with --suite only", "data", "items", "new_tokens")
    check(figure is None or figure.suffix == ".svg", "figure", "be an .svg file", str(figure))
    place = choose_device(device)
    tokenizer = loading.load_tokenizer(model)
    sources = check_sources(calibrate or ([f"{text}:first"] if text else None), tokens, window, start_token)
    tasks = None
    if material is not None:
        evaluation = domain_windows(tokenizer, material.domains, evaluation_tokens, window, start_token)
        tasks = Tasks(tokenizer, material.questions, NEW_TOKENS if new_tokens is None else new_tokens)
    else:
        evaluation = _evaluation(tokenizer, text, also or [DEFAULT], evaluation_tokens, window, start_token)
    loaded = loading.load_model(model, dtype, place)
    rows = settings(recipes, keeps, loaded.config.num_hidden_layers, multiple, seeds)
    facts: dict[str, Any] = {"model": model if model == loading.DEMO else Path(model).name}
    with _RowBars() as bars:
        calibration = mix(sources, loaded, tokenizer, tokens, window, start=start_token, progress=bars)
        facts |= {"text": calibration.name, "sources": calibration.facts()}
        taught = None
        if any(row.recovery for row in rows) and not (calibrate or text):
            size: dict[str, Any] = {"start": start_token, "seed": unread(0)}
            taught = mix(lessons(tokenizer), loaded, tokenizer, tokens, window, **size, progress=bars)
        comparison = compare_settings(
            loaded, rows, calibration, evaluation, out, lessons=taught, tasks=tasks, facts=facts, progress=bars
        )
    result = comparison.to_json()
    if figure is not None:
        compare_figure(result, figure)
    dense = ", ".join(f"{value:.2f} on {name}" for name, value in comparison.dense.items())
    show(
        result,
        as_json,
        *_tables(result),
        escape(f"dense {dense}; calibrated on {calibration.ids.numel()} tokens of {calibration.name}"),
        escape(f"{len(rows)} rows, {comparison.found} of them measured before; written to {out}"),
    )
