"""Which format files are in, by what lies there: names of files and columns only."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import FORMATS
from fashiondpo_pipeline.formats.kto import NAME

FIRST = 1 << 20  # bytes that are looked at


def guess(path: Path) -> str:
    """The format's name. Raises UserError where nothing is known."""
    if not path.exists():
        raise UserError(f"there is no {path}: check the path")
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    if found is None:
        raise UserError(f"{path} is in no format that is known at sight: `fdpo import FORMAT {path}` with one of {', '.join(FORMATS)}")
    return found


def _of_folder(path: Path) -> str | None:
    if all(any(folder.is_dir() for folder in path.rglob(side)) for side in ("w", "l")):
        return "folders"
    for name in ("metadata.jsonl", NAME, "pairs.csv"):
        if (path / name).is_file():
            return _of_file(path / name)
    tables = sorted(path.rglob("*.parquet"))
    if tables:
        return _of_file(tables[0])
    return "json" if any(path.glob("*.json")) else None


def _of_file(path: Path) -> str | None:
    try:
        if path.suffix == ".parquet":
            return "pickapic" if "jpg_0" in pq.read_schema(path).names else "huggingface"
        if path.suffix == ".json":
            return "json"
        with path.open("rb") as file:
            first = file.readline(FIRST).decode("utf-8-sig", errors="replace")
        if path.suffix == ".jsonl":
            row = json.loads(first)
            return "invoke" if "prefer_0" in row else "captions" if "image" in row else "huggingface"
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return None
    if path.suffix == ".csv":
        columns = next(csv.reader([first]), [])
        thumbs = "file_path" in columns or {"file_name", "split"} <= set(columns)  # a column `split` alone may tell parts of a set
        return "kto" if thumbs else "huggingface" if any(c.endswith("file_name") for c in columns) else "csv"
    return None
