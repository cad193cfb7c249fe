"""What the verbs that prune have in common: where they write, and what they say that they did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..base import machine
from ..base.errors import InputError
from ..base.ranks import leads
from ..model import checkpoint, loading
from ..pruning.blocks import BlockReport
from ..pruning.prune import PruneReport
from ..training.recovery import RecoverReport
from .screen import megabytes, show, table

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.", show_default=False)]
SaveMaskOption = Annotated[Path | None, typer.Option(help="Also write the mask to this file.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Do everything but write the model; --save-mask is written.")
]
OverwriteOption = Annotated[
    bool, typer.Option(help="Replace a checkpoint that pyprune wrote; it stays whole until then.")
]


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


def run_facts(model: str) -> dict[str, Any]:
    """What the checkpoint says of the run."""
    name = model if model == loading.DEMO else Path(model).name
    return {"model": name, "versions": machine.versions()}


def check_out(out: Path | None, dry_run: bool, overwrite: bool, max_shard_size: str) -> None:
    """Raise `InputError` where there is no folder to write, or it cannot be written."""
    if out is None and not dry_run:
        raise InputError("out must be given, unless with --dry-run; got None")
    if out is not None:
        checkpoint.check_out(out, overwrite, max_shard_size)


def finish(
    model: str,
    report: PruneReport | BlockReport,
    text: str | None,
    out: Path | None,
    save_mask: Path | None,
    notes: list[str],
    as_json: bool,
    taught: RecoverReport | None = None,
) -> None:
    """Write the mask, and show what was done and written; `out` is None in a dry run."""
    written = "nothing (dry run)" if out is None else str(out)
    if save_mask is not None and report.mask is not None:
        if leads():
            report.mask.save(save_mask)
        written = f"{save_mask} only (dry run)" if out is None else f"{written} and {save_mask}"
    on_device = f", {megabytes(report.device_peak_bytes)} on the device" if report.device_peak_bytes else ""
    show(
        {
            "model": model,
            **report.to_json(),
            **({} if taught is None else {"recovery": taught.to_json()}),
            "text": text,
            "out": None if out is None else str(out),
        },
        as_json,
        table(f"pruned {escape(model)}", ("what", ">dense", ">pruned"), _rows(report)),
        *notes,
        f"text {text or 'not needed'}, {report.tokens} tokens; {report.seconds:.1f} s; "
        f"peak memory +{megabytes(report.peak_bytes)}{on_device}; wrote {escape(written)}",
    )
