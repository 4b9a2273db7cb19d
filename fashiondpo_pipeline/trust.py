"""Modules that a person trusts: a configuration that names `module:Class` is code, and no configuration trusts itself.

A module is known by its name and the place it lies at, so that another folder's module of the same name is another one.
Trust lies in a file of the user's (`file()`), or for one process in FDPO_TRUST, names with commas between them.
"""

import importlib
import importlib.util
import os
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from fashiondpo_pipeline.errors import UserError

OWN = "fashiondpo_pipeline"
VARIABLE = "FDPO_TRUST"


def file() -> Path:
    """The list of trusted modules: a line each, name and place with a tab between."""
    import typer

    return Path(typer.get_app_dir("fashiondpo_pipeline")) / "trusted.txt"


def place(module: str) -> Path | None:
    """Where the package or file that holds `module` lies; None if nowhere. Nothing is imported.

    The working folder is looked in last, so that no file in it takes the place of what is installed.
    """
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, [str(Path.cwd())])
    except (ValueError, ImportError):  # a module without a spec, as __main__ is
        return None
    if spec is None:
        return None
    found = spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), None)
    return Path(found).resolve() if found else None


def load(module: str) -> ModuleType:
    """A module, imported: from the working folder too if it is not installed. Raises ModuleNotFoundError."""
    here = str(Path.cwd())
    if importlib.util.find_spec(module.partition(".")[0]) is None and trusted(module) and here not in sys.path:
        sys.path.append(here)  # last, and only for who is trusted: libraries look for optional ones by name
    return importlib.import_module(module)


def trusted(module: str) -> bool:
    """Whether a module may be imported because a configuration names it."""
    top = module.partition(".")[0]
    if top == OWN or top in os.environ.get(VARIABLE, "").split(","):
        return True
    lies = place(module)
    return lies is not None and f"{top}\t{lies}" in _lines()


def check(module: str, what: str) -> None:
    """Raises UserError, in whose words `what` asks for it, unless a module is trusted; one that is nowhere is not refused here."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UserError(f"{what} names Python's own module {top}, which holds none: name a class of yours")
    lies = place(module)
    if lies is not None and not trusted(module):
        raise UserError(f"{what} runs the code of {lies}, which was never trusted on this machine: read it, "
                        f"and if you trust it: fdpo trust {shlex.quote(top)}")


def trust(module: str) -> Path:
    """From now on a module may be named by configurations; gives its place. Raises UserError if it cannot be found or kept."""
    top = module.partition(":")[0].partition(".")[0]
    if top in sys.stdlib_module_names or top == OWN:
        raise UserError(f"{top} needs no trust: {'it is this program' if top == OWN else 'what Python brings is never an expert'}")
    lies = place(top)
    if lies is None:
        raise UserError(f"there is no module {top} in {Path.cwd()} or among the installed packages: go to its folder, or install it")
    line = f"{top}\t{lies}"
    if line not in _lines():
        try:
            file().parent.mkdir(parents=True, exist_ok=True)
            with file().open("a", encoding="utf-8") as kept:
                kept.write(line + "\n")
        except OSError as problem:
            raise UserError(f"{file()} cannot be written ({problem.strerror}): make it yours, or set {VARIABLE}={top}") from problem
    return lies


def _lines() -> set[str]:
    try:
        return set(file().read_text(encoding="utf-8", errors="replace").splitlines())
    except FileNotFoundError:
        return set()
    except OSError as problem:
        raise UserError(f"{file()} cannot be read ({problem.strerror}): make it yours, or delete it") from problem
