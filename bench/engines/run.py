"""Dense and pruned SmolLM2-135M in vLLM and llama.cpp: do they write what Transformers writes, and how fast.

    python -m bench.engines.run                           all; speed only where the machine is quiet
    python -m bench.engines.run --no-speed                beside other work
    python -m bench.engines.run --no-agreement --no-serve speed alone

What is not measured stays in the result as it was.

After `bench.engines.setup`. Models: dense, 30 % removed with one width and with widths that differ by layer, and 50 %;
for speed in vLLM a wide one too (`speed.WIDE`). The reference is Transformers in float32. Agreement: the first 16
greedy tokens after 20 prompts, and perplexity on 8 windows of 512 tokens. Served: one request to `vllm serve` over HTTP
and one text of llama.cpp's own program. The result goes to bench/results/engines-CPU.json.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pyprune import prune
from pyprune.base import machine
from pyprune.base.files import new_file
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.model import checkpoint, loading
from pyprune.serving.deci import to_deci
from pyprune.serving.gguf_export import to_gguf
from pyprune.serving.padded import to_padded

from . import served
from . import speed as speeds
from .ceiling import LEAST
from .places import ENGINES, LLAMA_BIN, ROOT, ask_llama, ask_vllm

RESULT = ROOT / "bench" / "results" / "engines-CPU.json"
MODELS = ENGINES / "models"
PROMPTS, NEW, WINDOWS, WINDOW = 20, 16, 8, 512
PRUNED = {"uniform": ("uniform", 0.7), "half": ("global", 0.5), "differing": ("global", 0.7)}
TYPES = ("bf16", "f32", "q8_0", "q4_0")


def say(text: str) -> None:
    print(f"[engines] {text}", flush=True)


def make_models() -> None:
    """The checkpoints, their exports and GGUF files, where they are not there yet."""
    MODELS.mkdir(parents=True, exist_ok=True)
    tokenizer = loading.load_tokenizer("demo")
    if not (MODELS / "dense").is_dir():
        loading.load_model("demo", "bfloat16").save_pretrained(MODELS / "dense")
        tokenizer.save_pretrained(MODELS / "dense")
    for name, (allocation, keep) in PRUNED.items():
        if not (MODELS / name).is_dir():
            say(f"pruning: {name}")
            model = loading.load_model("demo", "bfloat16")
            text = token_windows(tokenizer, load_text(None, "first")[0], 8192, 512)
            prune(model, keep, "wanda", allocation=allocation, repair="least-squares", text=text)
            checkpoint.save(model, MODELS / name, tokenizer)
    model = loading.load_model(str(MODELS / "differing"))
    if not (MODELS / "deci").is_dir():
        to_deci(model, MODELS / "deci", tokenizer)
    if not (MODELS / "padded").is_dir():
        tokens = token_windows(tokenizer, load_text(None, "second")[0], 256, 64)
        to_padded(model, MODELS / "padded", tokens, tokenizer)
    speeds.make_least(MODELS)
    for kind in TYPES:
        # The demo's file holds weights of 5 bits: widened to bfloat16, it is a base like a converted checkpoint's. What
        # is quantised comes from the bfloat16 files, by llama.cpp's own program, as users would.
        target = MODELS / f"dense-{kind}.gguf"
        if not target.is_file():
            source = loading.demo_file() if kind == "bf16" else MODELS / "dense-bf16.gguf"
            _quantise(source, target, kind)
        for name in (*PRUNED, LEAST) if kind in speeds.TYPES else PRUNED:
            target = MODELS / f"{name}-{kind}.gguf"
            if target.is_file():
                continue
            if kind in ("f32", "bf16"):
                to_gguf(loading.load_model(str(MODELS / name), "auto"), MODELS / f"dense-{kind}.gguf", target, kind)
            else:
                _quantise(MODELS / f"{name}-bf16.gguf", target, kind)


def _quantise(source: Path, target: Path, kind: str) -> None:
    with new_file(target) as temporary:
        command = [LLAMA_BIN / "llama-quantize", "--allow-requantize", source, temporary, kind.upper()]
        subprocess.run(command, check=True, capture_output=True)


def texts() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the windows."""
    tokenizer = loading.load_tokenizer("demo")
    lines = (ROOT / "pyprune" / "evaluation" / "domains" / "prompts.jsonl").read_text().splitlines()[:PROMPTS]
    prompts = [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]
    windows = token_windows(tokenizer, load_text(None, "second")[0], WINDOWS * WINDOW, WINDOW)
    return prompts, windows.tolist()


@torch.no_grad()
def reference(name: str, prompts: list[list[int]], windows: list[list[int]]) -> dict[str, Any]:
    """What Transformers makes of a checkpoint in float32, as a worker answers; and the lead of each greedy token."""
    model = loading.load_model(str(MODELS / name), "float32")
    generated, leads = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            top = model(ids).logits[0, -1].topk(2)
            leads.append(float(top.values[0] - top.values[1]))
            ids = torch.cat([ids, top.indices[None, :1]], dim=1)
        generated.append(ids[0, len(prompt) :].tolist())
    nats = 0.0
    for window in windows:
        row = torch.tensor([window])
        nats -= float(model(row).logits[0, :-1].double().log_softmax(-1).gather(-1, row[0, 1:, None]).sum())
    return {"generated": generated, "leads": leads, "nll": nats / (len(windows) * (WINDOW - 1))}


def agreement(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """How an engine's text and perplexity compare with the reference.

    `same`: prompts whose 16 tokens are all the same; `leads` of the others: by how many logits the reference's token
    led where the texts part (near 0 is a tie).
    """
    leads = []
    for i, (got, want) in enumerate(zip(found["generated"], wanted["generated"], strict=True)):
        part = next((j for j, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]), None)
        if part is not None:
            leads.append(wanted["leads"][i * NEW + part])
    ratio = float(torch.tensor(found["nll"] - wanted["nll"], dtype=torch.float64).exp())
    return {
        "same": len(wanted["generated"]) - len(leads),
        "of": len(wanted["generated"]),
        "leads": leads,
        "perplexity": float(torch.tensor(found["nll"], dtype=torch.float64).exp()),
        "perplexity_ratio": ratio,
    }


def compare() -> list[dict[str, Any]]:
    """A row for each model, engine and type."""
    prompts, windows = texts()
    rows: list[dict[str, Any]] = []
    for name in ("dense", *PRUNED):
        wanted = reference(name, prompts, windows)
        perplexity = float(torch.tensor(wanted["nll"], dtype=torch.float64).exp())
        rows.append({"model": name, "engine": "transformers", "type": "float32", "perplexity": perplexity})
        asked = {"prompts": prompts, "windows": windows, "new_tokens": NEW}
        for kind in TYPES:
            found = ask_llama(
                {**asked, "model": str(MODELS / f"{name}-{kind}.gguf"), "threads": torch.get_num_threads()}
            )
            rows.append({"model": name, "engine": "llama.cpp", "type": kind, **agreement(found, wanted)})
            say(str(rows[-1]))
        ways: list[tuple[str, str, str, dict[str, str]]]
        ways = [(name, dtype, "auto", {}) for dtype in ("float32", "bfloat16")]
        if name == "differing":
            ways += [("deci", "float32", "auto", {}), ("padded", "float32", "auto", {})]
            ways += [(name, "float32", "transformers", {}), (name, "float32", "auto", {"kernels": "on"})]
            ways += [(name, "bfloat16", "auto", {"kernels": "on", "weights": "int8"})]
        for folder, dtype, way, ours in ways:
            options: dict[str, Any] = {"dtype": dtype, "enforce_eager": True, "model_impl": way}
            options |= {"trust_remote_code": folder == "deci", "additional_config": {"pyprune": ours}}
            found = ask_vllm({**asked, "model": str(MODELS / folder), "options": options})
            told = {"model": folder, "engine": "vllm", "type": dtype, "class": found["class"]}
            told |= {"asked": ours, "records": found["records"]}
            rows.append({**told, **agreement(found, wanted)})
            say(str(rows[-1]))
    return rows


def main(
    speed: Annotated[bool, typer.Option(help="Measure speed, where the machine is quiet.")] = True,
    agreement: Annotated[bool, typer.Option(help="Compare texts and perplexity.")] = True,
    serve: Annotated[bool, typer.Option(help="One request to vllm serve, one text by llama.cpp.")] = True,
    out: Annotated[Path, typer.Option(help="The result; what is not measured stays as it is there.")] = RESULT,
) -> None:
    """Compare, measure, and write the result."""
    facts = machine.facts()
    make_models()
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    result = {"suite": "engines", "machine": facts, "agreement": [], "speed": None, **result}

    def add(**found: Any) -> None:
        """Put what was measured into the result at once: whatever ends the run, it stays."""
        result.update(found)
        with new_file(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if agreement:
        add(machine=facts, agreement=compare())
    if serve:
        shown: dict[str, Any] = {"machine": facts, "vllm": served.by_vllm(MODELS / "differing")}
        say(str(shown["vllm"]))
        shown["llama.cpp"] = served.by_llama(MODELS / "differing-f32.gguf", MODELS / "differing")
        say(str(shown["llama.cpp"]))
        add(served=shown)
    if speed and (rows := speeds.measure(MODELS, ("dense", *PRUNED), say)):
        add(speed=rows, speed_machine=facts)
    say(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
