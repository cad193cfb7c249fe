"""The verb `compare`: many ways to prune one model, each measured on the same texts; rows survive a kill.

Every row starts from a copy of the dense model, so two models are in memory.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..base import machine
from ..base.errors import InputError, check
from ..base.files import new_file
from ..base.memory import release
from ..base.progress import Progress, quiet
from ..base.windows import check_windows, stack_batches
from ..model import families
from ..pruning.blocks import BlockOptions, BlockReport
from ..pruning.mixture import Windows, unnamed
from ..pruning.options import PruneOptions
from ..training.recovery import RecoverConfig, RecoverReport, recover
from . import perplexity
from .domains import Tasks
from .recipes import Setting
from .summary import MEAN, Line, comparison_lines, judged_texts

STAGE = "comparing settings"
_FORMAT = 1
# What all rows of one file share.
_SAME = ("fingerprint", "dtype", "device", "calibration", "evaluation")


# The best published method at the first share kept, against ours at the second: a step of sparsity for free.
GOALS = ((0.8, 0.7), (0.7, 0.5))


def _sha256(value: Any) -> str:
    content = value.numpy().tobytes() if isinstance(value, Tensor) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _text_facts(windows: Tensor) -> dict[str, Any]:
    return {"tokens": windows.numel(), "window": windows.shape[1], "sha256": _sha256(windows)}


def _write(path: Path, result: Mapping[str, Any]) -> None:
    """As JSON with one line a row, so that two results can be compared line by line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in result["rows"])
    head, tail = json.dumps({**result, "rows": ["@"]}, indent=2).split('    "@"')
    with new_file(path) as temporary:
        temporary.write_text(f"{head}{rows}{tail}\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """A result that `compare` wrote.

    Raises:
        InputError: the file is none, or is damaged.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        known = result["format"] == _FORMAT and isinstance(result["evaluation"], dict)
        names = [(str(row["label"]), float(row["keep"]), int(row["seed"])) for row in result["rows"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"out must be a result of compare; {path} is not ({type(error).__name__}: {error})") from error
    check(known, "out", f"be a result of compare in format {_FORMAT}", str(path))
    check(len(set(names)) == len(names), "out", "have every row once", str(path))
    found: dict[str, Any] = result
    return found


def _check_same(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to add rows to those of another model or of other texts."""
    texts = {"calibration": "calibration text", "evaluation": "evaluation texts", "suite": "suite"}
    for key in (*_SAME, "suite"):
        rule = f"be the one of {path}, or out another file; its {key} is {json.dumps(old.get(key))}"
        check(old.get(key) == new.get(key), texts.get(key, "model"), rule, new.get(key))


def _measure(model: nn.Module, evaluation: Mapping[str, Tensor], progress: Progress) -> dict[str, float]:
    """Perplexity on every text.

    Raises:
        InputError: it is NaN or infinite.
    """
    found = {name: perplexity(model, windows, progress).perplexity for name, windows in evaluation.items()}
    check(all(map(math.isfinite, found.values())), "perplexity", "be finite", found)
    return found


def _row(
    model: nn.Module,
    setting: Setting,
    calibration: Windows,
    lessons: Windows,
    evaluation: Mapping[str, Tensor],
    measure: Callable[[nn.Module], dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Prune a copy of the model, and measure it; `measure` says what goes into the row besides perplexity."""
    windows = calibration.first(setting.tokens // calibration.ids.shape[1]) if setting.tokens else calibration
    pruned = copy.deepcopy(model)
    report = setting.run(pruned, windows, progress)
    taught: RecoverReport | None = None
    if setting.recovery is not None:
        taught = recover(pruned, model, lessons, setting.recovery, progress=progress)
    whole = isinstance(report, BlockReport)
    kept = len(report.kept) / len(report.influence) if whole else report.mask.keep  # type: ignore[union-attr]
    started = time.perf_counter()
    found = {"perplexity": _measure(pruned, evaluation, progress), **measure(pruned)}
    return {
        **found,
        "kept": kept,
        "parameters": report.parameters_after,
        "widths": list(report.mask.widths) if report.mask is not None else None,
        "damping": [layer.damping for layer in getattr(report, "layers", [])],
        "tokens": report.tokens,
        "prune_seconds": report.seconds,
        **({} if taught is None else {"recovery": _taught(taught)}),
        "evaluation_seconds": time.perf_counter() - started,
        "peak_bytes": report.peak_bytes,
    }


def _taught(report: RecoverReport) -> dict[str, Any]:
    facts = ("steps", "best", "tokens", "sources", "seconds")
    return {name: getattr(report, name) for name in facts}


@dataclass
class Comparison:
    """What `compare` found.

    Attributes:
        facts: about the machine, the model (`fingerprint`, `dtype`, `device`) and the texts (`calibration`, and
            `evaluation` by name).
        dense: perplexity of the dense model on each evaluation text.
        dense_tasks: what the dense model has of the suite's tasks, as `Tasks.measure` gives it; empty without a suite.
        rows: one a setting. `perplexity` by text, with a suite `piqa` and `generation`, `kept` (share of neurons, or of
            layers where whole ones went), `parameters` (of the whole model), `widths`, `damping` by layer, `tokens` (of
            calibration, 0 where none was needed), `prune_seconds`, `evaluation_seconds`, `peak_bytes` (growth of the
            process while pruning), and where it was taught `recovery` (as in its report); or `error` with `kind` and
            `message`.
        found: rows that an earlier call had measured.
    """

    facts: dict[str, Any]
    dense: dict[str, float]
    rows: list[dict[str, Any]]
    found: int = 0
    dense_tasks: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        more = {"dense_tasks": self.dense_tasks} if self.dense_tasks else {}
        result = {"format": _FORMAT, **self.facts, "dense": self.dense, **more, "rows": self.rows}
        return {**result, "goals": goals(result)}


class _Run:
    """The rows measured so far, and their file."""

    def __init__(self, facts: dict[str, Any], path: Path | None) -> None:
        old = read_result(path) if path and path.exists() else None
        if path and old:
            _check_same(path, old, facts)
        self.facts, self.path = facts, path
        versions = facts["machine"]["versions"]
        self._base = [facts[key] for key in _SAME] + [versions["pyprune"], versions["torch"]]
        self._base += [facts["suite"]] if "suite" in facts else []
        self._source = {key: facts["machine"][key] for key in ("commit", "dirty", "date")}
        self.rows: dict[tuple[str, float, int], dict[str, Any]] = {
            (row["label"], row["keep"], row["seed"]): row for row in (old["rows"] if old else [])
        }
        same = old if old and old.get("dense_key") == self.key(None) else {}
        self.dense: dict[str, float] = same.get("dense", {})
        self.dense_tasks: dict[str, Any] = same.get("dense_tasks", {})

    def key(
        self,
        chosen: PruneOptions | BlockOptions | None,
        tokens: int = 0,
        recovery: RecoverConfig | None = None,
        lessons: Windows | None = None,
    ) -> str:
        """Names a measurement: all that its numbers depend on."""
        taught = [] if recovery is None or lessons is None else [recovery.to_json(), _sha256(lessons.ids)]
        return _sha256([self._base, chosen and chosen.facts(), tokens, *taught])

    def add(self, setting: Setting, row: dict[str, Any]) -> None:
        names = {"label": setting.label, "group": setting.group, "keep": setting.keep, "seed": setting.seed}
        self.rows.pop(setting.name, None)
        self.rows[setting.name] = {**names, **row, "source": self._source}

    def result(self, found: int = 0) -> Comparison:
        facts = {**self.facts, "dense_key": self.key(None)}
        return Comparison(facts, self.dense, list(self.rows.values()), found, self.dense_tasks)

    def write(self) -> None:
        if self.path:
            _write(self.path, self.result().to_json())


def compare(
    model: nn.Module,
    rows: Sequence[Setting],
    calibration: Tensor | Windows,
    evaluation: Mapping[str, Tensor],
    path: str | Path | None = None,
    *,
    lessons: Windows | None = None,
    tasks: Tasks | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress = quiet,
) -> Comparison:
    """Prune a model in many ways, and measure each.

    Args:
        model: a dense causal LM of Transformers; unchanged afterwards.
        rows: what to measure, as `settings` makes them.
        calibration: `[N, W]` token ids, or windows of several sources.
        lessons: what settings with a recovery are taught on; None: the calibration text.
        evaluation: `[N, W]` token ids by the text's name; goals are judged on each.
        path: a JSON file, written again after every row. Rows that it has already are not measured again, unless the
            configuration or the version of pyprune or torch is another, or they failed.
        tasks: what the suite asks besides perplexity; the evaluation texts are then its domains, and goals are also
            judged on their geometric mean.
        facts: JSON values for the result's head, such as the names of the model and of the calibration text.
        progress: called as `(stage, done, total)`: with stage `STAGE` for the rows, else for what goes on in a row.

    Raises:
        InputError: no row, the same one twice, windows longer than the model's context, or a file of another model, of
            other texts, or of another kind.
        UnsupportedModelError: an FFN that pyprune does not know.
    """
    names = [row.name for row in rows]
    check(0 < len(names) == len(set(names)), "rows", "be some, each once", len(names))
    check(bool(evaluation), "evaluation", "hold at least one text", list(evaluation))
    vocabulary = getattr(model.config, "vocab_size", None)
    calibrating = calibration if isinstance(calibration, Windows) else unnamed(stack_batches(calibration, vocabulary))
    teaching = lessons or calibrating
    stack_batches(calibrating.ids, vocabulary, "calibration")
    evaluation = {name: stack_batches(windows, vocabulary) for name, windows in evaluation.items()}
    for name, windows in {"calibration": calibrating.ids, **evaluation}.items():
        check_windows(model, windows, name)
    parameter = next(model.parameters())
    run = _Run(
        {
            "machine": machine.facts(),
            **(facts or {}),
            "fingerprint": families.fingerprint(model, families.find_ffns(model)),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
            "calibration": _text_facts(calibrating.ids),
            "evaluation": {name: _text_facts(windows) for name, windows in evaluation.items()},
            **({} if tasks is None else {"suite": tasks.facts()}),
        },
        Path(path) if path else None,
    )
    if not run.dense:
        run.dense = _measure(model, evaluation, progress)
        run.dense_tasks = {} if tasks is None else tasks.measure(model, model, progress=progress)
        run.write()

    def measure(pruned: nn.Module) -> dict[str, Any]:
        return {} if tasks is None else tasks.measure(pruned, model, run.dense_tasks, progress)

    found = 0
    for done, setting in enumerate(rows):
        progress(STAGE, done, len(rows))
        key = None
        try:
            chosen = setting.chosen()
            key = run.key(chosen, setting.tokens, setting.recovery, teaching)
            old = run.rows.get(setting.name, {})
            if old.get("key") == key and "error" not in old:
                found += 1
                continue
            row = _row(model, setting, calibrating, teaching, evaluation, measure, progress)
            run.add(setting, {"config": chosen.facts(), "key": key, **row})
        except Exception as error:  # whatever a method makes of this model: the other rows still count
            message = (str(error).strip() or "no message").splitlines()[0][:1000]
            failure = {"kind": type(error).__name__, "message": message}
            run.add(setting, {"options": dict(setting.options), "key": key, "error": failure})
        release()
        run.write()
    progress(STAGE, len(rows), len(rows))
    return run.result(found)


def _best(lines: Sequence[Line], group: str, keep: float) -> dict[str, Any] | None:
    points = [(point, line.label) for line in lines if line.group == group for point in line.points]
    of = [(p.perplexity, label, p.kept) for p, label in points if p.keep == keep]
    return dict(zip(("perplexity", "label", "kept"), min(of), strict=True)) if of else None


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether ours is as good as the best published method a step of sparsity earlier, on each evaluation text.

    With a suite it is also asked of the geometric mean of the texts, each side's best by that.

    Args:
        result: as `Comparison.to_json` gives it.

    Returns:
        For each text and pair of `GOALS`: `text`, `published_keep`, `our_keep`, `published` and `ours` (`label`,
        `perplexity`, `kept`; None where nothing was measured), and `met` (None then). Of the geometric mean also
        `domains` and `domains_met`: how many texts there are, and on how many ours is met by itself.
    """
    judged: list[dict[str, Any]] = []
    for text in reversed(judged_texts(result)):  # the mean, which counts the others, is first and made last
        best = functools.partial(_best, comparison_lines(result, text))
        for published_keep, our_keep in GOALS:
            published, ours = best("published", published_keep), best("ours", our_keep)
            met = None if published is None or ours is None else ours["perplexity"] <= published["perplexity"]
            keeps = {"text": text, "published_keep": published_keep, "our_keep": our_keep}
            goal = {**keeps, "published": published, "ours": ours, "met": met}
            if text == MEAN:
                of = [other["met"] for other in judged if other["our_keep"] == our_keep and other["text"] != MEAN]
                goal |= {"domains": len(of), "domains_met": None if met is None else of.count(True)}
            judged.append(goal)
    order = judged_texts(result)
    return sorted(judged, key=lambda goal: order.index(goal["text"]))
