"""Rows of tables that people and other programs save: .txt, .csv, .tsv, .jsonl, .parquet; every line that is no row is told, none is mended."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from fashiondpo_pipeline import foreign
from fashiondpo_pipeline.errors import Faults, UserError
from fashiondpo_pipeline.workspace import read_parquet

KINDS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # spreadsheets save all three as .csv; that counts under which the first line has what is wanted
_MARKS = {",": "comma", ";": "semicolon", "\t": "tab"}


def faults_of(path: Path) -> Faults:
    """Where the mistakes in a table are gathered, by line or by row."""
    return Faults(path, "row" if path.suffix.lower() == ".parquet" else "line")


def rows_of(path: Path, wanted: Sequence[str], faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each line that is not blank. Raises UserError where a column of `wanted` is not there.

    What cannot be read as a row is added to `faults`, and so is a cell that has no value in Python. Cells of .csv and .tsv are text; a
    line of .txt is its first wanted column.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet_rows(path, wanted, faults)
    lines = _lines(path)
    if kind in DELIMITERS:
        return _csv_rows(path, lines, wanted, faults)
    there = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    if kind == ".txt":
        return ((n, {wanted[0]: line.strip()}) for n, line in there)
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


def _csv_rows(path: Path, lines: list[str], wanted: Sequence[str], faults: Faults) -> Iterator[tuple[int, dict]]:
    ended = [line + "\n" for line in lines]
    marks = DELIMITERS[path.suffix.lower()]
    headers = {mark: next(foreign.csv_records(ended, mark))[1] for mark in marks}
    delimiter = next((mark for mark, names in headers.items() if isinstance(names, list) and set(wanted) <= set(names)), marks[0])
    names = headers[delimiter]
    if isinstance(names, foreign.Unreadable):
        raise UserError(f"{path}, line 1: {names}")
    if lacking := [name for name in wanted if name not in names]:
        raise UserError(f"{path}: no column {_quoted(lacking)} in its first line{_found(names)}; name the columns there")
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


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{foreign.seen(name)}'" for name in names)


def _found(names: list[str]) -> str:
    return f", only {', '.join(foreign.seen(name) for name in names)}" if any(names) else ""


def _check_columns(where: str, names: list[str]) -> None:
    """Raises UserError for columns of one name, of which only one could be read."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: the column {_quoted(twice)} is there twice; rename or drop one of them")


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


def _parquet_rows(path: Path, wanted: Sequence[str], faults: Faults) -> Iterator[tuple[int, dict]]:
    table = read_parquet(path)
    _check_columns(str(path), table.column_names)
    if lacking := [name for name in wanted if name not in table.column_names]:
        raise UserError(f"{path}: no column {_quoted(lacking)}{_found(table.column_names)}; rename one")
    for name in wanted:
        if pa.types.is_binary(table.schema.field(name).type) or pa.types.is_large_binary(table.schema.field(name).type):
            raise UserError(f"{path}: the column '{name}' holds bytes, not text; save it as text")
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
