"""candidates (+ embeddings) -> one expert's scores. Each expert is a step of its own, so adding one re-runs nothing."""

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from fashiondpo_pipeline import schemas
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import ask, recorded
from fashiondpo_pipeline.experts.ahead import ahead
from fashiondpo_pipeline.experts.listing import reach
from fashiondpo_pipeline.reliability import chosen
from fashiondpo_pipeline.workspace import Output, Step


@dataclass
class Shard:
    """One shard on its way: the rows an expert is handed, and its answers; how many rows it is still to be asked about."""

    number: int
    rows: list[dict]
    answers: list[tuple]  # (score, reason), and a third entry of an expert that gives one
    due: int
    again: dict[int, tuple] = field(default_factory=dict)  # row -> the second answer, where it was asked twice


def run(session, step: Step, out: Output) -> None:
    name, started = step.args["expert"], time.monotonic()
    candidates, prompts = out.input("sample"), {row["group"]: row for row in session.prompts[step.args["split"]].rows}
    expert = session.expert(name, step.inputs.get("prepared"))
    shards = candidates.shards("candidates")
    todo = [shard for shard in session.processes.mine(shards) if not out.has(shard)]
    if hasattr(expert, "expect"):
        expert.expect(list(prompts.values()))
    about = described(expert, step)
    schema = schemas.scores_of(expert)
    read = Reader(expert, candidates, out.input("embed") if "embed" in step.inputs else None, prompts)
    twice = chosen(prompts, step.config["repeat"]) if step.config.get("repeat") else set()
    shards_answered = answered(expert, read, todo, session.config.machine.batch, twice)
    for shard in session.track(shards_answered, f"round {step.round} {step.name}", len(todo)):
        tables = {"scores": _table(schema, shard.rows, shard.answers)}
        if twice:
            tables["repeats"] = _table(schema, [shard.rows[n] for n in shard.again], list(shard.again.values()))
        _tell(session, step, expert)
        out.write(shard.number, time.monotonic() - started, **tables)
        started = time.monotonic()

    session.wait()
    if session.first:
        _finish(session, step, out, shards, about)


def described(expert, step: Step) -> dict:
    """Whose scores these are: kind, options, version, hashes of weights and tower, range, what is done to a picture, and of a plug-in
    what else it says of itself."""
    said = recorded.contract(expert, step.config["use"])
    return {**step.config, "range": reach(expert), "files": step.files, "preprocessing": getattr(expert, "preprocessing", None),
            **({"contract": said} if said else {})}


def _table(schema: pa.Schema, rows: list[dict], answers: list[tuple]) -> pa.Table:
    """Answers beside their keys."""
    columns = {
        "group": [row["group"] for row in rows], "candidate": [row["candidate"] for row in rows],
        "score": [answer[0] for answer in answers], "reason": [answer[1] for answer in answers],
    }
    for name in schema.names[len(columns):]:  # reply, or right
        columns[name] = [answer[2] if len(answer) > 2 else None for answer in answers]
    return pa.table(columns, schema=schema)


def answered(expert, read: "Reader", shards: list[int], batch: int, twice: Collection[str] = ()) -> Iterator[Shard]:
    """Shards with the expert's answers, and its second answers about the groups `twice`.

    They are read, and their pictures decoded, while the expert is at the ones before.
    """
    def batches() -> Iterator[tuple[Shard, list[int]]]:
        for shard in ahead(read.shard, shards, most=2, threads=1):
            for start in range(0, len(shard.rows), batch):
                yield shard, list(range(start, min(start + batch, len(shard.rows))))

    for shard, numbers in ahead(read.batch, batches(), most=4):
        sound = [n for n in numbers if not shard.rows[n]["fault"]]
        for n, answer in zip(sound, ask(expert, [shard.rows[n] for n in sound]) if sound else [], strict=True):
            shard.answers[n] = answer
        again = [n for n in sound if shard.rows[n]["group"] in twice]
        shard.again |= dict(zip(again, ask(expert, [shard.rows[n] for n in again]) if again else [], strict=True))
        for n in numbers:
            if shard.rows[n]["fault"]:
                shard.answers[n] = math.nan, shard.rows[n]["fault"]
            shard.rows[n].pop("picture", None)  # decoded, it is some hundred times its PNG
        shard.due -= len(numbers)
        if not shard.due:
            yield shard


def _tell(session, step: Step, expert) -> None:
    """Say what the expert wants the person to know, once."""
    notes = getattr(expert, "notes", [])
    while notes:
        session.say(f"round {step.round} {step.name}: {notes.pop(0)}")


def _finish(session, step: Step, out: Output, shards: list[int], about: dict) -> None:
    name, scores = step.args["expert"], out.table("scores", ["score", "reason"])
    missing = [reason for reason in scores["reason"].to_pylist() if reason]
    if len(missing) == len(scores) and getattr(session.make(name), "held_out", True):
        for shard in shards:
            out.drop(shard)  # so that the mended expert is asked again
        raise UserError(f"round {step.round}: expert '{name}' gave no score for any of {len(scores)} candidates ({missing[0]}): "
                        "mend it and run the same command again")
    if missing:
        session.say(f"round {step.round}: expert '{name}' gave no score for {len(missing)} of {len(scores)} ({missing[0]})")
    known = [score for score in scores["score"].to_pylist() if not math.isnan(score)]
    mean = math.fsum(known) / len(known) if known else None
    out.finish({"scored": len(known), "missing": len(missing), "mean": mean}, {"expert": about})


class Reader:
    """What the expert is handed: a candidate joined to its prompt, with a picture or an embedding where it needs one."""

    def __init__(self, expert, candidates: Output, embeddings: Output | None, prompts: dict[str, dict]):
        self.pictures, self.candidates, self.embeddings, self.prompts = "picture" in expert.needs, candidates, embeddings, prompts

    def shard(self, number: int) -> Shard:
        """One shard's rows, pictures not yet decoded."""
        columns = ["group", "candidate", "fault", *(["picture"] if self.pictures else [])]
        table = self.candidates.table("candidates", columns, number)
        rows = [{**self.prompts[row["group"]], **row} for row in table.to_pylist()]
        if self.embeddings:
            self._embed(rows, self.embeddings.table("embeddings", shard=number))
        return Shard(number, rows, [(math.nan, None)] * len(rows), len(rows))

    def batch(self, asked: tuple[Shard, list[int]]) -> tuple[Shard, list[int]]:
        """The same rows, their pictures decoded."""
        shard, numbers = asked
        if self.pictures:
            for n in numbers:
                _open(shard.rows[n])
        return asked

    def _embed(self, rows: list[dict], table: pa.Table) -> None:
        keys = zip(table["group"].to_pylist(), table["candidate"].to_pylist(), strict=True)
        vectors = dict(zip(keys, table["embedding"], strict=True))
        for row in rows:
            vector = vectors[row["group"], row["candidate"]]
            if vector.is_valid:
                row["embedding"] = vector.values.to_numpy()
            else:
                row["fault"] = row["fault"] or "the picture cannot be read"


def _open(row: dict) -> None:
    try:
        row["picture"] = decode_picture(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}")
    except UserError as problem:
        row["fault"] = row["fault"] or str(problem)
