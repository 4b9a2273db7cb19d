"""A plain CSV: one row a comparison, pictures by their paths below the file's folder; what a spreadsheet opens without running anything.

Columns: prompt, first, second, label (preference for the first: 1, 0, 0.5 a tie, empty where nobody has looked) and, where there are
any, annotator, gap, source, and source_0 and source_1 for what the pictures were called. Other
names are read too, such as winner and loser in the place of first, second and label: see `meaning`.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import MORE, Format, Losses, Made, Reading, Rows, splits, turned
from fashiondpo_pipeline.formats.files import Pictures, Place, comparisons, in_pairs, picture_at, write_csv
from fashiondpo_pipeline.formats.meaning import made_of
from fashiondpo_pipeline.formats.tables import rows_of
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.pairsets import PairSet

ENDINGS = (".csv", ".tsv", ".xlsx")
COLUMNS = ["prompt", "first", "second", "label", "annotator", "gap", "source", "source_0", "source_1"]


def read(tree: Tree, reading: Reading) -> Rows:
    files = tree.names(*(f"pairs{ending}" for ending in ENDINGS)) if not tree.named else [tree.named]
    files = [name for name in files if tree.named or name.lower() in {f"pairs{ending}" for ending in ENDINGS}]
    if not files:
        raise UserError(f"{tree.root}/pairs.csv is not there: name the file, or the folder that holds pairs.csv")
    return chain.from_iterable(turned(rows_of(tree, name, reading, lambda _: True), partial(_made, place=Place.of(tree, name), reading=reading))
                               for name in files)


def _made(row: dict, place: Place, reading: Reading) -> Made:
    cells = reading.cells(row)
    splits.of_row(cells, reading)
    return made_of(cells, partial(picture_at, place))


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    in_pairs(pairs, losses)
    pictures = Pictures(pairs, folder)

    def rows() -> Iterator[list]:
        for _, pair in comparisons(pairs):
            rows = [pairs.picture(pair["group"], pair[side]) for side in ("first", "second")]
            yield [rows[0]["prompt"], *map(pictures.put, rows), *(pair[name] for name in ("label", *MORE)), *(row["source"] for row in rows)]

    write_csv(folder / "pairs.csv", COLUMNS, rows())
    return Counter(pairs=pairs.counts["pairs"], pictures=pictures.count)


FORMAT = Format("it needs a .csv with prompt, first, second and label (or prompt, winner and loser)", read, write, holds=(*MORE, "name"))
