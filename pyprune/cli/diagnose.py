"""`pyprune diagnose`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor

from ..base.errors import InputError, check
from ..base.files import new_file
from ..base.memory import PeakMemory
from ..evaluation.diagnose import PARTS, Budget, check_parts, described
from ..evaluation.diagnose import diagnose as run_diagnosis
from ..evaluation.tasks.encoding import prompt_ids
from ..model import loading
from .options import (
    MODEL_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SeedOption,
    StartOption,
    TextOption,
    TokensOption,
    WindowOption,
    check_left_out,
    check_same_tokenizer,
    choose_device,
    text_windows,
)
from .screen import Bars, megabytes, show, table, verb

# Options that one part alone reads.
_OF_PARTS = {
    "drift": ("prompts", "prompt_tokens", "prompts_file", "new_tokens", "temperature"),
    "tasks": ("task", "items", "shots"),
}
_SPACES = (("embedding", "hidden states"), ("logits", "logits"), ("probabilities", "probabilities"))


def _prompts(tokenizer: Any, file: Path | None) -> list[Tensor] | None:
    """Token ids of every line that is not empty."""
    if file is None:
        return None
    check(file.is_file(), "prompts_file", "be an existing file", str(file))
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"prompts_file must be UTF-8; {file} is not ({error})") from error
    check(bool(lines), "prompts_file", "have a line that is not empty", str(file))
    return [torch.tensor(prompt_ids(tokenizer, line), dtype=torch.int64) for line in lines]


def _number(found: dict[str, Any], pattern: str = "{:.3g}") -> str:
    """A mean with its interval."""
    if found["mean"] is None:
        return "-"
    if not found.get("interval"):
        return pattern.format(found["mean"])
    low, high = (pattern.format(value) for value in found["interval"])
    return f"{pattern.format(found['mean'])} ({low} to {high})"


def _hierarchy_tables(found: dict[str, Any]) -> Iterator[Any]:
    rows = [
        (name, _number(found[key]["cosine"]), _number(found[key].get("angle", {"mean": None}))) for key, name in _SPACES
    ]
    yield table(
        "where it differs: 1 - cos against dense, teacher-forced", ("space", ">1 - cos", ">angle, degrees"), rows
    )
    p = found["probabilities"]
    ratio = found["amplification"]
    if ratio["exact"] is not None:
        yield (
            f"from logits to probabilities 1 - cos grows {ratio['exact']:.2g} times (median; to second order "
            f"{ratio['estimate']:.2g}); KL {_number(p['kl'])} nats, total variation {_number(p['total_variation'])}, "
            f"same likeliest token {_number(p['top1'], '{:.1%}')}"
        )
    kept = [layer for layer in found["layers"] if layer["kept"]]
    worst = sorted(kept, key=lambda layer: -(layer["ffn_alone"]["cosine"]["mean"] or 0))[:5]
    rows = [
        (layer["layer"], *(_number(layer[space]["cosine"]) for space in ("ffn_alone", "hidden_alone", "hidden")))
        for layer in worst
    ]
    columns = (">layer", ">FFN alone", ">layer alone", ">hidden state, all before it pruned too")
    yield table("layers whose FFN differs most: 1 - cos", columns, rows)


def _drift_tables(found: dict[str, Any]) -> Iterator[Any]:
    rows = []
    for name, drift in found.items():
        half = drift["median_divergence"]
        rows.append(
            (
                name,
                "never" if half is None else f"token {half}",
                _number(drift["instantaneous"]["probabilities"]),
                _number(drift["exposure"]["probabilities"]),
                _number(drift["accumulated"]["probabilities"]),
                _number(drift["agreement"]["overlap2"], "{:.1%}"),
                f"{drift['dense']['repetition']:.1%} / {drift['pruned']['repetition']:.1%}",
            )
        )
    columns = (
        "text",
        ">half have parted",
        ">1 - cos on dense's text",
        ">more, both on its own",
        ">more, each on its own",
        ">bigrams shared",
        ">repeated: dense / pruned",
    )
    yield table("generation from the same prompts", columns, rows)


def _task_tables(found: dict[str, Any]) -> Iterator[Any]:
    rows = []
    for task in found["tasks"]:
        main = task["metrics"][task["main"]]
        rows.append((escape(task["name"]), task["kind"], task["items"], *_task_cells(main)))
    for one in found["skipped"]:
        yield f"[yellow]no task:[/] {escape(one['name'])}: {escape(one['reason'])}"
    yield table(
        "tasks", ("task", "kind", ">items", ">dense", ">pruned", ">lost", ">of what was above chance, kept"), rows
    )


def _task_cells(metric: dict[str, Any]) -> tuple[str, ...]:
    def cell(entry: dict[str, Any] | None) -> str:
        return "-" if entry is None else _number({"mean": entry["value"], **entry}, "{:.1%}")

    return tuple(cell(metric.get(name)) for name in ("dense", "pruned", "difference", "retained"))


def tables(facts: dict[str, Any]) -> Iterator[Any]:
    """What `pyprune diagnose` shows of its facts."""
    if "hierarchy" in facts:
        both = facts["hierarchy"]["perplexity"]
        yield f"token perplexity on {escape(facts['text'])}: dense {both['dense']:.2f}, pruned {both['pruned']:.2f}"
        yield from _hierarchy_tables(facts["hierarchy"])
    if "drift" in facts:
        yield from _drift_tables(facts["drift"])
    if "tasks" in facts:
        yield from _task_tables(facts["tasks"])


@verb
def diagnose(
    context: typer.Context,
    dense: Annotated[str, typer.Argument(help=f"The dense model. {MODEL_HELP}", metavar="DENSE", show_default=False)],
    pruned: Annotated[
        str, typer.Argument(help=f"The pruned model. {MODEL_HELP}", metavar="PRUNED", show_default=False)
    ],
    text: TextOption = None,
    tokens: TokensOption = 4096,
    window: WindowOption = 256,
    start_token: StartOption = "auto",
    parts: Annotated[str, typer.Option(help="What to look at, by commas.")] = ",".join(PARTS),
    prompts: Annotated[int, typer.Option(help="Continuations, from all over the text.")] = Budget.prompts,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = Budget.prompt_tokens,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Continue the lines of this file instead.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a continuation at most.")] = Budget.new_tokens,
    temperature: Annotated[float, typer.Option(help="Of the sampled continuations.")] = Budget.temperature,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="A task file (JSON lines); repeat for more. Default: four that ship.", show_default=False),
    ] = None,
    items: Annotated[int, typer.Option(help="Of each task at most; 0 for all.")] = 100,
    shots: Annotated[
        int, typer.Option(help="Solved examples in front of questions answered by letter or word.")
    ] = Budget.shots,
    out: Annotated[Path | None, typer.Option("--out", help="Write all facts to this JSON file.")] = None,
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What a pruned model lost and where: in its layers, logits and probabilities, in its text, and by type of task."""
    budget = Budget(prompts, prompt_tokens, new_tokens, temperature, items or None, shots)
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    check_parts(chosen)
    if prompts_file is not None:
        check_left_out(context, "be left out with --prompts-file", "prompts", "prompt_tokens")
    for part, of_it in _OF_PARTS.items():
        if part not in chosen:
            check_left_out(context, f"be left out where --parts lacks {part}", *of_it)
    check(out is None or not out.is_dir(), "out", "be a file", str(out))
    place = choose_device(device)
    tokenizer = loading.load_tokenizer(dense)
    check_same_tokenizer(tokenizer, loading.load_tokenizer(pruned), "pruned")
    windows, name = text_windows(tokenizer, text, "second", tokens, window, start_token)
    starts = _prompts(tokenizer, prompts_file)
    with PeakMemory() as memory, Bars() as bars:
        models = [loading.load_model(path, dtype, place) for path in (dense, pruned)]
        a, b = models
        found = run_diagnosis(a, b, tokenizer, windows, budget, starts, task, chosen, seed, bars)
    paths = {"dense": dense, "pruned": pruned}
    names = {key: path if path == loading.DEMO else Path(path).name for key, path in paths.items()}
    size = sum(p.numel() * p.element_size() for p in a.parameters())
    facts = {
        **described(found, a, b, names, name, windows, dtype),
        "memory": {"model_bytes": size, "peak_bytes": memory.growth},
    }
    if out is not None:
        with new_file(out) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    seconds = sum(facts["seconds"].values())
    show(
        facts,
        as_json,
        *tables(facts),
        f"{seconds:.0f} s; memory grew by {megabytes(memory.growth)}, {memory.growth / size:.2f} times the dense model"
        + (f"; wrote {escape(str(out))}" if out is not None else ""),
    )
