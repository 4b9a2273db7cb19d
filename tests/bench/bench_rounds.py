"""Three rounds on the embedded default: three seeds as shipped, then the controls with swapped and with random labels.

    python tests/bench/bench_rounds.py              # half an hour on two cores; --seeds 7 for less
    python tests/bench/bench_rounds.py --quick      # a fifth of it: one seed, one round; only the direction is judged
    python tests/bench/bench_rounds.py --set pair.margin=0.7

Targets after the last round: at least 80 % with a lower bound above 75 % and a diversity of 0.9 on every seed; swapped loses; random
stays at 50 %. It exits 1 when one is missed.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import peaks

from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.statistics import percent
from stages import Session

SEEDS, ROUNDS = (7, 8, 9), 3
LEAST, LEAST_LOW, LEAST_DIVERSITY = 0.8, 0.75, 0.9


@dataclass(frozen=True)
class Run:
    """What the last round of a run found. rate: win rate over the base with its interval. diversity: share of the base's."""

    seed: int
    labels: str
    rate: dict
    diversity: float


def rounds(folder: Path, count: int, sets: list[str]) -> list[dict]:
    """What `evaluate` found in each round."""
    session = Session(load(None, sets), folder, say=lambda text: None)
    chain = session.chain(count)
    session.execute(chain.steps)
    return [session.output(r.evaluate).manifest["numbers"] for r in chain.rounds[1:]]


def judge(run: Run, targets: peaks.Targets, quick: bool) -> None:
    """One run against what was promised of its labels."""
    who, found = f"seed {run.seed}, {run.labels}", percent(run.rate)
    if run.labels == "swapped":
        targets.check(f"{who}: loses", found, "below 50 %", run.rate["high"] < 0.5)
    elif run.labels == "random":
        targets.check(f"{who}: stays", found, "50 % inside", run.rate["low"] <= 0.5 <= run.rate["high"])
    elif quick:
        targets.check(f"{who}: wins", found, "above 50 %", run.rate["low"] > 0.5)
    else:
        targets.check(f"{who}: win rate", found, f"{100 * LEAST:.0f} %, lower bound above {100 * LEAST_LOW:.0f} %",
                      run.rate["win_rate"] >= LEAST and run.rate["low"] > LEAST_LOW)
        targets.check(f"{who}: diversity", f"{run.diversity:.3f}", f"{LEAST_DIVERSITY}", run.diversity >= LEAST_DIVERSITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="the first seed, one round; controls too")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    seeds, count = (options.seeds[:1], 1) if options.quick else (options.seeds, ROUNDS)
    asked = [(seed, "scored") for seed in seeds] + [(seeds[0], labels) for labels in ("swapped", "random")]
    targets = peaks.Targets()
    print(f"{'seed':>4} {'labels':8} {'round':>5} {'win rate over the base':>24} {'over the round before':>24} "
          f"{'diversity':>9} {'pairs':>6} {'minutes':>7}")
    with tempfile.TemporaryDirectory() as folder:  # one for all: what two runs share is made once
        for seed, labels in asked:
            started = time.monotonic()
            found = rounds(Path(folder), count, [f"seed={seed}", f"pair.labels={labels}", *options.sets])
            minutes = (time.monotonic() - started) / 60
            for number, numbers in enumerate(found, 1):
                kept = numbers["diversity"]["after"] / numbers["diversity"]["base"]
                print(f"{seed:4} {labels:8} {number:5} {percent(numbers['against_base']):>24} "
                      f"{percent(numbers['against_previous']):>24} {kept:9.3f} {numbers['pairs']:6,} "
                      f"{minutes if number == count else 0:7.1f}", flush=True)
            judge(Run(seed, labels, numbers["against_base"], kept), targets, options.quick)
    targets.end()


if __name__ == "__main__":
    main()
