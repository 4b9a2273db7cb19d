"""A plug-in is a small package: installed, its expert keeps the contract, is listed, and scores a run by its name."""

import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from whole_runs import folder_of, refused, table, works

from fashiondpo_pipeline import experts, testing

SOURCE = Path(__file__).parent / "plugin_symmetry"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of installed packages with the plug-in in it, as pip leaves it; built from a copy, without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--target", folder / "site", folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("fdpo_symmetry", None)


def test_it_is_about_forty_lines():
    assert len((SOURCE / "fdpo_symmetry.py").read_text().splitlines()) <= 45


def test_it_is_not_there_before_it_is_installed(place):
    assert refused("plan", "--set", "experts.even={use: symmetry}").startswith("no expert called 'symmetry'; known: ")


def test_it_keeps_the_contract_and_measures_what_it_says(installed):
    expert = experts.make("even", "symmetry", {"power": 1.0})
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    half = np.full((32, 32, 3), 255, np.uint8)
    half[:, :16] = 0
    even = np.full((32, 32, 3), 255, np.uint8)
    even[4:20, 8:24] = (200, 0, 0)
    pictures = [noise, half, even, np.full((8, 8, 3), 255, np.uint8)]
    rows = [{"group": f"g{n}", "candidate": 0, "prompt": "x", "picture": Image.fromarray(picture)} for n, picture in enumerate(pictures)]
    testing.check_expert(expert, rows)
    found = expert(rows)
    assert found[1] == pytest.approx(0) and found[2] == 1 and math.isnan(found[3][0])


def test_it_is_listed_with_its_package(place, installed):
    told = json.loads(works("experts", "--json", "--set", "experts.even={use: symmetry, options: {power: 2.0}}").out)
    (kind,) = [kind for kind in told["kinds"] if kind["name"] == "symmetry"]
    assert kind["origin"] == "package fdpo-symmetry 0.3" and kind["version"] == 1 and kind["needs"] == ["picture"] and kind["range"] == [0, 1]
    assert kind["options"] == {"power": {"default": 1.0}} and kind["fault"] is None
    assert told["experts"][-1] == {"name": "even", "use": "symmetry", "weight": 0.0, "options": {"power": 2.0}, "version": 1,
                                   "needs": ["picture"], "reads": []}


def test_it_scores_and_makes_pairs_in_a_round(place, installed):
    sets = ("--set", "experts.even={use: symmetry}", "--set", "pair.weights={even: 1.0}", "--set", "pair.margin=0.1",
            "--set", "evaluate.judge=even", "--set", "finetune.epochs=1")
    for command in ("sample", "score", "pair"):
        works(command, "--round", "1", *sets)
    step = folder_of(place / "runs/t", 1, "score-even")
    scores = table(step, "scores")
    assert len(scores) == 24 and all(0 <= score <= 1 for score in scores["score"].to_pylist())
    manifest = json.loads((step / "manifest.json").read_text())
    said = manifest["expert"].pop("contract")
    assert said.pop("code") and said == {"needs": ["picture"], "files": {}, "prepares": False}
    assert manifest["expert"] == {"use": "symmetry", "options": {}, "version": 1, "range": [0, 1], "files": {}, "preprocessing": None}
    assert len(table(folder_of(place / "runs/t", 1, "pair"), "pairs")) > 0


def test_the_environment_is_as_before():
    assert "fdpo-symmetry" not in {found.name for found in importlib.metadata.distributions()}
