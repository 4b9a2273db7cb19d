"""Outfits and users for the embedded default, made of its garments by a rule that is stated here: colour harmony and taste.

Harmony: two garments go together if one of them is neutral (its dye's largest and smallest channel differ by less than 0.35 of the
range: black, grey, brown, navy), or if their hues are at most 45 degrees apart, or at least 150. An outfit is harmonious if every two
of its four garments go together, and every outfit here is. Taste: a user likes one neutral colour and two others that go together;
three garments in four that the user wears, and all that were bought before, are in these colours.
"""

import colorsys
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline.demo.garments import CATEGORIES, COLOURS, PALETTE, group, prompted
from fashiondpo_pipeline.identity import hash_file, hash_path
from fashiondpo_pipeline.seeds import key

FOLDER = "outfits"
USERS, TRAIN, TEST = 48, 1500, 400
NEUTRAL, NEAR, OPPOSITE = 0.35, 45.0, 150.0
WORN = 0.75  # share of an outfit's garments in the user's colours
TOPS, SHOES = ("t-shirt", "pullover", "shirt", "coat"), ("sandal", "sneaker", "ankle boot")
BOUGHT = (3, 8)  # garments in a user's history of a category, least and most
UNKNOWN = 2  # categories in which a user has bought nothing


def neutral(colour: str) -> bool:
    return (max(PALETTE[colour]) - min(PALETTE[colour])) / 255 < NEUTRAL


def together(one: str, other: str) -> bool:
    """Whether two colours go together.

    >>> together("red", "teal"), together("red", "green"), together("navy", "green")
    (True, False, True)
    """
    if neutral(one) or neutral(other):
        return True
    hues = [360 * colorsys.rgb_to_hsv(*(channel / 255 for channel in PALETTE[colour]))[0] for colour in (one, other)]
    apart = abs(hues[0] - hues[1])
    apart = min(apart, 360 - apart)
    return apart <= NEAR or apart >= OPPOSITE


def harmonious(colours: list[str]) -> bool:
    """Whether every two of the colours go together."""
    return all(together(one, other) for n, one in enumerate(colours) for other in colours[:n])


class Closet:
    """The catalogue's plain garments by colour and category, dealt out by key."""

    def __init__(self, catalog: pa.Table):
        self.items: dict[tuple[str, str, str], list[str]] = {}
        rows = [row for row in catalog.select(["item", "category", "colour", "pattern", "split"]).to_pylist() if row["pattern"] == "plain"]
        for row in rows:
            self.items.setdefault((row["colour"], row["category"], row["split"]), []).append(row["item"])

    def one(self, rng: np.random.Generator, colour: str, category: str, split: str) -> str:
        return str(rng.choice(self.items[colour, category, split]))


def liked(rng: np.random.Generator, colour: str | None = None) -> list[str]:
    """A user's three colours: one neutral, two others that go together; `colour` among them if it is given."""
    while True:
        first = str(rng.choice([c for c in COLOURS if neutral(c)]))
        second, third = (str(c) for c in rng.choice([c for c in COLOURS if not neutral(c)], 2, replace=False))
        if together(second, third) and (colour is None or colour in (first, second, third)):
            return [first, second, third]


def dressed(rng: np.random.Generator, likes: list[str], colour: str | None = None, category: str | None = None) -> list[tuple[str, str]]:
    """(colour, category) of four garments in harmony; one of them as given."""
    kinds = (["dress", "coat"] if rng.random() < 0.2 else [str(rng.choice(TOPS)), "trousers"]) + [str(rng.choice(SHOES)), "bag"]
    if category is not None and category not in kinds:
        if category in SHOES:
            kinds[2] = category
        elif category == "dress":
            kinds[:2] = ["dress", "coat"]
        else:
            kinds[:2] = [category if category in TOPS else str(rng.choice(TOPS)), "trousers"]
    worn = {category: colour} if category is not None and colour is not None else {}
    for kind in kinds:
        if kind not in worn:
            some = likes if rng.random() < WORN else COLOURS
            fits = [c for c in some if harmonious([*worn.values(), c])] or [c for c in COLOURS if harmonious([*worn.values(), c])]
            worn[kind] = str(rng.choice(fits))
    return [(worn[kind], kind) for kind in kinds]


def tables(catalog: pa.Table, seed: int) -> tuple[pa.Table, pa.Table]:
    """(outfits, users): the outfits to learn from, to test on (of garments that none of the others wear) and for the prompts."""
    closet = Closet(catalog)
    users = {f"user-{n:02d}": liked(np.random.default_rng(key(seed, "taste", n))) for n in range(USERS)}
    history = [_bought(closet, np.random.default_rng(key(seed, "history", name)), name, likes) for name, likes in users.items()]
    outfits: list[dict] = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        for n in range(count):
            rng = np.random.default_rng(key(seed, "outfit", split, n))
            user = f"user-{rng.integers(USERS):02d}"
            items = [closet.one(rng, colour, category, split) for colour, category in dressed(rng, users[user])]
            outfits.append({"outfit": f"{split}-{n:04d}", "user": user, "split": split, "items": items, "group": None, "place": None})
    for look in prompted():
        colour, category, name = look.colour, look.category, group(look)
        rng = np.random.default_rng(key(seed, "prompt", name))
        user = str(rng.choice([name for name, likes in users.items() if colour in likes]))
        parts = dressed(rng, users[user], colour, category)
        items = [closet.one(rng, *part, "test") for part in parts]  # histories are of train garments, so none of these is in them
        outfits.append({"outfit": f"prompt-{name}", "user": user, "split": "prompt", "items": items, "group": name,
                        "place": parts.index((colour, category))})
    return pa.Table.from_pylist(outfits, OUTFITS), pa.Table.from_pylist([row for rows in history for row in rows], PEOPLE)


def _bought(closet: Closet, rng: np.random.Generator, user: str, likes: list[str]) -> list[dict]:
    """A user's history: one row a category, none of those in which nothing was bought."""
    unknown = set(rng.choice(CATEGORIES, UNKNOWN, replace=False))
    rows = []
    for category in CATEGORIES:
        if category not in unknown:
            colours = rng.choice(likes, rng.integers(BOUGHT[0], BOUGHT[1] + 1))
            items = list(dict.fromkeys(closet.one(rng, str(colour), category, "train") for colour in colours))
            rows.append({"user": user, "category": category, "items": items, "likes": likes})
    return rows


def _about(name: str, kind: pa.DataType, text: str) -> pa.Field:
    return pa.field(name, kind, metadata={"about": text})


OUTFITS = pa.schema([
    _about("outfit", pa.string(), "key"), _about("user", pa.string(), "who wears it"),
    _about("split", pa.string(), "train; test: of garments that no other outfit has; prompt: one for each prompt"),
    _about("items", pa.list_(pa.string()), "its garments, by `item` of the catalogue"),
    _about("group", pa.string(), "the prompt that asks for one of them"),
    _about("place", pa.int8(), "which of them, from 0"),
])
PEOPLE = pa.schema([
    _about("user", pa.string(), "key"), _about("category", pa.string(), "of the garments bought"),
    _about("items", pa.list_(pa.string()), "bought before, by `item` of the catalogue"),
    _about("likes", pa.list_(pa.string()), "the user's colours: the truth, which no expert is shown"),
])


def write(folder: Path, catalog: Path, seed: int) -> dict[str, int]:
    """outfits.parquet and users.parquet in `folder`; the same catalogue and seed give the same bytes. Returns their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    made = dict(zip(("outfits", "users"), tables(pq.read_table(catalog), seed), strict=True))
    for name, table in made.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    return {name: table.num_rows for name, table in made.items()}


def make(out: Path, seed: int, device: str = "cpu") -> str:
    """The folder `outfits` of the embedded default in `out`, unless it is there: both tables, and the expert taught by them.

    Returns a sentence on what was done. The card comes last: with it the folder is whole.
    """
    from fashiondpo_pipeline.experts.compatibility import in_words, train

    folder = out / FOLDER
    made_from = {"seed": seed, "catalog": hash_file(out / "catalog.parquet"), "clip": hash_path(out / "clip", "CLIP")}
    card = folder / "card.json"
    if card.is_file() and json.loads(card.read_text())["made_from"] == made_from:
        return "outfits: already there"
    rows = write(folder, out / "catalog.parquet", seed)
    about = train(folder / "compatibility", f"local-dir:{out / 'clip'}", None, str(folder / "outfits.parquet"), str(out / "catalog.parquet"),
                  seed=seed, device=device)
    rule = {"neutral": NEUTRAL, "near": NEAR, "opposite": OPPOSITE, "worn": WORN}
    card.write_text(json.dumps({"made_from": made_from, "rows": rows, "rule": rule}, indent=2) + "\n")
    return f"outfits: {in_words(about)}"
