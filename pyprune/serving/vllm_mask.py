"""A mask that is chosen when vLLM starts: of the dense checkpoint only the kept neurons are loaded.

In one process there is one mask, so the rows of the others are of no use there: what vLLM builds is what it builds for
the pruned checkpoint, as fast at every number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..base.errors import CheckpointError, UnsupportedModelError, check
from ..model import families, provenance
from ..model.loading import load_model
from ..model.mask import KeepIndex, Mask
from ..model.widths import set_layers


class Cut:
    """What a mask makes of a dense checkpoint.

    Args:
        folder: the checkpoint, which is read once to see whether the mask is its own.
        mask: file of the mask.

    Raises:
        InputError: the mask belongs to another model, or the model is pruned already.
        CheckpointError: either cannot be read.
        UnsupportedModelError: FFNs that are not one a layer.
    """

    def __init__(self, folder: str, mask: str) -> None:
        found = Mask.load(mask)
        dense = load_model(folder, "auto")
        pruned = provenance.read(dense.config).get("ffn")
        check(not pruned, "model", "be the dense checkpoint, whose neurons the mask numbers", folder)
        ffns = families.find_plain(dense, "a mask at start")
        found.check_fits([ffn.intermediate_size for ffn in ffns], families.fingerprint(dense, ffns))
        self.block = families.ffn_block(dense, ffns)
        if "modules" in self.block:
            raise UnsupportedModelError(
                f"a mask at start needs one FFN of one form in every layer; {folder} has others"
            )
        self.layers: tuple[KeepIndex, ...] = found.layers

    def narrow_config(self, config: Any) -> None:
        """Write the mask's widths into vLLM's config of the model, as those of a pruned checkpoint stand there."""
        set_layers(config, self.block, [len(keep) for keep in self.layers])

    def narrow(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the dense checkpoint, those of FFNs with the kept neurons only.

        Raises:
            CheckpointError: at the end, some were missing; or one is not as wide as its layer.
        """
        blocks = {f"{path}.{part}": count for path, count in self.block["in"] for part in ("weight", "bias")}
        blocks[f"{self.block['out']}.weight"] = 1
        place = re.compile(rf"(?:^|\.){re.escape(self.block['layers'].rpartition('.')[2])}\.(\d+)\.(.+)$")
        waiting = {(i, name) for i in range(len(self.layers)) for name in blocks if name.endswith("weight")}
        for name, tensor in weights:
            match = place.search(name)
            layer = int(match[1]) if match else len(self.layers)
            if match and layer < len(self.layers) and match[2] in blocks:  # others may follow, for drafts
                tensor = self._kept(name, tensor, self.layers[layer], blocks[match[2]], match[2])
                waiting.discard((layer, match[2]))
            yield name, tensor
        if waiting:
            raise CheckpointError(f"the checkpoint lacks {len(waiting)} tensors of FFNs, the first is {min(waiting)}")

    def _kept(self, name: str, tensor: Tensor, keep: KeepIndex, blocks: int, path: str) -> Tensor:
        size = keep.intermediate_size
        index = torch.cat([keep.neurons.long() + block * size for block in range(blocks)])
        # Neurons lie along the first side of a weight [out, in] that leads into an FFN; of a Conv1D along the other.
        sides = list(range(tensor.ndim))
        for side in reversed(sides) if path == f"{self.block['out']}.weight" else sides:
            if tensor.shape[side] == blocks * size:
                return tensor.index_select(side, index)
        raise CheckpointError(f"{name} must have a side of {blocks * size}; got {list(tensor.shape)}")
