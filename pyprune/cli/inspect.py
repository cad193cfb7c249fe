"""`pyprune inspect`: the FFNs of a model, and how redundant their neurons are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..base import machine
from ..evaluation.analysis import neuron_redundancy
from ..evaluation.analysis.redundancy import CRITERIA, THRESHOLD
from ..model import families, loading
from .options import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    StartOption,
    TextOption,
    TokensOption,
    WindowOption,
    check_left_out,
    choose_device,
    text_windows,
)
from .screen import Bars, megabytes, show, table, verb


def _rows(model: Any, ffns: list[families.FFN], total: int) -> list[dict[str, Any]]:
    """Facts of every FFN; `total` are the model's bytes."""
    rows: list[dict[str, Any]] = []
    for ffn in ffns:
        parameters = ffn.parameters()
        rows.append(
            {
                "layer": ffn.layer,
                "name": ffn.name,
                "family": ffn.pattern.name,
                "kind": "gated" if ffn.gated else "plain",
                "hidden_size": ffn.hidden_size,
                "intermediate_size": ffn.intermediate_size,
                "activation": ffn.activation,
                "bias": ffn.weights().down_bias is not None,
                "parameters": sum(p.numel() for p in parameters),
                "share_of_bytes": sum(p.numel() * p.element_size() for p in parameters) / total,
            }
        )
    return rows


def _ffn_table(title: str, rows: list[dict[str, Any]]) -> Any:
    columns = (">layer", "name", "family", "kind", ">D", ">F", "activation", "bias", ">parameters", ">share")
    keys = ("layer", "name", "family", "kind", "hidden_size", "intermediate_size", "activation")
    shown = [
        (
            *(r[key] for key in keys),
            "yes" if r["bias"] else "no",
            f"{r['parameters']:,}",
            f"{r['share_of_bytes']:.2%}",
        )
        for r in rows
    ]
    return table(title, columns, shown)


def _redundancy_tables(found: dict[str, Any]) -> Iterator[Any]:
    columns = (
        ">layer",
        ">unique",
        ">clusters",
        ">neurons in them",
        ">largest",
        ">dead",
        ">sensitivity, mean",
        ">of top tenth",
    )
    rows = []
    for layer in found["layers"]:
        groups, spread = layer["clusters"], layer["sensitivity"]
        largest = groups["largest"][0]["size"] if groups["largest"] else 0
        counts = (groups["count"], groups["neurons"], largest, layer["dead"])
        rows.append(
            (
                layer["layer"],
                f"{layer['uniqueness']:.2%}",
                *counts,
                f"{spread['mean']:.2e}",
                f"{spread['top_tenth']:.0%}",
            )
        )
    whole = found["all"]
    tokens = found["windows"] * found["window"]
    title = f"redundancy: cosine of activations from {found['threshold']:g}, {tokens} tokens of {found['text']}"
    yield table(title, columns, rows)
    curve = ", ".join(f"{point['uniqueness']:.1%} at {point['threshold']:g}" for point in whole["curve"])
    yield f"unique over all {whole['neurons']:,} neurons: {curve}"
    after = [
        (name, f"{entry['uniqueness']:.2%}", f"{entry['sensitivity']:.1%}") for name, entry in found["after"].items()
    ]
    yield table(
        f"what criteria leave that keep {found['keep']:.0%} of every layer (before: {whole['uniqueness']:.2%} unique)",
        ("criterion", ">unique", ">of the sensitivity"),
        after,
    )


@verb
def inspect(
    context: typer.Context,
    model: ModelArgument,
    redundancy: Annotated[
        bool, typer.Option("--redundancy", help="Also: which neurons are alike, and how much the loss depends on each.")
    ] = False,
    threshold: Annotated[float, typer.Option(help="With --redundancy: cosine from which two are alike.")] = THRESHOLD,
    criteria: Annotated[str, typer.Option(help="With --redundancy: show what these leave, by commas.")] = ",".join(
        CRITERIA
    ),
    keep: Annotated[float, typer.Option(help="With --redundancy: the share of neurons that they keep.")] = 0.7,
    text: TextOption = None,
    tokens: TokensOption = 8192,
    window: WindowOption = 512,
    start_token: StartOption = "auto",
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """The FFNs found: layer, family, plain or gated, widths, activation, bias, parameters, share of the bytes."""
    windows, name = None, ""
    if not redundancy:
        sampling = ("threshold", "criteria", "keep", "text", "tokens", "window", "start_token", "seed", "device")
        check_left_out(context, "be given with --redundancy only", *sampling)
    else:
        windows, name = text_windows(loading.load_tokenizer(model), text, "first", tokens, window, start_token)
    loaded = loading.load_model(
        model, "float32" if redundancy else "auto", choose_device(device) if redundancy else "cpu"
    )
    ffns = families.find_ffns(loaded)
    total = sum(p.numel() * p.element_size() for p in loaded.parameters())
    rows = _rows(loaded, ffns, total)
    share = sum(r["share_of_bytes"] for r in rows)
    facts: dict[str, Any] = {
        "model": model,
        "model_type": loaded.config.model_type,
        "bytes": total,
        "ffn_share_of_bytes": share,
        "fingerprint": families.fingerprint(loaded, ffns),
        "ffns": rows,
    }
    shown = [_ffn_table(f"{escape(model)}: {len(rows)} FFNs, {share:.1%} of {megabytes(total)}", rows)]
    if windows is not None:
        chosen = [word.strip() for word in criteria.split(",") if word.strip()]
        with Bars() as bars:
            found = neuron_redundancy(loaded, windows, threshold, chosen, keep, seed, bars)
        facts["redundancy"] = {"text": name, **found.to_json(), "machine": machine.facts()}
        shown += _redundancy_tables(facts["redundancy"])
    show(facts, as_json, *shown)
