"""The verb `recover`: a short training of a pruned model, taught by the dense one, that wins back what pruning lost.

Where the model's logits are nothing but a projection of its last hidden states, no logits of all tokens ever exist, and
the teacher runs once over each window: what is kept of it are hidden states, from which its logits are made again.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .calibration import Progress, check_windows, quiet, stack_batches
from .errors import CheckpointError, InputError, check, check_choice
from .memory import PeakMemory
from .probe import evaluating
from .training import persist
from .training.adapters import Adapters, check_peft, projections
from .training.distillation import (
    DistillationConfig,
    DistillationLoss,
    check_pair,
    distillation_loss,
    distillation_loss_from_hidden,
    plain_head,
    shifted,
)

MODES = ("full", "lora")
TRAINED = ("ffn", "layers", "all")
DECAYS = ("cosine", "linear", "none")
PRECISIONS = ("auto", "float32", "bfloat16")
STATE = "recovery.safetensors"
_FORMAT = "pyprune-recovery-1"
_CACHE_BYTES = 2 << 30
_ONLY_TEXT = DistillationConfig(kl_weight=0.0, ce_weight=1.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class RecoverConfig:
    """How to recover.

    Attributes:
        steps: optimizer steps at most.
        batch: windows a step.
        learning_rate: its peak, for AdamW.
        warmup: share of the run over which it rises, in [0, 1).
        decay: `cosine` or `linear` down to 0, or `none`.
        weight_decay, max_norm: of AdamW; of the gradient, where 0 does not clip.
        train: `ffn`, the FFN weights alone; `layers`, all weights of the decoder layers; `all`, embeddings too.
        mode: `full` trains these weights, `lora` low-rank adapters on the projections among them, merged at the end.
        rank, alpha: of the adapters.
        precision: of the products: `float32`; `bfloat16` (autocast, weights stay float32); `auto` for bfloat16 where
            the device multiplies it fast.
        minutes: of wall time at most, or None. The schedule follows the larger of the shares of steps and of time, so
            the learning rate has come down when the time is over.
        held_out: share of the text that is not trained on, in [0, 0.5], for choosing the best state and stopping early;
            0 returns the last state. Not used where held-out windows are given.
        every: steps between measurements on the held-out text.
        patience: measurements without a new best after which training stops; 0 never stops early.
        save_every: steps between states to resume from, where there is a folder for them; 0 for one at the end.
        seed: of the order of the windows, and of dropout.
        distillation: the loss.

    Raises:
        InputError: a value breaks its rule.
    """

    steps: int = 200
    batch: int = 8
    learning_rate: float = 3e-4
    warmup: float = 0.05
    decay: str = "cosine"
    weight_decay: float = 0.0
    max_norm: float = 1.0
    train: str = "layers"
    mode: str = "full"
    rank: int = 32
    alpha: int = 64
    precision: str = "auto"
    minutes: float | None = None
    held_out: float = 0.05
    every: int = 25
    patience: int = 4
    save_every: int = 0
    seed: int = 0
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "alpha", "every"):
            value = getattr(self, name)
            check(_is_count(value) and value >= 1, name, "be a positive integer", value)
        for name in ("patience", "save_every", "seed"):
            value = getattr(self, name)
            check(_is_count(value), name, "be a non-negative integer", value)
        rate = self.learning_rate
        check(_is_number(rate) and rate > 0, "learning_rate", "be positive and finite", rate)
        for name in ("weight_decay", "max_norm"):
            value = getattr(self, name)
            check(_is_number(value) and value >= 0, name, "be 0 or more, and finite", value)
        check(_is_number(self.warmup) and 0 <= self.warmup < 1, "warmup", "lie in [0, 1)", self.warmup)
        check(_is_number(self.held_out) and 0 <= self.held_out <= 0.5, "held_out", "lie in [0, 0.5]", self.held_out)
        timed = self.minutes is None or (_is_number(self.minutes) and self.minutes > 0)
        check(timed, "minutes", "be positive, or None", self.minutes)
        for name, choices in (("decay", DECAYS), ("train", TRAINED), ("mode", MODES), ("precision", PRECISIONS)):
            check_choice(getattr(self, name), name, choices)
        check(self.mode == "full" or self.train != "all", "train", "be ffn or layers with mode 'lora'", self.train)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "distillation": self.distillation.to_json()}

    def rate(self, share: float) -> float:
        """The learning rate when `share` of the run, in [0, 1], is over."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        left = 1 - (share - self.warmup) / (1 - self.warmup)
        factor = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "none": 1.0}[self.decay]
        return self.learning_rate * factor


@dataclass
class RecoverReport:
    """What `recover` did.

    Attributes:
        config: as given.
        steps, tokens: taken and trained on; each pass over a window counts.
        windows, window, held_out_windows: of training text, tokens in each, and not trained on.
        trained: parameters that could change.
        precision: `float32` or `bfloat16`.
        train: of each step, `{step, rate, loss, ce, kl, hidden}`.
        held_out: measurements, `{step, ce}`, in nats a token; step 0 is the model as it came.
        teacher_ce: the teacher's measure on the same text, or None without held-out text.
        best: the step whose weights the model has now.
        stopped: `steps`, `minutes` or `patience`: what ended it.
        seconds: wall time, those before a resume included; `teacher_seconds` and `held_out_seconds` are parts of it.
        peak_bytes: growth of the process's memory, over what it held before.
    """

    config: RecoverConfig
    steps: int = 0
    tokens: int = 0
    windows: int = 0
    window: int = 0
    held_out_windows: int = 0
    trained: int = 0
    precision: str = "float32"
    train: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    teacher_ce: float | None = None
    best: int = 0
    stopped: str = "steps"
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    held_out_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def perplexities(self) -> dict[str, float] | None:
        """Of the held-out text: `before`, `after` (the weights of step `best`), and the `teacher`'s."""
        if not self.held_out or self.teacher_ce is None:
            return None
        ces = {m["step"]: m["ce"] for m in self.held_out}
        return {"before": math.exp(ces[0]), "after": math.exp(ces[self.best]), "teacher": math.exp(self.teacher_ce)}

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "config": self.config.to_json(), "tokens_per_second": self.tokens_per_second}


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the products: bfloat16 pays off only where the device has instructions for it."""
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _order(count: int, epoch: int, seed: int) -> Tensor:
    """The windows of one pass, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def _rows(step: int, count: int, batch: int, seed: int) -> Tensor:
    """`[batch]`: windows of a step; passes follow each other without a gap, and only the step's number matters."""
    places = torch.arange(step * batch, (step + 1) * batch)
    orders = {epoch: _order(count, epoch, seed) for epoch in set((places // count).tolist())}
    return torch.stack([orders[int(p) // count][int(p) % count] for p in places])


class _Lesson:
    """Student, teacher and text: the loss of a batch, and of the held-out windows."""

    def __init__(
        self, student: Any, teacher: Any, windows: Tensor, held_out: Tensor | None, config: RecoverConfig
    ) -> None:
        self.student, self.teacher, self.windows, self.held_out = student, teacher, windows, held_out
        self.config = config
        self.device = next(student.parameters()).device
        self.dtype = _precision(config.precision, self.device)
        self.teacher_seconds = self.held_out_seconds = 0.0
        heads = plain_head(student), plain_head(teacher)
        fits = None not in heads and not config.distillation.hidden_weight
        self._heads = heads if fits else None
        self._groups = _order(len(windows), 0, config.seed).split(config.batch)
        self._group_of = {int(row): n for n, group in enumerate(self._groups) for row in group}
        self._kept: dict[int, Tensor] = {}
        # In bfloat16 a copy of the teacher is no smaller than what the weights would be cast to at every step.
        width = teacher.config.get_text_config().hidden_size
        self._keeps = windows.numel() * width * self.dtype.itemsize <= _CACHE_BYTES

    @contextmanager
    def _casting(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    @torch.no_grad()
    def _teacher_states(self, rows: Tensor) -> Tensor:
        """`[B, W, D]`: the teacher's last hidden states.

        Windows go through the teacher in the groups in which the first pass meets them, so that a run and its
        continuation see the same bits, whichever windows a step needs.
        """
        started = time.perf_counter()
        if not self._keeps:
            states = self._base(self.teacher, self.windows[rows]).to(self.dtype)
        else:
            for row in rows.tolist():
                if row not in self._kept:
                    group = self._groups[self._group_of[row]]
                    found = self._base(self.teacher, self.windows[group]).to(self.dtype)
                    self._kept.update(zip(group.tolist(), found, strict=True))
            states = torch.stack([self._kept[row] for row in rows.tolist()])
        self.teacher_seconds += time.perf_counter() - started
        return states

    def _base(self, model: Any, ids: Tensor) -> Tensor:
        with self._casting():
            result: Tensor = model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return result

    def _full(self, model: Any, ids: Tensor, hidden: bool) -> tuple[Tensor, Any]:
        with self._casting():
            out = model(input_ids=ids.to(self.device), use_cache=False, output_hidden_states=hidden)
        return out.logits, out.hidden_states[1:] if hidden else None

    def loss(self, rows: Tensor) -> DistillationLoss:
        """The loss of some windows, differentiable in the student's weights."""
        ids, config = self.windows[rows], self.config.distillation
        labels = shifted(ids).to(self.device)
        if self._heads is not None:
            mine, theirs = self._heads
            assert mine is not None and theirs is not None
            taught = (self._teacher_states(rows), theirs) if config.kl_weight else None
            return distillation_loss_from_hidden(
                (self._base(self.student, ids), mine), taught, labels, config, self.dtype
            )
        hidden = bool(config.hidden_weight)
        logits, states = self._full(self.student, ids, hidden)
        started = time.perf_counter()
        with torch.no_grad():
            their_logits, their_states = self._full(self.teacher, ids, hidden)
        self.teacher_seconds += time.perf_counter() - started
        return distillation_loss(logits, their_logits, labels, config, states, their_states)

    @torch.no_grad()
    def measure(self, model: Any) -> float:
        """Nats a token of student or teacher on the held-out windows."""
        assert self.held_out is not None
        started = time.perf_counter()
        total = 0.0
        head = None if self._heads is None else self._heads[model is self.teacher]
        with evaluating(model):
            for ids in self.held_out.split(self.config.batch):
                labels = shifted(ids).to(self.device)
                if head is not None:
                    states = self._base(model, ids)
                    loss = distillation_loss_from_hidden((states, head), None, labels, _ONLY_TEXT, self.dtype)
                else:
                    loss = distillation_loss(self._full(model, ids, False)[0], None, labels, _ONLY_TEXT)
                total += loss.ce * len(ids)
        self.held_out_seconds += time.perf_counter() - started
        return total / len(self.held_out)


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


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class _Run:
    """One call of `recover`: what is trained, the optimizer, the best state so far, and where all that is kept."""

    def __init__(self, lesson: _Lesson, report: RecoverReport, folder: Path | None, text: str) -> None:
        self.lesson, self.report, self.config = lesson, report, lesson.config
        self.named = {n: p for n, p in lesson.student.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=0.0, weight_decay=self.config.weight_decay, betas=(0.9, 0.95), fused=True
        )
        self.best: dict[str, Tensor] | None = None
        self.stale = 0
        self._file = None if folder is None else folder / STATE
        self._text = text
        self._before = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def share(self) -> float:
        """Of the run that is over, by steps or by time, the larger; the next step lies half in the past."""
        by_time = 0.0 if self.config.minutes is None else self.seconds / (60 * self.config.minutes)
        return min(1.0, max((self.report.steps + 0.5) / self.config.steps, by_time))

    def step(self) -> None:
        """One optimizer step.

        Raises:
            InputError: the loss is not finite.
        """
        report, config = self.report, self.config
        rate = config.rate(self.share())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(config.seed * 1_000_003 + report.steps)
        loss = self.lesson.loss(_rows(report.steps, report.windows, config.batch, config.seed))
        value = float(loss.total.detach())
        check(math.isfinite(value), "loss", f"be finite at step {report.steps}; lower the learning_rate", value)
        loss.total.backward()
        if config.max_norm:
            torch.nn.utils.clip_grad_norm_(self.named.values(), config.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        report.steps += 1
        report.tokens += config.batch * report.window
        parts = {"loss": value, "ce": loss.ce, "kl": loss.kl, "hidden": loss.hidden}
        report.train.append({"step": report.steps, "rate": rate, **parts})

    def measure(self) -> None:
        """Measure on the held-out text, and remember the weights if they are the best so far."""
        if self.lesson.held_out is None:
            return
        report = self.report
        found = self.lesson.measure(self.lesson.student)
        better = not report.held_out or found < min(m["ce"] for m in report.held_out)
        report.held_out.append({"step": report.steps, "ce": found})
        if better:
            report.best, self.stale = report.steps, 0
            self.best = {n: p.detach().to("cpu", copy=True) for n, p in self.named.items()}
        else:
            self.stale += 1

    def finished(self) -> str | None:
        """Why training ends here, or None."""
        config = self.config
        if self.report.steps >= config.steps:
            return "steps"
        if config.minutes is not None and self.seconds >= 60 * config.minutes:
            return "minutes"
        return "patience" if config.patience and self.stale >= config.patience else None

    def restore_best(self) -> None:
        if self.best is None:
            self.report.best = self.report.steps
            return
        for name, parameter in self.named.items():
            parameter.data.copy_(self.best[name])

    def _facts(self) -> dict[str, Any]:
        return {"config": self.config.to_json(), "text": self._text, "precision": self.report.precision}

    def save(self) -> None:
        """Write everything that another call needs to go on from here."""
        if self._file is None:
            return
        tensors = {f"weight.{n}": p for n, p in self.named.items()}
        tensors |= {f"best.{n}": t for n, t in (self.best or {}).items()}
        for name, parameter in self.named.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        report = self.report
        curves = {"train": report.train, "held_out": report.held_out}
        numbers = {"steps": report.steps, "tokens": report.tokens, "best": report.best, "stale": self.stale}
        lesson = self.lesson
        seconds = [self.seconds, lesson.teacher_seconds, lesson.held_out_seconds]
        facts = {**self._facts(), **curves, **numbers, "teacher_ce": report.teacher_ce, "seconds": seconds}
        persist.write(self._file, _FORMAT, tensors, facts)

    @torch.no_grad()
    def load(self) -> bool:
        """Go on from the state in the folder, if there is one.

        Raises:
            InputError: it is of another configuration, text or model.
            CheckpointError: it is damaged.
        """
        if self._file is None or not self._file.is_file():
            return False
        tensors, facts = persist.read(self._file, _FORMAT)
        try:
            self._check_same(facts)
            for name, parameter in self.named.items():
                stored = tensors[f"weight.{name}"]
                check(stored.shape == parameter.shape, f"{name} of the state to resume", "fit", tuple(stored.shape))
                parameter.copy_(stored)
                keys = ("step", "exp_avg", "exp_avg_sq") if facts["steps"] else ()
                self.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" or parameter.is_cuda else "cpu")
                    for key in keys
                }
            best = {n: tensors[f"best.{n}"] for n in self.named if f"best.{n}" in tensors}
            self.best = best or None
            report = self.report
            report.train, report.held_out = list(facts["train"]), list(facts["held_out"])
            report.steps, report.tokens, report.best = (int(facts[k]) for k in ("steps", "tokens", "best"))
            report.teacher_ce = facts["teacher_ce"]
            self.stale = int(facts["stale"])
            self._before, self.lesson.teacher_seconds, self.lesson.held_out_seconds = map(float, facts["seconds"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file} is damaged, or of another model: {error}") from error
        return True

    def _check_same(self, facts: dict[str, Any]) -> None:
        own = self._facts()
        mine, theirs = ({**f["config"], "text": f["text"], "precision": f["precision"]} for f in (own, facts))
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key), theirs.get(key)
            check(a == b, f"{key} of the state to resume", f"be {a!r}, as asked for now", b)


def split(windows: Tensor, held_out: Tensor | None, config: RecoverConfig) -> tuple[Tensor, Tensor | None]:
    """The windows to train on, and the held-out ones: those given, or the last of the text, or none.

    Raises:
        InputError: too few windows to train on.
    """
    if held_out is None and config.held_out:
        count = max(1, round(config.held_out * len(windows)))
        windows, held_out = windows[:-count], windows[-count:]
    check(len(windows) >= config.batch, "text", f"hold at least {config.batch} windows (batch)", len(windows))
    return windows, held_out


@contextmanager
def _trainable(student: Any, config: RecoverConfig) -> Iterator[Adapters | None]:
    """float32 weights, the chosen ones trainable, in training mode; afterwards everything as it was, but trained."""
    dtypes = {n: p.dtype for n, p in student.named_parameters()}
    wanted = {n: p.requires_grad for n, p in student.named_parameters()}
    adapters = None
    with evaluating(student):
        student.float()
        try:
            if config.mode == "lora":
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


def recover(
    student: nn.Module,
    teacher: nn.Module,
    windows: Tensor,
    config: RecoverConfig | None = None,
    *,
    held_out: Tensor | None = None,
    progress: Progress = quiet,
    folder: str | Path | None = None,
    provenance: dict[str, Any] | None = None,
) -> RecoverReport:
    """Train a pruned model for a while, in place, taught by the dense one.

    Args:
        student: a causal LM of Transformers; its weights are float32 while they are trained, and get their dtypes back.
        teacher: the dense model, of the same vocabulary, on the same device; it does not change.
        windows: `[N, W]` token ids to train on.
        config: None for the defaults.
        held_out: `[M, W']` token ids to choose the best state by; None takes a share of `windows`.
        progress: called as `(stage, done, total)`.
        folder: where the state to resume from is written. A later call with the same model as it was at first, the same
            text and configuration goes on from it, without a budget of minutes bit for bit.
        provenance: facts about the run (teacher, text, versions) that go into the checkpoint.

    Raises:
        InputError: a value breaks its rule; text too short; a teacher with another vocabulary; a state of another
            configuration, text or model; a loss that is not finite (the student has the best weights so far then).
        CheckpointError: a damaged state.
    """
    config = config or RecoverConfig()
    if config.mode == "lora":
        check_peft()
    check_pair(student, teacher, config.distillation)
    model: Any = student
    vocabulary = model.config.get_text_config().vocab_size
    windows = stack_batches(windows, vocabulary)
    held = None if held_out is None else stack_batches(held_out, vocabulary)
    for ids, name in ((windows, "windows"), (held, "held_out")):
        if ids is not None:
            check(ids.shape[1] >= 2, name, "have at least 2 tokens", ids.shape[1])
            check_windows(student, ids, name)
            check_windows(teacher, ids, name)
    training, held = split(windows, held, config)
    devices = [next(m.parameters()).device for m in (student, teacher)]
    check(devices[0] == devices[1], "teacher", f"be on the student's device ({devices[0]})", devices[1])
    report = RecoverReport(config, windows=len(training), window=training.shape[1])
    report.held_out_windows = 0 if held is None else len(held)
    with evaluating(teacher), torch.random.fork_rng(), PeakMemory() as memory, _trainable(student, config):
        lesson = _Lesson(student, teacher, training, held, config)
        report.precision = str(lesson.dtype).removeprefix("torch.")
        run = _Run(lesson, report, None if folder is None else Path(folder), _digest(training, held))
        report.trained = sum(p.numel() for p in run.named.values())
        _train(run, progress)
        report.seconds = run.seconds
        report.teacher_seconds, report.held_out_seconds = lesson.teacher_seconds, lesson.held_out_seconds
    report.peak_bytes = memory.growth
    facts = {
        "config": config.to_json(),
        "steps": report.steps,
        "best": report.best,
        "tokens": report.tokens,
        "window": report.window,
        **(provenance or {}),
    }
    block = getattr(model.config, "pyprune", None) or {}
    model.config.pyprune = {**block, "recovery": [*block.get("recovery", []), copy.deepcopy(facts)]}
    return report


def _train(run: _Run, progress: Progress) -> None:
    config, report = run.config, run.report
    progress("recovering", 0, config.steps)
    if not run.load():
        if run.lesson.held_out is not None:
            report.teacher_ce = run.lesson.measure(run.lesson.teacher)
        run.measure()
    try:
        while (reason := run.finished()) is None:
            run.step()
            if report.steps % config.every == 0 or run.finished():
                run.measure()
            if config.save_every and report.steps % config.save_every == 0:
                run.save()
            progress("recovering", round(run.share() * config.steps), config.steps)
        report.stopped = reason
        run.save()
    finally:
        run.restore_best()
