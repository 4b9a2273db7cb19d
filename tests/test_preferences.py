"""Scores to pairs, against a slow implementation written out one group, one candidate and one pair at a time."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import preferences
from fashiondpo_pipeline.preferences import Pairs, Rule, Spread, choose, compare, mix, normalise, rank_correlation, reasons

NAN = math.nan


@st.composite
def grids(draw, most_groups=5, most_candidates=6):
    """Scores in eighths, so that ties are common and exact; about one in eight is missing."""
    g, k = draw(st.integers(1, most_groups)), draw(st.integers(1, most_candidates))
    cell = st.one_of(*[st.integers(-16, 16).map(lambda n: n / 8)] * 7, st.just(NAN))
    return np.array(draw(st.lists(st.lists(cell, min_size=k, max_size=k), min_size=g, max_size=g)))


# -- the slow implementation


def slow_normalise(row, how, everything=None):
    """One row of scores; `everything` are all scores there are where it is normalised over all."""
    known = sorted(s for s in (everything if everything is not None else row) if not math.isnan(s))
    return [NAN if math.isnan(s) else slow_one(s, known, how) for s in row]


def slow_one(score, known, how):
    if how == "winrate":
        return sum(1 / (1 + math.exp(s - score)) for s in known) / (len(known) - 1) - 0.5 / (len(known) - 1) if len(known) > 1 else 0.5
    if len(set(known)) == 1:
        return 0.0 if how == "zscore" else 0.5
    if how == "rank":
        below, equal = sum(s < score for s in known), sum(s == score for s in known)
        return (below + (equal - 1) / 2) / (len(known) - 1)
    if how == "minmax":
        return (score - known[0]) / (known[-1] - known[0])
    mean = Fraction(sum(Fraction(s) for s in known), len(known))
    variance = sum((Fraction(s) - mean) ** 2 for s in known) / len(known)
    return float(Fraction(score) - mean) / math.sqrt(variance)


def slow_choose(mixed, rule, threshold=None):
    """{(group, winner, loser)} in the order in which they are kept."""
    kept = []
    for g, row in enumerate(mixed.tolist()):
        known = [c for c, score in enumerate(row) if not math.isnan(score)]
        pairs = [(won, lost) for won, lost in slow_candidates(row, known, rule) if row[won] > row[lost]]
        pairs = [(won, lost) for won, lost in pairs if row[won] - row[lost] >= rule.margin]
        if rule.select == "median_split":
            pairs = [(won, lost) for won, lost in pairs if row[won] >= threshold > row[lost]]
        pairs.sort(key=lambda pair: row[pair[1]] - row[pair[0]])
        kept += [(g, *pair) for pair in slow_caps(pairs, rule)]
    return kept


def slow_candidates(row, known, rule):
    if rule.select == "pareto":  # of one expert the fronts are its best and its worst
        best, worst = (pick((row[c] for c in known), default=0.0) for pick in (max, min))
        return [(a, b) for a in known for b in known if row[a] == best and row[b] == worst]
    if rule.select in ("all", "median_split"):
        return [(a, b) if row[a] > row[b] else (b, a) for a, b in combinations(known, 2)]
    best_first = sorted(known, key=lambda c: -row[c])
    mirrored = list(zip(best_first, reversed(best_first), strict=True))[: len(known) // 2]
    return mirrored[:1] if rule.select == "best_worst" else mirrored


def slow_caps(pairs, rule):
    used = {}
    if rule.per_candidate is not None:
        kept = []
        for pair in pairs:
            if all(used.get(c, 0) < rule.per_candidate for c in pair):
                kept.append(pair)
                used |= {c: used.get(c, 0) + 1 for c in pair}
        pairs = kept
    most = rule.per_group or (10 if rule.select == "mirror" else None)
    return pairs[: 1 if rule.select == "best_worst" else most]


def listed(pairs):
    return list(zip(pairs.group.tolist(), pairs.winner.tolist(), pairs.loser.tolist(), strict=True))


# -- normalising


@given(grids(), st.sampled_from(["zscore", "minmax", "rank", "winrate"]))
def test_normalising_within_groups_is_the_slow_one(scores, how):
    assert normalise(scores, how) == pytest.approx(np.array([slow_normalise(row, how) for row in scores.tolist()]), nan_ok=True)


@given(grids(), st.sampled_from(["zscore", "minmax", "rank"]))
def test_normalising_over_all_is_the_slow_one(scores, how):
    everything = scores.ravel().tolist()
    found = normalise(scores, how, Spread.of(scores, how == "rank"))
    assert found == pytest.approx(np.array([slow_normalise(row, how, everything) for row in scores.tolist()]), nan_ok=True)


@given(grids(), st.sampled_from(["zscore", "minmax", "rank"]), st.integers(-4, 4), st.sampled_from([0.5, 1.0, 8.0]))
def test_a_missing_score_stays_missing_and_no_scale_or_shift_matters(scores, how, shift, scale):
    found = normalise(scores, how)
    assert (np.isnan(found) == np.isnan(scores)).all()
    assert normalise(scores * scale + shift, how) == pytest.approx(found, nan_ok=True)


def test_z_scores_are_what_they_are_by_hand():
    """1, 2, 3 and a missing one: mean 2, standard deviation sqrt(2/3)."""
    found = normalise(np.array([[3.0, NAN, 1.0, 2.0]]), "zscore")
    assert found[0] == pytest.approx([math.sqrt(1.5), NAN, -math.sqrt(1.5), 0.0], nan_ok=True)


@pytest.mark.parametrize("how", ["zscore", "minmax", "rank", "winrate"])
@pytest.mark.parametrize("row", [[0.1, 0.1, 0.1], [0.1, NAN, NAN], [0.1 + 0.2, 0.3, 0.3]], ids=["equal", "lone", "rounding"])
def test_a_group_without_spread_has_no_opinion_and_no_pair(how, row):
    found = normalise(np.array([row]), how)
    neutral = 0.0 if how == "zscore" else 0.5
    if how != "rank":  # a rank sees the last bit, as it sees nothing else
        assert found[~np.isnan(found)] == pytest.approx(neutral, abs=1e-15 if how == "winrate" else 0)
        assert len(choose(found, Rule({"a": 1.0}, margin=0.0))) == 0


def test_win_rates_are_what_they_are_by_hand():
    """CaPO: logits 0, -ln 3 and -ln 9 beat each other with odds of 3, 9 and 3 to 1: (3/4 + 9/10)/2, (1/4 + 3/4)/2, (1/10 + 1/4)/2."""
    found = normalise(-np.log([[1.0, np.nan, 3.0, 9.0]]), "winrate")
    assert found[0] == pytest.approx([0.825, NAN, 0.5, 0.175], nan_ok=True)


@given(grids(), st.floats(-5, 5))
def test_win_rates_are_shares_that_no_shift_matters_to(scores, shift):
    found = normalise(scores, "winrate")
    known = ~np.isnan(scores)
    assert (np.isnan(found) == ~known).all() and ((found[known] >= 0) & (found[known] <= 1)).all()
    assert np.nanmean(found[known.any(1)], axis=1) == pytest.approx(0.5)  # somebody loses what another wins
    assert normalise(scores + shift, "winrate") == pytest.approx(found, nan_ok=True)
    assert normalise(scores * 1e4, "winrate") == pytest.approx(normalise(scores, "rank"), abs=1e-9, nan_ok=True)  # chances become certain


@given(grids(), st.sampled_from([0.5, 8.0]))
def test_win_rates_over_all_count_scores_in_deviations_of_everything(scores, scale):
    spread = Spread.of(scores, False)
    wanted = normalise(normalise(scores, "zscore", spread), "winrate")
    found = normalise(scores * scale, "winrate", Spread.of(scores * scale, False))
    assert found == pytest.approx(wanted, nan_ok=True)


def test_nothing_at_all_is_no_scale():
    nothing = np.full((2, 3), NAN)
    for how in ("zscore", "minmax", "rank", "winrate", "raw"):
        assert np.isnan(normalise(nothing, how)).all()
        assert np.isnan(normalise(nothing, how, Spread.of(nothing, True))).all()


@given(grids(), st.booleans())
def test_raw_scores_are_themselves(scores, over_all):
    assert np.array_equal(normalise(scores, "raw", Spread.of(scores, False) if over_all else None), scores, equal_nan=True)


def test_a_margin_of_raw_scores_means_the_same_however_alike_the_candidates_have_become():
    """Of a round whose pictures are nearly all good, standard deviations make pairs of differences that mean nothing."""
    late = np.array([[0.96, 0.97, 0.95, 0.97], [0.96, 0.30, 0.97, 0.96]])
    early = np.array([[0.96, 0.40, 0.50, 0.97], [0.96, 0.30, 0.60, 0.96]])
    for scores, wanted in ((early, 4 + 5), (late, 3)):
        assert len(choose(normalise(scores, "raw"), Rule({"a": 1.0}, margin=0.1))) == wanted
    nearly = late[:1]
    assert len(choose(normalise(nearly, "zscore", Spread.of(nearly, False)), Rule({"a": 1.0}, margin=0.1))) == 5  # all but the tie


# -- mixing


@given(grids(), st.floats(0.1, 5), st.floats(0.1, 5))
def test_a_mix_is_a_weighted_mean_and_misses_what_any_expert_misses(scores, first, second):
    other = np.where(scores > 1, NAN, -scores)
    found = mix({"a": scores, "b": other}, {"a": first, "b": second})
    wanted = [[(first * x + second * y) / (first + second) for x, y in zip(*rows, strict=True)]
              for rows in zip(scores.tolist(), other.tolist(), strict=True)]
    assert found == pytest.approx(np.array(wanted), nan_ok=True)


def test_a_pair_needs_every_expert_on_its_side_by_so_much():
    first, second = np.array([[0.0, 1.0, 2.0, NAN]]), np.array([[0.0, 2.0, 0.5, 1.0]])
    mixed, weights = first + second, {"a": 1.0, "b": 1.0}  # 0, 3, 2.5

    def chosen(agree):
        return listed(choose(mixed, Rule(weights, margin=0.0, agree=agree), 0.0, [first, second]))

    assert chosen(None) == [(0, 1, 0), (0, 2, 0), (0, 1, 2)]
    assert chosen(0.0) == chosen(0.5) == [(0, 1, 0), (0, 2, 0)]  # the first expert prefers 2 to 1
    assert chosen(1.0) == [(0, 1, 0)]
    assert chosen(1.5) == []


@given(grids(), st.sampled_from([0.0, 0.125, 1.0]))
def test_agreeing_pairs_are_the_pareto_pairs(first, agree):
    second = np.flip(first, 1) if first.shape[1] > 2 else first
    mixed = first + second
    found = set(listed(choose(mixed, Rule({}, margin=0.0, agree=agree), 0.0, [first, second])))
    everyone = set(listed(choose(mixed, Rule({}, margin=0.0))))
    assert found == {(g, w, x) for g, w, x in everyone if all(o[g, w] - o[g, x] >= agree for o in (first, second))}


def test_an_expert_without_weight_is_not_even_missed():
    assert mix({"a": np.array([[1.0, 2.0]])}, {"a": 2.0, "watched": 0.0}).tolist() == [[1.0, 2.0]]


# -- choosing


RULES = st.builds(
    Rule, weights=st.just({"a": 1.0}), select=st.sampled_from(["all", "best_worst", "mirror", "median_split", "pareto"]),
    margin=st.sampled_from([0.0, 0.125, 0.5, 2.0]), per_group=st.sampled_from([None, 1, 2, 5]),
    per_candidate=st.sampled_from([None, 1, 2]),
)


@given(grids(), RULES)
def test_pairs_are_those_of_the_slow_one_in_its_order(mixed, rule):
    threshold = float(np.nanmedian(mixed)) if np.isfinite(mixed).any() else 0.0
    pairs = choose(mixed, rule, threshold)
    assert listed(pairs) == slow_choose(mixed, rule, threshold)
    assert pairs.margin.tolist() == [mixed[g, won] - mixed[g, lost] for g, won, lost in listed(pairs)]


@given(grids(), RULES)
def test_no_pair_is_a_tie_or_within_the_margin_and_none_comes_twice(mixed, rule):
    found = listed(choose(mixed, rule, 0.0))
    for g, won, lost in found:
        assert mixed[g, won] > mixed[g, lost] and mixed[g, won] - mixed[g, lost] >= rule.margin
    assert len({(g, frozenset((won, lost))) for g, won, lost in found}) == len(found)


@given(grids(), RULES)
def test_caps_hold(mixed, rule):
    found = listed(choose(mixed, rule, 0.0))
    for g in range(len(mixed)):
        own = [pair for pair in found if pair[0] == g]
        assert rule.per_group is None or len(own) <= max(rule.per_group, 1)
        for c in range(mixed.shape[1]):
            assert rule.per_candidate is None or sum(c in pair[1:] for pair in own) <= rule.per_candidate


def test_all_is_every_pair_beyond_the_margin():
    """3, 1, 0.75, missing: gaps 2, 2.25 and 0.25, of which the last is within 0.5; widest first."""
    pairs = choose(np.array([[1.0, 3.0, NAN, 0.75]]), Rule({"a": 1.0}, margin=0.5))
    assert listed(pairs) == [(0, 1, 3), (0, 1, 0)]
    assert pairs.margin.tolist() == [2.25, 2.0]


def test_mirror_goes_inwards_and_stops_at_ten():
    """FashionDistill: best against worst, second best against second worst, ten at most."""
    mixed = np.arange(30.0)[None]
    found = listed(choose(mixed, Rule({"a": 1.0}, select="mirror", margin=0.0)))
    assert found == [(0, 29 - i, i) for i in range(10)]
    assert len(choose(mixed, Rule({"a": 1.0}, select="mirror", margin=0.0, per_group=15))) == 15


def test_median_split_sets_above_against_below_the_median_of_everything():
    """FashionDPO: the median over both groups is 2.5; the second lies wholly above it and gives nothing."""
    mixed = np.array([[0.0, 1.0, 2.0, 9.0], [3.0, 4.0, 5.0, NAN]])
    rule = Rule({"a": 1.0}, select="median_split", margin=0.0)
    assert set(listed(choose(mixed, rule, 3.0))) == {(0, 3, 0), (0, 3, 1), (0, 3, 2)}
    assert set(listed(choose(mixed[:1], rule, 1.5))) == {(0, 2, 0), (0, 2, 1), (0, 3, 0), (0, 3, 1)}


def test_pareto_sets_who_is_dominated_by_nobody_against_who_dominates_nobody():
    """Experts see 0 (3, 1), 1 (1, 3), 2 (2, 0), 3 (0, 2), 4 (0, 0), 5 (2, 2) and 6 nothing of one: 0, 1 and 5 are on the upper front.

    0 dominates 2 and 4; 1 dominates 3 and 4; 5 dominates 2, 3 and 4; 2 and 3 dominate 4. So only 4 is on the lower front, mix 0.
    """
    first, second = np.array([[3.0, 1.0, 2.0, 0.0, 0.0, 2.0, 9.0]]), np.array([[1.0, 3.0, 0.0, 2.0, 0.0, 2.0, NAN]])
    rule = Rule({}, select="pareto", margin=0.0)
    mixed = (first + second) / 2
    assert set(listed(choose(mixed, rule, 0.0, [first, second]))) == {(0, 0, 4), (0, 1, 4), (0, 5, 4)}
    assert listed(choose(mixed, replace(rule, margin=2.5), 0.0, [first, second])) == []
    assert set(listed(choose(mixed, replace(rule, agree=2.0), 0.0, [first, second]))) == {(0, 5, 4)}
    assert len(choose(mixed, replace(rule, per_group=2), 0.0, [first, second])) == 2
    assert len(choose(mixed, replace(rule, per_candidate=1), 0.0, [first, second])) == 1


def test_pareto_leaves_out_who_is_on_both_fronts():
    """Two who disagree on everything dominate nobody and nobody dominates them."""
    first, second = np.array([[1.0, 0.0]]), np.array([[0.0, 0.5]])
    mixed, rule = (first + second) / 2, Rule({}, select="pareto", margin=0.0)
    pairs = choose(mixed, rule, 0.0, [first, second])
    assert len(pairs) == 0
    assert reasons({"a": first}, mixed, pairs, rule) == {0: "no pair beyond the margin between the upper and the lower Pareto front"}


@given(grids(), grids(), st.sampled_from([0.0, 0.125, 1.0]))
def test_pareto_is_the_slow_one(first, other, margin):
    second = np.resize(other, first.shape)
    mixed = first + second
    found = set(listed(choose(mixed, Rule({}, select="pareto", margin=margin), 0.0, [first, second])))
    wanted = set()
    for g, rows in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        scores = {c: pair for c, pair in enumerate(zip(*rows, strict=True)) if not any(map(math.isnan, pair))}
        beats = {(a, b) for a, x in scores.items() for b, y in scores.items() if x != y and x[0] >= y[0] and x[1] >= y[1]}
        upper, lower = set(scores) - {b for _, b in beats}, set(scores) - {a for a, _ in beats}
        wanted |= {(g, a, b) for a in upper - lower for b in lower - upper if sum(scores[a]) - sum(scores[b]) >= max(margin, 1e-9)}
    assert found == wanted


@pytest.mark.parametrize("select", ["all", "best_worst", "mirror", "pareto"])
def test_a_tie_by_symmetry_is_a_tie_whatever_rounding_says(select):
    """Two experts of equal weight swap their opinions of two candidates: neither is better, though their mixes
    often differ in the last bit."""
    first = np.random.default_rng(0).normal(size=(300, 5))
    second = first[:, [3, 1, 2, 0, 4]]
    weights = {"a": 0.5, "b": 0.5}
    mixed = mix({"a": normalise(first, "zscore"), "b": normalise(second, "zscore")}, weights)
    twins = mixed[:, [0, 3]]
    assert (twins[:, 0] != twins[:, 1]).sum() > 20
    assert len(choose(twins, Rule(weights, select=select, margin=0.0))) == 0


# -- why there is no pair


@pytest.mark.parametrize(
    ("first", "second", "rule", "reason"),
    [
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], Rule({}), "all scores are equal"),
        ([1.0, NAN, NAN], [1.0, 2.0, 3.0], Rule({}), "a gave no score for 2 of 3"),
        ([NAN, NAN, NAN], [NAN, 2.0, 3.0], Rule({}), "a gave no score for 3 of 3; b gave no score for 1 of 3"),
        ([0.0, 0.1, 0.2], [0.0, 0.1, 0.2], Rule({}, margin=0.5), "widest gap 0.2 is within the margin 0.5"),
        ([5.0, 6.0, 7.0], [5.0, 6.0, 7.0], Rule({}, select="median_split"), "all on one side of the median"),
        ([5.0, 5.1, 5.2], [5.0, 5.1, 5.2], Rule({}, select="median_split"), "widest gap 0.2 is within the margin 0.5"),
    ],
)
def test_a_group_without_a_pair_says_why(first, second, rule, reason):
    scores = {"a": np.array([first]), "b": np.array([second])}
    mixed = mix(scores, {"a": 1.0, "b": 1.0})
    assert reasons(scores, mixed, choose(mixed, rule, 0.0), rule) == {0: reason}


@given(grids(), RULES)
def test_every_group_has_a_pair_or_a_reason_and_none_has_both(mixed, rule):
    pairs = choose(mixed, rule, 0.0)
    found = reasons({"a": mixed}, mixed, pairs, rule)
    assert set(found) ^ set(pairs.group.tolist()) == set(range(len(mixed)))
    assert all(found.values())


# -- comparing two rules


@given(grids(), RULES, grids(), RULES)
def test_comparing_is_counting_one_by_one(before, first, after, second):
    g, k = min(before.shape[0], after.shape[0]), min(before.shape[1], after.shape[1])
    old, new = choose(before[:g, :k], first, 0.0), choose(after[:g, :k], second, 0.0)
    was, now = set(listed(old)), set(listed(new))
    flipped = {(g, lost, won) for g, won, lost in now} & was
    assert compare(old, new, k) == {
        "kept": len(was & now), "flipped": len(flipped), "lost": len(was - now) - len(flipped),
        "new": len(now - was) - len(flipped),
    }


def test_comparing_with_swapped_labels_flips_every_pair():
    pairs = choose(np.arange(6.0).reshape(2, 3), Rule({"a": 1.0}, margin=0.0))
    swapped = Pairs(pairs.group, pairs.loser, pairs.winner, -pairs.margin)
    assert compare(pairs, swapped, 3) == {"kept": 0, "flipped": 6, "lost": 0, "new": 0}


@given(grids(), grids())
def test_rank_correlation_is_the_slow_one(before, after):
    g, k = min(before.shape[0], after.shape[0]), min(before.shape[1], after.shape[1])
    before, after = before[:g, :k], after[:g, :k]
    products, first, second = 0.0, 0.0, 0.0
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        both = [c for c in range(k) if not math.isnan(old[c] + new[c])]
        ranks = [[0.0 if len(both) < 2 else slow_one(row[c], sorted(row[i] for i in both), "rank") - 0.5 for c in both]
                 for row in (old, new)]
        products += sum(x * y for x, y in zip(*ranks, strict=True))
        first, second = first + sum(x * x for x in ranks[0]), second + sum(y * y for y in ranks[1])
    wanted = products / math.sqrt(first * second) if first * second > 0 else NAN
    assert rank_correlation(before, after) == pytest.approx(wanted, abs=1e-9, nan_ok=True)


def test_rank_correlation_of_one_order_is_one_and_of_the_other_minus_one():
    scores = np.array([[1.0, 2.0, 5.0], [3.0, 1.0, 2.0]])
    assert rank_correlation(scores, scores**3) == pytest.approx(1.0)
    assert rank_correlation(scores, -scores) == pytest.approx(-1.0)
    assert math.isnan(rank_correlation(scores, np.ones((2, 3))))


def test_of_one_group_rank_correlation_is_spearmans():
    """Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * (1 + 1 + 1 + 1 + 0) / (5 * 24) = 0.8."""
    assert rank_correlation(np.array([[1.0, 2, 3, 4, 5]]), np.array([[20.0, 10, 40, 30, 50]])) == pytest.approx(0.8)


def test_the_cap_of_mirror_is_named_once():
    assert preferences.MIRROR_PAIRS == 10
