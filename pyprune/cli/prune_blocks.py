"""The verb `prune-blocks`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.errors import check
from ..model import checkpoint, loading
from ..pruning.blocks import STRUCTURES, BlockOptions
from ..pruning.blocks import prune_blocks as remove_blocks
from ..pruning.mixture import mix
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
from .pruned import DryRunOption, OutOption, OverwriteOption, SaveMaskOption, check_out, finish, run_facts
from .screen import Bars, verb


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
            provenance=run_facts(model),
        )
    written = None if dry_run else out
    if written is not None:
        checkpoint.save(loaded, written, tokenizer, overwrite, max_shard_size=max_shard_size)
    finish(model, report, windows.name, written, save_mask, [], as_json)
