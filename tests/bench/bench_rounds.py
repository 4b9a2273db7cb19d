"""Three rounds on the embedded default: three seeds as shipped, then the controls with swapped and with random labels.

    python tests/bench/bench_rounds.py              # half an hour on two cores; --seeds 7 for less
    python tests/bench/bench_rounds.py --set pair.margin=0.7

Targets: at least 80 % with a lower bound above 75 % and a diversity of 0.9 on every seed; swapped loses; random stays at 50 %.
"""

import argparse
import tempfile
import time
from pathlib import Path

from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.statistics import percent
from stages import Session

SEEDS, ROUNDS = (7, 8, 9), 3


def rounds(folder: Path, sets: list[str]) -> list[dict]:
    """What `evaluate` found in each round."""
    session = Session(load(None, sets), folder, say=lambda text: None)
    chain = session.chain(ROUNDS)
    session.execute(chain.steps)
    return [session.output(r.evaluate).manifest["numbers"] for r in chain.rounds[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    options = parser.parse_args()
    runs = [(seed, "scored") for seed in options.seeds] + [(options.seeds[0], labels) for labels in ("swapped", "random")]
    print(f"{'seed':>4} {'labels':8} {'round':>5} {'win rate over the base':>24} {'over the round before':>24} "
          f"{'diversity':>9} {'pairs':>6} {'minutes':>7}")
    with tempfile.TemporaryDirectory() as folder:  # one for all: what two runs share is made once
        for seed, labels in runs:
            started = time.monotonic()
            found = rounds(Path(folder), [f"seed={seed}", f"pair.labels={labels}", *options.sets])
            minutes = (time.monotonic() - started) / 60
            for number, numbers in enumerate(found, 1):
                kept = numbers["diversity"]["after"] / numbers["diversity"]["base"]
                print(f"{seed:4} {labels:8} {number:5} {percent(numbers['against_base']):>24} "
                      f"{percent(numbers['against_previous']):>24} {kept:9.3f} {numbers['pairs']:6,} "
                      f"{minutes if number == ROUNDS else 0:7.1f}", flush=True)


if __name__ == "__main__":
    main()
