"""candidates -> some of them with every number one level of 255 up or down, which nobody sees: how much a judge's score moves by that is noise."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import codecs, schemas
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.seeds import key
from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    candidates, started = out.input("sample"), time.monotonic()
    for shard in candidates.shards("candidates"):
        if out.has(shard):
            continue
        table = candidates.table("candidates", shard=shard)
        rows = table.filter(pc.less(table["candidate"], step.config["candidates"])).to_pylist()
        for row in rows:
            row["picture"]["bytes"] = disturbed(row, step.config["seed"])
        out.write(shard, time.monotonic() - started, candidates=pa.Table.from_pylist(rows, schemas.CANDIDATES))
        started = time.monotonic()
    out.finish()


def disturbed(row: dict, seed: int) -> bytes:
    """The PNG of a candidate, each of its numbers one level up or down by chance; as it is where it cannot be read."""
    try:
        pixels = np.asarray(codecs.decode_picture(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}"), np.int16)
    except UserError:
        return row["picture"]["bytes"]
    rng = np.random.default_rng(key(seed, "disturbed", row["group"], row["candidate"]))
    return codecs.encode_png((pixels + rng.choice([-1, 1], pixels.shape)).clip(0, 255).astype(np.uint8))
