"""The files that an import may read: below a folder here, in a zip, or in a data set of the hub at one commit.

Whatever is met is either opened by what reads rows, or told of at the end: see `Tree.left`. Names are relative to the root, with slashes.
"""

import io
import os
import posixpath
import re
import shutil
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Refused
from fashiondpo_pipeline.formats.kinds import ARCHIVES, FIRST, PICTURES, kind_of
from fashiondpo_pipeline.pairsets import Numbers

OURS = ("lineage.json", "dropped.jsonl")  # beside what we exported; they hold no rows
MOST_PACKED = 4 << 30  # bytes of a table in a zip, which is unpacked to be read
CARDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what `datasets` says of a set: no rows
_HUB = re.compile(r"hf:/{1,2}(?:datasets/)?(?P<set>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]*))?(?:/(?P<below>.*))?")
_ZIP_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError)


class Tree(ABC):
    """Files by their names. root: what it is called, for people. named: the one file that was asked for, or None for all."""

    root: str
    named: str | None = None

    def __init__(self) -> None:
        self._met = Numbers()

    @abstractmethod
    def walk(self) -> Iterator[tuple[str, Refused | None]]:
        """Each thing that is met, in order, with why it cannot be read, if it cannot."""

    @abstractmethod
    def spelt(self, name: str, below: str) -> str:
        """The file that a row calls `name`, seen from the folder `below`. Raises Refused where it is not there, or not inside."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes."""

    @abstractmethod
    def _open(self, name: str) -> BinaryIO: ...

    def names(self, *endings: str) -> list[str]:
        """The files that can be read, or those with such endings, in capitals or not; the one that was named, whatever its ending."""
        if self.named:
            return [self.named]
        files = (name for name, problem in self.walk() if problem is None)
        return [name for name in files if not endings or name.lower().endswith(endings)]

    def has(self, name: str) -> bool:
        """Whether a file is there and can be read."""
        try:
            return self.spelt(name, "") == name
        except Refused:
            return False

    def find(self, name: Any, below: str = "") -> str:
        """The file that a row names, seen from the folder `below`: as it is spelt, else with slashes for a Windows path's backslashes.

        Raises Refused for what is no name, leads to nothing, or leads out by whatever way: `..`, links, drive letters, absolute paths.
        """
        if not isinstance(name, str) or not name:
            raise Refused("there is no file name", repr(name)[:80])
        try:
            return self.spelt(name, below)
        except Refused as problem:
            if "\\" not in name or problem.reason != "the file is not there":
                raise
            return self.spelt(name.replace("\\", "/"), below)

    def open(self, name: str) -> BinaryIO:
        """A file to be read, at any place of it; from now on it is spoken for."""
        self.meet(name)
        return self._open(name)

    def read(self, name: str, most: int) -> bytes:
        """A whole file. Raises Refused if it has more than `most` bytes."""
        self.meet(name)
        if self.size(name) > most:
            raise Refused(f"the file is larger than {most >> 20} MiB", name)
        with self._open(name) as file:
            return file.read(most + 1)

    def peek(self, name: str, count: int = FIRST) -> bytes:
        """The first bytes of a file, which is not spoken for by that; none where it cannot be read."""
        try:
            with self._open(name) as file:
                return file.read(count)
        except (OSError, Refused):
            return b""

    def meet(self, name: str) -> None:
        """Say that a file was read, or that its row is told of."""
        self._met.put([("", name.encode(errors="surrogateescape"), 1)])

    def left(self) -> Iterator[tuple[str, Refused]]:
        """What was met and nobody spoke for, with the reason."""
        if self.named:
            return
        for name, problem in self.walk():
            if name not in OURS and not self._met.find("", name.encode(errors="surrogateescape")):
                yield name, problem or Refused(_reason(name, self.peek(name)))


def _reason(name: str, first: bytes) -> str:
    """Why a file gave nothing."""
    kind = kind_of(name, first)
    if kind in ARCHIVES:
        return f"the file is {kind}: import it by itself"
    return "no row that was taken names the picture" if kind in PICTURES else "the file holds no rows of the format"


def at(path: Path | str) -> Tree:
    """The files at a path, or at hf://OWNER/NAME@COMMIT. Raises UserError if there is nothing."""
    if str(path).startswith("hf:/"):
        return Hub(str(path))
    path = Path(path)
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = False
    if not there:
        raise UserError(f"there is no {path}: check the path")
    if path.is_file() and zipfile.is_zipfile(path) and path.suffix.lower() != ".xlsx":
        return Zipped(path)
    return Local(path)


class Local(Tree):
    """A folder, or one file and what lies beside it. Links are followed where they stay inside, or lead to the hub's own store of blobs."""

    def __init__(self, path: Path):
        super().__init__()
        self.root, self.folder = str(path), Path(os.path.abspath(path if path.is_dir() else path.parent))
        self.named = None if path.is_dir() else path.name
        self._real = self.folder.resolve()

    def walk(self) -> Iterator[tuple[str, Refused | None]]:
        yield from self._below("")

    def _below(self, start: str) -> Iterator[tuple[str, Refused | None]]:
        waiting = [start]
        while waiting:
            name = waiting.pop()
            path = self.folder / name
            if path.is_dir() and not (name and path.is_symlink()):
                try:
                    inside = sorted(os.listdir(path), reverse=True)
                except OSError as problem:
                    yield name or ".", Refused("the folder cannot be read", problem.strerror or "")
                    continue
                waiting += [f"{name}/{one}" if name else one for one in inside]
            else:
                yield name, self._problem(path)

    def _problem(self, path: Path) -> Refused | None:
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as problem:
            return Refused("the link leads to nothing", str(problem)[:200])
        if not self._holds(real):
            return Refused("the link leads out of the folder", str(real))
        if real.is_dir():
            return Refused("the link leads to a folder, and is not followed", str(real))
        if not real.is_file():
            return Refused("it is no regular file")
        return None if os.access(real, os.R_OK) else Refused("the file may not be read")

    def _holds(self, real: Path) -> bool:
        """Whether a real path lies in the folder, or in the store that the folder's snapshot of the hub links to."""
        store = real.parent
        return real.is_relative_to(self._real) or (store.name == "blobs" and self._real.is_relative_to(store.parent))

    def spelt(self, name: str, below: str) -> str:
        try:
            path = Path(name) if Path(name).is_absolute() else self.folder / below / name
            if (PureWindowsPath(name).anchor and not Path(name).is_absolute()) or not self._holds(real := path.resolve()):
                raise Refused("the path leads out of its folder", name)
            if not real.is_file():
                raise Refused("the file is not there", name)
            if not os.access(real, os.R_OK):
                raise Refused("the file may not be read", name)
        except (OSError, ValueError, RuntimeError) as problem:  # a name that no file can have
            raise Refused("the file is not there", f"{name[:80]!r}: {problem}") from None
        path = Path(os.path.normpath(path))
        for folder in (self.folder, self._real):
            if path.is_relative_to(folder):
                return path.relative_to(folder).as_posix()
        if real.is_relative_to(self._real):
            return real.relative_to(self._real).as_posix()
        raise Refused("the path leads out of its folder", name)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def _open(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")


class Listed(Tree):
    """Files of which there is a list: name -> bytes, or why it cannot be read."""

    def __init__(self, files: dict[str, int | Refused]):
        super().__init__()
        self.files = files

    def walk(self) -> Iterator[tuple[str, Refused | None]]:
        for name in sorted(self.files):
            size = self.files[name]
            yield name, size if isinstance(size, Refused) else None

    def spelt(self, name: str, below: str) -> str:
        path = posixpath.normpath(posixpath.join(below, name))
        if PureWindowsPath(name).anchor or path.startswith(("/", "../")) or path == "..":
            raise Refused("the path leads out of its folder", name)
        if isinstance(problem := self.files.get(path), Refused):
            raise problem
        if path not in self.files:
            raise Refused("the file is not there", name)
        return path

    def size(self, name: str) -> int:
        size = self.files[name]
        return 0 if isinstance(size, Refused) else size


class Zipped(Listed):
    """The files in a zip; nothing is unpacked but a table while it is read."""

    def __init__(self, path: Path):
        self.root = str(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except _ZIP_BROKEN as problem:
            raise UserError(f"{path}: the zip is broken ({problem}): copy it again") from problem
        self._infos: dict[str, zipfile.ZipInfo] = {}
        files: dict[str, int | Refused] = {}
        for info in self._zip.infolist():
            if not info.filename.endswith("/"):
                if self._infos.setdefault(info.filename, info) is info:
                    files[info.filename] = _packed(info)
                else:
                    files[f"{info.filename} once more"] = Refused("the zip has two files of one name", info.filename)
        super().__init__(files)

    def _open(self, name: str) -> BinaryIO:
        def told(problem: Exception) -> Refused:
            return Refused("the file in the zip is broken", f"{name}: {str(problem)[:200]}")

        try:
            return io.BufferedReader(_Guarded(self._zip.open(self._infos[name]), _ZIP_BROKEN, told))
        except _ZIP_BROKEN as problem:
            raise told(problem) from problem

    def unpacked(self, name: str) -> BinaryIO:
        """A file whose places are all reached alike, which those of a zip are not. It is gone when it is closed."""
        if self.size(name) > MOST_PACKED:
            raise Refused(f"the table in the zip is larger than {MOST_PACKED >> 30} GiB: unpack the zip", name)
        file: Any = tempfile.TemporaryFile()  # noqa: SIM115  (it is the caller's to close)
        with self.open(name) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
        file.seek(0)
        return file


class _Guarded(io.RawIOBase):
    """A file whose problems are all told in one way. told: what is raised for them."""

    def __init__(self, file: Any, problems: tuple[type[Exception], ...], told: Callable[[Exception], Exception]):
        super().__init__()
        self._file, self._problems, self._told = file, problems, told

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._safely(self._file.read, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, place: int, whence: int = 0) -> int:
        return self._safely(self._file.seek, place, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _safely(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._problems as problem:
            raise self._told(problem) from problem


def _packed(info: zipfile.ZipInfo) -> int | Refused:
    if PureWindowsPath(info.filename).anchor or ".." in PurePosixPath(info.filename).parts:
        return Refused("the path leads out of its folder", info.filename)
    return Refused("the file is encrypted") if info.flag_bits & 1 else info.file_size


class Hub(Listed):
    """The files of a data set of the hub at one commit, of which only what is asked for is fetched."""

    def __init__(self, url: str):
        found = _HUB.fullmatch(url)
        if not found:
            raise UserError(f"{url}: a data set of the hub is named hf://OWNER/NAME@COMMIT")
        if not re.fullmatch(r"[0-9a-f]{40}", found["commit"] or ""):
            raise UserError(f"{url}: name the whole commit, 40 digits and letters a to f, as hf://{found['set']}@COMMIT: a branch or a tag may "
                            "mean other files tomorrow; the set's page on the hub has it under 'History'")
        self.root = url
        self.base = f"datasets/{found['set']}@{found['commit']}"
        below = posixpath.normpath(found["below"] or "").strip("./")
        super().__init__(self._list(below))

    def _list(self, below: str) -> dict[str, int | Refused]:
        from huggingface_hub import HfFileSystem  # here, as it takes long to import

        self._system: Any = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), skip_instance_cache=True)
        place = f"{self.base}/{below}" if below else self.base
        try:
            found: Any = self._system.find(place, detail=True)
            size = self._system.info(place)["size"] if list(found) == [place] else 0
        except _hub_problems() as problem:
            raise unreachable(self.root, problem) from problem
        if not found:
            raise UserError(f"{self.root}: there are no files in it: check the name, the commit, and whether you may read it (`hf auth login`)")
        if list(found) == [place]:
            folder, self.named = posixpath.split(below)
            self.base = f"{self.base}/{folder}" if folder else self.base
            return {self.named: size}
        self.base = place
        return {name.removeprefix(f"{place}/"): info["size"] for name, info in found.items()}

    def spelt(self, name: str, below: str) -> str:
        if self.named and name not in self.files:  # beside the file that was named: not listed
            path = posixpath.normpath(posixpath.join(below, name))
            if PureWindowsPath(name).anchor or path.startswith(("/", "..")):
                raise Refused("the path leads out of its folder", name)
            try:
                self.files[path] = self._system.info(f"{self.base}/{path}")["size"]
            except FileNotFoundError:
                raise Refused("the file is not there", name) from None
            except _hub_problems() as problem:
                raise unreachable(self.root, problem) from problem
        return super().spelt(name, below)

    def _open(self, name: str) -> BinaryIO:
        """Where the network fails the import ends, as rows behind it are neither read nor broken."""
        try:
            file = self._system.open(f"{self.base}/{name}", "rb", block_size=1 << 20, cache_type="readahead")
        except _hub_problems() as problem:
            raise unreachable(self.root, problem) from problem
        return io.BufferedReader(_Guarded(file, _hub_problems(), partial(unreachable, self.root)))


def _hub_problems() -> tuple[type[Exception], ...]:
    """What the hub's client raises for names, rights and networks."""
    import httpx2
    from huggingface_hub.errors import HfUriError

    return OSError, ValueError, HfUriError, httpx2.HTTPError


def unreachable(root: str, problem: BaseException) -> UserError:
    """What to do where the hub does not answer, or not with files."""
    if isinstance(problem, UserError):
        return problem
    said = re.sub(r"\s+", " ", str(problem)).strip()[:200] or type(problem).__name__
    return UserError(f"{root}: the hub gives no files ({said}): check the name, the commit, the network and whether you may read it "
                     "(`hf auth login`); offline, `hf download --repo-type dataset` it where there is a network, and import the folder")
