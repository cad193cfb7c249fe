"""Safe file writing: everything is written beside its place and renamed; a kill or a full disk loses nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_out_folder(path: str | Path, overwrite: bool) -> Path:
    """Return `path` as a Path, or raise `InputError` when it exists and may not be replaced."""
    target = Path(path)
    if target.is_file():
        raise InputError(f"out must be a folder; {target} is a file")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InputError(f"out must not exist yet; {target} is not empty (pass overwrite to replace it)")
    return target


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; put it in the place of `path` when the block succeeds.

    An existing folder is moved aside first and deleted last, so at every moment a whole folder, old or new, is on disk.

    Raises:
        InputError: `path` is a file, or a folder with content while `overwrite` is False.
    """
    target = check_out_folder(path, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            if file.is_file():
                _sync(file)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            target.rename(old / target.name)
        try:
            temporary.rename(target)
        except BaseException:  # Ctrl-C between the two renames included
            if old is not None and not target.exists():
                (old / target.name).rename(target)
                old.rmdir()
            raise
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
