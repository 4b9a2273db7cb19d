"""Held-out pictures of the base, the round that this one went on from and this round, from the same seeds -> who wins, and what drifted."""

import numpy as np
import pyarrow as pa

from fashiondpo_pipeline import preferences, schemas, statistics
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Grid
from fashiondpo_pipeline.preferences import Spread
from fashiondpo_pipeline.seeds import key
from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    knobs = step.config
    grids = {role: grid_of(out, role, knobs["experts"]) for role in ("base", "before", "after")}
    opinions = {role: dict(grid.scores) for role, grid in grids.items()}
    judge = knobs["judge"] or "mix"
    if knobs["judge"] is None:
        _add_mix(opinions, knobs["weights"])

    def versus(name: str, other: str) -> dict:
        won = statistics.wins(opinions["after"][name], opinions[other][name])
        if not np.isfinite(won).any():
            raise UserError(f"round {step.round} evaluate: expert '{name}' has no picture that it scored in both; look at its reasons")
        mean, low, high = statistics.interval(won, knobs["interval"])
        return {"win_rate": mean, "low": low, "high": high}

    experts = {
        name: {
            "rewarded": knobs["weights"].get(name, 0) > 0,
            "base": _mean(opinions["base"][name]), "before": _mean(opinions["before"][name]), "after": _mean(opinions["after"][name]),
            "against_base": versus(name, "base"),
        }
        for name in opinions["after"]
    }
    meters = {role: _meters(out, role) for role in ("base", "after")}
    diversity = {role: _diversity(out, role) for role in ("base", "before", "after")}
    out.write(0, meters=meters["after"])
    out.finish({
        "judge": judge, "judge_rewarded": knobs["weights"].get(judge, 0) > 0 or judge == "mix",
        "pictures": int(np.isfinite(opinions["after"][judge]).sum()), "prompts": len(grids["after"].groups),
        "interval": knobs["interval"], "before": step.inputs["before"].round,  # whose pictures are "previous" and "before"
        "against_base": versus(judge, "base"), "against_previous": versus(judge, "before"),
        "experts": experts,
        # what a mean has moved by is told in the base's own spread: of its prompts' diversity, of its pictures' meters
        "diversity": {role: _mean(each) for role, each in diversity.items()} | {"spread": _spread(diversity["base"])},
        "meters": {name: {role: _mean(table[name].to_numpy()) for role, table in meters.items()}
                   | {"spread": _spread(meters["base"][name].to_numpy())}
                   for name in ("brightness", "contrast", "saturation", "sharpness")},
        "pairs": out.input("pair").manifest["numbers"]["pairs"],
    }, session.about)


def grid_of(out: Output, role: str, experts: list[str]) -> Grid:
    tables = {name: out.input(f"{role}-score-{name}").table("scores", ["group", "candidate", "score"]) for name in experts}
    return Grid.of(out.input(role).table("candidates", ["group", "candidate"]), tables)


def _add_mix(opinions: dict[str, dict[str, np.ndarray]], weights: dict[str, float]) -> None:
    """The rewarded experts' mix, on a scale common to all three sets of pictures."""
    everything = {name: Spread.of(np.concatenate([o[name] for o in opinions.values()]), False) for name in weights}
    for found in opinions.values():
        normal = {name: preferences.normalise(found[name], "zscore", everything[name]) for name in weights}
        found["mix"] = preferences.mix(normal, weights)


def _mean(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def _spread(values: np.ndarray) -> float | None:
    """Standard deviation of the known values; None where there is none."""
    return float(np.nanstd(values)) if np.isfinite(values).any() else None


def _diversity(out: Output, role: str) -> np.ndarray:
    """Diversity of each prompt's pictures in the first CLIP tower, (g,); nothing where no expert has one."""
    if f"{role}-embed-0" not in out.inputs:
        return np.zeros(0)
    table = out.input(f"{role}-embed-0").table("embeddings").sort_by([("group", "ascending"), ("candidate", "ascending")])
    broken = set(table.filter(table["embedding"].is_null())["group"].to_pylist())  # groups with a picture that cannot be read
    table = table.filter([group not in broken for group in table["group"].to_pylist()])
    if not len(table):
        return np.zeros(0)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    groups = vectors.reshape(len(set(table["group"].to_pylist())), -1, vectors.shape[1]).astype(np.float64)  # (g, k, d)
    return np.array([statistics.diversity(group[None]) for group in groups])


def _meters(out: Output, role: str) -> pa.Table:
    table = out.input(role).table("candidates", ["group", "candidate", "picture"])
    values = [measure(row["picture"]["bytes"], f"{row['group']}/{row['candidate']}") for row in table.to_pylist()]
    return pa.table([table["group"], table["candidate"], *zip(*values, strict=True)], schema=schemas.METERS)


def measure(data: bytes, where: str) -> tuple[float, ...]:
    """A picture's meters; NaN where it cannot be read, which the experts' missing scores have told."""
    try:
        return statistics.meters(np.asarray(decode_picture(data, where)))
    except UserError:
        return (float("nan"),) * 4
