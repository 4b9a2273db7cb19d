"""Rectified flow: Euler's step of the ODE is diffusers' own, and the SDE is Flow-GRPO's, keeps the ODE's marginals and ends without noise."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import diffusion
from fashiondpo_pipeline.flow import Flow

SHAPE = (3, 2, 2)


def toy():
    """Two steps, from noise share 0.8 to 0.5 to 0."""
    return Flow(torch.tensor([0.8, 0.5, 0.0], dtype=torch.float64), torch.tensor([800.0, 500.0]))


def walk(steps, first=1.0):
    sigmas = torch.linspace(first, 0, steps + 1, dtype=torch.float64)
    return Flow(sigmas, (1000 * sigmas[:-1]).float())


def latents(rows, seed=0):
    return torch.randn(rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


# -- by hand


def test_a_step_without_chance_is_what_it_is_by_hand():
    """From x = 1 at 0.8 with velocity 2, down to 0.5: 1 + 2 (0.5 - 0.8) = 0.4."""
    assert toy().mean(one(2.0), one(1.0), torch.tensor([800.0]), 0.0).item() == pytest.approx(0.4, abs=1e-12)
    assert toy().std(torch.tensor([800.0]), 0.0).item() == 0


def test_a_step_with_chance_is_what_it_is_by_hand():
    """eta 0.5 at s = 0.8: w = 0.5 sqrt(0.8 / 0.2) = 1 and w^2 / 2s = 0.625; ds = -0.3.

    x (1 - 0.625 * 0.3) + v (1 + 0.625 * 0.2) (-0.3) = 0.8125 x - 0.3375 v, and the noise is sqrt(0.3).
    """
    t = torch.tensor([800.0])
    assert toy().mean(one(2.0), one(1.0), t, 0.5).item() == pytest.approx(0.8125 - 0.675, abs=1e-12)
    assert toy().std(t, 0.5).item() == pytest.approx(math.sqrt(0.3), abs=1e-12)
    assert toy().std(t, 1.0).item() == pytest.approx(2 * math.sqrt(0.3), abs=1e-12)


def test_the_last_step_takes_no_noise_and_is_the_odes():
    """Whatever eta: from 0.5 to 0, x - 0.5 v, which is x_0 where the velocity is exact."""
    t = torch.tensor([500.0])
    for eta in (0.0, 0.7, 1.0):
        assert toy().std(t, eta).item() == 0
        assert toy().mean(one(2.0), one(1.0), t, eta).item() == pytest.approx(0.0, abs=1e-12)


def test_at_pure_noise_the_pole_is_cut_to_the_second_noise_share():
    """Steps 1, 0.75, ...: w = eta sqrt(1 / (1 - 0.75)) = 2 eta, and the noise 2 eta sqrt(0.25) = eta."""
    assert walk(4).std(torch.tensor([1000.0]), 0.7).item() == pytest.approx(0.7, abs=1e-12)


def test_the_signal_and_the_noise_are_a_straight_line():
    """At t = 250 a quarter is noise: 0.75 * 4 + 0.25 * 8 = 5; the velocity is 8 - 4 = 4 everywhere."""
    t = torch.tensor([250.0])
    assert diffusion.add_noise(toy(), one(4.0), one(8.0), t).item() == 5
    assert diffusion.target(toy(), one(4.0), one(8.0), t).item() == 4
    assert [x.item() for x in diffusion.split(toy(), one(4.0), one(5.0), t)] == [4, 8]


def test_min_snr_weights_are_of_the_error_in_x_0():
    """At s = 0.5 and 0.2 the SNR is 1 and 16. The velocity's error is that of x_0 over s: at gamma 5, 1 * 0.25 and 5 * 0.04."""
    found = diffusion.min_snr_weight(toy(), torch.tensor([500.0, 200.0]), 5.0)
    assert found.tolist() == pytest.approx([0.25, 0.2], rel=1e-6)


def test_a_share_of_the_walk_lies_between_its_own_timesteps():
    """Its ends are 800, 500 and 0: a quarter of the walk is half-way from 800 to 500."""
    assert [toy().at_share(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [800, 650, 500, 250, 0]


# -- diffusers' scheduler


@pytest.mark.parametrize("steps", [1, 4, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_chance_every_step_is_diffusers_own(steps, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    ours = Flow(theirs.sigmas.double(), theirs.timesteps.float())
    x_t, velocity = latents(steps, 0).float(), latents(steps, 1).float()
    mean = ours.mean(velocity, x_t, ours.timesteps, 0.0)
    for i, timestep in enumerate(theirs.timesteps):
        row = slice(i, i + 1)
        assert torch.allclose(theirs.step(velocity[row], timestep, x_t[row]).prev_sample, mean[row], rtol=0, atol=1e-6)


def test_noise_is_mixed_as_diffusers_mixes_it():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(5)
    ours = Flow(theirs.sigmas.double(), theirs.timesteps.float())
    x_0, eps = latents(5, 0).float(), latents(5, 1).float()
    assert torch.allclose(diffusion.add_noise(ours, x_0, eps, ours.timesteps), theirs.scale_noise(x_0, theirs.timesteps, eps), atol=1e-6)


# -- properties


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_noise_velocity_and_picture_are_found_again(places, seed):
    ours = walk(5)
    t = ours.timesteps[places]
    x_0, eps = latents(len(t), seed), latents(len(t), seed + 1000)
    x_t = diffusion.add_noise(ours, x_0, eps, t)
    assert torch.allclose(diffusion.noise_between(ours, x_0, x_t, t), eps, rtol=0, atol=1e-9)
    found = diffusion.split(ours, diffusion.target(ours, x_0, eps, t), x_t, t)
    assert torch.allclose(found[0], x_0, rtol=0, atol=1e-9) and torch.allclose(found[1], eps, rtol=0, atol=1e-9)


def test_without_chance_and_with_a_perfect_velocity_every_step_stays_on_the_line():
    ours = walk(8)
    x_0, eps, t = latents(8, 0), latents(8, 1), ours.timesteps
    mean = ours.mean(eps - x_0, diffusion.add_noise(ours, x_0, eps, t), t, 0.0)
    wanted = diffusion.add_noise(ours, x_0, eps, 1000 * ours.sigmas[1:])
    assert torch.allclose(mean, wanted, rtol=0, atol=1e-6)


def test_sensitivity_is_how_fast_a_changed_velocity_makes_the_step_unlikely():
    ours = walk(5)
    t, x_t, velocity = ours.timesteps, latents(5, 0), latents(5, 1)
    mean, sigma = ours.mean(velocity, x_t, t, 0.7), ours.std(t, 0.7)
    lost = diffusion.log_prob(mean, sigma, mean) - diffusion.log_prob(ours.mean(velocity + 0.1, x_t, t, 0.7), sigma, mean)
    found = diffusion.sensitivity(ours, t, 0.7)
    assert torch.allclose(found[:-1] * 0.1**2 * x_t[0].numel(), lost[:-1], rtol=1e-9)
    assert torch.isinf(found[-1])


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_the_sde_keeps_the_marginals_of_the_ode(eta):
    """Pictures are N(2, 0.5^2), so every x_t is Normal too and the exact velocity is known: E[eps - x_0 | x_t].

    At noise share s: mean 2 (1 - s), variance V = (1 - s)^2 / 4 + s^2. In 400 small steps from s = 0.95, every marginal of the
    walk must be that one, and the last the pictures' own.
    """
    ours, count, middle, spread = walk(400, 0.95), 20_000, 2.0, 0.5
    random = torch.Generator().manual_seed(0)

    def marginal(s):
        return (1 - s) * middle, math.sqrt((1 - s) ** 2 * spread**2 + s**2)

    mean, deviation = marginal(0.95)
    x = mean + deviation * torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=random)
    for step, s in enumerate(ours.sigmas[:-1].tolist()):
        mean, deviation = marginal(s)
        away = (x - mean) / deviation**2
        velocity = s * away - (middle + (1 - s) * spread**2 * away)
        t = ours.timesteps[step : step + 1]
        x = ours.mean(velocity, x, t, eta) + ours.std(t, eta).reshape(-1, 1, 1, 1) * torch.randn(x.shape, dtype=torch.float64, generator=random)
        if step % 100 == 99:
            mean, deviation = marginal(float(ours.sigmas[step + 1]))
            assert x.mean().item() == pytest.approx(mean, abs=0.02)
            assert x.std().item() == pytest.approx(deviation, abs=0.02)
