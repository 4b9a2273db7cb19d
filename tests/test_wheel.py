"""The built wheel works from an empty folder, and the embedded default travels with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the project's own backend and unpacked as pip would; its dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def fdpo(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-m", "fashiondpo_pipeline", *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_library_the_recipes_and_the_embedded_default(installed: Path) -> None:
    for name in ("fashiondpo_pipeline/_data/fashion_mini/generator/model_index.json", "fashiondpo_pipeline/templates/report.html.j2",
                 "stages/sample.py"):
        assert (installed / name).is_file(), name
    assert not (installed / "tests").exists() and not (installed / "data").exists()


def test_init_and_plan_from_an_empty_folder_use_the_wheel_s_own_data(installed: Path, tmp_path: Path) -> None:
    assert fdpo(installed, tmp_path, "init").returncode == 0
    where = subprocess.run(
        [sys.executable, "-c", "from fashiondpo_pipeline.embedded import locate; print(locate('embedded:fashion_mini/generator'))"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=True,
    ).stdout.strip()
    assert Path(where).is_relative_to(installed)
    planned = fdpo(installed, tmp_path, "plan")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.slow
def test_a_round_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    small = ["prompts.most_train=6", "prompts.most_held_out=3", "sample.candidates=4", "evaluate.pictures=2", "finetune.epochs=1", "pair.margin=0.1"]
    assert fdpo(installed, tmp_path, "init").returncode == 0
    done = fdpo(installed, tmp_path, "round", "--n", "1", *(word for knob in small for word in ("--set", knob)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/demo/report.html").is_file()
    assert "win rate" in done.stdout
