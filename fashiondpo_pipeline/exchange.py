"""Tables to files that other programs read: CSV that is safe to open in a spreadsheet, JSON lines, Parquet."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from fashiondpo_pipeline.workspace import save_file, write_parquet

FORMULA = r"^[=+\-@\t\r]"  # what a spreadsheet takes for the beginning of a formula
ROWS = 10_000  # JSON lines made at once


def write_csv(path: Path, table: pa.Table) -> None:
    """Comma-separated, UTF-8; missing is empty. Text that looks like a formula gets an apostrophe before it."""
    plain = pa.table({name: _harmless(column) for name, column in _without_nan(table).items()})
    save_file(path, lambda draft: csv.write_csv(plain, draft))


def write_jsonl(path: Path, table: pa.Table) -> None:
    """JSON lines: one object a row, UTF-8; missing is null."""
    plain = pa.table(_without_nan(table))

    def save(draft: Path) -> None:
        with draft.open("w", encoding="utf-8") as file:
            for start in range(0, len(plain), ROWS):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in plain.slice(start, ROWS).to_pylist())

    save_file(path, save)


def _without_nan(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    """Columns in which NaN is null: neither CSV nor JSON has a NaN that everybody reads."""
    return {name: _nan_to_null(column) for name, column in zip(table.column_names, table.columns, strict=True)}


def _nan_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def _harmless(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type):
        return column
    return pc.if_else(pc.match_substring_regex(column, FORMULA), pc.binary_join_element_wise("'", column, ""), column)


WRITERS = {"csv": write_csv, "json": write_jsonl, "parquet": write_parquet}
