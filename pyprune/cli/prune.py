"""The verb `prune`."""

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
from ..pruning.config import ALLOCATIONS, COMPENSATIONS, STRUCTURES, PruneConfig
from ..pruning.nested import NestedReport, prune_nested
from ..pruning.prune import PruneReport
from ..pruning.prune import prune as prune_model
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    ShardOption,
    TextOption,
    TokensOption,
    WindowOption,
    choose_device,
    text_windows,
    tokenizer_to_save,
)
from .screen import Bars, megabytes, show, table, verb


def _counts(text: str, argument: str) -> tuple[int, int]:
    """`4,2` as two counts."""
    parts = text.split(",")
    check(len(parts) == 2 and all(p.strip().isdigit() for p in parts), argument, "be two counts like 4,2", text)
    return int(parts[0]), int(parts[1])


def _damping(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"damping must be a number or auto; got {text!r}") from error


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


def _rows(report: PruneReport) -> list[tuple[object, ...]]:
    """What a person wants to know first: dense beside pruned."""
    rows: list[tuple[object, ...]] = []
    if report.mask is not None:
        widths = sorted(set(report.mask.widths))
        full = max(k.intermediate_size for k in report.mask.layers)
        rows.append(("neurons", sum(k.intermediate_size for k in report.mask.layers), sum(report.mask.widths)))
        rows.append(("FFN width", full, " .. ".join(map(str, dict.fromkeys((widths[0], widths[-1]))))))
    if report.blocks is not None:
        count = len(report.blocks.influence)
        rows.append((f"{report.blocks.structure} blocks", count, len(report.blocks.kept)))
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


@verb
def prune(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of neurons (FFNs, layers) that stays, in (0, 1].")] = 0.7,
    method: Annotated[str, typer.Option(help=f"Importance criterion: {', '.join(importance.names())}.")] = "wanda",
    structure: Annotated[
        str, typer.Option(help=f"What is removed: {', '.join(STRUCTURES)}; whole blocks by block influence.")
    ] = "neurons",
    iterative: Annotated[
        bool, typer.Option("--iterative", help="Whole blocks: measure influences again after each removal.")
    ] = False,
    allocation: Annotated[
        str, typer.Option(help=f"How many neurons each layer keeps: {', '.join(ALLOCATIONS)}.")
    ] = "uniform",
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="Make the whole model this much faster here, at the least loss; implies allocation latency.",
            show_default=False,
        ),
    ] = None,
    workload: Annotated[
        str, typer.Option(help="What that speed-up is of: decode:1, prefill:512, decode:4:int8, ...")
    ] = "decode:1",
    protect: Annotated[str, typer.Option(help="How many first,last layers keep all their neurons.")] = "0,0",
    multiple: Annotated[int, typer.Option(help="Round widths to multiples of this many neurons.")] = 64,
    floor: Annotated[float, typer.Option(help="Not uniform: the least share of neurons any layer keeps.")] = 0.0,
    compensate: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(COMPENSATIONS)}. Default: least-squares for neurons, none for blocks.", show_default=False
        ),
    ] = None,
    damping: Annotated[
        str, typer.Option(help="Ridge of least squares, as a share of the mean diagonal; auto: by held-out windows.")
    ] = "0.01",
    sequential: Annotated[
        bool, typer.Option(help="Score and fit later layers on what pruned earlier ones produce.")
    ] = True,
    target: Annotated[
        float, typer.Option(help="Share of what earlier layers lost that a layer's fit makes up for, in [0, 1].")
    ] = 0.0,
    nested_widths: Annotated[
        bool,
        typer.Option(
            "--nested", help="Remove nothing: sort the neurons, so that --width runs any share of this checkpoint."
        ),
    ] = False,
    shares: Annotated[str, typer.Option(help="With --nested: widths whose down rows are fitted.")] = "0.8,0.7,0.5",
    text: TextOption = None,
    tokens: TokensOption = 16384,
    window: WindowOption = 1024,
    seed: SeedOption = 0,
    mask: Annotated[Path | None, typer.Option(help="Keep the neurons of this mask file instead of scoring.")] = None,
    save_mask: Annotated[Path | None, typer.Option(help="Also write the mask to this file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write the model; --save-mask is written.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a checkpoint that pyprune wrote; it stays whole until then.")
    ] = False,
    max_shard_size: ShardOption = checkpoint.MAX_SHARD_SIZE,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Remove FFN neurons, whole FFNs or layers, and write a checkpoint that Transformers loads."""
    if compensate is None:
        compensate = "least-squares" if structure == "neurons" else "none"
    if target_speedup is not None and allocation == "uniform":
        allocation = "latency"
    config = PruneConfig(
        keep=keep,
        method=method,
        structure=structure,
        iterative=iterative,
        allocation=allocation,
        protect=_counts(protect, "protect"),
        multiple=multiple,
        floor=floor,
        target_speedup=target_speedup,
        workload=workload,
        compensate=compensate,
        damping=_damping(damping),
        sequential=sequential,
        target=target,
        seed=seed,
    )
    if out is None and not dry_run:
        raise InputError("out must be given, unless with --dry-run; got None")
    if out is not None:
        checkpoint.check_out(out, overwrite, max_shard_size)
    check(save_mask is None or structure != "layer", "save_mask", "be left out with whole layers", save_mask)
    loaded_mask = Mask.load(mask) if mask else None
    place = choose_device(device)
    batches, text_name, tokenizer = None, None, None
    if config.compensate != "none" or (loaded_mask is None and config.needs_text):
        tokenizer = loading.load_tokenizer(model)
        batches, text_name = text_windows(tokenizer, text, "first", tokens, window)
    loaded = loading.load_model(model, dtype, place)
    if tokenizer is None and not dry_run:
        tokenizer = tokenizer_to_save(model)
    facts: dict[str, Any] = {
        "model": model if model == loading.DEMO else Path(model).name,
        "text": text_name,
        "versions": machine.versions(),
    }
    if nested_widths:
        check(mask is None and save_mask is None, "mask", "be left out with --nested", str(mask or save_mask))
        with Bars() as bars:
            made = prune_nested(loaded, config, batches, _shares(shares), bars, facts)
        if not dry_run and out is not None:
            checkpoint.save(loaded, out, tokenizer, overwrite, max_shard_size=max_shard_size)
        _show_nested(model, made, text_name, None if dry_run else out, as_json)
        return
    with Bars() as bars:
        report = prune_model(loaded, config, batches, mask=loaded_mask, progress=bars, provenance=facts)
    if not dry_run and out is not None:
        checkpoint.save(loaded, out, tokenizer, overwrite, max_shard_size=max_shard_size)
    if save_mask is not None and report.mask is not None:
        report.mask.save(save_mask)
    written = "nothing (dry run)" if dry_run else str(out)
    if save_mask is not None:
        written = f"{save_mask} only (dry run)" if dry_run else f"{written} and {save_mask}"
    show(
        {"model": model, **report.to_json(), "text": text_name, "out": None if dry_run else str(out)},
        as_json,
        table(f"pruned {escape(model)}", ("what", ">dense", ">pruned"), _rows(report)),
        *_notes(report),
        f"text {text_name or 'not needed'}, {report.tokens} tokens; {report.seconds:.1f} s; "
        f"peak memory +{megabytes(report.peak_bytes)}; wrote {escape(written)}",
    )
