"""What became of held-out pictures, and that those shown are drawn by key in the shares in which they occur."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import outcomes
from fashiondpo_pipeline.outcomes import GAINED, LOST, SAME, UNKNOWN

NAN = float("nan")


def test_pictures_are_mended_broken_or_stay_as_they_were():
    base, after = np.array([[0, 1, 1, 0, NAN, 1]]), np.array([[1, 0, 1, 0, 1, NAN]], float)
    assert outcomes.of_right(base, after).tolist() == [[GAINED, LOST, SAME, SAME, UNKNOWN, UNKNOWN]]


def test_scores_within_the_judges_noise_are_the_same():
    base, after = np.zeros((1, 5)), np.array([[0.3, -0.3, 0.1, -0.1, NAN]])
    assert outcomes.of_scores(base, after, 0.2).tolist() == [[GAINED, LOST, SAME, SAME, UNKNOWN]]
    assert outcomes.of_scores(base, after).tolist() == [[GAINED, LOST, GAINED, LOST, UNKNOWN]]


def mixture(rng, g=40, k=16, shares=(0.25, 0.05, 0.7)) -> np.ndarray:
    return rng.choice(outcomes.ORDER, (g, k), p=shares)


def test_those_shown_have_the_shares_of_all():
    every = mixture(np.random.default_rng(0))
    shown = outcomes.chosen(every, [f"g{n}" for n in range(40)], 40, 7)
    assert len(shown) == 40 == len({(one.row, one.number) for one in shown})
    for outcome, count in outcomes.counts(every).items():
        assert sum(one.outcome == outcome for one in shown) == pytest.approx(40 * count / every.size, abs=1)
    assert all(every[one.row, one.number] == one.outcome for one in shown)
    assert [one.outcome for one in shown] == sorted((one.outcome for one in shown), key=outcomes.ORDER.index), "mended first"


def test_which_are_shown_hangs_on_seed_and_names_and_on_nothing_else():
    every, names = mixture(np.random.default_rng(0)), [f"g{n}" for n in range(40)]
    shown = outcomes.chosen(every, names, 24, 7)
    assert outcomes.chosen(every, names, 24, 7) == shown != outcomes.chosen(every, names, 24, 8)
    turned = outcomes.chosen(every[::-1], names[::-1], 24, 7)
    assert {(names[one.row], one.number) for one in shown} == {(names[::-1][one.row], one.number) for one in turned}


def test_a_picture_without_a_score_is_never_shown():
    every = np.full((3, 4), UNKNOWN)
    every[1, 2] = LOST
    assert [(one.row, one.number) for one in outcomes.chosen(every, ["a", "b", "c"], 24, 7)] == [(1, 2)]
    assert outcomes.chosen(np.full((3, 4), UNKNOWN), ["a", "b", "c"], 24, 7) == []


@given(st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(0, 900)), st.integers(1, 60))
def test_every_place_is_given_and_none_is_off_its_share_by_a_whole_one(occur, most):
    found = outcomes.allotted(dict(zip(outcomes.ORDER, occur, strict=True)), most)
    total = sum(occur)
    assert sum(found.values()) == min(most, total)
    for places, count in zip(found.values(), occur, strict=True):
        assert places <= count and (total <= most or abs(places - most * count / total) < 1)
