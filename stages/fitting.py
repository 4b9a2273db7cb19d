"""`fdpo fit-weights`: what people said of one round's candidates -> expert weights as YAML, with intervals and held-out agreement."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import annotations, fitting
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.workspace import without_pandas
from stages import Session
from stages.inspecting import Question, Shelf, place


def run(session: Session, experts: str | None, annotators: str | None, number: int | None) -> None:
    without_pandas()
    r, rule = place(session, Question("pairs"), number, None)
    shelf = Shelf(session, Question("pairs"), r, rule)
    folder = session.run.root / "annotations"
    answers = annotations.read_all(folder, r.sample.folder)
    if not answers:
        raise UserError(f"round {r.number}: nobody has judged these candidates yet; "
                        f"`{session.command('studio', '--round', r.number)}` asks")
    if annotators:
        answers = _by(answers, annotators.split(","))
    people = {name for name in session.config.experts if not getattr(session.make(name), "held_out", True)}
    names = _experts(shelf, experts.split(",") if experts else [name for name in rule.weights if name in shelf.scored and name not in people], people)
    answers = [answer for answer in answers if answer.preference is not None]
    gaps = _gaps(shelf, names, answers)
    known = np.all([np.isfinite(gap) for gap in gaps.values()], axis=0)
    judging = [name for name, weight in rule.weights.items() if weight > 0 and name not in people]
    of_mix = [rule.weights[name] * gap[known] for name, gap in _gaps(shelf, judging, answers).items()]
    in_force = np.sum(of_mix, 0) if of_mix else None
    preferred = np.array([answer.preference for answer in answers], float)
    groups = np.array([answer.group for answer in answers])
    found = fitting.fit({name: gap[known] for name, gap in gaps.items()}, preferred[known], groups[known], in_force, session.config.seed)
    unknown = int((~known).sum())
    session.say(f"round {r.number}: {found.pairs:,} preferences on {found.prompts:,} prompts, {found.decided:,} of them decided"
                + (f"; {unknown:,} more where an expert gave no score" if unknown else ""))
    others = ", leaving out people themselves," if people & rule.weights.keys() else ""
    before = f", with the weights in force{others} in {_percent(found.before)}" if found.before else ""
    session.say(f"held out, people agree with the fitted mix in {_percent(found.agreement)}{before}")
    if not sum(found.weights.values()):
        raise UserError("none of these experts sees what people see: every fitted weight is below 0; look at other experts with --experts")
    print(fitting.in_yaml(found), end="")


def _by(answers: list, names: list[str]) -> list:
    there = sorted({answer.annotator for answer in answers})
    for name in names:
        if name not in there:
            raise UserError(f"--annotators: nobody called '{name}' has judged these; {did_you_mean(name, there)}")
    return [answer for answer in answers if answer.annotator in names]


def _experts(shelf: Shelf, names: list[str], people: set[str]) -> list[str]:
    others = [name for name in shelf.scored if name not in people]
    if not names:
        raise UserError(f"pair.weights reward nobody but people, to whom the others are fitted: name some with --experts ({', '.join(others)})")
    for name in names:
        if name in people:
            raise UserError(f"--experts: '{name}' says what people said, to which the others are fitted: leave it out")
        if name not in shelf.scored:
            raise UserError(f"--experts: no expert called '{name}' has scored these; {did_you_mean(name, others)}")
    return names


def _gaps(shelf: Shelf, names: list[str], answers: list) -> dict[str, np.ndarray]:
    """What each expert says of the first of a duel minus the second, normalised as the rule in force does."""
    rows = pc.index_in(pa.array([answer.group for answer in answers], pa.string()), value_set=shelf.opinions.grid.groups).to_numpy()
    first, second = (np.array([getattr(answer.duel, side) for answer in answers], int) for side in ("first", "second"))
    return {name: shelf.opinions.normal[name][rows, first] - shelf.opinions.normal[name][rows, second] for name in names}


def _percent(rate: tuple[float, float, float]) -> str:
    return f"{100 * rate[0]:.0f} % [{100 * rate[1]:.0f}, {100 * rate[2]:.0f}]"
