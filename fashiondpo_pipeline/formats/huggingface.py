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
from fashiondpo_pipeline.formats.files import Place, comparisons, in_pairs, picture_at, picture_in
from fashiondpo_pipeline.formats.meaning import NAMES, made_of
from fashiondpo_pipeline.formats.tables import TABLES, rows_of, schema_of
from fashiondpo_pipeline.formats.trees import CARDS, OURS, Tree
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.schemas import PICTURE

Classes = Mapping[str, Sequence[str]]
ROWS = 64  # a row group


def read(tree: Tree, reading: Reading) -> Rows:
    tables = [name for name in tree.names(*TABLES) if name.rpartition("/")[2] not in (*OURS, *CARDS)]
    if not tables:
        raise UserError(f"{tree.root}: there is no table in it ({', '.join(TABLES)})")
    return splits.chosen(tables, tree, reading, partial(_rows_in, tree=tree, reading=reading))


def _rows_in(table: str, tree: Tree, reading: Reading) -> Rows:
    """The rows of one table."""
    known, schema = {*NAMES, *reading.columns.values()}, schema_of(tree, table)
    reading.met.update(dict.fromkeys(schema.names))
    place, classes = Place.of(tree, table), classes_of(schema)
    return turned(rows_of(tree, table, reading, lambda name: _plain(name) in known), lambda row: _made(row, place, reading, classes))


def classes_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Column -> the names of its classes, which its whole numbers count from 0: what `datasets` wrote into the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: list(map(str, one["names"])) for name, one in features.items() if isinstance(one, dict) and one.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _made(row: dict, place: Place, reading: Reading, classes: Classes) -> Made:
    cells = reading.cells(row, _plain)
    splits.of_row(cells, reading)
    ours = {theirs: name for name, theirs in reading.columns.items()}
    return made_of(cells, partial(picture_of, place), {ours.get(name, name): names for name, names in classes.items()})


def picture_of(place: Place, cell: Any, name: str | None) -> Picture:
    """The picture of a cell: bytes, a struct of bytes and path, or the name of a file, seen from where the table lies."""
    return picture_at(place, cell, name) if isinstance(cell, str) else picture_in(cell, name, place)


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
                read, write, holds=(*MORE, "name"))
