"""What a configuration's objectives are, and what in it they would not heed: all of it said before anything is drawn."""

import inspect
import math
from typing import TYPE_CHECKING, Any

from fashiondpo_pipeline.config import Finetune, Sample
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.later import Later
from fashiondpo_pipeline.objectives import BUILTIN, Evidence, Objective, Term, signals_of
from fashiondpo_pipeline.registry import OBJECTIVES, did_you_mean

if TYPE_CHECKING:
    import torch

    from fashiondpo_pipeline.pairsets import PairSet
else:  # it takes longer to import than all that is said here
    torch = Later("torch")

AUTO = "auto"  # label_smoothing: the flip rate that asking twice shows; until it is known the objective's default stands for it
Taken = dict[str, dict[str, Any]]  # objective's name -> option -> its default


def terms_of(knobs: Finetune) -> list[Term]:
    """The objectives that the configuration mixes. Raises UserError with all that they do not take, or would not heed."""
    mix = {knobs.objective: 1.0} if isinstance(knobs.objective, str) else knobs.objective
    found = {name: _objective(name) for name in mix}
    taken = {name: _taken(objective) for name, objective in found.items()}
    problems = _wrong(knobs.options, taken) + _idle(knobs, [Term(objective) for objective in found.values()], taken)
    if problems:
        raise UserError("\n".join(problems))
    options = {key: value for key, value in knobs.options.items() if value != AUTO}
    if knobs.ratio_clip is not None:
        options["ratio_clip"] = knobs.ratio_clip
    terms = [Term(found[name], weight, {key: value for key, value in options.items() if key in taken[name]}) for name, weight in mix.items()]
    problems = [sentence for term in terms for sentence in _tried(term, knobs.beta)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return terms


def made_of(terms: list[Term], either: str) -> dict[str, list[str]]:
    """signals: what the gains are made of, the first term's first (see `signals_of`). heeds: which knobs any of them heeds."""
    return {"signals": signals_of(terms, either), "heeds": sorted({what for term in terms for what in term.objective.heeds})}


def check_fits_candidates(knobs: Finetune, sample: Sample, asked_twice: bool) -> None:
    """Raises UserError for what needs more than the sampler will keep. asked_twice: whether a rewarded expert is, and may answer otherwise."""
    if knobs.options.get("label_smoothing") == AUTO and not asked_twice:
        raise UserError("finetune.options.label_smoothing is auto, which needs a rewarded expert that may answer otherwise when asked again, "
                        "and score.repeat above 0: give it a number")
    if "log_prob" in signals_of(terms_of(knobs), knobs.signal):
        if sample.eta == 0:
            raise UserError(f"finetune.objective {knobs.objective} needs log-probabilities, which sample.eta 0 does not give: "
                            "raise sample.eta, use diffusion_dpo, or set finetune.signal to error")
        if not sample.path:
            raise UserError(f"finetune.objective {knobs.objective} needs to know where each step led, which sample.path false does not keep: "
                            "set sample.path to true, use diffusion_dpo, or set finetune.signal to error")


def check_fits_pictures(knobs: Finetune, pairs: "PairSet | None" = None) -> None:
    """Raises UserError for what needs more than pictures and who won: where a sampler stepped, experts' scores, or asking them twice.

    pairs: what it is to be trained on, None before it is known: some objectives can make nothing of shares of votes, some need rankings.
    """
    if knobs.replay:
        raise UserError("finetune.replay mixes earlier rounds' candidates in, which were saved with their steps, and imported pictures were not: "
                        "set it to 0")
    if knobs.options.get("label_smoothing") == AUTO:
        raise UserError("finetune.options.label_smoothing is auto, which is measured by asking experts twice, and imported pairs were made by none "
                        "of them: give it a number, such as 0.1")
    terms = terms_of(knobs.model_copy(update={"noise": "tracked"}))  # that it is fresh needs no heed here
    for name, term in zip([knobs.objective] if isinstance(knobs.objective, str) else knobs.objective, terms, strict=True):
        lacks = "experts' scores" if {"score", "opinions"} & set(term.objective.needs) and not term.objective.by_order else None
        if signals_of([term], knobs.signal) != ["error"]:
            lacks = "the steps that a sampler took"
        if pairs is not None and term.objective.outright and not lacks and pairs.shares:
            raise UserError(f"finetune.objective {name} takes a picture as good or bad, and labels of these pairs are shares of votes: "
                            "use an objective of pairs, such as diffusion_dpo, which weighs by them")
        if pairs is not None and term.objective.by_order and not lacks and (loose := sum(one is None for one in pairs.rankings.values())):
            raise UserError(f"finetune.objective {name} needs a ranking of each prompt's pictures, and of {loose:,} of {len(pairs.rankings):,} "
                            "prompts the pairs are none (each two compared once, without shares or contradictions): use an objective of pairs, "
                            "such as diffusion_dpo")
        if lacks:
            fit = {name: OBJECTIVES.find(name) for name in OBJECTIVES if not name.startswith("_")}
            fit = {name: o for name, o in fit.items() if o.signal != "log_prob" and (o.by_order or not {"score", "opinions"} & set(o.needs))}
            plain = ", ".join(sorted(name for name, o in fit.items() if o.signal == "error"))
            either = ", ".join(sorted(name for name, o in fit.items() if o.signal == "either"))
            raise UserError(f"finetune.objective {name} needs {lacks}, which imported pictures do not have: use {plain}, "
                            f"or with finetune.signal error one of {either}")


def _objective(name: str) -> Objective:
    found = OBJECTIVES.find(name)
    if not isinstance(found, Objective):
        raise UserError(f"finetune.objective: {name} is a {type(found).__name__}, not an objective: name an instance of "
                        "fashiondpo_pipeline.objectives.Objective")
    return found


def _taken(objective: Objective) -> dict[str, Any]:
    """Options of an objective with their defaults."""
    found = inspect.signature(objective.loss).parameters
    return {key: p.default for key, p in found.items() if p.kind is p.KEYWORD_ONLY and key != "beta"}


def _wrong(options: dict[str, Any], taken: Taken) -> list[str]:
    """What is wrong with the options as such."""
    every = sorted({key for defaults in taken.values() for key in defaults} - {"ratio_clip"})
    problems = []
    for key in options:
        if key == "ratio_clip":
            problems.append("finetune.options.ratio_clip: this is a knob of its own; write finetune.ratio_clip")
        elif key not in every:
            known = did_you_mean(key, every) if every else "it takes none"
            problems.append(f"finetune.options.{key}: {' and '.join(taken)} takes no such option; {known}")
        elif key == "label_smoothing" and options[key] == AUTO:
            continue
        elif any(_is_number(defaults.get(key)) for defaults in taken.values()) and not _is_number(options[key]):
            problems.append(f"finetune.options.{key}: should be a number, not {options[key]!r}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Looked(Exception):
    """An objective has looked at its evidence."""


class _Untouched:
    """Evidence that tells when it is looked at."""

    def __getattr__(self, name: str) -> Any:
        raise _Looked


def _tried(term: Term, beta: float) -> list[str]:
    """What an objective says of its options when it is asked: a range is known to the loss alone.

    Built-in ones say it before they look at the evidence; others are asked about two candidates.
    """
    try:
        term.objective.loss(_Untouched() if term.objective in BUILTIN.values() else _two(), beta=beta, **term.options)  # type: ignore[arg-type]
    except UserError as problem:
        return [str(problem)]
    except _Looked:
        return []
    return []


def _two() -> Evidence:
    """What is known of two candidates, one better than the other."""
    number, score = torch.tensor([0, 1]), torch.tensor([1.0, 0.0])
    pixels = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])  # (2, c, h, w)
    return Evidence(
        torch.zeros(2), number[:1], number[1:], torch.zeros_like(number), score=score, opinions=score[:, None], error=score, ref_error=score,
        prediction=pixels, ref_prediction=pixels, wanted=pixels * 0,
    )


def _idle(knobs: Finetune, terms: list[Term], taken: Taken) -> list[str]:
    """Knobs that are set and would change nothing."""
    names = " and ".join(taken)
    signals, heeded = made_of(terms, knobs.signal).values()
    clips = any("ratio_clip" in defaults for defaults in taken.values())
    errors, instead = signals == ["error"], "use diffusion_dpo, or set finetune.signal to error"
    checks = [  # (whether it is set, whether it acts, what to say if it does not)
        (knobs.guard is not None, errors, f"finetune.guard works on errors: {instead}"),
        (knobs.guard is not None, "slack" in heeded or not errors,
         f"finetune.guard has no effect on {names}: set it to null, or use diffusion_dpo"),
        (knobs.condition_dropout > 0, errors, f"finetune.condition_dropout works on errors: a step was taken with its prompt; {instead}"),
        (knobs.condition_dropout > 0, knobs.guidance != "sampled",
         "finetune.condition_dropout leaves no prompt to be guided by: set it to 0, or finetune.guidance to auto or none"),
        (knobs.noise == "fresh", errors, f"finetune.noise fresh works on errors: a step was taken with the sampler's noise; {instead}"),
        (knobs.min_snr is not None, "error" in signals, f"finetune.min_snr works on errors: {instead}"),
        (knobs.step_weight != "equal", "log_prob" in signals,
         f"finetune.step_weight has no effect on errors, which {names} is made of: set it to equal, or use step_dpo"),
        (knobs.auto_beta is not None, "beta" in heeded,
         f"finetune.auto_beta has no effect on {names}, which beta does not change: set it to null, or use another objective"),
        (knobs.divergence is not None, "log_prob" in signals,
         "finetune.divergence is measured on log-probabilities, which errors do not give: set it to null, or use step_dpo"),
        (knobs.divergence is not None, "beta" in heeded,
         f"finetune.divergence has no effect on {names}, which beta does not change: set it to null, or use another objective"),
        (knobs.divergence is not None, knobs.auto_beta is None,
         "finetune.divergence and finetune.auto_beta both move beta: set one of them to null"),
        (knobs.ratio_clip is not None, clips, f"finetune.ratio_clip has no effect on {names}: set it to null, or use step_dpo"),
    ]
    return [sentence for is_set, acts, sentence in checks if is_set and not acts]
