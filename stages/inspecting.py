"""`fdpo inspect`: one table of one round as rows to read, a contact sheet to look at, or a file to take away. Changes nothing."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import schemas, views
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.exchange import WRITERS
from fashiondpo_pipeline.opinions import Opinions
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.prompts import HELD_OUT, TRAIN
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Output, Step, replace_text
from stages import Round, Session
from stages.single import last, most_rounds, saved_pairs

SHOWN = 20  # rows in the terminal, groups or pairs on a sheet, unless --limit says otherwise
MOST_PICTURES = 5_000  # on one sheet: a browser must still open it
MOST_BYTES = 2**31 - 1  # of pictures in one exported column
_SCORED = {"group", "expert", "min", "max", "missing", "held-out", "html"}
TAKES: dict[str, set[str]] = {
    "candidates": _SCORED, "scores": _SCORED, "pairs": {"group", "expert", "min", "max", "html"}, "steps": set()
}


@dataclass(frozen=True)
class Question:
    """Which rows of which table, in which order. least, most: of the score or margin. sort: COLUMN or COLUMN:desc."""

    table: str
    groups: tuple[str, ...] = ()
    expert: str | None = None
    least: float | None = None
    most: float | None = None
    missing: bool = False
    held_out: bool = False
    sort: str | None = None
    limit: int | None = None

    def first(self, rows: pa.Table, default: int) -> pa.Table:
        """As many rows as were asked for; unsorted steps evenly spaced from first to last."""
        limit = default if self.limit is None else self.limit
        if not limit or limit >= len(rows):
            return rows
        if self.table == "steps" and not self.sort:
            return rows.take(np.linspace(0, len(rows) - 1, limit).round().astype(np.int64))
        return rows.slice(0, limit)


def run(session: Session, asked: Question, number: int | None, pairs: str | None, files: dict[str, Path]) -> None:
    """Print the rows, and write them to `files`: {"csv": path, "json": ..., "parquet": ..., "html": ...}."""
    _check(asked, files)
    shelf = Shelf(session, asked, *_place(session, asked, number, pairs))
    rows, total = {"candidates": shelf.candidates, "scores": shelf.scores, "pairs": shelf.pairs, "steps": shelf.steps}[asked.table]()
    rows = views.ordered(rows, asked.sort) if asked.sort else rows
    _print(session, shelf, rows, total)
    for kind, path in files.items():
        if kind == "html":
            session.say(f"wrote {path}: {_sheet(shelf, rows, path)}")
        else:
            chosen = asked.first(rows, 0)
            WRITERS[kind](path, shelf.with_pictures(chosen) if kind == "parquet" else chosen)
            session.say(f"wrote {path}: {len(chosen):,} rows")


def _check(asked: Question, files: dict[str, Path]) -> None:
    if asked.table not in TAKES:
        raise UserError(f"there is no table '{asked.table}' to inspect; {did_you_mean(asked.table, list(TAKES))}")
    given = {"group": asked.groups, "expert": asked.expert, "missing": asked.missing, "held-out": asked.held_out,
             "min": asked.least is not None, "max": asked.most is not None, "html": "html" in files}
    for option in (name for name, value in given.items() if value and name not in TAKES[asked.table]):
        takers = ", ".join(name for name, takes in TAKES.items() if option in takes)
        raise UserError(f"--{option} means nothing for {asked.table}, only for {takers}: leave it out")
    for kind, path in files.items():
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"--{kind} {path}: {'that is a folder' if path.is_dir() else f'there is no folder {path.parent}'}; name a file")


def _place(session: Session, asked: Question, number: int | None, pairs: str | None) -> tuple[Round, Rule]:
    """The round meant (the one named, else the one with that pair set, else the last that has the table) and its pair rule."""
    if number is None and pairs:
        there = sorted(session.run.root.glob(f"round-*/pair-{pairs}/manifest.json"))
        number = int(there[-1].parts[-3].removeprefix("round-")) if there else None
    if number is None:
        chain = session.chain(max(most_rounds(session), session.config.rounds))
        number = last(session, chain, lambda r: next((s for s in _needs(r, asked) if not session.run.done(s)), _needs(r, asked)[0]))
    if number == 0 and not asked.held_out:
        raise UserError("round 0 is the base and has held-out draws only: add --held-out, or name another round")
    section = saved_pairs(session, number, pairs) if pairs else session.config.pair
    r = session.chain(number, {number: section}).rounds[number]
    if pairs and r.pair and r.pair.fingerprint != pairs:
        raise UserError(f"pairs {pairs} of round {number} were made under other settings; `fdpo status` says what changed since")
    for step in _needs(r, asked):
        session.output(step)
    return r, Rule(**section.model_dump())


def _needs(r: Round, asked: Question) -> list[Step]:
    """What must be done before the table can be shown; for scores, every expert that is rewarded."""
    drawn, scores = _drawn(r, asked)
    rewarded = [scores[role.removeprefix("score-")] for role in (r.pair.inputs if r.pair else {}) if role.startswith("score-")]
    needs = {"candidates": [drawn], "scores": [drawn, *rewarded], "pairs": [drawn, r.pair], "steps": [r.finetune]}
    return needs[asked.table]


def _drawn(r: Round, asked: Question) -> tuple[Step, dict[str, Step]]:
    return (r.held_out, r.held_out_scores) if asked.held_out else (r.sample, r.scores)


class Shelf:
    """One round's tables as the question asks for them; each is read when it is first needed, and only the columns needed."""

    def __init__(self, session: Session, asked: Question, r: Round, rule: Rule):
        self.session, self.asked, self.round, self.rule = session, asked, r, rule
        self.drawn, scores = _drawn(r, asked)
        self.scored = {name: step for name, step in scores.items() if session.run.done(step)}
        self.unscored = [name for name in scores if name not in self.scored]
        if asked.expert and asked.expert not in scores:
            raise UserError(f"no expert called '{asked.expert}'; {did_you_mean(asked.expert, list(scores))}")
        if asked.expert in self.unscored:
            raise UserError(f"round {r.number}: '{asked.expert}' has not scored yet; `fdpo score --round {r.number}` asks it")

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Key of a group -> its prompt."""
        return {row["group"]: row["prompt"] for row in self.session.prompts[HELD_OUT if self.asked.held_out else TRAIN].rows}

    @cached_property
    def opinions(self) -> Opinions:
        candidates = self.session.output(self.drawn).table("candidates", [c for c in schemas.CANDIDATES.names if c != "picture"])
        scores = {name: self.session.output(step).table("scores") for name, step in self.scored.items()}
        return Opinions(candidates, scores, self.rule)

    # -- the four tables: (rows that were asked for, rows there are)

    def candidates(self) -> tuple[pa.Table, int]:
        if self.asked.expert is None and not self.asked.least is self.asked.most is None:
            raise UserError(f"candidates have a score from each expert: add --expert NAME ({', '.join(self.scored)}), "
                            "or look at `fdpo inspect scores`, which has their mix")
        rows = views.candidates(self.opinions, self._kept(), self._experts())
        return rows, len(self.opinions.candidates)

    def scores(self) -> tuple[pa.Table, int]:
        rows = views.scores(self.opinions, self._kept(), self._experts())
        return rows, len(self.opinions.candidates)

    def pairs(self) -> tuple[pa.Table, int]:
        everything = self.session.output(self.round.pair).table("pairs")
        rows = everything.filter(self._in_groups(everything["group"])) if self.asked.groups else everything
        if self.asked.expert and f"gap_{self.asked.expert}" not in rows.column_names:
            rows = views.with_gap(rows, self.opinions, self.asked.expert)
        if self.asked.expert:
            others = [name for name in rows.column_names if name.startswith("gap_") and name != f"gap_{self.asked.expert}"]
            rows = rows.drop_columns(others)
        value = rows[f"gap_{self.asked.expert}" if self.asked.expert else "margin"].to_numpy()
        return rows.filter(pa.array(self._within(value))), len(everything)

    def steps(self) -> tuple[pa.Table, int]:
        rows = self.session.output(self.round.finetune).table("steps")
        return rows, len(rows)

    # -- filters

    def _experts(self) -> list[str]:
        return [self.asked.expert] if self.asked.expert else list(self.scored)

    def _kept(self) -> np.ndarray:
        """Which candidates pass every filter, (n,) bool."""
        o, at = self.opinions, self.opinions.at
        keep = self._within((o.grid.scores[self.asked.expert] if self.asked.expert else o.mixed)[at]) if self._bounded else np.ones(len(at[0]), bool)
        if self.asked.groups:
            keep &= self._in_groups(o.candidates["group"]).to_numpy()
        if self.asked.missing:
            keep &= np.any([np.isnan(o.grid.scores[name][at]) for name in self._experts()], axis=0)
        return keep

    @property
    def _bounded(self) -> bool:
        return self.asked.least is not None or self.asked.most is not None

    def _within(self, values: np.ndarray) -> np.ndarray:
        keep = np.ones(len(values), bool)
        if self.asked.least is not None:
            keep &= values >= self.asked.least
        if self.asked.most is not None:
            keep &= values <= self.asked.most
        return keep

    def _in_groups(self, groups: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.is_in(groups, value_set=pa.array(views.matching(self.prompts, self.asked.groups), pa.string()))
