"""What a run will cost: packed bytes against the bytes on disk, rows and forwards against what was done, a probe against the run."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.compute as pc
import pytest
from families import QUIET
from whole_runs import fdpo, session, works

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.generators.stable_diffusion import StableDiffusion
from fashiondpo_pipeline.terminal import size
from stages import Session
from stages.plan import Costs, Probed, duration, latents_kept

EVERY_PAIR = ("--set", "pair.margin=0", "--set", "pair.normalise=rank")
NOTHING = Probed(picture=0.0, adapter=0, widths={}, encoding=0, drawing=0, picturing=0, training=0, asking=0, updating=0, looking={}, loading={},
                 peaks={})


class Counting(Costs):
    """Costs of steps as if none were done, with the bytes of the pictures that were drawn."""

    def line(self, step):
        out = self.session.output(step)
        if step.stage == "sample":
            pictures = out.table("candidates", ["picture"])["picture"].combine_chunks()
            lengths = pc.binary_length(pc.struct_field(pictures, "bytes"))
            self.probed = replace(NOTHING, picture=pc.mean(lengths).as_py())
            found = self.bytes(step)
            self.probed = None
            return found
        return self.bytes(step)


def check_bytes(made: Session, steps, share: float = 0.01) -> None:
    costs = Counting(made)
    for step in steps:
        real = sum(file["bytes"] for file in made.output(step).manifest["files"].values())
        assert costs.line(step) == pytest.approx(real, rel=share), step.name


def test_every_table_of_a_run_is_as_large_as_planned(finished):
    made = session()
    steps = made.chain(3).steps
    check_bytes(made, [step for step in steps if step.stage not in ("pair", "prepare")])
    # fewer groups than prompts may have pairs, so that these are planned at most
    check_bytes(made, [step for step in steps if step.stage == "pair"], 0.05)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("knobs", [
    ["sample.save=2", "sample.path=true", "sample.predictions=true"],
    ["sample.save=2", "sample.path=false", "sample.eta=0", "finetune.objective=diffusion_dpo"],
])
@pytest.mark.filterwarnings(QUIET)
def test_latents_and_prompts_of_every_family_are_as_large_as_planned(family, knobs, place, request):
    model = request.getfixturevalue(f"tiny_{family}")
    sets = [f"generator.model={model}", "sample.height=16", "sample.width=16", *knobs]
    works("sample", "--round", "1", *(word for one in sets for word in ("--set", one)))
    made = session(*sets)
    chain = made.chain(1)
    check_bytes(made, [chain.encode, chain.rounds[1].sample])


def test_the_embedded_default_is_as_large_as_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["prompts.most_train=3", "prompts.most_held_out=2", "machine.device=cpu", "machine.threads=1"]
    works("sample", "--round", "1", *(word for one in few for word in ("--set", one)))
    made = Session(load(None, few), say=lambda text: None)
    chain = made.chain(1)
    check_bytes(made, [chain.encode, chain.rounds[1].sample])


def test_rounds_draw_a_part_of_the_prompts_each_the_next_and_begin_again_when_all_were_drawn(place):
    (place / "prompts.txt").write_text("\n".join(f"a {n}th dress" for n in range(40)))

    def drawn(made: Session, rounds: int) -> list[list[str]]:
        chain = made.chain(rounds)
        assert made.drawn(chain.rounds[1].held_out) == made.prompts["held-out"].rows
        return [[row["group"] for row in made.drawn(r.sample)] for r in chain.rounds[1:]]

    every = [row["group"] for row in session().prompts["train"].rows]
    assert drawn(session(), 2) == [every, every]
    part = len(every) // 3 + 1
    first, second, third, fourth = drawn(session(f"sample.prompts={part}"), 4)
    assert [len(found) for found in (first, second, third, fourth)] == [part] * 4
    assert not set(first) & set(second) and set(first) | set(second) | set(third) == set(every)
    assert len(set(first) & set(third)) == 3 * part - len(every) and set(fourth) & set(first)
    assert first == every[:part] and second == every[part : 2 * part]
    more = drawn(session(f"sample.prompts={part}", "by_round.2.sample.prompts=2"), 3)
    assert more[0] == first and set(more[1]) <= set(second) and len(more[1]) == 2 and set(second) - set(more[1]) <= set(more[2])


def test_a_part_of_the_prompts_is_planned_as_it_is_drawn(place):
    sets = ["sample.prompts=2", "pair.margin=0", "pair.normalise=rank"]
    for stage in ("sample", "score", "pair", "finetune"):
        works(stage, "--round", "1", *(f"--set={one}" for one in sets))
    made = session(*sets)
    costs, r = Costs(made), made.chain(1).rounds[1]
    assert costs.rows(r.sample) == made.output(r.sample).manifest["numbers"]["candidates"] < len(made.prompts["train"]) * 4
    assert costs.rows(r.finetune) == made.output(r.finetune).manifest["numbers"]["steps"]
    check_bytes(made, [r.sample, *r.scores.values()])


@pytest.mark.slow
def test_many_shards_are_also_planned_as_one_file(place):
    (place / "prompts.txt").write_text("\n".join(f"a {n}th dress" for n in range(80)))
    sets = ["machine.shard=1", "prompts.held_out=0.1", "sample.candidates=2", "sample.steps=1"]
    for stage in ("sample", "score"):
        works(stage, "--round", "1", *(f"--set={one}" for one in sets))
    made = session(*sets)
    r = made.chain(1).rounds[1]
    assert (made.run.root / r.sample.folder / "whole/candidates.parquet").is_file()
    check_bytes(made, [r.sample, *r.scores.values()])


@pytest.mark.slow
def test_negative_replayed_and_live_forwards_are_counted_as_they_are_done(place):
    sets = ["finetune.negative=true", "finetune.replay=0.5", "sample.guidance=2.0", "sample.guidance_interval=[0.0, 0.5]",
            "finetune.objective={step_dpo: 1, anchor: 0.1}", "finetune.micro_batch=3", "sample.candidates=2"]
    words = [f"--set={one}" for one in sets]
    works("round", "-n", "2", *EVERY_PAIR, *words)
    made = session(*sets, *EVERY_PAIR[1::2])
    costs, chain = Costs(made), made.chain(2)
    for r in chain.rounds[1:]:
        assert r.negative is not None and r.negative.name == "negative"
        for step in (r.finetune, r.negative):
            numbers = made.output(step).manifest["numbers"]
            if numbers["groups"] - numbers["replayed_groups"] < len(made.prompts["train"]):
                continue  # a tie gave a group no pair
            assert costs.rows(step) == numbers["steps"]
            passed, asked = costs._trained(step)
            assert costs._groups(step) == numbers["groups"]
            knobs = step.config
            columns = 2  # steps 1 and 2 of 4 lie in the window; guidance acts in the first of them, so 1.5 branches
            assert passed == 1.5 * numbers["policy_rows"] == 1.5 * knobs["epochs"] * numbers["groups"] * 2 * columns
            assert asked == 1.5 * (numbers["reference_rows_before"] + numbers["reference_rows_in_training"])
    assert made.output(chain.rounds[2].finetune).manifest["numbers"]["replayed_groups"] > 0


def test_latents_kept_by_hand():
    knobs = {"steps": 10, "path": True, "predictions": False}
    assert latents_kept(knobs, list(range(10))) == 11, "x_0 and ten x_t, each of which is where the one before led"
    assert latents_kept(knobs, [0, 3, 9]) == 1 + 3 + 2, "where 0 and 3 led; where 9 led is x_0"
    assert latents_kept(knobs | {"path": False, "predictions": True}, [0, 3, 9]) == 1 + 3 + 3


@pytest.mark.slow
def test_a_probe_says_seconds_and_memory_and_the_round_compares_them(place):
    told = works("plan", "-n", "1", "--probe")
    plan = json.loads((place / "runs/t/plan.json").read_text())
    made = session()
    chain = made.chain(1)
    assert plan["steps"].keys() == {step.folder for step in chain.steps}
    for step in chain.steps:
        line = plan["steps"][step.folder]
        if step.stage not in ("pair", "evaluate", "disturb"):
            assert math.isfinite(line["seconds"]) and 0 < line["seconds"] < 600
            assert 10**7 < line["peak"] < 10**11
    assert "by the probe, for one process on this machine" in told.err
    assert "peak memory (RSS)" in told.out
    assert [line.split()[:3] for line in told.out.splitlines()[2:]] == [["round", str(step.round), step.name] for step in chain.steps]

    told = works("round", "-n", "1")
    rows = {line.split()[0]: line for line in told.out.partition("planned, and what happened")[2].splitlines()[2:]}
    assert list(rows) == ["sample", "evaluate", "score", "pair", "finetune"]
    sample = [chain.encode, chain.rounds[1].sample]
    written = sum(file["bytes"] for step in sample for file in made.output(step).manifest["files"].values())
    assert size(written) in rows["sample"]
    assert sum(plan["steps"][step.folder]["bytes"] for step in sample) == pytest.approx(written, rel=0.05)
    assert "planned, and what happened" not in works("round", "-n", "1", "--set", "finetune.beta=7").out.partition("seconds")[0]


@pytest.mark.slow
def test_seconds_are_those_of_the_calls_that_a_run_will_make(place, monkeypatch):
    """Where each call of the denoiser takes 0.2 s and all else next to nothing, seconds can be counted by hand."""
    call = StableDiffusion.call
    monkeypatch.setattr(StableDiffusion, "call", lambda *args: time.sleep(0.2) or call(*args))
    works("plan", "-n", "1", "--probe")
    steps = json.loads(Path("runs/t/plan.json").read_text())["steps"]
    planned = {step.name: steps[step.folder]["seconds"] for step in session().chain(1).of(1)}
    assert 2.4 < planned["sample"] < 9, "3 shards of 8 candidates: a tile each, 4 steps: 12 calls"
    assert 2.4 < planned["held-out-sample"] < 9, "3 shards of 4 candidates: a tile each, filled up"
    assert 2.4 < planned["finetune"] < 9, "2 epochs of 6 groups, 8 rows a step: 12 calls"


@pytest.mark.slow
def test_a_probe_leaves_the_run_as_a_run_without_it_would_be(place, finished_place):
    works("plan", "-n", "1", "--probe")
    works("round", "-n", "1")
    made = {path.relative_to(place): path.read_bytes() for path in place.glob("runs/t/round-*/*/parts/*.parquet")}
    assert made and {path: (finished_place / path).read_bytes() for path in made} == made


def test_a_plan_of_a_run_in_use_does_not_probe(place):
    made = session()
    with made.run.lock():
        assert "is in use by" in fdpo("plan", "--probe").err
    assert not Path("runs/t/plan.json").exists()


def test_durations_are_told_in_the_unit_that_fits():
    assert [duration(s) for s in (0.4, 119, 120, 7199, 7200)] == ["0 s", "119 s", "2 min", "120 min", "2.0 hours"]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.filterwarnings(QUIET)
def test_a_file_of_each_kind_is_as_large_as_planned(kind, family, place, request, tmp_path):
    model = request.getfixturevalue(f"tiny_{family}")
    made = session(f"generator.model={model}", "sample.height=16", "sample.width=16", f"finetune.adapter={kind}")
    generator, knobs = made.generator(), made.config.finetune
    adapters.attach(generator.denoiser, knobs.rank, float(knobs.rank), knobs.targets, 0, kind)
    generator.save_adapter(tmp_path / "adapter")
    written = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert Costs(made)._adapter == pytest.approx(written, rel=0.03)
