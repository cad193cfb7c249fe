"""PrunedMoE: the experts of one layer over neuron-major records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import reference
from ..base.errors import UnsupportedModelError, check, check_choice
from ..base.experts import Experts, ragged
from ..base.memory import Room
from ..model.expert_form import activation, tensor_names, why_no_record
from ..model.experts import Bank
from ..model.mask import KeepIndex
from . import moe_choice
from .mlp import MODES
from .mlp_state import NO_PROJECTION, NoProjectionError, fitting
from .moe_operator import BACKENDS as KERNELS
from .moe_operator import MOE, arguments, kernel_on
from .operators import check_dual, dual
from .quantisation import WEIGHTS, cast, channel_scales, dequantise

BACKENDS = ("auto", *KERNELS)


def _fill(rows: Tensor, scales: Tensor | None, part: int, given: Tensor, channels: Tensor | None = None) -> None:
    """Write part `part` of every expert's record, from `given` `[E, F, D]` over `channels`; `rows` `[E, F, P*D]` say in
    which dtype.
    """
    d = given.shape[2]
    for expert, own in enumerate(given):
        own = own if channels is None else own / channels
        columns = rows[expert, :, part * d : (part + 1) * d]
        if own.dtype == rows.dtype:
            columns.copy_(own)
            continue
        found, steps = cast(own.contiguous(), 1, rows.dtype)
        columns.copy_(found)
        if scales is not None and steps is not None:
            scales[expert, :, part : part + 1] = steps


class PrunedMoE(nn.Module):
    """The experts of a layer, each a record: `y[t] = sum over k of weights[t, k] * ffn(x[t], expert index[t, k])`.

        >>> from transformers import AutoModelForCausalLM, Qwen3MoeConfig
        >>> small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        >>> config = Qwen3MoeConfig(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **small)
        >>> model = accelerate(AutoModelForCausalLM.from_config(config), backend="torch")
        >>> model.model.layers[0].mlp.experts
        PrunedMoE(gated, E=4, D=32, F=16, silu, torch)

    It takes the place of a Transformers module of experts (`model.experts.Bank`), is called as that is, and its
    `state_dict` has the names, shapes and dtype of it, so a model that holds it saves and loads as its family does.

    Attributes:
        record: `[E, F, P*D]` parameter, rows [up | down] or [gate | up | down] of each expert; int8, or any dtype that
            mixes with `dtype` (see `Record.check_dtype`).
        scales: `[E, F, P]` float32 buffer with int8 records, which no cast of the module changes, else None.
        channel_scales: `[D]` buffer with int8 records, which results are multiplied by, see
            `quantisation.channel_scales`; down rows in the record are divided by it. Else None.
        index, counts: int32 buffers in gather mode, the neurons that run of each expert (see `Experts`), else None.
        dtype: of x, and of the tensors in the `state_dict`.
        picked: how many experts a token is expected to go to; only the choice of a backend depends on it.
        batch_invariant: whether a row of the result is independent, to the bit, of the rows beside it, at the price of
            speed with many rows. Two calls give the same bits either way.
    """

    scales: Tensor | None
    channel_scales: Tensor | None
    index: Tensor | None
    counts: Tensor | None

    def __init__(
        self,
        experts: Experts,
        bank: Bank,
        *,
        dtype: torch.dtype,
        backend: str = "auto",
        batch_invariant: bool = False,
        picked: int = 2,
        channel_scales: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_choice(backend, "backend", BACKENDS)
        experts.one(0).check_dtype(dtype, "dtype")
        self.gated, self.activation = experts.gated, experts.activation
        self.backend, self.batch_invariant, self.picked = backend, batch_invariant, picked
        self.num_experts, self.hidden_size, self.intermediate_size = len(experts.rows), experts.hidden_size, bank.size
        # Of the module that this stands for: how its tensors lie, and their shapes.
        names = list(dict.fromkeys(tensor_names(bank)))
        self._bank = bank.over({name: bank.tensor(name).detach().to("meta") for name in names})
        self.record = nn.Parameter(experts.rows, requires_grad=experts.rows.is_floating_point())
        for name in ("scales", "index", "counts"):
            self.register_buffer(name, getattr(experts, name), persistent=False)
        self.register_buffer("channel_scales", channel_scales, persistent=False)
        self._set_dtype(dtype)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.native_pairs = moe_choice.native_pairs(self.experts, dtype, self.picked)

    def __getattr__(self, name: str) -> Any:
        bank = self.__dict__.get("_bank")
        if bank is not None and name in tensor_names(bank):
            raise NoProjectionError(NO_PROJECTION)
        return super().__getattr__(name)

    @property
    def _parts(self) -> int:
        return 3 if self.gated else 2

    @property
    def experts(self) -> Experts:
        """The records."""
        return Experts.unchecked(self.record, self.gated, self.activation, self.scales, self.index, self.counts)

    @classmethod
    @torch.no_grad()
    def from_bank(
        cls,
        bank: Bank,
        keep: Sequence[KeepIndex] | None = None,
        mode: str = "compact",
        backend: str = "auto",
        weights: str | None = None,
        room: Room | None = None,
        batch_invariant: bool = False,
        picked: int = 2,
    ) -> PrunedMoE:
        """Build one from a bank of experts, which stays as it is.

        Args:
            bank: what `families.find_ffns` found (`Expert.of_bank`).
            keep: of each expert the neurons that run, in gather mode; see `set_keep`.
            mode: `compact`, or `gather`, which holds all neurons and reads only those kept.
            backend: `auto`, `torch`, `cpu`, `triton` or `cuda`.
            weights: dtype of the records, a key of `quantisation.WEIGHTS`; None for that of the bank.
            room: where the records are to lie, or None for anywhere.
            batch_invariant, picked: see the attributes.

        Raises:
            InputError: unknown mode, backend or weights, `keep` without `gather` or the other way round or of other
                experts, or a weight that is not finite in the dtype asked for.
            UnsupportedModelError: the experts cannot run from records.
        """
        check_choice(mode, "mode", MODES)
        check_choice(weights or "float32", "weights", WEIGHTS)
        check((keep is not None) == (mode == "gather"), "keep", "be given in gather mode, and there alone", mode)
        if reason := why_no_record(bank):
            raise UnsupportedModelError(f"{bank.name} ({type(bank.module).__name__}) cannot run from records: {reason}")
        parts = bank.all_weights().parts
        e, f, d = parts[0].shape
        own, device = parts[0].dtype, parts[0].device
        dtype = own if weights is None else WEIGHTS[weights]
        shape = (e, f, len(parts) * d)
        rows = torch.empty(shape, dtype=dtype, device=device) if room is None else room.take(shape, dtype, device)
        scales = torch.empty(e, f, len(parts), device=device) if dtype == torch.int8 else None
        channels = channel_scales(parts[-1]) if dtype == torch.int8 else None
        for part, given in enumerate(parts):
            _fill(rows, scales, part, given, channels if part == len(parts) - 1 else None)
        name = activation(bank)
        assert name is not None
        experts = Experts(rows, len(parts) == 3, name, scales)
        module = cls(
            experts,
            bank,
            dtype=own,
            backend=backend,
            batch_invariant=batch_invariant,
            picked=picked,
            channel_scales=channels,
        )
        if keep is not None:
            module.set_keep(keep)
        wanted = any(p.requires_grad for p in bank.module.parameters())
        module.record.requires_grad_(wanted and rows.is_floating_point())
        return module.train(bank.module.training)

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_keep(self, keep: Sequence[KeepIndex] | None) -> None:
        """Run these neurons of each expert from now on, of the same records: any number of each.

        What was compiled before is compiled again; a CUDA graph that was captured before must not be replayed, for the
        memory where it reads which neurons run is freed, and must be captured again.

        Args:
            keep: one an expert, each of all F neurons; None for all of every expert.

        Raises:
            InputError: not one an expert, or of another width; nothing has changed then.
        """
        if keep is None:
            self.index = self.counts = None
        else:
            check(len(keep) == self.num_experts, "keep", f"have one of each of {self.num_experts} experts", len(keep))
            for one in keep:
                size = self.intermediate_size
                check(one.intermediate_size == size, "keep", f"refer to {size} neurons", one.intermediate_size)
            self.index, self.counts = ragged([one.neurons for one in keep], self.record.device)
        self._set_dtype(self.dtype)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Hidden states `[..., D]`, and of each token experts (integers) and weights `[..., K]` in either order.

        Returns:
            `[..., D]`, as the module that this stands for gives it.

        Raises:
            InputError: x has another width, dtype or device than the records, or the router names an expert that there
                is not (the token becomes NaN where kernels run on a GPU).
            BackendError: the forced backend cannot run this.
        """
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        check(len(given) >= 3, "call", "bring hidden states, experts and weights", len(given))
        hidden, index, weights = given[:3]
        if index.is_floating_point():
            index, weights = weights, index
        x = hidden.reshape(-1, hidden.shape[-1])
        tokens = x.shape[0]
        index, weights = (t.reshape(tokens, t.shape[-1]) for t in (index, weights))
        experts = self.experts
        experts.check_call(x, index, weights)
        backend = self.backend
        needed = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad or self.record.requires_grad)
        if needed or dual():
            check_dual(backend, self.batch_invariant)
            if backend == "auto" and not self.batch_invariant and not torch.compiler.is_compiling():
                # Training differentiates plain torch itself, which saves what the backward pass needs.
                experts.check_index(index)
                return self._scaled(reference.moe(x, experts, index, weights)).view(hidden.shape)
            backend = "torch" if backend == "auto" else backend
        if backend == "auto":
            pairs = self.picked if self.batch_invariant else index.numel()
            # Those of another dtype than expected are for torch.
            kernel = "cpu" if kernel_on(self.record.device.type) == "cpu" else "auto"
            backend = kernel if x.dtype == self.dtype and 0 < pairs <= self.native_pairs else "torch"
        out = MOE(*arguments(x, experts, index, weights, backend, self.batch_invariant))
        return self._scaled(out).view(hidden.shape)

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.channel_scales is None else out * self.channel_scales

    def _family_tensors(self) -> dict[str, Tensor]:
        """The tensors of the module that this stands for, under its names."""
        of, d = self._bank, self.hidden_size
        tensors = {
            name: torch.empty(tensor.shape, dtype=self.dtype, device=self.record.device)
            for name in dict.fromkeys(tensor_names(of))
            for tensor in [of.tensor(name)]
        }
        for part, place in enumerate(of.over(tensors).all_weights().parts):
            for expert, own in enumerate(place):
                rows = self.record.detach()[expert, :, part * d : (part + 1) * d]
                scales = None if self.scales is None else self.scales[expert, :, [part]]
                own.copy_(dequantise(rows, scales, 1, self.dtype))
            if self.channel_scales is not None and part == self._parts - 1:
                place.mul_(self.channel_scales)
        return tensors

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: tensor for name, tensor in self._family_tensors().items()})

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = tensor_names(self._bank)
        tensors = {name: self._bank.tensor(name) for name in names}
        shapes = {name: old.shape for name, old in tensors.items()}
        found = fitting(state_dict, prefix, shapes, missing_keys, error_msgs)
        tensors |= {name: new.to(self.record.device) for name, new in found.items()}
        if strict:
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k[len(prefix) :] not in names)
        for part, given in enumerate(self._bank.over(tensors).all_weights().parts):
            if not given.is_meta or self.record.is_meta:
                last = self.channel_scales if part == self._parts - 1 else None
                if last is not None:
                    last.copy_(channel_scales(given.to(last.dtype)))
                _fill(self.record, self.scales, part, given, last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrunedMoE:
        exact = self.scales
        super()._apply(fn, recurse)
        if exact is not None and self.scales is not None and self.scales.dtype != torch.float32:
            self.scales = exact.to(self.scales.device)
        self._set_dtype(fn(torch.empty(0, dtype=self.dtype, device=self.record.device)).dtype)
        return self

    def extra_repr(self) -> str:
        kind, own = "gated" if self.gated else "plain", self.record.dtype
        weights = "" if own == self.dtype else f", {str(own).removeprefix('torch.')} weights"
        size = f"E={self.num_experts}, D={self.hidden_size}, F={self.intermediate_size}"
        if self.counts is not None:
            low, high = (int(n) for n in self.counts.aminmax())
            size += f", gather {low}" + (f" to {high}" if high > low else "")
        invariant = ", batch-invariant" if self.batch_invariant else ""
        return f"{kind}, {size}, {self.activation}, {self.backend}{weights}{invariant}"
