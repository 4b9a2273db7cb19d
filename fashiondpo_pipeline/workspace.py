"""Resumability, once: folders named by what they claim to hold, shards whole or absent, the manifest written last.

A step of many shards also keeps its narrow tables in `whole/`, one file each, for who reads all of them: opening a thousand files
takes longer than reading a million rows. It is made of the shards when the step ends, listed in the manifest, and never the only copy.

What is read is what was written: receipts and manifests carry every file's hash and one of themselves, and a file is hashed before it is
read, once as long as it stays as it is (see remembered.py).
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.identity import canonical, fingerprint, fingerprint_of_text, hash_file
from fashiondpo_pipeline.remembered import hash_within

# Tensor columns do not compress (fp16 noise): storing them plain is faster both ways.
_PLAIN = {"x_t.list.element", "x_prev.list.element", "x_0", "prediction.list.element", "tokens", "pooled", "picture.bytes", "embedding.list.element"}


WHOLE: dict[str, set[str]] = {"candidates": {"picture"}, "scores": set()}  # what `whole/` keeps -> the columns it leaves out
MANY = 64  # shards from which on that is worth it
AT_ONCE = 1_024  # shards in memory while it is made
ROWS = 1 << 17  # in a row group: what is read to show a few rows
PIECE = 1 << 19  # rows that are read before they are worked on, where a whole table would not fit
SMALL = 1 << 22  # bytes: such a file is read at once, which takes less than mapping it
MEND = "`fdpo status --verify --repair` names and re-makes it"
# What receipts and manifests of earlier versions hold, which have no hash of themselves.
ADDED = {"expert", "tower", "pairs", "identity", "settings"}  # of single stages
UNSEALED = ({"files", "seconds"}, {"claim", "inputs", "numbers", "files", "seconds", "versions", "git"})


@dataclass(frozen=True)
class Step:
    """One piece of work of a run: what it claims to be, and what it reads. Its folder is named by both."""

    stage: str  # module in stages/
    name: str  # folder's name before the fingerprint
    round: int
    version: int  # of the stage's meaning, bumped by hand
    config: dict  # knobs that change the result
    inputs: dict[str, "Step"] = field(default_factory=dict)  # role -> step whose tables it reads
    files: dict[str, str] = field(default_factory=dict)  # what else it reads -> its hash
    args: dict[str, Any] = field(default_factory=dict, compare=False)  # how to reach those things; never in the claim
    implied: bool = False  # whoever reads it claims all that it is made of already, so its own fingerprint is not in theirs

    @cached_property
    def _text(self) -> str:
        inputs = {role: step.fingerprint for role, step in self.inputs.items() if not step.implied}
        own = {"stage": self.stage, "version": self.version, "config": self.config, "files": self.files, "inputs": inputs}
        return canonical(own)

    @cached_property
    def claim(self) -> dict:
        return json.loads(self._text)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_of_text(self._text)

    @cached_property
    def folder(self) -> str:
        return f"round-{self.round:02d}/{self.name}-{self.fingerprint}"


class Run:
    """The folder of one run, `runs/NAME`; one process at a time may write in it."""

    def __init__(self, root: Path):
        """Raises UserError where something that is no folder lies at `root`."""
        self.root = root
        if root.is_symlink() and not root.exists():
            raise UserError(f"{root} is a link to {os.readlink(root)}, where nothing is: bring back what it names, or take the link away")
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file, where a run's folder should be: move it away, or use another --name")
        if root.parent.exists() and not root.parent.is_dir():
            raise UserError(f"{root.parent} is a file, where the folder of runs should be: move it away")

    def output(self, step: Step) -> "Output":
        return Output(self.root / step.folder, step.claim, {role: self.root / s.folder for role, s in step.inputs.items()})

    def done(self, step: Step) -> bool:
        return (self.root / step.folder / "manifest.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. Raises UserError at once if another process has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        owner = self.root / "run.owner"
        lock = FileLock(self.root / "run.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = owner.read_text() if owner.is_file() else "another process"
            raise UserError(f"{self.root} is in use by {who}: wait until it ends, or use another --name") from None
        try:
            owner.write_text(f"process {os.getpid()}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


class Output:
    """One step's folder: `parts/` holds shards with a receipt each, `work/` survives a crash, `manifest.json` comes last."""

    def __init__(self, folder: Path, claim: dict, inputs: dict[str, Path]):
        self.folder, self.claim, self.inputs = folder, claim, inputs
        self.parts, self.whole, self.work = folder / "parts", folder / "whole", folder / "work"
        self.started, self.earlier = time.monotonic(), 0.0

    def open(self) -> None:
        """Make the folders, clear what a killed writer left half done, and remember how long the shards that are there took."""
        self.parts.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        for leftover in self.folder.rglob("*.tmp"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.clear_half()
        write_json(self.folder / "claim.json", self.claim)
        self.earlier = sum(receipt["seconds"] for receipt in self._receipts())

    def clear_half(self) -> None:
        """Take away tables whose shard has no receipt: a writer, or who dropped it, was killed before its end."""
        if not self.done and self.parts.is_dir():
            for path in self.parts.glob("*.parquet"):
                shard = self._place(path.name)[1]
                if isinstance(shard, int) and not self.has(shard):
                    path.unlink()

    # -- shards

    def has(self, shard: int) -> bool:
        """Whether a shard is on disk, whole."""
        return self._receipt(shard).is_file()

    def write(self, shard: int, seconds: float = 0.0, **tables: pa.Table) -> None:
        """Put one shard's tables on disk; its receipt comes last, so a shard is whole or absent."""
        files = {}
        for name, table in tables.items():
            path = self.parts / f"{name}-{shard:05d}.parquet"
            write_parquet(path, table)
            files[path.name] = {"rows": table.num_rows, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        write_sealed(self._receipt(shard), {"files": files, "seconds": round(seconds, 3)})

    def drop(self, shard: int | None = None) -> None:
        """Forget one shard (None: only what was gathered of them), so that the next run makes it again; the step is no longer done."""
        self.work.mkdir(exist_ok=True)  # begun again
        (self.folder / "manifest.json").unlink(missing_ok=True)
        if self.whole.is_dir():
            shutil.rmtree(self.whole)
        if shard is None:
            return
        self._receipt(shard).unlink(missing_ok=True)
        for path in self.parts.glob(f"*-{shard:05d}.parquet"):
            path.unlink()

    def publish(self, name: str, draft: Path) -> None:
        """Rename a finished folder or file in `work/` into place."""
        target = self.folder / name
        if target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        os.replace(draft, target)

    def finish(self, numbers: dict | None = None, about: dict | None = None) -> None:
        """Write the manifest: from now on, and not before, this step is done. about: what else is worth knowing of how it was made."""
        for name in WHOLE:
            self._gather(name)
        others = {
            path.relative_to(self.folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for top in sorted(self.folder.iterdir()) if top.name not in ("parts", "work")  # not rglob: parts may hold 20,000 files
            for path in ([top] if top.is_file() else sorted(top.rglob("*"))) if path.is_file()
        }
        seconds = round(time.monotonic() - self.started + self.earlier, 3)
        for left in self.work.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        write_sealed(
            self.folder / "manifest.json",
            {
                "claim": self.claim,
                "inputs": {role: path.parent.name + "/" + path.name for role, path in self.inputs.items()},
                "numbers": numbers or {},
                **(about or {}),
                "files": _listed(self._receipts()) | others,
                "seconds": seconds,
                "versions": versions(),
                "git": git_commit(),
            },
        )
        self.work.rmdir()  # last: a folder with neither this nor a manifest has lost its manifest

    def _gather(self, name: str) -> None:
        """Put a table's narrow columns into one file, if there are many shards of it."""
        shards = self.shards(name)
        if len(shards) < MANY:
            return
        schema = read_schema(self._part(name, shards[0]))
        columns = [column for column in schema.names if column not in WHOLE[name]]
        narrow = pa.schema([schema.field(column) for column in columns], schema.metadata)

        def write(draft: Path) -> None:
            with pq.ParquetWriter(draft, narrow, **_packing(narrow)) as writer:
                for start in range(0, len(shards), AT_ONCE):
                    some = [read_parquet(self._part(name, shard), columns) for shard in shards[start : start + AT_ONCE]]
                    writer.write_table(pa.concat_tables(some), row_group_size=ROWS)

        self.whole.mkdir(exist_ok=True)
        _put(self.whole / f"{name}.parquet", write)

    def verify(self) -> list[tuple[str, int | str | None]]:
        """(what is wrong, where) of each file that is missing, cut short, altered or not of this step, in a begun step too.

        Where is the number of a shard, "whole" for what was gathered of the shards, "claim" and "manifest" for those files alone, None
        for what only the whole step can make.
        """
        wrong: list[tuple[str, int | str | None]] = []
        receipts = self._sound_receipts(wrong)
        manifest = self._sound_manifest(wrong)
        if complaint := self._wrong_claim():
            wrong.append((complaint, "claim"))
        files = manifest["files"] if manifest else _listed(receipts.values())
        for name, info in files.items():
            path, where = self._place(name)
            if complaint := _wrong(path, info):
                wrong.append((complaint, where))
            elif isinstance(where, int) and not self._receipt(where).is_file():
                wrong.append((f"{self._receipt(where)}: missing", where))
        if manifest:
            strays = (path for path in self.parts.glob("*.parquet") if path.name not in files)
            wrong += [(f"{path}: no file of this step", self._place(path.name)[1]) for path in sorted(strays)]
        return wrong

    def _sound_receipts(self, wrong: list) -> dict[int, dict]:
        """Shard -> its receipt; what is wrong with others is noted."""
        found = {}
        for path in sorted(self.parts.glob("*.json")):
            try:
                found[int(path.stem)] = receipt = read_sealed(path)
                if not all(name.endswith(f"-{path.stem}.parquet") for name in receipt["files"]):
                    raise ValueError("it is that of another shard")
            except (UserError, ValueError):
                wrong.append((f"{path}: altered", int(path.stem) if path.stem.isdigit() else None))
        return found

    def _sound_manifest(self, wrong: list) -> dict | None:
        """The manifest, if there should be one and it is whole; otherwise that is noted, with what its loss takes along."""
        path = self.folder / "manifest.json"
        published = any(top.name not in ("parts", "whole", "work", "claim.json", "manifest.json") for top in self.folder.iterdir())
        try:
            if path.is_file():
                return read_sealed(path)
            if not self.work.is_dir():
                wrong.append((f"{path}: missing", None if published else "manifest"))
        except UserError:
            wrong.append((f"{path}: altered", None if published else "manifest"))
        return None

    def _wrong_claim(self) -> str | None:
        """What is wrong with claim.json, which names the folder."""
        path = self.folder / "claim.json"
        if not path.is_file():
            return f"{path}: missing"
        try:
            whole = self.folder.name.endswith(fingerprint(read_json(path))) and path.read_bytes().endswith(b"}\n")
        except (UserError, ValueError):
            whole = False
        return None if whole else f"{path}: altered"

    def _place(self, name: str) -> tuple[Path, int | str | None]:
        """(path, where, as `verify` has it) of a file by its name in a manifest."""
        if "/" in name or not name.endswith(".parquet"):
            return self.folder / name, "whole" if name.startswith("whole/") else "claim" if name == "claim.json" else None
        shard = Path(name).stem.rpartition("-")[2]
        return self.parts / name, int(shard) if shard.isdigit() else None

    def mend(self, where: int | str | None) -> None:
        """Drop what `verify` has found wrong, so that the next run makes it again."""
        if where is None:
            shutil.rmtree(self.folder)
        elif where == "claim":
            (self.folder / "claim.json").unlink(missing_ok=True)
            self.drop()  # whoever opens it writes its claim
        else:
            self.drop(where if isinstance(where, int) else None)

    def _receipts(self) -> list[dict]:
        return [read_sealed(path) for path in sorted(self.parts.glob("*.json"))]

    def _receipt(self, shard: int) -> Path:
        return self.parts / f"{shard:05d}.json"

    # -- reading

    @property
    def manifest(self) -> dict:
        """What is known of a done step. Raises UserError if it is not as it was written."""
        return read_sealed(self.folder / "manifest.json")

    @property
    def done(self) -> bool:
        """Whether the step has been finished."""
        return (self.folder / "manifest.json").is_file()

    def published(self, name: str) -> Path:
        """A folder that the step has published, such as its adapter. Raises UserError if a file in it is not as it was written."""
        for file in self.manifest["files"]:
            if file.startswith(f"{name}/"):
                self._check(self.folder / file)
        return self.folder / name

    def _check(self, path: Path) -> None:
        """Raises UserError if a file of this step is not as it was written."""
        place = path.name if path.parent == self.parts else path.relative_to(self.folder).as_posix()
        if self.done:
            info = self.manifest["files"].get(place, {"sha256": "none, as it is no file of this step"})
        elif isinstance(shard := self._place(place)[1], int) and self.has(shard):
            info = read_sealed(self._receipt(shard))["files"].get(place)
        else:
            info = None
        if not info:
            return
        with _naming(path):
            if hash_within(self.folder, path.relative_to(self.folder).as_posix(), hash_file) != info["sha256"]:
                raise OSError("it is not as it was written")

    def shards(self, table: str) -> list[int]:
        """Numbers of the shards that hold `table`: those of the manifest, in a begun step those on disk."""
        start, end = f"{table}-", ".parquet"
        names = list(self.manifest["files"]) if self.done else os.listdir(self.parts) if self.parts.is_dir() else []
        found = (name[len(start) : -len(end)] for name in names if name.startswith(start) and name.endswith(end))
        return sorted(int(number) for number in found if number.isdigit())

    def table(self, name: str, columns: list[str] | None = None, shard: int | None = None) -> pa.Table:
        """A table of this step, or one shard of it; only the named columns are read."""
        files = self._files(name, columns) if shard is None else [self._part(name, shard)]
        for file in files:
            self._check(file)
        return concatenated([read_parquet(file, columns) for file in files])

    def pieces(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """A table some PIECE rows at a time, for who need not have all of it in memory."""
        held: list[pa.Table] = []
        for path in self._files(name, columns):
            self._check(path)
            file = _open(path)
            for group in range(file.metadata.num_row_groups):
                with _naming(path):
                    held.append(file.read_row_group(group, columns))
                if sum(map(len, held)) >= PIECE:
                    yield concatenated(held)
                    held = []
        if held:
            yield concatenated(held)

    def rows(self, name: str, columns: list[str], numbers: np.ndarray) -> pa.Table:
        """Rows of a table by their numbers, in that order; files and row groups that hold none of them are not read."""
        files = self._files(name, columns)
        listed = self.manifest["files"] if len(files) > 1 else {}
        counts = [listed[file.name]["rows"] if file.name in listed else _open(file).metadata.num_rows for file in files]
        def read(at: int, some: np.ndarray) -> pa.Table:
            self._check(files[at])
            return _rows_of(files[at], columns, some)

        return _taken(counts, numbers, read)

    def count(self, name: str) -> int:
        """How many rows a table of a done step has."""
        rows = (info["rows"] for file, info in self.manifest["files"].items() if file.startswith(f"{name}-") and "rows" in info)
        return sum(rows)

    def columns(self, name: str) -> list[str]:
        """Names of a table's columns."""
        file = self._files(name, None)[0]
        self._check(file)
        return read_schema(file).names

    def _part(self, name: str, shard: int) -> Path:
        return self.parts / f"{name}-{shard:05d}.parquet"

    def _files(self, name: str, columns: list[str] | None) -> list[Path]:
        """The files that hold these columns of a whole table, in order."""
        whole, lacks = self.whole / f"{name}.parquet", WHOLE.get(name, set())
        asked = lacks if columns is None else lacks & set(columns)
        if not asked and whole.is_file() and (self.folder / "manifest.json").is_file():
            return [whole]
        shards = self.shards(name)
        if not shards:
            raise UserError(f"{self.folder}: no table '{name}'; run `fdpo status` to see what there is")
        return [self._part(name, shard) for shard in shards]

    def input(self, role: str) -> "Output":
        return Output(self.inputs[role], {}, {})


def _listed(receipts: Iterable[dict]) -> dict[str, dict]:
    return {name: info for receipt in receipts for name, info in receipt["files"].items()}


def _wrong(path: Path, info: dict) -> str | None:
    """What is wrong with a file, every byte of which is read."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != info["bytes"]:
        return f"{path}: {path.stat().st_size:,} bytes instead of {info['bytes']:,}"
    return None if hash_file(path) == info["sha256"] else f"{path}: altered"


def concatenated(tables: list[pa.Table]) -> pa.Table:
    """Tables one below the other; those of earlier versions take the types of the last."""
    schema = tables[-1].schema
    return pa.concat_tables([table if table.schema.equals(schema) else table.cast(schema) for table in tables])


def write_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is damaged ({problem}): delete it and run the same command again") from problem


def write_sealed(path: Path, value: dict) -> None:
    """JSON that carries a hash of itself, `sum`."""
    write_json(path, value | {"sum": _sum(json.loads(json.dumps(value)))})


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote, without its hash; of a step it must be the manifest of the claim that names the folder.

    Raises UserError if it is not as it was written.
    """
    stat = path.stat()
    return _sealed(path.absolute(), path, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=16)
def _sealed(place: Path, path: Path, stamp: tuple[int, ...]) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        if not isinstance(found, dict) or not text.endswith("}\n"):
            raise ValueError("it is not as it was written")
        whole = found.pop("sum") == _sum(found) if "sum" in found else found.keys() - ADDED in UNSEALED
        if not whole or not _lists_files(found):
            raise ValueError("it is not as it was written")
        if "claim" in found and not path.parent.name.endswith(fingerprint(found["claim"])):
            raise ValueError("it is that of another step")
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is damaged ({problem}); {MEND}") from problem
    return found


def _lists_files(found: dict) -> bool:
    """Whether each file that it names has a size and a hash, as no seal shows of what earlier versions wrote."""
    files = found.get("files", {})
    return isinstance(files, dict) and all(
        isinstance(info, dict) and isinstance(info.get("bytes"), int) and isinstance(info.get("sha256"), str) for info in files.values())


def agrees(found: dict) -> bool | None:
    """Whether what a JSON file holds agrees with the hash of itself that it carries; None where it carries none, as earlier versions did."""
    if "sum" in found:
        return found["sum"] == _sum({key: value for key, value in found.items() if key != "sum"})
    spoilt = any(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in found.values())  # a hash under another name
    return False if spoilt else None


def is_sealed(path: Path) -> bool:
    """Whether a whole JSON file carries a hash of itself: those of earlier versions do not."""
    return "sum" in read_json(path)


def _sum(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_parquet(path: Path, table: pa.Table) -> None:
    """Whole or not at all: temporary name, fsync, rename. Same table, same bytes."""
    _put(path, lambda draft: pq.write_table(table, draft, row_group_size=ROWS, **_packing(table.schema)))


def packed_size(table: pa.Table) -> int:
    """Bytes of the file that `write_parquet` would write."""
    pq.write_table(table, buffer := io.BytesIO(), row_group_size=ROWS, **_packing(table.schema))
    return buffer.tell()


def _packing(schema: pa.Schema) -> dict[str, Any]:
    """How each leaf column is packed."""
    packed = {leaf: "none" if leaf in _PLAIN else "zstd" for leaf in _leaves(schema)}
    few = [leaf for leaf in packed if leaf in ("group", "prompt", "reason")]
    return {"compression": packed, "use_dictionary": few, "write_statistics": False}


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    with _naming(path):
        return _open(path).read(columns=columns, use_threads=path.stat().st_size > SMALL)


def read_schema(path: Path) -> pa.Schema:
    with _naming(path):
        return _open(path).schema_arrow


def _open(path: Path) -> pq.ParquetFile:
    # not read_table, which builds a dataset round each file, nor a path, for which pyarrow looks up a file system each time:
    # a run has thousands of small shards
    with _naming(path):
        small = path.stat().st_size <= SMALL
        return pq.ParquetFile(pa.BufferReader(path.read_bytes()) if small else pa.memory_map(str(path)))


def _rows_of(path: Path, columns: list[str], numbers: np.ndarray) -> pa.Table:
    """Rows of one file by their numbers; row groups that hold none of them are not read."""
    file = _open(path)
    counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]

    def read(group: int, some: np.ndarray) -> pa.Table:
        with _naming(path):
            return file.read_row_group(group, columns).take(pa.array(some))

    return _taken(counts, numbers, read)


def _taken(counts: list[int], numbers: np.ndarray, read: Callable[[int, np.ndarray], pa.Table]) -> pa.Table:
    """Rows by their numbers out of pieces of `counts` rows; read(piece, numbers within it) is asked only where there are some."""
    ends = np.cumsum(counts)
    order = np.argsort(numbers, kind="stable")
    pieces = np.searchsorted(ends, numbers[order], side="right")
    found = [read(int(piece), numbers[order[pieces == piece]] - (ends[piece] - counts[piece])) for piece in np.unique(pieces)]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return concatenated(found or [read(0, numbers)]).take(pa.array(back))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What cannot be read is named with the way out."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as problem:  # names of columns are text too
        check_pulled(path)
        raise UserError(f"{path} cannot be read ({problem}); {MEND}") from problem


def replace_text(path: Path, text: str) -> None:
    _put(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    _put(path, lambda draft: draft.write_bytes(data))


_PAGE = re.compile(r"<!-- whole: ([0-9a-f]{64})(?: beside: ([0-9a-f]{64}))? -->\n")


def write_page(path: Path, text: str, beside: Path | None = None) -> None:
    """A page that ends with a hash of itself, and of a file beside it that belongs to it."""
    other = f" beside: {hash_file(beside)}" if beside else ""
    replace_text(path, f"{text}\n<!-- whole: {hashlib.sha256((text + other).encode()).hexdigest()}{other} -->\n")


def is_whole_page(path: Path) -> bool | None:
    """Whether a page is as `write_page` wrote it; None where nothing tells, as it is of an earlier version."""
    data = path.read_bytes().decode(errors="replace")
    start = data.rfind("\n<!-- whole: ")
    if start < 0:
        return None if data.endswith("</html>") or data.endswith("</html>\n") else False
    end = _PAGE.fullmatch(data[start + 1 :])
    other = f" beside: {end[2]}" if end and end[2] else ""
    return end is not None and hashlib.sha256((data[:start] + other).encode()).hexdigest() == end[1]


def hash_in_page(path: Path) -> str | None:
    """The hash of the file beside a page that is whole."""
    found = _PAGE.findall(path.read_text(encoding="utf-8")[-400:])
    return found[-1][1] if found else None


def write_hashed(path: Path, data: bytes) -> None:
    """Bytes behind their sha256, for a file that no receipt knows of: what survives a crash."""
    replace_bytes(path, hashlib.sha256(data).digest() + data)


def read_hashed(path: Path, say: Callable[[str], None]) -> bytes | None:
    """What `write_hashed` wrote; None where there is nothing, or where it is not as it was written: then it is set aside, and that is said."""
    try:
        held = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(held[32:]).digest() == held[:32]:
        return held[32:]
    aside = path.with_name(path.name + ".broken")
    with suppress(FileNotFoundError):  # another process was first
        os.replace(path, aside)
    say(f"{path} is not as it was written: it is set aside as {aside.name}, and what it kept is made anew")
    return None


def save_file(path: Path, save: Any) -> None:
    """Let `save(draft)` write a file, then rename it to `path`: whole or not at all."""
    _put(path, save)


def _put(path: Path, write: Any) -> None:
    draft = path.with_name(path.name + ".tmp")
    try:
        write(draft)
        as_umask_asks(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as problem:
        draft.unlink(missing_ok=True)  # a full disk must not stay full because of us
        if isinstance(problem, OSError):
            problem.filename = problem.filename or str(path)  # a write names no file, and which disk is full matters
        raise


def as_umask_asks(path: Path) -> None:
    """Give a file, or every one below a folder, the mode that the umask asks for: libraries make some for their owner alone."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        fresh = file.with_name(file.name + ".mode.tmp")
        fresh.touch()  # asking the process for its umask would change it for a moment, in every thread
        mode = fresh.stat().st_mode & 0o777
        fresh.unlink()
        if file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


class _NoPandas:
    """An import finder that has no pandas."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "pandas":
            raise ImportError(name)


def without_pandas() -> None:
    """Let pyarrow make its first array, at which it looks for pandas, without finding it: importing that takes as long as all else.

    Nobody else is kept from importing pandas, and pyarrow looks again once a table is to become a data frame.
    """
    if "pandas" in sys.modules:
        return
    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([])
    finally:
        sys.meta_path.remove(_NoPandas)


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of the leaf columns."""

    def below(name: str, kind: pa.DataType) -> list[str]:
        if pa.types.is_struct(kind):
            return [leaf for inner in kind for leaf in below(f"{name}.{inner.name}", inner.type)]
        if pa.types.is_list(kind):
            return below(f"{name}.list.element", kind.value_type)
        return [name]

    return [leaf for column in schema for leaf in below(column.name, column.type)]


@lru_cache
def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {}
    for package in ("fashiondpo_pipeline", "torch", "diffusers", "transformers", "peft", "open_clip_torch", "pyarrow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@lru_cache
def git_commit() -> str | None:
    """The commit of the checkout this package runs from; None in an installed wheel."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
