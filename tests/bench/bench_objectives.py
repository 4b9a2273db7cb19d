"""Every objective with the same small budget, and its rivals at equal forwards: quality against diversity, with the base's best of n.

    python tests/bench/bench_objectives.py --jobs 8                 # all rows, seeds 7, 8, 9; goes on where it stopped
    python tests/bench/bench_objectives.py --only step_dpo grpo --seeds 7 --jobs 2 --set prompts.most_train=32
    python tests/bench/bench_objectives.py --show                   # the tables of what is done

Each row has the six settings that stand below. The first seed is a screen: one round with each setting. The two with the highest
best-of-n equivalent go on to the other seeds, and what is reported of a row is of those seeds alone where there are any, as the best of
six on one seed is partly luck. Candidates, scores and the base's pictures of a seed are made once and shared; jobs are processes on one
device (`machine.device: auto`). Everything that is not in a setting is the configuration's. Writes results.csv and plot.svg.
"""

import argparse
import csv
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fashiondpo_pipeline import terminal
from fashiondpo_pipeline.config import Config, load, validate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser
from fashiondpo_pipeline.preferences import Rule
from stages import Session

KEEP = 2  # settings of a row that go on to the other seeds
RATES = [3e-4, 1e-3, 3e-3]
Setting = dict[str, Any]  # section.key -> value


def six(fixed: Setting, **two: list) -> list[Setting]:
    """Three learning rates times two values of one knob, beside what is fixed; `__` stands for the dot of a knob's name."""
    (name, values), = two.items()
    return [fixed | {"finetune.learning_rate": rate, name.replace("__", "."): value} for rate, value in itertools.product(RATES, values)]


def objective(name: str, betas: tuple[float, float] = (300.0, 3000.0), **options: float) -> list[Setting]:
    return six({"finetune.objective": name, "finetune.options": options}, finetune__beta=list(betas))


def option(name: str, key: str, values: tuple[float, float], **fixed: Any) -> list[Setting]:
    """An objective that beta does not change: another knob of its own in its place."""
    return six({"finetune.objective": name} | fixed, finetune__options=[{key: value} for value in values])


STEPS = {"finetune.objective": "step_dpo"}
BEST = {"pair.select": "best_worst", "pair.margin": 0.0, "pair.agree": None}
# Label 1 at or above the median of everything, every pair of unlike labels, the bare mean log-ratio, beta and clip 0.1. As released only one
# step is trained, by a slip; the second value is that, the first what was meant.
PUBLISHED = STEPS | {"pair.select": "median_split", "pair.over": "all", "pair.margin": 0.0, "pair.agree": None, "finetune.step_weight": "density",
                     "finetune.beta": 0.1, "finetune.ratio_clip": 0.1}

ROWS: dict[str, list[Setting]] = {
    "step_dpo": objective("step_dpo"),
    "step_dpo, pairs over all, saturated": six(STEPS | {"pair.over": "all", "pair.agree": None, "finetune.beta": 300.0}, pair__saturate=[0.5, 0.8]),
    "ipo": objective("ipo", (100.0, 1000.0)),  # its margins are drawn to 1/2
    "hinge": objective("hinge"),
    "cdpo": objective("cdpo", label_smoothing=0.1),
    "robust_dpo": objective("robust_dpo", label_smoothing=0.1),
    "soft_dpo": objective("soft_dpo", tau=0.5),
    "margin_dpo": objective("margin_dpo", alpha=1.0),
    "kto": objective("kto"),
    "capo": objective("capo", (50.0, 500.0)),  # to a difference of win rates, some 1/4
    "plackett_luce": objective("plackett_luce"),
    "rankdpo": objective("rankdpo"),
    "dgpo": objective("dgpo"),
    "grpo": objective("grpo"),  # beta is how soon its clip acts
    "diffusion_dpo": objective("diffusion_dpo"),
    "diffusion_dpo, fresh noise": six({"finetune.objective": "diffusion_dpo", "finetune.noise": "fresh"}, finetune__beta=[300.0, 3000.0]),
    "grpo on errors of fresh noise (AWM)": six({"finetune.objective": "grpo", "finetune.signal": "error", "finetune.noise": "fresh"},
                                               finetune__beta=[300.0, 3000.0]),
    "mapo": option("mapo", "weight", (0.1, 1.0)),
    "dspo": option("dspo", "pull", (0.01, 0.05)),
    "nft": option("nft", "strength", (0.1, 1.0)),
    "nft, fresh noise": option("nft", "strength", (0.1, 1.0), **{"finetune.noise": "fresh"}),
    # rivals and controls
    "finetuning on the best of n": six(BEST | {"finetune.objective": "sft", "finetune.signal": "error"}, finetune__noise=["tracked", "fresh"]),
    "FashionDPO's loss as published": six(PUBLISHED, finetune__window=[[0.0, 1.0], [0.9, 1.0]]),
    "random labels": six(STEPS | {"pair.labels": "random"}, finetune__beta=[300.0, 3000.0]),
    "swapped labels": six(STEPS | {"pair.labels": "swapped"}, finetune__beta=[300.0, 3000.0]),
}
TOLD = ("learning_rate", "beta", "options", "noise", "saturate", "window")  # knobs of which the table tells
RIVALS = ("finetuning on the best of n", "FashionDPO's loss as published", "random labels", "swapped labels")


@dataclass(frozen=True)
class Job:
    """One setting of a row on one seed; seed alone (row "") makes what all settings of the seed share."""

    row: str
    number: int
    seed: int

    @property
    def setting(self) -> Setting:
        return ROWS[self.row][self.number] if self.row else {}

    def root(self, folder: Path) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in self.row)
        return folder / f"seed-{self.seed}" / (f"{name}-{self.number}" if self.row else "shared")


@dataclass(frozen=True)
class Where:
    """What every job has in common."""

    folder: Path
    config: Path | None
    sets: tuple[str, ...]
    threads: int | None

    def session(self, job: Job) -> Session:
        """The configuration with a job's setting and seed, in a folder of its own."""
        values = load(self.config, list(self.sets)).model_dump(mode="json")
        for key, value in job.setting.items():
            section, _, knob = key.partition(".")
            values[section][knob] = value
        values |= {"seed": job.seed, "rounds": 1}
        if self.threads:
            values["machine"]["threads"] = self.threads
        if job.row and "grid" in values["evaluate"]:
            values["evaluate"]["grid"] = []  # the sampler's own line is the base's, which is drawn once
        config: Config = validate(values, job.row or "shared")
        return Session(config, job.root(self.folder), say=lambda text: None)


def shared(where: Where, seed: int) -> dict:
    """Draw and score a seed's candidates and the base's pictures, and one plain round, which measures the base."""
    session = where.session(Job("", 0, seed))
    with session.lock():
        chain = session.chain(1)
        session.execute(chain.steps)
    evaluated = session.output(chain.rounds[1].evaluate)
    return {"seed": seed, "line": base_line(evaluated), "sampler": [one for one in evaluated.manifest["numbers"].get("sampler", [])
                                                                    if one["role"] == "base"]}


def made(where: Where, job: Job) -> dict:
    """One round with a job's setting: its figures."""
    session, lender = where.session(job), Job("", 0, job.seed).root(where.folder)
    chain = session.chain(1)
    for step in chain.steps:
        theirs, ours = lender / step.folder, session.run.root / step.folder
        if (theirs / "manifest.json").is_file() and not os.path.lexists(ours):
            ours.parent.mkdir(parents=True, exist_ok=True)
            ours.symlink_to(theirs.resolve())
    with session.lock():
        session.execute(chain.steps)
    r = chain.rounds[1]
    return figures(job, session.output(r.evaluate).manifest["numbers"], session.output(r.finetune).manifest)


def figures(job: Job, numbers: dict, trained: dict) -> dict:
    """What is kept of a round: a row of results.csv."""
    size, judge, training = numbers["size"], numbers["experts"].get(numbers["judge"]), trained["numbers"]
    right = size.get("right") or {}
    return {
        "row": job.row, "number": job.number, "seed": job.seed, "setting": json.dumps(job.setting),
        **{f"best_of_{end}": size["best_of"][end] for end in ("value", "low", "high", "most")},
        "diversity_at_equal_quality": size["diversity_at_equal_quality"]["value"],
        "right": (right.get("after") or {}).get("value"), "right_base": (right.get("base") or {}).get("value"),
        "quality": judge and judge["after"], "quality_base": judge and judge["base"],
        "diversity": numbers["diversity"]["after"], "diversity_base": numbers["diversity"]["base"],
        "win_rate": numbers["against_base"]["win_rate"],
        # a backward pass counts as two forwards
        "training_forwards": 3 * training["policy_rows"] + training["reference_rows_before"] + training["reference_rows_in_training"],
        "optimiser_steps": training["steps"], "accuracy": training["last_accuracy"], "divergence": training.get("divergence"),
        "seconds": trained["seconds"],
    }


def base_line(evaluated: Any) -> list[dict]:
    """The base's best of n by the rewarded mix: n, its quality by the judge, its diversity; n from 1."""
    from fashiondpo_pipeline import effect_size
    from stages.evaluate import Drawn

    knobs = evaluated.claim["config"]
    base = Drawn.of(evaluated, "base", knobs)
    weights = {name: weight for name, weight in knobs["weights"].items() if weight > 0 and name in base.grid.scores}
    if not weights or knobs["judge"] is None:
        return []
    mix, scores = Chooser(base.grid, Rule(weights)).mixed, base.grid.scores[knobs["judge"]]
    quality = np.nanmean(effect_size.chosen_quality(mix, scores), 0)
    distance = np.nanmean(effect_size.chosen_distance(np.where(np.isfinite(scores), mix, np.nan), base.distances), 0)
    middle = len(quality) // 2
    return [{"n": 1 + place, "quality": float(quality[middle + place]), "diversity": float(distance[middle + place])}
            for place in range(middle + 1)]


def value_of(result: dict) -> float:
    """By what a setting is chosen: its best-of-n equivalent; more than the most that can be told is the highest, by quality.

    >>> value_of({"best_of_value": None, "best_of_most": 8, "quality": 2.0, "quality_base": 1.0}) > value_of({"best_of_value": 7.5})
    True
    """
    if result["best_of_value"] is not None:
        return result["best_of_value"]
    return result["best_of_most"] + (result["quality"] or 0) - (result["quality_base"] or 0)


def best_settings(screen: Iterable[dict]) -> dict[str, list[int]]:
    """Row -> numbers of its best settings on the first seed, the best first."""
    by_row: dict[str, list[dict]] = {}
    for result in screen:
        by_row.setdefault(result["row"], []).append(result)
    return {row: [one["number"] for one in sorted(found, key=value_of, reverse=True)[:KEEP]] for row, found in by_row.items()}


def reported(results: list[dict], first: int) -> dict[str, list[dict]]:
    """Row -> the results of its better setting, by the mean over the seeds that did not choose it; over the first where there are no others."""
    found = {}
    for row in dict.fromkeys(result["row"] for result in results):
        own = [result for result in results if result["row"] == row]
        later = [result for result in own if result["seed"] != first] or own
        settings = {number: [result for result in later if result["number"] == number] for number in {result["number"] for result in later}}
        whole = max(map(len, settings.values()))  # of settings that all the seeds have
        found[row] = max((some for some in settings.values() if len(some) == whole), key=lambda some: np.mean([value_of(one) for one in some]))
    return dict(sorted(found.items(), key=lambda one: -np.mean([value_of(result) for result in one[1]])))


def table(results: list[dict], bases: list[dict], first: int) -> list[list[str]]:
    """One line a row, best first, then the base's best of n and the sampler's settings."""
    rows = []
    for row, some in reported(results, first).items():
        setting = {key.partition(".")[2]: value for key, value in ROWS[row][some[0]["number"]].items() if value != {}}
        shown = ", ".join(f"{key} {setting[key]}" for key in TOLD if key in setting)
        rows.append([row, shown, str(len(some)), _best_of(some), _mean(some, "diversity_at_equal_quality", "{:.2f}"), _change(some),
                     _mean(some, "quality", "{:.3f}"), _mean(some, "diversity", "{:.3f}"), _mean(some, "win_rate", "{:.1%}"),
                     _mean(some, "training_forwards", "{:,.0f}"), "1"])
    for n in (1, 2, 4, 8):
        line = [one for base in bases for one in base["line"] if one["n"] == n]
        if line:
            rows.append([f"best of {n} of the base", "", str(len(line)), f"{n}", "1.00", "", _mean(line, "quality", "{:.3f}"),
                         _mean(line, "diversity", "{:.3f}"), "", "0", str(n)])
    for place in range(min((len(base["sampler"]) for base in bases), default=0)):
        line = [base["sampler"][place] for base in bases]
        how = f"guidance {line[0]['guidance']:g}, {line[0]['steps']} steps, eta {line[0]['eta']:g}"
        usual = next((one["forwards"] for one in bases[0]["sampler"] if one["usual"]), line[0]["forwards"])
        rows.append(["base, as it is drawn" if line[0]["usual"] else "base, another setting", how, str(len(line)), "", "",
                     _mean(line, "right", "{:.1%}"), _mean(line, "mean", "{:.3f}"), _mean(line, "diversity", "{:.3f}"), "", "0",
                     f"{line[0]['forwards'] / usual:.1f}"])
    return rows


def _mean(some: list[dict], name: str, form: str) -> str:
    known = [one[name] for one in some if one[name] is not None]
    return form.format(np.mean(known)) if known else "-"


def _best_of(some: list[dict]) -> str:
    values = [value_of(one) for one in some]
    more = "more than " if any(one["best_of_value"] is None for one in some) else ""
    return f"{more}{np.mean([min(v, one['best_of_most'] or v) for v, one in zip(values, some, strict=True)]):.2f}" + (
        f" ({min(values):.2f} .. {max(values):.2f})" if len(values) > 1 else "")


def _change(some: list[dict]) -> str:
    known = [(one["right_base"], one["right"]) for one in some if one["right"] is not None]
    return "{:.1%} -> {:.1%}".format(*np.mean(known, 0)) if known else "-"


HEADS = ["row", "setting", "seeds", "best of n of the base", "diversity at equal quality", "right", "quality", "diversity", "win rate",
         "training forwards", "forwards a picture"]


def plot(path: Path, results: list[dict], bases: list[dict], first: int) -> None:
    """Quality against diversity: every setting small, what is reported of a row large and named, and the base's best of n as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.add_subplot()
    kept = [result for result in results if result["quality"] is not None and result["diversity"] is not None]
    axes.scatter([one["diversity"] for one in kept], [one["quality"] for one in kept], s=8, color="0.75", label="every setting")
    for row, some in reported(kept, first).items() if kept else ():
        x, y = (float(np.mean([one[name] for one in some])) for name in ("diversity", "quality"))
        axes.scatter([x], [y], s=36, marker="s" if row in RIVALS else "o", color="tab:red" if row in RIVALS else "tab:blue")
        axes.annotate(row, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
    ends = list(range(1, 1 + min((len(base["line"]) for base in bases), default=0)))
    line = [[float(np.mean([base["line"][n - 1][name] for base in bases])) for n in ends] for name in ("diversity", "quality")]
    if ends:
        axes.plot(*line, color="black", linewidth=1, marker=".", label="best of n of the base, chosen by the rewarded mix")
        for n in (1, 2, 4, 8, ends[-1]):
            if n in ends:
                axes.annotate(f"n = {n}", (line[0][n - 1], line[1][n - 1]), xytext=(5, -10), textcoords="offset points", fontsize=8)
    settings = [one for base in bases for one in base["sampler"] if one["mean"] is not None and one["diversity"] is not None]
    axes.scatter([one["diversity"] for one in settings], [one["mean"] for one in settings], marker="x", color="tab:green",
                 label="base under other settings of the sampler")
    axes.set_xlabel("diversity of a prompt's pictures (CLIP distance)")
    axes.set_ylabel("quality: the judge's mean")
    axes.legend(fontsize=8)
    figure.savefig(path)


def write_csv(path: Path, results: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def in_processes(work: Callable, where: Where, todo: list, jobs: int, failed: list[str]) -> list[dict]:
    """Every piece of work's result, several at a time; what a UserError ends is noted, and the others go on."""
    if jobs == 1:
        found = []
        for one in todo:
            try:
                found.append(_told(work(where, one)))
            except UserError as problem:
                failed.append(_told(f"{one}: {problem}"))
        return found
    found = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(work, where, one): one for one in todo}
        for done in as_completed(waiting):
            try:
                found.append(_told(done.result()))
            except UserError as problem:
                failed.append(_told(f"{waiting[done]}: {problem}"))
    return found


def _told(result: Any) -> Any:
    if isinstance(result, str):
        terminal.say(result)
    elif "row" in result:
        terminal.say(f"seed {result['seed']} {result['row']} {result['setting']}: best of {_best_of([result])}, "
                     f"diversity at equal quality {_mean([result], 'diversity_at_equal_quality', '{:.2f}')}, {result['seconds']:.0f} s")
    else:
        terminal.say(f"seed {result['seed']}: candidates and the base's pictures are there")
    return result


def is_done(where: Where, job: Job) -> bool:
    """Whether a job has been done before."""
    session = where.session(job)
    return session.run.done(session.chain(1).rounds[1].evaluate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9], help="the first is the screen")
    parser.add_argument("--only", nargs="+", metavar="ROW", default=list(ROWS), help=f"some of: {'; '.join(ROWS)}")
    parser.add_argument("--settings", type=int, default=6, help="at most so many settings of each row, for a trial")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, on one device")
    parser.add_argument("--threads", type=int, help="CPU threads of each; 1 with several jobs if left out")
    parser.add_argument("--config", type=Path, help="pipeline.yaml; the embedded default if left out")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--run", type=Path, default=Path("runs/bench-objectives"), help="the folder of all that is made")
    parser.add_argument("--show", action="store_true", help="only the tables of what is done")
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in ROWS]:
        parser.error(f"no row called {unknown[0]!r}; there are: {'; '.join(ROWS)}")
    where = Where(options.run, options.config, tuple(options.sets), options.threads or (1 if options.jobs > 1 else None))
    first, *others = options.seeds
    failed: list[str] = []

    def wanted(jobs: list) -> list:
        return [job for job in jobs if is_done(where, job if isinstance(job, Job) else Job("", 0, job))] if options.show else jobs

    bases = in_processes(shared, where, wanted(options.seeds), options.jobs, failed)
    screen = [Job(row, number, first) for row in options.only for number in range(min(options.settings, len(ROWS[row])))]
    results = in_processes(made, where, wanted(screen), options.jobs, failed)
    later = [Job(row, number, seed) for seed in others for row, numbers in best_settings(results).items() for number in numbers]
    results += in_processes(made, where, wanted(later), options.jobs, failed)
    if not results:
        raise SystemExit("\n".join(["nothing is done", *failed]))
    results.sort(key=lambda one: (list(ROWS).index(one["row"]), one["number"], one["seed"]))
    bases.sort(key=lambda one: one["seed"])
    # rows that were finetuned count by the seeds that did not choose their setting, the base by the same
    apart = [base for base in bases if base["seed"] != first] or bases
    write_csv(options.run / "results.csv", results)
    plot(options.run / "plot.svg", results, apart, first)
    terminal.show("one round, held-out prompts", HEADS, table(results, apart, first))
    terminal.say(f"{options.run / 'results.csv'}, {options.run / 'plot.svg'}")
    if failed:
        raise SystemExit("not made:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
