"""Measures of size: each closed form against every subset enumerated, signs the right way round, what is missing not counted."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline.effect_size import (
    at_place,
    best_of,
    best_of_weights,
    choosing_helps,
    chosen_distance,
    chosen_quality,
    curve,
    diversity_at_equal_quality,
    estimate,
    moved,
    n_of,
    noise_of,
    place_of,
    share_right,
    shift,
    visible_change,
)

NAN = math.nan


def by_hand(mix, quality, n, sign=1):
    """Mean quality of what is chosen among every n of the pictures, equals sharing."""
    found = []
    for some in itertools.combinations(np.flatnonzero(np.isfinite(mix) & np.isfinite(quality)), n):
        best = max(sign * mix[i] for i in some)
        found.append(np.mean([quality[i] for i in some if sign * mix[i] == best]))
    return np.mean(found)


# -- choosing


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_the_weights_of_the_best_of_n_are_the_chances_of_each_rank(k):
    weights = best_of_weights(k)
    wanted = [[math.comb(r - 1, n - 1) / math.comb(k, n) for r in range(1, k + 1)] for n in range(1, k + 1)]
    assert weights == pytest.approx(np.array(wanted), abs=1e-12)
    assert weights.sum(1) == pytest.approx(np.ones(k))


def test_a_thousand_pictures_overflow_nothing():
    weights = best_of_weights(1000)
    assert np.isfinite(weights).all() and weights.sum(1) == pytest.approx(np.ones(1000))
    assert weights[499, 999] == pytest.approx(0.5)


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0, 2.5, NAN]), st.sampled_from([-3.0, 0.0, 1.0, 5.0, NAN])), min_size=1, max_size=6))
def test_quality_of_the_best_and_the_worst_of_n_is_that_of_every_subset_enumerated(pictures):
    mix, quality = np.array(pictures).T
    known = int((np.isfinite(mix) & np.isfinite(quality)).sum())
    curve, middle = chosen_quality(mix[None], quality[None])[0], len(mix) - 1
    for n in range(1, len(mix) + 1):
        if not known:
            assert np.isnan(curve).all()
            continue
        assert curve[middle + n - 1] == pytest.approx(by_hand(mix, quality, min(n, known)))
        assert curve[middle - n + 1] == pytest.approx(by_hand(mix, quality, min(n, known), -1))


@given(st.integers(2, 6), st.integers(0, 99))
def test_distance_of_two_choices_is_the_mean_over_pairs_of_different_pictures_by_how_often_each_is_chosen(k, seed):
    rng = np.random.default_rng(seed)
    mix, where = rng.integers(0, 4, k).astype(float), rng.normal(size=(k, 2))
    distance = np.linalg.norm(where[:, None] - where[None], axis=2)
    curve = chosen_distance(mix[None], distance[None])[0]
    for n in range(1, k):
        chance = np.array([by_hand(mix, np.eye(k)[i], n) for i in range(k)])
        pairs = [(chance[i] * chance[j], distance[i, j]) for i, j in itertools.permutations(range(k), 2)]
        assert curve[k - 1 + n - 1] == pytest.approx(np.average([d for _, d in pairs], weights=[w for w, _ in pairs]))
    assert curve[k - 1] == pytest.approx(np.mean([distance[i, j] for i, j in itertools.combinations(range(k), 2)]))


def test_where_one_picture_has_all_the_weight_the_distance_is_that_of_the_two_best():
    distance = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0], [2.0, 4.0, 0.0]])
    curve = chosen_distance(np.array([[1.0, 2.0, 3.0]]), distance[None])[0]
    assert curve[3] == curve[4] == 4.0 and curve[0] == curve[1] == 1.0
    assert np.isnan(chosen_distance(np.array([[1.0, NAN, NAN]]), distance[None])).all(), "one picture has no distance"


def test_distance_of_two_choices_is_that_of_two_fresh_choices_of_many():
    """By 16 pictures of a prompt, against pictures chosen from draws of their own."""
    rng, n, k = np.random.default_rng(0), 4, 16

    def drawn(count, each):
        quality = rng.normal(size=(count, each))
        return quality, rng.normal(size=(count, each)) * np.exp(-0.3 * quality)  # the better, the more alike

    quality, where = drawn(3000, k)
    found = np.nanmean(chosen_distance(quality, np.abs(where[:, :, None] - where[:, None]))[:, k - 1 + n - 1])
    picks = [where[np.arange(40_000), quality.argmax(1)] for quality, where in (drawn(40_000, n), drawn(40_000, n))]
    fresh, plain = np.abs(picks[0] - picks[1]).mean(), np.abs(where[:, :1] - where[:, 1:2]).mean()
    assert found == pytest.approx(fresh, rel=0.04) and fresh < 0.85 * plain


# -- places


def test_places_and_n_are_each_others():
    assert [n_of(place) for place in (0, 1, 2.4, -1, -3, math.inf, -math.inf)] == [1, 2, 3.4, 0.5, 0.25, math.inf, 0]


def test_a_place_is_where_the_curve_first_reaches_the_target_going_out_from_the_middle():
    curve = np.array([[-3.0, -1.0, 0.0, 2.0, 1.0]])
    targets = {0.0: 0.0, 1.0: 0.5, 2.0: 1.0, 2.5: math.inf, -0.5: -0.5, -2.0: -1.5, -3.0: -2.0, -4.0: -math.inf}
    assert place_of(np.array(list(targets)), np.repeat(curve, len(targets), 0)).tolist() == list(targets.values())


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=9).filter(lambda curve: len(curve) % 2), st.floats(-5, 5))
def test_at_the_place_of_a_target_the_curve_has_it(curve, target):
    curve, target = np.array([curve]), np.array([target])
    place = place_of(target, curve)
    if np.isfinite(place[0]):
        assert at_place(curve, place) == pytest.approx(target, abs=1e-6)


def test_beyond_its_ends_a_curve_stays_what_it_is_there():
    curve = np.array([[0.0, 1.0, 5.0]])
    assert at_place(np.repeat(curve, 2, 0), np.array([math.inf, -math.inf])).tolist() == [5.0, 0.0]
    assert at_place(np.ones((1, 1)), np.array([math.inf])).tolist() == [1.0], "one picture a prompt: nothing to choose"


# -- best-of-n equivalent


def simulated(rng, g=40, k=16, gain=0.0, noise=0.7):
    """(quality curve of the base, tuned model's means): a gain in the base's own standard deviations of a prompt's pictures."""
    prompt = rng.normal(size=(g, 1))
    base, after = rng.normal(size=(g, k)), rng.normal(gain, 1, (g, k))
    return chosen_quality(base + rng.normal(0, noise, (g, k)), base + prompt), (after + prompt).mean(1)


def test_a_model_that_draws_the_bases_best_of_four_is_worth_best_of_four():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(3000, 16))
    mix = base + rng.normal(0, 0.7, base.shape)
    four = rng.normal(size=(3000, 16, 4))
    mixed = four + rng.normal(0, 0.7, four.shape)
    picked = np.take_along_axis(four, mixed.argmax(2)[..., None], 2)[..., 0]
    value, low, high = best_of(chosen_quality(mix, base), picked.mean(1), 0.95)
    assert value == pytest.approx(4, abs=0.15) and low < 4 < high and high - low < 0.5
    worst = np.take_along_axis(four, mixed.argmin(2)[..., None], 2)[..., 0]
    assert best_of(chosen_quality(mix, base), worst.mean(1), 0.95)[0] == pytest.approx(1 / 4, abs=0.01)


def test_turned_round_the_equivalent_is_turned_round():
    quality, after = simulated(np.random.default_rng(1), gain=0.6)
    value, low, high = best_of(quality, after, 0.95)
    turned = best_of(-quality[:, ::-1], -after, 0.95)
    assert turned == pytest.approx((1 / value, 1 / high, 1 / low)) and value > 1.5 and low > 1


@pytest.mark.parametrize("g", [5, 10, 40])
def test_a_model_that_did_not_change_is_worth_one_picture_and_the_interval_holds_its_level(g):
    found = [best_of(*simulated(np.random.default_rng(seed), g), 0.95) for seed in range(200)]
    holds = np.mean([low <= 1 <= high for _, low, high in found])
    assert 0.91 <= holds <= 0.995
    assert np.median([value for value, _, _ in found]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("g", [5, 10, 40])
def test_a_gain_is_within_the_interval_as_often_as_it_says(g):
    """A gain of one standard deviation, whose worth is that of 3,000 prompts."""
    truth = best_of(*simulated(np.random.default_rng(999), 1500, gain=1.0), 0.95)[0]
    found = [best_of(*simulated(np.random.default_rng(seed), g, gain=1.0), 0.95) for seed in range(200)]
    assert 0.91 <= np.mean([low <= truth <= high for _, low, high in found]) <= 0.995


def test_beyond_what_k_pictures_tell_there_is_no_number():
    quality, after = simulated(np.random.default_rng(2), gain=4.0)
    assert best_of(quality, after, 0.95) == (math.inf, 16, math.inf)
    assert best_of(quality, -after, 0.95) == (0, 0, 0)
    value, low, high = best_of(*simulated(np.random.default_rng(3), gain=1.5, g=12), 0.95)
    assert 3 < low < value and high == math.inf, "the upper end alone may be unknown"
    assert estimate(value, low, high)["high"] is None


def test_of_fewer_than_five_prompts_nothing_can_be_said():
    quality, after = simulated(np.random.default_rng(4), g=4, gain=1.0)
    value, low, high = best_of(quality, after, 0.95)
    assert value > 1 and (low, high) == (0, math.inf)
    assert all(math.isnan(one) for one in best_of(quality, np.full(4, NAN), 0.95))
    diversity = np.ones(4)
    assert diversity_at_equal_quality(quality, quality * 0 + 1, after, diversity, 0, 50, 0.95) == (1, 0, math.inf)
    assert visible_change(diversity, diversity, 0.95) == (1, 0, math.inf)
    assert shift(np.arange(8.0).reshape(4, 2), np.arange(8.0).reshape(4, 2) + 1, 0, 200, 0.95)[1:] == (-math.inf, math.inf)


def test_prompts_of_which_nothing_is_known_do_not_count():
    quality, after = simulated(np.random.default_rng(5), gain=0.5)
    padded = np.concatenate([quality, np.full((3, quality.shape[1]), NAN)]), np.concatenate([after, np.ones(3)])
    assert best_of(*padded, 0.95) == best_of(quality, after, 0.95)


# -- diversity at equal quality


def test_a_model_that_draws_the_bases_best_of_n_has_its_diversity():
    rng, k = np.random.default_rng(0), 16

    def drawn(n):
        quality = rng.normal(size=(400, k, n))
        where = rng.normal(size=(400, k, n, 3)) * np.exp(-0.3 * quality)[..., None] + [2, 0, 0]
        best = quality.argmax(2)[..., None]
        return np.take_along_axis(quality, best, 2)[..., 0], np.take_along_axis(where, best[..., None], 2)[:, :, 0]

    def apart(where):
        unit = where / np.linalg.norm(where, axis=2, keepdims=True)
        return 1 - unit @ unit.transpose(0, 2, 1)

    quality, where = drawn(1)
    after, where_after = drawn(4)
    curve, far = chosen_quality(quality, quality), chosen_distance(quality, apart(where))
    diversity = apart(where_after).sum((1, 2)) / (k * (k - 1))
    value, low, high = diversity_at_equal_quality(curve, far, after.mean(1), diversity, 0, 400, 0.95)
    assert value == pytest.approx(1, abs=0.06) and low < value < high and high - low < 0.2
    assert diversity.mean() / np.nanmean(far[:, k - 1]) < 0.9, "against any picture of the base it would look like a loss"
    halved = diversity_at_equal_quality(curve, far, after.mean(1), diversity / 2, 0, 400, 0.95)
    assert halved == pytest.approx((value / 2, low / 2, high / 2))


# -- shares, shift, visible change, noise


def test_mended_and_broken_are_counted_by_the_same_seed():
    base = np.array([[0, 0, 1, 1, NAN]] * 6)
    after = np.array([[1, 0, 1, 0, 1]] * 5 + [[1, 1, 1, 1, 1]])
    found = share_right({"base": base, "after": after}, 0.95)
    assert (found["mended"], found["broken"], found["pictures"]) == (7, 5, 24)
    assert found["base"]["value"] == 0.5 and found["change"]["value"] == pytest.approx(2 / 24)
    assert found["after"]["value"] == pytest.approx(np.nanmean(after))
    assert found["change"]["low"] < 2 / 24 < found["change"]["high"]


def test_nothing_mended_in_a_few_prompts_is_no_proof_that_nothing_is():
    same = np.ones((8, 16))
    change = share_right({"base": same, "after": same}, 0.95)["change"]
    assert change["value"] == 0 and change["low"] == -change["high"] and 0.2 < change["high"] < 0.5


def test_a_shift_is_counted_in_the_bases_deviations():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 2, (40, 8))
    value, low, high = shift(base, base + 1, 0, 200, 0.95)
    assert value == pytest.approx(1 / base.std()) and low == pytest.approx(value) == high
    value, low, high = shift(base, base - rng.normal(1, 1, base.shape), 0, 200, 0.95)
    assert low < value < high < 0
    assert all(math.isnan(one) for one in shift(np.ones((6, 2)), np.ones((6, 2)), 0, 200, 0.95)), "a base without spread has no unit"


def test_visible_change_is_that_of_every_pair_of_seeds_enumerated():
    rng = np.random.default_rng(0)
    base, after = (rng.integers(0, 256, (5, 3, 4, 3)).astype(np.uint8) for _ in range(2))
    between = [np.abs(base[i].astype(float) - base[j]).mean() for i, j in itertools.combinations(range(5), 2)]
    assert moved(base, after) == pytest.approx((np.abs(base.astype(float) - after).mean(), np.mean(between)), rel=1e-5)
    assert moved(base, base)[0] == 0
    assert math.isnan(moved(base[:1], after[:1])[1]) and all(map(math.isnan, moved(base[:0], after[:0])))


def test_pictures_of_other_seeds_are_a_visible_change_of_one():
    rng = np.random.default_rng(1)
    found = np.array([moved(*rng.integers(0, 256, (2, 8, 6, 6, 3)).astype(np.uint8)) for _ in range(30)])
    value, low, high = visible_change(*found.T, 0.95)
    assert low < 1 < high and value == pytest.approx(1, abs=0.02)
    assert visible_change(found[:, 0] * 0, found[:, 1], 0.95) == (0, 0, 0)


def test_noise_is_how_much_a_score_changes_with_what_nobody_sees():
    scores = np.zeros((10, 10))
    disturbed = scores + np.linspace(-1, 1, 100).reshape(10, 10)
    assert noise_of(scores, disturbed) == pytest.approx(0.95, abs=0.02)
    assert noise_of(scores, np.full((10, 10), NAN)) == 0.0


def test_where_the_mix_chooses_what_the_judge_likes_less_there_is_no_best_of_n():
    """Else a model that got worse as its fooled reward wishes would be as good as the best of some."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 8))
    quality = chosen_quality(-scores, scores)
    worse = scores.mean(1) - 0.3
    assert not choosing_helps(quality) and choosing_helps(chosen_quality(scores, scores))
    assert np.isnan(best_of(quality, worse, 0.95)).all()
    assert best_of(chosen_quality(scores, scores), worse, 0.95)[2] < 1


def test_the_curve_of_choosing_begins_at_any_and_rises_to_the_best_of_all():
    scores = np.random.default_rng(1).normal(size=(30, 6))
    quality, distance = chosen_quality(scores, scores), np.full((30, 11), np.nan)
    found = curve(quality, distance, None)
    assert [row["n"] for row in found] == [1, 2, 4, 6]
    assert found[0]["mean"] == pytest.approx(scores.mean()) and found[-1]["mean"] == pytest.approx(scores.max(1).mean())
    assert [row["mean"] for row in found] == sorted(row["mean"] for row in found)
    assert {row["right"] for row in found} == {row["diversity"] for row in found} == {None}, "what is unknown stays so"
