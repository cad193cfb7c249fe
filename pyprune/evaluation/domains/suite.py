"""The suite: one model on six kinds of text, on PIQA and on prompts, alone or beside the dense model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base.errors import check
from ...base.progress import Progress, quiet
from ...base.windows import token_windows
from ..perplexity import window_losses
from ..tasks.choice import choice_correct
from ..tasks.records import ChoiceRecord
from .result import METRICS, Losses, Suite, generation_facts, piqa_facts
from .texts import Domain, Material, read_material
from .writing import has_chat, write

TOKENS, WINDOW, NEW_TOKENS = 8192, 512, 128


def domain_windows(
    tokenizer: Any, domains: Sequence[Domain], tokens: int = TOKENS, window: int = WINDOW, start: str = "auto"
) -> dict[str, Tensor]:
    """`[N, window]` token ids by domain, of at most `tokens` tokens each; 0 for all.

    Raises:
        InputError: a text shorter than a window, or as `token_windows`.
    """
    return {d.name: token_windows(tokenizer, d.documents, tokens, window, d.name, start) for d in domains}


def piqa(
    model: Any, tokenizer: Any, questions: Sequence[ChoiceRecord], progress: Progress = quiet
) -> dict[str, tuple[int, ...]]:
    """For each of `METRICS`, 1 for each question that is answered right, else 0; empty without questions."""
    if not questions:
        return {}
    found = choice_correct(model, tokenizer, questions, progress)
    return {name: tuple(map(int, found[name].tolist())) for name in METRICS}


def suite(
    model: Any,
    tokenizer: Any,
    data: str | Path | Material | None = None,
    *,
    dense: Any | None = None,
    reference: Suite | Mapping[str, Any] | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    start: str = "auto",
    items: int = 0,
    new_tokens: int = NEW_TOKENS,
    progress: Progress = quiet,
) -> Suite:
    """Judge a model on six domains, PIQA and its own writing.

    Args:
        model: a causal LM of Transformers, in eval mode.
        tokenizer: its tokenizer.
        data: a folder as for `read_material`, or what that gave; None for the two domains that CPython carries.
        dense: the model that it was made from, measured too unless `reference` is given; it judges what is written.
        reference: an earlier result for the dense model, or its JSON values, of the same texts.
        tokens: of each domain at most; 0 for all.
        window: tokens in a window.
        start: see `windows.start_ids`.
        items: questions of PIQA at most; 0 for all. Of a `data` that was read before, it is not asked.
        new_tokens: of what is written to a prompt at most; 0 writes nothing.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: what `read_material`, `domain_windows` or `Suite.of` refuse, a model whose context is too short, or
            a reference that was measured on something else.
    """
    material = data if isinstance(data, Material) else read_material(data, items)
    earlier = Suite.of(reference, "reference") if isinstance(reference, Mapping) else reference
    check(new_tokens >= 0, "new_tokens", "be 0 (for no writing) or more", new_tokens)
    windows = domain_windows(tokenizer, material.domains, tokens, window, start)
    if earlier is not None:  # complains before anything is measured
        hashes = {name: (_sha256(ids), *ids.shape) for name, ids in windows.items()}
        way = (new_tokens, bool(new_tokens) and has_chat(tokenizer))
        earlier.check_measured("reference", hashes, len(material.questions), way)
    judge = dense if dense is not None or earlier is not None else model
    if earlier is None and dense is not None:
        earlier = _measure(dense, tokenizer, material, windows, new_tokens, dense, progress)
    return _measure(model, tokenizer, material, windows, new_tokens, judge, progress, earlier)


@dataclass(frozen=True)
class Tasks:
    """PIQA and writing, as `compare` asks them of every model.

    Attributes:
        tokenizer: of all the models.
        questions: of PIQA; may be none.
        new_tokens: of what is written to a prompt at most; 0 writes nothing.
    """

    tokenizer: Any
    questions: Sequence[ChoiceRecord] = ()
    new_tokens: int = NEW_TOKENS

    def facts(self) -> dict[str, Any]:
        """All that the numbers depend on besides the model, as JSON values."""
        asked = json.dumps([[q.prompt, q.choices, q.answer] for q in self.questions])
        sha256 = hashlib.sha256(asked.encode()).hexdigest()
        return {"items": len(self.questions), "sha256": sha256, "new_tokens": self.new_tokens}

    def measure(
        self, model: Any, dense: Any, found: Mapping[str, Any] | None = None, progress: Progress = quiet
    ) -> dict[str, Any]:
        """Ask one model.

        Args:
            model: a causal LM of Transformers, in eval mode.
            dense: judges how likely its texts are.
            found: what this gave for the dense model, for a pruned one.
            progress: called as `(stage, done, total)`.

        Returns:
            `piqa` and `generation` as in `Suite.to_json`, without the texts; each only if it is asked for. With `found`
            the accuracies of PIQA have `retained`, the share of what dense has above chance, in place of `correct`.
        """
        facts: dict[str, Any] = {}
        if self.questions:
            correct = piqa(model, self.tokenizer, self.questions, progress)
            facts["piqa"] = piqa_facts(correct, found["piqa"] if found else None)
        if self.new_tokens:
            facts["generation"] = generation_facts(
                write(model, self.tokenizer, self.new_tokens, dense, progress), False
            )
        return facts


def _sha256(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _measure(
    model: Any,
    tokenizer: Any,
    material: Material,
    windows: Mapping[str, Tensor],
    new_tokens: int,
    judge: Any | None,
    progress: Progress,
    dense: Suite | None = None,
) -> Suite:
    domains = {}
    for domain in material.domains:
        ids = windows[domain.name]
        losses = window_losses(model, ids, progress) / (ids.shape[1] - 1)
        domains[domain.name] = Losses(domain.source, tuple(losses.tolist()), ids.shape[1], _sha256(ids))
    correct = piqa(model, tokenizer, material.questions, progress)
    writing = write(model, tokenizer, new_tokens, judge, progress) if new_tokens else None
    return Suite(domains, material.missing, correct, writing, dense)
