"""What is looked at, weighed and annotated: groups of pictures with what experts and people say of them, of a run or a pair set."""

import heapq
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import annotations, sheets
from fashiondpo_pipeline.agreement import Agreement
from fashiondpo_pipeline.annotations import Answer, Duel, Notebook
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Reweighed, reweigh
from fashiondpo_pipeline.opinions import Opinions
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.preferences import Pairs, Rule
from fashiondpo_pipeline.workspace import read_parquet

NOBODY = Rule(weights={"nobody": 1.0})  # of pictures that no expert has scored
ORDERS = ("as drawn", "widest margin first", "most disputed first")
KINDS = ("every group", "with pairs", "without a pair", "lacking a score or picture")


class Store(Protocol):
    """Where the pictures are, and where what is decided goes. `of` names the candidates in annotations."""

    title: str
    of: str
    folder: Path

    def rows(self, groups: list[str]) -> list[dict]:
        """Every candidate of some groups: group, candidate, picture, fault."""

    def save_rule(self, rule: Rule) -> str:
        """Keep the pairs that a rule makes; returns what to say."""

    def save_labels(self, name: str, answers: list[Answer]) -> str:
        """Keep what people said as a pair set; returns what to say."""


@dataclass(frozen=True)
class Album:
    """prompts: group -> prompt. pairs: group -> rows with winner, loser and margin. reasons: why a group has none. paired: whether
    pairs have been made at all. held_out: key of a held-out prompt -> the prompt; side_by_side: how its draws from the same seeds are read,
    (round, section) each. counted: what makes a score of what people say here, in words."""

    store: Store
    opinions: Opinions
    prompts: dict[str, str]
    pairs: dict[str, list[dict]]
    reasons: dict[str, str]
    paired: bool
    seed: int = 7
    held_out: dict[str, str] = field(default_factory=dict)
    side_by_side: Callable[[str], list[tuple[str, "sheets.Section"]]] | None = None
    counted: str = ""

    @property
    def folder(self) -> Path:
        """Where people's answers lie."""
        return self.store.folder / "annotations"

    @property
    def experts(self) -> list[str]:
        return list(self.opinions.grid.scores)

    @cached_property
    def _sound(self) -> np.ndarray:
        """Which candidates have a picture to look at."""
        table = self.opinions.candidates
        return pc.is_null(table["fault"]).to_numpy() if "fault" in table.column_names else np.ones(len(table), bool)

    @property
    def known(self) -> dict[str, set[int]]:
        """Group -> its candidates that can be looked at."""
        found: dict[str, set[int]] = {group: set() for group in self.prompts}
        table = self.opinions.candidates.filter(pa.array(self._sound))
        for group, candidate in zip(table["group"].to_pylist(), table["candidate"].to_pylist(), strict=True):
            found[group].add(candidate)
        return found

    # -- browse

    def find(self, text: str, kind: str, order: str) -> list[str]:
        """Keys of the groups that fit, in the order asked for."""
        wanted = text.strip().lower()
        groups = [group for group, prompt in self.prompts.items() if wanted in f"{group}\n{prompt}".lower()]
        keep = {"with pairs": lambda g: bool(self.pairs.get(g)), "without a pair": lambda g: not self.pairs.get(g),
                "lacking a score or picture": lambda g: g in self._lacking}.get(kind, lambda g: True)
        groups = [group for group in groups if keep(group)]
        if order == "widest margin first":
            groups.sort(key=lambda g: -max((abs(pair["margin"]) for pair in self.pairs.get(g, [])), default=0.0))
        elif order == "most disputed first":
            groups.sort(key=lambda g: self._disputed.get(g, len(self._disputed)))
        return groups

    @cached_property
    def _lacking(self) -> set[str]:
        silent = np.zeros(self.opinions.shape[0], bool)
        for row, _ in self.opinions.silences:
            silent[row] = True
        return set(self.opinions.grid.groups.filter(pa.array(silent)).to_pylist())

    @cached_property
    def _disputed(self) -> dict[str, int]:
        found = annotations.most_disputed(self.opinions.grid.groups, self.opinions.normal, len(self.prompts) * 50) if self.experts else []
        return {group: place for place, group in enumerate(dict.fromkeys(duel.group for duel in found))}

    def section(self, group: str) -> "sheets.Section":
        """One group as it is shown."""
        sheet = sheets.Sheet(self.opinions, self.prompts, self.store.rows([group]))
        return sheet.sections([group], self.pairs.get(group, []), self.reasons)[0]

    # -- weigh

    @cached_property
    def before(self) -> Pairs:
        """The pairs of the rule in force."""
        return self.opinions.chooser.pairs()

    def reweigh(self, rule: Rule) -> Reweighed:
        return reweigh(self.opinions.grid, rule, self.before)

    def turned(self, found: Reweighed, rule: Rule, most: int) -> dict[str, list["sheets.Duel"]]:
        """The widest pairs that a rule turns round (`flipped`), makes no more (`lost`, with the reason) and makes beside (`new`)."""
        opinions = self.opinions.under(rule)
        return {kind: self._duels(opinions, pairs, most, kind == "lost") for kind, pairs in found.apart(self.before).items()}

    def _duels(self, opinions: Opinions, pairs: Pairs, most: int, why: bool) -> list["sheets.Duel"]:
        pairs = pairs[np.argsort(-pairs.margin, kind="stable")[:most]]
        groups = self.opinions.grid.groups.take(pa.array(pairs.group)).to_pylist()
        rows = [{"group": g, "winner": int(w), "loser": int(x), "margin": float(m)}
                for g, w, x, m in zip(groups, pairs.winner, pairs.loser, pairs.margin, strict=True)]
        if why:
            reasons = {row: {frozenset(two): why for *two, why in opinions.chooser.unpaired(row)} for row in set(pairs.group.tolist())}
            for row, place in zip(rows, pairs.group.tolist(), strict=True):
                row["why"] = reasons[place].get(frozenset((row["winner"], row["loser"])))
        return sheets.Sheet(opinions, self.prompts, self.store.rows(list(dict.fromkeys(groups)))).duels([], rows)

    # -- annotate

    def queue(self, kind: str, path: Path | None = None) -> list[Duel]:
        """What to ask, in order: `disputed`, `random`, `pairs` (those that were made), or `list` (of a file)."""
        if kind == "list":
            if path is None:
                raise UserError("a list needs a file: start `fdpo studio` with --list FILE")
            return annotations.listed(path, self.known)
        if kind == "pairs":
            found = [Duel(g, min(p["winner"], p["loser"]), max(p["winner"], p["loser"])) for g, some in self.pairs.items() for p in some]
            return [duel for duel in dict.fromkeys(found) if duel.first != duel.second]
        if kind == "disputed":
            if len(self.experts) < 2:
                raise UserError(f"only {len(self.experts)} of the experts has scored these, and a dispute takes two: ask about random pairs")
            return annotations.most_disputed(self.opinions.grid.groups, self.opinions.normal)
        there = np.zeros(self.opinions.shape, bool)
        there[tuple(at[self._sound] for at in self.opinions.at)] = True
        return annotations.at_random(self.opinions.grid.groups, there, self.seed)

    @cached_property
    def queues(self) -> list[str]:
        """Kinds of queues that have something to ask, the best first."""
        kinds = ["disputed"] if len(self.experts) > 1 else []
        return kinds + (["pairs"] if any(self.pairs.values()) else []) + ["random"]


class Desk:
    """One person before a queue: which pair is asked, what was said. An answer is taken only for the pair that is on the screen.

    What a click costs depends on neither the queue's length nor on how much was said: what the notebook has changed is read on.
    """

    def __init__(self, album: Album, notebook: Notebook, queue: list[Duel]):
        self.album, self.notebook, self.queue = album, notebook, queue
        self._places = {duel: place for place, duel in enumerate(queue)}
        self._seen = len(notebook.changes)
        self._answered = {place for place, duel in enumerate(queue) if duel in notebook}
        self._open = [place for place in range(len(queue)) if place not in self._answered]  # a heap, with answered ones among them

    def _catch_up(self) -> None:
        """Take in what was said since, at this queue or another."""
        for duel in self.notebook.changes[self._seen :]:
            place = self._places.get(duel)
            if place is None:
                continue
            if duel in self.notebook:
                self._answered.add(place)
            elif place in self._answered:
                self._answered.remove(place)
                heapq.heappush(self._open, place)
        self._seen = len(self.notebook.changes)
        while self._open and self._open[0] in self._answered:
            heapq.heappop(self._open)

    @property
    def done(self) -> int:
        """How many of the queue this person has answered."""
        self._catch_up()
        return len(self._answered)

    @property
    def asked(self) -> Duel | None:
        """The first of the queue that this person has not answered."""
        self._catch_up()
        return self.queue[self._open[0]] if self._open else None

    def token(self, duel: Duel | None) -> str:
        """Names what is on the screen."""
        return "" if duel is None else f"{len(self.notebook)} {duel.first} {duel.second} {duel.group}"

    def answer(self, shown: str, verdict: str) -> bool:
        """Keep the answer; False, and nothing kept, where another pair than `shown` is asked by now."""
        with self.notebook.turn:
            duel = self.asked
            if duel is None or shown != self.token(duel):
                return False
            left, right = duel.sides(self.notebook.annotator)
            rows = {row["candidate"]: row for row in self.album.store.rows([duel.group])}
            self.notebook.add(duel.group, left, right, verdict, [_pixels(rows[number]) for number in (left, right)])
            return True

    def undo(self) -> Answer | None:
        return self.notebook.undo()


def _pixels(row: dict) -> str | None:
    """The hash of a picture; None where there is none to see."""
    try:
        return annotations.hash_pixels(decode_picture(row["picture"]["bytes"] if row["picture"] else None, "it"))
    except UserError:
        return None


def in_words(found: Agreement) -> list[tuple[str, str]]:
    """(what, figure) of how people agree: Cohen's kappa of each two with the number of pairs both judged, Krippendorff's alpha of all."""
    lines = [(f"{one} and {other}: Cohen's kappa on {both:,}", _figure(kappa)) for one, other, both, kappa in found.kappas()]
    return [*lines, ("all: Krippendorff's alpha", _figure(found.alpha()))] if lines else []


def _figure(value: float) -> str:
    return "not to be told yet" if np.isnan(value) else f"{value:.2f}"


# -- a pair set

class SetStore:
    """A pair set's pictures. What people say lies in its `annotations/`, the labels that are saved beside it."""

    def __init__(self, found: PairSet):
        self.set, self.folder, self.of, self.title = found, found.folder, "set", f"{found.folder}"
        self._shards = list(found.pictures(["group", "candidate", "prompt"]))
        self._last: tuple[int, pa.Table] | None = None
        self._lock = threading.Lock()

    @cached_property
    def candidates(self) -> pa.Table:
        return pa.concat_tables(self._shards)

    def rows(self, groups: list[str]) -> list[dict]:
        found: list[dict] = []
        wanted = pa.array(groups, pa.string())
        for number, table in enumerate(self._shards):
            places = pc.indices_nonzero(pc.is_in(table["group"], value_set=wanted))
            if len(places):
                found += self._shard(number).take(places).to_pylist()
        return [{**row, "fault": None} for row in found]

    def _shard(self, number: int) -> pa.Table:
        """The shard read last is kept, as neighbours are looked at one after another."""
        with self._lock:
            if self._last is None or self._last[0] != number:
                self._last = number, read_parquet(self.set._files("pictures")[number], ["group", "candidate", "picture"])
            return self._last[1]

    def save_rule(self, rule: Rule) -> str:
        raise UserError("a pair set has no scores to weigh; weights are for a run")

    def save_labels(self, name: str, answers: list[Answer]) -> str:
        lineage = {"set": self.set.identity, "of": self.set.manifest.get("lineage")}
        return save_labels(self, self.candidates, self.folder.parent / name, answers, f"{self.folder}, annotated", lineage)


def of_set(folder: Path) -> Album:
    """The album of a pair set; its labels stand for pairs."""
    found = PairSet.open(folder)
    store = SetStore(found)
    table = store.candidates
    if not len(table):
        raise UserError(f"{folder}: there are no pictures in this set; `fdpo import` says why rows were dropped")
    prompts = dict(zip(table["group"].to_pylist(), (prompt or "" for prompt in table["prompt"].to_pylist()), strict=True))
    pairs: dict[str, list[dict]] = {}
    for part in found.pairs(["group", "first", "second", "label", "gap"]):
        for row in part.to_pylist():
            first_won = row["label"] is None or row["label"] >= 0.5
            winner, loser = (row["first"], row["second"]) if first_won else (row["second"], row["first"])
            margin = row["gap"] if row["gap"] is not None else 0.0 if row["label"] is None else abs(2 * row["label"] - 1)
            undecided = {None: {"undecided": "not labelled"}, 0.5: {"undecided": "tie"}}.get(row["label"], {})
            pairs.setdefault(row["group"], []).append({"group": row["group"], "winner": winner, "loser": loser, "margin": margin} | undecided)
    opinions = Opinions(table.select(["group", "candidate"]), {}, NOBODY)
    return Album(store, opinions, prompts, pairs, {}, paired=False)


def save_labels(store: Store, candidates: pa.Table, folder: Path, answers: list[Answer], source: str, lineage: dict) -> str:
    """What people said as a pair set in `folder`: the left picture first, one row an answer; returns what to say.

    Who found both bad prefers neither, which is a tie with that source; what was skipped, and what has lost a picture, is counted as dropped.
    """
    from fashiondpo_pipeline import pairsets

    kept = [answer for answer in answers if answer.label is not None]
    if not kept:
        raise UserError("nobody has preferred anything yet: there is nothing to save")
    groups = list(dict.fromkeys(answer.group for answer in kept))
    prompts = dict(zip(candidates["group"].to_pylist(), candidates["prompt"].to_pylist(), strict=True))

    written: set[tuple[str, int]] = set()

    def pictures():
        for group in groups:
            for row in store.rows([group]):
                if not row["fault"] and row["picture"] and row["picture"]["bytes"]:
                    written.add((group, row["candidate"]))
                    yield {"group": group, "candidate": row["candidate"], "prompt": prompts[group], "picture": row["picture"]}

    dropped: Counter[str] = Counter({"skipped": len(answers) - len(kept)} if len(kept) < len(answers) else {})

    def pairs():
        for a in kept:
            if not {(a.group, a.left), (a.group, a.right)} <= written:
                dropped["a picture of it is not there"] += 1
                continue
            yield {"group": a.group, "first": a.left, "second": a.right, "label": {"left": 1.0, "right": 0.0}.get(a.verdict, 0.5),
                   "annotator": a.annotator, "source": "both bad" if a.verdict == "both_bad" else None}

    found = pairsets.write(folder, pictures(), pairs(), {"source": source, "lineage": lineage, "dropped": dropped})
    lost = len(kept) - found.counts["pairs"]
    left_out = f"; {lost:,} left out, as a picture is not there" if lost else ""
    return f"saved {found.counts['pairs']:,} answers of {len(groups):,} groups as {folder}{left_out}"
