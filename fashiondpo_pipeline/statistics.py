"""Win rates, intervals and diversity: the figures a result is judged by. Pure numpy."""

import math
from statistics import NormalDist

import numpy as np

from fashiondpo_pipeline import pixels


def wins(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """1 where the first scores higher, 1/2 where they tie, 0 where lower, NaN where either is missing."""
    with np.errstate(invalid="ignore"):
        won = (after > before) + 0.5 * (after == before)
    return np.where(np.isfinite(after) & np.isfinite(before), won, np.nan)


def bootstrap(values: np.ndarray, seed: int, resamples: int, coverage: float) -> tuple[float, float, float]:
    """(mean, low, high) of values (g, k) with a percentile bootstrap that draws whole rows with replacement.

    Rows are prompts: pictures of one prompt are alike, so drawing single pictures would make the interval too narrow.
    NaN entries do not count. All three are NaN where there is no value at all.  Efron & Tibshirani 1993, ch. 13.
    """
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(1), known.sum(1)
    if not count.sum():
        return (float("nan"),) * 3
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(values), (resamples, len(values)))
    with np.errstate(invalid="ignore"):
        means = total[rows].sum(1) / count[rows].sum(1)
    low, high = np.nanquantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(total.sum() / count.sum()), float(low), float(high)


FEW, FEWEST = 20, 5  # prompts below which a bootstrap's interval is too narrow, and below which none means anything


def interval(values: np.ndarray, seed: int, resamples: int, coverage: float) -> tuple[float, float, float]:
    """(mean, low, high) of wins (g, k), each 0..1, g prompts of which some may be NaN; all three NaN where there is no value.

    From FEW prompts on `bootstrap`. Of fewer, whatever holds both Student's interval of the prompts' means and Wilson's of their share,
    counted as so many independent pictures as the likeness within prompts leaves: a bootstrap of five prompts that all agree has no
    width at all. Of fewer than FEWEST prompts it is all of 0..1: nothing can be said.
    """
    mean, low, high = bootstrap(values, seed, resamples, coverage)
    known = np.isfinite(values)
    prompts = np.array([row[there].mean() for row, there in zip(values, known, strict=True) if there.any()])
    if not len(prompts) or len(prompts) >= FEW:
        return mean, low, high
    if len(prompts) < FEWEST:
        return mean, 0.0, 1.0
    each = known.sum() / len(prompts)  # pictures a prompt
    alike, most = prompts.var(ddof=1), mean * (1 - mean)
    effect = float(np.clip(each * alike / most, 1, each)) if most > 0 else each  # how many pictures count as one
    ends = [*student(prompts, coverage), *wilson(mean, known.sum() / effect, NormalDist().inv_cdf((1 + coverage) / 2))]
    return mean, float(max(min(ends), 0.0)), float(min(max(ends), 1.0))


def student(values: np.ndarray, coverage: float) -> tuple[float, float]:
    """Student's interval (1908) of a mean of independent values (n,), five or more of them.

    The quantile is Cornish and Fisher's expansion about the normal one, right to 0.002 from four degrees of freedom on.

    >>> [round(end, 2) for end in student(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 0.95)]
    [1.04, 4.96]
    """
    z, n = NormalDist().inv_cdf((1 + coverage) / 2), len(values) - 1
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    last = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160
    quantile = z + sum(term / n**power for power, term in enumerate((*terms, last), 1))
    reach = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - reach, float(values.mean()) + reach


def wilson(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of a share seen in so many trials.  Wilson 1927.

    >>> [round(end, 3) for end in wilson(0.5, 100)]
    [0.404, 0.596]
    """
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - reach, middle + reach


def percent(rate: dict) -> str:
    """A win rate with its interval, for people.

    >>> percent({"win_rate": 0.7, "low": 0.625, "high": 0.75})
    '70.0 % [62.5, 75.0]'
    """
    return f"{100 * rate['win_rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def diversity(embeddings: np.ndarray) -> float:
    """Mean cosine distance between pictures of one group, averaged over groups; embeddings (g, k, d) of unit length.

    0: all pictures of a prompt are the same. NaN with fewer than two pictures a group.
    """
    groups, k, _ = embeddings.shape
    if k < 2 or not groups:
        return float("nan")
    total = embeddings.sum(1)
    similar = ((total**2).sum(1) - (embeddings**2).sum((1, 2))) / (k * (k - 1))
    return float(1 - similar.mean())


def meters(picture: np.ndarray) -> tuple[float, float, float, float]:
    """(brightness, contrast, saturation, sharpness) of one (h, w, 3) uint8 picture, each 0..1; this sharpness is `pixels.edges`."""
    light = pixels.luminance(picture)
    return pixels.brightness(light), pixels.contrast(light), pixels.saturation(picture), pixels.edges(light)
