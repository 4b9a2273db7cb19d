"""Rectified flow: a straight line from x_0 to noise, walked as an ODE or as the SDE that has log-probabilities."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fashiondpo_pipeline.diffusion import FLOW, wide


@dataclass(frozen=True)
class Flow:
    """A flow model's walk in some number of steps: x_t = (1 - s) x_0 + s eps, with s the noise share.

    sigmas: (steps + 1,) float64, from near 1 down to 0. timesteps: (steps,) float32, what the denoiser is told, 1000 s.
    """

    sigmas: Tensor
    timesteps: Tensor
    prediction: str = FLOW

    def _now_and_next(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(s, s after one step), (b,) float64 each, of timesteps of this walk."""
        place = (t[:, None].float() == self.timesteps.to(t.device)[None]).int().argmax(1)
        sigmas = self.sigmas.to(t.device)
        return sigmas[place], sigmas[place + 1]

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - s, s).  Liu et al. 2022 (2209.03003), eq. 1, with noise at s = 1 as in Esser et al. 2024 (2403.03206)."""
        s = t.double() / 1000
        return 1 - s, s

    def _spread(self, t: Tensor, eta: float) -> Tensor:
        """eta sqrt(s / (1 - s)), the diffusion of the SDE, (b,); at s = 1 its pole is cut to the walk's second s.

        0 in the last step, whose noise nothing would take away again.
        """
        s, after = self._now_and_next(t)
        below = torch.where(s >= 1, self.sigmas[min(1, len(self.sigmas) - 1)].to(s), s)
        return torch.where(after > 0, eta * (s / (1 - below)).sqrt(), torch.zeros_like(s))

    def mean(self, prediction: Tensor, x_t: Tensor, t: Tensor, eta: float) -> Tensor:
        """Mean of x_prev, (b, c, h, w).  Flow-GRPO, Liu et al. 2025 (2505.05470), eq. 9; with eta 0 Euler's step of the ODE.

        x_t + [v + w^2 / (2 s) (x_t + (1 - s) v)] ds, with w = eta sqrt(s / (1 - s)) and ds < 0. eta is the paper's noise level a, 0.7 there.
        """
        s, after = self._now_and_next(t)
        pull = self._spread(t, eta) ** 2 / (2 * s)
        ds = after - s
        return wide(1 + pull * ds, x_t) * x_t + wide((1 + pull * (1 - s)) * ds, x_t) * prediction

    def std(self, t: Tensor, eta: float) -> Tensor:
        """w sqrt(-ds), (b,) float64.  Flow-GRPO (2505.05470), eq. 9."""
        s, after = self._now_and_next(t)
        return self._spread(t, eta) * (s - after).sqrt()

    def at_share(self, share: float) -> float:
        """Between the walk's own timesteps, so that a shifted schedule is trained on where it walks."""
        ends = [*self.timesteps.tolist(), 0.0]
        return float(np.float32(np.interp(share * (len(ends) - 1), range(len(ends)), ends)))
