"""`prune --stream`: a checkpoint that need not fit in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..base.errors import CheckpointError, check
from ..base.machine import place_of
from ..base.memory import available, device_available
from ..base.windows import check_size
from ..model import loading
from ..model.mask import Mask
from ..model.shards import Shards
from ..pruning.mixture import mix
from ..pruning.options import PruneOptions
from ..pruning.streaming import check_text, prune_checkpoint
from .pruned import finish, run_facts
from .screen import Bars, err

StreamOption = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read MODEL, a folder of safetensors, a layer at a time, and write as it goes: memory is that of layers, "
        "not of MODEL. A killed run goes on with the same command. Default: where MODEL is larger than free memory, or "
        "than that of --device.",
        show_default=False,
    ),
]
SpillOption = Annotated[
    Path | None,
    typer.Option(help="With --stream: a folder for hidden states, instead of memory.", show_default=False),
]


def _size(model: str, dtype: str) -> int:
    """Bytes of a local checkpoint's weights once loaded; 0 where it is none, or broken, which loading will say."""
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return 0
    try:
        shards = Shards(folder)
    except CheckpointError:
        return 0
    wider = dtype == "float32" and any(place.dtype != "F32" for place in shards.places.values())
    return 2 * shards.size if wider else shards.size


def _free(device: str) -> int:
    """Bytes that are free in memory and on a device: a model is loaded into the one, and put on the other."""
    place = place_of(device)
    return available() if place.type == "cpu" else min(available(), device_available(place))


def streams(
    asked: bool | None, model: str, dtype: str, spill: Path | None, device: str, others: dict[str, Any]
) -> bool:
    """Whether to stream: where it was asked for, or weights do not fit and nothing in `others` stands against it.

    Args:
        asked: True or False where the user says so.
        model, dtype, spill: as on the command line.
        device: where layers compute.
        others: what cannot be streamed, by option; what is false was not asked for.

    Raises:
        InputError: streaming was asked for together with one of `others`, or of no folder.
    """
    against = [(name, value) for name, value in others.items() if value]
    if asked:
        for name, value in against:
            check(False, name, "be left out with --stream", value if isinstance(value, bool) else str(value))
        check(Path(model).expanduser().is_dir(), "model", "be a folder of safetensors with --stream", model)
        return True
    size, free = (0, 0) if asked is False else (_size(model, dtype), _free(device))
    if size > free:
        told = f"the weights ({size / 1e9:.1f} GB) are larger than the free memory ({free / 1e9:.1f} GB)"
        how = "they are streamed"
        if against:
            how = f"--{against[0][0].replace('_', '-')} cannot be streamed, so all are loaded"
        err.print(f"[yellow]note:[/] {told}; {how}", highlight=False, soft_wrap=True)
        if not against:
            return True
    check(spill is None, "spill", "be left out without --stream", str(spill))
    return False


def prune_streamed(
    model: str,
    out: Path | None,
    options: PruneOptions,
    mask: Mask | None,
    sources: dict[str, float] | None,
    size: dict[str, Any],
    save_mask: Path | None,
    as_json: bool,
    **more: Any,
) -> None:
    """Prune a checkpoint on the disk, and show what was done.

    Args:
        model, out, save_mask, as_json: as on the command line.
        options, mask: what to do.
        sources: calibration text; None: nobody named one.
        size: `tokens`, `window` and `start` of it.
        more: further arguments of `prune_checkpoint`.
    """
    assert out is not None
    check_size(size["tokens"], size["window"])
    text, windows, tokenizer = check_text(sources), None, None
    if options.needs_text(mask is not None):
        if sources is None:
            told = "[yellow]note:[/] calibration text is builtin: with --stream MODEL writes none itself"
            err.print(told, highlight=False, soft_wrap=True)
        tokenizer = loading.load_tokenizer(model)
        with Bars() as bars:
            windows = mix(text, None, tokenizer, seed=options.seed, progress=bars, **size)  # type: ignore[arg-type]
    with Bars() as bars:
        report = prune_checkpoint(
            model,
            out,
            options.keep,
            options.method,
            allocation=options.allocation,
            repair=options.repair,
            text=windows,
            tokenizer=tokenizer,
            seed=options.seed,
            sequential=options.sequential,
            precision=options.precision,
            mask=mask,
            progress=bars,
            provenance=run_facts(model),
            **more,
        )
    finish(model, report, None if windows is None else windows.name, out, save_mask, [], as_json)
