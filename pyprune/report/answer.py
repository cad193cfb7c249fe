"""The first screen: one sentence and a few big numbers, from whatever was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..evaluation.summary import comparison_lines, judged_texts, perplexity_on
from ..speed.summary import Speed
from .facts import Facts
from .figures_compare import best, recovered
from .figures_latency import narrowest, own
from .figures_speed import called, candidates
from .figures_tasks import KINDS, retained
from .figures_widths import layer_widths
from .parts import Tile
from .words import clip, estimate, listed, megabytes, model_name, percent, plural, short, signed, span, times

# Below so many tiles, those of further files are shown too.
_ENOUGH = 4
_MOST = 6


@dataclass(frozen=True)
class Answer:
    """What a reader sees first.

    Attributes:
        title: the model.
        sentence: what was lost and won.
        tiles: big numbers.
    """

    title: str
    sentence: str
    tiles: tuple[Tile, ...]


def _fastest(facts: Facts, what: str) -> tuple[str, Speed, list[tuple[str, Speed]]] | None:
    """Of the first kind of measurement that begins with `what`: the fastest model, its speed, and those of all."""
    bench = facts.bench
    found = candidates(bench) if bench is not None else {}
    first = {name: next((s for s in measured if s.what.startswith(what)), None) for name, measured in found.items()}
    known = [(name, speed) for name, speed in first.items() if speed is not None]
    if not known:
        return None
    name, speed = max(known, key=lambda entry: entry[1].ratio)
    return name, speed, known


def _perplexities(facts: Facts) -> tuple[float, float, str] | None:
    """Dense, pruned, and on what."""
    results = facts.get("results")
    if results is not None:
        return results["dense"]["perplexity"], results["pruned"]["perplexity"], results["evaluation"]["text"]
    both = facts.part("diagnose", "hierarchy", "perplexity")
    if both is None or both["dense"] is None or both["pruned"] is None:
        return None
    return both["dense"], both["pruned"], facts.part("diagnose", "text")


def _removed(facts: Facts) -> str | None:
    """What was taken out, with its share."""
    keep = facts.part("results", "keep")
    if keep is None and facts.bench is not None:
        keeps = {entry.get("keep") for name, entry in facts.bench["models"].items() if name != "dense"}
        keep = keeps.pop() if len(keeps) == 1 else None
    if keep is not None:
        return f"{percent(1 - keep)} of FFN neurons removed"
    widths = layer_widths(facts)
    before = [b for _, b, _ in widths if b is not None]
    if before:
        return f"{percent(1 - sum(after for _, _, after in widths) / sum(before))} of FFN neurons removed"
    sizes = facts.part("diagnose", "parameters")
    return f"{percent(1 - sizes['pruned'] / sizes['dense'])} of the parameters removed" if sizes else None


def _kept(facts: Facts) -> str | None:
    shares = retained(facts)
    if not shares:
        return None
    (first, share), *others = shares.items()
    told = [f"{KINDS[first]} keeps {percent(share)} of what was above chance"]
    return listed([*told, *(f"{KINDS[kind]} {percent(value)}" for kind, value in others)])


def _clauses(facts: Facts) -> Iterator[str]:
    speed = _fastest(facts, "decode")
    if speed is not None:
        name, found, _ = speed
        how = "" if called(name) == "as saved" else f" ({called(name)})"
        yield f"{times(found.ratio)} as fast when decoding{how}, where fewer neurons alone allow {times(found.ceiling)}"
    results = facts.get("results")
    if results is not None:
        change = results["pruned"]["file_bytes"] / results["dense"]["file_bytes"] - 1
        yield f"{percent(abs(change))} {'smaller' if change <= 0 else 'larger'} file"
    both = _perplexities(facts)
    if both is not None:
        yield f"perplexity {short(both[0])} → {short(both[1])} on {clip(both[2], 60)}"
    kept = _kept(facts)
    if kept is not None:
        yield kept
    greedy = facts.part("diagnose", "drift", "greedy")
    if greedy is not None:
        half = greedy["median_divergence"]
        yield (
            f"half of its greedy texts have parted from dense's by token {half}"
            if half
            else f"most of its greedy texts are dense's own through {greedy['new_tokens']} tokens"
        )


def _others(facts: Facts) -> Iterator[str]:
    """Of files that stand for themselves; each a sentence."""
    found = facts.part("redundancy", "redundancy")
    if found is not None:
        whole = found["all"]
        yield (
            f"{percent(whole['uniqueness'])} of {whole['neurons']:,} FFN neurons are unique at a cosine of "
            f"{found['threshold']:g}, and the tenth that matters most holds "
            f"{percent(whole['sensitivity']['top_tenth'])} of the sensitivity"
        )
    against = facts.part("suite", "against")
    if against is not None:
        worst = against["worst"]
        yield (
            f"over {plural(len(against['ratios']), 'kind')} of text perplexity is {estimate(against['ratio'], times)} "
            f"of dense, at worst {estimate(worst, times)} ({clip(worst['domain'], 24)})"
        )
    compare = facts.get("compare")
    if compare is not None:
        text = judged_texts(compare)[0]
        top = best(comparison_lines(compare, text))
        if top is not None:
            removed, line, perplexity = top
            dense = perplexity_on(compare["dense"], text)
            yield (
                f"of {plural(len({row['label'] for row in compare['rows']}), 'way')} to prune, {clip(line.label, 40)} "
                f"loses least at {percent(removed)} removed: perplexity {short(dense)} → "
                f"{short(perplexity)} on {clip(text, 60)}"
            )
    nested = facts.get("nested")
    if nested is not None:
        row = narrowest(nested)
        yield (
            f"one checkpoint runs at every width down to {percent(row['share'])} of the neurons, there "
            f"{times(nested['dense']['decode_ms']['p50'] / row['decode_ms']['p50'])} as fast when decoding, at "
            f"perplexity {short(own(row))} (dense {short(nested['dense']['perplexity'])})"
        )
    latency = facts.get("latency-aware")
    if latency is not None:
        row = latency["rows"][-1]
        yield (
            f"asked for {times(row['target'])}, measured {times(row['measured'])}, for perplexity "
            f"{short(latency['dense_perplexity'])} → {short(row['perplexity'])}"
        )
    for text, (before, after, dense) in list(recovered(facts).items())[:1]:
        numbers = f"from {short(before)} to {short(after)}"
        yield f"recovery took perplexity {numbers} on {clip(text, 60)} (dense {short(dense)})"
    widths = facts.part("pyprune", "widths")
    if widths is not None:
        low, high = min(widths), max(widths)
        spread = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        yield f"a checkpoint of {plural(len(widths), 'FFN')} with {spread} neurons each"


def _sentence(facts: Facts) -> str:
    clauses = list(_clauses(facts))
    if not clauses:
        told = "; ".join(list(_others(facts))[:2]) or "what these files hold says nothing in one sentence"
    else:
        removed = _removed(facts)
        told = (f"{removed}: " if removed else "") + "; ".join(clauses)
    return told[0].upper() + told[1:] + "."


def _main_tiles(facts: Facts) -> Iterator[Tile]:
    both = _perplexities(facts)
    if both is not None:
        dense, pruned, text = both
        beside = [f"dense {short(dense)}, {signed(pruned / dense - 1)}", clip(text, 44)]
        loss = facts.part("diagnose", "hierarchy", "perplexity", "loss")
        if loss is not None and facts.get("results") is None:
            beside.append(f"loss {estimate(loss)} nats a token higher")
        yield Tile("Token perplexity", short(pruned), tuple(beside))
    for what, label in (("decode", "Decoding"), ("prefill", "Reading a prompt")):
        found = _fastest(facts, what)
        if found is not None:
            name, speed, every = found
            base = next(s.text for s in _dense_speeds(facts) if s.what == speed.what)
            lines = [f"dense {base}, now {speed.text}", f"ceiling by fewer neurons alone {times(speed.ceiling)}"]
            lines += [f"{called(other)} {times(s.ratio)}" for other, s in every if other != name]
            yield Tile(f"{label}, {speed.what.partition(', ')[2]}, {called(name)}", times(speed.ratio), tuple(lines))
    results = facts.get("results")
    if results is not None:
        a, b = results["dense"], results["pruned"]
        lines = [f"dense {megabytes(a['file_bytes'])}, {signed(b['file_bytes'] / a['file_bytes'] - 1)}"]
        if "peak_bytes" in a and "peak_bytes" in b:
            lines.append(f"peak memory {megabytes(b['peak_bytes'])}, dense {megabytes(a['peak_bytes'])}")
        yield Tile("File", megabytes(b["file_bytes"]), tuple(lines))
    shares = retained(facts)
    if shares:
        worst = min(shares, key=lambda kind: shares[kind])
        others = [f"{KINDS[kind]} {percent(value)}" for kind, value in shares.items() if kind != worst]
        lines = ["of what dense scores above chance", *others]
        yield Tile(f"Kept in {KINDS[worst]}", percent(shares[worst]), tuple(lines))
    greedy = facts.part("diagnose", "drift", "greedy")
    if greedy is not None:
        half, last = greedy["median_divergence"], greedy["survival"][-1]
        still = f"{percent(last['mean'])} still as dense writes after {last['step']}{span(last, percent)}"
        label = "Half of greedy texts have parted by"
        yield Tile(label, f"token {half}" if half else "never", (f"{greedy['prompts']} prompts", still))


def _dense_speeds(facts: Facts) -> list[Speed]:
    from ..speed.summary import speeds

    return list(speeds(facts.bench, "dense")) if facts.bench is not None else []


def _other_tiles(facts: Facts) -> Iterator[Tile]:
    found = facts.part("redundancy", "redundancy")
    if found is not None:
        whole = found["all"]
        lines = (f"at a cosine of {found['threshold']:g}", f"{whole['clusters']['neurons']:,} in clusters")
        yield Tile("Unique neurons", percent(whole["uniqueness"]), lines)
        held = (f"of all sensitivity, over {whole['neurons']:,} neurons", "10% if all mattered alike")
        yield Tile("Held by the top tenth", percent(whole["sensitivity"]["top_tenth"]), held)
    against = facts.part("suite", "against")
    if against is not None:
        ratio, over = against["ratio"]["value"], f"of dense, over {plural(len(against['ratios']), 'kind')} of text"
        yield Tile("Perplexity, geometric mean", estimate({"value": ratio}, times), (over,))
    compare: dict[str, Any] | None = facts.get("compare")
    if compare is not None:
        for text in judged_texts(compare)[:2]:
            top = best(comparison_lines(compare, text))
            if top is not None:
                removed, line, perplexity = top
                beside = (f"dense {short(perplexity_on(compare['dense'], text))}", clip(line.label, 30), clip(text, 44))
                yield Tile(f"Perplexity, {percent(removed)} removed", short(perplexity), beside)
    nested = facts.get("nested")
    if nested is not None:
        row, dense = narrowest(nested), nested["dense"]
        slower = f"dense {short(dense['decode_ms']['p50'])} ms a token, now {short(row['decode_ms']['p50'])}"
        ratio = times(dense["decode_ms"]["p50"] / row["decode_ms"]["p50"])
        yield Tile(f"Decoding at {percent(row['share'])} width", ratio, (slower,))
        yield Tile("Perplexity there", short(own(row)), (f"dense {short(dense['perplexity'])}",))
    latency = facts.get("latency-aware")
    if latency is not None:
        row = latency["rows"][-1]
        lines = (f"promised {times(row['promised'])}", f"{percent(row['keep'])} of the neurons")
        yield Tile(f"Asked for {times(row['target'])}", times(row["measured"]), lines)
        yield Tile("Perplexity for it", short(row["perplexity"]), (f"dense {short(latency['dense_perplexity'])}",))
    for text, (before, after, base) in list(recovered(facts).items())[:2]:
        yield Tile(
            "Perplexity, recovered", short(after), (f"pruned {short(before)}, dense {short(base)}", clip(text, 44))
        )
    manifest = facts.get("pyprune")
    if manifest is not None:
        widths = [width for width in manifest["widths"] if width is not None]
        size = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors"))
        if widths:
            yield Tile("FFN neurons", f"{sum(widths):,}", (f"in {plural(len(widths), 'FFN')}",))
        yield Tile("Weights", megabytes(size), (clip(manifest["model_type"], 30),))


def _title(facts: Facts) -> str:
    for name in ("results", "diagnose", "suite", "compare", "nested", "latency-aware", "redundancy", "recover"):
        found = facts.get(name) or {}
        model = found.get("model") or found.get("dense")
        if isinstance(model, str):
            return clip(model_name(model), 60)
    return "A pruned model"


def answer(facts: Facts) -> Answer:
    """The first screen of a report."""
    tiles = list(_main_tiles(facts))
    if len(tiles) < _ENOUGH:
        tiles += list(_other_tiles(facts))[: _ENOUGH - len(tiles)]
    return Answer(_title(facts), _sentence(facts), tuple(tiles[:_MOST]))
