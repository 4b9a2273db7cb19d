"""`fdpo clean`: it says what would go, takes that alone, and never what somebody said or a present claim needs."""

import json
import os
import shutil

import pytest
from whole_runs import Process, folder_of, refused, results, works

from fashiondpo_pipeline.annotations import Notebook
from stages import clean


@pytest.fixture
def beside(finished):
    """A finished run, with saved pairs, answers, and a finetune under another beta, which nothing needs."""
    run = finished / "runs/t"
    works("rescore", "--round", "1", "--weights", "clip_t=0.5,bright=0.5")
    Notebook(run / "annotations", "ann", "here").add("g", 0, 1, "left")
    works("finetune", "--round", "1", "--set", "finetune.beta=50")
    return run


def claim(step):
    return json.loads((step / "claim.json").read_text())["config"]


def listing(run):
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def test_it_says_what_would_go_and_touches_nothing(beside):
    before = listing(beside)
    told = works("clean")
    (stale,) = (path for path in beside.glob("round-01/finetune-*") if claim(path)["beta"] == 50)
    assert stale.name in told.out and "pair-" not in told.out
    assert "1 results, " in told.err and told.err.endswith("`fdpo clean --yes` frees them; nothing has been touched\n")
    assert listing(beside) == before


def test_yes_takes_that_alone_and_a_second_time_nothing(beside, finished_place):
    before, kept = listing(beside), results(finished_place / "runs/t")
    assert works("clean", "--yes").err.startswith("1 results gone, ")
    gone = before - listing(beside)
    assert len({path.split("/")[1] for path in gone}) == 1 and all(path.startswith("round-01/finetune-") for path in gone)
    assert kept.items() <= results(beside).items()
    assert works("clean", "--yes").err == "nothing to free: every result is of these settings\n"
    assert "nothing to do" in works("round").err
    assert "every file is as it was written\n" in works("status", "--verify").err


def test_another_configuration_named_keeps_its_results(beside):
    shutil.copy("pipeline.yaml", "other.yaml")
    with open("other.yaml") as file:
        text = file.read()
    with open("other.yaml", "w") as file:
        file.write(text.replace("beta: 100.0", "beta: 50.0"))
    assert works("clean", "--keep", "other.yaml").err == "nothing to free: every result is of these settings\n"


def test_settings_that_nothing_was_made_with_take_nothing(beside):
    before = listing(beside)
    assert "no round is of these settings, so all would go" in refused("clean", "--yes", "--set", "seed=99")
    assert listing(beside) == before


def test_what_was_trained_on_saved_pairs_stays(beside):
    (saved,) = (path for path in beside.glob("round-01/pair-*") if "bright" in claim(path)["weights"])
    works("finetune", "--round", "1", "--pairs", saved.name[-8:])
    works("clean", "--yes")
    assert saved.is_dir() and len(list(beside.glob("round-01/finetune-*"))) == 2


def test_a_run_in_use_is_not_cleaned(beside):
    with Process(beside.parent.parent, "round", "--n", "4", pause="round-04/sample-*/parts/00000.json") as process:
        process.wait_paused()
        assert "is in use by process" in refused("clean", "--yes")


def test_killed_in_the_middle_it_leaves_no_half_step(beside, monkeypatch):
    monkeypatch.setattr(clean.shutil, "rmtree", lambda *_, **__: None)  # as killed before anything was deleted
    works("clean", "--yes")
    monkeypatch.undo()
    os.chdir(beside.parent.parent)
    assert "every file is as it was written\n" in works("status", "--verify").err
    works("clean", "--yes")
    assert not (beside / clean.GONE).exists()
    assert folder_of(beside, 1, "finetune")
