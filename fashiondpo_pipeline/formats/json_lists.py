"""JSON files that are one list of objects: HPDv2 and HPDv3 (Wu et al. 2023, Ma et al. 2025), Label Studio's export, and plain ones.

HPDv2: prompt, file_path or image_path (a list) and human_preference, or rank (1 the best). HPDv3: prompt, path1 (always the better),
path2, choice_dist (votes). Label Studio: data, and annotations with a `pairwise` result (selected: left or right), or a choice; the
short export has its answer in a column. Other objects are read as rows of a table are: see `meaning`. Pictures are files beside the
list, in a folder of its name, or in `images`; an address is not asked.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import MORE, Format, Losses, Made, Picture, Reading, Refused, Rows, splits
from fashiondpo_pipeline.formats.files import MOST_LINE, Pictures, comparisons, in_pairs, json_lines, picture_at
from fashiondpo_pipeline.formats.meaning import made_of
from fashiondpo_pipeline.pairsets import PairSet

PIECE = 1 << 20  # letters that are read at once
WHITE = " \t\r\n"
OWN = "lineage.json"  # what an export says of itself


def read(path: Path, reading: Reading) -> Rows:
    files = [path] if path.is_file() else sorted(file for file in path.glob("*.json") if file.is_file() and file.name != OWN)
    if not files:
        raise UserError(f"{path}: there is no .json file in it")
    return splits.chosen(files, path, reading, partial(_rows_of, reading=reading))


def _rows_of(file: Path, reading: Reading) -> Rows:
    for where, make in _objects(file):
        try:
            found = make()
        except Refused as problem:
            yield where, partial(_refuse, problem)
            continue
        if isinstance(found.get("data"), dict) and isinstance(found.get("annotations"), list | None):
            for number, row in enumerate(_answers(found), 1):
                yield f"{where}, annotation {number}", partial(_made, row, file, reading)
        else:
            yield where, partial(_made, found, file, reading)


def _refuse(problem: Refused) -> Any:
    raise problem


def _made(row: dict | Refused, file: Path, reading: Reading) -> Made:
    if isinstance(row, Refused):
        raise row
    cells = reading.cells(row)
    splits.of_row(cells, reading)
    return made_of(cells, lambda cell, _: _picture(file, cell))


def _picture(file: Path, name: Any) -> Picture:
    """The picture that an object names: beside its file, in a folder of the file's name, or in `images`."""
    if not isinstance(name, str):
        raise Refused("there is no file name", repr(name)[:80])
    if "://" in name:
        raise Refused("the picture is at an address, which is not asked", name[:80])
    if name.startswith("/data/local-files/?d="):  # how Label Studio names what lies on its own disk
        name = unquote(name.partition("?d=")[2])
    name = name.removeprefix("/data/")
    places = [name, f"{file.stem}/{name}", f"images/{name}", *([name.rpartition("/")[2]] if name.startswith("upload/") else [])]
    for place in places[:-1]:
        try:
            return picture_at(file.parent, place)
        except Refused as problem:
            if problem.reason != "the file is not there":
                raise
    return picture_at(file.parent, places[-1])


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


# -- a list, an object at a time


def _objects(file: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(where, make) of each object of the list in a file, or of each line where it holds an object a line; one in memory at a time."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as text:
        buffer = text.read(PIECE).lstrip(WHITE)
        if buffer.startswith("["):
            yield from _listed(file.name, text, buffer)
            return
    if buffer.partition("\n")[0].strip() == "{":  # one object over many lines
        yield file.name, partial(_refuse, Refused("the file is neither a list nor an object a line", file.name))
        return
    yield from json_lines(file)


def _listed(name: str, text: Any, buffer: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    decode, at, number, ended = json.JSONDecoder().raw_decode, 1, 0, False
    while True:
        while at < len(buffer) and buffer[at] in WHITE + ",":
            at += 1
        if buffer[at : at + 1] == "]":
            return
        try:
            found, end = decode(buffer, at)
            whole = end < len(buffer) or ended  # a number that ends with the piece may go on in the next
        except (ValueError, RecursionError) as problem:
            whole, found, end = ended or isinstance(problem, RecursionError) or len(buffer) - at > MOST_LINE, problem, at
        if not whole:
            piece = text.read(max(PIECE, len(buffer) - at))
            buffer, at, ended = buffer[at:] + piece, 0, not piece
            continue
        number += 1
        yield f"{name}, item {number}", partial(_object, found)
        if isinstance(found, Exception):
            return  # where the next one begins is not known
        at = end


def _object(found: Any) -> dict:
    if isinstance(found, Exception):
        raise Refused("the list is not JSON from here on", str(found)[:80])
    if not isinstance(found, dict):
        raise Refused("the item is not an object", repr(found)[:80])
    return found


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
