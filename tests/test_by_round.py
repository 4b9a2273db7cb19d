"""Settings of one round: validated as the sections are, in that round's claims and no other's, and advised where they are what is meant."""

import re

import pytest
from whole_runs import folder_of, manifests, refused, session, works

from fashiondpo_pipeline.config import load, template
from fashiondpo_pipeline.errors import UserError


def test_a_rounds_own_knobs_are_laid_over_the_runs():
    config = load(None, ["by_round.3.finetune.epochs=1", "by_round.3.pair.weights.clip_i=0.9", "finetune.beta=500"])
    assert config.of_round(1) is config
    assert config.of_round(3).finetune == config.of_round(2).finetune.model_copy(update={"epochs": 1})
    assert config.of_round(3).pair.weights == {"clip_i": 0.9, "clip_t": 0.4}  # one override keeps its neighbours
    assert load(None, ["pair.weights={clip_t: 1}", "by_round.3.pair.weights.clip_i=0.9"]).of_round(3).pair.weights == {"clip_t": 1, "clip_i": 0.9}


def test_the_template_reads_back(tmp_path):
    config = load(None, ["by_round.3.finetune.epochs=1", "by_round.2.sample.save=[1, 2]"])
    assert load(None, text=template(config)) == config


def test_a_file_and_a_set_name_the_same_round():
    text = "by_round: {3: {finetune: {epochs: 2, groups: 3}}}"
    assert load(None, ["by_round.3.finetune.epochs=1"], text=text).by_round[3].finetune == {"epochs": 1, "groups": 3}


def test_later_rounds_have_a_lower_learning_rate_but_for_those_that_name_their_own():
    config = load(None, ["finetune.learning_rate=0.004", "finetune.rate_later=0.5", "by_round.3.finetune.epochs=1",
                         "by_round.4.finetune.learning_rate=0.003"])
    assert [config.of_round(number).finetune.learning_rate for number in range(6)] == [0.004, 0.004, 0.002, 0.002, 0.003, 0.002]
    assert config.of_round(3).finetune.epochs == 1


def test_later_rounds_ask_for_a_wider_margin_but_for_those_that_name_their_own():
    config = load(None, ["pair.margin=0.5", "pair.margin_later=3", "by_round.3.pair.weights={clip_t: 1}", "by_round.4.pair.margin=0.2"])
    assert [config.of_round(number).pair.margin for number in range(6)] == [0.5, 0.5, 1.5, 1.5, 0.2, 1.5]
    assert config.of_round(3).pair.weights == {"clip_t": 1}
    steady = load(None, ["pair.margin_later=1", "finetune.rate_later=1"])
    assert steady.of_round(3) is steady


@pytest.mark.parametrize(("override", "sentence"), [
    ("by_round.3.finetune.epoch=1", "by_round.3.finetune.epoch: unknown key; did you mean 'epochs'?"),
    ("by_round.3.finetun.epochs=1", "by_round.3.finetun: unknown key; did you mean 'finetune'?"),
    ("by_round.3.evaluate.pictures=1", "by_round.3.evaluate: unknown key; known: finetune, pair, sample"),
    ("by_round.3.finetune.epochs=x", "by_round.3.finetune.epochs: should be a whole number, not 'x'"),
    ("by_round.x.finetune.epochs=1", "by_round.x: should be a whole number, not 'x'"),
    ("by_round.0.finetune.epochs=1", "by_round.0: should be greater than or equal to 1, not 0"),
    ("by_round.3=null", "by_round.3: should be a section with keys, not null"),
    ("by_round.3.finetune.rank=4", "by_round.3.finetune.rank: one adapter goes through all rounds, so no round has its own; take it out"),
    ("by_round.3.finetune.rate_later=0.9", "by_round.3.finetune.rate_later: it tells how rounds differ, so no round has its own; take it out"),
    ("by_round.3.pair.margin_later=2", "by_round.3.pair.margin_later: it tells how rounds differ, so no round has its own; take it out"),
    ("by_round.3.sample.height=64", "by_round.3.sample.height: held-out pictures are compared over all rounds, so no round has its own; take it out"),
    ("by_round.3.pair.weights={clipi: 1}", "by_round.3.pair.weights: no expert called 'clipi'; did you mean 'clip_i'?"),
    ("by_round.3.pair.weights={clip_i: 0}", "by_round.3.pair: at least one expert needs a weight above 0"),
])
def test_a_mistake_is_told_with_its_place(override, sentence):
    with pytest.raises(UserError) as problem:
        load(None, [override])
    assert str(problem.value) == f"the defaults: this does not fit\n  {sentence}"


def test_rounds_that_are_mixed_have_one_way_of_sampling():
    with pytest.raises(UserError, match=r"finetune\.replay mixes the candidates of several rounds"):
        load(None, ["by_round.3.sample.eta=0.5", "by_round.2.finetune.replay=0.2"])


def test_the_last_round_is_trained_anew_with_settings_of_its_own(finished):
    before = manifests(finished / "runs/t")
    saved = re.search(r"saved as pairs (\w+)", works("rescore", "--round", "3", "--set", "pair.margin=0.1").err).group(1)
    said = refused("finetune", "--round", "3", "--pairs", saved, "--set", "finetune.epochs=1")
    assert "to change round 3 alone, write --set by_round.3.finetune.epochs=1 in place of --set finetune.epochs=1" in said
    told = works("finetune", "--round", "3", "--pairs", saved, "--set", "by_round.3.finetune.epochs=1")
    assert told.err.endswith(f"next: fdpo evaluate --round 3 --pairs {saved} --set by_round.3.finetune.epochs=1\n")
    made = {path: manifest for path, manifest in manifests(finished / "runs/t").items() if path not in before}
    assert sorted(path.rpartition("-")[0] for path in made) == ["round-03/finetune", "round-03/pair"]
    (claim,) = (manifest["claim"] for path, manifest in made.items() if "finetune" in path)
    assert claim["config"]["epochs"] == 1 and claim["inputs"]["pair"] == saved
    assert claim["inputs"]["adapter"] == folder_of(finished / "runs/t", 2, "finetune").name[-8:]


def test_a_rule_given_to_rescore_comes_before_what_the_configuration_says_of_the_round(finished):
    own = ("--set", "by_round.3.pair.margin=0.2")
    works("rescore", "--round", "3", *own, "--set", "pair.margin=0.1")
    new = [m["claim"]["config"] for path, m in manifests(finished / "runs/t").items() if path.startswith("round-03/pair")]
    assert sorted(config["margin"] for config in new) == [0.1, 0.5]


def test_candidates_of_one_round_may_be_drawn_otherwise(place):
    works("round", "-n", "2", "--set", "by_round.2.sample.candidates=3", "--set", "by_round.2.sample.steps=5")
    counts = {path.split("/")[0]: m["numbers"]["candidates"] for path, m in manifests(place / "runs/t").items() if "/sample-" in path}
    assert counts == {"round-01": 24, "round-02": 18}
    plan = works("plan", "-n", "2", "--set", "by_round.2.sample.candidates=3", "--set", "by_round.2.sample.steps=5", "--name", "new").out
    rows = {tuple(line.split()[:3]): line.split() for line in plan.splitlines()[2:]}
    assert rows["round", "2", "sample"][5] == "18" and rows["round", "2", "pair"][5] == "18"
    assert {session().chain(1).rounds[1].held_out.fingerprint} == {
        session("by_round.2.sample.candidates=3").chain(1).rounds[1].held_out.fingerprint}
