"""9 to 64 tokens: enough bytes in flight, sizes that fit every architecture, and both orders of the second product."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Triton chooses between compiler and interpreter when it is imported, so this stands before its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from triton_cases import twin

from pyprune import triton_kernels as kernels
from pyprune.triton_kernels import defaults, hardware

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
pytestmark = [] if kernels.INTERPRETED else [pytest.mark.gpu]
STATIC = Path(__file__).parents[1] / "bench" / "results" / "static.json"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 103, 120)
# Tokens, neurons and channels: one neuron; a block and one more; a last block of which only a half is of the first
# product; splits without neurons.
ODD = [(9, 1, 16), (17, 65, 48), (33, 97, 80), (64, 130, 144), (40, 700, 64)]


@pytest.fixture(params=[90, 80], ids=["weights_left", "tokens_left"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As if on this one; and what the launchers allocate is NaN at first."""
    monkeypatch.setattr(kernels, "architecture", lambda device: request.param)
    empty = torch.empty

    def poisoned(*args, **options) -> Tensor:
        made = empty(*args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    return request.param


@pytest.mark.parametrize(("m", "k", "d"), ODD)
@pytest.mark.parametrize("form", ["compact", "gather"])
@pytest.mark.parametrize(("gated", "dtype"), [(True, torch.bfloat16), (False, torch.float16), (True, torch.float16)])
def test_odd_shapes_against_the_twin(
    architecture: int, m: int, k: int, d: int, form: str, gated: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(m)
    parts, rows = 3 if gated else 2, k if form == "compact" else 2 * k

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, record = randn(m, d).to(dtype).to(DEVICE), (randn(rows, parts * d) * d**-0.5).to(dtype).to(DEVICE)
    bias = randn(rows, parts - 1).to(dtype).to(DEVICE)
    index = None
    if form == "gather":
        index = torch.randperm(rows, generator=generator)[:k].sort().values.int().to(DEVICE)
    given = {"gated": gated, "activation": "silu", "neuron_bias": bias, "index": index}
    out = kernels.ffn(x, record, **given)
    assert torch.equal(out, kernels.ffn(x, record, **given))
    truth, own = (twin({"x": x, "record": record, **given}, to).double() for to in (torch.float64, dtype))
    allowed = max(2 * (own - truth).abs().max(), truth.abs().max() * torch.finfo(dtype).eps)
    assert (out.double() - truth).abs().max() <= allowed


def test_a_narrow_layer_pads_hidden_activations_for_both_products() -> None:
    config = kernels.prefill_config(33, 97, 80, torch.float16, True, False, True)
    assert config.hidden.block_n < config.down.block_k, "so that the test above has blocks that only padding fills"


@pytest.mark.parametrize("m", [16, 64])
@pytest.mark.parametrize(("k", "gated"), [(14336, True), (7168, True), (3584, True), (8192, False), (16384, False)])
@pytest.mark.parametrize("gather", [False, True])
def test_enough_bytes_are_in_flight_on_every_multiprocessor(m: int, k: int, gated: bool, gather: bool) -> None:
    d, sms, room = 4096, hardware.MULTIPROCESSORS, hardware.shared_limit(90) + 1024
    config = kernels.default_config(m, k, d, torch.bfloat16, gated, gather, True)
    products = [(config.hidden, 2 if gated else 1, -(-k // config.hidden.block_n), False)]
    products += [(config.down, 1, d // config.down.block_n * config.splits, gather)]
    for tile, parts, programs, chain in products:
        assert programs >= 0.84 * sms
        running = min(room // (defaults.shared_bytes(tile, parts, 2, chain) + 1024), programs / sms)
        stages = (tile.num_stages + 1) // 2 if chain else tile.num_stages
        assert running * (stages - 1) * tile.block_n * tile.block_k * parts * 2 >= 2 * 23 * 1024, (
            "twice what latency asks for"
        )


def test_every_default_and_candidate_fits_where_it_is_offered() -> None:
    sizes = itertools.product((1, 9, 16, 33, 64, 100, 4096), ((768, 3072), (576, 768), (4096, 3584), (4096, 14336)))
    dtypes = ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True))
    flags = itertools.product(dtypes, (False, True), (False, True), ARCHITECTURES)
    for (m, (d, k)), ((dtype, int8), gated, gather, architecture) in itertools.product(sizes, flags):
        given = (m, k, d, dtype, gated, gather, True)
        offered = kernels.candidates(*given, int8=int8, architecture=architecture)
        assert offered[0] == kernels.default_config(*given, int8=int8, architecture=architecture)
        assert all(defaults.fits(config, gated, gather, dtype, architecture) for config in offered)
        if not hardware.has_descriptors(architecture):
            assert not any(getattr(config, "descriptors", False) for config in offered)
    assert kernels.default_config(64, 7168, 4096, torch.bfloat16, True, False, True, architecture=86) != (
        kernels.default_config(64, 7168, 4096, torch.bfloat16, True, False, True, architecture=90)
    ), "the limit has been met"


def test_shared_memory_is_what_the_compiler_takes() -> None:
    rows = [
        row for row in json.loads(STATIC.read_text())["kernels"] if row["kernel"] in ("hidden_kernel", "down_kernel")
    ]
    rows = [row for row in rows if row["aligned"] and row["dtype"] != "float32"]
    assert len(rows) > 100
    for row in rows:
        sizes = [row["blocks"][name] for name in ("BLOCK_M", "BLOCK_N")]
        depth = row["blocks"].get("BLOCK_D") or row["blocks"]["BLOCK_K"]
        tile = kernels.TileConfig(*sizes, depth, row["num_warps"], row["num_stages"])
        parts = 2 if row["gated"] else 1
        counted = defaults.shared_bytes(tile, parts, 2, row["kernel"] == "down_kernel" and row["gather"])
        assert row["shared_bytes"] <= counted + 2048, row


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [100, 1536, 3584, 7168, 16384])
@pytest.mark.parametrize("architecture", [80, 90])
def test_under_batch_invariance_only_tokens_and_stages_follow_their_number(
    k: int, gated: bool, gather: bool, architecture: int
) -> None:
    given = (k, 4096, torch.bfloat16, gated, gather, True, True)
    found = {
        (
            c.hidden.block_n,
            c.hidden.block_k,
            c.hidden.num_warps,
            c.down.block_n,
            c.down.block_k,
            c.down.num_warps,
            c.splits,
        )
        for c in (kernels.prefill_config(m, *given, architecture=architecture) for m in range(1, 300))
    }
    assert len(found) == 1
