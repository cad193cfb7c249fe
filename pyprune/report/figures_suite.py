"""How much worse the pruned model reads six kinds of text, and what it answers and writes."""

from __future__ import annotations

from typing import Any

from .facts import Facts
from .parts import Example, Figure, Section, Table, figure
from .plots import dot, height, legend, mark, rows
from .svg import DENSE, PRUNED, WARM
from .words import clip, estimate, listed, percent, plural, span, times

# Texts shown side by side, evenly through the prompts and not by their looks.
_EXAMPLES = 2


def _figure(ratios: dict[str, Any], mean: dict[str, Any], worst: dict[str, Any]) -> Figure:
    caption = (
        f"Over {plural(len(ratios), 'domain')} perplexity is {estimate(mean, times)} of dense by geometric mean; the "
        f"worst is {clip(worst['domain'], 24)} with {estimate(worst, times)}."
    )

    def paint(axes: Any) -> None:
        for y, found in enumerate(ratios.values()):
            dot(axes, found, y, PRUNED, None if y else "pruned over dense")
        dot(axes, mean, len(ratios), WARM, "geometric mean", marker="D")
        mark(axes, 1.0, "dense", "x", DENSE)
        rows(axes, [*(clip(name, 18) for name in ratios), "all"])
        axes.set_xlabel("perplexity over that of dense")
        legend(axes)

    return figure("suite", "Perplexity by domain", caption, paint, height(len(ratios) + 1))


def _piqa(found: dict[str, Any]) -> str:
    metric = found["accuracy"]
    told = f"PIQA {estimate(metric['pruned'], percent)}, dense {percent(metric['dense']['value'])}"
    kept = metric["retained"]
    return f"{told}; {percent(kept['value'])}{span(kept, percent)} of what was above chance" if kept else told


def _perplexities(domains: dict[str, Any], dense: dict[str, Any], ratios: dict[str, Any]) -> Table:
    lines = [
        (name, estimate(found), estimate(dense[name]), estimate(ratios[name], times), f"{found['tokens']:,}")
        for name, found in domains.items()
    ]
    return Table("Token perplexity", ("domain", ">pruned", ">dense", ">ratio", ">tokens"), lines, folded=True)


def _examples(text: dict[str, Any], other: dict[str, Any]) -> tuple[Example, ...]:
    pairs = list(zip(text["texts"], other["texts"], strict=True))
    chosen = pairs[:: max(1, len(pairs) // _EXAMPLES)][:_EXAMPLES]
    return tuple(Example("One prompt, greedy", a["prompt"], "", b["text"], a["text"]) for a, b in chosen)


def section(facts: Facts) -> Section | None:
    """The suite; None without `suite.json`, or where it has no dense model to compare with."""
    found = facts.get("suite")
    against = found and found["against"]
    if found is None or against is None:
        return None
    told = [f"Both models read the same {plural(len(found['domains']), 'kind')} of text"]
    if against["piqa"] is not None:
        told.append(_piqa(against["piqa"]))
    text, other = found["generation"], against["dense"]["generation"]
    examples: tuple[Example, ...] = ()
    if text is not None and other is not None:
        share = f"{percent(text['repetition']['value'])} of its 4-grams, dense {percent(other['repetition']['value'])}"
        told.append(f"in {plural(text['prompts'], 'text')} of its own the pruned one repeats {share}")
        examples = _examples(text, other)
    lead = f"{'. '.join(part[0].upper() + part[1:] for part in told)}."
    if found["missing"]:
        lead += f" Not measured here: {listed([clip(name, 24) for name in found['missing']])}."
    table = _perplexities(found["domains"], against["dense"]["domains"], against["ratios"])
    figures = (_figure(against["ratios"], against["ratio"], against["worst"]),)
    return Section("suite", "Other kinds of text", lead, figures, (table,), examples)
