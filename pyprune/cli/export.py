"""`pyprune export`: a checkpoint for an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..base.errors import check, check_choice
from ..model import checkpoint, loading
from ..serving import gguf_check
from ..serving.agreement import prompts
from ..serving.deci import to_deci
from ..serving.gguf_base import CONVERTER, Base
from ..serving.gguf_export import check_out_file, to_gguf
from ..serving.gguf_plan import TYPES, WIDTHS
from ..serving.padded import check_multiple, to_padded
from .options import JsonOption, ShardOption
from .screen import megabytes, show, verb

TARGETS = ("gguf", "padded", "deci")
CHECKS = ("auto", "tensors", "logits")


def _spread(widths: list[int]) -> str:
    low, high = min(widths), max(widths)
    return f"{low} neurons in every layer" if low == high else f"{low} to {high} neurons"


def _gguf(
    model: str, base: Path | None, out: Path, kind: str, widths: str, checks: str, overwrite: bool, as_json: bool
) -> None:
    check(
        base is not None,
        "base",
        f"name the GGUF file of the dense model; without one, {CONVERTER} turns a checkpoint of one width into a file",
        base,
    )
    check_choice(kind, "type", TYPES)
    check_choice(widths, "widths", WIDTHS)
    check_choice(checks, "check", CHECKS)
    check_out_file(out, overwrite)
    assert base is not None
    Base(base)  # complains before a long load
    if checks == "logits":
        gguf_check.needed()
    loaded = loading.load_model(model, "auto")
    tokens = None
    if checks == "logits" or (checks == "auto" and gguf_check.has_llama_cpp()):
        tokens = prompts(_tokenizer(model), loaded.config)
    written = to_gguf(loaded, base, out, kind, widths, overwrite, tokens)
    found = written.check
    by_logits = (
        f"; llama.cpp's next tokens diverge by {found['divergence']:.2g} nats, {found['agree']:.1%} of "
        f"{found['positions']} likeliest ones agree"
        if "divergence" in found
        else "; no logits compared (llama-cpp-python is not installed, or --check tensors)"
    )
    show(
        vars(written),
        as_json,
        f"wrote {escape(written.path)}: {megabytes(written.bytes)}, architecture {written.arch}, "
        f"{_spread(written.widths)} in {written.type}",
        f"{written.kept} tensors as they are in {escape(str(base))}, {written.compared} of them found in "
        f"{escape(model)}; read back, the FFNs' lie {found['apart']:.2g} from the model's{by_logits}",
    )


def _tokenizer(model: str) -> Any:
    return loading.load_tokenizer(model) if loading.has_tokenizer(model) else None


@verb
def export(
    model: Annotated[str, typer.Argument(help="A pruned checkpoint.", metavar="DIR", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            help="gguf, for llama.cpp; padded, an ordinary checkpoint with zero neurons; deci, for engines that read "
            "DeciLM.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file, or the folder, to write.", show_default=False)],
    base: Annotated[
        Path | None,
        typer.Option(help="With gguf: the dense model's file, for everything but the FFNs.", show_default=False),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="With gguf: of the FFNs; bf16.", show_default=False)
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            help="With gguf: as-is, or padded with zero neurons where llama.cpp or the type needs it; as-is.",
            show_default=False,
        ),
    ] = None,
    checks: Annotated[
        str | None,
        typer.Option(
            "--check",
            help="With gguf: tensors; or their logits too, by llama-cpp-python; auto: where it is installed.",
            show_default=False,
        ),
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(help="With padded: widths are multiples of this; 1.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out names.")] = False,
    max_shard_size: ShardOption = checkpoint.MAX_SHARD_SIZE,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint for an engine, and check that it gives the same (docs/serving.md says which runs where)."""
    check_choice(to, "to", TARGETS)
    for argument, value, of in (
        ("base", base, "gguf"),
        ("type", kind, "gguf"),
        ("widths", widths, "gguf"),
        ("check", checks, "gguf"),
        ("multiple", multiple, "padded"),
    ):
        check(value is None or to == of, argument, f"be left out unless --to is {of}", str(value))
    if to == "gguf":
        whole = max_shard_size == checkpoint.MAX_SHARD_SIZE
        check(whole, "max_shard_size", "be left out unless --to is padded or deci", max_shard_size)
        _gguf(model, base, out, kind or "bf16", widths or "as-is", checks or "auto", overwrite, as_json)
        return
    many = 1 if multiple is None else multiple
    check_multiple(many)
    checkpoint.check_out(out, overwrite, max_shard_size)
    loaded, tokenizer = loading.load_model(model, "auto"), _tokenizer(model)
    if to == "deci":
        made = to_deci(loaded, out, tokenizer, overwrite, max_shard_size)
        show(
            vars(made),
            as_json,
            f"wrote {escape(made.path)}: DeciLM, {_spread(made.widths)}; engines need --trust-remote-code for it",
        )
        return
    tokens = prompts(tokenizer, loaded.config)
    result = to_padded(loaded, out, tokens, tokenizer, many, overwrite, max_shard_size)
    show(
        vars(result),
        as_json,
        f"wrote {escape(result.path)}: {result.width} neurons in every layer, {result.added:.1%} of them zeros; "
        f"logits lie {result.apart:.2g} from the checkpoint's",
    )
