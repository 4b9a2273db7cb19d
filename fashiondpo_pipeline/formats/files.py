"""Pictures of files that nobody vouches for, and what writers of formats have in common: paths stay in their folder, sizes are bounded."""

import csv
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fashiondpo_pipeline import codecs, seeds
from fashiondpo_pipeline.formats import Losses, Picture, Refused
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.pairsets import Numbers, PairSet

MOST_BYTES = 256 << 20  # of one picture's file
_BEGINS = r"[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # what spreadsheets begin a formula with, full-width signs too
_FORMULA, _GUARDED = re.compile(f"'*{_BEGINS}"), re.compile(f"'+{_BEGINS}")


class Place(NamedTuple):
    """A folder of a tree, from which a table names its pictures."""

    tree: Tree
    below: str = ""

    @classmethod
    def of(cls, tree: Tree, table: str) -> "Place":
        """The folder that a table lies in."""
        return cls(tree, table.rpartition("/")[0])


def picture_at(place: Place, name: Any, called: str | None = None) -> Picture:
    """The picture in the file that a row names. Unless it is `called` something it is called by that name, from the root where it is absolute."""
    found = place.tree.find(name, place.below)
    return Picture(place.tree.read(found, MOST_BYTES), called or (found if Path(name).is_absolute() else name))


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


def picture_in(cell: Any, source: str | None, place: Place) -> Picture:
    """The picture in a cell of a Parquet table: bytes, or a struct of bytes and path, as Hugging Face `datasets` writes it."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return picture_at(place, cell["path"])
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
    """(where, row) of each comparison.

    Where it is not known which picture was shown first, a coin thrown by key says which is: a format with places would else tell that
    the first always won.
    """
    number, placed = 0, pairs.manifest.get("placed", True)
    for table in pairs.pairs():
        for row in table.to_pylist():
            number += 1
            if not placed and seeds.key("first", row["group"], row["first"], row["second"]) % 2:
                label = None if row["label"] is None else 1 - row["label"]
                row |= {"first": row["second"], "second": row["first"], "label": label}
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

