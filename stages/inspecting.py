"""`fdpo inspect`: one table of one round to read in the terminal, to look at as a contact sheet, or to take away as a file."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import schemas, views
from fashiondpo_pipeline.config import Pair
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.exchange import WRITERS
from fashiondpo_pipeline.opinions import Opinions
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.terminal import show, size, width
from fashiondpo_pipeline.views import Found
from fashiondpo_pipeline.workspace import Output, Step, replace_text, without_pandas
from stages import Round, Session
from stages.naming import command_for
from stages.rounds import in_words
from stages.single import imported, last, most_rounds, number_of, saved_pairs, section_of

SHOWN = 20  # rows in the terminal, groups or pairs on a sheet, unless --limit says otherwise
MOST_PICTURES = 5_000  # on one sheet: a browser must still open it
AT_ONCE = 1_024  # pictures read before their bytes are counted
MOST_BYTES = 2**31 - 1  # of pictures in memory at once, which is also what one Arrow column bears
_SCORED = {"group", "expert", "min", "max", "missing", "held-out", "html"}
TAKES: dict[str, set[str]] = {  # which options mean something for which table
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

    @property
    def bounded(self) -> bool:
        return self.least is not None or self.most is not None

    def within(self, values: np.ndarray) -> np.ndarray:
        """Which values lie between least and most, both included; NaN lies nowhere."""
        low = -np.inf if self.least is None else self.least
        return (values >= low) & (values <= (np.inf if self.most is None else self.most))

    def first(self, count: int, default: int) -> np.ndarray:
        """Which of so many rows: as many as were asked for, 0 being all; of steps that nobody sorted, evenly from first to last."""
        limit = default if self.limit is None else self.limit
        if not limit or limit >= count:
            return np.arange(count)
        if self.table == "steps" and not self.sort:
            return np.linspace(0, count - 1, limit).round().astype(np.int64)
        return np.arange(limit)


def run(session: Session, asked: Question, number: int | None, pairs: str | None, files: dict[str, Path]) -> None:
    """Write the rows to `files` ({"csv": path, "json": ..., "parquet": ..., "html": ...}), and print the first of them."""
    without_pandas()
    _check(asked, files)
    shelf = Shelf(session, asked, *place(session, asked, number, pairs))
    tables = {"candidates": shelf.candidates, "scores": shelf.scores, "pairs": shelf.pairs, "steps": shelf.steps}
    found = tables[asked.table]()
    found = found.ordered(asked.sort) if asked.sort else found
    for kind, path in files.items():  # before printing, which a pager may cut short
        session.say(f"wrote {path}: {_sheet(shelf, found, path) if kind == 'html' else _export(shelf, found, kind, path)}")
    _print(shelf, found)
    r = shelf.round
    if asked.held_out and r.number and session.run.done(r.evaluate):
        session.say(f"round {r.number}: {in_words(session.output(r.evaluate).manifest['numbers'], r.before)}")


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
            problem = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise UserError(f"--{kind} {path}: {problem}; name a file to write")


def place(session: Session, asked: Question, number: int | None, pairs: str | None) -> tuple[Round, Rule]:
    """The round meant (the one named, else the one with that pair set, else the last that has the table), and its rule."""
    if pairs and imported(session, pairs):
        r = _imported(session, asked, number_of(session, number, pairs) or 1, pairs)
        return r, Rule(**session.config.of_round(r.number).pair.rule)
    if number is None and pairs:
        there = sorted(session.run.root.glob(f"round-*/pair-{pairs}/manifest.json"))
        number = int(there[-1].parts[-3].removeprefix("round-")) if there else most_rounds(session)
    session.settle()
    if number is None:
        number = _last(session, asked)
    section = saved_pairs(session, number, pairs) if pairs else session.config.of_round(number).pair
    if number == 0 and not asked.held_out:
        raise UserError("round 0 is the base, which has held-out draws only: add --held-out, or name another round")
    r = session.chain(number, {number: section}).rounds[number]
    if pairs and r.pair.fingerprint != pairs:
        raise UserError(f"pairs {pairs} of round {number} were made of other candidates or scores than these settings give: "
                        "take the settings back, or `fdpo rescore` again")
    for step in _needs(r, asked, section):
        session.output(step)
    return r, Rule(**section.rule)


def _imported(session: Session, asked: Question, number: int, pairs: str) -> Round:
    """The round that was trained on an imported pair set: how training went, and what it draws for held-out prompts."""
    if asked.table == "pairs" or (asked.table != "steps" and not asked.held_out):
        raise UserError(f"--pairs {pairs}: imported pictures and pairs are in their set, which `fdpo studio` shows; of the round there are "
                        "`fdpo inspect steps`, and `candidates` or `scores` with --held-out")
    section = section_of(session, number, pairs)
    r = session.chain(number, {number: section}).rounds[number]
    for step in _needs(r, asked, session.config.pair):
        if not session.run.done(step):
            raise UserError(f"round {number}: {step.name} has not been run on these pairs with these settings: "
                            f"`{session.command(command_for(step), '--round', number, '--pairs', pairs)}` does it, "
                            f"`{session.command('status')}` shows what there is")
    return r


def _last(session: Session, asked: Question) -> int:
    def lacking(r: Round) -> Step:
        needs = _needs(r, asked, session.config.of_round(r.number).pair)
        return next((step for step in needs if not session.run.done(step)), needs[0])

    return last(session, session.chain(max(most_rounds(session), session.config.rounds)), lacking)


def _needs(r: Round, asked: Question, section: Pair) -> list[Step]:
    """What must be done before the table can be shown; for scores, the opinion of every rewarded expert."""
    if asked.table == "steps":
        return [r.finetune]
    if asked.table == "pairs":
        return [r.sample, r.pair]
    drawn, scores = _drawn(r, asked)
    rewarded = [scores[name] for name, weight in section.weights.items() if weight > 0]
    return [drawn, *(rewarded if asked.table == "scores" else [])]


def _drawn(r: Round, asked: Question) -> tuple[Step, dict[str, Step]]:
    return (r.held_out, r.held_out_scores) if asked.held_out else (r.sample, r.scores)


class Shelf:
    """One round's tables as the question asks for them; each is read when first needed, in no more columns than needed."""

    def __init__(self, session: Session, asked: Question, r: Round, rule: Rule):
        self.session, self.asked, self.round, self.rule = session, asked, r, rule
        self.drawn, scores = _drawn(r, asked)
        self.scored = {name: step for name, step in scores.items() if session.run.done(step)}
        self.unscored = [name for name in scores if name not in self.scored]
        if asked.expert and asked.expert not in scores:
            raise UserError(f"no expert called '{asked.expert}'; {did_you_mean(asked.expert, list(scores))}")
        if asked.expert in self.unscored:
            raise UserError(f"round {r.number}: '{asked.expert}' has not scored these yet; {self.ask} asks it")

    @property
    def ask(self) -> str:
        return f"`{self.session.command('evaluate' if self.asked.held_out else 'score', '--round', max(self.round.number, 1))}`"

    @property
    def title(self) -> str:
        parts = [f"{self.session.run.root}", f"round {self.round.number}"]
        parts += ["held-out"] if self.asked.held_out else []
        return " · ".join(parts + ([f"pairs {self.round.pair.fingerprint}"] if self.asked.table == "pairs" else []))

    @cached_property
    def out(self) -> Output:
        """The candidates' folder."""
        return self.session.output(self.drawn)

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Key of a group -> its prompt, as it was drawn."""
        table = self.out.table("candidates", ["group", "candidate", "prompt"])
        table = table.filter(pc.equal(table["candidate"], 0))
        return dict(zip(table["group"].to_pylist(), table["prompt"].to_pylist(), strict=True))

    def prompts_of(self, groups: list[str]) -> dict[str, str]:
        """The same of a few groups, whose rows alone are read."""
        where = pc.index_in(pa.array(groups, pa.string()), self.out.table("candidates", ["group"])["group"].combine_chunks())
        return dict(zip(groups, self.out.rows("candidates", ["prompt"], where.to_numpy())["prompt"].to_pylist(), strict=True))

    @cached_property
    def opinions(self) -> Opinions:
        scores = {name: self.session.output(step).table("scores") for name, step in self.scored.items()}
        return Opinions(self.out.table("candidates", ["group", "candidate", "fault"]), scores, self.rule)

    # -- the four tables

    def candidates(self) -> Found:
        if self.asked.bounded and not self.asked.expert:
            raise UserError(f"--min and --max need --expert NAME for candidates ({', '.join(self.scored)}); "
                            "`fdpo inspect scores` has their mix")
        return self._judged([name for name in schemas.CANDIDATES.names if name != "picture"], self._kept(), ranked=False)

    def scores(self) -> Found:
        return self._judged(["group", "candidate", "prompt"], views.best_first(self.opinions, self._kept()), ranked=True)

    def _judged(self, light: list[str], kept: np.ndarray, ranked: bool) -> Found:
        fields = views.sayings(self.experts, ranked)

        def make(numbers: np.ndarray, names: list[str]) -> pa.Table:
            drawn = [name for name in names if name not in fields]
            rows = self.out.rows("candidates", drawn, numbers) if drawn else pa.table({})
            more = {name: (fields[name], views.said(self.opinions, numbers, self.experts, name)) for name in names if name in fields}
            return views.table(rows, more, names)

        return Found([*light, *fields], kept, len(self.opinions.candidates), make)

    def pairs(self) -> Found:
        out, expert = self.session.output(self.round.pair), self.asked.expert
        stored, gap = out.columns("pairs"), f"gap_{expert}"
        names = [name for name in stored if not name.startswith("gap_") or not expert or name == gap]
        names += [gap] if expert and gap not in stored else []

        def make(numbers: np.ndarray, names: list[str]) -> pa.Table:
            if set(names) <= set(stored):
                return out.rows("pairs", names, numbers)
            needed = dict.fromkeys(["group", "winner", "loser", *(name for name in names if name in stored)])
            return views.with_gap(out.rows("pairs", list(needed), numbers), self.opinions, str(expert)).select(names)

        total = out.count("pairs")
        found = Found(names, np.arange(total), total, make)
        if self.asked.groups:
            found = replace(found, numbers=found.numbers[self._in_groups(found.column("group")).to_numpy()])
        if self.asked.bounded:
            values = found.column(gap if expert else "margin").to_numpy()
            found = replace(found, numbers=found.numbers[self.asked.within(values)])
        return found

    def steps(self) -> Found:
        rows = self.session.output(self.round.finetune).table("steps")
        return Found(rows.column_names, np.arange(len(rows)), len(rows), lambda numbers, names: rows.select(names).take(pa.array(numbers)))

    # -- what belongs to groups

    @property
    def paired(self) -> bool:
        return not self.asked.held_out and self.session.run.done(self.round.pair)

    def pairs_of(self, groups: pa.Array) -> list[dict]:
        """Every pair that some groups gave."""
        if not self.paired:
            return []
        rows = self.session.output(self.round.pair).table("pairs", ["group", "winner", "loser", "margin"])
        return rows.filter(pc.is_in(rows["group"], value_set=groups)).to_pylist()

    def reasons(self) -> dict[str, str]:
        """Why groups gave no pair, of those that were asked for."""
        if not self.paired:
            return {}
        rows = self.session.output(self.round.pair).table("rejects")
        rows = rows.filter(self._in_groups(rows["group"])) if self.asked.groups else rows
        return {row["group"]: row["reason"] for row in rows.to_pylist()}

    def pictures(self, groups: pa.Array) -> pa.Table:
        """Every candidate of some groups with its picture and fault."""
        wanted = pc.indices_nonzero(pc.is_in(self.opinions.candidates["group"], value_set=groups)).to_numpy()
        return self._pictures(["group", "candidate", "picture", "fault"], wanted.astype(np.int64))

    def _pictures(self, columns: list[str], numbers: np.ndarray) -> pa.Table:
        """Candidates by their numbers; read in the order of the files, so that each is opened once, and counted."""
        there, back = np.unique(numbers, return_inverse=True)
        found, total = [self.out.rows("candidates", columns, there[:0])], 0
        for start in range(0, len(there), AT_ONCE):
            found.append(self.out.rows("candidates", columns, there[start : start + AT_ONCE]))
            total += pc.sum(pc.binary_length(pc.struct_field(found[-1]["picture"], "bytes"))).as_py() or 0
            if total > MOST_BYTES:
                raise UserError(f"over {size(MOST_BYTES)} of pictures at once: take fewer groups, with --group or --limit")
        return pa.concat_tables(found).take(pa.array(back))

    def with_pictures(self, rows: pa.Table, numbers: np.ndarray) -> pa.Table:
        """Candidates, whose numbers these are, each with its picture."""
        return views.with_pictures(rows, self._pictures(["picture"], numbers)["picture"])

    def with_prompts(self, rows: pa.Table) -> pa.Table:
        """Rows of groups, each with its prompt beside its key."""
        keys = rows["group"].combine_chunks().dictionary_encode()
        texts = self.prompts_of(keys.dictionary.to_pylist())
        prompts = pa.array([texts[key] for key in keys.dictionary.to_pylist()], pa.string()).take(keys.indices)
        return rows.add_column(rows.column_names.index("group") + 1, schemas.CANDIDATES.field("prompt"), prompts)

    # -- filters

    @property
    def experts(self) -> list[str]:
        """Whose scores are shown."""
        return [self.asked.expert] if self.asked.expert else list(self.scored)

    def _kept(self) -> np.ndarray:
        """Numbers of the candidates that pass every filter."""
        opinions, at = self.opinions, self.opinions.at
        keep = np.ones(len(opinions.candidates), bool)
        if self.asked.groups:
            keep &= self._in_groups(opinions.candidates["group"]).to_numpy()
        if self.asked.bounded:
            keep &= self.asked.within((opinions.grid.scores[self.asked.expert] if self.asked.expert else opinions.mixed)[at])
        if self.asked.missing:
            keep &= views.silent(opinions, np.arange(len(keep)), self.experts)
        return np.flatnonzero(keep)

    def _in_groups(self, groups: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.is_in(groups, value_set=pa.array(views.matching(self.prompts, self.asked.groups), pa.string()))


def _export(shelf: Shelf, found: Found, kind: str, path: Path) -> str:
    """Write the rows, all of them unless --limit says how many; returns how many."""
    which = shelf.asked.first(len(found), 0)
    rows = found.table(which)
    if (shelf.asked.table, kind) == ("candidates", "parquet"):
        rows = shelf.with_pictures(rows, found.numbers[which])
    if shelf.asked.table == "pairs":
        rows = shelf.with_prompts(rows)
    WRITERS[kind](path, views.without_lists(rows) if kind == "csv" else rows)
    return f"{len(which):,} rows"


def _print(shelf: Shelf, found: Found) -> None:
    asked, say = shelf.asked, shelf.session.say
    shown = found.table(asked.first(len(found), SHOWN))
    count = f"{len(found):,} of {found.total:,}" if len(found) < found.total else f"{found.total:,}"
    prompts = shelf.prompts_of(pc.unique(shown["group"]).to_pylist()) if "group" in found.names else {}
    show(f"{shelf.title} · {count} {asked.table}", *views.cells(shown, prompts, width()))
    if len(shown) < len(found):
        say(f"{len(shown):,} of {len(found):,} shown, --limit 0 shows all")
    if asked.table == "steps":
        say(views.in_words(found.table()))
    elif asked.table == "pairs":
        reasons = shelf.reasons()
        if reasons:
            print()
            show(f"{len(reasons):,} groups without a pair", *views.by_kind(reasons, shelf.prompts), right=False)
    else:
        _say_what_is_missing(shelf, int(views.silent(shelf.opinions, found.numbers, shelf.experts).sum()))


def _say_what_is_missing(shelf: Shelf, count: int) -> None:
    if shelf.unscored:
        shelf.session.say(f"not scored yet by {', '.join(shelf.unscored)}: {shelf.ask} does it")
    if count and not shelf.asked.missing:
        shelf.session.say(f"{count:,} candidates lack a score; --missing shows which and why")


def _sheet(shelf: Shelf, found: Found, path: Path) -> str:
    """Write the contact sheet of the first groups, or pairs and their groups; returns in a few words what is on it."""
    from fashiondpo_pipeline import sheets

    asked, reasons, duels = shelf.asked, shelf.reasons(), found.table(slice(0))
    if asked.table == "pairs":
        duels = (found if asked.sort else found.ordered("margin:desc")).table(asked.first(len(found), SHOWN))
        without = list(reasons)
        some = [without[i] for i in asked.first(len(without), SHOWN)]
        groups = pa.concat_arrays([pc.unique(duels["group"]), pa.array(some, pa.string())])
        count = f"{len(duels):,} of {len(found):,} pairs"
    else:
        every = pc.unique(found.column("group"))
        groups = every.take(pa.array(asked.first(len(every), SHOWN)))
        count = f"{len(groups):,} of {len(every):,} groups"
    pictures = len(groups) * shelf.opinions.shape[1]
    if pictures > MOST_PICTURES:
        raise UserError(f"--html {path}: {count} are {pictures:,} pictures, a browser bears {MOST_PICTURES:,}: lower --limit")
    names, sheet = groups.to_pylist(), sheets.Sheet(shelf.opinions, shelf.prompts, shelf.pictures(groups).to_pylist())
    sections = sheet.sections(names, shelf.pairs_of(groups), reasons)
    facts = [*_facts(shelf), f"{count}; --limit says how many"]
    page = sheets.render(shelf.title, facts, sheet.duels(names, duels.to_pylist()), sections, shelf.paired)
    replace_text(path, page)
    return f"{count} · {size(len(page))}"


def _facts(shelf: Shelf) -> list[str]:
    """How scores became a mix and pairs, in words."""
    rule, rewarded = shelf.rule, {name: weight for name, weight in shelf.rule.weights.items() if weight > 0}
    mix = " + ".join(f"{weight / sum(rewarded.values()):.3g} {name}" for name, weight in rewarded.items())
    watched = [name for name in shelf.scored if name not in rewarded]
    facts = [f"mix = {mix}, {rule.normalise} {'within a group' if rule.over == 'group' else 'over all groups'}"]
    facts += [f"watched, not rewarded: {', '.join(watched)}"] if watched else []
    facts += [f"pairs: {rule.select}, margin {rule.margin:g}" + (f", labels {rule.labels}" if rule.labels != "scored" else "")]
    facts += ["figures are the experts' own; a bar to the right speaks for the picture, one to the left against it"]
    if shelf.asked.table == "pairs":
        facts += ["under a pair: how much better each expert finds the winner, normalised; to the left it would take the loser"]
    return facts
