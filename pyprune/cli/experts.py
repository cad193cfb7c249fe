"""The verb `prune-experts`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..base.errors import check_choice
from ..model import checkpoint, loading
from ..pruning.experts import METHODS
from ..pruning.experts import prune_experts as remove_experts
from ..pruning.mixture import mix
from ..pruning.repair import parse as parse_repair
from ..pruning.text import TOKENS, WINDOW
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
)
from .pruned import DryRunOption, OutOption, OverwriteOption, check_out, run_facts
from .screen import Bars, megabytes, show, table, verb

RepairOption = Annotated[
    str, typer.Option(help="none, least-squares (the experts that are left are fitted to what all gave), or bias.")
]
MethodOption = Annotated[str, typer.Option(help=f"What ranks experts: {', '.join(METHODS)}.")]


@verb
def prune_experts(
    model: ModelArgument,
    out: OutOption = None,
    method: MethodOption = "reap",
    keep: Annotated[float, typer.Option(help="Share of the experts of every layer that stays, in (0, 1].")] = 0.75,
    repair: RepairOption = "none",
    text: SourcesOption = None,
    tokens: TokensOption = TOKENS,
    window: WindowOption = WINDOW,
    start_token: StartOption = "auto",
    seed: SeedOption = 0,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    max_shard_size: ShardOption = checkpoint.MAX_SHARD_SIZE,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Remove whole experts of a mixture with their rows of the router, and write a checkpoint."""
    check_choice(method, "method", METHODS)
    check_out(out, dry_run, overwrite, max_shard_size)
    fits = parse_repair(repair)
    place = choose_device(device)
    tokenizer = loading.load_tokenizer(model)
    sources = check_sources(text, tokens, window, start_token)
    loaded = loading.load_model(model, dtype, place)
    with Bars() as bars:
        windows = None
        if method != "random" or fits.needs:
            windows = mix(sources, loaded, tokenizer, tokens, window, start=start_token, seed=seed, progress=bars)
        report = remove_experts(
            loaded, keep, method, repair=fits, text=windows, seed=seed, progress=bars, provenance=run_facts(model)
        )
    if out is not None and not dry_run:
        checkpoint.save(loaded, out, tokenizer, overwrite, max_shard_size=max_shard_size)
    written = "nothing (dry run)" if dry_run else str(out)
    name = None if windows is None else windows.name
    rows = [
        ("experts a layer", len(report.layers[0]["scores"]), len(report.layers[0]["kept"])),
        ("layers with experts", len(report.layers), len(report.layers)),
        ("parameters", f"{report.parameters_before:,}", f"{report.parameters_after:,}"),
        ("size", megabytes(report.bytes_before), megabytes(report.bytes_after)),
    ]
    show(
        {"model": model, **report.to_json(), "text": name, "out": None if dry_run else str(out)},
        as_json,
        table(f"pruned {escape(model)}", ("what", ">dense", ">pruned"), rows),
        f"text {name or 'not needed'}, {report.tokens} tokens; {report.seconds:.1f} s; wrote {escape(written)}",
    )
