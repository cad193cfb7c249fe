"""What is kept of a run, so that a later call goes on from there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.errors import CheckpointError, InputError, check
from ...pruning.mixture import Windows
from .. import persist
from .run import Run
from .sources import UNNAMED

STATE = "recovery.safetensors"
_FORMAT = "pyprune-recovery-1"


def digest(*texts: Windows | None) -> str:
    """One name for what the windows hold, and for their sources where these have names."""
    found = hashlib.sha256()
    for text in texts:
        if text is None:
            found.update(b"none")
            continue
        named = text.names != UNNAMED
        for tensor in (text.ids, text.sources) if named else (text.ids,):
            found.update(repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
        if named:
            found.update(repr(text.names).encode())
    return found.hexdigest()


def check_folder(folder: str | Path | None) -> None:
    """Raise `InputError` unless a state can be kept in `folder`."""
    if folder is not None:
        here = Path(folder).absolute()
        above = next(path for path in (here, *here.parents) if path.exists())
        able = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
        check(able, "folder", "be one for the state that can be made and written", str(folder))


class State:
    """A run's file in `folder`, if there is one; of several processes the first reads and writes it.

    Args:
        run: what is written and read.
        folder: None to keep nothing.
        text: digest of its windows.
    """

    def __init__(self, run: Run, folder: Path | None, text: str) -> None:
        self.run = run
        self._file = None if folder is None else folder / STATE
        self._text = text

    def _facts(self) -> dict[str, Any]:
        return {"config": self.run.config.to_json(), "text": self._text, "precision": self.run.report.precision}

    def save(self) -> None:
        """Write everything that another call needs to go on from here."""
        run = self.run
        if self._file is None or run.lesson.ranks.rank > 0:
            return
        tensors = {f"weight.{n}": p for n, p in run.named.items()}
        tensors |= {f"best.{n}": t for n, t in (run.best or {}).items()}
        for name, parameter in run.named.items():
            tensors |= {f"{key}.{name}": value for key, value in run.optimizer.state[parameter].items()}
        report = run.report
        curves = {"train": report.train, "held_out": report.held_out}
        numbers = {"steps": report.steps, "tokens": report.tokens, "best": report.best, "stale": run.stale}
        lesson = run.lesson
        seconds = [run.seconds, lesson.teacher_seconds, lesson.held_out_seconds]
        taught = {"teacher_ce": report.teacher_ce, "teacher_sources": report.teacher_sources}
        facts = {**self._facts(), **curves, **numbers, **taught, "seconds": seconds}
        persist.write(self._file, _FORMAT, tensors, facts)

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """What is in the file; no facts where there is none."""
        return ({}, None) if self._file is None or not self._file.is_file() else persist.read(self._file, _FORMAT)

    @torch.no_grad()
    def load(self) -> bool:
        """Go on from the state in the folder, if there is one.

        Raises:
            InputError: it is of another configuration, text or model.
            CheckpointError: it is damaged.
        """
        run = self.run
        tensors, facts = run.lesson.ranks.first(self._read, lambda made: made, lambda *made: made)
        if facts is None:
            return False
        try:
            self._check_same(facts)
            for name, parameter in run.named.items():
                stored = tensors[f"weight.{name}"]
                check(stored.shape == parameter.shape, f"{name} of the state to resume", "fit", tuple(stored.shape))
                parameter.copy_(stored)
                # A parameter that the loss does not depend on has none.
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
                run.optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device if key != "step" or parameter.is_cuda else "cpu")
                    for key in keys
                }
            best = {n: tensors[f"best.{n}"] for n in run.named if f"best.{n}" in tensors}
            run.best = best or None
            report = run.report
            report.train, report.held_out = list(facts["train"]), list(facts["held_out"])
            report.steps, report.tokens, report.best = (int(facts[k]) for k in ("steps", "tokens", "best"))
            report.teacher_ce, report.teacher_sources = facts["teacher_ce"], dict(facts.get("teacher_sources", {}))
            run.stale = int(facts["stale"])
            run.before, run.lesson.teacher_seconds, run.lesson.held_out_seconds = map(float, facts["seconds"])
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file} is damaged, or of another model: {error}") from error
        return True

    def _check_same(self, facts: dict[str, Any]) -> None:
        own = self._facts()
        mine, theirs = ({**f["config"], "text": f["text"], "precision": f["precision"]} for f in (own, facts))
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key), theirs.get(key)
            check(a == b, f"{key} of the state to resume", f"be {a!r}, as asked for now", b)
