"""A line of what people say, and what shows that it is whole: it ends with its number and a hash of itself.

    {"of": ..., "verdict": "left", ..., "at": "...", "n": 12, "sum": "6c1f0e9a..."}

A number is given once and stays when lines before it are lost. Lines of earlier versions end without; they count from 0 by their place.
Beside the folder, `.FOLDER-NAME.tally` holds how many lines were confirmed and the last one's hash, so that an end cut off is known too.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_END = b', "sum": "'
_SEALED = re.compile(rb'\{"(?:of|undo|lost)": .*?, "sum": "[0-9a-f]{16}"\}')


def seal(said: dict, number: int) -> bytes:
    """One line, with its number and hash and its end.

    >>> seal({"undo": 0}, 1)
    b'{"undo": 0, "n": 1, "sum": "34232c10c787a739"}\\n'
    """
    body = json.dumps(said | {"n": number}, ensure_ascii=False).encode()[:-1]
    return body + _END + _hash(body) + b'"}\n'


def unseal(line: bytes, place: int) -> tuple[dict, int]:
    """(what a line says, its number: `place` for one of an earlier version). Raises ValueError for one that is not whole."""
    try:
        said = json.loads(line)
    except RecursionError:
        raise ValueError("lists within lists without end") from None
    if not isinstance(said, dict):
        raise ValueError(f"no object but a {type(said).__name__}")
    if "n" not in said and "sum" not in said:
        return said, place
    body, _, end = line.rpartition(_END)
    if end.rstrip() != _hash(body) + b'"}' or not isinstance(said.get("n"), int):
        raise ValueError("it is not as it was written")
    return {key: value for key, value in said.items() if key not in ("n", "sum")}, said["n"]


def sealed(line: bytes) -> bool:
    """Whether a line carries its hash: those of earlier versions do not."""
    return _END in line


def _hash(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:16].encode()


# -- a file of them


@dataclass
class Checked:
    """What a file of lines is found to be."""

    path: Path
    whole: dict[int, bytes] = field(default_factory=dict)  # number -> line, with its end
    broken: list[tuple[int, bytes, str]] = field(default_factory=list)  # place from 1, what stands there, why
    bare: int = 0  # lines of earlier versions, which nothing shows to be whole
    lost: set[int] = field(default_factory=set)  # numbers that a repair has put down as lost
    confirmed: int = 0  # lines that the tally knows of
    strange: str | None = None  # what is wrong with the tally

    @property
    def gone(self) -> list[int]:
        """Numbers that were confirmed and that neither stand in the file nor are put down as lost."""
        return sorted(set(range(self.next_number)) - self.whole.keys() - self.lost)

    @property
    def next_number(self) -> int:
        """The first number that was never given."""
        return max(self.confirmed, max(self.whole, default=-1) + 1)

    @property
    def complaints(self) -> list[str]:
        """What is wrong, in words; nothing where all is whole."""
        told = [f"{self.path}, line {place}: {why}" for place, _, why in self.broken]
        unnamed = len(self.gone) - len(self.broken)
        if not self.path.is_file():
            told.append(f"{self.path}: missing, with {self.confirmed:,} lines that were confirmed")
        elif unnamed > 0:
            told.append(f"{self.path}: {unnamed:,} {'line' if unnamed == 1 else 'lines'} that were confirmed are gone")
        return told + ([self.strange] if self.strange else [])


def check(path: Path, understand: Callable[[dict], object] = dict) -> Checked:
    """Look at every line of FOLDER/NAME.jsonl, and at its tally. understand: raises ValueError for what no line can say."""
    found = Checked(path)
    found.confirmed, last, found.strange = read_tally(path)
    *ended, rest = (path.read_bytes() if path.is_file() else b"").split(b"\n")
    for place, line in enumerate(ended):
        try:
            said, number = unseal(line, place)
            understand(said)
            if number in found.whole:
                raise ValueError(f"the number {number} stands twice")
            if number == found.confirmed - 1 and _hash(line) != last:
                raise ValueError("it is not what was confirmed last")
        except (ValueError, KeyError, TypeError, OverflowError) as problem:
            found.broken.append((place + 1, line, f"this is no whole line ({problem})"))
            continue
        found.whole[number] = line + b"\n"
        found.bare += not sealed(line)
        found.lost |= set(said.get("lost", ()))
    if found.bare < len(found.whole) and not _tally(path).is_file():
        found.strange = f"{_tally(path)}: missing, so that nothing shows whether the end of {path.name} is there"
    if rest and found.gone:  # else it is of a click that was never confirmed
        found.broken.append((len(ended) + 1, rest, "this is no whole line (its end is missing)"))
    return found


def mend(path: Path, understand: Callable[[dict], object] = dict) -> Path | None:
    """Put what is broken into NAME.broken beside the file, keep every whole line, and note the numbers of what is lost as a line of its own.

    The file with what was taken out, if anything was. The tally is made anew.
    """
    found, aside = check(path, understand), None
    for _, line, _ in found.broken:
        for piece in _SEALED.findall(line):  # where the end between two lines was what broke
            try:
                found.whole.setdefault(unseal(piece, -1)[1], piece + b"\n")
            except ValueError:
                continue
    if found.broken:
        aside = path.with_suffix(".broken")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for _, line, _ in found.broken)
            file.flush()
            os.fsync(file.fileno())
    if found.gone:
        found.whole[found.next_number] = seal({"lost": found.gone}, found.next_number)
    if found.broken or found.gone:
        path.parent.mkdir(exist_ok=True)
        draft = path.with_name(f".{path.name}.tmp")
        draft.write_bytes(b"".join(line for _, line in sorted(found.whole.items())))
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    _tally(path).write_bytes(tally(found.next_number, found.whole.get(found.next_number - 1, b"")))
    return aside


def every(folder: Path) -> Iterator[Path]:
    """FOLDER/NAME.jsonl of everybody who has said something, those that are gone too."""
    names = {path.name for path in folder.glob("*.jsonl")}
    start, end = f".{folder.name}-", ".tally"
    names |= {f"{path.name[len(start) : -len(end)]}.jsonl" for path in folder.parent.glob(f"{start}*{end}")}
    return (folder / name for name in sorted(names))


# -- how many were confirmed


def _tally(path: Path) -> Path:
    return path.parent.parent / f".{path.parent.name}-{path.stem}.tally"


def tally(lines: int, last: bytes) -> bytes:
    """What a tally holds: how many numbers were given, a hash of the last line, and one of both; always as long."""
    body = b"%012d %s" % (lines, _hash(last.rstrip(b"\n")))
    return body + b" " + _hash(body) + b"\n"


def read_tally(path: Path) -> tuple[int, bytes, str | None]:
    """(lines of FOLDER/NAME.jsonl that were confirmed, the last one's hash, what is wrong with the tally); 0 where there is none."""
    file = _tally(path)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return 0, b"", None
    body, _, _ = data.rpartition(b" ")
    if not body[:12].isdigit() or data != body + b" " + _hash(body) + b"\n":
        return 0, b"", f"{file}: altered, so that nothing shows whether the end of {path.name} is there"
    return int(body[:12]), body[13:], None


class Tally:
    """The tally of one file, open for whoever writes in it. It is written after the line is on disk: it never knows of more than was."""

    def __init__(self, path: Path):
        self._file = os.open(_tally(path), os.O_RDWR | os.O_CREAT, 0o644)

    def set(self, lines: int, last: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk: the next click writes it
            os.pwrite(self._file, tally(lines, last), 0)

    def close(self) -> None:
        os.close(self._file)
