"""What people say: on disk at once, as they said it; agreement and queues by numbers worked out by hand."""

import json
import math
import multiprocessing
import os
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fashiondpo_pipeline import annotations
from fashiondpo_pipeline.agreement import cohen_kappa, krippendorff_alpha
from fashiondpo_pipeline.annotations import Answer, Duel, Notebook
from fashiondpo_pipeline.errors import UserError


def answer(left: int, right: int, verdict: str, group: str = "g", annotator: str = "ann") -> Answer:
    return Answer(0, annotator, "here", group, left, right, verdict, (None, None))


# -- on disk

def test_an_answer_is_on_disk_when_add_returns_and_stands_after_the_process_is_gone(tmp_path):
    def click() -> None:
        book = Notebook(tmp_path / "annotations", "ann", "here")
        book.add("red dress", 3, 1, "left", ("aa", "bb"))
        os._exit(9)  # neither closed nor flushed

    child = multiprocessing.get_context("fork").Process(target=click)
    child.start()
    child.join()
    (found,) = Notebook(tmp_path / "annotations", "ann", "here").answers
    assert (found.group, found.left, found.right, found.verdict, found.pictures) == ("red dress", 3, 1, "left", ("aa", "bb"))


def test_undo_is_a_line_of_its_own_and_takes_back_the_last_that_stands(tmp_path):
    book = Notebook(tmp_path / "a", "ann", "here")
    for number, verdict in enumerate(("left", "tie", "skip")):
        book.add("g", number, 9, verdict)
    assert book.undo().verdict == "skip"
    assert book.undo().verdict == "tie"
    book.add("g", 5, 6, "both_bad")
    lines = [json.loads(line) for line in book.path.read_text().splitlines()]
    assert [line.get("undo", line.get("verdict")) for line in lines] == ["left", "tie", "skip", 2, 1, "both_bad"]
    book.close()
    assert [a.verdict for a in annotations.read(book.path)] == ["left", "both_bad"]


def test_undo_with_nothing_to_take_back_writes_nothing(tmp_path):
    book = Notebook(tmp_path / "a", "ann", "here")
    assert book.undo() is None and book.path.read_bytes() == b""


def test_answers_to_other_candidates_are_kept_and_left_alone(tmp_path):
    one = Notebook(tmp_path / "a", "ann", "round-01/sample-1")
    one.add("g", 0, 1, "left")
    one.close()
    two = Notebook(tmp_path / "a", "ann", "round-02/sample-2")
    assert two.answers == [] and two.undo() is None
    two.add("g", 0, 1, "right")
    two.close()
    assert [(a.of, a.verdict) for a in annotations.read_all(tmp_path / "a")] == [("round-01/sample-1", "left"), ("round-02/sample-2", "right")]
    assert [a.verdict for a in annotations.read_all(tmp_path / "a", "round-02/sample-2")] == ["right"]


def test_a_click_cut_off_in_the_middle_is_gone_and_said(tmp_path):
    book = Notebook(tmp_path / "a", "ann", "here")
    book.add("g", 0, 1, "left")
    book.close()
    whole = book.path.read_bytes()
    book.path.write_bytes(whole + b'{"of": "here", "gro')
    assert len(annotations.read(book.path)) == 1
    said = []
    again = Notebook(tmp_path / "a", "ann", "here", said.append)
    assert said == [f"{book.path}: the last 19 bytes were of a click that was never confirmed, and are gone"]
    assert book.path.read_bytes() == whole
    again.add("g", 0, 2, "right")
    assert [a.verdict for a in annotations.read(book.path)] == ["left", "right"]


def test_the_last_answer_to_a_duel_counts_whichever_way_it_was_shown(tmp_path):
    book = Notebook(tmp_path / "a", "ann", "here")
    book.add("g", 0, 1, "left")
    book.add("g", 1, 0, "left")
    assert [a.label for a in annotations.read_all(tmp_path / "a")] == ["second"]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    book = Notebook(tmp_path / "a", "ann", "here")
    book.add("g", 0, 1, "left")
    whole, write = book.path.read_bytes(), os.write
    monkeypatch.setattr(annotations.os, "write", lambda file, data: write(file, data[:10]))
    with pytest.raises(UserError, match=r"ann\.jsonl: that was not kept \(No space left on device\): make room, and say it again"):
        book.add("g", 0, 2, "left")
    assert book.path.read_bytes() == whole
    assert len(book.answers) == 1


def test_clicks_from_two_queues_are_numbered_one_after_another(tmp_path, monkeypatch):
    book, write, begun, go = Notebook(tmp_path / "a", "ann", "here"), os.write, threading.Event(), threading.Event()

    def slow(file: int, data: bytes) -> int:
        begun.set()
        assert go.wait(60)
        return write(file, data)

    monkeypatch.setattr(annotations.os, "write", slow)
    clicks = [threading.Thread(target=book.add, args=("g", 0, other, "left")) for other in (1, 2)]
    clicks[0].start()
    assert begun.wait(60)
    clicks[1].start()
    clicks[1].join(0.5)  # time enough to take the number that is being written
    go.set()
    for click in clicks:
        click.join()
    assert [a.number for a in book.answers] == [a.number for a in annotations.read(book.path)] == [0, 1]
    book.undo()
    assert [a.right for a in annotations.read(book.path)] == [1], "what is taken back is the last"


def test_a_folder_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "a").write_text("in the way")
    with pytest.raises(UserError, match=r"a/ann\.jsonl cannot be written \(File exists\): see to the folder"):
        Notebook(tmp_path / "a", "ann", "here")


def test_a_name_in_use_is_refused(tmp_path):
    book = Notebook(tmp_path / "a", "ann", "here")
    with pytest.raises(UserError, match=r"ann\.jsonl is in use by another studio: take another name, or close that one"):
        Notebook(tmp_path / "a", "ann", "here")
    Notebook(tmp_path / "a", "bob", "here").close()
    book.close()
    Notebook(tmp_path / "a", "ann", "here").close()


@pytest.mark.parametrize("name", ["", "../ann", "a/b", ".hidden", "-x", "a\x00b", "x" * 65, "änn"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a file: take letters, digits"):
        Notebook(tmp_path / "a", name, "here")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nonsense", "Expecting value"), ("{}", "'of'"), ("[]", "list"), ('{"undo": 7}', "7"),
        ('{"of": "h", "group": "g", "left": 1, "right": 1, "verdict": "tie", "pictures": [null, null]}', "of 1 and 1"),
        ('{"of": "h", "group": "g", "left": 1, "right": 2, "verdict": "best", "pictures": [null, null]}', "verdict 'best'"),
    ],
)
def test_a_line_that_is_no_answer_is_named(tmp_path, line, why):
    path = tmp_path / "ann.jsonl"
    path.write_text('{"of": "h", "group": "g", "left": 1, "right": 2, "verdict": "tie", "pictures": [null, null]}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"ann\.jsonl, line 2: this is no answer \(.*{why}.*\); take the line out or put it right"):
        annotations.read(path)


# -- what an answer means

@pytest.mark.parametrize(
    ("left", "right", "verdict", "label", "preference"),
    [(0, 1, "left", "first", 1.0), (1, 0, "left", "second", 0.0), (0, 1, "right", "second", 0.0), (1, 0, "right", "first", 1.0),
     (1, 0, "tie", "tie", 0.5), (0, 1, "both_bad", "both_bad", 0.5), (0, 1, "skip", None, None)],
)
def test_a_label_does_not_depend_on_the_side(left, right, verdict, label, preference):
    found = answer(left, right, verdict)
    assert (found.duel, found.label, found.preference) == (Duel("g", 0, 1), label, preference)


def test_sides_are_thrown_by_key_and_half_are_swapped():
    duels = [Duel(f"g{n}", 0, 1) for n in range(1000)]
    sides = [duel.sides("ann") for duel in duels]
    assert sides == [duel.sides("ann") for duel in duels] != [duel.sides("bob") for duel in duels]
    assert 440 < sides.count((1, 0)) < 560  # 500 +- 4 standard deviations
    assert {tuple(sorted(side)) for side in sides} == {(0, 1)}


def test_pixels_name_a_picture_not_its_file():
    red = Image.new("RGB", (4, 2), "red")
    assert annotations.hash_pixels(red) == annotations.hash_pixels(red.convert("RGBA")) != annotations.hash_pixels(red.resize((2, 4)))


# -- agreement

def test_cohen_by_hand():
    """Fifty items, both yes 20, both no 15, yes-no 5, no-yes 10: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5."""
    cells = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    one, other = (dict(enumerate(column)) for column in zip(*cells, strict=True))
    assert cohen_kappa(one, other) == pytest.approx(0.4)
    assert cohen_kappa(one | {99: "y"}, other | {100: "n"}) == pytest.approx(0.4), "what only one labelled does not count"


def test_cohen_without_anything_to_agree_on_is_missing():
    assert math.isnan(cohen_kappa({1: "a"}, {2: "a"}))
    assert math.isnan(cohen_kappa({1: "a", 2: "a"}, {1: "a", 2: "a"}))


def test_krippendorff_of_two_by_hand():
    """Ten items, four labelled apart: D_o = 8; fourteen 0 and six 1 of n = 20: D_e = 2 * 14 * 6 / 19."""
    one, other = (dict(enumerate(text)) for text in ("0100000010", "1110010000"))
    assert krippendorff_alpha([one, other]) == pytest.approx(1 - 8 * 19 / 168)


def test_krippendorff_of_four_with_gaps_as_published():
    """The example of Krippendorff 2011, section C: four observers, twelve units, alpha 0.743."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    assert krippendorff_alpha([{i: x for i, x in enumerate(row) if x != "."} for row in rows]) == pytest.approx(0.743, abs=5e-4)


def test_krippendorff_without_disagreement_to_expect_is_missing():
    assert math.isnan(krippendorff_alpha([]))
    assert math.isnan(krippendorff_alpha([{1: "a", 2: "a"}, {1: "a"}]))


@given(st.dictionaries(st.integers(0, 20), st.sampled_from("abc"), min_size=2))
def test_whoever_agrees_with_themselves_agrees_wholly(one):
    wholly = 1.0 if len(set(one.values())) > 1 else float("nan")
    assert cohen_kappa(one, one) == pytest.approx(wholly, nan_ok=True)
    assert krippendorff_alpha([one, one, one]) == pytest.approx(wholly, nan_ok=True)


# -- queues

def test_the_most_disputed_come_first():
    """Gaps of (0, 1), (0, 2), (1, 2) are -1, -3, -2 to one expert and 2, 1, -1 to the other: disputes min(1, 2), min(3, 1), none."""
    groups, nan = pa.array(["g", "h"]), np.nan
    normal = {"one": np.array([[0.0, 1.0, 3.0], [0, 0.5, nan]]), "other": np.array([[2.0, 0.0, 1.0], [4, 0, 9]])}
    assert annotations.most_disputed(groups, normal) == [Duel("g", 0, 1), Duel("g", 0, 2), Duel("h", 0, 1)]
    assert annotations.most_disputed(groups, normal, most=1) == [Duel("g", 0, 1)]
    assert annotations.most_disputed(groups, {"one": normal["one"]}) == []


def test_random_pairs_are_each_once_and_in_an_order_of_the_seed():
    groups, known = pa.array(["g", "h"]), np.array([[True, True, True, True], [True, False, True, False]])
    found = annotations.at_random(groups, known, 7)
    assert sorted((d.group, d.first, d.second) for d in found) == [
        *(("g", a, b) for a in range(4) for b in range(a + 1, 4)), ("h", 0, 2)]
    assert found == annotations.at_random(groups, known, 7) != annotations.at_random(groups, known, 8)
    assert annotations.at_random(groups, known, 7, most=3) == found[:3]


def test_a_list_of_pairs_in_every_form(tmp_path):
    table = pa.table({"group": ["g", "g", "h"], "first": [1, 0, 1], "second": [0, 1, 2], "more": ["x"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("group,first,second\ng,1,0\ng,0,1\nh,1,2\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    known = {"g": {0, 1}, "h": {1, 2}}
    (tmp_path / "a.tsv").write_text("group\tfirst\tsecond\ng\t1\t0\nh\t1\t2\n")
    for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl"):
        assert annotations.listed(tmp_path / name, known) == [Duel("g", 0, 1), Duel("h", 1, 2)]


def test_a_key_of_digits_stays_as_it_is_written(tmp_path):
    (tmp_path / "a.csv").write_text("group,first,second\n007,1,0\n")
    assert annotations.listed(tmp_path / "a.csv", {"007": {0, 1}, "7": {0, 1}}) == [Duel("007", 0, 1)]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.csv", "group,first\ng,1\n", "no column 'second' in its first line, only group, first; name the columns there"),
        ("a.csv", "group,first,second\ng,0,1\ng,0,7\n", "line 3: 'g' has no candidates 0 and 7 to compare; take it out"),
        ("a.csv", "group,first,second\nx,0,1\n", "line 2: 'x' has no candidates 0 and 1 to compare"),
        ("a.csv", "group,first,second\ng,1,1\n", "line 2: 'g' has no candidates 1 and 1 to compare"),
        ("a.csv", "", "no column 'group', 'first', 'second' in its first line; name the columns there"),
        *(("a.jsonl", json.dumps({"group": group, "first": first, "second": 1}), "line 1: it should say the group and two candidates' numbers")
          for group, first in (("g", [0]), ("g", "x"), ("g", None), ("g", 0.5), ("g", True), ("g", 1e999), ("g", -1), ([], 0), (None, 0))),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON \\(it is nested more than 64 deep\\); take it out|line 1: not JSON"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.txt", "g 0 1", "a list of pairs is a .csv, .tsv, .jsonl or .parquet file with the columns group, first and second"),
    ],
)
def test_a_list_that_is_none(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=why):
        annotations.listed(tmp_path / name, {"g": {0, 1}})
