"""How much a tuned model gained, in units that mean something to who uses it: best-of-n equivalents, shares right, visible change.

Prompts are the units of every interval: g prompts, k pictures of each. What is missing is NaN and does not count. Pure numpy.

Choosing the best n of k pictures is written along one line of `places`, 2 k - 1 of them: place 0 is any picture (best of 1), place s the
best of 1 + s, place -s the worst of 1 + s. Between whole n everything is linear: best of 2.5 is the best of 2 or of 3, each half of the
time. (Gamma functions would also continue C(r-1, n-1) / C(k, n) to real n, but with weights below 0 that are no choice at all.)
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from fashiondpo_pipeline import claims, statistics

Estimate = dict[str, float | None]  # value, low, high; None: unknown as a value, no bound as an end


def estimate(value: float, low: float, high: float) -> Estimate:
    """An estimate as it is written down: JSON has no infinity.

    >>> estimate(0.5, 0.25, float("inf"))
    {'value': 0.5, 'low': 0.25, 'high': None}
    """
    return {name: float(number) if math.isfinite(number) else None for name, number in zip(("value", "low", "high"), (value, low, high), strict=True)}


# -- choosing among k pictures


@lru_cache
def best_of_weights(k: int) -> np.ndarray:
    """(k, k) chance that the picture of rank r (column r - 1, the best last) is the best of n of k (row n - 1): C(r-1, n-1) / C(k, n).

    Every subset of n is as likely as any other. The mean under row n is the unbiased estimate of the best of n: the U-statistic that
    pass@k is one of (Chen et al. 2021, 2107.03374).
    """
    rank, weights = np.arange(1, k + 1), np.full((k, k), 1 / k)
    for n in range(1, k):  # C(r-1, n) / C(k, n+1) from the row before
        weights[n] = weights[n - 1] * np.maximum(rank - n, 0) / n * (n + 1) / (k - n)
    return weights


def choice_weights(mix: np.ndarray) -> np.ndarray:
    """(2k-1, k) chance of each picture to be the one chosen by `mix` (k,), at each place from the worst of k to the best of k.

    Pictures of the same mix share their weight; those without one (NaN) have none. Where m < k are known, n above m chooses among all m.
    """
    known = np.flatnonzero(np.isfinite(mix))
    k, m = len(mix), len(known)
    weights = np.zeros((2 * k - 1, k))
    if not m:
        return weights
    _, tie = np.unique(mix[known], return_inverse=True)
    order = np.argsort(tie, kind="stable")
    of_n = best_of_weights(m)[np.minimum(np.arange(k), m - 1)]  # (k, m): rows are n = 1 .. k
    sharing = np.equal.outer(tie, tie) / np.bincount(tie)[tie][:, None]  # (m, m): the mean over pictures of the same mix
    for rows, ranks in ((slice(k - 1, None), order), (slice(k - 1, None, -1), order[::-1])):
        chosen = np.zeros((k, m))
        chosen[:, ranks] = of_n
        weights[rows, known] = chosen @ sharing.T
    return weights


def chosen_quality(mix: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """(g, 2k-1) expected quality (g, k) of the picture chosen by `mix` (g, k) at each place; NaN for a prompt without any picture known."""
    mix = np.where(np.isfinite(quality), mix, np.nan)
    rows = [choice_weights(one) @ np.where(np.isfinite(one), values, 0) for one, values in zip(mix, quality, strict=True)]
    return np.where(np.isfinite(mix).any(1)[:, None], np.array(rows), np.nan)


def chosen_distance(mix: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """(g, 2k-1) expected distance (g, k, k) of two pictures of a prompt, each chosen by `mix` (g, k) at a place; NaN with fewer than two known.

    Two people who each draw n pictures and keep the best get different pictures. Here both choices come from the same k, which would
    sometimes make them one picture: sum of w_i w_j d_ij over i != j, divided by that of w_i w_j, is the distance given that they are not.
    At place 0 it is the mean distance of every two pictures; where one picture has all the weight (best of k), that of the place before.
    """
    found = np.full((len(mix), 2 * mix.shape[1] - 1), np.nan)
    middle = mix.shape[1] - 1
    for row, (one, apart) in enumerate(zip(mix, distance, strict=True)):
        known = np.isfinite(one) & np.isfinite(np.diagonal(apart))
        weights = choice_weights(np.where(known, one, np.nan))
        different = 1 - (weights**2).sum(1) if known.sum() > 1 else np.zeros(len(weights))
        there = different > 1e-9
        reached = np.einsum("pi,ij,pj->p", weights[there], np.where(np.outer(known, known), apart, 0), weights[there])
        found[row, there] = reached / different[there]
        for place in range(1, middle + 1) if there[middle] else ():
            for at, before in ((middle + place, middle + place - 1), (middle - place, middle - place + 1)):
                if not there[at]:
                    found[row, at] = found[row, before]
    return found


# -- places along the line of choices


def n_of(place: float) -> float:
    """The n of a place: best of n from 1 on, below it 1/m for the worst of m; 0 and infinity beyond what k pictures can tell.

    >>> n_of(0.0), n_of(2.5), n_of(-1.0), n_of(float("inf"))
    (1.0, 3.5, 0.5, inf)
    """
    return 1 + place if place >= 0 else 1 / (1 - place)


def place_of(target: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Place (b,) at which a curve (b, 2k-1) first reaches a target (b,), going out from the middle; +-inf where it never does.

    Upwards where the target is above the middle, downwards where it is below.
    """
    middle = curve.shape[1] // 2
    place = np.zeros(len(curve))
    for sign in (1, -1):
        side = sign * curve[:, middle::sign]  # (b, k), from the middle outwards
        goal = sign * target
        reached = side >= goal[:, None]
        first = reached.argmax(1)
        rows = np.arange(len(side))
        start, end = side[rows, np.maximum(first - 1, 0)], side[rows, first]
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.maximum(first - 1, 0) + (goal - start) / (end - start)
        between = np.where(reached.any(1), between, np.inf)
        place = np.where(goal > side[:, 0], sign * between, place)
    return place


def at_place(curve: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Value (b,) of curves (b, 2k-1) at places (b,), linear between whole ones; the curve's end where a place is beyond it."""
    middle = curve.shape[1] // 2
    spot = np.clip(place, -middle, middle) + middle
    low = np.minimum(spot.astype(int), curve.shape[1] - 2) if curve.shape[1] > 1 else np.zeros(len(spot), int)
    rows, share = np.arange(len(curve)), spot - low
    high = np.minimum(low + 1, curve.shape[1] - 1)
    return np.where(share > 0, (1 - share) * curve[rows, low] + share * curve[rows, high], curve[rows, low])


# -- the measures


def choosing_helps(quality: np.ndarray) -> bool:
    """Whether the best of all k pictures of a prompt, as the mix chooses them, is better to the judge than any: else there is no best of n.

    A reward that can be fooled, such as saturation, chooses pictures that the judge likes less; along such a curve worse would count as
    better. quality (g, 2k-1): `chosen_quality` of the base; a single picture a prompt (k = 1) is no choice, and says nothing against it.
    """
    curve = quality.mean(0)
    return quality.shape[1] == 1 or bool(curve[-1] > curve[len(curve) // 2])


def best_of(quality: np.ndarray, after: np.ndarray, coverage: float) -> tuple[float, float, float]:
    """Best-of-n equivalent of a tuned model, (value, low, high): the n whose best-of-n pictures of the base are as good as its pictures.

    quality (g, 2k-1): `chosen_quality` of the base. after (g,): the tuned model's mean of each prompt. Below 1 it is 1/m, as good as the
    worst of m; infinity: more than k; 0: less than the worst of k; NaN: the mix's choice is not the judge's (`choosing_helps`).
    The interval holds every n whose difference to the tuned model, a
    mean over prompts, has 0 in its Student's interval (the inversion of a test: Fieller 1954 for a curve), so that it needs no slope and
    may be open; of fewer than five prompts it is everything.
    """
    both = np.isfinite(after) & np.isfinite(quality).all(1)
    quality, after = quality[both], after[both]
    if not len(after) or not choosing_helps(quality):
        return (math.nan,) * 3
    value = n_of(float(place_of(after.mean(keepdims=True), quality.mean(0, keepdims=True))[0]))
    if len(after) < statistics.FEWEST:
        return value, 0.0, math.inf
    low, high = _places_not_refuted(quality, after, statistics.t_quantile(coverage, len(after) - 1))
    return value, min(n_of(low), quality.shape[1] // 2 + 1), n_of(high)  # more than k is at least k


STEPS = 50  # of a whole place that are tried


def _places_not_refuted(quality: np.ndarray, after: np.ndarray, limit: float) -> tuple[float, float]:
    """(lowest, highest) place at which the mean of after - quality is within `limit` standard errors of 0; +-inf where that has no end."""
    middle = quality.shape[1] // 2
    share = (np.arange(2 * middle * STEPS + 1) / STEPS)[None]  # from the worst of k, in whole places
    low = np.minimum(share.astype(int), max(2 * middle - 1, 0))
    fine = quality[:, low[0]] * (1 - (share - low)) + quality[:, np.minimum(low[0] + 1, 2 * middle)] * (share - low)  # (g, places)
    gap = after[:, None] - fine
    mean, error = gap.mean(0), gap.std(0, ddof=1) / math.sqrt(len(after))
    inside = np.flatnonzero(np.abs(mean) <= limit * error + 1e-12 * np.abs(after).max())
    if not len(inside):  # beyond either end, or between two places that differ by more than chance allows
        spot = place_of(after.mean(keepdims=True), quality.mean(0, keepdims=True))[0]
        return spot, spot
    first, last = inside[0], inside[-1]
    return (-math.inf if first == 0 else first / STEPS - middle), (math.inf if last == 2 * middle * STEPS else last / STEPS - middle)


def diversity_at_equal_quality(
    quality: np.ndarray, distance: np.ndarray, after: np.ndarray, diversity: np.ndarray, seed: int, resamples: int, coverage: float
) -> tuple[float, float, float]:
    """The tuned model's diversity over that of the base's best-of-n pictures at the n where they are as good, (value, low, high).

    1: tuning is worth what choosing is; above 1: it leaves more variety than choosing would. quality, distance (g, 2k-1): `chosen_quality`
    and `chosen_distance` of the base; after, diversity (g,): the tuned model's means of each prompt. Beyond k the base's best of k counts.
    The interval is a bootstrap over prompts of the whole, n included, its ends moved outwards as Student's are to the normal ones
    (Hesterberg 2015, 'expanded percentile'); of fewer than five prompts it is [0, infinity].
    """
    both = np.isfinite(quality).all(1) & np.isfinite(distance).all(1) & np.isfinite(after) & np.isfinite(diversity)
    quality, distance, after, diversity = quality[both], distance[both], after[both], diversity[both]
    if not len(after) or not choosing_helps(quality):
        return (math.nan,) * 3

    def ratio(weights: np.ndarray) -> np.ndarray:
        """(b,) of prompts counted so often, (b, g)."""
        weights = weights / weights.sum(1, keepdims=True)
        place = place_of(weights @ after, weights @ quality)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (weights @ diversity) / at_place(weights @ distance, place)

    value = float(ratio(np.ones((1, len(after))))[0])
    if len(after) < statistics.FEWEST:
        return value, 0.0, math.inf
    return value, *statistics.expanded(ratio(statistics.resampled(len(after), seed, resamples)), len(after), coverage)


def curve(quality: np.ndarray, distance: np.ndarray, right: np.ndarray | None) -> list[dict]:
    """What choosing gives the base: {n, mean, right, diversity} of its best of n for n = 1, 2, 4, 8, ... and for all k; None where unknown.

    quality, distance, right: (g, 2k-1) of `chosen_quality` of the judge's scores, `chosen_distance`, and `chosen_quality` of what is right.
    """
    k = quality.shape[1] // 2 + 1

    def mean(values: np.ndarray | None, n: int) -> float | None:
        chosen = None if values is None else values[:, k - 1 + n - 1]
        return None if chosen is None or not np.isfinite(chosen).any() else float(np.nanmean(chosen))

    counts = sorted({2**power for power in range(k.bit_length())} | {k})
    return [{"n": n, "mean": mean(quality, n), "right": mean(right, n), "diversity": mean(distance, n)} for n in counts]


def share_right(right: dict[str, np.ndarray], coverage: float) -> dict:
    """Shares of pictures that are right, of base and after (g, k) each (1, 0, NaN), and what became of pictures of the same seed.

    base, after, change: estimates. mended, broken: pictures that went from wrong to right, and from right to wrong, of `pictures`.
    """
    base, after = right["base"], right["after"]
    both = np.isfinite(base) & np.isfinite(after)
    shares = {role: estimate(*statistics.interval(values, coverage)) for role, values in right.items()}
    change = statistics.change_interval(np.where(both, after - base, np.nan), coverage)
    return shares | {
        "change": estimate(*change), "mended": int((both & (base == 0) & (after == 1)).sum()),
        "broken": int((both & (base == 1) & (after == 0)).sum()), "pictures": int(both.sum()),
    }


def shift(base: np.ndarray, after: np.ndarray, seed: int, resamples: int, coverage: float) -> tuple[float, float, float]:
    """Mean of after less that of base, scores (g, k) each, in standard deviations of the base's pictures, (value, low, high)."""
    spread = float(np.nanstd(base)) if np.isfinite(base).any() else 0.0
    if not spread > 0:
        return (math.nan,) * 3
    rise = statistics.row_means(after) - statistics.row_means(base)
    value, low, high = statistics.studentized(rise, seed, resamples, coverage)
    return value / spread, low / spread, high / spread


def moved(base: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(distance to the base's picture of the same seed, distance between two seeds of the base), means of one prompt's pictures.

    base, after: (k, h, w, 3) uint8 of the same seeds; a distance is the mean absolute difference of pixels, 0..255. NaN without a picture,
    the second with fewer than two. All pairs of seeds are counted at once: sorted, x_(r) is above r - 1 others and below k - r.
    """
    k = len(base)
    if not k:
        return math.nan, math.nan
    same_seed = float(np.abs(after.astype(np.int16) - base).mean())
    if k < 2:
        return same_seed, math.nan
    leads = 2 * np.arange(k) - (k - 1)
    sums = np.sort(base.reshape(k, -1), axis=0).astype(np.float32).mean(1, dtype=np.float64)
    return same_seed, float((leads * sums).sum() * 2 / (k * (k - 1)))


def visible_change(same_seed: np.ndarray, between_seeds: np.ndarray, coverage: float) -> tuple[float, float, float]:
    """How far pictures moved, (value, low, high): 0 nothing did, 1 as far as another seed's picture is. Prompts' `moved`, (g,) each."""
    return statistics.ratio_interval(same_seed, between_seeds, coverage)


def noise_of(scores: np.ndarray, disturbed: np.ndarray, quantile: float = 0.95) -> float:
    """A judge's own noise: this quantile of how much its score changes with a picture that nobody could tell apart; 0 if unknown."""
    change = np.abs(disturbed - scores)
    return float(np.nanquantile(change, quantile)) if np.isfinite(change).any() else 0.0


# -- what a setting of the sampler gives


def compared(one: dict, other: dict, seed: int, resamples: int, coverage: float) -> dict[str, Estimate | None]:
    """How much better pictures are than others of the same prompts and seeds: estimates over prompts, above 0 where `one` is better.

    one, other: {"mean": (g, k) the judge's scores, "right": (g, k) which are right, None where it does not classify}. mean: difference of
    the scores' means, a studentized bootstrap; right: of the shares, -1..1. Unknown, as of fewer than five prompts, as an estimate is.
    """
    gap = statistics.row_means(one["mean"] - other["mean"])
    right = None if one["right"] is None or other["right"] is None else one["right"] - other["right"]
    return {
        "mean": estimate(*statistics.studentized(gap, seed, resamples, coverage)),
        "right": None if right is None else estimate(*statistics.change_interval(right, coverage)),
    }


def deciding(over: Mapping) -> Estimate:
    """Of what `compared` gives, the estimate by which two settings are told apart: shares right where they are known, else means."""
    return over["right"] if over["right"] and over["right"]["value"] is not None else over["mean"]


def above(over: Mapping) -> bool:
    """Whether the whole interval of a difference lies at 0 or above."""
    low = deciding(over)["low"]
    return low is not None and low >= 0


def below(over: Mapping) -> bool:
    """Whether the whole interval of a difference lies below 0."""
    high = deciding(over)["high"]
    return high is not None and high < 0


def base_by_setting(sampler: list[dict]) -> dict[str, dict | None]:
    """What the base reaches by the sampler's settings alone, lines of `sampler`, each with role, usual, forwards, mean and over_tuned.

    equal: its best line at no more forwards than the usual setting takes; any: its best line at any forwards; reaches: a line that is as
    good as the tuned model under the usual setting; None: none is. As good is certainly one whose interval of the difference lies at 0 or
    above (`above`): of these that of fewest forwards. Where there is none it is the likeliest of those that are not told apart, provided
    that as many pictures do tell the base from the tuned model under the usual setting.
    """
    base = [line for line in sampler if line["role"] == "base" and line["mean"] is not None]
    usual = {line["role"]: line for line in sampler if line["usual"] and line["mean"] is not None}
    if len(usual) < 2:
        return {"equal": None, "any": None, "reaches": None}

    def best(lines: list[dict]) -> dict:
        return max(lines, key=lambda line: line["mean"])  # the first of equals: the usual one

    return {
        "equal": best([line for line in base if line["forwards"] <= usual["base"]["forwards"]]), "any": best(base),
        "reaches": _reaching([line for line in base if not line["usual"]], usual["base"]["over_tuned"]),
    }


def _reaching(lines: list[dict], gap: dict) -> dict | None:
    """`reaches` of `base_by_setting`. gap: of the base under the usual setting over the tuned model."""

    def value(line: dict) -> float:
        return deciding(line["over_tuned"])["value"] or 0.0

    lines = [line for line in lines if deciding(line["over_tuned"])["value"] is not None]
    if not (deciding(gap)["value"] or 0.0) < 0:
        return None  # nothing was gained, so that nothing is had elsewhere
    if certain := [line for line in lines if above(line["over_tuned"])]:
        return min(certain, key=lambda line: (line["forwards"], -value(line)))
    alike = [line for line in lines if below(gap) and not below(line["over_tuned"])]
    return max(alike, key=lambda line: (value(line), -line["forwards"]), default=None)


def setting_in_words(line: Mapping, usual: Mapping) -> str:
    """What a line of `sampler` does otherwise than the usual one.

    >>> usual = {"guidance": 1.0, "steps": 10, "eta": 1.0, "guidance_rescale": 0.0, "forwards": 10}
    >>> setting_in_words(usual | {"guidance": 1.5, "steps": 5}, usual)
    'guidance 1.5, 5 steps'
    """
    words = {"guidance": "guidance {:g}", "steps": "{} steps", "eta": "eta {:g}", "guidance_rescale": "guidance rescaled by {:g}"}
    return ", ".join(text.format(line[knob]) for knob, text in words.items() if line[knob] != usual[knob]) or "the usual setting"


# -- for people


def as_good_as(found: dict) -> str:
    """What one picture is as good as, in words; found: best_of as `evaluate` writes it.

    >>> as_good_as({"value": 3.42, "low": 2.9, "high": 4.1, "most": 16})
    'as good as the best of 3.4 [2.9, 4.1]'
    >>> as_good_as({"value": 0.5, "low": 0.4, "high": 0.8, "most": 16})
    'only as good as the worst of 2.0 [1.2, 2.5]'
    >>> as_good_as({"value": 0.9, "low": 0.8, "high": 1.5, "most": 16})
    'only as good as the worst of 1.1 [worst of 1.2, best of 1.5]'
    >>> as_good_as({"value": None, "low": 11.0, "high": None, "most": 16})
    'better than the best of 16 [11.0, more]'
    >>> as_good_as({"value": 0.98, "low": 0.6, "high": 1.5, "most": 16})
    'as good as the best of 1.0 [worst of 1.7, best of 1.5]'
    """
    head = claims.choice(found)
    if found["value"]:
        head = f"{'only ' if 'worst' in head else ''}as good as {head}"
    if not claims.known(found):
        return head
    few = claims.unbounded(found)
    return f"{head} (so few prompts say nothing of others)" if few else f"{head} [{', '.join(claims.ends(found))}]"


def in_words(size: dict) -> list[str]:
    """How much a round gained, in a few clauses, most telling first; size: as `evaluate` writes it."""
    right, even, shift, moved = (size[name] for name in ("right", "diversity_at_equal_quality", "shift", "visible_change"))
    said = [f"one picture is {as_good_as(size['best_of'])} of the base"]
    if right:
        said.append(f"right {100 * right['base']['value']:.1f} -> {100 * right['after']['value']:.1f} % "
                    f"({right['mended']:,} mended, {right['broken']:,} broken of {right['pictures']:,})")
    elif shift["value"] is not None:
        said.append(f"mean {shift['value']:+.2f} standard deviations of the base")
    if even["value"] is not None:
        said.append(f"diversity {even['value']:.2f} of the base's at equal quality")
    if moved["value"] is not None:
        said.append(f"visible change {moved['value']:.2f}")
    return said
