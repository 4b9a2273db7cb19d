"""What a run's figures mean, in plain words: how finetuning went, which rounds please their reward alone, which round to keep.

Pure functions of tables and numbers: nothing here reads a disk or loads a model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import claims
from fashiondpo_pipeline.effect_size import above, as_good_as, below, deciding, setting_in_words
from fashiondpo_pipeline.registry import OBJECTIVES
from fashiondpo_pipeline.statistics import FEW, FEWEST, percent, wilson

Level = Literal["note", "warning", "alarm"]
LEVELS: tuple[Level, ...] = ("alarm", "warning", "note")  # gravest first

LATE = 0.25  # the share of the optimiser steps, at the end, that says where finetuning arrived
MOSTLY = 0.5  # share of steps, or of pairs, above which something is the rule
TELLING = 0.1  # a change this small beside the other side's is no change
# A share of the loser's fall: winners that fall by more part from losers by less than both fall on average.
TOGETHER = 1 / 3
FLAT_MARGIN, FLAT_LOSS = 0.02, 0.002  # mean logits and losses this near to 0 and ln 2 throughout: nothing was preferred
WANTED_MARGIN, MOST_FACTOR = 0.5, 10.0  # the logit that an advised beta aims at, and how much more than now it may be
WIDE_MARGIN = 5.0  # at a logit of 5 a pair has 0.7 % of its first gradient left
FULL, EARLY = 0.99, 0.5  # share of pairs in their order, and how much of finetuning may pass before that is nothing odd
PLATEAU = 0.02  # gain of accuracy over the second half below which it taught nothing
FEW_PAIRS, FEW_STEPS = 10, 10  # pairs to learn from, and optimiser steps, below which a round shows little
SKIPPED = 0.05  # share of steps without a finite gradient; fp16 skips a few while it finds its scale
DRIFT = 1.0  # standard deviations of the base's pictures that a meter may move
# What is drawn at all may not get lost, however much the base's pictures vary in it: half of it must be left.
# A published run lost 60 % of its edges while its reward rose.
STRUCTURE, HALF = ("edge_density", "colour_entropy"), 0.5
VISIBLE = 0.1  # share of what another seed changes; at 0.03, of 40 pairs looked at blind 38 showed no difference
ALIKE = 1.5  # a best-of-n equivalent nearer to 1 is less than choosing between two every second time gives
Z = 1.96  # of a two-sided interval of 95 %
NAMED = 6  # more timesteps than these are counted, not named


@dataclass(frozen=True)
class Finding:
    """One thing worth saying. level: note (good to know), warning (likely costs quality), alarm (do not trust this round)."""

    level: Level
    what: str
    advice: str

    @property
    def sentence(self) -> str:
        """What is seen and what to do, to follow a level or a round's name."""
        return f"{self.what}: {self.advice}"


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Alarms, then warnings, then notes; each in the order in which they were found."""
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


# -- how finetuning went


def of_training(steps: pa.Table, columns: pa.Table | None, knobs: Mapping, walk: int | None = None) -> list[Finding]:
    """What the curves of one round's finetuning say, gravest first; empty where all is well.

    steps: the table of optimiser steps. columns: of saved steps (or draws) over the last epoch, None in runs that lack it.
    knobs: the section `finetune`, with what the finetuning noted of its objectives (`terms.made_of`).
    walk: how many steps a picture was drawn in, which `finetune.window` is a share of.
    """
    broken = _not_finite(steps)
    if broken:
        return broken  # every other figure is made of these
    training = _Training(_with_pairs(steps), None if columns is None else _with_pairs(columns), knobs, walk)
    if not len(training.steps):
        return []  # an objective without pairs has none of these figures
    checks = (_errors_rise, _chance, _flat, _saturated, _ratio_clipped, _gradient, _silent_columns, _plateau)
    return worst_first([finding for check in checks for finding in check(training)])


def _with_pairs(table: pa.Table) -> pa.Table:
    return table.filter(pc.greater(table["pairs"], 0))


@dataclass(frozen=True)
class _Training:
    """One round's finetuning as its tables have it."""

    steps: pa.Table
    columns: pa.Table | None
    knobs: Mapping
    walk: int | None

    def curve(self, name: str) -> np.ndarray:
        """A column of the step table, (steps,) float64; NaN throughout where the table lacks it."""
        if name not in self.steps.column_names:
            return np.full(len(self.steps), np.nan)
        return self.steps[name].to_numpy().astype(np.float64)

    @cached_property
    def pairs(self) -> np.ndarray:
        return self.curve("pairs")

    def part(self, start: float, end: float) -> slice:
        """The steps between two shares of finetuning, at least one.

        Of 10 steps the last quarter are the last 3.
        """
        first = min(math.floor(start * len(self.steps)), len(self.steps) - 1)
        return slice(first, max(math.ceil(end * len(self.steps)), first + 1))

    def mean(self, name: str, start: float = 1 - LATE, end: float = 1.0) -> float:
        """Mean of a curve over a part of finetuning, by default its end; a step weighs as much as it has pairs."""
        part = self.part(start, end)
        return float(np.average(self.curve(name)[part], weights=self.pairs[part]))

    def count(self, start: float = 1 - LATE, end: float = 1.0) -> float:
        return float(self.pairs[self.part(start, end)].sum())

    @cached_property
    def learnt(self) -> bool:
        """Whether the end's accuracy is above one half by more than chance."""
        return interval(self.mean("accuracy"), self.count())[0] > 0.5

    @cached_property
    def full_early(self) -> bool:
        """Whether every pair was in its order before half of finetuning was over."""
        return self.mean("accuracy", EARLY - LATE, EARLY) >= FULL

    @cached_property
    def clipped(self) -> float:
        """Share of the end's pairs that ratio_clip keeps from teaching."""
        share = self.mean("clipped")
        return share if math.isfinite(share) else 0.0

    def rise(self, role: str) -> tuple[float, bool]:
        """(how far a side moved away, at the end; whether most of those steps say so): its error's rise, or its log-ratio's fall."""
        name, sign = (f"{role}_error", 1) if self.on_errors else (role, -1)
        values = sign * self.curve(name)[self.part(1 - LATE, 1.0)]
        return sign * self.mean(name), bool((values > 0).mean() > MOSTLY)

    @cached_property
    def made_of(self) -> Mapping[str, list[str]]:
        """`terms.made_of` its objectives: as the finetuning noted, or for one that did not, from their names."""
        if "signals" in self.knobs:
            return self.knobs
        from fashiondpo_pipeline import terms, training  # here, as a report of newer runs needs no torch

        mix = self.knobs["objective"]
        return terms.made_of([training.Term(OBJECTIVES.find(name)) for name in ([mix] if isinstance(mix, str) else mix)], self.knobs["signal"])

    @property
    def signals(self) -> list[str]:
        """What the objectives are made of, that of the step table first."""
        return self.made_of["signals"]

    @property
    def may_guard(self) -> bool:
        """Whether finetune.guard would act."""
        return self.signals == ["error"] and "slack" in self.made_of["heeds"]

    @property
    def on_errors(self) -> bool:
        """Whether the step table is about errors; it has them in a training on log-probabilities too, which they do not judge."""
        return self.signals[0] == "error"

    @property
    def fresh(self) -> bool:
        """Whether columns are draws of fresh noise."""
        return self.knobs["noise"] == "fresh" and self.signals == ["error"]


def interval(share: float, count: float, z: float = Z) -> tuple[float, float]:
    """(low, high) of a share seen in so many trials.  Wilson 1927.

    Pairs share pictures, so that they tell less than as many tosses: what lies within chance here certainly does.

    >>> low, high = interval(0.5, 100); round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    return wilson(share, count, z)


def _not_finite(steps: pa.Table) -> list[Finding]:
    lost = np.flatnonzero(~np.isfinite(steps["loss"].to_numpy()))
    if not len(lost):
        return []
    what = f"the loss is not a number from optimiser step {lost[0]} on ({len(lost):,} of {len(steps):,} steps)"
    return [Finding("alarm", what, "lower finetune.learning_rate or finetune.beta, or set finetune.precision: no")]


def _errors_rise(training: _Training) -> list[Finding]:
    """Winners that a training drives away.

    A picture that the reference drew is less likely under any other model, on average by how far that one has moved (Gibbs): so winners
    may fall a little that are preferred, and it is told where both fall by more than they part.
    """
    (winner, often), (loser, loser_often) = training.rise("winner"), training.rise("loser")
    if not often or winner <= (TELLING if training.on_errors else TOGETHER) * abs(loser):
        return []
    guard = training.knobs.get("guard")
    first = "turn the guard on (finetune.guard: 0.9), " if guard is None else f"raise finetune.guard ({guard:g} now), "
    advice = f"{first if training.may_guard else ''}raise finetune.beta or lower finetune.learning_rate"
    if loser_often and loser > TELLING * winner:
        what = (f"the errors of winners and losers both rise, by {winner:.2g} and {loser:.2g}" if training.on_errors else
                f"winners and losers both become less likely than under the reference, by {winner:.2g} and {loser:.2g}, more than they part")
        return [Finding("warning", f"{what}; pairs are told apart by unlearning", advice)]
    what = (f"the winner's own error rises by {winner:.2g}" if training.on_errors else
            f"winners themselves become less likely than under the reference, by {winner:.2g}")
    return [Finding("warning", what, advice)]


def _chance(training: _Training) -> list[Finding]:
    if training.learnt:
        return []
    what = f"accuracy is not clearly above one half at the end ({100 * training.mean('accuracy'):.1f} % of the pairs in their order)"
    return [Finding("warning", what, "raise finetune.learning_rate or finetune.epochs; if that changes nothing, "
                                     "the pairs hold nothing to learn (look at the labels; of scored pairs, raise pair.margin)")]


def _flat(training: _Training) -> list[Finding]:
    """Mean logits may be small because pairs differ: then the losses are not near ln 2."""
    margin, loss = np.abs(training.curve("margin")).max(), np.abs(training.curve("loss") - math.log(2)).max()
    if margin >= FLAT_MARGIN or loss >= FLAT_LOSS or training.clipped > MOSTLY:
        return []
    what, faster = f"mean margins stay within ±{margin:.2g}", f"a higher finetune.learning_rate ({training.knobs['learning_rate']:g} now)"
    if training.knobs.get("auto_beta") is not None:
        return [Finding("warning", what, f"finetune.auto_beta could not make up for so little change; try {faster}")]
    arrived = abs(training.mean("margin"))
    wanted = training.knobs["beta"] * (min(WANTED_MARGIN / arrived, MOST_FACTOR) if arrived else MOST_FACTOR)
    return [Finding("warning", what, "beta is too small for so little change, or the learning rate too low; "
                                     f"try finetune.beta: {_coarse(wanted)} or {faster}")]


def _coarse(value: float) -> str:
    """One digit is all that an extrapolated setting deserves.

    >>> _coarse(34_000.0), _coarse(0.00046)
    ('30000', '0.0005')
    """
    return f"{float(f'{value:.0e}'):.9g}"


def _saturated(training: _Training) -> list[Finding]:
    advice = "fewer finetune.epochs, a lower finetune.learning_rate, or more prompts"
    margin = training.mean("margin")
    if margin > WIDE_MARGIN:
        return [Finding("warning", f"margins reach {margin:.1f} on average, where a pair teaches hardly anything: over-fitting", advice)]
    if training.full_early:
        share = 100 * training.mean("accuracy", EARLY - LATE, EARLY)
        return [Finding("warning", f"{share:.1f} % of the pairs are in their order before half of finetuning is over: over-fitting", advice)]
    return []


def _ratio_clipped(training: _Training) -> list[Finding]:
    if training.clipped <= MOSTLY:
        return []
    limit = training.knobs.get("ratio_clip")
    name = "finetune.ratio_clip" + (f" ({limit:g})" if limit is not None else "")
    return [Finding("warning", f"{name} holds back {100 * training.clipped:.0f} % of the pairs at the end",
                    "raise it (null: never), or stop there with fewer finetune.epochs")]


def _gradient(training: _Training) -> list[Finding]:
    norm, limit = training.curve("grad_norm"), training.knobs["max_grad_norm"]
    found = []
    skipped = float((~np.isfinite(norm)).mean())
    if skipped > SKIPPED:
        found.append(Finding("warning", f"{100 * skipped:.0f} % of the optimiser steps had no finite gradient and changed nothing",
                             "set finetune.precision: bf16, or lower finetune.beta"))
    above = float((norm > limit).mean())
    if above > MOSTLY:
        found.append(Finding("note", f"gradients are scaled down in {100 * above:.0f} % of the optimiser steps "
                                     f"(median norm {np.nanmedian(norm):.2g}, finetune.max_grad_norm {limit:g})",
                             "every step then counts alike, which AdamW bears well; lower finetune.learning_rate if the loss jumps"))
    return found


def _silent_columns(training: _Training) -> list[Finding]:
    """Saved steps (or draws) whose pairs are ordered by chance; where all are, accuracy as a whole has said so."""
    if training.columns is None or not len(training.columns):
        return []
    table = training.columns
    accuracy, pairs, timestep = (table[name].to_numpy().astype(np.float64) for name in ("accuracy", "pairs", "timestep"))
    silent = np.array([interval(share, count)[0] <= 0.5 for share, count in zip(accuracy, pairs, strict=True)])
    if silent.all() or not silent.any():
        return []
    noun = "draws" if training.fresh else "saved steps"
    names = [f"{t:.0f}" for t in sorted(timestep[silent], reverse=True)]
    named = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    what = (f"{silent.sum()} of {len(silent)} {noun} show no more than chance over the last epoch (timestep {named}; accuracy "
            f"{100 * np.average(accuracy[silent], weights=pairs[silent]):.1f} %)")
    return [Finding("note", what, _window(training, silent))]


def _window(training: _Training, silent: np.ndarray) -> str:
    """The window that leaves out what is silent at either end."""
    if training.walk is None and not training.fresh:
        return "narrow finetune.window to the others"
    start, end = _places(training)
    kept = ~silent
    low, high = start[kept].min(), end[kept].max()
    outside = (start[silent] < low) | (end[silent] > high)
    if not outside.any():
        return "they lie between others that learn, so that finetune.window cannot leave them out; more epochs may reach them"
    which = "them" if outside.all() else f"the {outside.sum()} at its ends"
    return f"finetune.window: [{_outward(low, math.floor)}, {_outward(high, math.ceil)}] leaves {which} out"


def _places(training: _Training) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of each column as shares of the walk: a saved step is a point of it, a draw a stratum of the window."""
    assert training.columns is not None
    if not training.fresh:
        share = training.columns["step"].to_numpy() / max((training.walk or 0) - 1, 1)
        return share, share
    (low, high), draws, number = training.knobs["window"], training.knobs["draws"], training.columns["step"].to_numpy()
    edges = low + (high - low) * np.arange(draws + 1) / draws
    return edges[number], edges[number + 1]


def _outward(share: float, rounding: Callable[[float], int]) -> str:
    """A share with three decimals that leaves nothing out."""
    return f"{rounding(round(1000 * share, 6)) / 1000:g}"


def _plateau(training: _Training) -> list[Finding]:
    """Accuracy of the third and of the last quarter against the second's; noise counts as a possible gain."""
    epochs = training.knobs["epochs"]
    if epochs < 2 or len(training.steps) < 8 or not training.learnt or training.full_early:
        return []
    then, count = training.mean("accuracy", 0.25, 0.5), training.count(0.25, 0.5)
    for start in (0.5, 0.75):
        now, more = training.mean("accuracy", start, start + 0.25), training.count(start, start + 0.25)
        if now - then + Z * math.sqrt(then * (1 - then) / count + now * (1 - now) / more) >= PLATEAU:
            return []
    return [Finding("note", f"accuracy stays at {100 * then:.0f} % over the second half of finetuning",
                    f"finetune.epochs: {math.ceil(epochs / 2)} would have done, or raise finetune.learning_rate to learn more")]


# -- how much there is to go by


def of_evidence(pairs: int, steps: pa.Table, evaluated: Mapping | None = None) -> list[Finding]:
    """Why a round's figures may mean little: few pairs, few optimiser steps, few held-out prompts, a gain that was not learnt.

    pairs: those that were trained on. steps: the table of optimiser steps. evaluated: what `evaluate` found, None before that.
    """
    return [*_few_pairs(pairs), *_few_steps(len(steps)), *([] if evaluated is None else [*_few_prompts(evaluated), *_not_learnt(steps, evaluated)])]


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _few_pairs(count: int) -> list[Finding]:
    if count >= FEW_PAIRS:
        return []
    return [Finding("warning", f"only {_counted(count, 'pair')} to learn from: they say what these pictures are, not what is preferred",
                    f"label or draw at least {FEW_PAIRS}, better hundreds")]


def _few_steps(count: int) -> list[Finding]:
    if count >= FEW_STEPS:
        return []
    return [Finding("warning", f"only {_counted(count, 'optimiser step')}: the adapter has hardly moved, and what moved is mostly chance",
                    "raise finetune.epochs, or lower finetune.groups")]


def _few_prompts(evaluated: Mapping) -> list[Finding]:
    count = evaluated["prompts"]
    if count >= FEW:
        return []
    what = f"only {_counted(count, 'held-out prompt')}: "
    what += "they say nothing of others" if count < FEWEST else "an interval over so few is wide, and says little"
    return [Finding("warning", what, f"hold out at least {FEW} (prompts.held_out)")]


def _not_learnt(steps: pa.Table, evaluated: Mapping) -> list[Finding]:
    """A win over the base by a training that did not tell its own pairs apart."""
    rate, paired = evaluated["against_base"], _with_pairs(steps)
    if rate["low"] <= 0.5 or not len(paired):
        return []
    training = _Training(paired, None, {}, None)
    if training.learnt:
        return []
    what = (f"{evaluated['judge']} prefers the round to the base in {percent(rate)}, but finetuning told its pairs apart no better than chance "
            f"({100 * training.mean('accuracy'):.1f} %)")
    return [Finding("warning", what, "what moved is not what the pairs prefer; look at the pictures, and raise finetune.learning_rate or "
                                     "finetune.epochs")]


# -- how much was gained, and what else would have given it


def of_size(numbers: Mapping, knobs: Mapping | None = None) -> list[Finding]:
    """What the measures of size say of a round, gravest first; nothing of fewer than FEWEST prompts, of which
    nothing can be said.

    numbers: what `evaluate` found. knobs: the section `finetune`. That a round is below the base is an alarm,
    which `of_round` raises.
    """
    size = numbers["size"]
    if numbers["prompts"] < FEWEST:
        return []
    found = [
        *_chosen_worse(size, numbers["judge"]),
        *_hardly_moved(size, knobs or {}),
        *_moved_for_nothing(size),
        *_diversity_paid(size),
        *_within_noise(size),
    ]
    return worst_first([*found, *_of_sampler(numbers)])


def _chosen_worse(size: Mapping, judge: str) -> list[Finding]:
    """A reward whose choice among the base's own pictures the judge likes less than chance."""
    means = [row["mean"] for row in size["curve"]]
    if len(means) < 2 or None in (means[0], means[-1]) or means[-1] > means[0]:
        return []
    what = (f"{judge} finds the pictures of the base that the reward likes best no better than any "
            f"(mean {means[-1]:.3g} against {means[0]:.3g}), so that there is no best-of-n equivalent")
    return [Finding("warning", what, "what is rewarded is not what it sees: give another expert a weight in pair.weights")]


def _hardly_moved(size: Mapping, knobs: Mapping) -> list[Finding]:
    moved, n = size["visible_change"]["value"], size["best_of"]["value"]
    if moved is None or moved >= VISIBLE or n is None or not 1 / ALIKE < n < ALIKE:
        return []
    beta, rate = (
        f"finetune.{name}" + (f" ({knobs[name]:g} now)" if name in knobs else "")
        for name in ("beta", "learning_rate")
    )
    what = f"the policy hardly moved (visible change {moved:.2f}, {claims.choice(size['best_of']).removeprefix('the ')})"
    return [Finding("warning", what, f"lower {beta} or raise {rate}")]


def _moved_for_nothing(size: Mapping) -> list[Finding]:
    moved, best_of = size["visible_change"]["value"], size["best_of"]
    if moved is None or moved < VISIBLE or claims.unbounded(best_of) or claims.direction(best_of) != "open":
        return []
    what = f"pictures changed (visible change {moved:.2f}) and are not shown to be better: one of its pictures is {as_good_as(best_of)} of the base"
    return [
        Finding(
            "warning",
            what,
            "what the pairs prefer is not what the judge sees; look at how often they agree, and at the pictures",
        )
    ]


def _diversity_paid(size: Mapping) -> list[Finding]:
    kept, best_of = size["diversity_at_equal_quality"], size["best_of"]
    if (
        kept["value"] is None
        or kept["high"] is None
        or kept["high"] >= 1
        or claims.direction(best_of) == "bad"
    ):
        return []
    what = (
        f"diversity was paid for nothing: pictures chosen from the base's are as good ({claims.choice(best_of)}) "
        f"and keep more, of which the tuned model has {claims.plain(kept)}"
    )
    return [
        Finding(
            "warning",
            what,
            "raise finetune.beta, train fewer finetune.epochs, or make pairs that leave alone what is good already",
        )
    ]


def _within_noise(size: Mapping) -> list[Finding]:
    ties = size["ties"]
    if ties is None or ties <= MOSTLY:
        return []
    return [
        Finding(
            "note",
            f"{100 * ties:.0f} % of the pictures score like the base's within the judge's own noise ({size['noise'] or 0:.2g})",
            "they count as ties; how much was gained is the best-of-n equivalent, not the win rate",
        )
    ]


# -- the sampler's own line

KNOBS = ("guidance", "steps", "eta", "guidance_rescale")  # of a setting


def _of_sampler(numbers: Mapping) -> list[Finding]:
    """A gain that the base reaches by a setting, or may reach, or part of which it would have for no more forwards."""
    usual = {line["role"]: line for line in numbers["sampler"] if line["usual"]}
    if line := numbers["base_by_setting"]["reaches"]:
        return [_reached(line, usual, numbers)]
    line = numbers["base_by_setting"]["equal"]
    if line and not line["usual"] and _better(line["over_base"], numbers["size"]["noise"] or 0.0):
        setting = setting_in_words(line, usual["base"])
        what = f"the base draws better with {setting} at no more forwards: {_beside(line, usual['base'], 'over_base')}"
        advice = f"set {_knobs(line, usual['base'])}: part of what tuning gains here is had for nothing"
        return [Finding("note", what, advice)]
    return _too_few_to_tell(numbers, usual)


def _reached(line: Mapping, usual: Mapping, numbers: Mapping) -> Finding:
    """A setting with which the base is as good as the tuned model, certainly or as far as the pictures tell."""
    setting, knobs = setting_in_words(line, usual["base"]), _knobs(line, usual["base"])
    certain = above(line["over_tuned"])
    beside = _beside(line, usual["after"], "over_tuned") + _tuned_there(line, numbers)
    what = f"{setting} {'gives' if certain else 'may give'} the base as much: {beside}"
    apart = "" if certain else "; more evaluate.grid_pictures tell them apart"
    return Finding("warning", what, f"set {knobs}, and tune from there: what is left then is what tuning adds{apart}")


def _better(over: Mapping, noise: float) -> bool:
    """Whether a difference is beyond chance, and one of means beyond the judge's own noise."""
    found = deciding(over)
    return above(over) and (found["value"] or 0.0) > (0.0 if found is over["right"] else noise)


def _too_few_to_tell(numbers: Mapping, usual: Mapping) -> list[Finding]:
    """So few pictures under each setting that they do not even show the gain which all held-out pictures show."""
    tried = any(line["role"] == "base" and not line["usual"] for line in numbers["sampler"])
    if not tried or len(usual) < 2 or claims.direction(numbers["size"]["best_of"]) != "good":
        return []
    over = usual["base"]["over_tuned"]
    if below(over) or above(over):
        return []
    what = (
        f"{usual['base']['pictures']:,} pictures under each setting of the sampler are too few to tell whether one gives the base as much: "
        f"they do not tell base and tuned model apart ({difference_in_words(over)})"
    )
    return [Finding("note", what, "raise evaluate.grid_pictures")]


def _tuned_there(line: Mapping, numbers: Mapping) -> str:
    """What the tuned model draws at a setting of the base's."""
    same = [one for one in numbers["sampler"] if one["role"] == "after" and all(one[knob] == line[knob] for knob in KNOBS)]
    if not same or same[0]["mean"] is None:
        return ""
    quality = f"mean {same[0]['mean']:.3g}" if same[0]["right"] is None else f"{100 * same[0]['right']:.1f} % right"
    return f"; the tuned model has {quality} there"


def _beside(line: Mapping, other: Mapping, over: str) -> str:
    """Quality and cost of one line against another's, and how sure the difference is."""
    if line["right"] is not None and other["right"] is not None:
        quality = f"{100 * line['right']:.1f} % right against {100 * other['right']:.1f} %"
    else:
        quality = f"mean {line['mean']:.3g} against {other['mean']:.3g}"
    difference = difference_in_words(line[over])
    alike = not above(line[over]) and not below(line[over])
    quality += f", and the difference, {difference}, holds 0" if alike else f", {difference}"
    if line["forwards"] == other["forwards"]:
        return f"{quality}; with as many forwards"
    return f"{quality}; with {line['forwards']:g} forwards a picture against {other['forwards']:g}"


def difference_in_words(over: Mapping) -> str:
    """A difference with its interval: in points of per cent of shares right, else of the judge's means."""
    found = deciding(over)
    if found is over["right"]:
        return claims.points(found)
    low, high = ("any" if end is None else f"{end:.3g}" for end in (found["low"], found["high"]))
    return "unknown" if found["value"] is None else f"{found['value']:+.3g} [{low}, {high}]"


def _knobs(line: Mapping, usual: Mapping) -> str:
    return " and ".join(f"sample.{name}: {line[name]:g}" for name in KNOBS if line[name] != usual[name])


# -- which rounds please their reward alone


def of_rounds(rounds: Mapping[int, dict], drift: float | None = DRIFT) -> list[Finding]:
    """The alarms of every round, by number; rounds: number -> what `evaluate` found. drift: see `of_round`."""
    return [finding for number in sorted(rounds) for finding in of_round(number, rounds[number], drift)]


def of_round(number: int, numbers: dict, drift: float | None = DRIFT) -> list[Finding]:
    """Signs that a round pleases its reward and not the eye, against the base.

    The whole interval of its best-of-n equivalent is below 1; or a watched expert falls (its interval wholly
    below one half) while a rewarded one rises (wholly above); or the mean of a meter or of diversity moved by
    more than `drift` standard deviations of the base's (diversity that falls no further than it does by choosing
    among the base's pictures for that quality is none), or a meter of structure lost more than HALF of the base's;
    None: the latter two are never an alarm.
    """
    pictures = [*_drifted(number, numbers, drift), *_emptied(number, numbers, drift)]
    return [*_below_base(number, numbers), *_watched_fall(number, numbers), *pictures]


def _below_base(number: int, numbers: Mapping) -> list[Finding]:
    best_of = numbers["size"]["best_of"]
    if claims.direction(best_of) != "bad":  # of too few prompts the interval is everything
        return []
    what = f"round {number} is below the base: one of its pictures is {as_good_as(best_of)} of the base"
    advice = "keep the base or an earlier round; if the labels are right, raise finetune.beta or lower finetune.learning_rate"
    return [Finding("alarm", what, advice)]


def _watched_fall(number: int, numbers: dict) -> list[Finding]:
    rates = {name: found["against_base"] for name, found in numbers["experts"].items()}
    rewarded = {name for name, found in numbers["experts"].items() if found["rewarded"]}
    rose = [f"{name} {percent(rate)}" for name, rate in rates.items() if name in rewarded and rate["low"] > 0.5]
    fell = [f"{name} {percent(rate)}" for name, rate in rates.items() if name not in rewarded | {"mix"} and rate["high"] < 0.5]
    if not rose or not fell:
        return []
    what = f"round {number}: what is rewarded rose over the base ({', '.join(rose)}) while what only watches fell ({', '.join(fell)})"
    return [Finding("alarm", what, "the reward is being gamed; keep a round without an alarm, or give what fell a weight in pair.weights")]


def _drifted(number: int, numbers: dict, limit: float | None) -> list[Finding]:
    if limit is None:
        return []
    moved = {name: shift for name, shift in shifts(numbers).items() if shift is not None and abs(shift) > limit}
    if moved.get("diversity", 0) < 0 and _as_varied_as_chosen(numbers["size"]):
        del moved["diversity"]
    far = [f"{name.replace('_', ' ')} by {shift:+.1f}" for name, shift in moved.items()]
    if not far:
        return []
    what = f"round {number}: pictures drifted from the base's, in standard deviations: {', '.join(far)} (evaluate.drift is {limit:g})"
    return [Finding("alarm", what, "if the prompts did not ask for that, keep an earlier round, or raise finetune.beta")]


def _as_varied_as_chosen(size: Mapping) -> bool:
    """Whether a better round may well keep what choosing among the base's pictures keeps: mistakes that go take their variety along."""
    kept = size["diversity_at_equal_quality"]
    return claims.direction(size["best_of"]) == "good" and kept["value"] is not None and (kept["high"] is None or kept["high"] >= 1)


def _emptied(number: int, numbers: dict, limit: float | None) -> list[Finding]:
    """Structure that is gone, where the base's pictures vary too much in it for a standard deviation to tell."""
    if limit is None:
        return []
    lost = []
    for name, values in ((name, numbers["meters"][name]) for name in STRUCTURE if name in numbers["meters"]):
        base, after, shift = values["base"], values["after"], _shift(values)
        if (
            base and after is not None and after < HALF * base and (shift is None or abs(shift) <= limit)
        ):  # else drift has told
            lost.append(
                f"{name.replace('_', ' ')} fell by {100 * (1 - after / base):.0f} %, from {base:.3g} to {after:.3g}"
            )
    if not lost:
        return []
    return [
        Finding(
            "alarm",
            f"round {number}: pictures lost structure: {'; '.join(lost)}",
            "look at them; if garments are drawn flatter or emptier, keep an earlier round, or raise finetune.beta",
        )
    ]


def shifts(numbers: dict) -> dict[str, float | None]:
    """How far each meter and diversity moved from the base, in standard deviations of the base's; None where not known.

    A meter's are over the base's pictures, diversity's over its prompts.
    """
    return {name: _shift(found) for name, found in {**numbers["meters"], "diversity": numbers["diversity"]}.items()}


def _shift(found: Mapping) -> float | None:
    base, after, spread = (found[name] for name in ("base", "after", "spread"))
    return (after - base) / spread if base is not None and after is not None and spread else None


# -- which round to keep


def best_round(rounds: Mapping[int, dict], judge: str, drift: float | None = DRIFT) -> int:
    """The round to keep: of those without an alarm that beat the base, the highest mean by the judge; 0 (the base) if none does.

    rounds: number -> what `evaluate` found. judge: the expert that decides, or "mix". A round beats the base where the interval
    of its best-of-n equivalent lies wholly above 1; where there is none (nobody rewarded is asked about held-out draws) that of its
    win rate above one half. Of equal rounds the earlier is kept: it moved less.
    """
    fit = [number for number in sorted(rounds) if _beats(rounds[number], judge) and not of_round(number, rounds[number], drift)]
    return max(fit, key=lambda number: rounds[number]["size"]["shift"]["value"] or 0.0, default=0)


def _beats(numbers: dict, judge: str) -> bool:
    least = numbers["size"]["best_of"]["low"]
    return _rate(numbers, judge)["low"] > 0.5 if least is None else least > 1


def best_in_words(rounds: Mapping[int, dict], judge: str, drift: float | None = DRIFT) -> str:
    """Which round `best_round` keeps, and why, as a sentence."""
    best = best_round(rounds, judge, drift)
    alarmed = [number for number in sorted(rounds) if of_round(number, rounds[number], drift)]
    aside = f"; not counting round{'s' if len(alarmed) > 1 else ''} {', '.join(map(str, alarmed))}, which raised an alarm" if alarmed else ""
    if not best:
        return f"The base is the one to keep: no round beats it by {judge}, with an interval wholly above the best of 1{aside}."
    found = rounds[best]
    why = (f"{judge} prefers it to the base in {percent(_rate(found, judge))}" if found["size"]["best_of"]["low"] is None else
           f"by {judge} one picture of it is {as_good_as(found['size']['best_of'])} of the base")
    return f"Round {best} is the one to keep: {why}{aside}."


def _rate(numbers: dict, judge: str) -> dict:
    return numbers["experts"][judge]["against_base"]
