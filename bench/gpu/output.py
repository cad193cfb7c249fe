"""The files that a run on a GPU leaves: each whole at every moment, however the run ends; standard library only."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

WORK = Path(__file__).resolve().parents[2] / "build" / "gpu"
# What machines that lend a GPU hand back at the most. A kill may leave one file under way beside them, see `place`.
MOST_FILES = 8
# Of a log, from its beginning and from its end, in characters.
HEAD, TAIL = 100_000, 400_000
# Log that comes back -> those it is put together from, in the folder of the logs.
LOGS = {
    "bench.log": "bench*.log",
    "build.log": "build*.log",
    "tests.log": "tests*.log",
    "sanitizer.log": "sanitizer*.log",
    "outcomes.jsonl": "outcomes.jsonl",
    "warm.log": "warm*.log",
}
EVERY = 3.0


def place(text: str, target: Path, work: Path = WORK) -> None:
    """Put `text` into `target` in one step: whoever looks finds what was there before, or all of it.

    It is written elsewhere and renamed, so that a run that is killed leaves nothing else in the target's folder: in
    `work`, or beside that folder. Only where both are on another file system than the target is it written beside it,
    under a name that the next call uses again.

    Raises:
        OSError: it cannot be written there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    for room in (work, target.resolve().parent.parent, target.parent):
        beside = room / f".{target.name}.new"
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
            return
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            if room == target.parent:
                raise


def trimmed(file: Path) -> str:
    """The text of a log, without its middle where it is long."""
    size = file.stat().st_size
    with file.open("rb") as log:
        if size <= HEAD + TAIL:
            return log.read().decode("utf-8", "replace")
        head = log.read(HEAD).decode("utf-8", "replace")
        log.seek(size - TAIL)
        tail = log.read().decode("utf-8", "replace")
    return f"{head}\n[... {size - HEAD - TAIL} bytes left out ...]\n{tail}"


class Handed:
    """Copies the logs in `logs` into the folder `outside`, if there is one; at most every EVERY seconds."""

    def __init__(self, logs: Path, outside: Path | None) -> None:
        self.logs, self.outside, self._last, self._sizes = logs, outside, 0.0, dict[str, int]()

    def tick(self) -> None:
        """Copy what has grown, now and then."""
        if time.monotonic() - self._last > EVERY:
            self.now()

    def now(self) -> None:
        """Copy what has grown since."""
        self._last = time.monotonic()
        for name, pattern in LOGS.items() if self.outside else ():
            found = sorted(self.logs.glob(pattern))
            size = sum(file.stat().st_size for file in found)
            if not size or size == self._sizes.get(name):
                continue
            texts = [trimmed(file) for file in found]
            if len(found) > 1:
                texts = [
                    f"=== {file.name}\n{text[-TAIL // len(found) :]}" for file, text in zip(found, texts, strict=True)
                ]
            assert self.outside is not None
            place("".join(texts), self.outside / name, self.logs)
            self._sizes[name] = size
