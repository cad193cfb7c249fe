"""The distillation loss against its naive formula, and as what a model's own `loss` becomes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune import InputError
from pyprune.training import chunked_loss
from pyprune.training.distillation import (
    DistillationConfig,
    attach,
    distillation_loss,
    distillation_loss_from_hidden,
    plain_head,
    shifted,
)

CE = DistillationConfig(kl_weight=0.0, ce_weight=1.0)
KL = DistillationConfig(temperature=1.0, kl_weight=1.0, ce_weight=0.0)
V = 11


def naive(z: Tensor, z_teacher: Tensor, labels: Tensor, config: DistillationConfig) -> Tensor:
    """The formula as it is written."""
    T, kept = config.temperature, labels != -100
    z, q = z[kept], torch.softmax(z_teacher[kept] / T, -1)
    kl = (q * (q.log() - torch.log_softmax(z / T, -1))).sum(-1).mean()
    return config.ce_weight * F.cross_entropy(z, labels[kept]) + config.kl_weight * T**2 * kl


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows, in blocks of two: several of both, and last ones that are shorter."""
    monkeypatch.setattr(chunked_loss, "_CHUNK", 3 * V)
    monkeypatch.setattr(chunked_loss, "_BLOCK", 2 * V)


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, q = (3 * torch.randn(2, 5, V, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = -100
    return z, q, labels


def test_a_teacher_that_agrees_costs_nothing(case: tuple[Tensor, Tensor, Tensor]) -> None:
    z, _, labels = case
    z = z.float().requires_grad_(True)
    loss = distillation_loss(z, z.detach().clone(), labels, KL)
    loss.total.backward()
    assert loss.total.item() == loss.kl == loss.ce == 0.0
    assert z.grad is not None and not z.grad.any()


def test_kl_of_a_scaled_logit() -> None:
    """Two tokens: the teacher gives the first the odds e^4, the student e^2; at temperature 2 these are e^2 and e."""
    teacher, student = torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    q, p = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    found = distillation_loss(student, teacher, torch.tensor([0]))
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.ce == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    assert found.total.item() == pytest.approx(0.5 * found.ce + 0.5 * 4 * kl, rel=1e-5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("config", [DistillationConfig(), DistillationConfig(3.5, 0.3, 1.2), CE, KL], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(
    case: tuple[Tensor, Tensor, Tensor], config: DistillationConfig
) -> None:
    z, q, labels = case
    exact = z.clone().requires_grad_(True)
    wanted = naive(exact.view(-1, V), q.view(-1, V), labels.view(-1), config)
    (2 * wanted).backward()
    mine = z.float().requires_grad_(True)
    loss = distillation_loss(mine, q.float(), labels, config)
    (2 * loss.total).backward()
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(mine.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)
    assert not mine.grad[labels == -100].any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("config", [DistillationConfig(), CE], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_from_hidden_states_is_the_same(
    case: tuple[Tensor, Tensor, Tensor], config: DistillationConfig, bias: bool
) -> None:
    labels = case[2]
    torch.manual_seed(1)
    head, other = torch.nn.Linear(6, V, bias=bias), torch.nn.Linear(4, V, bias=bias)
    hidden, theirs = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 4)
    wanted = [hidden, *head.parameters()]
    loss = distillation_loss(head(hidden), other(theirs), labels, config)
    expected = torch.autograd.grad(loss.total, wanted)
    again = distillation_loss_from_hidden((hidden, head), (theirs, other), labels, config)
    assert again.total.item() == pytest.approx(loss.total.item(), rel=1e-6)
    assert (again.ce, again.kl) == pytest.approx((loss.ce, loss.kl), rel=1e-5)
    for got, want in zip(torch.autograd.grad(again.total, wanted), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_few_floats_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float32 buffer of probabilities is of one block."""
    seen: list[int] = []
    original = torch.log_softmax
    monkeypatch.setattr(chunked_loss, "_BLOCK", 4 * V)
    monkeypatch.setattr(torch, "log_softmax", lambda x, dim: (seen.append(x.numel()), original(x, dim))[1])
    head = torch.nn.Linear(6, V)
    labels = torch.zeros(1, 50, dtype=torch.int64)
    distillation_loss_from_hidden(
        (torch.randn(1, 50, 6), head), (torch.randn(1, 50, 6), head), labels, DistillationConfig()
    )
    assert len(seen) == 3 * 13 and max(seen) == 4 * V


def test_the_hidden_part_is_the_mean_square() -> None:
    config = DistillationConfig(kl_weight=0.0, ce_weight=0.0, hidden_weight=0.5, layers=(1,))
    labels = torch.tensor([[1, -100]])
    student = [torch.zeros(1, 2, 4), torch.tensor([[[1.0, 2.0, 3.0, 4.0], [9.0] * 4]], requires_grad=True)]
    teacher = [torch.full((1, 2, 4), 7.0), torch.zeros(1, 2, 4)]
    loss = distillation_loss(torch.zeros(1, 2, V), torch.zeros(1, 2, V), labels, config, student, teacher)
    assert loss.hidden == pytest.approx(30 / 4) and loss.total.item() == pytest.approx(15 / 4)
    loss.total.backward()
    assert student[1].grad[0, 0].tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert not student[1].grad[0, 1].any()


def test_attached_model_has_the_distillation_loss(tiny: Callable[..., Any], ids: Tensor) -> None:
    student, teacher = tiny("llama", seed=1), tiny("llama")
    teacher.train()
    own = student(input_ids=ids, labels=ids).loss.item()
    handle = attach(student, teacher)
    assert not teacher.training
    out = student(input_ids=ids, labels=ids)
    logits = teacher(input_ids=ids).logits
    wanted = naive(out.logits.view(-1, 128), logits.view(-1, 128), shifted(ids).view(-1), DistillationConfig())
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert handle.last is not None and handle.last.ce == pytest.approx(own, rel=1e-5)
    assert next(iter(out)) == "loss"
    out.loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    as_tuple = student(input_ids=ids, labels=ids, return_dict=False)
    assert as_tuple[0].item() == pytest.approx(out.loss.item())
    assert student(input_ids=ids).loss is None
    handle.remove()
    assert student(input_ids=ids, labels=ids).loss.item() == pytest.approx(own)


def test_attached_with_hidden_states_and_padding(tiny: Callable[..., Any], ids: Tensor) -> None:
    student, teacher = tiny("gpt2", seed=1), tiny("gpt2")
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with attach(student, teacher, DistillationConfig(hidden_weight=2.0, layers=(0, 2))) as handle:
        out = student(**inputs, labels=labels)
    assert "hidden_states" not in out and handle.last is not None
    mine, theirs = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    kept = shifted(labels) != -100
    wanted = sum(F.mse_loss(mine[n][kept], theirs[n][kept]) for n in (1, 3)) / 2
    assert handle.last.hidden == pytest.approx(wanted.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.5 * handle.last.ce + 2 * handle.last.kl + 2 * wanted.item(), rel=1e-5)


def test_trainer_uses_it_unchanged(tiny: Callable[..., Any], ids: Tensor, tmp_path: Path) -> None:
    """Accumulated batches with different numbers of labels: the loss and the step are those of one large batch."""
    from transformers import Trainer, TrainingArguments

    labels = ids.clone()
    labels[0, 3:] = -100
    rows = [{"input_ids": row, "labels": wanted} for row, wanted in zip(ids, labels, strict=True)]
    found = []
    for size, accumulate in ((4, 1), (1, 4)):
        student = tiny("llama", seed=1)
        attach(student, tiny("llama"))
        arguments = TrainingArguments(
            str(tmp_path / str(size)),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-2,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            optim="sgd",
            max_grad_norm=0,
        )
        found.append((Trainer(student, arguments, train_dataset=rows).train().training_loss, student))
    (whole, a), (parts, b) = found
    with attach(plain := tiny("llama", seed=1), tiny("llama")):
        wanted = plain(input_ids=ids, labels=labels).loss.item()
    assert whole == pytest.approx(wanted, rel=1e-5) and parts == pytest.approx(wanted, rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_plain_head_is_found_by_trying(tiny: Callable[..., Any], family: str) -> None:
    """Where it is found, it gives the logits; models that cap or scale their logits have none."""
    model = tiny(family)
    ids = torch.arange(20, 30)[None]
    head = plain_head(model)
    if family in ("gemma2", "cohere2"):
        assert head is None
    if family in ("gpt2", "llama", "opt", "gpt_neox", "qwen3", "phi"):
        assert head is not None
    if head is not None:
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(model(input_ids=ids).logits, head(hidden))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite; got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be 0 or more"),
        ({"ce_weight": float("nan")}, "ce_weight must be 0 or more"),
        ({"kl_weight": 0, "ce_weight": 0}, "not all be 0"),
        ({"layers": (0,)}, "layers must be given only with a hidden_weight"),
        ({"layers": (), "hidden_weight": 1.0}, "layers must be numbers of decoder layers"),
        ({"layers": (-1,), "hidden_weight": 1.0}, "layers must be numbers of decoder layers"),
    ],
)
def test_a_config_is_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillationConfig(**values)


def test_models_that_do_not_fit_are_refused(tiny: Callable[..., Any], ids: Tensor) -> None:
    student = tiny("llama")
    hidden = DistillationConfig(hidden_weight=1.0)
    with pytest.raises(
        InputError, match=r"vocabulary of the teacher must be as large as the student's \(128\); got 96"
    ):
        attach(student, tiny("llama", vocab_size=96))
    with pytest.raises(InputError, match=r"hidden_size of the student must be the teacher's \(64\).*; got 32"):
        attach(student, tiny("llama", hidden_size=64, head_dim=16), hidden)
    with pytest.raises(InputError, match=r"num_hidden_layers of the student must be the teacher's \(2\)"):
        attach(student, tiny("llama", num_hidden_layers=2), hidden)
    with pytest.raises(InputError, match="layers must be numbers below 3"):
        attach(student, tiny("llama"), DistillationConfig(hidden_weight=1.0, layers=(3,)))
    with pytest.raises(InputError, match="teacher must be another model"):
        attach(student, student)
    attach(student, tiny("llama", hidden_size=64, head_dim=16))  # without hidden states any size will do
    with torch.no_grad():
        student.train()(input_ids=ids)
    with pytest.raises(InputError, match=r"labels must be given to the student that distils \(no label_smoothing"):
        student(input_ids=ids)
    student.eval()
    with pytest.raises(InputError, match="labels must have shape"):
        student(input_ids=ids, labels=ids, logits_to_keep=1)


def test_tensors_that_do_not_fit_are_refused() -> None:
    z, labels = torch.zeros(2, V), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"teacher_logits must have shape \(2, 11\); got \(2, 10\)"):
        distillation_loss(z, torch.zeros(2, 10), labels)
    with pytest.raises(InputError, match="teacher_logits must have shape"):
        distillation_loss(z, None, labels)
    with pytest.raises(InputError, match="labels must be one for each of 2 rows"):
        distillation_loss(z, z, labels[:1])
    with pytest.raises(InputError, match=r"labels must lie in \[0, 11\).*; got \(0, 11\)"):
        distillation_loss(z, z, torch.tensor([0, V]))
    with pytest.raises(InputError, match="student_hidden and teacher_hidden must be given"):
        distillation_loss(z, z, labels, DistillationConfig(hidden_weight=1.0))


def test_text_without_any_label_costs_nothing() -> None:
    z = torch.randn(2, V, requires_grad=True)
    loss = distillation_loss(z, torch.randn(2, V), torch.tensor([-100, -100]))
    loss.total.backward()
    assert loss.total.item() == 0.0 and z.grad is not None and not z.grad.any()
