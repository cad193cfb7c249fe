"""Commands in boxes of time, as the drivers of the GPU bench run them; standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMED_OUT = 124
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _die_with_the_parent() -> None:
    """In the child: a driver that is killed leaves nobody behind who goes on measuring."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Box:
    """A command that runs with its output in a file, and ends, with all that it started, when its time is up."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float
    limit: float
    ended: float = 0.0

    @classmethod
    def start(cls, command: list[str], log: Path, limit: float, environment: dict[str, str] | None = None) -> Box:
        """Start `command`; its output is added to `log`, and it may take `limit` seconds.

        Raises:
            OSError: there is no such program.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_the_parent,
            )
        box = cls(process, log, time.monotonic(), limit)
        _RUNNING.append(box)
        return box

    def poll(self) -> int | None:
        """Its exit code, TIMED_OUT once its time is up (it is ended then), or None while it runs."""
        code = self.process.poll()
        if code is None and time.monotonic() - self.started > self.limit:
            self.end()
            code = TIMED_OUT
        if code is not None and not self.ended:
            self.ended = time.monotonic()
        return code

    def wait(self, tick: Callable[[], object] = lambda: None) -> int:
        """As `poll`, when there is an answer; `tick` is called about ten times a second until then."""
        return wait_all([self], tick)[0]

    def end(self) -> None:
        """End the command and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def seconds(self) -> float:
        """How long it has run, or did."""
        return (self.ended or time.monotonic()) - self.started


_RUNNING: list[Box] = []


def wait_all(boxes: Sequence[Box], tick: Callable[[], object] = lambda: None) -> list[int]:
    """The exit codes of commands that run beside each other, as `Box.poll` tells them, when all have ended."""
    codes: dict[int, int] = {}
    while True:
        for i, box in enumerate(boxes):
            if i not in codes and (code := box.poll()) is not None:
                codes[i] = code
        if len(codes) == len(boxes):
            return [codes[i] for i in range(len(boxes))]
        tick()
        time.sleep(0.1)


def end_all() -> None:
    """End every command that still runs."""
    for box in _RUNNING:
        if box.process.poll() is None:
            box.end()


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
