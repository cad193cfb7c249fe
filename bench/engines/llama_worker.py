"""What llama.cpp makes of a GGUF file; needs llama-cpp-python (see `places.LLAMA_ENVIRONMENT`) and numpy.

    python bench/engines/llama_worker.py REQUEST.json ANSWER.json

A request: `model` (a file), `prompts` and `windows` (lists of token ids), `new_tokens`, `threads`. The answer:
`generated` (greedy token ids a prompt) and `nll` (nats a token over all windows, their first tokens aside).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def answer(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    context = max(
        [len(row) for row in request["windows"]] + [len(p) + request["new_tokens"] for p in request["prompts"]]
    )
    model = llama_cpp.Llama(
        request["model"], n_ctx=context, n_threads=request["threads"], logits_all=True, verbose=False
    )

    def logits(tokens: list[int]) -> np.ndarray:
        model.eval(tokens)
        return np.array(model.scores[model.n_tokens - len(tokens) : model.n_tokens], dtype=np.float64)

    generated = []
    for prompt in request["prompts"]:
        model.reset()
        ids = [int(logits(prompt)[-1].argmax())]
        while len(ids) < request["new_tokens"]:
            ids.append(int(logits(ids[-1:])[-1].argmax()))
        generated.append(ids)
    nats, count = 0.0, 0
    for window in request["windows"]:
        model.reset()
        found = logits(window)[:-1]
        top = found.max(-1, keepdims=True)
        told = found[np.arange(len(found)), window[1:]] - top[:, 0]
        nats += float((np.log(np.exp(found - top).sum(-1)) - told).sum())
        count += len(found)
    return {"generated": generated, "nll": nats / max(count, 1)}


if __name__ == "__main__":
    asked, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.write_text(json.dumps(answer(json.loads(asked.read_text()))))
