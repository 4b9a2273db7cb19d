"""Winner and loser folders, as sd-scripts' proposal for preference training has them: `w/NAME.png` beats `l/NAME.png`.

The folders may lie in subsets (`1_dress/w`, `1_dress/l`); a caption lies beside the winner, else the loser, as .caption or .txt.
"""

import re
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from fashiondpo_pipeline.codecs import kind_of
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Comparison, Format, Losses, Reading, Refused, Rows, splits
from fashiondpo_pipeline.formats.files import Place, comparisons, decided, in_pairs, picture_at
from fashiondpo_pipeline.formats.trees import Tree
from fashiondpo_pipeline.pairsets import PairSet

CAPTIONS = (".caption", ".txt")
MOST_CAPTION = 1 << 20  # bytes
_SIDE = re.compile(r"(?:(?<=/)|^)(w|l)/")
Sides = dict[str, dict[str, list[str]]]


def read(tree: Tree, reading: Reading) -> Rows:
    subsets = _subsets(tree)
    if not subsets:
        raise UserError(f"{tree.root}: there are no folders w and l in it")
    return _rows(tree, subsets, reading)


def _subsets(tree: Tree) -> dict[str, Sides]:
    """Folder that holds w and l -> side -> the path below it, without its ending -> the files called so, captions aside.

    Whatever a file's ending, it stands for a picture: one that is none costs its pair, which is told.
    """
    found: dict[str, Sides] = {}
    for name in tree.names():
        folder, *rest = _SIDE.split(name, maxsplit=1)
        if len(rest) < 2 or name.lower().endswith(CAPTIONS):
            continue
        stem = rest[1][: -len(suffix)] if (suffix := PurePosixPath(name).suffix) else rest[1]
        found.setdefault(folder, {"w": {}, "l": {}})[rest[0]].setdefault(stem, []).append(name)
    return found


def _rows(tree: Tree, subsets: dict[str, Sides], reading: Reading) -> Rows:
    parts = {subset: splits.split_of(PurePosixPath(subset) / "w") for subset in sorted(subsets)}
    wanted = splits.wanted_of({part for part in parts.values() if part}, tree.root, reading.split)
    return _of_parts(tree, subsets, parts, wanted, reading)


def _of_parts(tree: Tree, subsets: dict[str, Sides], parts: dict[str, str | None], wanted: str, reading: Reading) -> Rows:
    for subset, part in parts.items():
        reason, sides = splits.unwanted(part, wanted, set(parts.values())), subsets[subset]
        for stem in sorted(sides["w"].keys() | sides["l"].keys()):
            names = {side: sides[side].get(stem, []) for side in ("w", "l")}
            if part and not reason:
                reading.splits[part] += 1
            yield (names["w"] or names["l"])[0], partial(_comparison, tree, subset, stem, names, reason)


def _comparison(tree: Tree, subset: str, stem: str, names: dict[str, list[str]], reason: str | None) -> Comparison:
    captions = [name for side in ("w", "l") for ending in CAPTIONS if tree.has(name := f"{subset}{side}/{stem}{ending}")]
    for name in chain(*names.values(), captions):
        tree.meet(name)
    if reason:
        raise Refused(reason)
    for side, other in (("w", "l"), ("l", "w")):
        if not names[side]:
            raise Refused(f"there is no picture of that name in {side}", names[other][0])
        if len(names[side]) > 1:
            raise Refused(f"there are several pictures of that name in {side}", ", ".join(names[side]))
    winner, loser = (picture_at(Place(tree), names[side][0]) for side in ("w", "l"))
    if not captions:
        raise Refused("there is no caption beside it")
    text = _caption(tree, captions[0])
    others = tuple(("another caption of the same name says something else", name) for name in captions[1:] if _caption(tree, name) != text)
    return Comparison(text, winner, loser, 1.0, lost=others)


def _caption(tree: Tree, name: str) -> str:
    try:
        return tree.read(name, MOST_CAPTION).decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise Refused("the caption is not UTF-8", name) from None


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
