"""Score tables as a grid: a row for each group, a column for each candidate, so that no loop over groups chooses pairs."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import preferences
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.preferences import Pairs, Rule, Spread

GROUPS_A_PART = 32_768  # bounds the memory of choosing and writing
UNCHOSEN = {  # why a wide enough pair is not among those of a selection
    "best_worst": "not the best against the worst", "mirror": "not opposite in rank", "median_split": "both on one side of the median",
    "pareto": "not between the upper and the lower Pareto front",
}


@dataclass(frozen=True)
class Grid:
    """groups: (g,) keys. scores: expert -> (g, k) float64, NaN where there is no candidate or no score."""

    groups: pa.Array
    scores: dict[str, np.ndarray]

    @property
    def k(self) -> int:
        return next(iter(self.scores.values())).shape[1]

    @classmethod
    def of(cls, candidates: pa.Table, scores: dict[str, pa.Table]) -> "Grid":
        """From a table with group and candidate, and one with group, candidate and score for each expert; any row order."""
        return cls.gathered([candidates], {name: [table] for name, table in scores.items()})

    @classmethod
    def gathered(cls, candidates: Iterable[pa.Table], scores: Mapping[str, Iterable[pa.Table]]) -> "Grid":
        """The same from tables that come in pieces, each of which is let go before the next."""
        names, k = [], 0
        for piece in candidates:
            names.append(pc.unique(piece["group"]))
            k = max(k, int(pc.max(piece["candidate"]).as_py()) + 1)
        groups = pc.unique(pa.chunked_array(names)).sort()
        return cls(groups, {name: lay(pieces, groups, k, name) for name, pieces in scores.items()})

    @classmethod
    def joined(cls, grids: list["Grid"]) -> "Grid":
        """Grids of other groups each, one below the other."""
        names = grids[0].scores
        return cls(pa.concat_arrays([grid.groups for grid in grids]), {name: np.concatenate([grid.scores[name] for grid in grids]) for name in names})

    def part(self, rows: slice) -> "Grid":
        return Grid(self.groups[rows], {name: grid[rows] for name, grid in self.scores.items()})


def lay(pieces: Iterable[pa.Table], groups: pa.Array, k: int, name: str) -> np.ndarray:
    """(g, k) scores of rows with group, candidate and score; NaN where there is none."""
    grid = np.full((len(groups), k), np.nan)
    for piece in filter(len, pieces):
        rows = _rows_of(piece["group"], groups)
        if rows.null_count:
            strangers = f"{rows.null_count} rows belong to no candidate"
            raise UserError(f"scores of '{name}': {strangers}; `fdpo status --verify` finds the file")
        grid[rows.to_numpy(), piece["candidate"].to_numpy()] = piece["score"].to_numpy()
    return grid


def _rows_of(keys: pa.ChunkedArray, groups: pa.Array) -> pa.ChunkedArray:
    """Where each key stands among the sorted groups; only those between the least and the greatest key are searched.

    A piece mostly holds neighbours, so that the work for all pieces grows as their rows, not as rows times pieces.
    """
    ends = pc.min_max(keys)
    low = bisect_left(groups, ends["min"].as_py(), key=_text)
    high = bisect_right(groups, ends["max"].as_py(), key=_text)
    return pc.add(pc.index_in(keys, groups.slice(low, high - low)), pa.scalar(low, pa.int32()))


def _text(key: pa.Scalar) -> str:
    return key.as_py()


def quantile(scores: np.ndarray, share: float | None) -> float:
    """The score that so large a share of all known ones do not exceed; infinite without a share, or a score."""
    known = scores[np.isfinite(scores)]
    return float(np.quantile(known, share)) if share is not None and len(known) else np.inf


class Chooser:
    """A rule applied to a grid. What it must know of everything is gathered once; then it can go part by part, in bounded memory."""

    def __init__(self, grid: Grid, rule: Rule, known: tuple[dict[str, float], dict[str, Spread | None], float] | None = None):
        self.grid, self.rule = grid, rule
        self.rewarded = [name for name, weight in rule.weights.items() if weight > 0]
        if known:
            self._most, self._spread, self._threshold = known
            return
        ranks, over_all = rule.normalise == "rank", rule.over == "all"
        self._most = {name: quantile(grid.scores[name], rule.saturate) for name in self.rewarded}
        self._spread = {name: Spread.of(scores, ranks) if over_all else None for name, scores in self.saturated.items()}
        self._threshold = 0.0
        if rule.select == "median_split":
            mixed = np.concatenate([part.mixed for _, part in self.each()])
            self._threshold = float(np.nanmedian(mixed)) if np.isfinite(mixed).any() else 0.0

    @cached_property
    def saturated(self) -> dict[str, np.ndarray]:
        """Each rewarded expert's scores, those above the rule's quantile of all being that; (g, k) each."""
        return {name: np.minimum(self.grid.scores[name], self._most[name]) for name in self.rewarded}

    @cached_property
    def logits(self) -> dict[str, np.ndarray]:
        """Each rewarded expert's scores as something to put a sigmoid on, (g, k): as `winrate` takes them; else standard deviations."""
        raw = self.rule.normalise == "winrate" and self.rule.over != "all"
        scores = self.saturated
        return scores if raw else {name: preferences.normalise(s, "zscore", self._spread[name]) for name, s in scores.items()}

    @cached_property
    def normal(self) -> dict[str, np.ndarray]:
        """Each rewarded expert's normalised scores; (g, k) each."""
        return {name: preferences.normalise(scores, self.rule.normalise, self._spread[name]) for name, scores in self.saturated.items()}

    @cached_property
    def mixed(self) -> np.ndarray:
        """Their mix, (g, k)."""
        return preferences.mix(self.normal, self.rule.weights)

    @cached_property
    def chosen(self) -> Pairs:
        """The pairs, all at once."""
        return self._choose(slice(None))

    def each(self) -> Iterator[tuple[slice, "Chooser"]]:
        """The same rule on so many groups at a time; what one part works out is not kept."""
        for start in range(0, len(self.grid.groups), GROUPS_A_PART):
            rows = slice(start, start + GROUPS_A_PART)
            yield rows, self.on(self.grid.part(rows))

    def only(self, groups: pa.Array) -> "Chooser":
        """The same rule on those of these groups that are here, with what it knows of everything."""
        rows = np.flatnonzero(pc.is_in(self.grid.groups, groups).to_numpy(zero_copy_only=False))
        few = Grid(self.grid.groups.take(pa.array(rows)), {name: scores[rows] for name, scores in self.grid.scores.items()})
        return self.on(few)

    def on(self, grid: Grid) -> "Chooser":
        """The same rule on another grid, with what it knows of everything."""
        return Chooser(grid, self.rule, (self._most, self._spread, self._threshold))

    def _choose(self, rows: slice, rule: Rule | None = None) -> Pairs:
        opinions = [normal[rows] for normal in self.normal.values()]
        return preferences.choose(self.mixed[rows], rule or self.rule, self._threshold, opinions)

    def pairs(self) -> Pairs:
        """All pairs, numbered over the whole grid."""
        found = [(part.chosen.group + rows.start, part.chosen.winner, part.chosen.loser, part.chosen.margin) for rows, part in self.each()]
        return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def reasons(self) -> dict[int, str]:
        """Why each group without a pair has none."""
        return preferences.reasons({name: self.grid.scores[name] for name in self.rewarded}, self.mixed, self.chosen, self.rule)

    def unpaired(self, row: int) -> list[tuple[int, int, str]]:
        """Every two candidates of a group that make no pair, and why, in a few words."""
        rows, rule = slice(row, row + 1), self.rule
        free = replace(rule, agree=None, per_group=None, per_candidate=None)
        wide, agreed, made = (_duels(self._choose(rows, some)) for some in (free, replace(free, agree=rule.agree), rule))
        found = []
        for first in range(self.mixed.shape[1]):
            for second in range(first + 1, self.mixed.shape[1]):
                if frozenset((first, second)) not in made:
                    found.append((first, second, self._why_not(row, first, second, wide, agreed)))
        return found

    def _why_not(self, row: int, first: int, second: int, wide: set, agreed: set) -> str:
        duel, gap = frozenset((first, second)), self.mixed[row, first] - self.mixed[row, second]
        if np.isnan(gap):
            silent = [name for name, normal in self.normal.items() if np.isnan(normal[row, [first, second]]).any()]
            return f"no score by {', '.join(silent)}"
        if abs(gap) <= preferences.TIE:
            return "a tie"
        if abs(gap) < self.rule.margin:
            return f"gap {abs(gap):.2f} is within the margin {self.rule.margin:g}"
        if duel not in wide:
            return UNCHOSEN[self.rule.select]
        if duel not in agreed:
            gaps = {name: (normal[row, first] - normal[row, second]) * np.sign(gap) for name, normal in self.normal.items()}
            least = min(gaps, key=lambda name: gaps[name])
            return f"{least} sees {gaps[least]:+.2f} of the {self.rule.agree:g} that each must see"
        return "over the cap of per_group or per_candidate"


def _duels(pairs: Pairs) -> set[frozenset[int]]:
    return {frozenset(duel) for duel in zip(pairs.winner.tolist(), pairs.loser.tolist(), strict=True)}


@dataclass(frozen=True)
class Reweighed:
    """Cached scores under another rule: its pairs, how they differ from those before, and which of them are turned round."""

    chooser: Chooser
    pairs: Pairs
    change: dict[str, int]
    flipped: np.ndarray

    def apart(self, before: Pairs) -> dict[str, Pairs]:
        """What the rule changes, beside the pairs `before`: `flipped` and `new` of its own, and of those before what is `lost`."""
        k = self.chooser.grid.k
        kept, turned = preferences.shared(self.pairs, before, k), preferences.flipped(self.pairs, before, k)
        stays = preferences.shared(before, self.pairs, k)
        return {"flipped": self.pairs[self.flipped], "lost": before[~kept & ~turned], "new": self.pairs[~stays & ~self.flipped]}


def reweigh(grid: Grid, rule: Rule, before: Pairs) -> Reweighed:
    """The pairs that `rule` makes of cached scores, beside those `before`, made of the same grid."""
    chooser = Chooser(grid, rule)
    pairs = chooser.pairs()
    return Reweighed(chooser, pairs, preferences.compare(before, pairs, grid.k), preferences.flipped(before, pairs, grid.k))
