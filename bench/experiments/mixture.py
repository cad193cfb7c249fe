"""A small mixture of experts, trained here, and what it loses by each way to prune it.

    python -m bench.experiments.mixture --text FILE --model FOLDER             trains the mixture first (5 minutes)
    python -m bench.experiments.mixture --text FILE --model FOLDER --out bench/results/mixture.json

Qwen3-MoE in small: 4 layers, 8 experts of which a token goes to 2, on a tokenizer of its own. The first four fifths of
the text train it, and windows spread over them calibrate; the last fifth judges, by perplexity over windows, with
intervals by the bootstrap over windows against the mean of random choices.
"""

from __future__ import annotations

import json
import time
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig

from pyprune import prune, prune_experts
from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.evaluation.intervals import paired_bootstrap
from pyprune.evaluation.perplexity import window_losses

Structure = Enum("Structure", {name: name for name in ("neurons", "experts")})
VOCABULARY, WINDOW, BATCH = 2048, 128, 16
CRITERIA = ("magnitude-l2-both", "activation", "wanda", "flap", "fisher", "taylor-neuron", "obs")
EXPERTS = ("frequency", "reap")
KEEPS, SEEDS = (0.75, 0.5), (0, 1, 2)
REPAIRS = (None, "least-squares:damping=auto")
CALIBRATION, JUDGED = 192, 240  # windows


def config() -> Qwen3MoeConfig:
    """The mixture: 8 experts, 2 of them a token, 4 layers."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def windows_of(text: str, tokenizer: Any) -> Tensor:
    """`[N, WINDOW]`."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def train(windows: Tensor, minutes: float, seed: int = 0) -> Any:
    """The mixture after so many minutes of AdamW, with a step that falls to a tenth."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config())
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    started, step = time.perf_counter(), 0
    model.train()
    while (share := (time.perf_counter() - started) / (60 * minutes)) < 1:
        for group in adam.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - 0.9 * share)
        batch = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if step % 50 == 0:
            print(f"{share:5.0%}  step {step}  loss {float(loss):.3f}", flush=True)
        step += 1
    model.config.output_router_logits = False
    print(f"{step} steps, {step * BATCH * WINDOW:,} tokens")
    return model.eval()


def ways(structure: str | None = None) -> list[dict[str, Any]]:
    """Everything that is tried, or what of one structure is: structure, method, keep, repair, seed."""
    found: list[dict[str, Any]] = []
    for keep in KEEPS:
        for repair in REPAIRS:
            one = {"structure": "neurons", "keep": keep, "repair": repair}
            found += [{**one, "method": "random", "seed": seed} for seed in SEEDS]
            found += [{**one, "method": method, "seed": 0} for method in CRITERIA]
    for keep in KEEPS:
        for repair in REPAIRS:
            one = {"structure": "experts", "keep": keep, "repair": repair}
            found += [{**one, "method": "random", "seed": seed} for seed in SEEDS]
            found += [{**one, "method": method, "seed": 0} for method in EXPERTS]
    return [way for way in found if structure in (None, way["structure"])]


def losses_of(folder: Path, way: dict[str, Any] | None, calibration: Tensor, judged: Tensor) -> Tensor:
    """`[N]`: nats a token of every judged window, of the mixture pruned in one way; None for the dense one."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way is not None and way["structure"] == "experts":
            options = {"repair": way["repair"], "seed": way["seed"]}
            prune_experts(model, way["keep"], way["method"], text=calibration, **options)
        elif way is not None:
            options = {"keep": way["keep"], "method": way["method"], "repair": way["repair"], "seed": way["seed"]}
            prune(model, allocation="uniform:multiple=8", text=calibration, **options)
    return window_losses(model, judged) / (WINDOW - 1)


def measured(folder: Path, calibration: Tensor, judged: Tensor, structure: str | None) -> dict[str, Any]:
    """Perplexities of all ways, and by how many nats each is apart from random choices."""
    dense = losses_of(folder, None, calibration, judged)
    rows = []
    for way in ways(structure):
        losses = losses_of(folder, way, calibration, judged)
        rows.append({**way, "losses": losses, "perplexity": float(losses.mean().exp())})
        print({k: v for k, v in rows[-1].items() if k != "losses"}, flush=True)
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("structure", "keep", "repair"))]
        chance = torch.stack([r["losses"] for r in same if r["method"] == "random"]).mean(0)
        row["over_random"] = float((row["losses"] - chance).mean())
        row["interval"] = list(paired_bootstrap(row["losses"], chance))
    for row in rows:
        del row["losses"]
    return {"dense": float(dense.mean().exp()), "rows": rows}


def beside(old: dict[str, Any], facts: dict[str, Any], found: dict[str, Any], structure: str) -> tuple[Any, Any]:
    """A result with the rows of one structure measured anew, on the same mixture and the same tokens."""
    same = {key: old[key] == facts[key] for key in ("text", "calibration", "judged", "window")}
    check(
        all(same.values()), "out", "hold a result of the same text and windows", [k for k, s in same.items() if not s]
    )
    check(abs(old["dense"] / found["dense"] - 1) < 1e-3, "model", f"have perplexity {old['dense']}", found["dense"])
    rows = [row for row in old["rows"] if row["structure"] != structure] + found["rows"]
    later = {**old.get("later", {}), structure: facts["machine"]}
    return {**{key: old[key] for key in facts}, "later": later}, {"dense": old["dense"], "rows": rows}


def main(
    text: Annotated[Path, typer.Option(help="The text, as one file.")],
    model: Annotated[Path, typer.Option(help="Folder of the mixture; trained into it where it is not there.")],
    minutes: Annotated[float, typer.Option(help="Of training.")] = 4.5,
    out: Annotated[Path | None, typer.Option(help="JSON of perplexities by each way to prune it.")] = None,
    structure: Annotated[
        Structure | None, typer.Option(help="Measure the ways of this one alone, beside what is in the JSON.")
    ] = None,
) -> None:
    """Train the mixture, and prune it in every way."""
    torch.set_num_threads(1)
    whole = text.read_text(encoding="utf-8")
    first, last = whole[: len(whole) * 4 // 5], whole[len(whole) * 4 // 5 :]
    if not (model / "config.json").is_file():
        tokenizer = tokenizer_of(first)
        train(windows_of(first, tokenizer), minutes).save_pretrained(model)
        tokenizer.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    learnt, judged = windows_of(first, tokenizer), windows_of(last, tokenizer)
    chosen = torch.linspace(0, len(learnt) - 1, CALIBRATION).round().long()
    if out is not None:
        only = None if structure is None else structure.value
        found = measured(model, learnt[chosen], judged[:JUDGED], only)
        sizes = {"calibration": CALIBRATION * WINDOW, "judged": min(JUDGED, len(judged)) * WINDOW, "window": WINDOW}
        facts = {"machine": machine.facts(), "text": text.name, "training_minutes": minutes, **sizes}
        if only is not None:
            facts, found = beside(json.loads(out.read_text(encoding="utf-8")), facts, found, only)
        with new_file(out) as temporary:
            temporary.write_text(json.dumps({**facts, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
