"""Commands in boxes of time, as the drivers of the GPU bench run them; standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

TIMED_OUT = 124


@dataclass
class Box:
    """A command that runs with its output in a file, and ends, with all that it started, when its time is up."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float
    limit: float

    @classmethod
    def start(cls, command: list[str], log: Path, limit: float, environment: dict[str, str] | None = None) -> Box:
        """Start `command`; its output is added to `log`, and it may take `limit` seconds.

        Raises:
            OSError: there is no such program.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        return cls(process, log, time.monotonic(), limit)

    def poll(self) -> int | None:
        """Its exit code, TIMED_OUT once its time is up (it is ended then), or None while it runs."""
        code = self.process.poll()
        if code is None and time.monotonic() - self.started > self.limit:
            self.end()
            return TIMED_OUT
        return code

    def wait(self) -> int:
        """As `poll`, when there is an answer."""
        while (code := self.poll()) is None:
            time.sleep(0.1)
        return code

    def end(self) -> None:
        """End the command and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def tail(log: Path, lines: int = 12) -> str:
    """The end of a log."""
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
