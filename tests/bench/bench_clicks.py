"""What a click in the studio costs where people have said much already: seconds from the click to what is to be seen, by answers on disk.

    python tests/bench/bench_clicks.py [ANSWERS ...]

A pair set of tiny pictures, its random queue, three people of whom one clicks; half of the answers are theirs. The first click reads the files.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peaks

from fashiondpo_pipeline import albums, lines, pairsets
from fashiondpo_pipeline.annotations import VERDICTS
from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.studio import Books, answer

GROUPS, CLICKS = 500, 20
PICTURE = {"bytes": encode_png(np.full((8, 8, 3), 127, np.uint8)), "path": None}


def filled(folder: Path, answers: int) -> albums.Album:
    """A pair set with so many answers, by three people, each duel answered again and again."""
    rows = [{"group": f"g{g}", "candidate": n, "prompt": f"a dress {g}", "picture": PICTURE} for g in range(GROUPS) for n in range(8)]
    pairsets.write(folder, rows, [], {"source": "bench", "lineage": {}, "dropped": {}})
    (folder / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for name, share in (("ann", 0.5), ("bob", 0.25), ("eve", 0.25)):
        count = round(answers * share)
        duels = zip(*(rng.integers(most, size=count).tolist() for most in (GROUPS, 7, len(VERDICTS))), strict=True)
        with (folder / f"annotations/{name}.jsonl").open("wb") as file:
            for number, (group, left, verdict) in enumerate(duels):
                said = {"of": "set", "group": f"g{group}", "left": left, "right": 7, "verdict": VERDICTS[verdict], "pictures": [None, None]}
                file.write(lines.seal(said, number))
    return albums.of_set(folder)


def main(sizes: list[int]) -> None:
    medians: list[float] = []
    print(f"{'answers':>9} {'first, s':>9} {'click, ms':>10} {'worst, ms':>10}")
    for size in sizes:
        with tempfile.TemporaryDirectory() as place:
            books = Books(filled(Path(place) / "set", size), lambda text: None, None)
            started = time.perf_counter()
            turn = books.turn("ann", "random", lambda desk: None)
            first, taken = time.perf_counter() - started, []
            for n in range(CLICKS):
                started = time.perf_counter()
                turn = books.turn("ann", "random", answer(VERDICTS[n % 5], turn.token))
                books.crowd.agreement.kappas(), books.crowd.agreement.alpha(), books.album.section(turn.duel.group)
                taken.append(1000 * (time.perf_counter() - started))
            print(f"{size:>9,} {first:>9.2f} {np.median(taken):>10.1f} {max(taken):>10.1f}", flush=True)
            medians.append(float(np.median(taken)))
    targets = peaks.Targets()
    targets.check("a click at the most answers against one at the fewest", f"{medians[-1] / medians[0]:.2f} x", "at most 2 x",
                  medians[-1] <= 2 * medians[0])
    targets.end()


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [0, 10_000, 20_000, 200_000])
