"""What a task is: examples with all their references, and the metrics that judge it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One input with its references.

    Attributes:
        prompt: the input.
        references: every right answer, as a reader sees it.
        targets: those of them in the form the model is trained to write, placeholders included.
        slots: (placeholder, value): what to put back into a generated text.
    """

    prompt: str
    references: tuple[str, ...]
    targets: tuple[str, ...]
    slots: tuple[tuple[str, str], ...] = ()

    def restore(self, text: str) -> str:
        """A generated text with the values back in the places of their placeholders."""
        for placeholder, value in self.slots:
            text = text.replace(placeholder, value)
        return text


@dataclass(frozen=True)
class Task:
    """A task, loaded.

    Attributes:
        name: its name.
        train, test: examples; no prompt stands in both.
        metrics: keys of `metrics.METRICS`, the main one first; none: perplexity alone.
        note: what was trained on, what is evaluated, and in which form.
        ends: whether a target is a text with an end, to be learned as such; else it is cut out of one that goes on.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    metrics: tuple[str, ...]
    note: str
    ends: bool = True

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, target) of every training reference."""
        return [(e.prompt, target) for e in self.train for target in e.targets]
