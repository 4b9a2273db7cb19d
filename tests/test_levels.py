"""Replies are read as levels only where there is no doubt, and probabilities add up."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import levels


@pytest.mark.parametrize("reply", [
    "8", " 8\n", "8.", "**8**", "'8'", "[8]", "8-Very Good Quality", "8-very good quality", "8 - Very Good Quality", "8: Very Good Quality",
    "8) Very Good Quality", "8 Very Good Quality", "8-Very Good", "8 (Very Good Quality)", "8/10", "8/10.", "8 out of 10", "8 of 10",
    "Category 8", "Category 8 of 10", "Category 8: 8-Very Good Quality", "The category is 8.", "Level: 8", "Score = 8", "Quality: 8/10",
    "Quality level: 8", "Answer: **8**", "Final answer: 8", "8, because the sleeves are even.", "8\n\nThe dress is complete.",
    '{"level": 8}', '```json\n{"level": 8}\n```', "<think>a 3, or a 4?</think>\n8",
])
def test_a_level_is_read(reply):
    assert levels.read_level(reply) == 8


@pytest.mark.parametrize("reply", [
    "", "eight", "Very Good Quality",  # no number
    "7-8", "8-7", "7 to 8", "8 or 9", "8 8", "8-8", "8-9-10", "1-10", "8/10 or 9/10", "8: 9 was too much", "8 out of ten, no 7",  # two
    "8/5", "8/100", "10 out of 8", "8%", "8 %",  # another scale
    "0", "11", "80", "-8", "−8", "- 8", "Level: -8", "08", "+8",  # out of range  # noqa: RUF001
    "8.5", "8,5", "1e1", "8.0", "1,000", "8^2", "8:30",  # no whole number
    "8th", "v8", "8x", "8-bit", "8+", "~8", ">8", "８", "8?", "8 is too much", "I would not give it an 8", "not 8",  # noqa: RUF001
    "8-High Quality", "8: Exceptional Quality", "5-Perfectly Compatible",  # another level's label, or none
    "Category 1 of 10: 9-High Quality", "On a scale of 1 to 10, 8", "<think>8",
    '{"level": ' * 5_000, "[" * 100_000, '{"level": 8, "level": 8}', "9" * 5_000, '{"level": ' + "9" * 5_000 + "}", "8/" + "9" * 5_000,  # absurd
    '{"level": "8"}', '{"level": 8.0}', '{"level": true}', '{"level": 11}', '{"level": 8', '{"a": 8}', '{"level": 8, "other": 9}', "[8, 9]",
])
def test_a_level_is_not_guessed(reply):
    assert levels.read_level(reply) is None


@given(st.text())
def test_any_text_is_a_level_in_range_or_none(reply):
    assert levels.read_level(reply) in {None, *range(1, 11)}


def test_a_reply_is_kept_as_a_table_can_hold_it():
    assert levels.judged({}, "8 \ud800", 10, 0.5)[2] == "8 \\ud800"


def test_a_template_in_another_encoding_is_a_sentence(tmp_path):
    (tmp_path / "t.txt").write_bytes("grün {prompt}".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.txt is not UTF-8 \(byte 2\): save it as UTF-8"):
        levels.template_of(None, str(tmp_path / "t.txt"))


@given(st.integers(1, 10), st.integers(2, 10))
def test_a_number_is_a_level_where_it_is_one(number, count):
    wanted = number if number <= count else None
    assert levels.read_level(f"{number}", count) == levels.read_level(f"{number}/{count}", count) == wanted


@pytest.mark.parametrize("count", [5, 10])
def test_every_level_is_read_as_it_is_listed(count):
    listed = levels.listed(count).split(", ")
    assert [levels.read_level(one, count) for one in listed] == list(range(1, count + 1))


def test_five_levels_have_labels_of_their_own():
    assert levels.read_level("4-Good Quality", 5) == 4
    assert levels.read_level("4-Below Average Quality", 5) is None and levels.read_level("7-Good Quality", 5) is None


def test_a_long_reply_is_read_in_no_time():
    assert levels.read_level("the answer " * 20_000 + "8") is None
    assert levels.read_level("8: " + "fine " * 20_000) == 8


def test_one_of_ten_is_told_from_one():
    """p(1) = .5, of which .6 goes on to 10; p(2) = .3."""
    first = np.log([[0.5, 0.3, 0.2]])  # tokens "1", "2", "0"
    after = np.log([[0.1, 0.3, 0.6]])
    p = levels.sequences_probability([(0,), (1,), (0, 2)], {(): first, (0,): after})
    assert p[:, 0] == pytest.approx([0.2, 0.3, 0.3])


def test_judged_takes_the_expected_level_or_the_one_that_is_read_or_none():
    assert levels.judged({3: 0.4, 4: 0.4}, "4", 10, 0.5) == (3.5, None, "4")
    assert levels.judged({3: 0.2, 4: 0.2}, "4", 10, 0.5) == (4.0, None, "4")
    score, reason, reply = levels.judged({}, "well", 10, 0.5)
    assert math.isnan(score) and (reason, reply) == ("the reply names no level", "well")


def tokens_of(text, pieces):
    """The reply in pieces, each said with probability .9; the rest is on "5", or on "x" where no digit is said."""
    assert "".join(pieces) == text
    other = [("5" if piece.strip().isdigit() else "x") for piece in pieces]
    return [{"token": piece, "logprob": math.log(0.9),
             "top_logprobs": [{"token": piece, "logprob": math.log(0.9)}, {"token": alternative, "logprob": math.log(0.1)}]}
            for piece, alternative in zip(pieces, other, strict=True)]


@pytest.mark.parametrize("number", [1, 3, 9, 10])
@pytest.mark.parametrize("scale", ["/", " out of "])
@pytest.mark.parametrize("thought", ["", "<think>a 10, no, a 7 or a 2/10</think>"])
def test_the_level_stands_before_its_scale_whether_ten_is_one_token_or_two(number, scale, thought):
    """.9 for the level, .1 for 5; where digits are tokens, 10 is "1" (.9) and then "0" (.9), or 1 with what is left of it."""
    text = f"{thought}{number}{scale}10"
    begin = [thought] if thought else []
    whole = levels.reported(tokens_of(text, [*begin, str(number), scale, "10"]), text, 10)
    assert whole == pytest.approx({number: 0.9, 5: 0.1})
    digits = levels.reported(tokens_of(text, [*begin, *str(number), scale, "1", "0"]), text, 10)
    assert digits == pytest.approx({10: 0.81, 1: 0.09, 5: 0.1} if number == 10 else {number: 0.9, 5: 0.1})


@pytest.mark.parametrize("pieces", [["10/", "10"], ["1", "0/10"], ["Level 10", "/", "10"], ["10/10"], ["7", " ", "10/10"]])
def test_where_the_level_is_no_token_of_its_own_nothing_is_reported(pieces):
    assert levels.reported(tokens_of("".join(pieces), pieces), "10/10", 10) == {}
