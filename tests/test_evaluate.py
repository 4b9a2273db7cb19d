"""What `evaluate` writes: sizes of a gain by its own tables, the judge's noise, right pictures, the sampler's settings; and who says it."""

import json

import numpy as np
import pytest
from test_diagnosis import with_differences
from whole_runs import folder_of, manifests, refused, session, works

from fashiondpo_pipeline import codecs, effect_size, statistics
from fashiondpo_pipeline.effect_size import base_by_setting
from stages import disturb
from stages.plan import estimate

DARK = ["--set", "experts.dark={use: 'whole_runs:Dark', options: {middle: 0.47}}", "--set", "evaluate.judge=dark"]
GRID = ["--set", "evaluate.grid=[{guidance: 2.0}, {steps: 2}, {steps: 2, guidance: 1.0}]", "--set", "evaluate.grid_pictures=1"]


def sets(words):
    return [word for word in words if word != "--set"]


def outputs(run, number=1):
    chain = run.chain(number)
    return chain.rounds[0], chain.rounds[number], run.output(chain.rounds[number].evaluate).manifest["numbers"]


def scores_of(run, step):
    table = run.output(step).table("scores").sort_by([("group", "ascending"), ("candidate", "ascending")])
    return table["score"].to_numpy().reshape(len(set(table["group"].to_pylist())), -1)


def pictures_of(run, step):
    table = run.output(step).table("candidates").sort_by([("group", "ascending"), ("candidate", "ascending")])
    return [np.asarray(codecs.decode_picture(row["picture"]["bytes"], "here")) for row in table.to_pylist()]


# -- sizes


def test_sizes_are_those_of_the_tables(finished):
    run = session()
    base, first, numbers = outputs(run)
    size, k = numbers["size"], run.config.evaluate.pictures
    before, after, mix = (scores_of(run, step) for step in (base.held_out_scores["bright"], first.held_out_scores["bright"],
                                                            base.held_out_scores["clip_t"]))
    best = np.take_along_axis(before, mix.argmax(1)[:, None], 1)[:, 0]  # of two pictures
    curve = np.array([2 * before.mean() - best.mean(), before.mean(), best.mean()])
    assert size["best_of"]["value"] == pytest.approx(effect_size.n_of(effect_size.place_of(np.array([after.mean()]), curve[None])[0]))
    assert size["best_of"]["most"] == k == 2
    assert size["shift"]["value"] == pytest.approx((after.mean() - before.mean()) / before.std())
    assert size["shift"]["low"] < size["shift"]["value"] < size["shift"]["high"]
    was, now = pictures_of(run, base.held_out), pictures_of(run, first.held_out)
    moved = np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(was, now, strict=True)])
    seeds = np.mean([np.abs(was[i].astype(float) - was[i + 1]).mean() for i in range(0, len(was), 2)])
    assert size["visible_change"]["value"] == pytest.approx(moved / seeds, rel=1e-4)
    diversity = numbers["diversity"]
    assert size["diversity_at_equal_quality"]["value"] == pytest.approx(
        diversity["after"] / diversity["base"], rel=1e-4), "two pictures, one distance"
    assert size["right"] is None, "a brightness is no class"


def test_noise_is_the_judges_about_pictures_that_nobody_can_tell_apart_and_ties_lie_within_it(finished):
    run = session()
    base, first, numbers = outputs(run)
    pairs = list(zip(pictures_of(run, base.held_out), pictures_of(run, base.disturbed.sample), strict=True))
    assert all(np.abs(a.astype(int) - b).max() == 1 for a, b in pairs)
    scores, disturbed, after = (scores_of(run, step) for step in (base.held_out_scores["bright"], base.disturbed.scores["bright"],
                                                                  first.held_out_scores["bright"]))
    noise = np.quantile(np.abs(scores - disturbed), 0.95)
    assert numbers["size"]["noise"] == pytest.approx(noise) and 0 < noise < 1 / 255
    assert numbers["size"]["ties"] == numbers["against_base"]["ties"] == np.mean(np.abs(after - scores) <= noise)
    assert numbers["against_base"] == numbers["experts"]["bright"]["against_base"]
    assert numbers["against_base"]["win_rate"] == statistics.wins(after, scores, noise).mean()


def test_a_disturbed_picture_is_the_same_in_every_run_and_another_with_another_key():
    png = codecs.encode_png(np.full((8, 8, 3), (0, 128, 255), np.uint8))
    row = {"group": "g", "candidate": 0, "picture": {"bytes": png}}
    pixels = [np.asarray(codecs.decode_picture(disturb.disturbed(one, seed), "here"), int) for one, seed in
              ((row, 7), (row, 7), (row, 8), (row | {"candidate": 1}, 7))]
    assert (pixels[0] == pixels[1]).all() and all((pixels[0] != other).any() for other in pixels[2:])
    assert set(pixels[0][..., 0].flat) == {0, 1} and set(pixels[0][..., 1].flat) == {127, 129} and set(pixels[0][..., 2].flat) == {254, 255}
    assert disturb.disturbed(row | {"picture": {"bytes": b"no picture"}}, 7) == b"no picture"


def test_few_pictures_are_disturbed_where_there_are_many(place):
    (place / "prompts.txt").write_text("\n".join(f"hat {n}" for n in range(120)))
    run = session("evaluate.pictures=16", "prompts.held_out=0.5")
    step = run.chain(1).rounds[0].disturbed.sample
    prompts = len(run.prompts["held-out"])
    assert 128 <= step.config["candidates"] * prompts < 128 + prompts


# -- right


def test_right_is_the_judges_own_first_choice_and_a_silent_judge_is_not_counted(place):
    silent = sorted(row["group"] for row in session().prompts["held-out"].rows)[0]
    words = ["--set", f"experts.dark={{use: 'whole_runs:Dark', options: {{middle: 0.47, silent: {silent}}}}}", *DARK[2:]]
    told = works("round", "--n", "1", *words)
    run = session(*sets(words))
    base, first, numbers = outputs(run)
    before, after = (scores_of(run, step) > 0.47 for step in (base.held_out_scores["dark"], first.held_out_scores["dark"]))
    before, after = before[1:], after[1:]  # without the silent group, which sorts first
    right = numbers["size"]["right"]
    assert right["pictures"] == before.size == 2 * (len(run.prompts["held-out"]) - 1)
    assert (right["mended"], right["broken"]) == ((~before & after).sum(), (before & ~after).sum())
    assert (right["base"]["value"], right["after"]["value"]) == (pytest.approx(before.mean()), pytest.approx(after.mean()))
    assert right["change"]["value"] == pytest.approx(after.mean() - before.mean())
    assert f"right {100 * before.mean():.1f} -> {100 * after.mean():.1f} % ({right['mended']} mended" in told.err
    assert "right" in told.out
    table = run.output(first.scores["dark"]).table("scores")
    assert table["right"].to_pylist() == [score > 0.47 for score in table["score"].to_pylist()], "of candidates too"


# -- the sampler's settings


def test_settings_are_drawn_once_for_the_base_and_once_a_round_and_planned(place):
    planned = estimate(run := session(*sets(GRID)), run.chain(2))
    names = [f"{line.step.round} {line.step.name}" for line in planned.lines]
    for label in ("guidance-2", "steps-2"):
        wanted = [f"{n} held-out-{stage}{label}" for n in (0, 1, 2) for stage in ("sample-", "embed-clip-", "score-clip_t-", "score-bright-")]
        assert set(wanted) <= set(names)
    assert not [name for name in names if "guidance-1" in name], "{steps: 2, guidance: 1.0} is {steps: 2} once more"
    prompts = len(run.prompts["held-out"])
    forwards = {line.step.name: (line.rows, line.forwards) for line in planned.lines if line.step.round == 1}
    assert forwards["held-out-sample-guidance-2"] == (prompts, prompts * 4 * 2)
    assert forwards["held-out-sample-steps-2"] == (prompts, prompts * 2)
    works("round", "--n", "2", *GRID)
    numbers = outputs(run, 2)[2]
    lines = [(line["role"], line["guidance"], line["steps"], line["forwards"], line["pictures"]) for line in numbers["sampler"]]
    assert lines == [(role, *line) for role in ("base", "after") for line in
                     ((1.0, 4, 4, prompts), (2.0, 4, 8, prompts), (1.0, 2, 2, prompts))]
    assert [line["usual"] for line in numbers["sampler"]] == [True, False, False] * 2
    base = run.chain(2).rounds[0]
    for line, aside in zip(numbers["sampler"][1:3], base.settings, strict=True):
        assert line["mean"] == pytest.approx(scores_of(run, aside.scores["bright"]).mean())
    assert numbers["base_by_setting"] == base_by_setting(numbers["sampler"])
    assert len([name for name in manifests(place / "runs/t") if name.startswith("round-00/held-out-sample")]) == 4
    held_out, scores = numbers["sampler"][0], scores_of(run, base.held_out_scores["bright"])
    assert scores.shape == (prompts, 2) and held_out["mean"] == pytest.approx(scores[:, :1].mean()), "the same seeds as the others' pictures"
    assert held_out["diversity"] == numbers["diversity"]["base"]
    tuned = scores_of(run, run.chain(2).rounds[2].held_out_scores["bright"])[:, :1]
    usual, over = scores[:, :1], numbers["sampler"][1]
    drawn = scores_of(run, base.settings[0].scores["bright"])
    for name, other in (("over_base", usual), ("over_tuned", tuned)):
        assert over[name]["mean"]["value"] == pytest.approx((drawn - other).mean()) and over[name]["right"] is None
        assert over[name]["mean"]["low"] < over[name]["mean"]["value"] < over[name]["mean"]["high"], "by prompt"
    assert numbers["sampler"][0]["over_base"] is None is numbers["sampler"][3]["over_tuned"]
    assert numbers["sampler"][0]["over_tuned"]["mean"]["value"] == pytest.approx((usual - tuned).mean())


def test_only_the_embedded_defaults_generator_has_settings_of_its_own(place):
    assert not session().chain(1).rounds[1].settings
    assert refused("plan", "--set", "evaluate.grid=[{}]").endswith("evaluate.grid.0: says nothing; write {guidance: 1.5}, {steps: 20} or both")


def line(role, mean, forwards=10, usual=False, **knobs):
    return {"role": role, "usual": usual, "guidance": 1.0, "steps": 10, "eta": 1.0, "guidance_rescale": 0.0, "forwards": forwards, "mean": mean,
            "right": None} | knobs


def test_a_gain_that_a_setting_gives_the_base_is_said_to_be_one():
    lines = with_differences([line("base", -0.5, usual=True), line("base", -0.3, 20, guidance=3.0), line("base", -0.35, steps=5, guidance=1.5),
                              line("after", -0.4, usual=True), line("after", -0.1, 20, guidance=3.0)])
    assert base_by_setting(lines) == {"equal": lines[2], "any": lines[1], "reaches": lines[2]}
    better = with_differences([*lines[:3], line("after", -0.2, usual=True)])
    assert base_by_setting(better)["reaches"] is None
    worse = with_differences([*lines[:3], line("after", -0.6, usual=True)])
    assert base_by_setting(worse)["reaches"] is None, "there is no gain that a setting could give"
    assert base_by_setting(with_differences(lines[:1])) == {"equal": None, "any": None, "reaches": None}


def test_settings_are_compared_prompt_by_prompt_from_the_same_seeds():
    rng = np.random.default_rng(0)
    prompt = rng.normal(0, 5, (40, 1))  # prompts differ far more than settings do
    one, other = ({"mean": prompt + rng.normal(shift, 0.1, (40, 4)), "right": None} for shift in (0.1, 0.0))
    found = effect_size.compared(one, other, 0, 400, 0.95)
    assert effect_size.above(found) and found["right"] is None and found["mean"]["high"] - found["mean"]["low"] < 0.1
    assert effect_size.below(effect_size.compared(other, one, 0, 400, 0.95))


def test_shares_right_decide_where_they_are_known_and_a_missing_picture_does_not_count():
    right = np.array([[1.0, 1.0, np.nan]] * 30 + [[1.0, 0.0, 1.0]] * 10)
    one, other = {"mean": np.zeros((40, 3)), "right": right}, {"mean": np.ones((40, 3)), "right": np.zeros((40, 3))}
    found = effect_size.compared(one, other, 0, 400, 0.95)
    assert found["right"]["value"] == pytest.approx((30 + 10 * 2 / 3) / 40) and found["mean"]["value"] == -1
    assert effect_size.deciding(found) is found["right"] and effect_size.above(found)
    unknown = effect_size.compared(one | {"right": np.full((40, 3), np.nan)}, other, 0, 400, 0.95)
    assert effect_size.deciding(unknown) is unknown["mean"] and effect_size.below(unknown)


def test_of_four_prompts_no_setting_is_told_apart():
    few = [{"mean": np.full((4, 2), mean), "right": None} for mean in (0.0, 9.0)]
    found = effect_size.compared(*few, 0, 400, 0.95)
    assert not effect_size.above(found) and not effect_size.below(found) and found["mean"]["value"] == -9


# -- controls: what the measures say where one knows


def test_a_round_that_changed_nothing_gained_nothing(place):
    works("round", "--n", "1", "--set", "finetune.learning_rate=1e-12")
    size = outputs(session("finetune.learning_rate=1e-12"))[2]["size"]
    assert size["visible_change"]["value"] < 0.01 and size["ties"] == 1
    assert size["best_of"]["value"] == pytest.approx(1, abs=0.1) and size["diversity_at_equal_quality"]["value"] == pytest.approx(1, abs=0.05)


# -- who says it


@pytest.mark.parametrize("command", [["status"], ["inspect", "scores", "--held-out", "--round", "1"], ["round"]])
def test_how_much_was_gained_is_said_before_the_win_rate(finished, command):
    told = works(*command)
    said = told.err + told.out
    words = effect_size.as_good_as(outputs(session())[2]["size"]["best_of"])
    if command != ["round"]:
        assert f"round 1: one picture is {words} of the base" in said
        assert said.index("one picture is") < said.index("bright prefers it to the base in")
    else:
        head = next(text for text in told.out.splitlines() if "win rate" in text)
        assert head.index("as best of") < head.index("visible change") < head.index("win rate")


def test_evaluate_alone_says_it_too(place):
    for stage in ("sample", "score", "pair", "finetune"):
        works(stage, "--round", "1")
    told = works("evaluate", "--round", "1")
    assert "round 1: one picture is " in told.err and " of the base · mean " in told.err


def test_numbers_are_plain_json(finished):
    folder = folder_of(finished / "runs/t", 1, "evaluate")
    text = (folder / "manifest.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    size = json.loads(text)["numbers"]["size"]
    assert size.keys() == {"best_of", "diversity_at_equal_quality", "right", "shift", "visible_change", "curve", "noise", "ties"}
    assert all(set(size[name]) >= {"value", "low", "high"} for name in ("best_of", "diversity_at_equal_quality", "shift", "visible_change"))
