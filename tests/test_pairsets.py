"""Pair sets on disk: whole or not at all, shard by shard, and what is wrong with one in a sentence."""

import json

import pytest
from whole_runs import session

from fashiondpo_pipeline import pairsets
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.pairsets import PairSet, Writer
from stages.exchanging import from_run


def picture(group, candidate, data=b"png", **more):
    return {"group": group, "candidate": candidate, "prompt": f"a {group}", "picture": {"bytes": data, "path": f"{group}.png"}, **more}


PICTURES = [picture("hat", 0), picture("hat", 1, b"jpg", source="b.jpg"), picture("bag", 0, b"x" * 50, liked=True), picture("hat", 2)]
PAIRS = [{"group": "hat", "first": 1, "second": 0, "label": 1.0, "annotator": "ann", "gap": 0.25}, {"group": "hat", "first": 2, "second": 1},
         {"group": "hat", "first": 0, "second": 2, "label": 0.5, "source": "r7"}]
ABOUT = {"source": "made here", "lineage": {}, "dropped": {}}


@pytest.fixture
def made(tmp_path):
    return pairsets.write(tmp_path / "set", PICTURES, PAIRS, ABOUT)


def rows(tables):
    return [row for table in tables for row in table.to_pylist()]


def test_it_gives_back_what_was_written_in_its_order(made):
    again = PairSet.open(made.folder)
    found = rows(again.pictures())
    assert [(r["group"], r["candidate"], r["picture"]["bytes"], r["source"], r["liked"]) for r in found] == [
        ("hat", 0, b"png", None, None), ("hat", 1, b"jpg", "b.jpg", None), ("bag", 0, b"x" * 50, None, True), ("hat", 2, b"png", None, None)]
    assert [tuple(r.values()) for r in rows(again.pairs())] == [
        ("hat", 1, 0, 1.0, "ann", 0.25, None), ("hat", 2, 1, None, None, None, None), ("hat", 0, 2, 0.5, None, None, "r7")]
    assert again.counts == {"pictures": 4, "pairs": 3, "labelled": 2, "ties": 1}
    assert again.manifest["source"] == "made here"


def test_only_the_columns_asked_for_are_read(made):
    assert [table.column_names for table in made.pairs(["group", "label"])] == [["group", "label"]]


def test_a_single_picture_is_found_across_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(pairsets, "SHARD_BYTES", 4)  # two pictures of three bytes fill a shard
    monkeypatch.setattr(pairsets, "SHARD_ROWS", 2)
    made = pairsets.write(tmp_path / "set", PICTURES, PAIRS, ABOUT)
    assert [len(table) for table in made.pictures()] == [2, 1, 1] and [len(table) for table in made.pairs()] == [2, 1]
    assert made.picture("bag", 0)["picture"]["bytes"] == b"x" * 50
    assert made.picture("hat", 2)["prompt"] == "a hat"
    with pytest.raises(UserError, match="there is no picture 7 of 'hat'"):
        made.picture("hat", 7)


def test_without_an_end_there_is_no_set_and_the_next_writer_begins_afresh(tmp_path, monkeypatch):
    monkeypatch.setattr(pairsets, "SHARD_BYTES", 1)
    Writer(tmp_path / "set").picture(picture("old", 0))
    with pytest.raises(UserError, match="is no pair set"):
        PairSet.open(tmp_path / "set")
    made = pairsets.write(tmp_path / "set", PICTURES[:1], [], ABOUT)
    assert [row["group"] for row in rows(made.pictures())] == ["hat"]


@pytest.mark.parametrize("name", ["letter.txt", "pairs-of-shoes.parquet", "pictures-00000.parquet", "dropped.jsonl", ".hidden"])
def test_a_folder_with_anything_in_it_is_left_alone_whatever_it_is_called(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("dear")
    with pytest.raises(UserError, match=rf"is there already and is not empty \({name}\): name another folder"):
        Writer(tmp_path / "mine")
    assert (tmp_path / "mine" / name).read_text() == "dear" and len(list(tmp_path.iterdir())) == 1


def test_a_set_is_not_written_over_and_an_empty_folder_is_taken(made, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is there already"):
        Writer(made.folder)
    (tmp_path / "empty").mkdir()
    assert pairsets.write(tmp_path / "empty", PICTURES, PAIRS, ABOUT).identity == made.identity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "set"], "no draft is left"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"^\. is the folder you are in"):
        Writer(".")


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is there already and is a file: name a folder"):
        Writer(tmp_path / "file")
    with pytest.raises(UserError, match=r"file/below cannot be made \(Not a directory\): name a folder that you may write in"):
        Writer(tmp_path / "file" / "below")


def test_what_comes_to_lie_there_meanwhile_is_left_alone_and_the_draft_is_named(tmp_path):
    writer = Writer(tmp_path / "set")
    writer.picture(picture("hat", 0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"cannot take its place .*: all of it is in .*/\.set\.tmp, to be renamed"):
        writer.finish(ABOUT)
    assert (tmp_path / "set" / "letter.txt").read_text() == "dear" and PairSet.open(tmp_path / ".set.tmp").counts["pictures"] == 1


def test_what_is_missing_cut_short_or_strange_is_named(made):
    manifest = json.loads((made.folder / "manifest.json").read_text())
    del manifest["sum"]  # as earlier versions wrote it
    (made.folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 1"):
        PairSet.open(made.folder)
    (made.folder / "manifest.json").write_text(json.dumps({**manifest, "files": {"../pairs-00000.parquet": {"rows": 1, "bytes": 1, "sha256": ""}}}))
    with pytest.raises(UserError, match="not a file beside it"):
        PairSet.open(made.folder)
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    file = made.folder / "pairs-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"pairs-00000\.parquet is missing or cut short"):
        PairSet.open(made.folder)


@pytest.mark.parametrize(("change", "where"), [
    ({"counts": None}, "counts"), ({"counts": {"pictures": 4, "pairs": 3, "labelled": 2}}, "counts.ties: Field required"),
    ({"files": []}, "files"), ({"files": {"pairs-00000.parquet": {"rows": 3, "sha256": ""}}}, "files.pairs-00000.parquet.bytes: Field required"),
    ({"files": {"pairs-00000.parquet": {"rows": 3, "bytes": -1, "sha256": ""}}}, "files.pairs-00000.parquet.bytes"),
    ({"dropped": {"why": "x"}}, "dropped.why")])
def test_a_manifest_that_lacks_what_is_needed_is_told_what(made, change, where):
    file = made.folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=rf"manifest\.json is not that of a pair set of format 1 \({where}.*\): copy it again, or make"):
        PairSet.open(made.folder)


def test_a_manifest_that_is_no_object_is_told_so(made):
    (made.folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"is not that of a pair set of format 1 \(it: "):
        PairSet.open(made.folder)


def test_a_flipped_bit_is_found_by_its_hash(made):
    assert made.altered() == []
    file = made.folder / "pictures-00000.parquet"
    data = bytearray(file.read_bytes())
    data[data.index(b"jpg")] ^= 1
    file.write_bytes(data)
    assert PairSet.open(made.folder).altered() == [f"{file}: altered"]


def test_its_identity_is_its_content(made, tmp_path):
    copy = pairsets.write(tmp_path / "copy", PICTURES, PAIRS, {**ABOUT, "source": "elsewhere"})
    other = pairsets.write(tmp_path / "other", PICTURES, PAIRS[::-1], ABOUT)
    assert copy.identity == made.identity != other.identity


def test_a_runs_round_becomes_one(finished, tmp_path):
    run = session()
    made = from_run(run, 1, tmp_path / "set")
    r = run.chain(1).rounds[1]
    expected = run.output(r.pair).table("pairs", ["group", "winner", "loser", "margin"]).to_pylist()
    found = rows(made.pairs())
    won = [(p["group"], *((p["first"], p["second"]) if p["label"] else (p["second"], p["first"])), p["gap"]) for p in found]
    assert won == [tuple(row.values()) for row in expected]
    assert 0 < sum(p["label"] for p in found) < len(found), "the winner is shown first by a coin"
    candidates = run.output(r.sample).table("candidates", ["picture"])["picture"].to_pylist()
    assert [p["picture"]["bytes"] for p in rows(made.pictures())] == [p["bytes"] for p in candidates]
    assert made.manifest["lineage"]["pair"]["config"]["margin"] == 0.5
