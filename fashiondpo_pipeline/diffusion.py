"""Diffusion as tensor maths: no models, no files.

Words and letters: latent x_t at timestep t · finished latent x_0 · noise eps · cumulative signal share alpha_bar ·
the latent after a step x_prev · prediction f (eps or v) · DDIM's noise share eta, its standard deviation sigma.
Every function takes one timestep per row, so that a training batch may mix them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON, V = "epsilon", "v_prediction"


@dataclass(frozen=True)
class Schedule:
    """A noise schedule walked in some number of steps.

    alpha_bar: (1000,) float64, signal share at each timestep. alpha_bar_end: signal share after the last step.
    timesteps: (steps,) int64, noisiest first. stride: timesteps between neighbours. prediction: "epsilon" or "v_prediction".
    """

    alpha_bar: Tensor
    alpha_bar_end: float
    timesteps: Tensor
    stride: int
    prediction: str

    def at(self, t: Tensor) -> Tensor:
        """alpha_bar at t, (b,)."""
        return self.alpha_bar.to(t.device)[t]

    def after(self, t: Tensor) -> Tensor:
        """alpha_bar where one step from t arrives, (b,)."""
        arrive = t - self.stride
        return torch.where(arrive >= 0, self.at(arrive.clamp(min=0)), torch.full_like(self.at(t), self.alpha_bar_end))


def wide(values: Tensor, like: Tensor) -> Tensor:
    """(b,) values shaped to multiply (b, ...) and in its type."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def add_noise(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.  Ho et al. 2020 (2006.11239), eq. 4."""
    a = schedule.at(t)
    return wide(a.sqrt(), x_0) * x_0 + wide((1 - a).sqrt(), x_0) * eps


def noise_between(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The eps for which `add_noise` takes x_0 to x_t: the noise that connects a saved latent with its own end."""
    a = schedule.at(t)
    return (x_t - wide(a.sqrt(), x_t) * x_0) / wide((1 - a).sqrt(), x_t)


def target(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """A perfect prediction: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.  Salimans & Ho 2022 (2202.00512)."""
    if schedule.prediction == EPSILON:
        return eps
    a = schedule.at(t)
    return wide(a.sqrt(), eps) * eps - wide((1 - a).sqrt(), eps) * x_0


def split(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, eps) that a prediction at x_t stands for."""
    a = schedule.at(t)
    signal, noise = wide(a.sqrt(), x_t), wide((1 - a).sqrt(), x_t)
    if schedule.prediction == EPSILON:
        return (x_t - noise * prediction) / signal, prediction
    return signal * x_t - noise * prediction, signal * prediction + noise * x_t


def ddim_sigma(schedule: Schedule, t: Tensor, eta: float) -> Tensor:
    """Standard deviation of one DDIM step, (b,) float64.  Song et al. 2021 (2010.02502), eq. 16."""
    a, a_prev = schedule.at(t), schedule.after(t)
    variance = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
    return eta * variance.clamp(min=0).sqrt()


def ddim_mean(schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor, eta: float) -> Tensor:
    """Mean of x_prev, (b, c, h, w).  Song et al. 2021 (2010.02502), eq. 12."""
    x_0, eps = split(schedule, prediction, x_t, t)
    a_prev, sigma = schedule.after(t), ddim_sigma(schedule, t, eta)
    return wide(a_prev.sqrt(), x_t) * x_0 + wide((1 - a_prev - sigma**2).clamp(min=0).sqrt(), x_t) * eps


def ddim_sensitivity(schedule: Schedule, t: Tensor, eta: float) -> Tensor:
    """How much a squared change of the prediction moves the step's log-probability, (b,) float64; infinite where sigma is 0.

    c^2 / (2 sigma^2), with c the slope of `ddim_mean` in the prediction. It differs a hundredfold between the steps of one
    walk: unweighted, the last step but one alone decides what training does.
    """
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    slope = ddim_mean(schedule, one, zero, t, eta) - ddim_mean(schedule, zero, zero, t, eta)
    return slope[:, 0] ** 2 / (2 * ddim_sigma(schedule, t, eta) ** 2)


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
    """Loss weight min(SNR, gamma)/SNR for eps, /(SNR + 1) for v, (b,).  Hang et al. 2023 (2303.09556)."""
    a = schedule.at(t)
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / (snr if schedule.prediction == EPSILON else snr + 1)


def guide(predictions: Tensor, weights: Tensor) -> Tensor:
    """Branches (k, b, c, h, w) under weights (k,) that sum to one: classifier-free guidance of any number of conditions."""
    return (predictions * weights.to(predictions).reshape(-1, 1, 1, 1, 1)).sum(0)
