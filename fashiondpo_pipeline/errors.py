"""The one exception that is meant for the person at the terminal, and several mistakes said in one."""

import errno
import os
from pathlib import Path


class UserError(Exception):
    """A mistake outside the program: one sentence saying what, where and what to do; shown without a traceback."""


class Faults:
    """The mistakes of one file, said together: the first SHOWN, each with its place, and how many more there are."""

    SHOWN = 20

    def __init__(self, where: object, unit: str = "line"):
        self.where, self.unit = where, unit
        self.count, self._first = 0, list[tuple[int, str]]()

    def add(self, number: int, text: str) -> None:
        """One mistake; said twice, it counts once."""
        if (number, text) in self._first:
            return
        self.count += 1
        if len(self._first) < self.SHOWN:
            self._first.append((number, text))

    def check(self) -> None:
        """Raises UserError if anything was added."""
        if self.count == 1:
            number, text = self._first[0]
            raise UserError(f"{self.where}, {self.unit} {number}: {text}")
        if self.count:
            more = [f"and {self.count - self.SHOWN:,} more"] if self.count > self.SHOWN else []
            lines = [f"{self.unit} {number}: {text}" for number, text in sorted(self._first)] + more
            raise UserError("\n  ".join([f"{self.where}: {self.count:,} things do not fit", *lines]))


def disk_is_full(problem: BaseException) -> bool:
    """Whether a writer failed for want of room: by the system's number, or its words where a library hides the number."""
    return getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(problem)


def not_allowed(problem: BaseException) -> bool:
    """Whether the system refused a named file or folder: permissions, or a file system that is read-only."""
    return isinstance(problem, OSError) and problem.filename is not None and problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def no_such_place(problem: BaseException) -> bool:
    """Whether a named file or folder cannot be one: a name too long, links in a circle, a file where a folder should be or the reverse."""
    return isinstance(problem, OSError) and problem.filename is not None and problem.errno in (
        errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


POINTER = b"version https://git-lfs.github.com/spec/"
PULL = "run `git lfs pull` in the folder that it was cloned into"


def is_pointer(start: bytes) -> bool:
    """Whether a file that begins so is a pointer that git LFS left in the place of the file itself."""
    return start.startswith(POINTER)


def check_pulled(path: Path) -> None:
    """Raises UserError if a file that cannot be read is a git LFS pointer, or a folder holds some."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    found = [file for file in files if file.is_file() and file.stat().st_size < 1024 and is_pointer(file.read_bytes())]
    if found:
        more = f" (as {len(found) - 1} more beside it are)" if len(found) > 1 else ""
        raise UserError(f"{found[0]} is a git LFS pointer{more}, not the file itself: {PULL}")
