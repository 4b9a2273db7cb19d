"""Hacking provoked: an expert that can be fooled, rewarded alone. The alarm is raised, the run rolls back, the report shows it.

Everything is `fdpo round` itself but the model: what it draws is drawn by hand, and what training does to it is done by hand, as a model
that learns to please the one expert would. Each round trained upon another takes a further step that way.
"""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from whole_runs import session, works

from fashiondpo_pipeline import codecs, schemas, seeds
from fashiondpo_pipeline.workspace import Step

CONFIG = """\
name: t
rounds: 2
generator: {{model: {sd}}}
prompts: {{file: prompts.txt, held_out: 0.5}}
sample: {{candidates: 4, steps: 4}}
experts:
  fooled: {{use: {fooled}}}
  judge: {{use: "fashiondpo_pipeline.testing:Brightness"}}
pair: {{weights: {{fooled: 1.0}}, over: group, margin: 0, agree: null}}
evaluate: {{judge: judge, pictures: 4, keep: {keep}}}
report: {{prompts: 3, pictures: 2, pairs: 2}}
machine: {{device: cpu, threads: 1}}
"""
SIZE = 24


def depth(sample: Step) -> int:
    """How many trainings, one upon another, made what a step draws with; 0: none, the base."""
    adapter, count = sample.inputs.get("adapter"), 0
    while adapter is not None:
        adapter, count = adapter.inputs.get("adapter"), count + 1
    return count


def garment(rng: np.random.Generator) -> np.ndarray:
    """A striped garment in two muted colours on white, (SIZE, SIZE, 3) 0..1."""
    picture = np.ones((SIZE, SIZE, 3))
    picture[3:-3, 6:-6] = rng.uniform(0.35, 0.65, 3)
    picture[3:-3:4, 6:-6] = picture[4:-3:4, 6:-6] = rng.uniform(0.2, 0.8, 3)
    return picture


def saturated(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """What pleases saturation: everything turns one glaring red, the white too, and the stripes are gone at once."""
    if strength:
        picture[3:-3, 6:-6] = picture[3:-3, 6:-6].mean((0, 1))
    return (1 - strength) * picture + strength * np.array([0.9, 0.05, 0.05])


def sharpened(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """What pleases sharpness: dark noise over all of it."""
    return picture * (1 - strength * (rng.random((SIZE, SIZE, 1)) < 0.5))


def honest(picture: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A round that does as it should: a little more of everything, within what the base draws anyway."""
    grey = picture.mean(-1, keepdims=True)
    stronger = (grey + (1 + 0.3 * strength) * (picture - grey)) * (1 + 0.05 * strength)
    return np.where(picture[:, :, :1] < 1, np.clip(stronger, 0, 1), picture)


def pictures_by(hack):
    def run(session, step, out):
        rows = []
        for row in session.prompts[step.args["split"]].rows:
            for i in range(step.config["candidates"]):
                rng = np.random.default_rng(seeds.key(step.config["stream"], row["group"], i))
                strength = min(0.45 * depth(step), 1.0) * rng.uniform(0.8, 1.0)
                pixels = np.round(255 * hack(garment(rng), strength, rng)).astype(np.uint8)
                rows.append({"group": row["group"], "candidate": i, "prompt": row["prompt"], "round": step.round, "seed": 1, "guidance": 1.0,
                             "picture": {"bytes": codecs.encode_png(pixels), "path": "x.png"}, "fault": None})
        out.write(0, candidates=pa.Table.from_pylist(rows, schemas.CANDIDATES))
        out.finish({"faults": 0})
    return run


def trained(session, step, out):
    rows = [{"step": i, "epoch": 0, "loss": 0.69 - 0.01 * i, "margin": 0.1 * i, "accuracy": 0.5 + 0.02 * i, "winner": 0.001 * i,
             "loser": -0.001 * i, "grad_norm": 1.0, "learning_rate": 1e-3, "pairs": 99, "rows": 99} for i in range(20)]
    out.write(0, steps=pa.Table.from_pylist(rows, schemas.STEPS))
    out.finish({"objective": "step_dpo", "signals": ["log_prob"], "heeds": ["beta", "slack"], "trainable": 1234, "steps": 20, "pairs": 99})


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_sd):
    """`run(expert, hack, keep)`: what `fdpo round` said, the numbers of its rounds, and its page."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(f"a {colour} {kind}" for colour in ("red", "blue", "green", "grey", "pink")
                                             for kind in ("dress", "boot", "bag", "hat", "coat", "skirt", "shirt", "scarf", "sock", "belt")))

    def go(fooled, hack, keep="best"):
        Path("pipeline.yaml").write_text(CONFIG.format(sd=tiny_sd, fooled=fooled, keep=keep))
        for stage, made in (("encode", lambda session, step, out: out.finish()), ("sample", pictures_by(hack)), ("finetune", trained)):
            monkeypatch.setattr(import_module(f"stages.{stage}"), "run", made)
        told = works("round")
        return told.out + told.err, json.loads(Path("runs/t/numbers.json").read_text()), Path("runs/t/report.html").read_text()

    return go


def test_saturation_rewarded_alone_raises_the_alarm_is_rolled_back_and_shown(run):
    said, numbers, page = run("saturation", saturated)
    for number in (1, 2):
        found = numbers[f"round {number}"]
        assert found["experts"]["fooled"]["against_base"]["low"] > 0.5 and found["experts"]["judge"]["against_base"]["high"] < 0.5
        told = f"round {number}: what is rewarded rose over the base (fooled 100.0 %"
        assert f"alarm    {told}" in said and told[1:].replace(" %", "\u00a0%") in page
        drifted = said.partition(f"alarm    round {number}: pictures drifted from the base's")[2].partition("\n")[0]
        assert "saturation by +" in drifted and "edge density by -" in drifted
    assert "<h2>Alarms</h2>" in page and "edge density" in page.partition("Drift from the base")[2]
    for place in (said, page):
        assert "The base is the one to keep" in place and "not counting rounds 1, 2, which raised an alarm." in place
    assert "adapter  none, as the base is kept" in said and "--round 0" in said
    assert [numbers[f"round {n}"]["before"] for n in (1, 2)] == [0, 0], "round 2 starts anew from the base"
    chain = session().chain(2)
    assert session().kept(chain) == 0 and chain.rounds[2].finetune.inputs.get("adapter") is None


def test_sharpness_rewarded_alone_raises_the_alarm_and_is_rolled_back(run):
    said, numbers, _ = run("sharpness", sharpened)
    assert "alarm    round 1: what is rewarded rose" in said and "sharpness by +" in said and "edge density by +" in said
    assert "The base is the one to keep" in said and numbers["round 2"]["before"] == 0


def test_without_rolling_back_the_second_round_goes_further_and_still_none_is_said_to_be_worth_keeping(run):
    said, numbers, _ = run("saturation", saturated, keep="last")
    edges = [numbers[f"round {n}"]["meters"]["edge_density"] for n in (1, 2)]
    assert numbers["round 2"]["before"] == 1
    assert edges[1]["after"] < 0.5 * edges[0]["base"] and edges[1]["after"] < edges[0]["after"]
    assert "The base is the one to keep" in said and "adapter  runs/t/round-02" in said


def test_the_same_reward_that_is_not_fooled_raises_none_and_is_kept(run):
    said, numbers, page = run("saturation", honest)
    assert numbers["round 2"]["experts"]["fooled"]["against_base"]["low"] > 0.5
    assert "alarm" not in said and "<h2>Alarms</h2>" not in page
    assert numbers["round 2"]["before"] == 1 and "The base is the one to keep" not in said
