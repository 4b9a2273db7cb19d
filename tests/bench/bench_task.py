"""Whether the embedded default's task leaves room that no setting of the sampler takes: the base under many.

    python tests/bench/bench_task.py --run runs/task     # every line of GRID; goes on where it stopped
    python tests/bench/bench_task.py --quick --set prompts.most_train=20 --set prompts.most_held_out=10
    python tests/bench/bench_task.py --also 4,20,1,0.7 --sheet task.png   # another line; pictures to look at

Each line draws K pictures of every prompt of both splits, from the same seeds. Training prompts say which
setting is the base's best, by the rewarded mix on a scale common to all lines. The judge says what is right,
and what the best of n of a held-out prompt's pictures, chosen by the rewarded mix, would be (expectation over
subsets). Targets: at the chosen setting at most 75 % of held-out pictures are right; of the best of 8 at
least 92 %, there and at the shipped setting; the shipped setting is the one chosen, or to the judge the other
gains nothing. Everything else is as shipped, or as --set says.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fashiondpo_pipeline import claims, effect_size, statistics, terminal
from fashiondpo_pipeline.config import Config, load
from fashiondpo_pipeline.effect_size import estimate
from fashiondpo_pipeline.workspace import Step
from stages import Aside, Session
from stages.evaluate import Drawn, decoded, mix_of, mixed, spreads_of

MOST, LEAST, OF = 0.75, 0.92, 8  # share right of one picture at most, of the best of OF at least
ROWS, CELL, TEXT = 20, 128, 18  # prompts on the sheet, pixels of a picture and of the line above


class Setting(NamedTuple):
    """What one line draws with; the names are those of `sample`."""

    guidance: float
    steps: int
    eta: float
    guidance_rescale: float = 0.0

    def __str__(self) -> str:
        rescaled = f", rescaled {self.guidance_rescale:g}" if self.guidance_rescale else ""
        return f"guidance {self.guidance:g}, {self.steps} steps, eta {self.eta:g}{rescaled}"

    @classmethod
    def parsed(cls, text: str) -> "Setting":
        guidance, steps, eta, *rescale = text.split(",")
        return cls(float(guidance), int(steps), float(eta), *map(float, rescale))


GRID = [
    Setting(1, 10, 1), Setting(1.5, 10, 1), Setting(2, 10, 1), Setting(3, 10, 1),
    Setting(1, 20, 1), Setting(1.5, 20, 1), Setting(2, 20, 1), Setting(3, 20, 1),
    Setting(1, 20, 0), Setting(2, 20, 0), Setting(2, 20, 0.5), Setting(2, 20, 1, 0.7), Setting(3, 20, 1, 0.7),
]
QUICK = [Setting(1, 10, 1), Setting(2, 10, 1), Setting(2, 20, 1)]


@dataclass(frozen=True)
class Line:
    """What one setting gave. best: (g, k) chance that the best of 1 to k of a held-out prompt is right."""

    setting: Setting
    train: Drawn
    held_out: Drawn
    best: np.ndarray
    forwards: float
    seconds: float

    def shares(self, n: int, coverage: float) -> tuple[float, float, float]:
        """Held-out pictures that are right, of the best of n, (value, low, high)."""
        return statistics.interval(self.held_out.right if n == 1 else self.best[:, [n - 1]], coverage)


def lines_of(config: Config, grid: list[Setting]) -> list[Setting]:
    """The shipped setting, then the others, each once."""
    shipped = Setting(*(getattr(config.sample, name) for name in Setting._fields))
    return list(dict.fromkeys([shipped, *grid]))


def session_of(folder: Path, setting: Setting, k: int, sets: list[str]) -> Session:
    """The shipped default with this setting for both splits."""
    own = [f"sample.{name}={value}" for name, value in setting._asdict().items()]
    same = [f"evaluate.{name}=null" for name in ("guidance", "steps", "eta")]  # held-out prompts too
    many = [f"sample.candidates={k}", f"evaluate.pictures={k}", "sample.save=1", "by_round={}"]
    return Session(load(None, [*sets, *own, *same, *many]), folder, say=lambda text: None)


def measured(session: Session, setting: Setting, sheet: Path | None = None) -> Line:
    """Draws both splits, asks the experts, and looks; steps that are done already are not done again."""
    chain = session.chain(1)
    base, first = chain.rounds
    train = Aside(first.sample, first.embeddings, first.scores)
    held_out = Aside(base.held_out, base.held_out_embeddings, base.held_out_scores)
    with session.lock():
        session.execute([chain.encode, *chain.prepared.values(), *train.steps, *held_out.steps])
    knobs = first.evaluate.config
    inputs = train.roles("train") | held_out.roles("held-out")
    out = session.run.output(Step("evaluate", "task", 0, 0, knobs, inputs))
    seen = {role: Drawn.of(out, role, knobs) for role in ("train", "held-out")}
    mix, right = mix_of(seen["held-out"].grid, knobs), seen["held-out"].right
    if right is None:
        raise SystemExit(
            f"evaluate.judge {knobs['judge']} does not say what is right: name one that classifies"
        )
    best = effect_size.chosen_quality(mix, right)[:, mix.shape[1] - 1 :]  # before these places: worst of n
    if sheet:
        draw_sheet(sheet, session, held_out.sample, seen["held-out"], mix)
    numbers = session.output(train.sample).manifest["numbers"]
    seconds = sum(session.output(one.sample).manifest["seconds"] for one in (train, held_out))
    return Line(setting, *seen.values(), best, numbers["forwards"], seconds)


def rewards(lines: list[Line], weights: dict[str, float]) -> list[float]:
    """Each line's mean of the rewarded mix on training prompts, in standard deviations over all lines."""
    scores = {str(line.setting): line.train.grid.scores for line in lines}
    spreads = spreads_of(scores, weights)
    return [float(np.nanmean(mixed(one, spreads, weights))) for one in scores.values()]


def percents(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def show(lines: list[Line], reward: list[float], coverage: float) -> None:
    counts = [n for n in (2, 4, 8, 16) if n <= lines[0].best.shape[1]]
    heads = ["", "forwards", "rewarded mix", "right in training", "right held out"]
    heads += [*(f"best of {n}" for n in counts), "diversity", "seconds"]
    terminal.show("the base by the sampler's settings, the shipped one first", heads, [
        [line.setting, f"{line.forwards:g}", f"{score:+.3f}",
         percents(*statistics.interval(line.train.right, coverage)), percents(*line.shares(1, coverage)),
         *(f"{100 * line.shares(n, coverage)[0]:.1f} %" for n in counts),
         f"{np.nanmean(line.held_out.diversity):.3f}", f"{line.seconds:.0f}"]
        for line, score in zip(lines, reward, strict=True)
    ])


def check(targets: Any, lines: list[Line], reward: list[float], coverage: float) -> None:
    """The rule for the task; the first line is the shipped setting."""
    shipped, chosen = lines[0], lines[int(np.argmax(reward))]  # the first of equals
    print(f"on training prompts the rewarded experts choose {chosen.setting}; shipped is {shipped.setting}")
    most = {name: max(getattr(line.setting, name) for line in lines) for name in ("guidance", "steps")}
    if edge := [name for name, value in most.items() if getattr(chosen.setting, name) == value]:
        print(f"no line has more {' or '.join(edge)} than that one: the best may lie beyond (--also)")
    share = chosen.shares(1, coverage)
    targets.check("right at the chosen setting", percents(*share), f"at most {MOST:.0%}", share[0] <= MOST)
    for which, line in {"shipped": shipped, "chosen": chosen}.items():
        what = f"best of {OF} at the {which} setting"
        if line.best.shape[1] < OF:
            targets.not_here(what, f"at least {LEAST:.0%}", f"needs --pictures {OF} or more")
            continue
        share = line.shares(OF, coverage)
        targets.check(what, percents(*share), f"at least {LEAST:.0%}", share[0] >= LEAST)
    gain = statistics.change_interval(chosen.held_out.right - shipped.held_out.right, coverage)
    found = "it is" if chosen is shipped else f"chosen: {claims.points(estimate(*gain))}"
    holds = chosen is shipped or gain[1] <= 0
    targets.check("shipped is the chosen setting", found, "it is, or no gain beyond chance", holds)


def draw_sheet(file: Path, session: Session, sample: Step, seen: Drawn, mix: np.ndarray) -> None:
    """Held-out prompts spread over the split, all pictures, best by the rewarded mix first; red: wrong."""
    table = session.output(sample).table("candidates", ["group", "candidate", "prompt", "picture"])
    rows = {(row["group"], row["candidate"]): row for row in table.to_pylist()}
    groups, k = seen.grid.groups.to_pylist(), seen.grid.k
    places = sorted({int(place) for place in np.linspace(0, len(groups) - 1, min(ROWS, len(groups)))})
    sheet = Image.new("RGB", (k * CELL, len(places) * (CELL + TEXT)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, place in enumerate(places):
        top = row * (CELL + TEXT)
        pen.text((4, top + 3), rows[groups[place], 0]["prompt"], fill="black")
        for column, n in enumerate(np.argsort(-mix[place])):
            pixels = decoded(rows[groups[place], int(n)]["picture"]["bytes"], groups[place])
            if pixels is not None:
                x, y = column * CELL, top + TEXT
                colour = "green" if seen.right[place, n] == 1 else "red"
                pen.rectangle((x + 1, y + 1, x + CELL - 2, y + CELL - 2), outline=colour, width=2)
                inner = Image.fromarray(pixels).resize((CELL - 8, CELL - 8), Image.Resampling.BICUBIC)
                sheet.paste(inner, (x + 4, y + 4))
    sheet.save(file)


def main() -> None:
    import peaks  # torch comes with it, and the rest can do without

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pictures", type=int, default=OF, metavar="K", help="of each prompt, in each line")
    parser.add_argument("--quick", action="store_true", help="a few lines")
    parser.add_argument("--also", type=Setting.parsed, action="append", default=[],
                        metavar="GUIDANCE,STEPS,ETA[,RESCALE]", help="one more line")
    parser.add_argument("--run", type=Path, help="folder in which all is kept; goes on where it stopped")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="PNG of the shipped setting's pictures")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    settings = lines_of(load(None, options.sets), [*(QUICK if options.quick else GRID), *options.also])
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            session = session_of(options.run or Path(folder), setting, options.pictures, options.sets)
            lines.append(measured(session, setting, options.sheet if setting == settings[0] else None))
            print(f"{setting}: {lines[-1].seconds:.0f} s", flush=True)
    weights = session.rewarding(session.config.pair).weights
    reward = rewards(lines, {name: weight for name, weight in weights.items() if weight > 0})
    show(lines, reward, session.config.evaluate.interval)
    targets = peaks.Targets()
    check(targets, lines, reward, session.config.evaluate.interval)
    targets.end()


if __name__ == "__main__":
    main()
