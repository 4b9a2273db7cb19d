"""What goes in and out of a run: pair sets of other formats, and of a run's own pictures and pairs."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from fashiondpo_pipeline import checks, formats, pairsets, seeds
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.formats import meaning
from fashiondpo_pipeline.identity import fingerprint
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.prompts import TRAIN, Prompts, read
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.workspace import Output, Step
from stages import VERSIONS, Session
from stages.naming import written
from stages.single import last, made_of, most_rounds, saved_pairs


def from_run(session: Session, number: int | None, folder: Path, pairs: str | None = None) -> PairSet:
    """A pair set of one round's pictures and pairs; the last round that has pairs where none is named.

    Which picture of a pair comes first is a coin's matter, thrown by key, so that the place does not tell the winner.
    """
    chain = session.chain(max(most_rounds(session), session.config.rounds))
    number = number or last(session, chain, lambda r: r.pair)
    step = session.chain(number, {number: saved_pairs(session, number, pairs)} if pairs else None).rounds[number]
    sample, paired = session.output(step.sample), session.output(step.pair)
    lineage = {"run": session.config.name, "round": number, "base": session.config.generator.model,
               "sample": sample.manifest["claim"], "pair": paired.manifest["claim"]}
    manifest = {"source": f"round {number} of {session.run.root}", "lineage": lineage, "dropped": {}}
    return pairsets.write(folder, _pictures(sample), _pairs(paired), manifest)


def _pictures(sample: Output) -> Iterator[dict]:
    for shard in sample.shards("candidates"):
        for row in sample.table("candidates", ["group", "candidate", "prompt", "picture", "fault"], shard).to_pylist():
            if not row["fault"]:
                yield {**row, "source": row["picture"]["path"]}


def _pairs(paired: Output) -> Iterator[dict]:
    for shard in paired.shards("pairs"):
        for row in paired.table("pairs", ["group", "winner", "loser", "margin"], shard).to_pylist():
            swap = seeds.key("first", row["group"], row["winner"], row["loser"]) % 2
            first, second = (row["loser"], row["winner"]) if swap else (row["winner"], row["loser"])
            yield {"group": row["group"], "first": first, "second": second, "label": float(not swap), "gap": row["margin"]}


def bring_in(name: str, path: Path | str, folder: Path | None, say: Callable[[str], None], columns: str | None = None,
             split: str | None = None, most: int | None = None) -> PairSet:
    """`fdpo import`: other programs' files as a pair set, with what was left out and what the checks say.

    path: here, or hf://OWNER/NAME@COMMIT. columns: OURS=THEIRS with commas between. split: the part that is read, "all", or None for the
    training part. most: rows that are taken.
    """
    hub = str(path).startswith("hf:")
    folder = folder or Path("pairs") / Path(str(path).partition("@")[0] if hub else path).stem
    wanted = columns_of(columns)
    how = [wanted, split, most]
    if hub:  # a commit is always the same
        stand: str | None = fingerprint([name, str(path), *how])
    else:
        stand = made_of(name, Path(path), how) if Path(path).exists() else None
    same = _there(folder, lambda made: stand is not None and made.get("made_of") == stand, say)
    pairs = same or formats.read(name, path, folder, wanted, split, most, stand)
    found = checks.check(pairs)
    pairs.keep_checks(found)
    say(pairsets.in_words(pairs))
    if pairs.manifest["dropped"]:
        say(f"everything left out, and why: {folder / 'dropped.jsonl'}")
    for line in formats.notes(pairs):
        say(line)
    for line in checks.sentences(found):
        say(line)
    print(folder)
    labelled = pairs.counts["labelled"] > 0
    finetune = written(["finetune", "--pairs", folder, "--set", "finetune.objective=diffusion_dpo"])
    say(f"next: {finetune}" if labelled else f"next: {written(['studio', folder])}, to label them")
    return pairs


def columns_of(text: str | None) -> dict[str, str]:
    """What --columns says, as our name -> the files'. Raises UserError with everything that is wrong with it.

    >>> columns_of("winner=preferred, loser=unpreferred")
    {'winner': 'preferred', 'loser': 'unpreferred'}
    """
    found: dict[str, str] = {}
    problems = []
    for part in filter(None, map(str.strip, (text or "").split(","))):
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not equals or not ours or not theirs:
            problems.append(f"--columns: '{part}' is not OURS=THEIRS, as in winner=preferred")
        elif ours not in meaning.ROLES:
            problems.append(f"--columns: there is no column called '{ours}' here; {did_you_mean(ours, list(meaning.ROLES))}")
        elif ours in found or theirs in found.values():
            problems.append(f"--columns: '{part}' says of a column what was said before")
        found[ours] = theirs
    if problems:
        raise UserError("\n".join(problems))
    return found


def _there(folder: Path, same: Callable[[dict], bool], say: Callable[[str], None]) -> PairSet | None:
    """The pair set in a folder, if it is what the command would make and as it was written: nothing is left to do then, and that is said."""
    if not (folder / "manifest.json").is_file():
        return None
    pairs = PairSet.open(folder)
    if not same(pairs.manifest) or pairs.altered():
        return None
    say(f"{folder} is there already, and is what this makes: nothing to do")
    return pairs


def take_out(name: str, folder: Path, session: Callable[[], Session], number: int | None, pairs: str | None, source: Path | None,
             say: Callable[[str], None]) -> None:
    """`fdpo export-pairs`: a pair set, or one round's pairs, as other programs read them."""
    formats.FORMATS.check(name)
    if source is not None and (number is not None or pairs is not None):
        raise UserError("--from names a pair set, --round and --pairs a run's: give one of them")
    if source is not None:
        _write(name, PairSet.open(source), folder, say)
        return
    with _aside(folder, "set") as place:
        _write(name, from_run(session(), number, place, pairs), folder, say)


@contextmanager
def _aside(folder: Path, what: str) -> Iterator[Path]:
    """A place for a hidden folder beside another, which is gone afterwards; what a killed process left in it goes first."""
    place = folder.absolute().with_name(f".{folder.absolute().name}.{what}.tmp")
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _as_written(name: str, pairs: PairSet, folder: Path) -> bool:
    """Whether a folder is, byte for byte, what would be written."""
    if not (folder / "lineage.json").is_file():
        return False
    with _aside(folder, "again") as place:
        formats.write(name, pairs, place)
        trees = [{path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()} for top in (place, folder)]
    return trees[0] == trees[1]


def _write(name: str, pairs: PairSet, folder: Path, say: Callable[[str], None]) -> None:
    if _as_written(name, pairs, folder):
        say(f"{folder} is there already, and is what this writes: nothing to do")
        print(folder)
        return
    written, lost = formats.write(name, pairs, folder)
    say(f"{', '.join(f'{count:,} {what}' for what, count in written.items())}")
    for reason, count in lost.items():
        say(f"left out: {count:,} x {reason}")
    if lost:
        say(f"every one of them: {folder / 'dropped.jsonl'}")
    print(folder)


def generate_sets(session: Session, prompts: Path, size: int, folder: Path) -> PairSet:
    """`fdpo generate-sets`: pictures of every prompt, each two of a prompt as a pair that waits for a label.

    They are drawn into the run, a shard at a time, so the same command goes on where it was stopped; seeds depend on the run's seed, the
    prompt's key and the picture's number alone.
    """
    found = Prompts([row for split in read(prompts, 0.0).values() for row in split.rows])
    session.prompts = {TRAIN: found}
    s, g = session.config.sample, session.config.generator
    generator = {"use": g.use, "dtype": g.dtype, "variant": g.variant}
    files = {"generator": session.generator_identity, "prompts": found.identity}
    encode = Step("encode", "encode-sets", 0, VERSIONS["encode"], {"negative": s.negative, **generator}, {},
                  {"text": session.source.text_identity(), "prompts": found.identity}, implied=True)
    config = {"seed": session.config.seed, "stream": "sets", "candidates": size, "steps": s.steps, "guidance": s.guidance, "eta": s.eta,
              "guidance_interval": s.guidance_interval, "guidance_rescale": s.guidance_rescale, "negative": s.negative, "height": s.height,
              "width": s.width, "tile": s.tile, **generator}
    step = Step("sample", "sets", 0, VERSIONS["sample"], config, {"encode": encode}, files, {"split": TRAIN})
    if made := _there(folder, lambda made: (made.get("lineage") or {}).get("sample") == step.claim, session.say):
        print(folder)
        return made
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder} is there already: name another folder, or take it away")
    with session.lock():
        session.execute([encode, step])
    drawn = session.output(step)
    lineage = {"model": g.model, "lora": g.lora, "lora_scale": g.lora_scale if g.lora else None, "sample": drawn.manifest["claim"]}
    made = pairsets.write(folder, _pictures(drawn), _unlabelled(drawn), {"source": f"drawn for {prompts}", "lineage": lineage, "dropped": {}})
    session.say(pairsets.in_words(made))
    print(folder)
    session.say(f"next: {written(['studio', folder])}, or {written(['export-pairs', 'csv', 'DIR', '--from', folder])}, to label them")
    return made


def _unlabelled(drawn: Output) -> Iterator[dict]:
    """Each two sound pictures of a prompt; which comes first is a coin's matter, thrown by key."""
    for shard in drawn.shards("candidates"):
        numbers: dict[str, list[int]] = {}
        for row in drawn.table("candidates", ["group", "candidate", "fault"], shard).to_pylist():
            if not row["fault"]:
                numbers.setdefault(row["group"], []).append(row["candidate"])
        for group, there in numbers.items():
            for pair in combinations(there, 2):
                first, second = pair[:: -1 if seeds.key("first", group, *pair) % 2 else 1]
                yield {"group": group, "first": first, "second": second}
