"""Records compacted for a gather of many tokens, kept for as long as their weights and their index stay as they are."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Of a GPU's memory, and on a CPU, where only tests come here.
_SHARE = 1 / 8
_CPU_BYTES = 1 << 30
# Layers of a model, which share the room: a guess, for whoever must predict before there is one.
_LAYERS = 32

_Key = tuple[object, ...]


@dataclass
class _Kept:
    rows: Tensor
    place: _Key
    storages: tuple[StorageWeakRef, StorageWeakRef]
    versions: tuple[int, int]
    stream: int


# By the identities of record and index, for as long as both live; and what watches for their end.
_KEPT: dict[tuple[int, int], _Kept] = {}
_ENDS: dict[tuple[int, int], tuple[weakref.finalize, ...]] = {}


def _room(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _CPU_BYTES
    return int(_SHARE * torch.cuda.get_device_properties(device).total_memory)


def holds_a_model_of(rows_bytes: int, device: str) -> bool:
    """Whether the rows of every layer can be kept, if one layer's are so many bytes, on a type of device."""
    return _LAYERS * rows_bytes <= _room(torch.device(device))


def kept_bytes(device: torch.device) -> int:
    """Bytes that are kept on a device now."""
    return sum(kept.rows.nbytes for kept in _KEPT.values() if kept.rows.device == device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _place(record: Tensor, index: Tensor) -> _Key:
    where = (record.device, record.dtype, record.data_ptr(), tuple(record.shape), record.stride())
    return (*where, index.data_ptr(), index.shape[0])


def _there(kept: _Kept, record: Tensor, index: Tensor) -> bool:
    """Whether rows are of these tensors still: `module.to` and `data = ` put others into the same parameter, which may
    lie at the old address.
    """
    mine = (t.untyped_storage()._cdata for t in (record, index))
    return kept.place == _place(record, index) and all(s.cdata == m for s, m in zip(kept.storages, mine, strict=True))


def _forget(key: tuple[int, int]) -> None:
    _KEPT.pop(key, None)
    for finalizer in _ENDS.pop(key, ()):
        finalizer.detach()


def _keep(key: tuple[int, int], record: Tensor, index: Tensor, rows: Tensor, versions: tuple[int, int]) -> None:
    if rows.is_cuda:
        # Once for a mask: whatever stream takes the rows next finds them written.
        torch.cuda.current_stream(rows.device).synchronize()
    storages = StorageWeakRef(record.untyped_storage()), StorageWeakRef(index.untyped_storage())
    _KEPT[key] = _Kept(rows, _place(record, index), storages, versions, _stream(rows.device))
    _ENDS[key] = tuple(weakref.finalize(tensor, _forget, key) for tensor in (record, index))
    for finalizer in _ENDS[key]:
        finalizer.atexit = False


def _take_again(kept: _Kept, record: Tensor, index: Tensor) -> None:
    """Into the same memory, which other streams may be reading, and may read next."""
    waits = kept.rows.is_cuda and not _capturing(kept.rows.device)
    if waits:
        torch.cuda.synchronize(kept.rows.device)
    torch.index_select(record.detach(), 0, index, out=kept.rows)
    if waits:
        torch.cuda.current_stream(kept.rows.device).synchronize()


def compacted(record: Tensor, index: Tensor) -> Tensor:
    """The rows `index` of `record`, `[K, P*D]` contiguous; not to be written.

    They are kept until `record` or `index` is freed or gets other memory, and taken anew, into the same memory, after
    either was written to (not through `data`, of which nobody knows). An eighth of the GPU's memory is the most that is
    kept; what does not fit is taken at every call, as are rows of inference tensors, which do not tell whether they
    were written to.

    In the capture of a CUDA graph nothing is kept: rows that were kept before are read, and nothing is allocated;
    others are taken by the graph itself, at every replay, with a warning. So call once before, by `warming.warmup`. A
    graph that reads kept rows does not see later changes of the weights, until another call has taken the rows anew.

    Args:
        record: `[F, P*D]`.
        index: `[K]` int32.
    """
    if record.is_inference() or index.is_inference():
        return record.index_select(0, index)
    key, versions, capturing = (id(record), id(index)), (record._version, index._version), _capturing(record.device)
    kept = _KEPT.get(key)
    if kept is not None and not _there(kept, record, index):
        _forget(key)
        kept = None
    if kept is None:
        # Kept beyond a block of inference mode, whose own tensors could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            rows = record.index_select(0, index)
        if capturing:
            warnings.warn(
                "a gather's rows are copied at every replay of this CUDA graph; "
                "call pyprune.ffn.warming.warmup before the capture",
                stacklevel=2,
            )
        elif kept_bytes(record.device) + rows.nbytes <= _room(record.device):
            _keep(key, record, index, rows, versions)
        return rows
    if kept.versions != versions:
        _take_again(kept, record, index)
        if not capturing:
            kept.versions = versions
    if not capturing and kept.stream != _stream(record.device):
        kept.rows.record_stream(torch.cuda.current_stream(record.device))
    return kept.rows
