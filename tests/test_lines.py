"""A line of what people say shows whether it is whole; what is broken is named, and its neighbours are kept."""

import json

import pytest

from fashiondpo_pipeline import annotations, lines
from fashiondpo_pipeline.annotations import Notebook, understand
from fashiondpo_pipeline.errors import UserError


@pytest.fixture
def book(tmp_path):
    """Five answers, the last of them taken back."""
    found = Notebook(tmp_path / "annotations", "ann", "here")
    for number in range(4):
        found.add(f"röt {number}", 0, number + 1, "left", ("aa", "bb"))
    found.undo()
    found.close()
    return found.path


def check(path) -> lines.Checked:
    return lines.check(path, understand)


def test_every_flipped_bit_of_every_line_is_named_and_its_neighbours_are_kept(book):
    data = book.read_bytes()
    for at in range(len(data)):
        for bit in (0, 5):
            harmed = bytearray(data)
            harmed[at] ^= 1 << bit
            book.write_bytes(harmed)
            line = data[:at].count(b"\n") + 1
            told = check(book).complaints
            assert told and f"ann.jsonl, line {line}: this is no whole line" in told[0], (at, bit)
            with pytest.raises(UserError, match=r"ann\.jsonl, line \d"):
                Notebook(book.parent, "ann", "here")
            lines.mend(book, understand)
            kept = check(book)
            lost = 0 if data[at : at + 1] == b"\n" else 1
            assert len(kept.whole) == 5 and len(kept.lost) == lost and not kept.complaints, "the loss is a line of its own"
            book.with_suffix(".broken").unlink()
            lines._tally(book).write_bytes(lines.tally(5, data.splitlines()[-1]))


@pytest.mark.parametrize("gone", [1, 2, 5])
def test_an_end_that_is_cut_off_is_known_by_the_tally(book, gone):
    kept = book.read_bytes().splitlines(keepends=True)[: 5 - gone]
    book.write_bytes(b"".join(kept))
    (told,) = check(book).complaints
    assert told == f"{book}: {gone} {'line' if gone == 1 else 'lines'} that were confirmed are gone"
    said = []
    again = Notebook(book.parent, "ann", "here", said.append)
    again.add("more", 0, 1, "left")
    again.close()
    assert said == [told] == check(book).complaints, "what is added hides nothing"
    assert annotations.read(book)[-1].number == 5


def test_a_line_that_is_cut_off_is_no_unconfirmed_click(book):
    book.write_bytes(book.read_bytes()[:-3])
    assert "line 5: this is no whole line (its end is missing)" in check(book).complaints[0]
    with pytest.raises(UserError, match="line 5: this is no whole line"):
        Notebook(book.parent, "ann", "here")


def test_a_file_that_is_gone_or_another_ones_is_named(book):
    other = Notebook(book.parent, "bob", "here")
    for number in range(5):
        other.add("g", 0, number + 1, "right")
    other.close()
    mine = book.read_bytes()
    book.write_bytes(other.path.read_bytes())
    assert "line 5: this is no whole line (it is not what was confirmed last)" in check(book).complaints[0]
    book.unlink()
    assert [path.name for path in lines.every(book.parent)] == ["ann.jsonl", "bob.jsonl"]
    assert check(book).complaints == [f"{book}: missing, with 5 lines that were confirmed"]
    book.write_bytes(mine)
    assert not check(book).complaints


def test_an_altered_tally_is_named_and_made_anew(book):
    tally = lines._tally(book)
    for harm in (b"", b"000000000003 junk\n", tally.read_bytes().replace(b"5", b"4", 1)):
        tally.write_bytes(harm)
        assert "annotations-ann.tally: altered" in check(book).complaints[0]
        assert lines.mend(book, understand) is None
        assert not check(book).complaints and check(book).confirmed == 5


def test_a_line_taken_out_leaves_the_others_numbers_as_they_are(book):
    kept = book.read_bytes().splitlines(keepends=True)
    book.write_bytes(b"".join(kept[1:]))
    assert [answer.number for answer in annotations.read(book)] == [1, 2], "the last line takes back number 3, not the fourth line"
    assert check(book).complaints == [f"{book}: 1 line that were confirmed are gone"]
    lines.mend(book, understand)
    assert not check(book).complaints
    assert json.loads(book.read_bytes().splitlines()[-1])["lost"] == [0]
    assert [answer.number for answer in annotations.read(book)] == [1, 2]


def test_lines_of_earlier_versions_are_read_and_counted_as_bare(tmp_path):
    path = tmp_path / "annotations" / "ann.jsonl"
    path.parent.mkdir()
    old = '{"of": "here", "group": "g", "left": 0, "right": 1, "verdict": "left", "pictures": [null, null]}\n'
    path.write_text(old + old.replace("1", "2") + '{"undo": 0}\n')
    assert [answer.number for answer in annotations.read(path)] == [1]
    book = Notebook(path.parent, "ann", "here")
    book.add("g", 0, 3, "tie")
    book.undo()
    book.undo()
    book.close()
    assert annotations.read(path) == []
    assert check(path).bare == 3 and not check(path).complaints


def test_the_tally_never_knows_of_more_than_is_on_disk(book, monkeypatch):
    """A process killed between line and tally leaves a line more than the tally knows of: that is whole."""
    monkeypatch.setattr(lines.Tally, "set", lambda self, count, last: None)
    again = Notebook(book.parent, "ann", "here")
    again.add("more", 0, 1, "left")
    again.close()
    assert not check(book).complaints and len(annotations.read(book)) == 4
