"""Whole runs on tiny models: a working folder to run in, `fdpo` in this process, and `fdpo` in a process that can be killed."""

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from fashiondpo_pipeline import cli, identity, workspace
from fashiondpo_pipeline.config import load
from stages import Session

PROMPTS = [f"a {colour} {kind}" for colour in ("red", "blue", "green") for kind in ("dress", "boot", "bag", "hat")]
CONFIG = """\
name: t
rounds: 3
generator: {{model: {sd}}}
prompts: {{file: prompts.txt, held_out: 0.3}}
sample: {{candidates: 4, steps: 4, tile: 8}}
experts:
  clip_t: {{use: clip_text, options: {{model: "local-dir:{clip}"}}}}
  bright: {{use: "fashiondpo_pipeline.testing:Brightness"}}
pair: {{weights: {{clip_t: 1.0}}, over: group, margin: 0.5, margin_later: 1, agree: null}}
finetune:
  {{epochs: 2, groups: 1, timesteps: 2, beta: 100.0, rank: 2, learning_rate: 0.002, rate_later: 1, kept_later: 1, warmup: 0, checkpoint_every: 3}}
evaluate: {{judge: bright, pictures: 2, bootstrap: 200}}
machine: {{shard: 2, batch: 8, device: cpu, threads: 1}}
"""


@dataclass(frozen=True)
class Told:
    """What one call of `fdpo` said: exit code, results, words."""

    code: int
    out: str
    err: str


def fdpo(*args: str | Path) -> Told:
    """`fdpo ...` in this process and the working folder, as a person would see it."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["fdpo", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = argv
    return Told(stopped.value.code or 0, out.getvalue(), err.getvalue())


def works(*args: str | Path) -> Told:
    """The same, for a call that must succeed."""
    told = fdpo(*args)
    assert told.code == 0, told.err
    return told


def refused(*args: str | Path) -> str:
    """The same, for a call that must fail: the sentence that it ends with."""
    told = fdpo(*args)
    assert told.code == 1, told
    return told.err.rpartition("fdpo: ")[2].removesuffix("\n")


def session(*sets: str) -> Session:
    """The working folder's run, to look into or to run in part."""
    return Session(load(Path("pipeline.yaml"), list(sets)), say=lambda text: None)


# -- pages without curves

_DRAW = Figure.savefig


def _no_curves(self, file, **_) -> None:
    file.write('<svg viewBox="0 0 1 1"></svg>')


Figure.savefig = _no_curves  # a third of the time that a small round takes; tests of the report draw them


@contextlib.contextmanager
def curves_drawn() -> Iterator[None]:
    """Meanwhile pages have the curves that they have for everybody else."""
    Figure.savefig = _DRAW
    try:
        yield
    finally:
        Figure.savefig = _no_curves


# -- in a process of its own

# Forked from a server that has imported everything: a start costs a hundredth of a second instead of six.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([
    "fashiondpo_pipeline.generators.text2img", "fashiondpo_pipeline.experts.clip", "open_clip", "diffusers.guiders", "pandas",
    "rich.progress", "stages.finetune", "stages.report",
])


class Process:
    """`fdpo ...` as a real process in `folder`, which can be killed. It stops itself after writing a file like `pause`."""

    def __init__(self, folder: Path, *args: str, pause: str | None = None, kill_at: int | None = None):
        self._told = Path(tempfile.mkdtemp(prefix="told"))
        for name in ("out", "err"):
            (self._told / name).touch()
        self._process = _FORKS.Process(target=_enter, args=(folder, self._told, args, pause, kill_at), daemon=True)
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        shutil.rmtree(self._told)

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def writes(self) -> int:
        """How often the disk was changed, where that is counted."""
        return int((self._told / "writes").read_text())

    def wait_paused(self) -> None:
        """Return once it has stopped itself."""
        wait_for(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def wait(self) -> Told:
        """What it said when it ended; exit code -9 if it was killed."""
        wait_for(lambda: not self.running)
        return Told(self._process.exitcode, *((self._told / name).read_text() for name in ("out", "err")))


def _enter(folder: Path, told: Path, args: tuple[str, ...], pause: str | None, kill_at: int | None = None) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(told / name, os.O_WRONLY), number)
    if pause:
        _stop_after(pause)
    if kill_at is not None:
        _die_at(kill_at, told / "writes")
    sys.argv = ["fdpo", *args]
    cli.main()


def _die_at(number: int, count: Path) -> None:
    """Die, as by SIGKILL, just before the number-th time that the disk is changed below the working folder; 0: only count them."""
    tally = os.open(count, os.O_CREAT | os.O_WRONLY)

    def see(done: int) -> None:
        os.pwrite(tally, b"%d" % done, 0)
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch_changes(see)


def _watch_changes(see: Callable[[int], None]) -> Callable[[], None]:
    """see(n) just before the n-th time that the disk is changed below the working folder, until what is returned is called."""
    here, done, seeing = os.getcwd(), 0, False
    names = ("replace", "rename", "mkdir", "rmdir", "unlink", "truncate")
    before = {name: getattr(os, name) for name in names}, os.fsync, io.open

    def counted(call, concerns):
        def changing(*args, **kwargs):
            nonlocal done, seeing
            if not seeing and concerns(*args, **kwargs):
                done, seeing = done + 1, True
                try:
                    see(done)
                finally:
                    seeing = False
            return call(*args, **kwargs)
        return changing

    def ours(path, *_, **__) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(here)

    def written(path, mode="r", *_, **__) -> bool:
        return ours(path) and any(letter in mode for letter in "wax+")

    def undo() -> None:
        for name, call in before[0].items():
            setattr(os, name, call)
        os.fsync = before[1]
        io.open = builtins.open = before[2]

    for name in names:
        setattr(os, name, counted(getattr(os, name), ours))
    os.fsync = counted(os.fsync, lambda _: True)
    io.open = builtins.open = counted(io.open, written)
    return undo


def works_seen(see: Callable[[int], None], *args: str | Path) -> int:
    """`works` with see(n) before its n-th change of the disk; how many there were. What is there then is what a kill would leave."""
    count = 0

    def counting(number: int) -> None:
        nonlocal count
        count = number
        see(number)

    undo = _watch_changes(counting)
    try:
        works(*args)
    finally:
        undo()
    return count


def _stop_after(pattern: str) -> None:
    put = workspace._put

    def putting(path: Path, write) -> None:
        put(path, write)
        if path.match(pattern) and workspace._put is putting:
            workspace._put = put  # once: told to go on, it goes on
            os.kill(os.getpid(), signal.SIGSTOP)

    workspace._put = putting


def wait_for(condition, seconds: float = 600) -> None:
    """Return as soon as `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


# -- folders


def prepare(folder: Path, sd: Path, clip: Path) -> Path:
    """A working folder with a pipeline.yaml on tiny models and its prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pipeline.yaml").write_text(CONFIG.format(sd=sd, clip=clip))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def results(run: Path) -> dict[str, bytes]:
    """Everything a run leaves that must not depend on how it came about: every table, adapter and number, by its path."""
    kept = [*run.glob("round-*/*/parts/*.parquet"), *run.glob("round-*/*/adapter/*.safetensors"), *run.glob("numbers.json")]
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted(kept)}


def table(step: Path, name: str) -> pa.Table:
    """A table of a step's folder, however many files it is in."""
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in sorted(step.glob(f"parts/{name}-*.parquet"))])


def folder_of(run: Path, number: int, name: str) -> Path:
    """The folder of a round's step, where there is one."""
    (found,) = run.glob(f"round-{number:02d}/{name}-????????")
    return found


def manifests(run: Path) -> dict[str, dict]:
    """Folder of each finished step -> its manifest."""
    found = sorted(run.glob("round-*/*/manifest.json"))
    return {path.parent.relative_to(run).as_posix(): json.loads(path.read_text()) for path in found}


def sealed_anew(step: Path) -> None:
    """Let a finished or begun step's receipts and manifest say of its files what is there now: as if it had been written so."""
    for listing in [*step.glob("parts/*.json"), *step.glob("manifest.json")]:
        found = json.loads(listing.read_text())
        found.pop("sum", None)
        for name, file in found["files"].items():
            path = next(place for place in (step / "parts" / name, step / name, step / "whole" / name) if place.is_file())
            file |= {"bytes": path.stat().st_size, "sha256": identity.hash_file(path)}
        workspace.write_sealed(listing, found)


class Mood:
    """An expert with moods: whose key holds one of `moods` gets its answer ("raise", "nan", a number), others a brightness."""

    version, range = 1, (0.0, 1.0)

    def __init__(self, moods: dict[str, str | float] | None = None, needs: str = "picture"):
        self.moods, self.needs = moods or {}, ("picture", needs)

    def load(self, device: str, prepared: Path | None) -> None:
        pass

    def __call__(self, rows: list[dict]) -> list[float]:
        return [self._one(row) for row in rows]

    def _one(self, row: dict) -> float:
        mood = next((mood for word, mood in self.moods.items() if word in f"{row['group']}/{row['candidate']}"), None)
        if mood == "raise":
            raise ValueError(f"I do not like {row['group']}")
        return float(np.asarray(row["picture"]).mean() / 255 if mood is None else mood)


class Dark:
    """A classifier of two labels: darkness of a picture, which is right below the middle; None of a group that holds `silent`."""

    version, range, needs, classifies = 1, (0.0, 1.0), ("picture",), True

    def __init__(self, silent: str = "?", middle: float = 0.5):
        self.silent, self.middle = silent, middle

    def load(self, device: str, prepared: Path | None) -> None:
        pass

    def __call__(self, rows: list[dict]) -> list[tuple]:
        shades = [1 - float(np.asarray(row["picture"]).mean() / 255) for row in rows]
        return [(float("nan"), "silent") if self.silent in row["group"] else (shade, None, shade > self.middle)
                for row, shade in zip(rows, shades, strict=True)]


@pytest.fixture
def place(tmp_path, tiny_sd, tiny_clip, monkeypatch) -> Path:
    """An empty working folder, entered."""
    monkeypatch.chdir(prepare(tmp_path, tiny_sd, tiny_clip))
    return tmp_path


@pytest.fixture(scope="session")
def finished_place(tmp_path_factory, tiny_sd, tiny_clip) -> Path:
    """A working folder where an uninterrupted run of three rounds lies in runs/t; not to be changed."""
    folder = prepare(tmp_path_factory.mktemp("finished"), tiny_sd, tiny_clip)
    with contextlib.chdir(folder):
        works("round")
    return folder


@pytest.fixture
def finished(finished_place, place) -> Path:
    """A working folder, entered, with a copy of that run; its runs/t may be changed."""
    shutil.copytree(finished_place / "runs", place / "runs")
    return place
