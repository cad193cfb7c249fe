"""The main job, end to end, on a real model: prune, save, reload in a fresh process, compare with dense."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors.torch import save_file
from torch import Tensor

from .. import report
from ..base import machine
from ..base.errors import InputError, PypruneError
from ..base.files import new_file
from ..base.progress import Progress
from ..base.text import load_text
from ..base.windows import token_windows
from ..evaluation import perplexity
from ..evaluation.analysis import neuron_redundancy
from ..evaluation.diagnose import Budget, described, diagnose
from ..evaluation.domains import suite
from ..ffn.accelerate import accelerate
from ..model import checkpoint, loading
from ..pruning.options import PruneOptions
from ..pruning.prune import prune
from ..report.figures import demo_figure
from ..speed.benchmark import benchmark
from ..speed.summary import speeds
from . import fresh
from .screen import megabytes, table

PROMPT = "Explain in two sentences what a list is in Python."
METHOD = "wanda"  # looks at activations only, so it takes seconds
_FILES = ("results.json", "diagnose.json", "redundancy.json", "suite.json", "demo.png", "report.html")
_NEW_TOKENS = 48
_WINDOW = 1024
_EVALUATION_TOKENS = 4096
# Of why it got worse: windows of this many tokens, so many of them, and the rest of the budget; a minute or two.
_WHY_WINDOW, _WHY_WINDOWS = 256, 4
_BUDGET = Budget(prompts=4, new_tokens=32, items=20)
# Of other kinds of text, as far as CPython carries them: tokens of each, and of a window; some 20 seconds.
_SUITE_TOKENS, _SUITE_WINDOW = 1024, 256


@dataclass
class DemoResult:
    """What the demo measured.

    Attributes:
        out: the folder with `dense/`, `pruned/`, `results.json`, `diagnose.json`, `redundancy.json`, `suite.json`,
            `demo.png` and `report.html`.
        facts: everything, as JSON values.
    """

    out: Path
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.facts

    def tables(self) -> list[Any]:
        """The texts, what was lost and won, the speeds, and where the figure is."""
        dense, pruned = self.facts["dense"], self.facts["pruned"]
        rows = [
            ("FFN neurons", f"{dense['neurons']:,}", f"{pruned['neurons']:,}", _ratio(dense, pruned, "neurons")),
            ("token perplexity", f"{dense['perplexity']:.2f}", f"{pruned['perplexity']:.2f}", ""),
        ]
        for what, key in (("file", "file_bytes"), ("peak memory, load and generate", "peak_bytes")):
            rows.append((what, megabytes(dense[key]), megabytes(pruned[key]), _ratio(dense, pruned, key)))
        measured = [list(speeds(self.facts["bench"], name)) for name in ("dense", "pruned", "PrunedMLP")]
        speed_rows = [
            (
                base.what,
                base.text,
                f"{new.text} ({new.ratio:.2f}x)",
                f"{fast.text} ({fast.ratio:.2f}x)",
                f"{new.ceiling:.2f}x",
            )
            for base, new, fast in zip(*measured, strict=True)
        ]
        texts = [(escape(dense["text"].strip()), escape(pruned["text"].strip()))]
        return [
            table(f"prompt: {escape(PROMPT)}", ("dense", "pruned"), texts),
            table(
                f"{self.facts['model']}, {1 - self.facts['keep']:.1%} of FFN neurons removed",
                ("what", ">dense", ">pruned", ">ratio"),
                rows,
            ),
            table(
                "speed: the checkpoint as it is, and after pyprune.accelerate",
                ("what", ">dense", ">pruned", ">accelerated", ">ceiling"),
                speed_rows,
            ),
            f"reloaded by stock Transformers in a fresh process: logits differ by {pruned['difference']:g}; "
            f"figure {self.out / 'demo.png'}, report {self.out / 'report.html'}; {self.facts['seconds']:.0f} s in all",
        ]


def _ratio(dense: dict[str, Any], pruned: dict[str, Any], key: str) -> str:
    return f"{pruned[key] / dense[key]:.2f}x"


def _reload(folder: Path, model: Any, ids: Tensor) -> dict[str, Any]:
    """Load `folder` in a fresh process without pyprune; compare its logits with those of `model`."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as temporary:
        expected = Path(temporary) / "logits.safetensors"
        save_file({"ids": ids, "logits": logits}, expected)
        command = [sys.executable, "-P", str(fresh.__file__), str(folder), str(expected), PROMPT, str(_NEW_TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PypruneError(f"a fresh process could not use {folder}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _check_out(out: Path) -> None:
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise PypruneError(
            f"the demo writes a report, and {missing[0]} is not installed: pip install 'pyprune[report]'"
        )
    own = [(out / name / checkpoint.MANIFEST).is_file() for name in ("dense", "pruned")]
    made = [name for name, its in zip(("dense", "pruned"), own, strict=True) if not its]
    made += [] if any(own) else _FILES
    strange = out if out.exists() and not out.is_dir() else next((out / n for n in made if (out / n).exists()), None)
    if strange is not None:
        raise InputError(f"out must be a folder of the demo's own; {strange} is something else")


def _keep_facts(
    model: Any, tokenizer: Any, folder: Path, windows: Tensor, neurons: int, progress: Progress
) -> dict[str, Any]:
    """Save `model`, reload it in a fresh process, and measure what it is worth."""
    progress("saving and reloading in a fresh process", 0, 1)
    checkpoint.save(model, folder, tokenizer, overwrite=True)
    facts = _reload(folder, model, windows[:1, :256].contiguous())
    facts["file_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    facts["perplexity"] = perplexity(model, windows, progress).perplexity
    facts["neurons"] = neurons
    return facts


def _write(path: Path, facts: dict[str, Any]) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _explain(
    dense: Any, pruned: Any, tokenizer: Any, first: Tensor, second: Tensor, names: dict[str, str], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Why it got worse, on a small budget: the facts of `pyprune diagnose` and `pyprune inspect --redundancy`."""
    samples, windows = (ids.view(-1, _WHY_WINDOW)[:_WHY_WINDOWS] for ids in (first, second))
    found = diagnose(dense, pruned, tokenizer, windows, _BUDGET, progress=progress)
    facts = described(found, dense, pruned, {"dense": names["model"], "pruned": "pruned"}, names["second"], windows)
    alike = neuron_redundancy(dense, samples, keep=facts["provenance"]["config"]["keep"], progress=progress).to_json()
    redundancy = {"text": names["first"], **alike, "machine": facts["machine"]}
    return {"diagnose": facts, "redundancy": {"model": names["model"], "redundancy": redundancy}}


def run_demo(
    out: Path, keep: float, text: str | None, tokens: int, progress: Progress, model: str = loading.DEMO
) -> DemoResult:
    """Prune a model, the embedded one by default, and compare it with dense.

    Args:
        out: folder for results; what an earlier demo left there is replaced.
        keep: share of neurons that stays, in (0, 1].
        text: as for `text.load_text`; None for the default.
        tokens: calibration tokens.
        progress: called as `(stage, done, total)`.
        model: as for `loading.load_model`.

    Raises:
        InputError: `out` holds something else, a bad `keep`, `text` or `tokens`, or no embedded model.
    """
    started = time.perf_counter()
    _check_out(out)
    PruneOptions.of(keep, METHOD)  # complains before anything is loaded
    tokenizer = loading.load_tokenizer(model)
    name = "SmolLM2-135M-Instruct" if model == loading.DEMO else Path(model).name
    first, first_name = load_text(text, "first")
    second, second_name = load_text(text, "second")
    calibration = token_windows(tokenizer, first, tokens, _WINDOW)
    held_out = token_windows(tokenizer, second, _EVALUATION_TOKENS, _WINDOW)
    progress(f"loading {name}", 0, 1)
    dense, pruned = loading.load_model(model), loading.load_model(model)
    cut = prune(
        pruned,
        keep,
        METHOD,
        text=calibration,
        progress=progress,
        provenance={"model": name, "text": first_name, "versions": machine.versions()},
    )
    mask = cut.mask
    total = sum(k.intermediate_size for k in mask.layers)
    facts: dict[str, Any] = {
        "model": name,
        "keep": mask.keep,
        "calibration": {"text": first_name, "tokens": cut.tokens, "window": _WINDOW},
        "evaluation": {"text": second_name, "tokens": held_out.numel(), "window": _WINDOW},
        "prune": cut.to_json(),
        "dense": _keep_facts(dense, tokenizer, out / "dense", held_out, total, progress),
        "pruned": _keep_facts(pruned, tokenizer, out / "pruned", held_out, sum(mask.widths), progress),
    }
    names = {"model": name, "first": first_name, "second": second_name}
    explained = _explain(dense, pruned, tokenizer, calibration, held_out, names, progress)
    sizes: dict[str, Any] = {"tokens": _SUITE_TOKENS, "window": _SUITE_WINDOW, "new_tokens": 0}
    judged = suite(pruned, tokenizer, dense=dense, **sizes, progress=progress).to_json()
    explained["suite"] = {"model": "pruned", "dense": name, "machine": machine.facts(), **judged}
    swapped = accelerate(loading.load_model(str(out / "pruned")))
    facts["bench"] = benchmark(dense, {"pruned": pruned, "PrunedMLP": swapped}, progress=progress).to_json()
    facts["seconds"] = time.perf_counter() - started
    _write(out / "results.json", facts)
    for part, found in explained.items():
        _write(out / f"{part}.json", found)
    with new_file(out / "demo.png") as temporary:
        demo_figure(facts, temporary)
    report.write(out, out / "report.html")
    return DemoResult(out, facts)
