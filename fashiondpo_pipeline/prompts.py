"""What to draw: prompts from .txt, .csv, .tsv, .jsonl or .parquet, with a key each and a split that never changes by itself."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from fashiondpo_pipeline import foreign
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign_tables import KINDS, faults_of, rows_of
from fashiondpo_pipeline.identity import canonical, fingerprint
from fashiondpo_pipeline.remembered import remembered
from fashiondpo_pipeline.seeds import key

TRAIN, HELD_OUT = "train", "held-out"
MEANING = 3  # raised when `read` or an identity means something else: what was remembered is then forgotten


class Prompts:
    """Prompts of one split: one dict a prompt, with `group`, `prompt` and whatever else the file has; read when first looked at."""

    def __init__(self, rows: list[dict] | Callable[[], list[dict]], about: dict | None = None):
        self._rows, self._about = rows, about

    @cached_property
    def rows(self) -> list[dict]:
        return self._rows() if callable(self._rows) else self._rows

    @cached_property
    def about(self) -> dict:
        """Count, identity, which changes if and only if a row does, and the columns that every row has, and that some have."""
        if self._about is not None:
            return self._about
        columns = sorted(set.intersection(*map(set, self.rows))) if self.rows else []
        some = sorted(set().union(*self.rows).difference(columns))
        plain = [{name: _plain(value) for name, value in row.items()} for row in self.rows]
        return {"count": len(self.rows), "identity": fingerprint(plain), "columns": columns, "some": some}

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
    """{"train": ..., "held-out": ...}. Raises UserError for an unreadable file, and for all lines together that do not fit.

    Without a column `split` a prompt is held out if the hash of its text falls below `held_out`: adding prompts
    never moves another one across. Without a column `group` the key is made from the text.
    """
    faults = faults_of(path)
    seen: dict[str, int] = {}
    splits: dict[str, list[dict]] = {TRAIN: [], HELD_OUT: []}
    if not path.is_file():
        raise UserError(f"prompts.file: there is no file {path}; check the path (relative ones start in the working folder)")
    if path.suffix.lower() not in KINDS:
        raise UserError(f"prompts.file: {path.name} is none of {', '.join(KINDS)}; save it as one of them")
    for number, row in rows_of(path, ("prompt",), faults):
        if fault := _fault(row):
            faults.add(number, fault)
            continue
        prompt = row["prompt"]
        group = slug(prompt) if row.get("group") in (None, "") else str(row["group"])
        if group in seen:
            faults.add(number, f"'{group}' was given in {faults.unit} {seen[group]}; take one of them out")
            continue
        seen[group] = number
        split = row.get("split") or (HELD_OUT if key("held-out", prompt) / 2**63 < held_out else TRAIN)
        splits[split].append({**row, "group": group, "prompt": prompt, "split": split})
    faults.check()
    if not seen:
        raise UserError(f"{path}: there is no prompt in it; write one a line")
    return {split: Prompts(found) for split, found in splits.items()}


def _fault(row: Mapping[str, Any]) -> str | None:
    """What of a row's cells is not what it should be, and what to do."""
    prompt, group, split = row.get("prompt"), row.get("group"), row.get("split")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return "the prompt is empty; fill it or take the line out"
    if not isinstance(prompt, str):
        return f"the prompt is {_kind(prompt)}, not text; put it in quotes"
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int | float) or group != group):
        return f"the group is {_kind(group)}, not text; put its key in quotes"
    if split not in (None, "") and not (isinstance(split, str) and split in (TRAIN, HELD_OUT)):
        return f"split {_shown(split)} is not one of '{TRAIN}', '{HELD_OUT}'"
    for name, cell in row.items():
        if isinstance(cell, str) and len(cell) > foreign.MOST_LETTERS:
            return f"the {name} is longer than {foreign.MOST_LETTERS:,} letters; shorten it"
        if foreign.depth(cell) > foreign.DEPTH:
            return f"the {name} is nested more than {foreign.DEPTH} deep; flatten it"
        if odd := next(filter(None, map(foreign.oddity, foreign.texts({name: cell}))), None):
            return f"the {foreign.seen(name)} holds {odd}; take it out"
    return None


def _kind(value: Any) -> str:
    """What a cell is, where text was wanted.

    >>> _kind(3), _kind(["a"])
    ('a number (3)', "a list (['a'])")
    """
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", bytes: "bytes"}
    return f"{names.get(type(value), type(value).__name__)} ({_shown(value)})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


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
