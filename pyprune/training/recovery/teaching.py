"""The pruned model's lessons from first to last, and the model as it was but for what it learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check
from ...base.memory import PeakMemory
from ...base.progress import Progress, quiet
from ...base.ranks import Ranks
from ...model import families
from ...model import provenance as model_provenance
from ...model.attention import in_blocks
from ...model.probe import evaluating
from ...model.weights import check_plain, check_there, checksum, leave_inference
from ...pruning.mixture import Windows
from ...pruning.text import describe
from ..adapters import Adapters, check_peft, projections
from ..distillation import check_pair
from .config import RecoverConfig, RecoverReport
from .lesson import Lesson
from .run import Run
from .sources import UNNAMED, as_windows, split
from .state import State, check_folder, digest


def _freeze(student: nn.Module, config: RecoverConfig) -> None:
    """Leave only those parameters trainable that `config.train` names."""
    if config.train == "all":
        chosen = list(student.parameters())
    elif config.train == "layers":
        chosen = list(families.decoder_layers(student)[1].parameters())
    else:
        chosen = [p for ffn in families.find_ffns(student) for p in ffn.parameters()]
    student.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)


@contextmanager
def _trainable(student: Any, config: RecoverConfig) -> Iterator[Adapters | None]:
    """float32 weights, the chosen ones trainable, in training mode; afterwards everything as it was, but trained."""
    dtypes = {n: p.dtype for n, p in student.named_parameters()}
    kinds = {n: b.dtype for n, b in student.named_buffers()}
    wanted = {n: p.requires_grad for n, p in student.named_parameters()}
    adapters = None
    with evaluating(student):
        student.float()
        try:
            if config.mode == "lora":
                torch.manual_seed(config.seed)  # adapters begin at random
                names = projections(student, config.train == "ffn")
                adapters = Adapters(student, names, config.rank, config.alpha)
            else:
                _freeze(student, config)
            student.train()
            yield adapters
        finally:
            if adapters is not None:
                adapters.merge()
            for name, parameter in student.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])
                parameter.requires_grad_(wanted[name])
                parameter.grad = None
            for name, buffer in student.named_buffers():
                buffer.data = buffer.data.to(kinds.get(name, buffer.dtype))


@torch.inference_mode(False)
@torch.enable_grad()
def recover(
    student: nn.Module,
    teacher: nn.Module,
    windows: Tensor | Windows,
    config: RecoverConfig | None = None,
    *,
    held_out: Tensor | Windows | None = None,
    progress: Progress = quiet,
    folder: str | Path | None = None,
    provenance: dict[str, Any] | None = None,
    together: bool = True,
) -> RecoverReport:
    """Train a pruned model for a while, in place, taught by the dense one.

    Args:
        student: a causal LM of Transformers; its weights are float32 while they are trained, and get their dtypes back.
        teacher: the dense model, of the same vocabulary, on the same device; its weights do not change.
        windows: `[N, W]` token ids to train on, or windows of several sources (see `pruning.mixture.mix`).
        config: None for the defaults.
        held_out: as `windows`, `[M, W']`, to choose the best state by; None takes a share of every source of `windows`.
            Sources count alike, however long they are, and none may be worse than it was at first.
        progress: called as `(stage, done, total)`.
        folder: where the state to resume from is written. A later call with the same model as it was at first, the same
            text and configuration goes on from it, without a budget of minutes bit for bit.
        provenance: facts about the run (teacher, text, versions) that go into the checkpoint.
        together: in an initialised `torch.distributed` group of several processes every one makes this call with the
            same models and arguments: each takes its share of a step's windows and of the held-out ones, gradients are
            averaged, and all get the same weights (see docs/scale.md). The first one reads and writes the state. False:
            this process works by itself.

    Raises:
        InputError: a value breaks its rule; text or a source of it too short; a teacher with another vocabulary; a
            state of another configuration, text or model; processes that work together have other models or arguments,
            or are more than a step's windows; a loss that is not finite (the student has the best weights so far
            then).
        CheckpointError: a damaged state.
        UnsupportedModelError: weights of the student that are quantised, offloaded or not loaded.
    """
    ranks = Ranks.joined(together)
    with ranks.working():
        config = config or RecoverConfig()
        return _recover(student, teacher, windows, config, held_out, progress, folder, provenance, ranks)


def _recover(
    student: nn.Module,
    teacher: nn.Module,
    windows: Tensor | Windows,
    config: RecoverConfig,
    held_out: Tensor | Windows | None,
    progress: Progress,
    folder: str | Path | None,
    provenance: dict[str, Any] | None,
    ranks: Ranks,
) -> RecoverReport:
    ranks.check_enough(config.batch, "batch", "a window")
    if config.mode == "lora":
        check_peft()
    if ranks.rank == 0:
        check_folder(folder)
    list_name, layers = families.decoder_layers(student)
    check_there(student)
    check_plain(student, layers, list_name)
    for taught in (student, teacher):
        leave_inference(taught)
    check_pair(student, teacher, config.distillation)
    model: Any = student
    text = as_windows(windows, (student, teacher), "windows")
    held = None if held_out is None else as_windows(held_out, (student, teacher), "held_out")
    training, held = split(text, held, config)
    devices = [next(m.parameters()).device for m in (student, teacher)]
    check(devices[0] == devices[1], "teacher", f"be on the student's device ({devices[0]})", devices[1])
    if ranks.several:
        loss = config.to_json()
        ranks.check_same(
            {
                "checkpoint": checksum(student),
                "teacher": checksum(teacher),
                "device": devices[0].type,
                "torch": torch.__version__,
                **loss.pop("distillation"),
                **loss,
                "text": describe(training),
                "held-out text": describe(held),
                "folder": None if folder is None else "given",
            }
        )
    report = RecoverReport(config, windows=len(training.ids), window=training.ids.shape[1])
    report.sources = [] if training.names == UNNAMED else training.facts()
    report.held_out_windows = 0 if held is None else len(held.ids)
    with (
        evaluating(teacher),
        torch.random.fork_rng(),
        PeakMemory() as memory,
        _trainable(student, config),
        in_blocks(student, teacher),
    ):
        lesson = Lesson(student, teacher, training.ids, held, config, ranks)
        report.precision = str(lesson.dtype).removeprefix("torch.")
        run = Run(lesson, report)
        state = State(run, None if folder is None else Path(folder), digest(training, held))
        report.trained = sum(p.numel() for p in run.named.values())
        _train(run, state, progress)
        report.seconds = run.seconds
        report.teacher_seconds, report.held_out_seconds = lesson.teacher_seconds, lesson.held_out_seconds
    report.peak_bytes = memory.growth
    facts = {
        "config": config.to_json(),
        "steps": report.steps,
        "best": report.best,
        "tokens": report.tokens,
        "window": report.window,
        **({"sources": report.sources} if report.sources else {}),
        **(provenance or {}),
    }
    model_provenance.add_recovery(model, facts)
    return report


def _train(run: Run, state: State, progress: Progress) -> None:
    config, report = run.config, run.report
    progress("recovering", 0, config.steps)
    if not state.load():
        if run.lesson.held_out is not None:
            taught = run.measured(run.lesson.teacher)
            report.teacher_ce, report.teacher_sources = taught["ce"], taught.get("sources", {})
        run.measure()
    try:
        while (reason := run.finished()) is None:
            run.step()
            if report.steps % config.every == 0 or run.finished():
                run.measure()
            if config.save_every and report.steps % config.save_every == 0:
                state.save()
            progress("recovering", round(run.share() * config.steps), config.steps)
        report.stopped = reason
        state.save()
    finally:
        run.restore_best()
