"""Rows of tables in whatever file they come: Parquet, Arrow, JSON lines, JSON lists, CSV with any separator, XLSX, WebDataset tar.

What a file is, its first bytes say, not its ending. Each reader yields (where, make), a little in memory at once: `make()` gives the row
or raises `Refused`; what cannot be read of a file is a loss with the count of its rows, where that can be known.
"""

import csv
import gzip
import io
import json
import mmap
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import Reading, Refused, meaning
from fashiondpo_pipeline.formats.files import MOST_BYTES, unguarded
from fashiondpo_pipeline.formats.kinds import ARROW, CSV, FIRST, JSON, LINES, PARQUET, TAR, WRONG, XLSX, kind_of
from fashiondpo_pipeline.formats.trees import Hub, Tree, Zipped

TABLES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".xlsx", ".tar", ".tar.gz", ".tgz")
MOST_LINE = 16 << 20  # bytes of one line, or of one object of a JSON list
MOST_JSON = 256 << 20  # bytes of a JSON file that is no list, which is held whole
MOST_SHEET = 1 << 30  # bytes of a spreadsheet, unpacked
PIECE = 1 << 20  # letters of a JSON list that are read at once
BATCH = 4 << 20  # bytes of a Parquet file's rows that are decoded at once
Row = tuple[str, Callable[[], dict]]

_BROKEN = (OSError, ValueError, ArithmeticError, MemoryError, pa.ArrowException, Refused)  # what pyarrow says of damaged files
_UNREADABLE = (ValueError, ArithmeticError, TypeError, RecursionError, MemoryError, pa.ArrowException)  # of a cell that Python cannot hold
_UNPACK = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, ArithmeticError, Refused)
_NUMERIC = {"label", "preference", "gap", *meaning.RANKS, *meaning.NUMBERS, *(name for pair in meaning.VOTES for name in pair)}
_NUMERIC_ROLES = ("label", "votes_first", "votes_second", "rank", "gap")


def rows_of(tree: Tree, name: str, reading: Reading, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """(where, make) of each row of a table; of tables in columns only the `wanted` ones are read. A table without rows is a loss, too."""
    tree.meet(name)
    empty = True
    for row in _rows(tree, name, reading, wanted):
        empty = False
        yield row
    if empty:
        yield name, partial(_refuse, "there is no row in the file", name)


def _rows(tree: Tree, name: str, reading: Reading, wanted: Callable[[str], bool]) -> Iterator[Row]:
    kind = kind_of(name, tree.peek(name))
    if kind is PARQUET:
        return _parquet(tree, name, wanted)
    if kind is ARROW:
        return _arrow(tree, name, wanted)
    if kind is CSV:
        return csv_rows(tree, name, reading)
    if kind is XLSX:
        return xlsx_rows(tree, name, reading)
    plain = {LINES: json_lines, JSON: json_list, TAR: tar_rows}
    if kind in plain:
        return plain[kind](tree, name)
    said = f"the file is {kind}, and no table: {WRONG.get(kind, 'make a table of it, such as CSV')}"
    return iter([(name, partial(_refuse, said, name))])


def schema_of(tree: Tree, name: str) -> pa.Schema:
    """The schema of a Parquet or Arrow file; without columns where it is none, or broken."""
    kind = kind_of(name, tree.peek(name))
    try:
        if kind is PARQUET:
            with pq.ParquetFile(_Source(tree, name).file, pre_buffer=False) as file:
                return _named(file.schema_arrow)
        if kind is ARROW:
            return _named(_opened(_Source(tree, name).file, tree.peek(name)).schema)
    except _BROKEN:
        pass  # the rows' reader says what is wrong with it
    return pa.schema([])


def _named(schema: pa.Schema) -> pa.Schema:
    """The schema. Raises UnicodeDecodeError where a column's name is not UTF-8: pyarrow says so only when it is asked for the names."""
    return schema if schema.names else pa.schema([])


def _refuse(reason: str, detail: object = "", count: int = 1) -> Any:
    raise Refused(reason, detail, count)


# -- Parquet and Arrow


class _Source:
    """A file for pyarrow. A local one is mapped into memory, not read: a page of a Parquet file may be as large as its row group."""

    def __init__(self, tree: Tree, name: str):
        self._map: mmap.mmap | None = None
        self.file: Any
        if isinstance(tree, Hub):
            self.file = pa.PythonFile(tree.open(name), "r")
            return
        with (tree.unpacked(name) if isinstance(tree, Zipped) else tree.open(name)) as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.file = pa.BufferReader(pa.py_buffer(self._map))

    def forget(self) -> None:
        """Give back the memory of what was read; what is asked for again comes from the file."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        pa.default_memory_pool().release_unused()  # a decoder asks for as much as a whole page and uses little of it


def _parquet(tree: Tree, name: str, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Row groups by themselves: behind a broken one the next is read."""
    before = 0
    try:
        source = _Source(tree, name)
        file = pq.ParquetFile(source.file, buffer_size=1 << 20 if isinstance(tree, Hub) else 0, pre_buffer=False)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        columns = [column for column in file.schema_arrow.names if wanted(column)]
    except _BROKEN as problem:
        yield name, partial(_refuse, "the Parquet file is broken", f"all its rows: {_gist(problem)}")
        return
    if not columns:
        total = max(file.metadata.num_rows, 1)
        yield name, partial(_refuse, "the Parquet file has none of the format's columns", ", ".join(file.schema_arrow.names)[:200], total)
        return
    for number, group in enumerate(groups):
        done = 0
        try:
            at_once = max(1, min(64, BATCH * group.num_rows // max(group.total_byte_size, 1)))
            for batch in file.iter_batches(at_once, row_groups=[number], columns=columns, use_threads=False):
                for row in range(batch.num_rows):
                    done += 1
                    yield f"{name}, row {before + done}", partial(_row, batch, row)
                source.forget()
        except _BROKEN as problem:
            lost = max(group.num_rows - done, 1)
            yield name, partial(_refuse, "the Parquet file is broken", f"{lost:,} of its {file.metadata.num_rows:,} rows, in row group "
                                                                       f"{number + 1} of {len(groups)}: {_gist(problem)}", lost)
        before += group.num_rows


def _arrow(tree: Tree, name: str, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """As `datasets` saves to disk: a stream of batches, or a file of them, where behind a broken one the next is read."""
    number = 0
    try:
        source = _Source(tree, name)
        opened = _opened(source.file, tree.peek(name))
        columns = [column for column in opened.schema.names if wanted(column)]
    except _BROKEN as problem:
        yield name, partial(_refuse, "the Arrow file is broken", f"all its rows: {_gist(problem)}")
        return
    for batch in _batches(opened):
        if isinstance(batch, Exception):
            yield name, partial(_refuse, "the Arrow file is broken", f"from row {number + 1} on: {_gist(batch)}")
            continue
        if not columns:
            yield name, partial(_refuse, "the Arrow file has none of the format's columns", ", ".join(opened.schema.names)[:200], batch.num_rows)
            continue
        batch = batch.select(columns)
        for row in range(batch.num_rows):
            number += 1
            yield f"{name}, row {number}", partial(_row, batch, row)
        source.forget()


def _opened(file: Any, first: bytes) -> Any:
    return pa.ipc.open_file(file) if first.startswith(b"ARROW1") else pa.ipc.open_stream(file)


def _batches(opened: Any) -> Iterator[pa.RecordBatch | Exception]:
    """Each batch whose offsets lead nowhere outside it, or what is wrong with it; a stream ends with its first broken one."""
    count = getattr(opened, "num_record_batches", None)
    number = 0
    while count is None or number < count:
        try:
            batch = opened.read_next_batch() if count is None else opened.get_batch(number)
            batch.validate(full=True)
        except StopIteration:
            return
        except _BROKEN as problem:
            yield problem
            if count is None:
                return
        else:
            yield batch
        number += 1


def _row(batch: pa.RecordBatch, row: int) -> dict:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except _UNREADABLE:
        pass
    found = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            found[name] = column[row].as_py()
        except _UNREADABLE as problem:
            raise Refused(f"the cell {name} cannot be read", _gist(problem)) from None
    return found


def _gist(problem: BaseException) -> str:
    return re.sub(r"\s+", " ", str(problem)).strip()[:200] or type(problem).__name__


# -- JSON


def json_lines(tree: Tree, name: str) -> Iterator[Row]:
    """(where, make) of each line that is not blank; `make()` gives the object in it."""
    number = 0
    try:
        with tree.open(name) as file:
            while line := file.readline(MOST_LINE + 1):
                number += 1
                whole = line
                while len(line) > MOST_LINE and not line.endswith(b"\n"):
                    line = file.readline(MOST_LINE + 1)
                if whole.strip():
                    yield f"{name}, line {number}", partial(_json_object, whole)
    except (OSError, Refused) as problem:
        yield name, partial(_refuse, "the file cannot be read to its end", f"from line {number + 1} on: {_gist(problem)}")


def _json_object(line: bytes) -> dict:
    if len(line) > MOST_LINE:
        raise Refused(f"the line is longer than {MOST_LINE >> 20} MiB")
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:
        raise Refused("the line is not JSON", str(problem)[:80]) from None
    return _object(found, "line")


def _object(found: Any, what: str) -> dict:
    if not isinstance(found, dict):
        raise Refused(f"the {what} is not an object", repr(found)[:80])
    return found


def json_list(tree: Tree, name: str) -> Iterator[Row]:
    """The items of a list, one in memory at a time; or of the one list that an object holds; or an object a line; or the object itself."""
    first = tree.peek(name, MOST_LINE).decode("utf-8-sig", errors="replace").lstrip()
    if first[:1] == "[":
        with tree.open(name) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape") as text:
            yield from _items(text, name)
    elif _is_json(first.partition("\n")[0]):
        yield from json_lines(tree, name)
    else:
        yield from _whole(tree, name)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _whole(tree: Tree, name: str) -> Iterator[Row]:
    try:
        found = _object(json.loads(tree.read(name, MOST_JSON).decode("utf-8-sig")), "file")
    except (ValueError, RecursionError) as problem:
        yield name, partial(_refuse, "the file is not JSON", str(problem)[:200])
    except Refused as problem:
        yield name, partial(_refuse, problem.reason, problem.detail)
    else:
        lists = [value for value in found.values() if isinstance(value, list) and any(isinstance(one, dict) for one in value)]
        for number, one in enumerate(lists[0] if len(lists) == 1 else [found], 1):
            yield f"{name}, item {number}", partial(_object, one, "item")


def _items(file: TextIO, name: str) -> Iterator[Row]:
    """A list's items. After one that is broken nothing is known of the rest, which is one loss."""
    decoder, number, text, at, ended = json.JSONDecoder(), 0, "", 0, False
    try:
        text = file.read(PIECE).lstrip()[1:]
        while True:
            at = _past(text, at, " \t\r\n,")
            if at < len(text) and text[at] == "]":
                return
            try:
                found, end = decoder.raw_decode(text, at)
                whole = end < len(text) or ended  # a number that ends with the piece may go on in the next
            except ValueError:
                if ended or len(text) - at > MOST_LINE:
                    raise
                whole = False
            if not whole:
                more = file.read(max(PIECE, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            number, at = number + 1, end
            yield f"{name}, item {number}", partial(_object, found, "item")
    except (ValueError, RecursionError, OSError, Refused) as problem:
        yield f"{name}, item {number + 1}", partial(_refuse, "the list is not JSON from here on", str(problem)[:200])


def _past(text: str, at: int, blank: str) -> int:
    while at < len(text) and text[at] in blank:
        at += 1
    return at


# -- CSV and spreadsheets


def csv_rows(tree: Tree, name: str, reading: Reading | None = None) -> Iterator[Row]:
    """(where, make) of each row; `make()` gives its cells by the names in the first line, without what guards against formulas.

    As spreadsheets save it: with commas, semicolons, tabs or bars; in UTF-8 or UTF-16; names in capitals; 0,5 for 0.5 beside semicolons.
    """
    first = tree.peek(name, 1 << 16)
    line = 0
    try:
        with tree.open(name) as raw, io.TextIOWrapper(raw, _encoding(first), errors=_errors(first), newline="") as file:
            separator = _separator(first.decode(_encoding(first), errors="replace"))
            reader = csv.reader(file, delimiter=separator, strict=True)
            header: _Header | None = None
            while True:
                line = reader.line_num
                where = f"{name}, line {line + 1}"
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as problem:
                    yield where, partial(_refuse, "the line is not CSV", problem, max(reader.line_num - line, 1))
                    continue
                if not any(cell.strip() for cell in cells) or (line == 0 and re.fullmatch(r"sep=.?", separator.join(cells).strip())):
                    continue
                if header is None:
                    header = _Header(cells, reading or Reading(), "" if separator == "," else ",")
                else:
                    yield where, partial(header.row, cells)
    except (OSError, UnicodeError, Refused) as problem:
        yield name, partial(_refuse, "the file cannot be read to its end", f"from line {line + 1} on: {_gist(problem)}")


def _encoding(first: bytes) -> str:
    if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    half = max(len(first[:FIRST]) // 2, 1)
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if first[start:FIRST:2].count(0) > half // 2:
            return encoding
    return "utf-8-sig"


def _errors(first: bytes) -> str:
    return "surrogateescape" if _encoding(first) == "utf-8-sig" else "strict"


def _separator(text: str) -> str:
    """What stands between the names in the first line: the most frequent of the four that spreadsheets write, outside quotes."""
    lines = [line for line in text.removeprefix("\ufeff").splitlines() if line.strip()] or [""]
    if said := re.fullmatch(r"sep=(.)", lines[0].strip("\r\n")):
        return said[1] if said[1] in ",;\t|" else ","
    bare = re.sub(r'"[^"]*"', "", lines[0])
    return max(",;\t|", key=bare.count)


class _Header:
    """The first line of a table. Names count without the spaces round them and in small letters, but as they stand where `--columns` has them."""

    def __init__(self, cells: Sequence[Any], reading: Reading, comma: str):
        kept = set(reading.columns.values())
        self.names = [str(cell) if str(cell) in kept else unguarded(str(cell)).strip().lower() for cell in cells]
        while self.names and not self.names[-1]:
            self.names.pop()
        reading.met.update(dict.fromkeys(filter(None, self.names)))
        self.twice = sorted({name for name in self.names if name and self.names.count(name) > 1})
        numeric = _NUMERIC | {reading.columns[role] for role in _NUMERIC_ROLES if role in reading.columns}
        self.numeric = {name for name in self.names if comma and name in numeric}

    def row(self, cells: list[str]) -> dict[str, str]:
        """A line's cells by their names. Raises Refused where they do not fit the first line."""
        if self.twice:
            raise Refused("two columns have one name", ", ".join(self.twice))
        while len(cells) > len(self.names) and not cells[-1].strip():
            cells = cells[:-1]
        if len(cells) != len(self.names):
            raise Refused("the row has not as many cells as the first line", f"{len(cells)} instead of {len(self.names)}")
        found = {name: unguarded(cell) for name, cell in zip(self.names, cells, strict=True) if name}
        for name, cell in found.items():
            if any("\udc80" <= letter <= "\udcff" for letter in cell):
                raise Refused("the row is not UTF-8: save the table as 'CSV UTF-8'", f"{name}: {ascii(cell)[:80]}")
        return found | {name: found[name].replace(",", ".") for name in self.numeric if re.fullmatch(r"-?\d*,\d+", found[name].strip())}


def xlsx_rows(tree: Tree, name: str, reading: Reading | None = None) -> Iterator[Row]:
    """The rows of a spreadsheet's first sheet, formulas as what they gave; every other sheet that has rows is a loss."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{tree.root}: a spreadsheet is read by openpyxl, which is not installed: pip install 'fashiondpo_pipeline[formats]', "
                        "or save the sheet as 'CSV UTF-8'") from None
    try:
        data = io.BytesIO(tree.read(name, MOST_BYTES))
        if sum(info.file_size for info in zipfile.ZipFile(data).infolist()) > MOST_SHEET:
            raise Refused(f"the spreadsheet is larger than {MOST_SHEET >> 30} GiB when it is unpacked")
        book = openpyxl.load_workbook(data, read_only=True, data_only=True)
        for number, sheet in enumerate(book.worksheets):
            yield from _sheet(sheet, f"{name}, {sheet.title}", reading or Reading(), first=number == 0)
    except Refused as problem:
        yield name, partial(_refuse, problem.reason, problem.detail)
    except (*_UNPACK, zipfile.BadZipFile, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError) as problem:  # openpyxl has no one error
        yield name, partial(_refuse, "the spreadsheet is broken", _gist(problem))


def _sheet(sheet: Any, where: str, reading: Reading, first: bool) -> Iterator[Row]:
    header: _Header | None = None
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        if all(cell is None or str(cell).strip() == "" for cell in cells):
            continue
        if not first:
            yield f"{where}, row {number}", partial(_refuse, "the row is in another sheet than the first", where)
        elif header is None:
            header = _Header(["" if cell is None else cell for cell in cells], reading, "")
        else:
            yield f"{where}, row {number}", partial(_sheet_row, header, cells)


def _sheet_row(header: _Header, cells: tuple) -> dict:
    if header.twice:
        raise Refused("two columns have one name", ", ".join(header.twice))
    return {name: unguarded(cell) if isinstance(cell, str) else cell for name, cell in zip(header.names, cells, strict=False) if name}


# -- WebDataset


def tar_rows(tree: Tree, name: str) -> Iterator[Row]:
    """The samples of a WebDataset shard: files that share their name up to its first dot and follow each other.

    A sample's pictures go by what stands between (`7.chosen.jpg` is chosen, `7.0.jpg` image_0, `7.jpg` image), its .txt is the text, and
    its .json gives the other columns.
    """
    key, size = "", 0
    parts: dict[str, bytes] = {}
    for member, data in _members(tree, name):
        if isinstance(data, Refused):
            yield f"{name}, {member}", partial(_refuse, data.reason, data.detail)
            continue
        folder, base = member.rpartition("/")[::2]
        stem, dot, ending = base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if not dot or not stem:
            yield f"{name}, {member}", partial(_refuse, "the archive's file has no ending, so that its kind is not known", member)
            continue
        if parts and this != key:
            yield f"{name}, {key}", partial(_sample, key, parts)
            parts, size = {}, 0
        key, size = this, size + len(data)
        if ending.lower() in parts or size > 2 * MOST_BYTES:
            why = "twice there" if ending.lower() in parts else f"the sample is larger than {2 * MOST_BYTES >> 20} MiB"
            yield f"{name}, {member}", partial(_refuse, "the archive's file is one too many in its sample", why)
            continue
        parts[ending.lower()] = data
    if parts:
        yield f"{name}, {key}", partial(_sample, key, parts)


def _members(tree: Tree, name: str) -> Iterator[tuple[str, bytes | Refused]]:
    """The files in a tar; what cannot be read, and an end that is missing, are losses."""
    last = "its beginning"
    try:
        with tree.open(name) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # type: ignore[attr-defined]  # else it remembers every one
                    last = member.name
                    if member.isdir():
                        continue
                    if not member.isfile():
                        yield member.name, Refused("the archive's member is no regular file", member.name)
                    elif member.size > MOST_BYTES:
                        yield member.name, Refused(f"the file is larger than {MOST_BYTES >> 20} MiB", member.name)
                    else:
                        yield member.name, tar.extractfile(member).read()  # type: ignore[union-attr]
                file.seek(tar.offset)
                if file.read(512).strip(b"\0") or file.tell() != tar.offset + 512:
                    raise tarfile.ReadError("what follows is no archive, or it was cut")
    except _UNPACK as problem:
        yield last, Refused("the archive is broken", f"after {last}: {_gist(problem)}")


def _sample(key: str, parts: dict[str, bytes]) -> dict:
    row: dict[str, Any] = {}
    if "json" in parts:
        row |= _json_object(parts["json"])
    for ending, data in parts.items():
        column, _, kind = ending.rpartition(".")
        if kind in ("txt", "text", "caption", "prompt"):
            row[column or ("text" if kind == "txt" else kind)] = _utf8(data)
        elif kind == "cls":
            row[column or "label"] = _utf8(data).strip()
        elif kind != "json":
            row[_picture_column(column, kind)] = {"bytes": data, "path": f"{PurePosixPath(key).name}.{ending}"}
    return row


def _picture_column(column: str, kind: str) -> str:
    if not column:
        return "image" if re.fullmatch(r"[a-z]+", kind) else kind  # 7.jpg; 7.jpg_0
    return f"image_{column}" if column.isdigit() else column.replace(".", "_")


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise Refused("the text is not UTF-8", ascii(data)[:80]) from None


def row_count(tree: Tree, name: str) -> int | None:
    """How many rows a Parquet file has, by its end; None for other files, and for broken ones."""
    if kind_of(name, tree.peek(name)) is not PARQUET:
        return None
    try:
        return pq.read_metadata(_Source(tree, name).file).num_rows
    except _BROKEN:
        return None


