"""fdpo: parses, calls, prints. Nothing heavy is imported until a command needs it."""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fashiondpo_pipeline import __version__
from fashiondpo_pipeline.errors import UserError

app = typer.Typer(
    help="Preference tuning for fashion image generators: sample, score, pair, finetune, evaluate; every stage resumes from disk.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="configuration; default: pipeline.yaml here, else the embedded default")]
Sets = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="override one knob; may be repeated")]
RunName = Annotated[str | None, typer.Option("--name", help="name of the run; its folder is runs/NAME")]
RoundNumber = Annotated[int | None, typer.Option("--round", "-r", min=1, help="which round; default: the last one there is")]


def main() -> None:
    """The command `fdpo`: a mistake of the user's is one sentence and exit code 1, a bug shows its traceback."""
    try:
        app(standalone_mode=True)
    except UserError as problem:
        _fail(str(problem))
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = problem.filename or "the working folder"
        _fail(f"the disk is full ({where}): what was finished is kept; make room and run the same command again")
    except KeyboardInterrupt:
        _fail("interrupted: what was finished is kept; the same command goes on from there", code=130)


def _fail(message: str, code: int = 1) -> None:
    print(f"fdpo: {message}", file=sys.stderr)
    sys.exit(code)


def _config(config: Path | None, sets: list[str] | None, name: str | None) -> Any:
    from fashiondpo_pipeline.config import load

    here = Path("pipeline.yaml")
    path = config or (here if here.is_file() else None)
    return load(path, [*(sets or []), *([f"name={name}"] if name else [])])


def _session(config: Path | None, sets: list[str] | None, name: str | None) -> Any:
    from fashiondpo_pipeline.terminal import say, track
    from stages import Session

    return Session(_config(config, sets, name), say=say, track=track)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def round(
    n: Annotated[int | None, typer.Option("--n", "-n", min=1, help="how many rounds the run has when this returns; default: rounds in the configuration")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    name: RunName = None,
) -> None:
    """Bring the run to N rounds: sample, score, pair, finetune, evaluate, each from the last adapter, then report.

    Run it again to continue after an interruption; when everything is there it does nothing and says so.
    """
    from stages import rounds

    rounds.run(_session(config, sets, name), n)
