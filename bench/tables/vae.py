"""The tables of examples/README.md on ema_pruned_vae.py, from the JSON that it writes."""

from __future__ import annotations

from typing import Any

from bench.tables.readme import markdown, provenance

_MOMENTS = ("after pruning", "recovered")


def _bounds(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _stage(stage: dict[str, Any]) -> list[str]:
    """ELBO with its parts, and what of it is lost to the dense model that trained as long."""
    parts = [f"{stage[name]['value']:.2f}" for name in ("elbo", "reconstruction", "kl")]
    return [*parts, _bounds(stage["lost"]) if "lost" in stage else ""]


def _more(found: dict[str, Any]) -> list[str]:
    """One comparison of the EMA."""
    better = "better" if found["low"] > 0 else "worse" if found["high"] < 0 else "no difference shown"
    value = f"{found['value']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"
    return [found["score"], found["against"], found["when"], value, better]


def _speed(speed: dict[str, Any]) -> list[str]:
    dense, compact = speed["neurons"]
    lines = [
        [name, str(batch), f"{1e3 * entry['seconds']:.2f}", f"{entry['ratio']:.2f}x", f"{entry['ffn_ratio']:.2f}x"]
        for batch, of in speed["batches"].items()
        for name, entry in of["encoders"].items()
    ]
    ceilings = ", ".join(f"{of['ceiling']:.2f}x at {batch}" for batch, of in speed["batches"].items())
    return [
        f"The encoder, {dense:,} and {compact:,} FFN neurons; ceiling of the whole encoder by Amdahl's law: {ceilings} "
        f"strings; of the FFNs alone {speed['ffn_ceiling']:.1f}x.",
        "",
        *markdown(["encoder", ">strings", ">ms", ">over dense", ">FFNs alone"], lines),
    ]


def vae_table(result: dict[str, Any]) -> list[str]:
    """ELBO, reconstruction and KL before, after pruning and after recovery; the EMA against the rest; speed."""
    plan, held_out = result["plan"], result["held_out"]
    lines = [["dense", "before", *_stage(result["before"])]]
    for moment in _MOMENTS:
        lines.append(["dense, as long", moment, *_stage(result["dense"][moment])])
        lines += [[name, moment, *_stage(row[moment])] for name, row in result["rows"].items()]
    steps = f"{plan['steps']}, {plan['prune_steps']} and {plan['recover_steps']} steps"
    return [
        f"{plan['keep']:.0%} of the encoder's neurons kept; dense training, pruning and recovery of {steps}; "
        f"{result['text']}, {held_out['strings']} held-out strings of {held_out['length']} bytes, nats a string, "
        f"{plan['seeds']} seeds, {result['seconds']:.0f} s in all. {provenance(result)}",
        "",
        *markdown(["encoder", "when", ">ELBO", ">reconstruction", ">KL", ">lost to dense as long"], lines),
        "",
        "ELBO of the EMA on the schedule minus that of ..., paired by seed and string:",
        "",
        *markdown(["score", "minus", "when", ">nats a string", "EMA is"], map(_more, result["comparisons"])),
        "",
        *_speed(result["speed"]),
    ]
