"""What was worked out about files that have not changed since: hashes of models, what prompts are. It saves time and is never needed.

One JSON file in the user's cache folder, or in $FDPO_CACHE, and one for each folder of many files, in `folders/` beside it. An answer
counts while a file has the same size, times and inode; what was changed less than two seconds ago is asked again, as a second change
could bear the same time.
"""

import atexit
import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

MOST = 4_096  # answers kept, the oldest go first
SETTLED = 2.0  # seconds

_answers: dict[Path, dict[str, Any]] = {}  # of each cache file, as this process knows it


def remembered(path: Path, question: str, answer: Callable[[], Any]) -> Any:
    """answer() about a file, in plain JSON types; or what it was, if the file is as it was then."""
    file, stat = _file(), path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    known = _answers[file] if file in _answers else _answers.setdefault(file, _read(file))
    key = f"{question} {path.resolve()}"
    if key in known and known[key]["stamp"] == stamp:
        return known[key]["answer"]
    found = answer()
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        known.pop(key, None)  # so that it stands last, as the newest
        known[key] = {"stamp": stamp, "answer": found}
        _write(file, known)
    return found


def _cache() -> Path:
    return Path(os.environ.get("FDPO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fashiondpo_pipeline")


def _file() -> Path:
    return _cache() / "files.json"


def _read_plain(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, not readable or cut short: then everything is worked out anew
        return {}


def _read(file: Path) -> dict[str, Any]:
    found = _read_plain(file)
    whole = isinstance(found, dict) and all(isinstance(entry, dict) and {"stamp", "answer"} <= entry.keys() for entry in found.values())
    return found if whole else {}


def _write(file: Path, known: dict[str, Any]) -> None:
    for key in list(known)[: len(known) - MOST]:
        del known[key]
    _put(file, known)


def _put(file: Path, known: Any) -> None:
    """Whole or not at all, under a name of its own, as other processes may be at it; of two at once one wins."""
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, no result
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{uuid.uuid4().hex}.tmp")  # not tempfile's, which is for its owner alone
        try:
            with draft.open("x", encoding="utf-8") as out:
                json.dump(known, out)
            os.replace(draft, file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


# -- hashes of a folder of many files

FOLDERS = 1_024  # folders of which hashes are kept, those written longest ago go first
PATIENCE = 5.0  # seconds between two writings of a folder's hashes

Hashes = dict[str, list]  # name -> size, times, inode, hash
_folders: dict[Path, Hashes] = {}
_written: dict[Path, float] = {}  # when a folder's hashes were put on disk; gone where nothing has come since
_lock = threading.Lock()


def hash_within(folder: Path, name: str, hash_it: Callable[[Path], Any]) -> Any:
    """hash_it() of a file below a folder (or what else is to be known of it), or what it was if the file is as it was then.

    What is known of a folder's files lies in one file.

    They are put on disk every few seconds and at the end: a process that is killed leaves some to be worked out anew.
    """
    stat = os.stat(f"{folder}/{name}")
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    known_as = os.environ.get("FDPO_CACHE"), os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME")  # what `_cache` looks at
    place = _place(os.getcwd(), os.fspath(folder), known_as)
    known = _folders.get(place)
    if known is None:
        with _lock:
            known = _folders.setdefault(place, _hashes(place))
    if (entry := known.get(name)) and entry[:4] == stamp:
        return entry[4]
    found = hash_it(folder / name)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
        with _lock:
            known[name] = [*stamp, found]
            if time.monotonic() - _written.setdefault(place, time.monotonic()) > PATIENCE:
                _keep(place)
    return found


@lru_cache(maxsize=1_024)
def _place(here: str, folder: str, known_as: tuple[str | None, ...]) -> Path:
    """The file of a folder's hashes; worked out once for each, as a run of thousands of steps asks tens of thousands of times."""
    whole = os.fsencode(os.path.abspath(os.path.join(here, folder)))
    return _cache() / "folders" / f"{hashlib.sha256(whole).hexdigest()[:16]}.json"


def _hashes(place: Path) -> Hashes:
    found = _read_plain(place)
    whole = isinstance(found, dict) and all(isinstance(entry, list) and len(entry) == 5 for entry in found.values())
    return found if whole else {}


def _keep(place: Path) -> None:
    _put(place, _folders[place])
    _written.pop(place, None)
    ages = {path: age for path in place.parent.glob("*.json") if (age := _written_at(path)) is not None} if place.parent.is_dir() else {}
    for path in sorted(ages, key=lambda path: ages[path])[: len(ages) - FOLDERS]:
        path.unlink(missing_ok=True)


def _written_at(path: Path) -> int | None:
    """When a file was last written, in nanoseconds; None where another process has just taken it away."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def keep_all() -> None:
    """Put on disk what has been worked out since the last time."""
    with _lock:
        for place in list(_written):
            _keep(place)


atexit.register(keep_all)
