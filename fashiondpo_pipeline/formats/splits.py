"""Which part of a data set a file belongs to, by its name as `datasets` reads it: only the training part is trained on, unless asked."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Made, Reading, Refused, Rows
from fashiondpo_pipeline.formats.tables import row_count
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.registry import did_you_mean

TRAIN, ALL = "train", "all"
WORDS = {"train": TRAIN, "training": TRAIN, "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
         "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_SHARD = re.compile(r"(?P<name>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?$")
_NAME = re.compile(rf"(?P<word>{'|'.join(WORDS)})(?P<rest>_[a-z]+)*$")


def split_of(path: PurePosixPath) -> str | None:
    """The part that a file's path, relative to the set's folder, tells of; None where it tells of none.

    >>> [split_of(PurePosixPath(name)) for name in ("data/test_unique-00000-of-00001.parquet", "val/metadata.csv", "train_2.jsonl", "pairs.csv")]
    ['test_unique', 'validation', 'train', None]
    >>> split_of(PurePosixPath("test/data-00000-of-00001.arrow"))
    'test'
    """
    if (shard := _SHARD.fullmatch(path.stem)) and shard["name"] != "data":  # which `datasets` saves to disk in a folder of its part's name
        return named(shard["name"])
    for part in (path.stem, *reversed(path.parts[:-1])):
        plain = re.sub(r"[-_. ]*\d*$", "", part.lower())
        if found := _NAME.match(plain):
            return named(found[0])
    return None


def named(word: str) -> str:
    """A part's name as it is told and asked for: `val` is validation, `test_unique` itself."""
    return WORDS.get(word.lower(), word.lower())


def chosen(files: Iterable[str], tree: Tree, reading: Reading, rows_of: Callable[[str], Rows]) -> Rows:
    """The rows of the files of the part that is wanted; each other file is one loss, with the count of its rows.

    A file that the person named is taken whatever it is called. Files that tell of no part are taken where the training part, or all, is.
    Raises UserError where there are several parts and it is not clear which is meant, or the one that is asked for is not there.
    """
    parts = {file: split_of(PurePosixPath(file)) if file != tree.named else None for file in files}
    wanted = wanted_of({part for part in parts.values() if part}, tree.root, reading.split)
    return _of_parts(parts, tree, wanted, reading, rows_of)


def unwanted(part: str | None, wanted: str, there: set[str | None]) -> str | None:
    """Why a part is not read, None where it is. there: the parts that the set has."""
    whole = (part or "").removesuffix("_unique")
    if part and wanted not in (ALL, part):
        return f"of the part '{part}', which was not asked for (--split)"
    if part is None and wanted not in (ALL, TRAIN):
        return f"of no part that is known, and '{wanted}' was asked for"
    if wanted == ALL and part != whole and whole in there:
        return f"of the part '{part}', which '{whole}' holds too"
    return None


def wanted_of(there: set[str], root: str, asked: str | None) -> str:
    """The part that is meant, or "all". Raises UserError where that is not clear, or it is not there."""
    if asked is None or asked == ALL:
        if asked is None and len(there) > 1 and TRAIN not in there:
            raise UserError(f"{root}: it has the parts {', '.join(sorted(there))}, and none is called train: say which with --split NAME, "
                            "or --split all")
        return ALL if asked or len(there) < 2 else TRAIN
    if named(asked) not in there:
        has = (f"{did_you_mean(asked, sorted(there))} (it has {', '.join(sorted(there))})" if there else
               "its files tell of no parts: leave --split out")
        raise UserError(f"{root}: there is no part called '{asked}'; {has}")
    return named(asked)


def _of_parts(parts: dict[str, str | None], tree: Tree, wanted: str, reading: Reading, rows_of: Callable[[str], Rows]) -> Rows:
    there = set(parts.values())
    for where, part in parts.items():
        if reason := unwanted(part, wanted, there):
            yield where, partial(_left, reason, where, tree, rows_of)
        else:
            yield from _counted(rows_of(where), part, reading)


def _counted(rows: Rows, part: str | None, reading: Reading) -> Iterator[tuple[str, Callable[[], Made]]]:
    for row in rows:
        if part:
            reading.splits[part] += 1
        yield row


def _left(reason: str, where: str, tree: Tree, rows_of: Callable[[str], Rows]) -> Any:
    tree.meet(where)
    count = row_count(tree, where)
    raise Refused(reason, where, sum(1 for _ in rows_of(where)) if count is None else count)


def of_row(row: Any, reading: Reading) -> None:
    """Raises Refused for a row whose own column `split` names another part than the one that is wanted."""
    part = row.get("split") if "split" in row else None
    if not isinstance(part, str) or not part:
        return
    wanted = named(reading.split or TRAIN)
    if wanted != ALL and named(part) != wanted:
        raise Refused(f"of the part '{named(part)}', which was not asked for (--split)")
    reading.splits[named(part)] += 1
