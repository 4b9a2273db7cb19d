"""Text that nobody vouches for: bytes to text, JSON and CSV, with one kind of exception for all that may be wrong with them."""

import codecs as encodings
import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

DEPTH = 64  # brackets within brackets; data that people write has three or four
MOST_LETTERS = 1 << 17  # of a cell
AGAIN = 20  # how often a CSV file is read on from after a quote that does not close

_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_MARKS = {encodings.BOM_UTF32_LE: "utf-32", encodings.BOM_UTF32_BE: "utf-32", encodings.BOM_UTF8: "utf-8-sig",  # UTF-32 first: it begins as 16 does
          encodings.BOM_UTF16_LE: "utf-16", encodings.BOM_UTF16_BE: "utf-16"}


class Unreadable(ValueError):
    """What is wrong with a text; it has no place, which the one who reads it knows."""


def encoding_of(data: bytes) -> str:
    """What a byte order mark says, else UTF-8.

    >>> encoding_of("ä".encode("utf-16")), encoding_of("ä".encode())
    ('utf-16', 'utf-8')
    """
    return next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises Unreadable for what is none, nests deeper than DEPTH, or gives a key twice.

    >>> parse_json('{"a": [1, null]}')
    {'a': [1, None]}
    """
    try:
        found = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise Unreadable(f"it is nested more than {DEPTH} deep") from None
    except Unreadable:
        raise
    except ValueError as problem:  # UnicodeDecodeError and numbers of too many digits are such too
        detail = "it is not UTF-8" if isinstance(problem, UnicodeDecodeError) else str(problem)
        raise Unreadable(detail) from None
    if depth(found) > DEPTH:
        raise Unreadable(f"it is nested more than {DEPTH} deep")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"the key {name!r} is given twice")
    return found


def depth(value: Any) -> int:
    """How many lists and dicts are within each other; counted without recursion, up to one more than DEPTH.

    >>> depth(1), depth([]), depth({"a": [[1]]})
    (0, 1, 3)
    """
    found, level = 0, [value]
    while (level := [one for one in level if isinstance(one, dict | list)]) and found <= DEPTH:
        found += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return found


def texts(value: Any) -> Iterator[str]:
    """Every text in a value of at most DEPTH levels, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(key)
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def oddity(text: str) -> str | None:
    """The first thing in a text that no person wrote: half a character, or a control character but tab and line end.

    >>> oddity("a\\tb"), oddity("a\\0b"), oddity("\\ud800")
    (None, 'the control character U+0000', 'half a character (U+D800)')
    """
    found = _ODD.search(text)
    if not found:
        return None
    code = f"U+{ord(found[0]):04X}"
    return f"half a character ({code})" if found[0] >= "\ud800" else f"the control character {code}"


def seen(text: str, most: int = 60) -> str:
    """A text as a terminal can show it: in one line, what cannot be printed escaped, not too long.

    >>> seen("a\\x1bb"), seen("x" * 100, 5)
    ('a\\\\x1bb', 'xxxx…')
    """
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def csv_records(lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """(line in which it begins, cells) of each record, or what is wrong with it; lines count from 1, each with its end.

    A quote that does not close takes nothing with it: reading goes on in the line after.
    """
    start = 0
    for _ in range(AGAIN):
        reader = csv.reader(islice(lines, start, None), delimiter=delimiter, strict=True)
        while True:
            line = start + reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                end = start + reader.line_num
                yield line, Unreadable(_in_words(str(problem), end if end > line else None))
                if end > line or "end of data" in str(problem):
                    break
        start = line  # the line after, as these count from 0


def _in_words(problem: str, end: int | None) -> str:
    """What the csv module says, for people. end: the line it happened in, if that is another than the record's first."""
    if "end of data" in problem or (end and "limit" in problem):
        return 'a quote opens and does not close; close it, or write "" for a quote within quotes'
    if "limit" in problem:
        return f"a cell is longer than {csv.field_size_limit():,} letters; shorten it"
    if "expected after" in problem:
        where = f"; it closes in line {end}" if end else ""
        return f'text follows a closing quote{where}; put the whole cell in quotes, with "" for a quote within'
    return f"it is not CSV ({problem})"
