"""Scores to preference pairs: normalise each expert, mix, choose pairs. Pure numpy, no loop over groups.

Scores live in a grid (g, k): one row a group, one column a candidate, NaN where there is no candidate or no score.
A missing score is missing: it takes the candidate out of the pairs, it is never a zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIRROR_PAIRS = 10  # FashionDistill's cap
MOST_CODES = 1 << 28  # bytes of a table of all possible pairs; beyond, pairs are sorted to compare them
TIE = 1e-9  # a smaller gap of normalised scores is rounding: equal mixes of unequal experts differ by it


@dataclass(frozen=True)
class Rule:
    """How pairs are chosen; the fields are `pair`'s in pipeline.yaml."""

    weights: dict[str, float]
    normalise: str = "zscore"
    over: str = "group"
    saturate: float | None = None
    select: str = "all"
    margin: float = 0.5
    agree: float | None = None
    per_group: int | None = None
    per_candidate: int | None = None
    labels: str = "scored"


@dataclass(frozen=True)
class Pairs:
    """p pairs: row numbers of their groups, column numbers of winner and loser, and their margins; all (p,)."""

    group: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    margin: np.ndarray

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, keep: np.ndarray) -> "Pairs":
        return Pairs(self.group[keep], self.winner[keep], self.loser[keep], self.margin[keep])


@dataclass(frozen=True)
class Spread:
    """What normalising over all groups needs to know: gathered once, then used on any part of the grid."""

    mean: float
    deviation: float
    low: float
    high: float
    ordered: np.ndarray | None  # every score, ascending; only for ranks

    @classmethod
    def of(cls, scores: np.ndarray, ranks: bool) -> "Spread":
        found = scores[np.isfinite(scores)]
        if not len(found):
            return cls(0.0, 0.0, 0.0, 0.0, found if ranks else None)
        ordered = np.sort(found) if ranks else None
        return cls(float(found.mean()), float(found.std()), float(found.min()), float(found.max()), ordered)


def normalise(scores: np.ndarray, how: str, spread: Spread | None = None) -> np.ndarray:
    """Scores (g, k) on a common scale, within each row, or over all if `spread` is given; NaN stays NaN.

    zscore: standard deviations from the mean. minmax: 0..1. rank: 0..1, ties share their mean rank. winrate: 0..1, the chance to beat
    another of the row, scores being logits (CaPO, 2502.02588); `spread` then only makes logits of scores that are none, such as
    cosines, by counting them in its standard deviations. A row (or everything) without spread becomes 0 for zscore and 0.5 for the
    others: no opinion, hence no pair. raw: the scores themselves.

    >>> normalise(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, np.nan]]), "minmax").tolist()
    [[0.0, 0.5, 1.0], [0.5, 0.5, nan]]
    """
    if how == "raw":
        return scores
    if how == "rank":
        return _ranks(scores) if spread is None else _ranks_over_all(scores, spread)
    if how == "winrate":
        return _win_rates(scores if spread is None else normalise(scores, "zscore", spread))
    known = np.isfinite(scores)
    if spread is not None:
        mean, deviation, low, high = spread.mean, spread.deviation, spread.low, spread.high
    else:
        count = np.maximum(known.sum(1, keepdims=True), 1)
        mean = np.where(known, scores, 0).sum(1, keepdims=True) / count
        deviation = np.sqrt(np.where(known, (scores - mean) ** 2, 0).sum(1, keepdims=True) / count)
        low = np.where(known, scores, np.inf).min(1, keepdims=True)
        high = np.where(known, scores, -np.inf).max(1, keepdims=True)
    start, width, neutral = (mean, deviation, 0.0) if how == "zscore" else (low, np.subtract(high, low), 0.5)
    with np.errstate(invalid="ignore"):
        # A spread of rounding errors is no spread: equal scores do not always have a mean equal to them.
        flat = ~(np.asarray(width) > 1e-12 * np.maximum(np.abs(mean), 1e-300))
        scaled = np.where(flat, neutral, (scores - start) / np.where(flat, 1.0, width))
    return np.where(known, scaled, np.nan)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Mean rank within each row, 0..1: the share of the others one beats, ties counting half."""
    known = np.isfinite(scores)
    others = np.maximum(known.sum(1) - 1, 1)
    beaten = np.zeros(scores.shape)
    for column in range(scores.shape[1]):  # k is small; (g, k, k) at once would need k times the memory
        rival = scores[:, column : column + 1]
        with np.errstate(invalid="ignore"):
            beaten += np.where(np.isfinite(rival) & known, (scores > rival) + 0.5 * (scores == rival), 0)
    lone = (known.sum(1) < 2)[:, None]
    ranks = np.where(lone, 0.5, (beaten - 0.5) / others[:, None])  # less the half point for meeting oneself
    return np.where(known, ranks, np.nan)


def _win_rates(logits: np.ndarray) -> np.ndarray:
    """Mean chance to beat each other one of its row by Bradley-Terry, 0..1; 0.5 for one that is alone.

    >>> _win_rates(np.log([[3.0, 1.0, np.nan], [1.0, np.nan, np.nan]])).tolist()      # odds of 3 to 1
    [[0.75, 0.25, nan], [0.5, nan, nan]]
    """
    known = np.isfinite(logits)
    beaten = np.zeros(logits.shape)
    for column in range(logits.shape[1]):
        lead = logits - logits[:, column : column + 1]
        beaten += np.where(np.isfinite(lead), 0.5 * (1 + np.tanh(np.where(np.isfinite(lead), lead, 0) / 2)), 0)  # sigma without overflow
    others = known.sum(1, keepdims=True) - 1
    rates = np.where(others < 1, 0.5, (beaten - 0.5) / np.maximum(others, 1))  # less the half point for meeting oneself
    return np.where(known, rates, np.nan)


def _ranks_over_all(scores: np.ndarray, spread: Spread) -> np.ndarray:
    """Mean rank among every score, 0..1."""
    assert spread.ordered is not None
    known, count = np.isfinite(scores), len(spread.ordered)
    low, high = (np.searchsorted(spread.ordered, scores, side) for side in ("left", "right"))
    ranks = (low + high - 1) / 2 / max(count - 1, 1) if count > 1 else np.full(scores.shape, 0.5)
    return np.where(known, ranks, np.nan)


def mix(scores: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """Weighted mean of normalised experts, (g, k); NaN where any expert with a weight has no score."""
    total = sum(weights.values())
    return np.sum([weight / total * scores[name] for name, weight in weights.items() if weight > 0], axis=0)


def choose(mixed: np.ndarray, rule: Rule, threshold: float = 0.0, opinions: Sequence[np.ndarray] = ()) -> Pairs:
    """The pairs that `rule` makes of mixed scores (g, k), widest first within a group.

    threshold: the median of every mixed score, for `median_split`. opinions: each rewarded expert's normalised scores (g, k),
    for `agree` and `pareto` (the mix itself where there are none). Ties, pairs within the margin and pairs that the experts do
    not agree on are left out.
    """
    if rule.select == "pareto":
        pairs = _across_fronts(mixed, rule.margin, opinions or [mixed])
    else:
        pairs = {"all": _every, "best_worst": _mirror, "mirror": _mirror, "median_split": _split}[rule.select](mixed, rule.margin, threshold)
    if rule.agree is not None:
        pairs = pairs[_agreed(pairs, rule.agree, opinions)]
    order = np.lexsort((-pairs.margin, pairs.group))  # stable: equal margins stay in the order of their candidates
    pairs = pairs[order]
    per_group = {"best_worst": 1, "mirror": rule.per_group or MIRROR_PAIRS}.get(rule.select, rule.per_group)
    if rule.per_candidate is not None:
        pairs = pairs[_within_cap(pairs, rule.per_candidate, mixed.shape[1])]
    if per_group is not None:
        pairs = pairs[_nth_in_group(pairs.group) < per_group]
    return pairs


def _agreed(pairs: Pairs, agree: float, opinions: Sequence[np.ndarray]) -> np.ndarray:
    """Which pairs every expert by itself prefers by at least `agree`: the winner Pareto-dominates the loser."""
    keep = np.ones(len(pairs), bool)
    for scores in opinions:
        gap = scores[pairs.group, pairs.winner] - scores[pairs.group, pairs.loser]
        keep &= (gap >= agree) & (gap > -TIE)
    return keep


def _every(mixed: np.ndarray, margin: float, _: float) -> Pairs:
    """All pairs of a group that are no tie and at least the margin apart."""
    found = []
    for first in range(mixed.shape[1]):
        for second in range(first + 1, mixed.shape[1]):
            gap = mixed[:, first] - mixed[:, second]
            with np.errstate(invalid="ignore"):
                rows = np.flatnonzero((np.abs(gap) >= margin) & (np.abs(gap) > TIE))
            gap = gap[rows]
            won = gap > 0
            found.append((rows, np.where(won, first, second), np.where(won, second, first), np.abs(gap)))
    return _pairs(found)


def _mirror(mixed: np.ndarray, margin: float, _: float) -> Pairs:
    """Best against worst, second best against second worst, and so on inwards."""
    order = np.argsort(-np.nan_to_num(mixed, nan=-np.inf), axis=1, kind="stable")  # missing scores go last
    known = np.isfinite(mixed).sum(1)
    found = []
    for depth in range(mixed.shape[1] // 2):
        rows = np.flatnonzero(known >= 2 * (depth + 1))
        winner, loser = order[rows, depth], order[rows, known[rows] - 1 - depth]
        gap = mixed[rows, winner] - mixed[rows, loser]
        keep = (gap >= margin) & (gap > TIE)
        found.append((rows[keep], winner[keep], loser[keep], gap[keep]))
    return _pairs(found)


def _split(mixed: np.ndarray, margin: float, threshold: float) -> Pairs:
    """Everything at or above the threshold against everything below it."""
    pairs = _every(mixed, margin, threshold)
    keep = (mixed[pairs.group, pairs.winner] >= threshold) & (mixed[pairs.group, pairs.loser] < threshold)
    return pairs[keep]


def _across_fronts(mixed: np.ndarray, margin: float, opinions: Sequence[np.ndarray]) -> Pairs:
    """The upper Pareto front against the lower one across experts, whoever is on both left out.  CaPO, Lee et al. 2025 (2502.02588)."""
    pairs = _every(mixed, margin, 0.0)
    upper, lower = _fronts(np.where(np.isfinite(mixed), opinions, np.nan))
    winner, loser = upper & ~lower, lower & ~upper
    return pairs[winner[pairs.group, pairs.winner] & loser[pairs.group, pairs.loser]]


def _fronts(opinions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who of a row is dominated by nobody and who dominates nobody, (g, k) each, by experts' scores (m, g, k); a NaN is on neither.

    One dominates another if no expert scores it lower and some expert scores it higher.
    """
    known = np.isfinite(opinions).all(0)
    dominated, dominates = np.zeros(known.shape, bool), np.zeros(known.shape, bool)
    for column in range(known.shape[1]):
        with np.errstate(invalid="ignore"):
            lead = opinions - opinions[:, :, column : column + 1]  # (m, g, k), NaN compares as False
        dominates |= (lead >= -TIE).all(0) & (lead > TIE).any(0)
        dominated |= (lead <= TIE).all(0) & (lead < -TIE).any(0)
    return known & ~dominated, known & ~dominates


def _pairs(found: Sequence[tuple[np.ndarray, ...]]) -> Pairs:
    if not found:
        nobody = np.empty(0, int)
        return Pairs(nobody, nobody, nobody, np.empty(0))
    return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _nth_in_group(group: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal numbers."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def _within_cap(pairs: Pairs, cap: int, k: int) -> np.ndarray:
    """Which pairs stay when, widest first, no candidate may be in more than `cap` pairs."""
    used: dict[int, int] = {}
    keep = np.zeros(len(pairs), bool)
    ids = zip((pairs.group * k + pairs.winner).tolist(), (pairs.group * k + pairs.loser).tolist(), strict=True)
    for number, (winner, loser) in enumerate(ids):
        if used.get(winner, 0) < cap and used.get(loser, 0) < cap:
            used[winner], used[loser] = used.get(winner, 0) + 1, used.get(loser, 0) + 1
            keep[number] = True
    return keep


def reasons(scores: dict[str, np.ndarray], mixed: np.ndarray, pairs: Pairs, rule: Rule) -> dict[int, str]:
    """Why each group without a pair has none: row number -> a few words."""
    counts = np.bincount(pairs.group, minlength=len(mixed))
    found = {}
    for row in np.flatnonzero(counts == 0).tolist():
        known = np.isfinite(mixed[row])
        if known.sum() < 2:
            silent = {name: int((~np.isfinite(grid[row])).sum()) for name, grid in scores.items()}
            said = [f"{name} gave no score for {count} of {len(known)}" for name, count in silent.items() if count]
            found[row] = "; ".join(said) or "a pair needs two candidates"
        elif np.ptp(mixed[row][known]) <= TIE:
            found[row] = "all scores are equal"
        elif rule.select == "median_split" and np.ptp(mixed[row][known]) >= rule.margin:
            found[row] = "all on one side of the median"
        elif rule.select == "pareto" and rule.agree is None and np.ptp(mixed[row][known]) >= rule.margin:
            found[row] = "no pair beyond the margin between the upper and the lower Pareto front"
        else:
            widest = np.ptp(mixed[row][known])
            within = f"widest gap {widest:.3g} is within the margin {rule.margin:g}"
            found[row] = within if rule.agree is None or widest < rule.margin else "the experts agree on no pair beyond the margin"
    return found


def compare(before: Pairs, after: Pairs, k: int) -> dict[str, int]:
    """How many pairs two rules over the same grid share: kept, flipped, lost, new."""

    kept, turned = int(_is_in(after, before, k).sum()), int(flipped(before, after, k).sum())
    return {"kept": kept, "flipped": turned, "lost": len(before) - kept - turned, "new": len(after) - kept - turned}


def flipped(before: Pairs, after: Pairs, k: int) -> np.ndarray:
    """Which pairs of `after` stand the other way round in `before`; a bool each."""
    return _is_in(Pairs(after.group, after.loser, after.winner, after.margin), before, k)


def shared(before: Pairs, after: Pairs, k: int) -> np.ndarray:
    """Which pairs of `after` stand the same way in `before`; a bool each."""
    return _is_in(after, before, k)


def _is_in(some: Pairs, others: Pairs, k: int) -> np.ndarray:
    """Which of some pairs are among others; each pair by itself is one number."""
    if not len(some) or not len(others):
        return np.zeros(len(some), bool)
    size = (int(max(some.group.max(), others.group.max())) + 1) * k * k
    asked, known = ((pairs.group * k + pairs.winner) * k + pairs.loser for pairs in (some, others))
    if size > MOST_CODES:
        return np.isin(asked, known, assume_unique=True)
    there = np.zeros(size, bool)  # looked up, which takes a tenth of sorting
    there[known] = True
    return there[asked]


def rank_correlation(before: np.ndarray, after: np.ndarray) -> float:
    """Spearman's rank correlation within groups, over every candidate with both scores; NaN where nothing varies."""
    return correlation_of(rank_moments(before, after))


def rank_moments(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What the correlation is made of, (3,): sums over some groups of r s, r r and s s. Of all groups it is the sum of their parts'."""
    both = np.isfinite(before) & np.isfinite(after)
    first, second = (np.nan_to_num(_ranks(np.where(both, grid, np.nan)) - 0.5) for grid in (before, after))
    return np.array([(first * second).sum(), (first**2).sum(), (second**2).sum()])


def correlation_of(moments: np.ndarray) -> float:
    """The correlation that such sums make; NaN where nothing varies."""
    scale = np.sqrt(moments[1] * moments[2])
    return float(moments[0] / scale) if scale > 0 else float("nan")
