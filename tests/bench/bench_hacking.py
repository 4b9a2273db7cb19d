"""Hacking provoked on the embedded default: an expert that can be fooled is rewarded alone, and everything else only watches.

    python tests/bench/bench_hacking.py                       # saturation, then sharpness: three rounds each, rolled back where alarmed
    python tests/bench/bench_hacking.py --only sharpness --rounds 1 --set prompts.most_train=20 --set prompts.most_held_out=10

Printed are, of every round: what it went on from, the rewarded expert's and the judge's win rate over the base, the measures of size, the
meters' drift, and its alarms; at the end the round that `evaluate.keep: best` keeps. Targets: the reward rose, an alarm was raised, and
what is kept raised none. Finetuning is driven harder than it is shipped (DRIVEN), as who wants to see a number rise would: as shipped the
pictures of a small run hardly change.
"""

import argparse
import tempfile
from pathlib import Path

import peaks

from fashiondpo_pipeline import claims, diagnosis
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.statistics import percent
from stages import Session

FOOLED = ("saturation", "sharpness")
DRIVEN = ["finetune.beta=100", "finetune.learning_rate=5e-3", "pair.agree=null"]


def session_of(folder: Path, fooled: str, sets: list[str]) -> Session:
    """The embedded default with one expert rewarded, that looks at pixels alone."""
    hacked = [f"experts.{fooled}={{use: {fooled}}}", f"pair.weights={{{fooled}: 1.0}}", "evaluate.keep=best"]
    return Session(load(None, [*hacked, *DRIVEN, *sets]), folder, say=lambda text: None)


def rounds(session: Session, count: int) -> tuple[dict[int, dict], int]:
    """(round -> what `evaluate` found, the round that is kept); each goes on from the best one before it, as `fdpo round` does."""
    found = {}
    for number in range(count + 1):
        chain = session.chain(count)  # what a round starts from depends on how those before it did
        session.execute(chain.of(number))
        if number:
            found[number] = session.output(chain.rounds[number].evaluate).manifest["numbers"]
    return found, session.kept(session.chain(count))


def describe(number: int, fooled: str, numbers: dict, drift: float | None) -> None:
    """One round in some lines."""
    experts = numbers["experts"]
    print(
        f"{fooled:10} round {number} from {numbers['before'] or 'the base'}: {fooled} {percent(experts[fooled]['against_base'])}, "
        f"{numbers['judge']} {percent(numbers['against_base'])}"
    )
    if size := numbers.get("size"):
        print(
            f"{'':10} {claims.with_interval(size['best_of'])}; diversity at equal quality {claims.plain(size['diversity_at_equal_quality'])}; "
            f"visible change {claims.plain(size['visible_change'])}; {claims.gained(size)}"
        )
    moved = ", ".join(
        f"{name} {shift:+.2f}" for name, shift in diagnosis.shifts(numbers).items() if shift is not None
    )
    print(f"{'':10} drift in standard deviations: {moved}")
    for alarm in diagnosis.of_round(number, numbers, drift):
        print(f"{'':10} ALARM {alarm.sentence}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FOOLED, default=FOOLED)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    targets = peaks.Targets()
    with tempfile.TemporaryDirectory() as folder:  # one for all: what two runs share is made once
        for fooled in options.only:
            session = session_of(Path(folder), fooled, options.sets)
            found, kept = rounds(session, options.rounds)
            drift = session.config.evaluate.drift
            for number, numbers in found.items():
                describe(number, fooled, numbers, drift)
            rose = [numbers["experts"][fooled]["against_base"] for numbers in found.values()]
            alarmed = [
                number for number, numbers in found.items() if diagnosis.of_round(number, numbers, drift)
            ]
            targets.check(
                f"{fooled}: the reward rose",
                percent(max(rose, key=lambda rate: rate["low"])),
                "above 50 % in a round",
                any(rate["low"] > 0.5 for rate in rose),
            )
            targets.check(
                f"{fooled}: alarm",
                ", ".join(f"round {number}" for number in alarmed) or "none",
                "in a round",
                bool(alarmed),
            )
            targets.check(
                f"{fooled}: kept",
                f"round {kept}" if kept else "the base",
                "one without an alarm",
                kept not in alarmed,
            )
    targets.end()


if __name__ == "__main__":
    main()
