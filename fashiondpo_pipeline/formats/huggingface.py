"""Hugging Face `datasets` folders: Parquet with pictures as struct<bytes, path>, or picture files with a metadata.jsonl or .csv.

What the columns may be called and what their values mean is in `meaning`. A metadata file names its pictures in columns such as
image_0_file_name, or file_name. Where the schema says that a column's whole numbers are classes, their names are what counts.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import MORE, Format, Losses, Made, Picture, Reading, Rows, splits, turned
from fashiondpo_pipeline.formats.files import comparisons, csv_rows, in_pairs, json_lines, parquet_files, parquet_rows, picture_at, picture_in
from fashiondpo_pipeline.formats.meaning import NAMES, made_of
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.schemas import PICTURE

Classes = Mapping[str, Sequence[str]]
ROWS = 64  # a row group


def read(path: Path, reading: Reading) -> Rows:
    files = parquet_files(path)
    if files and path.suffix not in (".jsonl", ".csv"):
        return splits.chosen(files, path, reading, partial(_stored_in, root=path if path.is_dir() else path.parent, reading=reading))
    tables = [path] if path.is_file() else [file for name in ("metadata.jsonl", "metadata.csv") for file in sorted(path.rglob(name))]
    if not tables:
        raise UserError(f"{path}: there is no .parquet, metadata.jsonl or metadata.csv in it")
    return splits.chosen(tables, path, reading, partial(_listed_in, reading=reading))


def _stored_in(file: Path, root: Path, reading: Reading) -> Rows:
    """The rows of one Parquet file."""
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException):
        schema = pa.schema([])  # the rows' reader says what is wrong with it
    reading.met.update(dict.fromkeys(schema.names))
    classes = classes_of(schema)
    return turned(parquet_rows([file], [*NAMES, *reading.columns.values()]), lambda row: _made(row, root, reading, classes))


def classes_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> the names of its classes, which its whole numbers count from 0: what `datasets` wrote into the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(map(str, one["names"])) for name, one in features.items() if isinstance(one, dict) and one.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _listed_in(table: Path, reading: Reading) -> Rows:
    """The rows of one metadata file."""
    rows: Any = csv_rows(table) if table.suffix == ".csv" else json_lines(table)
    return turned(rows, lambda row: _made(row, table.parent, reading, {}))


def _made(row: dict, folder: Path, reading: Reading, classes: Classes) -> Made:
    cells = reading.cells(row, _plain)
    splits.of_row(cells, reading)
    ours = {theirs: name for name, theirs in reading.columns.items()}
    return made_of(cells, partial(picture_of, folder), {ours.get(name, name): names for name, names in classes.items()})


def picture_of(folder: Path, cell: Any, name: str | None) -> Picture:
    """The picture of a cell: bytes, a struct of bytes and path, or the name of a file below the folder."""
    return picture_at(folder, cell) if isinstance(cell, str) else picture_in(cell, name, folder)


def _plain(name: str) -> str:
    """The name of the feature that a metadata file's column fills: file_name is image, X_file_name is X."""
    return "image" if name == "file_name" else name.removesuffix("_file_name")


def schema() -> pa.Schema:
    """What is written: `datasets` and its viewer show both picture columns as pictures."""
    texts = {name: {"dtype": "string", "_type": "Value"} for name in ("prompt", "annotator", "source", "source_0", "source_1")}
    numbers = {name: {"dtype": "float64", "_type": "Value"} for name in ("label", "gap")}
    pictures = {name: {"_type": "Image"} for name in ("image_0", "image_1")}
    kinds = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(numbers, pa.float64()), **dict.fromkeys(pictures, PICTURE)}
    order = ["prompt", "image_0", "image_1", "label", "annotator", "gap", "source", "source_0", "source_1"]
    features = {name: (texts | numbers | pictures)[name] for name in order}
    return pa.schema([(name, kinds[name]) for name in order], {"huggingface": json.dumps({"info": {"features": features}})})


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    in_pairs(pairs, losses)
    (folder / "data").mkdir()
    rows, written, kinds = [], 0, schema()
    with pq.ParquetWriter(folder / "data" / "train-00000.parquet", kinds, compression="zstd") as file:
        for _, pair in comparisons(pairs):
            shown = [pairs.picture(pair["group"], pair[side]) for side in ("first", "second")]
            rows.append({"prompt": shown[0]["prompt"], **{f"image_{i}": one["picture"] for i, one in enumerate(shown)},
                         **{f"source_{i}": one["source"] for i, one in enumerate(shown)},
                         **{name: pair[name] for name in ("label", "annotator", "gap", "source")}})
            written += 1
            if len(rows) == ROWS:
                file.write_table(pa.Table.from_pylist(rows, kinds))
                rows = []
        file.write_table(pa.Table.from_pylist(rows, kinds))
    return Counter(pairs=written)


FORMAT = Format("it needs Parquet files or a metadata file with prompt, two pictures (chosen and rejected, or image_0 and image_1) and a label",
                read, write, holds=MORE)
