"""What is not finished goes on, what is damaged is found and made again, and a run ends as if nothing had happened."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from whole_runs import Process, Told, fdpo, manifests, refused, results, works

from fashiondpo_pipeline import adapters, workspace

KILLS = 14


def progress(run: Path) -> int:
    """How many shards, checkpoints and steps are on disk, whole."""
    return sum(1 for end in ("parts/*.json", "work/*.pt", "manifest.json") for _ in run.glob(f"round-*/*/{end}"))


def begun(run: Path) -> Path | None:
    """The folder of the step that was at work."""
    found = [path.parent for path in run.glob("round-*/*/claim.json") if not (path.parent / "manifest.json").is_file()]
    return max(found, default=None)


def kill_after_writing(place: Path, pattern: str) -> Path:
    """`fdpo round`, killed just after it has written such a file; the folder of the step that it was in."""
    with Process(place, "round", pause=pattern) as process:
        process.wait_paused()
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
    return begun(place / "runs/t")


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(place, finished_place, tmp_path_factory):
    """Two named moments, and each time after as many changes of the disk as make so many pieces of a straight run."""
    run, struck = place / "runs/t", []
    straight = prepare_copy(place, tmp_path_factory)
    with Process(straight, "round", kill_at=0) as process:
        assert process.wait().code == 0
        piece = process.writes // KILLS
    between_shards = kill_after_writing(place, "sample-*/parts/00000.json")
    assert not (between_shards / "parts/00001.json").exists()
    between_checkpoints = kill_after_writing(place, "finetune-*/work/checkpoint.pt")
    assert (between_checkpoints / "work/checkpoint.pt").is_file()
    assert not (between_checkpoints / "adapter").exists()
    while True:  # a process begins with some changes that it makes each time, so that each gets less far than a piece
        with Process(place, "round", kill_at=piece) as process:
            code = process.wait().code
        if code == 0:
            break
        assert code == -signal.SIGKILL
        struck.append(begun(run))
        assert len(struck) < 10 * KILLS, "it does not get on"

    assert len(struck) >= KILLS - 5
    assert len({path.name for path in struck if path}) >= 5, "the kills should be spread over many steps"
    assert {path.parent.name for path in struck if path} >= {"round-01", "round-02", "round-03"}
    assert results(run) == results(finished_place / "runs/t")
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("work"))


def prepare_copy(place: Path, tmp_path_factory) -> Path:
    """Another working folder with the same configuration."""
    folder = tmp_path_factory.mktemp("straight")
    for name in ("pipeline.yaml", "prompts.txt"):
        shutil.copy(place / name, folder / name)
    return folder


def works_in(place: Path, *args: str) -> int:
    with Process(place, *args) as process:
        return process.wait().code


def test_a_second_process_is_told_at_once_and_the_first_goes_on(place, finished_place):
    with Process(place, "round", "--n", "1", pause="held-out-sample-*/parts/00000.json") as first:
        first.wait_paused()
        for command in (["round"], ["sample"], ["status", "--repair"]):
            assert refused(*command) == f"runs/t is in use by process {first.pid}: wait until it ends, or use another --name"
        assert fdpo("status").code == 0
        first.send(signal.SIGCONT)
        assert first.wait().code == 0
    assert not (place / "runs/t/run.owner").exists()
    whole = results(finished_place / "runs/t")
    assert {name: data for name, data in results(place / "runs/t").items() if name != "numbers.json"}.items() <= whole.items()


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(place, finished_place):
    with Process(place, "round", "--n", "1", pause="finetune-*/work/checkpoint.pt") as process:
        process.wait_paused()
        process.send(signal.SIGINT)
        process.send(signal.SIGCONT)
        told = process.wait()
    assert told.code == 130
    said = " ".join(told.err.split())  # it is wrapped to the terminal
    assert said.endswith("fdpo: interrupted: what was finished is kept; the same command goes on from there")
    assert "Traceback" not in told.err + told.out
    assert "steps are done, going on with round 1 finetune" in works("round", "--n", "1").err
    adapter = "round-01/finetune-*/adapter/*.safetensors"
    (one,), (other,) = ((folder / "runs/t").glob(adapter) for folder in (place, finished_place))
    assert one.read_bytes() == other.read_bytes()


# -- damage


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_every_damaged_file_is_named_dropped_on_request_and_made_again_to_the_byte(finished):
    run = finished / "runs/t"
    whole, steps = results(run), manifests(run)
    damage = {
        "round-00/held-out-sample-????????/parts/candidates-00001.parquet": alter,
        "round-01/sample-*/parts/trajectories-00001.parquet": cut,
        "round-01/score-bright-*/parts/scores-00002.parquet": Path.unlink,
        "round-02/pair-*/parts/pairs-00000.parquet": alter,
        "round-02/finetune-*/adapter/pytorch_lora_weights.safetensors": alter,
        "round-03/evaluate-*/parts/meters-00000.parquet": cut,
    }
    complaints = []
    for pattern, harm in sorted(damage.items()):
        (path,) = run.glob(pattern)
        size, shown = path.stat().st_size, path.relative_to(finished)
        harm(path)
        complaints.append({alter: f"{shown}: altered", cut: f"{shown}: {size - 100:,} bytes instead of {size:,}",
                           Path.unlink: f"{shown}: missing"}[harm])

    told = fdpo("status", "--verify")
    assert told.code == 1
    *named, last = told.err.splitlines()
    assert sorted(named) == sorted(complaints)
    assert last == "fdpo: 6 damaged files: `fdpo status --repair` drops what is damaged, `fdpo round` then makes it again"
    told = works("status", "--repair")
    assert sorted(told.err.splitlines()[:-1]) == sorted(complaints)
    assert told.err.splitlines()[-1] == "6 damaged files dropped: `fdpo round` makes what is missing again"
    assert len(steps) - len(manifests(run)) == 6
    told = works("round")
    assert f"{len(steps) - 6} of {len(steps)} steps are done, going on with round 0 held-out-sample" in told.err
    assert results(run) == whole
    # the remade files are the same, so what was made of them stays as it is
    kept = {name: manifest for name, manifest in manifests(run).items() if manifest == steps[name]}
    assert len(kept) >= len(steps) - 6
    assert works("status", "--verify").err == "every file is as it was written\n"


def test_one_damaged_file_is_one(finished):
    (path,) = (finished / "runs/t").glob("round-01/embed-*/parts/embeddings-00000.parquet")
    path.unlink()
    assert refused("status", "--verify").startswith("1 damaged file: `fdpo status --repair` drops")


def test_a_shard_of_a_step_that_is_not_done_is_verified_too(place, finished_place):
    folder = kill_after_writing(place, "held-out-sample-*/parts/00001.json")
    cut(folder / "parts/candidates-00000.parquet")
    shown = f"{folder.relative_to(place)}/parts/candidates-00000.parquet"
    assert shown in fdpo("status", "--verify").err
    works("status", "--repair")
    assert [path.name for path in sorted((folder / "parts").iterdir())] == ["00001.json", "candidates-00001.parquet"]


def test_a_damaged_file_that_is_read_is_named_with_the_way_out(finished):
    run = finished / "runs/t"
    (path,) = run.glob("round-01/score-clip_t-*/parts/scores-00000.parquet")
    path.write_bytes(b"nothing")
    told = refused("pair", "--round", "1", "--set", "pair.margin=0.1")
    assert told.startswith(f"{path.relative_to(finished)} cannot be read (")
    assert told.endswith("); `fdpo status --verify --repair` names and re-makes it")


def test_a_damaged_manifest_is_named_with_the_way_out(finished):
    run = finished / "runs/t"
    (manifest,) = run.glob("round-03/evaluate-*/manifest.json")
    manifest.write_text("{")
    told = refused("round")
    assert told.startswith(f"{manifest.relative_to(finished)} is damaged (")
    assert told.endswith("); `fdpo status --verify --repair` names and re-makes it")
    works("status", "--verify", "--repair")
    works("round")


# -- a full disk


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator:
    """A disk of its own at `at`; yields what sets its size in kB. Needs root, as mounting does."""
    disk = Path(tempfile.mkdtemp())  # not below pytest's folders: it could not clear them if we were killed here

    def mount(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", *args, str(disk)], capture_output=True, text=True)

    at.symlink_to(disk)
    made = mount("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    if made.returncode:
        pytest.skip(f"this machine does not let us mount a small disk: {made.stderr.strip()}")
    try:
        yield lambda kilobytes: mount("-o", f"remount,size={kilobytes}k")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # tables that we have read may still be mapped
        disk.rmdir()


# what meets the full disk -> the file that the sentence names; the adapter's library does not say which one it was
FULL = {
    "sample-*/parts/candidates-00001.parquet": "candidates-00001.parquet", "sample-*/parts/00000.json": "00000.json",
    "score-clip_t-*/parts/scores-00000.parquet": "scores-00000.parquet", "pair-*/manifest.json": "manifest.json",
    "finetune-*/work/checkpoint.pt": "work/checkpoint.pt", "adapter": "", "finetune-*/manifest.json": "manifest.json",
    "evaluate-*/parts/meters-00000.parquet": "meters-00000.parquet", "numbers.json": "numbers.json", "report.html": "report.html",
}


@pytest.mark.slow
@pytest.mark.parametrize("struck", FULL)
def test_a_full_disk_is_one_sentence_keeps_what_was_done_and_goes_on_when_there_is_room(place, finished_place, monkeypatch, struck):
    """The disk is filled to the last byte just before that file is written, and emptied after the command has ended."""
    run, whole = place / "runs/t", results(finished_place / "runs/t")
    with small_disk(place / "runs") as resize:
        resize(65536)
        with monkeypatch.context() as patch:
            full_before(patch, struck, place / "runs/filler")
            path = full_at(fdpo("round", "--n", "1"))
        assert path is not None, "nothing was struck"
        assert path.endswith(FULL[struck])
        assert not list(run.rglob("*.tmp")), "nor is the disk kept full"
        done = progress(run)
        (place / "runs/filler").unlink()
        works("round", "--n", "1")
        assert progress(run) >= done, "what was finished is kept"
        made = results(run)
    assert json.loads(made.pop("numbers.json"))["round 1"] == json.loads(whole["numbers.json"])["round 1"]
    assert made.items() <= whole.items()


def full_before(patch: pytest.MonkeyPatch, pattern: str, filler: Path) -> None:
    """Fill the disk when a file like `pattern` is about to be written for the first time; "adapter": by its library."""
    put, save = workspace._put, adapters.save

    def fill() -> None:
        if not filler.exists():
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 65536)

    def putting(path: Path, write) -> None:
        if path.match(pattern):
            fill()
        put(path, write)

    def saving(*given, **named) -> None:
        fill()
        save(*given, **named)

    if pattern == "adapter":
        patch.setattr(adapters, "save", saving)
    else:
        patch.setattr(workspace, "_put", putting)


def full_at(told: Told) -> str | None:
    """The file that a command found no room for; None if it found room."""
    if not told.code:
        return None
    sentence = r"fdpo: the disk is full(?: \((.*)\))?: what was finished is kept; make room and run the same command again"
    found = re.fullmatch(sentence, told.err.splitlines()[-1])
    assert found, told.err
    assert "Traceback" not in told.err
    return found[1] or ""


def test_an_export_to_a_full_disk_is_told_as_such(finished):
    with small_disk(finished / "out") as resize:
        resize(8)
        told = fdpo("export", "out")
    assert told.code == 1
    assert told.err.splitlines()[-1].startswith("fdpo: the disk is full (out/")
