"""Pictures and lines of files that nobody vouches for: paths stay in their folder, sizes are bounded, a broken line costs itself only."""

import contextlib
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline import codecs
from fashiondpo_pipeline.errors import PULL, is_pointer
from fashiondpo_pipeline.formats import Losses, Picture, Refused
from fashiondpo_pipeline.pairsets import Numbers, PairSet

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_BYTES = 256 << 20  # of one picture's file
MOST_LINE = 16 << 20  # bytes of one line
ROWS = 16  # of a Parquet file in memory at once
_BEGINS = r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # what spreadsheets begin a formula with, full-width signs too
_FORMULA, _GUARDED = re.compile(f"'*{_BEGINS}"), re.compile(f"'+{_BEGINS}")


def inside(folder: Path, name: Any) -> Path:
    """The file `name` below `folder`. Raises Refused for a path that leads out of it, by whatever way, or to nothing.

    Absolute paths, `..`, links that point out and drive letters are all such ways.
    """
    if not isinstance(name, str) or not name:
        raise Refused("there is no file name", repr(name)[:80])
    try:
        outside = Path(name).is_absolute() or PureWindowsPath(name).anchor
        if outside or not (path := (folder / name).resolve()).is_relative_to(folder.resolve()):
            raise Refused("the path leads out of its folder", name)
        if not path.is_file():
            raise Refused("the file is not there", name)
    except (OSError, ValueError) as problem:  # a name that no file can have
        raise Refused("the file is not there", f"{name[:80]!r}: {problem}") from None
    return path


def picture_at(folder: Path, name: Any) -> Picture:
    """The picture in the file `name` below `folder`; it is called by that name."""
    path = inside(folder, name)
    if path.stat().st_size > MOST_BYTES:
        raise Refused(f"the file is larger than {MOST_BYTES >> 20} MiB", name)
    return Picture(path.read_bytes(), name)


def json_lines(path: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(where, make) of each line that is not blank; `make()` gives the object in it."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            whole = line
            while len(line) > MOST_LINE and not line.endswith(b"\n"):
                line = file.readline(MOST_LINE + 1)
            if whole.strip():
                yield f"{path.name}, line {number}", partial(_json_object, whole)


def _json_object(line: bytes) -> dict:
    if len(line) > MOST_LINE:
        raise Refused(f"the line is longer than {MOST_LINE >> 20} MiB")
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise Refused("the line is not JSON", str(problem)[:80]) from None
    if not isinstance(found, dict):
        raise Refused("the line is not an object", repr(found)[:80])
    return found


def csv_rows(path: Path) -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    """(where, make) of each row; `make()` gives its cells by the names in the first line, without what guards against formulas."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        names: list[str] | None = None
        while True:
            where = f"{path.name}, line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                yield where, partial(_refuse, "the line is not CSV", problem)
                continue
            if names is None:
                names = cells
            elif cells:
                yield where, partial(_cells, names, cells)


def _cells(names: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(names):
        raise Refused("the row has not as many cells as the first line", f"{len(cells)} instead of {len(names)}")
    return {name: unguarded(cell) for name, cell in zip(names, cells, strict=True)}


def _refuse(reason: str, detail: object = "") -> Any:
    raise Refused(reason, detail)


def guarded(text: str) -> str:
    """Text that no spreadsheet takes for a formula; `unguarded` gives it back.

    >>> [guarded(text) for text in ("=1+1", "'=1", "a=b", "'tis")]
    ["'=1+1", "''=1", 'a=b', "'tis"]
    """
    return "'" + text if _FORMULA.match(text) else text


def unguarded(text: str) -> str:
    """What `guarded` was given.

    >>> [unguarded(text) for text in ("'=1+1", "''=1", "a=b", "'tis", "-5")]
    ['=1+1', "'=1", 'a=b', "'tis", '-5']
    """
    return text[1:] if _GUARDED.match(text) else text


def write_csv(path: Path, names: list[str], rows: Iterator[list[Any]]) -> None:
    """A CSV file with a first line of names; None is empty, text is guarded against being run as a formula."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            writer.writerow(["" if cell is None else guarded(cell) if isinstance(cell, str) else repr(cell) for cell in row])


def parquet_rows(files: list[Path], columns: list[str]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(where, make) of each row, with those of the columns that a file has, a few rows in memory at once.

    What cannot be read of a file is one loss, after the rows that can.
    """
    for path in files:
        number = total = 0
        try:
            with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
                total = file.metadata.num_rows
                names = [name for name in columns if name in file.schema_arrow.names]
                if not names:
                    yield path.name, partial(_refuse, "the Parquet file has none of the format's columns", path.name)
                    continue
                for batch in file.iter_batches(ROWS, columns=names, use_threads=False):
                    for row in range(batch.num_rows):
                        number += 1
                        yield f"{path.name}, row {number}", partial(_row, batch, row)
        except (OSError, pa.ArrowException) as problem:
            with contextlib.suppress(OSError), path.open("rb") as opened:
                if is_pointer(opened.read(100)):
                    yield path.name, partial(_refuse, "a git LFS pointer stands where the Parquet file should be", PULL)
                    continue
            lost = f"{total - number:,} of its {total:,} rows" if total else "all its rows"
            yield path.name, partial(_refuse, "the Parquet file is broken", f"{lost}: {str(problem)[:200]}")


def _row(batch: pa.RecordBatch, row: int) -> dict:
    return batch.slice(row, 1).to_pylist()[0]


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files that are meant: the one named, or all below a folder, by name; links that lead out of it are not followed."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.rglob("*.parquet")) if file.is_file() and file.resolve().is_relative_to(path.resolve())]


def picture_in(cell: Any, source: str | None, folder: Path) -> Picture:
    """The picture in a cell of a Parquet table: bytes, or a struct of bytes and path, as Hugging Face `datasets` writes it."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return picture_at(folder, cell["path"])
        cell, source = cell.get("bytes"), source or cell.get("path")
    if cell is None:
        raise Refused("there is no picture")
    if not isinstance(cell, bytes):
        raise Refused("the picture's column holds no bytes", type(cell).__name__)
    return Picture(cell, source)


def text_of(row: dict, *names: str) -> str:
    """The first of these columns that is there, as text."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise Refused(f"there is no {' or '.join(names)}")


# -- writing


class Pictures:
    """Writes a pair set's pictures as files below a folder, each once."""

    def __init__(self, pairs: PairSet, folder: Path, below: str = "images"):
        self.pairs, self.folder, self.below = pairs, folder, below
        self.count = 0

    def put(self, row: dict) -> str:
        """The name of a picture's file, relative to the folder; it is written if it is not there."""
        data = row["picture"]["bytes"]
        name = f"{self.below}/{_folder_name(row['group'])}/{row['candidate']:05d}{codecs.kind_of(data)}"
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.count += 1
        return name

    def name(self, group: str, candidate: int) -> tuple[str, str]:
        """(prompt, file name) of a picture."""
        row = self.pairs.picture(group, candidate)
        return row["prompt"], self.put(row)


def _folder_name(group: str) -> str:
    """A group's key where it is a plain name, else a hash: keys are the user's, and may hold anything."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", group)
    return group if plain else "group-" + hashlib.sha256(group.encode()).hexdigest()[:16]


def comparisons(pairs: PairSet) -> Iterator[tuple[str, dict]]:
    """(where, row) of each comparison."""
    number = 0
    for table in pairs.pairs():
        for row in table.to_pylist():
            number += 1
            yield f"pair {number}", row


SHOWN, WON, LOST = 1, 2, 4


def standing(pairs: PairSet) -> Numbers:
    """Of each picture in any pair, by group and number: SHOWN, with WON and LOST where it did so outright at least once."""
    found = Numbers()
    for table in pairs.pairs(["group", "first", "second", "label"]):
        for row in table.to_pylist():
            marks = {1.0: (WON, LOST), 0.0: (LOST, WON)}.get(row["label"], (0, 0))
            found.mark((row["group"], row[side], SHOWN | mark) for side, mark in zip(("first", "second"), marks, strict=True))
    return found


def in_pairs(pairs: PairSet, losses: Losses) -> None:
    """Count as lost the pictures that no comparison shows, for formats that hold nothing else."""
    stand = standing(pairs)
    for table in pairs.pictures(["group", "candidate"]):
        for row in table.to_pylist():
            if not stand.find(row["group"], row["candidate"]):
                losses.add(f"picture {row['group']}/{row['candidate']}", "the picture is in no pair")


def decided(row: dict) -> tuple[int, int]:
    """(winner, loser) of a comparison. Raises Refused where none won outright."""
    if row["label"] is None:
        raise Refused("the pair has no label")
    if row["label"] not in (0.0, 1.0):
        raise Refused("the pair is a tie" if row["label"] == 0.5 else "the label is a share, which the format has no place for")
    return (row["first"], row["second"]) if row["label"] else (row["second"], row["first"])

