"""Plug-ins as their last scores say that they were: a run is read without their code, whether or not anybody trusts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fashiondpo_pipeline import trust
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.registry import EXPERTS
from fashiondpo_pipeline.workspace import read_sealed

SAID = ("held_out", "stochastic", "grows", "effort", "tower", "pixels_only")  # what the contract leaves to the expert


def contract(expert: Any, use: str) -> dict | None:
    """What a plug-in says of itself, for the manifest of what it scored, with a hash of its code; None for what is built in."""
    module = EXPERTS.module(use)
    if module is None:
        return None
    lies = trust.place(module)
    files = {name: str(path) for name, path in getattr(expert, "files", dict)().items()}
    said = {name: getattr(expert, name) for name in SAID if hasattr(expert, name)}
    return {"code": lies and trust.code(lies), "needs": expert.needs, "files": files, "prepares": hasattr(expert, "prepare"), **said}


class Recorded:
    """Stands for an expert where nothing is asked of it: what it is, without what it does."""

    def __init__(self, about: dict):
        said = about["contract"]
        self.version, self.range, self.needs = about["version"], about["range"], tuple(said["needs"])
        self._files = {name: Path(path) for name, path in said["files"].items()}
        for name in SAID:
            if name in said:
                setattr(self, name, said[name])
        if said["prepares"]:
            self.prepare = None

    def files(self) -> dict[str, Path]:
        return self._files


UNKNOWN = {"version": None, "range": [None, None], "contract": {"needs": ["picture"], "files": {}, "prepares": False}}  # it has scored nothing


def instead(root: Path, name: str, use: str, say: Callable[[str], None]) -> Recorded | None:
    """What stands for an expert of the run at `root` while that is only read; None where the expert itself is to be made.

    That is where it is built in, or has changed since it scored, or has not scored yet, and may be imported. Where it may not, or is
    not here, it is shown as it last scored, which is said.
    """
    module = EXPERTS.module(use)
    if module is None:
        return None
    lies, about = trust.place(module), _last(root, name, use)
    if about and lies and about["contract"]["code"] == trust.code(lies):
        return Recorded(about)
    try:
        EXPERTS.check(use)
    except UserError as problem:
        if lies is None or not trust.is_foreign(module):
            raise
        say(f"experts.{name} is shown {'as it last scored' if about else 'as one that has not scored yet'}: {problem}")
        return Recorded(about or UNKNOWN)
    if lies is None and about:
        say(f"experts.{name} is shown as it last scored: the module {module} is not here")
        return Recorded(about)
    return None


def _last(root: Path, name: str, use: str) -> dict | None:
    """What the newest step in which it scored says of it."""
    found = root.glob(f"round-*/*score-{name}-????????/manifest.json")
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            about = read_sealed(path).get("expert") or {}
        except UserError:  # it is damaged, which `fdpo status --verify` tells
            continue
        if about.get("use") == use and about.get("contract"):
            return about
    return None
