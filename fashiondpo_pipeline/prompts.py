"""What to draw: prompts from .txt, .csv, .tsv, .jsonl or .parquet, with a key each and a split that never changes by itself."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fashiondpo_pipeline import foreign
from fashiondpo_pipeline.errors import Faults, UserError
from fashiondpo_pipeline.identity import canonical, fingerprint
from fashiondpo_pipeline.remembered import remembered
from fashiondpo_pipeline.seeds import key
from fashiondpo_pipeline.workspace import read_parquet

TRAIN, HELD_OUT = "train", "held-out"
MEANING = 2  # raised when `read` or an identity means something else: what was remembered is then forgotten
KINDS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # the first under which the first line names a prompt; spreadsheets save all three


class Prompts:
    """Prompts of one split: one dict a prompt, with `group`, `prompt` and whatever else the file has; read when first looked at."""

    def __init__(self, rows: list[dict] | Callable[[], list[dict]], about: dict | None = None):
        self._rows, self._about = rows, about

    @cached_property
    def rows(self) -> list[dict]:
        return self._rows() if callable(self._rows) else self._rows

    @cached_property
    def about(self) -> dict:
        """Count, identity, which changes if and only if a row does, and the columns that every row has."""
        if self._about is not None:
            return self._about
        columns = sorted(set.intersection(*map(set, self.rows))) if self.rows else []
        plain = [{name: _plain(value) for name, value in row.items()} for row in self.rows]
        return {"count": len(self.rows), "identity": fingerprint(plain), "columns": columns}

    def __len__(self) -> int:
        return self.about["count"]

    @property
    def identity(self) -> str:
        return self.about["identity"]

    @property
    def columns(self) -> set[str]:
        return set(self.about["columns"])


def open_splits(path: Path, held_out: float, most: dict[str, int | None]) -> dict[str, Prompts]:
    """`read`, at most so many of each split. A file that has not changed is not read before somebody wants its rows."""
    @cache
    def rows() -> dict[str, list[dict]]:
        return {split: found.rows[: most[split]] for split, found in read(path, held_out).items()}

    if not path.is_file():
        rows()  # which says so
    question = f"prompts {MEANING} {canonical([held_out, most])}"
    about = remembered(path, question, lambda: {split: Prompts(found).about for split, found in rows().items()})
    return {split: Prompts(partial(_one_split, rows, split), about[split]) for split in about}


def _one_split(rows: Callable[[], dict[str, list[dict]]], split: str) -> list[dict]:
    return rows()[split]


def read(path: Path, held_out: float = 0.2) -> dict[str, Prompts]:
    """{"train": ..., "held-out": ...}. Raises UserError for an unreadable file, and for all lines together that do not fit.

    Without a column `split` a prompt is held out if the hash of its text falls below `held_out`: adding prompts
    never moves another one across. Without a column `group` the key is made from the text.
    """
    faults = Faults(path, "row" if path.suffix.lower() == ".parquet" else "line")
    seen: dict[str, int] = {}
    splits: dict[str, list[dict]] = {TRAIN: [], HELD_OUT: []}
    for number, row in _read_rows(path, faults):
        if fault := _fault(row):
            faults.add(number, fault)
            continue
        prompt = row["prompt"]
        group = slug(prompt) if row.get("group") in (None, "") else str(row["group"])
        if group in seen:
            faults.add(number, f"'{group}' was given in {faults.unit} {seen[group]}; take one of them out")
            continue
        seen[group] = number
        split = row.get("split") or (HELD_OUT if key("held-out", prompt) / 2**63 < held_out else TRAIN)
        splits[split].append({**row, "group": group, "prompt": prompt, "split": split})
    faults.check()
    if not seen:
        raise UserError(f"{path}: there is no prompt in it; write one a line")
    return {split: Prompts(found) for split, found in splits.items()}


def _fault(row: Mapping[str, Any]) -> str | None:
    """What of a row's cells is not what it should be, and what to do."""
    prompt, group, split = row.get("prompt"), row.get("group"), row.get("split")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return "the prompt is empty; fill it or take the line out"
    if not isinstance(prompt, str):
        return f"the prompt is {_kind(prompt)}, not text; put it in quotes"
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int | float) or group != group):
        return f"the group is {_kind(group)}, not text; put its key in quotes"
    if split not in (None, "") and not (isinstance(split, str) and split in (TRAIN, HELD_OUT)):
        return f"split {_shown(split)} is not one of '{TRAIN}', '{HELD_OUT}'"
    for name, cell in row.items():
        if isinstance(cell, str) and len(cell) > foreign.MOST_LETTERS:
            return f"the {name} is longer than {foreign.MOST_LETTERS:,} letters; shorten it"
        if foreign.depth(cell) > foreign.DEPTH:
            return f"the {name} is nested more than {foreign.DEPTH} deep; flatten it"
        if odd := next(filter(None, map(foreign.oddity, foreign.texts({name: cell}))), None):
            return f"the {foreign.seen(name)} holds {odd}; take it out"
    return None


def _kind(value: Any) -> str:
    """What a cell is, where text was wanted.

    >>> _kind(3), _kind(["a"])
    ('a number (3)', "a list (['a'])")
    """
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return f"{names.get(type(value), type(value).__name__)} ({_shown(value)})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it: pictures by their hash, dates and numbers that are none (NaN) by their text."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    known = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def slug(prompt: str) -> str:
    """A short readable key of a prompt; the hash keeps prompts apart that read alike."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'prompt'}-{fingerprint(prompt)[:6]}"


def _read_rows(path: Path, faults: Faults) -> Iterator[tuple[int, dict]]:
    """(line number, row) of each prompt in the file; what cannot be read as a row is added to `faults`."""
    if not path.is_file():
        raise UserError(f"prompts.file: there is no file {path}; check the path (relative ones start in the working folder)")
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise UserError(f"prompts.file: {path.name} is none of {', '.join(KINDS)}; save it as one of them")
    if kind == ".parquet":
        return _parquet_rows(path, faults)
    lines = _lines(path)
    if kind in DELIMITERS:
        return _csv_rows(path, lines, kind, faults)
    there = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    if kind == ".txt":
        return ((n, {"prompt": line.strip()}) for n, line in there)
    return _json_rows(there, faults)


def _lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Raises UserError that names every line which is not in its encoding."""
    data = path.read_bytes()
    encoding = foreign.encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as problem:
        remedy = "save the file as UTF-8" + (" (in a spreadsheet: CSV UTF-8)" if path.suffix.lower() in DELIMITERS else "")
        if encoding not in ("utf-8", "utf-8-sig"):
            raise UserError(f"{path}: it begins as {encoding.upper()} and does not go on so (byte {problem.start}); {remedy}") from None
        faults, begins = Faults(path), 0
        for number, line in enumerate(data.split(b"\n"), 1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                faults.add(number, f"not UTF-8 (byte {begins + wrong.start}); {remedy}")
            begins += len(line) + 1
        faults.check()
        raise AssertionError("some line was not UTF-8") from problem
    # as editors count them: str.splitlines knows more ends
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _csv_rows(path: Path, lines: list[str], kind: str, faults: Faults) -> Iterator[tuple[int, dict]]:
    ended = [line + "\n" for line in lines]
    headers = {delimiter: next(foreign.csv_records(ended, delimiter))[1] for delimiter in DELIMITERS[kind]}
    delimiter = next((mark for mark, names in headers.items() if isinstance(names, list) and "prompt" in names), DELIMITERS[kind][0])
    names = headers[delimiter]
    if isinstance(names, foreign.Unreadable):
        raise UserError(f"{path}, line 1: {names}")
    if "prompt" not in names:
        raise UserError(f"{path}: no column 'prompt' in its first line{_found(names)}; name the columns there")
    _check_columns(f"{path}, line 1", [name for name in names if name])
    records = foreign.csv_records(ended, delimiter)
    next(records)
    for number, cells in records:
        if isinstance(cells, foreign.Unreadable):
            faults.add(number, str(cells))
        elif not any(cells):
            continue  # a blank line, or one that a spreadsheet filled up with commas
        elif len(cells) != len(names):
            remedy = "put cells with a comma in quotes" if len(cells) > len(names) else "give every column a cell, an empty one if need be"
            faults.add(number, f"{len(cells)} cells instead of {len(names)}; {remedy.replace('comma', _MARKS[delimiter])}")
        elif stray := next((n for n, (name, cell) in enumerate(zip(names, cells, strict=True), 1) if cell and not name), 0):
            faults.add(number, f"cell {stray} is in a column without a name; name it in the first line")
        else:
            yield number, {name: cell for name, cell in zip(names, cells, strict=True) if name}


_MARKS = {",": "comma", ";": "semicolon", "\t": "tab"}


def _found(names: list[str]) -> str:
    return f", only {', '.join(foreign.seen(name) for name in names)}" if any(names) else ""


def _check_columns(where: str, names: list[str]) -> None:
    """Raises UserError for columns of one name, of which only one could be read."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the column {', '.join(map(repr, twice))} is there twice; rename or drop one of them")


def _json_rows(lines: Iterator[tuple[int, str]], faults: Faults) -> Iterator[tuple[int, dict]]:
    for number, line in lines:
        try:
            row = foreign.parse_json(line)
        except foreign.Unreadable as problem:
            faults.add(number, f"not JSON ({problem})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            faults.add(number, 'expected an object such as {"prompt": "a red dress"}')


def _parquet_rows(path: Path, faults: Faults) -> Iterator[tuple[int, dict]]:
    table = read_parquet(path)
    _check_columns(str(path), table.column_names)
    if "prompt" not in table.column_names:
        raise UserError(f"{path}: no column 'prompt'{_found(table.column_names)}; rename one")
    if pa.types.is_binary(table.schema.field("prompt").type) or pa.types.is_large_binary(table.schema.field("prompt").type):
        raise UserError(f"{path}: the column 'prompt' holds bytes, not text; save it as text")
    light = table.select([name for name in table.column_names if not pa.types.is_binary(table.schema.field(name).type)])
    columns = {name: _cells(light[name]) for name in light.column_names}
    for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
        row = dict(zip(columns, cells, strict=True))
        if wrong := next((f"the {foreign.seen(name)} cannot be read ({cell})" for name, cell in row.items() if isinstance(cell, Exception)), None):
            faults.add(number, f"{wrong}; put it right")
        else:
            yield number, row


def _cells(column: pa.ChunkedArray) -> list[Any]:
    """What a column holds; in place of a cell that has no value in Python, the reason."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, TypeError, pa.ArrowException):  # text that is not UTF-8, a date of the year 300000
        return [_cell(scalar) for chunk in column.chunks for scalar in chunk]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as problem:
        return problem
