"""Each command killed before changes that it makes to the disk: the same command again ends as if nothing had been."""

import shutil
from pathlib import Path

import pytest
from whole_runs import Process, fdpo, works, works_seen

POINTS = 4  # of each command's writes that are tried; a multiple of what is between them and the last three always

EXPORTED = "exported"
COMMANDS = {
    "finetune --pairs": ["finetune", "--pairs", "pairs/set", "--set", "finetune.epochs=1", "--set", "finetune.objective=diffusion_dpo",
                         "--set", "finetune.noise=fresh"],
    "export-pairs of a run": ["export-pairs", "csv", EXPORTED, "--round", "1"],
    "export-pairs of a set": ["export-pairs", "folders", EXPORTED, "--from", "pairs/set"],
    "import": ["import", "csv", "given/pairs.csv", "--out", EXPORTED],
    "export": ["export", EXPORTED, "--round", "1"],
    "report": ["report"],
    "rescore": ["rescore", "--round", "1", "--weights", "clip_t=0.5,bright=0.5"],
    "clean": ["clean", "--yes"],
    "status --repair": ["status", "--repair"],
    "generate-sets": ["generate-sets", "--prompts", "prompts.txt", "--out", EXPORTED, "--set", "sample.steps=2"],
}


@pytest.fixture(scope="module")
def start(finished_place, tmp_path_factory) -> Path:
    """A working folder with a finished run of which a table is damaged, a stale step, a pair set and another program's files."""
    folder = tmp_path_factory.mktemp("start") / "here"
    shutil.copytree(finished_place, folder)
    import contextlib

    with contextlib.chdir(folder):
        works("finetune", "--round", "1", "--set", "finetune.beta=50")
        works("export-pairs", "csv", "given", "--round", "1")
        works("import", "csv", "given", "--out", "pairs/set")
        next((folder / "runs/t").glob("round-03/evaluate-*/parts/meters-00000.parquet")).write_bytes(b"harm")
        COMMANDS["import"][2] = "given"
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every result in a working folder: receipts and manifests hold seconds, and a page says when, so of those only that they are there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".lock",) and path.name != "run.owner":
            told = path.suffix in (".html",) or (path.suffix == ".json" and "round-" in str(path))
            found[path.relative_to(folder).as_posix()] = b"" if told else path.read_bytes()
    return found


def put(state: Path, place: Path) -> None:
    """Make a working folder what it was: at the same place each time, as some files name it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(state, place, symlinks=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_before_any_write_the_same_command_again_ends_as_if_nothing_had_been(start, tmp_path, monkeypatch, name):
    """What a kill leaves is what is there when it strikes: kept for many moments of one run, and for one of them by a real kill."""
    command, place, states = COMMANDS[name], tmp_path / "here", tmp_path / "states"
    put(start, place)
    monkeypatch.chdir(place)
    writes = works_seen(lambda number: None, *command)
    wanted = tree(place)
    assert writes > 3, "or nothing was counted"
    step = max(writes // POINTS, 1)
    moments = sorted({*range(1, writes + 1, step), writes - 2, writes - 1, writes})
    monkeypatch.chdir(tmp_path)
    put(start, place)
    monkeypatch.chdir(place)

    def keep(number: int) -> None:
        if number in moments:
            shutil.copytree(place, states / f"{number}", symlinks=True)

    assert works_seen(keep, *command) == writes
    for number in moments:
        monkeypatch.chdir(tmp_path)
        put(states / f"{number}", place)
        visible = {path.relative_to(place).parts[0] for path in place.rglob("*")} - {path.name for path in start.iterdir()}
        assert all(top.startswith(".") or top == EXPORTED for top in visible), f"litter after write {number}: {visible}"
        monkeypatch.chdir(place)
        told = fdpo(*command)
        assert told.code == 0, f"killed at write {number} of {writes}: {told.err}"
        found = tree(place)
        assert found.keys() == wanted.keys(), f"killed at write {number} of {writes}: {found.keys() ^ wanted.keys()}"
        assert found == wanted, f"killed at write {number} of {writes}: {[key for key in found if found[key] != wanted[key]]}"
    struck = moments[len(moments) // 2]
    monkeypatch.chdir(tmp_path)
    put(start, place)
    with Process(place, *command, kill_at=struck) as process:
        assert process.wait().code == -9, f"write {struck} of {writes}"
    killed = tree(place)
    put(states / f"{struck}", place)
    assert killed == tree(place), "what was kept is not what a kill leaves"


@pytest.mark.parametrize("name", ["export-pairs of a run", "import", "generate-sets"])
def test_when_it_is_done_the_same_command_says_so_and_another_is_refused(start, tmp_path, monkeypatch, name):
    place = tmp_path / "here"
    shutil.copytree(start, place)
    monkeypatch.chdir(place)
    works(*COMMANDS[name])
    before = tree(place)
    assert "is there already, and is what this" in works(*COMMANDS[name]).err
    assert tree(place) == before
    table = next(path for path in sorted((place / EXPORTED).rglob("*")) if path.suffix in (".parquet", ".csv"))
    table.write_bytes(table.read_bytes() + b"x")
    told = fdpo(*COMMANDS[name])
    assert told.code == 1 and EXPORTED in told.err
