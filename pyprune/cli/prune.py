"""The verbs `prune` and `prune-blocks`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..base import machine
from ..base.errors import InputError, check
from ..model import checkpoint, loading
from ..model.mask import Mask
from ..pruning import importance
from ..pruning.allocation import ALLOCATIONS
from ..pruning.blocks import STRUCTURES, BlockOptions, BlockReport
from ..pruning.blocks import prune_blocks as remove_blocks
from ..pruning.mixture import mix
from ..pruning.nested import NestedReport, prune_nested
from ..pruning.options import ALLOCATION, KEEP, METHOD, REPAIR, PruneOptions
from ..pruning.prune import PruneReport
from ..pruning.prune import prune as prune_model
from ..pruning.repair import REPAIRS
from ..pruning.text import MANY_TOKENS, TOKENS, WINDOW
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    ShardOption,
    SourcesOption,
    StartOption,
    TokensOption,
    WindowOption,
    check_sources,
    choose_device,
    tokenizer_to_save,
)
from .screen import Bars, megabytes, show, table, verb

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)]
SaveMaskOption = Annotated[Path | None, typer.Option(help="Also write the mask to this file.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Do everything but write the model; --save-mask is written.")
]
OverwriteOption = Annotated[
    bool, typer.Option(help="Replace a checkpoint that pyprune wrote; it stays whole until then.")
]


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


def _rows(report: PruneReport | BlockReport) -> list[tuple[object, ...]]:
    """What a person wants to know first: dense beside pruned."""
    rows: list[tuple[object, ...]] = []
    if report.mask is not None:
        widths = sorted(set(report.mask.widths))
        full = max(k.intermediate_size for k in report.mask.layers)
        rows.append(("neurons", sum(k.intermediate_size for k in report.mask.layers), sum(report.mask.widths)))
        rows.append(("FFN width", full, " .. ".join(map(str, dict.fromkeys((widths[0], widths[-1]))))))
    if isinstance(report, BlockReport):
        rows.append((f"{report.structure} blocks", len(report.influence), len(report.kept)))
    rows.append(("parameters", f"{report.parameters_before:,}", f"{report.parameters_after:,}"))
    rows.append(("size", megabytes(report.bytes_before), megabytes(report.bytes_after)))
    return rows


def _notes(report: PruneReport) -> list[str]:
    """Lines below the table: how well the fit went, and with which damping."""
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
    return notes


def _given(**values: Any) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def facts_of(model: str) -> dict[str, Any]:
    """What the checkpoint says of the run."""
    name = model if model == loading.DEMO else Path(model).name
    return {"model": name, "versions": machine.versions()}


def check_out(out: Path | None, dry_run: bool, overwrite: bool, max_shard_size: str) -> None:
    """Raise `InputError` where there is no folder to write, or it cannot be written."""
    if out is None and not dry_run:
        raise InputError("out must be given, unless with --dry-run; got None")
    if out is not None:
        checkpoint.check_out(out, overwrite, max_shard_size)


def _finish(
    model: str,
    report: PruneReport | BlockReport,
    text: str | None,
    out: Path | None,
    save_mask: Path | None,
    notes: list[str],
    as_json: bool,
) -> None:
    """Write the mask, and show what was done and written; `out` is None in a dry run."""
    written = "nothing (dry run)" if out is None else str(out)
    if save_mask is not None and report.mask is not None:
        report.mask.save(save_mask)
        written = f"{save_mask} only (dry run)" if out is None else f"{written} and {save_mask}"
    show(
        {"model": model, **report.to_json(), "text": text, "out": None if out is None else str(out)},
        as_json,
        table(f"pruned {escape(model)}", ("what", ">dense", ">pruned"), _rows(report)),
        *notes,
        f"text {text or 'not needed'}, {report.tokens} tokens; {report.seconds:.1f} s; "
        f"peak memory +{megabytes(report.peak_bytes)}; wrote {escape(written)}",
    )


@verb
def prune(
    model: ModelArgument,
    out: OutOption = None,
    keep: Annotated[float, typer.Option(help="Share of neurons that stays, in (0, 1].")] = KEEP,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help=f"What measured best: {MANY_TOKENS:,} tokens unless --tokens says otherwise. Takes longer.",
        ),
    ] = False,
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
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Remove FFN neurons, and write a checkpoint that Transformers loads.

    --target-speedup to --target are keys of --allocation and --repair, given apart.
    """
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
    check_out(out, dry_run, overwrite, max_shard_size)
    if nested_widths:
        check(mask is None and save_mask is None, "mask", "be left out with --nested", str(mask or save_mask))
        check(sequential, "sequential", "be True with nested widths", False)
    loaded_mask = Mask.load(mask) if mask else None
    place = choose_device(device)
    windows, tokenizer = None, None
    needed = options.needs_text(loaded_mask is not None)
    sources = check_sources(text, tokens, window, start_token)
    if needed:
        tokenizer = loading.load_tokenizer(model)
    loaded = loading.load_model(model, dtype, place)
    options = options.suited(loaded)
    if needed:
        with Bars() as bars:
            windows = mix(sources, loaded, tokenizer, tokens, window, start=start_token, seed=seed, progress=bars)
    text_name = None if windows is None else windows.name
    if tokenizer is None and not dry_run:
        tokenizer = tokenizer_to_save(model)
    common: dict[str, Any] = {"allocation": options.allocation, "repair": options.repair, "text": windows, "seed": seed}
    common["provenance"] = facts_of(model)
    made, report = None, None
    with Bars() as bars:
        if nested_widths:
            made = prune_nested(loaded, _shares(shares), method, progress=bars, **common)
        else:
            more: dict[str, Any] = {"sequential": sequential, "precision": precision, "mask": loaded_mask}
            report = prune_model(loaded, keep, method, **more, progress=bars, **common)
    written = None if dry_run else out
    if written is not None:
        checkpoint.save(loaded, written, tokenizer, overwrite, max_shard_size=max_shard_size)
    if made is not None:
        _show_nested(model, made, text_name, written, as_json)
    if report is not None:
        _finish(model, report, text_name, written, save_mask, _notes(report), as_json)


@verb
def prune_blocks(
    model: ModelArgument,
    out: OutOption = None,
    structure: Annotated[
        str, typer.Option(help=f"What is removed, by block influence: {', '.join(STRUCTURES)}.")
    ] = "ffn",
    keep: Annotated[float, typer.Option(help="Share of FFNs or layers that stays, in (0, 1].")] = 0.7,
    protect: Annotated[str, typer.Option(help="How many first,last blocks stay whatever their influence.")] = "0,0",
    repair: Annotated[
        str, typer.Option(help="none; for FFNs also bias, which keeps the mean output of a removed one.")
    ] = "none",
    iterative: Annotated[
        bool, typer.Option("--iterative", help="Measure influences again after each removal.")
    ] = False,
    sequential: Annotated[bool, typer.Option(help="Mean outputs are those with the earlier FFNs removed.")] = True,
    text: SourcesOption = None,
    tokens: TokensOption = TOKENS,
    window: WindowOption = WINDOW,
    start_token: StartOption = "auto",
    seed: SeedOption = 0,
    save_mask: SaveMaskOption = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    max_shard_size: ShardOption = checkpoint.MAX_SHARD_SIZE,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Remove whole FFNs or whole decoder layers, and write a checkpoint that Transformers loads."""
    words = protect.split(",")
    two = len(words) == 2 and all(word.strip().isdigit() for word in words)
    check(two, "protect", "be two counts like 4,2", protect)
    options = BlockOptions.of(structure, keep, (int(words[0]), int(words[1])), repair, iterative, sequential)
    check_out(out, dry_run, overwrite, max_shard_size)
    check(save_mask is None or structure != "layer", "save_mask", "be left out with whole layers", str(save_mask))
    place = choose_device(device)
    tokenizer = loading.load_tokenizer(model)
    sources = check_sources(text, tokens, window, start_token)
    loaded = loading.load_model(model, dtype, place)
    with Bars() as bars:
        windows = mix(sources, loaded, tokenizer, tokens, window, start=start_token, seed=seed, progress=bars)
        report = remove_blocks(
            loaded,
            structure,
            keep,
            options.protect,
            options.repair,
            iterative=iterative,
            sequential=sequential,
            text=windows,
            progress=bars,
            provenance=facts_of(model),
        )
    written = None if dry_run else out
    if written is not None:
        checkpoint.save(loaded, written, tokenizer, overwrite, max_shard_size=max_shard_size)
    _finish(model, report, windows.name, written, save_mask, [], as_json)
