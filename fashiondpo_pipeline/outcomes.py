"""What became of each held-out picture, and which of them are shown: by a rule, in the shares in which they
occur. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fashiondpo_pipeline.seeds import key

GAINED, LOST, SAME, UNKNOWN = 1, -1, 0, 9
ORDER = (GAINED, LOST, SAME)  # in which they are shown
RIGHT = {GAINED: "mended", LOST: "broken", SAME: "unchanged"}  # of pictures that are right or wrong
SCORED = {GAINED: "better", LOST: "worse", SAME: "alike"}  # of pictures that only have a score


def of_right(base: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(g, k) outcomes of pictures that are right (1), wrong (0) or unknown (NaN), of one seed by both models.
    """
    known = np.isfinite(base) & np.isfinite(after)
    return np.where(known, np.sign(np.where(known, after - base, 0)), UNKNOWN).astype(int)


def of_scores(base: np.ndarray, after: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """(g, k) outcomes of pictures that have a score each, NaN where there is none; within the judge's own
    noise they are the same.
    """
    known = np.isfinite(base) & np.isfinite(after)
    gap = np.where(known, after - base, 0)
    return np.where(known, np.sign(gap) * (np.abs(gap) > noise), UNKNOWN).astype(int)


def counts(outcomes: np.ndarray) -> dict[int, int]:
    """How many pictures have each outcome."""
    return {outcome: int((outcomes == outcome).sum()) for outcome in ORDER}


def allotted(occur: dict[int, int], most: int) -> dict[int, int]:
    """Places for each outcome, in the shares in which they occur; what is left over goes to the largest
    remainders (Hamilton 1792).

    >>> allotted({1: 16, -1: 1, 0: 623}, 24), allotted({1: 2, -1: 0, 0: 1}, 24)
    ({1: 1, -1: 0, 0: 23}, {1: 2, -1: 0, 0: 1})
    """
    total = sum(occur.values())
    if total <= most:
        return dict(occur)
    exact = {outcome: most * count / total for outcome, count in occur.items()}
    places = {outcome: int(share) for outcome, share in exact.items()}
    left = sorted(occur, key=lambda outcome: places[outcome] - exact[outcome])[: most - sum(places.values())]
    return {outcome: count + (outcome in left) for outcome, count in places.items()}


@dataclass(frozen=True)
class Shown:
    """A picture that is shown: its outcome, its prompt's row, its number within the prompt."""

    outcome: int
    row: int
    number: int


def chosen(outcomes: np.ndarray, names: Sequence[str], most: int, seed: int) -> list[Shown]:
    """The pictures to show: of each outcome as many as it is allotted, the lowest keys first, whatever they
    look like.

    outcomes: (g, k). names: of the g prompts; a picture's key is made of the seed, its prompt's name and its
    number.
    """
    shown = []
    for outcome, places in allotted(counts(outcomes), most).items():
        rows = sorted(
            (key(seed, "shown", names[row], int(number)), int(row), int(number))
            for row, number in np.argwhere(outcomes == outcome)
        )
        shown += [Shown(outcome, row, number) for _, row, number in rows[:places]]
    return shown
