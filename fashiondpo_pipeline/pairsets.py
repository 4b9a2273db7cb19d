"""Pair sets: pictures and comparisons of them in a folder that travels, read and written a shard at a time.

    pictures-00000.parquet ...   one row is one picture (schemas.PICTURES)
    pairs-00000.parquet ...      one row is one comparison of two of them (schemas.PREFERENCES)
    manifest.json                format, source, lineage, counts, what was dropped and why, every file's hash; written last

The manifest existing is the only meaning of "done". Nothing but a shard is ever held in memory.
"""

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, NonNegativeInt, ValidationError

from fashiondpo_pipeline import schemas
from fashiondpo_pipeline.errors import UserError, disk_is_full
from fashiondpo_pipeline.identity import fingerprint, hash_file
from fashiondpo_pipeline.workspace import agrees, read_json, read_parquet, read_schema, write_parquet, write_sealed

FORMAT = 1
SHARD_BYTES = 32 << 20  # of pictures in a file, and so in memory
SHARD_ROWS = 1 << 17  # comparisons in a file
MOST = 1 << 15  # pictures a group: candidate numbers are 16 bits
SCHEMAS = {"pictures": schemas.PICTURES, "pairs": schemas.PREFERENCES}


class _File(BaseModel):
    rows: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class _Counts(BaseModel):
    pictures: NonNegativeInt
    pairs: NonNegativeInt
    labelled: NonNegativeInt
    ties: NonNegativeInt


class _Manifest(BaseModel):
    """What a manifest must say; it may say more."""

    format: Literal[1]
    counts: _Counts
    files: dict[str, _File]
    dropped: dict[str, NonNegativeInt] = {}


class PairSet:
    """A finished pair set, to be read."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: Path | str) -> "PairSet":
        """Raises UserError if it is none, is unfinished, or files of it are missing or cut short."""
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder} is no pair set (it has no manifest.json): `fdpo import` and `fdpo generate-sets` make one")
        manifest = read_json(folder / "manifest.json")
        try:
            _Manifest.model_validate(manifest)
        except ValidationError as problem:
            first = problem.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise UserError(f"{folder}/manifest.json is not that of a pair set of format {FORMAT} ({where}: {first['msg']}): "
                            "copy it again, or make the set anew with `fdpo import`") from None
        if agrees(manifest) is False:
            raise UserError(f"{folder}/manifest.json is not as it was written: copy it again, or make the set anew")
        for name, info in manifest["files"].items():
            if Path(name).name != name:
                raise UserError(f"{folder}/manifest.json names '{name}', which is not a file beside it: make the set anew")
            if not (folder / name).is_file() or (folder / name).stat().st_size != info["bytes"]:
                raise UserError(f"{folder}/{name} is missing or cut short: copy it again, or make the set anew")
            table = name.partition("-")[0]
            if table not in SCHEMAS or read_schema(folder / name).names != SCHEMAS[table].names:
                raise UserError(f"{folder}/{name} has not the columns of a pair set's {table}: make the set anew")
        return cls(folder, {key: value for key, value in manifest.items() if key != "sum"})

    @property
    def identity(self) -> str:
        """A hash of what is in it; a copy has the same."""
        return fingerprint({name: info["sha256"] for name, info in self.manifest["files"].items()})

    def altered(self) -> list[str]:
        """The files that are missing or not as they were written, by their hashes; every byte is read."""
        found = []
        for name, info in (self.manifest["files"] | self.manifest.get("others", {})).items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{path}: missing")
            elif hash_file(path) != info["sha256"]:
                found.append(f"{path}: altered")
        return found

    def keep_checks(self, found: Mapping[str, Any]) -> None:
        """Write what its checks found beside it, as checks.json; from then on that file belongs to it."""
        path = self.folder / "checks.json"
        write_sealed(path, dict(found))
        others = self.manifest.get("others", {}) | {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}}
        if others != self.manifest.get("others"):
            self.manifest = self.manifest | {"others": others}
            write_sealed(self.folder / "manifest.json", self.manifest)

    @property
    def counts(self) -> dict[str, int]:
        """Rows of `pictures` and `pairs`, and how many of the pairs are `labelled`, and `ties` among them."""
        return self.manifest["counts"]

    @cached_property
    def shares(self) -> int:
        """How many labels are shares: neither won outright nor a tie."""
        return sum(pc.sum(pc.and_(pc.and_(pc.greater(label, 0), pc.less(label, 1)), pc.not_equal(label, 0.5))).as_py() or 0
                   for label in (table["label"] for table in self.pairs(["label"])))

    @cached_property
    def rankings(self) -> dict[str, dict[int, float] | None]:
        """Group -> candidate -> how many others it beat, ties one half, where the group's pairs are a ranking; None where they are none.

        They are where each two of its pictures were compared, nobody contradicts anybody and nobody goes round in a circle. Groups
        without a winner are not there.
        """
        found: dict[str, list[tuple[int, int, float | None]]] = {}
        for table in self.pairs(["group", "first", "second", "label"]):
            for row in table.to_pylist():
                found.setdefault(row["group"], []).append((row["first"], row["second"], row["label"]))
        return {group: _ranking(rows) for group, rows in found.items() if any(label not in (None, 0.5) for *_, label in rows)}

    def pictures(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The pictures, a shard at a time, in the order in which they came."""
        return (read_parquet(file, columns) for file in self._files("pictures"))

    def pairs(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The comparisons, a shard at a time, in the order in which they came."""
        return (read_parquet(file, columns) for file in self._files("pairs"))

    def picture(self, group: str, candidate: int) -> dict:
        """One picture's row. Fastest where neighbours are asked for one after another."""
        place = self._places.find(group, candidate)
        if place is None:
            raise UserError(f"{self.folder}: there is no picture {candidate} of '{group}', though a pair names it: make the set anew")
        shard, row = divmod(place, 1 << 32)
        return self._shard(shard).slice(row, 1).to_pylist()[0]

    def has(self, group: str, candidate: int) -> bool:
        """Whether a picture is in it."""
        return self._places.find(group, candidate) is not None

    def _files(self, table: str) -> list[Path]:
        return [self.folder / name for name in sorted(self.manifest["files"]) if name.startswith(f"{table}-")]

    @cached_property
    def _places(self) -> "Numbers":
        """(group, candidate) -> shard and row."""
        found = Numbers()
        for shard, table in enumerate(self.pictures(["group", "candidate"])):
            rows = zip(table["group"].to_pylist(), table["candidate"].to_pylist(), strict=True)
            found.put((group, candidate, shard << 32 | row) for row, (group, candidate) in enumerate(rows))
        return found

    @cached_property
    def _shard(self) -> Any:
        return lru_cache(2)(lambda number: read_parquet(self._files("pictures")[number]))


def _ranking(rows: list[tuple[int, int, float | None]]) -> dict[int, float] | None:
    said: dict[tuple[int, int], float] = {}
    for first, second, label in rows:
        if label not in (0.0, 0.5, 1.0) or first == second or said.setdefault((first, second), label) != label:
            return None
        if said.setdefault((second, first), 1 - label) != 1 - label:
            return None
    beaten: Counter[int] = Counter()
    for (first, _), label in said.items():
        beaten[first] += label  # type: ignore[assignment]  # ties count one half
    whole = len(said) == len(beaten) * (len(beaten) - 1)
    agrees = all((beaten[a] > beaten[b]) - (beaten[a] < beaten[b]) == 2 * label - 1 for (a, b), label in said.items())
    return dict(beaten) if whole and agrees else None


class Numbers:
    """Numbers by (group, key), in a temporary file once they are many."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # "": private, on disk where it outgrows its cache, gone when closed
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("CREATE TABLE numbers (a TEXT, b, n INTEGER, PRIMARY KEY (a, b)) WITHOUT ROWID")

    def find(self, group: str, key: Any) -> int | None:
        row = self._db.execute("SELECT n FROM numbers WHERE a = ? AND b = ?", (group, key)).fetchone()
        return row and row[0]

    def put(self, rows: Iterable[tuple[str, Any, int]]) -> None:
        self._many("INSERT OR REPLACE INTO numbers VALUES (?, ?, ?)", rows)

    def mark(self, rows: Iterable[tuple[str, Any, int]]) -> None:
        """Set the bits of these numbers in those that are there."""
        self._many("INSERT INTO numbers VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n | excluded.n", rows)

    def _many(self, question: str, rows: Iterable[tuple[str, Any, int]]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(question, rows)
        self._db.execute("COMMIT")


class Writer:
    """Writes a pair set row by row in a draft; without `finish` there is none."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.draft = draft_of(self.folder)
        self.files: dict[str, dict] = {}
        self.counts: Counter[str] = Counter(dict.fromkeys(("pictures", "pairs", "labelled", "ties"), 0))
        self._rows: dict[str, list[dict]] = {"pictures": [], "pairs": []}
        self._bytes = 0

    def picture(self, row: Mapping[str, Any]) -> None:
        """One picture; columns that are left out are null."""
        self._add("pictures", row)
        self._bytes += len(row["picture"]["bytes"])
        if self._bytes >= SHARD_BYTES:
            self._flush("pictures")

    def pair(self, row: Mapping[str, Any]) -> None:
        """One comparison; columns that are left out are null."""
        self._add("pairs", row)
        label = row.get("label")
        self.counts["labelled"] += label is not None
        self.counts["ties"] += label == 0.5
        if len(self._rows["pairs"]) >= SHARD_ROWS:
            self._flush("pairs")

    def finish(self, manifest: Mapping[str, Any]) -> PairSet:
        """From now on, and not before, it is a pair set. `manifest`: source, lineage, dropped and what else is to be known of it."""
        for table in self._rows:
            self._flush(table)
        others = {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)}
                  for path in sorted(self.draft.iterdir()) if path.is_file() and path.name not in self.files}
        write_sealed(self.draft / "manifest.json",
                     {**manifest, "format": FORMAT, "counts": dict(self.counts), "files": self.files, "others": others})
        put_in_place(self.draft, self.folder)
        return PairSet.open(self.folder)

    def _add(self, table: str, row: Mapping[str, Any]) -> None:
        self._rows[table].append({name: row.get(name) for name in SCHEMAS[table].names})
        self.counts[table] += 1

    def _flush(self, table: str) -> None:
        if not self._rows[table]:
            return
        number = sum(name.startswith(f"{table}-") for name in self.files)
        path = self.draft / f"{table}-{number:05d}.parquet"
        write_parquet(path, pa.Table.from_pylist(self._rows[table], SCHEMAS[table]))
        self.files[path.name] = {"rows": len(self._rows[table]), "bytes": path.stat().st_size, "sha256": hash_file(path)}
        self._rows[table] = []
        if table == "pictures":
            self._bytes = 0


def write(folder: Path | str, pictures: Iterable[Mapping], pairs: Iterable[Mapping], manifest: Mapping[str, Any]) -> PairSet:
    """A pair set of rows, which may be generators: `pictures` is read to its end first."""
    writer = Writer(folder)
    for row in pictures:
        writer.picture(row)
    for row in pairs:
        writer.pair(row)
    return writer.finish(manifest)


def in_words(pairs: PairSet) -> str:
    """What is in a pair set, for people."""
    counts, dropped = pairs.counts, pairs.manifest.get("dropped", {})
    text = f"{counts['pictures']:,} pictures, {counts['pairs']:,} pairs"
    if counts["pairs"]:
        won, bare = counts["labelled"] - counts["ties"], counts["pairs"] - counts["labelled"]
        shared = f", {pairs.shares:,} of them by a share of votes" if pairs.shares else ""
        text += f" ({won:,} with a winner{shared}, {counts['ties']:,} ties, {bare:,} not labelled)"
    if dropped:
        text += f"; {sum(dropped.values()):,} left out: " + ", ".join(f"{count:,} x {reason}" for reason, count in dropped.items())
    return text


def draft_of(folder: Path) -> Path:
    """An empty hidden folder beside `folder`, `.NAME.tmp`, to write in before `put_in_place`. What an interrupted writer left in it is cleared.

    Raises UserError if something lies at `folder`, whatever it is, or nothing can be written beside it.
    """
    place = folder.resolve()
    try:
        if place.is_dir() and (there := sorted(path.name for path in place.iterdir())):
            raise UserError(f"{folder} is there already and is not empty ({there[0]}): name another folder, or take it away")
        if place.exists() and not place.is_dir():
            raise UserError(f"{folder} is there already and is a file: name a folder, or take it away")
        if place == Path.cwd():
            raise UserError(f"{folder} is the folder you are in: name another")
        draft = place.with_name(f".{place.name}.tmp")
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
    except OSError as problem:
        if disk_is_full(problem):
            raise
        raise UserError(f"{folder} cannot be made ({problem.strerror}): name a folder that you may write in") from problem
    return draft


def put_in_place(draft: Path, folder: Path) -> None:
    """Rename a finished draft: whole or not at all. Raises UserError if something has come to lie there meanwhile; the draft is kept."""
    try:
        os.replace(draft, folder.resolve())  # an empty folder gives way
    except OSError as problem:
        raise UserError(f"{folder} cannot take its place ({problem.strerror}): all of it is in {draft}, to be renamed") from problem
