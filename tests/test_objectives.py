"""The losses against numbers derived by hand, and what must hold for every objective in the registry."""

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fashiondpo_pipeline.objectives import diffusion_dpo, step_dpo
from fashiondpo_pipeline.registry import OBJECTIVES

FIRST, SECOND = torch.tensor([0]), torch.tensor([1])
NAMES = sorted(OBJECTIVES)
SIGNALS = st.lists(st.floats(-1e4, 1e4, width=16), min_size=2, max_size=2)

every_objective = pytest.mark.parametrize("name", NAMES)


def loss_of(name, beta=2.0):
    """The objective as a function of fits, where more is better whatever its signal is: (n, ...) -> loss, margin."""
    objective = OBJECTIVES.find(name)
    sign = 1 if objective.signal == "log_prob" else -1

    def loss(fit, reference, winner=FIRST, loser=SECOND):
        return objective.loss(sign * fit, sign * reference, winner, loser, beta=beta)

    return loss


def column(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


# -- by hand


def test_diffusion_dpo_is_what_it_is_by_hand():
    """The winner's error fell from 0.3 to 0.2, the loser's rose from 0.4 to 0.5: gains 0.1 and -0.1, 0.2 apart.

    With beta 4 the logit is 4/2 * 0.2 = 0.4, and -ln sigma(0.4) = ln(1 + e^-0.4) = 0.513015...
    """
    loss, margin = diffusion_dpo(column([0.2, 0.5]), column([0.3, 0.4]), FIRST, SECOND, beta=4.0)
    assert margin.item() == pytest.approx(0.4, abs=1e-12)
    assert loss.item() == pytest.approx(0.5130152523999526, abs=1e-12)


def test_diffusion_dpo_has_the_gradient_it_has_by_hand():
    """d loss/d margin = -sigma(-margin), and d margin/d error = -beta/2 for the winner, +beta/2 for the loser.

    At margin ln 3, sigma(-ln 3) = 1/(1 + 3) = 1/4; with beta 4 that is +-1/2: less error of the winner lowers the loss.
    """
    error = column([1.0, 1.0 + math.log(3) / 2]).requires_grad_()
    diffusion_dpo(error, column([1.0, 1.0]), FIRST, SECOND, beta=4.0)[0].sum().backward()
    assert error.grad.tolist() == pytest.approx([0.5, -0.5], abs=1e-12)


def test_step_dpo_is_what_it_is_by_hand():
    """The winner's step became twice as likely, the loser's half as likely: log-ratios ln 2 and -ln 2, ln 4 apart.

    With beta 1, sigma(ln 4) = 4/5 and the loss is ln(5/4).
    """
    loss, margin = step_dpo(column([math.log(2), 0.0]), column([0.0, math.log(2)]), FIRST, SECOND, beta=1.0)
    assert margin.item() == pytest.approx(math.log(4), abs=1e-12)
    assert loss.item() == pytest.approx(math.log(5 / 4), abs=1e-12)


def test_step_dpo_has_the_gradient_it_has_by_hand():
    """d loss/d margin = -sigma(-ln 4) = -1/5, and the margin rises with the winner's log-probability at rate beta = 1."""
    log_prob = column([math.log(2), 0.0]).requires_grad_()
    step_dpo(log_prob, column([0.0, math.log(2)]), FIRST, SECOND, beta=1.0)[0].sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([-0.2, 0.2], abs=1e-12)


def test_step_dpo_with_a_clip_is_what_it_is_by_hand():
    """Both log-ratios of the example above stop at ln 1.5: margin 2 ln 1.5 = ln 2.25, sigma = 9/13, loss ln(13/9)."""
    loss, margin = step_dpo(
        column([math.log(2), 0.0]), column([0.0, math.log(2)]), FIRST, SECOND, beta=1.0, ratio_clip=math.log(1.5)
    )
    assert margin.item() == pytest.approx(math.log(2.25), abs=1e-12)
    assert loss.item() == pytest.approx(math.log(13 / 9), abs=1e-12)


# -- the clip is one-sided


@given(st.floats(0.01, 2), st.floats(-10, 10), st.floats(-10, 10))
def test_the_clip_stops_only_who_went_too_far_the_right_way(clip, up, down):
    assume(up != clip and down != -clip)  # the corner has no derivative
    ratio = column([up, down]).requires_grad_()
    step_dpo(ratio, column([0.0, 0.0]), FIRST, SECOND, beta=0.1, ratio_clip=clip)[0].sum().backward()
    winner, loser = ratio.grad.tolist()
    assert winner == 0 if up > clip else winner < 0
    assert loser == 0 if down < -clip else loser > 0


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_the_clip_changes_nothing_within_it(up, down):
    values, zero = column([up, down]), column([0.0, 0.0])
    assert torch.equal(
        step_dpo(values, zero, FIRST, SECOND, beta=3.0, ratio_clip=1.0)[1], step_dpo(values, zero, FIRST, SECOND, beta=3.0)[1]
    )


def test_a_candidate_is_clipped_as_winner_and_still_pushed_as_loser():
    ratio = column([5.0, 0.0, 0.0]).requires_grad_()
    winner, loser = torch.tensor([0, 2]), torch.tensor([1, 0])  # candidate 0 wins once and loses once
    step_dpo(ratio, torch.zeros(3, dtype=torch.float64), winner, loser, beta=1.0, ratio_clip=1.0)[0].sum().backward()
    assert ratio.grad[0] > 0.9


# -- what holds for every objective


@every_objective
@given(SIGNALS, st.floats(1, 5000))
def test_equal_policy_and_reference_lose_log_two(name, values, beta):
    loss, margin = loss_of(name, beta)(column(values), column(values))
    assert margin.item() == 0
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


@every_objective
@given(SIGNALS, SIGNALS)
def test_swapping_winner_and_loser_flips_the_margin(name, policy, reference):
    loss = loss_of(name)
    policy, reference = column(policy), column(reference)
    (first, margin), (second, flipped) = loss(policy, reference), loss(policy, reference, SECOND, FIRST)
    assert torch.equal(margin, -flipped)
    # -ln sigma(m) + ln sigma(-m) = -m
    assert (first - second).item() == pytest.approx(-margin.item(), rel=1e-12, abs=1e-9)


@every_objective
@given(SIGNALS, SIGNALS)
def test_loss_and_gradient_are_finite_and_no_loss_is_below_zero(name, policy, reference):
    fit = column(policy, torch.float32).requires_grad_()
    loss, margin = loss_of(name, 5000.0)(fit, column(reference, torch.float32))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(margin).all() and torch.isfinite(fit.grad).all()
    assert (loss >= 0).all()


@every_objective
@given(SIGNALS, SIGNALS, st.floats(0, 100))
def test_a_better_winner_or_a_worse_loser_never_raises_the_loss(name, policy, reference, change):
    loss, reference = loss_of(name), column(reference)
    before = loss(column(policy), reference)[0]
    assert loss(column([policy[0] + change, policy[1]]), reference)[0] <= before
    assert loss(column([policy[0], policy[1] - change]), reference)[0] <= before


@every_objective
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=2))
def test_the_gradient_pulls_the_winner_up_and_the_loser_down(name, policy):
    fit = column(policy).requires_grad_()
    loss_of(name)(fit, column([0.0, 0.0]))[0].sum().backward()
    assert fit.grad[0] < 0 < fit.grad[1]
    assert fit.grad.sum().item() == pytest.approx(0, abs=1e-12)


@every_objective
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@given(SIGNALS, SIGNALS)
def test_half_precision_signals_lose_what_the_same_numbers_lose_in_single(name, half, policy, reference):
    loss = loss_of(name, 5000.0)
    policy, reference = column(policy, half), column(reference, half)
    for narrow, full in zip(loss(policy, reference), loss(policy.float(), reference.float()), strict=True):
        assert torch.isfinite(narrow).all()
        assert torch.equal(narrow, full)


@every_objective
def test_each_pair_keeps_its_own_loss(name):
    """Rows are candidates, columns are timesteps; nothing is averaged before the sigmoid."""
    random = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, 3, generator=random, dtype=torch.float64)
    winner, loser = torch.tensor([0, 0, 4, 2]), torch.tensor([1, 2, 3, 4])
    loss, margin = loss_of(name)(policy, reference, winner, loser)
    assert loss.shape == margin.shape == (4, 3)
    alone = partial(loss_of(name), winner=FIRST, loser=SECOND)
    for pair, both in enumerate(zip(winner.tolist(), loser.tolist(), strict=True)):
        for t in range(3):
            one = alone(policy[list(both), t], reference[list(both), t])
            assert one[0].item() == pytest.approx(loss[pair, t].item(), abs=1e-12)
