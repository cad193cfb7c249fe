"""What `bench.model.worth` judges: dense, pruned and recovered checkpoints, their GGUF files, and the bytes of both."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from bench.engines.places import LLAMA_BIN
from bench.engines.run import _quantise as quantise
from pyprune import accelerate
from pyprune.base.errors import InputError, check, check_choice
from pyprune.model import loading, provenance
from pyprune.serving.gguf_base import Base, heads_apart, package
from pyprune.serving.gguf_export import to_gguf
from pyprune.serving.gguf_plan import of_ffn
from pyprune.speed.timing import ffn_units

DENSE = "dense"
# By how many percent of the neurons; `recovered` is what `pyprune prune --best` makes.
CHECKPOINTS = (DENSE, *(f"removed-{n}" for n in (10, 20, 30, 40, 50)), "recovered-30", "recovered-50")
OURS, LLAMA = "pyprune", "llama.cpp"
# What the weights are kept in; ours are of the FFNs alone, llama.cpp's of all matrices but the embedding.
FORMATS = {OURS: ("bf16", "int8", "int4"), LLAMA: ("bf16", "q8_0", "q4_0", "q4_1")}
_PROGRAMS = ("llama-bench", "llama-quantize")


@dataclass(frozen=True)
class Files:
    """Where checkpoints lie.

    Attributes:
        model: the dense one, MODEL as for the command line.
        work: the folder of what is made.
        given: folders of checkpoints that are not to be made.
    """

    model: str
    work: Path
    given: Mapping[str, Path]

    @classmethod
    def of(cls, model: str, work: Path, given: list[str]) -> Files:
        """From the words of the command line, `LABEL=PATH` each.

        Raises:
            InputError: another form, an unknown label, or no such folder.
        """
        found = {}
        for text in given:
            label, sign, path = text.partition("=")
            check(bool(sign), "checkpoint", "be LABEL=PATH", text)
            check_choice(label, "checkpoint", CHECKPOINTS[1:])
            check(Path(path).is_dir(), "checkpoint", f"name an existing folder for {label}", path)
            found[label] = Path(path)
        return cls(model, work, found)

    @property
    def source(self) -> Path | None:
        """The GGUF file of the dense model; None where it comes as something else."""
        file = loading.demo_file() if self.model == loading.DEMO else Path(self.model)
        return file if file.suffix == ".gguf" else None

    def why_no_llama(self) -> str | None:
        """What the rows of llama.cpp lack; None for nothing."""
        lacking = [name for name in _PROGRAMS if not (LLAMA_BIN / name).is_file()]
        if lacking:
            return f"{', '.join(lacking)} (make engines)"
        return None if self.source else "the dense model as a GGUF file"

    def checkpoint(self, label: str) -> str:
        """MODEL of a checkpoint, made by `pyprune prune` and its defaults where it is not there yet."""
        if label == DENSE:
            return self.model
        if label in self.given:
            return str(self.given[label])
        folder = self.work / label
        if not folder.is_dir():
            kind, _, percent = label.partition("-")
            command = [sys.executable, "-m", "pyprune", "prune", self.model, "--keep", f"{1 - int(percent) / 100:g}"]
            command += ["--best"] if kind == "recovered" else []
            subprocess.run([*command, "--out", str(folder)], check=True)
        return str(folder)

    def load(self, label: str, weights: str, measure: bool) -> Any:
        """A checkpoint in bfloat16, its FFNs accelerated in one of our formats; `measure` as of `accelerate`."""
        model = loading.load_model(self.checkpoint(label), "bfloat16", "cpu")
        return accelerate(model, weights=None if weights == "bf16" else weights, measure=measure)

    def made(self, label: str) -> dict[str, Any]:
        """How a checkpoint came about, from its config: calibration tokens, and recovery."""
        if label == DENSE:
            return {}
        block = provenance.read(loading.checkpoint.read_config(self.checkpoint(label)))
        recovery = [{k: one[k] for k in ("steps", "best", "tokens")} for one in block.get("recovery", [])]
        return {"tokens": block["provenance"]["tokens"], "recovery": recovery}

    def gguf(self, label: str, kind: str) -> Path:
        """A checkpoint as a file of llama.cpp's, in the work folder; quantised by its own program from bfloat16."""
        target = self.work / f"{label}-{kind}.gguf"
        if target.is_file():
            return target
        if self.source is None:
            raise InputError(f"model must be a GGUF file for {LLAMA}; got {self.model!r}")
        if kind != "bf16" or label == DENSE:
            quantise(self.source if label == DENSE and kind == "bf16" else self.gguf(label, "bf16"), target, kind)
            return target
        model, base = loading.load_model(self.checkpoint(label), "bfloat16"), self.gguf(DENSE, "bf16")
        if not provenance.read(model.config).get("recovery"):
            to_gguf(model, base, target)
            return target
        with TemporaryDirectory(dir=self.work) as folder:
            own_base(model, base, own := Path(folder) / "base.gguf")
            to_gguf(model, own, target)
        return target


def own_base(model: nn.Module, dense: Path, out: Path) -> None:
    """The dense model's file with what a checkpoint has outside its FFNs, for recovery trains that too.

    `to_gguf` then compares every tensor with the checkpoint's.
    """
    gguf = package()
    shutil.copyfile(dense, out)
    base, reader = Base(dense), gguf.GGUFReader(out, "r+")
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == base.arch)
    names = gguf.get_tensor_name_map(arch, base.layers)
    own = {names.get_name(key, try_suffixes=(".weight", ".bias")): t for key, t in model.state_dict().items()}
    for tensor in reader.tensors:
        if of_ffn(tensor.name) or tensor.name not in own:
            continue
        values = own[tensor.name].float()
        if base.arch == "llama" and (".attn_q." in tensor.name or ".attn_k." in tensor.name):
            values = values[torch.from_numpy(heads_apart(len(values), base.heads(tensor.name)))]
        tensor.data[:] = gguf.quants.quantize(values.numpy(), tensor.tensor_type)
        tensor.data.flush()


def sizes(model: Any) -> dict[str, int]:
    """Bytes of an accelerated model's weights, of its FFNs', and those that a decode step of one token reads."""
    every = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = head is not None and head.weight is not table.weight
    unread = table.weight.nbytes - table.weight[0].nbytes if apart else 0
    return {"bytes": every, "ffn_bytes": sum(unit.bytes for unit in ffn_units(model)), "read_bytes": every - unread}


def gguf_sizes(path: Path) -> dict[str, int]:
    """The same of a GGUF file's tensors, and the whole file's."""
    tensors = Base(path).tensors
    every = sum(int(t.n_bytes) for t in tensors.values())
    table = tensors["token_embd.weight"]
    unread = int(table.n_bytes) - int(table.n_bytes) // int(table.shape[1]) if "output.weight" in tensors else 0
    ffns = sum(int(t.n_bytes) for name, t in tensors.items() if of_ffn(name))
    return {"bytes": every, "ffn_bytes": ffns, "read_bytes": every - unread, "file_bytes": path.stat().st_size}
