"""Several processes at one run, started as people start them: the same results, one voice, and an end for all when one ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from whole_runs import folder_of, manifests, results, table, wait_for, works

from fashiondpo_pipeline import processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]


class Short:
    """An expert that forgets a score wherever it sees a boot."""

    version, range, needs = 1, (0.0, 1.0), ("picture",)

    def load(self, device, prepared):
        pass

    def __call__(self, rows):
        return [0.5] * (len(rows) - any("boot" in row["prompt"] for row in rows))


def launched(place: Path, launcher: list[str], *args: str) -> subprocess.Popen:
    paths = [str(Path(__file__).parent), *sys.path]
    return subprocess.Popen([*launcher, "fashiondpo_pipeline", *args], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"})


def ranks(launcher: subprocess.Popen) -> dict[int, int]:
    """Rank -> process, of the launcher's processes that are there."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            settings = stat.with_name("environ").read_bytes().split(b"\0") if parent == launcher.pid else []
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        found |= {int(value[5:]): int(stat.parent.name) for value in settings if value.startswith(b"RANK=")}
    return found


def adapter(run: Path, number: int) -> dict[str, np.ndarray]:
    return load_file(folder_of(run, number, "finetune") / "adapter/pytorch_lora_weights.safetensors")


def check_same_training(one: Path, other: Path, number: int) -> None:
    """Every optimiser step has the same numbers, and the adapters differ by a thousandth of what was learnt at most."""
    steps = [table(folder_of(run, number, "finetune"), "steps").to_pandas() for run in (one, other)]
    np.testing.assert_allclose(steps[1], steps[0], rtol=2e-3, atol=1e-3)
    weights = [adapter(run, number) for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for part in ("lora_A", "lora_B"):  # not weight by weight: Adam turns a gradient of rounding's size into a whole step
        flat = [np.concatenate([found[name].ravel() for name in sorted(found) if part in name]) for found in weights]
        assert np.linalg.norm(flat[0]) > 0, "something was learnt"
        assert np.linalg.norm(flat[1] - flat[0]) < 1e-3 * np.linalg.norm(flat[0])


def before_training(run: Path) -> dict[str, bytes]:
    """What does not depend on a sum's order: all that lies before the first adapter."""
    names = ("encode-", "held-out-", "sample-", "embed-", "score-", "pair-")
    found = results(run)
    return {path: found[path] for path in found if path.startswith(("round-00/", *(f"round-01/{name}" for name in names if name != "held-out-")))}


@pytest.mark.slow
def test_two_processes_draw_the_same_pictures_and_train_the_same_adapter_as_one(place, finished_place):
    told = launched(place, ACCELERATE, "round", "--n", "1").communicate()
    run, whole = place / "runs/t", finished_place / "runs/t"
    same = before_training(whole)
    drawn = [path for path in same if "/candidates-" in path and "disturbed" not in path]
    assert len(drawn) == 3 + 3, "three shards of training prompts, three held-out"
    assert {path: data for path, data in before_training(run).items() if same[path] != data} == {}
    check_same_training(whole, run, 1)
    assert manifests(run).keys() <= manifests(whole).keys()
    assert told[1].count("run t ·") == told[1].count("round 1  sample") == told[0].count("as good as the best of n of the base") == 1
    assert "Traceback" not in told[1]

    before = {path: path.stat().st_mtime_ns for path in run.glob("round-*/*/*")}
    again = launched(place, TORCHRUN, "round", "-n", "1")
    told = again.communicate()
    assert again.returncode == 0, told[1]
    assert told[1].count("runs/t has 1 round already: nothing to do") == 1
    assert {path: path.stat().st_mtime_ns for path in run.glob("round-*/*/*")} == before


@pytest.mark.slow
@pytest.mark.launch
def test_a_killed_process_ends_all_within_seconds_and_the_run_goes_on(place, finished_place):
    launcher = launched(place, TORCHRUN, "round", "-n", "1")
    wait_for(lambda: list(place.glob("runs/t/round-01/finetune-*/work/checkpoint.pt")) or launcher.poll() is not None)
    both = ranks(launcher)
    assert both.keys() == {0, 1}
    os.kill(both[1], signal.SIGKILL)
    killed = time.monotonic()
    told = launcher.communicate()
    assert time.monotonic() - killed < 30
    assert launcher.returncode == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in both.values())
    assert str(Path(processes.__file__).parents[1]) not in told[1] and "stages/" not in told[1], "no traceback of ours"
    assert not list(place.glob("runs/t/round-01/finetune-*/manifest.json"))
    works("round", "--n", "1")
    check_same_training(finished_place / "runs/t", place / "runs/t", 1)


@pytest.mark.slow
@pytest.mark.launch
def test_what_is_wrong_in_one_process_is_said_once_and_ends_all(place):
    launcher = launched(place, TORCHRUN, "round", "-n", "1", "--set", "experts.bright.use=test_processes:Short")
    told = launcher.communicate()
    assert launcher.returncode == 1
    said = [line for line in told[1].splitlines() if line.startswith("fdpo: ")]
    assert len(said) == 1, told[1]
    assert re.match(r"fdpo: Short gave \d scores for \d pictures: ", said[0])
    assert told[1].count("Traceback") == 1, "the launcher's own"


def test_alone_there_is_nothing_to_share_and_nobody_to_wait_for():
    one = processes.Processes()
    assert (one.count, one.rank, one.first, one.mine([3, 1, 2])) == (1, 0, True, [3, 1, 2])
    one.wait()
    one.close()
    assert one.total_numbers({"pairs": 3.0}) == {"pairs": 3.0}
    assert processes.first_to_fail() and processes.first_to_fail()


def test_shares_are_disjoint_and_leave_nothing_out(monkeypatch):
    shares = []
    for rank in range(3):
        one = processes.Processes()
        one.count, one.rank = 3, rank
        shares.append(one.mine(list(range(8))))
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.UserError, match=r"machine.device is cuda:0, but process 1 .* needs a GPU of its own"):
        processes.Processes("cuda:0")
