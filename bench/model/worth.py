"""Is pruning worth it beside quantisation: perplexity on six domains against bytes, and against the time of a token.

    python -m bench.model.worth --work DIR --data DATA --quality     beside other work: what every row loses
    python -m bench.model.worth --work DIR --latency                 in quiet minutes: decode of one sequence
    python -m bench.tables.worth                                     draws the result

A row is a checkpoint in one format in one engine: ours, where `accelerate(model, weights=...)` keeps the FFNs in it and
the rest stays bfloat16, or llama.cpp, where it is set up (`make engines`), with every matrix but the embedding in it.
What the result has is not measured again; it is written after every row. Checkpoints are made in the work folder by
`pyprune prune` where they are not there yet; `--checkpoint recovered-30=DIR` takes one that exists.

Each latency stands beside one of the dense model in bfloat16, measured in turn with it: `anchor_ms`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import Tensor

from bench import by_line
from bench.engines.places import LLAMA_BIN, ask_llama
from bench.model.worth_files import CHECKPOINTS, DENSE, FORMATS, LLAMA, OURS, Files, gguf_sizes, sizes
from pyprune.base import machine
from pyprune.base.clock import interleave, quantiles
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.evaluation.domains import domain_windows, read_material
from pyprune.evaluation.perplexity import window_losses
from pyprune.model.loading import DEMO, load_tokenizer
from pyprune.speed.timing import Decode

RESULT = Path(__file__).parents[1] / "results" / "worth.json"
PROMPT, STEPS, ROUNDS, LLAMA_ROUNDS = 32, 32, 5, 3

Row = dict[str, Any]
Losses = dict[str, list[float]]


def say(text: str) -> None:
    print(f"[worth] {text}", flush=True)


def keys(only: str) -> list[tuple[str, str, str]]:
    """The rows whose `CHECKPOINT/ENGINE/FORMAT` fits a pattern, engine by engine, what says most first."""
    order = sorted(CHECKPOINTS, key=lambda label: (label != DENSE, "rec" not in label, label[-2:] not in ("30", "50")))
    found = [(label, engine, kind) for engine, kinds in FORMATS.items() for label in order for kind in kinds]
    return [key for key in found if fnmatch("/".join(key), only)]


class Result:
    """The rows, on the disk after every step."""

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.facts: Row = {"suite": "worth", "model": model, "machine": None, "texts": None, "rows": []}
        if path.is_file():
            self.facts |= json.loads(path.read_text(encoding="utf-8"))
            check(self.facts["model"] == model, "model", f"be that of {path.name}", model)

    def check_texts(self, texts: Row) -> None:
        """Raise `InputError` where the rows that are there were judged on others."""
        self.facts["texts"] = self.facts["texts"] or texts
        check(self.facts["texts"] == texts, "out", f"hold rows judged on the same texts: {texts}", self.facts["texts"])

    def row(self, key: tuple[str, str, str]) -> Row:
        """A row, made where it is not there yet."""
        names = dict(zip(("checkpoint", "engine", "weights"), key, strict=True))
        rows: list[Row] = self.facts["rows"]
        found = next((row for row in rows if row.items() >= names.items()), None)
        if found is None:
            rows.append(found := names)
        return found

    def write(self) -> None:
        """All rows, by checkpoint, engine and format."""
        order = [(c, engine, kind) for c in CHECKPOINTS for engine, kinds in FORMATS.items() for kind in kinds]
        self.facts["rows"].sort(key=lambda row: order.index((row["checkpoint"], row["engine"], row["weights"])))
        self.facts["machine"] = machine.facts()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as temporary:
            temporary.write_text(by_line.dumps(self.facts, ("rows",)), encoding="utf-8")


def where() -> Row:
    """What a reader needs of the machine to judge one row."""
    facts = machine.facts()
    return {name: facts[name] for name in ("cpu", "torch_threads", "load", "commit", "dirty", "date")}


def quality(files: Files, key: tuple[str, str, str], windows: Mapping[str, Tensor]) -> Row:
    """Sizes, and of each domain the mean loss of a token in nats: of every window, by llama.cpp of all together."""
    label, engine, kind = key
    losses: Losses = {}
    if engine == OURS:
        model = files.load(label, kind, measure=False)
        size = sizes(model)
        for name, ids in windows.items():
            losses[name] = (window_losses(model, ids) / (ids.shape[1] - 1)).tolist()
    else:
        file = files.gguf(label, kind)
        size = gguf_sizes(file)
        asked = {"model": str(file), "prompts": [], "new_tokens": 0, "threads": torch.get_num_threads()}
        for name, ids in windows.items():
            losses[name] = [ask_llama({**asked, "windows": ids.tolist()})["nll"]]
    return {**size, "made": files.made(label), "losses": losses, "judged": where()}


def llama_bench(file: Path) -> list[float]:
    """Seconds a token of llama.cpp's own bench, of runs of `STEPS` tokens."""
    command = [LLAMA_BIN / "llama-bench", "-m", file, "-t", torch.get_num_threads(), "-p", 0, "-n", STEPS, "-r", 3]
    done = subprocess.run([*map(str, command), "-o", "json"], check=True, capture_output=True, text=True)
    return [1 / rate for one in json.loads(done.stdout) for rate in one["samples_ts"]]


class Clock:
    """Times rows, each in turn with the dense model in bfloat16 in the same engine."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.dense: Any = None

    def __call__(self, key: tuple[str, str, str]) -> Row:
        """Milliseconds of a token, and of one by the dense model beside it."""
        label, engine, kind = key
        found = (self._ours if engine == OURS else self._llama)(label, kind)
        step, anchor = quantiles(found["row"]), quantiles(found["dense"])
        return {"step_ms": step, "anchor_ms": anchor, "timed": where()}

    def _ours(self, label: str, kind: str) -> dict[str, list[float]]:
        self.dense = self.dense or self.files.load(DENSE, "bf16", measure=True)
        model = self.files.load(label, kind, measure=True)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.dense.config.vocab_size, (1, PROMPT), generator=generator)
        jobs = {"dense": Decode(self.dense, prompt, STEPS), "row": Decode(model, prompt, STEPS)}
        return {name: [1e3 * s for s in found] for name, found in interleave(jobs, ROUNDS).items()}

    def _llama(self, label: str, kind: str) -> dict[str, list[float]]:
        files = {"dense": self.files.gguf(DENSE, "bf16"), "row": self.files.gguf(label, kind)}
        jobs = {name: partial(llama_bench, file) for name, file in files.items()}
        return {name: [1e3 * s for s in found] for name, found in interleave(jobs, LLAMA_ROUNDS).items()}


def busy(most: float) -> bool:
    """Whether other processes take more than a share of the machine just now; says so."""
    percent = psutil.cpu_percent(interval=1)
    if percent > 100 * most:
        say(f"stopped: {percent:.0f} % of the machine is busy with other work; what was measured is kept")
    return percent > 100 * most


def measure(result: Result, wanted: list[tuple[str, str, str]], part: str, run: Callable[..., Row]) -> None:
    """Give each row that lacks `part` what `run` finds."""
    for i, key in enumerate(wanted):
        if part in result.row(key):
            continue
        say(f"{part}, row {i + 1} of {len(wanted)}: {'/'.join(key)}")
        result.row(key).update(run(key))
        result.write()


def main(
    work: Annotated[Path, typer.Option(help="Folder of the checkpoints and files that are made, and kept.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the texts of the suite; without: CPython's.")] = None,
    quality_: Annotated[bool, typer.Option("--quality", help="Judge the rows that are not judged yet.")] = False,
    latency: Annotated[bool, typer.Option("--latency", help="Time the rows that are not timed yet.")] = False,
    checkpoint: Annotated[list[str] | None, typer.Option(help="LABEL=PATH of one that exists; repeatable.")] = None,
    only: Annotated[str, typer.Option(help="Pattern of CHECKPOINT/ENGINE/FORMAT.")] = "*",
    tokens: Annotated[int, typer.Option(help="Of each domain.")] = 4096,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    quiet: Annotated[float, typer.Option(help="Share of the machine that others may take while rows are timed.")] = 0.1,
    model: Annotated[str, typer.Option(help="The dense one, as for the command line.")] = DEMO,
    out: Annotated[Path, typer.Option(help="The result; what it has is kept.")] = RESULT,
) -> None:
    """Measure the rows, and write them."""
    check(quality_ or latency, "quality", "be asked for, or latency, or both", False)
    files = Files.of(model, work, checkpoint or [])
    wanted = keys(only)
    check(bool(wanted), "only", "fit a row, such as removed-30/pyprune/int8", only)
    if lacking := files.why_no_llama():
        say(f"no rows of {LLAMA}, for want of {lacking}")
        wanted = [key for key in wanted if key[1] != LLAMA]
    work.mkdir(parents=True, exist_ok=True)
    result = Result(out, model if model == DEMO else Path(model).name)
    if quality_:
        material = read_material(data)
        windows = domain_windows(load_tokenizer(model), material.domains, tokens, window)
        domains = {domain.name: domain.source for domain in material.domains}
        result.check_texts({"tokens": tokens, "window": window, "domains": domains})
        measure(result, wanted, "losses", lambda key: quality(files, key, windows))
    if latency:
        clock = Clock(files)

        def timed(key: tuple[str, str, str]) -> Row:
            if busy(quiet):
                raise typer.Exit(1)
            return clock(key)

        measure(result, wanted, "step_ms", timed)


if __name__ == "__main__":
    typer.run(main)
