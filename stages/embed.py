"""candidates -> embeddings of one CLIP tower, shared by every expert on it."""

import time

import pyarrow as pa

from fashiondpo_pipeline import schemas
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    candidates = out.input("sample")
    model, pretrained = step.args["tower"]
    tower = Tower(model, pretrained, session.device)
    mine = session.processes.mine(candidates.shards("candidates"))
    for shard in session.track(mine, f"round {step.round} {step.name}", len(mine)):
        if out.has(shard):
            continue
        started = time.monotonic()
        table = candidates.table("candidates", ["group", "candidate", "picture", "fault"], shard)
        rows = table.to_pylist()
        vectors: list = [None] * len(rows)
        for start in range(0, len(rows), session.config.machine.batch):
            readable = {}
            for n, row in enumerate(rows[start : start + session.config.machine.batch], start):
                if row["fault"]:
                    continue
                try:
                    readable[n] = decode_picture(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}")
                except UserError as problem:  # the score stage gives the reason with the missing score
                    session.say(f"round {step.round}: {problem}")
            if readable:
                for n, vector in zip(readable, tower.pictures(list(readable.values())), strict=True):
                    vectors[n] = vector
        columns = [table["group"], table["candidate"], pa.array(vectors, pa.list_(pa.float32()))]
        out.write(shard, time.monotonic() - started, embeddings=pa.table(columns, schema=schemas.EMBEDDINGS))
    session.wait()
    if session.first:
        out.finish()
