"""Runs what a result lacks, in processes, and writes the result after each: whatever ends it, finished runs stay."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import by_line
from pyprune.base.errors import InputError
from pyprune.base.files import new_file

from .recipes import completed
from .settings import Setting

Entry = dict[str, Any]
Job = Callable[[Setting], Entry]
_ADDED = ("dense", "runs", "failed")


def load(path: Path) -> dict[str, Any]:
    """A result, or an empty one where there is no file.

    Raises:
        InputError: the file is no result of this bench.
    """
    if not path.is_file():
        return {"dense": {}, "runs": {}}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"out must be a result of this bench; {path} is not JSON ({error})") from error
    if not isinstance(result, dict) or not all(isinstance(result.get(key), dict) for key in ("dense", "runs")):
        raise InputError(f"out must be a result of this bench, with 'dense' and 'runs'; {path} is not")
    return result


def save(path: Path, **parts: Any) -> None:
    """Put `parts` into the result at `path`; `dense`, `runs` and `failed` are added to, other keys replaced."""
    result = load(path)
    for name, part in parts.items():
        result[name] = {**result.get(name, {}), **part} if name in _ADDED else part
    for key in parts.get("runs", ()):
        result.get("failed", {}).pop(key, None)
    with new_file(path) as temporary:
        temporary.write_text(by_line.dumps(result, _ADDED), encoding="utf-8")


def pending(settings: Sequence[Setting], runs: dict[str, Entry], recipe: dict[str, Any]) -> list[Setting]:
    """Those without an entry that was made by the same recipe."""
    return [s for s in settings if s.key not in runs or completed(runs[s.key]["recipe"]) != recipe]


def quiet() -> None:
    """Transformers says nothing in this process: its warnings and bars are not about the runs."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _start() -> None:
    torch.set_num_threads(1)
    quiet()


def processes(jobs: int) -> Executor:
    """`jobs` fresh processes of one thread each."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start)


def _here(job: Job, setting: Setting) -> Future[Entry]:
    """What an executor's `submit` gives, done in this process; whatever asks to stop does so."""
    future: Future[Entry] = Future()
    try:
        future.set_result(job(setting))
    except Exception as error:
        future.set_exception(error)
    return future


def drive(
    settings: Sequence[Setting],
    job: Job,
    path: Path,
    executor: Executor | None = None,
    jobs: int = 1,
    seconds: float = float("inf"),
    say: Callable[[str], None] = print,
) -> int:
    """Run every setting, and write each entry, or what made it fail, into the result at `path` when it is there.

    Args:
        settings: what to run, in this order.
        job: a setting -> its entry; must be picklable where processes run it.
        path: the result.
        executor: where jobs run; None for here.
        jobs: how many at a time.
        seconds: no run is started later than this.
        say: told about each run.

    Returns:
        How many were run.

    Raises:
        Exception: what the first job that failed raised, after all others.
    """
    started, done = time.perf_counter(), 0
    failures: list[BaseException] = []
    queue = list(settings)
    running: dict[Future[Entry], Setting] = {}

    def finish(setting: Setting, entry: Entry) -> None:
        nonlocal done
        done += 1
        save(path, runs={setting.key: entry})
        spent = time.perf_counter() - started
        say(f"{done} of {len(settings)} in {spent / 60:.1f} min: {setting.key}, {entry.get('words', '')}")

    while queue or running:
        while queue and len(running) < jobs:
            if time.perf_counter() - started > seconds:
                say(f"out of time, runs left: {len(queue)}")
                queue.clear()
                break
            setting = queue.pop(0)
            future = executor.submit(job, setting) if executor else _here(job, setting)
            running[future] = setting
        for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
            setting = running.pop(future)
            if (error := future.exception()) is None:
                finish(setting, future.result())
            else:
                failures.append(error)
                save(path, failed={setting.key: {**setting.to_json(), "error": str(error)}})
                say(f"failed: {setting.key}, {error}")
    if failures:
        raise failures[0]
    return done
