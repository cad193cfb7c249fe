"""Pruning during training as a callback of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..base.errors import check
from ..model.mask import Mask
from ..model.weights import is_sharded
from .config import TrainingConfig
from .pruner import TrainingPruner


def _foreign(args: TrainingArguments, model: nn.Module) -> str | None:
    """What holds the model in another way than whole in every process, or cut by FSDP2."""
    if getattr(args, "deepspeed", None):
        return "DeepSpeed"
    if not dist.is_available():
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        return "FSDP1"
    return "weights cut otherwise" if is_sharded(model) and not isinstance(model, FSDPModule) else None


class PruningCallback(TrainerCallback):
    """`Trainer(..., callbacks=[PruningCallback(config)])` prunes while it trains, and cuts at the end.

    Its state goes into the Trainer's checkpoint folders, and comes from there when the Trainer resumes. Uses the events
    that Transformers 5.17 to 5.23 have. In several processes every one has the callback: by DistributedDataParallel
    each cuts its model, alike; by FSDP2 (`fsdp=True`) the weights are put together, narrower, in `into`.

    Args:
        config: what to do; its steps may not exceed the Trainer's.
        finish: cut the model when training ends; otherwise it stays masked, and `pruner.finish()` cuts it.
        resume: the folder that the Trainer resumes from; None for the checkpoint of the step in its output folder.
        provenance: facts about the run that go into the mask and the checkpoint.
        into: with FSDP2 and `finish`, a whole model of the same config on the first process, which gets the weights and
            is cut; the trained one stays dense. None on the others, and without FSDP2.

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
        into: nn.Module | None = None,
    ) -> None:
        self.config, self.finish, self.resume, self.provenance, self.into = config, finish, resume, provenance, into
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
            InputError: several devices in one process, processes that neither hold the whole model each nor cut it by
                FSDP2 (FSDP1, DeepSpeed, tensor parallel), FSDP2 without `into`, fp16 (its loss scale would be in the
                scores), a search over hyperparameters, the best model to be loaded at the end (its masks are gone by
                then), more steps in the schedule than the Trainer takes, or a checkpoint that does not belong here.
        """
        assert model is not None
        check(args.n_gpu <= 1, "Trainer", "run with one device a process (torchrun)", args.n_gpu)
        foreign = _foreign(args, model)
        rule = "give every process the whole model (DistributedDataParallel), or cut it by FSDP2"
        check(foreign is None, "Trainer", rule, foreign)
        check(not args.fp16, "fp16", "be off, the loss scale would be in the scores; use bf16", args.fp16)
        best = args.load_best_model_at_end
        check(not best, "load_best_model_at_end", "be off, the masks belong to the last step", best)
        check(not state.is_hyper_param_search, "Trainer", "not search hyperparameters while pruning", True)
        steps = self.config.steps
        check(steps <= state.max_steps, "steps", f"be at most the Trainer's ({state.max_steps})", steps)
        if self.pruner is not None:
            self.pruner.remove()  # of a training that was broken off
        self.pruner = TrainingPruner(model, self.config)
        try:
            if self.finish:
                self.pruner.check_into(self.into)
            if state.global_step > 0:
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
        """The state, into the Trainer's checkpoint folder; the first process writes it."""
        if args.should_save or is_sharded(self._running().model):
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
            optimizers = [] if optimizer is None else [optimizer]
            self.mask = self._running().finish(self.provenance, optimizers, self.into)
