"""Whole commands that only read, on a run of 1,000,000 candidates in 10,000 shards, and the status of a run of 2,000 rounds: seconds with
Python's start, and peak memory. The first time hashes what is read; what was hashed is remembered for the others.

    python tests/bench/bench_status.py              # target: at most 1 s each on two cores
    python tests/bench/bench_status.py --keep DIR   # leaves the runs in DIR, or takes those that are there
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fashiondpo_pipeline import schemas
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.workspace import Output
from stages import Session

ROOT = Path(__file__).resolve().parents[2]
K, SHARDS, GROUPS = 8, 10_000, 125_000
ROUNDS = 2_000
EXPERTS = ("first", "second")
# The generator is the embedded one, whose files are hashed; its pictures are left empty, as nothing here shows one.
CONFIG = """
name: large
prompts: {{file: {prompts}}}
experts:
  first: {{use: "fashiondpo_pipeline.testing:Brightness"}}
  second: {{use: "fashiondpo_pipeline.testing:Brightness"}}
pair: {{weights: {{first: 0.6, second: 0.4}}, agree: null}}
evaluate: {{judge: null}}
"""
COMMANDS = (
    "--help", "status", "inspect candidates", "inspect scores", "inspect pairs", "inspect candidates --sort first:desc",
    "inspect scores --group g0012345 --min 0.5", "inspect pairs --sort margin:desc --limit 5", "inspect candidates --missing",
    "rescore --round 1 --weights first=0.7,second=0.3",
)


def large_run(folder: Path) -> None:
    """A run in which one round is drawn, scored and paired."""
    os.fsync = lambda _: None  # 60,000 files that need not outlive a power cut
    names = [f"g{number:07d}" for number in range(GROUPS)]
    table = pa.table({"group": names, "prompt": [f"a photo of garment {name}" for name in names], "split": ["train"] * GROUPS})
    held_out = pa.table({"group": ["held"], "prompt": ["a held-out garment"], "split": ["held-out"]})
    pq.write_table(pa.concat_tables([table, held_out]), folder / "prompts.parquet")
    (folder / "pipeline.yaml").write_text(CONFIG.format(prompts=folder / "prompts.parquet"))
    session = Session(load(folder / "pipeline.yaml"), folder / "runs" / "large", say=lambda text: None)
    chain = session.chain(1)
    rng = np.random.default_rng(0)
    r = chain.rounds[1]
    cuts = np.linspace(0, GROUPS, SHARDS + 1).astype(int)
    for step in (r.sample, *r.scores.values()):
        out = session.run.output(step)
        out.open()
        for shard in range(SHARDS):
            part = slice(cuts[shard], cuts[shard + 1])
            _write(out, shard, table["group"][part], table["prompt"][part], step.stage, rng)
        out.finish()
    session.execute([r.pair])


def long_run(folder: Path) -> None:
    """A finished run of many rounds, whose steps are empty."""
    os.fsync = lambda _: None
    (folder / "long.yaml").write_text("name: long\n")
    session = Session(load(folder / "long.yaml"), folder / "runs" / "long", say=lambda text: None)
    for step in session.chain(ROUNDS).steps:
        out = session.run.output(step)
        out.open()
        out.finish()


def _write(out: Output, shard: int, groups: pa.ChunkedArray, prompts: pa.ChunkedArray, stage: str, rng: np.random.Generator) -> None:
    """One shard, as the sample or score stage would write it; one score in 10,000 is missing."""
    rows = len(groups) * K
    each = np.repeat(np.arange(len(groups)), K)
    keys = {"group": groups.take(each), "candidate": np.tile(np.arange(K, dtype=np.int16), len(groups))}
    if stage == "sample":
        known = keys | {"prompt": prompts.take(each), "round": np.ones(rows, np.int32), "seed": rng.integers(2**62, size=rows)}
        columns = [known.get(field.name, pa.nulls(rows, field.type)) for field in schemas.CANDIDATES]
        return out.write(shard, 1.0, candidates=pa.table(columns, schema=schemas.CANDIDATES))
    scores = np.where(rng.random(rows) < 1e-4, np.nan, rng.normal(size=rows))
    reasons = ["it cannot say" if score != score else None for score in scores]
    out.write(shard, 1.0, scores=pa.table(keys | {"score": scores, "reason": reasons}, schema=schemas.SCORES))


def _environment(folder: Path) -> dict[str, str]:
    """As on a machine where the commands have run before: modules are compiled, and files remembered."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return known | {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(folder / "compiled"), "FDPO_CACHE": str(folder / "remembered")}


def timed(folder: Path, call: list[str]) -> tuple[float, float, int, str]:
    """(seconds, those of a CPU's, peak memory in bytes, what it said last) of one whole process."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *call], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=_environment(folder))
    told = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    if code:
        sys.exit(f"{call}\n{told}")
    seconds = time.monotonic() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, next((line for line in reversed(told.splitlines()) if line.strip()), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    asked = parser.parse_args()
    keep, repeats = asked.keep, asked.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        if not (folder / "pipeline.yaml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            with ProcessPoolExecutor(1, get_context("spawn")) as other:  # a child's peak memory begins at its parent's
                other.submit(large_run, folder).result()
                other.submit(long_run, folder).result()
            print(f"{GROUPS * K:,} candidates in {SHARDS:,} shards, {len(EXPERTS)} experts: written in {time.monotonic() - started:.0f} s")
        calls = {"(imports alone)": ["-c", "import pyarrow.compute, pyarrow.parquet, pydantic, rich.table, typer, yaml"]}
        calls |= {command: ["-m", "fashiondpo_pipeline", *command.split()] for command in COMMANDS}
        calls[f"status of {ROUNDS:,} rounds"] = ["-m", "fashiondpo_pipeline", "status", "-c", "long.yaml"]
        print(f"{'fdpo':50} {'first s':>8} {'median s':>9} {'of imports':>11} {'CPU s':>6} {'peak MB':>8}   what it said last")
        bare = 0.0
        for name, call in calls.items():
            found = [timed(folder, call) for _ in range(repeats + 1)]
            first, *seconds = (one[0] for one in found)
            bare = bare or median(seconds)
            print(f"{name:50} {first:8.2f} {median(seconds):9.2f} {median(seconds) / bare:11.1f} {median(one[1] for one in found[1:]):6.2f} "
                  f"{found[-1][2] / 1e6:8.0f}   {found[-1][3][:60]}", flush=True)


if __name__ == "__main__":
    main()
