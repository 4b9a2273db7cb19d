"""Drawing candidates with everything finetuning needs: our own DDIM loop over any denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fashiondpo_pipeline import diffusion
from fashiondpo_pipeline.diffusion import Schedule

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (b, c, h, w), t (b,), tokens (b, n, d)) -> prediction


@dataclass(frozen=True)
class Condition:
    """What steers a row: k guidance branches of tokens (k, b, n, d), mixed by weights (k,) that sum to one.

    Branch 0 is the fully conditioned one. With one branch there is no guidance and half the cost.
    """

    tokens: Tensor
    weights: Tensor

    def rows(self, keep: slice) -> "Condition":
        return Condition(self.tokens[:, keep], self.weights)


@dataclass(frozen=True)
class Trajectory:
    """b finished paths. x_0 (b, c, h, w); at the s saved steps x_t, x_prev (b, s, c, h, w), log_prob, error (b, s).

    log_prob: float64 nats, NaN where the step has no density. error: of the conditional prediction against the path's
    own x_0, the reference that finetuning caches.
    """

    x_0: Tensor
    x_t: Tensor | None = None
    x_prev: Tensor | None = None
    log_prob: Tensor | None = None
    error: Tensor | None = None


def predict(denoise: Denoise, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """(guided, conditional) predictions, each (b, c, h, w); every branch in one call of the denoiser."""
    k, b = condition.tokens.shape[:2]
    if k == 1:
        only = denoise(x_t, t, condition.tokens[0]).to(x_t.dtype)
        return only, only
    every = denoise(x_t.repeat(k, 1, 1, 1), t.repeat(k), condition.tokens.flatten(0, 1)).to(x_t.dtype)
    branches = every.unflatten(0, (k, b))  # (k, b, c, h, w)
    return diffusion.guide(branches, condition.weights), branches[0]


@torch.inference_mode()
def sample(
    denoise: Denoise,
    schedule: Schedule,
    condition: Condition,
    generators: list[torch.Generator],
    shape: tuple[int, int, int],
    *,
    eta: float,
    save: Sequence[int] = (),
    tile: int | None = None,
    device: torch.device | str = "cpu",
) -> Trajectory:
    """Walk from noise to x_0 for every generator; keep the path at the steps in `save`.

    shape: (c, h, w). Each generator gives first x_T, then each step's noise, as diffusers' pipelines draw them. `tile`: rows in
    each call of the denoiser, filled up to that number, so that how many rows come together never changes a number.
    Where a path is kept, the walk itself runs on fp16 values of x_t: what lies on disk is then the path, not a copy of it.
    """
    tile = tile or len(generators)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(generators), tile):
        rows = slice(start, start + tile)
        count = len(generators[rows])
        filled = _fill(condition.rows(rows), tile)
        part = _walk(denoise, schedule, filled, generators[rows], shape, eta, save, tile, device)
        parts.append({name: value[:count] for name, value in vars(part).items() if value is not None})
    return Trajectory(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _fill(condition: Condition, tile: int) -> Condition:
    missing = tile - condition.tokens.shape[1]
    if not missing:
        return condition
    last = condition.tokens[:, -1:].expand(-1, missing, -1, -1)
    return Condition(torch.cat([condition.tokens, last], 1), condition.weights)


def _walk(
    denoise: Denoise,
    schedule: Schedule,
    condition: Condition,
    generators: list[torch.Generator],
    shape: tuple[int, int, int],
    eta: float,
    save: Sequence[int],
    tile: int,
    device: torch.device | str,
) -> Trajectory:
    on_grid = _half_grid if save else lambda x: x
    x_t = on_grid(_noise(generators, shape, tile)).to(device)  # (b, c, h, w)
    kept: dict[str, list[Tensor]] = {"x_t": [], "x_prev": [], "log_prob": [], "conditional": []}
    for step, timestep in enumerate(schedule.timesteps.tolist()):
        t = torch.full((tile,), timestep, device=device)
        guided, conditional = predict(denoise, x_t, t, condition)
        mean = diffusion.ddim_mean(schedule, guided, x_t, t, eta)
        sigma = diffusion.ddim_sigma(schedule, t, eta)
        x_prev = mean
        if eta > 0:
            x_prev = mean + diffusion.wide(sigma, mean) * _noise(generators, shape, tile).to(device)
        x_prev = on_grid(x_prev)
        if step in save:
            kept["x_t"].append(x_t)
            kept["x_prev"].append(x_prev)
            kept["conditional"].append(conditional)
            kept["log_prob"].append(diffusion.log_prob(mean, sigma, x_prev))
        x_t = x_prev
    if not save:
        return Trajectory(x_t)
    error = [
        tracked_error(schedule, conditional, x_t, saved, torch.full((tile,), int(schedule.timesteps[step]), device=device))
        for step, saved, conditional in zip(save, kept["x_t"], kept["conditional"], strict=True)
    ]
    path = {name: torch.stack(kept[name], 1) for name in ("x_t", "x_prev", "log_prob")}
    return Trajectory(x_t, **path, error=torch.stack(error, 1))


def tracked_error(schedule: Schedule, prediction: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Squared error (b,) of a prediction at a saved x_t against the noise that connects it with its own x_0."""
    eps = diffusion.noise_between(schedule, x_0, x_t, t)
    return diffusion.squared_error(prediction, diffusion.target(schedule, x_0, eps, t))


def _noise(generators: list[torch.Generator], shape: tuple[int, int, int], rows: int) -> Tensor:
    """(rows, c, h, w) standard normal noise, a generator a row; rows without one are zero and thrown away."""
    drawn = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return torch.cat([drawn, drawn.new_zeros(rows - len(drawn), *shape)]) if rows > len(drawn) else drawn


def _half_grid(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)
