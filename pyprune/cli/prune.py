"""The verb `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..base.errors import InputError, check, is_finite
from ..base.ranks import Ranks, launched, leads
from ..model import checkpoint, loading
from ..model.mask import Mask
from ..pruning import importance
from ..pruning.allocation import ALLOCATIONS
from ..pruning.mixture import lessons, mix, unread
from ..pruning.nested import NestedReport, prune_nested
from ..pruning.options import ALLOCATION, KEEP, METHOD, REPAIR, PruneOptions
from ..pruning.prune import PruneReport
from ..pruning.prune import prune as prune_model
from ..pruning.repair import REPAIRS
from ..pruning.text import MANY_TOKENS, TOKENS, WINDOW, shared
from ..serving.gguf_base import Base
from ..serving.gguf_export import check_out_file, to_gguf
from ..training.recovery import RecoverConfig, RecoverReport
from ..training.recovery import recover as recover_model
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    ShardOption,
    SourcesOption,
    StartOption,
    WindowOption,
    check_left_out,
    check_sources,
    choose_device,
    tokenizer_to_save,
)
from .pruned import DryRunOption, OverwriteOption, SaveMaskOption, check_out, finish, run_facts
from .recover import taught_by
from .screen import Bars, show, table, verb
from .streamed import SpillOption, StreamOption, prune_streamed, streams
from .together import together

# Minutes of recovery with --best, and steps in a minute at most: fast machines do not go over the same text for ever.
BEST_MINUTES, STEPS_A_MINUTE = 10.0, 30


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise InputError(f"shares must be numbers separated by commas; got {text!r}") from error


def _show_nested(model: str, made: NestedReport, text: str | None, out: Path | None, as_json: bool) -> None:
    rows = []
    for i, (share, widths) in enumerate(zip(made.shares, made.widths, strict=True)):
        errors = made.errors[i] if made.errors else []
        means = [f"{sum(e) / len(errors):.1%}" for e in zip(*errors, strict=True)] if errors else ["-", "-"]
        rows.append((f"{share:g}", f"{min(widths)} .. {max(widths)}", *means))
    show(
        {"model": model, **made.to_json(), "text": text, "out": None if out is None else str(out)},
        as_json,
        table(
            f"{escape(model)}: neurons sorted; mean output error of a layer at the fitted widths",
            ("share", ">widths", ">bare prefix", ">fitted"),
            rows,
        ),
        f"text {text or 'not needed'}, {made.tokens} tokens; {made.seconds:.1f} s; "
        f"wrote {escape(str(out or 'nothing'))}",
    )


def _notes(report: PruneReport, taught: RecoverReport | None) -> list[str]:
    """Lines below the table: how well the fit went, with which damping, and what recovery brought."""
    notes = []
    fitted = [r for r in report.layers if r.error_repaired is not None]
    if fitted:
        cut = sum(r.error_cut or 0.0 for r in fitted) / len(fitted)
        left = sum(r.error_repaired or 0.0 for r in fitted) / len(fitted)
        dampings = sorted({r.damping for r in fitted if r.damping is not None})
        ridge = " .. ".join(f"{d:g}" for d in dict.fromkeys((dampings[0], dampings[-1])))
        notes.append(f"mean output error of a layer: {cut:.1%} after the cut, {left:.1%} repaired (damping {ridge})")
    if report.promise is not None:
        notes.append(f"promised speed-up {report.promise:.3f}x over the dense model, both accelerated")
    found = None if taught is None else taught.perplexities
    if taught is not None and found is not None:
        steps = f"{taught.steps} steps, {taught.seconds:.0f} s; weights of step {taught.best}"
        values = f"{found['before']:.2f} before, {found['after']:.2f} after, dense {found['teacher']:.2f}"
        notes.append(f"recovery: {steps}; perplexity on held-out windows {values}")
    return notes


def _check_gguf(model: str, out: Path | None, changes_more: bool, overwrite: bool) -> None:
    """That `out` can be MODEL's own file but for the FFNs."""
    check(Path(model).suffix == ".gguf", "out", "be a folder where MODEL is no GGUF file", str(out))
    rule = "be a folder with --recover, --best or --nested: they change more than FFNs"
    check(not changes_more, "out", rule, str(out))
    if out is not None:
        check_out_file(out, overwrite)
    Base(model)


def _check_together(context: typer.Context, nested_widths: bool, mask: Path | None, out: Path | None) -> None:
    """That no option was given which would do nothing beside others."""
    if nested_widths:
        check_left_out(context, "be left out with --nested, which removes nothing", "keep", "precision")
    else:
        check_left_out(context, "be given with --nested only", "shares")
    if mask is not None:
        scoring = ("keep", "method", "allocation", "target_speedup", "workload", "protect", "multiple", "floor")
        check_left_out(context, "be left out with --mask, which says what stays", *scoring)
    if out is not None and out.suffix == ".gguf":
        check_left_out(context, "be left out where --out is a GGUF file, which is not split", "max_shard_size")


def _given(**values: Any) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


@verb
@together
def prune(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder to write, or where MODEL is a GGUF file also a .gguf file; must not exist.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of neurons that stays, in (0, 1].")] = KEEP,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help=f"What measured best: {MANY_TOKENS:,} tokens unless --tokens says otherwise, then {BEST_MINUTES:g} "
            "minutes of --recover. Takes longer.",
        ),
    ] = False,
    recover: Annotated[
        float | None,
        typer.Option(
            help="Minutes at most in which the dense model teaches the pruned one afterwards, as the verb recover, in "
            f"at most {STEPS_A_MINUTE} steps each; 0 for none. Default: 0, or {BEST_MINUTES:g} with --best.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=f"Importance criterion: {', '.join(importance.names())}.")] = METHOD,
    allocation: Annotated[
        str | None,
        typer.Option(
            help=f"How many neurons each layer keeps: {ALLOCATIONS.help()}. Default: uniform.", show_default=False
        ),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            help=f"What kept neurons take over from removed ones: {REPAIRS.help()}. Default: {REPAIR}.",
            show_default=False,
        ),
    ] = None,
    target_speedup: Annotated[
        str | None,
        typer.Option(
            help="Make the whole model this much faster here, at the least loss; implies allocation latency.",
            show_default=False,
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="What that speed-up is of: decode:1, prefill:512, decode:4:int8, ...", show_default=False),
    ] = None,
    protect: Annotated[
        str | None, typer.Option(help="How many first,last layers keep all their neurons.", show_default=False)
    ] = None,
    multiple: Annotated[
        str | None, typer.Option(help="Round widths to multiples of this many neurons; 64.", show_default=False)
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(help="Not uniform: the least share of neurons any layer keeps; 0.", show_default=False),
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(
            help="Ridge of least squares, as a share of the mean diagonal, 0.01; auto: by held-out windows.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Share of what earlier layers lost that a layer's fit makes up for, in [0, 1], or auto: 0.5 where the "
            "model lets it.",
            show_default=False,
        ),
    ] = None,
    sequential: Annotated[
        bool, typer.Option(help="Score and fit later layers on what pruned earlier ones produce.")
    ] = True,
    nested_widths: Annotated[
        bool,
        typer.Option(
            "--nested", help="Remove nothing: sort the neurons, so that --width runs any share of this checkpoint."
        ),
    ] = False,
    shares: Annotated[str, typer.Option(help="With --nested: widths whose down rows are fitted.")] = "0.8,0.7,0.5",
    text: SourcesOption = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of text to use at most; 0 for all. Default: {TOKENS}, or {MANY_TOKENS} with --best.",
            show_default=False,
        ),
    ] = None,
    window: WindowOption = WINDOW,
    start_token: StartOption = "auto",
    seed: SeedOption = 0,
    precision: Annotated[
        str,
        typer.Option(
            help="In which float32 layers multiply while text runs through them: float32, bfloat16, or auto: bfloat16 "
            "where this machine is fast in it."
        ),
    ] = "auto",
    mask: Annotated[Path | None, typer.Option(help="Keep the neurons of this mask file instead of scoring.")] = None,
    save_mask: SaveMaskOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    max_shard_size: ShardOption = checkpoint.MAX_SHARD_SIZE,
    stream: StreamOption = None,
    spill: SpillOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Remove FFN neurons, and write a checkpoint that Transformers loads.

    --target-speedup to --target are keys of --allocation and --repair, given apart.
    """
    _check_together(context, nested_widths, mask, out)
    spread = _given(target_speedup=target_speedup, workload=workload, protect=protect, multiple=multiple, floor=floor)
    named = allocation or (ALLOCATION if target_speedup is None else "latency")
    options = PruneOptions.of(
        keep,
        method,
        ALLOCATIONS.parse(named, **spread),
        REPAIRS.parse(
            repair or (REPAIR if target is None else "least-squares"), **_given(damping=damping, target=target)
        ),
        sequential,
        seed,
        precision,
    )
    if tokens is None:
        tokens = MANY_TOKENS if best else TOKENS
    minutes = (BEST_MINUTES if best and not nested_widths else 0.0) if recover is None else recover
    check(is_finite(minutes) and minutes >= 0, "recover", "be 0 minutes or more, and finite", minutes)
    steps = max(1, round(STEPS_A_MINUTE * minutes))
    teaching = RecoverConfig(minutes=minutes, steps=steps, seed=seed) if minutes else None
    to_file = out is not None and out.suffix == ".gguf"
    if to_file:
        _check_gguf(model, out, nested_widths or teaching is not None, overwrite)
    else:
        check_out(out, dry_run, overwrite, max_shard_size)
    if nested_widths:
        check(teaching is None, "recover", "be left out with --nested", minutes)
        check(mask is None and save_mask is None, "mask", "be left out with --nested", str(mask or save_mask))
        check(sequential, "sequential", "be True with nested widths", False)
    loaded_mask = Mask.load(mask) if mask else None
    against: dict[str, Any] = {"recover": minutes, "nested": nested_widths, "dry_run": dry_run, "out": to_file and out}
    processes = launched() > 1 and launched()
    check(not processes or not nested_widths, "WORLD_SIZE", "be 1 with --nested", processes)
    if teaching is not None:
        most = f"be at most {teaching.batch} with --recover, which takes so many windows a step"
        check(processes <= teaching.batch, "WORLD_SIZE", most, processes)
    against |= {"nproc_per_node": processes}
    against |= {"dtype": dtype != "auto" and dtype}
    place = choose_device(device)
    if streams(stream, model, dtype, spill, place, against):
        read = check_sources(text, tokens, window, start_token) if text else None
        size: dict[str, Any] = {"tokens": tokens, "window": window, "start": start_token}
        more: dict[str, Any] = {"spill": spill, "max_shard_size": max_shard_size, "overwrite": overwrite}
        more["device"] = place
        prune_streamed(model, out, options, loaded_mask, read, size, save_mask, as_json, **more)
        return
    windows, taught_text, tokenizer = None, None, None
    needed = options.needs_text(loaded_mask is not None) or teaching is not None
    sources = check_sources(text, tokens, window, start_token)
    if needed:
        tokenizer = loading.load_tokenizer(model)
    loaded = loading.load_model(model, dtype, place)
    if needed:
        with Bars() as bars:
            size = {"tokens": tokens, "window": window, "start": start_token, "seed": seed}
            ranks = Ranks.joined()
            windows = shared(ranks, lambda: mix(sources, loaded, tokenizer, **size, progress=bars))
            if teaching is not None:
                size["seed"] = unread(seed)
                taught_text = windows
                if not text:
                    own = lessons(tokenizer)
                    taught_text = shared(ranks, lambda: mix(own, loaded, tokenizer, **size, progress=bars))
    text_name = None if windows is None else windows.name
    if tokenizer is None and not dry_run and not to_file:
        tokenizer = tokenizer_to_save(model)
    common: dict[str, Any] = {"allocation": options.allocation, "repair": options.repair, "text": windows, "seed": seed}
    common["provenance"] = run_facts(model)
    made, report, taught = None, None, None
    with Bars() as bars:
        if nested_widths:
            made = prune_nested(loaded, _shares(shares), method, progress=bars, **common)
        else:
            more = {"sequential": sequential, "precision": precision, "mask": loaded_mask}
            report = prune_model(loaded, keep, method, **more, progress=bars, **common)
            if teaching is not None and taught_text is not None:
                dense = loading.load_model(model, dtype, place)
                facts = taught_by(dense, model, taught_text.name)
                taught = recover_model(loaded, dense, taught_text, teaching, progress=bars, provenance=facts)
    written = out if leads() and not dry_run else None
    if written is not None and to_file:
        to_gguf(loaded, model, written, overwrite=overwrite)
    elif written is not None:
        checkpoint.save(loaded, written, tokenizer, overwrite, max_shard_size=max_shard_size)
    if made is not None:
        _show_nested(model, made, text_name, written, as_json)
    if report is not None:
        finish(model, report, text_name, written, save_mask, _notes(report, taught), as_json, taught)
