"""Diffusion-KTO's table (Li et al. 2024, 2404.04465): a CSV with one row a picture, liked or not, beside the pictures.

Its description names the columns file_path, caption and label, its program reads file_name, caption and split; both are read here, and
the latter are written. Values: exclusive_win, exclusive_lose; `intersections` (won once, lost once) is neither. Each picture that
is liked beats each of the same prompt that is not; a pair that does not come back in this way is counted as lost.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Format, Losses, Reading, Refused, Rows, Single, turned
from fashiondpo_pipeline.formats.files import LOST, WON, Pictures, Place, comparisons, decided, picture_at, standing, text_of, write_csv
from fashiondpo_pipeline.formats.tables import rows_of
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.pairsets import Numbers, PairSet

NAME = "train_processed_v3.csv"
THUMBS = {"exclusive_win": True, "exclusive_lose": False, "intersections": None}


def read(tree: Tree, reading: Reading) -> Rows:
    name = tree.named or NAME
    if not tree.has(name):
        tables = tree.names(".csv", ".tsv", ".xlsx")
        if len(tables) != 1:
            raise UserError(f"{tree.root}: there is no {NAME} in it, and {len(tables)} other .csv files: name the one that is meant")
        name = tables[0]
    place = Place.of(tree, name)
    return turned(rows_of(tree, name, reading, lambda _: True), lambda row: _single(reading.cells(row), place))


def _single(row: dict[str, str], place: Place) -> Single:
    kind = text_of(row, "split", "label")
    if not isinstance(kind, str) or kind not in THUMBS:
        raise Refused("the label is none of exclusive_win, exclusive_lose, intersections", str(kind)[:80])
    name = text_of(row, "file_name", "file_path")
    try:
        picture = picture_at(place, name)
    except Refused as problem:
        if problem.reason != "the file is not there":
            raise
        picture = picture_at(place, f"train/{name}")  # names are given without the folder that the pictures lie in, too
    return Single(text_of(row, "caption", "prompt"), picture, THUMBS[kind])


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    pictures, written, stand = Pictures(pairs, folder, "train"), Counter[str](), standing(pairs)
    by_thumb = {liked: kind for kind, liked in THUMBS.items()}
    by_pairs = {WON: "exclusive_win", LOST: "exclusive_lose", WON | LOST: "intersections"}
    thumbs, order = Numbers(), list(THUMBS)

    def rows() -> Iterator[list]:
        for table in pairs.pictures():
            for row in table.to_pylist():
                stood = (stand.find(row["group"], row["candidate"]) or 0) & (WON | LOST)
                kind = by_pairs.get(stood) if row["liked"] is None else by_thumb[row["liked"]]
                if kind is None:
                    losses.add(f"picture {row['group']}/{row['candidate']}", "the picture has no thumb, and neither won nor lost")
                    continue
                written[kind] += 1
                thumbs.put([(row["group"], row["candidate"], order.index(kind))])
                yield [pictures.put(row), row["prompt"], kind]

    write_csv(folder / NAME, ["file_name", "caption", "split"], rows())
    _count_lost(pairs, thumbs, losses)
    return written


def _count_lost(pairs: PairSet, thumbs: Numbers, losses: Losses) -> None:
    """Count the pairs that thumbs do not tell; `thumbs`: place in THUMBS of each picture written."""
    seen = Numbers()
    for where, pair in comparisons(pairs):
        try:
            winner, loser = decided(pair)
            if [thumbs.find(pair["group"], number) for number in (winner, loser)] != [0, 1]:
                raise Refused("the winner is not liked throughout, or the loser is elsewhere")
            if seen.find(pair["group"], f"{winner} {loser}"):
                raise Refused("the pair came before")
            seen.put([(pair["group"], f"{winner} {loser}", 1)])
        except Refused as problem:
            losses.add(where, problem.reason)


FORMAT = Format(f"it needs {NAME} with file_name, caption and split", read, write, placed=False, holds=("thumb",))
