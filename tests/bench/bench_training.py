"""Group-batched finetuning on the cached reference against the loop over pairs with a live reference, as peers write it.

The baseline takes one pair at a time: a policy forward of winner and loser, a reference forward of both with the adapter off,
loss, backward; gradients accumulate over the pairs of an optimiser step, as ours do. Both see the same pairs and timesteps.

    python tests/bench/bench_training.py
"""

import resource
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from fashiondpo_pipeline import adapters, diffusion
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.generators.text2img import Text2Image
from fashiondpo_pipeline.objectives import step_dpo
from fashiondpo_pipeline.sampling import predict, sample
from fashiondpo_pipeline.training import Group, Unit, accumulate

K, GROUPS, BETA, ETA = 8, 4, 3000.0, 1.0
PAIRS = [(w, loser) for w in range(K) for loser in range(w + 1, K)]  # all 28


def setup():
    torch.manual_seed(0)
    generator = Text2Image("embedded:fashion_mini/generator")
    schedule = generator.schedule(10)
    rows = [{"prompt": f"a {colour} dress"} for colour in ("red", "navy", "green", "black") for _ in range(K)]
    condition = generator.condition(rows, 1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(len(rows))]
    path = sample(generator.denoise, schedule, condition, generators, generator.latent_shape, eta=ETA, save=[2, 4, 6])
    adapters.attach(generator.denoiser, 8, 8.0, ["to_q", "to_k", "to_v", "to_out.0"], seed=0)
    return generator, schedule, condition, path


def log_prob(generator, schedule, condition, path, rows, columns):
    t = schedule.timesteps[[2, 4, 6]][columns]
    x_t, x_prev = path.x_t[rows, columns].clone(), path.x_prev[rows, columns].clone()
    condition = type(condition)(condition.tokens[:, rows].clone(), condition.weights)
    prediction, _ = predict(generator.denoise, x_t, t, condition)
    mean = diffusion.ddim_mean(schedule, prediction, x_t, t, ETA)
    return diffusion.log_prob(mean, diffusion.ddim_sigma(schedule, t, ETA), x_prev) / x_t[0].numel()


def ours(generator, schedule, condition, path) -> int:
    """One optimiser step's gradient; returns pairs times timesteps."""
    reference = path.log_prob.clone() / path.x_t[0, 0].numel()
    winner, loser = (np.array(side) for side in zip(*PAIRS, strict=True))
    groups = [Group(str(g), np.arange(g * K, (g + 1) * K), winner, loser) for g in range(GROUPS)]
    units = [Unit(group, column) for group in groups for column in range(3)]

    def signal(batch):
        rows, columns = torch.from_numpy(batch.rows), torch.from_numpy(batch.columns)
        return log_prob(generator, schedule, condition, path, rows, columns), reference[rows, columns]

    tally = accumulate(units, 64, signal, lambda *quantities: step_dpo(*quantities, beta=BETA), higher_is_better=True)
    return tally.pairs


def pair_loop(generator, schedule, condition, path) -> int:
    count = 0
    for g in range(GROUPS):
        for column in range(3):
            for winner, loser in PAIRS:
                rows, columns = torch.tensor([g * K + winner, g * K + loser]), torch.tensor([column, column])
                policy = log_prob(generator, schedule, condition, path, rows, columns)
                with torch.no_grad(), adapters.disabled(generator.denoiser):
                    reference = log_prob(generator, schedule, condition, path, rows, columns)
                ratio = policy - reference
                (-F.logsigmoid(BETA * (ratio[0] - ratio[1])) / (GROUPS * 3 * len(PAIRS))).backward()
                count += 1
    return count


def measure(which: str) -> None:
    things = setup()
    step = {"group": ours, "pairs": pair_loop}[which]
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(*things)
    repeats = 5 if which == "group" else 1
    started = time.monotonic()
    pairs = sum(step(*things) for _ in range(repeats))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    norm = sum(float(w.grad.square().sum()) for w in adapters.parameters(things[0].denoiser).values()) ** 0.5 / (repeats + 1)
    print(pairs / seconds, peak / 1e3, (peak - base) / 1e3, norm)


def main() -> None:
    locate("embedded:fashion_mini/generator")
    found = {}
    for which in ("pairs", "group"):  # a process each, so that peak memory is its own
        done = subprocess.run([sys.executable, __file__, which], capture_output=True, text=True, check=True)
        found[which] = [float(x) for x in done.stdout.split()]
    print(f"{'':28} {'pair-steps/s':>12} {'peak MB':>8} {'above setup MB':>15} {'gradient norm':>14}")
    for which, label in (("pairs", "pair loop, live reference"), ("group", "group batch, cached")):
        speed, peak, above, norm = found[which]
        print(f"{label:28} {speed:>12.0f} {peak:>8.0f} {above:>15.0f} {norm:>14.6g}")
    print(f"ratio {found['group'][0] / found['pairs'][0]:.1f}x, K = {K}, all {len(PAIRS)} pairs, {GROUPS} groups, 3 timesteps a step")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
