"""An attribute told from pictures without training: a CLIP tower compares a picture with a sentence for each choice.  Radford et al. 2021, 3.1."""

import math
import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.tower import Tower


class Attributes:
    """Probability of the wanted choice among `choices`, in [0, 1], and whether no other is likelier; which is wanted, the prompt says.

    attribute: its name (colour, sleeve, pattern, category), for messages. choices: its values. template: a sentence, or several that are
    averaged, with {} where the choice goes. What is wanted is `wanted`, the same for all; or the prompt's column `column`; or, without
    either, the one choice that stands in the prompt's text as a word of its own. temperature: cosines are divided by it before the softmax.
    """

    version, range, classifies = 2, (0.0, 1.0), True
    needs: tuple[str, ...] = ("embedding",)

    def __init__(
        self, model: str, attribute: str, choices: list[str], pretrained: str | None = None, template: str | list[str] = "a photo of a {}",
        wanted: str | None = None, column: str | None = None, temperature: float = 0.01,
    ):
        self.tower, self.attribute, self.choices, self.temperature = (model, pretrained), attribute, choices, temperature
        self.wanted, self.column = wanted, column
        self.templates = [template] if isinstance(template, str) else template
        self.needs = ("embedding", *([column] if column else []))
        self._check()

    def _check(self) -> None:
        """Raises UserError with everything that does not fit."""
        folded = [str(choice).casefold() for choice in self.choices]
        fields = [[name for _, name, _, _ in string.Formatter().parse(template) if name is not None] for template in self.templates]
        wrong = {
            "choices: name two or more": len(folded) < 2,
            "choices: two are the same": len(set(folded)) < len(folded),
            "template: write {} once in each, where the choice goes": not fields or any(names != [""] for names in fields),
            "wanted and column: give one of them, or neither": bool(self.wanted and self.column),
            f"wanted '{self.wanted}' is none of the choices": self.wanted is not None and self.wanted.casefold() not in folded,
            "temperature: should be above 0": not self.temperature > 0,
        }
        if any(wrong.values()):
            raise UserError("\n".join(f"attribute '{self.attribute}': {text}" for text, broken in wrong.items() if broken))

    def load(self, device: str, prepared: Path | None) -> None:
        self._tower = Tower(*self.tower, device=device)

    def __call__(self, rows: list[dict]) -> list[tuple]:
        asked = [self._asked(row) for row in rows]
        known = self.vectors() if any(isinstance(choice, int) for choice in asked) else np.zeros(0)
        return [self._one(row, choice, known) for row, choice in zip(rows, asked, strict=True)]

    def _one(self, row: dict, choice: int | str, known: np.ndarray) -> tuple:
        if isinstance(choice, str):
            return math.nan, choice
        chances = shares(row["embedding"], known, self.temperature)
        return float(chances[choice]), None, bool(chances[choice] >= chances.max())

    def vectors(self) -> np.ndarray:
        """(choices, d) unit vectors: each choice's sentences, averaged."""
        sentences = [template.format(choice) for choice in self.choices for template in self.templates]
        mean = self._tower.texts(sentences).astype(np.float64).reshape(len(self.choices), len(self.templates), -1).mean(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _asked(self, row: dict) -> int | str:
        """The number of the wanted choice, or why there is none."""
        if self.column is not None and row[self.column] is None:
            return f"the prompt's {self.column} is empty"
        text = self.wanted or (str(row[self.column]) if self.column else row["prompt"])
        if self.wanted or self.column:
            folded = [choice.casefold() for choice in self.choices]
            return folded.index(text.casefold()) if text.casefold() in folded else f"the {self.attribute} '{text}' is none of the choices"
        found = mentioned(text, self.choices)
        if len(found) == 1:
            return self.choices.index(found[0])
        return f"the prompt names several: {', '.join(found)}" if found else f"the prompt names no {self.attribute}"


def shares(embedding: np.ndarray, choices: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax over choices (n, d) of their cosines with an embedding (d,), divided by the temperature; (n,)."""
    logits = choices @ embedding.astype(np.float64) / temperature  # (n,)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def mentioned(text: str, choices: Sequence[str]) -> list[str]:
    """The choices that stand in a text as words of their own, in the order of `choices`; of overlapping ones the longest.

    >>> mentioned("a navy T-shirt and an ankle boot", ["shirt", "t-shirt", "boot", "ankle boot"])
    ['t-shirt', 'ankle boot']
    """
    longest = sorted(choices, key=len, reverse=True)
    words = re.findall(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])", text, re.IGNORECASE)
    found = {word.casefold() for word in words}
    return [choice for choice in choices if choice.casefold() in found]
