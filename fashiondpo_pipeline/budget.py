"""A budget of divergence: how far from its reference a policy is to be at each optimiser step, and how far off it is."""

import math
from collections.abc import Sequence

import numpy as np


def ahead(divergence: float, budget: float) -> float:
    """How far a divergence is beyond its budget, as a difference of logarithms, -1 to 1.

    >>> ahead(2.0, 2.0), ahead(100.0, 2.0), ahead(0.0, 2.0), round(ahead(2.2, 2.0), 3)
    (0.0, 1.0, -1.0, 0.095)
    """
    if not budget or not divergence:
        return 0.0 if divergence == budget else 1.0 if divergence > budget else -1.0
    return min(max(math.log(divergence / budget), -1.0), 1.0)


def way(learning_rates: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share of a training's way that lies before each optimiser step: of the sum of all learning rates; (steps,), from 0.

    >>> way([2.0, 1.0, 1.0]).tolist()
    [0.0, 0.5, 0.75]
    """
    spent = np.cumsum([0.0, *learning_rates])
    return spent[:-1] / spent[-1]


def on_the_way(whole: float, share: float | np.ndarray) -> float | np.ndarray:
    """How far from its reference a policy is to be there, in the budget's unit.

    At a steady pull it gets as far as the learning rates carry it, and divergence is the square of how far.
    """
    return whole * share**2
