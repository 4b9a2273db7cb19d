"""One stage of one round, and which round is meant when none is named."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fashiondpo_pipeline import diagnosis, pairsets
from fashiondpo_pipeline.config import OfRound, Pair, may_differ
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.identity import fingerprint
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.prompts import HELD_OUT
from fashiondpo_pipeline.terminal import size
from fashiondpo_pipeline.terms import check_fits_pictures
from fashiondpo_pipeline.workspace import Step, read_sealed
from stages import STAGES, Chain, Round, Session, trained
from stages.naming import command_for
from stages.plan import line_of
from stages.rounds import in_words


def run(session: Session, stage: str, number: int | None, pairs: str | None) -> None:
    """Run what `stage` adds to a round. Raises UserError if something it reads has not been made."""
    chain, number = choose(session, stage, number, pairs)
    steps = [] if stage == "report" else steps_of(chain, chain.rounds[number], stage)
    if stage in ("sample", "finetune") and not all(map(session.run.done, steps)):
        if stage == "finetune" and not chain.rounds[number].imported:
            session.check_objectives()
        session.check_model()
    if stage == "report":  # it reads, and writes whole or not at all: a run that goes on is not in its way
        for step in chain.steps:
            session.output(step)
        from stages import report  # here, for the same reason as in rounds

        if session.first:
            session.say(f"report   {report.write(session, chain)}")
        return
    with session.lock():
        own = {step.folder for step in steps}
        for step in steps:
            for role, wanted in step.inputs.items():
                if wanted.folder not in own and not session.run.done(wanted):
                    raise UserError(f"round {number} {stage} reads {role} of round {wanted.round} ({wanted.name}), which is not there "
                                    f"with these settings: {_way_to(session, number, wanted)}")
        if stage == "sample" and not session.run.done(steps[-1]):
            cost = line_of(session, steps[-1])
            session.say(f"round {number} sample: {cost.rows:,} candidates, about {size(cost.bytes)} to write, {cost.forwards:,} denoiser rows")
        ran = session.execute(steps)
    if not session.first:
        return
    r = chain.rounds[number]
    if r.imported:
        from stages import imported_report  # here, for the same reason as above

        session.say(f"report   {imported_report.write(session, r)}")
    if not ran:
        session.say(f"round {number} {stage}: done already, nothing to do")
    elif stage == "evaluate":
        numbers, finetune = session.output(steps[-1]).manifest["numbers"], session.output(chain.rounds[number].finetune)
        session.say(f"round {number}: {in_words(numbers, r.before)}")
        evidence = diagnosis.of_evidence(finetune.manifest["numbers"]["pairs"], finetune.table("steps"), numbers)
        for finding in [*evidence, *diagnosis.of_size(numbers, r.finetune.config)]:
            session.say(f"round {number}: {finding.level}: {finding.sentence}")
    else:
        numbers = session.output(steps[-1]).manifest["numbers"] if stage == "pair" else {}
        made = f"{numbers['pairs']:,} pairs, {numbers['rejected']} groups without · " if numbers else ""
        session.say(f"round {number} {stage}: {made}{sum(session.output(step).manifest['seconds'] for step in ran):.1f} s")
    session.say(f"next: {_next(session, r, stage, pairs)}")


def _next(session: Session, r: Round, stage: str, pairs: str | None) -> str:
    """The command that goes on from a stage of a round that is done."""
    following = ["generate", session.prompts[HELD_OUT].rows[0]["prompt"]] if stage == "evaluate" else [STAGES[STAGES.index(stage) + 1]]
    of_round = [] if r.imported and r.number == 1 else ["--round", r.number]
    of_pairs = ["--pairs", pairs] if pairs else []
    # what was trained on imported pairs is found again with its settings
    return session.command(*following, *of_round, *of_pairs, without=trained.TAKEN if r.imported else ())


def _way_to(session: Session, number: int, wanted: Step) -> str:
    """How to come by a step that is not there: make it, or change one round alone where it is there with other settings."""
    makes = f"`{session.command(command_for(wanted), '--round', wanted.round)}` makes it" + (
        ", or `fdpo round` with the same options" if session.options else ", or `fdpo round`")
    own = [text for text in session.overridden(*OfRound.model_fields) if may_differ(text)]
    if not own or number == 1 or not any(session.run.root.glob(f"round-{wanted.round:02d}/{wanted.name}-????????/manifest.json")):
        return makes
    alone = " ".join(f"--set by_round.{number}.{text}" for text in own)
    return f"to change round {number} alone, write {alone} in place of {' '.join(f'--set {text}' for text in own)}; otherwise {makes}"


def steps_of(chain: Chain, r: Round, stage: str) -> list[Step]:
    """A round's steps that belong to a stage's command."""
    if stage == "sample":
        return [chain.encode, r.sample]
    if stage == "finetune" and r.imported:
        drawing = [chain.encode, *chain.prepared.values()] if r.tried else []
        return [r.pair, r.finetune.inputs["encode"], r.sample, *drawing, *r.trained]
    if stage == "finetune":
        return [chain.encode, *r.trained]
    if stage == "score":
        return [*chain.prepared.values(), *r.embeddings.values(), *r.scores.values()]
    if stage == "evaluate":
        held_out = {s.folder: s for n in (0, r.before, r.number) for s in chain.rounds[n].watching}
        return [chain.encode, *chain.prepared.values(), *held_out.values(), r.evaluate]
    return [getattr(r, stage)]


def choose(session: Session, stage: str, number: int | None, pairs: str | None = None) -> tuple[Chain, int]:
    """The chain, and the round meant: the one named, else the first one where `stage` is still to do, else the last.

    Of imported pairs it is the first round where none is named.
    """
    number = number_of(session, number, pairs)
    if number is None:
        chain = session.chain(max(most_rounds(session), session.config.rounds))
        if stage == "report":
            number = last(session, chain, lambda r: r.evaluate)
            return session.chain(number), number
        todo = [r.number for r in chain.rounds[1:] if not all(map(session.run.done, steps_of(chain, r, stage)))]
        number = todo[0] if todo else len(chain.rounds) - 1
    section = {number: section_of(session, number, pairs, stage != "finetune")} if pairs else None
    return session.chain(number, section, number if stage == "score" else None), number


def most_rounds(session: Session) -> int:
    """The highest round that has a folder."""
    return max((int(path.name.removeprefix("round-")) for path in session.run.root.glob("round-[0-9]*")), default=1) or 1


def last(session: Session, chain: Chain, step_of: Callable[[Round], Step | None]) -> int:
    """The last round whose step is done. Raises UserError if there is none."""
    done = [r.number for r in chain.rounds[1:] if (step := step_of(r)) and session.run.done(step)]
    if not done:
        raise UserError(f"{session.run.root}: no round has been made with these settings; "
                        f"`{session.command('status')}` shows what there is, `{session.command('round')}` makes one")
    return done[-1]


def is_path(pairs: str) -> bool:
    """Whether --pairs names files rather than what has an id."""
    return Path(pairs).exists() or not re.fullmatch(r"[0-9a-f]{8}", pairs)


def imported(session: Session, pairs: str) -> bool:
    """Whether --pairs names an imported pair set, or a training on one."""
    return is_path(pairs) or trained.named(session, pairs) is not None


def number_of(session: Session, number: int | None, pairs: str | None) -> int | None:
    """The round named; where none is, that of the training that --pairs names, and the first one of imported pairs."""
    if number is not None or not pairs:
        return number
    found = None if is_path(pairs) else trained.named(session, pairs)
    return found.round if found else 1 if is_path(pairs) else None


def section_of(session: Session, number: int, pairs: str, made: bool = True) -> Pair | PairSet:
    """What --pairs names: what `fdpo rescore` saved for this round, an imported pair set, files that are imported into the run, or a training.

    made: what was trained on imported pairs is meant, so that its settings are taken up; else it is to be trained with those in force.
    """
    training = None if is_path(pairs) else trained.named(session, pairs)
    if not is_path(pairs) and training is None:
        return saved_pairs(session, number, pairs)
    found = PairSet.open(training.pairs) if training else _imported(session, pairs)
    if made or training:
        trained.take_up(session, number, found, training.id if training else None)
    return found


def _imported(session: Session, pairs: str) -> PairSet:
    """The pair set at a path, or of the files there."""
    path = Path(pairs)
    if (path / "manifest.json").is_file():
        return PairSet.open(path)
    from fashiondpo_pipeline.formats import guess, notes, read  # here, as most commands import nothing

    if not path.exists():
        raise UserError(f"--pairs: there is no {path}, nor does an id look like that: name a pair set, files to import, or the id of "
                        "what `fdpo rescore` saved or `fdpo finetune --pairs` trained")
    name = guess.guess(path)
    folder = session.run.root / "imported" / f"{path.stem}-{made_of(name, path)}"
    if (folder / "manifest.json").is_file():
        return PairSet.open(folder)
    check_fits_pictures(session.config.finetune)  # before the import, which may take hours
    found = read(name, path, folder)
    session.say(f"imported {path} as {name}: {pairsets.in_words(found)}")
    for line in notes(found):
        session.say(line)
    return found


def made_of(name: str, path: Path, how: Sequence = ()) -> str:
    """What tells whether files of other programs are those that were read before: where they are, their sizes and times, and how."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stand = [[file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return fingerprint([name, str(path.resolve()), stand, *how])


def saved_pairs(session: Session, number: int, fingerprint: str) -> Pair:
    """The pair section that a saved pair set was made with."""
    folder = session.run.root / f"round-{number:02d}" / f"pair-{fingerprint}"
    if not (folder / "manifest.json").is_file():
        there = ", ".join(sorted(p.name.removeprefix("pair-") for p in folder.parent.glob("pair-*"))) or "none"
        raise UserError(f"round {number} has no pairs {fingerprint}; there are: {there}")
    session.settle()
    config = read_sealed(folder / "manifest.json")["claim"]["config"]
    section = Pair.model_validate({key: value for key, value in config.items() if key in Pair.model_fields})
    for name in section.weights:
        if name not in session.config.experts:
            raise UserError(f"pairs {fingerprint} reward the expert '{name}', which these settings do not have: "
                            "put it back under experts, or `fdpo rescore` again")
    return section


def finished(session: Session, number: int | None, pairs: str | None = None) -> tuple[Step | None, int]:
    """(step whose adapter is the round's, round) of the round named, else of the one that is kept; (None, 0) for the base.

    Kept is the last that is finished, or the best one.
    """
    if number == 0:
        return None, 0
    number = number_of(session, number, pairs)
    if number is None:
        chain = session.chain(max(most_rounds(session), session.config.rounds))
        number = last(session, chain, lambda r: r.adapter)
        if session.config.evaluate.keep == "best" and session.run.done(chain.rounds[number].evaluate):
            number = session.kept(chain)
            if not number:
                return None, 0
    section = {number: section_of(session, number, pairs)} if pairs else None
    step = session.chain(number, section).rounds[number].adapter
    session.output(step)
    return step, number
