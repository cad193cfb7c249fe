"""docs/findings.md, from the results of findings.py and generation_aware.py."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.experiments.findings_claims import CLAIMS, FAILS, HOLDS, OPEN, Claim, Row, categorical, majority, number
from bench.tables.generation import strategy
from bench.tables.readme import markdown


def _columns(claim: Claim, rows: Sequence[Row]) -> list[str]:
    if claim.columns:
        return list(claim.columns)
    names = [task["name"] for task in categorical(rows[0])]
    return [f">{name}: {what}" for name in names for what in ("all tokens", "answers", "dense accuracy", "lost")]


def _spread(values: Sequence[tuple[float | None, str]]) -> str:
    """Median over the ways to prune, and from where to where."""
    there = sorted(value for value, _ in values if value is not None)
    if not there:
        return "-"
    middle, low, high = (values[0][1].format(value) for value in (median(there), there[0], there[-1]))
    return f"{middle} ({low} to {high})"


def _counted(verdicts: Sequence[str]) -> str:
    """How many rows said what."""
    counts = {word: verdicts.count(word) for word in (HOLDS, FAILS, OPEN)}
    return ", ".join(f"{word} in {count}" for word, count in counts.items() if count)


def _by_share(claim: Claim, rows: Sequence[Row], verdicts: Sequence[str]) -> list[str]:
    """A line for each share that was removed: what the rows say, and the spread of the numbers over them."""
    lines = []
    for keep in sorted({row["keep"] for row in rows}, reverse=True):
        there = [i for i, row in enumerate(rows) if row["keep"] == keep]
        found = [claim.measures(rows[i]) for i in there]
        spreads = [_spread([measures[name] for measures in found]) for name in found[0]]
        lines.append([f"{1 - keep:.0%}", _counted([verdicts[i] for i in there]), *spreads])
    return markdown([">removed", "claim", *(f">{name}" for name in claim.measures(rows[0]))], lines)


def _section(claim: Claim, rows: Sequence[Row]) -> list[str]:
    judged = [(row, *claim.judge(row)) for row in rows]
    verdicts = [found for _, found, _ in judged]
    cells = [[row["label"], f"{1 - row['kept']:.0%}", *shown, found] for row, found, shown in judged]
    aside = claim.aside(rows)
    return [
        f"### ({claim.letter}) {claim.words}",
        "",
        f"The claim {'is ' * (set(verdicts) == {OPEN})}{_counted(verdicts)} of {len(rows)} rows{aside and '; '}{aside}."
        " Medians over the ways to prune, and from the lowest to the highest:",
        "",
        *_by_share(claim, rows, verdicts),
        "",
        "Every row:",
        "",
        *markdown(["pruned by", ">removed", *_columns(claim, rows), "claim"], cells),
        "",
    ]


def _answer(claim: Claim, blocks: Sequence[tuple[str, list[Row]]]) -> str:
    """One sentence: where a claim holds."""
    found = []
    for title, rows in blocks:
        verdicts = [claim.judge(row)[0] for row in rows]
        aside = claim.aside(rows)
        counted = f"{_counted(verdicts)} of {len(rows)} rows{aside and '; '}{aside}"
        found.append(f"{majority(verdicts)} on {title} ({counted})")
    return f"- **({claim.letter}) {claim.words}:** {'; '.join(found)}."


def _overview(rows: Sequence[Row]) -> list[str]:
    cells = [
        [
            row["label"],
            f"{1 - row['kept']:.1%}",
            f"{row['hierarchy']['perplexity']['pruned']:.2f}",
            number(row["hierarchy"]["probabilities"]["kl"]),
            number(row["hierarchy"]["probabilities"]["top1"], "{:.0%}"),
            str(row["drift"]["greedy"]["median_divergence"] or "never"),
            number(row["drift"]["greedy"]["repetition_difference"], "{:+.1%}"),
        ]
        for row in rows
    ]
    columns = ("perplexity", "KL, nats", "same top token", "half have parted at", "repetition")
    return markdown(["pruned by", ">removed", *(f">{name}" for name in columns)], cells)


def _made(row: Row) -> str:
    """How a checkpoint came to be."""
    read = row["calibration"]
    steps = [f", then taught {r['steps']} steps on {r['tokens']:,} tokens of {r['text']}" for r in row["recovery"]]
    how = f"{row['method']} with {row['compensate']} on {read['tokens']:,} tokens of {read['text']}"
    return f"- {row['label']}, {1 - row['kept']:.0%} removed: {how}{''.join(steps)}."


def _about(facts: dict[str, Any], rows: Sequence[Row], file: str) -> list[str]:
    """What was measured, by which command, where."""
    settings, where = facts["settings"], facts["machine"]
    read, text, budget = settings["calibration"], settings["text"], settings["budget"]
    how = f"calibrated on {read['tokens']:,} tokens of {read['text']}" if read else "checkpoints of earlier runs"
    dense = f"{rows[0]['hierarchy']['perplexity']['dense']:.2f}"
    return [
        f"{settings['model']} in {settings['dtype']}, neurons removed in every FFN; {how}, judged on "
        f"{text['tokens']:,} of {text['text']} (dense perplexity {dense}, windows of {text['window']}), "
        f"{budget['prompts']} prompts, {budget['new_tokens']} new tokens, and the task files that ship. "
        f"{where['cpu']}, torch {where['versions']['torch']}, Transformers {where['versions']['transformers']}, commit "
        f"{(where['commit'] or 'none')[:10]}, {where['date'][:10]}. `bench/results/{file}`:",
        "",
        f"    {facts['command']}",
        "",
        *([*map(_made, rows), ""] if not read else []),
    ]


def document(blocks: Sequence[tuple[str, str, dict[str, Any]]], attempts: dict[str, Any] | None = None) -> str:
    """The whole of docs/findings.md.

    Args:
        blocks: title, file and result of each model or checkpoint.
        attempts: the result of generation_aware.py.
    """
    sorted_rows = [
        sorted(facts["rows"].values(), key=lambda row: (-row["keep"], row["label"])) for _, _, facts in blocks
    ]
    there = [(*block, rows) for block, rows in zip(blocks, sorted_rows, strict=True) if rows]
    answers = [_answer(claim, [(title, rows) for title, _, _, rows in there]) for claim in CLAIMS] if there else []
    attempt, attempted = strategy(attempts) if attempts else ([], [])
    lines = [
        "# What pruning does to a model",
        "",
        "Made by `python -m bench.experiments.findings --show` from `bench/results/findings*.json`; do not edit.",
        "",
        "The claims are those of He et al. 2026 (arXiv 2603.24652) on layers and single weights of larger models. A "
        "claim holds, or fails, on a model where it does in more than half of its rows; else it is open there.",
        "",
        *answers,
        *attempt,
        "",
        "Intervals are 95 %, by bootstrap over windows, prompts or items.",
        "",
        *(f"- Claim ({claim.letter}) {claim.rule}" for claim in CLAIMS),
        "- In the overviews, `half have parted at` is the token at which half of the greedy texts differ from the "
        "dense model's; `repetition` the share of repeated 4-grams, pruned minus dense.",
        "",
    ]
    for title, file, facts, rows in there:
        lines += [f"## {title}", "", *_about(facts, rows, file), *_overview(rows), ""]
        lines += [line for claim in CLAIMS for line in _section(claim, rows)]
    return "\n".join([*lines, *attempted]).rstrip() + "\n"
