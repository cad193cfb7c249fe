"""A tensor-parallel model with its FFNs in records, in several processes: run by `python -m torch.distributed.run`.

tensor_parallel_cases.py MODEL MASK OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]


def main(rank: int, folder: Path, mask_file: Path, out: Path) -> None:
    import torch
    from rank_cases import text
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    import pyprune

    ids = text()[:, :12]

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()

    def logits(model: Any, of: torch.Tensor = ids) -> torch.Tensor:
        with torch.no_grad():
            return model(of).logits

    def gradient(model: Any) -> torch.Tensor:
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        return x.grad

    found = {"sharded": logits(load())}
    facts: dict[str, Any] = {}
    model = pyprune.accelerate(load())
    facts["rows"] = [len(layer.mlp.record) for layer in model.model.layers]
    found["compact"] = logits(model)
    found["one"] = logits(model, ids[:1])
    found["gradient"] = gradient(model)
    model.save_pretrained(out / "saved")
    found["quantised"] = logits(pyprune.accelerate(load(), weights="int8"))
    mask = pyprune.Mask.load(mask_file)
    gather = pyprune.accelerate(load(), mode="gather", mask=mask)
    facts["index"] = [len(layer.mlp.index) for layer in gather.model.layers]
    found["gather"] = logits(gather)

    def refused(name: str, call: Any) -> None:
        try:
            call()
            facts[name] = None
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"

    def lopsided() -> pyprune.Mask:
        sizes = [k.intermediate_size for k in mask.layers]
        return pyprune.Mask(tuple(pyprune.KeepIndex(range(8), size) for size in sizes), mask.fingerprint)

    refused("compact mask", lambda: pyprune.accelerate(load(), mask=mask))
    refused("lopsided mask", lambda: pyprune.accelerate(load(), mode="gather", mask=lopsided()))
    refused("save", lambda: pyprune.save(model, out / "by one"))
    refused("twice", lambda: pyprune.accelerate(model))
    narrow = folder.parent / "narrow"
    refused("narrow", lambda: pyprune.accelerate(AutoModelForCausalLM.from_pretrained(narrow, tp_plan="auto")))
    refused("prune", lambda: pyprune.prune(load(), method="random", repair=None))
    save_file(found, out / f"logits-{rank}.safetensors")
    (out / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    from rank_cases import group

    with group(sharded=True) as number:
        main(number, *map(Path, sys.argv[1:4]))
