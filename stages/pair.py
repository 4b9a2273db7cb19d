"""scores -> preference pairs, and the groups that gave none with the reason. Loads no model: new weights take seconds."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import reliability, schemas, seeds
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser, Grid, lay
from fashiondpo_pipeline.preferences import Pairs, Rule
from fashiondpo_pipeline.workspace import Output, Step

COLUMNS = ["group", "candidate", "score"]


def run(session, step: Step, out: Output, parts: Iterable[tuple[slice, Chooser]] | None = None) -> None:
    """`parts`: the rule on the grid, part by part, where the caller has it already."""
    config = dict(step.config)
    seed = config.pop("seed", 0)
    total = rejected = count = 0
    margin = 0.0
    looks, first = second_looks(out, step), []
    twice = groups_of(looks)
    for shard, (_, part) in enumerate(parts or Chooser(grid(out, step), Rule(**config)).each()):
        reasons, groups, pairs = part.reasons(), part.grid.groups, part.chosen
        rejects = pa.table([groups.take(pa.array(list(reasons), pa.int64())), list(reasons.values())], schema=schemas.REJECTS)
        labelled = relabel(pairs, config["labels"], seeds.key(seed, "labels", step.round, shard))
        out.write(shard, pairs=table(labelled, part), rejects=rejects)
        total, rejected, count = total + len(pairs), rejected + len(reasons), count + len(groups)
        margin += float(pairs.margin.sum())
        first += [part.only(twice)] if looks else []
    if not total:
        example = out.table("rejects")["reason"][0].as_py()
        raise UserError(f"round {step.round}: no group gave a pair ({example}, and so on): "
                        "lower pair.margin or pair.agree, or look at the scores")
    out.finish({"pairs": total, "groups": count, "rejected": rejected, "mean_margin": margin / total, **retested(looks, first)},
               session.about)


def second_looks(out: Output, step: Step) -> dict[str, pa.Table]:
    """Expert -> its second scores, of those that were asked twice."""
    roles = [role for role in step.inputs if role.startswith("score-") and out.input(role).shards("repeats")]
    return {role.removeprefix("score-"): out.input(role).table("repeats", COLUMNS) for role in roles}


def groups_of(tables: dict[str, pa.Table]) -> pa.Array:
    """Every group in them, once."""
    return pc.unique(pa.chunked_array([chunk for table in tables.values() for chunk in table["group"].chunks], pa.string()))


def retested(looks: dict[str, pa.Table], first: list[Chooser]) -> dict:
    """How far the experts that were asked twice agree with themselves, and what that does to the pairs; nothing where none was.

    first: the rule on the groups that were asked about twice, in parts.
    """
    if not looks:
        return {}
    chooser = first[0].on(Grid.joined([part.grid for part in first]))
    again = {name: lay([table], chooser.grid.groups, chooser.grid.k, name) for name, table in looks.items()}
    experts = {name: reliability.agreement(chooser.grid.scores[name], scores) for name, scores in again.items()}
    return {"retest": {"experts": experts, "labels": reliability.retest(chooser, again)}}


def grid(out: Output, step: Step) -> Grid:
    """The scores that a pair step reads, as a grid."""
    candidates = out.input("sample").pieces("candidates", ["group", "candidate"])
    names = [role.removeprefix("score-") for role in step.inputs if role.startswith("score-")]
    return Grid.gathered(candidates, {name: out.input(f"score-{name}").pieces("scores", COLUMNS) for name in names})


def relabel(pairs: Pairs, labels: str, seed: int) -> Pairs:
    """The pairs as they are, or with labels swapped or drawn by a coin: control experiments."""
    if labels == "scored":
        return pairs
    swap = np.ones(len(pairs), bool) if labels == "swapped" else np.random.default_rng(seed).random(len(pairs)) < 0.5
    winner, loser = np.where(swap, pairs.loser, pairs.winner), np.where(swap, pairs.winner, pairs.loser)
    return Pairs(pairs.group, winner, loser, np.where(swap, -pairs.margin, pairs.margin))


def table(pairs: Pairs, chooser: Chooser) -> pa.Table:
    """The pairs of a part of the groups as a table, with both scores and each expert's gap."""
    winner, loser = (pairs.group, pairs.winner), (pairs.group, pairs.loser)
    mixed = chooser.mixed
    gaps = {name: normal[winner] - normal[loser] for name, normal in chooser.normal.items()}
    columns = [
        chooser.grid.groups.take(pa.array(pairs.group)),
        pairs.winner.astype(np.int16), pairs.loser.astype(np.int16),
        mixed[winner].astype(np.float32), mixed[loser].astype(np.float32), pairs.margin.astype(np.float32),
        *(gap.astype(np.float32) for gap in gaps.values()),
    ]
    return pa.table(columns, schema=schemas.pairs(list(gaps)))
