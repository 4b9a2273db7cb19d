"""The report: one page that is safe to open, says what the tables say, and warns where something looks off."""

import base64
import html
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_diagnosis import with_differences

from fashiondpo_pipeline import charts, codecs, config, effect_size, outcomes, report, schemas, seeds, statistics
from fashiondpo_pipeline.report import Missing, Record
from fashiondpo_pipeline.workspace import Step, write_sealed
from stages import Session
from stages.evaluate import decoded
from stages.report import _made, _pictures, read, write

EVIL = "<script>alert(1)</script> & a hat"
TOWER = {"use": "clip_text", "options": {"model": "ViT-B-32", "pretrained": "nowhere"}}
BRIGHT = {"use": "fashiondpo_pipeline.testing:Brightness"}


# -- a finished run, its pictures, scores and curves made by hand: no model


def finished(root: Path, seconds: float = 1.0, rounds: int = 2, judge: str | None = "judge", tower: bool = True) -> Session:
    """A session whose run is done; the tuned pictures are somewhat brighter and score somewhat higher each round."""
    root.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": EVIL, "split": "train"}, {"prompt": EVIL + "s", "split": "held-out"}]
    prompts += [{"prompt": f"a dress, number {i}", "split": "train" if i % 2 else "held-out"} for i in range(6)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (root / "model").mkdir(exist_ok=True)
    (root / "model" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    values = {
        "rounds": rounds, "generator": {"model": str(root / "model")}, "prompts": {"file": str(root / "prompts.jsonl")},
        "experts": {"clip": TOWER if tower else BRIGHT, "taste": BRIGHT, "judge": BRIGHT},
        "pair": {"weights": {"clip": 0.7, "taste": 0.3}, "margin": 0.1},
        "sample": {"candidates": 4}, "evaluate": {"judge": judge, "pictures": 3, "bootstrap": 200},
        "report": {"prompts": 3, "pictures": 2, "pairs": 4},
    }
    session = Session(config.validate(values, "the test"), root=root / "run", say=lambda text: None)
    for step in session.chain(rounds).steps:
        out = session.run.output(step)
        out.open()
        MAKERS.get(step.stage, import_module(f"stages.{step.stage}").run)(session, step, out)
        write_sealed(out.folder / "manifest.json", out.manifest | {"seconds": seconds})
    return session


def places(session: Session, sample: Step) -> list[tuple[dict, int, float]]:
    """(prompt, candidate, quality) of everything that a sample step draws."""
    rows = session.prompts[sample.args["split"]].rows
    keys = [(row, i) for row in rows for i in range(sample.config["candidates"])]
    drawn = sample.inputs["sample"] if sample.stage == "disturb" else sample
    luck = [np.random.default_rng(seeds.key(drawn.config["stream"], row["group"], i)).normal(size=2) for row, i in keys]
    return [(row, i, a + sample.round * (0.4 + 0.3 * b)) for (row, i), (a, b) in zip(keys, luck, strict=True)]


def make_encode(session, step, out):
    out.finish()


def make_sample(session, step, out):
    def picture(quality):
        light = np.clip(120 + 20 * quality, 0, 255)
        return codecs.encode_png(np.full((6, 5, 3), light, np.uint8) + np.arange(5, dtype=np.uint8)[:, None])

    rows = [{"group": row["group"], "candidate": i, "prompt": row["prompt"], "round": step.round, "seed": 1, "guidance": 1.0,
             "picture": {"bytes": picture(quality), "path": "x.png"}, "fault": None}
            for row, i, quality in places(session, step)]
    out.write(0, candidates=pa.Table.from_pylist(rows, schemas.CANDIDATES))
    out.finish({"faults": 0})


def make_embed(session, step, out):
    rows = [{"group": row["group"], "candidate": i, "embedding": [np.cos(i), np.sin(i)]}
            for row, i, _ in places(session, step.inputs["sample"])]
    out.write(0, embeddings=pa.Table.from_pylist(rows, schemas.EMBEDDINGS))
    out.finish()


def make_score(session, step, out):
    name = step.args["expert"]
    rows = [{"group": row["group"], "candidate": i, "reason": None,
             "score": 0.3 + 0.01 * quality + 0.002 * np.random.default_rng(seeds.key(name, row["group"], i)).normal()}
            for row, i, quality in places(session, step.inputs["sample"])]
    out.write(0, scores=pa.Table.from_pylist(rows, schemas.SCORES))
    out.finish({"scored": len(rows), "missing": 0})


def make_finetune(session, step, out):
    rows = [{"step": i, "epoch": 0, "loss": 0.69 - 0.01 * i, "margin": 0.1 * i, "accuracy": 0.5 + 0.02 * i, "winner": 0.001 * i,
             "loser": -0.001 * i, "grad_norm": 1.0, "learning_rate": 1e-3, "pairs": 9, "rows": 9} for i in range(12)]
    out.write(0, steps=pa.Table.from_pylist(rows, schemas.STEPS))
    out.finish({"objective": "step_dpo", "signals": ["log_prob"], "heeds": ["beta", "slack"], "trainable": 1234, "steps": 12})


MAKERS = {"encode": make_encode, "sample": make_sample, "embed": make_embed, "score": make_score, "finetune": make_finetune}


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    return finished(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(session) -> str:
    return write(session, session.chain(2)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def record(session) -> Record:
    return read(session, session.chain(2))


def changed(record: Record, **numbers) -> Record:
    """The record with other figures in its last round's evaluation."""
    last = record.rounds[-1]
    return replace(record, rounds=[*record.rounds[:-1], replace(last, numbers=last.numbers | numbers)])


# -- the page


def test_prompts_are_escaped(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; a hat" in page


def test_page_needs_nothing_from_elsewhere(page):
    assert set(re.findall(r'src="([^:"]*):', page)) == {"data"}
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert not re.search(r"https?://|<link|@import|<iframe", page)


def test_page_says_what_the_tables_say(page, record):
    numbers = record.last.numbers
    assert report.percent(numbers["against_base"]) in page
    assert f"{numbers['pictures']} held-out pictures" in page
    assert "Rewarded: clip (70\u00a0%) and taste (30\u00a0%). Only watched: judge." in page
    for done in record.rounds:
        for name in record.experts:
            assert report.fixed(done.numbers["experts"][name]["after"], record.decimals[name] + 1) in page


def test_page_is_made_for_phones_and_for_the_dark(page):
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page
    assert "image-rendering: pixelated" in page


def test_equal_results_give_the_same_bytes_of_numbers_however_long_they_took(tmp_path, session, page):
    other = finished(tmp_path, seconds=99.0)
    write(other, other.chain(2))
    assert (other.run.root / "numbers.json").read_bytes() == (session.run.root / "numbers.json").read_bytes()


def test_written_again_it_is_the_same_page_and_leaves_nothing_beside_it(session, page):
    assert write(session, session.chain(2)).read_text(encoding="utf-8") == page
    assert not list(session.run.root.glob("*.tmp"))


def test_one_round_without_a_tower_and_without_a_judge_is_reported_too(tmp_path):
    session = finished(tmp_path, rounds=1, judge=None, tower=False)
    page = write(session, session.chain(1)).read_text(encoding="utf-8")
    assert "not measured" in page
    assert "The mix of the rewarded experts is itself what was rewarded" in page
    assert json.loads((session.run.root / "numbers.json").read_text())["round 1"]["diversity"]["after"] is None


def test_report_loads_no_torch(tmp_path):
    session = finished(tmp_path, rounds=1, tower=False)
    values = tmp_path / "pipeline.yaml"
    values.write_text(config.template(session.config))
    program = f"""
import sys
from pathlib import Path
from fashiondpo_pipeline.config import load
from stages import Session, report
session = Session(load(Path({str(values)!r})), root=Path({str(session.run.root)!r}))
report.write(session, session.chain(1))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout == "False\n", done.stderr


# -- what is shown


@given(st.integers(1, 50), st.integers(1, 12))
def test_spaced_numbers_are_few_ascending_and_end_at_both_ends(count, most):
    found = report.spaced(count, most)
    assert len(found) == min(count, most) == len(set(found))
    assert found == sorted(found)
    assert found[-1] == count - 1
    assert most == 1 or found[0] == 0


def test_shown_prompts_reach_from_the_greatest_gain_to_the_least(record):
    rows = report.chosen_prompts(record)
    gains = record.judged_gains[rows]
    assert len(rows) == 3
    assert (np.diff(gains) <= 0).all()
    assert (gains[0], gains[-1]) == (record.judged_gains.max(), record.judged_gains.min())


def test_a_prompt_that_the_judge_did_not_score_is_not_shown(record):
    gains = record.judged_gains.copy()
    gains[0] = np.nan
    odd = replace(record)
    odd.__dict__["judged_gains"] = gains
    assert 0 not in report.ranked_prompts(odd)
    assert len(report.ranked_prompts(odd)) == len(gains) - 1


def test_widest_pairs_are_wider_than_the_narrowest_and_of_different_prompts(record):
    widest, narrowest = report.chosen_pairs(record.last, 4)
    margin, groups = record.last.pairs["margin"].to_pylist(), record.last.pairs["group"].to_pylist()
    assert len(widest) == len(narrowest) == 2
    assert margin[widest[0]] == max(margin) and margin[narrowest[0]] == min(margin)
    assert len({groups[row] for row in widest}) == 2
    assert not set(widest) & set(narrowest)


def test_gaps_of_rewarded_experts_are_those_of_the_pair_table(session, record):
    table = session.output(session.chain(2).rounds[2].pair).table("pairs")
    for name in ("clip", "taste"):
        assert np.allclose(record.last.gaps[name], table[f"gap_{name}"].to_numpy(), atol=1e-5)


def test_without_a_judge_the_mix_is_on_one_scale_for_all_rounds(record):
    mixed = changed(record, judge="mix").opinions
    everything = np.concatenate([scores.ravel() for scores in mixed])
    assert len(mixed) == 3
    assert abs(everything.mean()) < 1e-9
    assert mixed[2].mean() > mixed[0].mean()


def test_small_pictures_keep_their_pixels_and_large_ones_shrink():
    def shown(size):
        return report.thumbnail(codecs.encode_png(np.zeros((size, 2 * size, 3), np.uint8)), "here")

    assert (shown(32).pixelated, shown(32).width, shown(32).height) == (True, 64, 32)
    assert (shown(400).pixelated, shown(400).width, shown(400).height) == (False, 256, 128)


def test_an_unreadable_picture_has_a_note_in_its_place(session, record):
    assert report.thumbnail(b"no picture", "here") is None
    rows = report.chosen_prompts(record)[:1]
    name = record.base.groups[rows[0]].as_py()
    look = report.before_and_after(record, rows, {name: "x"}, {0: {(name, i): None for i in range(2)}})
    assert [cell["picture"] for cell in look[0]["draws"][0]["cells"]] == [None, None]


def test_a_picture_in_the_page_can_be_read_back(page):
    data = re.search(r'src="data:image/png;base64,([^"]*)"', page)[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (5, 6)


# -- what looks off


def rate(win_rate, low, high):
    return {"win_rate": win_rate, "low": low, "high": high}


def experts(record, **rates):
    return {name: record.last.numbers["experts"][name] | {"against_base": rate(*found)} for name, found in rates.items()}


UP, DOWN, OPEN = (0.7, 0.6, 0.8), (0.3, 0.2, 0.4), (0.52, 0.45, 0.6)


def test_nothing_looks_off_where_nothing_does(record):
    fine = changed(record, prompts=40, against_base=rate(*UP), meters={}, size=size())
    assert report.warnings(fine) == []
    assert report.headline(fine)[0] == "good"


def test_where_there_is_nothing_to_choose_by_the_win_rate_is_told_and_said_to_be_no_size(session, record):
    blind = changed(record, prompts=40, against_base=rate(*UP), meters={}, size=size((None, None, None)))
    assert report.headline(blind) == ("good", "Preferred to the base")
    assert "it does not say by how much" in rendered(session, blind)


def test_a_round_is_said_to_have_lost_to_the_one_it_went_on_from(record):
    """Two rounds that went on from the base lost to it, which other sentences say; a third went on from the first."""
    first, second = (replace(r, before=0, numbers=r.numbers | {"against_previous": rate(*DOWN)}) for r in record.rounds)
    third = replace(second, number=3, before=1)
    assert report._step_back(replace(record, rounds=[first, second, third])) == [
        f"Round 3 lost to round 1: {report.percent(rate(*DOWN))}. Round 1 may be the one to keep."]


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"against_base": rate(*OPEN)}, "the judge, which only watched, cannot tell it from the base (52.0 % [45.0, 60.0])"),
        ({"against_previous": rate(*DOWN)}, "Round 2 lost to round 1: 30.0 % [20.0, 40.0]. Round 1 may be the one to keep."),
        ({"judge_rewarded": True}, "The judge is itself what was rewarded"),
        ({"prompts": 6}, "Only 6 held-out prompts: an interval over so few is wide, and says little"),
    ],
)
def test_what_looks_off_is_said_in_plain_words(record, numbers, sentence):
    fine = {"prompts": 40, "size": size(), "against_base": rate(*UP), "meters": {}, "experts": experts(record, clip=UP, taste=OPEN, judge=OPEN)}
    (warning,) = report.warnings(changed(record, **(fine | numbers)))
    assert sentence in warning.replace("\u00a0", " ")


def test_lost_diversity_is_told_by_itself_only_where_choosing_cannot_be_held_against_it(session, record):
    """Whoever chooses pictures as good from the base's loses some too: that is what it is judged by where it is known."""
    lost, known, unknown = {"base": 0.5, "before": 0.5, "after": 0.4, "spread": 0.3}, size(right=False), size((None, None, None))
    unknown["diversity_at_equal_quality"] = span(None)
    few = known | {"diversity_at_equal_quality": span(1.04)}  # of so few prompts that it has no interval
    for found, told in ((known, False), (unknown, True), (few, True)):
        odd = changed(fine(record), diversity=lost, size=found)
        assert any("Diversity within a prompt fell to 0.80 of the base's" in text for text in report.warnings(odd)) == told
    page = plain(rendered(session, calm(changed(fine(record), diversity=lost, size=known))))
    assert "diversity is not shown to be below that of the base's pictures chosen to be as good, " in page
    kept = lost | {"after": 0.46}
    assert "diversity is at least 0.9 of the base's, " in plain(rendered(session, calm(changed(fine(record), diversity=kept, size=unknown))))
    worse = changed(fine(record), size=size() | {"diversity_at_equal_quality": span(0.8, 0.7, 0.9)})
    assert any(text.startswith("Diversity was paid for nothing") for text in report.warnings(worse))


def test_a_note_on_sizes_stands_with_them_and_looks_like_nothing_off(session, record):
    odd = calm(changed(fine(record), size=size(right=False, ties=0.62)))
    assert report.warnings(odd) == []
    page = plain(rendered(session, odd))
    assert "Nothing looks off" in page
    told = page.partition("<h3>How much was gained</h3>")[2].partition("<h3>")[0]
    assert '<p class="note">62 % of the pictures score like the base\'s within the judge\'s own noise' in told


def fine(record: Record, **last) -> Record:
    """A record in which nothing looks off but what `last` changes in its last round."""
    found = changed(record, prompts=40, against_base=rate(*UP), meters={}, size=size())
    return replace(found, rounds=[*found.rounds[:-1], replace(found.last, **last)])


def test_what_finetuning_warns_of_is_told_of_the_last_round_and_named_of_others(record):
    falls = {"winner": pa.array(np.full(12, -0.03)), "loser": pa.array(np.full(12, 0.01))}
    steps = record.last.steps
    for name, values in falls.items():
        steps = steps.set_column(steps.column_names.index(name), name, values)
    wrong = fine(record, steps=steps)
    first = replace(wrong.rounds[0], steps=steps)
    others, = report.warnings(replace(wrong, rounds=[first, fine(record).last]))
    assert others == "Finetuning of round 1 gave warnings too; see Finetuning below."
    (warning,) = report.warnings(wrong)
    assert warning.startswith("Finetuning of round 2: winners themselves become less likely than under the reference, by 0.03: raise")


def test_many_missing_scores_are_warned_of_and_few_are_not(record):
    many, few = (Missing("taste", "candidates of round 1", count, 100, "<too dark>") for count in (3, 2))
    assert report.warnings(replace(fine(record), missing=[many, few])) == [
        "taste gave no score for 3 of 100 candidates of round 1; mostly: <too dark>."
    ]


def test_prompts_without_pairs_are_warned_of(record):
    (warning,) = report.warnings(fine(record, pair_numbers={"rejected": 3, "groups": 4, "pairs": 1}))
    assert warning == ("Round 2: 3 of 4 prompts gave no pair: their pictures lie within the margin. "
                       "Where most are good already that is as it should be; else lower pair.margin or pair.agree.")


def test_control_labels_are_warned_of_and_a_watched_expert_that_dislikes_the_pairs(record):
    swapped = record.last.pairs.rename_columns(
        ["group", "loser", "winner", "loser_score", "winner_score", "margin"]
    )
    control, dislikes = report.warnings(fine(record, pairs=swapped, rule=replace(record.last.rule, labels="swapped")))
    assert control.startswith("This is a control experiment: the pairs' labels are swapped")
    assert dislikes.startswith("judge, which only watched, would have ordered most of round 2's pairs the other way round")


# -- alarms


def gamed(record: Record, number: int = 2, **numbers) -> Record:
    """A record whose round `number` pleases its reward alone."""
    index = number - 1
    odd = record.rounds[index].numbers | {"experts": experts(record, clip=UP, taste=OPEN, judge=DOWN), "against_base": rate(*DOWN)} | numbers
    return replace(record, rounds=[*record.rounds[:index], replace(record.rounds[index], numbers=odd), *record.rounds[index + 1 :]])


def calm(record: Record) -> Record:
    """A record in which no round raises an alarm."""
    return replace(record, rounds=[replace(r, numbers=r.numbers | {"meters": {}}) for r in record.rounds])


def rendered(session: Session, record: Record) -> str:
    chain = session.chain(len(record.rounds))
    return report.render(record=record, report=report, made=_made(session, chain), **_pictures(session, chain, record))


def test_a_round_that_games_its_reward_is_an_alarm_and_no_second_caution(record):
    odd = gamed(calm(record))
    ((number, (alarm,)),) = report.alarms(odd).items()
    assert number == 2
    start = "Round 2: what is rewarded rose over the base (clip 70.0 % [60.0, 80.0]) while what only watches fell (judge"
    assert alarm.replace("\u00a0", " ").startswith(start)
    assert not any("prefers the base" in sentence for sentence in report.warnings(odd))
    assert report.alarms(calm(record)) == {}


def test_a_loss_that_is_not_a_number_is_an_alarm_of_its_round(record):
    steps = record.rounds[0].steps
    lost = steps.set_column(steps.column_names.index("loss"), "loss", pa.array(np.full(12, np.nan)))
    odd = replace(calm(record), rounds=[replace(calm(record).rounds[0], steps=lost), calm(record).last])
    assert report.alarms(odd)[1][0].startswith("Round 1: the loss is not a number from optimiser step 0 on (12 of 12 steps): lower")


def test_alarms_stand_on_top_of_the_page_in_words_and_not_in_colour_alone(session, record):
    page = rendered(session, gamed(gamed(calm(record)), 1))
    top = page[: page.index("<nav>")]
    assert top.index("<h2>Alarms</h2>") < top.index("<h2>What looks off</h2>")
    assert top.count('<span class="level alarm"><span aria-hidden="true">✖</span> alarm</span>') == 2
    assert "<summary>Round 1: 1 alarm</summary>" in top
    assert "<h2>Alarms</h2>" not in rendered(session, calm(record))


def test_an_alarm_of_an_earlier_round_says_that_the_last_raised_none(session, record):
    assert "Round 2 raised none; earlier rounds did." in rendered(session, gamed(calm(record), 1))


def test_page_says_which_round_to_keep(session, record):
    def plain(record):
        return rendered(session, record).replace("\u00a0", " ")

    better = changed(calm(record), experts=experts(record, clip=UP, taste=UP, judge=OPEN), size=size(right=False))
    assert "Round 2 is the one to keep: by judge one picture of it is as good as the best of 3.4 [2.9, 4.1] of the base." in plain(better)
    first = better.rounds[0]
    won = replace(first, numbers=first.numbers | {"size": size((1.5, 1.2, 1.9), right=False)})
    assert "Round 1 is the one to keep" in plain(gamed(replace(better, rounds=[won, *better.rounds[1:]])))
    assert "The base is the one to keep" in plain(gamed(better)), "of so few prompts round 1's own interval is too wide to beat it"


def test_page_says_over_how_many_pictures_a_mean_is(session, record):
    text = rendered(session, record)
    shown, every = record.config.report.pictures, record.base.k
    told = f"all {every} pictures of the prompt, of which {shown} are shown" if shown < every else "the pictures shown"
    assert f"its mean over {told}" in text
    few = replace(record, config=record.config.model_copy(update={"report": record.config.report.model_copy(update={"pictures": 1})}))
    assert f"its mean over all {every} pictures of the prompt, of which 1 are shown" in rendered(session, few)


def test_the_default_judge_is_said_to_be_a_logarithm_and_the_mix_a_mean(record):
    named = {"judge": config.Config().experts["judge"]}
    default = replace(record, config=record.config.model_copy(update={"experts": named}))
    assert report.judges_number(changed(default, judge="judge")).startswith("Its score: ln p(label | picture)")
    assert "weighted mean, in standard deviations" in report.judges_number(changed(record, judge="mix"))
    strange = {"judge": named["judge"].model_copy(update={"use": "somebody:Else"})}
    assert report.judges_number(changed(replace(record, config=record.config.model_copy(update={"experts": strange})), judge="judge")) == ""


def test_drift_is_told_in_the_spread_of_the_base_that_evaluate_measured(session, record):
    table = pa.concat_tables([session.output(session.chain(2).rounds[0].held_out).table("candidates")])
    brightness = [statistics.meters(decoded(row["bytes"], "here"))[0] for row in table["picture"].to_pylist()]
    found = record.last.numbers["meters"]["brightness"]
    assert found["spread"] == pytest.approx(np.std(brightness), rel=1e-5)
    assert found["base"] == pytest.approx(np.mean(brightness), rel=1e-5)
    assert record.last.numbers["diversity"]["spread"] == pytest.approx(0, abs=1e-6)  # all prompts' pictures lie alike in the made-up tower


# -- measures of size


def span(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def size(best=(3.4, 2.9, 4.1), right=True, moved=0.31, ties=0.12, **others) -> dict:
    shares = {"base": span(0.6, 0.55, 0.65), "after": span(0.775, 0.7, 0.8), "change": span(0.175, 0.13, 0.22), "mended": 3, "broken": 1,
              "pictures": 12}
    return {"best_of": span(*best) | {"most": 16}, "diversity_at_equal_quality": span(1.04, 0.98, 1.1), "right": shares if right else None,
            "shift": span(0.42, 0.3, 0.5), "visible_change": span(moved, 0.2, 0.4), "noise": 0.004, "ties": ties,
            "curve": CURVE, **others}


def line(role, guidance, steps, mean, right):
    return {"role": role, "usual": (guidance, steps) == (1.0, 10), "guidance": guidance, "steps": steps, "eta": 1.0, "guidance_rescale": 0.0,
            "forwards": steps * (2 if guidance != 1 else 1), "mean": mean, "rewarded": mean, "right": right, "diversity": 0.1, "pictures": 12}


LINES = [line("base", 1.0, 10, 0.30, 0.60), line("base", 1.5, 10, 0.31, 0.65), line("after", 1.0, 10, 0.32, 0.775),
         line("after", 1.5, 10, 0.33, 0.80)]
CURVE = [{"n": n, "mean": 0.3 + 0.01 * n, "right": 0.6 + 0.03 * n, "diversity": 0.1 - 0.005 * n} for n in (1, 2, 4, 8)]


def sized(record: Record, found: dict | None = None, lines=LINES, right=True, reach=0.02) -> Record:
    """The record with measures of size in every round, a grid in the last, and a judge that classifies or does not."""
    rates = experts(record, clip=UP, taste=UP, judge=UP)
    numbers = {"size": found or size(), "prompts": 40, "against_base": rate(*UP), "meters": {}, "experts": rates}
    every = replace(record, rounds=[replace(r, numbers=r.numbers | numbers) for r in record.rounds])
    known = [np.zeros(scores.shape) for scores in (every.opinions[0], every.opinions[-1])]
    known[0][:, :2], known[1][:, 1:] = 1, 1  # of each prompt's three pictures one is broken, one stays right and one is mended
    lines = with_differences(lines, reach)
    found = changed(every, sampler=lines, base_by_setting=effect_size.base_by_setting(lines))
    return replace(found, right=known if right else None)


def plain(page: str) -> str:
    return html.unescape(page).replace("\u00a0", " ")


def test_the_page_leads_with_the_size_of_the_gain_and_the_win_rate_comes_after(session, record):
    page = plain(rendered(session, sized(record)))
    top = page[page.index("<h1"): page.index("<nav>")]
    order = ["One picture of the tuned model is as good as the best of 3.4 [2.9, 4.1] of the base</h1>", ">best of 3.4</p>",
             "95 % interval 2.9 to 4.1",
             "Round 1 is the one to keep: by judge one picture of it is as good as the best of 3.4", "60.0 → 77.5 %", "+17.5 points [13.0, 22.0]",
             "<dd>3, 1</dd>", "of 12 held-out pictures", "1.04 [0.98, 1.10]", "0.31 [0.20, 0.40]", "prefers the tuned model's picture in 70.0 %",
             "12 % are ties within its own noise", "The expert judge (fashiondpo_pipeline.testing:Brightness) judges, and was not rewarded.",
             "Its own noise is 0.004"]
    places = [top.index(text) for text in order]
    assert places == sorted(places)
    assert "70.0 %" not in top[: places[-4]], "the win rate is not what is claimed"


def test_a_judge_that_does_not_classify_is_told_by_how_far_its_mean_moved(session, record):
    page = plain(rendered(session, sized(record, size(right=False), [one | {"right": None} for one in LINES], right=False)))
    assert "<dt>mean of the judge</dt><dd>+0.42 [0.30, 0.50]</dd>" in page
    assert "mended" not in page and "better" in page and "what lies within the judge's own noise is alike" in page


@pytest.mark.parametrize(("best", "tone", "words"), [
    ((3.4, 2.9, 4.1), "good", "One picture of the tuned model is as good as the best of 3.4 [2.9, 4.1] of the base"),
    ((None, 9.0, None), "good", "One picture of the tuned model is better than the best of 16 [9.0, more] of the base"),
    ((0.5, 0.4, 0.6), "bad", "One picture of the tuned model is only as good as the worst of 2.0 [1.7, 2.5] of the base"),
    ((1.2, 0.9, 1.5), "open", "No clear difference from the base"), ((2.0, 0.0, None), "open", "No clear difference from the base"),
])
def test_the_headline_is_the_equivalent_and_not_the_win_rate(record, best, tone, words):
    assert report.headline(sized(record, size(best))) == (tone, words)
    places = report.gauge(size(best)["best_of"])
    assert 0 <= places["low"] <= places["at"] <= places["high"] <= 100
    assert (places["at"] > 50) == (best[0] is None or best[0] > 1)


def test_a_gain_that_a_setting_gives_the_base_is_said_to_be_one_in_the_headline_and_below(session, record):
    free = sized(record, lines=[*LINES, line("base", 3.0, 10, 0.34, 0.85)])
    assert report.headline(free) == (
        "open", "One picture of the tuned model is as good as the best of 3.4 [2.9, 4.1] of the base, and so is one of the base with guidance 3")
    assert any(text.startswith("Guidance 3 gives the base as much: 85.0") for text in report.warnings(free))
    page = plain(rendered(session, free))
    assert "Nothing looks off" not in page
    assert '<td class="nowrap">+7.5 points [5.5, 9.5]</td>' in page and page.count('<td class="nowrap">\u2013</td>') == 1
    maybe = sized(record, lines=[*LINES, line("base", 3.0, 10, 0.34, 0.78)])
    assert report.headline(maybe)[1].endswith(" of the base, and so may be one of the base with guidance 3")
    assert not any("gives the base" in text for text in report.warnings(sized(record)))


def test_few_prompts_claim_nothing(record):
    few = changed(sized(record, size((3.4, 0.0, None))), prompts=3)
    assert report.headline(few)[0] == "open"
    assert any("they say nothing of others" in text for text in report.warnings(few))


def test_the_samplers_own_line_is_drawn_for_both_models_with_the_best_for_so_many_forwards(session, record):
    svg = report.sampler_chart(sized(record))
    assert "forwards a picture" in svg and "right, %" in svg and svg.count("1.5</text>") == 2
    assert "mean judge" in report.sampler_chart(sized(record, lines=[one | {"right": None} for one in LINES]))
    assert report.sampler_chart(sized(record, lines=[one for one in LINES if one["usual"]])) is None is report.sampler_chart(record)
    page = plain(rendered(session, sized(record)))
    assert "The sampler's own line" in page and page.count("<tr><th>base</th><td>1.5</td>") == 1


def test_quality_against_diversity_shows_the_base_choosing_and_every_round(record):
    svg = report.trade_off_chart(sized(record))
    for word in ("best of 2", "best of 8", ">base<", "round 1", "round 2", "diversity within a prompt"):
        assert word in svg
    blind = size(curve=[row | {"diversity": None} for row in CURVE])
    assert report.trade_off_chart(sized(record, blind)) is None, "without a tower there is nothing to compare by"


def test_every_measure_of_size_has_its_chart_and_its_column(session, record):
    starts = ("Best-of-n equivalent: ", "Held-out pictures that are right; dashed: the base's, 60.0 %",
              "Diversity over that of the base's pictures chosen to be as good; ", "Visible change: ")
    assert all(caption.startswith(start) for (caption, _), start in zip(report.size_charts(sized(record)), starts, strict=True))
    beyond = report.size_charts(sized(record, size((None, 9.0, None), right=False)))
    assert "best of 16" in beyond[0][1] and "worst" not in beyond[0][1] and "Mean of the judge" in beyond[1][0]
    assert "worst of 2" in report.size_charts(sized(record, size((0.5, 0.4, 0.6))))[0][1]
    page = plain(rendered(session, sized(record)))
    assert page.count("<b>the best of 3.4 [2.9, 4.1]</b>") == 2 and "3, 1 <span" in page


def test_what_stands_first_of_the_pictures_is_drawn_by_key_in_the_shares_of_what_became_of_them(session, record, monkeypatch):
    monkeypatch.setattr(report, "LEADING", 6)
    of_scores = sized(record, size(right=False), right=False)
    shown, every = report.leading(of_scores), outcomes.counts(of_scores.outcomes)
    assert len(shown) == 6 and sum(every.values()) == 12
    assert {one: sum(two.outcome == one for two in shown) for one in every} == outcomes.allotted(every, 6)
    words = report.outcomes_in_words(of_scores)
    told = f"Of 12 held-out pictures {every[1]} are better, {every[-1]} worse and {every[0]} alike. Shown are 6 of them in these shares, "
    told += "of each kind those whose key comes first, which is made of the run's seed, the prompt and the picture's number."
    assert words == told and told in plain(rendered(session, of_scores))
    again = replace(of_scores, config=of_scores.config.model_copy(update={"seed": of_scores.config.seed + 1}))
    assert report.leading(of_scores) == shown != report.leading(again), "by seed, and not by what they look like"
    section = rendered(session, of_scores).partition('<section id="pictures">')[2].partition("<h3>By prompt</h3>")[0]
    assert section.count("<article") == 6 and section.count("<img") == 12


def test_mended_and_broken_pictures_are_those_that_the_judge_says(session, record):
    found = sized(record)
    assert outcomes.counts(found.outcomes) == {1: 4, -1: 4, 0: 4}
    section = plain(rendered(session, found)).partition('<section id="pictures">')[2].partition("<h3>By prompt</h3>")[0]
    assert "Of 12 held-out pictures 4 are mended, 4 broken and 4 unchanged (right in both, or wrong in both). Shown are 12 of them" in section
    cards = re.findall(r"<figcaption>(\w+)</figcaption>.*?<figcaption>(\w+)</figcaption>.*?<b class=\"\w*\">(\w+)</b>", section, re.DOTALL)
    assert sorted(set(cards)) == [("right", "right", "unchanged"), ("right", "wrong", "broken"), ("wrong", "right", "mended")]
    assert [what for *_, what in cards] == ["mended"] * 4 + ["broken"] * 4 + ["unchanged"] * 4


def test_an_outcome_too_rare_to_be_shown_is_named(record):
    odd = sized(record)
    odd.__dict__["outcomes"] = np.array([[1] + [0] * 99] * 1)
    assert report.outcomes_in_words(odd).endswith("so few are mended that none is among them.")


# -- findings and the walk


def walk_table(accuracy) -> pa.Table:
    return pa.table({"step": pa.array([0, 5, 9], pa.int16()), "timestep": pa.array([900.0, 400.0, 0.0], pa.float32()), "pairs": [500] * 3,
                     "accuracy": pa.array(accuracy, pa.float32()), "margin": [0.1] * 3, "winner": [0.1] * 3, "loser": [0.0] * 3})


def test_findings_of_a_round_stand_with_its_curves(session, record):
    odd = replace(record, rounds=[replace(record.rounds[0], columns=walk_table([0.5, 0.8, 0.9])), record.last])
    told = rendered(session, odd).partition('<section id="finetuning">')[2]
    assert '<span class="level note"><span aria-hidden="true">●</span> note</span> 1 of 3 saved steps show no more than chance' in told
    assert "finetune.window: [0.555, 1] leaves them out." in told
    assert told.count("Nothing to remark") == 1


def test_accuracy_by_timestep_is_drawn_where_there_is_a_table_of_it(session, record):
    assert report.columns_chart(record) is None
    assert "Where in the walk it learns" not in rendered(session, record)
    found = replace(record, rounds=[record.rounds[0], replace(record.last, columns=walk_table([0.6, 0.8, 0.9]))])
    empty = replace(record, rounds=[record.rounds[0], replace(record.last, columns=walk_table([0.6, 0.8, 0.9]).slice(0, 0))])
    assert report.columns_chart(empty) is None
    svg = report.columns_chart(found)
    place = {label: float(x) for x, label in re.findall(r'<text[^>]* x="([\d.]+)"[^>]*>(\d+)</text>', svg)}
    assert "timestep, from noise to picture" in svg and place["800"] < place["100"]
    assert "Where in the walk it learns" in rendered(session, found)


def test_a_table_of_steps_that_finetuning_left_is_read(tmp_path, monkeypatch):
    def make(session, step, out):
        out.write(1, columns=walk_table([0.6, 0.8, 0.9]))
        make_finetune(session, step, out)

    monkeypatch.setitem(MAKERS, "finetune", make)
    session = finished(tmp_path, rounds=1)
    assert read(session, session.chain(1)).last.columns["accuracy"].to_pylist() == pytest.approx([0.6, 0.8, 0.9])


# -- how strong the adapter is, and how far it moved


def strengthened(record: Record, *found: dict | None) -> Record:
    return replace(record, rounds=[replace(r, strength=one) for r, one in zip(record.rounds, found, strict=True)])


def tried(chosen: float, floor: float | None = 0.7) -> dict:
    """What a search noted: the mix rises with the strength, diversity falls by a fifth of it; that of 2 is below the floor."""
    rows = [{"strength": one, "score": 0.3 * one, "share": 1 - 0.2 * one, "pictures": 8, "value": 0.3 * one,
             "fits": floor is None or 1 - 0.2 * one >= floor} for one in (0.5, 1.0, 1.5, 2.0)]
    base = {"strength": 0.0, "score": 0.0, "share": 1.0, "diversity": 0.1, "pictures": 8}
    return {"strength": chosen, "base": base, "tried": rows, "floor": floor}


def test_the_strength_that_was_searched_for_is_shown_with_what_each_gave(session, record):
    searched = strengthened(record, tried(1.5), tried(1.0))
    page = plain(rendered(session, searched)).partition('<section id="finetuning">')[2]
    assert ("<li>Round 1: strength 1.5 of 0.5, 1, 1.5 and 2: rewarded mix +0.45 SD of the base, as trained (1) +0.30; diversity 0.70 of the "
            "base's (floor 0.7).</li>") in page
    assert "<li>Round 2: strength 1 of 0.5, 1, 1.5 and 2: rewarded mix +0.30 SD of the base; diversity 0.80 of the base's (floor 0.7).</li>" in page
    (caption, mix), (dashed, share) = report.strength_charts(searched)
    assert "filled: the one chosen" in caption and "dashed: the least it may be" in dashed
    assert caption in page and dashed in page and "mix, SD of the base" in mix
    filled, hollow = "fill: var(--{})", "fill: var(--card)"
    for svg in (mix, share):
        for colour in report.round_colours(record).values():
            assert svg.count(filled.format(colour)) == 1, "of each round the one chosen"
        assert svg.count(hollow) == 2 * 5, "the base and each strength, of both rounds"


def test_a_search_without_a_floor_or_without_a_strength_that_fits_is_told_as_that(record):
    free, (least, *_) = strengthened(record, tried(2.0, None), None), report.strengths_in_words(strengthened(record, tried(0.5, 0.95), None))
    assert report.strengths_in_words(free) == [
        "Round 1: strength 2 of 0.5, 1, 1.5 and 2: rewarded mix +0.60 SD of the base, as trained (1) +0.30; diversity 0.60 of the base's."]
    assert least == "Round 1: strength 0.5, the least that was tried, as none keeps 0.95 of the base's diversity and has every picture sound."
    blind = tried(1.5, None)
    blind["tried"] = [one | {"share": None} for one in blind["tried"]]
    assert len(report.strength_charts(strengthened(record, blind, None))) == 1, "no tower, no diversity"
    assert "diversity" not in report.strengths_in_words(strengthened(record, blind, None))[0]


def test_a_strength_that_was_given_is_told_and_one_that_was_not_is_not(session, record):
    given = strengthened(record, {"strength": 2.0}, {"strength": 2.0})
    page = rendered(session, given)
    assert "<li>Round 2: strength 2, as finetune.strength says.</li>" in page and report.strength_charts(given) == []
    assert "How strong the adapter is" not in rendered(session, record)


def held(record: Record, *budgets: float | None) -> Record:
    """The record as if beta had followed a budget in the rounds that have one."""
    rounds = []
    for r, budget in zip(record.rounds, budgets, strict=True):
        steps = r.steps
        for name, values in (("divergence", np.arange(12.0)), ("beta", np.linspace(300, 90, 12))):
            steps = steps.set_column(steps.column_names.index(name), name, pa.array(values, pa.float32()))
        rounds.append(replace(r, steps=steps, divergence=10.5, knobs=r.knobs | ({} if budget is None else {"divergence": budget})))
    return replace(record, rounds=rounds)


def test_divergence_is_shown_beside_the_budget_that_beta_followed(session, record):
    both = held(record, 8.0, None)
    page = plain(rendered(session, both)).partition('<section id="finetuning">')[2]
    beta = record.last.knobs["beta"]
    assert f"<li>Round 1 ended at 10.5 nats a picture of 8, with beta 90.0 ({beta:g} at the start).</li>" in page and "Round 2 ended" not in page
    assert [caption.partition(" ")[0] for caption, _ in report.divergence_charts(both)] == ["Divergence", "Beta,"]
    assert all(caption in page for caption, _ in report.divergence_charts(both))
    way = report.way_to_budget(both.rounds[0])
    assert way == pytest.approx(8 * (np.arange(12) / 12) ** 2) and np.isnan(report.way_to_budget(both.last)).all()


def test_without_a_budget_no_divergence_is_shown(session, record):
    assert report.divergence_charts(held(record, None, None)) == []
    assert "How far it moved" not in rendered(session, held(record, None, None))


# -- charts


def test_charts_take_their_colours_from_the_page():
    svg = charts.gains(np.array([0.5, -0.25]), [0], y="gain", about="of <two>")
    assert "var(--good)" in svg and "var(--bad)" in svg
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"#[0-9a-z]*(?=[\")])", "", svg))
    assert 'aria-label="of &lt;two&gt;"' in svg


def test_charts_keep_every_digit_of_their_labels():
    line = charts.Points("ink", [0, 1], [0.53281, 0.53305], [0.5328, 0.533], [0.53283, 0.5331])
    labels = re.findall(r">(0\.\d+)<", charts.intervals([line], y="y", about="x"))
    assert len(labels) == len(set(labels)) > 2


def test_long_curves_are_thinned_and_keep_their_mean():
    values = np.arange(40.0 * charts.MOST_POINTS)
    thin = charts._thin(values, charts.MOST_POINTS)
    assert len(thin) == charts.MOST_POINTS
    assert thin.mean() == pytest.approx(values.mean())


def test_running_mean_of_a_constant_is_the_constant():
    assert np.allclose(charts._smooth(np.full(100, 3.0)), 3.0)


def test_a_histogram_without_a_single_score_is_an_empty_chart():
    assert "<svg" in charts.outlines([("ink", np.full(4, np.nan))], x="x", y="y", about="nothing")
