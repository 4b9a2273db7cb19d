"""One page on a round of imported pairs: what they are and look like, what was left out, what the checks say, how training and evaluation went."""

from pathlib import Path

import pyarrow as pa

from fashiondpo_pipeline import checks, diagnosis, formats, pairsets, report, seeds
from fashiondpo_pipeline.grid import Grid
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.report import Record, thumbnail
from fashiondpo_pipeline.workspace import Output, write_page
from stages import Round, Session
from stages.encode import sampled_of
from stages.report import grid_of, right_of_both, strength_of, thumbnails


def write(session: Session, r: Round) -> Path:
    """`imported-ID.html` in the run's folder, of what is done of the round; the page's path."""
    pairs, finetune = PairSet.open(r.pair.args["pairs"]), session.output(r.finetune)
    found = session.output(r.pair).manifest["numbers"]["checks"]
    evaluated = session.output(r.evaluate).manifest["numbers"] if session.run.done(r.evaluate) else None
    record = _record(session, r, finetune, evaluated)
    manifest = pairs.manifest
    text = report.render(
        "imported.html.j2", record=record, report=report, evaluated=evaluated, title=f"Imported pairs, round {r.number} of {session.config.name}",
        source=manifest.get("source", ""), counts=pairsets.in_words(pairs), dropped=manifest.get("dropped", {}), notes=formats.notes(pairs),
        checks=checks.sentences(found), bias=found["bias"], looked=found.get("looked", 0), trained=finetune.manifest["numbers"],
        cautions=[report.described(one) for one in _cautions(session, r, record, finetune, evaluated)],
        cards=_cards(pairs, record.last.pairs, session.config.report.pairs), **_looks(session, r, record, evaluated),
    )
    path = session.run.root / f"imported-{r.finetune.fingerprint}.html"
    write_page(path, text)
    return path


def _cautions(session: Session, r: Round, record: Record, finetune: Output, evaluated: dict | None) -> list[diagnosis.Finding]:
    """What gives cause to doubt the round, and what its measures of size say; an alarm of its pictures too.
    """
    found = diagnosis.of_evidence(finetune.manifest["numbers"]["pairs"], record.last.steps, evaluated)
    if evaluated is None:
        return found
    size = [one for one in diagnosis.of_size(evaluated, r.finetune.config) if one.level != "note"]  # the page has those as remarks
    return [*diagnosis.of_round(r.number, evaluated, session.config.evaluate.drift), *found, *size]


def _record(session: Session, r: Round, finetune: Output, evaluated: dict | None) -> Record:
    """What the report's parts are made from: as of a round of one's own, but for candidates and their scores, which there are none of."""
    section, out = session.config.pair, session.output(r.pair)
    base = held_out = Grid(pa.array([], pa.string()), {})
    if evaluated is not None:
        inputs = r.evaluate.inputs
        base = grid_of(session, inputs["base"], {name: inputs[f"base-score-{name}"] for name in r.held_out_scores})
        held_out = grid_of(session, r.held_out, r.held_out_scores)
    weights = section.weights if evaluated is not None and evaluated["judge"] == "mix" else {}  # nobody of them made these pairs
    numbers = finetune.manifest["numbers"]
    done = report.Round(
        r.number, r.before, evaluated or {}, held_out, held_out, Rule(**section.rule | {"weights": weights}),
        out.table("pairs").combine_chunks(), out.manifest["numbers"], finetune.table("steps"),
        finetune.table("columns") if finetune.shards("columns") else None,
        r.finetune.config | {name: numbers[name] for name in ("signals", "heeds") if name in numbers}, sampled_of(r.finetune)["steps"],
        strength_of(session, r),
    )
    right = right_of_both(session, r.evaluate, base) if evaluated is not None else None
    return Record(session.config, base, [done], [], right)


def _cards(pairs: PairSet, table: pa.Table, most: int) -> list[dict]:
    """Some pairs with their pictures, drawn by key, in the set's order."""
    rows = table.to_pylist()
    chosen = sorted(range(len(rows)), key=lambda n: seeds.key("shown", rows[n]["group"], rows[n]["winner"], rows[n]["loser"]))[:most]
    cards = []
    for row in (rows[n] for n in sorted(chosen)):
        shown = {role: pairs.picture(row["group"], row[role]) for role in ("winner", "loser")}
        sides = [{"role": role, "picture": thumbnail(one["picture"]["bytes"], f"{row['group']}/{row[role]}")} for role, one in shown.items()]
        cards.append({"prompt": shown["winner"]["prompt"], "sides": sides, "share": row.get("share"), "gap": row["margin"]})
    return cards


def _looks(session: Session, r: Round, record: Record, evaluated: dict | None) -> dict:
    """The held-out prompts that are shown before and after; none before there is an evaluation."""
    if evaluated is None:
        return {"rows": [], "grids": [], "leading": []}
    rows, leading, names = report.chosen_prompts(record), report.leading(record), record.base.groups.to_pylist()
    prompts: dict[str, str] = {}
    wanted = {(names[row], i) for row in rows for i in range(min(record.config.report.pictures, record.base.k))}
    wanted |= {(names[one.row], one.number) for one in leading}
    # the page numbers its draws: 0 is the base, 1 the only round that is shown
    draws = {number: thumbnails(session.output(step), wanted, prompts) for number, step in ((0, r.evaluate.inputs["base"]), (1, r.held_out))}
    return {"leading": report.leading_cards(record, leading, prompts, draws[0], draws[1]),
            "rows": rows, "grids": report.before_and_after(record, rows, prompts, draws)}
