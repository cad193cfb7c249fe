"""A pruned model as the draft of its dense model: how many of its tokens are accepted, and what that saves.

    python -m bench.model.draft             six minutes on one core
    python -m bench.model.draft --no-speed  beside other work

The result is written after each draft, and a draft that is there already, of the same settings, is not measured again:
a run that was ended goes on where it was. `--again` measures all.

Drafts: fewer layers, fewer neurons, and prefixes of the dense model's own sorted neurons, which need no memory of their
own. Every text is the dense model's greedy one in float32, as `generate(assistant_model=...)` must give it; the bench
stops where it is not. `match` is the share of all its tokens that the draft predicts from what stands before them;
`per_step` how many tokens the dense model yields a step, with `DRAFTED` tokens drafted each time.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import Tensor

from pyprune import accelerate, prune, prune_blocks, set_width
from pyprune.base import machine
from pyprune.base.clock import interleave, median
from pyprune.base.files import new_file
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.ffn.warming import warmup
from pyprune.model.loading import DEMO, load_model, load_tokenizer
from pyprune.pruning.nested import prune_nested

RESULT = Path(__file__).parents[1] / "results" / "draft.json"
PROMPTS, PROMPT, NEW, DRAFTED, ROUNDS = 6, 64, 48, 3, 3


def shared(model: Any) -> Any:
    """A model of its own modules over the same tensors, so that another width can be set."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, tensors)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    return twin


def generate(model: Any, prompt: Tensor, draft: Any = None) -> tuple[list[int], int]:
    """Greedy ids after `[1, L]`, and how many steps the model itself took."""
    steps = [0]
    hook = model.register_forward_pre_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    if draft is not None:
        config = draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFTED, "constant"
        config.assistant_confidence_threshold = 0.0
    try:
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, **options)
    finally:
        hook.remove()
    return found[0, prompt.shape[1] :].tolist(), steps[0]


@torch.no_grad()
def match(draft: Any, prompt: Tensor, text: list[int]) -> float:
    """Share of the tokens of a text that a model predicts from all before them."""
    ids = torch.cat([prompt, torch.tensor([text])], 1)
    found = draft(ids).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
    return float((found == torch.tensor(text)).float().mean())


def drafts(dense: Any, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """Ways to make a draft, by what they do."""
    text = token_windows(tokenizer, load_text(None, "first")[0], 4096, 512)

    def fewer(change: Callable[[Any], object]) -> Callable[[], Any]:
        def make() -> Any:
            model = load_model(DEMO)
            change(model)
            return accelerate(model)

        return make

    def narrow(share: float) -> Callable[[], Any]:
        def make() -> Any:
            model = shared(dense)
            set_width(model, share, compensated=False)
            return model

        return make

    made = {}
    for keep in (0.8, 0.5):
        name = f"{1 - keep:.0%} of the layers removed"
        made[name] = fewer(lambda m, k=keep: prune_blocks(m, structure="layer", keep=k, text=text))
    for keep in (0.7, 0.5):
        name = f"{1 - keep:.0%} of the neurons removed"
        made[name] = fewer(lambda m, k=keep: prune(m, k, allocation="global", repair="least-squares", text=text))
    return made | {f"the first {share:.0%} of the dense model's neurons": narrow(share) for share in (0.7, 0.5)}


def measure(dense: Any, draft: Any, prompts: list[Tensor], texts: list[list[int]], speed: bool) -> dict[str, Any]:
    """One draft's row."""
    steps = 0
    for prompt, text in zip(prompts, texts, strict=True):
        found, took = generate(dense, prompt, draft)
        if found != text:
            raise AssertionError(f"with a draft the dense model wrote {found}, without {text}")
        steps += took
    row: dict[str, Any] = {
        "match": sum(match(draft, p, t) for p, t in zip(prompts, texts, strict=True)) / len(prompts),
        "per_step": len(prompts) * NEW / steps,
    }
    if speed:

        def timed(model: Any, helper: Any) -> Callable[[], list[float]]:
            def job() -> list[float]:
                start = time.perf_counter()
                generate(model, prompts[0], helper)
                return [NEW / (time.perf_counter() - start)]

            return job

        jobs = {"alone": timed(dense, None), "drafted": timed(dense, draft), "draft": timed(draft, None)}
        row |= {f"tokens_per_s_{name}": median(found) for name, found in interleave(jobs, ROUNDS).items()}
    return row


def pending(result: dict[str, Any], names: Iterable[str], settings: dict[str, Any], speed: bool) -> list[str]:
    """Drafts that a result lacks, or has of other settings, or without the speed that is asked for."""
    there = {row["draft"] for row in result["rows"] if not speed or "tokens_per_s_drafted" in row}
    return [name for name in names if name not in there or result["settings"] != settings]


def main(
    speed: Annotated[bool, typer.Option(help="Measure speed too, where the machine is quiet.")] = True,
    again: Annotated[bool, typer.Option(help="Measure what the result has already, too.")] = False,
    out: Annotated[Path, typer.Option(help="The result.")] = RESULT,
) -> None:
    """Measure every draft that the result lacks, and write the result after each."""
    if speed and (busy := psutil.cpu_percent(interval=10)) > 10:
        print(f"no speed: {busy:.0f} % of the machine is busy with other work")
        speed = False
    settings = {"prompts": PROMPTS, "prompt_tokens": PROMPT, "new_tokens": NEW, "drafted": DRAFTED, "dtype": "float32"}
    result: dict[str, Any] = {"suite": "draft", "settings": settings, "rows": []}
    if out.is_file() and not again:
        result = json.loads(out.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(DEMO)
    dense = load_model(DEMO)
    prune_nested(
        dense, [1.0], "wanda", repair="none", text=token_windows(tokenizer, load_text(None, "first")[0], 4096, 512)
    )
    dense = accelerate(dense)
    made = drafts(dense, tokenizer)
    todo = pending(result, made, settings, speed)
    if not todo:
        print(f"{out} has all drafts")
        return
    kept = {row["draft"]: row for row in result["rows"] if row["draft"] not in todo and row["draft"] in made}
    warmup(dense, (1, DRAFTED + 1, PROMPT))
    windows = token_windows(tokenizer, load_text(None, "second")[0], 64 * PROMPT, PROMPT)
    prompts = [windows[i : i + 1] for i in range(0, 64, 64 // PROMPTS)][:PROMPTS]
    texts = [generate(dense, prompt)[0] for prompt in prompts]
    for name in todo:
        kept[name] = {"draft": name, **measure(dense, made[name](), prompts, texts, speed)}
        print(kept[name], flush=True)
        rows = [kept[name] for name in made if name in kept]
        result = {"suite": "draft", "machine": machine.facts(), "settings": settings, "rows": rows}
        with new_file(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
