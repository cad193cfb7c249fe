"""Safe writing: a kill, a full disk or an exception loses nothing, and a failing save leaves nothing behind."""

import resource
import signal
import subprocess
import sys
import textwrap

import pytest

from pyprune import InputError, checkpoint, files


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


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
    with pytest.raises(error), files.new_folder(target, overwrite=True) as folder:
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
    with pytest.raises(error), files.new_folder(target, overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert listing(tmp_path) == ["out"]


def test_new_folder_replaces_the_whole_folder(tmp_path):
    target = tmp_path / "out"
    for name in ("a", "b"):
        with files.new_folder(target, overwrite=True) as folder:
            (folder / name).write_text(name)
    assert listing(target) == ["b"]
    assert listing(tmp_path) == ["out"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_out_folder_rules(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"out must be a folder; .*file is a file"):
        files.check_out_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match=r"out must not exist yet; .* is not empty"):
        files.check_out_folder(tmp_path, overwrite=False)
    assert files.check_out_folder(tmp_path / "empty", overwrite=False) == tmp_path / "empty"
    assert files.check_out_folder(tmp_path / "new", overwrite=False) == tmp_path / "new"
    assert files.check_out_folder(tmp_path, overwrite=True) == tmp_path


SAVE_OVER = """
    import os, resource, signal, sys
    from transformers import AutoModelForCausalLM
    from pyprune import checkpoint, files
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
    assert "File too large" in result.stdout
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert listing(saved.parent) == ["out"]
    checkpoint.verify(saved)


def test_undisturbed_save_over_succeeds(saved):
    before = checkpoint.verify(saved)["files"]["model.safetensors"]
    assert save_over(saved, "not at all").returncode == 0
    assert checkpoint.verify(saved)["files"]["model.safetensors"] != before
    assert listing(saved.parent) == ["out"]


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "abc").startswith("ba7816bf8f01cfea")
