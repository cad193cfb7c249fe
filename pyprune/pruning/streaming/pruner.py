"""One run of `Pruner` over a model on the disk: what is pruned is read, cut, written and dropped layer by layer."""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ...base.errors import check
from ...base.machine import products
from ...base.memory import device_available
from ...base.progress import Progress
from ...model import families, surgery
from ...model.families import FFN
from ...model.mask import KeepIndex
from ...model.pages import Pages
from ...model.shard_writer import ShardWriter
from .. import importance
from ..calibration import LayerStream
from ..mixture import Windows
from ..options import PruneOptions
from ..pruner import LayerReport, Pruner
from .state import State

# Hidden states of the first of two passes, which compares layers.
_DENSE = "dense"
# On a GPU layers take less time than their hidden states to be kept, so these are kept as seldom, in seconds; what was
# done since is lost in a kill.
SELDOM = 30.0


class KeptStream(LayerStream):
    """Hidden states that a state keeps: from where an earlier process left them, in memory or mapped to files.

    Args:
        state: keeps them.
        name: of the hidden states there.
        start: the layer that they are in front of.
        spilled: they are mapped to their files.
        work: bytes of the device that a layer needs beside them; where both do not fit, they are in main memory.

    The others, and errors, as `LayerStream`.
    """

    def __init__(
        self, state: State, name: str, start: int, spilled: bool, work: int, *args: Any, **kwargs: Any
    ) -> None:
        self._state, self._name, self._start, self.spilled, self._work = state, name, start, spilled, work
        super().__init__(*args, **kwargs)
        for layer in range(start):
            self._calls[layer] = ((), {})
        self._position = self._twin_position = start

    def _embed(self, ids: Tensor) -> Tensor:
        kept = self._state.progress.hidden
        if self._start and kept:
            return self._back(self._name, kept)
        return super()._embed(ids)

    def _back(self, name: str, kept: list[Any]) -> Tensor:
        """Hidden states that an earlier process kept, where this one has them."""
        states = self._state.states(name, self._start, kept, self.spilled)
        if self.spilled or self._device.type == "cpu":
            return states
        return self._room(name, tuple(states.shape), states).copy_(states)

    def _begin_twin(self) -> Tensor:
        kept = self._state.progress.twin
        if self._start and kept:
            return self._back("twin", kept)
        return super()._begin_twin()

    def _room(self, what: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if self.spilled:
            return self._map(what, shape, like, self._start)
        if self._device.type == "cpu":
            return super()._room(what, shape, like)
        if self._fits(torch.Size(shape).numel() * like.dtype.itemsize):
            return torch.empty(shape, dtype=like.dtype, device=self._device)
        return torch.empty(shape, dtype=like.dtype, pin_memory=self._device.type == "cuda")

    def _fits(self, size: int) -> bool:
        return size + self._work <= device_available(self._device)

    def _onward(self, what: str, states: Tensor) -> Tensor:
        if not self.spilled:
            return states
        position = self._twin_position if what == "twin" else self._position
        return self._map(what, tuple(states.shape), states, position + 1)

    def _map(self, what: str, shape: tuple[int, ...], like: Tensor, layer: int) -> Tensor:
        """A file for the hidden states in front of a layer, mapped; a full disk is an error here, no signal later."""
        path = self._state.states_file(what if what == "twin" else self._name, layer)
        size = torch.Size(shape).numel()
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size * like.dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)

    def keep(self, layer: int) -> None:
        """Let what stands in front of a layer be on the disk."""
        kept = self._state.progress
        kept.hidden = self._state.keep_states(self._name, layer, self._hidden, self.spilled)
        if self._twin is not None:
            kept.twin = self._state.keep_states("twin", layer, self._twin, self.spilled)


class StreamedPruner(Pruner):
    """`Pruner` of a model on the disk.

    Args:
        pages: the model.
        options, windows, progress: as `Pruner`.
        state: where the run notes how far it is.
        spilled: hidden states lie in files.

    Attributes:
        writer: of the output's shards; set before `run`.
    """

    writer: ShardWriter

    def __init__(
        self,
        pages: Pages,
        options: PruneOptions,
        windows: Windows | None,
        progress: Progress,
        state: State,
        spilled: bool = False,
    ) -> None:
        super().__init__(pages.described, options, windows, progress)
        self.pages, self.state, self.spilled = pages, state, spilled
        self._samples: list[bytes] = []
        self._seldom = 0.0 if spilled or pages.transfer is None else SELDOM
        self._kept = time.monotonic()
        self._writing = ThreadPoolExecutor(1, "writing a layer")
        self._job: Future[None] | None = None

    @property
    def begun(self) -> str:
        return ""  # the checkpoint that is read is as it was

    @property
    def fingerprint(self) -> str:
        """Of the dense model, once all its layers were read."""
        return families.fingerprint_of(self.pages.model, self._samples)

    def _stream_from(self, name: str, start: int, twin: bool) -> KeptStream | None:
        if start == len(self.ffns):
            return None
        self.progress("embedding the calibration text", 0, 1)
        assert self.ids is not None
        with self.pages.front():
            multiplied = products(self.options.precision, self.pages.device)
            kept = self.state, name, start, self.spilled, self.work(twin)
            return KeptStream(*kept, self.pages.model, self.ffns, self.ids, twin, self.sources, multiplied)

    def work(self, twin: bool) -> int:
        """Bytes that a layer needs at most, of weights, activations of a window, statistics and its fit."""
        assert self.ids is not None
        ffn = self.ffns[0]
        f, d, tokens = max(self.sizes), ffn.hidden_size, self.ids.shape[1]
        k = math.ceil(self.options.keep * f)
        needed = 3 * self.pages.layer_bytes + tokens * (20 * f + 16 * d)
        if "gram" in self.options.repair.needs | self.criterion.needs:
            fit = max(k * f + 2 * k * k + f * d + 2 * k * d, 4 * f * d + k * d)
            scores = 4 * f * f if "gram" in self.criterion.needs else 0
            needed += 8 * (f * (f + d * twin) + max(fit, scores))
        return needed

    def _due(self) -> bool:
        """Whether hidden states are to be kept now."""
        return time.monotonic() - self._kept >= self._seldom

    def stream(self, twin: bool = False) -> KeptStream | None:  # type: ignore[override]
        """As `Pruner.stream`; None where no layer is left."""
        return self._stream_from("hidden", self.state.progress.layers, twin)

    def scores(self) -> list[Tensor]:
        """`[F]` scores of every FFN of the dense model, by a pass of its own, which resumes too."""
        kept, last = self.state.progress, len(self.ffns)
        stream = self._stream_from(_DENSE, kept.scored, False) if self.criterion.needs else None
        for ffn in self.ffns[kept.scored :]:
            self.progress("scoring neurons", ffn.layer, last)
            self.pages.need(ffn.block)
            stats = None
            if stream is not None:
                stats = stream.statistics(ffn, "gram" in self.criterion.needs)
            self.state.note_scores(ffn.layer, self.score(ffn, stats))
            more = ffn.layer + 1 < last
            if stream is not None and more:
                stream.advance()
            self.pages.drop(ffn.block)
            if stream is not None and more:
                if not self._due():
                    continue
                stream.keep(ffn.layer + 1)
            kept.scored = ffn.layer + 1
            if not more:
                kept.hidden = None
            self.state.save()
            self.state.forget_states(kept.scored)
            self._kept = time.monotonic()
        self.progress("scoring neurons", last, last)
        self._scores = [self.state.scores(ffn.layer) for ffn in self.ffns]
        return self._scores

    def copy_outside(self) -> None:
        """Write the tensors that belong to no layer, as they are."""
        for name in self.pages.outside[self.writer.done :]:
            self.progress("copying what is outside the layers", self.writer.done, len(self.pages.outside))
            self.writer.write(name, self.pages.copied(name))
            self._note_written()

    def _note_written(self) -> None:
        self.writer.flush()
        kept = self.state.progress
        kept.tensors, kept.hashes = self.writer.done, dict(self.writer.hashes)
        self.state.save()

    def enter(self, stage: list[list[FFN]]) -> list[KeepIndex] | None:
        ffn = stage[0][0]
        if ffn.block < self.state.progress.layers:
            report, keep, sample = self.state.layer(ffn.layer)
            self.reports.append(report)
            self._samples.append(sample)
            surgery.cut(ffn, keep)  # its weights are not here, its shapes are
            return [keep]
        self.pages.need(ffn.block)
        self._samples.append(families.sample(ffn))
        return None

    def leave(self, stage: list[list[FFN]], chosen: list[KeepIndex], stream: Any) -> None:
        block = stage[0][0].block
        more = block + 1 < len(self.ffns)
        if isinstance(stream, KeptStream) and self.options.sequential and more:
            stream.advance()
        tensors = {name: self.pages.model.state_dict()[name] for name in self.pages.names(block)}
        self.pages.drop(block)
        self.wait()  # no more than one layer waits to be written
        what = self.reports[-1], chosen[-1], self._samples[-1]
        after = None if self.pages.transfer is None else self.pages.transfer.mark()
        keeps = not more or stream is None or self._due()
        self._job = self._writing.submit(self._write, block, tensors, what, after, stream if more else None, keeps)
        if stream is not None and keeps:
            self.wait()  # the next layer changes what is to be kept
            self._kept = time.monotonic()

    def _write(
        self,
        block: int,
        tensors: dict[str, Tensor],
        what: tuple[LayerReport, KeepIndex, bytes],
        after: Any,
        stream: Any,
        keeps: bool,
    ) -> None:
        """Let a layer be on the disk, and then, where it `keeps` up, the state say so."""
        move = self.pages.transfer
        for name, tensor in tensors.items():
            self.writer.write(name, [tensor] if move is None else move.leave(tensor, after))
        self.state.note_layer(block, *what)
        if not keeps:
            return
        if isinstance(stream, KeptStream):
            stream.keep(block + 1)
        self.state.progress.layers = block + 1
        self._note_written()
        self.state.forget_states(block + 1)

    def wait(self) -> None:
        """Until all that was given to be written is."""
        if self._job is not None:
            self._job.result()

    def close(self) -> None:
        """End threads and files, also after an error."""
        self._writing.shutdown()
        if hasattr(self, "writer"):
            self.writer.close()


def check_streamed(options: PruneOptions) -> None:
    """Raise `InputError` for what cannot be streamed."""
    rule = "be uniform or global with stream: others run the whole model many times; prune in memory, or give a mask"
    check(options.allocation.NAME in ("uniform", "global"), "allocation", rule, options.allocation.NAME)
    gradients = importance.get(options.method).needs & {"gradients", "gradients2"}
    rule = "need no gradients with stream: they go back through the whole model; take obs, wanda or a magnitude"
    check(not gradients, "method", rule, options.method)
