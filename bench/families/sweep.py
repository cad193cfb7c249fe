"""Every type of Transformers that writes text, tiny and random: what does pyprune do with it?

python -m bench.families.sweep [--out FILE.json] [TYPE ...]      all: about three minutes of one core

Each model is pruned to half of its FFN neurons, saved, loaded with its own class, accelerated, and writes. By state:

    works        reloaded logits equal, accelerated logits within 1e-4 of the largest, generation runs
    refused      a PypruneError before anything changed, with its message
    refused late the same after something had changed
    CRASH        any other exception, or wrong logits: a fault of pyprune
    not built    no tiny model could be made here, which says nothing about pyprune
    no decoder   an encoder with a head for text, refused
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
import typer
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

import pyprune
from bench.families.build import built
from pyprune.base.files import new_file

SECONDS = 60
RESULT = Path(__file__).parents[1] / "results" / "families.json"
TABLES = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "sequence-to-sequence": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
ENCODERS = ("bert", "roberta", "electra", "xlnet", "xlm", "xmod", "ernie", "rembert", "roformer", "camembert",
            "data2vec-text", "big_bird", "reformer", "megatron-bert", "roc_bert", "roberta-prelayernorm",
            "xlm-roberta", "xlm-roberta-xl", "bert-generation", "git", "encoder-decoder")  # fmt: skip


def types() -> Iterator[tuple[str, str, str]]:
    """(type, class, table) of every type of the tables, each once."""
    seen = set()
    for table, names in TABLES.items():
        for kind in sorted(names):
            name = names[kind]
            if kind not in seen:
                seen.add(kind)
                yield kind, name if isinstance(name, str) else name[0], table


def tried(model: Any, words: dict[str, Tensor]) -> tuple[str, str]:
    """What happens to a model that runs: state, and step with message."""
    step = "prune"
    start = {"decoder_start_token_id": 1} if "decoder_input_ids" in words else {}
    try:
        model.generate(words["input_ids"], max_new_tokens=3, do_sample=False, **start)
        writes = True
    except Exception:  # without pictures, some do not
        writes = False
    batches = torch.randint(3, 100, (16, 24), generator=torch.Generator().manual_seed(1))
    try:
        pyprune.prune(model, keep=0.5, method="wanda", allocation="global:multiple=1", repair="none", text=batches)
        with torch.no_grad():
            pruned = model(**words).logits
        assert pruned.isfinite().all(), "logits are not finite"
        with tempfile.TemporaryDirectory() as folder:
            step = "save"
            pyprune.save(model, f"{folder}/x")
            step = "reload"
            again = type(model).from_pretrained(f"{folder}/x").eval()
        with torch.no_grad():
            off = float((again(**words).logits - pruned).abs().max())
        assert off == 0, f"reloaded logits differ by {off}"
        step = "accelerate"
        pyprune.accelerate(again)
        with torch.no_grad():
            off = float((again(**words).logits - pruned).abs().max() / pruned.abs().max())
        assert off < 1e-4, f"accelerated logits differ by {off}"
        step = "generate"
        if writes:
            again.generate(words["input_ids"], max_new_tokens=3, do_sample=False, **start)
        return "works", ""
    except pyprune.PypruneError as error:
        return "refused" if step == "prune" else f"refused late ({step})", str(error)
    except TimeoutError:
        raise
    except Exception as error:
        return "CRASH", f"{step}: {type(error).__name__}: {error}"


def reloads(kind: str, class_name: str) -> bool:
    """Whether the dense model loads as it was saved, with nothing of pyprune."""
    model, words, _ = built(kind, class_name)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
        return bool((again(**words).logits == model(**words).logits).all())


def _stop(*_: Any) -> None:
    raise TimeoutError


def judged(kind: str, class_name: str) -> tuple[str, str]:
    """State and message of one type."""
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: others may be at work too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, words, why = built(kind, class_name)
            state, message = ("not built", why) if model is None else tried(model, words)
            if "reloaded logits differ" in message and not reloads(kind, class_name):
                state, message = "not built", "dense, it does not load as it was saved by Transformers itself"
    except TimeoutError:
        state, message = "not built", f"longer than {SECONDS} s"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if state == "refused" and kind in ENCODERS:
        state = "no decoder"
    return state, message[:400]


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Types; none for all.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of what was found.")] = None,
) -> None:
    """Try every type."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {}
    for kind, class_name, table in types():
        if only and kind not in only:
            continue
        state, message = judged(kind, class_name)
        found[kind] = {"state": state, "message": message, "class": class_name, "table": table}
        print(f"{state:12} {kind:28} {message}".replace("\n", " ")[:220], flush=True)
    counts = dict(Counter(f["state"] for f in found.values()))
    print(counts)
    if out is not None:
        result = {"transformers": transformers.__version__, "counts": counts, "types": found}
        with new_file(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
