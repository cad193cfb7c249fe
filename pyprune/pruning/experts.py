"""The verb `prune_experts`: whole experts of every mixture, and what the router has for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import InputError, UnsupportedModelError, check, check_choice, is_count, is_number
from ..base.memory import PeakMemory, release
from ..base.progress import Progress, quiet
from ..model import families
from ..model.expert_removal import Removal
from ..model.probe import evaluating
from ..model.provenance import read
from ..model.units import Expert, groups
from ..model.widths import set_widths
from .expert_repair import check_repair, mend, of_bank, outputs
from .options import PruneOptions
from .pruner import LEAST_TOKENS, Pruner
from .repair import Repair
from .repair import parse as parse_repair
from .run import Run, Totals
from .text import Text

# What ranks experts; `{source}` where somebody else defined it.
METHODS = {
    "reap": "mean over the tokens routed to it of the router's weight times the L2 norm of its output "
    "(Lasby et al. 2025, arXiv 2510.13999, section 4)",
    "frequency": "how many tokens were routed to it",
    "random": "a number drawn by chance",
}


@dataclass(kw_only=True)
class ExpertReport(Totals):
    """What `prune_experts` did.

    Attributes:
        method, keep, seed: as given.
        repair: its name.
        layers: for every bank of experts its `name`, `scores` and `tokens` of all experts, and those `kept`; after a
            repair also `error_cut`, `error_repaired` and `damping` (see `expert_repair.Mended`).

    The others: see `run.Totals`.
    """

    method: str
    keep: float
    seed: int = 0
    repair: str = "none"
    layers: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "structure": "experts"}


def choose(scores: Tensor, count: int, groups_of: int = 1) -> list[int]:
    """Numbers of the `count` experts of highest score, as many of each of `groups_of` runs of experts.

    Ties keep the lower number.
    """
    rows = scores.double().view(groups_of, -1)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, : count // groups_of]
    offsets = torch.arange(groups_of)[:, None] * rows.shape[1]
    return sorted((best + offsets).flatten().tolist())


def _measured(
    pruner: Pruner, banks: Sequence[list[Expert]], method: str, seed: int, progress: Progress
) -> list[tuple[Tensor, list[int] | None]]:
    """Scores `[E]` of each bank, and tokens of each expert where they were counted."""
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return [(torch.rand(len(bank), generator=generator, dtype=torch.float64), None) for bank in banks]
    stream = pruner.stream()
    found: list[tuple[Tensor, list[int] | None]] = []
    for i, bank in enumerate(banks):
        progress("measuring experts", i, len(banks))
        stream.reach(bank[0])
        sums, tokens = torch.zeros(len(bank), dtype=torch.float64), [0] * len(bank)

        def see(ffn: Any, a: Tensor, weights: Tensor | None, _: Tensor | None) -> None:
            norms = ffn.of_bank.outputs(ffn.number, a).double().norm(dim=1)
            tokens[ffn.number] += len(a)  # noqa: B023
            sums[ffn.number] += float((norms * weights).sum())  # noqa: B023

        stream.see_all(list(bank), see)
        finite = bool(sums.isfinite().all())
        check(finite, f"outputs of {bank[0].group}", "be finite", "NaN or infinity")
        counts = torch.tensor(tokens, dtype=torch.float64)
        found.append((counts if method == "frequency" else sums / counts.clamp_min(1), tokens))
    progress("measuring experts", len(banks), len(banks))
    return found


def _remove(
    pruner: Pruner, removal: Removal, banks: Sequence[list[Expert]], kept: Sequence[list[int]], progress: Progress
) -> list[dict[str, Any]]:
    """Cut every bank and repair what is left of it, behind the banks before as they are then; facts for the report."""
    repair = pruner.options.repair
    if not repair.needs:
        for i, own in enumerate(kept):
            removal.cut(i, own)
        removal.finish()
        return [{} for _ in banks]
    stream, few = pruner.stream(), dict[str, int]()
    facts: list[dict[str, Any]] = []
    count = len(pruner.batches or pruner.ids)  # type: ignore[arg-type]
    sources = [0] * count if pruner.sources is None else pruner.sources.tolist()
    with removal.partly():
        for i, (bank, own) in enumerate(zip(banks, kept, strict=True)):
            progress("repairing experts", i, len(banks))
            try:
                stream.reach(bank[0])
                removal.say(removal.experts)
                dense = outputs(stream, bank)
                removal.cut(i, own)
                removal.say(removal.count)
                found = mend(stream, of_bank(bank[0].of_bank, bank[0]), dense, repair, sources, LEAST_TOKENS)
            except InputError as error:
                raise InputError(f"{error}; experts are removed already, so load the model again") from error
            few |= found.few
            facts.append(
                {"error_cut": found.error_cut, "error_repaired": found.error_repaired, "damping": found.damping}
            )
    removal.finish()
    progress("repairing experts", len(banks), len(banks))
    if few:
        shown = ", ".join(f"{name} ({tokens})" for name, tokens in list(few.items())[:5])
        warnings.warn(
            f"{len(few)} of the experts that are left saw too few calibration tokens for a repair and keep their rows: "
            f"{shown}{', ...' if len(few) > 5 else ''}",
            stacklevel=6,
        )
    return facts


@torch.inference_mode(False)
@torch.no_grad()
def prune_experts(
    model: nn.Module,
    keep: float = 0.75,
    method: str = "reap",
    *,
    repair: Repair | str | None = None,
    text: Text = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress = quiet,
    provenance: dict[str, Any] | None = None,
) -> ExpertReport:
    """Remove whole experts of every mixture, in place: as many of each layer, those of the lowest scores.

    Rows of the router go with them, and what it does with the rest stays: with fewer to choose from, its weights are
    those of the best that are left. All layers keep as many, so the config's own key says how many, and what loads
    the family loads the result.

        >>> from transformers import AutoModelForCausalLM, Qwen3MoeConfig
        >>> small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        >>> config = Qwen3MoeConfig(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **small)
        >>> report = prune_experts(AutoModelForCausalLM.from_config(config), keep=0.5, method="random")
        >>> [len(layer["kept"]) for layer in report.layers]
        [2, 2]

    Args:
        model: a mixture of Transformers whose experts lie in tensors (`model.experts.Bank`).
        keep: share of the experts of every layer that stays, in (0, 1]: the nearest number.
        method: one of `METHODS`; all measure the dense model.
        repair: `least-squares` fits the down rows of the experts that are left to what the dense experts of the layer
            gave together, `bias` their down biases; layer by layer, on what the layers before give then. `damping`
            as for `prune.prune`, `target` 0.
        text, tokenizer, progress, provenance: as for `prune.prune`; text must be given but for `random` with no repair.
        seed: of what is random.

    Raises:
        InputError: a value breaks its rule, text is missing, fewer experts would be left than the router chooses for a
            token, outputs are not finite, or a repair is none for whole experts; the model is unchanged then.
        UnsupportedModelError: no experts in tensors, a family whose config cannot say how many there are, or experts
            that the repair cannot be written into; the model is unchanged then.
    """
    check(is_number(keep) and 0 < keep <= 1, "keep", "lie in (0, 1]", keep)
    check_choice(method, "method", METHODS)
    check(is_count(seed), "seed", "be a non-negative integer", seed)
    chosen_repair = parse_repair(repair).suited(model, False)
    needed = method != "random" or bool(chosen_repair.needs)
    purpose = f"method {method!r} and repair {chosen_repair.NAME!r}"
    run = Run(model, text, tokenizer, needed, purpose, provenance, seed, progress)
    described = run.described
    banks = [[f for f in group if isinstance(f, Expert)] for group in groups(described.ffns)]
    banks = [bank for bank in banks if bank]
    if not banks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts whose weights lie in tensors: structure 'experts' has nothing to "
            "remove (lists of expert modules are pruned by neurons)"
        )
    check_repair(chosen_repair, described, banks)
    removal = Removal(model, banks, keep)
    described.fingerprint  # noqa: B018 - of the dense model
    with evaluating(model), PeakMemory(device=next(model.parameters()).device) as memory:
        pruner = Pruner(described, PruneOptions.of(repair=chosen_repair), run.windows, progress, run.batches)
        measured = _measured(pruner, banks, method, seed, progress)
        kept = [choose(scores, removal.count, removal.groups) for scores, _ in measured]
        repaired = _remove(pruner, removal, banks, kept, progress)
        if any("modules" in (read(config).get("ffn") or {}) for config in removal.configs):
            ffns = families.find_ffns(model)
            set_widths(model, families.ffn_block(model, ffns), [f.intermediate_size for f in ffns])
        release()
        layers = [
            {"name": bank[0].group, "scores": scores.tolist(), "tokens": tokens, "kept": own, **facts}
            for bank, (scores, tokens), own, facts in zip(banks, measured, kept, repaired, strict=True)
        ]
        chosen = {"keep": keep, "structure": "experts", "method": method, "seed": seed}
        if chosen_repair.needs:
            chosen |= {"compensate": chosen_repair.NAME, **chosen_repair.values()}
        facts = run.facts(chosen, experts=[{"name": one["name"], "kept": one["kept"]} for one in layers])
        totals = run.finish(facts, memory)
    return ExpertReport(method=method, keep=keep, seed=seed, repair=chosen_repair.NAME, layers=layers, **totals)
