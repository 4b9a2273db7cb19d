"""Which format files are in, by what lies there: names of files and columns only."""

import json
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import FORMATS, Reading, trees
from fashiondpo_pipeline.formats.kinds import CSV, JSON, LINES, TAR, XLSX, kind_of
from fashiondpo_pipeline.formats.kto import NAME
from fashiondpo_pipeline.formats.tables import TABLES, rows_of, schema_of
from fashiondpo_pipeline.formats.trees import OURS, Tree

FIRST = 1 << 20  # bytes that are looked at


def guess(path: Path) -> str:
    """The format's name. Raises UserError where nothing is known."""
    found = _of_tree(trees.at(path))
    if found is None:
        raise UserError(f"{path} is in no format that is known at sight: `fdpo import FORMAT {path}` with one of {', '.join(FORMATS)}")
    return found


def _of_tree(tree: Tree) -> str | None:
    if tree.named:
        return _of_file(tree, tree.named)
    names = tree.names()
    folders = {part for name in names for part in name.split("/")[:-1]}
    if {"w", "l"} <= folders:
        return "folders"
    for name in ("metadata.jsonl", NAME, "pairs.csv", "pairs.tsv", "pairs.xlsx"):
        if name in names:
            return _of_file(tree, name)
    tables = [name for name in names if name.lower().endswith(TABLES) and name not in OURS]
    return _of_file(tree, min(tables, key=lambda name: (not name.lower().endswith((".parquet", ".arrow")), name))) if tables else None


def _of_file(tree: Tree, name: str) -> str | None:
    kind = kind_of(name, tree.peek(name))
    if columns := schema_of(tree, name).names:
        return "pickapic" if "jpg_0" in columns else "huggingface"
    if kind is LINES:
        try:
            row = json.loads(tree.peek(name, FIRST).split(b"\n", 1)[0].decode("utf-8-sig", errors="replace"))
            return "invoke" if "prefer_0" in row else "captions" if "image" in row else "huggingface"
        except (ValueError, TypeError, RecursionError):
            return None
    if kind in (CSV, XLSX):
        found = _columns(tree, name)
        thumbs = "file_path" in found or {"file_name", "split"} <= found  # a column `split` alone may tell parts of a set
        return "kto" if thumbs else "huggingface" if any(one.endswith("file_name") for one in found) else "csv"
    return "json" if kind is JSON else "huggingface" if kind is TAR else None


def _columns(tree: Tree, name: str) -> set[str]:
    """The names in a sheet's first line."""
    next(rows_of(tree, name, reading := Reading(), lambda _: True))
    return set(reading.met)
