"""`fdpo rescore`: other weights on cached scores, counted against an independent reckoning pair by pair."""

import itertools
import json
import re

import numpy as np
import pytest
from whole_runs import folder_of, refused, results, session, table, works

WEIGHTS = "clip_t=0.3,bright=0.7"


def reckoned(place, weights: dict[str, float], margin: float = 0.5) -> tuple[dict[tuple, float], dict[tuple, float]]:
    """((group, winner, loser) -> margin, (group, candidate) -> mixed score) of round 1, one pair after another."""
    run = place / "runs/t"
    mixed: dict[tuple, float] = {}
    for expert, weight in weights.items():
        frame = table(folder_of(run, 1, f"score-{expert}"), "scores").to_pandas()
        normal = frame.groupby("group")["score"].transform(lambda s: (s - s.mean()) / s.std(ddof=0))
        for group, candidate, value in zip(frame["group"], frame["candidate"], normal, strict=True):
            mixed[group, candidate] = mixed.get((group, candidate), 0) + value * weight / sum(weights.values())
    pairs = {}
    for first, second in itertools.permutations(mixed, 2):
        if first[0] == second[0] and mixed[first] - mixed[second] >= margin:
            pairs[first[0], first[1], second[1]] = mixed[first] - mixed[second]
    return pairs, mixed


def spearman(first: dict[tuple, float], second: dict[tuple, float]) -> float:
    """Rank correlation within groups."""
    ranks = []
    for scores in (first, second):
        groups: dict[str, list] = {}
        for (group, candidate), score in scores.items():
            groups.setdefault(group, []).append((score, candidate))
        ranks.append({(group, candidate): rank - (len(rows) - 1) / 2
                      for group, rows in groups.items() for rank, (_, candidate) in enumerate(sorted(rows))})
    one, other = (np.array([ranking[key] for key in ranks[0]]) for ranking in ranks)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def saved(told) -> str:
    return re.search(r"saved as pairs ([0-9a-f]{8}) · to train on it: fdpo finetune --round 1 --pairs \1", told.err)[1]


def test_the_figures_are_those_of_a_reckoning_pair_by_pair(finished):
    old, before = reckoned(finished, {"clip_t": 1.0})
    new, after = reckoned(finished, {"clip_t": 0.3, "bright": 0.7})
    told = works("rescore", "--round", "1", "--weights", WEIGHTS)
    kept = len(old.keys() & new.keys())
    flipped = sum((group, loser, winner) in old for group, winner, loser in new)
    assert min(kept, flipped, len(new) - kept - flipped) > 0, "the tiny run should show every kind of change"
    head, change, _ = told.err.splitlines()
    assert re.fullmatch(r"24 candidates, 2 experts, from cache · \d+\.\d s", head)
    assert change == (
        f"pairs {len(old)} -> {len(new)}: {kept} kept, {flipped} flipped, {len(old) - kept - flipped} lost, "
        f"{len(new) - kept - flipped} new · rank correlation {spearman(before, after):.2f}")


def test_the_saved_pairs_are_those_of_the_reckoning(finished):
    new, _ = reckoned(finished, {"clip_t": 0.3, "bright": 0.7})
    name = saved(works("rescore", "--round", "1", "--weights", WEIGHTS))
    pairs = table(finished / f"runs/t/round-01/pair-{name}", "pairs").to_pylist()
    assert {(pair["group"], pair["winner"], pair["loser"]) for pair in pairs} == new.keys()
    for pair in pairs:
        assert pair["margin"] == pytest.approx(new[pair["group"], pair["winner"], pair["loser"]], abs=1e-6)
        assert pair["winner_score"] - pair["loser_score"] == pytest.approx(pair["margin"], abs=1e-6)
        assert 0.3 * pair["gap_clip_t"] + 0.7 * pair["gap_bright"] == pytest.approx(pair["margin"], abs=1e-6)


def test_saved_pairs_are_trained_on_drawn_with_and_exported(finished):
    whole = results(finished / "runs/t")
    name = saved(works("rescore", "--round", "1", "--weights", WEIGHTS))
    told = works("finetune", "--round", "1", "--pairs", name)
    assert told.err.startswith("round 1 finetune: ")
    assert works("finetune", "--round", "1", "--pairs", name).err == (
        f"round 1 finetune: done already, nothing to do\nnext: fdpo evaluate --round 1 --pairs {name}\n")
    works("export", "theirs", "--round", "1")
    works("export", "ours", "--round", "1", "--pairs", name)
    theirs, ours = (json.loads((finished / folder / "lineage.json").read_text()) for folder in ("theirs", "ours"))
    assert ours["finetune"]["inputs"]["pair"] == name != theirs["finetune"]["inputs"]["pair"]
    weights = [(finished / folder / "pytorch_lora_weights.safetensors").read_bytes() for folder in ("theirs", "ours")]
    assert weights[0] != weights[1]
    drawn = [works("generate", "a red dress", "--round", "1", "--count", "1", "--out", folder, *more).out.strip()
             for folder, more in (("a", ()), ("b", ("--pairs", name)))]
    assert (finished / drawn[0]).read_bytes() != (finished / drawn[1]).read_bytes()
    works("evaluate", "--round", "1", "--pairs", name)
    assert results(finished / "runs/t").items() >= whole.items(), "the run itself stays as it was"
    assert works("round").err.startswith("runs/t has 3 rounds already: nothing to do")


def test_the_weights_in_force_save_nothing_new(finished):
    before = results(finished / "runs/t")
    count = len(reckoned(finished, {"clip_t": 1.0})[0])
    told = works("rescore", "--round", "1", "--weights", "clip_t=1")
    assert told.err.splitlines()[1:] == [
        f"pairs {count} -> {count}: {count} kept, 0 flipped, 0 lost, 0 new · rank correlation 1.00",
        "these are the settings in force: nothing new was saved"]
    assert results(finished / "runs/t") == before


def test_the_last_round_is_meant_when_none_is_named(finished):
    assert "fdpo finetune --round 3 --pairs" in works("rescore", "--weights", WEIGHTS).err


def test_other_rules_than_weights_come_by_set(finished):
    told = works("rescore", "--round", "1", "--set", "pair.select=best_worst", "--set", "pair.margin=0")
    assert "-> 6: " in told.err
    name = saved(told)
    assert len(table(finished / f"runs/t/round-01/pair-{name}", "pairs")) == 6


def test_a_run_made_with_overrides_is_found_by_the_same_overrides(place):
    other = ("--set", "sample.candidates=3", "--set", "pair.margin=0.1")
    for stage in ("sample", "score"):
        works(stage, "--round", "1", *other)
    told = works("rescore", "--round", "1", "--weights", "bright=1", *other)
    assert "18 candidates, 1 experts" in told.err or "18 candidates, 1 expert," in told.err
    chain = session("sample.candidates=3", "pair.margin=0.1", "pair.weights={bright: 1}").chain(1)
    assert chain.rounds[1].pair.fingerprint == saved(told)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ("clip=0.7", "--weights: no expert called 'clip'; did you mean 'clip_t'?"),
        ("clip_t=much", "--weights: clip_t: the weight should be a number, not 'much'"),
        ("clip_t", "--weights: clip_t: the weight should be a number, not ''"),
        ("clip_t=-1", "--weights: clip_t: the weight should be 0 or more, not -1"),
        ("clip_t=nan", "--weights: clip_t: the weight should be 0 or more, not nan"),
        ("clip_t=0,bright=0", "--weights: at least one expert needs a weight above 0"),
        ("clip=1,bright=x", "--weights:\n  no expert called 'clip'; did you mean 'clip_t'?\n"
                            "  bright: the weight should be a number, not 'x'"),
    ],
)
def test_weights_that_are_none(place, weights, sentence):
    assert refused("rescore", "--weights", weights) == sentence


def test_scores_that_are_not_there_are_named(finished):
    told = refused("rescore", "--round", "1", "--weights", "mood=1", "--set", "experts.mood.use=whole_runs:Mood")
    assert told == "round 1: score-mood has not been run with these settings; `fdpo round --set experts.mood.use=whole_runs:Mood` makes it"
