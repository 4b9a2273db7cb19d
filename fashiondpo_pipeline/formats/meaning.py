"""What the columns of other programs' tables say: names by which winner, loser, prompt and label go, and what a label's value means.

Pictures: one column each for the winner and the loser (DECIDED), one each for two sides (SIDES) with a label, a list of them with ranks
or preferences, or one alone. A label is the preference for the first picture, 0 to 1; it may be a number, true or false, the name of a
side, two numbers that add up to 1, votes, or weighted shares of votes. Votes become shares, which train as such.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from fashiondpo_pipeline.formats import Comparison, Made, Picture, Ranked, Refused, Single

PROMPT = ("prompt", "caption", "text", "prompt_text", "text_prompt")
DECIDED = [("chosen", "rejected"), ("winner", "loser"), ("preferred", "unpreferred"), ("preferred", "dispreferred"), ("preferred", "rejected"),
           ("better", "worse"), ("img_better", "img_worse"), ("win", "lose"), ("chosen_image", "rejected_image"), ("image_chosen", "image_rejected"),
           ("preferred_image", "unpreferred_image"), ("preferred_image", "rejected_image"), ("winner_image", "loser_image"),
           ("winning_image", "losing_image"), ("image_w", "image_l"), ("jpg_w", "jpg_l")]
SIDES = [("image_0", "image_1"), ("jpg_0", "jpg_1"), ("image0", "image1"), ("image1", "image2"), ("image_1", "image_2"), ("first", "second"),
         ("image_a", "image_b"), ("left", "right"), ("image_left", "image_right"), ("left_image", "right_image"), ("img_0", "img_1"),
         ("img_1", "img_2"), ("img1", "img2")]
WON_BY_FIRST = ("path1", "path2")  # HPDv3: the first path is always the better picture's
LISTS = ("images", "image_path", "image_paths", "file_path", "file_paths", "image")
ALONE = ("image", "image_path", "file_path")
CHOICES = ("label", "preference", "choice", "selected", "winner", "vote", "pairwise", "pw", "comparison")
RANKS = ("rank", "ranks", "ranking")
NUMBERS = ("label_0", "label_1", "prefer_0", "prefer_1", "has_label", "human_preference", "choice_dist", "confidence", "prompt_id")
OPTIONAL = ("annotator", "gap", "source", "source_0", "source_1")
ROLES = ("prompt", "winner", "loser", "first", "second", "label", "votes_first", "votes_second", "image", "images", "rank", *OPTIONAL)
TIES = {"tie", "tied", "equal", "same", "both", "draw", "neither", "bothgood", "bothbad", "tiebothbad"}
YES, NO = {"true", "yes", "1", "1.0"}, {"false", "no", "0", "0.0"}
FIRST = {"first", "left", "a", "win", "wins", "won", "imagea", "imageleft"}
SECOND = {"second", "right", "b", "lose", "loses", "lost", "imageb", "imageright"}


def votes_of(first: str, second: str) -> list[tuple[str, str]]:
    """The columns that may say how many, or which share, voted for each of two sides, the most telling first."""
    forms = ("weighted_results_{}_preference", "weighted_results_{}", "votes_{}", "{}_votes", "num_votes_{}")
    names = [(form.format(first), form.format(second)) for form in forms]
    common = [("first", "second"), ("0", "1"), ("1", "2"), ("a", "b"), ("left", "right")]
    return names + [(f"votes_{a}", f"votes_{b}") for a, b in common] + [(f"{a}_votes", f"{b}_votes") for a, b in common]


VOTES = [pair for sides in SIDES for pair in votes_of(*sides)]
NAMES = list(dict.fromkeys([*PROMPT, *(name for pair in [*DECIDED, *SIDES, WON_BY_FIRST, *VOTES] for name in pair), *LISTS, *CHOICES, *RANKS,
                            *NUMBERS, *OPTIONAL, "split"]))  # all that any row is asked for
Read = Callable[[Any, str | None], Picture]  # (a cell, what the picture is called) -> the picture


# -- cells


def absent(value: Any) -> bool:
    """Whether a cell holds nothing: null, an empty text, or the not-a-number that pandas writes for null."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def number(name: str, value: Any) -> float | None:
    """A cell as a number, None where it holds nothing. Raises Refused for what is none.

    >>> number("label", "0.25"), number("label", True), number("label", float("nan"))
    (0.25, 1.0, None)
    """
    if absent(value):
        return None
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    try:
        if isinstance(value, bool | int | float | Decimal | str) and math.isfinite(found := float(value)):
            return found
    except (ValueError, OverflowError, ArithmeticError):
        pass
    raise Refused(f"the {name} is not a number", repr(value)[:80])


def truth(name: str, value: Any) -> bool | None:
    """A cell that says yes or no: true and false, 1 and 0 as numbers or text; None where it holds nothing.

    >>> truth("has_label", 0), truth("has_label", "True"), truth("has_label", None)
    (False, True, None)
    """
    if absent(value):
        return None
    word = str(value).strip().lower()
    if isinstance(value, Decimal):
        word = str(float(value))
    if word in YES or word in NO:
        return word in YES
    raise Refused(f"{name} is neither true nor false", repr(value)[:80])


def words(value: Any, name: str = "name") -> str | None:
    """An id or a name as text; None where there is none. Raises Refused for lists and the like. name: of the column.

    >>> words(3), words(3.0), words("ann"), words("")
    ('3', '3', 'ann', None)
    """
    if absent(value):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool | int | float | Decimal | str):
        return str(value)
    raise Refused(f"the {name} is not text", repr(value)[:80])


# -- labels


def share_of_two(one: float | None, other: float | None) -> float:
    """Preference for the first of two numbers that add up to 1; the first alone is enough.

    >>> share_of_two(1.0, None), share_of_two(0.25, 0.75)
    (1.0, 0.25)
    """
    if one is None:
        raise Refused("label_0 or label_1 is missing", (one, other))
    other = 1 - one if other is None else other
    if not (0 <= one <= 1 and 0 <= other <= 1) or abs(one + other - 1) > 1e-6:
        raise Refused("label_0 and label_1 do not add up to 1", (one, other))
    return one


def share_of_votes(one: float | None, other: float | None) -> float | None:
    """Share of the votes that went to the first; None where nobody voted.

    >>> share_of_votes(9, 1), share_of_votes(0, 0)
    (0.9, None)
    """
    if one is None or other is None:
        if one is other:
            return None
        raise Refused("votes are given for one picture alone", (one, other))
    if one < 0 or other < 0:
        raise Refused("votes are below 0", (one, other))
    return one / (one + other) if one + other else None


def side_named(value: str, sides: tuple[str, str]) -> float | None:
    """What a word says of two pictures: 1 the first won, 0 the second, 0.5 neither; None where it says nothing.

    >>> side_named("image_1", ("image_1", "image_2")), side_named("Image 1", ("image_0", "image_1")), side_named("tie", ("left", "right"))
    (1.0, 0.0, 0.5)
    """
    word = _bare(value)
    own = [_bare(side) for side in sides]
    if word in own:
        return float(word == own[0])
    if word in TIES:
        return 0.5
    if word in FIRST or word in SECOND:
        return float(word in FIRST)
    digits = [re.fullmatch(r"(?:image|img|jpg|picture|option|model)(\d)", text) for text in (word, *own)]
    if digits[0] and digits[0][1] in "012":
        ends = (digits[1][1], digits[2][1]) if digits[1] and digits[2] else ("1", "2")
        return float(digits[0][1] == ends[0]) if digits[0][1] in ends else None
    return None


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def label_of(row: Mapping[str, Any], sides: tuple[str, str], classes: Mapping[str, Sequence[str]] | None = None) -> float | None:
    """Preference for the first of two pictures, 0 to 1; None where nobody has chosen. classes: column -> names of its whole numbers."""
    if truth("has_label", row.get("has_label")) is False:
        _seen(row, "prefer_0", "prefer_1", "label_0", "label_1", *CHOICES)
        return None
    if any(not absent(row.get(name)) for name in ("prefer_0", "prefer_1")):
        found = [truth(name, row.get(name)) for name in ("prefer_0", "prefer_1")]
        return {(True, False): 1.0, (True, None): 1.0, (False, True): 0.0, (None, True): 0.0, (True, True): 0.5}.get((found[0], found[1]))
    if any(not absent(row.get(name)) for name in ("label_0", "label_1")):
        return share_of_two(*(number(name, row.get(name)) for name in ("label_0", "label_1")))
    for name in CHOICES:
        if not absent(row.get(name)):
            return _choice(name, row[name], sides, (classes or {}).get(name))
    if isinstance(liked := row.get("human_preference"), list) and len(liked) == 2:
        return share_of_votes(*(number("human_preference", one) for one in liked))
    for one, other in votes_of(*sides):
        if not absent(row.get(one)) or not absent(row.get(other)):
            return share_of_votes(number(one, row.get(one)), number(other, row.get(other)))
    return None


def _seen(row: Mapping[str, Any], *names: str) -> None:
    """Ask for columns that another one has already said not to heed."""
    for name in names:
        row.get(name)


def _choice(name: str, value: Any, sides: tuple[str, str], classes: Sequence[str] | None) -> float | None:
    if classes is not None and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(classes):
            return None  # -1: `datasets` writes it where there is no label
        value = classes[value]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        said = side_named(value, sides)
        if said is not None:
            return said
        if _bare(value) in ("yes", "no"):
            return float(_bare(value) == "yes")
        try:
            return number(name, value)
        except Refused:
            known = "is not a number" if name == "label" else "names neither picture"
            raise Refused(f"the {name} {known}", value[:80]) from None
    return number(name, value)


# -- rows


def made_of(row: Mapping[str, Any], read: Read, classes: Mapping[str, Sequence[str]] | None = None) -> Made:
    """The comparison, ranking or picture that a row of a table is. Raises Refused where it is none."""
    prompt = _first(row, *PROMPT)
    for names in DECIDED:
        if _has(row, names):
            first, second = (read(row[name], None) for name in names)
            label = None if truth("has_label", row.get("has_label")) is False else 1.0
            return _with_optional(row, Comparison(prompt, first, second, label, placed=False))
    if _has(row, WON_BY_FIRST):
        first, second = (read(row[name], None) for name in WON_BY_FIRST)
        return _with_optional(row, Comparison(prompt, first, second, _winners_share(row), placed=False))
    for sides in SIDES:
        if _has(row, sides):
            label = label_of(row, sides, classes)
            first, second = (read(row[name], words(row.get(f"source_{i}"), f"source_{i}")) for i, name in enumerate(sides))
            return _with_optional(row, Comparison(prompt, first, second, label))
    for name in LISTS:
        if isinstance(row.get(name), list):
            return _of_list(row, prompt, [read(cell, None) for cell in row[name]])
    for name in ALONE:
        if not absent(row.get(name)):
            ranked = [number(rank, row[rank]) for rank in RANKS if not absent(row.get(rank))]
            among = words(row.get("prompt_id"), "prompt_id") or ""
            return Single(prompt, read(row[name], None), rank=ranked[0] if ranked else None, among=among)
    raise Refused("there are no pictures under names that are known", ", ".join(row))


def _has(row: Mapping[str, Any], names: tuple[str, str]) -> bool:
    """Whether a row has both; only then are they asked for, and so read."""
    return all(name in row for name in names) and all(not absent(row[name]) for name in names)


def _first(row: Mapping[str, Any], *names: str) -> str:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise Refused(f"there is no {' or '.join(names[:3])}")


def _winners_share(row: Mapping[str, Any]) -> float:
    """HPDv3: how many chose each picture; the first is the better one, in whichever order they are counted."""
    votes = row.get("choice_dist")
    if not isinstance(votes, list) or len(votes) != 2:
        return 1.0
    share = share_of_votes(*(number("choice_dist", one) for one in votes))
    return 1.0 if share is None else max(share, 1 - share)


def _of_list(row: Mapping[str, Any], prompt: str, pictures: list[Picture]) -> Made:
    """Pictures with ranks (1 the best), or with preferences: votes of two, a one among zeros, or the number of the best."""
    for name in RANKS:
        if isinstance(row.get(name), list):
            ranks = [number(name, one) for one in row[name]]
            if len(ranks) != len(pictures) or None in ranks:
                raise Refused("there are not as many ranks as pictures", f"{len(ranks)} of {len(pictures)}")
            return Ranked(prompt, tuple(pictures), tuple(float(rank or 0) for rank in ranks))
    liked = row.get("human_preference")
    if isinstance(liked, list) and len(liked) == len(pictures) == 2:
        return _with_optional(row, Comparison(prompt, pictures[0], pictures[1], share_of_votes(*(number("human_preference", one) for one in liked))))
    if len(pictures) == 2 and not isinstance(liked, int):
        label = label_of(row, ("image_0", "image_1"))
        return _with_optional(row, Comparison(prompt, pictures[0], pictures[1], label))
    if isinstance(liked, list) and len(liked) == len(pictures):
        best = [i for i, one in enumerate(liked) if number("human_preference", one)]
        liked = best[0] if len(best) == 1 else None
    if isinstance(liked, bool) or not isinstance(liked, int) or not 0 <= liked < len(pictures):
        raise Refused("it says of no picture of its list that it is the best, and gives no ranks", repr(row.get("human_preference"))[:80])
    return Ranked(prompt, tuple(pictures), tuple(float(i != liked) for i in range(len(pictures))), ties=False)


def _with_optional(row: Mapping[str, Any], made: Comparison) -> Comparison:
    """With annotator, gap and source; one that cannot be kept is lost alone, and told."""
    lost = []
    found: dict[str, Any] = {}
    for name in ("annotator", "source"):
        try:
            found[name] = words(row.get(name), name)
        except Refused as problem:
            lost.append((problem.reason, problem.detail))
    try:
        found["gap"] = number("gap", row.get("gap"))
    except Refused as problem:
        lost.append((problem.reason, problem.detail))
    return replace(made, **found, lost=tuple(lost))
