"""candidates (+ embeddings) -> one expert's scores. Each expert is a step of its own, so adding one re-runs nothing."""

import math
import time

import pyarrow as pa

from fashiondpo_pipeline import schemas
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import ask
from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    name = step.args["expert"]
    prompts = {row["group"]: row for row in session.prompts[step.args["split"]].rows}
    expert = session.expert(name, step.inputs.get("prepared"))

    candidates = out.input("sample")
    shards = candidates.shards("candidates")
    mine = session.processes.mine(shards)
    for shard in session.track(mine, f"round {step.round} {step.name}", len(mine)):
        if out.has(shard):
            continue
        started = time.monotonic()
        rows = _rows(expert, candidates, out.input("embed") if "embed" in step.inputs else None, shard, prompts)
        usable = [n for n, row in enumerate(rows) if not row["fault"]]
        answers: list = [(math.nan, row["fault"]) for row in rows]
        for start in range(0, len(usable), session.config.machine.batch):
            chosen = usable[start : start + session.config.machine.batch]
            for n, answer in zip(chosen, ask(expert, [rows[n] for n in chosen]), strict=True):
                answers[n] = answer
        columns = {
            "group": [row["group"] for row in rows], "candidate": [row["candidate"] for row in rows],
            "score": [score for score, _ in answers], "reason": [reason for _, reason in answers],
        }
        out.write(shard, time.monotonic() - started, scores=pa.table(columns, schema=schemas.SCORES))

    session.wait()
    if session.first:
        _finish(session, step, out, shards)


def _finish(session, step: Step, out: Output, shards: list[int]) -> None:
    name, scores = step.args["expert"], out.table("scores", ["score", "reason"])
    missing = [reason for reason in scores["reason"].to_pylist() if reason]
    if len(missing) == len(scores):
        for shard in shards:
            out.drop(shard)  # so that the mended expert is asked again
        raise UserError(f"round {step.round}: expert '{name}' gave no score for any of {len(scores)} candidates ({missing[0]}): "
                        "mend it and run the same command again")
    if missing:
        session.say(f"round {step.round}: expert '{name}' gave no score for {len(missing)} of {len(scores)} ({missing[0]})")
    known = [score for score in scores["score"].to_pylist() if not math.isnan(score)]
    out.finish({"scored": len(known), "missing": len(missing), "mean": math.fsum(known) / len(known)})


def _rows(expert, candidates: Output, embeddings: Output | None, shard: int, prompts: dict[str, dict]) -> list[dict]:
    """What the expert is handed: a candidate joined to its prompt, with a picture or an embedding where it needs one."""
    pictures = "picture" in expert.needs
    columns = ["group", "candidate", "fault", *(["picture"] if pictures else [])]
    rows = [{**prompts[row["group"]], **row} for row in candidates.table("candidates", columns, shard).to_pylist()]
    if pictures:
        for row in rows:
            _open(row)
    if embeddings:
        table = embeddings.table("embeddings", shard=shard)
        vectors = dict(zip(zip(table["group"].to_pylist(), table["candidate"].to_pylist(), strict=True), table["embedding"], strict=True))
        for row in rows:
            vector = vectors[row["group"], row["candidate"]]
            if vector.is_valid:
                row["embedding"] = vector.values.to_numpy()
            else:
                row["fault"] = row["fault"] or "the picture cannot be read"
    return rows


def _open(row: dict) -> None:
    try:
        row["picture"] = decode_picture(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}")
    except UserError as problem:
        row["fault"] = row["fault"] or str(problem)
