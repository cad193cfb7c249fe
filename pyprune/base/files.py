"""Safe file writing: everything is written beside its place and renamed; a kill or a full disk loses nothing."""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import InputError

Strangers = Callable[[Path], list[str]]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The user's folder for what can be made again, which PYPRUNE_CACHE names; it need not exist."""
    named = os.environ.get("PYPRUNE_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "pyprune"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "pyprune" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "pyprune"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without a home: no folder, so that nothing is kept
        return Path(os.devnull)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path, what: str) -> Path:
    return target.parent / f".{target.name}.{what}-{secrets.token_hex(4)}"


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Let every failure to write be an `OSError` that says what could not be written."""
    try:
        yield
    except SafetensorError as error:  # how its writer tells of a full disk
        raise OSError(f"{target} could not be written, and nothing was changed: {error}") from error
    except OSError as error:
        if error.strerror is None:
            raise
        reason = f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
        told = type(error)(f"{target} could not be written, and nothing was changed: {reason}")
        told.errno = error.errno
        raise told from error


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block succeeds.

    Permissions are those that the umask gives a new file.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    target = Path(path)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target, "new")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        try:
            yield temporary
            temporary.chmod(mode)
            _sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def check_name(path: str | Path, argument: str) -> None:
    """Raise `InputError` for a path that only Python can open: libraries that are not Python's take UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that it cannot decode as surrogates
        rule = "be a path in UTF-8, and the locale of UTF-8 (or PYTHONUTF8=1 be set)"
        raise InputError(f"{argument} must {rule}; got {str(path)!r}") from error


def restore(target: str | Path) -> None:
    """Finish what a process that was killed while it replaced the folder `target` had begun.

    If it had moved the old folder aside and not yet put the new one in its place, the old one comes back.
    """
    target = Path(os.path.realpath(target))
    for aside in sorted(target.parent.glob(f".{glob.escape(target.name)}.old-*")):
        if not target.exists() and (aside / target.name).is_dir():
            (aside / target.name).rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _everything(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def check_out_folder(path: str | Path, overwrite: bool, strangers: Strangers = _everything) -> Path:
    """The folder that `path` names, links followed, if it may be written.

    Args:
        path: the folder, which need not exist.
        overwrite: whether a folder with content may be replaced.
        strangers: names what in such a folder must not be removed. The default names everything.

    Raises:
        InputError: it is a file, the working folder or one that holds it, a mount point, or a folder with content that
            may not be replaced; or it cannot be made where it is to lie.
    """
    check_name(path, "out")
    target = Path(os.path.realpath(path))
    restore(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"out must be a folder; {target} is a file")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise InputError(
            f"out must not be the working folder or hold it, for it is replaced as a whole; got {str(path)!r}: "
            "name a new folder in it"
        )
    if os.path.ismount(target):
        raise InputError(
            f"out must not be a mount point, which cannot be replaced; {target} is one: name a folder in it"
        )
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"out must lie in a folder that can be written; {above} {'cannot' if above.is_dir() else 'is a file'}"
        )
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise InputError(f"out must not exist yet; {target} is not empty (pass overwrite to replace it)")
        if found := strangers(target):
            named = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise InputError(
                f"out must hold nothing but what pyprune wrote, to be overwritten; {target} holds {named}: "
                "name another folder, or move these away"
            )
    return target


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, strangers: Strangers = _everything) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; put it in the place of `path` when the block succeeds.

    An existing folder is moved aside first and deleted last, so at every moment a whole folder, old or new, is on
    disk; a kill between the two renames leaves the old one beside its place, and `restore` brings it back. A symbolic
    link stays, and what it names is replaced. Permissions are those that the umask gives new files.

    Raises:
        InputError: as for `check_out_folder`.
        OSError: it cannot be written; `path` is as it was.
    """
    target = check_out_folder(path, overwrite, strangers)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(target, "new")
        temporary.mkdir()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            for entry in temporary.rglob("*"):
                entry.chmod(mode if entry.is_dir() else mode & 0o666)
            put_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_folder(made: Path, target: Path) -> None:
    """Put the folder `made`, on the same disk, in the place of `target`, as `new_folder` does at its end."""
    for entry in made.rglob("*"):
        if entry.is_file():
            _sync(entry)
    aside = _beside(target, "old")
    try:
        if target.exists():
            aside.mkdir()
            target.rename(aside / target.name)
        made.rename(target)
    finally:  # Ctrl-C between the two renames included
        restore(target)
