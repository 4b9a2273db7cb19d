"""Pick-a-Pic v2 (Kirstain et al. 2023, 2305.01569): Parquet, one row a comparison, both pictures as JPEG bytes in it.

label_0 and label_1 add up to 1: 1 and 0, or one half each for a tie; one of them is enough. Where `has_label` is false nobody has chosen.
The best picture's id (`best_image_uid`) says nothing that the labels do not, and is not read.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Comparison, Format, Losses, Reading, Refused, Rows, meaning, splits, turned
from fashiondpo_pipeline.formats.files import Place, comparisons, in_pairs, picture_in, text_of
from fashiondpo_pipeline.formats.tables import rows_of
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.pairsets import PairSet

COLUMNS = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "image_0_uid", "image_1_uid", "ranking_id", "user_id"]
SCHEMA = pa.schema([
    ("are_different", pa.bool_()), ("best_image_uid", pa.string()), ("caption", pa.string()), ("created_at", pa.timestamp("ns")),
    ("has_label", pa.bool_()), ("image_0_uid", pa.string()), ("image_0_url", pa.string()), ("image_1_uid", pa.string()),
    ("image_1_url", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
    ("model_0", pa.string()), ("model_1", pa.string()), ("ranking_id", pa.int64()), ("user_id", pa.int64()),
    ("num_example_per_prompt", pa.int64()), ("__index_level_0__", pa.int64()),
])
ROWS = 64  # a row group


def read(tree: Tree, reading: Reading) -> Rows:
    files = tree.names(".parquet", ".arrow")
    if not files:
        raise UserError(f"{tree.root}: there is no .parquet file in it")
    return splits.chosen(files, tree, reading, partial(_rows_in, tree=tree, reading=reading))


def _rows_in(file: str, tree: Tree, reading: Reading) -> Rows:
    known, place = {*COLUMNS, *reading.columns.values()}, Place.of(tree, file)
    return turned(rows_of(tree, file, reading, known.__contains__), lambda row: _comparison(reading.cells(row), place))


def _comparison(row: dict, place: Place) -> Comparison:
    label = label_of(row)
    lost: list[tuple[str, str]] = []
    ids = [_id(row, name, lost) for name in ("image_0_uid", "image_1_uid", "user_id", "ranking_id")]
    first, second = (picture_in(row.get(f"jpg_{i}"), ids[i], place) for i in (0, 1))
    return Comparison(text_of(row, "caption"), first, second, label, ids[2], None, ids[3], lost=tuple(lost))


def _id(row: dict, name: str, lost: list[tuple[str, str]]) -> str | None:
    """An id as text; one that is none is lost alone."""
    try:
        return meaning.words(row.get(name), name)
    except Refused as problem:
        lost.append((problem.reason, problem.detail))
        return None


def label_of(row: dict) -> float | None:
    """Preference for the first picture; None where nobody has chosen."""
    if meaning.truth("has_label", row.get("has_label")) is False:
        return None
    return meaning.share_of_two(*(meaning.number(name, row.get(name)) for name in ("label_0", "label_1")))


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    in_pairs(pairs, losses)
    (folder / "data").mkdir()
    rows, written = [], 0
    with pq.ParquetWriter(folder / "data" / "train-00000.parquet", SCHEMA, compression="zstd") as file:
        for where, pair in comparisons(pairs):
            rows.append(_row(pairs, pair, written))
            for name in ("annotator", "source"):
                if pair[name] is not None and _number(pair[name]) is None:
                    losses.add(where, f"the pair's {name} is no whole number, as the format needs it", pair[name])
            written += 1
            if len(rows) == ROWS:
                file.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        file.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return Counter(pairs=written)


def _row(pairs: PairSet, pair: dict, number: int) -> dict:
    first, second = (pairs.picture(pair["group"], pair[side]) for side in ("first", "second"))
    label = pair["label"]
    best = {1.0: first["source"], 0.0: second["source"]}.get(label) if label is not None else None
    data = first["picture"]["bytes"], second["picture"]["bytes"]
    return {
        "are_different": data[0] != data[1], "best_image_uid": best, "caption": first["prompt"], "has_label": label is not None,
        "image_0_uid": first["source"], "image_1_uid": second["source"], "jpg_0": data[0], "jpg_1": data[1],
        "label_0": label, "label_1": None if label is None else 1 - label,
        "ranking_id": _number(pair["source"]), "user_id": _number(pair["annotator"]), "__index_level_0__": number,
    }


def _number(text: str | None) -> int | None:
    """Ids are whole numbers there; other names are left out, and counted."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 and str(int(text)) == text else None


FORMAT = Format("it needs .parquet files with caption, jpg_0, jpg_1, label_0 and label_1", read, write, holds=("annotator", "source", "name"))
