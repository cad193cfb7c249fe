"""What a suite found of one model, and of that model beside the dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...base.errors import InputError, check
from ..analysis.summarise import interval, number
from ..intervals import bootstrap_mean_of_means
from ..perplexity import exponential
from ..tasks.estimates import estimate, metric
from .writing import Writing, prompts

FORMAT = 1
# Of PIQA: by the sum of an option's log-likelihoods, and by that over its bytes. Guessing is right in half the cases.
METRICS = ("accuracy", "accuracy_byte")
_CHANCE = 0.5


def _estimate(mean: float, found: Sequence[float] | None) -> dict[str, Any]:
    """exp of a mean in nats and of its interval, as JSON values."""
    ends = None if found is None else [number(exponential(end)) for end in found]
    return {"value": number(exponential(mean)), "interval": ends}


def _pooled(groups: Sequence[Tensor]) -> dict[str, Any]:
    """exp of the mean over groups of their means: the geometric mean of what exp makes of each."""
    mean = math.fsum(float(values.mean()) for values in groups) / len(groups)
    known = all(len(values) > 1 and bool(values.isfinite().all()) for values in groups)
    return _estimate(mean, bootstrap_mean_of_means(groups) if known else None)


@dataclass(frozen=True)
class Losses:
    """One domain, read.

    Attributes:
        source: the text.
        losses: of each window, the mean negative log-likelihood of its predicted tokens, in nats.
        window: tokens in a window.
        sha256: of the windows' token ids: what may be compared.
    """

    source: str
    losses: tuple[float, ...]
    window: int
    sha256: str

    @property
    def measured(self) -> tuple[str, int, int]:
        """What it was measured on: the hash of the token ids, how many windows, and tokens in each."""
        return self.sha256, len(self.losses), self.window

    @cached_property
    def values(self) -> Tensor:
        """`[N]` float64."""
        return torch.tensor(self.losses, dtype=torch.float64)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `value` is the perplexity."""
        size = {"tokens": len(self.losses) * self.window, "window": self.window, "sha256": self.sha256}
        found = _estimate(float(self.values.mean()), interval(self.values))
        return {**found, "source": self.source, **size, "losses": [number(loss) for loss in self.losses]}


@dataclass(frozen=True)
class Suite:
    """What a suite found of one model.

    Attributes:
        domains: by name.
        missing: domains that were not measured, for want of a data folder.
        correct: of PIQA, for each of `METRICS`, 1 or 0 for each question; empty without PIQA.
        writing: what the model wrote; None where it was not asked to.
        dense: the dense model's, of the same texts, questions and prompts.
    """

    domains: Mapping[str, Losses]
    missing: tuple[str, ...] = ()
    correct: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    writing: Writing | None = None
    dense: Suite | None = None

    def __post_init__(self) -> None:
        if self.dense is not None:
            hashes = {name: found.measured for name, found in self.domains.items()}
            self.dense.check_measured("dense", hashes, len(self.correct.get("accuracy", ())), _way(self.writing))

    def check_measured(
        self, argument: str, hashes: Mapping[str, tuple[str, int, int]], questions: int, way: tuple[int, bool]
    ) -> None:
        """Raise `InputError` unless this is of these windows (`Losses.measured`), questions and way to write."""
        for name, measured in hashes.items():
            found = self.domains.get(name)
            same = found is not None and found.measured == measured
            check(same, argument, f"be measured on the same windows of {name}", "others" if found else "none")
        mine = len(self.correct.get("accuracy", ()))
        check(mine == questions, argument, f"have answered the same {questions} questions of PIQA", mine)
        rule = "have written as many tokens (new_tokens, and whether by a chat template) as"
        check(_way(self.writing) == way, argument, f"{rule} {way}", _way(self.writing))

    @property
    def ratios(self) -> dict[str, Tensor]:
        """By domain, `[N]`: of each window, its mean loss less that of the dense model; empty without one."""
        if self.dense is None:
            return {}
        return {name: mine.values - self.dense.domains[name].values for name, mine in self.domains.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values.

        `domains` by name (`value`: perplexity, `interval`: 95 %, by bootstrap over windows, `losses` of the windows),
        `perplexity` (the geometric mean over domains), `missing`, `piqa`, `generation`, and with a dense model
        `against`: `ratios` of perplexity by domain with paired intervals, `ratio` (their geometric mean), `worst` (the
        domain with the largest), `piqa` (as the metrics of `pyprune diagnose`), and `dense`, all of the above of it.
        """
        return {
            "format": FORMAT,
            "domains": {name: found.to_json() for name, found in self.domains.items()},
            "missing": list(self.missing),
            "perplexity": _pooled([found.values for found in self.domains.values()]),
            "piqa": piqa_facts(self.correct),
            "generation": None if self.writing is None else generation_facts(self.writing),
            "against": self._against(),
        }

    def _against(self) -> dict[str, Any] | None:
        if self.dense is None:
            return None
        ratios = {n: _estimate(float(of.mean()), interval(of)) for n, of in self.ratios.items()}
        worst = max(self.ratios, key=lambda name: float(self.ratios[name].mean()))
        pairs = {name: (torch.tensor(self.dense.correct[name]), torch.tensor(c)) for name, c in self.correct.items()}
        return {
            "ratios": ratios,
            "ratio": _pooled(list(self.ratios.values())),
            "worst": {"domain": worst, **ratios[worst]},
            "piqa": {name: metric(*pair, _CHANCE).to_json() for name, pair in pairs.items()} or None,
            "dense": self.dense.to_json(),
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any], argument: str = "dense") -> Suite:
        """From `to_json`; what it says of yet another model is left out.

        Raises:
            InputError: other facts than `to_json` gives.
        """
        try:
            known = facts["format"] == FORMAT
            domains = {n: _losses(d) for n, d in facts["domains"].items()}
            piqa, text = facts["piqa"], facts["generation"]
            correct = {n: tuple(map(int, piqa[n]["correct"])) for n in METRICS} if piqa else {}
            found = cls(domains, tuple(facts["missing"]), correct, _writing(text) if text else None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{argument} must be a result of the suite; {type(error).__name__}: {error}") from error
        check(known and bool(domains), argument, f"be a result of the suite in format {FORMAT}", facts["format"])
        return found


def _way(writing: Writing | None) -> tuple[int, bool]:
    """New tokens and whether through a chat template; no tokens where nothing was written."""
    return (0, False) if writing is None else (writing.new_tokens, writing.chat)


def _losses(facts: Mapping[str, Any]) -> Losses:
    losses = tuple(math.inf if loss is None else float(loss) for loss in facts["losses"])
    return Losses(str(facts["source"]), losses, int(facts["window"]), str(facts["sha256"]))


def _writing(facts: Mapping[str, Any]) -> Writing:
    texts = facts["texts"]
    return Writing(
        int(facts["new_tokens"]),
        bool(facts["chat"]),
        tuple(str(entry["text"]) for entry in texts),
        tuple(float(entry["repetition"]) for entry in texts),
        float(facts["distinct2"]),
        None if facts["perplexity"] is None else float(facts["perplexity"]),
    )


def piqa_facts(correct: Mapping[str, tuple[int, ...]], dense: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Accuracies with intervals, and which questions were answered right (`1`, else `0`), as one text.

    With what this says of the dense model, the share that is retained of what that has above chance instead.
    """
    if not correct:
        return None
    facts: dict[str, Any] = {"items": len(correct["accuracy"]), "chance": _CHANCE}
    for name in METRICS:
        mine, answers = torch.tensor(correct[name]), "".join(map(str, correct[name]))
        more: dict[str, Any] = {"correct": answers}
        if dense is not None:
            theirs = torch.tensor([int(answer) for answer in dense[name]["correct"]])
            more = {"retained": metric(theirs, mine, _CHANCE).to_json()["retained"]}
        facts[name] = {**estimate(mine).to_json(), **more}
    return facts


def generation_facts(writing: Writing, keep: bool = True) -> dict[str, Any]:
    """Repetition with its interval over prompts, distinct-2, perplexity, and with `keep` the texts themselves."""
    values = torch.tensor(writing.repetition, dtype=torch.float64)
    facts = {
        "prompts": len(writing.texts),
        "new_tokens": writing.new_tokens,
        "chat": writing.chat,
        "repetition": {"value": float(values.mean()), "interval": interval(values)},
        "distinct2": writing.distinct2,
        "perplexity": None if writing.perplexity is None else number(writing.perplexity),
    }
    if not keep:
        return facts
    entries = zip(prompts(), writing.texts, writing.repetition, strict=True)
    texts = [{"kind": p.kind, "prompt": p.text, "text": text, "repetition": share} for p, text, share in entries]
    return {**facts, "texts": texts}
