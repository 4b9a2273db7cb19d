"""Sampling with every step saved against the bare denoiser forwards it needs, in one run.

    python tests/bench/bench_sampling.py            # target: the loop at most 15 % above the bare forwards
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.sampling import sample
from stages import Session

CANDIDATES, TILE, STEPS, REPEATS = 128, 32, 10, 5


def bare(generator, schedule, condition) -> None:
    """The same calls of the denoiser, and nothing else."""
    x = torch.randn(TILE, *generator.latent_shape)
    with torch.inference_mode():
        for start in range(0, CANDIDATES, TILE):
            tokens = condition.tokens[0, start : start + TILE]
            for t in schedule.timesteps.tolist():
                generator.denoise(x, torch.full((TILE,), t), tokens)


def loop(generator, schedule, condition) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(CANDIDATES)]
    sample(generator.denoise, schedule, condition, generators, generator.latent_shape, eta=1.0, save=list(range(STEPS)), tile=TILE)


def stage() -> None:
    """The whole stage: loop, decode, PNG, Parquet, manifest."""
    with tempfile.TemporaryDirectory() as folder:
        session = SESSION
        session.run.root = Path(folder)
        session.execute([CHAIN.rounds[1].sample])


SESSION = Session(load(None, ["prompts.most_train=16", f"sample.candidates={CANDIDATES // 16}"]), say=lambda text: None)
CHAIN = SESSION.chain(1)


def main() -> None:
    generator = SESSION.generator()
    schedule = generator.schedule(STEPS)
    condition = generator.condition(SESSION.prompts["train"].rows * (CANDIDATES // 16), 1.0)
    times: dict[str, list[float]] = {"bare forwards": [], "sampling loop, all saved": [], "whole stage": []}
    calls = {"bare forwards": lambda: bare(generator, schedule, condition),
             "sampling loop, all saved": lambda: loop(generator, schedule, condition), "whole stage": stage}
    for repeat in range(REPEATS + 1):  # in turn, so that a slow moment of the machine hits all three; the first is warm-up
        for name, call in calls.items():
            started = time.monotonic()
            call()
            if repeat:
                times[name].append(time.monotonic() - started)
    base = median(times["bare forwards"])
    print(f"{CANDIDATES} candidates, {STEPS} steps, tile {TILE}")
    for name, values in times.items():
        print(f"{name:26} {median(values):6.2f} s   {median(values) / base:5.2f} x")


if __name__ == "__main__":
    main()
