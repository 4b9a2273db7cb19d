"""What people say of pairs of pictures: a file a person, a line a click, no line ever changed; what to ask next.

A line of FOLDER/NAME.jsonl is an answer (`of`: which candidates, group, left, right, verdict, `pictures`: hashes of what was seen)
or takes one back ({"undo": its number}), with its number and a hash of itself (see lines.py). A last line without its end is a click
that was never confirmed.
"""

import errno
import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from PIL import Image

from fashiondpo_pipeline import foreign, lines, seeds
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign_tables import faults_of, rows_of

VERDICTS = ("left", "right", "tie", "both_bad", "skip")
MOST = 10_000  # pairs in a queue: more than people look at


@dataclass(frozen=True)
class Duel:
    """Two candidates of one group, the lower number first."""

    group: str
    first: int
    second: int

    def sides(self, annotator: str) -> tuple[int, int]:
        """(left, right) as this person sees them, by a coin thrown from the key: a habit for one side then favours nobody."""
        swap = seeds.key("side", annotator, self.group, self.first, self.second) & 1
        return (self.second, self.first) if swap else (self.first, self.second)


@dataclass(frozen=True)
class Answer:
    """One click that stands. pictures: hashes of the left and the right picture's pixels."""

    number: int
    annotator: str
    of: str
    group: str
    left: int
    right: int
    verdict: str
    pictures: tuple[str | None, str | None]

    @property
    def duel(self) -> Duel:
        return Duel(self.group, min(self.left, self.right), max(self.left, self.right))

    @property
    def label(self) -> str | None:
        """first, second, tie or both_bad, whichever side the pictures were on; None: skipped."""
        if self.verdict in ("left", "right"):
            return "first" if (self.verdict == "left") == (self.left < self.right) else "second"
        return None if self.verdict == "skip" else self.verdict

    @property
    def preference(self) -> float | None:
        """For the first of the duel: 1, 0, or 1/2 where neither is preferred; None: skipped."""
        return None if self.label is None else {"first": 1.0, "second": 0.0}.get(self.label, 0.5)


def hash_pixels(picture: Image.Image) -> str:
    """Sixteen hex digits that name a picture by its pixels, whatever file it came in."""
    rgb = picture.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height} ".encode() + rgb.tobytes()).hexdigest()[:16]


# -- on disk

def check_name(name: str) -> None:
    """Raises UserError for a name that is none of a file."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
        raise UserError(f"'{name}' cannot name a file: take letters, digits, '.', '_' and '-', beginning with a letter or digit")


def read(path: Path) -> list[Answer]:
    """The answers of a file that nobody took back, oldest first. Raises UserError that names every line that is not whole."""
    standing = Standing(path)
    wrong = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            standing.take(line)
        except UNFIT as problem:
            wrong.append(f"{path}, line {standing.lines}: this is no answer ({problem}); take the line out or put it right")
    if wrong:
        raise UserError("\n".join(wrong) + f"\n{MEND}")
    return list(standing.answers.values())


class Standing:
    """The lines of one person's file, taken one after another. answers: those that stand, by their numbers. lines: how many were taken."""

    def __init__(self, path: Path):
        self.annotator, self.lines = path.stem, 0
        self.answers: dict[int, Answer] = {}

    def take(self, line: bytes) -> tuple[Answer | None, bool]:
        """(the answer that comes or goes with a line, whether it stands from now on); None: neither. Raises one of UNFIT."""
        self.lines += 1
        said, number = lines.unseal(line, self.lines - 1)
        found = understand(said, number, self.annotator)
        if isinstance(found, Answer):
            self.answers[number] = found
            return found, True
        gone = None if found is None else self.answers.pop(found, None)
        if found is not None and gone is None and not lines.sealed(line):
            raise ValueError(f"there is no answer {found} to take back")
        return gone, False


MEND = "`fdpo status --verify --repair` sets such lines of a run aside and keeps the others; out of a pair set, take them by hand"
UNFIT = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # what `understand` raises


def understand(said: dict, number: int = 0, annotator: str = "") -> Answer | int | None:
    """The answer that a line gives, the number of the one that it takes back, or None: it says what was lost. Raises one of UNFIT."""
    if "undo" in said:
        return int(said["undo"])
    if "lost" in said:
        return None
    of, group, left, right = str(said["of"]), str(said["group"]), int(said["left"]), int(said["right"])
    answer = Answer(number, annotator, of, group, left, right, said["verdict"], tuple(said["pictures"]))
    if answer.verdict not in VERDICTS or answer.left == answer.right or len(answer.pictures) != 2:
        raise ValueError(f"verdict {answer.verdict!r} of {answer.left} and {answer.right}")
    return answer


def read_all(folder: Path, of: str | None = None) -> list[Answer]:
    """Everybody's answers, to everything or to the candidates `of`; of several to one duel the last that someone gave."""
    found = [answer for path in sorted(folder.glob("*.jsonl")) for answer in read(path)]
    kept = {(answer.annotator, answer.of, answer.duel): answer for answer in found if of is None or answer.of == of}
    return list(kept.values())


class Notebook:
    """One person's file, open for one process; an answer is on disk when `add` returns, and a click costs the same however many stand.

    changes: the duels that were answered, or whose answer was taken back, since it was opened, in their order.
    """

    def __init__(self, folder: Path, annotator: str, of: str, say: Callable[[str], None] = print):
        check_name(annotator)
        self.annotator, self.of, self.path = annotator, of, folder / f"{annotator}.jsonl"
        self.changes: list[Duel] = []
        self.turn = threading.RLock()  # one click at a time, whichever queue it comes from
        try:
            self._open(folder, say)
        except OSError as problem:
            raise UserError(f"{self.path} cannot be written ({problem.strerror}): see to the folder, or run the studio on a copy") from problem

    def _open(self, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder.parent / f".{folder.name}-{self.annotator}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(f"{self.path} is in use by another studio: take another name, or close that one") from None
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        _sync_folder(folder)
        found = lines.check(self.path, understand)
        if found.broken:
            raise UserError("\n".join(found.complaints) + f"\n{MEND}")
        for complaint in found.complaints:
            say(complaint)
        self._drop_unfinished_line(say)
        self._tally = lines.Tally(self.path)
        self._lines = found.next_number
        self._tally.set(self._lines, found.whole.get(self._lines - 1, b""))
        self._answers = [answer for answer in read(self.path) if answer.of == self.of]
        self._said = Counter(answer.duel for answer in self._answers)

    def _drop_unfinished_line(self, say: Callable[[str], None]) -> None:
        data = self.path.read_bytes()
        cut = len(data) - (data.rfind(b"\n") + 1)
        if cut:
            os.truncate(self.path, len(data) - cut)
            say(f"{self.path}: the last {cut} bytes were of a click that was never confirmed, and are gone")

    @property
    def answers(self) -> list[Answer]:
        """What stands of these candidates."""
        return list(self._answers)

    def __len__(self) -> int:
        """How many answers stand of these candidates."""
        return len(self._answers)

    def __contains__(self, duel: Duel) -> bool:
        """Whether an answer to this duel stands."""
        return self._said[duel] > 0

    def add(self, group: str, left: int, right: int, verdict: str, pictures: Sequence[str | None] = (None, None)) -> Answer:
        assert verdict in VERDICTS and left != right
        said = {"of": self.of, "group": group, "left": left, "right": right, "verdict": verdict, "pictures": list(pictures)}
        with self.turn:
            answer = Answer(self._lines, self.annotator, self.of, group, left, right, verdict, (pictures[0], pictures[1]))
            self._append(said)
            self._answers.append(answer)
            self._said[answer.duel] += 1
            self.changes.append(answer.duel)
        return answer

    def undo(self) -> Answer | None:
        """Take back the last answer that stands, and return it."""
        with self.turn:
            if not self._answers:
                return None
            self._append({"undo": self._answers[-1].number})
            answer = self._answers.pop()
            self._said[answer.duel] -= 1
            self.changes.append(answer.duel)
            return answer

    def _append(self, line: dict) -> None:
        """Put a line on disk. Raises UserError, and leaves the file as it was, where there is no room."""
        data = lines.seal(line | {"at": datetime.now(UTC).isoformat(timespec="milliseconds")}, self._lines)
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file)
        except OSError as problem:
            os.truncate(self.path, end)  # half a line must not stand before the next
            raise UserError(f"{self.path}: that was not kept ({problem.strerror}): make room, and say it again") from problem
        self._lines += 1
        self._tally.set(self._lines, data)

    def close(self) -> None:
        os.close(self._file)
        self._tally.close()
        self._lock.release()


def _sync_folder(folder: Path) -> None:
    """A new file's name is on disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- what to ask

def most_disputed(groups: pa.Array, normal: Mapping[str, np.ndarray], most: int = MOST) -> list[Duel]:
    """Pairs on which experts disagree most, widest first; normal: expert -> normalised scores (g, k).

    A pair's dispute is the smaller of the widest gap for one side and the widest for the other: 0 where no expert contradicts another.
    """
    scores = np.stack(list(normal.values()))  # (m, g, k)
    found = []
    for first in range(scores.shape[2]):
        for second in range(first + 1, scores.shape[2]):
            gap = scores[:, :, first] - scores[:, :, second]  # (m, g)
            with np.errstate(invalid="ignore"):
                dispute = np.minimum(gap.max(0), -gap.min(0))
            rows = np.flatnonzero(dispute > 0)  # NaN is not
            found.append(np.stack([dispute[rows], rows, np.full(len(rows), first), np.full(len(rows), second)]))
    every = np.concatenate(found, 1) if found else np.empty((4, 0))
    order = np.lexsort((every[3], every[2], every[1], -every[0]))[:most]
    return [_duel(groups, *map(int, every[1:, n])) for n in order]


def at_random(groups: pa.Array, known: np.ndarray, seed: int, most: int = MOST) -> list[Duel]:
    """Pairs of candidates that are there (known, (g, k)), in an order that depends on the seed alone."""
    first, second = np.triu_indices(known.shape[1], 1)
    rows, pairs = np.nonzero(known[:, first] & known[:, second])
    some = np.random.default_rng(seeds.key(seed, "annotate")).permutation(len(rows))[:most]
    return [_duel(groups, int(rows[n]), int(first[pairs[n]]), int(second[pairs[n]])) for n in some]


def _duel(groups: pa.Array, row: int, first: int, second: int) -> Duel:
    return Duel(groups[row].as_py(), first, second)


def listed(path: Path, known: Mapping[str, set[int]]) -> list[Duel]:
    """The pairs of a .csv, .tsv, .jsonl or .parquet with group, first and second; known: group -> its candidates. Raises UserError."""
    if not path.is_file() or path.suffix.lower() not in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise UserError(f"{path}: a list of pairs is a .csv, .tsv, .jsonl or .parquet file with the columns group, first and second")
    faults, found = faults_of(path), dict[Duel, None]()
    for number, row in rows_of(path, ("group", "first", "second"), faults):
        group, first, second = row.get("group"), _number(row.get("first")), _number(row.get("second"))
        if first is None or second is None or isinstance(group, bool) or not isinstance(group, str | int):
            faults.add(number, "it should say the group and two candidates' numbers, as first and second; put it right")
        elif first == second or not {first, second} <= known.get(str(group), set()):
            faults.add(number, f"'{foreign.seen(str(group))}' has no candidates {first} and {second} to compare; take it out")
        else:
            found[Duel(str(group), min(first, second), max(first, second))] = None
    faults.check()
    return list(found)


def _number(cell: Any) -> int | None:
    """A candidate's number as a cell of any table says it; None: it is none."""
    if isinstance(cell, str) and cell.strip().isascii() and cell.strip().isdigit() and len(cell) < 10:
        return int(cell)
    whole = isinstance(cell, int | float) and not isinstance(cell, bool) and 0 <= cell < 1 << 31 and int(cell) == cell
    return int(cell) if whole else None
