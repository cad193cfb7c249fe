"""`pyprune recover`."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..base import machine
from ..base.errors import InputError, RecoverError, check
from ..base.files import new_file
from ..base.ranks import Ranks, leads
from ..evaluation import perplexity
from ..model import checkpoint, loading
from ..pruning.mixture import lessons, mix, unread
from ..pruning.text import shared
from ..training.distillation import DistillationConfig
from ..training.recovery import DECAYS, MODES, ONLY_TEACHER, PRECISIONS, TRAINED, RecoverConfig, RecoverReport, split
from ..training.recovery import recover as recover_model
from .options import (
    MODEL_HELP,
    DeviceOption,
    JsonOption,
    SeedOption,
    ShardOption,
    SourcesOption,
    StartOption,
    TokensOption,
    WindowOption,
    check_left_out,
    check_same_tokenizer,
    check_sources,
    choose_device,
    text_windows,
)
from .screen import Bars, show, table, verb
from .together import together

# As long as the documents that a model writes, so that few of them are cut in two. The tokens are seen about twice.
WINDOW = 512
TOKENS = 131_072


def _figure(result: dict[str, Any], path: Path) -> None:
    """The loss of every step, and what was measured on the held-out text, in nats a token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    steps = [entry["step"] for entry in result["train"]]
    curves = [("loss", "distillation loss", "#8d99ae"), ("ce", "text, trained on", "#2a6f97")]
    for key, label, colour in curves if result["config"]["distillation"]["ce_weight"] else curves[:1]:
        axes.plot(steps, [entry[key] for entry in result["train"]], color=colour, linewidth=1, label=label)
    measured = result["held_out"]
    if measured:
        places, values = ([entry[key] for entry in measured] for key in ("step", "ce"))
        axes.plot(places, values, color="#2a9d6f", marker="o", label="text, held out")
        axes.axhline(result["teacher_ce"], color="#d62828", linestyle="--", label="the teacher on it")
        sources = list(result["teacher_sources"])
        for source in sources if len(sources) > 1 else []:
            axes.plot(
                places, [entry["sources"][source] for entry in measured], linewidth=1, label=f"{source}, held out"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def taught_by(teacher: Any, name: str, text: str) -> dict[str, Any]:
    """What the checkpoint says of a recovery."""
    block = getattr(teacher.config, "pyprune", None) or {}
    return {
        "teacher": {
            "model": name if name == loading.DEMO else Path(name).name,
            "type": teacher.config.model_type,
            "base_fingerprint": block.get("base_fingerprint"),
        },
        "text": text,
        "versions": {**machine.versions()},
    }


def _held_out(report: RecoverReport) -> dict[str, dict[str, float]]:
    """Perplexities of every held-out source, behind their mean where there are several."""
    found = {f"{name}, held out": entry for name, entry in report.source_perplexities.items()}
    mean = report.perplexities
    return found if len(found) < 2 or mean is None else {"geometric mean, held out": mean, **found}


def closed(entry: dict[str, float]) -> str:
    """The share of what pruning lost, in log perplexity, that came back."""
    before, after, teacher = (math.log(entry[when]) for when in ("before", "after", "teacher"))
    return f"{(before - after) / (before - teacher):.0%}" if before > teacher else "-"


def none_better(report: RecoverReport) -> RecoverError:
    first, tried = report.held_out[0], min(report.held_out[1:], key=lambda m: float(m["ce"]))
    worse = report.worse(tried)
    return RecoverError(
        f"no state was better on the held-out text than the model as it came ({first['ce']:.4f} nats a token; the best "
        f"after it {tried['ce']:.4f}, at step {tried['step']}{_worse(worse)}): nothing was written; try a lower "
        f"--learning-rate than {report.config.learning_rate:g}, or more --steps than {report.config.steps}"
    )


def _worse(names: list[str]) -> str:
    return f", but worse than at first on {' and '.join(names)}" if names else ""


@verb
@together
def recover(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"The pruned model. {MODEL_HELP}", metavar="MODEL", show_default=False)],
    teacher: Annotated[
        str, typer.Option("--teacher", help=f"The dense model. {MODEL_HELP}", metavar="DENSE", show_default=False)
    ],
    text: SourcesOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps at most.")] = RecoverConfig.steps,
    minutes: Annotated[
        float | None, typer.Option(help="Of wall time at most; the schedule ends with it.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = RecoverConfig.batch,
    window: WindowOption = WINDOW,
    tokens: TokensOption = TOKENS,
    start_token: StartOption = "auto",
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = RecoverConfig.learning_rate,
    warmup: Annotated[float, typer.Option(help="Share of the run over which it rises.")] = RecoverConfig.warmup,
    decay: Annotated[str, typer.Option(help=f"{', '.join(DECAYS)}.")] = RecoverConfig.decay,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = RecoverConfig.weight_decay,
    max_norm: Annotated[float, typer.Option(help="Of the gradient; 0 does not clip.")] = RecoverConfig.max_norm,
    train: Annotated[
        str, typer.Option(help=f"{', '.join(TRAINED)}: the FFNs, the decoder layers, or embeddings too.")
    ] = RecoverConfig.train,
    mode: Annotated[
        str, typer.Option(help=f"{', '.join(MODES)}: all these weights, or adapters that are merged at the end.")
    ] = RecoverConfig.mode,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = RecoverConfig.rank,
    alpha: Annotated[int, typer.Option(help="Of the adapters: they count alpha / rank.")] = RecoverConfig.alpha,
    temperature: Annotated[float, typer.Option(help="Of the KL to the teacher.")] = ONLY_TEACHER.temperature,
    kl_weight: Annotated[float, typer.Option(help="Of the KL to the teacher.")] = ONLY_TEACHER.kl_weight,
    ce_weight: Annotated[
        float, typer.Option(help="Of the text itself, where it is to be learnt: its domain, not what was lost.")
    ] = ONLY_TEACHER.ce_weight,
    hidden_weight: Annotated[
        float, typer.Option(help="Of the squared difference of hidden states.")
    ] = ONLY_TEACHER.hidden_weight,
    precision: Annotated[str, typer.Option(help=f"Of the products: {', '.join(PRECISIONS)}.")] = "auto",
    held_out: Annotated[
        float, typer.Option(help="Share of every source to choose the best state by; 0 takes the last one.")
    ] = RecoverConfig.held_out,
    every: Annotated[int, typer.Option(help="Steps between measurements on it.")] = RecoverConfig.every,
    patience: Annotated[
        int, typer.Option(help="Measurements without a new best that end training; 0 for none.")
    ] = RecoverConfig.patience,
    resume: Annotated[
        Path | None, typer.Option(help="Folder for the state; a second call goes on from it.", show_default=False)
    ] = None,
    save_every: Annotated[int, typer.Option(help="With --resume: steps between states; 0 for one at the end.")] = 0,
    also: Annotated[
        str | None,
        typer.Option(
            help="A second text to measure perplexity on. Default: the second half of prose that CPython carries.",
            show_default=False,
        ),
    ] = None,
    also_tokens: Annotated[int, typer.Option(help="Tokens of the second text to use at most; 0 for all.")] = 4096,
    figure: Annotated[Path | None, typer.Option(help="Draw the loss curves to this PNG file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a checkpoint that pyprune wrote; it stays whole until then.")
    ] = False,
    max_shard_size: ShardOption = checkpoint.MAX_SHARD_SIZE,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a pruned model for a while, taught by the dense one, and write it as a checkpoint."""
    if mode == "full":
        check_left_out(context, "be left out unless --mode is lora", "rank", "alpha")
    config = RecoverConfig(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        warmup=warmup,
        decay=decay,
        weight_decay=weight_decay,
        max_norm=max_norm,
        train=train,
        mode=mode,
        rank=rank,
        alpha=alpha,
        precision=precision,
        minutes=minutes,
        held_out=held_out,
        every=every,
        patience=patience,
        save_every=save_every,
        seed=seed,
        distillation=DistillationConfig(temperature, kl_weight, ce_weight, hidden_weight),
    )
    ranks = Ranks.joined()
    ranks.check_enough(batch, "batch", "a window")
    if out is None and not dry_run:
        raise InputError("out must be given, unless with --dry-run; got None")
    if out is not None:
        checkpoint.check_out(out, overwrite, max_shard_size)
    check(resume is not None or save_every == 0, "save_every", "be given with --resume", save_every)
    if figure is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("figure needs matplotlib: pip install 'pyprune[plot]'")
    sources = check_sources(text, tokens, window, start_token)
    place = choose_device(device)
    tokenizer = loading.load_tokenizer(model)
    sources = sources if text else lessons(tokenizer)
    check_same_tokenizer(tokenizer, loading.load_tokenizer(teacher), "teacher")
    second, second_name = text_windows(tokenizer, also, "second", also_tokens, window, start_token)
    dense = loading.load_model(teacher, "auto", place)
    with Bars() as bars:
        more: dict[str, Any] = {"start": start_token, "seed": unread(seed), "progress": bars}
        windows = shared(ranks, lambda: mix(sources, dense, tokenizer, tokens, window, **more))
        assert windows is not None
        split(windows, None, config)  # before anything else is done
        student = loading.load_model(model, "auto", place)
        other = {"before": perplexity(student, second, bars).perplexity} if leads() else {}
        report = recover_model(
            student,
            dense,
            windows,
            config,
            progress=bars,
            folder=None if dry_run else resume,
            provenance=taught_by(dense, teacher, windows.name),
        )
        if report.held_out and report.best == 0:
            raise none_better(report)
        if not leads():
            return
        for when, loaded in (("after", student), ("teacher", dense)):
            other[when] = perplexity(loaded, second, bars).perplexity
    found = {**_held_out(report), second_name: other}
    if not dry_run and out is not None:
        checkpoint.save(student, out, tokenizer, overwrite, max_shard_size=max_shard_size)
    result = {
        "model": model,
        **report.to_json(),
        "text": windows.name,
        "teacher": teacher,
        "perplexity": found,
        "perplexity_window": window,
        "machine": machine.facts(),
        "out": None if dry_run else str(out),
    }
    if figure is not None and not dry_run:
        with new_file(figure) as temporary:
            _figure(result, temporary)
    rows = [
        (escape(t), *(f"{entry[when]:.2f}" for when in ("before", "after", "teacher")), closed(entry))
        for t, entry in found.items()
    ]
    passes = report.tokens / (report.windows * report.window)
    written, over = "nothing (dry run)" if dry_run else str(out), report.passed_over
    ended = {"steps": "all steps", "minutes": "time over", "patience": "no better on the held-out text"}
    show(
        result,
        as_json,
        table(
            f"recovered {escape(model)}: token perplexity, window {window}",
            ("text", ">before", ">after", ">teacher", ">gap closed"),
            rows,
        ),
        f"{report.steps} steps ({ended[report.stopped]}), weights of step {report.best}; {report.tokens:,} tokens of "
        f"{escape(windows.name)} ({passes:.2f} passes)",
        *([f"step {over['step']} had a lower mean{escape(_worse(over['worse']))}"] if over else []),
        f"{report.seconds:.0f} s, {report.tokens_per_second:.0f} tokens/s in {report.precision}; of it "
        f"{report.teacher_seconds:.0f} s for the teacher, {report.held_out_seconds:.0f} s to measure",
        f"wrote {escape(written)}",
    )
