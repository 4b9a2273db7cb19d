"""Which command makes a step, and how a command is written: as the person knows it, and as a shell would run it."""

import re
import shlex
from collections.abc import Iterable

from fashiondpo_pipeline.workspace import Step


def command_for(step: Step) -> str:
    """The command that makes a step."""
    if step.name.startswith("held-out"):
        return "evaluate"
    if step.name.startswith("strength"):
        return "finetune"
    return {"embed": "score", "prepare": "score", "encode": "sample", "latents": "finetune", "adopt": "finetune"}.get(step.stage, step.stage)


def written(words: Iterable[object]) -> str:
    """`fdpo WORDS` as a shell takes it: to be copied, whatever a prompt or a path holds.

    >>> print(written(["generate", "a red dress", "--round", 3]))
    fdpo generate "a red dress" --round 3
    >>> print(written(["generate", "a $(date) dress"]))
    fdpo generate 'a $(date) dress'
    >>> print(written(["generate", "-sleeve dress", "--round", 3]))
    fdpo generate --round 3 -- "-sleeve dress"
    """
    command, *others = map(str, words)
    if command == "generate" and others and others[0].startswith("-"):  # a prompt, which would be taken for an option
        others = [*others[1:], "--", others[0]]
    return " ".join(map(_quoted, ["fdpo", command, *others]))


def _quoted(word: str) -> str:
    """A word as a shell takes it; in double quotes where nothing in it means anything there."""
    plain = re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII)
    return word if plain else shlex.quote(word) if re.search(r'["$`\\!]', word) or not word.isprintable() or not word else f'"{word}"'
