"""Outfits, users and garments as tables, and what an expert asks of them: the rest of an outfit, a user's history.

outfits: `outfit`, `items` (list of garments' keys), `split`, and for outfits that a prompt asks a garment of: `group`, `place`, `user`.
users: `user`, `category`, `items`. garments: `item`, `picture`, `category`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.workspace import read_parquet, read_schema


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for: one garment of an outfit."""

    items: list[str]
    place: int
    user: str | None

    @property
    def rest(self) -> list[str]:
        """The outfit's other garments."""
        return self.items[: self.place] + self.items[self.place + 1 :]


def read(path: Path, *columns: str) -> pa.Table:
    """These columns of a table. Raises UserError where one is missing."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: check the path (relative ones start in the working folder)")
    there = read_schema(path).names
    for column in columns:
        if column not in there:
            raise UserError(f"{path}: no column '{column}', only {', '.join(there)}")
    return read_parquet(path, list(columns))


def asked(outfits: Path) -> dict[str, Asked]:
    """group -> what it asks for. Raises UserError for a group given twice and a place outside its outfit."""
    table = read(outfits, "outfit", "items", "group", "place", "user")
    found: dict[str, Asked] = {}
    for row in table.filter(pc.is_valid(table["group"])).to_pylist():
        if row["group"] in found:
            raise UserError(f"{outfits}: two outfits are for the prompt '{row['group']}'; keep one of them")
        if not row["items"]:
            raise UserError(f"{outfits}, outfit '{row['outfit']}': it has no items, though the prompt '{row['group']}' asks for one; add them")
        if row["place"] is None or not 0 <= row["place"] < len(row["items"]):
            raise UserError(f"{outfits}, outfit '{row['outfit']}': place {row['place']} is none of its {len(row['items'])} garments")
        found[row["group"]] = Asked(row["items"], row["place"], row["user"])
    if not found:
        raise UserError(f"{outfits}: no outfit is for a prompt; give some a `group` and a `place`")
    return found


def histories(users: Path) -> dict[tuple[str, str], list[str]]:
    """(user, category) -> the garments bought before."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in read(users, "user", "category", "items").to_pylist():
        found.setdefault((row["user"], row["category"]), []).extend(row["items"] or [])
    return found


class Garments:
    """Garments by their key: category and picture, the pictures read only where they are embedded."""

    def __init__(self, path: Path):
        self.path = path
        table = read(path, "item", "category")
        self.category: dict[str, str] = dict(zip(table["item"].to_pylist(), table["category"].to_pylist(), strict=True))
        if len(self.category) < len(table):
            raise UserError(f"{path}: a garment's key is given twice; keep one of them")

    def check(self, items: list[str], where: Path) -> None:
        """Raises UserError for a garment that there is not."""
        for item in items:
            if item not in self.category:
                raise UserError(f"{where}: no garment '{item}' in {self.path}; add it, or take it out")

    @cached_property
    def _pictures(self) -> pa.ChunkedArray:
        return read(self.path, "picture")["picture"]

    def embed(self, items: list[str], tower) -> dict[str, np.ndarray]:
        """item -> (d,) float32 unit vector in the tower, each garment once."""
        place = {item: n for n, item in enumerate(self.category)}
        wanted = sorted(set(items), key=place.__getitem__)
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(wanted), 512):
            some = wanted[start : start + 512]
            cells = self._pictures.take(pa.array([place[item] for item in some], pa.int64())).to_pylist()
            pictures = [decode_picture(cell["bytes"], f"{self.path}, '{item}'") for item, cell in zip(some, cells, strict=True)]
            found |= dict(zip(some, tower.pictures(pictures), strict=True))
        return found
