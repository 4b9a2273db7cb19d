"""adapter (+ pictures of training prompts at several strengths, and their scores) -> the adapter at the strength that is best."""

import numpy as np

from fashiondpo_pipeline import adapters, preferences, seeds, statistics
from fashiondpo_pipeline.grid import Grid
from fashiondpo_pipeline.preferences import Spread
from fashiondpo_pipeline.workspace import Output, Step

KEYS = ["group", "candidate"]


def run(session, step: Step, out: Output) -> None:
    knobs, found = step.config, {}
    strength = knobs["strength"]
    if strength == "auto":
        found = tried(step, out)
        strength, fits = best(found["tried"], found["base"]["pictures"])
        session.say(f"round {step.round} {step.name}: {strength:g}" + ("" if fits else
                    f", the least that was tried, as none keeps {knobs['floor']:.0%} of the base's diversity with every picture sound"))
    adapters.strengthened(out.input("adapter").published("adapter"), out.work / "adapter", strength)
    out.publish("adapter", out.work / "adapter")
    out.finish({"strength": strength, **found})


def tried(step: Step, out: Output) -> dict:
    """Score, diversity and sound pictures of each strength, and of the base (strength 0).

    score: mean of the rewarded experts' mix, in standard deviations of the base's pictures from the base's mean; None without any.
    diversity: as `evaluate` measures it; share: of the base's, None where it is not measured; fits: whether that is above the floor.
    value: what decides, see `valued`.
    """
    knobs, strengths = step.config, step.inputs["sample"].config["strengths"]
    tables = {name: out.input(f"score-{name}").table("scores", [*KEYS, "score"]) for name in knobs["weights"]}
    grid = Grid.of(out.input("sample").table("candidates", KEYS), tables)
    normal = {name: preferences.normalise(scores, "zscore", Spread.of(part(scores, 0, len(strengths)), False))
              for name, scores in grid.scores.items()}
    mixed = preferences.mix(normal, knobs["weights"])  # (g, k)
    rows = [part(mixed, place, len(strengths)) for place in range(len(strengths))]
    diversity = diversities(out, len(strengths)) if "embed" in out.inputs else [None] * len(strengths)
    base, *others = [
        {"strength": strength, "score": float(np.nanmean(values)) if np.isfinite(values).any() else None, "diversity": each,
         "share": each / diversity[0] if each is not None and diversity[0] else None, "pictures": int(np.isfinite(values).sum())}
        for strength, values, each in zip(strengths, rows, diversity, strict=True)
    ]
    for one, value in zip(others, valued(step, [one["score"] for one in others]), strict=True):
        one["value"] = value
        one["fits"] = knobs["floor"] is None or (one["share"] is not None and one["share"] >= knobs["floor"])
    return {"base": base, "tried": others, "floor": knobs["floor"]}


def valued(step: Step, scores: list[float | None]) -> list[float | None]:
    """The scores; in control experiments turned round as their labels are, or drawn by chance."""
    labels = step.config.get("labels", "scored")
    if labels == "random":
        rng = np.random.default_rng(seeds.key(step.config["seed"], "strength", step.round))
        return [None if score is None else float(value) for score, value in zip(scores, rng.random(len(scores)), strict=True)]
    return [score if score is None or labels == "scored" else -score for score in scores]


def best(tried: list[dict], pictures: int) -> tuple[float, bool]:
    """(the strength of highest value, the lower of equals, among those that fit and have no fewer sound pictures; whether any does).

    Where none does, the least that was tried.
    """
    able = [one for one in tried if one["fits"] and one["value"] is not None and one["pictures"] >= pictures]
    if not able:
        return min(one["strength"] for one in tried), False
    return max(able, key=lambda one: (one["value"], -one["strength"]))["strength"], True


def part(values: np.ndarray, place: int, parts: int) -> np.ndarray:
    """The columns of one strength: (g, parts n, ...) -> (g, n, ...)."""
    each = values.shape[1] // parts
    return values[:, place * each : (place + 1) * each]


def diversities(out: Output, parts: int) -> list[float | None]:
    """Mean cosine distance between a prompt's pictures at each strength; None where no prompt has them all."""
    table = out.input("embed").table("embeddings").sort_by([(key, "ascending") for key in KEYS])
    groups: dict[str, list] = {}
    for row in table.to_pylist():
        groups.setdefault(row["group"], []).append(row["embedding"])
    found = []
    for place in range(parts):
        each = [rows[len(rows) // parts * place : len(rows) // parts * (place + 1)] for rows in groups.values()]
        whole = [some for some in each if all(vector is not None for vector in some)]
        found.append(statistics.diversity(np.array(whole, np.float64)) if whole else None)
    return found
