"""What `fdpo inspect` shows: candidates beside scores, filtered and sorted by number; only rows that are asked for become a table."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import schemas
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.opinions import Opinions
from fashiondpo_pipeline.registry import did_you_mean

MISSING = pa.field("missing", pa.string(), metadata={"about": "which expert gave no score, and why; null: every one shown did"})
MIXED = pa.field("mixed", pa.float64(), metadata={"about": "mixed normalised score; NaN: a rewarded expert gave none"})
RANK = pa.field("rank", pa.int16(), metadata={"about": "place within the group by the mix, from 1; ties share the better one"})
_TAKEN = {*schemas.CANDIDATES.names, MISSING.name, MIXED.name, RANK.name}
_HIDDEN = {"group", "prompt", "round", "guidance", "guidance_interval", "guidance_rescale"}  # in the terminal, where the prompt stands for its key
_UNLESS_SAID = {"fault", "missing"}  # hidden where no shown row has one
LETTERS = 48  # of a text, in the terminal


def column_of(expert: str) -> str:
    """The column of an expert's scores: its name, or `score_NAME` where the table has a column of that name already."""
    return f"score_{expert}" if expert in _TAKEN else expert


@dataclass(frozen=True)
class Found:
    """Which rows of a table were asked for, in which order; make(numbers, columns) is the table of some of them."""

    names: list[str]
    numbers: np.ndarray
    total: int
    make: Callable[[np.ndarray, list[str]], pa.Table]

    def __len__(self) -> int:
        return len(self.numbers)

    def table(self, which: np.ndarray | slice = slice(None)) -> pa.Table:
        """Some of the rows, by their places among those found."""
        return self.make(self.numbers[which], self.names)

    def column(self, name: str) -> pa.ChunkedArray:
        return self.make(self.numbers, [name])[name]

    def ordered(self, sort: str) -> "Found":
        """Sorted by `COLUMN` or `COLUMN:desc`, equal ones as they were, missing ones last. Raises UserError for another column."""
        column, _, direction = sort.partition(":")
        if column not in self.names:
            raise UserError(f"--sort {sort}: no column '{column}'; {did_you_mean(column, self.names)}")
        if direction not in ("", "asc", "desc"):
            raise UserError(f"--sort {sort}: write {column} or {column}:desc")
        key = [("", "descending" if direction == "desc" else "ascending")]
        return replace(self, numbers=self.numbers[pc.sort_indices(self.column(column), key).to_numpy()])


def sayings(experts: list[str], ranked: bool) -> dict[str, pa.Field]:
    """The columns that `said` can make: each expert's score, with `ranked` the mix and the rank, and why scores are missing."""
    abouts = {column_of(name): f"what {name} says, higher is better; NaN: nothing" for name in experts}
    found = {name: pa.field(name, pa.float64(), metadata={"about": about}) for name, about in abouts.items()}
    return found | {field.name: field for field in ((MIXED, RANK, MISSING) if ranked else (MISSING,))}


def said(opinions: Opinions, numbers: np.ndarray, experts: list[str], name: str) -> np.ndarray | pa.Array:
    """One of those columns, of candidates by their numbers."""
    at = tuple(place[numbers] for place in opinions.at)
    if name == MIXED.name:
        return opinions.mixed[at]
    if name == RANK.name:
        ranks = opinions.ranks[at]
        return pa.array(ranks, mask=ranks == 0)
    if name == MISSING.name:
        return _reasons(opinions, at, experts)
    return opinions.grid.scores[next(expert for expert in experts if column_of(expert) == name)][at]


def silent(opinions: Opinions, numbers: np.ndarray, experts: list[str]) -> np.ndarray:
    """Which candidates lack a score of any of the experts; a bool each."""
    return _silent(opinions, tuple(place[numbers] for place in opinions.at), experts)


def _silent(opinions: Opinions, at: tuple, experts: list[str]) -> np.ndarray:
    return np.any([np.isnan(opinions.grid.scores[name][at]) for name in experts], axis=0) if experts else np.zeros(len(at[0]), bool)


def _reasons(opinions: Opinions, at: tuple, experts: list[str]) -> pa.Array:
    reasons = np.full(len(at[0]), None)
    for i in np.flatnonzero(_silent(opinions, at, experts)):
        reasons[i] = opinions.silences[at[0][i], at[1][i]]
    return pa.array(reasons, pa.string())


def best_first(opinions: Opinions, numbers: np.ndarray) -> np.ndarray:
    """The same candidates: groups in the order in which they first appear, each from best to worst, those without a rank last."""
    rows, columns = (place[numbers] for place in opinions.at)
    first = np.empty(opinions.shape[0], np.int64)
    first[rows[::-1]] = np.arange(len(rows))[::-1]  # the earliest is written last, and stays
    ranks = opinions.ranks[rows, columns].astype(np.int64)
    last = np.iinfo(np.int16).max
    # one number to sort by, as sorting by three takes several times as long: at most 2^33 groups of 2^15 candidates
    return numbers[np.argsort((first[rows] << 30) | (np.where(ranks == 0, last, ranks) << 15) | columns)]


def table(drawn: pa.Table, more: dict[str, tuple[pa.Field, np.ndarray | pa.Array]], names: list[str]) -> pa.Table:
    """Columns of `drawn`, rows of the candidates, and others, in the order of `names`."""
    fields = [more[name][0] if name in more else schemas.CANDIDATES.field(name) for name in names]
    return pa.table([more[name][1] if name in more else drawn[name] for name in names], schema=pa.schema(fields))


def with_gap(pairs: pa.Table, opinions: Opinions, expert: str) -> pa.Table:
    """The pairs with the gap of an expert that had no part in them: does it agree?"""
    winner, loser = (opinions.normal[expert][opinions.places(pairs["group"], pairs[side])] for side in ("winner", "loser"))
    about = {"about": f"winner's normalised {expert} minus the loser's; only watched"}
    field = pa.field(f"gap_{expert}", pa.float32(), metadata=about)
    return pairs.append_column(field, pa.array((winner - loser).astype(np.float32)))


def with_pictures(rows: pa.Table, pictures: pa.ChunkedArray) -> pa.Table:
    """Candidates with their pictures, in a form that Hugging Face `datasets` shows as pictures."""
    schema = schemas.CANDIDATES
    table = rows.add_column(schema.get_field_index("picture"), schema.field("picture"), pictures)
    card = json.loads(schema.metadata[b"huggingface"])
    known = card["info"]["features"]
    card["info"]["features"] = {field.name: known.get(field.name) or _feature(field.type) for field in table.schema}
    return table.replace_schema_metadata({**schema.metadata, b"huggingface": json.dumps(card).encode()})


def _feature(kind: pa.DataType) -> dict:
    return {"dtype": "float64" if kind == pa.float64() else str(kind), "_type": "Value"}


def without_lists(rows: pa.Table) -> pa.Table:
    """Lists as text, numbers with a blank between: a CSV has no lists."""
    for place, field in enumerate(rows.schema):
        if pa.types.is_list(field.type):
            texts = [None if value is None else " ".join(map(str, value)) for value in rows.column(place).to_pylist()]
            rows = rows.set_column(place, field.name, pa.array(texts, pa.string()))
    return rows


# -- filters

def matching(prompts: dict[str, str], texts: tuple[str, ...]) -> list[str]:
    """Groups whose key or prompt holds any of the texts, whatever the case. Raises UserError for a text that none holds."""
    everything = {group: f"{group}\n{prompt}".lower() for group, prompt in prompts.items()}
    found: dict[str, None] = {}
    for text in texts:
        groups = [group for group, words in everything.items() if text.lower() in words]
        if not groups:
            raise UserError(f"--group '{text}': no group and no prompt has that in it; {_nearest(text, prompts)}")
        found |= dict.fromkeys(groups)
    return list(found)


def _nearest(text: str, prompts: dict[str, str]) -> str:
    """The text with each word replaced by the nearest word of all prompts, as a question; else where to look."""
    known = sorted({word for prompt in prompts.values() for word in re.findall(r"\w+", prompt.lower())})
    near = " ".join(word for asked in text.lower().split() for word in get_close_matches(asked, known, n=1))
    if near and any(near in prompt.lower() for prompt in prompts.values()):
        return f"did you mean '{near}'?"
    return "`fdpo inspect candidates` shows what there is"


# -- text for the terminal

def cells(rows: pa.Table, prompts: dict[str, str], width: int = 200) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of what is worth reading, the prompt in place of its key and as long as `width` leaves room for."""
    empty = {name for name in _UNLESS_SAID & set(rows.column_names) if rows[name].null_count == len(rows)}
    names = [name for name in rows.column_names if name not in _HIDDEN | empty]
    columns = [_texts(rows[name]) for name in names]
    room = width - _wide(names, columns)
    if room < LETTERS // 3:
        names = [name.replace("_", "_\n", 1) for name in names]
        room = max(width - _wide(names, columns), LETTERS // 3)
    if "group" in rows.column_names:
        texts = [shorten(prompts[key], min(room, LETTERS)) for key in rows["group"].to_pylist()]
        names, columns = ["prompt", *names], [texts, *columns]
    return names, [list(row) for row in zip(*columns, strict=True)]


def _wide(heads: list[str], columns: list[list[str]]) -> int:
    """Letters that columns take, with the two blanks before each."""
    lines = [[*head.split("\n"), *column] for head, column in zip(heads, columns, strict=True)]
    return sum(2 + max(map(len, texts)) for texts in lines)


def _texts(column: pa.ChunkedArray) -> list[str]:
    values = column.to_pylist()
    if not pa.types.is_floating(column.type):
        return ["-" if x is None else shorten(x) if isinstance(x, str) else str(x) for x in values]
    largest = max((abs(x) for x in values if x is not None and np.isfinite(x)), default=0.0)
    digits = ".3f" if largest >= 0.1 or not largest else ".5f" if largest >= 1e-3 else ".2e"
    return ["-" if x is None or np.isnan(x) else format(x, digits) for x in values]


def shorten(text: str, letters: int = LETTERS) -> str:
    """One line of at most so many letters; no control characters, which a terminal would obey.

    >>> shorten("a red  dress\\x1b[2J")
    'a red dress\N{REPLACEMENT CHARACTER}[2J'
    """
    line = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))
    return line if len(line) <= letters else line[: letters - 1].rstrip() + "…"


def by_kind(reasons: dict[str, str], prompts: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows): how many groups have no pair for reasons that differ in figures only, with one of them; most first."""
    kinds: dict[str, list[str]] = {}
    for group, reason in reasons.items():
        kinds.setdefault(re.sub(r"(?<![\w.])\d[\d.]*(e[+-]?\d+)?(?!\w)", "#", reason), []).append(group)
    found = sorted(kinds.values(), key=len, reverse=True)
    rows = [[f"{len(groups):,}", reasons[groups[0]], shorten(prompts[groups[0]])] for groups in found]
    return ["groups", "why (the first of them)", "its prompt"], rows


def in_words(steps: pa.Table) -> str:
    """What a step table says, in a line; the end is the mean of the last epoch, as single steps are noisy."""
    end = steps.filter(pc.equal(steps["epoch"], pc.max(steps["epoch"])))
    loss, accuracy, winner, loser = (pc.mean(end[name]).as_py() for name in ("loss", "accuracy", "winner", "loser"))
    return (
        f"loss {steps['loss'][0].as_py():.3f} at first, {loss:.3f} in the last epoch ({len(end)} steps), where the policy "
        f"orders {accuracy:.0%} of pairs as the scores do; against the reference winners moved by {winner:+.2g}, "
        f"losers by {loser:+.2g}: {_movement(winner, loser)}"
    )


def _movement(winner: float, loser: float) -> str:
    if winner <= loser:
        return "it does not tell them apart"
    if winner > 0:
        return "winners up and losers down, as meant" if loser < 0 else "both up, winners further"
    return "both down, losers further: it learns what to avoid rather than what to draw"
