"""Held-out pictures of the base, the round that this one went on from and this round, from the same seeds -> how much was gained, who wins,
what drifted, and what a setting of the sampler would have given.

`size` of the numbers that are written (see fashiondpo_pipeline/effect_size.py for each): best_of {value, low, high, most} (value null: more
than the best of `most`; 0: less than the worst of it), diversity_at_equal_quality, shift (deviations of the base), visible_change, each
{value, low, high}; right {base, after, change, mended, broken, pictures}, null where the judge does not classify; curve [{n, mean, right,
diversity}] of the base's best of n; noise of the judge (null where it was not measured) and the share of ties within it. A bound that is
null is none; a value that is null is unknown.
"""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import effect_size, preferences, schemas, statistics
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.effect_size import estimate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser, Grid, lay
from fashiondpo_pipeline.preferences import Rule, Spread
from fashiondpo_pipeline.seeds import key
from fashiondpo_pipeline.timesteps import forwards
from fashiondpo_pipeline.workspace import Output, Step

ROLES = ("base", "before", "after")
METERS = schemas.METERS.names[2:]


def run(session, step: Step, out: Output) -> None:
    knobs = step.config
    drawn = {role: Drawn.of(out, role, knobs) for role in ROLES}
    opinions = {role: each.grid.scores for role, each in drawn.items()}
    judge = knobs["judge"] or "mix"
    if knobs["judge"] is None:
        _add_mix(opinions, knobs["weights"])
    noise = _noise(out, knobs, opinions)
    looked = [_looked(base, after) for base, after in _by_prompt(out)]  # pictures of one prompt at a time

    def versus(name: str, other: str) -> dict:
        won = statistics.wins(opinions["after"][name], opinions[other][name], (noise or 0.0) if name == judge else 0.0)
        if not np.isfinite(won).any():
            raise UserError(f"round {step.round} evaluate: expert '{name}' has no picture that it scored in both; look at its reasons")
        mean, low, high = statistics.interval(won, knobs["interval"])
        return {"win_rate": mean, "low": low, "high": high, "ties": statistics.ties(won)}

    experts = {
        name: {
            "rewarded": knobs["weights"].get(name, 0) > 0,
            "base": _mean(opinions["base"][name]), "before": _mean(opinions["before"][name]), "after": _mean(opinions["after"][name]),
            "against_base": versus(name, "base"),
        }
        for name in opinions["after"]
    }
    meters = {role: pa.concat_tables([one[role] for one in looked]) for role in ("base", "after")}
    out.write(0, meters=meters["after"])
    against_base = versus(judge, "base")
    sampler = _sampler(out, drawn, judge, knobs)
    out.finish({
        "judge": judge, "judge_rewarded": knobs["weights"].get(judge, 0) > 0 or judge == "mix",
        "pictures": int(np.isfinite(opinions["after"][judge]).sum()), "prompts": len(drawn["after"].grid.groups),
        "interval": knobs["interval"], "before": step.inputs["before"].round,  # whose pictures are "previous" and "before"
        "size": _size(drawn, judge, np.array([one["moved"] for one in looked]), knobs) | {"noise": noise, "ties": against_base["ties"]},
        "against_base": against_base, "against_previous": versus(judge, "before"),
        "sampler": sampler, "base_by_setting": effect_size.base_by_setting(sampler),
        "experts": experts,
        # what a mean has moved by is told in the base's own spread: of its prompts' diversity, of its pictures' meters
        "diversity": {role: _mean(each.diversity) for role, each in drawn.items()} | {"spread": _spread(drawn["base"].diversity)},
        "meters": {name: {role: _mean(table[name].to_numpy()) for role, table in meters.items()}
                   | {"spread": _spread(meters["base"][name].to_numpy())} for name in METERS},
        "pairs": out.input("pair").manifest["numbers"]["pairs"],
    }, session.about)


@dataclass(frozen=True)
class Drawn:
    """One draw's pictures: scores (g, k) by expert, unit vectors in the first CLIP tower (g, k, d), NaN where there is none; and where the
    judge classifies, which pictures are right (g, k)."""

    grid: Grid
    vectors: np.ndarray
    right: np.ndarray | None

    @classmethod
    def of(cls, out: Output, role: str, knobs: dict) -> "Drawn":
        grid = grid_of(out, role, [name for name in knobs["experts"] if f"{role}-score-{name}" in out.inputs])
        return cls(grid, _vectors(out, role, grid), _right(out, role, grid, knobs["judge"]))

    @property
    def distances(self) -> np.ndarray:
        """Cosine distances of every two pictures of a prompt, (g, k, k)."""
        return 1 - self.vectors @ self.vectors.transpose(0, 2, 1)

    @property
    def diversity(self) -> np.ndarray:
        """Diversity of each prompt's pictures, (g,); NaN where one of them has no vector."""
        return np.array([statistics.diversity(one[None]) for one in self.vectors])


def _size(drawn: dict[str, Drawn], judge: str, moved: np.ndarray, knobs: dict) -> dict:
    """How much was gained: `size` of the numbers, but for the judge's noise. moved: (g, 2) of `effect_size.moved`."""
    base, after, coverage = drawn["base"], drawn["after"], knobs["interval"]
    scores, mean = base.grid.scores[judge], statistics.row_means(after.grid.scores[judge])
    mix = mix_of(base.grid, knobs)
    quality = effect_size.chosen_quality(mix, scores)
    distance = effect_size.chosen_distance(np.where(np.isfinite(scores), mix, np.nan), base.distances)

    def resampling(name: str) -> tuple[int, int, float]:
        return key(knobs["seed"], "bootstrap", name), knobs["bootstrap"], coverage

    best_of = effect_size.best_of(quality, mean, coverage)
    even = effect_size.diversity_at_equal_quality(quality, distance, mean, after.diversity, *resampling("diversity"))
    right = None if base.right is None or after.right is None else {"base": base.right, "after": after.right}
    return {
        "best_of": estimate(*best_of) | {"most": base.grid.k},
        "diversity_at_equal_quality": estimate(*even),
        "right": effect_size.share_right(right, coverage) if right else None,
        "shift": estimate(*effect_size.shift(scores, after.grid.scores[judge], *resampling("shift"))),
        "visible_change": estimate(*effect_size.visible_change(*moved.T, coverage)),
        "curve": effect_size.curve(quality, distance, None if base.right is None else effect_size.chosen_quality(mix, base.right)),
    }


def mix_of(grid: Grid, knobs: dict) -> np.ndarray:
    """The rewarded mix by which the base's pictures are chosen, (g, k): that of the round's pairs, of who is asked about held-out draws."""
    weights = {name: weight for name, weight in knobs["weights"].items() if weight > 0 and name in knobs["experts"]}
    if not weights:  # people alone are rewarded
        return np.full((len(grid.groups), grid.k), np.nan)
    return Chooser(grid, Rule(weights, normalise=knobs["normalise"], over=knobs["over"])).mixed


def _noise(out: Output, knobs: dict, opinions: dict[str, dict[str, np.ndarray]]) -> float | None:
    """The judge's noise: by how much its score moves when every number of a picture is one level up or down."""
    disturbed = Drawn.of(out, "disturbed", knobs).grid.scores
    judge = knobs["judge"]
    if judge is None:
        if set(knobs["weights"]) - set(disturbed):  # rewarded by these pairs alone
            return None
        judge, disturbed = "mix", {"mix": mixed(disturbed, spreads_of(opinions, knobs["weights"]), knobs["weights"])}
    few = disturbed[judge].shape[1]
    return effect_size.noise_of(opinions["base"][judge][:, :few], disturbed[judge])


def _sampler(out: Output, drawn: dict[str, Drawn], judge: str, knobs: dict) -> list[dict]:
    """The base and the round under each setting of the sampler, the one held-out pictures are drawn with first.

    Of that one too only the first pictures of each prompt are looked at, as many as there are of the others: they have the same seeds.
    over_base, over_tuned: how much better a line's pictures are than those under that setting (`effect_size.compared`), by the base and by
    the round; None for these themselves.
    """
    weights = {name: weight for name, weight in knobs["weights"].items() if weight > 0 and name in knobs["experts"]}
    spreads = {name: Spread.of(drawn["base"].grid.scores[name], False) for name in weights}
    lines, judged = [], []
    settings = {role: [role, *(name for name in out.inputs if name.startswith(f"{role}-setting-") and name.count("-") == 2)]
                for role in ("base", "after")}
    few = min(out.input(name).manifest["claim"]["config"]["candidates"] for names in settings.values() for name in names)
    for role, names in settings.items():
        for name in names:
            sample, found = out.input(name).manifest, drawn[role] if name == role else Drawn.of(out, name, knobs)
            how, scores = sample["claim"]["config"], found.grid.scores
            rewarded = mixed(scores, spreads, weights) if weights and set(weights) <= set(scores) else np.zeros((0, 0))
            quality, rewarded = scores.get(judge, rewarded)[:, :few], rewarded[:, :few]
            right = None if found.right is None else found.right[:, :few]
            judged.append({"mean": quality, "right": right})
            lines.append({
                "role": role, "usual": name == role, **{knob: how[knob] for knob in ("guidance", "steps", "eta", "guidance_rescale")},
                "forwards": sample["numbers"].get("forwards", forwards(how)), "mean": _mean(quality), "rewarded": _mean(rewarded),
                "right": None if right is None else _mean(right), "diversity": _mean(found.diversity),
                "pictures": int(np.isfinite(quality).sum()),
            })
    usual = {line["role"]: one for line, one in zip(lines, judged, strict=True) if line["usual"]}
    resampling = key(knobs["seed"], "bootstrap", "setting"), knobs["bootstrap"], knobs["interval"]
    return [
        line | {over: None if one is usual[role] else effect_size.compared(one, usual[role], *resampling)
                for over, role in (("over_base", "base"), ("over_tuned", "after"))}
        for line, one in zip(lines, judged, strict=True)
    ]


def grid_of(out: Output, role: str, experts: list[str]) -> Grid:
    tables = {name: out.input(f"{role}-score-{name}").table("scores", ["group", "candidate", "score"]) for name in experts}
    return Grid.of(out.input(role).table("candidates", ["group", "candidate"]), tables)


def _add_mix(opinions: dict[str, dict[str, np.ndarray]], weights: dict[str, float]) -> None:
    """The rewarded experts' mix, on a scale common to all sets of pictures."""
    spreads = spreads_of(opinions, weights)
    for found in opinions.values():
        found["mix"] = mixed(found, spreads, weights)


def spreads_of(opinions: dict[str, dict[str, np.ndarray]], weights: dict[str, float]) -> dict[str, Spread]:
    return {name: Spread.of(np.concatenate([found[name] for found in opinions.values()]), False) for name in weights}


def mixed(scores: dict[str, np.ndarray], spreads: dict[str, Spread], weights: dict[str, float]) -> np.ndarray:
    return preferences.mix({name: preferences.normalise(scores[name], "zscore", spreads[name]) for name in weights}, weights)


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _spread(values: np.ndarray) -> float | None:
    """Standard deviation of the known values; None where there is none."""
    return float(np.nanstd(values)) if np.isfinite(values).any() else None


def _vectors(out: Output, role: str, grid: Grid) -> np.ndarray:
    """(g, k, d) in the first CLIP tower, NaN where a picture cannot be read, and everywhere where no expert has a tower."""
    if f"{role}-embed-0" not in out.inputs:
        return np.full((len(grid.groups), grid.k, 1), np.nan)
    table = out.input(f"{role}-embed-0").table("embeddings")
    table = table.filter(table["embedding"].is_valid())
    rows = pc.index_in(table["group"], grid.groups).to_numpy()
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    found = np.full((len(grid.groups), grid.k, vectors.shape[1] if len(table) else 1), np.nan)
    found[rows, table["candidate"].to_numpy()] = vectors
    return found


def _right(out: Output, role: str, grid: Grid, judge: str | None) -> np.ndarray | None:
    """`right_of` the judge's scores of one draw."""
    scores = out.input(f"{role}-score-{judge}") if f"{role}-score-{judge}" in out.inputs else None
    return None if scores is None else right_of(scores, grid, str(judge))


def right_of(scores: Output, grid: Grid, name: str) -> np.ndarray | None:
    """(g, k) 1 where an expert's own first choice is what was asked for, 0 where not, NaN unknown; None where it does not classify."""
    if "right" not in scores.columns("scores"):
        return None
    table = scores.table("scores", ["group", "candidate", "right"])
    right = pc.fill_null(table["right"].cast(pa.int8()).cast(pa.float64()), math.nan)
    table = pa.table({"group": table["group"], "candidate": table["candidate"], "score": right})
    return lay([table], grid.groups, grid.k, name)


def _by_prompt(out: Output):
    """(rows of the base, rows of the round) of one prompt after another, pictures undecoded."""
    columns = ["group", "candidate", "picture", "fault"]
    before, after = (out.input(role).table("candidates", columns).sort_by([("group", "ascending"), ("candidate", "ascending")])
                     for role in ("base", "after"))
    for group in pc.unique(before["group"]):
        yield tuple(table.filter(pc.equal(table["group"], group)).to_pylist() for table in (before, after))


def _looked(before: list[dict], after: list[dict]) -> dict:
    """One prompt's meters of the base and the round, and how far its sound pictures moved."""
    seen = {role: {row["candidate"]: decoded(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}") for row in rows}
            for role, rows in (("base", before), ("after", after))}
    meters = {role: _meters(rows, seen[role]) for role, rows in (("base", before), ("after", after))}
    broken = {row["candidate"] for row in [*before, *after] if row["fault"]}
    sound = [n for n, picture in seen["base"].items() if picture is not None and seen["after"].get(n) is not None and n not in broken]
    pictures = [np.array([seen[role][n] for n in sound]) for role in ("base", "after")]
    return meters | {"moved": effect_size.moved(*pictures)}


def _meters(rows: list[dict], seen: dict[int, np.ndarray | None]) -> pa.Table:
    nothing = (math.nan,) * len(METERS)  # it cannot be read, which the experts' missing scores have told
    values = [nothing if (picture := seen[row["candidate"]]) is None else statistics.meters(picture) for row in rows]
    return pa.table([[row["group"] for row in rows], [row["candidate"] for row in rows], *zip(*values, strict=True)], schema=schemas.METERS)


def decoded(data: bytes, where: str) -> np.ndarray | None:
    """A picture's pixels; None where it cannot be read."""
    try:
        return np.asarray(decode_picture(data, where))
    except UserError:
        return None
