"""Do compatibility and personalisation see the rule that the embedded outfits were made by? No run is needed.

    python tests/bench/bench_outfits.py        # a minute on two cores; embeds the 960 test garments of the catalogue

For each of the 120 prompts, test garments of its category in every colour: those that go together with the rest of the outfit against
those that do not (compatibility), and those in the user's colours against the others (personalisation). AUC, with 95 % intervals
over prompts. The ceiling is what the rule itself would reach on the held-out outfits, where what is not worn may fit as well.
It exits 1 when an interval holds 0.5.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from fashiondpo_pipeline import wardrobe
from fashiondpo_pipeline.demo.outfits import together
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.experts import make
from fashiondpo_pipeline.experts.compatibility import Triples, _splits
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.statistics import bootstrap, wins
from fashiondpo_pipeline.workspace import read_parquet

MINI = "embedded:fashion_mini"
CLIP = f"local-dir:{MINI}/clip"
TABLES = {"outfits": f"{MINI}/outfits/outfits.parquet", "items": f"{MINI}/catalog.parquet"}
EXPERTS = {
    "compatibility": {"model": CLIP, "weights": f"{MINI}/outfits/compatibility", **TABLES},
    "personalisation": {"model": CLIP, "users": f"{MINI}/outfits/users.parquet", **TABLES},
}


def main() -> int:
    catalog = read_parquet(locate(TABLES["items"])).select(["item", "category", "colour", "pattern", "split"]).to_pylist()
    colour, category = ({row["item"]: row[name] for row in catalog} for name in ("colour", "category"))
    tests = [row for row in catalog if row["split"] == "test" and row["pattern"] == "plain"]
    vectors = wardrobe.Garments(locate(TABLES["items"])).embed([row["item"] for row in tests], Tower(CLIP))
    asked = wardrobe.asked(locate(TABLES["outfits"]))
    likes = {row["user"]: row["likes"] for row in read_parquet(locate(EXPERTS["personalisation"]["users"])).to_pylist()}
    bad = 0
    for name, options in EXPERTS.items():
        expert = make(name, name, options)
        with tempfile.TemporaryDirectory() as folder:
            expert.prepare(Path(folder), "cpu")
            expert.load("cpu", Path(folder))
        table = np.full((len(asked), 12 * 12 * 16), np.nan)
        silent = 0
        for row, (group, wish) in enumerate(asked.items()):
            some = [one for one in tests if one["category"] == category[wish.items[wish.place]]]
            if name == "compatibility":
                good = [all(together(one["colour"], colour[item]) for item in wish.rest) for one in some]
            else:
                good = [one["colour"] in likes[wish.user] for one in some]
            scores = expert([{"group": group, "embedding": vectors[one["item"]]} for one in some])
            if isinstance(scores[0], tuple):
                silent += 1
                continue
            fits, others = (np.array([s for s, g in zip(scores, good, strict=True) if g == wanted]) for wanted in (True, False))
            found = wins(fits[:, None], others[None, :]).ravel()
            table[row, : len(found)] = found
        auc, low, high = bootstrap(table, 0, 2000, 0.95)
        print(f"{name}: garments that obey the rule above those that do not, AUC {auc:.3f} [{low:.3f}, {high:.3f}]; "
              f"{silent} of {len(asked)} prompts without an opinion")
        bad += not low > 0.5
    print(f"ceiling of the held-out AUC against the same category, by the rule itself: {ceiling(colour):.3f}")
    return int(bad > 0)


def ceiling(colour: dict[str, str]) -> float:
    """Held-out AUC of whoever knows the rule of harmony and nothing else."""
    part = _splits(locate(TABLES["outfits"]))["test"]
    number = {item: n for n, item in enumerate(dict.fromkeys(item for outfit in part for item in outfit))}
    names, triples, rng = list(number), Triples(part, wardrobe.Garments(locate(TABLES["items"])), number), np.random.default_rng(0)
    won = []
    for row, place in triples.places():
        rest = [colour[names[n]] for n in triples.rest(row, place) if n >= 0]
        for _ in range(10):
            other = triples.negative(rng, row, place, True)
            fits = other is not None and all(together(colour[names[other]], one) for one in rest)
            won.append(0.5 if fits else 1.0)  # what is worn always fits
    return float(np.mean(won))


if __name__ == "__main__":
    sys.exit(main())
