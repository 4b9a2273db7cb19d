"""Diffusion and flow as tensor maths: no models, no files.

Words and letters: latent x_t at timestep t · finished latent x_0 · noise eps · cumulative signal share alpha_bar ·
the latent after a step x_prev · prediction f (eps, v, or a flow's velocity) · noise share eta of a step, its standard deviation sigma.
Every function takes one timestep per row, so that a training batch may mix them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EPSILON, V, FLOW = "epsilon", "v_prediction", "flow"


class Schedule(Protocol):
    """A walk from noise to a picture: how much signal and noise x_t holds, and what one step does. Two kinds: `Ddim` and `flow.Flow`."""

    @property
    def timesteps(self) -> Tensor:
        """(steps,) what the denoiser is told, noisiest first."""
        ...

    @property
    def prediction(self) -> str: ...

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) with x_t = signal x_0 + noise eps, (b,) float64 each."""
        ...

    def mean(self, prediction: Tensor, x_t: Tensor, t: Tensor, eta: float) -> Tensor:
        """Mean of x_prev, (b, c, h, w)."""
        ...

    def std(self, t: Tensor, eta: float) -> Tensor:
        """Standard deviation of x_prev, (b,) float64; 0 where a step is deterministic."""
        ...

    def at_share(self, share: float) -> float:
        """The timestep at a share of the walk, from 0 (noise) to 1 (picture): what fresh noise is drawn at."""
        ...


@dataclass(frozen=True)
class Ddim:
    """A diffusion model's noise schedule walked by DDIM in some number of steps.

    alpha_bar: (1000,) float64, signal share at each timestep. alpha_bar_end: signal share after the last step.
    timesteps: (steps,) int64, noisiest first, evenly spaced or not. prediction: "epsilon" or "v_prediction".
    """

    alpha_bar: Tensor
    alpha_bar_end: float
    timesteps: Tensor
    prediction: str

    def at(self, t: Tensor) -> Tensor:
        """alpha_bar at t, (b,)."""
        return self.alpha_bar.to(t.device)[t]

    def after(self, t: Tensor) -> Tensor:
        """alpha_bar where one step from t arrives, (b,): at the timestep that the next step is told, or at the end.

        diffusers' own DDIM arrives at t - 1000 // steps, which is elsewhere where timesteps are not evenly spaced.
        """
        rising = self.timesteps.flip(0).to(t.device)
        place = torch.searchsorted(rising, t.to(rising.dtype)) - 1  # of the greatest timestep below t
        end = torch.full_like(self.at(t), self.alpha_bar_end)
        return torch.where(place >= 0, self.at(rising[place.clamp(min=0)]), end)

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)).  Ho et al. 2020 (2006.11239), eq. 4."""
        a = self.at(t)
        return a.sqrt(), (1 - a).sqrt()

    def std(self, t: Tensor, eta: float) -> Tensor:
        """sigma of one DDIM step, (b,) float64.  Song et al. 2021 (2010.02502), eq. 16."""
        a, a_prev = self.at(t), self.after(t)
        variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        return eta * variance.clamp(min=0).sqrt()

    def mean(self, prediction: Tensor, x_t: Tensor, t: Tensor, eta: float) -> Tensor:
        """Mean of x_prev, (b, c, h, w).  Song et al. 2021 (2010.02502), eq. 12."""
        x_0, eps = split(self, prediction, x_t, t)
        a_prev, sigma = self.after(t), self.std(t, eta)
        return wide(a_prev.sqrt(), x_t) * x_0 + wide((1 - a_prev - sigma**2).clamp(min=0).sqrt(), x_t) * eps

    def at_share(self, share: float) -> float:
        """Training timesteps, from the last (noise) to 0, evenly."""
        return min(int(len(self.alpha_bar) * (1 - share)), len(self.alpha_bar) - 1)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """(b,) values shaped to multiply (b, ...) and in its type."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = signal x_0 + noise eps."""
    signal, noise = schedule.shares(t)
    return wide(signal, x_0) * x_0 + wide(noise, x_0) * eps


def noise_between(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The eps for which `add_noise` takes x_0 to x_t: the noise that connects a saved latent with its own end."""
    signal, noise = schedule.shares(t)
    return (x_t - wide(signal, x_t) * x_0) / wide(noise, x_t)


def target(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """A perfect prediction: eps; v = signal eps - noise x_0 (Salimans & Ho 2022, 2202.00512); a flow's eps - x_0 (Liu et al. 2022, 2209.03003)."""
    if schedule.prediction == EPSILON:
        return eps
    if schedule.prediction == FLOW:
        return eps - x_0
    signal, noise = schedule.shares(t)
    return wide(signal, eps) * eps - wide(noise, eps) * x_0


def split(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, eps) that a prediction at x_t stands for."""
    shares = schedule.shares(t)
    signal, noise = wide(shares[0], x_t), wide(shares[1], x_t)
    if schedule.prediction == EPSILON:
        return (x_t - noise * prediction) / signal, prediction
    if schedule.prediction == FLOW:
        return x_t - noise * prediction, x_t + signal * prediction
    return signal * x_t - noise * prediction, signal * prediction + noise * x_t


def sensitivity(schedule: Schedule, t: Tensor, eta: float) -> Tensor:
    """How much a squared change of the prediction moves the step's log-probability, (b,) float64; infinite where sigma is 0.

    c^2 / (2 sigma^2), with c the slope of the step's mean in the prediction. It differs a hundredfold between the steps of one
    walk: unweighted, the last step but one alone decides what training does.
    """
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    slope = schedule.mean(one, zero, t, eta) - schedule.mean(zero, zero, t, eta)
    return slope[:, 0] ** 2 / (2 * schedule.std(t, eta) ** 2)


def log_prob(mean: Tensor, sigma: Tensor, x_prev: Tensor) -> Tensor:
    """ln of the Normal density of x_prev, summed over dimensions, (b,) float64 nats; NaN where sigma is 0 (no density).

    Summed in float64: the difference of two such sums is what training sees, and it is a millionth of either.
    """
    sigma = sigma.double()
    gap = (x_prev.double() - mean.double()).flatten(1).square().sum(1)
    size = x_prev[0].numel()
    density = -gap / (2 * sigma**2) - size * (sigma.log() + 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64)))
    return torch.where(sigma > 0, density, torch.full_like(density, torch.nan))


def squared_error(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each row over its dimensions, (b,) float32 at least."""
    return (prediction - wanted).flatten(1).to(torch.promote_types(prediction.dtype, torch.float32)).square().mean(1)


def min_snr_weight(schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """Loss weight min(SNR, gamma)/SNR for eps, /(SNR + 1) for v, (b,).  Hang et al. 2023 (2303.09556).

    A flow's velocity error is the x_0 error divided by noise^2, so its weight is min(SNR, gamma) noise^2.
    """
    signal, noise = schedule.shares(t)
    snr = signal**2 / noise**2
    if schedule.prediction == FLOW:
        return snr.clamp(max=gamma) * noise**2
    return snr.clamp(max=gamma) / (snr if schedule.prediction == EPSILON else snr + 1)


def guide(predictions: Tensor, weights: Tensor) -> Tensor:
    """Branches (k, b, c, h, w) under weights (k,) or (k, b) that sum to one: classifier-free guidance of any number of conditions."""
    weights = weights.to(predictions)
    return (predictions * (weights[:, None] if weights.ndim == 1 else weights)[..., None, None, None]).sum(0)


def rescale(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Guided predictions with part of their spread taken back to the conditional one's.  Lin et al. 2024 (2305.08891), eqs. 15, 16."""
    wanted, found = conditional.flatten(1).std(1), guided.flatten(1).std(1)
    return guided * wide(share * wanted / found + (1 - share), guided)
