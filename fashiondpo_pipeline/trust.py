"""Modules that a person trusts: a configuration that names `module:Class` is code, and no configuration trusts itself.

A module is known by its name, the place it lies at and what is in it: another folder's module of the same name is another one, and
so is the same file once it has changed. What it imports from beside it is trusted with it. Trust lies in a file of the user's
(`file()`), or for one process in FDPO_TRUST, names with commas between them, whatever is in them.

An installed module comes first, then one beside the configuration file in force, then one in the working folder.
"""

import hashlib
import importlib
import importlib.util
import os
import shlex
import sys
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from fashiondpo_pipeline.errors import UserError

OWN = "fashiondpo_pipeline"
VARIABLE = "FDPO_TRUST"
CODE = (".py", ".pyc", ".so", ".pyd")  # endings of what Python runs

_config: Path | None = None  # the configuration file in force, where one was named


def look_beside(config: Path | None) -> None:
    """From now on modules are looked for beside this configuration file too."""
    global _config
    _config = config


def file() -> Path:
    """The list of trusted modules: a line each, name, place and hash of the code with a tab between."""
    import typer

    return Path(typer.get_app_dir("fashiondpo_pipeline")) / "trusted.txt"


def place(module: str) -> Path | None:
    """Where the package or file that holds `module` lies; None if nowhere. Nothing is imported.

    Folders are looked in last, so that no file in them takes the place of what is installed.
    """
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, _folders())
    except (ValueError, ImportError):  # a module without a spec, as __main__ is
        return None
    if spec is None:
        return None
    found = spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), None)
    return Path(found).resolve() if found else None


def code(lies: Path) -> str:
    """A hash of what Python runs of a module that lies there: of its file, or of a package of every such file below its folder."""
    folder = lies if lies.is_dir() else lies.parent if lies.stem == "__init__" else None
    files = [lies] if folder is None else sorted(path for path in folder.rglob("*") if path.suffix in CODE and "__pycache__" not in path.parts)
    found = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        found.update(f"{path.relative_to(folder or path.parent).as_posix()}\0{len(data)}\0".encode() + data)
    return found.hexdigest()


def load(module: str) -> ModuleType:
    """A module, imported: from beside the configuration or the working folder too if it is not installed. Raises ModuleNotFoundError."""
    lies = place(module) if module.partition(".")[0] != OWN else None
    folder = lies and str(lies.parent if lies.is_dir() or lies.stem != "__init__" else lies.parent.parent)
    if folder in _folders() and trusted(module):
        _compile_from_source(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # last, and only for who is trusted: libraries look for optional ones by name
    return importlib.import_module(module)


def trusted(module: str) -> bool:
    """Whether a module may be imported because a configuration names it."""
    top = module.partition(".")[0]
    if top == OWN or top in os.environ.get(VARIABLE, "").split(","):
        return True
    lies = place(module)
    return lies is not None and _line(top, lies) in _lines()


def is_foreign(module: str) -> bool:
    """Whether a module could be trusted: it is neither of this program nor of Python itself."""
    top = module.partition(".")[0]
    return top != OWN and top not in sys.stdlib_module_names


def check(module: str, what: str) -> None:
    """Raises UserError, in whose words `what` asks for it, unless a module is trusted; one that is nowhere is not refused here."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UserError(f"{what} names Python's own module {top}, which holds none: name a class of yours")
    lies = place(module)
    if lies is not None and not trusted(module):
        changed = any(line.startswith(f"{top}\t{lies}\t") for line in _lines())
        told = "has changed since it was trusted: read it again" if changed else "was never trusted on this machine: read it"
        beside = ["--config", str(_config)] if _config and _own_folder() != str(Path.cwd()) and lies.is_relative_to(_own_folder()) else []
        raise UserError(f"{what} runs the code of {lies}, which {told}, and if you trust it: {shlex.join(['fdpo', 'trust', top, *beside])}")


def trust(module: str) -> Path:
    """From now on a module, as it is now, may be named by configurations; gives its place. Raises UserError if it cannot be found or kept."""
    top = module.partition(":")[0].partition(".")[0]
    if not is_foreign(top):
        raise UserError(f"{top} needs no trust: {'it is this program' if top == OWN else 'what Python brings is never an expert'}")
    lies = place(top)
    if lies is None:
        raise UserError(f"there is no module {top} in {' or '.join(_folders())} or among the installed packages: go to its folder, or "
                        "install it")
    line = _line(top, lies)
    if line not in (lines := _lines()):
        kept = [other for other in lines if not other.startswith(f"{top}\t{lies}\t") and other != f"{top}\t{lies}"]
        draft = file().with_name(f".{file().name}.tmp")
        try:
            file().parent.mkdir(parents=True, exist_ok=True)
            draft.write_text("".join(f"{one}\n" for one in [*kept, line]), encoding="utf-8")
            os.replace(draft, file())
        except OSError as problem:
            raise UserError(f"{file()} cannot be written ({problem.strerror}): make it yours, or set {VARIABLE}={top}") from problem
    return lies


def _line(top: str, lies: Path) -> str:
    return f"{top}\t{lies}\t{code(lies)}"


def _own_folder() -> str:
    return str(_config.resolve().parent) if _config else str(Path.cwd())


def _folders() -> list[str]:
    """Where what is not installed is looked for, in this order."""
    return list(dict.fromkeys([_own_folder(), str(Path.cwd())]))


class _Source(SourceFileLoader):
    """Compiles what is imported, and takes no bytecode that lies beside it: nobody could have read that."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


_compiled: set[str] = set()  # folders of which all that is imported is compiled from its source


def _compile_from_source(folder: str) -> None:
    _compiled.add(folder)
    if _finder not in sys.path_hooks:
        sys.path_hooks.insert(0, _finder)
    for known in [path for path in sys.path_importer_cache if _within(path)]:
        del sys.path_importer_cache[known]


def _finder(path: str) -> FileFinder:
    if not _within(path):
        raise ImportError(path)
    return FileFinder(path, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_Source, SOURCE_SUFFIXES))


def _within(path: str) -> bool:
    """Whether a folder belongs to one of ours; an environment that lies in the working folder has a place of its own on Python's path."""
    above = [one for one in (*sys.path, *_compiled) if one and (path == one or path.startswith(one.rstrip(os.sep) + os.sep))]
    return bool(above) and max(above, key=len) in _compiled


def _lines() -> list[str]:
    try:
        return file().read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise UserError(f"{file()} cannot be read ({problem.strerror}): make it yours, or delete it") from problem
