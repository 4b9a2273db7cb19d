"""Preference losses as pure functions of one evidence: what training knows of its candidates, and the pairs among them.

Shapes: n rows (candidates at one saved step or draw), p pairs that index rows, u units (one group at one column), m experts.
Each objective returns (values, margin): values unreduced, one for each pair, candidate or unit as its `per` says, 0 for those that
take no part; margin (p,). The training loop alone takes a mean, over what `per` counts in the whole optimiser step, and no value
looks beyond its own unit: so micro-batches of whole units change nothing.

beta means one thing everywhere: margin = beta * (gain of the winner - gain of the loser), in the unit of a logit. What a paper calls
beta but is something else is an option with a name of its own. Papers that write -beta * (error - ref_error) without the half have
half the beta used here, as gain = (ref_error - error) / 2. A number that is missing is NaN: such a row takes no part where it is
needed, and never is a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.later import Later

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:  # what an objective is and takes can be asked without
    torch, F = Later("torch"), Later("torch.nn.functional")


@dataclass(frozen=True)
class Evidence:
    """What training knows of n candidates (rows) at one saved step or draw each, and the p pairs among them.

    The policy's quantities (gain, error, prediction) carry gradients. `gain` has `scale` in it already; error, ref_error and
    predictions have not. Experts' scores are on a scale on which 1 is much, such as standard deviations.
    """

    gain: Tensor  # (n,) implicit reward without beta: ln p - ln p_ref of the step taken (mean), or (ref_error - error) / 2
    winner: Tensor  # (p,) int64 rows
    loser: Tensor  # (p,) int64 rows
    unit: Tensor  # (n,) int64, number of the unit each row belongs to, 0..u-1
    score: Tensor | None = None  # (n,) mixed normalised score, NaN where missing
    opinions: Tensor | None = None  # (n, m) each rewarded expert's score, NaN where missing
    error: Tensor | None = None  # (n,) squared error of the prediction, mean over dimensions
    ref_error: Tensor | None = None  # (n,)
    prediction: Tensor | None = None  # (n, c, h, w)
    ref_prediction: Tensor | None = None  # (n, c, h, w)
    wanted: Tensor | None = None  # (n, c, h, w) the target of the prediction
    scale: Tensor | None = None  # (n,) weight of each row's error (min-SNR), 1 where None
    slack: Tensor | None = None  # (p,) share of the loser's gradient that the winner guard lets through, 1 where None
    share: Tensor | None = None  # (p,) preference for the winner, 0.5 to 1, which the training loop weighs by; 1 where None
    log_ratio: Tensor | None = None  # (n,) ln p - ln p_ref of the step taken, nats, summed over dimensions; where it is known
    turned_slack: Tensor | None = None  # (p,) the slack of each pair turned round, where there are shares

    def turned(self) -> Evidence:
        """The same with every pair turned round."""
        share = None if self.share is None else 1 - self.share
        return replace(self, winner=self.loser, loser=self.winner, slack=self.turned_slack, turned_slack=self.slack, share=share)


@dataclass(frozen=True)
class Objective:
    """A loss, what its values count, what `gain` must be made of, and which other fields of the evidence it reads.

    heeds: which of "beta" and the winner guard's "slack" its gradient depends on; a knob that no objective heeds is refused.
    outright: a pair must have a winner outright; a share of votes is refused.
    by_order: it reads of scores their order alone, so that a ranking by people does.
    """

    loss: Callable[..., tuple[Tensor, Tensor]]
    per: Literal["pair", "candidate", "unit"]
    signal: Literal["either", "log_prob", "error"] = "either"
    needs: tuple[str, ...] = ()
    heeds: tuple[str, ...] = ("beta",)
    outright: bool = False
    by_order: bool = False


@dataclass(frozen=True)
class Term:
    """One objective of a mix, with its weight and options."""

    objective: Objective
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def signals_of(terms: list[Term], either: str) -> list[str]:
    """What the gains of these objectives are made of, the first term's first; `either` decides where an objective can take both."""
    return list(dict.fromkeys(either if term.objective.signal == "either" else term.objective.signal for term in terms))


# -- what the losses share


def _single(values: Tensor) -> Tensor:
    """Half-precision values as float32: beta times a small difference of them would overflow or vanish."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _given(evidence: Evidence, name: str) -> Tensor:
    """A field that the objective's `needs` names, in single precision at least."""
    value = getattr(evidence, name)
    assert value is not None, f"the objective needs Evidence.{name}, and it is missing"
    return _single(value)


def _eased(loser: Tensor, slack: Tensor | None) -> Tensor:
    """The loser's quantities (p,) with only `slack` of their gradient; the values stay."""
    if slack is None:
        return loser
    still = loser.detach()
    return still + slack.to(still.dtype) * (loser - still)


def _two_gains(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """The gains of winners and of losers, (p,) each, the latter under the winner guard."""
    gain = _single(evidence.gain)
    return gain[evidence.winner], _eased(gain[evidence.loser], evidence.slack)


def _margin(evidence: Evidence, beta: float) -> Tensor:
    """The logit of each pair, (p,): above 0 the policy prefers the winner more than the reference does."""
    up, down = _two_gains(evidence)
    return beta * (up - down)


def _weighted(values: Tensor, evidence: Evidence) -> Tensor:
    """Errors (n,) times the weight of their rows."""
    return values if evidence.scale is None else values * evidence.scale.to(values.dtype)


def _score_gap(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """How much higher the winner's score is, (p,), 0 where either is missing; and where neither is."""
    score = _given(evidence, "score")
    gap = score[evidence.winner] - score[evidence.loser]
    known = torch.isfinite(gap)
    return torch.where(known, gap, torch.zeros_like(gap)), known


def _part(values: Tensor, takes_part: Tensor) -> Tensor:
    """Values, 0 where one takes no part."""
    return torch.where(takes_part, values, torch.zeros_like(values))


def _units(evidence: Evidence) -> int:
    return int(evidence.unit.max()) + 1 if len(evidence.unit) else 0


def _sum_by_unit(values: Tensor, evidence: Evidence) -> Tensor:
    """Rows' values (n,) added up, (u,)."""
    return torch.zeros(_units(evidence), dtype=values.dtype, device=values.device).index_add(0, evidence.unit, values)


def _rivals(evidence: Evidence, known: Tensor) -> Tensor:
    """Which rows meet, (n, n): two different ones of one unit, both known."""
    same = evidence.unit[:, None] == evidence.unit[None, :]
    return same & known[:, None] & known[None, :] & ~torch.eye(len(known), dtype=torch.bool, device=known.device)


def _standard(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """Scores in standard deviations from their unit's mean, (n,), 0 where missing or all alike; and where known.

    >>> import torch; nobody = torch.empty(0, dtype=torch.int64)
    >>> _standard(Evidence(torch.zeros(3), nobody, nobody, torch.zeros(3, dtype=torch.int64), score=torch.tensor([1.0, 3.0, torch.nan])))[0].tolist()
    [-1.0, 1.0, 0.0]
    """
    score = _given(evidence, "score")
    known = torch.isfinite(score)
    score = _part(score, known)
    count = _sum_by_unit(known.to(score.dtype), evidence).clamp(min=1)  # (u,)
    mean = (_sum_by_unit(score, evidence) / count)[evidence.unit]  # (n,)
    off = _part(score - mean, known)
    deviation = (_sum_by_unit(off**2, evidence) / count).sqrt()[evidence.unit]
    spread = deviation > 1e-6 * (1 + mean.abs())  # less than this is rounding
    return _part(off / torch.where(spread, deviation, torch.ones_like(deviation)), spread), known


def _pixels(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return values.flatten(1).mean(1)


def _checked(name: str, value: float, fits: bool, wanted: str) -> float:
    if not fits:
        raise UserError(f"finetune: the objective's option {name} should be {wanted}, not {value:g}; change it in the configuration")
    return value


def winner_guard(prediction: Tensor, wanted: Tensor, winner: Tensor, loser: Tensor, mu: float) -> Tensor:
    """The share of each loser's gradient that leaves its winner no worse, (p,) in 0..1.  Diffusion-SDPO, Fu et al. 2025 (2511.03317).

    g = 2 (prediction - wanted) / dimensions is the gradient of an error in its prediction. Where <g_l, g_w> > 0 the share is
    (1 - mu) |g_w|^2 / <g_l, g_w>, at most 1; elsewhere 1. Then to first order the winner's error falls by at least mu |g_w|^2 a step.
    mu: 0.9 for Stable Diffusion 1.5, 0.6 for SDXL. The authors' code takes one share for a whole batch; here each pair has its own.
    prediction, wanted: (n, c, h, w).
    """
    _checked("mu", mu, 0 <= mu <= 1, "from 0 to 1")
    off = (_single(prediction.detach()) - _single(wanted.detach())).flatten(1)  # (n, d)
    up, down = off[winner], off[loser]  # (p, d)
    square, along = (up * up).mean(1), (up * down).mean(1)  # the factor 2/d cancels
    against = along > 0
    share = (1 - mu) * square / torch.where(against, along, torch.ones_like(along))
    return torch.where(against, share.clamp(max=1), torch.ones_like(share))


# -- one value a pair


def diffusion_dpo(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO.  Wallace et al. 2023 (2311.12908), final loss: -ln sigma(-beta/2 [(e_w - ref_w) - (e_l - ref_l)]).

    The half is in `gain`; beta takes in the number of timesteps: 2000 to 5000 for Stable Diffusion.

    >>> import torch; zero = torch.zeros(2)
    >>> diffusion_dpo(Evidence(zero, torch.tensor([0]), torch.tensor([1]), zero.long()), beta=2000.0)[0].item()  # policy = reference: ln 2
    0.6931471824645996
    """
    margin = _margin(evidence, beta)
    return -F.logsigmoid(margin), margin


def step_dpo(evidence: Evidence, *, beta: float, ratio_clip: float | None = None) -> tuple[Tensor, Tensor]:
    """DPO on each denoising step.  D3PO, Yang et al. 2024 (2311.13231), eq. 14: -ln sigma(beta [ratio_w - ratio_l]).

    gain: ln p - ln p_ref of x_prev given x_t, averaged over dimensions, so beta here is the paper's times the number of
    dimensions. ratio_clip: a candidate whose log-ratio went further than this in the wanted direction gives no more gradient;
    one that went the wrong way always does (PPO's one-sided clip; the published two-sided one lets losses drift).
    """
    up, down = _two_gains(evidence)
    margin = beta * (up - down)
    if ratio_clip is None:
        return -F.logsigmoid(margin), margin
    return -F.logsigmoid(beta * (up.clamp(max=ratio_clip) - down.clamp(min=-ratio_clip))), margin


def ipo(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """IPO, times beta^2.  Azar et al. 2023 (2310.12036), eq. 17: beta^2 (h - 1/(2 beta))^2 = (margin - 1/2)^2.

    The paper's tau is beta. The factor makes its gradient comparable with the others': margins are drawn to 1/2, not to infinity.
    """
    margin = _margin(evidence, beta)
    return (margin - 0.5) ** 2, margin


def hinge(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """Hinge loss on the margin, max(0, 1 - margin).  RSO, Liu et al. 2023 (2309.06657), after SLiC (2305.10425)."""
    margin = _margin(evidence, beta)
    return (1 - margin).clamp(min=0), margin


def cdpo(evidence: Evidence, *, beta: float, label_smoothing: float = 0.1) -> tuple[Tensor, Tensor]:
    """DPO that believes a share of the labels is wrong: -(1 - e) ln sigma(z) - e ln sigma(-z).  "Conservative DPO", Mitchell 2023.

    label_smoothing: e, the share of wrong labels, 0 to below 0.5. The loss is least at margin ln((1 - e)/e), not at infinity.
    """
    e = _checked("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "from 0 to below 0.5")
    margin = _margin(evidence, beta)
    return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin), margin


def robust_dpo(evidence: Evidence, *, beta: float, label_smoothing: float = 0.1) -> tuple[Tensor, Tensor]:
    """DPO without the bias of wrong labels.  Chowdhury et al. 2024 (2403.00409): [-(1 - e) ln sigma(z) + e ln sigma(-z)] / (1 - 2e).

    Its mean over labels of which a share e (label_smoothing, 0 to below 0.5) is flipped is what DPO would lose on the true ones.
    """
    e = _checked("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "from 0 to below 0.5")
    margin = _margin(evidence, beta)
    return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e), margin


def soft_dpo(evidence: Evidence, *, beta: float, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """DPO on a Bradley-Terry probability.  MMPO, Kim et al. 2024 (2410.03145): -p ln sigma(z) - (1 - p) ln sigma(-z).

    p = sigma((score_w - score_l) / tau): a near tie asks for a small margin, not for an infinite one. Which of the two is called
    the winner no longer matters. tau: temperature in the unit of the scores.
    """
    _checked("tau", tau, tau > 0, "above 0")
    gap, known = _score_gap(evidence)
    margin = _margin(evidence, beta)
    p = torch.sigmoid(gap / tau)
    return _part(-p * F.logsigmoid(margin) - (1 - p) * F.logsigmoid(-margin), known), margin


def margin_dpo(evidence: Evidence, *, beta: float, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """DPO with an offset: -ln sigma(z - alpha (score_w - score_l)).  ODPO, Amini et al. 2024 (2402.10571), f the identity.

    The better the winner, the wider the margin that is asked for. alpha: logits asked for by one unit of score.
    """
    _checked("alpha", alpha, alpha >= 0, "0 or more")
    gap, known = _score_gap(evidence)
    margin = _margin(evidence, beta)
    return _part(-F.logsigmoid(margin - alpha * gap), known), margin


def sft(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """The winner's error itself: supervised finetuning on winners, with no reference; to be mixed with a preference loss."""
    error = _weighted(_given(evidence, "error"), evidence)
    return error[evidence.winner], _margin(evidence, beta)


def winner_rise(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """How far the winner has become less likely than under the reference, beta max(0, -gain_w); to be mixed with a preference loss.

    The penalty of DPOP, Pal et al. 2024 (2402.13228), added to the loss instead of standing inside its sigmoid.
    """
    up, _ = _two_gains(evidence)
    return beta * (-up).clamp(min=0), _margin(evidence, beta)


def _link(x: Tensor) -> Tensor:
    """x / (e^x - 1), which falls from 1 at 0 to 0, without overflow."""
    small = x.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(x), x)
    decay = torch.exp(-safe.abs())
    ratio = safe.abs() / -torch.expm1(-safe.abs())  # |x| / (1 - e^-|x|)
    return torch.where(small, 1 - x / 2 + x * x / 12, ratio * torch.where(safe > 0, decay, torch.ones_like(decay)))


def mapo(evidence: Evidence, *, beta: float, weight: float = 0.1, snr: float = 0.5, timesteps: float = 1000.0) -> tuple[Tensor, Tensor]:
    """MaPO, which needs no reference.  Hong et al. 2024 (2406.06424), authors' code: e_w - weight ln sigma(T [o(e_w) - o(e_l)]).

    o(e) = s e / (exp(s e) - 1), with s = snr and T = timesteps, the scheduler's. weight is the authors' beta, 0.1. The winner's own
    error is in the loss, so that it cannot collapse. beta only scales the margin that is returned.
    """
    _checked("snr", snr, snr > 0, "above 0")
    error = _weighted(_given(evidence, "error"), evidence)
    up, down = error[evidence.winner], _eased(error[evidence.loser], evidence.slack)
    odds = _link(snr * up) - _link(snr * down)
    return up - weight * F.logsigmoid(timesteps * odds), _margin(evidence, beta)


def dspo(evidence: Evidence, *, beta: float, pull: float = 0.01) -> tuple[Tensor, Tensor]:
    """DSPO: |(f_w - y_w) - pull sigma(-z) (f_w - ref_w)|^2.  Zhu, Xiao & Honavar, ICLR 2025, authors' code for Stable Diffusion 1.5.

    A pretraining loss on winners whose target is moved beyond y by how far the policy has come from the reference, as long as it does
    not yet tell the pair apart. The authors use one number, 0.001 to 0.05, for pull and for z's beta, which leaves sigma(-z) at 1/2;
    here it is a weight through which no gradient runs. At pull 1 the target would flip to the other side.
    """
    _checked("pull", pull, 0 <= pull < 1, "from 0 to below 1")
    margin = _margin(evidence, beta)
    prediction, reference, wanted = (_given(evidence, name)[evidence.winner] for name in ("prediction", "ref_prediction", "wanted"))
    weight = torch.sigmoid(-margin.detach()).reshape(-1, *[1] * (prediction.ndim - 1))  # (p, 1, 1, 1)
    residual = (prediction - wanted) - pull * weight * (prediction - reference)
    values = _pixels(residual**2)
    return values if evidence.scale is None else values * evidence.scale[evidence.winner].to(values.dtype), margin


def capo(evidence: Evidence, *, beta: float, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """CaPO: ((R_w - R_l) - z)^2, regression on calibrated win rates.  Lee et al. 2025 (2502.02588).

    R_i = mean over the others j of the unit of sigma((s_i - s_j) / temperature), averaged over experts: the expected win rate, 0..1.
    The opinions are logits: raw scores where pairs are made with `normalise: winrate`, else standard deviations. The paper's
    temperature is 1; its weight of timesteps is left out. Margins are drawn to at most 1.
    """
    _checked("temperature", temperature, temperature > 0, "above 0")
    opinions = _given(evidence, "opinions")  # (n, m)
    known = torch.isfinite(opinions).all(1)
    opinions = torch.where(known[:, None], opinions, torch.zeros_like(opinions))
    rivals = _rivals(evidence, known)
    beats = torch.sigmoid((opinions[:, None] - opinions[None]) / temperature).mean(2)  # (n, n)
    rate = _part(beats, rivals).sum(1) / rivals.sum(1).clamp(min=1)  # (n,)
    margin = _margin(evidence, beta)
    wanted = rate[evidence.winner] - rate[evidence.loser]
    return _part((wanted - margin) ** 2, known[evidence.winner] & known[evidence.loser]), margin


# -- one value a candidate


def anchor(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """Squared distance of the policy's prediction from the reference's, mean over dimensions; to be mixed with a preference loss.

    For Gaussian steps this is the Kullback-Leibler divergence of the two steps, but for a factor that depends on the timestep.
    """
    off = _given(evidence, "prediction") - _given(evidence, "ref_prediction")
    return _weighted(_pixels(off**2), evidence), _margin(evidence, beta)


def kto(evidence: Evidence, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0) -> tuple[Tensor, Tensor]:
    """Diffusion-KTO: weight (1 - sigma(+-beta [gain - kl])).  Li et al. 2024 (2404.04465), the authors' sigmoid utility.

    A candidate is desirable (+) if it wins more of its pairs than it loses, undesirable (-) if fewer, and takes no part otherwise.
    kl = max(0, mean gain), without gradient. The authors take that mean over the batch, which makes the loss depend on what it is
    batched with; here it is over the candidate's own unit, so that accumulation changes nothing.
    """
    gain = _single(evidence.gain)
    one = torch.ones(len(evidence.winner), dtype=gain.dtype, device=gain.device)
    sign = torch.zeros_like(gain).index_add(0, evidence.winner, one).index_add(0, evidence.loser, -one).sign()  # (n,)
    still = gain.detach()
    mean = _sum_by_unit(still, evidence) / _sum_by_unit(torch.ones_like(still), evidence).clamp(min=1)
    logit = beta * sign * (gain - mean.clamp(min=0)[evidence.unit])
    weight = torch.where(sign > 0, desirable, undesirable).to(gain.dtype)
    return _part(weight * torch.sigmoid(-logit), sign != 0), _margin(evidence, beta)


def nft(evidence: Evidence, *, beta: float, strength: float = 1.0, clip: float = 5.0) -> tuple[Tensor, Tensor]:
    """DiffusionNFT: a good candidate draws the policy, a bad one its mirror image.  Zheng et al. 2025 (2509.16117), authors' code.

    f+ = b f + (1 - b) f_ref and f- = (1 + b) f_ref - b f, with b = strength (the authors' beta, 0.1 or 1); r = A / (2 clip) + 1/2 in
    0..1, where A is the score in standard deviations of its unit. Loss: clip/b [r |f+ - y|^2 / w+ + (1 - r) |f- - y|^2 / w-], each w
    the mean absolute deviation, without gradient. At f = f_ref the gradient is that of A |f - y|^2 / w, whatever b and clip.
    The authors measure distances at x_0, which weighs a step with the factor from the prediction to there (t for rectified flow), and
    add a KL term: both are left out (`anchor` is such a term). beta only scales the margin that is returned.
    """
    _checked("strength", strength, strength > 0, "above 0")
    _checked("clip", clip, clip > 0, "above 0")
    advantage, known = _standard(evidence)
    r = advantage.clamp(-clip, clip) / (2 * clip) + 0.5  # (n,)
    prediction, old, wanted = (_given(evidence, name) for name in ("prediction", "ref_prediction", "wanted"))

    def distance(mixed: Tensor) -> Tensor:
        off = mixed - wanted
        return _pixels(off**2) / _pixels(off.detach().abs()).clamp(min=1e-5)

    good, bad = distance(old + strength * (prediction - old)), distance(old - strength * (prediction - old))
    values = clip / strength * (r * good + (1 - r) * bad)
    return _part(_weighted(values, evidence), known), _margin(evidence, beta)


STEEP = 3.0  # ln of a ratio from which on it goes on as a straight line: what is beyond stays finite, and is pulled back


def grpo(evidence: Evidence, *, beta: float, clip: float = 0.2, most: float = 5.0) -> tuple[Tensor, Tensor]:
    """Group-relative advantages: -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A).  Flow-GRPO, Liu et al. 2025 (2505.05470), eq. 5.

    A: the score in standard deviations of its unit, within -most to most. ratio = exp(beta gain); the authors take the log-ratio's mean over
    dimensions and clip at 0.0001, which is beta 2000 and clip 0.2. On log-probabilities it is Flow-GRPO on the saved walk, with
    `step_weight: equal` evened out over steps as in GRPO-Guard (2510.22319), whose shift of the ratio's mean is left out. On errors of fresh
    noise it is Advantage Weighted Matching, Xue et al. 2025 (2509.25050). Their KL term is left out (`anchor` is such a term).
    """
    _checked("clip", clip, 0 < clip < 1, "above 0 and below 1")
    _checked("most", most, most > 0, "above 0")
    advantage, known = _standard(evidence)
    advantage = advantage.clamp(-most, most)
    log_ratio = beta * _single(evidence.gain)
    near = log_ratio.clamp(max=STEEP).exp()
    ratio = near + math.exp(STEEP) * (log_ratio - STEEP).clamp(min=0)
    return _part(-torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage), known), _margin(evidence, beta)


# -- one value a unit


def plackett_luce(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """Listwise DPO, Diffusion-LPO.  Bai et al. 2025 (2510.01540): -sum_j [r_j - ln sum of exp r_k over k ranked no better than j].

    r = beta gain; the ranking is the score's, over every candidate of the unit that has one, not over the pairs alone. Two
    candidates lose what diffusion_dpo loses. The paper has no ties; tied candidates stand in each other's sums (Breslow), so that no
    order is made up.
    """
    score = _given(evidence, "score")
    known = torch.isfinite(score)
    reward = beta * _single(evidence.gain)
    below = _rivals(evidence, known) & (score[None, :] <= score[:, None])
    below = below | torch.eye(len(score), dtype=torch.bool, device=score.device)
    rest = reward[None, :].expand(len(score), -1).masked_fill(~below, -torch.inf).logsumexp(1)  # (n,)
    return _sum_by_unit(_part(rest - reward, known), evidence), _margin(evidence, beta)


def rankdpo(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """RankDPO: DPO over every two of a unit, weighted as in LambdaRank.  Karthik et al. 2024 (2410.18013), eqs. 6 and 7, algorithm 1.

    phi_i: the share of comparisons that i wins, over all experts and rivals. Weight of i against j:
    |2^phi_i - 2^phi_j| |1/ln(1 + rank_i) - 1/ln(1 + rank_j)|, the ranks by phi from 1; equals share their mean rank and have weight 0
    against each other. Its pairs are its own: neither the rule's pairs nor the winner guard has a say.
    """
    opinions = _given(evidence, "opinions")  # (n, m)
    known = torch.isfinite(opinions).all(1)
    rivals = _rivals(evidence, known)
    beats = (opinions[:, None] > opinions[None]).to(opinions.dtype).mean(2)  # (n, n)
    phi = _part(beats, rivals).sum(1) / rivals.sum(1).clamp(min=1)  # (n,)
    above = phi[:, None] - phi[None, :] > 1e-6
    better, equal = (rivals & above.T).sum(1), (rivals & ~above & ~above.T).sum(1)
    discount = 1 / torch.log(2 + better.to(phi.dtype) + equal.to(phi.dtype) / 2)  # (n,) 1 / ln(1 + rank)
    weight = (2**phi[:, None] - 2**phi[None, :]).abs() * (discount[:, None] - discount[None, :]).abs()
    gain = _single(evidence.gain)
    lost = -F.logsigmoid(beta * (gain[:, None] - gain[None, :])) * weight.to(gain.dtype)  # (n, n)
    return _sum_by_unit(_part(lost, rivals & above).sum(1), evidence), _margin(evidence, beta)


def dgpo(evidence: Evidence, *, beta: float) -> tuple[Tensor, Tensor]:
    """DGPO: the better part of a group against the worse.  Luo et al. 2025 (2510.08425), eq. 17: -ln sigma(beta mean_i A_i gain_i).

    A_i: the score in standard deviations of its unit. The mean over the group instead of the sum is the authors' code's, whose
    gradient is this one's divided by beta. A unit with fewer than two scores takes no part.
    """
    advantage, known = _standard(evidence)
    count = _sum_by_unit(known.to(advantage.dtype), evidence)  # (u,)
    logit = beta * _sum_by_unit(advantage * _single(evidence.gain), evidence) / count.clamp(min=1)
    return _part(-F.logsigmoid(logit), count > 1), _margin(evidence, beta)


GUARDED = ("beta", "slack")

DIFFUSION_DPO = Objective(diffusion_dpo, "pair", "error", heeds=GUARDED)
STEP_DPO = Objective(step_dpo, "pair", "log_prob", heeds=GUARDED)
IPO = Objective(ipo, "pair", heeds=GUARDED)
HINGE = Objective(hinge, "pair", heeds=GUARDED)
CDPO = Objective(cdpo, "pair", heeds=GUARDED)
ROBUST_DPO = Objective(robust_dpo, "pair", heeds=GUARDED)
SOFT_DPO = Objective(soft_dpo, "pair", needs=("score",), heeds=GUARDED)
MARGIN_DPO = Objective(margin_dpo, "pair", needs=("score",), heeds=GUARDED)
SFT = Objective(sft, "pair", needs=("error",), heeds=())
WINNER_RISE = Objective(winner_rise, "pair")
MAPO = Objective(mapo, "pair", "error", needs=("error",), heeds=("slack",))
DSPO = Objective(dspo, "pair", "error", needs=("prediction", "ref_prediction", "wanted"))
CAPO = Objective(capo, "pair", needs=("opinions",), heeds=GUARDED)
ANCHOR = Objective(anchor, "candidate", needs=("prediction", "ref_prediction"), heeds=())
KTO = Objective(kto, "candidate", outright=True)  # a picture is good or bad to it
NFT = Objective(nft, "candidate", "error", needs=("score", "prediction", "ref_prediction", "wanted"), heeds=())
GRPO = Objective(grpo, "candidate", needs=("score",))
PLACKETT_LUCE = Objective(plackett_luce, "unit", needs=("score",), by_order=True)
RANKDPO = Objective(rankdpo, "unit", needs=("opinions",), by_order=True)
DGPO = Objective(dgpo, "unit", needs=("score",))

BUILTIN: dict[str, Objective] = {
    "diffusion_dpo": DIFFUSION_DPO,
    "step_dpo": STEP_DPO,
    "ipo": IPO,
    "hinge": HINGE,
    "cdpo": CDPO,
    "robust_dpo": ROBUST_DPO,
    "soft_dpo": SOFT_DPO,
    "margin_dpo": MARGIN_DPO,
    "sft": SFT,
    "winner_rise": WINNER_RISE,
    "mapo": MAPO,
    "dspo": DSPO,
    "capo": CAPO,
    "anchor": ANCHOR,
    "kto": KTO,
    "nft": NFT,
    "grpo": GRPO,
    "plackett_luce": PLACKETT_LUCE,
    "rankdpo": RANKDPO,
    "dgpo": DGPO,
}
