"""`fdpo status`: what is done, what is stale and why, what is damaged, and how big it all is."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.prompts import HELD_OUT
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Output, Step, read_json
from stages import Chain, Session, trained
from stages.single import most_rounds

TOLD = 2  # differences that are told of what is stale
LETTERS = 24  # of each value


def run(session: Session, verify: bool, repair: bool) -> None:
    root = session.run.root
    if not root.is_dir():
        raise UserError(f"there is no run at {root}: `{session.command('round')}` makes it, --name names another")
    chain = session.chain(max(most_rounds(session), session.config.rounds))
    current = {step.folder for step in chain.steps}
    others = [path for path in root.glob("round-*/*-*") if f"{path.parent.name}/{path.name}" not in current]
    imported = _imported(others)
    rows = [[f"round {step.round}", step.name, *_row(session, step, imported)] for step in chain.steps]
    rows += [[f"round {int(path.parent.name.removeprefix('round-'))}", path.name, *_found(path, words)] for path, words in imported.items()]
    others = [path for path in others if path not in imported]
    show(f"{root}", ["", "step", "state", "", "size", "seconds"], rows, right=False)
    if others:
        total = sum(map(_bytes, others))
        session.say(f"{len(others)} results of other settings, {size(total)}; the same settings find them again")
    if repair:
        with session.run.lock():
            _verify(session, repair)
    elif verify:
        _verify(session, repair)
    else:
        _next(session, chain, [row[2] for row in rows[: len(chain.steps)]])


def _next(session: Session, chain: Chain, states: list[str]) -> None:
    """Say what goes on from here: the last training on imported pairs where there is nothing else, the round begun, or pictures."""
    begun = any(state in ("done", "begun", "stale") for step, state in zip(chain.steps, states, strict=True) if step.round)
    latest = next(iter(trained.trainings(session.run)), None)
    if latest and not begun:
        session.say(f"next: {session.command('evaluate', '--pairs', latest.id)}")
    elif set(states) == {"done"}:
        session.say(f"next: {session.command('generate', session.prompts[HELD_OUT].rows[0]['prompt'], '--round', session.kept(chain))}")
    else:
        session.say(f"next: {session.command('round')}")


def _row(session: Session, step: Step, imported: Collection[Path]) -> tuple[str, str, str, str]:
    """State, why or how far, size, seconds. What was made of imported pairs is no older state of a step."""
    folder = session.run.root / step.folder
    if session.run.done(step):
        grown = f"more has come in since: `{session.command('score', '--round', step.round)}` counts it" if step.args.get("grown") else ""
        return _found(folder, grown)
    if folder.is_dir():
        return "begun", _progress(step, folder), size(_bytes(folder)), ""
    others = [path for path in folder.parent.glob(f"{step.name}-????????") if path not in imported and (path / "claim.json").is_file()]
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return "stale", why(read_json(newest / "claim.json"), step.claim), "", ""
    return "missing", "", "", ""


def _found(folder: Path, words: str) -> tuple[str, str, str, str]:
    """The same of a folder that is there."""
    if not (folder / "manifest.json").is_file():
        return "begun", words, size(_bytes(folder)), ""
    manifest = read_json(folder / "manifest.json")
    return "done", words, size(sum(file["bytes"] for file in manifest["files"].values())), f"{manifest['seconds']:.1f}"


def _imported(others: list[Path]) -> dict[Path, str]:
    """Of the folders that are in no chain, those of rounds on imported pairs -> the pair set: what took it in, and all that was made of that."""
    claims = {path.name[-8:]: (path, read_json(path / "claim.json")) for path in others if (path / "claim.json").is_file()}
    sets = {key: claim["files"]["pairs"] for key, (_, claim) in claims.items() if "pairs" in claim["files"]}  # fingerprint -> the set's identity
    while more := {key: sets[min(sets.keys() & claim["inputs"].values())] for key, (_, claim) in claims.items()
                   if key not in sets and sets.keys() & claim["inputs"].values()}:
        sets |= more
    adopted = [claims[key][0] for key in sets if claims[key][1]["stage"] == "adopt" and (claims[key][0] / "manifest.json").is_file()]
    names = {sets[path.name[-8:]]: read_json(path / "manifest.json")["numbers"].get("set") for path in adopted}
    found = {claims[key][0]: f"imported pairs{': ' + name if (name := names.get(identity)) else ''}" for key, identity in sets.items()}
    return dict(sorted(found.items(), key=lambda one: (one[0].parent.name, one[1], (one[0] / "claim.json").stat().st_mtime_ns)))


def _progress(step: Step, folder: Path) -> str:
    if step.stage in ("finetune", "prepare"):
        return "goes on from its last checkpoint"
    parts = folder / "parts"
    shards = sum(name.endswith(".json") for name in os.listdir(parts)) if parts.is_dir() else 0
    return f"{shards} shards are there"


def why(old: dict, new: dict) -> str:
    """What differs between two claims, in a few words: the first things that do, and how many more; the inputs only if nothing nearer does.

    >>> why({"config": {"beta": 1}, "inputs": {}}, {"config": {"beta": 2}, "inputs": {}})
    'beta: 1 -> 2'
    """
    own = [
        f"{key}: {_short(old['config'].get(key, 'absent'))} -> {_short(new['config'].get(key, 'absent'))}"
        for key in sorted(old["config"].keys() | new["config"].keys())
        if old["config"].get(key, "absent") != new["config"].get(key, "absent")
    ]
    own += [f"{name} changed" for name in sorted(new.get("files", {})) if old.get("files", {}).get(name) != new["files"][name]]
    if old.get("version") != new.get("version"):
        own.append(f"the stage's meaning changed (version {old.get('version')} -> {new.get('version')})")
    inputs = [f"{role} is made anew" for role in sorted(new["inputs"]) if old["inputs"].get(role) != new["inputs"][role]]
    told = own or inputs
    return "; ".join(told[:TOLD]) + (f"; and {len(told) - TOLD} more" if len(told) > TOLD else "")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LETTERS else text[: LETTERS - 3] + "..."


def _verify(session: Session, repair: bool) -> None:
    """Re-hash every file of the run, those of other settings and of steps not yet done too."""
    damaged = 0
    for folder in sorted(session.run.root.glob("round-*/*-*")):
        out = Output(folder, {}, {})
        for complaint, where in out.verify():
            damaged += 1
            session.say(complaint)
            if not repair:
                continue
            if where is None:
                shutil.rmtree(folder)
                break
            out.drop(where if isinstance(where, int) else None)
    sets = [complaint for name in ("imported", "labels") for folder in sorted(session.run.root.glob(f"{name}/*/manifest.json"))
            for complaint in _altered(folder.parent)]
    for complaint in sets:
        session.say(complaint)
    files = "1 damaged file" if damaged == 1 else f"{damaged} damaged files"
    if not damaged and not sets:
        session.say("every file is as it was written")
    if damaged and repair:
        session.say(f"{files} dropped: `{session.command('round')}` makes what is missing again")
    told = [
        f"{files}: `{session.command('status', '--repair')}` drops what is damaged, `{session.command('round')}` then makes it again"
    ] if damaged and not repair else []
    if sets:
        told.append("damaged pair sets: take them away, then import them, or save what people said, again")
    if told:
        raise UserError("\n".join(told))


def _altered(folder: Path) -> list[str]:
    """What is wrong with a pair set."""
    try:
        return PairSet.open(folder).altered()
    except UserError as problem:
        return [str(problem)]


def _bytes(folder: Path) -> int:
    """What a folder holds, folders within it too."""
    with os.scandir(folder) as entries:
        return sum(map(_bytes_of, entries))


def _bytes_of(entry: os.DirEntry) -> int:
    try:
        return _bytes(Path(entry)) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # a draft that a process at work has just renamed
        return 0
