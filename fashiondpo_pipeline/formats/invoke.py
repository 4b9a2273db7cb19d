"""invoke-training's `metadata.jsonl`: preference sets (image_0, image_1, prompt, prefer_0, prefer_1), and picture-caption sets (image, text).

Of a preference set, one of prefer_0 and prefer_1 is true; both false is a pair that nobody has ranked, both true a tie.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import MORE, Comparison, Format, Losses, Made, Reading, Refused, Rows, Single, turned
from fashiondpo_pipeline.formats.files import Pictures, Place, comparisons, in_pairs, picture_at, text_of
from fashiondpo_pipeline.formats.tables import rows_of
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.pairsets import PairSet

_LABELS = {(True, False): 1.0, (False, True): 0.0, (True, True): 0.5, (False, False): None}


def metadata_of(tree: Tree) -> str:
    """The metadata file that is meant: the one named, or `metadata.jsonl` at the root."""
    name = tree.named or "metadata.jsonl"
    if not tree.has(name):
        raise UserError(f"{tree.root}/{name} is not there: name the folder that holds metadata.jsonl, or the file")
    return name


def read_preferences(tree: Tree, reading: Reading) -> Rows:
    return _rows(tree, reading, _comparison)


def _rows(tree: Tree, reading: Reading, made: Callable[[dict, Place], Made]) -> Rows:
    name = metadata_of(tree)
    place = Place.of(tree, name)
    return turned(rows_of(tree, name, reading, lambda _: True), lambda row: made(reading.cells(row), place))


def _comparison(row: dict, place: Place) -> Comparison:
    prefer: Any = row.get("prefer_0"), row.get("prefer_1")
    if not all(isinstance(one, bool) for one in prefer):
        raise Refused("prefer_0 and prefer_1 are not both true or false", prefer)
    first, second = (picture_at(place, row.get(f"image_{i}")) for i in (0, 1))
    return Comparison(text_of(row, "prompt"), first, second, _LABELS[prefer])


def read_captions(tree: Tree, reading: Reading) -> Rows:
    return _rows(tree, reading, _captioned)


def _captioned(row: dict, place: Place) -> Single:
    return Single(text_of(row, "text", "caption", "prompt"), picture_at(place, text_of(row, "image", "file_name")))


def write_preferences(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    in_pairs(pairs, losses)
    pictures, written = Pictures(pairs, folder), 0
    flags = {label: prefer for prefer, label in _LABELS.items()}
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for where, pair in comparisons(pairs):
            if pair["label"] not in flags:
                losses.add(where, "the label is a share, which the format has no place for", str(pair["label"]))
                continue
            (prompt, first), (_, second) = (pictures.name(pair["group"], pair[side]) for side in ("first", "second"))
            prefer = flags[pair["label"]]
            row = {"image_0": first, "image_1": second, "prompt": prompt, "prefer_0": prefer[0], "prefer_1": prefer[1]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return Counter(pairs=written, pictures=pictures.count)


def write_captions(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    pictures = Pictures(pairs, folder)
    for where, _ in comparisons(pairs):
        losses.add(where, "the format holds pictures, not pairs")
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for table in pairs.pictures():
            for row in table.to_pylist():
                file.write(json.dumps({"image": pictures.put(row), "text": row["prompt"]}, ensure_ascii=False) + "\n")
    return Counter(pictures=pictures.count)


PREFERENCES = Format("it needs a metadata.jsonl with image_0, image_1, prompt, prefer_0 and prefer_1", read_preferences, write_preferences)
CAPTIONS = Format("it needs a metadata.jsonl with image and text", read_captions, write_captions, placed=False, holds=MORE)  # pairs are lost whole
