"""How to recover, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ...base.errors import check, check_choice, is_count, is_finite
from ...base.machine import PRECISIONS
from ..distillation import DistillationConfig

MODES = ("full", "lora")
TRAINED = ("ffn", "layers", "all")
DECAYS = ("cosine", "linear", "none")
# The teacher's whole distribution and nothing of the text. On text that the teacher wrote, cross entropy has the same
# gradient in the mean, but with the noise of one sample; on other text it fits that text's domain, which no other
# domain is better for. At temperature 1 the KL is what perplexity loses on the teacher's own text.
ONLY_TEACHER = DistillationConfig(temperature=1.0, kl_weight=1.0, ce_weight=0.0)


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
        held_out: share of every source that is not trained on (one window at least), in [0, 0.5], for choosing the best
            state and stopping early; 0 returns the last state. Not used where held-out windows are given.
        every: steps between measurements on the held-out text.
        patience: measurements without a new best or a new lowest mean after which training stops; 0 never stops early.
        save_every: steps between states to resume from, where there is a folder for them; 0 for one at the end.
        seed: of the order of the windows, and of dropout.
        distillation: the loss.

    Raises:
        InputError: a value breaks its rule.
    """

    steps: int = 300
    batch: int = 2
    learning_rate: float = 1e-4
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
    every: int = 60
    patience: int = 4
    save_every: int = 0
    seed: int = 0
    distillation: DistillationConfig = ONLY_TEACHER

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rank", "alpha", "every"):
            value = getattr(self, name)
            check(is_count(value) and value >= 1, name, "be a positive integer", value)
        for name in ("patience", "save_every", "seed"):
            value = getattr(self, name)
            check(is_count(value), name, "be a non-negative integer", value)
        rate = self.learning_rate
        check(is_finite(rate) and rate > 0, "learning_rate", "be positive and finite", rate)
        for name in ("weight_decay", "max_norm"):
            value = getattr(self, name)
            check(is_finite(value) and value >= 0, name, "be 0 or more, and finite", value)
        check(is_finite(self.warmup) and 0 <= self.warmup < 1, "warmup", "lie in [0, 1)", self.warmup)
        check(is_finite(self.held_out) and 0 <= self.held_out <= 0.5, "held_out", "lie in [0, 0.5]", self.held_out)
        timed = self.minutes is None or (is_finite(self.minutes) and self.minutes > 0)
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
        sources: of the training text, `{source, tokens, share}`; empty for token ids that have none.
        trained: parameters that could change.
        precision: `float32` or `bfloat16`.
        train: of each step, `{step, rate, loss, ce, kl, hidden}`.
        held_out: measurements, `{step, ce, sources: {name: ce}}`, in nats a token. `ce` is the mean over sources,
            each of which counts alike; token ids without a source have no `sources`. Step 0 is the model as it came.
        teacher_ce, teacher_sources: the teacher's measures on the same text; None and empty without held-out text.
        best: the step whose weights the model has now: of the lowest `ce` among the measurements in which no source is
            worse than at step 0.
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
    sources: list[dict[str, Any]] = field(default_factory=list)
    trained: int = 0
    precision: str = "float32"
    train: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    teacher_ce: float | None = None
    teacher_sources: dict[str, float] = field(default_factory=dict)
    best: int = 0
    stopped: str = "steps"
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    held_out_seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def perplexities(self) -> dict[str, float] | None:
        """Of the held-out text: `before`, `after` (the weights of step `best`), and the `teacher`'s.

        Of several sources it is the geometric mean.
        """
        if not self.held_out or self.teacher_ce is None:
            return None
        ces = {m["step"]: m["ce"] for m in self.held_out}
        return {"before": math.exp(ces[0]), "after": math.exp(ces[self.best]), "teacher": math.exp(self.teacher_ce)}

    @property
    def source_perplexities(self) -> dict[str, dict[str, float]]:
        """As `perplexities`, of every source with a name."""
        ces = {m["step"]: m.get("sources", {}) for m in self.held_out}
        return {
            name: {"before": math.exp(ces[0][name]), "after": math.exp(ces[self.best][name]), "teacher": math.exp(ce)}
            for name, ce in self.teacher_sources.items()
        }

    def worse(self, measured: dict[str, Any]) -> list[str]:
        """The sources on which a measurement is worse than the model as it came."""
        return [n for n, ce in measured.get("sources", {}).items() if ce > self.held_out[0]["sources"][n]]

    @property
    def passed_over(self) -> dict[str, Any] | None:
        """The measurement of the lowest mean, if it is not the best because of sources that are `worse` in it."""
        lowest = min(self.held_out, key=lambda m: float(m["ce"]), default=None)
        worse = [] if lowest is None else self.worse(lowest)
        return {**lowest, "worse": worse} if lowest is not None and worse else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        more = {"tokens_per_second": self.tokens_per_second, "passed_over": self.passed_over}
        return {**vars(self), "config": self.config.to_json(), **more}
