"""an imported pair set -> pairs as finetuning reads them, and the groups that gave none with the reason."""

from collections import Counter

import pyarrow as pa

from fashiondpo_pipeline import checks, schemas
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    pairs = PairSet.open(step.args["pairs"])
    if altered := pairs.altered():
        raise UserError(f"{altered[0]} since the set was made: copy it again, or make the set anew")
    found = checks.check(pairs)
    for line in checks.sentences(found):
        session.say(f"round {step.round} pairs: {line}")
    reasons: dict[str, str | None] = {}  # of each group: why it gives no pair; None where it gives one
    counts: Counter[str] = Counter(pairs=0, ties=0, unlabelled=0, dangling=0)
    shared, schema = step.config.get("shares", False), schemas.SHARED_PAIRS if step.config.get("shares") else schemas.pairs([])
    shard = -1
    for shard, table in enumerate(pairs.pairs(["group", "first", "second", "label", "gap"])):
        rows = []
        for row in table.to_pylist():
            there = all(pairs.has(row["group"], row[side]) for side in ("first", "second"))
            kind = "dangling" if not there else "unlabelled" if row["label"] is None else "ties" if row["label"] == 0.5 else "pairs"
            counts[kind] += 1
            if kind == "pairs":
                rows.append(_pair(row) | ({"share": max(row["label"], 1 - row["label"])} if shared else {}))
            else:
                reasons.setdefault(row["group"], "all its pairs are ties, not labelled, or of pictures that are not there")
        reasons.update(dict.fromkeys((row["group"] for row in rows), None))
        out.write(shard, pairs=pa.Table.from_pylist(rows, schema), rejects=schemas.REJECTS.empty_table())
    if not counts["pairs"]:
        raise UserError(f"{pairs.folder}: no pair in it has a winner ({counts['ties']:,} ties, {counts['unlabelled']:,} not labelled, "
                        f"{counts['dangling']:,} of pictures that are not there): label some")
    rejects = [{"group": group, "reason": reason} for group, reason in reasons.items() if reason]
    out.write(shard + 1, pairs=schema.empty_table(), rejects=pa.Table.from_pylist(rejects, schemas.REJECTS))
    out.finish({**counts, "groups": len(reasons), "rejected": len(rejects), "mean_margin": None, "checks": found,
                "set": str(pairs.folder)})


def _pair(row: dict) -> dict:
    """Winner and loser; the winner of a share is the picture that more chose."""
    won = row["label"] > 0.5
    winner, loser = (row["first"], row["second"]) if won else (row["second"], row["first"])
    return {"group": row["group"], "winner": winner, "loser": loser, "winner_score": None, "loser_score": None, "margin": row["gap"]}
