"""How far a streamed run is, on the disk beside its output, so that the same command goes on after a kill.

The folder `.NAME.stream` beside the output NAME holds:

    state.json        the settings of the run, what of the shards is written, and how far the layers are
    layers/0007.json  what was done to a layer
    out/              the output's shards; as a whole it becomes the output at the end
    hidden-8.bin      hidden states of all windows in front of layer 8 (twin-8.bin: of the dense model); or in the spill

`state.json` is replaced after everything it tells of is on the disk; what else a kill left behind is written again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...base.errors import CheckpointError, InputError
from ...base.files import new_file
from ...model.mask import KeepIndex
from ...model.shards import raw_bytes
from ..pruner import LayerReport

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None  # type: ignore[assignment]

STATE = "state.json"
_FORMAT = 1
_SPILLED = "spilled"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        tensors: written to the shards.
        hashes: of finished shards.
        layers: pruned and written.
        hidden, twin: shape of the hidden states that are kept, and dtype; None where there are none.
        scored: layers whose scores are kept, of a run that compares layers first.
    """

    tensors: int = 0
    hashes: dict[str, str] = field(default_factory=dict)
    layers: int = 0
    hidden: list[Any] | None = None
    twin: list[Any] | None = None
    scored: int = 0


def folder_of(out: Path) -> Path:
    """Where the state of a run lies that writes to `out`."""
    target = Path(os.path.realpath(out))
    return target.parent / f".{target.name}.stream"


class State:
    """The state of one run; a second process that wants the same is refused while it is open.

    Args:
        out: the output folder.
        settings: what the result depends on: names with JSON values.
        spill: where hidden states lie instead of beside the state; None for there.

    Attributes:
        folder: of the state.
        out: where the output is written meanwhile.
        progress: how far the run is.
        resumed: an earlier process began it.

    Raises:
        InputError: a run with other settings was begun, or another process is at it.
        CheckpointError: a state that is damaged.
    """

    def __init__(self, out: Path, settings: dict[str, Any], spill: Path | None = None) -> None:
        self.folder = folder_of(out)
        self.out, self._layers = self.folder / "out", self.folder / "layers"
        self.settings = json.loads(json.dumps(settings))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: BinaryIO | None = (self.folder / "lock").open("ab")
        self._take_lock()
        said = self._read()
        self.resumed = said is not None and self.out.is_dir()
        self._states = self.folder if spill is None else Path(spill) / self._spilled()
        if self.resumed:
            assert said is not None
            self.progress = said
            return
        self._clear()
        self.progress = Progress()
        for place in (self.out, self._layers, self._states):
            place.mkdir(parents=True, exist_ok=True)
        (self.folder / _SPILLED).write_text(self._states.name, encoding="utf-8")
        self.save()

    def _spilled(self) -> str:
        """The name of the folder of hidden states.

        Outputs of one name in several places may share what it lies in; a run that goes on, perhaps with its output
        elsewhere, keeps the name that it began with.
        """
        file = self.folder / _SPILLED
        if self.resumed:
            return file.read_text(encoding="utf-8") if file.is_file() else self.folder.name
        return f"{self.folder.name}.{hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()[:12]}"

    def _take_lock(self) -> None:
        if fcntl is None or self._lock is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise InputError(f"out must not be written by two processes; another one is at {self.folder}") from error

    def _read(self) -> Progress | None:
        path = self.folder / STATE
        if not path.is_file():
            return None
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            begun, found = dict(said["settings"]), Progress(**said["progress"])
            if said["format"] != _FORMAT:
                raise ValueError(f"format {said['format']}")
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise CheckpointError(f"{path} is damaged: remove {self.folder} to start anew ({error})") from error
        for name in sorted(begun.keys() | self.settings.keys()):
            if begun.get(name) != self.settings.get(name):
                self.close()
                raise InputError(
                    f"{name} must be {begun.get(name)!r}, as in the run that was begun in {self.folder}; got "
                    f"{self.settings.get(name)!r}: give the same to go on, or remove that folder to start anew"
                )
        return found

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
        if self._states != self.folder:
            shutil.rmtree(self._states, ignore_errors=True)

    def save(self) -> None:
        """Let the state on the disk be this."""
        said = {"format": _FORMAT, "settings": self.settings, "progress": asdict(self.progress)}
        with new_file(self.folder / STATE) as file:
            file.write_text(json.dumps(said, indent=2), encoding="utf-8")

    def note_layer(self, layer: int, report: LayerReport, keep: KeepIndex, sample: bytes) -> None:
        """Write down what was done to a layer: its report, the neurons it kept, and what names the dense one."""
        neurons = base64.b64encode(keep.neurons.to(torch.int32).numpy().tobytes()).decode()
        said = {"report": asdict(report), "neurons": neurons, "sample": base64.b64encode(sample).decode()}
        with new_file(self._layers / f"{layer:04}.json") as file:
            file.write_text(json.dumps(said), encoding="utf-8")

    def layer(self, layer: int) -> tuple[LayerReport, KeepIndex, bytes]:
        """What `note_layer` was given."""
        path = self._layers / f"{layer:04}.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            report = LayerReport(**said["report"])
            raw = bytearray(base64.b64decode(said["neurons"]))
            keep = KeepIndex(torch.frombuffer(raw, dtype=torch.int32), report.before)
            return report, keep, base64.b64decode(said["sample"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: remove {self.folder} to start anew ({error})") from error

    def note_scores(self, layer: int, scores: Tensor) -> None:
        """Write down `[F]` scores of a layer, of a run that compares layers before it prunes any."""
        with new_file(self._layers / f"{layer:04}.scores") as file:
            file.write_bytes(scores.double().cpu().numpy().tobytes())

    def scores(self, layer: int) -> Tensor:
        """What `note_scores` was given."""
        raw = bytearray((self._layers / f"{layer:04}.scores").read_bytes())
        return torch.frombuffer(raw, dtype=torch.float64)

    def states_file(self, what: str, layer: int) -> Path:
        """Where the hidden states `what` in front of a layer lie."""
        return self._states / f"{what}-{layer}.bin"

    def keep_states(self, what: str, layer: int, states: Tensor, mapped: bool) -> list[Any]:
        """Let hidden states be on the disk; those that are `mapped` to their file need only be flushed there."""
        path = self.states_file(what, layer)
        if mapped:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            with new_file(path) as made, made.open("wb", buffering=0) as file:
                for window in states:
                    raw = raw_bytes(window.cpu().contiguous())
                    while len(raw):
                        raw = raw[file.write(raw) :]
        return [list(states.shape), str(states.dtype).removeprefix("torch.")]

    def states(self, what: str, layer: int, facts: list[Any], mapped: bool) -> Tensor:
        """Hidden states that were kept; `mapped` to their file, or in memory."""
        path = self.states_file(what, layer)
        shape, dtype = torch.Size(facts[0]), getattr(torch, facts[1])
        size = shape.numel() * dtype.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} must have {size} bytes: remove {self.folder} to start anew")
        if mapped:
            return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)
        raw = torch.empty(size, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            view, done = raw_bytes(raw), 0
            while done < size:
                done += file.readinto(view[done:])
        return raw.view(dtype).view(shape)

    def forget_states(self, but: int) -> None:
        """Remove hidden states in front of other layers than this."""
        for path in self._states.glob("*-*.bin"):
            if path.stem.rpartition("-")[2] != str(but):
                path.unlink()

    def close(self) -> None:
        """Let another process go on."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """After the output is in its place."""
        self.close()
        if self._states != self.folder:
            shutil.rmtree(self._states, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
