"""Quality in levels, as a language model is asked for it and as its answer is read. Pure functions; FashionDPO (2504.12900)."""

import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign import Unreadable, parse_json

# The ten are FashionDPO's; the five are every second of them.
TEN = ("Very Poor Quality", "Poor Quality", "Low Quality", "Below Average Quality", "Moderate Quality", "Above Average Quality",
       "Good Quality", "Very Good Quality", "High Quality", "Exceptional Quality")
LABELS = {10: TEN, 5: ("Very Poor Quality", "Poor Quality", "Moderate Quality", "Good Quality", "Exceptional Quality")}
TEMPLATE = (
    "The picture was made for this request: {prompt}. Judge the garment alone: is it complete and well formed, does it show what was asked "
    "for, and does it follow the principles of fashion design? Put it into one of these categories: {levels}. If you are in doubt, take "
    "the nearest. Answer with the number of the category and nothing else."
)
THOUGHT = "</think>"  # ends what a model thinks aloud
REPLY = 2_000  # characters of a reply that are kept
GIVEN = ("levels",)  # what a template may name beside the prompts' columns


def listed(levels: int) -> str:
    """The levels as a template shows them.

    >>> listed(5)[:36]
    '1-Very Poor Quality, 2-Poor Quality,'
    """
    labels = LABELS.get(levels)
    return ", ".join(f"{n}-{labels[n - 1]}" if labels else str(n) for n in range(1, levels + 1))


def template_of(text: str | None, file: str | None) -> str:
    """The template: given as text, in a file, or the default. Raises UserError for one that cannot be filled in."""
    if text is not None and file is not None:
        raise UserError("a vision-language expert takes `template` or `template_file`, not both: drop one")
    if file is not None:
        path = locate(file)
        if not path.is_file():
            raise UserError(f"template_file: there is no file {path}; check the path (relative ones start in the working folder)")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            raise UserError(f"template_file: {path} is not UTF-8 (byte {problem.start}): save it as UTF-8") from None
    text = TEMPLATE if text is None else text
    columns_of(text)
    return text


def columns_of(template: str) -> list[str]:
    """The prompts' columns that a template names. Raises UserError where a brace holds anything but a column's name."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as problem:
        raise UserError(f"template: {problem}; a brace that is meant as one is written twice") from None
    for name in names:
        if not name.isidentifier():
            raise UserError(f"template: {{{name}}} is no column's name; a brace that is meant as one is written twice")
    return list(dict.fromkeys(name for name in names if name not in GIVEN))


def question(template: str, row: Mapping, levels: int) -> str:
    """The template filled in for one candidate."""
    return template.format(**{name: row[name] for name in columns_of(template)}, levels=listed(levels))


# -- reading an answer

_WORD = r"(?:final\s+)?(?:answer|category|level|grade|score|rating|quality)\b\s*(?:level\b|category\b|score\b)?\s*(?:is\b|[:=#])?\s*"
_LEAD = rf"(?:the\s+)?(?:{_WORD}){{0,2}}"
_NUMBER = re.compile(rf"^{_LEAD}(?P<dash>[-‐‑‒–—−]?)(?P<number>\d{{1,9}})(?![\w%])", re.IGNORECASE)  # noqa: RUF001 - dashes as people write them
_SCALE = re.compile(r"^\s*(?:/|out\s+of|of)\s*(\d{1,9})(?![\w%])", re.IGNORECASE)
_DASH = re.compile(r"^(\s*)[-–—](\s*)")  # noqa: RUF001
_STOP = re.compile(r"^\s*(?:[:;,)\n]|\.(?!\d))\s*|^\s*\((?=\D)")


def read_level(reply: str, levels: int = 10) -> int | None:
    """The level that a reply names, 1..levels; None unless it is sure: one number, in range, first in the reply.

    >>> [read_level(text) for text in ("8", "8-Very Good Quality", "8/10", "Category 8", "**8**", '{"level": 8}')]
    [8, 8, 8, 8, 8, 8]
    >>> [read_level(text) for text in ("7-8", "8/5", "-8", "0", "11", "8 or 9", "Very Good Quality", "8.5", "8-High Quality", "80 %")]
    [None, None, None, None, None, None, None, None, None, None]
    """
    text = _bare(reply)
    if text.startswith("{"):
        return _from_json(text, levels)
    found = _NUMBER.match(text)
    if not found or found["dash"]:
        return None
    level, rest = int(found["number"]), text[found.end():]
    if not 1 <= level <= levels or found["number"] != str(level):
        return None
    if scale := _SCALE.match(rest):
        if int(scale[1]) != levels:
            return None
        rest = rest[scale.end():]
    return level if _agrees(rest, level, levels) else None


def _bare(reply: str) -> str:
    """The reply without what the model thought aloud, code fences, emphasis and quotes."""
    text = reply.rpartition(THOUGHT)[2].strip()
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text)
    return text.replace("*", "").strip(" \t\r\n\"'`_[]")


def _from_json(text: str, levels: int) -> int | None:
    try:
        answer = parse_json(text)
    except Unreadable:
        return None
    level = answer.get("level") if isinstance(answer, dict) and len(answer) == 1 else None
    return level if type(level) is int and 1 <= level <= levels else None


def _agrees(rest: str, level: int, levels: int) -> bool:
    """Whether what follows the number leaves no doubt: nothing, the level's own label, or words without another number."""
    if not rest.strip(" .!"):
        return True
    numbers = re.findall(r"\d+(?:[.,]\d+)*", rest)
    if any(number != str(level) for number in numbers):
        return False
    dash, stop = _DASH.match(rest), _STOP.match(rest)
    words = rest[(dash or stop).end():] if dash or stop else rest.lstrip()  # type: ignore[union-attr]
    labelled = _label(words, levels)
    if labelled is not None:
        return labelled == level and words[:1].isalpha()
    spaced = bool(dash and dash[1] and dash[2])
    return bool(stop or (spaced and words[:1].isalpha()))


def _label(words: str, levels: int) -> int | None:
    """The level whose label the words begin with, the whole of it or all but `Quality`; None: no label."""
    said = words.casefold()
    for n, label in enumerate(LABELS.get(levels, ()), 1):
        short = label.casefold().removesuffix(" quality")
        if re.match(rf"{re.escape(short)}\b(?! (?!quality)\w)", said):
            return n
    return None


# -- what its probabilities say


def judged(probabilities: Mapping[int, float], reply: str, levels: int, sure: float) -> tuple[float, str | None, str]:
    """(score, reason, reply): the expected level where the levels together have the probability `sure`, else the level read, else none."""
    kept = (reply if len(reply) <= REPLY else reply[:REPLY] + "…").encode(errors="backslashreplace").decode()  # half characters fit no table
    if math.fsum(probabilities.values()) >= sure:
        return expected_level(probabilities), None, kept
    level = read_level(reply, levels)
    if level is None:
        return math.nan, "the reply names no level" if reply.strip() else "the reply is empty", kept
    return float(level), None, kept


def expected_level(probabilities: Mapping[int, float]) -> float:
    """Sum of level times its share of the levels' probability; G-Eval (2303.16634), eq. 1.

    >>> expected_level({7: 0.2, 8: 0.6})
    7.75
    """
    return math.fsum(n * p for n, p in probabilities.items()) / math.fsum(probabilities.values())


def sequences_probability(sequences: Sequence[tuple[int, ...]], log_p: Mapping[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """p(reply says exactly this level) for several token sequences a level is written in, one number a row of the batch.

    log_p: tokens said so far -> log-probabilities of the next token (b, vocabulary). A sequence that another one begins with ("1" of
    "10") counts without that other one.
    """
    whole = {s: np.exp(sum(log_p[s[:n]][:, s[n]] for n in range(len(s)))) for s in sequences}
    return np.stack([p - sum((q for t, q in whole.items() if len(t) == len(s) + 1 and t[: len(s)] == s), np.zeros(len(p)))
                     for s, p in whole.items()])


def reported(tokens: Sequence[Mapping], reply: str, levels: int) -> dict[int, float]:
    """level -> probability, from what an OpenAI-compatible server reports of the reply's tokens (`logprobs.content`).

    Taken at the token where the reply's level stands, not where the scale of "1/10" ends. Where digits are tokens by themselves, "1" may
    go on to "10": what is said next tells, where "1" was said; where it was not, that share of the probability is unknown and left out.
    Empty: nothing to go by.
    """
    level = read_level(reply, levels)
    place = _place(tokens, level)
    if place is None:
        return {}
    found: dict[int, float] = {}
    for text, p in _alternatives(tokens[place]):
        if text.strip() in {str(n) for n in range(1, levels + 1)}:
            found[int(text)] = found.get(int(text), 0.0) + p
    beginnings = {n for n in found if any(str(m).startswith(str(n)) and m != n for m in range(1, levels + 1))}
    for n in beginnings:
        longer = [m for m in range(1, levels + 1) if str(m).startswith(str(n)) and m != n]
        if any(m in found for m in longer):
            continue  # such a number is one token
        share = found.pop(n)
        if str(tokens[place].get("token", "")).strip() != str(n):
            continue
        after = dict(_alternatives(tokens[place + 1])) if place + 1 < len(tokens) else {}
        tails = {m: after.get(str(m)[len(str(n)):], 0.0) for m in longer}
        found |= {m: share * q for m, q in tails.items() if q} | {n: share * (1 - sum(tails.values()))}
    return {n: p for n, p in found.items() if p > 0}


def _place(tokens: Sequence[Mapping], level: int | None) -> int | None:
    """The number of the token that begins the level: the first with a digit, once thinking aloud is over. None where it says another."""
    if level is None:
        return None
    said, wanted = [str(token.get("token", "")) for token in tokens], str(level)
    starts = accumulate(map(len, said), initial=0)
    over = "".join(said).rfind(THOUGHT)  # -1: not a word of it
    place = next((n for n, (start, text) in enumerate(zip(starts, said, strict=False)) if start > over and re.search(r"\d", text)), None)
    if place is None:
        return None
    here, rest = said[place].strip(), "".join(said[place + 1 : place + 2])
    return place if wanted in (here, here + rest.strip()) else None


def _alternatives(token: Mapping) -> Iterable[tuple[str, float]]:
    """(text, probability) of a token and of what else might have stood there, each text once."""
    listed = {str(other["token"]): math.exp(min(float(other["logprob"]), 0.0)) for other in token.get("top_logprobs") or []}
    listed.setdefault(str(token.get("token", "")), math.exp(min(float(token.get("logprob", -math.inf)), 0.0)))
    return listed.items()


def file_of(template_file: str | None) -> dict[str, Path]:
    """What `files()` of an expert with a template adds."""
    return {"template": locate(template_file)} if template_file else {}
