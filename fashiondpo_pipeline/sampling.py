"""Drawing candidates with everything finetuning needs: our own loop over any denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fashiondpo_pipeline import diffusion
from fashiondpo_pipeline.diffusion import Schedule

Parts = dict[str, Tensor]  # what the denoiser is told beside x_t and t, by name: tokens (b, n, d), pooled (b, d), ...
Denoise = Callable[[Tensor, Tensor, Parts], Tensor]  # (x_t (b, c, h, w), t (b,), parts) -> prediction (b, c, h, w)


@dataclass(frozen=True)
class Guidance:
    """How branches of a condition are mixed; stored with every candidate, so that the trainer cannot disagree with the sampler.

    scale: classifier-free guidance (Ho & Salimans 2022, 2207.12598), 1 is none. interval: the part of the walk in which it acts,
    from 0 (noise) to 1 (picture), outside it the conditional branch stands alone (Kynkaanniemi et al. 2024, 2404.07724).
    rescale: share of the spread that guidance adds which is taken back (Lin et al. 2024, 2305.08891); 0 none, usual 0.7.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def acts(self, timesteps: Tensor) -> tuple[float, float]:
        """(lowest, highest) timestep of the walk at which guidance acts."""
        last = max(len(timesteps) - 1, 1)
        inside = [float(t) for step, t in enumerate(timesteps) if self.interval[0] <= step / last <= self.interval[1]]
        return (min(inside), max(inside)) if inside else (0.0, -1.0)


@dataclass(frozen=True)
class Condition:
    """What steers b rows: k guidance branches of named parts (k, b, ...), mixed by weights (k,) that sum to one.

    Branch 0 is the fully conditioned one. With one branch there is no guidance and half the cost. acts: (lowest, highest)
    timestep at which the branches are mixed. rescale: as in `Guidance`.
    """

    parts: Parts
    weights: Tensor
    acts: tuple[float, float] = (0.0, float("inf"))
    rescale: float = 0.0

    @property
    def rows(self) -> int:
        return next(iter(self.parts.values())).shape[1]

    def branch(self, number: int) -> Parts:
        return {name: part[number] for name, part in self.parts.items()}

    def take(self, keep: slice) -> "Condition":
        return replace(self, parts={name: part[:, keep] for name, part in self.parts.items()})

    def filled(self, rows: int) -> "Condition":
        """With the last row repeated up to so many."""
        missing = rows - self.rows
        if not missing:
            return self
        return replace(self, parts={name: torch.cat([part, part[:, -1:].expand(-1, missing, *part.shape[2:])], 1)
                                    for name, part in self.parts.items()})

    def alone(self) -> "Condition":
        """The conditional branch by itself."""
        return Condition({name: part[:1] for name, part in self.parts.items()}, torch.ones_like(self.weights[:1]))

    def steered(self, guidance: Guidance, schedule: Schedule) -> "Condition":
        """Under this guidance's interval on this walk."""
        return self if guidance.interval == (0.0, 1.0) else replace(self, acts=guidance.acts(schedule.timesteps))

    @classmethod
    def cat(cls, conditions: list["Condition"]) -> "Condition":
        """Rows of several conditions of one kind."""
        parts = {name: torch.cat([c.parts[name] for c in conditions], 1) for name in conditions[0].parts}
        return replace(conditions[0], parts=parts)


@dataclass(frozen=True)
class Trajectory:
    """b finished paths. x_0 (b, c, h, w); at the s saved steps x_t, x_prev, prediction (b, s, c, h, w), log_prob, error (b, s).

    log_prob: float64 nats, NaN where the step has no density. error: of the conditional prediction against the path's
    own x_0, the reference that finetuning caches.
    """

    x_0: Tensor
    x_t: Tensor | None = None
    x_prev: Tensor | None = None
    log_prob: Tensor | None = None
    error: Tensor | None = None
    prediction: Tensor | None = None

    def cpu(self) -> "Trajectory":
        return Trajectory(**{name: value.cpu() for name, value in vars(self).items() if value is not None})


def predict(denoise: Denoise, x_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """(guided, conditional) predictions, each (b, c, h, w); every branch in one call of the denoiser.

    Where guidance acts on none of the rows the other branches are not computed.
    """
    k = len(condition.weights)
    acting = (t >= condition.acts[0]) & (t <= condition.acts[1])  # (b,)
    if k == 1 or not (condition.acts == Condition.acts or bool(acting.any())):
        only = denoise(x_t, t, condition.branch(0)).to(x_t.dtype)
        return only, only
    every = denoise(x_t.repeat(k, 1, 1, 1), t.repeat(k), {name: part.flatten(0, 1) for name, part in condition.parts.items()})
    branches = every.to(x_t.dtype).unflatten(0, (k, len(x_t)))  # (k, b, c, h, w)
    guided = diffusion.guide(branches, condition.weights)
    if condition.rescale:
        guided = diffusion.rescale(guided, branches[0], condition.rescale)
    if condition.acts != Condition.acts:
        guided = torch.where(acting[:, None, None, None], guided, branches[0])
    return guided, branches[0]


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
        filled = condition.take(rows).filled(tile)
        part = _walk(denoise, schedule, filled, generators[rows], shape, eta, save, tile, device)
        parts.append({name: value[:count] for name, value in vars(part).items() if value is not None})
    return Trajectory(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


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
        t = torch.full((tile,), timestep, device=device)  # whole numbers stay so: an int64 for diffusion, a float32 for flows
        guided, conditional = predict(denoise, x_t, t, condition)
        mean = schedule.mean(guided, x_t, t, eta)
        sigma = schedule.std(t, eta)
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
        tracked_error(schedule, conditional, x_t, saved, torch.full((tile,), schedule.timesteps[step].item(), device=device))
        for step, saved, conditional in zip(save, kept["x_t"], kept["conditional"], strict=True)
    ]
    path = {name: torch.stack(kept[name], 1) for name in ("x_t", "x_prev", "log_prob")}
    return Trajectory(x_t, **path, error=torch.stack(error, 1), prediction=torch.stack(kept["conditional"], 1))


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
