"""The strength of a trained LoRA: chosen on training prompts by who is rewarded, above a floor of diversity, and put into its weights."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from whole_runs import folder_of, manifests, refused, results, session, table, works

from fashiondpo_pipeline import adapters, report
from fashiondpo_pipeline.config import Finetune, validate
from fashiondpo_pipeline.errors import UserError
from stages import strengthen
from stages.plan import estimate

AUTO = ("--set", "finetune.strength=auto", "--set", "finetune.strengths=[0.5, 1.0, 4.0]", "--set", "finetune.strength_prompts=3",
        "--set", "finetune.strength_pictures=2", "--set", "finetune.strength_floor=null")
BRIGHT = ("--set", "pair.weights={bright: 1.0}")
FILE = f"adapter/{adapters.FILE}"


def numbers(step) -> dict:
    return json.loads((step / "manifest.json").read_text())["numbers"]


def ratio(strong, plain) -> float:
    """How many times one adapter's change over the base is the other's; the same for every tensor."""
    one, other = load_file(strong / FILE), load_file(plain / FILE)
    for name in one:
        if "lora_A" in name:
            assert torch.equal(one[name], other[name])
    found = [one[name] / other[name] for name in one if "lora_B" in name]
    values = torch.cat([values[torch.isfinite(values)] for values in found])
    assert len(values) and torch.allclose(values, values[0].expand_as(values))
    return float(values[0])


# -- which is chosen


def one(strength, score, share=1.0, pictures=8, floor=0.7):
    return {"strength": strength, "value": score, "share": share, "pictures": pictures, "fits": share >= floor}


@pytest.mark.parametrize(("tried", "strength", "fits"), [
    ([one(0.5, 0.1), one(1.0, 0.3), one(2.0, 0.2)], 1.0, True),
    ([one(0.5, 0.1), one(1.0, 0.3), one(2.0, 0.9, share=0.69)], 1.0, True),  # collapsed
    ([one(0.5, 0.1), one(1.0, 0.3), one(2.0, 0.9, share=0.70)], 2.0, True),  # just not
    ([one(0.5, 0.1), one(1.0, 0.3), one(2.0, 0.9, pictures=7)], 1.0, True),  # a picture broke
    ([one(0.5, 0.3), one(1.0, 0.3)], 0.5, True),  # the same for less
    ([one(2.0, 0.9, share=0.1), one(1.0, 0.3, share=0.2)], 1.0, False),
    ([one(2.0, None), one(1.0, None)], 1.0, False),
])
def test_the_best_above_the_floor_is_chosen(tried, strength, fits):
    assert strengthen.best(tried, 8) == (strength, fits)


# -- what it is made of


def test_a_strength_in_the_weights_is_the_adapter_at_that_strength(finished, tmp_path):
    """What `auto` draws each strength with, and what is kept."""
    generator = session().generator(folder := folder_of(finished / "runs/t", 1, "finetune") / "adapter")
    denoiser = generator.denoiser
    names = [name for name, _ in denoiser.named_parameters() if "lora_B" in name]
    with adapters.scaled(denoiser, 2.5):
        wanted = {name: weight.detach().clone() for name, weight in denoiser.named_parameters() if name in names}
    adapters.strengthened(folder, tmp_path / "strong", 2.5)
    adapters.load(denoiser, tmp_path / "strong")
    found = dict(denoiser.named_parameters())
    assert names and all(torch.equal(found[name], wanted[name]) for name in names)
    adapters.strengthened(folder, tmp_path / "same", 1.0)
    assert (tmp_path / "same" / adapters.FILE).read_bytes() == (folder / adapters.FILE).read_bytes()


def test_a_number_scales_every_round_by_it_and_what_follows_starts_from_there(place):
    works("round", "--n", "2", "--set", "finetune.strength=2.0")
    run = place / "runs/t"
    for number in (1, 2):
        assert ratio(folder_of(run, number, "strength"), folder_of(run, number, "finetune")) == pytest.approx(2)
        claim = json.loads((folder_of(run, number, "held-out-sample") / "claim.json").read_text())
        assert folder_of(run, number, "strength").name.endswith(claim["inputs"]["adapter"])
    claim = json.loads((folder_of(run, 2, "finetune") / "claim.json").read_text())
    assert folder_of(run, 1, "strength").name.endswith(claim["inputs"]["adapter"])
    told = works("generate", "a red dress", "--set", "finetune.strength=2.0").out
    assert "round2" in told
    works("export", "out", "--set", "finetune.strength=2.0")
    assert (place / "out" / adapters.FILE).read_bytes() == (folder_of(run, 2, "strength") / FILE).read_bytes()
    lineage = json.loads((place / "out/lineage.json").read_text())
    assert lineage["strength"] == 2.0 and lineage["finetune"]["stage"] == "finetune"


def test_auto_takes_what_the_rewarded_experts_like_best_of_training_prompts(place):
    told = works("round", "--n", "1", *AUTO, *BRIGHT)
    run = place / "runs/t"
    found = numbers(folder := folder_of(run, 1, "strength"))
    tried = {each["strength"]: each for each in found["tried"]}
    assert set(tried) == {0.5, 1.0, 4.0}
    assert found["strength"] == max(tried, key=lambda strength: tried[strength]["score"])
    assert ratio(folder, folder_of(run, 1, "finetune")) == pytest.approx(found["strength"])
    assert f", strength {found['strength']:g}, " in told.err
    page = (run / "report.html").read_text()
    assert f"<li>Round 1: strength {found['strength']:g} of 0.5, 1 and 4: rewarded mix {tried[found['strength']]['score']:+.2f} SD" in (
        page.replace("\N{MINUS SIGN}", "-")), "the chart and what it says are in tests/test_report.py"

    sample = folder_of(run, 1, "strength-sample")
    drawn, scores = table(sample, "candidates").to_pandas(), table(folder_of(run, 1, "strength-score-bright"), "scores").to_pandas()
    assert drawn.groupby("candidate")["group"].nunique().eq(3).all() and drawn["candidate"].nunique() == 2 * 4  # the base beside three
    assert set(drawn["prompt"]) <= {row["prompt"] for row in session().prompts["train"].rows}
    by_place = drawn["candidate"] // 2
    assert drawn.groupby(["group", drawn["candidate"] % 2])["seed"].nunique().eq(1).all()  # same seeds at each strength
    base = scores[scores["candidate"] < 2]["score"]
    for number, strength in enumerate(sorted(tried), start=1):
        mean = (scores[scores["candidate"] // 2 == number]["score"].mean() - base.mean()) / base.std(ddof=0)
        assert tried[strength]["score"] == pytest.approx(mean)
    assert by_place.nunique() == 4 and tried[4.0]["pictures"] == 6
    assert not list(run.glob("round-01/strength-score-clip_t-*"))  # who only watches is not asked: the judge neither


def test_pictures_at_a_strength_are_those_that_the_scaled_adapter_draws(place):
    works("round", "--n", "1", *AUTO, *BRIGHT)
    run = place / "runs/t"
    tried = table(folder_of(run, 1, "strength-sample"), "candidates").to_pandas().set_index(["group", "candidate"])["picture"]
    base = table(folder_of(run, 0, "held-out-sample"), "candidates")
    assert len(base)
    groups = sorted({group for group, _ in tried.index})
    for group in groups:  # the base's are others than those at strength 4, from the same seeds
        assert tried[group, 0]["bytes"] != tried[group, 6]["bytes"]
    own = session("finetune.strength=auto", "finetune.strengths=[4.0]", "finetune.strength_prompts=3", "finetune.strength_pictures=2",
                  "finetune.strength_floor=null", "pair.weights={bright: 1.0}")
    own.execute(own.chain(1).steps)
    alone = table(next(path for path in run.glob("round-01/strength-sample-*") if len(table(path, "candidates")) == 3 * 4), "candidates")
    alone = alone.to_pandas().set_index(["group", "candidate"])["picture"]
    for group in groups:
        assert alone[group, 0]["bytes"] == tried[group, 0]["bytes"] and alone[group, 2]["bytes"] == tried[group, 6]["bytes"]


def test_the_floor_is_a_share_of_the_bases_diversity(place):
    floor = ("--set", "finetune.strength_floor=0.0")
    works("round", "--n", "1", *AUTO, *BRIGHT, *floor)
    step = folder_of(place / "runs/t", 1, "strength")
    found = numbers(step)
    vectors = table(folder_of(place / "runs/t", 1, "strength-embed-clip"), "embeddings").to_pandas()
    for number, each in enumerate([found["base"], *found["tried"]]):
        own = vectors[vectors["candidate"] // 2 == number].groupby("group")["embedding"]
        distance = np.mean([1 - float(np.dot(*rows)) for rows in (list(some) for _, some in own)])
        assert each["diversity"] == pytest.approx(distance, abs=1e-6)
        assert each["share"] == pytest.approx(each["diversity"] / found["base"]["diversity"])
    shutil.rmtree(step)
    told = works("round", "--n", "1", *AUTO, *BRIGHT, "--set", "finetune.strength_floor=1e9")
    assert "strength: 0.5, the least that was tried" in told.err
    assert numbers(folder_of(place / "runs/t", 1, "strength"))["strength"] == 0.5


@pytest.mark.parametrize("labels", ["swapped", "random"])
def test_a_control_experiment_is_one_in_its_strength_too(place, labels):
    works("round", "--n", "1", *AUTO, *BRIGHT, "--set", f"pair.labels={labels}")
    tried = numbers(folder_of(place / "runs/t", 1, "strength"))["tried"]
    if labels == "swapped":
        assert [one["value"] for one in tried] == [-one["score"] for one in tried]
    else:
        assert all(0 <= one["value"] < 1 and one["value"] != one["score"] for one in tried)


# -- as a step


def test_another_way_to_choose_trains_nothing_again_and_a_lost_shard_comes_back_the_same(place):
    works("round", "--n", "1", *AUTO, *BRIGHT)
    run = place / "runs/t"
    before, all_of_it = manifests(run), results(run)
    sample = folder_of(run, 1, "strength-sample")
    (sample / "manifest.json").unlink()
    for path in (*sample.glob("parts/*00001*"), *folder_of(run, 1, "strength").glob("manifest.json")):
        path.unlink()
    (sample / "work").mkdir()
    (folder_of(run, 1, "strength") / "work").mkdir()
    works("round", "--n", "1", *AUTO, *BRIGHT)
    assert results(run) == all_of_it and manifests(run).keys() == before.keys()
    works("finetune", "--round", "1", *AUTO, *BRIGHT, "--set", "finetune.strength_prompts=2")
    made = {re.sub(r"-\w{8}/.*", "", path) for path in manifests(run).keys() - before.keys()}
    assert made and all("strength" in name for name in made)


def test_fdpo_finetune_makes_the_strength_and_a_plan_counts_it(place):
    for stage in ("sample", "score", "pair", "finetune"):
        works(stage, *AUTO, *BRIGHT)
    assert numbers(folder_of(place / "runs/t", 1, "strength"))["tried"]
    told = works("plan", "--n", "2", *AUTO, *BRIGHT).out
    (line,) = [line for line in told.splitlines() if re.search(r"round 2\s.*strength-sample", line)]
    assert "96" in line  # 3 prompts x 2 pictures x 4 strengths x 4 steps
    own = session(*[text for text in (*AUTO, *BRIGHT) if text != "--set"])
    chain = own.chain(2)
    planned = {line.step.name: line.bytes for line in estimate(own, chain).lines if line.step.round == 2}
    works("round", "--n", "2", *AUTO, *BRIGHT)
    for name in ("strength-score-bright", "strength"):
        happened = sum(file["bytes"] for file in own.output(next(s for s in chain.of(2) if s.name == name)).manifest["files"].values())
        assert planned[name] == pytest.approx(happened, rel=0.15), name


def test_one_round_may_have_a_strength_of_its_own(place):
    chain = session("by_round={2: {finetune: {strength: 2.0}}}").chain(2)
    assert chain.rounds[1].strength is None and chain.rounds[2].strength is not None
    assert chain.rounds[1].adapter is chain.rounds[1].finetune


# -- refused


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_only_a_plain_lora_has_a_strength(place, kind):
    said = refused("round", "--set", f"finetune.adapter={kind}", "--set", "finetune.strength=auto")
    assert said.count("\n") <= 1 and "strength needs a plain LoRA" in said and kind in said


@pytest.mark.parametrize("value", ["0.0", "-1.0", "most", ".nan"])
def test_a_strength_is_auto_a_number_above_0_or_none(place, value):
    assert "should be auto, a number above 0, or null" in refused("round", "--set", f"finetune.strength={value}")


def test_a_floor_needs_something_that_measures_diversity(place):
    said = refused("plan", *AUTO, *BRIGHT, "--set", "finetune.strength_floor=0.5", "--set", "experts.clip_t=null")
    assert "finetune.strength_floor" in said and "CLIP" in said


def test_by_default_nothing_is_scaled():
    assert Finetune().strength is None
    assert validate({"finetune": {"strength": "auto"}}, "here").finetune.strength == "auto"
    with pytest.raises(UserError):
        validate({"finetune": {"strength": "auto", "adapter": "full"}}, "here")


# -- with the rest


def test_every_means_goes_through_three_rounds_together_with_replay(place):
    """Strength, a budget, saturated pairs, the guided policy and earlier rounds' candidates; a second call finds all of it done."""
    sets = [*AUTO, *BRIGHT]
    for text in ("finetune.replay=0.5", "finetune.divergence=1.0", "pair.saturate=0.9", "pair.over=all", "pair.margin=0.0", "sample.guidance=2.0",
                 "finetune.guidance=sampled", "finetune.objective={grpo: 1, anchor: 0.1}"):
        sets += ["--set", text]
    works("round", *sets)
    run = place / "runs/t"
    for number in (1, 2, 3):
        trained = numbers(folder_of(run, number, "finetune"))
        assert trained["divergence"] >= 0
        assert trained["replayed_groups"] > 0 if number > 1 else trained["replayed_groups"] == 0
        ended = f"Round {number} ended at {report.figure(trained['divergence'], 3)} nats a picture of 1, with beta "
        assert ended in (run / "report.html").read_text()
    assert "nothing to do" in works("round", *sets).err
