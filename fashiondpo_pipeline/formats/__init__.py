"""Other programs' preference sets: a file a format, each with a reader and a writer. Here is what they have in common.

A reader yields (where, make): `make()` gives the comparison or picture at that place of the file, or raises `Refused`. So a row that
is broken costs itself and nothing else, and every one that is left out is counted, with its reason.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fashiondpo_pipeline import codecs
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign import seen
from fashiondpo_pipeline.formats import kinds
from fashiondpo_pipeline.pairsets import MOST, Numbers, PairSet, Writer, draft_of, put_in_place
from fashiondpo_pipeline.prompts import slug
from fashiondpo_pipeline.registry import Registry
from fashiondpo_pipeline.workspace import write_json

if TYPE_CHECKING:
    from fashiondpo_pipeline.formats.trees import Tree

LEAST_SIDE, MOST_SIDE = 8, 16_384  # pixels
MOST_LETTERS = 20_000  # of a prompt
NAMED = 12  # more columns than these are counted, not named
MORE = ("annotator", "gap", "source")  # what a pair may say beside its pictures and its label

FORMATS = Registry(
    "format",
    "fashiondpo_pipeline.formats",
    {
        "pickapic": "fashiondpo_pipeline.formats.pickapic:FORMAT",
        "invoke": "fashiondpo_pipeline.formats.invoke:PREFERENCES",
        "captions": "fashiondpo_pipeline.formats.invoke:CAPTIONS",
        "huggingface": "fashiondpo_pipeline.formats.huggingface:FORMAT",
        "folders": "fashiondpo_pipeline.formats.folders:FORMAT",
        "kto": "fashiondpo_pipeline.formats.kto:FORMAT",
        "csv": "fashiondpo_pipeline.formats.plain_csv:FORMAT",
        "json": "fashiondpo_pipeline.formats.json_lists:FORMAT",
    },
)


class Refused(Exception):
    """Why a row is left out: a reason that many rows may share, and what is special to this one. count: how many rows it stands for."""

    def __init__(self, reason: str, detail: object = "", count: int = 1):
        super().__init__(reason)
        self.reason, self.detail, self.count = reason, str(detail), count


@dataclass(frozen=True)
class Picture:
    """Bytes of a PNG, JPEG or WebP, and what it was called."""

    data: bytes
    source: str | None = None


@dataclass(frozen=True)
class Single:
    """One picture of a prompt by itself. liked: thumb up or down. rank: its place, 1 the best, among the prompt's pictures of equal `among`."""

    prompt: str
    picture: Picture
    liked: bool | None = None
    rank: float | None = None
    among: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two pictures of a prompt; label: preference for the first, None where nobody has looked.

    placed: whether it is known which was shown first. lost: what of the row cannot be kept, (reason, detail) each; the pair is.
    """

    prompt: str
    first: Picture
    second: Picture
    label: float | None
    annotator: str | None = None
    gap: float | None = None
    source: str | None = None
    placed: bool = True
    lost: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Ranked:
    """Several pictures of a prompt in an order, 1 the best. ties: whether equal ranks say that neither of two is better, or nothing."""

    prompt: str
    pictures: tuple[Picture, ...]
    ranks: tuple[float, ...]
    ties: bool = True

    def comparisons(self) -> Iterator[Comparison]:
        """Each two of them."""
        for i, j in combinations(range(len(self.pictures)), 2):
            behind = self.ranks[j] - self.ranks[i]
            if behind or self.ties:
                label = 0.5 if not behind else float(behind > 0)
                yield Comparison(self.prompt, self.pictures[i], self.pictures[j], label, gap=abs(behind) or None, placed=False)


Made = Comparison | Single | Ranked
Rows = Iterator[tuple[str, Callable[[], Made]]]


@dataclass
class Losses:
    """What is left out: how much for each reason, and every place with its reason in a file."""

    file: TextIO
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str, detail: str = "", count: int = 1) -> None:
        self.reasons[reason] += count
        self.note(where, reason, detail)

    def note(self, where: str, reason: str, detail: str = "") -> None:
        """A line of the file alone: the row itself is kept."""
        self.file.write(json.dumps({"where": where, "reason": reason, "detail": detail}, ensure_ascii=True) + "\n")


@dataclass
class Reading:
    """What is asked of files that are read, and what is noted meanwhile.

    columns: our name of a column -> the files' (see `meaning.ROLES`). split: the part that is wanted, "all", or None for the training part
    where there are several. met, used: the columns that were met, and those that anything was made of. splits: rows of each part.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    met: dict[str, None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    splits: Counter[str] = field(default_factory=Counter)

    def cells(self, row: Mapping[str, Any], plain: Callable[[str], str] = str) -> "Cells":
        """A row under our names, which notes what of it is read. plain: what a column that nobody renamed is called here.

        Raises Refused where a name is not UTF-8: it might be one that is looked for.
        """
        for name in row:
            _check_text("a column's name", name)
        self.met.update(dict.fromkeys(row))
        ours = {theirs: ours for ours, theirs in self.columns.items()}
        names = {ours.get(name) or plain(name): name for name in row if name in ours or plain(name) not in self.columns}
        return Cells(row, self.used, names)

    @property
    def unread(self) -> list[str]:
        """The columns that nothing was made of."""
        return [seen(name) for name in self.met if name not in self.used]


class Cells(dict):
    """A row of a table under our names; `used` gets the table's own name of each column that is asked for. names: ours -> the row's."""

    def __init__(self, row: Mapping[str, Any], used: set[str], names: Mapping[str, str]):
        super().__init__({ours: row[theirs] for ours, theirs in names.items()})
        self._used, self._names = used, names

    def __getitem__(self, name: str) -> Any:
        if name in self:
            self._used.add(self._names[name])
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]


@dataclass(frozen=True)
class Format:
    """One format. placed: its files say which picture was shown first. holds: what else of a pair, or of a picture, they have a place for."""

    about: str
    read: "Callable[[Tree, Reading], Rows]"
    write: Callable[[PairSet, Path, Losses], Counter[str]]
    placed: bool = True
    holds: tuple[str, ...] = ()


def read(name: str, path: Path | str, folder: Path, columns: Mapping[str, str] | None = None, split: str | None = None,
         most: int | None = None, made_of: str | None = None) -> PairSet:
    """The pair set in `folder` made of other programs' files at `path`, or of a data set at hf://OWNER/NAME@COMMIT.

    Every file and row that is met is imported or stands in its dropped.jsonl. columns: our name of a column -> the files'. split: which part
    of several, "all", or None for the training part. most: rows that are taken, after which nothing more is looked at. made_of: what tells
    whether the same files would be read again; kept in the manifest. Raises UserError if nothing can be used.
    """
    from fashiondpo_pipeline.formats import trees  # here, as it needs what is above

    kind: Format = FORMATS.find(name)
    reading = Reading(columns or {}, split)
    tree = trees.at(path)
    rows = kind.read(tree, reading)  # first, as most see at once that there is nothing to read
    target, taken = _Import(Writer(folder)), 0
    with (target.writer.draft / "dropped.jsonl").open("w", encoding="utf-8") as file:
        losses, fields = Losses(file), Counter[str]()
        for where, make in rows:
            try:
                for reason, detail in target.add(make()):
                    fields[reason] += 1
                    losses.note(where, reason, detail)
                taken += 1
            except Refused as problem:
                losses.add(where, problem.reason, problem.detail, problem.count)
            if taken == most:
                break  # what lies behind is not met
        else:
            for where, why in tree.left():
                losses.add(where, why.reason, why.detail)
        if not target.writer.counts["pictures"]:
            told = "; ".join(f"{count:,} x {reason}" for reason, count in losses.reasons.most_common(5)) or "there is no row in it"
            gone = [theirs for theirs in reading.columns.values() if theirs not in reading.met]
            if reading.met and any(reason.startswith(("there is no ", "there are no ")) for reason in losses.reasons):
                told += f"; its columns are {', '.join(map(seen, list(reading.met)[:NAMED]))}"
            told += f"; no column is called {' or '.join(gone)}" if gone and reading.met else ""
            told += f"; every one of them: {file.name}" if losses.reasons else ""
            raise UserError(f"{path}: nothing in it can be used as '{name}' ({told}): {kind.about}")
    target.link()
    lineage = {"format": name, "path": str(path), "columns": dict(reading.columns), "split": split,
               **({} if most is None else {"most": most})}
    return target.writer.finish({"source": f"{name}: {path}", "lineage": lineage, "placed": kind.placed and target.placed,
                                 "dropped": dict(losses.reasons), "fields": dict(fields), "unread": reading.unread, "splits": dict(reading.splits),
                                 **({"most": most} if taken == most else {}), "made_of": made_of})


def notes(pairs: PairSet) -> list[str]:
    """What was not made anything of at an import, and which parts it is made of, for people."""
    manifest, lines = pairs.manifest, []
    if splits := manifest.get("splits"):
        lines.append("split: " + ", ".join(f"{name} ({count:,} rows)" for name, count in splits.items()))
    if most := manifest.get("most"):
        lines.append(f"note: {most:,} rows were taken (--most), and nothing behind them was looked at")
    lines += [f"note: {count:,} x {reason}: the pair is kept without it" for reason, count in manifest.get("fields", {}).items()]
    if unread := manifest.get("unread"):
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        lines.append(f"note: columns that were not read: {', '.join(unread[:NAMED])}{more}; "
                     "`fdpo import --columns OURS=THEIRS` says what one of them holds")
    return lines


def write(name: str, pairs: PairSet, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """(what was written, what was left out and why) of a pair set as other programs read it; the folder is whole or absent."""
    kind: Format = FORMATS.find(name)
    draft = draft_of(folder)
    with (draft / "dropped.jsonl").open("w", encoding="utf-8") as file:
        losses = Losses(file)
        written = kind.write(pairs, draft, losses)
        for where, what, count in _without_a_place(pairs, kind):
            losses.add(where, f"the format has no place for a {where[:-1]}'s {what}", f"{count:,} {where}", count)
    if not losses.reasons:
        (draft / "dropped.jsonl").unlink()
    write_json(draft / "lineage.json", {"format": name, "source": pairs.manifest.get("source"), "lineage": pairs.manifest.get("lineage"),
                                        "identity": pairs.identity, "written": dict(written), "dropped": dict(losses.reasons)})
    put_in_place(draft, folder)
    return written, losses.reasons


def _without_a_place(pairs: PairSet, kind: Format) -> Iterator[tuple[str, str, int]]:
    """("pairs" or "pictures", what, of how many) of what they say and the format cannot."""
    for where, tables, what, column in (*(("pairs", pairs.pairs, name, name) for name in MORE), ("pictures", pairs.pictures, "name", "source"),
                                        ("pictures", pairs.pictures, "thumb", "liked")):
        count = 0 if what in kind.holds else sum(len(table) - table[column].null_count for table in tables([column]))
        if count:
            yield where, what, count


def group_of(prompt: str) -> str:
    """The group of an imported prompt: readable, and 64 bits of its hash, as sets have millions of prompts."""
    return slug(prompt)[:-6] + hashlib.sha256(prompt.encode()).hexdigest()[:16]


def turned(rows: Iterator[tuple[str, Callable[[], Any]]], turn: Callable[[Any], Made]) -> Rows:
    """Rows of a file as comparisons or pictures."""
    return ((where, partial(_turned, make, turn)) for where, make in rows)


def _turned(make: Callable[[], Any], turn: Callable[[Any], Made]) -> Made:
    return turn(make())


class _Import:
    """Numbers pictures within their prompt; the same bytes under the same name are the same picture."""

    def __init__(self, writer: Writer):
        self.writer, self.known, self.placed = writer, Numbers(), True
        self.thumbs = sqlite3.connect("", isolation_level=None)  # a temporary file, once they are many
        self.thumbs.execute("CREATE TABLE thumbs (a TEXT, n INTEGER, liked INTEGER)")
        self.thumbs.execute("CREATE INDEX by_group ON thumbs (a, liked)")
        self.thumbs.execute("CREATE TABLE ranks (a TEXT, among TEXT, n INTEGER, place REAL)")
        self.thumbs.execute("CREATE INDEX by_rank ON ranks (a, among)")

    def add(self, made: Made) -> Iterable[tuple[str, str]]:
        """(reason, detail) of what of it is lost, though the rest is kept. Raises Refused where nothing of it can be."""
        _check_text("the prompt", made.prompt)
        if not made.prompt.strip():
            raise Refused("the prompt is empty")
        if len(made.prompt) > MOST_LETTERS:
            raise Refused(f"the prompt is longer than {MOST_LETTERS:,} letters")
        group = group_of(made.prompt)
        if isinstance(made, Single):
            return self._single(group, made)
        if isinstance(made, Ranked):
            for picture in made.pictures:
                check(picture)
            for pair in made.comparisons():
                self._pair(group, pair)
            return ()
        return self._pair(group, made)

    def _single(self, group: str, made: Single) -> Iterable[tuple[str, str]]:
        check(made.picture)
        if self.known.find(group, _digest(made.picture)) is not None:
            raise Refused("the same picture came before")
        number = self._number(group, made.prompt, made.picture, made.liked)
        if made.liked is not None:
            self.thumbs.execute("INSERT INTO thumbs VALUES (?, ?, ?)", (group, number, made.liked))
        if made.rank is not None:
            self.placed = False
            self.thumbs.execute("INSERT INTO ranks VALUES (?, ?, ?, ?)", (group, made.among, number, made.rank))
        return ()

    def _pair(self, group: str, made: Comparison) -> Iterable[tuple[str, str]]:
        if made.label is not None and not 0 <= made.label <= 1:
            raise Refused("the label is not between 0 and 1", made.label)
        _check_text("the annotator", made.annotator)
        _check_text("the source", made.source)
        for picture in (made.first, made.second):
            check(picture)
        first, second = (self._number(group, made.prompt, picture) for picture in (made.first, made.second))
        self.placed = self.placed and made.placed
        self.writer.pair({"group": group, "first": first, "second": second, "label": made.label, "annotator": made.annotator,
                          "gap": made.gap, "source": made.source})
        return made.lost

    def _number(self, group: str, prompt: str, picture: Picture, liked: bool | None = None) -> int:
        digest = _digest(picture)
        number = self.known.find(group, digest)
        if number is not None:
            return number
        number = self.known.find(group, "") or 0
        if number >= MOST:
            raise Refused(f"the prompt has more than {MOST:,} pictures")
        self.known.put([(group, digest, number), (group, "", number + 1)])
        self.writer.picture({"group": group, "candidate": number, "prompt": prompt, "source": picture.source, "liked": liked,
                             "picture": {"bytes": picture.data, "path": f"{group}/{number}{codecs.kind_of(picture.data)}"}})
        return number

    def link(self) -> None:
        """Each picture with thumb up against each with thumb down of its prompt; each two that were ranked together."""
        question = "SELECT w.a, w.n, l.n FROM thumbs w JOIN thumbs l ON l.a = w.a AND l.liked = 0 WHERE w.liked = 1 ORDER BY w.rowid, l.rowid"
        for group, winner, loser in self.thumbs.execute(question):
            self.writer.pair({"group": group, "first": winner, "second": loser, "label": 1.0})
        question = ("SELECT f.a, f.n, s.n, s.place - f.place FROM ranks f JOIN ranks s ON s.a = f.a AND s.among = f.among AND s.rowid > f.rowid "
                    "ORDER BY f.rowid, s.rowid")
        for group, first, second, behind in self.thumbs.execute(question):
            label = 0.5 if not behind else float(behind > 0)
            self.writer.pair({"group": group, "first": first, "second": second, "label": label, "gap": abs(behind) or None})


def check(picture: Picture) -> None:
    """Raises Refused for what is no picture, is broken, or has an absurd size."""
    _check_text("the picture's name", picture.source)
    try:
        width, height = codecs.decode_picture(picture.data, "").size
    except codecs.BadPicture as problem:
        if (kind := kinds.kind_of("", picture.data[: kinds.FIRST])) in kinds.OTHER_PICTURES:
            raise Refused(f"the picture is {kind}, which is not read: save it as PNG, JPEG or WebP", problem.detail) from None
        raise Refused(problem.kind, problem.detail) from None
    if min(width, height) < LEAST_SIDE or max(width, height) > MOST_SIDE:
        raise Refused(f"the picture has a side below {LEAST_SIDE} or above {MOST_SIDE:,} pixels", f"{width}x{height}")


def _check_text(what: str, text: object) -> None:
    if text is not None and not isinstance(text, str):
        raise Refused(f"{what} is not text", repr(text)[:80])
    if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Refused(f"{what} is not UTF-8", ascii(text)[:80])


def _digest(picture: Picture) -> bytes:
    return hashlib.sha256((picture.source or "").encode() + b"\0" + picture.data).digest()[:16]
