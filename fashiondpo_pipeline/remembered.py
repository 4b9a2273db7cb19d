"""What was worked out about files that have not changed since: hashes of models, what prompts are. It saves time and is never needed.

One JSON file in the user's cache folder, or in $FDPO_CACHE. An answer counts while a file has the same size, times and inode; what was
changed less than two seconds ago is asked again, as a second change could bear the same time.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
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


def _file() -> Path:
    folder = os.environ.get("FDPO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fashiondpo_pipeline"
    return Path(folder) / "files.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, not readable or cut short: then everything is worked out anew
        return {}
    whole = isinstance(found, dict) and all(isinstance(entry, dict) and {"stamp", "answer"} <= entry.keys() for entry in found.values())
    return found if whole else {}


def _write(file: Path, known: dict[str, Any]) -> None:
    """Whole or not at all, under a name of its own, as other processes may be at it; of two at once one wins."""
    for key in list(known)[: len(known) - MOST]:
        del known[key]
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
