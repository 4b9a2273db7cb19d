"""Coverage and width of candidate intervals over few prompts, by simulation: how the ones in use were chosen.

    python tests/bench/bench_intervals.py [--tries 1000] [--quick]

Each line is one kind of figure and one number of prompts: how often of so many simulated evaluations each candidate's 95 % interval
held the truth, and its median width. Kinds: `win` and `win, alike` (beta-binomial wins of 16 pictures a prompt, prompts spread widely or
narrowly, at means 0.5, 0.7 and 0.9), `ln p` (a judge's mean gain, skewed as logarithms of probabilities are), `visible` (a ratio of
means), `best of` (best-of-n equivalent), `diversity` (at equal quality). The truth of the last two is that of 20,000 prompts.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache

import numpy as np

from fashiondpo_pipeline import effect_size, statistics

COVERAGE, K, RESAMPLES = 0.95, 16, 400
Interval = tuple[float, float]
Data = tuple[np.ndarray, ...]


# -- what an evaluation of g prompts might find


def wins(rng: np.random.Generator, g: int, mean: float, alike: float) -> Data:
    chance = rng.beta(alike * mean, alike * (1 - mean), (g, 1))
    return ((rng.random((g, K)) < chance).astype(float),)


def log_probabilities(rng: np.random.Generator, g: int) -> Data:
    """Gains of ln p, of pictures most of which are right for certain before and after."""
    hard = rng.normal(2, 2, (g, 1))
    before, after = (-np.log1p(np.exp(-(hard + rng.normal(0, 1.5, (g, K)) + gain))) for gain in (0.0, 1.0))
    return ((after - before).mean(1, keepdims=True),)


def changes(rng: np.random.Generator, g: int) -> Data:
    between = rng.lognormal(0, 0.4, g)
    return between * rng.lognormal(-2, 0.5, g), between


def choices(rng: np.random.Generator, g: int, gain: float = 1.0) -> Data:
    """(mix, judge, embeddings) of the base and (judge, embeddings) of the tuned model; better pictures of a prompt are more alike."""
    prompt = rng.normal(0, 1, (g, 1))

    def pictures(bias: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        quality = rng.normal(bias, 1, (g, K)) * np.exp(0.3 * rng.normal(0, 1, (g, 1)))
        judge = -np.log1p(np.exp(-(prompt + quality)))  # ln p
        where = rng.normal(0, 1, (g, K, 6)) * np.exp(-0.25 * quality)[..., None]
        where[..., 0] += 2
        return quality + rng.normal(0, 0.7, (g, K)), judge, where / np.linalg.norm(where, axis=2, keepdims=True)

    mix, judge, where = pictures(0.0)
    _, judge_after, where_after = pictures(gain * 0.8)
    return (effect_size.chosen_quality(mix, judge), effect_size.chosen_distance(mix, 1 - where @ where.transpose(0, 2, 1)),
            judge_after.mean(1), np.array([statistics.diversity(one[None]) for one in where_after]))


# -- figures, and candidates for their intervals


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def ratio(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.mean() / below.mean())


def equivalent(quality: np.ndarray, _: np.ndarray, after: np.ndarray, __: np.ndarray) -> float:
    return float(effect_size.place_of(after.mean(keepdims=True), quality.mean(0, keepdims=True))[0])


def equal_quality(quality: np.ndarray, distance: np.ndarray, after: np.ndarray, diversity: np.ndarray) -> float:
    place = np.array([equivalent(quality, distance, after, diversity)])
    return float(diversity.mean() / effect_size.at_place(distance.mean(0, keepdims=True), place)[0])


def resampled(figure: Callable[..., float], data: Data, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, len(data[0]), (RESAMPLES, len(data[0])))
    return np.array([figure(*(one[some] for one in data)) for some in rows])


def percentile(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    low, high = np.quantile(resampled(figure, data, seed), [0.025, 0.975], method="nearest")
    return float(low), float(high)


def expanded(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    found, count = resampled(figure, data, seed), len(data[0])
    tail = statistics.NormalDist().cdf(-statistics.t_quantile(COVERAGE, count - 1) * math.sqrt(count / (count - 1)))
    low, high = np.quantile(found, [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def bootstrap_t(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    """Studentized, of a mean."""
    prompts = data[0].mean(1)
    rows = np.random.default_rng(seed).integers(0, len(prompts), (RESAMPLES, len(prompts)))
    again, root = prompts[rows], math.sqrt(len(prompts))
    with np.errstate(invalid="ignore", divide="ignore"):
        t = (again.mean(1) - prompts.mean()) / (again.std(1, ddof=1) / root)
    t = t[np.isfinite(t)]
    if not len(t):
        return float(prompts.mean()), float(prompts.mean())
    low, high = np.quantile(t, [0.025, 0.975], method="nearest")
    error = prompts.std(ddof=1) / root
    return float(prompts.mean() - high * error), float(prompts.mean() - low * error)


def student(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    return statistics.student(data[0].mean(1), COVERAGE)


def never_narrower(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    return statistics.studentized(data[0].mean(1), seed, RESAMPLES, COVERAGE)[1:]


def with_wilson(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    return statistics.interval(data[0], COVERAGE)[1:]


def fieller(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    return statistics.ratio_interval(*data, COVERAGE)[1:]


def inverted(figure: Callable[..., float], data: Data, seed: int) -> Interval:
    limit = statistics.t_quantile(COVERAGE, len(data[0]) - 1)
    return effect_size._places_not_refuted(data[0], data[2], limit)


OF_MEANS = {"percentile": percentile, "expanded": expanded, "bootstrap-t": bootstrap_t, "student": student}
KINDS: dict[str, tuple] = {
    **{f"win {at}": (lambda rng, g, at=at: wins(rng, g, at, 2.0), mean, OF_MEANS | {"with wilson": with_wilson}) for at in (0.5, 0.7, 0.9)},
    **{f"win {at}, alike": (lambda rng, g, at=at: wins(rng, g, at, 30.0), mean, OF_MEANS | {"with wilson": with_wilson})
       for at in (0.5, 0.7, 0.9)},
    "ln p": (log_probabilities, mean, OF_MEANS | {"studentized": never_narrower}),
    "visible": (changes, ratio, {"percentile": percentile, "expanded": expanded, "fieller": fieller}),
    "best of": (choices, equivalent, {"percentile": percentile, "expanded": expanded, "inverted": inverted}),
    "diversity": (choices, equal_quality, {"percentile": percentile, "expanded": expanded}),
}


@cache
def truth(kind: str) -> float:
    draw, figure, _ = KINDS[kind]
    if kind.startswith("win"):
        return float(kind.split()[1].rstrip(","))
    return float(figure(*draw(np.random.default_rng(99), 20_000)))


def covered(kind: str, prompts: int, tries: int) -> dict[str, tuple[float, float]]:
    """Candidate -> (share of simulated evaluations whose interval holds the truth, its median width)."""
    draw, figure, candidates = KINDS[kind]
    hits: dict[str, list[bool]] = {name: [] for name in candidates}
    widths: dict[str, list[float]] = {name: [] for name in candidates}
    for seed in range(tries):
        data = draw(np.random.default_rng(seed), prompts)
        for name, candidate in candidates.items():
            low, high = candidate(figure, data, seed)
            hits[name].append(low - 1e-9 <= truth(kind) <= high + 1e-9)
            widths[name].append(high - low)
    return {name: (float(np.mean(hits[name])), float(np.median(widths[name]))) for name in candidates}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="a fifth of the tries")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    for kind in options.kinds:
        for prompts in (5, 10, 20, 40):
            found = covered(kind, prompts, options.tries // 5 if options.quick else options.tries)
            print(f"{kind:16} {prompts:3} " + "  ".join(f"{name} {100 * hit:.1f} ({width:.3g})" for name, (hit, width) in found.items()), flush=True)
