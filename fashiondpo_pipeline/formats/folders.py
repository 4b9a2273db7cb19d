"""Winner and loser folders, as sd-scripts' proposal for preference training has them: `w/NAME.png` beats `l/NAME.png`.

The folders may lie in subsets (`1_dress/w`, `1_dress/l`); a caption lies beside the winner, else the loser, as .caption or .txt.
"""

from collections import Counter
from functools import partial
from pathlib import Path

from fashiondpo_pipeline.codecs import kind_of
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Comparison, Format, Losses, Reading, Refused, Rows, splits
from fashiondpo_pipeline.formats.files import ENDINGS, comparisons, decided, in_pairs, inside, picture_at
from fashiondpo_pipeline.pairsets import PairSet

CAPTIONS = (".caption", ".txt")
MOST_CAPTION = 1 << 20  # bytes


def read(path: Path, reading: Reading) -> Rows:
    subsets = sorted({folder.parent for side in ("w", "l") for folder in path.rglob(side) if folder.is_dir()})
    if not subsets:
        raise UserError(f"{path}: there are no folders w and l in it")
    parts = {subset: splits.split_of(subset.relative_to(path) / "w") for subset in subsets}
    wanted = splits.wanted_of({part for part in parts.values() if part}, path, reading.split)
    for subset, part in parts.items():
        reason = splits.unwanted(part, wanted, set(parts.values()))
        sides = {side: _pictures(subset / side) for side in ("w", "l")}
        for stem in sorted(sides["w"].keys() | sides["l"].keys()):
            names = {side: [f"{side}/{name}" for name in sides[side].get(stem, [])] for side in ("w", "l")}
            where = (subset / (names["w"] or names["l"])[0]).relative_to(path).as_posix()
            if part and not reason:
                reading.splits[part] += 1
            yield where, partial(_refuse, reason) if reason else partial(_comparison, path, subset, stem, names)


def _refuse(reason: str) -> Comparison:
    raise Refused(reason)


def _pictures(folder: Path) -> dict[str, list[str]]:
    """Name without its ending -> the picture files called so."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix.lower() in ENDINGS:
            found.setdefault(file.stem, []).append(file.name)
    return found


def _comparison(root: Path, subset: Path, stem: str, names: dict[str, list[str]]) -> Comparison:
    for side, other in (("w", "l"), ("l", "w")):
        if not names[side]:
            raise Refused(f"there is no picture of that name in {side}", names[other][0])
        if len(names[side]) > 1:
            raise Refused(f"there are several pictures of that name in {side}", ", ".join(names[side]))
    prefix = subset.relative_to(root).as_posix()
    winner, loser = (picture_at(root, name if prefix == "." else f"{prefix}/{name}") for name in (names["w"][0], names["l"][0]))
    return Comparison(_caption(subset, stem), winner, loser, 1.0)


def _caption(subset: Path, stem: str) -> str:
    for side in ("w", "l"):
        for ending in CAPTIONS:
            if (subset / side / f"{stem}{ending}").exists():
                file = inside(subset, f"{side}/{stem}{ending}")
                if file.stat().st_size > MOST_CAPTION:
                    raise Refused("the caption is too long")
                try:
                    return file.read_bytes().decode("utf-8-sig").removesuffix("\n")
                except UnicodeDecodeError:
                    raise Refused("the caption is not UTF-8") from None
    raise Refused("there is no caption beside it")


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    in_pairs(pairs, losses)
    for side in ("w", "l"):
        (folder / side).mkdir()
    written = 0
    for where, pair in comparisons(pairs):
        try:
            shown = [pairs.picture(pair["group"], number) for number in decided(pair)]
        except Refused as problem:
            losses.add(where, problem.reason)
            continue
        for side, row in zip(("w", "l"), shown, strict=True):
            data = row["picture"]["bytes"]
            (folder / side / f"{written:08d}{kind_of(data)}").write_bytes(data)
            (folder / side / f"{written:08d}.caption").write_bytes(row["prompt"].encode())
        written += 1
    return Counter(pairs=written)


FORMAT = Format("it needs folders w and l with pictures of the same names, and a caption beside each", read, write, placed=False)
