"""The plain loop and the Trainer's callback: they agree, and both go on from a checkpoint bit for bit."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pyprune import InputError
from pyprune.training import PruningCallback, TrainingConfig, TrainingPruner, loop, methods, train

STEPS = 8


@pytest.fixture
def rows():
    """Sixteen sequences of 12 tokens, with labels."""
    ids = torch.randint(3, 128, (16, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def batches_of(rows, size=2):
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def config_of(method, **values):
    return TrainingConfig(**{"method": method, "keep": 0.4, "steps": STEPS, "warmup": 1, "cooldown": 2, **values})


def optimizer_of(model):
    # An epsilon above rounding: the gradient of a key bias is zero but for that, and Adam would step by its sign.
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-4)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))


def arguments(folder, **values):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **values})


def by_trainer(model, rows, config, folder, resume=None, finish=True, **values):
    callback = PruningCallback(config, finish=finish)
    trainer = Trainer(
        model, arguments(folder, **values), train_dataset=rows, callbacks=[callback], optimizers=optimizer_of(model)
    )
    trainer.train(resume_from_checkpoint=resume)
    return callback


def by_loop(model, rows, config, **values):
    pruner = TrainingPruner(model, config)
    optimizer, scheduler = optimizer_of(model)
    losses = train(model, batches_of(rows), optimizer, pruner, scheduler=scheduler, **{"steps": STEPS, **values})
    return pruner, losses


def assert_same(one, other, **tolerance):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if tolerance:
            torch.testing.assert_close(tensor, theirs[name], **tolerance)
        else:
            assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(
    ("method", "name", "accumulate"),
    [
        ("movement", "llama", 1),
        ("gum", "gpt2", 2),
        ("magnitude", "gpt2", 1),
        ("l0:tolerance=1", "llama", 2),
        ("movement-soft", "llama", 2),
    ],
)
def test_the_trainer_and_the_loop_agree(method, name, accumulate, tiny, rows, tmp_path):
    """The same masks, and the same weights to float tolerance: the Trainer divides the loss in another order.

    Batches have different numbers of labels, and each counts by its labels. Of a class that is not called ForCausalLM,
    as GPT-2's, the Trainer counts the first label too, which has nothing to predict it, unless it is told the loss.
    """
    for i, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: i % 7] = -100
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    one, other = tiny(name, **still), tiny(name, **still)
    one.loss_type = "ForCausalLM"
    config = config_of({"movement-soft": methods.MovementSoft(threshold=0.48, score_rate=0.05)}.get(method, method))
    callback = by_trainer(one, rows, config, tmp_path, gradient_accumulation_steps=accumulate)
    pruner, losses = by_loop(other, rows, config, accumulate=accumulate)
    mask = pruner.finish()
    assert len(losses) == STEPS
    assert mask.layers == callback.mask.layers
    assert mask.widths != (96, 96, 96)
    assert mask.fingerprint == callback.mask.fingerprint
    assert_same(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gum", "l0:tolerance=1", "movement-soft", "platon"])
def test_the_loop_resumes_bit_for_bit(method, tiny, rows, tmp_path):
    """Eight steps, against four, a checkpoint, new objects, and four more; with dropout, so random state counts."""
    config = config_of("gum:optimizer=adam,criterion=wanda" if method == "gum" else method)
    torch.manual_seed(5)
    whole = tiny("gpt2")
    want, losses = by_loop(whole, rows, config)
    torch.manual_seed(5)
    by_loop(tiny("gpt2"), rows, config, checkpoint=tmp_path / "ck", on_step=lambda done, loss: done == 4)
    torch.manual_seed(99)
    resumed = tiny("gpt2", seed=3)
    got, all_losses = by_loop(resumed, rows, config, resume=tmp_path / "ck")
    assert all_losses == losses
    assert_same(whole, resumed)
    state, other = want.state_dict(), got.state_dict()
    assert state["facts"] == other["facts"]
    assert state["tensors"].keys() == other["tensors"].keys()
    assert all(torch.equal(tensor, other["tensors"][name]) for name, tensor in state["tensors"].items())
    assert want.finish() == got.finish()


def test_a_checkpoint_restores_the_optimizer(tiny, rows, tmp_path):
    model = tiny("llama")
    optimizer, scheduler = optimizer_of(model)
    train(model, batches_of(rows), optimizer, steps=3, scheduler=scheduler, checkpoint=tmp_path / "ck", every=2)
    fresh = tiny("llama", seed=1)
    again, rate = optimizer_of(fresh)
    assert len(train(fresh, batches_of(rows), again, steps=3, scheduler=rate, resume=tmp_path / "ck")) == 3
    assert_same(model, fresh)
    mine, theirs = optimizer.state_dict(), again.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    for index, values in mine["state"].items():
        assert all(torch.equal(value, theirs["state"][index][key]) for key, value in values.items())
    assert rate.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize("method", ["movement", "gum"])
def test_the_trainer_resumes_bit_for_bit(method, tiny, rows, tmp_path):
    config = config_of(method)
    whole, start, resumed = tiny("llama"), tiny("llama"), tiny("llama")
    want = by_trainer(whole, rows, config, tmp_path / "a", finish=False)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    callback = PruningCallback(config, finish=False)
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer = Trainer(
        start,
        arguments(tmp_path / "b", **saving),
        train_dataset=rows,
        callbacks=[callback, Stop()],
        optimizers=optimizer_of(start),
    )
    trainer.train()
    assert (tmp_path / "b" / "checkpoint-4" / "pruning.safetensors").is_file()
    callback.pruner.remove()
    got = by_trainer(resumed, rows, config, tmp_path / "b", resume=True, finish=False, **saving)
    assert_same(whole, resumed)
    state, other = want.pruner.state_dict(), got.pruner.state_dict()
    assert state["facts"] == other["facts"]
    assert all(torch.equal(tensor, other["tensors"][name]) for name, tensor in state["tensors"].items())
    assert want.pruner.finish() == got.pruner.finish()


def test_the_trainer_does_not_resume_without_the_pruning_state(tiny, rows, tmp_path):
    model = tiny("llama")
    config = config_of("movement")
    by_trainer(model, rows, config, tmp_path, finish=False, save_strategy="steps", save_steps=4)
    (tmp_path / "checkpoint-4" / "pruning.safetensors").unlink()
    fresh = tiny("llama")
    with pytest.raises(InputError, match=r"checkpoint must be an existing file; got .*checkpoint-4"):
        by_trainer(fresh, rows, config, tmp_path, resume=str(tmp_path / "checkpoint-4"))
    TrainingPruner(fresh, config).remove()  # it left no masks behind
    with pytest.raises(InputError, match=r"config keep of the state to resume must be 0.3; got 0.4"):
        by_trainer(tiny("llama"), rows, config_of("movement", keep=0.3), tmp_path, resume=True)


def test_the_callback_uses_events_that_exist():
    events = [name for name in vars(PruningCallback) if name.startswith("on_")]
    assert len(events) == 5
    assert all(hasattr(TrainerCallback, name) for name in events)


@pytest.mark.parametrize(
    ("values", "config", "message"),
    [
        ({"max_steps": 4}, {}, r"steps must be at most the Trainer's \(4\); got 8"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 500},
            {},
            "load_best_model_at_end must be off",
        ),
    ],
)
def test_what_the_callback_refuses(values, config, message, tiny, rows, tmp_path):
    callback = PruningCallback(config_of("movement", **config))
    model = tiny("llama")
    trainer = Trainer(model, arguments(tmp_path, **values), train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert callback.pruner is None


def test_bad_input_to_the_loop(tiny, rows, tmp_path):
    model = tiny("llama")
    optimizer, _ = optimizer_of(model)
    batches = batches_of(rows)
    with pytest.raises(InputError, match="steps must be an integer of at least 1; got 0"):
        train(model, batches, optimizer, steps=0)
    with pytest.raises(InputError, match="accumulate must be an integer of at least 1"):
        train(model, batches, optimizer, steps=1, accumulate=0)
    with pytest.raises(InputError, match="batches must not be empty"):
        train(model, [], optimizer, steps=1)
    with pytest.raises(InputError, match="batches must not be empty, and give their batches again"):
        train(model, iter(batches[:1]), optimizer, steps=2)
    with pytest.raises(InputError, match="loss must be finite; got nan at step 0"):
        train(model, batches, optimizer, steps=1, loss_fn=lambda m, b: loop.model_loss(m, b) * float("nan"))
    with pytest.raises(InputError, match="resume must be an existing folder"):
        train(model, batches, optimizer, steps=1, resume=tmp_path / "none")
    pruner = TrainingPruner(model, config_of("movement"))
    with pytest.raises(InputError, match=r"steps must be at least those of the pruner's schedule \(8\); got 4"):
        train(model, batches, optimizer, pruner, steps=4)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tiny, rows, tmp_path):
    model = tiny("llama")
    train(model, batches_of(rows), optimizer_of(model)[0], steps=1, checkpoint=tmp_path / "ck")
    wide = tiny("llama", intermediate_size=64)
    with pytest.raises(InputError, match=r"mlp.down_proj.weight of the checkpoint must have shape \(32, 64\)"):
        train(wide, batches_of(rows), optimizer_of(wide)[0], steps=2, resume=tmp_path / "ck")
    half = torch.optim.AdamW(list(model.parameters())[:3])
    with pytest.raises(InputError, match=r"optimizer of the checkpoint must have groups of \[3\] parameters"):
        train(model, batches_of(rows), half, steps=2, resume=tmp_path / "ck")


def test_the_loss_and_the_progress_are_the_callers(tiny, rows):
    model = tiny("llama")
    seen = []
    losses = train(
        model,
        batches_of(rows),
        optimizer_of(model)[0],
        steps=3,
        loss_fn=lambda m, batch: 2 * loop.model_loss(m, batch),
        progress=lambda *call: seen.append(call),
    )
    assert seen == [("training", 1, 3), ("training", 2, 3), ("training", 3, 3)]
    with torch.no_grad():
        first = loop.model_loss(tiny("llama"), batches_of(rows)[0])
    assert losses[0] == pytest.approx(2 * float(first))
