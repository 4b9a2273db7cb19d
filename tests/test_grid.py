"""Score tables as a grid, whatever the order of their rows, and pairs that do not depend on how the grid is cut."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import grid as grids
from fashiondpo_pipeline import preferences
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser, Grid, reweigh
from fashiondpo_pipeline.preferences import Rule

NAN = float("nan")


def table(rows):
    """(group, candidate, score) rows as the score stage writes them."""
    names, candidates, scores = zip(*rows, strict=True)
    return pa.table({"group": pa.array(names, pa.string()), "candidate": pa.array(candidates, pa.int16()),
                     "score": pa.array(scores, pa.float64())})


def grid_of(rows, **experts):
    return Grid.of(table([(g, c, 0.0) for g, c in rows]), {name: table(scores) for name, scores in experts.items()})


def test_rows_land_in_their_cells_and_groups_come_sorted():
    found = grid_of([("b", 0), ("a", 1), ("a", 0)], e=[("a", 1, 2.0), ("b", 0, 3.0), ("a", 0, 1.0)])
    assert found.groups.to_pylist() == ["a", "b"]
    assert found.k == 2
    assert found.scores["e"] == pytest.approx(np.array([[1.0, 2.0], [3.0, NAN]]), nan_ok=True)


@given(st.permutations([(g, c, 10.0 * ord(g) + c) for g in "abc" for c in range(4)]), st.permutations(range(12)))
def test_the_order_of_rows_does_not_matter(rows, order):
    straight = grid_of([(g, c) for g, c, _ in rows], e=sorted(rows))
    shuffled = grid_of([(rows[i][0], rows[i][1]) for i in order], e=[rows[i] for i in order])
    assert shuffled.groups.equals(straight.groups)
    assert (shuffled.scores["e"] == straight.scores["e"]).all()
    assert straight.scores["e"].tolist() == [[10.0 * ord(g) + c for c in range(4)] for g in "abc"]


def test_a_score_of_nothing_that_was_drawn_is_refused():
    with pytest.raises(UserError) as problem:
        grid_of([("a", 0), ("a", 1)], e=[("a", 0, 1.0), ("z", 1, 2.0), ("y", 0, 2.0)])
    assert str(problem.value) == "scores of 'e': 2 rows belong to no candidate; `fdpo status --verify` finds the file"


def random_grid(g=11, k=5, seed=0):
    rng = np.random.default_rng(seed)
    scores = {name: np.where(rng.random((g, k)) < 0.1, NAN, rng.normal(size=(g, k))) for name in ("a", "b", "watched")}
    return Grid(pa.array([f"g{i:02d}" for i in range(g)]), scores)


WEIGHTS = {"a": 0.6, "b": 0.4, "watched": 0.0}
every_rule = pytest.mark.parametrize("rule", [
    Rule(WEIGHTS, normalise=normalise, over=over, select=select, margin=0.1)
    for normalise in ("zscore", "minmax", "rank") for over in ("group", "all") for select in ("all", "mirror", "median_split")
], ids=str)


@every_rule
def test_how_many_groups_are_taken_at_a_time_changes_no_pair(rule, monkeypatch):
    whole = Chooser(random_grid(), rule).pairs()
    monkeypatch.setattr(grids, "GROUPS_A_PART", 3)
    chooser = Chooser(random_grid(), rule)
    assert [rows for rows, _ in chooser.each()] == [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)]
    assert all(part.chosen.group.max(initial=0) < 3 for _, part in chooser.each())
    pieces = chooser.pairs()
    assert all((getattr(pieces, name) == getattr(whole, name)).all() for name in ("group", "winner", "loser", "margin"))
    assert len(whole) > 5


@every_rule
def test_a_chooser_normalises_mixes_and_chooses_in_that_order(rule):
    grid = random_grid()
    chooser = Chooser(grid, rule)
    spread = {name: preferences.Spread.of(grid.scores[name], True) if rule.over == "all" else None for name in "ab"}
    normal = {name: preferences.normalise(grid.scores[name], rule.normalise, spread[name]) for name in "ab"}
    mixed = 0.6 * normal["a"] + 0.4 * normal["b"]
    assert chooser.normal.keys() == {"a", "b"}  # the watched expert has no say
    assert chooser.mixed == pytest.approx(mixed, nan_ok=True)
    wanted = preferences.choose(chooser.mixed, rule, float(np.nanmedian(chooser.mixed)))
    assert (chooser.pairs().winner == wanted.winner).all() and (chooser.pairs().loser == wanted.loser).all()


def test_over_all_lets_hard_prompts_eat_the_pairs_and_within_groups_does_not():
    """One prompt's scores are all low, another's all high: over all, their own differences nearly vanish."""
    scores = np.array([[0.0, 0.1, 0.2], [10.0, 10.1, 10.2]])
    grid = Grid(pa.array(["hard", "easy"]), {"a": scores})
    assert len(Chooser(grid, Rule({"a": 1.0}, over="group", margin=0.5)).pairs()) == 6
    assert len(Chooser(grid, Rule({"a": 1.0}, over="all", margin=0.5)).pairs()) == 0


def laid(**scores):
    """A grid of whole tables of scores, (g, k) each."""
    return Grid(pa.array([f"g{n}" for n in range(len(next(iter(scores.values()))))]), scores)


@given(st.lists(st.lists(st.floats(-5, 5, width=16), min_size=4, max_size=4), min_size=2, max_size=6),
       st.sampled_from(["zscore", "minmax", "rank", "winrate", "raw"]), st.sampled_from(["group", "all"]), st.floats(0.1, 0.9))
def test_what_is_above_the_quantile_of_all_is_equal_and_makes_no_pair(values, how, over, share):
    scores = np.array(values)
    most = np.quantile(scores, share)
    rule = Rule({"a": 1.0}, normalise=how, over=over, margin=0.0, saturate=share)
    own = Chooser(laid(a=scores), rule)
    cut = Chooser(laid(a=np.minimum(scores, most)), replace(rule, saturate=None))
    assert np.array_equal(own.mixed, cut.mixed) and np.array_equal(own.logits["a"], cut.logits["a"])
    pairs = own.pairs()
    assert (scores[pairs.group, pairs.loser] < most).all()  # two good ones are left alone
    for part in (own.on(own.grid.part(slice(0, 1))), own.only(own.grid.groups[:1])):  # the quantile is that of everything
        assert np.array_equal(part.mixed, own.mixed[:1])


def test_saturating_takes_pairs_from_prompts_that_are_good_already_and_keeps_the_others():
    """One prompt's pictures are all good, another's all poor, a third's are mixed; each expert has a quantile of its own."""
    scores = np.array([[8.0, 9.0, 10.0], [1.0, 2.0, 3.0], [1.0, 5.0, 9.0]])
    rule = Rule({"a": 1.0, "b": 1.0}, margin=0.0)
    before, after = (Chooser(laid(a=scores, b=100 * scores), replace(rule, saturate=share)) for share in (None, 0.5))
    assert np.bincount(before.pairs().group, minlength=3).tolist() == [3, 3, 3]
    assert np.bincount(after.pairs().group, minlength=3).tolist() == [0, 3, 2]  # 5 and 9 are at the median or above it
    assert after.reasons() == {0: "all scores are equal"}


def test_a_grid_without_any_score_gives_reasons_and_no_pair():
    grid = Grid(pa.array(["x", "y"]), {"a": np.full((2, 3), NAN)})
    chooser = Chooser(grid, Rule({"a": 1.0}, select="median_split"))
    assert len(chooser.chosen) == 0
    assert chooser.reasons() == {0: "a gave no score for 3 of 3", 1: "a gave no score for 3 of 3"}


def test_reweighing_tells_what_flips():
    """Two experts of opposite minds: all weight to the other turns every pair round."""
    one = np.array([[0.0, 1.0, 2.0], [5.0, 3.0, 4.0]])
    grid = Grid(pa.array(["g", "h"]), {"one": one, "other": -one})
    rule = Rule({"one": 1.0, "other": 0.0}, margin=0.0)
    before = Chooser(grid, rule).pairs()
    same, turned = (reweigh(grid, replace(rule, weights=weights), before) for weights in ({"one": 2.0}, {"other": 1.0}))
    assert same.change == {"kept": 6, "flipped": 0, "lost": 0, "new": 0} and not same.flipped.any()
    assert turned.change == {"kept": 0, "flipped": 6, "lost": 0, "new": 0} and turned.flipped.all()
    some = reweigh(grid, replace(rule, weights={"other": 1.0}, select="best_worst"), before)
    assert some.change == {"kept": 0, "flipped": 2, "lost": 4, "new": 0}
    assert list(zip(some.pairs.winner.tolist(), some.pairs.loser.tolist(), strict=True)) == [(0, 2), (1, 0)]


def test_pairs_compare_alike_however_many_codes_there_are(monkeypatch):
    rng = np.random.default_rng(0)
    grid = Grid(pa.array(list("abcdefgh")), {"one": rng.normal(size=(8, 5)), "other": rng.normal(size=(8, 5))})
    before = Chooser(grid, Rule({"one": 1.0})).pairs()
    looked_up = reweigh(grid, Rule({"other": 1.0}), before)
    monkeypatch.setattr(preferences, "MOST_CODES", 0)
    in_order = reweigh(grid, Rule({"other": 1.0}), before)
    assert looked_up.change == in_order.change and min(looked_up.change.values()) > 0
    assert (looked_up.flipped == in_order.flipped).all()


@pytest.mark.parametrize(
    ("scores", "rule", "why"),
    [
        ([[0, 1], [NAN, 1]], {}, "no score by other"),
        ([[0, 1], [0, -1]], {"weights": {"one": 1.0, "other": 1.0}, "agree": None}, "a tie"),
        ([[0, 1], [0, 1]], {"margin": 5.0}, "gap 2.00 is within the margin 5"),
        ([[0, 9], [1, 0]], {"weights": {"one": 3.0, "other": 1.0}, "agree": 0.25}, "other sees -2.00 of the 0.25 that each must see"),
    ],
)
def test_why_two_candidates_make_no_pair(scores, rule, why):
    grid = Grid(pa.array(["g"]), dict(zip(("one", "other"), np.array(scores, float)[:, None], strict=True)))
    chooser = Chooser(grid, Rule(**{"weights": {"one": 1.0, "other": 1.0}, "margin": 0.5} | rule))
    assert chooser.unpaired(0) == [(0, 1, why)]


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"select": "best_worst"}, {(0, 1): "not the best against the worst", (1, 2): "not the best against the worst"}),
        ({"select": "median_split"}, {(1, 2): "both on one side of the median"}),
        ({"select": "all", "per_group": 1}, dict.fromkeys([(0, 1), (1, 2)], "over the cap of per_group or per_candidate")),
        ({"select": "all"}, {}),
    ],
)
def test_why_the_rest_of_a_group_makes_no_pair(rule, why):
    grid = Grid(pa.array(["g"]), {"one": np.array([[0.0, 1.0, 2.0]])})
    assert {(a, b): text for a, b, text in Chooser(grid, Rule({"one": 1.0}, margin=0.1, **rule)).unpaired(0)} == why


def test_a_grid_is_the_same_whether_its_tables_come_whole_or_in_pieces():
    """Pieces of neighbours, of strangers, and in another order than the candidates."""
    rng = np.random.default_rng(0)
    rows = [(f"g{n:02d}", k, float(rng.normal())) for n in range(12) for k in range(3)]
    whole = table(rows)
    grid = Grid.of(whole, {"a": whole})
    for order in (np.arange(36), rng.permutation(36)):
        mixed = whole.take(pa.array(order))
        pieces = [mixed.slice(start, 5) for start in range(0, 36, 5)]
        found = Grid.gathered(pieces, {"a": pieces[::-1]})
        assert found.groups.equals(grid.groups) and (found.scores["a"] == grid.scores["a"]).all()


def test_a_stranger_in_a_piece_is_named():
    whole = table([("b", 0, 1.0), ("c", 0, 2.0)])
    for stranger in ("a", "bb", "d"):
        with pytest.raises(UserError, match="scores of 'one': 1 rows belong to no candidate"):
            Grid.gathered([whole], {"one": [whole, table([(stranger, 0, 1.0)])]})
