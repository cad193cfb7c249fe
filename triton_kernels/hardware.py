"""What a configuration must know of a device: its architecture, as 10 * major + minor of the compute capability."""

from __future__ import annotations

import functools

import torch

# Most shared memory that a block may ask for, in KiB (CUDA programming guide, technical specifications). Others are
# taken to have the least.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
# The system's own part of it for every block that runs.
_RESERVED = 1024

# Of an H100 or H200. Others with much memory bandwidth have as many, roughly: 108 in an A100, 148 in a B200.
MULTIPROCESSORS = 132

# Stands for a device in Triton's interpreter, which has neither shared memory nor registers.
INTERPRETER = 90


@functools.cache
def _of(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """The architecture of a CUDA device, of the current one where it has no number; `INTERPRETER` for others."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETER
    return _of(torch.cuda.current_device() if device.index is None else device.index)


def shared_limit(architecture: int, blocks: int = 1) -> int:
    """Bytes of shared memory that a block may ask for where `blocks` of them are to run on a multiprocessor at once."""
    limit = _SHARED_KIB.get(architecture, min(_SHARED_KIB.values())) * 1024
    return (limit + _RESERVED) // blocks - _RESERVED


def has_descriptors(architecture: int) -> bool:
    """Whether tiles can be copied by tensor descriptors."""
    return architecture >= 90


def multiplies_from_shared(architecture: int) -> bool:
    """Whether matrix instructions take 64 rows of weights from shared memory; elsewhere they take 16 from registers."""
    return 90 <= architecture < 120
