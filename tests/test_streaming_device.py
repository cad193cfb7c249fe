"""Streaming to a device: pieces on their way, states that are kept seldom; on a GPU to the bit as in its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pyprune import InputError, prune, prune_checkpoint
from pyprune.base.machine import place_of
from pyprune.cli.commands import app
from pyprune.model import checkpoint, loading, pages, shards, transfer
from pyprune.pruning.moments import Moments
from pyprune.pruning.streaming import pruner
from pyprune.pruning.streaming.state import folder_of

WANDA = {"method": "wanda", "repair": "least-squares:target=auto"}
HOW: list[dict[str, Any]] = [
    WANDA,
    {**WANDA, "allocation": "global:multiple=5"},
    {"method": "magnitude-l2-both", "repair": None},
]
ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = make_model("llama", intermediate_size=91).to(request.param)
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    return tmp_path / "dense"


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors travel in pieces of 1,000 bytes, on a CPU too."""
    monkeypatch.setattr(shards, "CHUNK", 1000)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    made = pages.Pages.__init__

    def making(self: pages.Pages, folder: Path, device: torch.device = pages.CPU) -> None:
        made(self, folder, device)
        self.transfer = self.transfer or transfer.Transfer(device)

    monkeypatch.setattr(pages.Pages, "__init__", making)


def stream(source: Path, out: Path, ids: torch.Tensor, how: dict[str, Any], **more: Any) -> Any:
    text = None if how["repair"] is None else ids
    return prune_checkpoint(source, out, 0.6, text=text, max_shard_size="20KB", **how, **more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def check_same(folder: Path, other: Path) -> None:
    a, b = tensors(folder), tensors(other)
    assert a.keys() == b.keys()
    assert {k: float((a[k] - b[k]).abs().max()) for k in a if not torch.equal(a[k], b[k])} == {}
    assert (folder / "config.json").read_bytes() == (other / "config.json").read_bytes()


@pytest.mark.parametrize("device", ON)
def test_pieces_on_their_way(device: str, tmp_path: Path, pieces: None) -> None:
    values = torch.randn(37, 113, generator=torch.Generator().manual_seed(0))
    held = {"a": values, "b": values.bfloat16(), "c": torch.arange(7), "d": torch.tensor(3.0), "e": torch.ones(0, 4)}
    save_file(held, tmp_path / "model.safetensors")
    where, known = place_of(device), shards.Shards(tmp_path)
    move = transfer.Transfer(where)
    for name, wanted in held.items():
        found = move.read(known, name)
        move.arrive([found])
        assert found.device == where and found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted)
        back = [piece.clone() for piece in move.leave(found * 2, move.mark())]
        assert all(piece.device.type == "cpu" and piece.nbytes <= 1000 for piece in back)
        assert torch.equal(torch.cat([*back, torch.empty(0, dtype=wanted.dtype)]).view(wanted.shape), wanted * 2)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("how", HOW, ids=["fit", "global", "magnitude"])
def test_the_same_as_in_memory_and_after_every_kill(
    device: str,
    how: dict[str, Any],
    source: Path,
    tmp_path: Path,
    more_ids: torch.Tensor,
    pieces: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden states are kept after every second layer; what was written since is written again."""
    model = loading.load_model(str(source), "auto", device)
    text = None if how["repair"] is None else more_ids
    made = prune(model, 0.6, text=text, **how)
    checkpoint.save(model, tmp_path / "memory")
    asked: list[int] = []
    monkeypatch.setattr(pruner, "SELDOM", 1e9)
    report = stream(source, tmp_path / "seldom", more_ids, how, device=device)
    check_same(tmp_path / "seldom", tmp_path / "memory")
    assert report.mask == made.mask and report.layers == made.layers
    assert (report.device_peak_bytes > 0) == (made.device_peak_bytes > 0) == (device == "cuda")

    monkeypatch.setattr(pruner.StreamedPruner, "_due", lambda self: not asked.append(1) and len(asked) % 2 == 0)
    write, left = pruner.StreamedPruner._write, [0]

    def stopping(self: Any, block: int, *what: Any) -> None:
        write(self, block, *what)
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(pruner.StreamedPruner, "_write", stopping)
    for stop in (1, 2, 1, 2, 3):
        left = [stop]
        try:
            stream(source, tmp_path / "out", more_ids, how, device=device)
            break
        except Killed:
            assert not (tmp_path / "out").exists()
    else:
        left = [9]
        stream(source, tmp_path / "out", more_ids, how, device=device)
    check_same(tmp_path / "out", tmp_path / "memory")
    assert not folder_of(tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["device", "memory", "spilled"])
def test_where_hidden_states_are(
    where: str, source: Path, tmp_path: Path, more_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "memory":
        monkeypatch.setattr(pruner, "device_available", lambda device: 0)
    kept, seen = pruner.StreamedPruner._stream_from, []

    def seeing(self: Any, *what: Any) -> Any:
        found = kept(self, *what)
        seen.append((found._hidden.device.type, found._hidden.is_pinned(), found._twin.device.type))
        return found

    monkeypatch.setattr(pruner.StreamedPruner, "_stream_from", seeing)
    spill = tmp_path / "spill" if where == "spilled" else None
    stream(source, tmp_path / "out", more_ids, WANDA, device="cuda", spill=spill)
    places = {"device": ("cuda", False, "cuda"), "memory": ("cpu", True, "cpu"), "spilled": ("cpu", False, "cpu")}
    assert seen == [places[where]]
    model = loading.load_model(str(source), "auto", "cuda")
    prune(model, 0.6, text=more_ids, **WANDA)
    checkpoint.save(model, tmp_path / "memory")
    check_same(tmp_path / "out", tmp_path / "memory")


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_16_bits_are_as_exact_as_of_32(device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, more = (torch.randn(600, size, generator=generator).to(device, dtype) for size in (1301, 70))
    sums = Moments(1301, 70, torch.device(device), True, True)
    for rows in (slice(0, 320), slice(320, 600)):
        sums.add(a[rows], more[rows])
    stats = sums.to_stats()
    assert stats.gram is not None and stats.cross is not None
    for found, wanted in ((stats.gram, a.double().t() @ a.double()), (stats.cross, a.double().t() @ more.double())):
        # Sums of 320 float32, each of which rounds by 2**-24 at most, or is cut off by 2**-23 in matrix units.
        assert float((found - wanted).abs().max()) < 320 * 2.0**-23 * float(wanted.abs().max())


DEVICES = {"tpu": "be cpu or cuda", "cuda:99": "be (cpu, for torch sees no|one of the)", "meta": "be cpu or cuda"}


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_are_not_there(device: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"device must {DEVICES[device]}"):
        prune_checkpoint(source, tmp_path / "out", device=device)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.gpu
def test_the_verb_streams_what_the_device_cannot_hold(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyprune.cli.streamed.device_available", lambda device: 1000)
    how = ["--method", "wanda", "--tokens", "2048", "--window", "128", "--text", "builtin", "--json"]
    run = CliRunner().invoke(app, ["prune", str(tiny_checkpoint), "--out", str(tmp_path / "out"), *how])
    assert run.exit_code == 0, run.stderr
    assert "they are streamed" in run.stderr
    assert '"device_peak_bytes": 0' not in run.stdout
