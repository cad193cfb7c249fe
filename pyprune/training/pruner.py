"""Pruning neurons while a model trains: masks by a schedule, scores that learn, and the cut at the end.

config = TrainingConfig(method=Gum(similarity=0.5), keep=0.3, steps=1000, warmup=100, cooldown=300)
pruner = TrainingPruner(model, config)
for t in range(1000):
    pruner.before_step(t)      # masks by the schedule
    loss(model).backward()     # once, or several times to accumulate
    pruner.step()              # scores; then the optimizer's own step
    optimizer.step()
    optimizer.zero_grad()
mask = pruner.finish()         # the model is narrower now; `checkpoint.save` writes it

The optimizer may go on afterwards: parameters stay the same objects, and its moments keep the rows that stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import CheckpointError, InputError, UnsupportedModelError, check
from ..base.ranks import Ranks
from ..model import families, surgery
from ..model import provenance as model_provenance
from ..model.mask import KeepIndex, Mask
from ..model.units import tied
from ..model.weights import is_sharded
from ..pruning.importance.base import NEEDS
from . import gathering, methods, persist, selection
from .config import TrainingConfig
from .masks import NeuronMask
from .methods import Gathered, Moment, State
from .optimizers import Cut, Optimizers

FILE = "pruning.safetensors"
_FORMAT = "pyprune-training-1"


class TrainingPruner:
    """Prunes the FFN neurons of a model during training. The weights stay dense until `finish`.

    In an initialised `torch.distributed` group the processes train one model, as DistributedDataParallel does: what
    scores learn from is the mean over them, and all have the same masks. Everything here is then called by every one.
    Weights may be cut over the processes by FSDP2 (`fully_shard`), but for criteria that want them whole; `finish` then
    puts the narrower model together in another one.

    Args:
        model: a causal LM of Transformers, as it is inside DistributedDataParallel; its down projections get forward
            pre-hooks until `finish` or `remove`.
        config: what to do.
        together: with all processes of the group; False: this process trains a model of its own.

    Attributes:
        done: optimizer steps taken.

    Raises:
        InputError: the model is masked already, or the multiple leaves no narrower width.
        UnsupportedModelError: an FFN that pyprune does not know, or that cannot be masked or judged; the model is
            unchanged then.
    """

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, config: TrainingConfig, together: bool = True) -> None:
        self._ranks = Ranks.joined(together)
        for name, module in model.named_modules():
            hooks = module._forward_pre_hooks.values()
            masked = any(isinstance(getattr(hook, "__self__", None), NeuronMask) for hook in hooks)
            check(not masked, "model", "not be masked by another pruner (see its `remove`)", name)
        self.model, self.config, self.done = model, config, 0
        self._method = methods.parse(config.method)
        self._sharded = is_sharded(model)
        reads = self._sharded and self._method.reads_weights
        rule = "be one without a criterion where weights are cut over processes (FSDP2)"
        check(not reads, "method", rule, self._method.NAME)
        self._ffns = families.find_ffns(model, sharded=self._sharded)
        self._check_learnable()
        if self._method.cutoff(self._moment(0)) is None:
            sizes = [ffn.intermediate_size for ffn in self._ffns]
            selection.check_narrows(sizes, config.scope, config.keep, config.floor, config.multiple)
        self._block = families.ffn_block(model, self._ffns)
        self._fingerprint = families.fingerprint(model, self._ffns)
        self._ranks.check_same({"checkpoint": self._fingerprint, "config": config.to_json()})
        self._states: list[State] = []
        for ffn in self._ffns:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + ffn.layer)
            self._states.append(self._method.start(ffn, generator))
        self._moved = [False] * len(self._ffns)
        needs = self._method.needs
        asked = needs & NEEDS.keys()
        self._masks = [NeuronMask(ffn, "gradient" in needs, "products" in needs, asked) for ffn in self._ffns]
        self._optimizers = Optimizers()
        self._share: float | None = None  # v(t) of the masks in force

    def _check_learnable(self) -> None:
        """Raise `UnsupportedModelError` for an FFN that cannot be masked, or judged in several places at once."""
        for ffn in self._ffns:
            _ = ffn.down  # which experts whose weights lie in a tensor refuse
            if (ffn.twins or ffn.shared) and self._method.needs & {"gradients", "gradients2"}:
                raise UnsupportedModelError(
                    f"{ffn.name} runs in several places, where the gradients of criteria are not gathered: "
                    f"method {self._method.NAME} must have another criterion there"
                )

    @property
    def masks(self) -> list[Tensor]:
        """One `[F]` bool tensor a layer, true for the neurons that work now."""
        return [mask.keep.clone() for mask in self._masks]

    @property
    def scores(self) -> list[Tensor]:
        """One `[F]` tensor a layer; the highest are kept."""
        return [state["scores"].clone() for state in self._states]

    @property
    def widths(self) -> list[int]:
        """Neurons that work now, in each layer."""
        return [int(mask.keep.sum()) for mask in self._masks]

    @property
    def keep(self) -> float:
        """Share of all neurons that works now."""
        return sum(self.widths) / sum(mask.keep.numel() for mask in self._masks)

    def _moment(self, step: int) -> Moment:
        schedule = self.config.schedule
        return Moment(step, schedule(step), schedule.progress(step), step >= schedule.end)

    def _alive(self) -> None:
        check(bool(self._masks), "pruner", "not have been finished or removed", "one that was")

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Put the masks of optimizer step t = `step` in force, and start gathering.

        Raises:
            InputError: `step` is not the number of steps taken so far, or the schedule ends and the method did not get
                to its share (`l0`).
        """
        self._alive()
        check(step == self.done, "step", f"be {self.done}, the number of steps taken so far", step)
        self._set_masks(final=step >= self.config.schedule.end)

    def _set_masks(self, final: bool) -> None:
        """Masks by the share of this step, `final` ones rounded to multiples and without gates."""
        for ffn, state in zip(self._ffns, self._states, strict=True):  # the model may have moved
            device = ffn.weights().down.device
            for name, tensor in state.items():
                state[name] = tensor.to(device)
        moment = replace(self._moment(self.done), final=final)
        gates = self._method.prepare(self._states, moment, self.config.scope)
        scores = [state["scores"] for state in self._states]
        multiple = self.config.multiple if final else 1
        cutoff = self._method.cutoff(moment)
        if cutoff is not None:
            widths = selection.threshold_widths(scores, cutoff, self.config.floor, multiple)
        elif self.config.scope == "global":
            widths = selection.global_widths(scores, moment.keep, self.config.floor, multiple)
        else:
            widths = selection.layer_widths(scores, moment.keep, self.config.floor, multiple)
        if final:  # experts of a layer that are modules of their own keep one width
            pairs = zip(tied(self._ffns, widths), scores, strict=True)
            widths = [selection.round_width(width, multiple, len(score)) for width, score in pairs]
        keeps = [selection.top(score, width) for score, width in zip(scores, widths, strict=True)]
        if self._ranks.several:  # the first rank's: other hardware may round otherwise
            whole = torch.cat(keeps)
            found = self._ranks.exchange({"keep": whole} if self._ranks.rank == 0 else {}, whole.device)["keep"]
            keeps = list(found.split([len(keep) for keep in keeps]))
        for i, (mask, keep) in enumerate(zip(self._masks, keeps, strict=True)):
            mask.set(keep, None if gates is None else gates[i])
        self._share = moment.keep

    @torch.no_grad()
    def step(self) -> None:
        """Update the scores by the gradients of this step; call it after the last backward pass and any clipping,
        before the optimizer's step.

        Raises:
            InputError: gradients or scores that are not finite (the message names layer and step), no backward pass
                through the masks since `before_step`, or no `before_step` at all.
        """
        self._alive()
        check(self._share is not None, "step", "follow before_step", "no before_step since the last step")
        gradients = [mask.gradient for mask in self._masks]
        if "gradient" in self._method.needs:
            some = any(g is not None for g in gradients)
            check(some, "step", "follow a backward pass of the model in training mode", "no gradient of any mask")
            gradients = [
                torch.zeros_like(mask.keep, dtype=torch.float32) if g is None else g
                for g, mask in zip(gradients, self._masks, strict=True)
            ]
            gradients = self._mean([g for g in gradients if g is not None])
            self._check_finite([g for g in gradients if g is not None], "score gradients")
        products = [mask.products for mask in self._masks]
        self._ranks.add(*(p for p in products if p is not None))
        moment = self._moment(self.done)
        every = zip(self._ffns, self._states, self._masks, gradients, products, strict=True)
        for ffn, state, mask, gradient, product in every:
            before = state["scores"]
            gathered = Gathered(ffn, len(self._ffns), gradient, product, mask.statistics(self._ranks))
            self._method.update(state, gathered, moment)
            if not self._moved[ffn.layer]:
                self._moved[ffn.layer] = not torch.equal(before, state["scores"])
        self._check_finite([state["scores"] for state in self._states], "scores")
        self.done += 1
        self._share = None

    def _mean(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """Over the ranks, as DistributedDataParallel takes it of the weights' gradients."""
        if not self._ranks.several:
            return [*gradients]
        whole = torch.cat(gradients)
        self._ranks.add(whole)
        return [*(whole / self._ranks.size).split([len(g) for g in gradients])]

    def _check_finite(self, values: list[Tensor], what: str) -> None:
        finite = torch.stack([v.isfinite().all().cpu() for v in values]).tolist()
        if not all(finite):
            layer = finite.index(False)
            bad = int((~values[layer].isfinite()).sum())
            rule = f"{what} of layer {layer} must be finite at step {self.done}"
            raise InputError(f"{rule}; got {bad} of {values[layer].numel()} that are not")

    def remove(self) -> None:
        """Take the masks off; the model is dense again, and this pruner is done for."""
        for mask in self._masks:
            mask.remove()
        self._masks = []
        self._optimizers.stop()

    @torch.inference_mode(False)
    def finish(
        self,
        provenance: dict[str, Any] | None = None,
        optimizers: Iterable[Any] = (),
        into: nn.Module | None = None,
    ) -> Mask:
        """Cut the neurons that are masked out of the model, in place, and write the widths into its config.

        The masks are those the last step trained with, if that was in the cool-down; without one they are set once
        more, to the share that has been reached.

        Args:
            provenance: facts about the run (text, versions) that go into the mask and the checkpoint.
            optimizers: that keep state for the model's parameters and are to go on. Those that took a step since this
                pruner was made need not be named; one that is neither fails at its next step, by shapes that differ.
            into: where weights are cut over processes, and only there: a model of the same config, whole, on the first
                process (others may give None), which gets the weights and is cut; the trained one stays dense.

        Returns:
            The mask, with the fingerprint of the model as it was before training.

        Raises:
            InputError: `provenance` holds something else than JSON values, `into` is missing or of another shape, or as
                `before_step`.

        Warns:
            UserWarning: the schedule has not ended, the scores of a layer never moved, no neuron was removed, or an
                optimizer keeps something that cannot be cut (see `optimizers`).
        """
        self._alive()
        given = model_provenance.check_json(provenance)
        self.check_into(into)
        schedule = self.config.schedule
        if self.done <= schedule.end:  # the last step did not train with final masks
            self._set_masks(final=True)
        if self.done < schedule.end:
            warnings.warn(
                f"training ended after {self.done} steps, the schedule ends at {schedule.end}: {self.keep:.3f} of the "
                f"neurons are kept, not {self.config.keep}",
                stacklevel=3,
            )
        still = [i for i, moved in enumerate(self._moved) if not moved]
        if self._method.LEARNED and still:
            warnings.warn(
                f"the scores of layers {still} never moved, so their neurons were kept by their number alone",
                stacklevel=3,
            )
        kept = self.keep
        if kept == 1 > self.config.keep and self.done >= schedule.end and self._method.cutoff(self._moment(0)) is None:
            warnings.warn(f"no neuron was removed: {self.config.multiple} is too coarse a multiple", stacklevel=3)
        keeps = tuple(KeepIndex(mask.keep.nonzero().flatten(), mask.keep.numel()) for mask in self._masks)
        self.remove()
        facts = {"training": self.config.to_json(), "steps": self.done, "kept": kept, **given}
        if self._sharded:
            gathering.gather(self.model, into, self._ranks)
            if into is not None and self._ranks.rank == 0:
                ffns = families.find_ffns(into)
                self._cut(into, ffns, families.ffn_block(into, ffns), keeps, facts)
        else:
            self._optimizers.follow(self._cut(self.model, self._ffns, self._block, keeps, facts), optimizers)
        return Mask(keeps, self._fingerprint, facts)

    def _cut(
        self,
        model: nn.Module,
        ffns: list[families.FFN],
        block: dict[str, Any],
        keeps: tuple[KeepIndex, ...],
        facts: dict[str, Any],
    ) -> list[Cut]:
        """Cut a model, and let its config say so."""
        cuts = [cut for ffn, keep in zip(ffns, keeps, strict=True) for cut in surgery.cut(ffn, keep)]
        surgery.set_widths(model, block, [len(k) for k in keeps])
        model_provenance.write(model, self._fingerprint, facts)
        return cuts

    def check_into(self, into: nn.Module | None) -> None:
        """Raise `InputError`, on every process, unless `finish` can use `into`."""
        gathering.check_into(self.model, into, self._ranks)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from: `tensors`, flat by name, and `facts`, JSON values. To be taken between steps."""
        self._alive()
        tensors = {f"layers.{i}.keep": mask.keep for i, mask in enumerate(self._masks)}
        for i, state in enumerate(self._states):
            tensors.update({f"layers.{i}.state.{name}": tensor for name, tensor in state.items()})
        model_config: Any = self.model.config
        return {
            "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
            "facts": {
                "config": self.config.to_json(),
                "done": self.done,
                "moved": list(self._moved),
                "model_type": model_config.model_type,
                "intermediate_sizes": [mask.keep.numel() for mask in self._masks],
                "weights": families.fingerprint(self.model, self._ffns),
                "base_fingerprint": self._fingerprint,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave. The model must hold the weights of that moment already.

        Raises:
            InputError: a state of another configuration or another model; the message has the key and both values.
            CheckpointError: a damaged state.
        """
        self._alive()
        try:
            tensors, facts = state["tensors"], state["facts"]
            self._check_same(facts)
            states: list[State] = [{} for _ in self._ffns]
            for name, tensor in tensors.items():
                _, layer, kind, *rest = name.split(".")
                if kind == "state":
                    states[int(layer)][".".join(rest)] = tensor.clone()
            keeps = [tensors[f"layers.{i}.keep"] for i in range(len(self._ffns))]
            done, moved, base = int(facts["done"]), [bool(m) for m in facts["moved"]], str(facts["base_fingerprint"])
            sizes = [mask.keep.shape for mask in self._masks]
            if not all(k.shape == n == s["scores"].shape for k, s, n in zip(keeps, states, sizes, strict=True)):
                raise CheckpointError("the state is damaged: its tensors do not fit its widths")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise CheckpointError(f"the state is damaged: {type(error).__name__}: {error}") from error
        self._states, self.done, self._moved, self._fingerprint = states, done, moved, base
        for mask, keep in zip(self._masks, keeps, strict=True):
            mask.set(keep.to(torch.bool))
        self._share = None

    def _check_same(self, saved: dict[str, Any]) -> None:
        own = self.state_dict()["facts"]
        pairs = [(f"config {key}", value, saved["config"].get(key)) for key, value in own["config"].items()]
        pairs += [(key, own[key], saved[key]) for key in ("model_type", "intermediate_sizes")]
        for key, mine, theirs in pairs:
            check(mine == theirs, f"{key} of the state to resume", f"be {mine!r}", theirs)
        rule = f"be those in the model ({own['weights'][:16]}); load the weights of that checkpoint first"
        check(own["weights"] == saved["weights"], "weights of the state to resume", rule, saved["weights"][:16])

    def save(self, folder: str | Path) -> Path:
        """Write the state into `folder` as one file, `pruning.safetensors`; returns its path.

        Of processes that train together the first writes; where weights are cut over them, all must call this.
        """
        path = Path(folder) / FILE
        with self._ranks.working() if self._sharded else nullcontext():
            state = self.state_dict()
            if self._ranks.rank == 0:
                persist.write(path, _FORMAT, state["tensors"], state["facts"])
        return path

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote into `folder`; of several processes the first reads it.

        Raises:
            InputError: no such file, or as `load_state_dict`.
            CheckpointError: a damaged file.
        """
        with self._ranks.working():
            made = self._ranks.first(
                lambda: persist.read(Path(folder) / FILE, _FORMAT), lambda made: made, lambda *made: made
            )
            self.load_state_dict({"tensors": made[0], "facts": made[1]})
