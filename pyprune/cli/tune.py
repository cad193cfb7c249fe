"""`pyprune tune`."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from ..base.errors import InputError, check, check_choice
from ..base.files import cache_folder
from ..ffn.contest import Tuned
from ..ffn.quantisation import WEIGHTS
from ..ffn.tune import MODES, layer_problems, model_problems
from ..ffn.tune import tune as tune_problems
from ..model import loading
from .options import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, check_left_out, choose_device
from .screen import Bars, show, table, verb


def _numbers(text: str | None) -> list[int] | None:
    """`1,8,64` as numbers."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"tokens must be numbers separated by commas; got {text!r}") from error


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def _row(one: Tuned) -> tuple[str, ...]:
    best, before = one.entries[0], one.before
    config = ", ".join(f"{name} {value}" for name, value in best.config.items())
    problem = one.problem
    layer = f"D {problem.hidden_size}, K {problem.kept}"
    return (
        layer,
        str(problem.tokens),
        "none" if before is None else before.backend,
        "" if before is None else _microseconds(before.seconds),
        best.backend,
        _microseconds(best.seconds),
        "" if one.speedup is None else f"{one.speedup:.2f}x",
        escape(config),
    )


@verb
def tune(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} Or give sizes.", show_default=False)] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Without MODEL: D.", show_default=False)] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Without MODEL: F.", show_default=False)] = None,
    gated: Annotated[bool, typer.Option("--gated/--plain", help="Without MODEL: the form.")] = True,
    activation: Annotated[str, typer.Option(help="Without MODEL: the activation.")] = "silu",
    keep: Annotated[float, typer.Option(help="Share of the neurons that is used, in (0, 1].")] = 1.0,
    mode: Annotated[str, typer.Option(help=f"{', '.join(MODES)}.")] = "compact",
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, such as 1,8,512; default: all that matter.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds; a later call goes on where this one stopped.")] = 300.0,
    again: Annotated[bool, typer.Option("--again", help="Time also what was timed before.")] = False,
    dtype: DtypeOption = "auto",
    weights: Annotated[
        str | None, typer.Option(help=f"Dtype of the kept weights: {', '.join(WEIGHTS)}.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Time every backend and configuration on this machine; from then on `auto` takes the fastest."""
    place = choose_device(device)
    check(place in ("cpu", "cuda"), "device", "be cpu, cuda or auto", device)
    check_choice(dtype, "dtype", loading.DTYPES)
    check_choice(weights or "float32", "weights", WEIGHTS)
    options: dict[str, Any] = {"mode": mode, "keep": keep, "tokens": _numbers(tokens), "device": place}
    kept = None if weights is None else WEIGHTS[weights]
    if model is not None:
        form = ("hidden_size", "intermediate_size", "gated", "activation")
        check_left_out(context, "be left out with MODEL, which has its own", *form)
        check_choice(mode, "mode", MODES)  # before a long load
        problems = model_problems(loading.load_model(model, dtype), weights=kept, **options)
    else:
        if hidden_size is None or intermediate_size is None:
            raise InputError("MODEL, or hidden_size and intermediate_size, must be given; got neither")
        default = torch.bfloat16 if place == "cuda" else torch.float32
        own = default if dtype == "auto" else WEIGHTS[dtype]
        own_form: dict[str, Any] = {"gated": gated, "activation": activation, "dtype": own, "weights": kept}
        problems = layer_problems(hidden_size, intermediate_size, **own_form, **options)
    with Bars() as bars:
        report = tune_problems(problems, budget, again, bars)
    refused = [reason for one in report.tuned for reason in one.refused]
    done = f"{len(report.tuned)} timed, {len(report.skipped)} known before, {len(report.left)} left for another call"
    show(
        report.to_json(),
        as_json,
        table(
            "the fastest, against what was used before",
            ("layer", ">M", "before", ">time", "best", ">time", ">ratio", "configuration"),
            [_row(one) for one in report.tuned],
        ),
        *(f"[yellow]refused:[/] {escape(reason)}" for reason in refused),
        f"{done}; written to {escape(report.path.name)} in {escape(str(cache_folder()))}",
    )
