"""What the command line shows: progress on standard error, tables or one JSON object on standard output."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, ParamSpec

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..base import ranks
from ..base.errors import InputError, PypruneError, check
from ..base.ranks import leads

EXIT_CODES = (
    "Exit codes: 0 done; 2 a mistake in what was asked for (an argument, a file that is not there); 1 it could not be "
    "done (a damaged or unsupported model, a full disk, a lack of memory). The reason is one line on standard error."
)

out = Console()
err = Console(stderr=True)

_Arguments = ParamSpec("_Arguments")


class Bars:
    """Progress bars on standard error; an instance is a `progress.Progress` callback."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=err,
        )
        self._stage = ""
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._task is None or stage != self._stage or done == 0:
            self._finish()
            self._stage, self._task = stage, self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=self._progress.tasks[-1].total)
            self._progress.stop_task(self._task)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A rich table; columns whose name starts with '>' are right-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        result.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def show(result: dict[str, Any], as_json: bool, *tables: Table | str) -> None:
    """Print `result` as one JSON object, or the tables."""
    if not leads():
        return
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
        return
    for item in tables:
        out.print(item)


def printable() -> None:
    """Let standard output replace what its encoding does not have, as standard error does, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _no_memory(error: RuntimeError) -> bool:
    """Whether torch had no memory left, which on a CPU has no kind of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def verb(function: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turn what goes wrong into one line and an exit code (see `EXIT_CODES`), never a traceback."""

    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            if not getattr(function, "together", False):
                rule = f"be 1 for {function.__name__}, which runs in one process"
                check(ranks.launched() == 1, "WORLD_SIZE", rule, ranks.launched())
            function(*args, **kwargs)
        except (PypruneError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _no_memory(error):
                raise
            message = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
            if not getattr(error, "told", False):
                if kwargs.get("as_json"):
                    sys.stdout.write(json.dumps({"error": {"kind": type(error).__name__, "message": message}}) + "\n")
                err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, InputError) else 1) from error

    return wrapped


def megabytes(count: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:.1f} MB"
