"""Experts by name. An expert is an opinion on pictures: rows in, one number a row out, higher is better.

A module of experts imports torch only inside methods: `fdpo plan` and `fdpo rescore` make experts, but load no model.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fashiondpo_pipeline.errors import UserError, disk_is_full
from fashiondpo_pipeline.registry import EXPERTS, did_you_mean

# A score; (nan, reason) where there is none; with a third entry the raw reply, or whether the picture is right.
Opinion = float | tuple[float, str | None] | tuple[float, str | None, str | bool]


@runtime_checkable
class Expert(Protocol):
    """The contract; `fashiondpo_pipeline.testing.check_expert` checks it.

    version: raised when the meaning of the score changes. range: (least, greatest) score. needs: what a row must hold:
    "picture" (PIL image), "embedding" ((d,) float32, of `tower`), or a column of the prompts. A row always has group,
    candidate and prompt. The constructor takes plain keywords from the configuration and loads nothing.

    Optional: `tower` (model, pretrained) of a CLIP tower whose embeddings it reads; `files()` name -> path of
    what its scores depend on; `weights` name -> Place, to say whether they are here; `preprocessing` what it
    does to a picture, in words, once loaded; `prepare(folder, device)` slow work done once a run, whose
    folder `load` is then given; `expect(prompts)` the prompts' rows that it will be asked about, in their
    order, told before the first call; `replies` True where an opinion is (score, reason or None, the raw
    reply); `classifies` True where it is (score, None, whether what was asked for is its own first choice for
    the picture), from which shares of right pictures are counted; `stochastic` True where it may answer
    otherwise when asked again; `effort` names of options that change no score, only how it is got; `notes`
    sentences for the person, emptied by whoever shows them; `held_out` False: it is not asked about held-out
    draws, and may be silent about every candidate; `pixels_only` True: it becomes the judge of no run that
    names none; `grows` names of `files()` that grow while a run lives: a
    round keeps what they held when it was scored, until `fdpo score` asks again.
    """

    version: int
    range: tuple[float, float]
    needs: tuple[str, ...]

    def load(self, device: str, prepared: Path | None) -> None: ...

    def __call__(self, rows: list[dict]) -> Sequence[Opinion]: ...


def make(name: str, use: str, options: dict[str, Any]) -> Any:
    """The expert called `name` in the configuration, not yet loaded. Raises UserError with every option that does not fit."""
    factory = EXPERTS.find(use)
    takes = inspect.signature(factory).parameters
    wrong = [f"experts.{name}.options.{key}: {fault}" for key, value in options.items()
             if key in takes and (fault := _mistyped(takes[key].annotation, value))]
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        wrong = [f"experts.{name}.options.{key}: unknown key; {did_you_mean(key, list(takes))}"
                 for key in options if key not in takes] + wrong
        wrong += [f"experts.{name}.options.{key}: missing; add it"
                  for key, p in takes.items() if p.default is p.empty and key not in options]
    if wrong:
        raise UserError("\n".join(wrong))
    return factory(**options)


def make_all(entries: Mapping[str, Any], instead: Callable[[str, str], Any] = lambda name, use: None) -> dict[str, Any]:
    """The experts of a configuration by name. Raises UserError with everything that does not fit, of all of them.

    instead: name and use -> what stands for an expert; None: it is made.
    """
    made, wrong = {}, []
    for name, entry in entries.items():
        try:
            made[name] = instead(name, entry.use) or make(name, entry.use, entry.options)
        except UserError as problem:
            wrong.append(str(problem))
    if wrong:
        raise UserError("\n".join(wrong))
    return made


def _mistyped(kind: Any, value: Any) -> str | None:
    """What is wrong with a value for a parameter of this type, in words; None where nothing is, or where the type says nothing."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    from fashiondpo_pipeline.config import in_words

    if kind is inspect.Parameter.empty or isinstance(kind, str) or "Path" in str(kind):
        return None
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except PydanticSchemaGenerationError:  # a class of its author's
        return None
    except ValidationError as problem:
        return in_words(problem.errors()[0])
    return None


def ask(expert: Expert, rows: list[dict]) -> list[tuple]:
    """(score, reason) of each row, and a third entry where the expert gives one (see Opinion); an expert that fails on a batch is
    asked row by row, and what it cannot say is NaN."""
    try:
        opinions = list(expert(rows))
    except (UserError, MemoryError):
        raise
    except Exception as problem:  # somebody else's code on somebody else's pictures: kept as the reason, counted aloud
        if disk_is_full(problem):
            raise
        if len(rows) == 1:
            return [(math.nan, f"{type(problem).__name__}: {problem}")]
        return [answer for row in rows for answer in ask(expert, [row])]
    if len(opinions) != len(rows):
        name = type(expert).__name__
        raise UserError(f"{name} gave {len(opinions)} scores for {len(rows)} pictures: one for each is the contract")
    return [_plain(opinion) for opinion in opinions]


def _plain(opinion: Opinion) -> tuple:
    score, reason, *reply = opinion if isinstance(opinion, tuple) else (opinion, None)
    score = float(score) if score is not None else math.nan
    if math.isfinite(score):
        return score, None, *reply
    return math.nan, reason or f"the expert answered {score}", *reply
