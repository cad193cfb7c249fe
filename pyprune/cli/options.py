"""Options that several verbs of the command line share, and what they mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from torch import Tensor

from ..base.errors import InputError, PypruneError, check, check_choice
from ..base.ranks import local_device
from ..base.text import load_text
from ..base.windows import STARTS, check_size, token_windows
from ..ffn.quantisation import WEIGHTS
from ..model import loading
from ..pruning import mixture
from .screen import err

MODEL_HELP = "A local folder, a hub name, a GGUF file, or 'demo' (SmolLM2-135M-Instruct)."
ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help=f"Of the weights: {', '.join(loading.DTYPES)}.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help=f"Run MODEL's FFNs by PrunedMLP, with their weights kept in {', '.join(WEIGHTS)}.",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: cuda where there is one.")]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="UTF-8 text or .jsonl with a 'text' field; append :first or :second for half of it. "
        "Default: prose that CPython carries, one half to calibrate, the other to evaluate.",
        show_default=False,
    ),
]
SourcesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="Calibration text, SOURCE or SOURCE@WEIGHT; give several to mix them. A source is a file (UTF-8 text, or "
        ".jsonl with 'text', 'messages' or an instruction and its answer; append :first or :second for half of it), "
        "'self' (what the model writes itself) or 'builtin' (prose and code that CPython carries). "
        "Default: self@3 and builtin.",
        show_default=False,
    ),
]
StartOption = Annotated[
    str,
    typer.Option(
        "--start-token",
        help="Windows begin with the start token: auto, as the tokenizer begins a text; always; never.",
    ),
]
TokensOption = Annotated[int, typer.Option("--tokens", help="Tokens of text to use at most; 0 for all.")]
WindowOption = Annotated[int, typer.Option("--window", help="Tokens in a window; windows do not overlap.")]
WidthOption = Annotated[
    float | None,
    typer.Option(
        "--width",
        help="Run this share of the neurons of a nested checkpoint (`prune --nested`), in (0, 1], by PrunedMLP.",
        show_default=False,
    ),
]
ShardOption = Annotated[
    str,
    typer.Option(
        "--max-shard-size", help="Bytes of one file of weights at most, like 5GB or 500MB; more makes several."
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of everything random.")]


def check_left_out(context: typer.Context, rule: str, *names: str) -> None:
    """Raise `InputError` for an option among `names` that was given, with any value: it would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        value = context.params[name]
        shown = str(value) if isinstance(value, Path) else value
        check(source is None or source.name != "COMMANDLINE", name, rule, shown)


def choose_device(name: str) -> str:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    check_choice(chosen.partition(":")[0], "device", ("cpu", "cuda"))
    if chosen.startswith("cuda"):
        check(torch.cuda.is_available(), "device", "be cpu, for torch sees no CUDA device here", name)
    return local_device(chosen)


def as_text(word: str, argument: str) -> str:
    """An argument that is text, not a name of a file: its bytes as UTF-8, where the locale could not decode them."""
    try:
        word.encode()
        return word
    except UnicodeEncodeError:  # Python keeps such bytes as surrogates
        pass
    try:
        return os.fsencode(word).decode()
    except UnicodeError as error:
        raise InputError(f"{argument} must be UTF-8; got {word!r}") from error


def tokenizer_to_save(model: str) -> Any:
    """The model's tokenizer, or None with a note on standard error, for a verb that only saves it along."""
    try:
        return loading.load_tokenizer(model)
    except PypruneError as error:
        err.print(f"[yellow]note:[/] no tokenizer is saved: {escape(str(error))}", highlight=False, soft_wrap=True)
        return None


def text_windows(
    tokenizer: Any, text: str | None, part: str, tokens: int, window: int, start: str = "auto"
) -> tuple[Tensor, str]:
    """Token windows of a text, and the text's name."""
    content, name = load_text(text, part)
    return token_windows(tokenizer, content, tokens, window, start=start), name


def check_sources(words: list[str] | None, tokens: int, window: int, start: str) -> dict[str, float]:
    """The sources of calibration text with their weights, checked before a model is loaded."""
    check_size(tokens, window)
    check_choice(start, "start_token", STARTS)
    return mixture.check_sources(mixture.parse(words) if words else mixture.DEFAULT)


def check_same_tokenizer(mine: Any, theirs: Any, argument: str) -> None:
    """Raise `InputError` unless two tokenizers turn text into the same tokens, as far as their contents tell."""
    a, b = mine.get_vocab(), theirs.get_vocab()
    if a != b:
        other = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
        first = other[0]
        raise InputError(
            f"{argument} must have the other model's tokenizer; {len(other)} tokens differ, the first is {first!r}: "
            f"{b.get(first)} in its own, {a.get(first)} in the other's"
        )
    contents = [json.loads(t.backend_tokenizer.to_str()) if t.is_fast else {} for t in (mine, theirs)]
    parts = [
        name for name in ("normalizer", "pre_tokenizer", "model") if contents[0].get(name) != contents[1].get(name)
    ]
    check(not parts, argument, "have the other model's tokenizer; the same tokens, but these parts differ", parts)
