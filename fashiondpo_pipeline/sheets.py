"""Contact sheets: pictures with what the experts say of them and the pairs made of them, as one HTML file that needs no network."""

import base64
import hashlib
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fashiondpo_pipeline.codecs import decode_picture, encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.opinions import Opinions

LARGEST = 320  # pixels a side; larger pictures are shrunk, or a sheet of photographs would be too big to send
SMALL = 96  # pictures of at most so many pixels a side are enlarged as they are, pixel by pixel


@dataclass(frozen=True)
class Bar:
    """One expert's say: in figures, and as a length -1..1 from the middle; None where it gave no score."""

    expert: str
    figures: str
    length: float | None
    watched: bool


@dataclass(frozen=True)
class Card:
    """One candidate. note: why it has no picture or lacks a score."""

    number: int
    image: str | None
    small: bool
    mixed: float | None
    bars: list[Bar]
    note: str | None


@dataclass(frozen=True)
class Section:
    """One group: its candidates from best to worst, the pairs made of them, widest first, or why there is none; why others are none."""

    number: int
    group: str
    prompt: str
    cards: list[Card]
    pairs: list[dict]
    reason: str | None
    unpaired: list[tuple[int, int, str]]


@dataclass(frozen=True)
class Duel:
    """One pair and each expert's gap; `section` is the number of its group's section, 0 where there are none.

    why: why it is a pair no more, of one that was.
    """

    section: int
    prompt: str
    winner: Card
    loser: Card
    margin: float
    gaps: list[Bar]
    why: str | None = None


class Sheet:
    """What one sheet is made of. candidates: rows with group, candidate, picture and fault; prompts: group -> its prompt."""

    def __init__(self, opinions: Opinions, prompts: dict[str, str], candidates: list[dict]):
        self.opinions, self.prompts = opinions, prompts
        self._drawn: dict[str, dict[int, dict]] = {}
        for row in candidates:
            self._drawn.setdefault(row["group"], {})[row["candidate"]] = row
        rows = pc.index_in(pa.array(self._drawn, pa.string()), value_set=opinions.grid.groups).to_pylist()
        self._rows = dict(zip(self._drawn, rows, strict=True))
        self._middle = {name: self._middle_of(normal) for name, normal in opinions.normal.items()}
        self._widest = max((_largest(normal[rows] - self._middle[name]) for name, normal in opinions.normal.items()), default=0.0)

    def _middle_of(self, normal: np.ndarray) -> float:
        """Of the scale that an expert's scores are normalised to: a bar to its right speaks for the picture, one to its left against."""
        if self.opinions.rule.normalise == "raw":
            known = normal[np.isfinite(normal)]
            return float(known.mean()) if known.size else 0.0
        return 0.0 if self.opinions.rule.normalise == "zscore" else 0.5

    def sections(self, groups: list[str], pairs: list[dict], reasons: dict[str, str]) -> list[Section]:
        """The groups with the pairs made of each; pairs: rows of the pair table."""
        made: dict[str, list[dict]] = {group: [] for group in groups}
        for pair in sorted(pairs, key=lambda pair: -abs(pair["margin"])):
            made[pair["group"]].append(pair)
        return [Section(number, group, self.prompts[group], self._cards(group), made[group], reasons.get(group), self._unpaired(group))
                for number, group in enumerate(groups, 1)]

    def by_number(self, group: str) -> Section:
        """One group with its candidates in the order of their numbers, which is that of their seeds; no pairs."""
        cards = [self._card(group, number) for number in sorted(self._drawn[group])]
        return Section(0, group, self.prompts[group], cards, [], None, [])

    def _unpaired(self, group: str) -> list[tuple[int, int, str]]:
        return [] if self.opinions.unheard else self.opinions.chooser.unpaired(self._rows[group])

    def duels(self, groups: list[str], pairs: list[dict]) -> list[Duel]:
        """The pairs, in their order; groups: the sections, in theirs, if there are any."""
        numbers = {group: number for number, group in enumerate(groups, 1)}
        gaps = [{name: self._gap(normal, pair) for name, normal in self.opinions.normal.items()} for pair in pairs]
        widest = max((_largest(np.array(list(gap.values()))) for gap in gaps), default=0.0)
        return [
            Duel(numbers.get(pair["group"], 0), self.prompts[pair["group"]], self._card(pair["group"], pair["winner"]),
                 self._card(pair["group"], pair["loser"]), pair["margin"],
                 [self._bar(name, f"{value:+.2f}", value, widest) for name, value in gap.items()], pair.get("why"))
            for pair, gap in zip(pairs, gaps, strict=True)
        ]

    def _gap(self, normal: np.ndarray, pair: dict) -> float:
        row = self._rows[pair["group"]]
        return float(normal[row, pair["winner"]] - normal[row, pair["loser"]])

    def _cards(self, group: str) -> list[Card]:
        ranks = self.opinions.ranks[self._rows[group]]
        return [self._card(group, number) for number in sorted(self._drawn[group], key=lambda n: (ranks[n] == 0, ranks[n], n))]

    def _card(self, group: str, number: int) -> Card:
        place, drawn = (self._rows[group], number), self._drawn[group][number]
        image, small, problem = _embed(drawn["picture"], f"{group}/{number}")
        bars = [self._bar(name, f"{scores[place]:.3f}", self.opinions.normal[name][place] - self._middle[name], self._widest)
                for name, scores in self.opinions.grid.scores.items()]
        note = drawn["fault"] or self.opinions.silences.get(place) or problem
        mixed = float(self.opinions.mixed[place])
        return Card(number, image, small, mixed if np.isfinite(mixed) else None, bars, note)

    def _bar(self, expert: str, figures: str, value: float, widest: float) -> Bar:
        known = bool(np.isfinite(value))
        watched = not self.opinions.rule.weights.get(expert, 0) > 0
        return Bar(expert, figures if known else "no score", float(value / (widest or 1.0)) if known else None, watched)


def _largest(values: np.ndarray) -> float:
    """The largest magnitude; 0 where nothing is known."""
    known = values[np.isfinite(values)]
    return float(np.abs(known).max()) if known.size else 0.0


def _embed(picture: dict | None, where: str) -> tuple[str | None, bool, str | None]:
    """(data URI, whether to show it pixel by pixel, why there is none); drawn anew, so that only pixels get onto the sheet."""
    try:
        image = decode_picture(picture["bytes"] if picture else None, where)
    except UserError as problem:
        return None, False, str(problem)
    if max(image.size) <= LARGEST:
        kind, data = "png", encode_png(np.asarray(image))
    else:
        image.thumbnail((LARGEST, LARGEST))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", max(image.size) <= SMALL, None


def pages() -> Environment:
    """Templates in which every text is escaped."""
    return Environment(loader=PackageLoader("fashiondpo_pipeline"), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)


def render(title: str, facts: list[str], duels: list[Duel], sections: list[Section], paired: bool) -> str:
    """The page. paired: whether these candidates have been through pairing, so that a group without a pair is worth a word.

    It runs one script, its own, which filters and answers keys; the page names it by its hash, so a browser runs no other.
    """
    found = pages()
    script = found.get_template("sheet.js").render()
    allowed = f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
    return found.get_template("sheet.html.j2").render(
        title=title, facts=facts, duels=duels, sections=sections, paired=paired, script=Markup(script), allowed=Markup(allowed))  # noqa: S704
