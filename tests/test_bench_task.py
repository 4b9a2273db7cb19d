"""The bench of the task: its lines can be drawn as they stand, and what it makes of figures."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.grid import Grid

SPEC = importlib.util.spec_from_file_location("bench_task", Path(__file__).parent / "bench/bench_task.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)
G, K = 20, 8


class Checked(list):
    """Stands for the targets: what was checked, and whether it holds."""

    def check(self, what, found, wanted, holds):
        self.append((what, bool(holds)))

    def not_here(self, what, wanted, why):
        self.append((what, None))


def line(setting, right, best=None, reward=0.0):
    """One on which so large a share of each prompt's pictures is right."""
    table = np.tile(np.arange(K) < right * K, (G, 1)).astype(float)
    of_n = np.full((G, K), right if best is None else best)
    train = SimpleNamespace(grid=Grid(None, {"a": np.full((G, K), reward)}))
    return bench.Line(setting, train, SimpleNamespace(right=table), of_n, 10, 1.0)


def checked(*lines):
    found = Checked()
    bench.check(found, list(lines), bench.rewards(list(lines), {"a": 1.0}), 0.95)
    return dict(found)


@pytest.mark.parametrize("setting", bench.GRID)
def test_every_line_is_a_setting_that_both_splits_are_drawn_with(setting, tmp_path):
    other = ["evaluate.guidance=9", "evaluate.steps=3", "by_round={1: {sample: {steps: 5}}}"]
    session = bench.session_of(tmp_path, setting, 4, other)
    chain = session.chain(1)
    for step in (chain.rounds[0].held_out, chain.rounds[1].sample):
        assert bench.Setting(*(step.config[name] for name in bench.Setting._fields)) == setting
        assert step.config["candidates"] == 4


def test_the_shipped_setting_is_the_first_line_and_comes_once():
    own = load(None, ["sample.guidance=2", "sample.steps=20", "sample.eta=0.5"])
    lines = bench.lines_of(own, bench.GRID)
    assert lines[0] == bench.Setting(2, 20, 0.5) and len(lines) == len(set(lines)) == len(bench.GRID)
    assert bench.lines_of(load(None, ["sample.steps=7"]), [])[0].steps == 7
    assert bench.Setting.parsed("4,20,1,0.7") == bench.Setting(4, 20, 1, 0.7)
    assert str(bench.Setting.parsed("4,20,1")) == "guidance 4, 20 steps, eta 1"


def test_training_prompts_alone_choose_and_each_part_of_the_rule_can_fail():
    shipped, other = bench.Setting(1, 10, 1), bench.Setting(2, 10, 1)
    right, at_shipped, at_chosen, same = (
        "right at the chosen setting", "best of 8 at the shipped setting", "best of 8 at the chosen setting",
        "shipped is the chosen setting")
    holds = dict.fromkeys((right, at_shipped, at_chosen, same), True)
    assert checked(line(shipped, 0.75, 0.95, reward=1.0), line(other, 1.0, 1.0)) == holds
    # what is right held out does not choose: the other is taken, though to the judge it is no better
    found = checked(line(shipped, 0.75, 0.95), line(other, 0.5, 0.91, reward=1.0))
    assert found == holds | {at_chosen: False}
    assert checked(line(shipped, 0.5, 0.95), line(other, 0.75, 0.95, reward=1.0)) == holds | {same: False}
    assert checked(line(shipped, 0.875, 0.91)) == holds | {right: False, at_shipped: False, at_chosen: False}


def test_of_fewer_pictures_the_best_of_8_is_not_told():
    one = line(bench.Setting(1, 10, 1), 0.5)
    assert checked(replace(one, best=one.best[:, :4]))["best of 8 at the shipped setting"] is None
