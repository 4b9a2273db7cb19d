"""The picture that a prompt refers to, in its column `reference`: bytes, bytes with a name, or the path of a file beside the prompts."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fashiondpo_pipeline import codecs
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Refused
from fashiondpo_pipeline.formats.files import Place, picture_at
from fashiondpo_pipeline.formats.trees import Local
from fashiondpo_pipeline.identity import canonical
from fashiondpo_pipeline.prompts import Prompts, slug
from fashiondpo_pipeline.remembered import remembered
from fashiondpo_pipeline.workspace import read_parquet, read_schema

COLUMN = "reference"
MEANING = 1  # raised when what a cell stands for changes: what was remembered is then forgotten
WANTED = "a picture's bytes, bytes and path as Hugging Face saves them, or the path of a file beside {name}"


def filled(splits: dict[str, Prompts], path: Path) -> dict[str, Prompts]:
    """The prompts in the file `path` with their reference as {"bytes": ..., "path": ...}, or None where a prompt has none.

    Prompts without such a column stay as they are. Raises UserError that names every cell from which no picture comes, by what it is; only
    the first bytes of a picture are looked at. Whether files beside the prompts have changed is asked each time.
    """
    @cache
    def work() -> tuple[dict[str, list[dict]], bool]:
        return _rows(splits, path)

    def answer() -> dict:
        rows, beside = work()
        return {"splits": {split: Prompts(found).about for split, found in rows.items()}, "beside": beside}

    if not any(COLUMN in found.about["columns"] + found.about["some"] for found in splits.values()) and not _as_bytes(path):
        return splits
    question = f"references {MEANING} {canonical({split: found.about for split, found in splits.items()})}"
    about = remembered(path, question, answer)
    if about["beside"]:
        about = answer()
    return {split: Prompts(partial(_one, work, split), about["splits"][split]) for split in splits}


def _one(work: Callable[[], tuple[dict[str, list[dict]], bool]], split: str) -> list[dict]:
    return work()[0][split]


def _as_bytes(path: Path) -> bool:
    """Whether the column is there as bare bytes, which `prompts.read` passes over."""
    if path.suffix.lower() != ".parquet":
        return False
    schema = read_schema(path)
    return COLUMN in schema.names and pa.types.is_binary(schema.field(COLUMN).type)


def _rows(splits: dict[str, Prompts], path: Path) -> tuple[dict[str, list[dict]], bool]:
    """(the rows with their pictures, whether any came from a file of its own)."""
    cells = _cells(path) if _as_bytes(path) else {}
    faults: dict[str, list[str]] = {}
    found: dict[str, list[dict]] = {}
    beside, place = False, Place(Local(path.parent))
    for split, prompts in splits.items():
        found[split] = []
        for row in prompts.rows:
            cell = cells.get(row["group"]) if cells else row.get(COLUMN)
            beside |= isinstance(cell, str) or (isinstance(cell, dict) and not cell.get("bytes"))
            try:
                found[split].append({**row, COLUMN: _picture(cell, place)})
            except Refused as problem:
                detail = f" ({problem.detail})" if problem.detail else ""
                faults.setdefault(problem.reason, []).append(f"of '{row['group']}'{detail}")
    if faults:
        told = "; ".join(f"{reason}: {cells[0]}" + (f" and of {len(cells) - 1:,} more prompts" if len(cells) > 1 else "")
                         for reason, cells in faults.items())
        raise UserError(f"{path}, column '{COLUMN}': {told}; each should be {WANTED.format(name=path.name)}")
    return found, beside


def _cells(path: Path) -> dict[str, Any]:
    """A prompt's key -> its bytes."""
    table = read_parquet(path)
    groups = table["group"].to_pylist() if "group" in table.column_names else [None] * len(table)
    keys = [slug(prompt) if group in (None, "") else str(group) for prompt, group in zip(table["prompt"].to_pylist(), groups, strict=True)]
    return dict(zip(keys, table[COLUMN].to_pylist(), strict=True))


def _picture(cell: Any, place: Place) -> dict | None:
    """Raises Refused for what is no picture, nor the name of one."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, bytes):
        cell = {"bytes": cell, "path": None}
    elif isinstance(cell, str):
        cell = {"bytes": picture_at(place, cell).data, "path": cell}
    elif not isinstance(cell, dict):
        raise Refused(f"it is {'a list' if isinstance(cell, list) else f'of type {type(cell).__name__}'}")
    elif not isinstance(cell.get("bytes"), bytes):
        if not isinstance(cell.get("path"), str):
            raise Refused("there are neither bytes nor a path")
        cell = {**cell, "bytes": picture_at(place, cell["path"]).data}
    try:
        codecs.check_kind(cell["bytes"])
    except codecs.BadPicture as problem:
        raise Refused(problem.kind, problem.detail) from None
    return cell
