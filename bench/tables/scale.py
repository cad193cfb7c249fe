"""Tables of docs/scale.md: streamed runs (bench/streaming/run.py), kills, and what pruning costs on paper."""

from __future__ import annotations

from typing import Any

from bench.streaming.paper import MODELS, machines
from bench.tables.readme import markdown, provenance


def streaming_table(result: dict[str, Any]) -> list[str]:
    """A line for each checkpoint and criterion, with where the numbers are from."""
    rows: list[list[str]] = []
    sources: dict[str, None] = {}
    for name, found in result.items():
        shape = found["shape"]
        sides = f"{shape['num_hidden_layers']} layers, D {shape['hidden_size']}, F {shape['intermediate_size']}"
        for criterion, run in found["runs"].items():
            equal = {True: "yes", False: "NO", None: "not compared"}[run.get("equal_to_the_bit")]
            rows.append(
                [
                    f"{name}, {sides}",
                    criterion,
                    f"{found['limit_bytes'] / 1e9:g} GB",
                    f"{run['peak_rss_bytes'] / 1e9:.2f} GB",
                    f"{run['in_memory']['peak_rss_bytes'] / 1e9:.2f} GB" if "in_memory" in run else "-",
                    _long(run["seconds"]),
                    f"{run['bytes_per_second'] / 1e6:.0f} MB/s",
                    f"{run['share_of_copy']:.0%}",
                    equal,
                ]
            )
            # Runs of one checkpoint may be of different days; what is said of all is said once.
            own = {"machine": found["machine"], "copy": found["copy"], **run}
            copied = f"a copy {own['copy']['bytes_per_second'] / 1e6:.0f} MB/s read and written"
            line = f"{copied}; load before {own['machine']['load']:g}. {provenance(own)}"
            sources.setdefault(f"{name}: {line}", None)
    header = ("checkpoint", "criterion", ">limit of addresses", ">peak", ">in memory", ">time", ">rate", ">of a copy's")
    return [*markdown((*header, "equal to the bit"), rows), "", *(line for s in sources for line in (s, ""))][:-1]


def streamed_table(result: dict[str, Any]) -> list[str]:
    """A line for each run on a GPU."""
    made, rows = result["make"], []
    for name, run in result.items():
        if not (isinstance(run, dict) and "device_peak_bytes" in run):
            continue
        rows.append(
            [
                name,
                f"{run['limit_bytes'] / 1e9:g} GB",
                f"{run['device_peak_bytes'] / 1e9:.2f} GB",
                f"{run['host_peak_bytes'] / 1e9:.2f} GB",
                f"{run['seconds']:.1f} s",
                f"{run['seconds_a_layer']:.2f} s",
                f"{max(run['floor'].values()):.1f} to {sum(run['floor'].values()):.1f} s",
                f"{run['bytes_per_second'] / 1e9:.2f} GB/s",
                f"{run['tokens_per_second']:,.0f}" if run["tokens"] else "",
            ]
        )
    sides = f"{made['num_hidden_layers']} layers, D {made['hidden_size']}, F {made['intermediate_size']}"
    disk = result["disk"]
    header = ("run", ">limit", ">peak of the GPU", ">of the host", ">time", ">a layer", ">floor", ">rate", ">tokens/s")
    start = f"{made['bytes'] / 1e9:.1f} GB in bfloat16, {sides}, {result['keep']:.0%} kept; the disk reads "
    start += f"{disk['read'] / 1e9:.2f} and writes {disk['write'] / 1e9:.2f} GB/s. {provenance(result)}"
    return [start, "", *markdown(header, rows)]


def killed_table(result: dict[str, Any]) -> list[str]:
    """What became of the kills, in one line, and the log."""
    log = [
        [str(number), f"{row['after_seconds']:.1f} s", str(row["layers_before"]), str(row["layers_done"])]
        for number, row in enumerate(result["log"], 1)
    ]
    kept = sum(row["layers_done"] > 0 for row in result["log"])
    return [
        f"{result['kills']} kills of runs over {result['layers']} layers, {kept} of them with layers done already; "
        f"{result['runs_that_ended_and_were_equal']} runs ended, each equal to the bit. {provenance(result)}",
        "",
        *markdown((">kill", ">after", ">layers done by earlier runs", ">and when it was killed"), log),
    ]


def ranks_table(result: dict[str, Any]) -> list[str]:
    """Several processes against one: a line for each device, number of processes and criterion."""
    rows, sources = [], []
    for found in result.values():
        for criterion, run in found["runs"].items():
            one, several = (min(run[key], key=lambda row: row["seconds"]) for key in ("one", "several"))
            rows.append(
                [
                    f"{found['processes']}, {found['device']}",
                    criterion,
                    f"{one['seconds']:.1f} s",
                    f"{several['seconds']:.1f} s",
                    f"{run['speedup_seconds']:.2f}x",
                    f"{run['speedup_cpu_seconds']:.2f}x",
                    f"{one['peak_bytes'] / 1e6:.0f} MB",
                    f"{several['peak_bytes'] / 1e6:.0f} MB",
                    "the same" if run["same_neurons"] else "OTHERS",
                    f"{run['largest_difference']:.1g}",
                ]
            )
        shape = found["shape"]
        sides = f"{shape['num_hidden_layers']} layers, D {shape['hidden_size']}, F {shape['intermediate_size']}"
        sources.append(
            f"{sides}, {shape['tokens']:,} tokens; load before {found['machine']['load']:g}. {provenance(found)}"
        )
    header = ("processes", "criterion", ">time of one", ">of several", ">faster", ">by processor time", ">peak of one")
    header += (">of each of several", "neurons", ">largest difference of a weight")
    return [*markdown(header, rows), "", *(line for s in dict.fromkeys(sources) for line in (s, ""))][:-1]


def _long(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def rates_table(result: dict[str, Any]) -> list[str]:
    """What two models take, and how long that is on three machines."""
    takes = []
    for m in MODELS:
        sizes = f"{m.weights / 1e9:.0f} G", f"{m.read / 1e9:.0f} GB", f"{m.written / 1e9:.0f} GB"
        work = (f"{products / 1e15:.1f} P" for products in (m.forward, m.moments, m.fit))
        takes.append([m.name, *sizes, *work, f"{m.memory / 1e9:.0f} GB", f"{m.reduced / 1e12:.1f} TB"])
    header = ("model", ">weights", ">read", ">written", ">forwards", ">moments", ">fits", ">peak", ">moments to add up")
    products, threads = result["products"], result["machine"]["torch_threads"]
    rows, places = [], machines(products, threads)
    for m in MODELS:
        for place in places:
            found = place.seconds(m)
            binds = max(found, key=lambda part: found[part])
            rows.append([m.name, place.name, *map(_time, (*found.values(), sum(found.values()))), binds])
    parts = ("disk", "forwards", "moments", "fits", "network")
    measured = ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in products.items())
    return [
        *markdown(header, takes),
        "",
        *markdown(("model", "machine", *(f">{part}" for part in parts), ">sum", "binds"), rows),
        "",
        f"Products here: {measured}; load before {result['machine']['load']:g}. {provenance(result)}",
    ]
