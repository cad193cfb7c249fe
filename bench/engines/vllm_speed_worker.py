"""How long vLLM takes over several checkpoints in turn; run by the Python of vLLM's own environment.

    python bench/engines/vllm_speed_worker.py REQUEST.json ANSWER.json

A request: `models`, a list of requests as `vllm_worker.load` takes them, `cases`, a list of [batch, prompt tokens, new
tokens], and `rounds`. All models are loaded first, then timed in turn in each round, so that a slow minute of the
machine hits all alike. The answer: `threads`, and `models`, for each what `load` tells and `seconds`, a list a case.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_worker import load, run


def answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    loaded = [load(model) for model in request["models"]]
    cases = request["cases"]
    for _, found in loaded:
        found["seconds"] = [[] for _ in cases]
    for round_ in range(request["rounds"] + 1):
        for i, (batch, prompt, new) in enumerate(cases):
            # Other tokens in each round, so that nothing comes from the cache of prefixes.
            prompts = [[(7 * row + j + round_) % 1000 + 100 for j in range(prompt)] for row in range(batch)]
            for llm, found in loaded:
                start = time.perf_counter()
                run(llm, prompts, new)
                if round_:  # the first warms
                    found["seconds"][i].append(time.perf_counter() - start)
    return {"threads": torch.get_num_threads(), "models": [found for _, found in loaded]}


if __name__ == "__main__":
    asked, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.write_text(json.dumps(answer(json.loads(asked.read_text()))))
