"""Where the data that travels with the package lies: `embedded:NAME` in a configuration is a path in it."""

from pathlib import Path

from fashiondpo_pipeline.errors import UserError

PREFIX = "embedded:"


def root() -> Path:
    """The shelf: `data/` beside the package in a checkout, `fashiondpo_pipeline/_data/` in an installed wheel."""
    package = Path(__file__).resolve().parent
    installed = package / "_data"
    return installed if (installed / "fashion_mini").is_dir() else package.parent / "data"


def locate(path: str, base: Path | None = None) -> Path:
    """The file or folder that a configuration names; a relative one lies beside `base` (the working folder if None)."""
    if path.startswith(PREFIX):
        found = (root() / path.removeprefix(PREFIX)).resolve()
        if root().resolve() not in found.parents:  # data/ of a checkout may be a link
            raise UserError(f"'{path}' leaves the embedded data: name something inside {root()}")
        return found
    return (base or Path()) / Path(path).expanduser()
