"""Win rates, intervals and diversity: the figures a result is judged by. Pure numpy."""

import math
from statistics import NormalDist

import numpy as np

from fashiondpo_pipeline import pixels


def wins(after: np.ndarray, before: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """1 where the first scores higher, 1/2 where they tie, 0 where lower, NaN where either is missing. A tie: no further apart than noise."""
    with np.errstate(invalid="ignore"):
        gap = after - before
        won = (gap > noise) + 0.5 * (np.abs(gap) <= noise)
    return np.where(np.isfinite(after) & np.isfinite(before), won, np.nan)


def ties(won: np.ndarray) -> float:
    """Share of ties among what `wins` gives; NaN where there is nothing."""
    return float((won == 0.5).sum() / np.isfinite(won).sum()) if np.isfinite(won).any() else float("nan")


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


FEW, FEWEST = 20, 5  # prompts below which an interval says little, and below which none means anything


def interval(values: np.ndarray, coverage: float) -> tuple[float, float, float]:
    """(mean, low, high) of wins or shares (g, k), each 0..1, of g prompts of which some may be NaN; all three NaN where there is no value.

    Whatever holds both Student's interval of the prompts' means and Wilson's of their share, counted as so many independent pictures as
    the likeness within prompts leaves: prompts that all agree leave Student's without any width. Of fewer than FEWEST prompts it is all
    of 0..1: nothing can be said. tests/bench/bench_intervals.py compares it with bootstraps, which are too narrow with few prompts.
    """
    known = np.isfinite(values)
    prompts = row_means(values)[known.any(1)]
    if not len(prompts):
        return (math.nan,) * 3
    mean = float(values[known].mean())
    if len(prompts) < FEWEST:
        return mean, 0.0, 1.0
    each = known.sum() / len(prompts)  # pictures a prompt
    alike, most = prompts.var(ddof=1), mean * (1 - mean)
    effect = float(np.clip(each * alike / most, 1, each)) if most > 0 else each  # how many pictures count as one
    ends = [*student(prompts, coverage), *wilson(mean, known.sum() / effect, NormalDist().inv_cdf((1 + coverage) / 2))]
    return mean, float(max(min(ends), 0.0)), float(min(max(ends), 1.0))


def t_quantile(coverage: float, freedom: int) -> float:
    """Student's t that so much of the distribution lies within, both sides together, with so many degrees of freedom.

    Cornish and Fisher's expansion about the normal quantile, right to 0.002 from four degrees of freedom on.

    >>> round(t_quantile(0.95, 4), 2), round(t_quantile(0.95, 39), 2)
    (2.78, 2.02)
    """
    z = NormalDist().inv_cdf((1 + coverage) / 2)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    last = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92_160
    return z + sum(term / freedom**power for power, term in enumerate((*terms, last), 1))


def student(values: np.ndarray, coverage: float) -> tuple[float, float]:
    """Student's interval (1908) of a mean of independent values (n,), five or more of them.

    >>> [round(end, 2) for end in student(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 0.95)]
    [1.04, 4.96]
    """
    reach = t_quantile(coverage, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - reach, float(values.mean()) + reach


def row_means(values: np.ndarray) -> np.ndarray:
    """Mean of what is known of each prompt, (g,) of (g, k); NaN where nothing is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)


def mean_interval(prompts: np.ndarray, coverage: float) -> tuple[float, float, float]:
    """(mean, low, high) of prompts' means (g,), Student's interval; without end of fewer than FEWEST prompts, all NaN of none."""
    prompts = prompts[np.isfinite(prompts)]
    if len(prompts) < FEWEST:
        return (float(prompts.mean()), -math.inf, math.inf) if len(prompts) else (math.nan,) * 3
    return float(prompts.mean()), *student(prompts, coverage)


def studentized(prompts: np.ndarray, seed: int, resamples: int, coverage: float) -> tuple[float, float, float]:
    """(mean, low, high) of prompts' means (g,) of any skewness, such as those of ln p: a bootstrap of Student's t (Efron & Tibshirani 1993,
    12.5), and never narrower than Student's own; without end of fewer than FEWEST prompts."""
    mean, low, high = mean_interval(prompts, coverage)
    if not math.isfinite(low) or low == high:
        return mean, low, high
    prompts = prompts[np.isfinite(prompts)]
    again = prompts[np.random.default_rng(seed).integers(0, len(prompts), (resamples, len(prompts)))]
    error, errors = (one.std(-1, ddof=1) / math.sqrt(len(prompts)) for one in (prompts, again))
    t = (again.mean(1) - mean)[errors > 0] / errors[errors > 0]
    if len(t):
        least, most = np.quantile(t, [(1 - coverage) / 2, (1 + coverage) / 2])
        low, high = min(low, mean - float(most * error)), max(high, mean - float(least * error))
    return mean, low, high


def change_interval(differences: np.ndarray, coverage: float) -> tuple[float, float, float]:
    """(mean, low, high) of differences (g, k), each -1..1: Student's of the prompts' means. Where none differs, so many prompts
    that do not may still hide as much as Wilson's interval of none among them leaves."""
    mean, low, high = mean_interval(row_means(differences), coverage)
    count = int(np.isfinite(differences).any(1).sum())
    if count and low == high:
        hidden = wilson(0.0, count, NormalDist().inv_cdf((1 + coverage) / 2))[1]
        low, high = mean - hidden, mean + hidden
    return mean, max(low, -1.0), min(high, 1.0)


def ratio_interval(above: np.ndarray, below: np.ndarray, coverage: float) -> tuple[float, float, float]:
    """(ratio, low, high) of the means of two values of each prompt, (g,) each, neither below 0.  Fieller 1954.

    It holds every ratio r for which the mean of above - r * below has 0 in its Student's interval; [0, infinity] of fewer than FEWEST
    prompts, all NaN where there is nothing to divide by.
    """
    both = np.isfinite(above) & np.isfinite(below)
    above, below = above[both], below[both]
    if not len(above) or not below.mean() > 0:
        return (math.nan,) * 3
    ratio = float(above.mean() / below.mean())
    if len(above) < FEWEST:
        return ratio, 0.0, math.inf
    limit = t_quantile(coverage, len(above) - 1) ** 2 / len(above)
    (of_above, shared), (_, of_below) = np.cov(above, below)
    a, b, c = (float(one) for one in (below.mean() ** 2 - limit * of_below, above.mean() * below.mean() - limit * shared,
                                      above.mean() ** 2 - limit * of_above))
    if a <= 0:  # the divisor itself may be 0
        return ratio, 0.0, math.inf
    reach = math.sqrt(max(b * b - a * c, 0.0))
    return ratio, max((b - reach) / a, 0.0), (b + reach) / a


def resampled(count: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of `count` prompts is drawn in each bootstrap sample, (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def expanded(estimates: np.ndarray, count: int, coverage: float) -> tuple[float, float]:
    """(low, high) percentiles of bootstrap estimates (b,), further out by what Student's interval of `count` prompts is wider than the
    normal one of the same values.  Hesterberg 2015 (1411.5279), 'expanded percentile'."""
    estimates = estimates[np.isfinite(estimates)]
    if not len(estimates):
        return math.nan, math.nan
    tail = NormalDist().cdf(-t_quantile(coverage, count - 1) * math.sqrt(count / (count - 1)))
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


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


METERS = {  # what evaluate watches of each picture, and the checks compare winners and losers by; "sharpness" is `pixels.edges`
    "brightness": pixels.brightness, "contrast": pixels.contrast, "saturation": pixels.saturation, "sharpness": pixels.edges,
    "edge_density": pixels.edge_density, "colour_entropy": pixels.colour_entropy, "dark_pixels": pixels.dark_pixels,
}
OF_COLOUR = ("saturation", "colour_entropy")  # the others read luminance alone


def meters(picture: np.ndarray) -> tuple[float, ...]:
    """Every meter of METERS, in its order, of one (h, w, 3) uint8 picture."""
    light = pixels.luminance(picture)
    return tuple(measure(picture if name in OF_COLOUR else light) for name, measure in METERS.items())
