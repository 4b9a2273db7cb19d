"""What an import meets: links, endings, broken parts, spreadsheets, archives, odd cells; each is taken or told of, and nothing ends it."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_formats import listed, painted, pickapic, reasons, told

from fashiondpo_pipeline import formats
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import guess, kinds

LEFT = "no row that was taken names the picture"


def imported(path, tmp_path, name="huggingface", **asked):
    return formats.read(name, path, tmp_path / f"set-{len(list(tmp_path.iterdir()))}", **asked)


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def line(winner="a.png", loser="b.png", prompt="a hat"):
    return json.dumps({"chosen_file_name": winner, "rejected_file_name": loser, "prompt": prompt}) + "\n"


@pytest.fixture
def source(tmp_path):
    """A folder with two sound pictures, and a secret beside it."""
    for number, name in enumerate(["in/a.png", "in/b.png", "secret.png"]):
        put(tmp_path / name, painted(number))
    return tmp_path / "in"


# -- links


def snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """As `huggingface_hub` keeps a data set that it downloaded: names are links to blobs beside the snapshots."""
    place = cache / "datasets--ann--hats" / "snapshots" / ("0" * 40)
    for number, (name, data) in enumerate(files.items()):
        put(cache / "datasets--ann--hats" / "blobs" / f"{number:040x}", data)
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        up = os.path.relpath(cache / "datasets--ann--hats" / "blobs", (place / name).parent)
        (place / name).symlink_to(f"{up}/{number:040x}")
    return place


def test_a_snapshot_of_the_hub_is_read_though_its_files_are_links(tmp_path):
    pickapic(tmp_path / "p.parquet")
    place = snapshot(tmp_path / "hub", {"data/train-00000-of-00001.parquet": (tmp_path / "p.parquet").read_bytes(), "README.md": b"hats"})
    for path in (place, place / "data", place / "data" / "train-00000-of-00001.parquet"):
        assert imported(path, tmp_path, "pickapic").counts["pairs"] == 4
    assert reasons(imported(place, tmp_path, "pickapic")) == {"the file holds no rows of the format": 1}, "which is README.md"


def test_so_is_one_of_pictures_beside_a_table(tmp_path):
    files = {"train/metadata.jsonl": line("img/a.png", "b.png").encode(), "train/img/a.png": painted(1), "train/b.png": painted(2)}
    found = imported(snapshot(tmp_path / "hub", files), tmp_path)
    assert [row[:4] for row in told(found)] == [("a hat", painted(1), painted(2), 1.0)] and not reasons(found)


def test_links_that_lead_elsewhere_are_told_one_by_one_and_nothing_behind_them_is_read(source, tmp_path):
    pickapic(source / "real.parquet")
    pickapic(tmp_path / "secret.parquet", caption=["secret"] * 4)
    put(tmp_path / "far" / "blobs" / "x", (tmp_path / "secret.parquet").read_bytes())
    (source / "out.parquet").symlink_to(tmp_path / "secret.parquet")
    (source / "store.parquet").symlink_to(tmp_path / "far" / "blobs" / "x")  # a store, but not that of this folder
    (source / "gone.parquet").symlink_to("nowhere")
    (source / "round.parquet").symlink_to("round.parquet")
    (source / "twin.parquet").symlink_to("real.parquet")
    (source / "folder").symlink_to(tmp_path / "far")
    (source / "same").symlink_to(".")
    found = imported(source, tmp_path, "pickapic")
    assert {row[0] for row in told(found)} == {"a hat"} and found.counts["pairs"] == 8
    out, nowhere = "the link leads out of the folder", "the link leads to nothing"
    assert {row["where"]: row["reason"] for row in listed(found.folder)} == {
        "out.parquet": out, "store.parquet": out, "folder": out, "gone.parquet": nowhere, "round.parquet": nowhere,
        "same": "the link leads to a folder, and is not followed", "a.png": LEFT, "b.png": LEFT}


# -- endings and kinds


@pytest.mark.parametrize("ending", [".PARQUET", ".Parquet", ".ARROW", ".JSONL", ".NDJSON", ".JSON", ".CSV", ".TSV", ".XLSX", ".TAR"])
def test_an_ending_in_capitals_is_the_same_ending(ending, source, tmp_path):
    rows = [{"prompt": "a hat", "chosen": "a.png", "rejected": "b.png"}]
    write_as(ending.lower(), source / f"x{ending}", rows)
    found = imported(source, tmp_path)
    assert [row[:4] for row in told(found)] == [("a hat", painted(0), painted(1), 1.0)]


def write_as(ending: str, path: Path, rows: list[dict]) -> Path:
    """A table of texts in any of the forms that are read."""
    table = pa.Table.from_pylist(rows)
    if ending == ".parquet":
        with path.open("wb") as file:
            pq.write_table(table, file)
    elif ending == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    elif ending in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif ending == ".xlsx":
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        for row in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(row)
        book.save(path)
    elif ending == ".tar":
        with tarfile.open(path, "w") as tar:
            for number, row in enumerate(rows):
                member(tar, f"{number}.json", json.dumps({"prompt": row["prompt"]}).encode())
                for side in ("chosen", "rejected"):
                    member(tar, f"{number}.{side}.png", (path.parent / row[side]).read_bytes())
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",")
            writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return path


def member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(("kind", "words"), [("BMP", "a BMP"), ("GIF", "a GIF"), ("TIFF", "a TIFF"), ("AVIF", "an AVIF")])
def test_pictures_of_other_kinds_on_both_sides_of_a_pair_cost_it_and_are_named(kind, words, tmp_path):
    for number, name in enumerate(["w/0.png", "l/0.jfif", "w/1.x", "l/1.x"]):
        Image.fromarray(np.full((12, 10, 3), number, np.uint8)).save(data := io.BytesIO(), {"x": kind, "jfif": "JPEG"}.get(name[4:], "PNG"))
        put(tmp_path / "in" / name, data.getvalue())
    for number in (0, 1):
        put(tmp_path / "in" / "w" / f"{number}.txt", "a hat")
    found = imported(tmp_path / "in", tmp_path, "folders")
    assert found.counts["pairs"] == 1, "a JPEG is one under any ending"
    assert reasons(found) == {f"the picture is {words}, which is not read: save it as PNG, JPEG or WebP": 1}


def test_folders_below_the_sides_and_what_is_no_picture_are_met(tmp_path):
    place = tmp_path / "in"
    for number, name in enumerate(["w/deep/er/0.png", "l/deep/er/0.PNG", "w/1.png", "l/deep/1.png", "w/Thumbs.db", "l/Thumbs.db", "loose.png"]):
        put(place / name, painted(number) if not name.endswith("db") else b"\0" * 20)
    for name, text in (("w/deep/er/0.txt", "a hat"), ("w/alone.caption", "of nothing"), ("notes.md", "x"), ("w/1.txt", "y")):
        put(place / name, text)
    found = imported(place, tmp_path, "folders")
    assert [row[:3] for row in told(found)] == [("a hat", painted(0), painted(1))]
    assert sorted((row["where"], row["reason"]) for row in listed(found.folder)) == [
        ("l/deep/1.png", "there is no picture of that name in w"), ("loose.png", LEFT),
        ("notes.md", "the file holds no rows of the format"), ("w/1.png", "there is no picture of that name in l"),
        ("w/Thumbs.db", "there is no caption beside it"), ("w/alone.caption", "the file holds no rows of the format")]


def test_captions_end_with_their_text_whatever_ends_the_line_and_one_that_differs_is_told(tmp_path):
    for number in range(3):
        for i, side in enumerate("wl"):
            put(tmp_path / "in" / side / f"{number}.png", painted(2 * number + i))
    for number, text in enumerate(["a red dress\r\n", "a red dress\n", "\ufeffa red dress"]):
        put(tmp_path / "in" / "w" / f"{number}.txt", text)
    put(tmp_path / "in" / "l" / "0.txt", "a red dress")
    put(tmp_path / "in" / "l" / "1.caption", "a blue dress")
    found = imported(tmp_path / "in", tmp_path, "folders")
    assert [row[0] for row in told(found)] == ["a red dress"] * 3
    assert found.manifest["fields"] == {"another caption of the same name says something else": 1} and not reasons(found)


def test_every_table_of_a_folder_is_read_a_metadata_file_beside_parquet_too(source, tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [pa.array([{"bytes": painted(n), "path": None}], image) for n in (5, 6)]
    pq.write_table(pa.table({"prompt": ["a bag"], "chosen": pictures[0], "rejected": pictures[1]}), source / "x.parquet")
    put(source / "metadata.jsonl", line())
    put(source / "dataset_info.json", "{}")
    found = imported(source, tmp_path)
    assert sorted(row[0] for row in told(found)) == ["a bag", "a hat"]
    assert reasons(found) == {"the file holds no rows of the format": 1}


def test_a_metadata_table_in_parquet_names_files(source, tmp_path):
    pq.write_table(pa.table({"chosen_file_name": ["a.png"], "rejected_file_name": ["b.png"], "prompt": ["a hat"]}), source / "metadata.parquet")
    assert [row[:4] for row in told(imported(source, tmp_path))] == [("a hat", painted(0), painted(1), 1.0)]


@pytest.mark.parametrize(("name", "data", "words"), [
    ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a git LFS pointer, and no table: `git lfs pull`"),
    ("x.parquet", b"../../blobs/0af3", "a link that was copied as text, and no table: copy what it leads to"),
    ("x.parquet", b"<!DOCTYPE html><html>", "a web page, and no table: get the file itself"), ("x.parquet", b"", "empty, and no table"),
    ("x.jsonl.gz", b"\x1f\x8b\x08" + bytes(9), "a gzip archive, and no table: unpack it"), ("x.pkl", b"\x80\x04K\x01.", "a pickle, and no table"),
    ("x.rar", b"Rar!\x1a\x07", "a rar archive, and no table"), ("x.png", painted(1), "a PNG, and no table"),
    ("x.md", b"# hats", "text, and no table"), ("x.bin", b"\0\1\2", "of a kind that is not known, and no table")])
@pytest.mark.parametrize("format", ["huggingface", "pickapic", "csv", "invoke", "kto"])
def test_what_is_no_table_is_called_by_its_name(format, name, data, words, tmp_path):
    with pytest.raises(UserError, match=f"the file is {words}".replace("(", r"\(")):
        imported(put(tmp_path / "in" / name, data), tmp_path, format)


def test_a_file_is_what_its_bytes_say_and_not_its_ending(tmp_path):
    pickapic(tmp_path / "x.json")
    assert imported(tmp_path / "x.json", tmp_path, "pickapic").counts["pairs"] == 4


# -- broken parts


def grouped(path: Path, groups: int = 3, rows: int = 4) -> pq.FileMetaData:
    pickapic(path, **{name: values * groups for name, values in {
        "caption": ["a hat"] * rows, "jpg_0": [painted(n, "JPEG") for n in range(rows)], "jpg_1": [painted(9 + n, "JPEG") for n in range(rows)],
        "label_0": [1.0] * rows, "label_1": [0.0] * rows, "has_label": [True] * rows, "image_0_uid": list("abcd"), "image_1_uid": list("efgh"),
        "ranking_id": [1] * rows, "user_id": [2] * rows}.items()})
    pq.write_table(pq.read_table(path), path, row_group_size=rows, compression="none", use_dictionary=False)
    return pq.read_metadata(path)


def test_row_groups_behind_a_broken_one_are_read_and_rows_are_counted(tmp_path):
    about = grouped(tmp_path / "p.parquet")
    data = bytearray((tmp_path / "p.parquet").read_bytes())
    at = about.row_group(1).column(1).data_page_offset
    data[at : at + 40] = b"\xff" * 40
    put(tmp_path / "p.parquet", bytes(data))
    found = imported(tmp_path / "p.parquet", tmp_path, "pickapic")
    assert found.counts["pairs"] == 8 and reasons(found) == {"the Parquet file is broken": 4}
    assert "4 of its 12 rows, in row group 2 of 3" in listed(found.folder)[0]["detail"]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_batches_behind_a_broken_one_are_read_where_the_file_says_where_they_begin(form, tmp_path):
    schema = pa.schema([("prompt", pa.string()), ("chosen", pa.binary()), ("rejected", pa.binary())])
    batches = [pa.record_batch([[f"hat {n}"], [painted(2 * n)], [painted(2 * n + 1)]], schema=schema) for n in range(3)]
    with getattr(pa.ipc, f"new_{form}")(tmp_path / "x.arrow", schema) as file:
        for batch in batches:
            file.write_batch(batch)
    whole = imported(tmp_path / "x.arrow", tmp_path)
    assert [row[0] for row in told(whole)] == ["hat 0", "hat 1", "hat 2"]
    data = bytearray((tmp_path / "x.arrow").read_bytes())
    at = data.index(b"hat 1") - 64  # the offsets of the prompt
    data[at : at + 8] = b"\0\0\0\0\xff\xff\xff\x7f"
    put(tmp_path / "x.arrow", bytes(data))
    found = imported(tmp_path / "x.arrow", tmp_path)
    assert [row[0] for row in told(found)] == (["hat 0", "hat 2"] if form == "file" else ["hat 0"])
    assert reasons(found) == {"the Arrow file is broken": 1}


def test_a_cell_that_python_cannot_hold_costs_its_row_alone(tmp_path):
    days = pa.array([0, 2**30, 1, 2], pa.int32()).cast(pa.date32())
    pickapic(tmp_path / "p.parquet", user_id=days)
    found = imported(tmp_path / "p.parquet", tmp_path, "pickapic")
    assert reasons(found) == {"the cell user_id cannot be read": 1}
    assert found.counts["pairs"] == 3 and found.manifest["fields"] == {"the user_id is not text": 3}, "of the others the id alone is lost"
    text = pa.Array.from_buffers(pa.string(), 4, [None, *pa.array([b"ok", b"\xff\xfe", b"ok", b"ok"], pa.binary()).buffers()[1:]])
    pickapic(tmp_path / "q.parquet", caption=text)
    found = imported(tmp_path / "q.parquet", tmp_path, "pickapic")
    assert found.counts["pairs"] == 3 and reasons(found) == {"the cell caption cannot be read": 1}


KINDS = [pa.string(), pa.binary(), pa.bool_(), pa.int64(), pa.float64(), pa.decimal128(30, 2), pa.date32(), pa.timestamp("ns"),
         pa.timestamp("s", "UTC"), pa.list_(pa.string()), pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.null(),
         pa.duration("s"), pa.time64("ns"),
         pa.map_(pa.string(), pa.int64()), pa.dictionary(pa.int32(), pa.string()), pa.large_binary(), pa.month_day_nano_interval()]
VALUES = [None, "", "a hat", "a.png", "x" * 9, b"\xff\xd8\xff", b"", True, 0, 1, -1, 2**62, 2**31, 1e308, float("nan"), float("inf"), Decimal("0.5"),
          Decimal("1e25"), ["a.png", "b.png"], [], {"bytes": None, "path": "a.png"}, {"bytes": b"x", "path": None}, [("k", 1)]]
COLUMNS = ["prompt", "caption", "jpg_0", "jpg_1", "image_0", "image_1", "chosen", "rejected", "images", "image", "label", "label_0", "label_1",
           "has_label", "prefer_0", "prefer_1", "user_id", "annotator", "gap", "source", "split", "rank", "human_preference", "image_0_uid", "text"]


def fits(value, kind):
    try:
        return pa.array([value], kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None


CELLS = [array for kind in KINDS for value in VALUES if (array := fits(value, kind)) is not None]
CELLS += [pa.array([2**62], pa.int64()).cast(pa.timestamp("s")), pa.array([-(2**30)], pa.int32()).cast(pa.date32()),
          pa.array([2**62], pa.int64()).cast(pa.duration("s")),
          pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff\xfe"], pa.binary()).buffers()[1:]])]


@given(st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(CELLS), min_size=1, max_size=8),
       st.sampled_from(["huggingface", "pickapic", "kto", "csv"]))
@settings(max_examples=80)
def test_no_cell_of_a_table_ends_an_import(tmp_path_factory, columns, format):
    place = tmp_path_factory.mktemp("cells")
    for number, name in enumerate(["a.png", "b.png"]):
        put(place / "in" / name, painted(number))
    with pa.ipc.new_stream(place / "in" / "pairs.arrow", (table := pa.table(columns)).schema) as file:
        file.write_table(table)
    try:
        found = formats.read(format, place / "in" / "pairs.arrow", place / "set")
    except UserError as problem:
        assert "nothing in it can be used" in str(problem) or "parts" in str(problem)
        return
    assert found.counts["pictures"] and not reasons(found)


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=4), st.just("a.png"))
JSONS = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path"]), inner, max_size=2),
                     max_leaves=4)


@given(st.dictionaries(st.sampled_from([*COLUMNS, "file_name", "chosen_file_name"]), JSONS, max_size=6), st.sampled_from(list(formats.FORMATS)))
@settings(max_examples=80)
def test_no_object_of_json_ends_an_import(tmp_path_factory, row, format):
    place = tmp_path_factory.mktemp("objects")
    put(place / "in" / "a.png", painted(0))
    put(place / "in" / "metadata.jsonl", json.dumps(row) + "\n")
    try:
        formats.read(format, place / "in" / "metadata.jsonl", place / "set")
    except UserError as problem:
        assert "nothing in it can be used" in str(problem) or "no folders w and l" in str(problem) or "parts" in str(problem)


FOLDERS = ["", "w/", "l/", "w/sub/", "l/sub/", "train/", "1_hat/w/", "1_hat/l/", "data/", ".hidden/", "w/\udcff/"]
NAMES = ["0.png", "0.PNG", "0.bmp", "0.txt", "0.caption", "1.png", "1.jfif", "1", "metadata.jsonl", "metadata.csv", "pairs.csv", "x.parquet",
         "x.PARQUET", "train.json", "shard.tar", "set.zip", "README.md", ".gitattributes", "odd name\n.png",
         "train_processed_v3.csv", "dropped.jsonl"]
WHAT = ["picture", "picture", "gif", "text", "rows", "empty", "link in", "link out", "link nowhere", "pipe"]


def grown(place: Path, tree: dict[str, str]) -> None:
    """An odd tree: path -> what lies there."""
    (place.parent / "secret.png").write_bytes(painted(99))
    for number, (name, what) in enumerate(tree.items()):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if what.startswith("link"):
            path.symlink_to({"link in": place / "sound.png", "link out": place.parent / "secret.png"}.get(what, "nowhere"))
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "rows":
            rows = [{"prompt": "a hat", "chosen": "sound.png", "rejected": "other.png"}, {"prompt": "", "chosen": "no.png", "rejected": "x"}]
            ending = path.suffix.lower()
            write_as(ending if ending in (".parquet", ".csv", ".json") else ".jsonl", path, rows)
        else:
            path.write_bytes({"picture": painted(number), "gif": b"GIF89a" + bytes(20), "text": b"a hat", "empty": b""}[what])


@given(st.dictionaries(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)).map("".join), st.sampled_from(WHAT), max_size=12),
       st.sampled_from(list(formats.FORMATS)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_everything_that_is_met_in_an_odd_tree_is_imported_or_told_of(tmp_path_factory, tree, format):
    place = tmp_path_factory.mktemp("tree") / "in"
    place.mkdir()
    for number, name in ((50, "sound.png"), (51, "other.png")):
        put(place / name, painted(number))
    grown(place, tree)
    folder, found = place.parent / "set", None
    try:
        found = formats.read(format, place, folder)
    except UserError as problem:
        if "nothing in it can be used" not in str(problem):
            return  # told before anything was read
        folder = place.parent / ".set.tmp"
    held = {row["picture"]["bytes"] for table in found.pictures() for row in table.to_pylist()} if found else set()
    prompts = {row["prompt"] for table in found.pictures() for row in table.to_pylist()} if found else set()
    assert painted(99) not in held, "a link that leads out was read"
    told_of = [f"{row['where']} {row['detail']}" for row in listed(folder)]
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if (path.is_dir() and not path.is_symlink()) or name == "dropped.jsonl":
            continue
        data = path.read_bytes() if path.is_file() and not path.is_fifo() else None
        taken = data is not None and (data in held or (data.decode(errors="replace") in prompts and path.suffix in (".txt", ".caption")))
        rows = tree.get(name) == "rows" and found is not None and found.counts["pairs"]
        partner = path.suffix in (".txt", ".caption") and any(name.rsplit(".", 1)[0] in told for told in told_of)
        assert taken or rows or partner or any(name in told for told in told_of), (name, tree.get(name), told_of)


def test_a_tree_of_everything_adds_up_exactly(source, tmp_path):
    good = {"prompt": "a hat", "chosen": "a.png", "rejected": "b.png"}
    write_as(".parquet", source / "x.parquet", [good] * 3 + [{"prompt": "", "chosen": "", "rejected": ""}])
    write_as(".csv", source / "y.csv", [good, good | {"chosen": "c.png"}])
    for name in ("README.md", "more/set.zip", "more/c.gif", "more/deep/d.png"):
        put(source / name, {"z": b"PK\x03\x04", "g": b"GIF89a", "p": painted(7)}.get(name.rsplit(".", 1)[1][0], b"# hats"))
    found = imported(source, tmp_path)
    assert found.counts["pairs"] == 4
    assert reasons(found) == {"there are no pictures under names that are known": 1, "the file is not there": 1, LEFT: 2,
                              "the file holds no rows of the format": 1, "the file is a zip archive: import it by itself": 1}
    rows, files = 4 + 2, 8
    assert found.counts["pairs"] + sum(reasons(found).values()) == rows + files - 4, "two tables and two pictures were taken"


# -- spreadsheets


def sheet(place: Path, data: bytes, name: str = "pairs.csv") -> Path:
    for number in range(4):
        put(place / f"{number}.png", painted(number))
    return put(place / name, data)


ROWS = [["prompt", "first", "second", "label"], ["a café dress", "0.png", "1.png", "1"], ["b, c; d\tand more", "2.png", "3.png", "0.25"]]


def saved(separator=",", encoding="utf-8", header=ROWS[0], comma=".", end="\r\n", before="") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([header, *([*row[:3], row[3].replace(".", comma)] for row in ROWS[1:])])
    return (before + text.getvalue()).encode(encoding)


@pytest.mark.parametrize("data", [
    saved(), saved(";"), saved(";", comma=","), saved("\t", comma=","), saved("|"), saved("\t", "utf-16"), saved(";", "utf-16"),
    saved(",", "utf-16-le"), saved("\t", "utf-16-be"), saved(encoding="utf-8-sig"), saved(";", header=["Prompt ", " FIRST", "Second", "LABEL"]),
    saved(end="\n"),
    saved(";", before="sep=;\r\n"), saved(before="\r\n\r\n"), saved().replace(b"label\r\n", b"label,,\r\n").replace(b"1\r\n", b"1,,\r\n")])
def test_a_csv_is_read_as_spreadsheets_save_it(data, tmp_path):
    sheet(tmp_path / "in", data)
    found = imported(tmp_path / "in", tmp_path, "csv")
    assert [row[:4] for row in told(found)] == [(ROWS[1][0], painted(0), painted(1), 1.0), (ROWS[2][0], painted(2), painted(3), 0.25)]
    assert not {reason for reason in reasons(found) if "cells" not in reason}


def test_a_comma_in_a_prompt_is_no_decimal_and_one_beside_commas_is_told(tmp_path):
    sheet(tmp_path / "in", b'prompt;first;second;label\n"0,5";0.png;1.png;0,5\n')
    assert [(row[0], row[3]) for row in told(imported(tmp_path / "in", tmp_path, "csv"))] == [("0,5", 0.5)]
    sheet(tmp_path / "in2", b'prompt,first,second,label\na,0.png,1.png,"0,5"\nb,2.png,3.png,1\n')
    assert reasons(imported(tmp_path / "in2", tmp_path, "csv"))["the label is not a number"] == 1


def test_text_in_another_encoding_is_told_with_how_to_save_it(tmp_path):
    sheet(tmp_path / "in", saved(encoding="cp1252"))
    found = imported(tmp_path / "in", tmp_path, "csv")
    assert found.counts["pairs"] == 1 and reasons(found)["the row is not UTF-8: save the table as 'CSV UTF-8'"] == 1


def test_columns_that_are_not_known_are_named_where_nothing_can_be_used(tmp_path):
    sheet(tmp_path / "in", b"texte;gauche;droite\na;0.png;1.png\n")
    with pytest.raises(UserError, match="its columns are texte, gauche, droite"):
        imported(tmp_path / "in", tmp_path, "csv")
    asked = imported(tmp_path / "in", tmp_path, "csv", columns={"prompt": "texte", "winner": "gauche", "loser": "droite"})
    assert [row[3] for row in told(asked)] == [1.0]


def test_a_stray_quote_costs_what_it_swallows_and_two_columns_of_one_name_every_row(tmp_path):
    sheet(tmp_path / "in", b'prompt,first,second,label\na,0.png,1.png,1\nb,"2.png,3.png,1\nc,0.png,1.png,1\nd,0.png,1.png,1\n')
    found = imported(tmp_path / "in", tmp_path, "csv")
    assert [row[0] for row in told(found)] == ["a"] and reasons(found)["the line is not CSV"] == 3
    sheet(tmp_path / "twice", b"prompt,first,second,label,Label\na,0.png,1.png,1,0\nb,2.png,3.png,0,1\n")
    with pytest.raises(UserError, match="2 x two columns have one name"):
        imported(tmp_path / "twice", tmp_path, "csv")


def test_a_workbook_is_read_and_its_other_sheets_are_counted(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [["Prompt", "first", "second", "label", None], [None] * 5, ["a hat", "0.png", "1.png", 0.25, "x"],
                ["'=1+1", "2.png", "3.png", True, None], ["a bag", "0.png", "no.png", 1, None]]:
        book.active.append(row)
    other = book.create_sheet("notes")
    other.append(["seen by", "ann"])
    sheet(tmp_path / "in", b"")
    (tmp_path / "in" / "pairs.csv").unlink()
    book.save(tmp_path / "in" / "pairs.xlsx")
    found = imported(tmp_path / "in", tmp_path, "csv")
    assert [(row[0], row[3]) for row in told(found)] == [("a hat", 0.25), ("=1+1", 1.0)]
    assert [(row["where"], row["reason"]) for row in listed(found.folder)] == [
        ("pairs.xlsx, Sheet, row 5", "the file is not there"), ("pairs.xlsx, notes, row 1", "the row is in another sheet than the first")]
    put(tmp_path / "in" / "pairs.xlsx", (tmp_path / "in" / "pairs.xlsx").read_bytes()[:500])
    with pytest.raises(UserError, match="1 x the spreadsheet is broken"):
        imported(tmp_path / "in", tmp_path, "csv")


def test_without_openpyxl_it_is_told_how_to_get_it(tmp_path, monkeypatch):
    sheet(tmp_path / "in", b"PK\x03\x04", "pairs.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"pip install 'fashiondpo_pipeline\[formats\]', or save the sheet as 'CSV UTF-8'"):
        imported(tmp_path / "in" / "pairs.xlsx", tmp_path, "csv")


# -- paths


def test_backslashes_and_absolute_paths_inside_the_folder_lead_to_their_pictures(source, tmp_path):
    put(source / "img" / "c.png", painted(5))
    put(source / "metadata.jsonl", line("img\\c.png", str(source / "b.png")) + line("img\\..\\..\\secret.png") + line(str(tmp_path / "secret.png"))
        + line("C:\\img\\c.png") + line("\\\\host\\c.png"))
    found = imported(source, tmp_path)
    assert [row[1:3] for row in told(found)] == [(painted(5), painted(1))]
    assert {r["source"] for table in found.pictures() for r in table.to_pylist()} == {"img\\c.png", "b.png"}, "no name tells where the folder lay"
    assert reasons(found) == {"the path leads out of its folder": 4, LEFT: 1}
    (tmp_path / "also").symlink_to(source)
    put(source / "metadata.jsonl", line(str(tmp_path / "also" / "a.png"), str(source / "b.png")))
    assert imported(tmp_path / "also", tmp_path).counts["pairs"] == imported(source, tmp_path).counts["pairs"] == 1


def test_a_backslash_that_is_part_of_a_name_is_one(source, tmp_path):
    put(source / "a\\b.png", painted(6))
    put(source / "metadata.jsonl", line("a\\b.png"))
    assert told(imported(source, tmp_path))[0][1] == painted(6)


# -- other forms


def test_what_datasets_saves_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "image_0": datasets.Image(), "image_1": datasets.Image(),
                                  "label": datasets.ClassLabel(names=["image_1", "image_0"])})
    rows = {"prompt": ["a hat", "a bag"], "image_0": [{"bytes": painted(n), "path": None} for n in (0, 1)],
            "image_1": [{"bytes": painted(n), "path": None} for n in (2, 3)], "label": [0, 1]}
    made = datasets.Dataset.from_dict(rows, features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "parts")
    for name in ("one", "parts"):
        found = imported(tmp_path / name, tmp_path)
        assert [row[:4] for row in told(found)] == [("a hat", painted(0), painted(2), 0.0), ("a bag", painted(1), painted(3), 1.0)]
    assert reasons(found)["of the part 'test', which was not asked for (--split)"] == 2


@pytest.mark.parametrize("wrap", ["{}", '{{"info": 1, "data": {}}}'])
def test_a_list_of_objects_is_read_as_it_comes(wrap, source, tmp_path, monkeypatch):
    rows = [{"prompt": f"hat {n} [,]}}{{" + "é" * 40, "chosen": "a.png", "rejected": "b.png"} for n in range(9)]
    put(source / "x.json", "\ufeff" + wrap.format(json.dumps([*rows[:4], 7, *rows[4:]], ensure_ascii=False, indent=1)))
    found = imported(source / "x.json", tmp_path)
    assert [row[0] for row in told(found)] == [row["prompt"] for row in rows] and reasons(found) == {"the item is not an object": 1}


def test_a_list_that_breaks_off_gives_what_came_before(source, tmp_path):
    rows = json.dumps([{"prompt": f"hat {n}", "chosen": "a.png", "rejected": "b.png"} for n in range(3)])
    put(source / "x.json", rows[:-30])
    found = imported(source / "x.json", tmp_path)
    assert [row[0] for row in told(found)] == ["hat 0", "hat 1"] and reasons(found) == {"the list is not JSON from here on": 1}
    put(source / "x.json", "[" * 100_000)
    with pytest.raises(UserError, match="1 x the list is not JSON from here on"):
        imported(source / "x.json", tmp_path)


def sample(number: int, **parts) -> list[tuple[str, bytes]]:
    return [(f"{number:06d}.{ending.replace('__', '.')}", data) for ending, data in parts.items()]


def shard(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            member(tar, name, data)
    return path


SAMPLES = [*sample(0, chosen__png=painted(0), rejected__jpg=painted(1, "JPEG"), txt=b"a hat\n"),
           *sample(1, **{"0__png": painted(2), "1__png": painted(3)}, json=json.dumps({"prompt": "a bag", "label": 0.25}).encode()),
           *sample(2, png=painted(4), txt="é".encode("latin-1")), ("README", b"x"), ("d/000003.png", painted(5)), ("d/000003.txt", b"a boot")]


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("X.TGZ", "w:gz")])
def test_a_shard_of_webdataset_is_read_sample_by_sample(name, mode, tmp_path):
    found = imported(shard(tmp_path / "in" / name, SAMPLES, mode).parent, tmp_path)
    assert [row[:4] for row in told(found)] == [("a hat", painted(0), painted(1, "JPEG"), 1.0), ("a bag", painted(2), painted(3), 0.25)]
    assert found.counts["pictures"] == 5 and {r["source"] for t in found.pictures() for r in t.to_pylist()} >= {"000000.chosen.png", "000003.png"}
    assert [(row["where"], row["reason"]) for row in listed(found.folder)] == [
        (f"{name}, README", "the archive's file has no ending, so that its kind is not known"), (f"{name}, 000002", "the text is not UTF-8")]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # of its own files
def test_it_is_what_webdatasets_own_library_writes_and_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        writer.write({"__key__": "a/7", "chosen.png": painted(0), "rejected.png": painted(1), "json": {"prompt": "a hat", "gap": 2}})
    found = imported(tmp_path / "x.tar", tmp_path)
    assert [row[:6] for row in told(found)] == [("a hat", painted(0), painted(1), 1.0, None, 2.0)]
    own = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [(one["__key__"], one["chosen.png"]) for one in own] == [("a/7", painted(0))]


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "header", "no end"])
def test_a_tar_that_is_cut_or_damaged_gives_what_comes_before_and_says_so(damage, tmp_path):
    data = bytearray(shard(tmp_path / "x.tar", [*SAMPLES[:3], *sample(9, png=painted(7))]).read_bytes())
    at = data.index(b"000009.png")
    kept = {"cut": data[: at + 700], "cut at a member": data[:at], "header": data[:at] + b"\xff" * 512 + data[at + 512 :],
            "no end": data[: at + 1024]}[damage]
    found = imported(put(tmp_path / "x.tar", bytes(kept)), tmp_path)
    assert found.counts["pairs"] == 1 and reasons(found)["the archive is broken"] == 1


def zipped(path: Path, files: dict[str, bytes | str], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_like_the_folder_that_it_holds(packing, tmp_path):
    pickapic(tmp_path / "p.parquet")
    table = (tmp_path / "p.parquet").read_bytes()
    rows = line("img/a.png", "..\\b.png") + line("../../x.png") + line("no.png")
    files = {"set/metadata.jsonl": rows, "set/img/a.png": painted(1), "b.png": painted(2), "c.png": painted(3), "../up.png": painted(4), "set/": ""}
    found = imported(zipped(tmp_path / "x.zip", files, compression=packing), tmp_path)
    assert [row[1:3] for row in told(found)] == [(painted(1), painted(2))]
    assert reasons(found) == {"the path leads out of its folder": 2, "the file is not there": 1, LEFT: 1}
    assert imported(zipped(tmp_path / "y.zip", {"data/a.parquet": table}, compression=packing), tmp_path, "pickapic").counts["pairs"] == 4
    pairs = {"w/0.png": painted(1), "l/0.png": painted(2), "w/0.txt": "a hat\r\n"}
    assert told(imported(zipped(tmp_path / "z.zip", pairs, compression=packing), tmp_path, "folders"))[0][0] == "a hat"


def test_what_is_broken_or_locked_in_a_zip_is_told(tmp_path):
    files = {"metadata.jsonl": line() + line("b.png", "c.png", "a bag"), **{f"{name}.png": painted(n) for n, name in enumerate("abc")}}
    data = bytearray(zipped(tmp_path / "x.zip", files).read_bytes())
    data[data.index(painted(0)) + 60] ^= 1
    found = imported(put(tmp_path / "x.zip", bytes(data)), tmp_path)
    assert [row[0] for row in told(found)] == ["a bag"] and reasons(found) == {"the file in the zip is broken": 1}
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the last file, locked
    put(tmp_path / "x.zip", bytes(data))
    with pytest.raises(UserError, match="2 x the file is encrypted"):
        imported(tmp_path / "x.zip", tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_in_a_zip_and_one_without_a_name_are_told(tmp_path):
    zipped(tmp_path / "x.zip", {"metadata.jsonl": line(), "a.png": painted(1), "b.png": painted(2)})
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as file:
        file.writestr("a.png", painted(3))
        file.writestr(zipfile.ZipInfo("x"), b"")
    data = (tmp_path / "x.zip").read_bytes()
    at = data.rindex(b"PK\x01\x02")
    put(tmp_path / "x.zip", data[: at + 46] + b"\0" + data[at + 47 :])  # a name of no letter
    found = imported(tmp_path / "x.zip", tmp_path)
    assert told(found)[0][1:3] == (painted(1), painted(2))
    assert reasons(found) == {"the zip has two files of one name": 1, "the file holds no rows of the format": 1}


def test_no_more_rows_are_taken_than_asked_for_and_nothing_behind_them_is_looked_at(tmp_path):
    (tmp_path / "in").mkdir()
    grouped(tmp_path / "in" / "a.parquet")
    put(tmp_path / "in" / "b.parquet", b"PAR1 broken")
    found = imported(tmp_path / "in", tmp_path, "pickapic", most=5)
    assert found.counts["pairs"] == 5 and not reasons(found) and found.manifest["most"] == 5 and found.manifest["lineage"]["most"] == 5
    assert formats.notes(found)[0] == "note: 5 rows were taken (--most), and nothing behind them was looked at"
    every = imported(tmp_path / "in", tmp_path, "pickapic", most=99)
    assert every.counts["pairs"] == 12 and reasons(every) == {"the Parquet file is broken": 1} and "most" not in every.manifest


@pytest.mark.parametrize(("files", "format"), [
    (["x.parquet"], "pickapic"), (["X.PARQUET"], "pickapic"), (["data/x.arrow"], "huggingface"), (["pairs.csv"], "csv"), (["pairs.tsv"], "csv"),
    (["pairs.xlsx"], "csv"), (["metadata.jsonl"], "huggingface"), (["train.json"], "json"), (["0000.tar"], "huggingface"),
    (["a/w/0.png", "a/l/0.png"], "folders"), (["README.md"], None)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_format_is_known_at_sight(files, format, packed, source, tmp_path):
    good = {"prompt": "a hat", "chosen": "a.png", "rejected": "b.png"}
    for name in files:
        if name.lower() == "x.parquet":
            pickapic(put(source / name, ""))
        elif name.startswith(("a/", "README")):
            put(source / name, "x")
        else:
            write_as(Path(name).suffix, put(source / name, ""), [good])
    path = source
    if packed:
        inside = {file.relative_to(source).as_posix(): file.read_bytes() for file in source.rglob("*") if file.is_file()}
        path = zipped(tmp_path / "x.zip", inside)
    if format is None:
        with pytest.raises(UserError, match="is in no format that is known at sight"):
            guess.guess(path)
    else:
        assert guess.guess(path) == format


def forms(place: Path) -> dict[str, Path]:
    """A sound file of every form that is read, each beside its pictures."""
    for number, name in enumerate(["a.png", "b.png"]):
        put(place / name, painted(number))
    good = [{"prompt": f"hat {n}", "chosen": "a.png", "rejected": "b.png"} for n in range(3)]
    made = {ending: write_as(ending, place / f"x{ending}", good) for ending in (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".xlsx", ".tar")}
    with pa.ipc.new_file(place / "y.arrow", (table := pa.Table.from_pylist(good)).schema) as file:
        file.write_table(table)
    pickapic(place / "p.parquet")
    pictures = {"w/0.png": painted(0), "l/0.png": painted(1), "w/0.txt": "a hat"}
    return made | {"file": place / "y.arrow", "pickapic": place / "p.parquet", "folders": zipped(place / "x.zip", pictures, compression=8)}


@given(st.data())
@settings(max_examples=int(os.environ.get("FDPO_FUZZ", "60")))
def test_no_damage_to_a_file_ends_an_import(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "forms"
    if not place.exists():
        forms(place)
    sound = {name: place / path for name, path in {
        **{ending: f"x{ending}" for ending in (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".xlsx", ".tar")}, "file": "y.arrow",
        "pickapic": "p.parquet", "folders": "x.zip"}.items()}
    name = data.draw(st.sampled_from(sorted(sound)))
    content = bytearray(sound[name].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(max(len(content) - 300, 0), len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "set", "cut", "zero"]))
        if how == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "set":
            content[at : at + 4] = data.draw(st.sampled_from([b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 4, b"\0" * 4, b'"', b"[[[["]))
        elif how == "cut" and at:
            del content[at:]
        else:
            content[at : at + 16] = bytes(len(content[at : at + 16]))
    path = put(place / f"damaged{sound[name].suffix}", bytes(content))
    folder = tmp_path_factory.mktemp("set")
    try:
        found = formats.read(name if name in formats.FORMATS else "huggingface", path, folder / "s")
    except UserError:
        return
    assert found.counts["pairs"]


def test_kinds_are_told_by_their_first_bytes():
    assert kinds.kind_of("x", b"RIFF1234WEBP") == "a WebP" and kinds.kind_of("x", b"\0\0\0 ftypavif") == "an AVIF"
    assert kinds.kind_of("x.txt", b"prompt,first") == kinds.CSV and kinds.kind_of("x", b"\xef\xbb\xbf [{") == kinds.JSON


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    """Each column of it is one page of 96 MB; a process of its own tells its peak."""
    rows, size = 96, 1 << 20
    with pq.ParquetWriter(tmp_path / "x.parquet", (table := pa.table({name: [bytes(size)] * rows for name in ("jpg_0", "jpg_1")})).schema,
                          compression="none", use_dictionary=False, data_page_size=1 << 30) as file:
        file.write_table(table)
    script = ("import resource, sys\nfrom pathlib import Path\nfrom fashiondpo_pipeline.formats import Reading, tables, trees\n"
              "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\nbefore, path = peak(), Path(sys.argv[1])\n"
              "for _, make in tables.rows_of(trees.at(path), path.name, Reading(), lambda _: True): make()\nprint(peak() - before)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x.parquet")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64, "MiB, of 192 in the row group"
