"""Preference losses as pure functions of per-candidate quantities and the pairs among them.

Shapes: n rows (candidates), s columns (timesteps or draws), p pairs that index rows. Each objective returns
(loss, margin), both (p, s) and unreduced; only the training loop takes a mean, so pairs are never blended before the sigmoid.
`margin` is the logit: above 0 the policy prefers the winner more than the reference does; at 0 the loss is ln 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """A loss and the per-candidate signal it is a function of."""

    loss: Callable[..., tuple[Tensor, Tensor]]
    signal: str  # "log_prob": of the step taken, mean over dimensions; "error": squared error of the prediction, mean


def _single(signal: Tensor) -> Tensor:
    """Half-precision signals as float32: beta times a small difference of them would overflow or vanish."""
    return signal.to(torch.promote_types(signal.dtype, torch.float32))


def diffusion_dpo(error: Tensor, ref_error: Tensor, winner: Tensor, loser: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO.  Wallace et al. 2023 (2311.12908), final loss: -ln sigma(-beta/2 [(e_w - ref_w) - (e_l - ref_l)]).

    error, ref_error: (n, s) squared errors averaged over dimensions, policy and reference at one x_t and one eps;
    beta takes in the number of timesteps: 2000 to 5000 for Stable Diffusion.

    >>> import torch; e = torch.tensor([[1.0], [1.0]]); first, second = torch.tensor([0]), torch.tensor([1])
    >>> diffusion_dpo(e, e, first, second, beta=2000.0)[0].item()      # the policy is the reference: ln 2
    0.6931471824645996
    """
    gain = _single(ref_error) - _single(error)
    margin = beta / 2 * (gain[winner] - gain[loser])
    return -F.logsigmoid(margin), margin


def step_dpo(
    log_prob: Tensor, ref_log_prob: Tensor, winner: Tensor, loser: Tensor, *, beta: float, ratio_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """DPO on each denoising step.  D3PO, Yang et al. 2024 (2311.13231), eq. 14: -ln sigma(beta [ratio_w - ratio_l]).

    log_prob, ref_log_prob: (n, s) ln p(x_prev | x_t) averaged over dimensions, so beta here is the paper's times the number of
    dimensions. ratio_clip: a candidate whose log-ratio went further than this in the wanted direction gives no more gradient;
    one that went the wrong way always does (PPO's one-sided clip; the published two-sided one lets losses drift).
    """
    ratio = _single(log_prob) - _single(ref_log_prob)
    up, down = ratio[winner], ratio[loser]
    if ratio_clip is not None:
        up, down = up.clamp(max=ratio_clip), down.clamp(min=-ratio_clip)
    margin = beta * (up - down)
    return -F.logsigmoid(margin), margin


DIFFUSION_DPO = Objective(diffusion_dpo, "error")
STEP_DPO = Objective(step_dpo, "log_prob")
