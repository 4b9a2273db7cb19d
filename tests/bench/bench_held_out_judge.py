"""A judge that no part of the embedded default has seen, on a finished run: other garments, another architecture, trained here.

    python tests/bench/bench_held_out_judge.py --images /usr/share/datasets/fashion-mnist --run runs/demo --rounds 3

The garments are Fashion-MNIST's official test pictures, which taught nothing in the default: most of them train a plain stack of
convolutions without shortcuts, as a classifier of category, colour, pattern and accent, and the last 1,500 measure it. It then looks at the
run's held-out pictures. Printed of every round, by the run's own judge and by the stranger: share right, best-of-n equivalent with the same
rewarded mix, and what was mended and broken. Targets: shares right within 3 points; each equivalent within the other's interval.
"""

import argparse
from pathlib import Path

import numpy as np
import peaks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fashiondpo_pipeline import claims, effect_size, statistics
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.demo.fitting import fit
from fashiondpo_pipeline.demo.garments import ATTRIBUTES, Wardrobe, generator, mirrored, parts, shifted, wardrobes
from fashiondpo_pipeline.effect_size import estimate
from stages import Session
from stages.evaluate import decoded, grid_of, mix_of, right_of

MEASURED = 1500  # test garments that the stranger is measured on


class Stranger(nn.Module):
    """A stack of convolutions with pooling between and one linear layer an attribute; pictures (b, 3, 64, 64) in [0, 1]."""

    def __init__(self, width: int = 24):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width, 6 * width):
            layers += [nn.Conv2d(channels, out, 5, padding=2), nn.GELU(), nn.GroupNorm(4, out), nn.MaxPool2d(2)]
            channels = out
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 192), nn.GELU(), nn.Dropout(0.2))
        self.heads = nn.ModuleList(nn.Linear(192, len(values)) for values in ATTRIBUTES.values())

    def forward(self, pictures: Tensor) -> list[Tensor]:
        seen = self.body(2 * pictures - 1)
        return [head(seen) for head in self.heads]


def taught(wardrobe: Wardrobe, steps: int, batch: int, seed: int, work: Path) -> Stranger:
    torch.manual_seed(seed)
    network = Stranger()

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "stranger", step)
        pictures, looks = wardrobe.draw(batch, key)
        said = network(mirrored(shifted(pictures, key, reach=3), key))
        return sum((F.cross_entropy(logits, wanted) for logits, wanted in zip(said, parts(looks), strict=True)), torch.zeros(()))

    fit(network, loss_of, steps=steps, rate=2e-3, checkpoint=work, every=60.0,
        tick=lambda step, steps, loss: print(f"\rstranger: step {step} of {steps}, loss {loss:.3f} ", end="", flush=True))
    print()
    return network


@torch.no_grad()
def opinion(network: Stranger, pictures: Tensor, looks: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(ln p of what was asked for, whether no other value is likelier) of pictures (b, 3, 64, 64); (b,) each."""
    said = [torch.cat(part) for part in zip(*(network(some) for some in pictures.split(250)), strict=True)]
    log_p = sum(logits.log_softmax(1).gather(1, wanted[:, None])[:, 0] for logits, wanted in zip(said, looks, strict=True))
    right = torch.stack([logits.argmax(1) == wanted for logits, wanted in zip(said, looks, strict=True)]).all(0)
    return log_p.double().numpy(), right.double().numpy()


def asked_for(rows: dict[str, dict], groups: list[str], k: int) -> list[Tensor]:
    """Number of each attribute's value that the prompts ask for, one a picture."""
    return [torch.tensor([list(values).index(rows[group][name]) for group in groups]).repeat_interleave(k) for name, values in ATTRIBUTES.items()]


def pictures_of(output, groups: list[str], k: int) -> Tensor:
    """Pictures of a draw, (g k, 3, 64, 64), by prompt and candidate."""
    table = output.table("candidates", ["group", "candidate", "picture"]).to_pylist()
    found = {(row["group"], row["candidate"]): decoded(row["picture"]["bytes"], row["group"]) for row in table}
    arrays = np.stack([found[group, n] for group in groups for n in range(k)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def size(mix: np.ndarray, score: dict[str, np.ndarray], right: dict[str, np.ndarray], coverage: float) -> dict:
    quality = effect_size.chosen_quality(mix, score["base"])
    best_of = effect_size.best_of(quality, statistics.row_means(score["after"]), coverage)
    return {"best_of": estimate(*best_of) | {"most": mix.shape[1]}, "right": effect_size.share_right(right, coverage)}


def told(name: str, found: dict) -> None:
    right = found["right"]
    print(f"  {name:9} right {100 * right['base']['value']:.1f} -> {100 * right['after']['value']:.1f} %, "
          f"{claims.with_interval(found['best_of'])}; {right['mended']} mended, {right['broken']} broken of {right['pictures']}", flush=True)


def inside(value: float | None, bounds: dict) -> bool:
    number = float("inf") if value is None else value
    return (bounds["low"] or 0.0) <= number <= (float("inf") if bounds["high"] is None else bounds["high"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--images", type=Path, default=where, help="folder with Fashion-MNIST's four idx .gz files")
    parser.add_argument("--run", type=Path, nargs="+", default=[Path("runs/demo")])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--work", type=Path, default=Path("stranger.pt"), help="the stranger's checkpoint; goes on from it")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="section.key=value", help="as the run was made")
    options = parser.parse_args()

    test = wardrobes(options.images, {}, 0)["test"]
    order = torch.randperm(len(test), generator=generator("stranger", "split"))
    pupil, measured = (Wardrobe(test.grey[rows], test.category[rows]) for rows in order.split([len(test) - MEASURED, MEASURED]))
    network = taught(pupil, options.steps, options.batch, 0, options.work)
    pictures, looks = measured.draw(MEASURED, generator("stranger", "test"))
    said = [logits.argmax(1) for logits in network(pictures)]
    shares = [float((one == wanted).float().mean()) for one, wanted in zip(said, parts(looks), strict=True)]
    accuracy = ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(ATTRIBUTES, shares, strict=True))
    print(f"the stranger on garments it has not seen: {accuracy}")

    targets = peaks.Targets()
    for folder in options.run:
        config = load(None, options.sets)
        session = Session(config, folder, say=lambda text: None)
        chain = session.chain(options.rounds)
        rows = {row["group"]: row for row in session.prompts["held-out"].rows}
        for number in range(1, options.rounds + 1):
            step = chain.rounds[number].evaluate
            draws = {role: session.output(step.inputs[role]) for role in ("base", "after")}
            judge, coverage = str(config.evaluate.judge), config.evaluate.interval
            out = session.output(step)
            asked = {role: [name for name in step.config["experts"] if f"{role}-score-{name}" in step.inputs] for role in draws}
            grids = {role: grid_of(out, role, names) for role, names in asked.items()}
            groups, k = grids["base"].groups.to_pylist(), grids["base"].k
            mix = mix_of(grids["base"], step.config)
            own = {role: grid.scores[judge] for role, grid in grids.items()}
            own_right = {role: right_of(out.input(f"{role}-score-{judge}"), grid, judge) for role, grid in grids.items()}
            wanted = asked_for(rows, groups, k)
            strange = {role: opinion(network, pictures_of(draws[role], groups, k), wanted) for role in draws}
            score, right = ({role: strange[role][place].reshape(len(groups), k) for role in draws} for place in (0, 1))
            found = {"own": size(mix, own, own_right, coverage), "stranger": size(mix, score, right, coverage)}
            print(f"{folder} round {number}")
            for name, one in found.items():
                told(name, one)
            gap = 100 * abs(found["own"]["right"]["after"]["value"] - found["stranger"]["right"]["after"]["value"])
            targets.check(f"{folder} round {number}: share right", f"{gap:.1f} points apart", "at most 3", gap <= 3)
            fits = inside(found["own"]["best_of"]["value"], found["stranger"]["best_of"])
            targets.check(f"{folder} round {number}: best of", claims.with_interval(found["stranger"]["best_of"]), "the judge's value in it", fits)
    targets.end()


if __name__ == "__main__":
    main()
