"""The diagnosis: each threshold at both sides, alarms, and the round that is kept."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import diagnosis
from fashiondpo_pipeline.diagnosis import Finding, best_in_words, best_round, interval, of_rounds, of_training, shifts, worst_first
from fashiondpo_pipeline.effect_size import base_by_setting
from fashiondpo_pipeline.timesteps import in_window

LN_2 = math.log(2)
KNOBS = {"objective": "diffusion_dpo", "beta": 2000.0, "learning_rate": 1e-4, "max_grad_norm": 1.0, "epochs": 4, "ratio_clip": None,
         "noise": "tracked", "draws": 4, "window": [0.0, 1.0], "guard": None, "signal": "log_prob"}


def table(steps: int = 40, **curves) -> pa.Table:
    """A finetuning in which nothing is odd, of `steps` optimiser steps of 100 pairs; curves (numbers or sequences) replace its own."""
    x = np.linspace(0, 1, steps)
    usual = {
        "step": np.arange(steps), "epoch": np.arange(steps) * 4 // steps, "loss": LN_2 - 0.3 * x, "margin": 1.2 * x,
        "accuracy": 0.5 + 0.35 * x, "winner": 0.01 * x, "loser": -0.02 * x, "grad_norm": np.full(steps, 0.5),
        "learning_rate": np.full(steps, 1e-4), "pairs": np.full(steps, 100), "rows": np.full(steps, 50), "beta": np.full(steps, 2000.0),
        "clipped": np.zeros(steps), "winner_error": -0.01 * x, "loser_error": 0.02 * x,
    }
    return pa.table(usual | {name: np.broadcast_to(curve, steps) for name, curve in curves.items()})


def told(steps: pa.Table, columns: pa.Table | None = None, walk: int | None = None, **knobs) -> list[tuple[str, str]]:
    return [(finding.level, finding.sentence) for finding in of_training(steps, columns, KNOBS | knobs, walk)]


def the_one(*args, **knobs) -> tuple[str, str]:
    (only,) = told(*args, **knobs)
    return only


def late(value: float, before: float = 0.0, steps: int = 40) -> np.ndarray:
    """A curve that is `value` in the last quarter of the steps, `before` until then."""
    return np.where(np.arange(steps) >= steps - steps // 4, value, before)


# -- finetuning


def test_nothing_is_said_where_nothing_is_odd():
    assert told(table()) == []


def test_tables_of_older_runs_are_read_too():
    old = table().drop_columns(["beta", "clipped", "winner_error", "loser_error"])
    assert told(old) == []
    fallen = old.set_column(old.column_names.index("winner"), "winner", pa.array(late(-0.03)))
    assert told(fallen, objective="step_dpo") != []


def test_columns_of_nulls_are_as_no_columns():
    silent = pa.nulls(40, pa.float32())
    steps = table(winner=late(-0.04), loser=late(-0.1))
    for name in ("winner_error", "loser_error", "clipped"):
        steps = steps.set_column(steps.column_names.index(name), name, silent)
    assert the_one(steps, objective="step_dpo")[1].startswith("winners and losers both become less likely than under the reference, by 0.04 and 0.1")


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_shortest_finetuning_is_read_too(steps):
    assert [level for level, _ in told(table(steps))] == (["warning", "warning"] if steps == 1 else [])  # one step cannot have learnt


def test_a_loss_that_is_not_a_number_is_an_alarm_and_the_only_finding():
    loss = np.full(40, 0.6)
    loss[30:33] = np.nan
    level, sentence = the_one(table(loss=loss, accuracy=0.1, margin=99.0))
    assert level == "alarm"
    assert sentence.startswith("the loss is not a number from optimiser step 30 on (3 of 40 steps): lower finetune.learning_rate")
    assert the_one(table(loss=np.inf))[0] == "alarm"


def test_a_winner_whose_error_rises_calls_for_the_guard():
    level, sentence = the_one(table(winner_error=late(0.031), loser_error=late(-0.01)))
    assert level == "warning"
    assert sentence.startswith("the winner's own error rises by 0.031: turn the guard on (finetune.guard: 0.9)")
    guarded = the_one(table(winner_error=late(0.031), loser_error=late(-0.01)), guard=0.8)
    assert "raise finetune.guard (0.8 now)" in guarded[1]


@pytest.mark.parametrize("knobs", [{"objective": "step_dpo"}, {"objective": "ipo"}, {"objective": {"step_dpo": 1.0, "diffusion_dpo": 1.0}}])
def test_what_is_trained_on_log_probabilities_is_judged_by_them_and_not_by_its_errors(knobs):
    """The step table has errors whatever the objective: here they fall for winners and rise for losers, as they should."""
    _, sentence = the_one(table(winner=late(-0.031), loser=late(0.01)), **knobs)
    assert sentence == ("winners themselves become less likely than under the reference, by 0.031: "
                        "raise finetune.beta or lower finetune.learning_rate")


@pytest.mark.parametrize(("knobs", "guard"), [
    ({"objective": "ipo", "signal": "error"}, True), ({"objective": {"diffusion_dpo": 1.0, "step_dpo": 1.0}}, False),
    ({"objective": "kto", "signal": "error"}, False),
])
def test_what_is_trained_on_errors_is_judged_by_them_and_the_guard_advised_only_where_it_acts(knobs, guard):
    _, sentence = the_one(table(winner_error=late(0.031), loser_error=late(-0.01)), **knobs)
    assert sentence.startswith("the winner's own error rises by 0.031: ")
    assert ("finetune.guard" in sentence) == guard


def test_steps_and_columns_without_a_pair_do_not_count():
    odd = np.arange(40) % 2 == 1
    holes = table(pairs=np.where(odd, 100, 0), accuracy=np.where(odd, 0.9, np.nan), margin=np.where(odd, 1.0, np.nan))
    assert told(holes) == []
    assert told(table(pairs=0, accuracy=np.nan, margin=np.nan)) == []
    columns = by_step([0.9, math.nan, 0.5], [0, 1, 2], [900.0, 500.0, 100.0])
    columns = columns.set_column(2, "pairs", pa.array([1000, 0, 1000]))
    assert "1 of 2 saved steps" in the_one(table(), columns, 3)[1]


def test_both_errors_rising_is_said_as_such():
    _, sentence = the_one(table(winner_error=late(0.01), loser_error=late(0.05)))
    assert sentence.startswith("the errors of winners and losers both rise, by 0.01 and 0.05; pairs are told apart by unlearning: turn")


def test_a_winner_that_rises_little_beside_the_loser_is_no_finding():
    loser = 0.05
    at = diagnosis.TELLING * loser
    assert told(table(winner_error=late(0.99 * at), loser_error=late(loser))) == []
    assert len(told(table(winner_error=late(1.01 * at), loser_error=late(loser)))) == 1


@pytest.mark.parametrize(("winner", "loser", "unlearns"), [
    (-0.00066, -0.002, False), (-0.00067, -0.002, True), (-0.00062, -0.0045, False), (-0.014, -0.029, True), (-0.001, 0.0, True),
])
def test_winners_may_fall_by_what_moving_costs_every_picture_and_not_by_more(winner, loser, unlearns):
    """The third is a round that mended 74 pictures and broke 6: its winners rose by 0.002 and its losers fell by it, beside 0.0026 that
    all pictures fell by. The fourth rewarded saturation, and the judge liked its pictures less."""
    found = told(table(winner=late(winner), loser=late(loser)), objective="step_dpo")
    assert [sentence.partition(" than")[0] for _, sentence in found] == (
        [] if not unlearns else ["winners and losers both become less likely" if loser else "winners themselves become less likely"])
    assert all(("more than they part; pairs are told apart by unlearning" in sentence) == (loser < 0) for _, sentence in found)


def test_one_wild_step_is_not_a_winner_that_rises():
    wild = np.zeros(40)
    wild[-1] = 5.0
    assert told(table(winner_error=wild, loser_error=0.0)) == []


def test_only_the_end_counts_for_rising_errors():
    assert told(table(winner_error=np.where(np.arange(40) < 30, 0.1, -0.1))) == []


def test_accuracy_is_above_one_half_only_by_more_than_chance():
    # the last quarter is 10 steps of 100 pairs: a standard deviation of a fair coin over 1000 tosses is 1.58 %, times 1.96 is 3.1 %
    assert the_one(table(accuracy=late(0.530, 0.5)))[1].startswith("accuracy is not clearly above one half at the end (53.0 % of the pairs")
    assert told(table(accuracy=late(0.532, 0.5))) == []


def test_margins_that_stay_near_zero_name_a_beta_to_try():
    flat = table(margin=np.linspace(0, 0.003, 40), loss=LN_2)
    level, sentence = the_one(flat)
    assert level == "warning"
    assert sentence.startswith("mean margins stay within ±0.003: beta is too small for so little change")
    assert "try finetune.beta: 20000 or a higher finetune.learning_rate (0.0001 now)" in sentence  # ten times is the most


def test_an_advised_beta_aims_at_the_wanted_margin():
    flat = table(margin=0.0199, loss=LN_2)
    assert "finetune.beta: 20000 " in the_one(flat)[1]  # 0.5 / 0.0199 is 25: more than ten times
    assert diagnosis._coarse(2000 * diagnosis.WANTED_MARGIN / 0.2) == "5000"


def test_a_beta_that_moves_by_itself_is_not_advised():
    assert the_one(table(margin=0.0, loss=LN_2), auto_beta=0.3)[1].endswith("for so little change; try a higher finetune.learning_rate (0.0001 now)")


@pytest.mark.parametrize(("margin", "loss"), [(1.01 * diagnosis.FLAT_MARGIN, 0.0), (0.0, 1.01 * diagnosis.FLAT_LOSS)])
def test_margins_or_losses_that_move_are_not_flat(margin, loss):
    assert told(table(margin=late(0.99 * diagnosis.FLAT_MARGIN), loss=LN_2 - late(0.99 * diagnosis.FLAT_LOSS))) != []
    assert told(table(margin=late(margin), loss=LN_2 - late(loss))) == []


def test_margins_that_the_clip_holds_flat_are_the_clips_affair():
    assert the_one(table(margin=0.0, loss=LN_2, clipped=1.0), ratio_clip=0.01)[1].startswith("finetune.ratio_clip (0.01) holds back 100 %")


def test_wide_margins_are_over_fitting():
    assert told(table(margin=late(diagnosis.WIDE_MARGIN))) == []
    assert the_one(table(margin=late(diagnosis.WIDE_MARGIN + 0.1)))[1].startswith("margins reach 5.1 on average")


def test_every_pair_in_order_by_half_time_is_over_fitting_and_later_it_is_not():
    def curve(from_step):
        return np.where(np.arange(40) >= from_step, 0.995, 0.6)

    assert the_one(table(accuracy=curve(10)))[1].startswith("99.5 % of the pairs are in their order before half of finetuning is over")
    assert told(table(accuracy=curve(20))) == []


@pytest.mark.parametrize(("share", "count"), [(0.5, 0), (0.51, 1)])
def test_a_clip_that_holds_back_most_pairs_is_warned_of(share, count):
    assert len(told(table(clipped=late(share)), ratio_clip=0.1)) == count


def test_gradients_mostly_above_the_limit_are_a_note():
    half = np.where(np.arange(40) % 2 == 0, 3.0, 0.5)
    assert told(table(grad_norm=half)) == []
    half[1] = 3.0
    level, sentence = the_one(table(grad_norm=half))
    assert level == "note"
    assert sentence.startswith("gradients are scaled down in 52 % of the optimiser steps (median norm 3, finetune.max_grad_norm 1)")


def test_skipped_steps_are_warned_of_when_they_are_more_than_a_scales_search():
    norm = np.full(40, 0.5)
    norm[:2] = np.inf  # 5 %
    assert told(table(grad_norm=norm)) == []
    norm[2] = np.nan
    assert the_one(table(grad_norm=norm))[1].startswith("8 % of the optimiser steps had no finite gradient")


def test_a_plateau_says_how_many_epochs_would_have_done():
    level, sentence = the_one(table(pairs=2000, accuracy=np.where(np.arange(40) >= 10, 0.8, 0.6)))
    assert (level, sentence[:68]) == ("note", "accuracy stays at 80 % over the second half of finetuning: finetune.")
    assert "finetune.epochs: 2 would have done" in sentence


def test_a_gain_that_noise_could_hide_is_no_plateau():
    flat = np.where(np.arange(40) >= 10, 0.8, 0.6)
    assert told(table(pairs=100, accuracy=flat)) == []  # 1000 pairs a quarter: 1.96 x sqrt(2 x 0.16 / 1000) = 3.5 points
    # 20 000 pairs a quarter: 1.96 x sqrt(2 x 0.16 / 20 000) = 0.8 points, so that 1.2 of the 2 points are told from none
    for gain, count in ((0.011, 1), (0.013, 0)):
        assert len(told(table(pairs=2000, accuracy=np.where(np.arange(40) >= 30, 0.8 + gain, flat)))) == count
    assert told(table(pairs=2000, accuracy=flat), epochs=1) == []


def test_the_gravest_finding_comes_first():
    found = [Finding("note", "a", ""), Finding("alarm", "b", ""), Finding("warning", "c", ""), Finding("alarm", "d", "")]
    assert [finding.what for finding in worst_first(found)] == ["b", "d", "c", "a"]
    both = told(table(grad_norm=9.0, margin=9.0))
    assert [level for level, _ in both] == ["warning", "note"]


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12), st.floats(0, 1))
def test_no_curve_is_too_odd_to_be_read(curve, share):
    steps = table(len(curve), margin=curve, loss=np.abs(curve), accuracy=share, winner_error=curve, loser_error=curve[::-1])
    for finding in of_training(steps, None, KNOBS):
        assert finding.level in diagnosis.LEVELS and finding.what and finding.advice
        assert "nan" not in finding.sentence


# -- steps of the walk


def by_step(accuracy: list[float], steps: list[int], timesteps: list[float], pairs: int = 1000) -> pa.Table:
    return pa.table({
        "step": pa.array(steps, pa.int16()), "timestep": pa.array(timesteps, pa.float32()), "pairs": [pairs] * len(steps),
        "accuracy": pa.array(accuracy, pa.float32()), "margin": [0.0] * len(steps), "winner": [0.0] * len(steps), "loser": [0.0] * len(steps),
    })


STEPS, TIMESTEPS = [0, 5, 10, 14, 19], [950.0, 700.0, 450.0, 250.0, 0.0]


def test_silent_steps_at_the_ends_give_a_window_that_leaves_out_just_them():
    level, sentence = the_one(table(), by_step([0.50, 0.52, 0.8, 0.7, 0.49], STEPS, TIMESTEPS), 20)
    assert level == "note"
    assert sentence.startswith("3 of 5 saved steps show no more than chance over the last epoch (timestep 950, 700, 0; accuracy 50.3 %): "
                               "finetune.window: [0.526, 0.737] leaves them out")
    assert in_window(STEPS, 20, [0.526, 0.737]) == [2, 3]


@given(st.integers(2, 1000), st.data())
def test_the_advised_window_holds_what_learns_and_no_silent_step_beyond_it(walk, data):
    saved = sorted(data.draw(st.sets(st.integers(0, walk - 1), min_size=2, max_size=8)))
    learns = data.draw(st.lists(st.booleans(), min_size=len(saved), max_size=len(saved)).filter(lambda found: any(found) and not found[0]))
    columns = by_step([0.9 if found else 0.5 for found in learns], saved, [1000.0 - i for i in saved])
    low, high = map(float, the_one(table(), columns, walk)[1].split("[")[1].split("]")[0].split(","))
    first, last = learns.index(True), len(learns) - 1 - learns[::-1].index(True)
    assert in_window(saved, walk, [low, high]) == list(range(first, last + 1))


def test_a_silent_step_is_one_whose_interval_reaches_one_half():
    # of 1000 tosses: 1.96 x 1.58 % = 3.1 % above one half
    assert told(table(), by_step([0.532, 0.9], [0, 1], [900.0, 100.0]), 2) == []
    assert len(told(table(), by_step([0.530, 0.9], [0, 1], [900.0, 100.0]), 2)) == 1
    assert len(told(table(), by_step([0.3, 0.9], [0, 1], [900.0, 100.0]), 2)) == 1  # the wrong way round teaches nothing either


def test_where_every_step_is_silent_the_accuracy_as_a_whole_says_so():
    silent = by_step([0.5] * 5, STEPS, TIMESTEPS)
    assert told(table(), silent, 20) == []
    assert the_one(table(accuracy=0.5), silent, 20)[1].startswith("accuracy is not clearly above one half")


def test_a_silent_step_between_others_cannot_be_left_out():
    assert the_one(table(), by_step([0.9, 0.5, 0.9, 0.9, 0.9], STEPS, TIMESTEPS), 20)[1].endswith("more epochs may reach them")
    some = the_one(table(), by_step([0.5, 0.9, 0.5, 0.9, 0.9], STEPS, TIMESTEPS), 20)[1]
    assert some.endswith("finetune.window: [0.263, 1] leaves the 1 at its ends out")


def test_without_the_length_of_the_walk_the_window_has_no_numbers():
    assert the_one(table(), by_step([0.5, 0.9, 0.9, 0.9, 0.9], STEPS, TIMESTEPS))[1].endswith("narrow finetune.window to the others")


def test_draws_of_fresh_noise_are_strata_of_the_window():
    # numbered as the walk goes, from high timesteps down; of four draws over [0.2, 1] the silent first is the walk's second fifth
    draws = by_step([0.5, 0.9, 0.9, 0.9], [0, 1, 2, 3], [700.0, 500.0, 300.0, 100.0])
    sentence = the_one(table(), draws, 20, noise="fresh", window=[0.2, 1.0])[1]
    assert sentence.startswith("1 of 4 draws show")
    assert "finetune.window: [0.4, 1] leaves them out" in sentence
    unseen = draws.set_column(2, "pairs", pa.array([0, 1000, 1000, 1000])).set_column(3, "accuracy", pa.array([math.nan, 0.5, 0.9, 0.9]))
    assert "finetune.window: [0.6, 1] leaves them out" in the_one(table(), unseen, 20, noise="fresh", window=[0.2, 1.0])[1]


def test_many_silent_steps_are_counted_not_named():
    columns = by_step([0.5] * 10 + [0.9] * 2, list(range(12)), [990.0 - 10 * i for i in range(12)])
    assert "(timestep 990, 980, 970, 960, 950, 940 and 4 more;" in the_one(table(), columns, 12)[1]


def test_an_empty_table_of_steps_says_nothing():
    assert told(table(), by_step([], [], []), 20) == []


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_an_interval_holds_its_share_and_narrows(share, count):
    low, high = interval(share, count)
    assert -1e-9 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1 + 1e-9
    wide = interval(share, count / 2)
    assert wide[0] <= low + 1e-9 and high <= wide[1] + 1e-9


# -- rounds

UP, DOWN, OPEN = (0.7, 0.6, 0.8), (0.3, 0.2, 0.4), (0.5, 0.4, 0.6)


def rate(win_rate, low, high):
    return {"win_rate": win_rate, "low": low, "high": high}


def numbers(clip=UP, judge=UP, watcher=OPEN, saturation=0.4, diversity=0.5, best_of=(3.4, 2.9, 4.1), shift=0.5, kept=(0.7, 0.6, 0.8)) -> dict:
    """What `evaluate` says of a round: saturation 0.4 +- 0.1 and diversity 0.5 +- 0.2 in the base."""
    rates = {"clip": (clip, True), "judge": (judge, False), "watcher": (watcher, False)}
    return {
        "experts": {name: {"rewarded": rewarded, "against_base": rate(*found)} for name, (found, rewarded) in rates.items()},
        "size": {"best_of": dict(zip(("value", "low", "high", "most"), (*best_of, 16), strict=True)), "shift": {"value": shift},
                 "diversity_at_equal_quality": dict(zip(("value", "low", "high"), kept, strict=True))},
        "meters": {"saturation": {"base": 0.4, "after": saturation, "spread": 0.1}},
        "diversity": {"base": 0.5, "before": 0.5, "after": diversity, "spread": 0.2},
    }


def test_rounds_without_a_sign_of_gaming_raise_no_alarm():
    assert of_rounds({1: numbers(), 2: numbers(judge=OPEN)}) == []


def test_a_watched_expert_that_falls_while_a_rewarded_one_rises_is_an_alarm():
    (alarm,) = of_rounds({1: numbers(), 2: numbers(watcher=DOWN)})
    assert alarm.level == "alarm"
    assert alarm.what == ("round 2: what is rewarded rose over the base (clip 70.0 % [60.0, 80.0]) while what only watches fell "
                          "(watcher 30.0 % [20.0, 40.0])")


@pytest.mark.parametrize(("clip", "watcher", "count"), [
    ((0.6, 0.501, 0.7), (0.4, 0.3, 0.499), 1), ((0.6, 0.5, 0.7), (0.4, 0.3, 0.499), 0), ((0.6, 0.501, 0.7), (0.4, 0.3, 0.5), 0), (DOWN, DOWN, 0),
])
def test_rises_and_falls_are_intervals_wholly_beyond_one_half(clip, watcher, count):
    assert len(of_rounds({1: numbers(clip=clip, watcher=watcher)})) == count


def test_the_mix_of_the_rewarded_is_no_watcher():
    found = numbers()
    found["experts"]["mix"] = {"rewarded": False, "against_base": rate(*DOWN)}
    assert of_rounds({1: found}) == []


@pytest.mark.parametrize(("saturation", "count"), [(0.499, 0), (0.501, 1), (0.301, 0), (0.299, 1)])
def test_a_meter_may_drift_by_one_standard_deviation_either_way(saturation, count):
    assert len(of_rounds({1: numbers(saturation=saturation)})) == count


def test_drift_of_meters_and_diversity_is_one_alarm_with_figures():
    (alarm,) = of_rounds({3: numbers(saturation=0.63, diversity=0.2)})
    assert alarm.what == ("round 3: pictures drifted from the base's, in standard deviations: saturation by +2.3, diversity by -1.5 "
                          "(evaluate.drift is 1)")


@pytest.mark.parametrize(("best_of", "kept", "count"), [
    ((3.4, 2.9, 4.1), (1.1, 0.9, 1.3), 0), ((3.4, 2.9, None), (1.1, 0.9, None), 0), ((3.4, 2.9, 4.1), (0.9, 0.7, 0.99), 1),
    ((3.4, 2.9, 4.1), (None, None, None), 1), ((1.2, 0.9, 1.5), (1.1, 0.9, 1.3), 1),
])
def test_diversity_that_choosing_costs_too_is_no_drift(best_of, kept, count):
    assert len(of_rounds({1: numbers(diversity=0.2, best_of=best_of, kept=kept)})) == count
    (alarm,) = of_rounds({1: numbers(diversity=0.8, best_of=best_of, kept=kept)})
    assert "diversity by +1.5" in alarm.what


def test_the_limit_of_drift_is_a_knob_and_null_is_never():
    far = {1: numbers(saturation=0.63)}
    assert of_rounds(far, drift=2.5) == [] == of_rounds(far, drift=None)
    assert len(of_rounds({1: numbers(watcher=DOWN)}, drift=None)) == 1


def test_what_was_not_measured_or_does_not_vary_has_no_shift():
    found = numbers()
    found["meters"] |= {"contrast": {"base": None, "after": None, "spread": None}, "sharpness": {"base": 0.1, "after": 0.2, "spread": 0.0}}
    found["diversity"] = {"base": 0.5, "before": None, "after": None, "spread": 0.2}
    assert shifts(found) == {"saturation": 0.0, "contrast": None, "sharpness": None, "diversity": None}
    assert of_rounds({1: found}) == []


def structure(base, after, spread, name="edge_density") -> dict:
    return numbers() | {"meters": {name: {"base": base, "after": after, "spread": spread}}}


def test_structure_that_is_gone_is_an_alarm_however_much_the_base_varies_in_it():
    (alarm,) = of_rounds({2: structure(0.2, 0.08, 0.15)})
    assert alarm.level == "alarm"
    assert alarm.what == "round 2: pictures lost structure: edge density fell by 60 %, from 0.2 to 0.08"
    assert of_rounds({2: structure(0.2, 0.08, 0.15)}, drift=None) == []
    assert len(of_rounds({2: structure(4.0, 1.9, 9.0, "colour_entropy")})) == 1
    assert best_round({1: structure(0.2, 0.08, 0.15)}, "judge") == 0


@pytest.mark.parametrize(("after", "count"), [(0.101, 0), (0.099, 1)])
def test_half_of_the_structure_may_go(after, count):
    assert len(of_rounds({1: structure(0.2, after, 0.15)})) == count


def test_what_drift_tells_already_is_told_once_and_what_is_no_structure_may_halve():
    (alarm,) = of_rounds({1: structure(0.2, 0.08, 0.05)})
    assert "edge density by -2.4" in alarm.what and "lost structure" not in alarm.what
    assert of_rounds({1: structure(0.2, 0.08, 0.15, "dark_pixels")}) == []
    assert of_rounds({1: structure(0.0, 0.0, 0.0)}) == of_rounds({1: structure(None, None, None)}) == []


# -- the round to keep


NO_MIX = (None, None, None)  # nobody rewarded is asked about held-out draws: nothing to choose the base's pictures by


def test_the_round_with_the_highest_mean_is_kept_whatever_the_win_rates():
    rounds = {1: numbers(judge=(0.9, 0.8, 0.95)), 2: numbers(judge=OPEN, shift=0.9), 3: numbers(judge=(0.8, 0.7, 0.9), shift=0.7)}
    assert best_round(rounds, "judge") == 2


def test_of_equal_rounds_the_earlier_is_kept_in_whatever_order_they_come():
    assert best_round({3: numbers(), 2: numbers(), 1: numbers(best_of=(1.1, 0.9, 1.3))}, "judge") == 2


def test_a_round_with_an_alarm_is_not_kept_however_high():
    rounds = {1: numbers(), 2: numbers(shift=0.9, saturation=0.9)}
    assert best_round(rounds, "judge") == 1
    assert best_round(rounds, "judge", drift=None) == 2
    assert best_in_words(rounds, "judge") == ("Round 1 is the one to keep: by judge one picture of it is as good as the best of 3.4 [2.9, 4.1] "
                                              "of the base; not counting round 2, which raised an alarm.")


@pytest.mark.parametrize(("low", "best"), [(1.0, 0), (1.01, 1), (0.0, 0)])
def test_the_base_is_kept_unless_an_equivalent_lies_wholly_above_one(low, best):
    """However often a difference of nothing is won: a win rate of 90 % alone keeps no round."""
    assert best_round({1: numbers(judge=(0.9, 0.8, 0.95), best_of=(1.2, low, 1.4))}, "judge") == best


def test_more_than_can_be_told_is_above_one():
    assert best_round({1: numbers(best_of=(None, 9.0, None))}, "judge") == 1
    assert "better than the best of 16 [9.0, more] of the base" in best_in_words({1: numbers(best_of=(None, 9.0, None))}, "judge")


def test_the_base_is_kept_in_words_where_no_round_beats_it():
    sentence = "The base is the one to keep: no round beats it by judge, with an interval wholly above the best of 1"
    assert best_in_words({1: numbers(best_of=(1.1, 0.9, 1.3))}, "judge") == sentence + "."
    found = {number: numbers(best_of=(0.5, 0.4, 0.7), saturation=0.9) for number in (1, 2)}
    assert best_in_words(found, "judge") == sentence + "; not counting rounds 1, 2, which raised an alarm."


def test_no_round_at_all_keeps_the_base():
    assert best_round({}, "judge") == 0


@pytest.mark.parametrize(("low", "best"), [(0.5, 0), (0.501, 1)])
def test_where_there_is_nothing_to_choose_by_the_win_rate_decides(low, best):
    found = {1: numbers(judge=(0.6, low, 0.7), best_of=NO_MIX), 2: numbers(judge=OPEN, watcher=UP, best_of=NO_MIX)}
    assert best_round(found, "judge") == best and best_round(found, "watcher") == 2
    assert best != 1 or best_in_words(found, "judge").endswith("judge prefers it to the base in 60.0 % [50.1, 70.0].")


# -- how much there is to go by


def evaluated(prompts=40, low=0.4, high=0.7):
    return {"prompts": prompts, "judge": "judge", "against_base": {"win_rate": 0.859, "low": low, "high": high}}


def evidence(pairs=100, steps=40, **found):
    return [(finding.level, finding.sentence) for finding in diagnosis.of_evidence(pairs, table(steps, accuracy=late(0.8, steps=steps)), **found)]


def test_enough_pairs_steps_and_prompts_call_for_no_caution():
    assert evidence() == evidence(evaluated=evaluated()) == evidence(evaluated=evaluated(low=0.6)) == []


def test_two_pairs_two_steps_and_four_prompts_are_each_told():
    found = evidence(2, 2, evaluated=evaluated(4, 0.0, 1.0))
    assert [level for level, _ in found] == ["warning"] * 3
    pairs, steps, prompts = (sentence for _, sentence in found)
    assert pairs.startswith("only 2 pairs to learn from: they say what these pictures are, not what is preferred: label or draw at least 10")
    assert steps.startswith("only 2 optimiser steps: the adapter has hardly moved")
    assert prompts.startswith("only 4 held-out prompts: they say nothing of others: hold out at least 20")
    assert evidence(1, 40)[0][1].startswith("only 1 pair to learn from")


@pytest.mark.parametrize(("count", "words"), [(4, "they say nothing of others"), (5, "an interval over so few is wide"), (19, "an interval"),
                                             (20, None)])
def test_prompts_are_too_few_to_say_anything_or_to_say_much(count, words):
    assert [words in sentence for _, sentence in evidence(evaluated=evaluated(count))] == ([True] if words else [])


def test_a_gain_that_finetuning_did_not_learn_is_told_with_both_figures():
    steps = table(40, accuracy=np.full(40, 0.505))
    (finding,) = diagnosis.of_evidence(100, steps, evaluated(low=0.7, high=0.95))
    assert finding.what == ("judge prefers the round to the base in 85.9 % [70.0, 95.0], but finetuning told its pairs apart no better than chance "
                            "(50.5 %)")
    assert diagnosis.of_evidence(100, steps, evaluated(low=0.4)) == [], "nothing is claimed, so nothing is doubted"


# -- how much was gained

def span(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def size(best=(3.4, 2.9, 4.1), diversity=(1.02, 0.97, 1.07), moved=0.4, ties=0.1) -> dict:
    """What is as it should be but for what is given."""
    return {"best_of": span(*best) | {"most": 16}, "diversity_at_equal_quality": span(*diversity), "visible_change": span(moved, 0.0, 1.0),
            "right": None, "shift": span(0.3, 0.2, 0.4), "noise": 0.02, "ties": ties, "curve": [{"n": 1, "mean": -0.5}, {"n": 16, "mean": -0.1}]}


def line(role, guidance, steps, forwards, mean, right) -> dict:
    return {"role": role, "usual": (guidance, steps) == (1.0, 10), "guidance": guidance, "steps": steps, "eta": 1.0, "guidance_rescale": 0.0,
            "forwards": forwards, "mean": mean, "rewarded": mean, "right": right, "diversity": 0.1, "pictures": 640}


def with_differences(lines, reach=0.02) -> list[dict]:
    """Lines of the sampler with their differences to the usual ones, whose intervals reach so far to both sides."""
    def over(one, other):
        gaps = {name: None if None in (one[name], other[name]) else one[name] - other[name] for name in ("mean", "right")}
        found = {name: None if gap is None else span(gap, gap - reach, gap + reach) for name, gap in gaps.items()}
        return found | {"mean": found["mean"] or span(None)}

    usual = {one["role"]: one for one in lines if one["usual"]}
    roles = {"over_base": "base", "over_tuned": "after"}
    return [one | {name: None if usual.get(role, one) is one else over(one, usual[role]) for name, role in roles.items()} for one in lines]


LINES = [line("base", 1.0, 10, 10, -0.5, 0.845), line("after", 1.0, 10, 10, -0.3, 0.93), line("base", 1.5, 10, 20, -0.4, 0.90),
         line("after", 1.5, 10, 20, -0.25, 0.95), line("base", 1.0, 20, 20, -0.45, 0.86)]


def of_size(found=None, lines=(), prompts=40, reach=0.02, **knobs) -> list[tuple[str, str]]:
    lines = with_differences(lines, reach)
    found = {"prompts": prompts, "judge": "judge", "size": size() if found is None else found, "sampler": lines,
             "base_by_setting": base_by_setting(lines)}
    return [(finding.level, finding.sentence) for finding in diagnosis.of_size(found, knobs)]


def test_a_round_that_gained_calls_for_no_remark():
    assert of_size(lines=LINES) == of_size() == []


def test_a_policy_that_hardly_moved_is_told_with_both_figures_and_what_to_turn():
    (found,) = of_size(size(best=(1.2, 1.1, 1.3), moved=0.04), beta=2000.0, learning_rate=6e-4)
    assert found == ("warning", "the policy hardly moved (visible change 0.04, best of 1.2): lower finetune.beta (2000 now) or raise "
                                "finetune.learning_rate (0.0006 now)")
    assert of_size(size(best=(1.2, 1.1, 1.3), moved=0.04))[0][1].endswith("lower finetune.beta or raise finetune.learning_rate")
    assert "worst of 1.2" in of_size(size(best=(1 / 1.2, 0.7, 1.1), moved=0.04))[0][1]


@pytest.mark.parametrize(("best", "moved", "told"), [
    ((1.49, 1.1, 1.6), 0.099, True), ((1.51, 1.1, 1.6), 0.099, False), ((1.49, 1.1, 1.6), 0.101, False), ((None, 9.0, None), 0.05, False),
    ((1.2, 1.1, 1.3), None, False),
])
def test_to_have_hardly_moved_is_to_have_changed_little_and_gained_little(best, moved, told):
    assert any("hardly moved" in sentence for _, sentence in of_size(size(best=best, moved=moved))) == told


def test_pictures_that_changed_and_got_no_better_are_told():
    (found,) = of_size(size(best=(1.1, 0.8, 1.5), moved=0.4))
    assert found[0] == "warning" and found[1].startswith(
        "pictures changed (visible change 0.40) and are not shown to be better: one of its pictures is as good as "
        "the best of 1.1 [worst of 1.2, best of 1.5] of the base:")
    assert of_size(size(best=(1.1, 1.01, 1.5), moved=0.4)) == []


def test_diversity_paid_for_nothing_is_an_interval_wholly_below_what_choosing_keeps():
    (found,) = of_size(size(diversity=(0.85, 0.8, 0.9)))
    assert found[0] == "warning" and found[1].startswith(
        "diversity was paid for nothing: pictures chosen from the base's are as good (the best of 3.4) and keep more, of which the tuned "
        "model has 0.85 [0.80, 0.90]: raise finetune.beta")
    assert of_size(size(diversity=(0.97, 0.9, 1.0))) == of_size(size(diversity=(None, None, None))) == []
    assert len(of_size(size(diversity=(0.97, 0.9, 0.999)))) == 1


def test_a_win_rate_that_is_mostly_ties_is_told():
    assert of_size(size(ties=0.62)) == [("note", "62 % of the pictures score like the base's within the judge's own noise (0.02): they count "
                                                 "as ties; how much was gained is the best-of-n equivalent, not the win rate")]
    assert of_size(size(ties=0.5)) == of_size(size(ties=None)) == []


def test_a_setting_of_the_sampler_that_gives_the_base_as_much_is_told_the_cheapest_first():
    more = [line("base", 3.0, 10, 20, -0.2, 0.96), line("base", 3.0, 20, 40, -0.1, 0.97)]
    (found,) = of_size(lines=[*LINES, *more])
    assert found == ("warning", "guidance 3 gives the base as much: 96.0 % right against 93.0 %, +3.0 points [1.0, 5.0]; with 20 forwards "
                                "a picture against 10: set sample.guidance: 3, and tune from there: what is left then is what tuning adds")
    both = of_size(lines=[*LINES, *more, line("after", 3.0, 10, 20, -0.05, 0.994)])[0][1]
    assert "against 10; the tuned model has 99.4 % right there: set sample.guidance: 3," in both
    cheaper = [line("base", 1.5, 5, 10, -0.29, 0.951)]
    assert of_size(lines=[*LINES, *more, *cheaper])[0][1].startswith(
        "guidance 1.5, 5 steps gives the base as much: 95.1 % right against 93.0 %, +2.1 points [0.1, 4.1]; with as many forwards: set "
        "sample.guidance: 1.5 and sample.steps: 5, and")


@pytest.mark.parametrize(("right", "said"), [
    (0.951, "guidance 3 gives the base as much: 95.1 % right against 93.0 %, +2.1 points [0.1, 4.1]; with"),
    (0.949, "guidance 3 may give the base as much: 94.9 % right against 93.0 %, and the difference, +1.9 points [-0.1, 3.9], holds 0; with"),
    (0.92, "guidance 3 may give the base as much: 92.0 % right against 93.0 %, and the difference, -1.0 points [-3.0, 1.0], holds 0; with"),
    (0.909, None),
])
def test_a_setting_gives_the_base_as_much_certainly_or_as_far_as_the_pictures_tell_or_not(right, said):
    found = [sentence for _, sentence in of_size(lines=[*LINES, line("base", 3.0, 10, 20, -0.2, right)])]
    assert len(found) == (said is not None) and all(sentence.startswith(said) for sentence in found)
    assert all(("evaluate.grid_pictures" in sentence) == ("may" in sentence) for sentence in found)


def test_what_is_certain_is_told_before_what_is_cheaper_and_of_the_uncertain_the_likeliest():
    maybe = [line("base", 1.5, 5, 10, -0.3, 0.92), line("base", 2.0, 10, 20, -0.3, 0.94), line("base", 2.0, 20, 40, -0.3, 0.94)]
    assert of_size(lines=[*LINES, *maybe, line("base", 3.0, 20, 40, -0.1, 0.97)])[0][1].startswith("guidance 3, 20 steps gives")
    assert of_size(lines=[*LINES, *maybe])[0][1].startswith("guidance 2 may give")


def test_pictures_too_few_to_show_the_gain_itself_say_nothing_of_settings_but_that():
    ((level, sentence),) = of_size(lines=LINES, reach=0.09)
    assert level == "note" and sentence == (
        "640 pictures under each setting of the sampler are too few to tell whether one gives the base as much: they do not tell base and "
        "tuned model apart (-8.5 points [-17.5, 0.5]): raise evaluate.grid_pictures")
    assert of_size(size(best=(0.8, 0.5, 1.4), moved=0.05), lines=LINES, reach=0.09)[0][1].startswith("the policy hardly moved")
    assert of_size(lines=LINES[:2], reach=0.09) == [], "no setting was tried"
    certain = [one | {"right": None} for one in [*LINES, line("base", 3.0, 10, 20, 0.1, None)]]
    assert "guidance 3 gives the base as much" in of_size(lines=certain, reach=0.25)[0][1]


def test_where_the_judge_does_not_classify_a_setting_is_told_by_its_mean():
    lines = [one | {"right": None} for one in [*LINES, line("base", 3.0, 10, 20, -0.2, None)]]
    assert ("guidance 3 gives the base as much: mean -0.2 against -0.3, +0.1 [0.08, 0.12]; with 20 forwards a picture against 10"
            in of_size(lines=lines)[0][1])
    assert ("3 may give the base as much: mean -0.2 against -0.3, and the difference, +0.1 [-0.05, 0.25], holds 0"
            in of_size(lines=lines, reach=0.15)[0][1])


def test_a_setting_below_the_tuned_model_or_of_the_tuned_model_itself_gives_the_base_nothing():
    assert of_size(lines=LINES) == []
    lost = [one | ({"mean": -0.6, "right": 0.8} if one["role"] == "after" else {}) for one in LINES]
    assert of_size(lines=lost) == [], "what did not gain is not had elsewhere"


def test_a_base_that_is_not_at_its_best_for_its_forwards_is_noted():
    ((level, sentence),) = of_size(lines=[*LINES, line("base", 1.5, 5, 10, -0.42, 0.9)])
    assert (level, sentence) == ("note", "the base draws better with guidance 1.5, 5 steps at no more forwards: 90.0 % right against "
                                         "84.5 %, +5.5 points [3.5, 7.5]; with as many forwards: set sample.guidance: 1.5 and sample.steps: 5: "
                                         "part of what tuning gains here is had for nothing")
    assert of_size(lines=[*LINES, line("base", 1.5, 5, 10, -0.42, 0.86)]) == [], "by chance"
    scored = [one | {"right": None} for one in [*LINES, line("base", 1.5, 5, 10, -0.49, None)]]
    assert of_size(lines=scored, reach=0.001) == [], "within the judge's own noise"
    assert len(of_size(lines=[*scored[:-1], scored[-1] | {"mean": -0.47}], reach=0.001)) == 1


def test_of_fewer_than_five_prompts_nothing_is_said_of_size():
    wrong = size(best=(0.4, 0.3, 0.5), diversity=(0.5, 0.4, 0.6), moved=0.01, ties=0.9)
    assert of_size(wrong, prompts=4) == []
    assert diagnosis.of_round(1, numbers(best_of=(0.4, 0.0, None))) == []


def test_a_round_below_the_base_is_an_alarm_and_not_kept():
    found = numbers(best_of=(0.5, 0.4, 0.8))
    (alarm,) = of_rounds({2: found})
    assert alarm.level == "alarm"
    assert alarm.what == "round 2 is below the base: one of its pictures is only as good as the worst of 2.0 [1.2, 2.5] of the base"
    assert best_round({2: found}, "judge") == 0
    (beyond,) = of_rounds({2: numbers(best_of=(0.0, 0.0, 0.1))})
    assert "one of its pictures is worse than the worst of 16 [10.0, more] of the base" in beyond.what
    assert of_rounds({2: numbers(best_of=(0.8, 0.6, 1.0))}) == [] == of_rounds({2: numbers(best_of=NO_MIX)})


def test_a_reward_whose_own_choice_the_judge_likes_less_is_told():
    wrong = size(best=(None, None, None), diversity=(None, None, None)) | {"curve": [{"n": 1, "mean": -0.5}, {"n": 16, "mean": -0.7}]}
    ((level, sentence),) = of_size(wrong)
    assert level == "warning" and sentence.startswith(
        "judge finds the pictures of the base that the reward likes best no better than any (mean -0.7 against -0.5), so that there is no "
        "best-of-n equivalent: what is rewarded is not what it sees")
    assert of_size(size() | {"curve": [{"n": 1, "mean": -0.5}]}) == []


def test_no_finding_of_size_appears_with_another():
    """Each of these is one thing that went wrong, and one sentence."""
    wrong = [size(best=(1.2, 1.1, 1.3), moved=0.04), size(best=(1.1, 0.8, 1.5)), size(diversity=(0.85, 0.8, 0.9)), size(ties=0.62)]
    assert [len(of_size(one, LINES)) for one in wrong] == [1, 1, 1, 1]
