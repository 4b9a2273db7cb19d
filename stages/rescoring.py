"""`fdpo rescore`: other weights or rules on cached scores -> a new pair set, and what it changes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from fashiondpo_pipeline.config import Pair
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser, Grid
from fashiondpo_pipeline.preferences import Rule, compare, correlation_of, rank_moments
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.workspace import without_pandas
from stages import Session, pair
from stages.single import last, most_rounds


def run(session: Session, section_of: Callable[[int], Pair], weights: str | None, number: int | None) -> None:
    """`section_of` a round carries the `--set pair.…` overrides; `weights` replaces its weights."""
    started = time.monotonic()
    without_pandas()
    session.settle()
    instead = {"weights": parse_weights(weights, list(session.config.experts))} if weights else {}
    if number is None:
        chain = session.chain(max(most_rounds(session), session.config.rounds))
        number = last(session, chain, lambda r: r.sample)
    section = section_of(number)
    section = Pair.model_validate(section.model_dump() | instead) if instead else session.rewarding(section)
    before = session.chain(number).rounds[number].pair
    step = session.chain(number, {number: section}).rounds[number].pair
    for scored in {s.folder: s for s in (*before.inputs.values(), *step.inputs.values())}.values():
        session.output(scored)
    with session.run.lock():
        out = session.run.output(step)
        grid = pair.grid(out, step)
        old, new = _chooser(session, grid, before), Chooser(grid, Rule(**section.rule))
        tally = Tally()
        parts = tally.through(old, new)
        if session.run.done(step):
            for _ in parts:
                pass  # only counted
        else:
            out.open()
            pair.run(session, step, out, parts)
    _say(session, tally, len(new.rewarded), time.monotonic() - started)
    if step.folder == before.folder:
        session.say("these are the settings in force: nothing new was saved")
    else:
        session.say(f"saved as pairs {step.fingerprint} · to train on it: "
                    f"{session.command('finetune', '--round', number, '--pairs', step.fingerprint)}")


def _chooser(session: Session, grid: Grid, step) -> Chooser:
    """The pairs in force, on the same grid of groups; experts that only they reward are read too."""
    scores = dict(grid.scores)
    config = {key: value for key, value in step.config.items() if key != "seed"}
    missing = [name for name, weight in config["weights"].items() if weight > 0 and name not in scores]
    if missing:
        scores |= {name: pair.grid(session.run.output(step), step).scores[name] for name in missing}
    return Chooser(Grid(grid.groups, scores), Rule(**config))


class Tally:
    """What changes between two rules, summed part by part."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._moments = np.zeros(3)

    def through(self, old: Chooser, new: Chooser) -> Iterator[tuple[slice, Chooser]]:
        """The parts of the new rule, each counted against the old."""
        for (rows, after), (_, before) in zip(new.each(), old.each(), strict=True):
            self.counts.update(compare(before.chosen, after.chosen, after.grid.k))
            self.counts.update(candidates=int(np.isfinite(before.mixed).sum()), before=len(before.chosen), after=len(after.chosen))
            self._moments += rank_moments(before.mixed, after.mixed)
            yield rows, after

    @property
    def correlation(self) -> float:
        return correlation_of(self._moments)


def _say(session: Session, tally: Tally, experts: int, seconds: float) -> None:
    change = tally.counts
    session.say(f"{change['candidates']:,} candidates, {experts} expert{'' if experts == 1 else 's'}, from cache · {seconds:.1f} s")
    session.say(
        f"pairs {change['before']:,} -> {change['after']:,}: {change['kept']:,} kept, {change['flipped']:,} flipped, {change['lost']:,} lost, "
        f"{change['new']:,} new · rank correlation {tally.correlation:.2f}"
    )


def parse_weights(text: str, experts: list[str]) -> dict[str, float]:
    """`clip_i=0.7,clip_t=0.3` as a table; every problem at once."""
    found, wrong = {}, []
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in experts:
            wrong.append(f"no expert called '{name}'; {did_you_mean(name, experts)}")
            continue
        try:
            found[name] = float(value)
        except ValueError:
            wrong.append(f"{name}: the weight should be a number, not '{value}'")
            continue
        if not 0 <= found[name] < float("inf"):
            wrong.append(f"{name}: the weight should be 0 or more, not {value}")
    if not wrong and not sum(found.values()):
        wrong.append("at least one expert needs a weight above 0")
    if wrong:
        raise UserError("\n".join(["--weights:", *(f"  {line}" for line in wrong)] if len(wrong) > 1 else [f"--weights: {wrong[0]}"]))
    return found
