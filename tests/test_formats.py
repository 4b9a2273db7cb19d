"""Other programs' preference sets: there and back exactly; every row left out is counted with its reason; nothing leaves its folder."""

import csv
import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fashiondpo_pipeline import formats, pairsets
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import files, tables, trees
from fashiondpo_pipeline.formats.pickapic import label_of


def painted(number, kind="PNG"):
    """Bytes of a small picture that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def bomb(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# prompt, first, second, label, annotator, gap, source: three pictures of one prompt in three pairs, then another prompt
PROMPTS = ["a red dress", '=HYPERLINK("http://x"), "two"\nlines']
KINDS = ["PNG", "JPEG", "WEBP", "PNG", "PNG"]
PAIRS = [(0, 0, 1, 1.0, "7", 0.5, "100"), (0, 2, 0, 0.0, "8", None, "101"), (0, 1, 2, 0.5, None, None, "102"), (1, 3, 4, 0.0, "7", -0.25, "103"),
         (1, 4, 3, None, None, None, None)]
NAMELESS = {"the format has no place for a picture's name": 5}
NOWHERE = {f"the format has no place for a pair's {name}": count for name, count in {"annotator": 3, "gap": 2, "source": 4}.items()} | NAMELESS
ASKS = {  # format -> columns that come back, what of the others is counted as left out
    "pickapic": ([3, 4, 6], {"the format has no place for a pair's gap": 2}), "huggingface": ([3, 4, 5, 6], {}), "csv": ([3, 4, 5, 6], {}),
    "json": ([3, 4, 5, 6], NAMELESS),
    "invoke": ([3], NOWHERE)}


@pytest.fixture
def made(tmp_path):
    """A pair set with all kinds of pictures and labels."""
    groups = [formats.group_of(prompt) for prompt in PROMPTS]
    where = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1)}
    pictures = [{"group": groups[g], "candidate": c, "prompt": PROMPTS[g], "source": f"uid-{n}",
                 "picture": {"bytes": painted(n, KINDS[n]), "path": None}} for n, (g, c) in where.items()]
    pairs = [{"group": groups[g], "first": where[a][1], "second": where[b][1], "label": label, "annotator": who, "gap": gap, "source": source}
             for g, a, b, label, who, gap, source in PAIRS]
    return pairsets.write(tmp_path / "set", pictures, pairs, {"source": "made", "lineage": {}, "dropped": {}})


def told(pairs):
    """What a set says, whatever it calls things: prompt, bytes of both pictures, label, annotator, gap, source of each pair, in order."""
    shown = {(r["group"], r["candidate"]): r for table in pairs.pictures() for r in table.to_pylist()}
    rows = [row for table in pairs.pairs() for row in table.to_pylist()]
    return [(shown[r["group"], r["first"]]["prompt"], shown[r["group"], r["first"]]["picture"]["bytes"],
             shown[r["group"], r["second"]]["picture"]["bytes"], r["label"], r["annotator"], r["gap"], r["source"]) for r in rows]


def there_and_back(name, pairs, tmp_path):
    written, lost = formats.write(name, pairs, tmp_path / name)
    return formats.read(name, tmp_path / name, tmp_path / f"{name}-back"), written, lost


def reasons(pairs):
    return pairs.manifest["dropped"]


def listed(folder: Path):
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


# -- there and back


@pytest.mark.parametrize("name", list(ASKS))
def test_a_round_trip_keeps_bytes_labels_and_order(name, made, tmp_path):
    held, nowhere = ASKS[name]
    back, written, lost = there_and_back(name, made, tmp_path)
    assert [row[:3] for row in told(back)] == [row[:3] for row in told(made)]
    for column in held:
        assert [row[column] for row in told(back)] == [row[column] for row in PAIRS], column
    assert written["pairs"] == 5 and lost == nowhere and not reasons(back)


@pytest.mark.parametrize("name", ["pickapic", "huggingface", "csv"])
def test_what_pictures_were_called_comes_back_where_the_format_has_a_place_for_it(name, made, tmp_path):
    back, _, _ = there_and_back(name, made, tmp_path)
    assert {r["source"] for table in back.pictures() for r in table.to_pylist()} == {f"uid-{n}" for n in range(5)}


def test_folders_keep_who_won_and_say_what_they_have_no_place_for(made, tmp_path):
    back, written, lost = there_and_back("folders", made, tmp_path)
    assert told(back) == [(PROMPTS[0], painted(0), painted(1, "JPEG"), 1.0, None, None, None),
                          (PROMPTS[0], painted(0), painted(2, "WEBP"), 1.0, None, None, None),
                          (PROMPTS[1], painted(4), painted(3), 1.0, None, None, None)]
    assert written == {"pairs": 3} and lost == {"the pair is a tie": 1, "the pair has no label": 1} | NOWHERE
    assert [row["where"] for row in listed(tmp_path / "folders")] == ["pair 3", "pair 5", "pairs", "pairs", "pairs", "pictures"]
    assert back.manifest["placed"] is False


def test_captions_keep_every_picture_and_count_the_pairs_as_lost(made, tmp_path):
    back, written, lost = there_and_back("captions", made, tmp_path)
    found = [(r["prompt"], r["picture"]["bytes"]) for table in back.pictures() for r in table.to_pylist()]
    assert found == [(PROMPTS[n > 2], painted(n, KINDS[n])) for n in range(5)]
    assert written == {"pictures": 5} and lost == {"the format holds pictures, not pairs": 5} | NAMELESS and back.counts["pairs"] == 0


def test_thumbs_go_there_and_back_and_each_liked_picture_beats_each_other_one(tmp_path):
    place = tmp_path / "in" / "train"
    place.mkdir(parents=True)
    rows = [("a hat", "exclusive_win"), ("a bag", "exclusive_win"), ("a hat", "exclusive_lose"), ("a hat", "exclusive_lose"),
            ("a hat", "exclusive_win")]
    for number in range(5):
        (place / f"{number}.png").write_bytes(painted(number))
    lines = ["file_path,caption,label", *(f"{n}.png,{caption},{label}" for n, (caption, label) in enumerate(rows))]  # as its description has it
    (tmp_path / "in" / "train_processed_v3.csv").write_text("\n".join(lines))
    found = formats.read("kto", tmp_path / "in", tmp_path / "set")
    assert [row[1:4] for row in told(found)] == [(painted(w), painted(loser), 1.0) for w, loser in ((0, 2), (0, 3), (4, 2), (4, 3))]
    back, written, lost = there_and_back("kto", found, tmp_path)
    assert [(r["prompt"], r["picture"]["bytes"], r["liked"]) for table in back.pictures() for r in table.to_pylist()] == [
        (caption, painted(n), label == "exclusive_win") for n, (caption, label) in enumerate(rows)]
    assert told(back) == told(found) and written == {"exclusive_win": 3, "exclusive_lose": 2} and lost == NAMELESS
    for name in ("csv", "folders"):
        assert formats.write(name, found, tmp_path / name)[1]["the format has no place for a picture's thumb"] == 5


def test_thumbs_of_pairs_are_who_won_and_who_lost(made, tmp_path):
    back, written, lost = there_and_back("kto", made, tmp_path)
    with (tmp_path / "kto" / "train_processed_v3.csv").open(newline="") as file:
        found = [row["split"].removeprefix("exclusive_") for row in csv.DictReader(file)]
    assert found == ["win", "lose", "lose", "lose", "win"]
    assert sum(written.values()) == 5 and lost == {"the pair is a tie": 1, "the pair has no label": 1} | NOWHERE
    assert back.counts["pairs"] == 3, "the other three"


def test_what_thumbs_cannot_tell_of_pairs_is_counted_pair_by_pair(tmp_path):
    pictures = [{"group": "hat", "candidate": n, "prompt": "a hat", "picture": {"bytes": painted(n), "path": None}} for n in range(5)]
    labels = [(0, 1, 1.0), (1, 0, 0.0), (1, 2, 1.0), (3, 4, 0.7), (3, 4, 0.5), (0, 2, 1.0)]  # 1 loses and wins, 3 and 4 do neither outright
    made = pairsets.write(tmp_path / "set", pictures, [{"group": "hat", "first": a, "second": b, "label": label} for a, b, label in labels], {})
    back, written, lost = there_and_back("kto", made, tmp_path)
    assert [row[1:4] for row in told(back)] == [(painted(0), painted(2), 1.0)]
    assert written == {"exclusive_win": 1, "exclusive_lose": 1, "intersections": 1}
    assert lost == {"the picture has no thumb, and neither won nor lost": 2, "the winner is not liked throughout, or the loser is elsewhere": 3,
                    "the label is a share, which the format has no place for": 1, "the pair is a tie": 1}
    again = pairsets.write(tmp_path / "again", pictures, [{"group": "hat", "first": 0, "second": 1, "label": 1.0}] * 2, {})
    assert formats.write("kto", again, tmp_path / "out")[1]["the pair came before"] == 1


def test_an_annotator_whom_pick_a_pic_has_no_number_for_is_counted(tmp_path):
    pictures = [{"group": "hat", "candidate": n, "prompt": "a hat", "picture": {"bytes": painted(n), "path": None}} for n in range(2)]
    pairs = [{"group": "hat", "first": 0, "second": 1, "label": 1.0, "annotator": who, "source": "12"} for who in ("ann", "7", None)]
    _, lost = formats.write("pickapic", pairsets.write(tmp_path / "set", pictures, pairs, {}), tmp_path / "out")
    assert lost == {"the pair's annotator is no whole number, as the format needs it": 1}
    assert listed(tmp_path / "out") == [{"where": "pair 1", "reason": next(iter(lost)), "detail": "ann"}]


def test_hugging_faces_own_library_reads_what_is_written(made, tmp_path):
    from datasets import load_dataset

    formats.write("huggingface", made, tmp_path / "out")
    found = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert found[0]["image_1"].size == (10, 12) and found["label"][:] == [1.0, 0.0, 0.5, 0.0, None]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_any_text_survives_a_csv_and_none_is_a_formula(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    files.write_csv(path, ["prompt", "label"], iter([[text, 0.5], ["'" + text, None]]))
    rows = [make() for _, make in tables.csv_rows(trees.at(path), path.name)]
    assert rows == [{"prompt": text, "label": "0.5"}, {"prompt": "'" + text, "label": ""}]
    for row in list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))[1:]:
        assert row[0][0] not in "=+-@\t\r\n"


# -- what is left out


def preference(place, **changes):
    row = {"image_0": "a.png", "image_1": "b.png", "prompt": "a hat", "prefer_0": True, "prefer_1": False} | changes
    return json.dumps({name: value for name, value in row.items() if value is not ...})


@pytest.fixture
def source(tmp_path):
    """A folder with two sound pictures, and a secret beside it."""
    place = tmp_path / "in"
    place.mkdir()
    (place / "a.png").write_bytes(painted(1))
    (place / "b.png").write_bytes(painted(2))
    (tmp_path / "secret.png").write_bytes(painted(3))
    return place


BAD_LINES = [
    ('{"image_0": ', "the line is not JSON"),
    ("[1, 2]", "the line is not an object"),
    ("\xff\xfe", "the line is not JSON"),
    (preference("", prompt=...), "there is no prompt"),
    (preference("", prompt="  "), "the prompt is empty"),
    (preference("", prompt=7), "the prompt is not text"),
    (preference("", prompt="\ud800"), "the prompt is not UTF-8"),
    (preference("", prompt="x" * 20_001), "the prompt is longer than 20,000 letters"),
    (preference("", prefer_0=None), "prefer_0 and prefer_1 are not both true or false"),
    (preference("", image_0="c.png"), "the file is not there"),
    (preference("", image_0=""), "there is no file name"),
    (preference("", image_0="a\0.png"), "the file is not there"),
    (preference("", image_0="x" * 5000), "the file is not there"),
    (preference("", image_0="../secret.png"), "the path leads out of its folder"),
    (preference("", image_0="sub/../../secret.png"), "the path leads out of its folder"),
    (preference("", image_0="/etc/passwd"), "the path leads out of its folder"),
    (preference("", image_0="C:\\secret.png"), "the path leads out of its folder"),
    (preference("", image_0="link.png"), "the path leads out of its folder"),
    (preference("", image_0="linked/secret.png"), "the path leads out of its folder"),
    (preference("", image_0="pipe"), "the file is not there"),
    (preference("", image_0="text.png"), "the picture cannot be read"),
    (preference("", image_0="cut.png"), "the picture cannot be read"),
    (preference("", image_0="empty.png"), "there is no picture"),
    (preference("", image_0="bomb.png"), "its pixels are too many"),
    (preference("", image_0="thin.png"), "the picture has a side below 8 or above 16,384 pixels"),
    ("[" * 100_000, "the line is not JSON"),
]


def test_a_half_broken_file_gives_what_is_whole_and_names_every_loss(source, tmp_path):
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    (source / "linked").symlink_to(tmp_path)
    os.mkfifo(source / "pipe")
    (source / "text.png").write_text("not a picture")
    (source / "cut.png").write_bytes(painted(1)[:60])
    (source / "empty.png").touch()
    (source / "bomb.png").write_bytes(bomb(9000))
    Image.new("RGB", (100, 4)).save(source / "thin.png")
    good = preference("")
    lines = [good, *(line for line, _ in BAD_LINES), "", good.replace("a hat", "a bag")]
    (source / "metadata.jsonl").write_text("\n".join(lines), encoding="latin-1")
    found = formats.read("invoke", source, tmp_path / "set")
    assert [row[0] for row in told(found)] == ["a hat", "a bag"]
    losses = listed(tmp_path / "set")
    assert [(row["where"], row["reason"]) for row in losses] == [
        *((f"metadata.jsonl, line {number}", reason) for number, (_, reason) in enumerate(BAD_LINES, 2)),
        ("link.png", "the link leads out of the folder"), ("linked", "the link leads out of the folder"), ("pipe", "it is no regular file")]
    assert sum(reasons(found).values()) == len(BAD_LINES) + 3 and reasons(found)["the path leads out of its folder"] == 6
    assert all(painted(3) not in row for row in told(found))


def test_a_line_that_never_ends_is_left_out_in_bounded_pieces(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_LINE", 200)
    (source / "metadata.jsonl").write_text(preference("") + "\n" + "x" * 1000 + "\n" + preference("", prompt="a bag") + "\n")
    found = formats.read("invoke", source, tmp_path / "set")
    assert [row[0] for row in told(found)] == ["a hat", "a bag"] and listed(tmp_path / "set")[0]["where"] == "metadata.jsonl, line 2"


def test_where_nothing_can_be_used_there_is_a_sentence_and_no_set(source, tmp_path):
    (source / "metadata.jsonl").write_text(preference("", image_0="../secret.png") + "\n")
    with pytest.raises(UserError, match=r"nothing in it can be used as 'invoke' \(2 x no row that was taken names the picture; "
                                         r"1 x the path leads out of its folder; every one of them: "
                                         r".*/\.set\.tmp/dropped\.jsonl\): it needs a metadata\.jsonl"):
        formats.read("invoke", source, tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()
    (source / "metadata.jsonl").write_text(preference(""))
    assert formats.read("invoke", source, tmp_path / "set").counts["pairs"] == 1, "and the folder can be used again"


@pytest.mark.parametrize(("name", "sentence"), [
    ("invoke", "metadata.jsonl is not there"), ("pickapic", "there is no .parquet file in it"), ("folders", "there are no folders w and l in it"),
    ("kto", "there is no train_processed_v3.csv in it, and 0 other .csv files"), ("csv", "pairs.csv is not there"),
    ("json", "there is no .json file in it"),
    ("huggingface", "there is no table in it (.parquet, .arrow, .jsonl")])
def test_an_empty_folder_is_told_what_it_lacks(name, sentence, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=re.escape(sentence)):
        formats.read(name, tmp_path / "in", tmp_path / "set")


def test_a_format_nobody_knows_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="no format called 'pickapick'; did you mean 'pickapic'"):
        formats.FORMATS.find("pickapick")


def pickapic(path, **changes):
    columns = {"caption": ["a hat"] * 4, "jpg_0": [painted(n, "JPEG") for n in (0, 1, 2, 3)], "jpg_1": [painted(n, "JPEG") for n in (4, 5, 6, 7)],
               "label_0": [1.0, 0.0, 0.5, 0.5], "label_1": [0.0, 1.0, 0.5, 0.5], "has_label": [True, True, True, False],
               "image_0_uid": list("abcd"), "image_1_uid": list("efgh"), "ranking_id": [1, 2, 3, 4], "user_id": [9, 9, 8, 8]}
    pq.write_table(pa.table(columns | changes), path)


def test_pick_a_pics_ties_and_rows_without_a_label_are_what_they_say(tmp_path):
    pickapic(tmp_path / "p.parquet")
    found = formats.read("pickapic", tmp_path / "p.parquet", tmp_path / "set")
    assert [row[3:] for row in told(found)] == [(1.0, "9", None, "1"), (0.0, "9", None, "2"), (0.5, "8", None, "3"), (None, "8", None, "4")]
    assert found.counts == {"pictures": 8, "pairs": 4, "labelled": 3, "ties": 1}


@pytest.mark.parametrize(("row", "label"), [
    ({"label_0": 0.25, "label_1": 0.75}, 0.25), ({"label_0": 1, "label_1": 0, "has_label": None}, 1.0), ({"has_label": False}, None)])
def test_pick_a_pics_labels(row, label):
    assert label_of(row) == label


@pytest.mark.parametrize("row", [{"label_0": 1.0, "label_1": 1.0}, {"label_0": float("nan"), "label_1": 0.0}, {"label_0": 2.0, "label_1": -1.0},
                                 {"label_0": None, "label_1": 1.0}, {}])
def test_pick_a_pics_labels_that_mean_nothing_are_refused(row):
    with pytest.raises(formats.Refused):
        label_of(row)


def test_a_parquet_file_that_is_cut_or_has_other_columns_is_one_loss_among_sound_ones(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        pickapic(tmp_path / "in" / f"{name}.parquet")
    whole = (tmp_path / "in" / "a.parquet").read_bytes()
    (tmp_path / "in" / "a.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.table({"x": [1]}), tmp_path / "in" / "c.parquet")
    found = formats.read("pickapic", tmp_path / "in", tmp_path / "set")
    assert found.counts["pairs"] == 4
    assert reasons(found) == {"the Parquet file is broken": 1, "the Parquet file has none of the format's columns": 1}


def test_a_damaged_page_costs_the_rows_behind_it_and_says_how_many(tmp_path):
    path = tmp_path / "p.parquet"
    pickapic(path, jpg_0=[painted(0, "JPEG")] * 4)
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    at = column.dictionary_page_offset or column.data_page_offset
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="4 x the Parquet file is broken"):
        formats.read("pickapic", path, tmp_path / "set")
    assert "4 of its 4 rows" in (tmp_path / ".set.tmp" / "dropped.jsonl").read_text()


def test_a_picture_that_several_pairs_show_is_kept_once(tmp_path):
    pickapic(tmp_path / "p.parquet", jpg_1=[painted(0, "JPEG")] * 4, image_1_uid=["a"] * 4)
    found = formats.read("pickapic", tmp_path / "p.parquet", tmp_path / "set")
    assert found.counts["pictures"] == 4
    assert [(r["first"], r["second"]) for t in found.pairs() for r in t.to_pylist()] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_hugging_faces_folders_of_files_and_names_that_others_use(source, tmp_path):
    (source / "metadata.csv").write_text("chosen_file_name,rejected_file_name,text\na.png,b.png,a hat\nb.png,../secret.png,a bag\n")
    found = formats.read("huggingface", source, tmp_path / "set")
    assert [row[:4] for row in told(found)] == [("a hat", painted(1), painted(2), 1.0)]
    assert reasons(found) == {"the path leads out of its folder": 1}
    (source / "metadata.csv").unlink()
    lines = [{"image_0_file_name": "a.png", "image_1_file_name": "b.png", "prompt": "a hat", "label": 0.75}, {"file_name": "a.png", "text": "a bag"},
             {"one": "a.png", "text": "a bag"}, {"image_0_file_name": "a.png", "image_1_file_name": "b.png", "prompt": "a hat", "label": 3}]
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = formats.read("huggingface", source, tmp_path / "set2")
    assert [row[3] for row in told(found)] == [0.75] and found.counts["pictures"] == 3
    assert reasons(found) == {"there are no pictures under names that are known": 1, "the label is not between 0 and 1": 1}


def test_folders_say_which_half_of_a_pair_is_missing(tmp_path):
    for number, name in enumerate(["w/a.png", "l/a.png", "w/b.png", "l/c.png", "w/d.png", "l/d.png", "l/d.jpg", "w/e.png", "l/e.png"]):
        (tmp_path / "in" / "1_hat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "1_hat" / name).write_bytes(painted(number))
    (tmp_path / "in" / "1_hat" / "l" / "a.txt").write_text("a hat\n")
    found = formats.read("folders", tmp_path / "in", tmp_path / "set")
    assert [row[:4] for row in told(found)] == [("a hat", painted(0), painted(1), 1.0)]
    assert [(row["where"], row["reason"]) for row in listed(tmp_path / "set")] == [
        ("1_hat/w/b.png", "there is no picture of that name in l"), ("1_hat/l/c.png", "there is no picture of that name in w"),
        ("1_hat/w/d.png", "there are several pictures of that name in l"), ("1_hat/w/e.png", "there is no caption beside it")]


def test_a_csvs_broken_rows_are_named(source, tmp_path):
    lines = ["prompt,first,second,label", "a hat,a.png,b.png,1", "a hat,a.png", "a hat,a.png,b.png,x", "\udcff,a.png,b.png,1", "a hat,b.png,a.png,"]
    (source / "pairs.csv").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    found = formats.read("csv", source, tmp_path / "set")
    assert [row[3] for row in told(found)] == [1.0, None]
    assert [(row["where"], row["reason"]) for row in listed(tmp_path / "set")] == [
        ("pairs.csv, line 3", "the row has not as many cells as the first line"), ("pairs.csv, line 4", "the label is not a number"),
        ("pairs.csv, line 5", "the row is not UTF-8: save the table as 'CSV UTF-8'")]


def test_shares_and_pictures_without_a_pair_are_counted_when_a_format_has_no_place_for_them(tmp_path):
    pictures = [{"group": "../../up", "candidate": n, "prompt": "a hat", "picture": {"bytes": painted(n), "path": None}} for n in range(3)]
    pairs = [{"group": "../../up", "first": 0, "second": 1, "label": 0.75}, {"group": "../../up", "first": 1, "second": 0, "label": 1.0}]
    made = pairsets.write(tmp_path / "set", pictures, pairs, {})
    written, lost = formats.write("invoke", made, tmp_path / "deep" / "out")
    assert written == {"pairs": 1, "pictures": 2}
    assert lost == {"the picture is in no pair": 1, "the label is a share, which the format has no place for": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"set", "deep"}, "a group's key leads nowhere"


def test_an_export_is_whole_or_absent(made, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    with pytest.raises(UserError, match="is there already"):
        formats.write("csv", made, tmp_path / "mine")
    for place, words in ((tmp_path / "mine" / "letter", "is a file: name a folder"), (tmp_path / "mine" / "letter" / "x", "cannot be made")):
        with pytest.raises(UserError, match=words):
            formats.write("csv", made, place)
    monkeypatch.setattr(files.Pictures, "put", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        formats.write("csv", made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    formats.write("csv", made, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["identity"] == made.identity
