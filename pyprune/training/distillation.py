"""Distillation: the student learns from text and from what a teacher, usually the dense model, says of the same text.

with attach(student, teacher):
    loss = student(input_ids=ids, labels=ids).loss     # Trainer or a plain loop
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base.errors import check
from ..model.probe import evaluating
from .chunked_loss import IGNORED
from .distillation_config import DistillationConfig
from .distillation_loss import DistillationLoss, distillation_loss, distillation_loss_from_hidden

__all__ = [
    "Distillation",
    "DistillationConfig",
    "DistillationLoss",
    "attach",
    "check_pair",
    "distillation_loss",
    "distillation_loss_from_hidden",
    "plain_head",
    "shifted",
]


@torch.no_grad()
def plain_head(model: Any) -> nn.Linear | None:
    """The output projection, if the logits are nothing but it over the base model's last hidden states; or None.

    Found by trying: families scale or cap their logits, or project hidden states first.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return None
    ids = torch.arange(min(8, len(head.weight)), device=head.weight.device)[None]
    with evaluating(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != head.weight.shape[1]:
            return None
        return head if torch.allclose(model(input_ids=ids, use_cache=False).logits, head(hidden)) else None


def shifted(labels: Tensor) -> Tensor:
    """`[B, T]`: at each position the label of the next one, as causal models predict; -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def check_pair(student: Any, teacher: Any, config: DistillationConfig) -> None:
    """Raise `InputError` unless `teacher` can teach `student`: another model of the same vocabulary.

    With a hidden_weight, also the hidden size and the number of layers must be the same.
    """
    check(teacher is not student, "teacher", "be another model than the student", type(teacher).__name__)
    mine, theirs = (m.config.get_text_config() for m in (student, teacher))
    same = mine.vocab_size == theirs.vocab_size
    check(same, "vocabulary of the teacher", f"be as large as the student's ({mine.vocab_size})", theirs.vocab_size)
    if not config.hidden_weight:
        return
    for name in ("hidden_size", "num_hidden_layers"):
        a, b = getattr(mine, name), getattr(theirs, name)
        check(a == b, f"{name} of the student", f"be the teacher's ({b}) with a hidden_weight above 0", a)
    strange = [n for n in config.layers or () if n >= theirs.num_hidden_layers]
    check(not strange, "layers", f"be numbers below {theirs.num_hidden_layers}", strange)


class Distillation:
    """What `attach` gives: the hooks, until `remove` or the end of a `with` block.

    Attributes:
        last: the `DistillationLoss` of the last forward pass that had labels, or None.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, config: DistillationConfig) -> None:
        self.config = config
        self._teacher: Any = teacher
        self._taken: dict[str, Any] = {}
        self._handles = [
            student.register_forward_pre_hook(self._before, with_kwargs=True),
            student.register_forward_hook(self._after, with_kwargs=True),
        ]
        self.last: DistillationLoss | None = None

    def remove(self) -> None:
        """The student computes its own loss again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Distillation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _before(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the labels away, so that the model does not work out a loss that nobody wants."""
        names = ("labels", "num_items_in_batch", "output_hidden_states")
        self._taken = {name: kwargs.get(name) for name in names}
        if self._taken["labels"] is None:
            wanted = student.training and torch.is_grad_enabled()
            rule = (
                "be given to the student that distils (no label_smoothing_factor or compute_loss_func in the Trainer)"
            )
            check(not wanted, "labels", rule, None)
            return args, kwargs
        rest = {name: value for name, value in kwargs.items() if name not in names}
        if self.config.hidden_weight or self._taken["output_hidden_states"]:
            rest["output_hidden_states"] = True
        return args, rest

    def _after(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taken, self._taken = self._taken, {}
        labels = taken.get("labels")
        if labels is None:
            return output
        as_tuple = isinstance(output, tuple)
        logits = output[0] if as_tuple else output.logits
        check(logits.shape[:2] == labels.shape, "labels", f"have shape {tuple(logits.shape[:2])}", tuple(labels.shape))
        if next(self._teacher.parameters()).device != logits.device:
            self._teacher.to(logits.device)
        with torch.no_grad():
            theirs = self._teacher(*args, **{**kwargs, "return_dict": True, "use_cache": False})
        hidden: list[Any] = [None, None]
        if self.config.hidden_weight:
            check(not as_tuple, "return_dict", "be True with a hidden_weight above 0", False)
            hidden = [output.hidden_states[1:], theirs.hidden_states[1:]]
        self.last = loss = distillation_loss(
            logits, theirs.logits, shifted(labels), self.config, *hidden, tokens=taken["num_items_in_batch"]
        )
        if as_tuple:
            return (loss.total, *output)
        shown = {name: value for name, value in output.items() if name not in ("loss", "hidden_states")}
        if taken["output_hidden_states"]:
            shown["hidden_states"] = output.hidden_states
        return type(output)(loss=loss.total, **shown)


def attach(student: nn.Module, teacher: nn.Module, config: DistillationConfig | None = None) -> Distillation:
    """From now on, the loss of `student(..., labels=...)` is the distillation loss against `teacher`.

    `transformers.Trainer` and plain loops need no change. The teacher runs on the same inputs without gradients; it is
    put into eval mode, and follows the student to its device.

    Args:
        student, teacher: causal LMs of Transformers with one vocabulary.
        config: None for the defaults.

    Raises:
        InputError: the teacher is the student itself, has another vocabulary size, or, with a hidden_weight, another
            hidden size or number of layers; later, a training pass of the student without labels.
    """
    config = config or DistillationConfig()
    check_pair(student, teacher, config)
    teacher.eval()
    return Distillation(student, teacher, config)
