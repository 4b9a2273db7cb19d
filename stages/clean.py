"""`fdpo clean`: what no claim of the present settings needs any more, by round and step with its bytes; with --yes it goes.

What people said, labels, imported pairs and what was trained on them stay, and so do pairs that `fdpo rescore` saved of candidates
that stay, and what was trained on those.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import read_json
from stages import Session
from stages.single import most_rounds
from stages.status import There, bytes_of, imported

GONE = ".gone"  # where folders go first: a half-deleted one must not pass for a step


def run(session: Session, others: Sequence[Session], yes: bool) -> None:
    """others: runs of the same folder under other settings, whose results stay too. Raises UserError where nothing is of any of them."""
    root = session.run.root
    if not root.is_dir():
        raise UserError(f"there is no run at {root}: `fdpo round` makes it, --name names another")
    if not yes:
        return _tell(session, _unneeded(session, others))
    with session.run.lock():
        shutil.rmtree(root / GONE, ignore_errors=True)
        found = _unneeded(session, others)
        freed = sum(map(bytes_of, found))
        for path in found:
            (root / GONE).mkdir(exist_ok=True)
            os.replace(path, root / GONE / f"{path.parent.name}-{path.name}")
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        shutil.rmtree(root / GONE, ignore_errors=True)
    session.say(f"{len(found)} results gone, {size(freed)} freed" if found else "nothing to free: every result is of these settings")


def _tell(session: Session, found: list[Path]) -> None:
    if not found:
        session.say("nothing to free: every result is of these settings")
        return
    rows = [[f"round {int(path.parent.name.removeprefix('round-'))}", path.name, size(bytes_of(path))] for path in found]
    show("no claim of these settings needs", ["", "step", "size"], rows, right=False)
    session.say(f"{len(found)} results, {size(sum(map(bytes_of, found)))}: `fdpo clean --yes` frees them; nothing has been touched")


def _unneeded(session: Session, others: Sequence[Session]) -> list[Path]:
    root = session.run.root
    there = There(root)
    needed = {step.folder for one in (session, *others) for step in one.chain(max(most_rounds(one), one.config.rounds)).steps}
    drawn = [folder for folder in there.folders if not folder.startswith("round-00/")]
    if drawn and not any(folder in needed for folder in drawn):
        raise UserError(f"{root}: no round is of these settings, so all would go: give the settings that the run was made with "
                        "(--config, --set), or delete the folder itself")
    beside = [root / folder for folder in there.folders if folder not in needed]
    kept = {*imported(beside), *_made_by_hand(root, needed, beside)}
    return [path for path in beside if path not in kept]


def _made_by_hand(root: Path, needed: set[str], beside: list[Path]) -> set[Path]:
    """Pairs saved of candidates that stay, and all that was made of those; sets whose drawing has not ended; what cannot be read."""
    there = {folder[-8:] for folder in needed}
    kept = {path for path in beside if path.name.startswith("sets-") and not (path / "manifest.json").is_file()}
    claims: dict[Path, dict] = {}
    for path in beside:
        try:
            claims[path] = read_json(path / "claim.json")["inputs"]
        except (FileNotFoundError, UserError, KeyError, TypeError):
            kept.add(path)  # nobody knows what it is
    saved: set[str] = set()
    while more := {path for path, inputs in claims.items() if path not in kept and inputs and set(inputs.values()) <= there | saved
                   and (path.name.startswith("pair-") or saved & set(inputs.values()))}:
        kept |= more
        saved |= {path.name[-8:] for path in more}
    return kept
