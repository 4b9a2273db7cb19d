"""The bench of objectives: its table of settings can be run as it stands, and how it chooses among them."""

import importlib.util
from pathlib import Path

import pytest

from fashiondpo_pipeline.config import Config, load, validate
from fashiondpo_pipeline.objectives import BUILTIN
from fashiondpo_pipeline.terms import terms_of

SPEC = importlib.util.spec_from_file_location("bench_objectives", Path(__file__).parent / "bench/bench_objectives.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def configured(job) -> Config:
    return bench.Where(Path("nowhere"), None, (), None).session(job).config


@pytest.mark.parametrize("row", bench.ROWS)
def test_every_row_has_six_settings_that_differ_and_can_be_run(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [configured(bench.Job(row, number, 7)) for number in range(len(bench.ROWS[row]))]
    assert len(found) == 6
    assert len({str(config.model_dump(exclude={"experts"})) for config in found}) == 6
    for config in found:
        assert terms_of(config.finetune)
        assert (config.seed, config.rounds) == (7, 1)


def test_every_objective_that_tunes_by_itself_has_a_row():
    by_itself = set(BUILTIN) - {"anchor", "winner_rise"}  # which only hold back
    assert by_itself == {setting["finetune.objective"] for settings in bench.ROWS.values() for setting in settings}


def result(row, number, seed, best_of, **more):
    return {"row": row, "number": number, "seed": seed, "best_of_value": best_of, "best_of_most": 8, "quality": 1.0, "quality_base": 0.0} | more


def test_the_two_best_on_the_screen_go_on_and_beyond_all_that_can_be_told_is_best():
    screen = [result("a", n, 7, value) for n, value in enumerate([1.2, 3.0, None, 0.5])] + [result("b", 0, 7, 1.0)]
    assert bench.best_settings(screen) == {"a": [2, 1], "b": [0]}


def test_what_is_reported_is_of_the_seeds_that_did_not_choose():
    results = [result("a", 0, 7, 9.0), result("a", 1, 7, 5.0), result("a", 0, 8, 1.0), result("a", 0, 9, 2.0), result("a", 1, 8, 3.0),
               result("a", 1, 9, 2.5), result("b", 0, 7, 4.0)]
    found = bench.reported(results, 7)
    assert list(found) == ["b", "a"]
    assert [(one["number"], one["seed"]) for one in found["a"]] == [(1, 8), (1, 9)]
    assert [one["seed"] for one in found["b"]] == [7]  # it has no other


def test_a_setting_that_lacks_a_seed_is_not_reported_beside_one_that_has_all():
    results = [result("a", 0, 8, 9.0), result("a", 1, 8, 2.0), result("a", 1, 9, 2.0)]
    assert [(one["number"], one["seed"]) for one in bench.reported(results, 7)["a"]] == [(1, 8), (1, 9)]


def test_a_setting_changes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = validate(load(None).model_dump(mode="json") | {"rounds": 1}, "here")
    job = bench.Job("step_dpo", 3, 7)
    theirs = configured(job)
    told = {key.partition(".")[2] for key in job.setting}
    assert {name for name in type(plain.finetune).model_fields if getattr(plain.finetune, name) != getattr(theirs.finetune, name)} <= told
    assert plain.sample == theirs.sample and plain.pair == theirs.pair and plain.experts == theirs.experts
