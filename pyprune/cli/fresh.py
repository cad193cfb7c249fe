"""Use a checkpoint as somebody without pyprune would: run as a script in a fresh process, stock Transformers only.

    python fresh.py FOLDER LOGITS.safetensors PROMPT NEW_TOKENS

prints one JSON object: the largest difference of the logits from those in the file (`ids` `[1, W]`, `logits`
`[1, W, vocabulary]`), a greedy continuation of the prompt, and how much memory loading and running took (bytes).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

if __name__ == "__main__":
    sys.modules["pyprune"] = None  # type: ignore[assignment]  # an import of it would now fail

import psutil
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def _watch(process: psutil.Process, peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.005):
        peak[0] = max(peak[0], process.memory_info().rss)


def main(folder: str, logits_file: str, prompt: str, new_tokens: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    expected = load_file(logits_file)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [before]
    watcher = threading.Thread(target=_watch, args=(process, peak, done), daemon=True)
    watcher.start()
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    loaded = time.perf_counter() - started
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=int(new_tokens), do_sample=False)
    done.set()
    watcher.join()
    with torch.no_grad():
        difference = (model(expected["ids"]).logits - expected["logits"]).abs().max().item()
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    print(json.dumps({"difference": difference, "text": text, "load_seconds": loaded, "peak_bytes": peak[0] - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
