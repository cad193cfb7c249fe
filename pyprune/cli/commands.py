"""The command line: `pyprune VERB ...`. Every verb is a thin call of the Python interface."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.markup import escape

from ..base.errors import CheckpointError, check, check_choice
from ..evaluation import generate_text, perplexity
from ..evaluation.analysis.summarise import number
from ..evaluation.domains.suite import NEW_TOKENS, TOKENS, WINDOW
from ..ffn import dispatch, native
from ..ffn.accelerate import accelerate
from ..ffn.mlp import MODES
from ..ffn.moe import PrunedMoE
from ..ffn.quantisation import WEIGHTS
from ..model import checkpoint, families, loading
from ..pruning import nested
from ..pruning.allocation import Uniform
from ..pruning.options import PruneOptions
from ..pruning.prune import prune as prune_model
from ..speed.benchmark import benchmark
from ..speed.summary import speeds
from .compare import compare
from .demo import run_demo
from .diagnose import diagnose
from .doctor import found_here
from .experts import prune_experts
from .export import export
from .inspect import inspect
from .options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    StartOption,
    TextOption,
    TokensOption,
    WeightsOption,
    WidthOption,
    as_text,
    check_left_out,
    choose_device,
    text_windows,
)
from .prune import prune
from .prune_blocks import prune_blocks
from .recover import recover
from .report import report
from .screen import EXIT_CODES, Bars, err, printable, show, table, verb
from .suite import AgainstOption, DataOption, ItemsOption, NewTokensOption, judge
from .tune import tune

# Of `eval` on one text.
_TOKENS, _WINDOW = 16384, 1024

app = typer.Typer(
    help="Structurally pruned feed-forward networks (FFNs) that really run faster, inside real GPT-type models.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested facts as rows."""
    rows: list[tuple[str, object]] = []
    for key, value in facts.items():
        rows += _flat(value, f"{key} ") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _load(model: str, dtype: str, device: str, weights: str | None, width: float | None = None) -> Any:
    """A model as it is, or accelerated with `weights`, or at one of its nested widths."""
    check_choice(weights or "float32", "weights", WEIGHTS)
    loaded = loading.load_model(model, dtype, device)
    if weights is not None:
        accelerate(loaded, weights=weights)
    return nested.narrowed(loaded, model, width)


@app.command()
@verb
def doctor(as_json: JsonOption = False) -> None:
    """Machine, versions and backends: usable, or why not, in one line each."""
    facts = found_here()
    states = [(name, device, state) for name, by in facts["backends"].items() for device, state in by.items()]
    choices, measured = facts["choices"], facts["measured"]
    timed = (
        [table("timed on this machine", tuple(measured[0]), [tuple(row.values()) for row in measured])]
        if measured
        else []
    )
    show(
        facts,
        as_json,
        table("machine", ("what", "value"), _flat(facts["machine"])),
        table("backends", ("backend", "device", "state"), states),
        table("what `auto` chooses", tuple(choices[0]), [tuple(choice.values()) for choice in choices]),
        *timed,
        escape(native.describe()),
        escape(native.describe("cuda")),
        *(escape(f"  {device}: {code}") for device, code in facts["cuda_devices"].items()),
        f"demo model: {escape(facts['demo'])}",
    )


app.command()(inspect)
app.command()(prune)
app.command()(prune_blocks)
app.command()(prune_experts)


@app.command(name="eval")
@verb
def evaluate(
    context: typer.Context,
    model: ModelArgument,
    text: TextOption = None,
    whole: Annotated[
        bool,
        typer.Option("--suite", help="Judge on six domains, PIQA and 32 prompts at once, instead of one text."),
    ] = False,
    data: DataOption = None,
    against: AgainstOption = None,
    items: ItemsOption = None,
    new_tokens: NewTokensOption = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of text at most; 0 for all. Default: {_TOKENS}, or with --suite {TOKENS} of each domain.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens in a window; windows do not overlap. Default: {_WINDOW}, or with --suite {WINDOW}.",
            show_default=False,
        ),
    ] = None,
    start_token: StartOption = "auto",
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    width: WidthOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Token perplexity (not word perplexity) over non-overlapping windows of text; or everything, with --suite."""
    place = choose_device(device)
    if whole:
        check(text is None, "text", "be left out with --suite, which has its own", text)

        def load(name: str, dense: bool) -> Any:
            return _load(name, dtype, place, *((None, None) if dense else (weights, width)))

        size = TOKENS if tokens is None else tokens, WINDOW if window is None else window
        judge(
            model,
            load,
            data,
            against,
            *size,
            start_token,
            items or 0,
            NEW_TOKENS if new_tokens is None else new_tokens,
            as_json,
        )
        return
    check_left_out(context, "be given with --suite only", "data", "against", "items", "new_tokens")
    tokens, window = _TOKENS if tokens is None else tokens, _WINDOW if window is None else window
    windows, name = text_windows(loading.load_tokenizer(model), text, "second", tokens, window, start_token)
    loaded = _load(model, dtype, place, weights, width)
    provenance = (getattr(loaded.config, "pyprune", None) or {}).get("provenance") or {}
    calibrated = provenance.get("text") == name
    if calibrated:
        err.print(f"[yellow]note:[/] this model was calibrated on {escape(name)} too; its perplexity there flatters it")
    with Bars() as bars:
        result = perplexity(loaded, windows, bars)
    show(
        {
            "model": model,
            "text": name,
            "calibrated_on_this_text": calibrated,
            **vars(result),
            "perplexity": number(result.perplexity),
        },
        as_json,
        f"token perplexity {result.perplexity:.3f} ({result.tokens} tokens of {escape(name)}, window {result.window})",
    )


@app.command()
@verb
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    against: Annotated[str | None, typer.Option(help="A second MODEL, to show beside.", show_default=False)] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    width: WidthOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, with one model or two side by side."""
    place, prompt, texts = choose_device(device), as_text(prompt, "prompt"), {}
    for name, how in (*([] if against is None else [(against, (None, None))]), (model, (weights, width))):
        loaded = _load(name, dtype, place, *how)
        title = ", ".join([name, *(str(given) for given in how if given is not None)]) if name in texts else name
        texts[title] = generate_text(loaded, loading.load_tokenizer(name), prompt, new_tokens, temperature, seed, chat)
    show(
        {"prompt": prompt, "texts": texts},
        as_json,
        table(f"prompt: {escape(prompt)}", tuple(escape(n) for n in texts), [tuple(escape(t) for t in texts.values())]),
    )


@app.command()
@verb
def bench(
    context: typer.Context,
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(help="The dense MODEL; then MODEL is a pruned one.", show_default=False)
    ] = None,
    keep: Annotated[
        float, typer.Option(help="Without --against or --width: keep this share of MODEL's neurons (random ones).")
    ] = 0.5,
    mode: Annotated[str, typer.Option(help=f"{' or '.join(MODES)}, for PrunedMLP.")] = "compact",
    backend: Annotated[
        str, typer.Option(help=f"{', '.join(dispatch.names())}; a forced one is used or refused.")
    ] = "auto",
    prefill: Annotated[int, typer.Option(help="Tokens of a prefill, and of the many-token FFN timing.")] = 512,
    repeats: Annotated[int, typer.Option(help="Rounds of every measurement; all models take turns in each.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also run by torch.compile; the faster path counts.")
    ] = False,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    width: WidthOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Decode, prefill and FFN speed as ratios to dense in the same run, each with its ceiling."""
    if against is not None or width is not None:
        check_left_out(context, "be left out with --against or --width, which say what stays", "keep", "seed")
    check(against is None or mode == "compact", "mode", "be compact with --against, whose neurons are gone", mode)
    every = Uniform(multiple=1)
    PruneOptions.of(keep, "random", every, None, seed=seed)  # complains before a long load
    check_choice(mode, "mode", MODES)
    check_choice(backend, "backend", dispatch.names())
    check_choice(weights or "float32", "weights", WEIGHTS)
    place = choose_device(device)
    check(width is None or mode == "compact", "mode", "be compact with --width", mode)
    dense = loading.load_model(against or model, dtype, place)
    swapped = loading.load_model(model, dtype, place)
    candidates: dict[str, Any] = {}
    mask = None
    if width is None:
        candidates["narrow modules"] = narrow = loading.load_model(model, dtype, place)
        if against is None:
            mask = prune_model(narrow, keep, "random", allocation=every, repair=None, seed=seed).mask
    if mask is not None and mode == "compact":  # experts are pruned in place only
        prune_model(swapped, mask=mask, repair=None)
        mask = None
    accelerate(swapped, mode, backend, mask, weights)
    kind = "PrunedMoE" if any(isinstance(module, PrunedMoE) for module in swapped.modules()) else "PrunedMLP"
    name = f"{kind} {mode}" + (f" {weights}" if weights else "") + (f" width {width:g}" if width else "")
    candidates[name] = nested.narrowed(swapped, model, width)
    with Bars() as bars:
        report = benchmark(dense, candidates, prefill_tokens=prefill, repeats=repeats, compiled=compiled, progress=bars)
    result = report.to_json()
    rows = [
        (name, s.what, s.text, f"{s.ratio:.2f}x", f"{s.ceiling:.2f}x", s.path)
        for name in result["models"]
        for s in speeds(result, name)
    ]
    share = result["share"]
    show(
        result,
        as_json,
        table(
            "speed against dense in the same run, medians",
            ("model", "what", ">speed", ">ratio", ">ceiling", "path"),
            rows,
        ),
        f"FFN share of the dense model's time: decode {share['decode'][min(share['decode'], key=int)]:.0%} at batch 1, "
        f"prefill {share['prefill'][str(prefill)]:.0%}; memory read at {result['bandwidth_gb_s']:.1f} GB/s",
    )


app.command()(export)
app.command()(compare)
app.command()(recover)
app.command()(diagnose)
app.command()(report)
app.command()(tune)


@app.command()
@verb
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that pyprune wrote.", metavar="DIR", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The dense MODEL it should come from.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a checkpoint: hashes of its files, widths against tensors, fingerprint of the base model."""
    manifest = checkpoint.verify(folder)
    known = [width for width in manifest["widths"] if width is not None]  # some families' configs do not say
    said = f" ({min(known)} to {max(known)} neurons)" if known else ""
    if base is not None:
        dense = loading.load_model(base, "auto")
        found = families.fingerprint(dense, families.find_ffns(dense))
        if found != manifest["base_fingerprint"]:
            raise CheckpointError(
                f"{folder} was pruned from a model with fingerprint {manifest['base_fingerprint']}; {base} has {found}"
            )
    show(
        {"verified": True, "base_checked": base is not None, **manifest},
        as_json,
        f"{escape(str(folder))}: {len(manifest['files'])} files have their hashes, widths fit the tensors{said}, "
        f"base {manifest['base_fingerprint']}" + (" matches" if base else ""),
    )


@app.command()
@verb
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint, the results and the figure.")] = Path(
        "out/demo"
    ),
    keep: Annotated[float, typer.Option(help="Share of neurons that stays, in (0, 1].")] = 0.7,
    text: TextOption = None,
    tokens: TokensOption = 16384,
    as_json: JsonOption = False,
) -> None:
    """The main job on a real model: prune, save, reload in a fresh process, compare with dense, draw."""
    with Bars() as bars:
        result = run_demo(out, keep, text, tokens, bars)
    show(result.to_json(), as_json, *result.tables())


def main() -> None:
    """Entry point: quiet libraries, a screen that can show anything, then the verbs."""
    printable()
    warnings.filterwarnings("ignore", module="torch")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    app()
