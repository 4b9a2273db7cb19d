"""What is looked at before a pair set is trained on: pure functions of pairs and pictures, and sentences of what they find."""

import hashlib
import math
import sqlite3
from collections import Counter
from collections.abc import Iterable
from itertools import groupby

import numpy as np
import pyarrow as pa

from fashiondpo_pipeline import codecs, seeds, statistics
from fashiondpo_pipeline.pairsets import Numbers, PairSet

MOST = 2_000  # pairs whose pixels are looked at
RESAMPLES = 2_000
FEWEST = 5  # prompts from which on an interval of them is worth its name
COVERAGE, Z = 0.95, 1.959964


def wilson(wins: int, count: int, z: float = Z) -> tuple[float, float]:
    """Interval of a share.  Wilson 1927, as in Brown, Cai & DasGupta 2001, eq. 4.

    >>> [round(end, 4) for end in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    return statistics.wilson(wins / count, count, z)


def contradicted(pairs: Iterable[tuple[int, int]]) -> int:
    """How many of one group's (winner, loser) pairs lie on a cycle, or between two: a beats b, b beats c, c beats a. 0 if they agree.

    Pictures that never won, or never lost, are taken away until none is left or all do both (Kahn 1962).

    >>> contradicted([(0, 1), (1, 2), (2, 0), (2, 3)]), contradicted([(0, 1), (1, 2), (0, 2)]), contradicted([(0, 1), (1, 0)])
    (3, 0, 2)
    """
    left = [pair for pair in pairs if pair[0] != pair[1]]
    while True:
        both = {winner for winner, _ in left} & {loser for _, loser in left}
        kept = [pair for pair in left if pair[0] in both and pair[1] in both]
        if len(kept) == len(left):
            return len(left)
        left = kept


class Contests:
    """Who won against whom in which group, in a temporary file once they are many."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE contests (a TEXT, winner INTEGER, loser INTEGER)")

    def put(self, rows: Iterable[tuple[str, int, int]]) -> None:
        """(group, winner, loser) of some pairs; a group's need not come together."""
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO contests VALUES (?, ?, ?)", rows)
        self._db.execute("COMMIT")

    def circles(self) -> dict:
        """How many groups hold pairs that contradict each other, how many such pairs there are, and one of the groups."""
        found: dict = {"groups": 0, "pairs": 0, "example": None}
        for group, rows in groupby(self._db.execute("SELECT a, winner, loser FROM contests ORDER BY a"), lambda row: row[0]):
            if count := contradicted((winner, loser) for _, winner, loser in rows):
                found = {"groups": found["groups"] + 1, "pairs": found["pairs"] + count, "example": found["example"] or group}
        return found


def bias(differences: dict[str, list[float]], seed: int = 0) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of what winners have more than losers, by group; whole groups are resampled, as their pairs share pictures.

    Of fewer groups than FEWEST there is no interval: so few say nothing of others.
    """
    if len(differences) < FEWEST:
        return float(np.mean([value for found in differences.values() for value in found])), None, None
    if len(differences) < statistics.FEW:
        means = np.array([np.mean(found) for found in differences.values()])
        low, high = statistics.student(means, COVERAGE)  # a bootstrap of so few is too narrow
        return float(means.mean()), low, high
    most = max(map(len, differences.values()))
    values = np.array([found + [math.nan] * (most - len(found)) for found in differences.values()])  # (g, most)
    return statistics.bootstrap(values, seed, RESAMPLES, COVERAGE)


def check(pairs: PairSet) -> dict:
    """Everything there is to know of a set before training: counts, shares with their intervals. A cycle is sought among one group's pairs.

    Pairs that name a picture which is not there are counted, and nothing else is said of them.
    """
    digests, same = Numbers(), Counter(dict.fromkeys(("in its group", "in another"), 0))
    first_of = Numbers()
    for table in pairs.pictures(["group", "candidate", "picture"]):
        for row in table.to_pylist():
            digest = hashlib.sha256(row["picture"]["bytes"]).digest()
            known = int.from_bytes(digest[:7], "big")
            same["in its group"] += first_of.find(row["group"], digest) is not None
            same["in another"] += first_of.find(row["group"], digest) is None and first_of.find("", digest) is not None
            first_of.put([(row["group"], digest, 1), ("", digest, 1)])
            digests.put([(row["group"], row["candidate"], known)])

    won, itself, contests = Counter(first=0, second=0), 0, Contests()
    dangling, example = 0, None
    sampled: list[tuple[int, str, int, int]] = []
    for table in pairs.pairs(["group", "first", "second", "label"]):
        decided = []
        for row in table.to_pylist():
            there = [digests.find(row["group"], row[side]) for side in ("first", "second")]
            if None in there:
                dangling, example = dangling + 1, example or row["group"]
                continue
            if row["label"] is None:
                continue
            alike = there[0] == there[1]
            itself += alike and row["label"] != 0.5
            if row["label"] == 0.5:
                continue
            side = "first" if row["label"] > 0.5 else "second"
            won[side] += 1
            winner, loser = (row["first"], row["second"]) if side == "first" else (row["second"], row["first"])
            decided.append((row["group"], winner, loser))
            sampled.append((seeds.key("look", row["group"], winner, loser), row["group"], winner, loser))
            if len(sampled) >= 2 * MOST:
                sampled = sorted(sampled)[:MOST]
        contests.put(decided)
    total = won.total()
    found: dict = {
        "pictures": pairs.counts["pictures"], "pairs": total, "duplicates": dict(same), "itself": itself,
        "dangling": {"pairs": dangling, "example": example}, "cycles": contests.circles(),
        "first": None, "bias": {},
    }
    if total and pairs.manifest.get("placed", True):
        low, high = wilson(won["first"], total)
        found["first"] = {"share": won["first"] / total, "low": low, "high": high}
    if total:
        found["bias"], found["looked"] = _pixels(pairs, sorted(sampled)[:MOST])
    return found


def _pixels(pairs: PairSet, chosen: list[tuple[int, str, int, int]]) -> tuple[dict, int]:
    """Each meter's bias over the chosen pairs, in the set's own order, so that shards are read once."""
    meters: dict[tuple[str, int], tuple[float, ...]] = {}
    wanted = {(group, number) for _, group, *numbers in chosen for number in numbers}
    for table in pairs.pictures(["group", "candidate", "picture"]):
        keys = zip(table["group"].to_pylist(), table["candidate"].to_pylist(), strict=True)
        for row in table.take(pa.array([n for n, key in enumerate(keys) if key in wanted], pa.int64())).to_pylist():
            picture = codecs.decode_picture(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}")
            picture.thumbnail((512, 512))
            meters[row["group"], row["candidate"]] = statistics.meters(np.asarray(picture))
    found = {}
    for n, name in enumerate(statistics.METERS):
        differences: dict[str, list[float]] = {}
        for _, group, winner, loser in chosen:
            differences.setdefault(group, []).append(meters[group, winner][n] - meters[group, loser][n])
        mean, low, high = bias(differences)
        found[name] = {"mean": mean, "low": low, "high": high}
    return found, len(chosen)


def sentences(found: dict) -> list[str]:
    """The findings in plain words, warnings first in each; nothing is said of what is as it should be, but for one line."""
    lines = []
    pairs, copies = found["pairs"], found["duplicates"]
    if copies["in its group"] or copies["in another"]:
        lines.append(f"warning: {copies['in its group']:,} pictures are copies of another of their prompt, {copies['in another']:,} of another "
                     "prompt's: who won against a copy teaches nothing")
    if found["itself"]:
        lines.append(f"warning: in {found['itself']:,} of {pairs:,} pairs winner and loser are the same picture")
    if found["dangling"]["pairs"]:
        lines.append(f"warning: {found['dangling']['pairs']:,} pairs name a picture that is not in the set, such as one of "
                     f"'{found['dangling']['example']}': they are not trained on")
    if found["cycles"]["groups"]:
        cycles = found["cycles"]
        lines.append(f"warning: {cycles['pairs']:,} pairs of {cycles['groups']:,} prompts contradict each other in a circle, such as in "
                     f"'{cycles['example']}'")
    first = found["first"]
    if first and not first["low"] <= 0.5 <= first["high"]:
        lines.append(f"warning: the first (left) picture won {_percent(first)} of {pairs:,} pairs: the place may have decided, not the picture")
    for name, one in found["bias"].items():
        if one["low"] is not None and not one["low"] <= 0 <= one["high"] and round(one["mean"], 4):
            more = "more" if one["mean"] > 0 else "less"
            interval = f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
            lines.append(f"note: winners have {more} {name.replace('_', ' ')} than losers, {interval}: training will push it")
    if not pairs:
        return [*lines, "checks: no pair has a winner yet"]
    return lines or [f"checks: nothing strange in {pairs:,} pairs"]


def _percent(share: dict) -> str:
    return f"{100 * share['share']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
