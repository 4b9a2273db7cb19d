"""A plain CSV: one row a comparison, pictures by their paths below the file's folder; what a spreadsheet opens without running anything.

Columns: prompt, first, second, label (preference for the first: 1, 0, 0.5 a tie, empty where nobody has looked) and, where there are
any, annotator, gap, source. Other names are read too, such as winner and loser in the place of first, second and label: see `meaning`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import MORE, Format, Losses, Made, Reading, Rows, splits, turned
from fashiondpo_pipeline.formats.files import Pictures, comparisons, csv_rows, in_pairs, picture_at, write_csv
from fashiondpo_pipeline.formats.meaning import made_of
from fashiondpo_pipeline.pairsets import PairSet

COLUMNS = ["prompt", "first", "second", "label", "annotator", "gap", "source"]


def read(path: Path, reading: Reading) -> Rows:
    file = path / "pairs.csv" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} is not there: name the file, or the folder that holds pairs.csv")
    return turned(csv_rows(file), lambda row: _made(reading.cells(row), file.parent, reading))


def _made(row: dict, folder: Path, reading: Reading) -> Made:
    splits.of_row(row, reading)
    return made_of(row, lambda cell, _: picture_at(folder, cell))


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    in_pairs(pairs, losses)
    pictures = Pictures(pairs, folder)

    def rows() -> Iterator[list]:
        for _, pair in comparisons(pairs):
            (prompt, first), (_, second) = (pictures.name(pair["group"], pair[side]) for side in ("first", "second"))
            yield [prompt, first, second, pair["label"], pair["annotator"], pair["gap"], pair["source"]]

    write_csv(folder / "pairs.csv", COLUMNS, rows())
    return Counter(pairs=pairs.counts["pairs"], pictures=pictures.count)


FORMAT = Format("it needs a .csv with prompt, first, second and label (or prompt, winner and loser)", read, write, holds=MORE)
