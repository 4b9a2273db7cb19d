"""Own prompts on the shipped default: who cannot be asked is left out aloud, who is the person's own is an error, and null drops one."""

import json

import pytest
from whole_runs import fdpo, folder_of, refused, session, works

from fashiondpo_pipeline import panel
from fashiondpo_pipeline.config import Config, load
from fashiondpo_pipeline.errors import UserError
from stages import Session

FEW = [f"a {colour} {kind}" for colour in ("red", "blue", "green") for kind in ("dress", "boot", "bag")]
OWN = ["--set", "prompts.file=mine.txt", "--set", "prompts.held_out=0.4", "--set", "sample.candidates=4", "--set", "evaluate.pictures=2",
       "--set", "finetune.epochs=1", "--set", "finetune.timesteps=1", "--set", "evaluate.bootstrap=100", "--set", "machine.threads=1",
       "--set", "pair.margin=0", "--set", "pair.agree=null"]
WHY = "the prompts have no column category, colour, pattern or accent"
LEFT = f"left out: clip_i ({WHY}), judge ({WHY})"


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A working folder with nothing but prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("\n".join(FEW))
    return tmp_path


def test_own_prompts_on_the_shipped_default_leave_out_who_cannot_be_asked_and_say_so_everywhere(bare):
    lines = works("round", "-n", "1", *OWN).err.splitlines()
    at = [line.startswith("run demo") for line in lines].index(True)
    assert lines[:at] == [LEFT, "pair.weights is now clip_t 1", "the mix (clip_t 1) judges, and it is what was rewarded, which flatters: better name "
                          "an expert that is only watched in evaluate.judge"]
    run = bare / "runs/demo"
    for step in ("pair", "evaluate"):
        manifest = json.loads((folder_of(run, 1, step) / "manifest.json").read_text())
        assert manifest["left_out"] == dict.fromkeys(("clip_i", "judge"), WHY)
    assert manifest["claim"]["config"]["weights"] == {"clip_t": 1.0}
    page = " ".join((run / "report.html").read_text().split())
    assert f"Not asked: clip_i ({WHY}), judge ({WHY})." in page
    assert LEFT in works("status", *OWN).err.splitlines()
    assert not list(run.glob("*/*clip_i*"))


def test_the_shipped_experts_may_stand_in_the_file_as_init_writes_them(bare):
    works("init")
    assert LEFT in works("plan", "-n", "1", *OWN).err


def test_an_expert_of_ones_own_that_lacks_a_column_is_an_error_as_a_typo_would_be(bare):
    mine = "experts.mine={use: classifier, options: {model: 'embedded:fashion_mini/judge', label: '{colur}'}}"
    said = refused("plan", "-n", "1", *OWN, "--set", mine)
    assert said == ("expert 'mine' needs the column 'colur', which the prompts do not have: add it, or drop the expert (--set experts.mine=null)")
    said = refused("plan", "-n", "1", *OWN, "--set", "experts.judge.options.label='colour: {colur}'")
    assert "expert 'judge' needs the column 'colur'" in said and not (bare / "runs").exists()


def test_null_drops_an_expert_and_what_names_it_follows(place):
    err = works("plan", "--set", "experts.bright=null", "--set", "name=other").err.splitlines()
    assert err[:2] == ["left out: bright (dropped)", "the mix (clip_t 1) judges, and it is what was rewarded, which flatters: better name an "
                       "expert that is only watched in evaluate.judge"]
    assert "bright: null" in works("config", "--set", "experts.bright=null").out
    made = session("experts.bright=null")
    assert "score-bright" not in str([step.name for step in made.chain(1).steps])


def test_the_judge_that_takes_over_is_watched_and_looks_at_more_than_pixels(place):
    clip = session().config.asked["clip_t"].options["model"]
    more = ["experts.bright=null", "experts.sharp={use: sharpness}", "experts.other={use: clip_text, options: {model: '" + clip + "'}}"]
    made = session(*more)
    made.chain(1)
    assert made.config.evaluate.judge == "other"
    made = session(*more[:2])
    made.chain(1)
    assert made.config.evaluate.judge is None


def test_nobody_rewarded_left_is_refused_with_the_reasons(bare, place):
    assert refused("plan", "--set", "experts.clip_t=null") == (
        "no rewarded expert is left: clip_t (dropped); give the prompts what they need, or reward another expert in pair.weights")


def test_rescore_and_the_rules_of_single_rounds_know_who_is_left_out():
    config = load(None, ["by_round.2.pair.weights.clip_i=0.9"])
    found, said = panel.without(config, {"clip_i": "dropped"}, [])
    assert found.pair.weights == {"clip_t": 1.0}
    assert found.of_round(2).pair.weights == {"clip_t": 1.3}  # the sum that they had
    assert found.evaluate.judge == "judge" and "judge" not in " ".join(said[1:])
    with pytest.raises(UserError, match="no rewarded expert is left"):
        panel.without(load(None, ["by_round.2.pair.weights={clip_i: 1}"]), {"clip_i": "dropped"}, [])


def test_with_nobody_left_out_the_configuration_is_what_it_was():
    config = Config()
    assert panel.without(config, {}, []) == (config, [])


@pytest.mark.parametrize("command", [("plan",), ("round", "--n", "1")])
@pytest.mark.parametrize(("knob", "told"), [
    ("seed=7", None), ("evaluate.judge=clip_t", "clip_t is rewarded"), ("evaluate.judge=null", "the rewarded experts' own mix judges"),
])
def test_a_judge_that_is_rewarded_is_told_before_anything_is_drawn(place, monkeypatch, command, knob, told):
    def stop(*_: object) -> None:
        raise UserError("now it would be drawn")

    monkeypatch.setattr(Session, "execute", stop)
    said = fdpo(*command, "--set", knob)
    assert told is None or told in said.out + said.err
    assert ("is rewarded" in said.out + said.err or "own mix judges" in said.out + said.err) == bool(told)
