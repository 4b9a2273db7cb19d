"""Resumability, once: folders named by what they claim to hold, shards whole or absent, the manifest written last.

A step of many shards also keeps its narrow tables in `whole/`, one file each, for who reads all of them: opening a thousand files
takes longer than reading a million rows. It is made of the shards when the step ends, listed in the manifest, and never the only copy.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from fashiondpo_pipeline.identity import canonical, fingerprint, hash_file

# Tensor columns do not compress (fp16 noise): storing them plain is faster both ways.
_PLAIN = {"x_t.list.element", "x_prev.list.element", "x_0", "prediction.list.element", "tokens", "pooled", "picture.bytes", "embedding.list.element"}


WHOLE: dict[str, set[str]] = {"candidates": {"picture"}, "scores": set()}  # what `whole/` keeps -> the columns it leaves out
MANY = 64  # shards from which on that is worth it
AT_ONCE = 1_024  # shards in memory while it is made
ROWS = 1 << 17  # in a row group: what is read to show a few rows
PIECE = 1 << 19  # rows that are read before they are worked on, where a whole table would not fit
SMALL = 1 << 22  # bytes: such a file is read at once, which takes less than mapping it


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
    def claim(self) -> dict:
        inputs = {role: step.fingerprint for role, step in self.inputs.items() if not step.implied}
        own = {"stage": self.stage, "version": self.version, "config": self.config, "files": self.files, "inputs": inputs}
        return json.loads(canonical(own))

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.claim)

    @property
    def folder(self) -> str:
        return f"round-{self.round:02d}/{self.name}-{self.fingerprint}"


class Run:
    """The folder of one run, `runs/NAME`; one process at a time may write in it."""

    def __init__(self, root: Path):
        self.root = root

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
        write_json(self.folder / "claim.json", self.claim)
        self.earlier = sum(receipt["seconds"] for receipt in self._receipts())

    # -- shards

    def has(self, shard: int) -> bool:
        """Whether a shard is on disk, whole."""
        return (self.parts / f"{shard:05d}.json").is_file()

    def write(self, shard: int, seconds: float = 0.0, **tables: pa.Table) -> None:
        """Put one shard's tables on disk; its receipt comes last, so a shard is whole or absent."""
        files = {}
        for name, table in tables.items():
            path = self.parts / f"{name}-{shard:05d}.parquet"
            write_parquet(path, table)
            files[path.name] = {"rows": table.num_rows, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        write_json(self.parts / f"{shard:05d}.json", {"files": files, "seconds": round(seconds, 3)})

    def drop(self, shard: int | None = None) -> None:
        """Forget one shard (None: only what was gathered of them), so that the next run makes it again; the step is no longer done."""
        (self.folder / "manifest.json").unlink(missing_ok=True)
        if self.whole.is_dir():
            shutil.rmtree(self.whole)
        if shard is None:
            return
        (self.parts / f"{shard:05d}.json").unlink(missing_ok=True)
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
        shutil.rmtree(self.work)
        write_json(
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
        """(what is wrong, where) of each file that is missing, cut short or altered since it was written, in a begun step too.

        Where is the number of a shard, "whole" for what was gathered of the shards, None for what only the whole step can make.
        """
        done = (self.folder / "manifest.json").is_file()
        wrong = []
        for name, info in (self.manifest["files"] if done else _listed(self._receipts())).items():
            part = self.parts / name
            shard = int(part.stem.rpartition("-")[2]) if "/" not in name and name.endswith(".parquet") else None
            path = part if shard is not None else self.folder / name
            where = "whole" if name.startswith("whole/") else shard
            if not path.is_file():
                wrong.append((f"{path}: missing", where))
            elif path.stat().st_size != info["bytes"]:
                wrong.append((f"{path}: {path.stat().st_size:,} bytes instead of {info['bytes']:,}", where))
            elif hash_file(path) != info["sha256"]:
                wrong.append((f"{path}: altered", where))
        return wrong

    def _receipts(self) -> list[dict]:
        return [read_json(path) for path in sorted(self.parts.glob("*.json"))]

    # -- reading

    @property
    def manifest(self) -> dict:
        return read_json(self.folder / "manifest.json")

    def shards(self, table: str) -> list[int]:
        """Numbers of the shards on disk that hold `table`."""
        start, end = f"{table}-", ".parquet"
        names = os.listdir(self.parts) if self.parts.is_dir() else []
        found = (name[len(start) : -len(end)] for name in names if name.startswith(start) and name.endswith(end))
        return sorted(int(number) for number in found if number.isdigit())

    def table(self, name: str, columns: list[str] | None = None, shard: int | None = None) -> pa.Table:
        """A table of this step, or one shard of it; only the named columns are read."""
        files = self._files(name, columns) if shard is None else [self._part(name, shard)]
        return pa.concat_tables([read_parquet(file, columns) for file in files])

    def pieces(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """A table some PIECE rows at a time, for who need not have all of it in memory."""
        held: list[pa.Table] = []
        for path in self._files(name, columns):
            file = _open(path)
            for group in range(file.metadata.num_row_groups):
                with _naming(path):
                    held.append(file.read_row_group(group, columns))
                if sum(map(len, held)) >= PIECE:
                    yield pa.concat_tables(held)
                    held = []
        if held:
            yield pa.concat_tables(held)

    def rows(self, name: str, columns: list[str], numbers: np.ndarray) -> pa.Table:
        """Rows of a table by their numbers, in that order; files and row groups that hold none of them are not read."""
        files = self._files(name, columns)
        listed = self.manifest["files"] if len(files) > 1 else {}
        counts = [listed[file.name]["rows"] if file.name in listed else _open(file).metadata.num_rows for file in files]
        return _taken(counts, numbers, lambda at, some: _rows_of(files[at], columns, some))

    def count(self, name: str) -> int:
        """How many rows a table of a done step has."""
        rows = (info["rows"] for file, info in self.manifest["files"].items() if file.startswith(f"{name}-") and "rows" in info)
        return sum(rows)

    def columns(self, name: str) -> list[str]:
        """Names of a table's columns."""
        return read_schema(self._files(name, None)[0]).names

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


def _listed(receipts: list[dict]) -> dict[str, dict]:
    return {name: info for receipt in receipts for name, info in receipt["files"].items()}


def write_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is damaged ({problem}): delete it and run the same command again") from problem


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
    return pa.concat_tables(found or [read(0, numbers)]).take(pa.array(back))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What cannot be read is named with the way out."""
    try:
        yield
    except (OSError, pa.ArrowException) as problem:
        check_pulled(path)
        raise UserError(f"{path} cannot be read ({problem}); `fdpo status --verify --repair` names and re-makes it") from problem


def replace_text(path: Path, text: str) -> None:
    _put(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    _put(path, lambda draft: draft.write_bytes(data))


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
