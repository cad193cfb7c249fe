"""What vLLM makes of a checkpoint; run by the Python of vLLM's own environment, imports nothing of this repository.

    python bench/engines/vllm_worker.py REQUEST.json ANSWER.json

A request: `model` (a folder), `options` (of `LLM`), `prompts` and `windows` (lists of token ids), `new_tokens`. The
answer: `class`, `records` (see `load`), `generated` (greedy token ids a prompt) and `nll` (nats a token over all
windows, their first tokens aside).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """vLLM with a request's `model`, and what runs there.

    That is the `class`, and `records`: how many FFNs run from a record of pyprune's, `always` or for which numbers of
    tokens. Where several processes share the model nothing is told.
    """
    from vllm import LLM

    llm = LLM(request["model"], max_model_len=request.get("context", 1024), **request.get("options", {}))
    worker: Any = getattr(getattr(llm.llm_engine.model_executor, "driver_worker", None), "worker", None)
    if worker is None:
        return llm, {}
    model = worker.model_runner.model
    ours = [module for module in model.modules() if type(module).__name__ == "RecordFFN"]
    records = Counter("always" if m.own is None else " ".join(map(str, sorted(m.served))) for m in ours)
    return llm, {"class": f"{type(model).__module__}.{type(model).__name__}", "records": records}


def run(llm: Any, prompts: list[list[int]], tokens: int, **options: Any) -> list[Any]:
    """Greedy outputs of so many tokens after each prompt."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **options)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    return list(llm.generate(asked, sampling, use_tqdm=False))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    llm, found = load(request)
    outputs = run(llm, request["prompts"], request["new_tokens"])
    found["generated"] = [list(output.outputs[0].token_ids) for output in outputs]
    nats, count = 0.0, 0
    for window, output in zip(request["windows"], run(llm, request["windows"], 1, prompt_logprobs=0), strict=True):
        for token, logprobs in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            nats, count = nats - logprobs[token].logprob, count + 1
    return {**found, "nll": nats / count}


if __name__ == "__main__":
    asked, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.write_text(json.dumps(answer(json.loads(asked.read_text()))))
