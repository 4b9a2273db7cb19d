"""What the columns of other programs' tables mean: labels in every form, names of winner and loser, parts of a set, what was not read."""

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_formats import listed, painted, reasons, told
from test_import_files import LEFT

from fashiondpo_pipeline import checks, formats
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import meaning, splits, tables
from fashiondpo_pipeline.formats.guess import guess
from fashiondpo_pipeline.formats.meaning import label_of, side_named
from fashiondpo_pipeline.schemas import PICTURE
from stages.exchanging import columns_of

SIDES = ("image_0", "image_1")
CASES = Path(__file__).resolve().parent.parent.parent / "shared" / "cases"


def table(path, rows=1, classes=None, **columns):
    """A Parquet file as `datasets` writes it: pictures as structs, each row with its own two; classes: column -> names of its numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name, values in columns.items() if values == "picture"]
    start = sum(path.name.encode()) * 100
    for i, name in enumerate(names):
        columns[name] = pa.array([{"bytes": painted(start + 10 * row + i), "path": None} for row in range(rows)], PICTURE)
    made = pa.table({"prompt": [f"hat {start + n}" for n in range(rows)]} | columns)
    if classes:
        features = {name: {"names": list(words), "_type": "ClassLabel"} for name, words in classes.items()}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path)
    return path


def imported(path, tmp_path, name="huggingface", **asked):
    return formats.read(name, path, tmp_path / f"set-{len(list(tmp_path.iterdir()))}", **asked)


def labels(pairs):
    return [row[3] for row in told(pairs)]


# -- whether anybody has chosen


NOBODY = [False, 0, 0.0, "0", "0.0", "false", "False", "no", Decimal("0"), Decimal("0.00")]
SOMEBODY = [True, 1, 1.0, "1", "1.0", "true", "TRUE", "yes", Decimal("1.0"), None, "", float("nan")]


@pytest.mark.parametrize("value", NOBODY)
@pytest.mark.parametrize("label", [{"label_0": 1.0, "label_1": 0.0}, {"label": 1.0}, {"prefer_0": True, "prefer_1": False}, {"choice": "left"}])
def test_a_row_that_says_that_nobody_chose_has_no_label_in_whatever_form_it_says_so(value, label):
    assert label_of({"has_label": value, **label}, SIDES) is None
    assert label_of({"has_label": True, **label}, SIDES) == 1.0


@pytest.mark.parametrize("value", SOMEBODY)
def test_a_row_that_does_not_say_so_keeps_its_label(value):
    assert label_of({"has_label": value, "label_0": 0.0, "label_1": 1.0}, SIDES) == 0.0


@pytest.mark.parametrize("value", ["maybe", 2, -1, [0]])
def test_what_is_neither_yes_nor_no_is_refused(value):
    with pytest.raises(formats.Refused, match="has_label is neither true nor false"):
        label_of({"has_label": value, "label": 1.0}, SIDES)


def test_a_winner_that_nobody_chose_has_not_won(tmp_path):
    found = imported(table(tmp_path / "in" / "a.parquet", 2, chosen="picture", rejected="picture", has_label=[0, 1]), tmp_path)
    assert labels(found) == [None, 1.0]


# -- what a label says


@pytest.mark.parametrize(("row", "label"), [
    ({"label_0": True, "label_1": False}, 1.0), ({"label_0": Decimal("0.00"), "label_1": Decimal("1.00")}, 0.0), ({"label_0": 1.0}, 1.0),
    ({"label_0": "0.25", "label_1": "0.75"}, 0.25), ({"label": Decimal("0.5")}, 0.5), ({"label": float("nan")}, None), ({"label": ""}, None),
    ({"prefer_0": "true", "prefer_1": "false"}, 1.0), ({"prefer_0": 1, "prefer_1": 1}, 0.5), ({"prefer_0": 0, "prefer_1": 0}, None),
    ({"prefer_1": True}, 0.0), ({"human_preference": [0, 1]}, 0.0), ({"human_preference": [3, 1]}, 0.75), ({}, None)])
def test_a_label_is_the_preference_for_the_first(row, label):
    assert label_of(row, SIDES) == label


@pytest.mark.parametrize(("word", "sides", "label"), [
    ("image_1", ("image_1", "image_2"), 1.0), ("image_1", ("image_0", "image_1"), 0.0), ("image2", ("image_1", "image_2"), 0.0),
    ("Left", SIDES, 1.0), ("right", SIDES, 0.0), ("A", SIDES, 1.0), ("b", SIDES, 0.0), ("Tie", SIDES, 0.5), ("both bad", SIDES, 0.5),
    ("win", SIDES, 1.0), ("jpg_0", ("jpg_0", "jpg_1"), 1.0), ("Image 1", ("left", "right"), 1.0), ("image_2", ("image_0", "image_1"), None),
    ("banana", SIDES, None), ("", SIDES, None)])
def test_a_side_is_named_as_its_column_is_or_by_a_common_word(word, sides, label):
    assert side_named(word, sides) == label


@pytest.mark.parametrize(("names", "expected"), [
    (["image_0", "image_1", "tie"], [1.0, 0.0, 0.5]), (["second", "first", "equal"], [0.0, 1.0, 0.5]), (["0", "1"], [0.0, 1.0]),
    (["no", "yes"], [0.0, 1.0]), (["lose", "win", "tie"], [0.0, 1.0, 0.5])])
def test_a_class_is_what_its_name_says_and_not_its_number(names, expected, tmp_path):
    numbers = list(range(len(names)))
    path = table(tmp_path / "in" / "a.parquet", len(names), {"label": names}, image_0="picture", image_1="picture", label=numbers)
    assert labels(imported(path, tmp_path)) == expected


def test_a_class_of_no_known_meaning_and_one_that_is_none_are_told_and_not_labelled(tmp_path):
    path = table(tmp_path / "in" / "a.parquet", 3, {"label": ["dress", "left"]}, image_0="picture", image_1="picture", label=[0, 1, -1])
    found = imported(path, tmp_path)
    assert labels(found) == [1.0, None] and reasons(found) == {"the label is not a number": 1}


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}', b"[" * 100_000])
def test_metadata_of_another_make_names_no_classes(metadata, tmp_path):
    path = table(tmp_path / "in" / "a.parquet", 1, image_0="picture", image_1="picture", label=[1])
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"huggingface": metadata}), path)
    assert labels(imported(path, tmp_path)) == [1.0]


# -- votes


@pytest.mark.parametrize("columns", [
    {"image1": "picture", "image2": "picture", "weighted_results_image1_preference": [0.9], "weighted_results_image2_preference": [0.1]},
    {"image1": "picture", "image2": "picture", "votes_image1": [9], "votes_image2": [1]},
    {"image_0": "picture", "image_1": "picture", "votes_0": [9], "votes_1": [1]},
    {"image_a": "picture", "image_b": "picture", "image_a_votes": [18], "image_b_votes": [2]}])
def test_votes_and_weighted_results_are_shares(columns, tmp_path):
    found = imported(table(tmp_path / "in" / "a.parquet", **columns), tmp_path)
    assert labels(found) == [0.9] and found.manifest["unread"] == [] and found.manifest["placed"]


@pytest.mark.parametrize(("votes", "label"), [((0, 0), None), ((5, 5), 0.5), ((-1, 2), "votes are below 0"), ((3, None), "votes are given for one")])
def test_votes_that_nobody_gave_are_no_label_and_impossible_ones_are_refused(votes, label):
    row = {"votes_0": votes[0], "votes_1": votes[1]}
    if isinstance(label, str):
        with pytest.raises(formats.Refused, match=label):
            label_of(row, SIDES)
    else:
        assert label_of(row, SIDES) == label


def test_columns_that_nothing_was_made_of_are_named(tmp_path):
    found = imported(table(tmp_path / "in" / "a.parquet", image_0="picture", image_1="picture", approval_0=[9], approval_1=[1]), tmp_path)
    assert labels(found) == [None] and found.manifest["unread"] == ["approval_0", "approval_1"]
    assert formats.notes(found) == ["note: columns that were not read: approval_0, approval_1; "
                                    "`fdpo import --columns OURS=THEIRS` says what one of them holds"]
    told_so = imported(tmp_path / "in", tmp_path, columns={"votes_first": "approval_0", "votes_second": "approval_1"})
    assert labels(told_so) == [0.9] and formats.notes(told_so) == []


def test_a_metadata_files_columns_that_nothing_was_made_of_are_named_too(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(2):
        (tmp_path / "in" / f"{n}.png").write_bytes(painted(n))
    (tmp_path / "in" / "metadata.csv").write_text("image_0_file_name,image_1_file_name,prompt,grade\n0.png,1.png,x,7\n")
    assert imported(tmp_path / "in", tmp_path).manifest["unread"] == ["grade"]


# -- names


@pytest.mark.parametrize("names", meaning.DECIDED)
def test_winner_and_loser_go_by_many_names_and_none_says_which_was_shown_first(names, tmp_path):
    winner, loser = names
    found = imported(table(tmp_path / "in" / "a.parquet", 6, **{loser: "picture", winner: "picture"}), tmp_path)
    assert labels(found) == [1.0] * 6 and not found.manifest["placed"] and not found.manifest["unread"]
    assert [row[1] for row in told(found)] == [row["bytes"] for row in pq.read_table(tmp_path / "in" / "a.parquet")[winner].to_pylist()]
    assert not any("won" in line for line in checks.sentences(checks.check(found)))


@pytest.mark.parametrize("format", ["csv", "huggingface", "pickapic", "json", "invoke"])
def test_a_set_without_an_order_gets_none_that_tells_the_winner_when_it_travels_on(format, tmp_path):
    found = imported(table(tmp_path / "in" / "a.parquet", 40, chosen="picture", rejected="picture"), tmp_path)
    formats.write(format, found, tmp_path / "out")
    back = imported(tmp_path / "out", tmp_path, format)
    winners = [[row[1] if row[3] else row[2] for row in told(one)] for one in (found, back)]
    assert winners[0] == winners[1] and 8 <= sum(labels(back)) <= 32
    assert not any("the first (left) picture won" in line for line in checks.sentences(checks.check(back)))


@pytest.mark.parametrize("sides", meaning.SIDES)
def test_sides_go_by_many_names_and_were_shown_in_that_order(sides, tmp_path):
    found = imported(table(tmp_path / "in" / "a.parquet", 6, **dict.fromkeys(sides, "picture"), label=[1.0] * 6), tmp_path)
    assert labels(found) == [1.0] * 6 and found.manifest["placed"]
    assert "the first (left) picture won 100.0 %" in "\n".join(checks.sentences(checks.check(found)))


def test_one_row_without_an_order_leaves_the_whole_set_without(tmp_path):
    table(tmp_path / "in" / "a.parquet", 3, image_0="picture", image_1="picture", label=[1.0] * 3)
    table(tmp_path / "in" / "b.parquet", 3, chosen="picture", rejected="picture")
    assert not imported(tmp_path / "in", tmp_path).manifest["placed"]


@pytest.mark.parametrize("format", ["huggingface", "csv"])
def test_other_names_are_told_on_the_command_line(format, tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(2):
        (tmp_path / "in" / f"{n}.png").write_bytes(painted(n))
    file = tmp_path / "in" / "metadata.csv"
    file.write_text("liked,disliked,words\n1.png,0.png,a hat\n")
    with pytest.raises(UserError, match="there is no prompt or caption or text"):
        imported(file, tmp_path, format)
    found = imported(file, tmp_path, format, columns=columns_of("winner=liked,loser=disliked,prompt=words"))
    assert told(found)[0][:4] == ("a hat", painted(1), painted(0), 1.0) and found.manifest["lineage"]["columns"]["winner"] == "liked"
    with pytest.raises(UserError, match="no column is called lked"):
        imported(file, tmp_path, format, columns={"winner": "lked", "prompt": "words"})


@pytest.mark.parametrize(("text", "sentence"), [
    ("winer=a", "there is no column called 'winer' here; did you mean 'winner'"), ("winner", "'winner' is not OURS=THEIRS"),
    ("winner=", "'winner=' is not OURS=THEIRS"), ("winner=a,loser=a", "'loser=a' says of a column what was said before"),
    ("winner=a,winner=b", "'winner=b' says of a column what was said before")])
def test_columns_that_make_no_sense_are_told(text, sentence):
    with pytest.raises(UserError) as told_so:
        columns_of(text)
    assert sentence in str(told_so.value)


# -- what a row may lack


@pytest.mark.parametrize(("value", "kept"), [(3, "3"), (3.0, "3"), (True, "True"), (Decimal("7"), "7"), ("ann", "ann"), (None, None), ("", None)])
def test_ids_that_are_numbers_become_text(value, kept, tmp_path):
    found = imported(table(tmp_path / "in" / "a.parquet", chosen="picture", rejected="picture", annotator=[value], source=[value]), tmp_path)
    assert [(row[4], row[6]) for row in told(found)] == [(kept, kept)] and not found.manifest["fields"]


def test_what_a_pair_can_do_without_is_dropped_alone_and_counted(tmp_path):
    path = table(tmp_path / "in" / "a.parquet", 2, chosen="picture", rejected="picture", source=[{"set": "x"}, {"set": "y"}], gap=["wide", "0.5"],
                 annotator=[["ann"], ["bob"]])
    found = imported(path, tmp_path)
    assert [row[3:] for row in told(found)] == [(1.0, None, None, None), (1.0, None, 0.5, None)] and not reasons(found)
    assert found.manifest["fields"] == {"the annotator is not text": 2, "the gap is not a number": 1, "the source is not text": 2}
    assert len(listed(found.folder)) == 5 and "note: 2 x the source is not text: the pair is kept without it" in formats.notes(found)


# -- parts of a set


@pytest.mark.parametrize(("name", "part"), [
    ("data/train-00000-of-00002.parquet", "train"), ("data/test_unique-00000-of-00001.parquet", "test_unique"),
    ("train-00000-of-00002-0a1b2c3d.parquet", "train"), ("validation/0000.parquet", "validation"), ("val.parquet", "validation"),
    ("dev_3.parquet", "validation"), ("default/train/0000.parquet", "train"), ("Test.parquet", "test"), ("hats-00000-of-00001.parquet", "hats"),
    ("pairs.parquet", None), ("latest.parquet", None), ("trainer/a.parquet", None), ("contest.parquet", None), ("a.parquet", None)])
def test_a_file_tells_its_part_as_the_hub_names_it(name, part):
    assert splits.split_of(Path(name)) == part


@pytest.fixture
def parts(tmp_path):
    for name, rows in (("train", 3), ("validation", 2), ("test", 2)):
        table(tmp_path / "in" / "data" / f"{name}-00000-of-00001.parquet", rows, chosen="picture", rejected="picture")
    unique = pq.read_table(tmp_path / "in" / "data" / "test-00000-of-00001.parquet").slice(0, 1)
    pq.write_table(unique, tmp_path / "in" / "data" / "test_unique-00000-of-00001.parquet")
    return tmp_path / "in"


def left(part, count):
    return {f"of the part '{part}', which was not asked for (--split)": count}


@pytest.mark.parametrize(("split", "pairs", "read", "dropped"), [
    (None, 3, {"train": 3}, left("test", 2) | left("test_unique", 1) | left("validation", 2)),
    ("val", 2, {"validation": 2}, left("test", 2) | left("test_unique", 1) | left("train", 3)),
    ("test_unique", 1, {"test_unique": 1}, left("test", 2) | left("train", 3) | left("validation", 2)),
    ("all", 7, {"test": 2, "train": 3, "validation": 2}, {"of the part 'test_unique', which 'test' holds too": 1})])
def test_one_part_is_read_and_every_other_is_named_with_its_count(parts, tmp_path, split, pairs, read, dropped):
    found = imported(parts, tmp_path, split=split)
    assert found.counts["pairs"] == pairs and found.manifest["splits"] == read and reasons(found) == dropped
    assert sum(read.values()) + sum(dropped.values()) == 8, "nothing is lost, nothing read twice"
    assert formats.notes(found)[0].startswith("split: ")


def test_folders_of_winners_and_losers_have_parts_too(tmp_path):
    for number, place in enumerate(("train/1_hat", "test/1_hat", "test/2_bag")):
        for n, side in enumerate("wl"):
            (tmp_path / "in" / place / side).mkdir(parents=True)
            (tmp_path / "in" / place / side / "a.png").write_bytes(painted(10 * number + n))
        (tmp_path / "in" / place / "w" / "a.txt").write_text(place)
    found = imported(tmp_path / "in", tmp_path, "folders")
    assert [row[0] for row in told(found)] == ["train/1_hat"] and reasons(found) == left("test", 2) and found.manifest["splits"] == {"train": 1}
    assert imported(tmp_path / "in", tmp_path, "folders", split="all").counts["pairs"] == 3


@pytest.mark.parametrize(("columns", "name"), [("winner,loser,prompt,split", "csv"), ("file_name,caption,split", "kto"),
                                               ("file_path,caption,label", "kto"), ("chosen_file_name,rejected_file_name,text,split", "huggingface")])
def test_a_column_of_parts_does_not_make_a_sheet_another_programs(columns, name, tmp_path):
    (tmp_path / "a.csv").write_text(columns + "\n")
    assert guess(tmp_path / "a.csv") == name


def test_a_part_that_is_not_there_and_parts_without_training_are_told(parts, tmp_path):
    with pytest.raises(UserError, match=r"no part called 'tst'; did you mean 'test'\? \(it has test, test_unique, train, validation\)"):
        imported(parts, tmp_path, split="tst")
    next(parts.rglob("train-*")).unlink()
    with pytest.raises(UserError, match="it has the parts test, test_unique, validation, and none is called train: say which with --split NAME"):
        imported(parts, tmp_path)


def test_a_file_that_is_named_and_the_only_part_there_is_are_read_whatever_they_are_called(parts, tmp_path):
    assert imported(next(parts.rglob("validation-*")), tmp_path).counts["pairs"] == 2
    for name in ("train", "test", "test_unique"):
        next(parts.rglob(f"{name}-*")).unlink()
    assert imported(parts, tmp_path).manifest["splits"] == {"validation": 2}


def test_metadata_files_have_parts_and_so_have_rows(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "in" / part).mkdir(parents=True)
        for n in range(2):
            (tmp_path / "in" / part / f"{n}.png").write_bytes(painted(n))
        line = json.dumps({"chosen_file_name": "0.png", "rejected_file_name": "1.png", "prompt": part}) + "\n"
        (tmp_path / "in" / part / "metadata.jsonl").write_text(line * 2)
    found = imported(tmp_path / "in", tmp_path)
    assert {row[0] for row in told(found)} == {"train"}
    assert reasons(found) == left("test", 2) | {"no row that was taken names the picture": 2}

    rows = "".join(f"{n}.png,{1 - n}.png,{part},{part}\n" for n, part in ((0, "train"), (1, "test"), (0, "")))
    (tmp_path / "in" / "train" / "pairs.csv").write_text("winner,loser,prompt,split\n" + rows.replace(",,\n", ",x,\n"))
    found = imported(tmp_path / "in" / "train", tmp_path, "csv")
    assert [row[0] for row in told(found)] == ["train", "x"] and found.manifest["splits"] == {"train": 1}
    assert reasons(found) == left("test", 1) | {"the file holds no rows of the format": 1}, "which is metadata.jsonl"
    assert imported(tmp_path / "in" / "train", tmp_path, "csv", split="all").counts["pairs"] == 3


# -- lists


def a_list(folder, objects, name="train.json", pictures=6):
    folder.mkdir(exist_ok=True)
    for n in range(pictures):
        (folder / f"{n}.png").write_bytes(painted(n))
    (folder / name).write_text(objects if isinstance(objects, str) else json.dumps(objects, indent=1))
    return folder / name


def pairs_of(found):
    """(first, second, label) of each pair by the pictures' numbers."""
    numbers = {painted(n): n for n in range(6)}
    return [(numbers[row[1]], numbers[row[2]], row[3]) for row in told(found)]


@pytest.mark.parametrize(("objects", "pairs", "placed"), [
    ([{"prompt": "x", "file_path": ["0.png", "1.png"], "human_preference": [0, 1]}], [(0, 1, 0.0)], True),  # HPDv2, train
    ([{"prompt": "x", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 2], "raw_annotations": []}],
     [(0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0)], False),  # HPDv2, test
    ([{"prompt": "x", "images": ["0.png", "1.png", "2.png"], "human_preference": 1}], [(0, 1, 0.0), (1, 2, 1.0)], False),  # HPDv1
    ([{"prompt": "x", "path1": "0.png", "path2": "1.png", "choice_dist": [3, 1], "confidence": 0.9}], [(0, 1, 0.75)], False),  # HPDv3
    ([{"prompt": "x", "path1": "0.png", "path2": "1.png", "choice_dist": [1, 3]}], [(0, 1, 0.75)], False),
    ([{"prompt": "x", "path1": "0.png", "path2": "1.png"}], [(0, 1, 1.0)], False),
    ([{"image1": "0.png", "image2": "1.png", "prompt": "x", "pw": "right", "annotator": 7}], [(0, 1, 0.0)], True),  # Label Studio, short
    ([{"prompt": "x", "preferred": "1.png", "unpreferred": "0.png"}], [(1, 0, 1.0)], False)])
def test_lists_of_objects_are_read_as_their_makers_mean_them(objects, pairs, placed, tmp_path):
    found = imported(a_list(tmp_path / "in", objects), tmp_path, "json")
    assert pairs_of(found) == pairs and found.manifest["placed"] == placed and not reasons(found)


def task(*annotations, **data):
    return {"id": 5, "data": {"caption": "x", "left_one": "/data/local-files/?d=0.png", "right_one": "/data/upload/3/1.png", **data},
            "annotations": list(annotations)}


def said(selected, who=1, **more):
    value = {"from_name": "pw", "to_name": "left_one,right_one", "type": "pairwise", "value": {"selected": selected}}
    return {"id": 9, "completed_by": who, "result": [value] if selected else [], **more}


def test_label_studios_export_is_a_pair_an_annotation(tmp_path):
    tasks = [task(said("left"), said("right", {"id": 2, "email": "ann@x"}), said("left", was_cancelled=True)), task(said(None, 3)), task()]
    found = imported(a_list(tmp_path / "in", tasks, "export.json"), tmp_path, "json")
    assert [(first, second, label) for first, second, label in pairs_of(found)] == [(0, 1, 1.0), (0, 1, 0.0)], "without an answer nothing is compared"
    assert [(row[4], row[6]) for row in told(found)] == [("1", "5"), ("ann@x", "5")]
    assert reasons(found) == {"the annotator skipped it": 1, "there are no pictures under names that are known": 2}
    plain = [{"id": 6, "data": {"prompt": "x", "image1": "0.png", "image2": "1.png"}, "annotations": [
        {"completed_by": 1, "result": [{"to_name": "image1", "type": "choices", "value": {"choices": ["Tie"]}}]}, {"completed_by": 2, "result": []}]}]
    assert labels(imported(a_list(tmp_path / "in", plain, "export.json"), tmp_path, "json")) == [0.5, None]


def test_pictures_are_found_beside_a_list_and_nowhere_else(tmp_path):
    file = a_list(tmp_path / "in", [{"prompt": "x", "preferred": a, "rejected": "1.png"} for a in
                                    ("9.png", "8.png", "http://x/0.png", "/etc/passwd", "../secret.png", 3)])
    for place, n in (("train/9.png", 2), ("images/8.png", 3)):
        (tmp_path / "in" / place).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / place).write_bytes(painted(n))
    (tmp_path / "secret.png").write_bytes(painted(4))
    found = imported(file, tmp_path, "json")
    assert pairs_of(found) == [(2, 1, 1.0), (3, 1, 1.0)]
    assert reasons(found) == {"the picture is at an address, which is not asked": 1, "the path leads out of its folder": 2,
                              "there is no file name": 1}


@pytest.mark.parametrize("piece", [3, 17, 1 << 20])
@pytest.mark.parametrize(("text", "count", "dropped"), [
    ("[%s]", 1, {}), (" [ %s,\n%s , %s ] ", 3, {}), ("[1, %s, 234, null]", 1, {"the item is not an object": 3}),
    ("[%s, {]", 1, {"the list is not JSON from here on": 1}), ("[%s", 1, {"the list is not JSON from here on": 1}),
    ("%s\n%s\n", 2, {}), ("[%s, " + "[" * 100_000, 1, {"the list is not JSON from here on": 1})])
def test_a_list_is_read_in_pieces_and_what_is_broken_costs_itself(text, count, dropped, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE", piece)
    row = json.dumps({"prompt": "é [,]}", "preferred": "0.png", "rejected": "1.png"}, ensure_ascii=False)
    found = imported(a_list(tmp_path / "in", text.replace("%s", row)), tmp_path, "json")
    assert len(told(found)) == count and reasons(found) == dropped and told(found)[0][0] == "é [,]}"


def test_an_object_without_end_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE", 50)
    monkeypatch.setattr(tables, "MOST_LINE", 200)
    row = json.dumps({"prompt": "x", "preferred": "0.png", "rejected": "1.png"})
    found = imported(a_list(tmp_path / "in", f'[{row}, {{"a": "{"x" * 10_000}"}}]'), tmp_path, "json")
    assert reasons(found) == {"the list is not JSON from here on": 1}


def test_parts_of_a_list_set_and_lists_that_say_nothing(tmp_path):
    row = {"prompt": "x", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]}
    a_list(tmp_path / "in", [row, {"prompt": "x", "file_path": ["0.png", "1.png", "2.png"]}, {"prompt": "x", "images": ["0.png"], "rank": [1, 2]},
                             {"prompt": "x", "images": ["0.png", "1.png", "2.png"], "human_preference": [1, 1, 0]}])
    a_list(tmp_path / "in", [row] * 3, "test.json")
    a_list(tmp_path / "in", '{\n "a": 1\n}', "info.json")
    found = imported(tmp_path / "in", tmp_path, "json")
    assert pairs_of(found) == [(0, 1, 1.0)] and reasons(found) == left("test", 3) | {
        "there is no prompt or caption or text": 1, LEFT: 3, "there are not as many ranks as pictures": 1,
        "it says of no picture of its list that it is the best, and gives no ranks": 2}
    assert guess(tmp_path / "in") == guess(tmp_path / "in" / "test.json") == "json"


# -- ranks


def test_rows_of_one_picture_with_a_rank_are_compared_within_their_prompt_and_list(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [("x", 0, 2, "a"), ("x", 1, 1, "a"), ("x", 2, 2, "a"), ("x", 3, 1, "b"), ("y", 4, 1, "a")]  # as ImageRewardDB has them
    for n in range(5):
        (tmp_path / "in" / f"{n}.png").write_bytes(painted(n))
    columns = {"prompt": [r[0] for r in rows], "image_path": [f"{r[1]}.png" for r in rows], "rank": [r[2] for r in rows],
               "prompt_id": [r[3] for r in rows]}
    pq.write_table(pa.table(columns), tmp_path / "in" / "metadata-train.parquet")
    found = imported(tmp_path / "in", tmp_path)
    assert pairs_of(found) == [(0, 1, 0.0), (0, 2, 0.5), (1, 2, 1.0)] and not found.manifest["placed"]
    assert [row[5] for row in told(found)] == [1.0, None, 1.0] and found.counts["pictures"] == 5


# -- what was met


@pytest.mark.skipif(not CASES.is_dir(), reason="the inputs that failed are not beside the repository")
@pytest.mark.parametrize(("name", "case", "expected"), [
    ("pickapic", "has-label-not-bool/int", [None, None]), ("huggingface", "has-label-not-bool/csv", [None]),
    ("huggingface", "has-label-not-bool/label", [None]), ("huggingface", "label-columns-unknown/in", [0.9]),
    ("huggingface", "optional-field-kills-row/in", [1.0]), ("huggingface", "optional-field-kills-row/in2", [1.0]),
    ("pickapic", "pickapic-label-forms/bool", [1.0, 1.0]), ("pickapic", "pickapic-label-forms/only0", [1.0, 1.0]),
    ("pickapic", "pickapic-label-forms/decimal", [1.0, 1.0]), ("pickapic", "splits-merged/in", [1.0] * 3),
    ("huggingface", "false-first-won/in", [1.0] * 6), ("csv", "false-first-won/winners", [1.0] * 6)])
def test_inputs_that_failed_mean_what_they_say(name, case, expected, tmp_path):
    found = imported(CASES / case, tmp_path, name)
    assert labels(found) == expected
    if "won" in case:
        assert not any("the first (left) picture won" in line for line in checks.sentences(checks.check(found)))
