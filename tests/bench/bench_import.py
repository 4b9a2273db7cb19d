"""How much memory do import and export of a large preference set take? A made-up Pick-a-Pic file of --gigabytes goes in and out again.

    python tests/bench/bench_import.py                  # 1 GB: half a minute on a core
    python tests/bench/bench_import.py --gigabytes 2
    python tests/bench/bench_import.py --one-group --gigabytes 2    # all rows in one row group, and each column of it in one or a few pages
    python tests/bench/bench_import.py --repeat 40      # each prompt has as many pairs: the pictures of a prompt lie far apart

Each step is a process of its own, whose peak is the kernel's own figure (ru_maxrss). `idle` has imported what the others import.
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fashiondpo_pipeline.formats.pickapic import SCHEMA

A_GROUP = 256  # rows of a row group: some 170 MB


def make(path: Path, size: int, repeat: int, group: int | None, compression: str) -> int:
    """Small pictures in files as large as a photograph's: what follows a JPEG's end is not decoded, but carried. Returns the number of rows."""
    rng = np.random.default_rng(0)
    bases = []
    for _ in range(8):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer := io.BytesIO(), "JPEG", quality=90)
        bases.append(buffer.getvalue() + rng.bytes(320_000))
    rows = size // (2 * len(bases[0]))
    group = group or rows
    with pq.ParquetWriter(path, SCHEMA, compression=compression, use_dictionary=False) as file:
        for start in range(0, rows, group):
            end = min(start + group, rows)
            parts = [_rows(range(at, min(at + A_GROUP, end)), rows, repeat, bases) for at in range(start, end, A_GROUP)]
            file.write_table(pa.concat_tables(parts).combine_chunks(), row_group_size=group)
    return rows


def _rows(numbers: range, rows: int, repeat: int, bases: list[bytes]) -> pa.Table:
    return pa.Table.from_pylist([_row(n, rows, repeat, bases) for n in numbers], SCHEMA)


def _row(n: int, rows: int, repeat: int, bases: list[bytes]) -> dict:
    data = [bases[(2 * n + i) % 8] + (2 * n + i).to_bytes(8, "big") for i in (0, 1)]
    return {"caption": f"prompt {n % max(rows // repeat, 1)}", "jpg_0": data[0], "jpg_1": data[1], "label_0": float(n % 2), "label_1": 1.0 - n % 2,
            "has_label": True, "image_0_uid": f"{n}-0", "image_1_uid": f"{n}-1", "ranking_id": n, "user_id": n % 50}


def work(kind: str, source: Path, target: Path) -> None:
    """One step, in this process; prints its seconds and its peak in bytes."""
    from fashiondpo_pipeline import checks, formats
    from fashiondpo_pipeline.pairsets import PairSet

    started = time.monotonic()
    if kind == "import":
        formats.read("pickapic", source, target)
    elif kind == "export":
        formats.write("pickapic", PairSet.open(source), target)
    elif kind == "check":
        checks.check(PairSet.open(source))
    print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--one-group", action="store_true", help="all rows in one row group; making the file takes its size of memory thrice")
    parser.add_argument("--compression", default="none", help="of the file: none, snappy, zstd")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        if args.work[0] == "make":
            make(Path(args.work[1]), int(args.gigabytes * 1e9), args.repeat, None if args.one_group else A_GROUP, args.compression)
        else:
            work(args.work[0], Path(args.work[1]), Path(args.work[2]))
        return
    with tempfile.TemporaryDirectory() as place:
        file, folder, out = (Path(place) / name for name in ("p.parquet", "set", "out"))
        # in a process of its own: a child begins with its parent's peak
        options = ["--gigabytes", str(args.gigabytes), "--repeat", str(args.repeat), "--compression", args.compression]
        options += ["--one-group"] if args.one_group else []
        subprocess.run([sys.executable, __file__, *options, "--work", "make", str(file), "-"], check=True)
        about = pq.read_metadata(file)
        print(f"{about.num_rows:,} pairs, {file.stat().st_size / 1e9:.2f} GB in {about.num_row_groups} row groups", flush=True)
        for kind, source, target in (("idle", file, folder), ("import", file, folder), ("check", folder, out), ("export", folder, out)):
            done = subprocess.run([sys.executable, __file__, "--work", kind, str(source), str(target)], check=True, capture_output=True, text=True)
            seconds, peak = map(float, done.stdout.split())
            print(f"{kind:7s} {seconds:7.1f} s   peak {peak / 1e6:7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
