"""Where the numbers come from, and the commands that make them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from .facts import Facts
from .parts import Section, Table
from .words import clip, megabytes, model_name

_DEFAULT_TEXT = "pydoc_data.topics"
_SELDOM = {"protect", "iterative", "structure"}


def _models(found: dict[str, Any]) -> str:
    names = [found.get(key) for key in ("model", "dense", "pruned")]
    return ", ".join(model_name(name) for name in names if isinstance(name, str)) or "-"


def _texts(name: str, found: dict[str, Any]) -> tuple[str, str]:
    """What was read, and how much of it."""
    if name == "results.json":
        parts = [found.get(key) for key in ("calibration", "evaluation")]
        known = [part for part in parts if part]
        tokens = "; ".join(f"{part['tokens']:,} in windows of {part['window']:,}" for part in known)
        return "; ".join(part["text"] for part in known), tokens
    if name == "compare.json":
        sizes = ", ".join(f"{entry['tokens']:,}" for entry in found["evaluation"].values())
        return "; ".join([found.get("text", "-"), *found["evaluation"]]), sizes
    if name == "suite.json":
        domains = found["domains"]
        return "; ".join(domains), ", ".join(f"{entry['tokens']:,}" for entry in domains.values())
    if name == "redundancy.json":
        inner = found["redundancy"]
        return inner["text"], f"{inner['windows'] * inner['window']:,} in windows of {inner['window']:,}"
    texts = [found.get(key) for key in ("calibration", "text", "evaluation")]
    counts = [found.get(key) for key in ("tokens", "evaluation_tokens")]
    known_texts = [text for text in texts if isinstance(text, str)]
    return "; ".join(known_texts) or "-", ", ".join(f"{c:,}" for c in counts if isinstance(c, int)) or "-"


def _machine(name: str, found: dict[str, Any]) -> dict[str, Any] | None:
    inner = {"redundancy.json": "redundancy", "results.json": "bench"}.get(name)
    holder = found[inner] if inner else found
    machine: dict[str, Any] | None = holder.get("machine")
    return machine


def _seed(found: dict[str, Any]) -> str:
    config = (found.get("prune") or {}).get("config") or (found.get("provenance") or {}).get("config") or {}
    seeds = [found.get("seed"), config.get("seed")]
    return ", ".join(str(seed) for seed in dict.fromkeys(seeds) if isinstance(seed, int)) or "-"


def _commit(machine: dict[str, Any] | None) -> str:
    commit = (machine or {}).get("commit")
    return "-" if not commit else clip(commit, 200)[:10] + (" (changed)" if (machine or {}).get("dirty") else "")


def _date(text: str | None) -> str:
    """Without the seconds."""
    return f"{text[:10]} {text[11:16]}" if text else "-"


def _files(facts: Facts) -> Table:
    rows = []
    for name, found in facts.files.items():
        machine = _machine(name, found)
        date = _date((machine or {}).get("date"))
        cells = (_models(found), *_texts(name, found), _seed(found), date, _commit(machine))
        rows.append((facts.places[name], *cells))
    return Table("Files", ("file", "model", "text", "tokens", "seed", ">date (UTC)", ">commit"), rows)


def _machines(facts: Facts) -> Table | None:
    """One column a machine: what differs between files stands side by side."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, content in facts.files.items():
        machine = _machine(name, content)
        if machine:
            found.setdefault(tuple(_described(machine)), []).append(facts.places[name])
    if not found:
        return None
    labels = list(dict.fromkeys(label for rows in found for label, _ in rows))
    by = [dict(rows) for rows in found]
    rows = [(label, *(entry.get(label, "-") for entry in by)) for label in labels]
    return Table("Machine and versions", ("", *(", ".join(names) for names in found.values())), rows)


def _described(machine: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for label, key in (
        ("CPU", "cpu"),
        ("instructions", "instructions"),
        ("cores", "cores"),
        ("threads", "torch_threads"),
    ):
        if key in machine:
            yield label, str(machine[key])
    if "memory_bytes" in machine:
        yield "memory", megabytes(machine["memory_bytes"])
    gpu = machine.get("gpu")
    yield "GPU", gpu["name"] if gpu else "none"
    if "system" in machine:
        yield "system", machine["system"]
    for name, version in (machine.get("versions") or {}).items():
        yield name, version or "not installed"


def _options(**given: Any) -> str:
    """Options with their values, those without one left out; nothing in a name or value is a command."""
    parts = [
        f"--{name.replace('_', '-')} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}"
        for name, value in given.items()
        if value is not None and not isinstance(value, bool | list | dict) and re.fullmatch(r"[a-z][a-z0-9_]*", name)
    ]
    return " ".join(parts)


def _text(name: Any, option: str = "--text", half: str = "") -> str:
    """The option for a text that is not the default one."""
    default = not isinstance(name, str) or name.startswith(_DEFAULT_TEXT)
    return "" if default else f"{option} FILE{half}"


def _sources(used: list[dict[str, Any]] | None, else_: str) -> str:
    """The options for calibration text from several sources, files by a name that stands for them."""
    if not used:
        return else_
    words = []
    for number, part in enumerate(used, 1):
        name = str(part["source"])
        own = name.partition(":")[0] in ("self", "builtin")
        name = "builtin:prose" if name.startswith(_DEFAULT_TEXT) else name if own else f"FILE{number}"
        words.append(f"--text {shlex.quote(name)}@{part['share']:.3g}")
    return " ".join(words)


def _command(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _pruning(facts: Facts) -> Iterator[str]:
    provenance = facts.part("diagnose", "provenance")
    if not provenance:
        return
    config = provenance.get("config") or {}
    if not {"keep", "target_speedup"} & config.keys():  # a mask said which neurons; it is in no file here
        return
    plain = {key: value for key, value in config.items() if key not in _SELDOM}
    verb = "prune"
    if config.get("structure", "neurons") != "neurons":
        verb, plain["structure"] = "prune-blocks", config["structure"]
        plain.pop("seed", None)  # nothing is drawn there
    if "compensate" in plain:
        plain["repair"] = plain.pop("compensate")
    sizes = {"tokens": provenance.get("tokens") or None, "window": provenance.get("window") or None}
    if "damping" in config and config["damping"] is None:
        plain["damping"] = "auto"
    flags = "--no-sequential" if config.get("sequential") is False else ""
    text = _sources(provenance.get("sources"), _text(provenance.get("text")))
    yield _command(f"pyprune {verb} DENSE --out PRUNED", _options(**{**plain, **sizes}), flags, text)


def _commands(facts: Facts) -> Iterator[str]:
    results = facts.get("results")
    if results is not None:
        config = results["prune"].get("config") or {}
        calibration = results.get("calibration") or {}
        given = _options(keep=config.get("keep"), tokens=calibration.get("tokens"))
        yield _command("pyprune demo --out DIR", given, _text(calibration.get("text")))
    yield from _pruning(facts)
    diagnose = facts.get("diagnose")
    if diagnose is not None:
        budget = diagnose.get("budget") or {}
        parts = ",".join(part for part in ("hierarchy", "drift", "tasks") if part in diagnose)
        sizes = {key: diagnose[key] for key in ("tokens", "window")}
        rest: dict[str, Any] = {}
        if "drift" in diagnose:  # options that one part alone reads are refused without it
            rest |= {key: budget.get(key) for key in ("prompts", "prompt_tokens", "new_tokens", "temperature")}
        if "tasks" in diagnose:
            rest |= {"items": budget.get("items") or 0}
        rest |= {"dtype": diagnose.get("dtype"), "seed": diagnose.get("seed")}
        given = _options(**sizes, parts=parts or None, **rest)
        yield _command("pyprune diagnose DENSE PRUNED", _text(diagnose["text"]), given, "--out DIR/diagnose.json")
    suite = facts.get("suite")
    if suite is not None:
        yield f"pyprune eval PRUNED --suite --against DENSE {_suite_options(suite)} --json > DIR/suite.json"
    redundancy = facts.part("redundancy", "redundancy")
    if redundancy is not None:
        sizes = {"tokens": redundancy["windows"] * redundancy["window"], "window": redundancy["window"]}
        criteria = ",".join(redundancy["after"]) or None
        given = _options(threshold=redundancy["threshold"], keep=redundancy["keep"], criteria=criteria, **sizes)
        command = _command("pyprune inspect DENSE --redundancy", _text(redundancy["text"]), given, "--json")
        yield f"{command} > DIR/redundancy.json"
    bench = facts.get("bench")
    if bench is not None:
        settings = bench.get("settings") or {}
        given = _options(
            prefill=settings.get("prefill_tokens"), repeats=settings.get("repeats"), dtype=settings.get("dtype")
        )
        yield f"{_command('pyprune bench PRUNED --against DENSE', given, '--json')} > DIR/bench.json"
    yield from _experiments(facts)
    if facts.get("pyprune") is not None:
        yield "pyprune verify PRUNED --base DENSE"
    yield "pyprune report DIR -o report.html"


def _suite_options(suite: dict[str, Any]) -> str:
    first, piqa, text = next(iter(suite["domains"].values())), suite["piqa"], suite["generation"]
    more = {"items": piqa["items"] if piqa else None, "new_tokens": text["new_tokens"] if text else 0}
    data = "" if suite["missing"] else "--data FOLDER"
    return _command(data, _options(tokens=first["tokens"], window=first["window"], **more))


def _experiments(facts: Facts) -> Iterator[str]:
    nested = facts.get("nested")
    if nested is not None:
        sizes = {key: nested.get(key) for key in ("method", "dtype", "evaluation_tokens", "prefill_tokens")}
        text, calibrate = _text(nested.get("evaluation"), half=":second"), "--calibrate FILE:first"
        both = _command(text, calibrate if text else "")
        yield _command("python -m bench.model.nested --model DENSE", both, _options(**sizes), "--results DIR")
    latency = facts.get("latency-aware")
    if latency is not None:
        load = latency["table"]["workload"]
        targets = ",".join(f"{row['target']:g}" for row in latency["rows"])
        sizes = {
            key: latency.get(key) for key in ("method", "dtype", "tokens", "evaluation_tokens", "window", "rounds")
        }
        kind = {"workload": load["kind"], "batch": load["tokens"], "weights": load.get("weights")}
        given = _options(targets=targets, **sizes, **kind)
        yield _command("python -m bench.model.latency_aware --model DENSE", _text(latency.get("evaluation")), given)
    compare = facts.get("compare")
    if compare is not None:
        keeps = sorted({row["keep"] for row in compare["rows"]}, reverse=True)
        evaluation = next(iter(compare["evaluation"].values()))
        sizes = {"tokens": (compare.get("calibration") or {}).get("tokens"), "evaluation_tokens": evaluation["tokens"]}
        given = _options(keep=",".join(f"{k:g}" for k in keeps) or None, **sizes, window=evaluation["window"])
        yield _command("pyprune compare DENSE", _text(compare.get("text")), given, "--out DIR/compare.json")
    recover = facts.get("recover")
    if recover is not None and "models" in recover:
        yield "python -m bench.model.recover DENSE PRUNED RECOVERED --data DATA"
    elif recover is not None:
        given = _options(steps=recover.get("steps"), window=recover.get("window"))
        command = _command("pyprune recover PRUNED --teacher DENSE --out RECOVERED", _text(recover.get("text")), given)
        yield f"{command} --json > DIR/recover.json"


def section(facts: Facts) -> Section:
    """Files, machines and commands."""
    machines = _machines(facts)
    tables = (_files(facts), *([machines] if machines is not None else []))
    lead = (
        "Every number above comes from these files; a figure whose file is not there is not there either. In the "
        "commands, DENSE, PRUNED and RECOVERED are models, FILE is the text named here, FOLDER holds those of the "
        "suite, and DIR is this folder."
    )
    return Section("provenance", "Provenance", lead, tables=tables, commands=tuple(_commands(facts)))
