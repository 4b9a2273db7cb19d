"""Whole commands that only read, on a run of 1,000,000 candidates in 10,000 shards: seconds with Python's start, and peak memory.

    python tests/bench/bench_status.py              # target: at most 1 s each on two cores
    python tests/bench/bench_status.py --keep DIR   # leaves the run in DIR, or takes the one that is there
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
K, SHARDS, GROUPS, REPEATS = 8, 10_000, 125_000, 5
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


def timed(folder: Path, command: str) -> tuple[float, int, str]:
    """(seconds, peak memory in bytes, what it said last) of one whole process."""
    started = time.monotonic()
    call = [sys.executable, "-m", "fashiondpo_pipeline", *command.split()]
    process = subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    told = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    if code:
        sys.exit(f"fdpo {command}\n{told}")
    return time.monotonic() - started, usage.ru_maxrss * 1024, next(line for line in reversed(told.splitlines()) if line.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="DIR")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        if not (folder / "pipeline.yaml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            started = time.monotonic()
            with ProcessPoolExecutor(1, get_context("spawn")) as other:  # a child's peak memory begins at its parent's
                other.submit(large_run, folder).result()
            print(f"{GROUPS * K:,} candidates in {SHARDS:,} shards, {len(EXPERTS)} experts: written in {time.monotonic() - started:.0f} s")
        print(f"{'fdpo':50} {'first s':>8} {'median s':>9} {'peak MB':>8}   what it said last")
        for command in COMMANDS:
            found = [timed(folder, command) for _ in range(REPEATS + 1)]
            seconds = [one[0] for one in found]
            print(f"{command:50} {seconds[0]:8.2f} {median(seconds[1:]):9.2f} {found[-1][1] / 1e6:8.0f}   {found[-1][2][:70]}", flush=True)


if __name__ == "__main__":
    main()
