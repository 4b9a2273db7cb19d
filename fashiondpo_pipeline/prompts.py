"""What to draw: prompts from .txt, .csv, .jsonl or .parquet, with a key each and a split that never changes by itself."""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.identity import canonical, fingerprint
from fashiondpo_pipeline.remembered import remembered
from fashiondpo_pipeline.seeds import key
from fashiondpo_pipeline.workspace import read_parquet

TRAIN, HELD_OUT = "train", "held-out"
MEANING = 1  # raised when `read` or an identity means something else: what was remembered is then forgotten
KINDS = (".txt", ".csv", ".jsonl", ".parquet")


class Prompts:
    """Prompts of one split: one dict a prompt, with `group`, `prompt` and whatever else the file has; read when first looked at."""

    def __init__(self, rows: list[dict] | Callable[[], list[dict]], about: dict | None = None):
        self._rows, self._about = rows, about

    @cached_property
    def rows(self) -> list[dict]:
        return self._rows() if callable(self._rows) else self._rows

    @cached_property
    def about(self) -> dict:
        """Count, identity, which changes if and only if a row does, and the columns that every row has."""
        if self._about is not None:
            return self._about
        columns = sorted(set.intersection(*map(set, self.rows))) if self.rows else []
        plain = [{name: _plain(value) for name, value in row.items()} for row in self.rows]
        return {"count": len(self.rows), "identity": fingerprint(plain), "columns": columns}

    def __len__(self) -> int:
        return self.about["count"]

    @property
    def identity(self) -> str:
        return self.about["identity"]

    @property
    def columns(self) -> set[str]:
        return set(self.about["columns"])


def open_splits(path: Path, held_out: float, most: dict[str, int | None]) -> dict[str, Prompts]:
    """`read`, at most so many of each split. A file that has not changed is not read before somebody wants its rows."""
    @cache
    def rows() -> dict[str, list[dict]]:
        return {split: found.rows[: most[split]] for split, found in read(path, held_out).items()}

    if not path.is_file():
        rows()  # which says so
    question = f"prompts {MEANING} {canonical([held_out, most])}"
    about = remembered(path, question, lambda: {split: Prompts(found).about for split, found in rows().items()})
    return {split: Prompts(partial(_one_split, rows, split), about[split]) for split in about}


def _one_split(rows: Callable[[], dict[str, list[dict]]], split: str) -> list[dict]:
    return rows()[split]


def read(path: Path, held_out: float = 0.2) -> dict[str, Prompts]:
    """{"train": ..., "held-out": ...}. Raises UserError for an unreadable file, an empty prompt, or a key given twice.

    Without a column `split` a prompt is held out if the hash of its text falls below `held_out`: adding prompts
    never moves another one across. Without a column `group` the key is made from the text.
    """
    rows = _read_rows(path)
    if not rows:
        raise UserError(f"{path}: there is no prompt in it; write one a line")
    seen: dict[str, int] = {}
    splits: dict[str, list[dict]] = {TRAIN: [], HELD_OUT: []}
    for number, row in rows:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{path}, line {number}: the prompt is empty; fill it or take the line out")
        group = slug(prompt) if row.get("group") in (None, "") else str(row["group"])
        if group in seen:
            raise UserError(f"{path}, line {number}: '{group}' was given in line {seen[group]}; take one of them out")
        seen[group] = number
        split = row.get("split") or (HELD_OUT if key("held-out", prompt) / 2**63 < held_out else TRAIN)
        if split not in splits:
            raise UserError(f"{path}, line {number}: split '{split}' is not one of '{TRAIN}', '{HELD_OUT}'")
        splits[split].append({**row, "group": group, "prompt": prompt, "split": split})
    return {split: Prompts(found) for split, found in splits.items()}


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it: pictures by their hash, dates and numbers that are none (NaN) by their text."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    known = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if known else str(value)


def slug(prompt: str) -> str:
    """A short readable key of a prompt; the hash keeps prompts apart that read alike."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'prompt'}-{fingerprint(prompt)[:6]}"


def _read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, row) of each prompt in the file."""
    if not path.is_file():
        raise UserError(f"prompts.file: there is no file {path}; check the path (relative ones start in the working folder)")
    if path.suffix not in KINDS:
        raise UserError(f"prompts.file: {path.name} is none of {', '.join(KINDS)}; save it as one of them")
    if path.suffix == ".parquet":
        table = read_parquet(path)
        if "prompt" not in table.column_names:
            raise UserError(f"{path}: no column 'prompt', only {', '.join(table.column_names)}; rename one")
        light = [name for name in table.column_names if not pa.types.is_binary(table.schema.field(name).type)]
        return list(enumerate(table.select(light).to_pylist(), 1))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        line = path.read_bytes()[: problem.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (byte {problem.start}); save the file as UTF-8") from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]  # splitlines knows more ends than editors
    if path.suffix == ".txt":
        return [(n, {"prompt": line.strip()}) for n, line in lines]
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        if "prompt" not in (reader.fieldnames or []):
            raise UserError(f"{path}: no column 'prompt' in its first line; name the columns there")
        return [(reader.line_num, {k: v for k, v in row.items() if k}) for row in reader]
    return [(n, _json_row(path, n, line)) for n, line in lines]


def _json_row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as problem:
        raise UserError(f"{path}, line {number}: not JSON ({problem})") from None
    if not isinstance(row, dict):
        raise UserError(f'{path}, line {number}: expected an object such as {{"prompt": "a red dress"}}')
    return row
