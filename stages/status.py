"""`fdpo status`: what is done, what is stale and why, what is damaged, and how big it all is."""

import shutil
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Output, Step, read_json
from stages import Session
from stages.single import most_rounds


def run(session: Session, verify: bool, repair: bool) -> None:
    root = session.run.root
    if not root.is_dir():
        raise UserError(f"there is no run at {root}: `fdpo round` makes it, --name names another")
    chain = session.chain(max(most_rounds(session), session.config.rounds))
    rows, current = [], set()
    for step in chain.steps:
        current.add(step.folder)
        state, detail = _state(session, step)
        seconds = f"{session.output(step).manifest['seconds']:.1f}" if state == "done" else ""
        rows.append([f"round {step.round}", step.name, state, detail, _size(root / step.folder), seconds])
    others = [path for path in root.glob("round-*/*-*") if f"{path.parent.name}/{path.name}" not in current]
    show(f"{root}", ["", "step", "state", "", "size", "seconds"], rows, right=False)
    if others:
        total = sum(_bytes(path) for path in others)
        session.say(f"{len(others)} results of other settings, {size(total)}; the same settings find them again")
    if repair:
        with session.run.lock():
            _verify(session, repair)
    elif verify:
        _verify(session, repair)


def _state(session: Session, step: Step) -> tuple[str, str]:
    folder = session.run.root / step.folder
    if session.run.done(step):
        return "done", ""
    shards = len(list((folder / "parts").glob("*.json"))) if folder.is_dir() else 0
    if folder.is_dir():
        return "begun", f"{shards} shards are there" if step.stage not in ("finetune", "prepare") else "goes on from its last checkpoint"
    others = [path for path in folder.parent.glob(f"{step.name}-????????") if (path / "claim.json").is_file()]
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return "stale", why(read_json(newest / "claim.json"), step.claim)
    return "missing", ""


def why(old: dict, new: dict) -> str:
    """What differs between two claims, in a few words; the inputs only if nothing nearer does.

    >>> why({"config": {"beta": 1}, "inputs": {}}, {"config": {"beta": 2}, "inputs": {}})
    'beta: 1 -> 2'
    """
    own = [
        f"{key}: {old['config'].get(key, 'absent')} -> {new['config'].get(key, 'absent')}"
        for key in sorted(old["config"].keys() | new["config"].keys())
        if old["config"].get(key, "absent") != new["config"].get(key, "absent")
    ]
    own += [f"{name} changed" for name in sorted(new.get("files", {})) if old.get("files", {}).get(name) != new["files"][name]]
    if old.get("version") != new.get("version"):
        own.append(f"the stage's meaning changed (version {old.get('version')} -> {new.get('version')})")
    inputs = [f"{role} is made anew" for role in sorted(new["inputs"]) if old["inputs"].get(role) != new["inputs"][role]]
    return "; ".join(own or inputs[:2])


def _verify(session: Session, repair: bool) -> None:
    """Re-hash every file of the run, those of other settings and of steps not yet done too."""
    damaged = 0
    for folder in sorted(session.run.root.glob("round-*/*-*")):
        out = Output(folder, {}, {})
        for complaint, shard in out.verify():
            damaged += 1
            session.say(complaint)
            if repair and shard is not None:
                out.drop(shard)
            elif repair:
                shutil.rmtree(folder)
                break
    files = "1 damaged file" if damaged == 1 else f"{damaged} damaged files"
    if not damaged:
        session.say("every file is as it was written")
    elif repair:
        session.say(f"{files} dropped: `fdpo round` makes what is missing again")
    else:
        raise UserError(f"{files}: `fdpo status --repair` drops what is damaged, `fdpo round` then makes it again")


def _size(folder: Path) -> str:
    return size(_bytes(folder)) if folder.is_dir() else ""


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
