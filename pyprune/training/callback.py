"""Pruning during training as a callback of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..base.errors import check
from ..model.mask import Mask
from ..model.weights import is_sharded
from .config import TrainingConfig
from .pruner import TrainingPruner


class PruningCallback(TrainerCallback):
    """`Trainer(..., callbacks=[PruningCallback(config)])` prunes while it trains, and cuts at the end.

    Its state goes into the Trainer's checkpoint folders, and comes from there when the Trainer resumes. Uses the events
    that Transformers 5.17 to 5.23 have.

    Args:
        config: what to do; its steps may not exceed the Trainer's.
        finish: cut the model when training ends; otherwise it stays masked, and `pruner.finish()` cuts it.
        resume: the folder that the Trainer resumes from; None for the checkpoint of the step in its output folder.
        provenance: facts about the run that go into the mask and the checkpoint.

    Attributes:
        pruner: from the beginning of the training on.
        mask: from its end on, if it was finished.
    """

    def __init__(
        self,
        config: TrainingConfig,
        finish: bool = True,
        resume: str | Path | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.finish, self.resume, self.provenance = config, finish, resume, provenance
        self.pruner: TrainingPruner | None = None
        self.mask: Mask | None = None

    def _running(self) -> TrainingPruner:
        assert self.pruner is not None, "the Trainer calls on_train_begin first"
        return self.pruner

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Mask the model, and go on from the checkpoint if the Trainer does.

        Raises:
            InputError: several devices in one process, processes that do not hold the whole model each (FSDP,
                DeepSpeed), fp16 (its loss scale would be in the scores), a search over
                hyperparameters, the best model to be loaded at the end (its masks are gone by then), more steps in the
                schedule than the Trainer takes, or a checkpoint that does not belong here.
        """
        assert model is not None
        check(args.n_gpu <= 1, "Trainer", "run with one device a process (torchrun)", args.n_gpu)
        cut = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
        cut += ["weights that are cut over processes"] if is_sharded(model) else []
        check(not cut, "Trainer", "give every process the whole model (DistributedDataParallel)", cut)
        check(not args.fp16, "fp16", "be off, the loss scale would be in the scores; use bf16", args.fp16)
        best = args.load_best_model_at_end
        check(not best, "load_best_model_at_end", "be off, the masks belong to the last step", best)
        check(not state.is_hyper_param_search, "Trainer", "not search hyperparameters while pruning", True)
        steps = self.config.steps
        check(steps <= state.max_steps, "steps", f"be at most the Trainer's ({state.max_steps})", steps)
        if self.pruner is not None:
            self.pruner.remove()  # of a training that was broken off
        self.pruner = TrainingPruner(model, self.config)
        if state.global_step > 0:
            try:
                self.pruner.load(self.resume or self._folder(args, state))
            except Exception:
                self.pruner.remove()
                raise

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Masks by the schedule, once an optimizer step."""
        self._running().before_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scores, after the last backward pass and the clipping."""
        self._running().step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The state, into the Trainer's checkpoint folder; the process that writes that writes this."""
        if args.should_save:
            self._running().save(self._folder(args, state))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The cut; the Trainer's optimizer goes on with the narrower FFNs when it trains again."""
        if self.finish:
            self.mask = self._running().finish(self.provenance, [] if optimizer is None else [optimizer])
