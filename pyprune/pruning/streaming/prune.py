"""The verb `prune` on a checkpoint that need not fit in memory: `prune_checkpoint`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base import machine
from ...base.errors import PypruneError, check
from ...base.files import put_folder
from ...base.memory import PeakMemory
from ...base.progress import Progress, quiet
from ...base.ranks import Ranks
from ...model import checkpoint, families, loading, surgery
from ...model.attention import in_blocks
from ...model.manifest import is_tokenizer
from ...model.mask import Mask
from ...model.pages import Pages
from ...model.shard_writer import ShardWriter, as_bytes
from ..allocation import Allocation, Plan
from ..mixture import BUILTIN, SELF, Windows
from ..options import ALLOCATION, KEEP, METHOD, REPAIR, PruneOptions
from ..prune import PruneReport, check_rebuilds
from ..repair import Repair
from ..run import Run
from ..text import Text
from .pruner import StreamedPruner, check_streamed
from .state import STATE, State, folder_of


def _settings(
    pages: Pages, options: PruneOptions, windows: Windows | None, mask: Mask | None, spill: Path | None, limit: int
) -> dict[str, Any]:
    """What the result depends on, and where hidden states lie, by the names that a user knows."""
    read = hashlib.sha256()
    if windows is not None:
        for part in (windows.ids, windows.sources):
            read.update(part.contiguous().numpy().tobytes())
    kept = hashlib.sha256(repr([keep.neurons.tolist() for keep in mask.layers]).encode()).hexdigest() if mask else None
    folder = pages.shards.files[0].parent
    return {
        "keep": options.keep,
        "method": options.method,
        "allocation": options.allocation.in_full,
        "repair": options.repair.in_full,
        "sequential": options.sequential,
        "seed": options.seed,
        "precision": options.precision,
        "mask": kept,
        "text": None if windows is None else f"{windows.ids.numel()} tokens, {read.hexdigest()[:16]}",
        "max_shard_size": limit,
        "device": machine.name_of(pages.device),
        "spill": None if spill is None else str(spill.absolute()),
        "config.json": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()[:16],
        **machine.versions(),
        **pages.shards.identity(),
    }


def check_text(text: Text) -> Text:
    """Calibration text that needs no whole model; None becomes what CPython carries.

    Raises:
        InputError: text that the model is to write itself.
    """
    if text is None:
        return {BUILTIN: 1.0}
    named = list(text) if isinstance(text, dict) else [text] if isinstance(text, str) else []
    own = [name for name in named if str(name).partition(":")[0] == SELF]
    rule = f"be a file, {BUILTIN} or token ids with stream: to write text the whole model would be read for every token"
    check(not own, "text", rule, own)
    return text


def _check_mask(mask: Mask, pages: Pages) -> None:
    """Raise `InputError` where a mask belongs to another model; reads the layers once."""
    mask.check_fits(pages.described.sizes, mask.fingerprint)  # widths first, which cost nothing
    samples = []
    for ffn in pages.described.ffns:
        pages.need(ffn.block)
        samples.append(families.sample(ffn))
        pages.drop(ffn.block)
    mask.check_fits(pages.described.sizes, families.fingerprint_of(pages.model, samples))


@torch.inference_mode(False)
@torch.no_grad()
def prune_checkpoint(
    model: str | Path,
    out: str | Path,
    keep: float = KEEP,
    method: str = METHOD,
    *,
    allocation: Allocation | str = ALLOCATION,
    repair: Repair | str | None = REPAIR,
    text: Text = None,
    tokenizer: Any = None,
    seed: int = 0,
    sequential: bool = True,
    precision: str = "float32",
    mask: Mask | None = None,
    spill: str | Path | None = None,
    max_shard_size: int | str = checkpoint.MAX_SHARD_SIZE,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
) -> PruneReport:
    """Remove FFN neurons from a checkpoint on the disk, and write another: the model need not fit in memory.

    A layer at a time is read from the shards (the next one meanwhile), calibrated, scored, cut, repaired, written and
    dropped, so that memory is that of two layers and one layer's statistics. The result is that of `prune` and `save`
    to the bit. What does not change is copied. A killed run goes on with the same call, from the layer it was at; the
    folder `.NAME.stream` beside the output keeps what it needs for that, and `out` appears when it is whole.

        >>> model, tokenizer = load("demo")
        >>> dense = save(model, "dense", tokenizer)
        >>> report = prune_checkpoint("dense", "pruned", keep=0.7, method="wanda")
        >>> report.parameters_after < report.parameters_before
        True

    Args:
        model: a folder of safetensors, of a model whose layers each have one FFN of one form. Its dtype stays.
        out: the folder to write.
        keep, method, repair, seed, sequential, precision, mask, progress, provenance: as for `prune`.
        allocation: uniform or global; global reads the layers twice.
        text: as for `prune`, without what the model writes itself and without batches; None: what CPython carries.
        tokenizer: the model's; None for the one in its folder.
        spill: a folder for the hidden states of the calibration text, which else are in memory.
        max_shard_size, overwrite: as for `save`.
        device: what computes; weights come from the disk all the same. Of a GPU, memory is that of two layers, one
            layer's statistics and, where they fit, hidden states; the result is that of `prune` on the same GPU.

    Raises:
        InputError: a value breaks its rule, or cannot be streamed; a run with other settings was begun with this
            `out`, which is named; or as `prune`.
        CheckpointError: a folder whose config, index and tensors do not fit each other; a shard that is missing,
            truncated or of another dtype.
        UnsupportedModelError: a model of another kind.
        OSError: the disk is full, or not writable; the same call goes on once that is mended.
    """
    options = PruneOptions.of(keep, method, allocation, repair, sequential, seed, precision)
    check(not Ranks.joined().several, "prune_checkpoint", "be called by one process alone", "several in one group")
    check_streamed(options)
    place = machine.place_of(device)
    folder = Path(model).expanduser()
    rule = "be a folder with a checkpoint of safetensors, to be streamed"
    check(folder.is_dir() and (folder / "config.json").is_file(), "model", rule, str(model))
    _tidy(Path(out))
    target = checkpoint.check_out(out, overwrite, max_shard_size)
    text = check_text(text)
    if tokenizer is None and loading.has_tokenizer(str(folder)):
        try:
            tokenizer = loading.load_tokenizer(str(folder))
        except PypruneError:
            if options.needs_text(mask is not None) and not isinstance(text, Tensor | Windows):
                raise
    pages = Pages(folder, place)
    try:
        return _prune(pages, target, options, text, tokenizer, mask, spill, max_shard_size, progress, provenance)
    finally:
        pages.close()


def _copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the files of a tokenizer that cannot be loaded here, and need not be."""
    for file in folder.iterdir():
        if file.is_file() and is_tokenizer(file.name):
            shutil.copyfile(file, out / file.name)


def _tidy(out: Path) -> None:
    """Remove what a run left that was killed after its output was in its place."""
    folder = folder_of(out)
    if (folder / STATE).is_file() and not (folder / "out").exists():
        shutil.rmtree(folder)


def _prune(
    pages: Pages,
    target: Path,
    options: PruneOptions,
    text: Text,
    tokenizer: Any,
    mask: Mask | None,
    spill: str | Path | None,
    max_shard_size: int | str,
    progress: Progress,
    provenance: dict[str, Any] | None,
) -> PruneReport:
    given, place, limit = mask is not None, None if spill is None else Path(spill), as_bytes(max_shard_size)
    needed = options.needs_text(given)
    described, lm = pages.described, pages.model
    run = Run(lm, text, tokenizer, needed, options.purpose, provenance, options.seed, progress, described)
    check(run.batches is None, "text", "be windows of token ids with stream", "batches")
    settings = _settings(pages, options, run.windows, mask, place, limit)
    if options.repair.needs or options.repair.share:
        with pages.front():
            options = options.suited(described)
            options.repair.check_model(described)
    if mask is not None:
        _check_mask(mask, pages)
    check_rebuilds(described, options, mask)
    block = described.block
    if place is not None:
        check(not place.exists() or place.is_dir(), "spill", "be a folder", str(place))
    state = State(target, settings, place)
    if state.resumed:
        progress("going on where an earlier run was stopped", state.progress.layers, len(described.ffns))
    pruner = StreamedPruner(pages, options, run.windows, progress, state, place is not None)
    try:
        with PeakMemory(device=pages.device) as memory, in_blocks(lm):
            plan = options.allocation.plan(pruner, options.keep) if mask is None else Plan(list(mask.layers))
            options.repair.prepare(described)
            widths = [item if isinstance(item, int) else len(item) for item in plan.layers]
            done = state.progress
            pruner.writer = ShardWriter(state.out, pages.planned(widths), limit, done.tensors, done.hashes)
            pruner.copy_outside()
            keeps = pruner.run(plan.layers)
            pruner.wait()
            pruner.writer.finish()
            described.fingerprint = pruner.fingerprint
            surgery.set_widths(lm, block, [len(k) for k in keeps])
            facts = run.facts(options.facts(given), **({} if mask is None else {"mask": mask.provenance}))
            totals = run.finish(facts, memory)
        if tokenizer is None:
            _copy_tokenizer(pages.shards.files[0].parent, state.out)
        checkpoint.save_around(lm, state.out, target, tokenizer, pruner.writer.hashes)
        put_folder(state.out, target)
    except OSError as error:
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        told = OSError(
            f"{target} is not finished: {reason}; what is done is kept in {state.folder}: once that is mended, the "
            "same command goes on"
        )
        told.errno = error.errno
        raise told from error
    finally:
        pruner.close()
        state.close()
    state.remove()
    made = Mask(tuple(keeps), described.fingerprint, facts)
    return PruneReport(options=options, mask=made, layers=pruner.reports, promise=plan.promise, **totals)
