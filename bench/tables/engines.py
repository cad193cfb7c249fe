"""The tables of docs/serving.md, from the result of bench/engines/run.py."""

from __future__ import annotations

import json
import shlex
from typing import Any

from bench.engines.ceiling import LEAST, case_of

NAMES = {
    "dense": "dense",
    "uniform": "30 % removed, one width",
    "half": "50 % removed, widths differ",
    "differing": "30 % removed, widths differ",
    "deci": "the same, as DeciLM",
    "padded": "the same, padded",
    LEAST: "32 neurons an FFN",
    "llama-1b-half": "LLaMA 3.2 1B's shape, 50 % removed, random weights",
}


def engines_table(result: dict[str, Any]) -> list[str]:
    """A line for each model and engine: same texts and perplexity; and tokens a second where they were measured."""
    from .readme import markdown, provenance

    lines = []
    for row in result["agreement"]:
        engine = row["engine"]
        if "class" in row and ".transformers." in row["class"]:
            engine += ", Transformers backend"
        if row.get("asked"):
            engine += f", {' '.join(row['asked'].values())}"
        cells = [NAMES[row["model"]], engine, row["type"]]
        if "same" in row:
            lead = f"{max(row['leads']):.2f}" if row["leads"] else ""
            lines.append([*cells, f"{row['same']} of {row['of']}", lead, f"{row['perplexity']:.3f}"])
            lines[-1].append(f"{row['perplexity_ratio'] - 1:+.2%}")
        else:
            lines.append([*cells, "", "", f"{row['perplexity']:.3f}", ""])
    header = ("model", "engine", "type", ">same texts", ">lead at most", ">perplexity", ">over Transformers")
    found = [f"SmolLM2-135M-Instruct, dense and pruned. {provenance(result)}", "", *markdown(header, lines)]
    if result["speed"]:
        where = provenance({"machine": result.get("speed_machine", result["machine"])})
        in_turn = any("ceiling" in row for row in result["speed"])
        turns = "" if in_turn else " One model after another, without ceilings yet."
        found += ["", f"Speed, medians.{turns} {where}", "", *speed_lines(result["speed"])]
    if "served" in result:
        found += ["", f"Served from the checkpoint whose widths differ. {provenance(result['served'])}", ""]
        found += served_lines(result["served"])
    return found


def served_lines(served: dict[str, Any]) -> list[str]:
    """Commands, and what came back, as a terminal would show them."""
    http, simple = served["vllm"], served["llama.cpp"]
    asked = f"curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d {_json(http['request'])}"
    told = {key: http["answer"][key] for key in ("object", "model", "choices", "usage") if key in http["answer"]}
    told["choices"] = [{key: one[key] for key in ("text", "finish_reason")} for one in told["choices"]]
    shown = [f"$ {shlex.join(http['command'])}", f"$ {asked}", _json(told, quoted=False), ""]
    shown += [f"$ {shlex.join(simple['command'])}", simple["text"]]
    same = {name: served[name]["same"] for name in ("vllm", "llama.cpp")}
    end = "Both texts are what Transformers writes of the checkpoint in float32, to the letter."
    if not all(same.values()):
        end = f"Not what Transformers writes in float32: {', '.join(name for name, ok in same.items() if not ok)}."
    return ["```console", *shown, "```", "", end]


def _json(found: Any, quoted: bool = True) -> str:
    text = json.dumps(found, ensure_ascii=False)
    return shlex.quote(text) if quoted else text


def speed_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Tokens a second, over the dense model beside the ceiling of that, and over vLLM's own layers."""
    from .readme import markdown

    dense = {case_of(row): row for row in rows if row["model"] == "dense"}
    own = {(row["model"], case_of(row)): row for row in rows if row.get("kernels") == "off"}
    lines = []
    for row in rows:
        engine, kind, what, batch = case_of(row)
        cells = [NAMES[row["model"]], engine, row.get("kernels", ""), kind, what, str(batch)]
        cells.append(f"{row['tokens_per_s']:,.0f}")
        over = dense.get(case_of(row)) if row["model"] in ("uniform", "half", "differing", LEAST) else None
        cells.append("" if over is None else f"{row['tokens_per_s'] / over['tokens_per_s']:.2f}x")
        told = ("ffn_share", "{:.0%}"), ("ceiling", "{:.2f}x"), ("of_ceiling", "{:.0%}")
        cells += [form.format(row[key]) if key in row else "" for key, form in told]
        theirs = own.get((row["model"], case_of(row))) if row.get("kernels") in ("auto", "int8") else None
        cells.append("" if theirs is None else f"{row['tokens_per_s'] / theirs['tokens_per_s']:.2f}x")
        lines.append(cells)
    names = ("model", "engine", "kernels", "type", "what", ">batch", ">tokens/s", ">over dense", ">FFNs' share")
    return markdown((*names, ">ceiling", ">of ceiling", ">over vLLM's layers"), lines)
