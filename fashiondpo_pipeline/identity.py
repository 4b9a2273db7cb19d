"""What something *is*, as a hash: models by their files, prompts by their content. Names and times do not count."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.remembered import remembered


def canonical(value: Any) -> str:
    """JSON with sorted keys and no blanks: one text for one meaning.

    >>> canonical({"b": 1, "a": [1.0, None]})
    '{"a":[1.0,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def fingerprint(claim: Any) -> str:
    """Eight hex digits that name a claim."""
    return fingerprint_of_text(canonical(claim))


def fingerprint_of_text(text: str) -> str:
    """The same of a claim as `canonical` has it."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SMALL = 1 << 20  # bytes: such a file is hashed sooner than looked up


def _hash_unchanged(path: Path, size: int) -> str:
    return hash_file(path) if size <= SMALL else remembered(path, "sha256", lambda: hash_file(path))


def hash_path(path: Path, what: str) -> str:
    """A hash of a file, or of every file below a folder with its relative name (16 hex digits).

    Raises UserError if there is nothing at `path`; `what` says what was looked for.
    """
    if not path.exists():
        raise UserError(f"{what}: there is nothing at {path}; check the path (relative ones start in the working folder)")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    parts = {}
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        parts[name] = _hash_unchanged(file, file.stat().st_size)
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:16]
