"""The report's parts: what a run's tables say in words, charts and pictures, and the page they are laid out on.

Nothing here reads a disk or loads a model: `stages/report.py` gathers a `Record`, everything below is a function of it.
"""

import base64
import inspect
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from fashiondpo_pipeline import budget, charts, claims, diagnosis, effect_size, outcomes, preferences, statistics
from fashiondpo_pipeline.charts import EXPERT_COLOURS, ROUND_COLOURS, Mark, Points
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.config import Config
from fashiondpo_pipeline.diagnosis import Finding
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser, Grid
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.registry import EXPERTS
from fashiondpo_pipeline.seeds import key

DIVERSITY_FLOOR = 0.9  # of the base's
MISSING = 0.02  # share of pictures without a score
THUMBNAIL, PIXELS = 256, 96  # longest side in the page; up to PIXELS a picture is shown as the pixels it has
LEADING = 24  # pictures that "Before and after" leads with
RESAMPLES = 1000  # for the intervals of means, which only a chart shows


@dataclass(frozen=True)
class Missing:
    """How many pictures of one draw an expert gave no score, and the reason it gave most often."""

    expert: str
    where: str
    count: int
    total: int
    reason: str


@dataclass(frozen=True)
class Round:
    """What the tables say of one round."""

    number: int
    before: int  # the round it went on from; 0 is the base
    numbers: dict  # evaluate's
    held_out: Grid
    train: Grid  # every expert's scores of the candidates, rewarded or not
    rule: Rule
    pairs: pa.Table
    pair_numbers: dict
    steps: pa.Table
    columns: pa.Table | None  # accuracy by saved step; None in runs that lack it
    knobs: dict  # the section `finetune` as it was, and what the finetuning noted of its objectives
    walk: int  # how many steps a candidate was drawn in
    strength: dict | None = None  # what the step that gave its adapter a strength wrote; None where that is as trained
    divergence: float | None = None  # from the reference when finetuning ended, nats a picture; None without log-probabilities

    @cached_property
    def chooser(self) -> Chooser:
        """The candidates as pairs were chosen from them."""
        return Chooser(self.train, self.rule)

    @cached_property
    def gaps(self) -> dict[str, np.ndarray]:
        """Winner's normalised score minus loser's, of every expert, watched ones too; (p,) each."""
        everyone = Chooser(self.train, replace(self.rule, weights=dict.fromkeys(self.train.scores, 1.0)))
        rows = pc.index_in(self.pairs["group"], self.train.groups).to_numpy()
        winner, loser = (self.pairs[role].to_numpy() for role in ("winner", "loser"))
        return {name: normal[rows, winner] - normal[rows, loser] for name, normal in everyone.normal.items()}

    @property
    def size(self) -> dict | None:
        """The measures of size; None before an evaluation, or where there was nothing to choose the base's pictures by."""
        size = self.numbers.get("size")
        return size if size and claims.known(size["best_of"]) else None

    @cached_property
    def findings(self) -> list[Finding]:
        """What this round's finetuning gives cause to say, gravest first."""
        return diagnosis.of_training(self.steps, self.columns, self.knobs, self.walk)

    @property
    def rewarded(self) -> dict[str, float]:
        return {name: weight for name, weight in self.rule.weights.items() if weight > 0}


@dataclass(frozen=True)
class Record:
    """What the tables say of a run."""

    config: Config
    base: Grid
    rounds: list[Round]
    missing: list[Missing]
    right: list[np.ndarray] | None = None  # which of the base's and the last round's are right, (g, k); None: scores only

    @property
    def last(self) -> Round:
        return self.rounds[-1]

    @property
    def experts(self) -> list[str]:
        return list(self.base.scores)

    @property
    def judge(self) -> str:
        return self.last.numbers["judge"]

    @property
    def shown(self) -> list[Round]:
        """Rounds that pictures and overlaid curves show: all, or as many as there are colours, the first and last too."""
        return [self.rounds[i] for i in spaced(len(self.rounds), ROUND_COLOURS - 1)]

    @cached_property
    def opinions(self) -> list[np.ndarray]:
        """The judge's scores of the held-out pictures, (g, k), of the base and of every round."""
        grids = [self.base.scores, *(r.held_out.scores for r in self.rounds)]
        if self.judge in self.base.scores:
            return [scores[self.judge] for scores in grids]
        return _mixed(grids, self.last.rewarded)

    @cached_property
    def decimals(self) -> dict[str, int]:
        """How many decimals each expert's scores are shown with, and the judge's."""
        return {name: decimals_for(scores) for name, scores in {**self.base.scores, self.judge: self.opinions[0]}.items()}

    @cached_property
    def outcomes(self) -> np.ndarray:
        """What became of each held-out picture from the base to the last round, (g, k); see `outcomes`."""
        if self.right is not None:
            return outcomes.of_right(*self.right)
        return outcomes.of_scores(self.opinions[0], self.opinions[-1], self.last.numbers["size"]["noise"] or 0.0)

    @cached_property
    def judged_gains(self) -> np.ndarray:
        """How much the judge's mean rose from the base to the last round, of each held-out prompt; (g,), NaN where unknown."""
        return _row_means(self.opinions[-1] - self.opinions[0])


def _mixed(grids: list[dict[str, np.ndarray]], weights: dict[str, float]) -> list[np.ndarray]:
    """The rewarded experts' mix of several draws, in standard deviations over all of them."""
    spread = {name: preferences.Spread.of(np.concatenate([grid[name] for grid in grids]), False) for name in weights}
    scaled = [{name: preferences.normalise(grid[name], "zscore", spread[name]) for name in weights} for grid in grids]
    return [preferences.mix(normal, weights) for normal in scaled]


def _row_means(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, values, 0).sum(1) / np.maximum(count, 1), np.nan)


def spaced(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0..count-1, evenly spread, both ends among them (the last one if only one may stay).

    >>> spaced(3, 5), spaced(10, 4), spaced(10, 1)
    ([0, 1, 2], [0, 3, 6, 9], [9])
    """
    if count <= most:
        return list(range(count))
    return [count - 1] if most == 1 else [round(i * (count - 1) / (most - 1)) for i in range(most)]


# -- figures in words


MINUS, NO_VALUE, UNBROKEN = "\u2212", "\u2013", "\u00a0"  # a true minus sign, a dash, a space where no line may break


def figure(value: float | None, digits: int = 4) -> str:
    """A number in so many digits, a dash where there is none.

    >>> figure(0.531249), figure(None) == NO_VALUE, figure(-12.0, 3) == MINUS + "12.0"
    ('0.5312', True, True)
    """
    return NO_VALUE if value is None or value != value else f"{value:#.{digits}g}".rstrip(".").replace("-", MINUS)


def fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals, a dash where there is none."""
    return NO_VALUE if value is None or value != value else f"{value:z.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, decimals: int = 2) -> str:
    """The same with its sign."""
    return f"+{fixed(value, decimals)}" if value is not None and value > 0 else fixed(value, decimals)


def decimals_for(values: np.ndarray) -> int:
    """How many decimals tell values apart: two digits of their interquartile range, which a few far ones do not widen.

    >>> decimals_for(np.array([0.27, 0.31])), decimals_for(np.array([-3.0, 250.0])), decimals_for(np.array([5.0]))
    (3, 0, 3)
    """
    known = values[np.isfinite(values)]
    spread = float(np.subtract(*np.quantile(known, [0.75, 0.25]))) if len(known) else 0.0
    return int(np.clip(1 - np.floor(np.log10(spread)), 0, 6)) if spread > 0 else 3


def percent(rate: dict) -> str:
    """A win rate with its interval, on one line."""
    return statistics.percent(rate).replace(" ", UNBROKEN)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(0.42), duration(75), duration(8000)
    ('0.4 s', '1 min 15 s', '2 h 13 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _set(text: str) -> str:
    """A sentence as the page sets it: true minus signs, an interval on one line.

    >>> _set("by -1.5, 70.0 % [60.0, 80.0]") == f"by {MINUS}1.5, 70.0{UNBROKEN}%{UNBROKEN}[60.0,{UNBROKEN}80.0]"
    True
    """
    text = re.sub(r"(?<![\w.])-(?=\d)", MINUS, text).replace(" -> ", " → ")
    return re.sub(r"\d %( \[[^]]*\])?", lambda found: found[0].replace(" ", UNBROKEN), text)


def _capital(text: str) -> str:
    """A sentence's start; the rest as it is, for names may be in capitals."""
    return text[:1].upper() + text[1:]


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}" + ("" if number == 1 else "s")


def judge_in_words(record: Record) -> str:
    """'the judge', 'the judge (bright)', 'the mix of the rewarded experts'."""
    if record.judge not in record.experts:
        return "the mix of the rewarded experts"
    return "the judge" if record.judge == "judge" else f"the judge ({record.judge})"


def judges_number(record: Record) -> str:
    """What the judge's score is, as a sentence: the first line of its kind's description; '' where that is not this package's to say."""
    entry = record.config.experts.get(record.judge)
    if entry is None:
        return "Its score is the rewarded experts' weighted mean, in standard deviations." if record.judge == "mix" else ""
    if entry.use not in EXPERTS.names():
        return ""
    about = (inspect.getdoc(EXPERTS.find(entry.use)) or "").partition("\n")[0].rstrip(".")
    return f"Its score: {about}; higher is better." if about else ""


def judge_line(record: Record) -> str:
    """Who judges, whether it was rewarded, what its score is and how far it can be trusted, in one line."""
    entry, size = record.config.experts.get(record.judge), record.last.size
    kind = f" ({entry.use})" if entry is not None and entry.use != record.judge else ""
    who = (
        f"The expert {record.judge}{kind}"
        if record.judge in record.experts
        else "The mix of the rewarded experts"
    )
    stands = "was itself rewarded" if record.last.numbers["judge_rewarded"] else "was not rewarded"
    noise = size["noise"] if size else None
    sentences = (
        f"{who} judges, and {stands}.",
        judges_number(record),
        f"Its own noise is {figure(noise, 2)}: scores no further apart count as a tie." if noise else "",
    )
    return " ".join(filter(None, sentences))


def headline(record: Record) -> tuple[str, str]:
    """(good, bad or open; the result in a few words)."""
    size = record.last.size
    if size is None:
        rate = record.last.numbers["against_base"]
        if rate["low"] > 0.5:
            return "good", "Preferred to the base"
        return (
            ("bad", "The base is preferred")
            if rate["high"] < 0.5
            else ("open", "No clear difference from the base")
        )
    tone = claims.direction(size["best_of"])
    if tone == "open":
        return tone, "No clear difference from the base"
    text = _set(f"One picture of the tuned model is {effect_size.as_good_as(size['best_of'])} of the base")
    free = record.last.numbers["base_by_setting"]["reaches"]
    if free is None:
        return tone, text
    usual = next(line for line in record.last.numbers["sampler"] if line["usual"])
    so = "so is" if effect_size.above(free["over_tuned"]) else "so may be"
    return "open", f"{text}, and {so} one of the base with {effect_size.setting_in_words(free, usual)}"


def measures(record: Record) -> list[tuple[str, str, str]]:
    """(name, figure with interval, what it means) of each measure of size beside the best-of-n equivalent, of
    the last round.
    """
    size = record.last.size
    if size is None:
        return []
    right = size["right"]
    gain = (
        [
            ("share right", claims.right_share(right), claims.points(right["change"])),
            (
                "mended, broken",
                f"{right['mended']:,}, {right['broken']:,}",
                f"of {_count(right['pictures'], 'held-out picture')}",
            ),
        ]
        if right
        else [
            ("mean of the judge", claims.signed(size["shift"]), "standard deviations of the base's pictures")
        ]
    )
    kept, moved = size["diversity_at_equal_quality"], size["visible_change"]
    every = [
        *gain,
        (
            "diversity at equal quality",
            claims.plain(kept),
            "over that of the base's pictures chosen to be as good",
        ),
        (
            "visible change",
            claims.plain(moved),
            "distance to the base's picture of the same seed, over that between two seeds",
        ),
    ]
    return [(name, _set(value), _set(about)) for name, value, about in every]


def verdict(record: Record) -> str:
    """How often the judge prefers the last round, as a sentence."""
    numbers, size = record.last.numbers, record.last.size
    text = (
        f"After {_count(record.last.number, 'round')} {judge_in_words(record)} prefers the tuned model's picture in "
        f"{percent(numbers['against_base'])} of {_count(numbers['pictures'], 'held-out picture')}"
    )
    ties = (
        f"; {100 * size['ties']:.0f}{UNBROKEN}% are ties within its own noise"
        if size and size["ties"] is not None
        else ""
    )
    ratio = diversity_ratio(record.last)
    return text + ties + (f", diversity {ratio:.2f} of the base's." if ratio is not None else ".")


def gauge(best_of: dict) -> dict[str, float]:
    """Places in per cent on a scale from the worst to the best of all, 1 in its middle, each doubling as
    long: low, value, high.
    """
    return dict(
        zip(
            ("low", "at", "high"),
            (100 * (0.5 + place / (2 * _reach(best_of))) for place in _doublings(best_of)),
            strict=True,
        )
    )


def _reach(best_of: dict) -> float:
    """How many doublings from 1 to all that there is to choose from."""
    return max(float(np.log2(best_of["most"])), 1.0)


def _doublings(best_of: dict) -> list[float]:
    """Low, value and high of a best-of-n equivalent as doublings of 1, at the scale's end where they are
    beyond it.
    """
    ends = (
        best_of["low"] or 0.0,
        np.inf if best_of["value"] is None else best_of["value"],
        np.inf if best_of["high"] is None else best_of["high"],
    )
    with np.errstate(divide="ignore"):
        return np.clip(np.log2(ends), -_reach(best_of), _reach(best_of)).tolist()


def diversity_ratio(done: Round) -> float | None:
    """Diversity within a prompt as a share of the base's; None where no tower measured it, or the base has none."""
    found = done.numbers["diversity"]
    return found["after"] / found["base"] if found["after"] is not None and found["base"] else None


def round_to_keep(record: Record) -> str:
    """Which round to keep, as a sentence."""
    return _set(diagnosis.best_in_words({r.number: r.numbers for r in record.rounds}, record.judge, record.config.evaluate.drift))


def what_was_rewarded(record: Record) -> str:
    """Which experts the pairs were made from, and which only looked on."""
    rewarded = record.last.rewarded
    total = sum(rewarded.values())
    weights = _listed([f"{name} ({100 * weight / total:.0f}{UNBROKEN}%)" for name, weight in rewarded.items()])
    watched = [name for name in record.experts if name not in rewarded]
    return f"Rewarded: {weights}. " + (f"Only watched: {_listed(watched)}." if watched else "No expert was only watched.")


# -- what looks off


def alarms(record: Record) -> dict[int, list[str]]:
    """Each round's alarms as sentences, of its finetuning and of its pictures; only the rounds that have any."""
    found = {}
    for r in record.rounds:
        training = [f"round {r.number}: {finding.sentence}" for finding in r.findings if finding.level == "alarm"]
        pictures = [finding.sentence for finding in diagnosis.of_round(r.number, r.numbers, record.config.evaluate.drift)]
        found[r.number] = [_set(_capital(sentence)) + "." for sentence in training + pictures]
    return {number: sentences for number, sentences in found.items() if sentences}


def described(finding: Finding) -> str:
    """A finding as a sentence of its own."""
    return _set(_capital(finding.sentence)) + "."


def warnings(record: Record) -> list[str]:
    """Everything that looks off, in plain words; empty where nothing does."""
    checks = (_control, _judge_is_rewarded, _size, _reward_without_gain, _step_back, _narrower, _pairs_against_watched, _training,
              _silence, _groups_without, _reliability, _little_evidence)
    return [sentence for check in checks for sentence in check(record)]


def _control(record: Record) -> list[str]:
    odd = sorted({r.rule.labels for r in record.rounds} - {"scored"})
    return [f"This is a control experiment: the pairs' labels are {label}, so no gain is to be expected." for label in odd]


def _judge_is_rewarded(record: Record) -> list[str]:
    if not record.last.numbers["judge_rewarded"]:
        return []
    return [f"{_capital(judge_in_words(record))} is itself what was rewarded: a high win rate shows that the reward went up, "
            "not that pictures got better. Set evaluate.judge to an expert without a weight in pair.weights."]


def _size(record: Record) -> list[str]:
    return [described(finding) for finding in _of_size(record) if finding.level != "note"]


def remarks(record: Record) -> list[str]:
    """What the measures of size give cause to say though nothing is off."""
    return [described(finding) for finding in _of_size(record) if finding.level == "note"]


def _of_size(record: Record) -> list[Finding]:
    return diagnosis.of_size(record.last.numbers, record.last.knobs)


def _reward_without_gain(record: Record) -> list[str]:
    numbers = record.last.numbers
    rate, judge = numbers["against_base"], judge_in_words(record)
    if rate["low"] > 0.5:
        return []
    finds = "prefers the base" if rate["high"] < 0.5 else "cannot tell it from the base"
    held_out = numbers["experts"]  # people are not asked about held-out draws
    rose = [name for name in record.last.rewarded if name in held_out and held_out[name]["against_base"]["low"] > 0.5]
    if rose and rate["high"] < 0.5 and not numbers["judge_rewarded"]:
        return []  # an alarm says it
    if not rose or numbers["judge_rewarded"]:
        return [f"{_capital(judge)} {finds}: the tuned model's picture wins in {percent(rate)}."]
    return [f"{_listed(rose)}, which was rewarded, rose; {judge}, which only watched, {finds} ({percent(rate)}). "
            "The model may be pleasing its reward alone: look at the pictures before and after."]


def _step_back(record: Record) -> list[str]:
    return [f"Round {r.number} lost to round {r.before}: {percent(rate)}. Round {r.before} may be the one to keep."
            for r in record.rounds if r.before and (rate := r.numbers["against_previous"])["high"] < 0.5]


def _narrower(record: Record) -> list[str]:
    """A loss of diversity by itself: only where it cannot be held against what choosing pictures as good would lose too."""
    ratio = diversity_ratio(record.last)
    if ratio is None or ratio >= DIVERSITY_FLOOR or _at_equal_quality(record):
        return []
    return [f"Diversity within a prompt fell to {ratio:.2f} of the base's (below {DIVERSITY_FLOOR:g}): pictures of one prompt "
            "have become alike. Fewer epochs, a higher finetune.beta or a lower finetune.learning_rate hold it."]


def _at_equal_quality(record: Record) -> bool:
    """Whether diversity at equal quality says anything, so that the diagnosis judges it."""
    size = record.last.size
    return size is not None and size["diversity_at_equal_quality"]["high"] is not None


def diversity_in_words(record: Record) -> str:
    """What may be said of diversity where nothing of it is off."""
    if _at_equal_quality(record):
        return "diversity is not shown to be below that of the base's pictures chosen to be as good"
    unknown = " (not measured)" if diversity_ratio(record.last) is None else ""
    return f"diversity is at least {DIVERSITY_FLOOR:g} of the base's{unknown}"


def _pairs_against_watched(record: Record) -> list[str]:
    last = record.last
    watched = {name: share for name, share in sides_with_pairs(last).items() if name not in last.rewarded}
    return [f"{name}, which only watched, would have ordered most of round {last.number}'s pairs the other way round "
            f"(it sides with {100 * share:.0f} %): what is rewarded is not what it likes."
            for name, share in watched.items() if share < 0.5]


def sides_with_pairs(done: Round) -> dict[str, float]:
    """Share of the round's pairs that each expert orders as they are labelled, ties one half; NaN without a score."""
    found = {}
    for name, gap in done.gaps.items():
        known = gap[np.isfinite(gap)]
        found[name] = float(((known > 0) + 0.5 * (known == 0)).mean()) if len(known) else float("nan")
    return found


def _training(record: Record) -> list[str]:
    """The last round's warnings in full; the others' stand with their curves."""
    last = [finding for finding in record.last.findings if finding.level == "warning"]
    found = [_set(f"Finetuning of round {record.last.number}: {finding.sentence}.") for finding in last]
    others = [str(r.number) for r in record.rounds[:-1] if any(finding.level == "warning" for finding in r.findings)]
    if others:
        found.append(f"Finetuning of round{'s' if len(others) > 1 else ''} {_listed(others)} gave warnings too; see Finetuning below.")
    return found


def _silence(record: Record) -> list[str]:
    return [f"{m.expert} gave no score for {m.count:,} of {m.total:,} {m.where}; mostly: {m.reason}."
            for m in record.missing if m.count > MISSING * m.total]


def _groups_without(record: Record) -> list[str]:
    found = []
    for r in record.rounds:
        without, groups = r.pair_numbers["rejected"], r.pair_numbers["groups"]
        if without > groups / 2:
            found.append(f"Round {r.number}: {without:,} of {groups:,} prompts gave no pair: their pictures lie within the margin. "
                         "Where most are good already that is as it should be; else lower pair.margin or pair.agree.")
    return found


def _reliability(record: Record) -> list[str]:
    """What asking experts a second time has shown, of the last round."""
    retest = record.last.pair_numbers.get("retest")
    if not retest:
        return []
    found = [f"Asked twice about {e['calls']:,} candidates of round {record.last.number}, {name} orders {e['same_order']:.1%} of {e['pairs']:,} "
             f"pairs the same way{_in_brackets(e)}."
             for name, e in retest["experts"].items() if e["same_order"] is not None]
    if retest["labels"]:
        labels = retest["labels"]
        found.append(f"Of {labels['pairs']:,} preferences looked at twice {labels['disagree']:.1%} turn round: about {labels['flip_rate']:.1%} of "
                     "the labels are chance (finetune.options: {label_smoothing: auto} allows for it).")
    return found


def _in_brackets(e: dict) -> str:
    """
    >>> _in_brackets({"correlation": 0.5, "alpha": None}), _in_brackets({"correlation": None, "alpha": None})
    (' (correlation 0.50)', '')
    """
    figures = (("correlation", e["correlation"]), ("Krippendorff's alpha", e["alpha"]))
    known = ", ".join(f"{name} {value:.2f}" for name, value in figures if value is not None)
    return f" ({known})" if known else ""


def _little_evidence(record: Record) -> list[str]:
    last = record.last
    return [described(finding) for finding in diagnosis.of_evidence(len(last.pairs), last.steps, last.numbers)]


# -- which pictures to show


def chosen_prompts(record: Record) -> list[int]:
    """Rows of the held-out prompts to show, greatest gain first: evenly spread over all, the greatest loss among them."""
    order = ranked_prompts(record)
    return [int(order[i]) for i in spaced(len(order), record.config.report.prompts)]


def ranked_prompts(record: Record) -> np.ndarray:
    """Rows of the held-out prompts that the judge scored in both, greatest gain first."""
    known = np.flatnonzero(np.isfinite(record.judged_gains))
    return known[np.argsort(-record.judged_gains[known], kind="stable")]


def chosen_pairs(done: Round, most: int) -> tuple[list[int], list[int]]:
    """Rows of the widest and of the narrowest pairs of a round, half of `most` each, at most one a prompt on each side."""
    margin = np.abs(done.pairs["margin"].to_numpy())
    groups = done.pairs["group"].to_pylist()

    def first_of_groups(order: np.ndarray, count: int) -> list[int]:
        found: dict[str, int] = {}
        for row in order.tolist():
            if len(found) == count:
                break
            found.setdefault(groups[row], row)
        return list(found.values())

    widest = first_of_groups(np.argsort(-margin, kind="stable"), (most + 1) // 2)
    narrowest = first_of_groups(np.argsort(margin, kind="stable"), most // 2)
    return widest, [row for row in narrowest if row not in widest]


def leading(record: Record) -> list[outcomes.Shown]:
    """The held-out pictures that stand first: by key, in the shares of what became of them."""
    return outcomes.chosen(record.outcomes, record.base.groups.to_pylist(), LEADING, record.config.seed)


def outcome_names(record: Record) -> dict[int, str]:
    """What outcomes are called: mended, broken, unchanged; where the judge has scores only, better, worse,
    alike.
    """
    return outcomes.SCORED if record.right is None else outcomes.RIGHT


def outcomes_in_words(record: Record) -> str:
    """How many pictures there are of each outcome, and how many of each are shown, as sentences."""
    names, occur = outcome_names(record), outcomes.counts(record.outcomes)
    total, places = sum(occur.values()), outcomes.allotted(occur, LEADING)
    every = _listed([f"{count:,} {names[outcome]}" for outcome, count in occur.items()]).replace(
        " ", " are ", 1
    )
    unseen = [names[outcome] for outcome, count in occur.items() if count and not places[outcome]]
    rare = f"; so few are {_listed(unseen)} that none is among them" if unseen else ""
    meaning = "" if record.right is None else " (right in both, or wrong in both)"
    return (
        f"Of {_count(total, 'held-out picture')} {every}{meaning}. Shown are {sum(places.values())} of them in these shares, "
        f"of each kind those whose key comes first, which is made of the run's seed, the prompt and the picture's number{rare}."
    )


@dataclass(frozen=True)
class Thumbnail:
    """A picture as the page holds it."""

    source: str
    width: int
    height: int
    pixelated: bool


def thumbnail(data: bytes, where: str) -> Thumbnail | None:
    """A small picture stays as it is, to be shown in its own pixels; others become JPEGs of at most 256 pixels a side.

    None where it cannot be read: the page says so in its place, as the experts' reasons do.
    """
    try:
        picture = decode_picture(data, where)
    except UserError:
        return None
    if max(picture.size) <= PIXELS:
        return _embed(picture, "png", pixelated=True)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return _embed(picture, "jpeg", pixelated=False)


def _embed(picture: Image.Image, kind: str, pixelated: bool) -> Thumbnail:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    text = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/{kind};base64,{text}", *picture.size, pixelated)


Pictures = dict[tuple[str, int], Thumbnail | None]


def before_and_after(record: Record, rows: list[int], prompts: dict[str, str], pictures: dict[int, Pictures]) -> list[dict]:
    """For each chosen prompt: its pictures by the base and, from the same seeds, by each shown round; pictures: by round."""
    order = ranked_prompts(record).tolist()
    names = record.base.groups.to_pylist()
    return [
        {"prompt": prompts[names[row]], "place": order.index(row) + 1, "gain": float(record.judged_gains[row]),
         "draws": [_draw(record, number, row, names[row], found) for number, found in pictures.items()]}
        for row in rows
    ]


def leading_cards(
    record: Record, shown: list[outcomes.Shown], prompts: dict[str, str], base: Pictures, after: Pictures
) -> list[dict]:
    """For each picture that stands first: both models' of its seed, what became of it, and the judge's
    scores.
    """
    names, words = record.base.groups.to_pylist(), outcome_names(record)
    cards = []
    for one in shown:
        name = names[one.row]
        sides = [
            {
                "role": role,
                "picture": pictures[name, one.number],
                "score": float(record.opinions[at][one.row, one.number]),
                "right": _right_in_words(record, at, one),
            }
            for role, pictures, at in (("base", base, 0), ("tuned", after, -1))
        ]
        cards.append(
            {
                "prompt": prompts[name],
                "outcome": words[one.outcome],
                "tone": {1: "good", -1: "bad"}.get(one.outcome, ""),
                "sides": sides,
            }
        )
    return cards


def _right_in_words(record: Record, at: int, one: outcomes.Shown) -> str:
    if record.right is None:
        return ""
    return "right" if record.right[at][one.row, one.number] else "wrong"


def _draw(record: Record, number: int, row: int, name: str, pictures: Pictures) -> dict:
    """One draw of one prompt: a row of pictures with the judge's scores."""
    base, scores = record.opinions[0][row], record.opinions[number][row]
    cells = []
    for i in range(min(record.config.report.pictures, len(scores))):
        change = scores[i] - base[i]
        trend = "" if number == 0 or not np.isfinite(change) or change == 0 else "up" if change > 0 else "down"
        cells.append({"picture": pictures[name, i], "score": float(scores[i]), "trend": trend})
    mean = float(_row_means(record.opinions[number][row : row + 1])[0])
    return {"label": f"round {number}" if number else "base", "mean": mean, "cells": cells}


def pair_cards(record: Record, rows: list[int], prompts: dict[str, str], pictures: Pictures) -> list[dict]:
    """The chosen pairs of the last round: both pictures, mixed scores, margin, and what every expert says of them."""
    done = record.last
    cards = []
    for row in rows:
        pair = done.pairs.slice(row, 1).to_pylist()[0]
        group = pc.index(done.train.groups, pair["group"]).as_py()
        sides = [
            {"role": role, "picture": pictures[pair["group"], pair[role]], "score": pair[f"{role}_score"], "number": pair[role]}
            for role in ("winner", "loser")
        ]
        experts = [_opinion(done, name, float(done.gaps[name][row]), group, pair) for name in record.experts]
        cards.append({"prompt": prompts[pair["group"]], "margin": pair["margin"], "sides": sides, "experts": experts})
    return cards


def _opinion(done: Round, name: str, gap: float, group: int, pair: dict) -> dict:
    """One expert on one pair. width: length of the gap's bar, full at three of its units."""
    scores = done.train.scores[name][group]
    width = 100 * min(abs(gap) / 3, 1) if np.isfinite(gap) else 0
    return {"name": name, "rewarded": name in done.rewarded, "gap": gap, "width": round(width, 1),
            "winner": float(scores[pair["winner"]]), "loser": float(scores[pair["loser"]])}


# -- charts


def colour_of(record: Record, expert: str) -> str:
    """The same colour for an expert everywhere."""
    return f"expert-{record.experts.index(expert) % EXPERT_COLOURS}" if expert in record.experts else "ink"


def round_colours(record: Record) -> dict[int, str]:
    """Colour of each shown round, 1.. from pale to strong."""
    tones = spaced(ROUND_COLOURS - 1, len(record.shown))
    return {r.number: f"round-{tone + 1}" for r, tone in zip(record.shown, tones, strict=True)}


def win_rate_chart(record: Record) -> Markup:
    names = list(record.last.numbers["experts"])
    lines = []
    for number, name in enumerate(names):
        rates = [r.numbers["experts"][name]["against_base"] for r in record.rounds]
        beside = 0.05 * (number - (len(names) - 1) / 2)  # bars of the same round must not hide each other
        places = [r.number + beside for r in record.rounds]
        middle, low, high = ([100 * rate[part] for rate in rates] for part in ("win_rate", "low", "high"))
        lines.append(Points(colour_of(record, name), places, middle, low, high, hollow=name not in record.last.rewarded))
    return charts.intervals(lines, y="win rate over the base, %", level=50, about="Win rate over the base by round")


def size_charts(record: Record) -> list[tuple[str, Markup]]:
    """(caption, chart) of each measure of size with its interval, round by round; empty where there are none."""
    sizes = {r.number: r.size for r in record.rounds if r.size}
    if not sizes:
        return []

    def chart(name: str, level: float | None, y: str, caption: str) -> tuple[str, Markup]:
        values = [(number, size[name], 1.0) for number, size in sizes.items()]
        return caption, _estimates(values, y, level, f"{name.replace('_', ' ')} by round")

    return [
        (
            "Best-of-n equivalent: of how many pictures of the base the best is as good as one; dashed: any.",
            _best_of_chart(sizes),
        ),
        _right_chart(sizes)
        or chart(
            "shift",
            0.0,
            "SD of the base",
            "Mean of the judge over the base's, in standard deviations of the base.",
        ),
        chart(
            "diversity_at_equal_quality",
            1.0,
            "ratio",
            "Diversity over that of the base's pictures chosen to be as good; dashed: choosing is worth as much.",
        ),
        chart(
            "visible_change",
            None,
            "ratio",
            "Visible change: distance to the base's picture of the same seed, over that between two seeds.",
        ),
    ]


def _right_chart(sizes: dict[int, dict]) -> tuple[str, Markup] | None:
    rights = {number: size["right"] for number, size in sizes.items() if size["right"]}
    if not rights:
        return None
    base = 100 * next(iter(rights.values()))["base"]["value"]
    values = [(number, right["after"], 100.0) for number, right in rights.items()]
    return (
        f"Held-out pictures that are right; dashed: the base's, {base:.1f} %.",
        _estimates(values, "right, %", base, "Share right by round"),
    )


def _estimates(values: list[tuple[int, dict, float]], y: str, level: float | None, about: str) -> Markup:
    """Estimates (round, estimate, unit) with their intervals; one without an end is drawn to its value."""
    known = [(number, unit, one) for number, one, unit in values if one["value"] is not None]
    middle = [unit * one["value"] for _, unit, one in known]
    low, high = (
        [unit * (one["value"] if one[end] is None else one[end]) for _, unit, one in known]
        for end in ("low", "high")
    )
    return charts.intervals(
        [Points("ink", [number for number, *_ in known], middle, low, high)], y=y, level=level, about=about
    )


def _best_of_chart(sizes: dict[int, dict]) -> Markup:
    """On a scale of doublings, from the worst of all to the best of all."""
    low, middle, high = zip(*(_doublings(size["best_of"]) for size in sizes.values()), strict=True)
    furthest = max(2, int(np.ceil(max(map(abs, (*low, *high))))))
    ticks = {
        float(at): f"best of {2**at}" if at > 0 else f"worst of {2**-at}" if at else "any"
        for at in range(-furthest, furthest + 1)
    }
    least = min(0, int(np.floor(min(low))))
    return charts.intervals(
        [Points("ink", list(sizes), middle, low, high)],
        y="as good as",
        level=0.0,
        about="Best-of-n equivalent by round",
        ticks={at: word for at, word in ticks.items() if at >= least},
    )


def _quality(record: Record, rows: Sequence[dict]) -> tuple[str, list[float | None]]:
    """(what it is, values): shares right in per cent where all have one, else the judge's means."""
    if all(row["right"] is not None for row in rows):
        return "right, %", [100 * row["right"] for row in rows]
    return f"mean {record.judge}", [row["mean"] for row in rows]


def sampler_chart(record: Record) -> Markup | None:
    """Quality against forwards a picture: base and tuned model at each setting of the grid, and the best of
    each for so many forwards.
    """
    rows = record.last.numbers["sampler"]
    if all(row["usual"] for row in rows):
        return None
    y, quality = _quality(record, rows)
    lines, marks = [], []
    for role, colour in (("base", "muted"), ("after", "good")):
        own = [
            (row["forwards"], value, row["guidance"])
            for row, value in zip(rows, quality, strict=True)
            if row["role"] == role and value is not None
        ]
        own.sort(key=lambda point: (point[0], -point[1]))
        best = [point for n, point in enumerate(own) if all(point[1] > before for _, before, _ in own[:n])]
        lines.append((colour, [forwards for forwards, *_ in best], [value for _, value, _ in best]))
        marks += [
            Mark(colour, *point[:2], f"{point[2]:g}" if point in best else "", hollow=role == "base")
            for point in own
        ]
    return charts.plane(
        lines,
        marks,
        x="forwards a picture",
        y=y,
        costs=True,
        about="Quality against forwards of base and tuned model",
    )


def over_tuned(row: dict) -> str:
    """How much better a setting's pictures are than the tuned model's under the usual one; a dash for these themselves."""
    return NO_VALUE if row["over_tuned"] is None else _set(diagnosis.difference_in_words(row["over_tuned"]))


def trade_off_chart(record: Record) -> Markup | None:
    """Quality against diversity: the base's best of n as a line, each round a point; None where no curve was
    measured.
    """
    curve = [] if record.last.size is None else record.last.size["curve"]
    if all(row["diversity"] is None for row in curve):
        return None
    rounds = [r for r in record.rounds if r.size and _point(r)["diversity"] is not None]
    y, quality = _quality(record, [*curve, *map(_point, rounds)])
    chosen = zip(curve, quality, strict=False)  # the rounds' follow
    line = [
        (row["diversity"], value, row["n"])
        for row, value in chosen
        if row["diversity"] is not None and value is not None
    ]
    marks = [
        Mark("muted", x, value, f"best of {n:g}" if n > 1 else "base", hollow=True) for x, value, n in line
    ]
    colours = round_colours(record)
    marks += [
        Mark(colours.get(r.number, "ink"), _point(r)["diversity"], value, f"round {r.number}")
        for r, value in zip(rounds, quality[len(curve) :], strict=True)
        if value is not None
    ]
    return charts.plane(
        [("muted", [x for x, *_ in line], [value for _, value, _ in line])],
        marks,
        x="diversity within a prompt",
        y=y,
        about="Quality against diversity: the base's best of n, and each round",
    )


def _point(done: Round) -> dict:
    """A round as the base's curve has its points."""
    right, judge = (done.size or {}).get("right"), done.numbers["judge"]
    return {
        "mean": done.numbers["experts"][judge]["after"],
        "right": right["after"]["value"] if right else None,
        "diversity": done.numbers["diversity"]["after"],
    }


def rise_charts(record: Record) -> dict[str, Markup]:
    """One chart an expert: how far its mean rose over the base's, picture against picture of the same seed."""
    return {name: _rise_chart(record, name) for name in record.experts}


def _rise_chart(record: Record, name: str) -> Markup:
    rises = [grid.scores[name] - record.base.scores[name] for grid in (record.base, *(r.held_out for r in record.rounds))]
    coverage, seed = record.config.evaluate.interval, key(record.config.seed, "report", name)
    middle, low, high = np.array([statistics.bootstrap(rise, seed, RESAMPLES, coverage) for rise in rises]).T
    line = Points(colour_of(record, name), range(len(rises)), middle, low, high, hollow=name not in record.last.rewarded)
    return charts.intervals([line], y=f"rise of mean {name}", level=0.0, about=f"Rise of mean {name} over the base, by round")


def score_charts(record: Record) -> dict[str, Markup]:
    """One chart an expert: histograms of its scores of the training candidates, a line a round."""
    colours = round_colours(record)
    return {
        name: charts.outlines([(colours[r.number], r.train.scores[name].ravel()) for r in record.shown],
                              x=name, y="% of candidates", about=f"Histogram of {name} over training candidates by round")
        for name in record.experts
    }


def margin_chart(record: Record) -> Markup:
    colours = round_colours(record)
    return charts.outlines([(colours[r.number], r.pairs["margin"].to_numpy()) for r in record.shown],
                           x="margin", y="% of pairs", about="Histogram of the pairs' margins by round")


def gain_chart(record: Record, rows: list[int]) -> Markup:
    order = ranked_prompts(record)
    places = [order.tolist().index(row) for row in rows]
    return charts.gains(record.judged_gains[order], places, y=f"gain in mean {record.judge}",
                        about="Gain of each held-out prompt from the base to the last round, greatest first")


def finetune_charts(record: Record) -> list[tuple[str, Markup]]:
    """(caption, chart) of the optimiser's curves, rounds end to end."""

    def parts(name: str) -> list[np.ndarray]:
        return [r.steps[name].to_numpy().astype(float) for r in record.rounds]

    limit = record.config.finetune.max_grad_norm
    from_ln_2 = abs(parts("loss")[0][0] - np.log(2)) < 0.01  # other objectives start elsewhere
    return [
        ("Loss." + (" Dashed: ln 2, where the policy is its reference." if from_ln_2 else ""),
         charts.traces([("ink", parts("loss"))], y="loss", level=float(np.log(2)) if from_ln_2 else None, about="Loss by optimiser step")),
        ("Share of pairs ordered as the reward orders them, ties one half.",
         charts.traces([("ink", [100 * part for part in parts("accuracy")])], y="accuracy, %", level=50.0,
                       about="Accuracy by optimiser step")),
        ("Signal against the reference. Winners and losers should part; where both fall by more than that, the loss is won by unlearning.",
         charts.traces([("good", parts("winner")), ("bad", parts("loser"))], y="change of signal", level=0.0,
                       about="Winner's and loser's signal by optimiser step")),
        (f"Norm of the gradient before clipping at {limit:g} (dashed).",
         charts.traces([("ink", parts("grad_norm"))], y="gradient norm", level=limit, about="Gradient norm by optimiser step")),
    ]


def strengths_in_words(record: Record) -> list[str]:
    """How strong each round's adapter was made, and why, as sentences; empty where all are as they were trained."""
    return [_set(f"Round {r.number}: {_strength(r.strength)}.") for r in record.rounds if r.strength]


def _strength(found: dict) -> str:
    tried = {one["strength"]: one for one in found.get("tried", ())}
    if not tried:
        return f"strength {found['strength']:g}, as finetune.strength says"
    chosen, trained = tried[found["strength"]], tried.get(1.0)
    if not (chosen["fits"] and chosen["value"] is not None and chosen["pictures"] >= found["base"]["pictures"]):
        floor = "" if found["floor"] is None else f" keeps {found['floor']:g} of the base's diversity and"
        return f"strength {chosen['strength']:g}, the least that was tried, as none{floor} has every picture sound"
    what = f"strength {chosen['strength']:g} of {_listed([f'{one:g}' for one in tried])}: rewarded mix {chosen['score']:+.2f} SD of the base"
    if trained and trained is not chosen and trained["score"] is not None:
        what += f", as trained (1) {trained['score']:+.2f}"
    if chosen["share"] is not None:
        what += f"; diversity {chosen['share']:.2f} of the base's"
    return what + ("" if found["floor"] is None else f" (floor {found['floor']:g})")


def strength_charts(record: Record) -> list[tuple[str, Markup]]:
    """(caption, chart) of what each strength gave that was tried on training prompts, a line a round; empty where none was searched for."""
    searched = {r.number: r.strength for r in record.shown if r.strength and "tried" in r.strength}
    if not searched:
        return []
    colours, floors = round_colours(record), {found["floor"] for found in searched.values()}

    def line(number: int, name: str, chosen: bool) -> Points:
        found = searched[number]
        rows = [one for one in (found["base"], *found["tried"]) if one[name] is not None]
        rows = [one for one in rows if not chosen or one["strength"] == found["strength"]]
        values = [one[name] for one in rows]
        return Points(colours[number], [one["strength"] for one in rows], values, values, values, hollow=not chosen)

    def chart(name: str, y: str, level: float | None, about: str) -> Markup:
        lines = [line(number, name, chosen) for chosen in (False, True) for number in searched]  # no line hides what was chosen
        return charts.intervals(lines, x="strength, 0 is the base", y=y, level=level, about=about)

    floor = floors.pop() if len(floors) == 1 else None
    found = [("What the rewarded experts say of pictures of training prompts at each strength; filled: the one chosen.",
              chart("score", "mix, SD of the base", 0.0, "Rewarded mix by strength of the adapter"))]
    if any(one["share"] is not None for strength in searched.values() for one in strength["tried"]):
        dashed = "" if floor is None else "; dashed: the least it may be"
        found.append((f"Their diversity{dashed}.", chart("share", "share of the base's", floor, "Diversity by strength of the adapter")))
    return found


def divergence_in_words(record: Record) -> list[str]:
    """Where each round that had a budget of divergence ended, as sentences."""
    return [
        f"Round {r.number} ended at {figure(r.divergence, 3)} nats a picture of {r.knobs['divergence']:g}, with beta "
        f"{figure(r.steps['beta'].to_pylist()[-1], 3)} ({r.knobs['beta']:g} at the start)."
        for r in record.rounds if r.knobs.get("divergence") is not None
    ]


def divergence_charts(record: Record) -> list[tuple[str, Markup]]:
    """(caption, chart) of the divergence beside its budget, and of the beta that followed; empty where no round had one."""
    if not divergence_in_words(record):
        return []

    def parts(name: str) -> list[np.ndarray]:
        return [r.steps[name].to_numpy().astype(float) for r in record.rounds]

    ways = [way_to_budget(r) for r in record.rounds]
    return [
        ("Divergence from the reference; grey: the way to its budget, which grows as the square of the learning rates spent.",
         charts.traces([("muted", ways), ("ink", parts("divergence"))], y="divergence, nats", about="Divergence by optimiser step")),
        ("Beta, which rises where the divergence is ahead.",
         charts.traces([("ink", parts("beta"))], y="beta", about="Beta by optimiser step")),
    ]


def way_to_budget(done: Round) -> np.ndarray:
    """How far a round's policy was to have moved at each optimiser step, nats a picture (steps,); NaN without a budget."""
    rates = done.steps["learning_rate"].to_numpy().astype(float)
    whole = done.knobs.get("divergence")
    if whole is None:
        return np.full(len(rates), np.nan)
    return np.asarray(budget.on_the_way(whole, budget.way(rates)))


def columns_chart(record: Record) -> Markup | None:
    """Accuracy at each saved step over the last epoch with its interval, a line a round; None where no round has the table."""
    colours, lines = round_colours(record), []
    for done in record.shown:
        if done.columns is None:
            continue
        table = done.columns.filter(pc.greater(done.columns["pairs"], 0)).sort_by([("timestep", "descending")])
        if not len(table):
            continue
        share, pairs = (table[name].to_numpy().astype(float) for name in ("accuracy", "pairs"))
        low, high = 100 * np.array([diagnosis.interval(*place) for place in zip(share, pairs, strict=True)]).T
        lines.append(Points(colours[done.number], table["timestep"].to_numpy(), 100 * share, low, high))
    if not lines:
        return None
    return charts.intervals(lines, x="timestep, from noise to picture", y="accuracy, %", level=50.0, falling=True,
                            about="Accuracy by timestep over the last epoch, by round")


def agreement(done: Round) -> tuple[list[str], list[list[float]]]:
    """Spearman's rank correlation within prompts of every two experts over a round's candidates; the rewarded mix last."""
    grids = dict(done.train.scores)
    if len(done.rewarded) > 1:
        grids["mix"] = done.chooser.mixed
    return list(grids), [[preferences.rank_correlation(a, b) for b in grids.values()] for a in grids.values()]


# -- the page


def render(page: str = "report.html.j2", **parts: object) -> str:
    """A page as text. Everything that is not made by this package (prompts, reasons, names) is escaped."""
    pages = Environment(loader=PackageLoader("fashiondpo_pipeline"), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)
    pages.filters.update(figure=figure, fixed=fixed, signed=signed, duration=duration)
    return pages.get_template(page).render(parts)
