"""`fdpo status`: what is done, what is stale and why, what is damaged, and how big it all is."""

import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from fashiondpo_pipeline import memory
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.prompts import HELD_OUT
from fashiondpo_pipeline.remembered import hash_within
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Step, read_json, read_sealed
from stages import Chain, Session, trained
from stages import verify as check
from stages.rounds import in_words
from stages.single import most_rounds


def run(session: Session, verify: bool, repair: bool) -> None:
    root = session.run.root
    if not root.is_dir():
        raise UserError(f"there is no run at {root}: `{session.command('round')}` makes it, --name names another")
    wrong = None
    if verify:
        try:
            check.run(session, repair)
        except UserError as problem:
            wrong = problem
    try:
        with memory.keeping():
            chain, states = _table(session)
    except UserError as problem:  # what is damaged may be what the table is made from
        raise wrong or problem from None
    if wrong:
        raise wrong
    if not verify:
        _gained(session, chain)
        _next(session, chain, states)


TOLD = 2  # differences that are told of what is stale
LETTERS = 24  # of each value
SHOWN = 20  # rounds that are listed step by step, the last ones; of those before, a round in one state throughout is folded into a line


def _table(session: Session) -> tuple[Chain, list[str]]:
    """Show it; the chain, and each of its steps' state."""
    root, there = session.run.root, There(session.run.root)
    chain = session.chain(max(most_rounds(session), session.config.rounds))
    current = {step.folder for step in chain.steps}
    others = [root / folder for folder in there.folders if folder not in current]
    of_imported = imported(others)
    there.leave_out(f"{path.parent.name}/{path.name}" for path in of_imported)  # they are no older state of a step
    found: list[str] = []
    rows: list[list[str]] = []
    alike: list[tuple[int, str, list[Step]]] = []
    for r in chain.rounds:
        steps = chain.of(r.number)
        of_round = [_state(root, step, there) for step in steps]
        found += of_round
        states = set(of_round)
        if len(states) == 1 and 0 < r.number <= len(chain.rounds) - SHOWN:
            alike.append((r.number, states.pop(), steps))
            continue
        rows += _folded(root, alike) + [[f"round {step.round}", step.name, *_row(session, step, there)] for step in steps]
        alike = []
    rows += _folded(root, alike)
    rows += [[f"round {int(path.parent.name.removeprefix('round-'))}", path.name, *_found(root, path, words)] for path, words in of_imported.items()]
    others = [path for path in others if path not in of_imported]
    show(f"{root}", ["", "step", "state", "", "size", "seconds"], rows, right=False)
    if others:
        total = sum(map(bytes_of, others))
        session.say(f"{len(others)} results of other settings, {size(total)}; the same settings find them again, "
                    f"`{session.command('clean')}` says which nothing needs")
    return chain, found


class There:
    """round-NN/STEP of every step's folder there is, in order, and by the name before its fingerprint."""

    def __init__(self, root: Path):
        self.folders = _folders(root)
        self.alike: dict[str, list[str]] = {}
        for folder in self.folders:
            self.alike.setdefault(folder[:-9], []).append(folder)

    def leave_out(self, folders: Iterable[str]) -> None:
        """Folders that are no other state of any step."""
        for folder in folders:
            self.alike[folder[:-9]].remove(folder)


def _folders(root: Path) -> dict[str, None]:
    rounds = sorted(entry.name for entry in os.scandir(root) if entry.name.startswith("round-") and entry.is_dir())
    return dict.fromkeys(f"{name}/{step}" for name in rounds for step in sorted(os.listdir(root / name)) if "-" in step)


def _next(session: Session, chain: Chain, states: list[str]) -> None:
    """Say what goes on from here: the last training on imported pairs where there is nothing else, the round begun, or pictures."""
    begun = any(state in ("done", "begun", "stale") for step, state in zip(chain.steps, states, strict=True) if step.round)
    latest = None if begun else next(iter(trained.trainings(session.run)), None)
    if latest:
        session.say(f"next: {session.command('evaluate', '--pairs', latest.id)}")
    elif set(states) == {"done"}:
        session.say(f"next: {session.command('generate', session.prompts[HELD_OUT].rows[0]['prompt'], '--round', session.kept(chain))}")
    else:
        session.say(f"next: {session.command('round')}")


def _gained(session: Session, chain: Chain) -> None:
    """Say how much each round gained that was evaluated."""
    for r in chain.rounds[1:][-SHOWN:]:
        if session.run.done(r.evaluate):
            session.say(f"round {r.number}: {in_words(session.output(r.evaluate).manifest['numbers'], r.before)}")


def _state(root: Path, step: Step, there: There) -> str:
    if step.folder in there.folders:
        return "done" if os.path.isfile(f"{root}/{step.folder}/manifest.json") else "begun"
    return "stale" if _others(step, there) else "missing"


def _others(step: Step, there: There) -> list[str]:
    """Folders of the same step under other settings."""
    return there.alike.get(step.folder[:-9], [])


def _folded(root: Path, alike: list[tuple[int, str, list[Step]]]) -> list[list[str]]:
    """A line for each stretch of rounds in one state."""
    found = []
    for state, stretch in groupby(alike, key=lambda one: one[1]):
        parts = list(stretch)
        steps = [step for _, _, of_round in parts for step in of_round]
        first, last = parts[0][0], parts[-1][0]
        label = f"round {first}" if first == last else f"rounds {first}-{last}"
        known = [_size(root, step.folder) for step in steps] if state == "done" else []
        sizes = [size(sum(one[0] for one in known)), f"{sum(one[1] for one in known):.1f}"] if known else ["", ""]
        found.append([label, f"all {len(steps):,} steps", state, "", *sizes])
    return found


def _row(session: Session, step: Step, there: There) -> tuple[str, str, str, str]:
    """State, why or how far, size, seconds."""
    root = session.run.root
    folder, state = root / step.folder, _state(root, step, there)
    if state == "done":
        grown = f"more has come in since: `{session.command('score', '--round', step.round)}` counts it" if step.args.get("grown") else ""
        return _found(root, folder, grown)
    if state == "begun":
        return "begun", _progress(step, folder), size(bytes_of(folder)), ""
    others = [root / path for path in _others(step, there) if (root / path / "claim.json").is_file()]
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return "stale", _why(newest, step.claim), "", ""
    return "missing", "", "", ""


def _why(folder: Path, claim: dict) -> str:
    try:
        return why(read_json(folder / "claim.json"), claim)
    except (UserError, KeyError, TypeError, AttributeError):
        return f"{folder.name}/claim.json is damaged: `fdpo status --verify` names what"


def _found(root: Path, folder: Path, words: str) -> tuple[str, str, str, str]:
    """The same of a folder that is there."""
    if not (folder / "manifest.json").is_file():
        return "begun", words, size(bytes_of(folder)), ""
    try:
        held, seconds = _size(root, folder.relative_to(root).as_posix())
    except UserError:
        return "damaged", "`fdpo status --verify` names what", size(bytes_of(folder)), ""
    return "done", words, size(held), f"{seconds:.1f}"


def _size(root: Path, folder: str) -> tuple[int, float]:
    """(bytes, seconds) of a done step, by its manifest, which is opened when it has changed."""
    return hash_within(root, f"{folder}/manifest.json", _in_manifest)


def _in_manifest(path: Path) -> list:
    manifest = read_sealed(path)
    return [sum(file["bytes"] for file in manifest["files"].values()), manifest["seconds"]]


def imported(others: list[Path]) -> dict[Path, str]:
    """Of the folders that are in no chain, those of rounds on imported pairs -> the pair set: what took it in, and all that was made of that."""
    if not any(path.name.startswith("encode-pairs-") for path in others):
        return {}  # opening every claim takes seconds where they are thousands
    claims = {path.name[-8:]: (path, read_json(path / "claim.json")) for path in others if (path / "claim.json").is_file()}
    sets = {key: claim["files"]["pairs"] for key, (_, claim) in claims.items() if "pairs" in claim["files"]}  # fingerprint -> the set's identity
    while more := {key: sets[min(sets.keys() & claim["inputs"].values())] for key, (_, claim) in claims.items()
                   if key not in sets and sets.keys() & claim["inputs"].values()}:
        sets |= more
    adopted = [claims[key][0] for key in sets if claims[key][1]["stage"] == "adopt" and (claims[key][0] / "manifest.json").is_file()]
    names = {sets[path.name[-8:]]: read_sealed(path / "manifest.json")["numbers"].get("set") for path in adopted}
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


def bytes_of(folder: Path) -> int:
    """What a folder holds, folders within it too."""
    with os.scandir(folder) as entries:
        return sum(map(_entry, entries))


def _entry(entry: os.DirEntry) -> int:
    try:
        return bytes_of(Path(entry)) if entry.is_dir(follow_symlinks=False) else entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # a draft that a process at work has just renamed
        return 0
