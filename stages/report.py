"""Everything of a run -> one self-contained HTML file and its numbers as JSON. Reads tables only, loads no model."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import __version__, report
from fashiondpo_pipeline.config import template
from fashiondpo_pipeline.grid import Grid
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.report import Missing, Pictures, Record, Round, thumbnail
from fashiondpo_pipeline.workspace import Output, Step, write_json, write_page
from stages import STAGES, Chain, Session
from stages.evaluate import right_of
from stages.naming import command_for


def write(session: Session, chain: Chain) -> Path:
    """`report.html` and `numbers.json` of a finished chain, written anew; the path of the page.

    Equal results give the same bytes of numbers.json; seconds and versions are in the page only.
    """
    record = read(session, chain)
    numbers = session.run.root / "numbers.json"
    write_json(numbers, {f"round {r.number}": r.numbers for r in record.rounds})
    page = session.run.root / "report.html"
    parts = _pictures(session, chain, record)
    write_page(page, report.render(record=record, report=report, made=_made(session, chain), **parts), numbers)
    return page


def read(session: Session, chain: Chain) -> Record:
    """What the report's figures are made from."""
    base, *rounds = chain.rounds
    grid, made = grid_of(session, base.held_out, base.held_out_scores), [_round(session, r) for r in rounds]
    return Record(
        session.config, grid, made,
        [missing for step in chain.steps if step.stage == "score" for missing in _missing(session.output(step), step)],
        right_of_both(session, chain.rounds[-1].evaluate, grid),
    )


def right_of_both(session: Session, evaluate: Step, grid: Grid) -> list[np.ndarray] | None:
    """Which held-out pictures of the base and of a round are right, as `Record` has it; None where the judge does not classify."""
    name = session.output(evaluate).manifest["numbers"]["judge"]
    steps = [evaluate.inputs.get(f"{role}-score-{name}") for role in ("base", "after")]
    found = [right_of(session.output(step), grid, name) for step in steps if step is not None]
    known = [one for one in found if one is not None]
    return known if len(known) == 2 else None


def _round(session: Session, r) -> Round:
    pair, finetune = session.output(r.pair), session.output(r.finetune)
    rule = {name: value for name, value in r.pair.config.items() if name != "seed"}
    noted = {name: finetune.manifest["numbers"][name] for name in ("signals", "heeds") if name in finetune.manifest["numbers"]}
    columns = ["group", "winner", "loser", "winner_score", "loser_score", "margin"]
    return Round(
        r.number, r.before, session.output(r.evaluate).manifest["numbers"],
        grid_of(session, r.held_out, r.held_out_scores), grid_of(session, r.sample, r.scores),
        Rule(**rule), pair.table("pairs", columns).combine_chunks(), pair.manifest["numbers"],
        finetune.table("steps"), finetune.table("columns") if finetune.shards("columns") else None,
        r.finetune.config | noted, r.sample.config["steps"], strength_of(session, r), finetune.manifest["numbers"].get("divergence"),
    )


def strength_of(session: Session, r) -> dict | None:
    """What the step noted that gave a round's adapter its strength; None where that is as trained."""
    return session.output(r.strength).manifest["numbers"] if r.strength else None


def grid_of(session: Session, sample: Step, scores: dict[str, Step]) -> Grid:
    """The scores of one draw's pictures."""
    tables = {name: session.output(step).table("scores", ["group", "candidate", "score"]) for name, step in scores.items()}
    return Grid.of(session.output(sample).table("candidates", ["group", "candidate"]), tables)


def _missing(out: Output, step: Step) -> list[Missing]:
    count, known = (out.manifest["numbers"][name] for name in ("missing", "scored"))
    if not count:
        return []
    reasons = Counter(out.table("scores", ["reason"])["reason"].drop_null().to_pylist())
    by = f"round {step.round}" if step.round else "the base"
    where = f"held-out pictures of {by}" if step.name.startswith("held-out") else f"candidates of {by}"
    return [Missing(step.args["expert"], where, count, count + known, reasons.most_common(1)[0][0])]


# -- pictures


def _pictures(session: Session, chain: Chain, record: Record) -> dict:
    """The parts of the page that show pictures: prompts before and after, widest and narrowest pairs."""
    rows, leading = report.chosen_prompts(record), report.leading(record)
    names = record.base.groups.to_pylist()
    wanted = {(names[row], i) for row in rows for i in range(min(record.config.report.pictures, record.base.k))}
    wanted |= {(names[one.row], one.number) for one in leading}
    draws: dict[int, Any] = {}
    prompts: dict[str, str] = {}
    for number in (0, *(r.number for r in record.shown)):
        draws[number] = thumbnails(session.output(chain.rounds[number].held_out), wanted, prompts)

    widest, narrowest = report.chosen_pairs(record.last, record.config.report.pairs)
    pairs = record.last.pairs.take(pa.array(widest + narrowest, pa.int64())).to_pylist()
    wanted = {(pair["group"], pair[role]) for pair in pairs for role in ("winner", "loser")}
    candidates = thumbnails(session.output(chain.rounds[-1].sample), wanted, prompts)
    return {
        "leading": report.leading_cards(record, leading, prompts, draws[0], draws[record.last.number]),
        "rows": rows, "grids": report.before_and_after(record, rows, prompts, draws),
        "widest": report.pair_cards(record, widest, prompts, candidates),
        "narrowest": report.pair_cards(record, narrowest, prompts, candidates),
    }


def thumbnails(out: Output, wanted: set[tuple[str, int]], prompts: dict[str, str]) -> Pictures:
    """The wanted pictures, small; what was asked for is noted in `prompts`."""
    found = _read_pictures(out, wanted)
    prompts.update({group: prompt for (group, _), (_, prompt) in found.items()})
    return {place: thumbnail(data, "/".join(map(str, place))) for place, (data, _) in found.items()}


def _read_pictures(out: Output, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], tuple[bytes, str]]:
    """(group, candidate) -> (file, prompt) of the wanted pictures; one shard's pictures in memory at a time."""
    groups = pa.array(sorted({group for group, _ in wanted}), pa.string())
    found = {}
    for shard in out.shards("candidates"):
        if not pc.any(pc.is_in(out.table("candidates", ["group"], shard)["group"], groups)).as_py():
            continue
        table = out.table("candidates", ["group", "candidate", "prompt", "picture"], shard)
        for row in table.filter(pc.is_in(table["group"], groups)).to_pylist():
            if (row["group"], row["candidate"]) in wanted:
                found[row["group"], row["candidate"]] = row["picture"]["bytes"], row["prompt"]
    return found


# -- how it was made


def _made(session: Session, chain: Chain) -> dict:
    """Configuration, fingerprints, seconds and versions."""
    done = [(step, session.output(step).manifest) for step in chain.steps]
    last = session.output(chain.rounds[-1].evaluate).manifest
    seconds = [_seconds([(step, manifest) for step, manifest in done if step.round == r.number]) for r in chain.rounds]
    return {
        "version": __version__, "root": session.run.root, "config": template(session.config), "steps": done,
        "versions": last["versions"], "git": last["git"], "mixed": any(m["versions"] != last["versions"] for _, m in done),
        "seconds": seconds, "stages": [name for name in STAGES if any(name in row for row in seconds)],
        "finetune": session.output(chain.rounds[-1].finetune).manifest["numbers"], "sources": chain.rounds[0].held_out.files,
        "left_out": session.left_out,
    }


def _seconds(steps: list[tuple[Step, dict]]) -> dict[str, float]:
    """Seconds by the command that a person knows the step by."""
    found: dict[str, float] = {}
    for step, manifest in steps:
        name = command_for(step)
        found[name] = found.get(name, 0.0) + manifest["seconds"]
    return found
