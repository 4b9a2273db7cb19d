"""What is not finished goes on, what is damaged is found and made again, and a run ends as if nothing had happened."""

import contextlib
import json
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from whole_runs import Process, Told, fdpo, manifests, refused, results, wait_for, works

KILLS = 25


def progress(run: Path) -> int:
    """How many shards, checkpoints and steps are on disk, whole."""
    return sum(1 for end in ("parts/*.json", "work/*.pt", "manifest.json") for _ in run.glob(f"round-*/*/{end}"))


def begun(run: Path) -> Path | None:
    """The folder of the step that was at work."""
    found = [path.parent for path in run.glob("round-*/*/claim.json") if not (path.parent / "manifest.json").is_file()]
    return max(found, default=None)


def kill_at(place: Path, moment: int, delay: float) -> None:
    """`fdpo round`, killed a little after so much is on disk: while models are being loaded if it is there already."""
    run = place / "runs/t"
    with Process(place, "round") as process:
        wait_for(lambda: (run / "run.owner").is_file() and (run / "run.owner").read_text() == f"process {process.pid}")
        wait_for(lambda: progress(run) >= moment)
        time.sleep(delay)
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL


def kill_after_writing(place: Path, pattern: str) -> Path:
    """`fdpo round`, killed just after it has written such a file; the folder of the step that it was in."""
    with Process(place, "round", pause=pattern) as process:
        process.wait_paused()
        process.send(signal.SIGKILL)
        assert process.wait().code == -signal.SIGKILL
    return begun(place / "runs/t")


@pytest.mark.slow
def test_a_run_killed_at_25_moments_ends_as_if_nothing_had_happened(place, finished_place):
    run, chance, struck = place / "runs/t", random.Random(2), []
    end = progress(finished_place / "runs/t")

    def kill(count: int, of: int) -> None:
        for left in range(of, of - count, -1):  # somewhere in the part that is then due
            moment = progress(run) + chance.randint(0, 2 * (end - progress(run)) // (left + 1))
            kill_at(place, moment, chance.uniform(0, 0.1))
            struck.append(begun(run))

    kill(6, of=KILLS - 2)
    between_shards = kill_after_writing(place, "sample-*/parts/00000.json")
    assert not (between_shards / "parts/00001.json").exists()
    between_checkpoints = kill_after_writing(place, "finetune-*/work/checkpoint.pt")
    assert (between_checkpoints / "work/checkpoint.pt").is_file()
    assert not (between_checkpoints / "adapter").exists()
    kill(KILLS - 8, of=KILLS - 8)

    assert len({path.name for path in struck if path}) >= 8, "the kills should be spread over many steps"
    assert {path.parent.name for path in struck if path} >= {"round-01", "round-02", "round-03"}
    assert works_in(place, "round") == 0
    assert results(run) == results(finished_place / "runs/t")
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("work"))


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
        "round-00/held-out-sample-*/parts/candidates-00001.parquet": alter,
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


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_keeps_what_was_done_and_goes_on_when_there_is_room(place, finished_place):
    run, whole = place / "runs/t", results(finished_place / "runs/t")
    struck, done, size, path = {}, 0, 16, ""
    with small_disk(place / "runs") as resize:
        while path is not None:
            resize(size)
            # every other time without checkpoints, which no claim knows of: then it is the adapter that finds no room
            path = full_at(fdpo("round", "--n", "1", "--set", f"finetune.checkpoint_every={(3, 1000)[size // 8 % 2]}"))
            assert progress(run) >= done, "what was finished is kept"
            assert not list(run.rglob("*.tmp")), "nor is the disk kept full"
            done = progress(run)
            stage = "report" if path == "runs/t/report.html" else begun(run).name.partition("-")[0] if begun(run) else ""
            struck.setdefault(stage, []).append(path)
            size += {"sample": 48, "finetune": 8, "report": 512}.get(stage, 24)
        made = results(run)
    assert json.loads(made.pop("numbers.json"))["round 1"] == json.loads(whole["numbers.json"])["round 1"]
    assert made.items() <= whole.items()
    assert struck.keys() >= {"sample", "finetune", "report"}
    assert any(path.endswith("/work/checkpoint.pt") for path in struck["finetune"])
    assert "" in struck["finetune"], "the adapter should have been struck: its library does not say which file it was"


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
