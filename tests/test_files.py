"""Safe writing: a kill, a full disk or an exception loses nothing, and a failing save leaves nothing behind."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from pyprune import InputError
from pyprune.base import files
from pyprune.model import checkpoint, loading


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


def none(folder):
    """No strangers: everything there may be replaced."""
    return []


def test_new_file_replaces_when_the_block_succeeds(tmp_path):
    target = tmp_path / "deep" / "file"
    with files.new_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert listing(target.parent) == ["file"]
    with pytest.raises(RuntimeError), files.new_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "new"
    assert listing(target.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_new_folder_that_fails_leaves_the_old_one(error, tmp_path):
    target = tmp_path / "out"
    with files.new_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(error), files.new_folder(target, True, none) as folder:
        (folder / "a").write_text("half")
        raise error
    assert (target / "a").read_text() == "old"
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interruption_between_the_two_renames_puts_the_old_folder_back(error, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with files.new_folder(target) as folder:
        (folder / "a").write_text("old")
    rename = type(target).rename

    def failing(self, to):
        if ".new-" in self.name:
            raise error
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", failing)
    with pytest.raises(error), files.new_folder(target, True, none) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert listing(tmp_path) == ["out"]


def test_new_folder_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "out"
    for name in ("a", "b"):
        with files.new_folder(target, True, none) as folder:
            (folder / name).write_text(name)
    assert listing(target) == ["b"]
    assert listing(tmp_path) == ["out"]


def test_out_folder_rules(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"out must be a folder; .*file is a file"):
        files.check_out_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match=r"out must not exist yet; .* is not empty"):
        files.check_out_folder(tmp_path, overwrite=False)
    assert files.check_out_folder(tmp_path / "empty", overwrite=False) == tmp_path / "empty"
    assert files.check_out_folder(tmp_path / "new", overwrite=False) == tmp_path / "new"
    with pytest.raises(InputError, match=r"out must hold nothing but what pyprune wrote, .* holds empty, file: name"):
        files.check_out_folder(tmp_path, overwrite=True)
    assert files.check_out_folder(tmp_path, True, none) == tmp_path


def test_places_that_cannot_be_replaced_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for place in (".", "..", tmp_path, "/"):
        with pytest.raises(InputError, match="out must not be the working folder or hold it"):
            files.check_out_folder(place, True, none)
    with pytest.raises(InputError, match=r"out must not be a mount point, .*/proc is one"):
        files.check_out_folder("/proc", True, none)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"out must lie in a folder that can be written; .*file is a file"):
        files.check_out_folder(tmp_path / "file" / "deep" / "out", False)
    monkeypatch.setattr(files.os, "access", lambda place, mode: False)  # as root may write everywhere
    with pytest.raises(InputError, match=r"out must lie in a folder that can be written; .* cannot"):
        files.check_out_folder(tmp_path / "new", False)


def test_through_a_link_its_target_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("link", tmp_path / "disk" / "real"), ("again", tmp_path / "link")):
        (tmp_path / name).symlink_to(target)
    for text in ("new", "newer"):
        with files.new_folder(tmp_path / "again", True, none) as folder:
            assert folder.parent == tmp_path / "disk"
            (folder / "a").write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "again").is_symlink()
        assert (tmp_path / "disk" / "real" / "a").read_text() == text
    assert listing(tmp_path / "disk") == ["real"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        with files.new_folder(tmp_path / "out") as folder:
            (folder / "deep").mkdir(mode=0o700)
            for file in (folder / "a", folder / "deep" / "b"):
                file.touch(mode=0o600)
        with files.new_file(tmp_path / "file") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)  # as writers that replace the file do
    finally:
        os.umask(before)
    modes = {p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    file, folder = 0o666 & ~umask, 0o777 & ~umask
    assert modes == {"out": folder, "out/deep": folder, "out/a": file, "out/deep/b": file, "file": file}


SAVE_OVER = """
    import os, resource, signal, sys
    from transformers import AutoModelForCausalLM
    from pyprune.model import checkpoint; from pyprune.base import files
    out, way = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(out)
    model.model.embed_tokens.weight.data.zero_()
    if way == "disk":  # a full disk: no file may grow past 8 KiB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    elif way == "writing":
        checkpoint._write_manifest = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
    elif way == "syncing":
        files._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    elif way == "renaming":
        rename = files.Path.rename
        files.Path.rename = lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if ".new-" in str(a) else rename(a, b)
    elif way == "removing":
        files.shutil.rmtree = lambda *rest, **how: os.kill(os.getpid(), signal.SIGKILL)
    try:
        checkpoint.save(model, out, overwrite=True)
    except Exception as error:
        print(type(error).__name__, error)
        sys.exit(3)
"""


def save_over(folder, way):
    command = [sys.executable, "-c", textwrap.dedent(SAVE_OVER), str(folder), way]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def saved(tiny, tmp_path):
    return checkpoint.save(tiny("llama"), tmp_path / "out")


@pytest.mark.parametrize("way", ["writing", "syncing"])
def test_kill_in_the_middle_of_saving_leaves_the_old_checkpoint(way, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    result = save_over(saved, way)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    checkpoint.verify(saved)


def test_full_disk_leaves_the_old_checkpoint_and_nothing_else(saved):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    result = save_over(saved, "disk")
    assert result.returncode == 3, result.stderr
    assert f"OSError {saved} could not be written, and nothing was changed: " in result.stdout
    assert "File too large" in result.stdout
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert listing(saved.parent) == ["out"]
    checkpoint.verify(saved)


@pytest.mark.parametrize(
    "use", [checkpoint.verify, lambda folder: loading.load_model(str(folder)), lambda folder: save_over(folder, "not")]
)
def test_kill_between_the_renames_loses_nothing(use, saved, tmp_path):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    (tmp_path / "link").symlink_to(saved)
    assert save_over(tmp_path / "link", "renaming").returncode == -signal.SIGKILL
    assert not saved.exists()
    (aside,) = tmp_path.glob(".out.old-*")
    assert {p.name: p.read_bytes() for p in (aside / "out").iterdir()} == before
    use(tmp_path / "link")
    checkpoint.verify(saved)
    assert not list(tmp_path.glob(".out.old-*"))


def test_kill_before_the_old_folder_is_removed(saved):
    assert save_over(saved, "removing").returncode == -signal.SIGKILL
    new = checkpoint.verify(saved)["files"]
    assert list(saved.parent.glob(".out.old-*"))
    with pytest.raises(InputError, match="is not empty"):
        checkpoint.check_out(saved, overwrite=False)
    assert checkpoint.verify(saved)["files"] == new and not list(saved.parent.glob(".out.old-*"))


def test_undisturbed_save_over_succeeds(saved):
    before = checkpoint.verify(saved)["files"]["model.safetensors"]
    assert save_over(saved, "not at all").returncode == 0
    assert checkpoint.verify(saved)["files"]["model.safetensors"] != before
    assert listing(saved.parent) == ["out"]


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")
