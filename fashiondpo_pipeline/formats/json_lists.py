"""JSON files that are one list of objects: HPDv2 and HPDv3 (Wu et al. 2023, Ma et al. 2025), Label Studio's export, and plain ones.

HPDv2: prompt, file_path or image_path (a list) and human_preference, or rank (1 the best). HPDv3: prompt, path1 (always the better),
path2, choice_dist (votes). Label Studio: data, and annotations with a `pairwise` result (selected: left or right), or a choice; the
short export has its answer in a column. Other objects are read as rows of a table are: see `meaning`. Pictures are files beside the
list, in a folder of its name, or in `images`; an address is not asked.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import MORE, Format, Losses, Made, Picture, Reading, Refused, Rows, splits
from fashiondpo_pipeline.formats.files import Pictures, Place, comparisons, in_pairs, picture_at
from fashiondpo_pipeline.formats.meaning import made_of
from fashiondpo_pipeline.formats.tables import rows_of
from fashiondpo_pipeline.formats.trees import CARDS, OURS, Tree
from fashiondpo_pipeline.pairsets import PairSet


def read(tree: Tree, reading: Reading) -> Rows:
    files = [name for name in tree.names(".json") if name.rpartition("/")[2] not in (*OURS, *CARDS)]
    if not files:
        raise UserError(f"{tree.root}: there is no .json file in it")
    return splits.chosen(files, tree, reading, partial(_rows_in, tree=tree, reading=reading))


def _rows_in(file: str, tree: Tree, reading: Reading) -> Rows:
    for where, make in rows_of(tree, file, reading, lambda _: True):
        try:
            found = make()
        except Refused as problem:
            yield where, partial(_refuse, problem)
            continue
        made = partial(_made, place=Place.of(tree, file), stem=PurePosixPath(file).stem, reading=reading)
        if isinstance(found.get("data"), dict) and isinstance(found.get("annotations"), list | None):
            for number, row in enumerate(_answers(found), 1):
                yield f"{where}, annotation {number}", partial(made, row)
        else:
            yield where, partial(made, found)


def _refuse(problem: Refused) -> Any:
    raise problem


def _made(row: dict | Refused, place: Place, stem: str, reading: Reading) -> Made:
    if isinstance(row, Refused):
        raise row
    cells = reading.cells(row)
    splits.of_row(cells, reading)
    return made_of(cells, lambda cell, name: _picture(place, stem, cell, name))


def _picture(place: Place, stem: str, name: Any, called: str | None) -> Picture:
    """The picture that an object names: beside its file, in a folder of the file's name (`stem`), or in `images`."""
    if not isinstance(name, str):
        raise Refused("there is no file name", repr(name)[:80])
    if "://" in name:
        raise Refused("the picture is at an address, which is not asked", name[:80])
    if name.startswith("/data/local-files/?d="):  # how Label Studio names what lies on its own disk
        name = unquote(name.partition("?d=")[2])
    name = name.removeprefix("/data/")
    places = [name, f"{stem}/{name}", f"images/{name}", *([name.rpartition("/")[2]] if name.startswith("upload/") else [])]
    for one in places[:-1]:
        try:
            return picture_at(place, one, called)
        except Refused as problem:
            if problem.reason != "the file is not there":
                raise
    return picture_at(place, places[-1], called)


# -- Label Studio


def _answers(task: Mapping[str, Any]) -> Iterator[dict | Refused]:
    """A row for each annotation of a task; one without a label where there is none."""
    annotations = [one for one in task.get("annotations") or [] if isinstance(one, dict)]
    for annotation in annotations:
        if annotation.get("was_cancelled"):
            yield Refused("the annotator skipped it", task.get("id", ""))
            continue
        who = annotation.get("completed_by")
        who = who.get("email") or who.get("id") if isinstance(who, dict) else who
        yield {**task["data"], **_answer(task["data"], annotation.get("result")), "annotator": who, "source": task.get("id")}
    if not annotations:
        yield {**task["data"], "source": task.get("id")}


def _answer(data: Mapping[str, Any], results: Any) -> dict:
    """What an annotation's results say: the label, and which columns were compared where they are named."""
    for result in results if isinstance(results, list) else []:
        value = result.get("value") if isinstance(result, dict) else None
        if not isinstance(value, dict):
            continue
        said = value.get("selected") or (value.get("choices") or [None])[0]
        names = [name.strip() for name in str(result.get("to_name", "")).split(",")]
        compared = {"first": data[names[0]], "second": data[names[1]]} if len(names) == 2 and all(name in data for name in names) else {}
        if isinstance(said, str):
            return {**compared, "label": said}
    return {}


def write(pairs: PairSet, folder: Path, losses: Losses) -> Counter[str]:
    """As HPDv2 has its pairs: prompt, image_path, human_preference; with annotator, gap and source where there are any."""
    in_pairs(pairs, losses)
    pictures, written = Pictures(pairs, folder), 0
    with (folder / "pairs.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for _, pair in comparisons(pairs):
            (prompt, first), (_, second) = (pictures.name(pair["group"], pair[side]) for side in ("first", "second"))
            label = pair["label"]
            row = {"prompt": prompt, "image_path": [first, second], "human_preference": None if label is None else [label, 1 - label]}
            row |= {name: pair[name] for name in MORE if pair[name] is not None}
            file.write(("," if written else "") + "\n" + json.dumps(row, ensure_ascii=False))
            written += 1
        file.write("\n]\n")
    return Counter(pairs=written, pictures=pictures.count)


FORMAT = Format("it needs a .json file that is a list of objects with a prompt, two pictures or a list of them, and which is preferred",
                read, write, holds=MORE)
