"""What vLLM makes of a checkpoint; run by the Python of vLLM's own environment, imports nothing of this repository.

    python bench/engines/vllm_worker.py REQUEST.json ANSWER.json

A request: `model` (a folder), `options` (of `LLM`), `prompts` and `windows` (lists of token ids), `new_tokens`, and
`speed`, a list of [batch, prompt tokens, new tokens]. The answer: `class`, `generated` (greedy token ids a prompt),
`nll` (nats a token over all windows, their first tokens aside), `seconds` to load, `records` (how many FFNs run from
a record of pyprune's: `always`, or for which numbers of tokens), and `speed`, seconds a case.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    start = time.perf_counter()
    llm = LLM(request["model"], max_model_len=request.get("context", 1024), **request.get("options", {}))
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    worker: Any = llm.llm_engine.model_executor.driver_worker.worker
    model = worker.model_runner.model
    found["class"] = f"{type(model).__module__}.{type(model).__name__}"
    ours = [module for module in model.modules() if type(module).__name__ == "RecordFFN"]
    found["records"] = Counter("always" if m.own is None else " ".join(map(str, sorted(m.served))) for m in ours)

    def run(prompts: list[list[int]], tokens: int, **options: Any) -> list[Any]:
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **options)
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return list(llm.generate(asked, sampling, use_tqdm=False))

    if request.get("prompts"):
        outputs = run(request["prompts"], request["new_tokens"])
        found["generated"] = [list(output.outputs[0].token_ids) for output in outputs]
    if request.get("windows"):
        nats, count = 0.0, 0
        for window, output in zip(request["windows"], run(request["windows"], 1, prompt_logprobs=0), strict=True):
            for token, logprobs in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                nats, count = nats - logprobs[token].logprob, count + 1
        found["nll"] = nats / count
    speeds = []
    for batch, prompt, new in request.get("speed", []):
        prompts = [[(7 * i + j) % 1000 + 100 for j in range(prompt)] for i in range(batch)]
        run(prompts, new)  # warm
        samples = []
        for round_ in range(3):
            # Other tokens in each round, so that nothing comes from the cache of prefixes.
            fresh = [[t + round_ + 1 for t in p] for p in prompts]
            start = time.perf_counter()
            run(fresh, new)
            samples.append(time.perf_counter() - start)
        speeds.append({"batch": batch, "prompt": prompt, "new": new, "seconds": sorted(samples)})
    found["speed"] = speeds
    return found


if __name__ == "__main__":
    asked, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.write_text(json.dumps(answer(json.loads(asked.read_text()))))
