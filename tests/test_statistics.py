"""The figures a result is judged by: win rates with ties one half, intervals that cover, diversity, pixel meters."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline.statistics import (
    bootstrap,
    change_interval,
    diversity,
    expanded,
    interval,
    mean_interval,
    meters,
    ratio_interval,
    resampled,
    student,
    studentized,
    ties,
    wins,
)

NAN = math.nan


# -- wins


def test_a_tie_is_half_a_win_and_a_missing_score_is_none():
    after, before = np.array([[2.0, 1.0, 1.0, NAN, 3.0]]), np.array([[1.0, 1.0, 2.0, 1.0, NAN]])
    assert wins(after, before) == pytest.approx(np.array([[1.0, 0.5, 0.0, NAN, NAN]]), nan_ok=True)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20))
def test_what_one_wins_the_other_loses(scores):
    after, before = np.array(scores, float).T
    assert (wins(after, before) + wins(before, after) == 1).all()


# -- intervals


def prompts(rng, groups=40, k=4, likeness=0.35):
    """Win shares whose true mean is 1/2; pictures of one prompt share a chance of their own, as those of a real one do."""
    chance = np.clip(0.5 + likeness * rng.choice([-1, 1], (groups, 1)), 0, 1)
    return (rng.random((groups, k)) < chance).astype(float)


def coverage(values_of):
    """How often of 300 simulated evaluations the 95 % interval holds the true mean."""
    hits = 0
    for seed in range(300):
        _, low, high = bootstrap(values_of(np.random.default_rng(seed)), seed, 400, 0.95)
        hits += low <= 0.5 <= high
    return hits / 300


def test_an_interval_covers_the_truth_as_often_as_it_says():
    assert 0.91 <= coverage(prompts) <= 0.98


def test_intervals_over_single_pictures_would_cover_too_seldom():
    """Why whole prompts are drawn: the same values taken as independent pictures are far from 95 %."""
    assert coverage(lambda rng: prompts(rng).reshape(-1, 1)) < 0.88


def chances(rng, groups, kind, mean):
    """The chance of each prompt: the same for all, spread about the mean, or all or nothing; (g, 1)."""
    drawn = {"same": np.full((groups, 1), mean), "spread": rng.beta(2 * mean, 2 * (1 - mean), (groups, 1)),
             "all or nothing": (rng.random((groups, 1)) < mean).astype(float)}
    return drawn[kind]


@pytest.mark.parametrize("pictures", [1, 4])
@pytest.mark.parametrize("kind", ["same", "spread", "all or nothing"])
@pytest.mark.parametrize("groups", [5, 8, 12, 19])
def test_the_interval_of_few_prompts_holds_its_level_whatever_they_are_like(groups, kind, pictures):
    for mean in (0.5, 0.7, 0.9):
        hits = 0
        for seed in range(200):
            rng = np.random.default_rng(seed)
            won = (rng.random((groups, pictures)) < chances(rng, groups, kind, mean)).astype(float)
            _, low, high = interval(won, 0.95)
            hits += low <= mean <= high
        assert hits >= 0.9 * 200, (mean, hits)  # 0.95 less three standard errors of 200 tries


def test_prompts_that_all_agree_still_leave_doubt():
    for groups in (5, 10, 19):
        mean, low, high = interval(np.ones((groups, 4)), 0.95)
        assert mean == high == 1.0 and 0.3 < low < 0.9, "a bootstrap's would be from 1 to 1"
    assert interval(np.full((8, 3), 0.5), 0.95)[1] < 0.35


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_of_fewer_than_five_prompts_nothing_can_be_said(groups):
    values = np.random.default_rng(groups).random((groups, 16))
    assert interval(values, 0.95) == (pytest.approx(values.mean()), 0.0, 1.0)
    padded = np.concatenate([values, np.full((30, 16), NAN)])
    assert interval(padded, 0.95)[1:] == (0.0, 1.0), "prompts without a score are none"


def test_without_a_value_there_is_no_interval():
    assert all(math.isnan(one) for one in interval(np.full((6, 2), NAN), 0.95))


def test_the_interval_goes_on_from_few_prompts_to_many_without_a_jump():
    values = prompts(np.random.default_rng(3), 60)
    widths = [np.diff(interval(values[:count], 0.95)[1:])[0] * math.sqrt(count) for count in range(15, 60)]
    assert max(abs(np.diff(widths))) < 0.15 * np.mean(widths)


def test_a_difference_within_the_noise_is_a_tie():
    after, before = np.array([[1.0, 1.2, 0.5, 0.9, NAN]]), np.array([[1.0, 1.0, 1.0, 1.0, 1.0]])
    won = wins(after, before, 0.2)
    assert won == pytest.approx(np.array([[0.5, 0.5, 0.0, 0.5, NAN]]), nan_ok=True) and ties(won) == 0.75
    assert ties(wins(after, before)) == 0.25 and math.isnan(ties(np.full((2, 2), NAN)))


# -- means, changes, ratios


def held(interval_of, truth, tries=400):
    """How often an interval of simulated values holds the truth."""
    found = [interval_of(np.random.default_rng(seed)) for seed in range(tries)]
    return np.mean([low <= truth <= high for _, low, high in found])


@pytest.mark.parametrize("count", [5, 10, 20, 40])
def test_means_and_ratios_hold_their_level_down_to_five_prompts(count):
    def ratio(rng):
        below = rng.gamma(8, 1 / 8, count)
        return ratio_interval(below * rng.gamma(8, 0.25 / 8, count), below, 0.95)

    assert 0.92 <= held(lambda rng: mean_interval(rng.normal(size=count), 0.95), 0) <= 0.98
    assert 0.92 <= held(ratio, 0.25) <= 0.99


@pytest.mark.parametrize("count", [5, 10, 20])
def test_means_of_skewed_values_hold_their_level_where_students_interval_does_not(count):
    """Gains of ln p: most pictures were right before and are right after."""
    def gains(rng):
        hard = rng.normal(2, 2, (count, 1))
        before, after = (-np.log1p(np.exp(-(hard + rng.normal(0, 1.5, (count, 16)) + gain))) for gain in (0.0, 1.0))
        return (after - before).mean(1)

    truth = np.mean([gains(np.random.default_rng(10_000 + seed)).mean() for seed in range(2000)])
    plain = held(lambda rng: mean_interval(gains(rng), 0.95), truth)
    assert held(lambda rng: studentized(gains(rng), 0, 400, 0.95), truth) >= max(0.92, plain)
    assert plain < 0.92


def test_a_ratio_whose_divisor_may_be_nothing_has_no_upper_end():
    value, low, high = ratio_interval(np.ones(6), np.array([0.0, 0, 0, 0, 0, 1]), 0.95)
    assert (value, low, high) == (pytest.approx(6), 0, math.inf)
    assert all(map(math.isnan, ratio_interval(np.ones(6), np.zeros(6), 0.95)))


def test_a_change_stays_between_minus_one_and_one():
    assert change_interval(np.array([[1.0], [1], [1], [1], [-1]]), 0.95)[2] == 1
    assert change_interval(np.ones((3, 4)), 0.95) == (1, -1, 1)


def test_percentiles_are_moved_outwards_the_more_the_fewer_the_prompts():
    drawn = np.random.default_rng(0).normal(size=100_000)
    plain = np.quantile(drawn, 0.975)
    reached = [expanded(drawn, count, 0.95)[1] / plain for count in (5, 10, 40, 1000)]
    assert reached == sorted(reached, reverse=True) and reached[0] > 1.5 and reached[-1] == pytest.approx(1, abs=0.01)
    assert resampled(7, 0, 50).sum(1).tolist() == [7.0] * 50


@pytest.mark.parametrize(("count", "coverage", "quantile"), [(5, 0.95, 2.7764), (19, 0.95, 2.1009), (11, 0.9, 1.8125), (8, 0.99, 3.4995)])
def test_students_quantiles_are_the_published_ones(count, coverage, quantile):
    values = np.arange(float(count))
    low, high = student(values, coverage)
    assert (high - low) / 2 == pytest.approx(quantile * values.std(ddof=1) / math.sqrt(count), rel=2e-3)


def test_the_middle_is_the_plain_mean_of_what_is_known():
    mean, low, high = bootstrap(np.array([[1.0, NAN], [0.0, 1.0], [NAN, NAN]]), 0, 200, 0.95)
    assert mean == pytest.approx(2 / 3)
    assert 0 <= low <= mean <= high <= 1


def test_equal_values_have_no_interval_and_nothing_at_all_has_no_mean():
    assert bootstrap(np.ones((5, 3)), 0, 200, 0.9) == (1.0, 1.0, 1.0)
    assert all(math.isnan(value) for value in bootstrap(np.full((5, 3), NAN), 0, 200, 0.9))


def test_an_interval_repeats_with_its_seed_and_widens_with_its_coverage():
    values = prompts(np.random.default_rng(0))
    assert bootstrap(values, 3, 500, 0.95) == bootstrap(values, 3, 500, 0.95)
    _, low, high = bootstrap(values, 3, 500, 0.95)
    _, wider_low, wider_high = bootstrap(values, 3, 500, 0.99)
    assert wider_low <= low and high <= wider_high


def test_prompts_with_more_pictures_count_for_more():
    """The mean is over pictures: 3 of 4 won, though it is one prompt of two."""
    assert bootstrap(np.array([[1.0, 1.0, 1.0], [0.0, NAN, NAN]]), 0, 200, 0.95)[0] == 0.75


# -- diversity


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 99))
def test_diversity_is_the_mean_distance_of_every_pair(groups, k, seed):
    vectors = np.random.default_rng(seed).normal(size=(groups, k, 3))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    apart = [1 - group[i] @ group[j] for group in vectors for i in range(k) for j in range(i)]
    assert diversity(vectors) == pytest.approx(np.mean(apart), abs=1e-12)


def test_diversity_of_copies_is_zero_and_of_strangers_one():
    assert diversity(np.tile([1.0, 0.0], (2, 3, 1))) == pytest.approx(0)
    assert diversity(np.eye(3)[None]) == pytest.approx(1)


def test_diversity_needs_two_pictures():
    assert math.isnan(diversity(np.ones((3, 1, 2)))) and math.isnan(diversity(np.empty((0, 4, 2))))


# -- meters


def flat(*colour):
    return np.full((4, 4, 3), colour, np.uint8)


@pytest.mark.parametrize(
    ("pixels", "wanted"),
    [
        (flat(255, 255, 255), (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        (flat(0, 0, 0), (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)),
        (flat(255, 0, 0), (0.2126, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)),
        (flat(0, 255, 0), (0.7152, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)),
        (flat(0, 0, 255), (0.0722, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)),
        (flat(200, 100, 100), ((0.2126 * 200 + 0.7874 * 100) / 255, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0)),
    ],
    ids=["white", "black", "red", "green", "blue", "pink"],
)
def test_meters_of_flat_pictures_are_what_they_are_by_hand(pixels, wanted):
    assert meters(pixels) == pytest.approx(wanted, abs=1e-5)


def test_a_chessboard_is_half_bright_and_as_contrasty_and_sharp_as_can_be():
    board = (np.indices((4, 4)).sum(0) % 2 * 255).astype(np.uint8)
    assert meters(np.repeat(board[..., None], 3, 2)) == pytest.approx((0.5, 0.5, 0.0, 1.0, 15 / 16, 1.0, 0.5), abs=1e-5)


def test_one_edge_is_as_sharp_as_its_share_of_neighbours():
    """Left half black, right half white, 4 x 4: of three horizontal steps one is 1, no vertical one: (0 + 1/3) / 2. A column is an edge."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 2:] = 255
    assert meters(pixels) == pytest.approx((0.5, 0.5, 0.0, 1 / 6, 1 / 4, 1.0, 0.5), abs=1e-5)
