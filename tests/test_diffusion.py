"""Our batched diffusion maths against diffusers' DDIM scheduler at every timestep, and against numbers derived by hand."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import diffusion
from fashiondpo_pipeline.diffusion import EPSILON, Ddim, V
from fashiondpo_pipeline.generators.text2img import text2img

SHAPE = (3, 2, 2)
both_predictions = pytest.mark.parametrize("prediction", [EPSILON, V])


def scheduler(prediction=EPSILON, alpha_to_one=False, offset=1, steps=10, **more):
    """diffusers' own, as Stable Diffusion sets it up, with its table in float64 so that rounding hides nothing."""
    found = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=alpha_to_one, steps_offset=offset, prediction_type=prediction, **more,
    )
    found.set_timesteps(steps)
    found.alphas_cumprod = found.alphas_cumprod.double()
    found.final_alpha_cumprod = found.final_alpha_cumprod.double()
    return found


def schedule(theirs):
    return Ddim(
        alpha_bar=theirs.alphas_cumprod, alpha_bar_end=float(theirs.final_alpha_cumprod), timesteps=theirs.timesteps.long(),
        prediction=theirs.config.prediction_type,
    )


def toy(prediction=EPSILON, end=1.0):
    """Three timesteps whose square roots are plain: signal 0.8, 0.6, 0.28 and noise 0.6, 0.8, 0.96."""
    alpha_bar = torch.tensor([0.64, 0.36, 0.0784], dtype=torch.float64)
    return Ddim(alpha_bar, end, torch.tensor([2, 1, 0]), prediction)


def latents(rows, seed=0):
    return torch.randn(rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows_of(value, rows=1):
    return torch.full((rows, 1, 1, 1), value, dtype=torch.float64)


# -- diffusers' scheduler


@both_predictions
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [7, 10, 30, 50])  # 7 and 30 do not divide 1000
@pytest.mark.parametrize(("alpha_to_one", "offset"), [(False, 1), (True, 0), (True, 1), (False, 0)])
def test_a_step_and_its_density_are_diffusers_own_at_every_timestep(prediction, eta, steps, alpha_to_one, offset):
    """The whole walk is one batch of ours: row i is at timestep i, so mixed timesteps in a batch are checked by the way."""
    theirs = scheduler(prediction, alpha_to_one, offset, steps)
    ours = schedule(theirs)
    t = ours.timesteps
    x_t, predicted, noise = (latents(len(t), seed) for seed in range(3))
    mean, sigma = ours.mean(predicted, x_t, t, eta), ours.std(t, eta)
    x_prev = mean + diffusion.wide(sigma, mean) * noise
    density = diffusion.log_prob(mean, sigma, x_prev)
    for i, timestep in enumerate(t.tolist()):
        row = slice(i, i + 1)
        walk = {"eta": eta, "variance_noise": noise[row] if eta else None}
        wanted = theirs.step(predicted[row], timestep, x_t[row], **walk).prev_sample
        assert torch.allclose(wanted, x_prev[row], rtol=0, atol=1e-10)
        walk["variance_noise"] = torch.zeros_like(noise[row]) if eta else None
        their_mean = theirs.step(predicted[row], timestep, x_t[row], **walk).prev_sample
        their_sigma = eta * theirs._get_variance(timestep, timestep - 1000 // steps).sqrt()
        assert sigma[i].item() == pytest.approx(their_sigma.item(), abs=1e-12)
        if their_sigma > 0:
            wanted = torch.distributions.Normal(their_mean, their_sigma).log_prob(x_prev[row]).sum()
            assert density[i].item() == pytest.approx(wanted.item(), rel=1e-9)
        else:
            assert math.isnan(density[i])


@both_predictions
def test_single_precision_steps_agree_with_the_scheduler_as_it_comes(prediction):
    theirs = scheduler(prediction, steps=20)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = theirs.alphas_cumprod.float(), theirs.final_alpha_cumprod.float()
    ours = schedule(theirs)
    x_t, predicted, noise = (latents(20, seed).float() for seed in range(3))
    x_prev = ours.mean(predicted, x_t, ours.timesteps, 1.0)
    x_prev = x_prev + diffusion.wide(ours.std(ours.timesteps, 1.0), x_prev) * noise
    for i, timestep in enumerate(theirs.timesteps):
        row = slice(i, i + 1)
        wanted = theirs.step(predicted[row], timestep, x_t[row], eta=1.0, variance_noise=noise[row]).prev_sample
        assert torch.allclose(wanted, x_prev[row], rtol=1e-4, atol=1e-5)


def test_a_schedule_without_signal_at_the_end_walks_as_diffusers_does():
    """Zero terminal SNR (v prediction): alpha_bar is 0 at the noisiest timestep, and nothing may divide by it."""
    theirs = scheduler(V, True, 0, 10, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ours = schedule(theirs)
    x_t, predicted, noise = (latents(10, seed) for seed in range(3))
    x_prev = ours.mean(predicted, x_t, ours.timesteps, 1.0)
    x_prev = x_prev + diffusion.wide(ours.std(ours.timesteps, 1.0), x_prev) * noise
    for i, timestep in enumerate(theirs.timesteps):
        row = slice(i, i + 1)
        wanted = theirs.step(predicted[row], timestep, x_t[row], eta=1.0, variance_noise=noise[row]).prev_sample
        assert torch.allclose(wanted, x_prev[row], rtol=0, atol=1e-9)
    assert torch.isfinite(diffusion.min_snr_weight(ours, ours.timesteps, 5.0)).all()


@pytest.mark.parametrize("steps", [1, 7, 10, 30, 999])
def test_a_generators_schedule_is_its_schedulers(tiny_sd_v, steps):
    generator = text2img(str(tiny_sd_v))
    found = generator.schedule(steps)
    theirs = DDIMScheduler.from_pretrained(tiny_sd_v, subfolder="scheduler")
    theirs.set_timesteps(steps)
    assert found.timesteps.tolist() == theirs.timesteps.tolist()
    assert len(found.timesteps) == steps
    assert torch.equal(found.alpha_bar, theirs.alphas_cumprod.double())
    assert found.alpha_bar_end == theirs.final_alpha_cumprod.item()
    assert found.prediction == V


@both_predictions
def test_noise_and_target_are_diffusers_own(prediction):
    theirs = scheduler(prediction)
    ours = schedule(theirs)
    t = torch.tensor([0, 1, 500, 998, 999])
    x_0, eps = latents(5, 0), latents(5, 1)
    assert torch.allclose(diffusion.add_noise(ours, x_0, eps, t), theirs.add_noise(x_0, eps, t), rtol=0, atol=1e-12)
    wanted = eps if prediction == EPSILON else theirs.get_velocity(x_0, eps, t)
    assert torch.allclose(diffusion.target(ours, x_0, eps, t), wanted, rtol=0, atol=1e-12)


# -- by hand


def test_a_step_without_chance_is_what_it_is_by_hand():
    """From x_t = 1 at signal 0.6, noise 0.8 with eps 0.5: x_0 = (1 - 0.4)/0.6 = 1; then 0.8 * 1 + 0.6 * 0.5 = 1.1."""
    mean = toy().mean(rows_of(0.5), rows_of(1.0), torch.tensor([1]), 0.0)
    assert mean.item() == pytest.approx(1.1, abs=1e-12)


def test_a_step_with_chance_is_what_it_is_by_hand():
    """eta 1 from alpha_bar 0.36 to 0.64: variance 0.36/0.64 * (1 - 0.36/0.64) = 0.5625 * 0.4375 = 0.24609375.

    The mean's noise share is sqrt(1 - 0.64 - 0.24609375) = sqrt(0.11390625) = 0.3375: 0.8 + 0.3375 * 0.5 = 0.96875.
    """
    t = torch.tensor([1])
    assert toy().std(t, 1.0).item() == pytest.approx(math.sqrt(0.24609375), abs=1e-12)
    assert toy().std(t, 0.5).item() == pytest.approx(math.sqrt(0.24609375) / 2, abs=1e-12)
    assert toy().mean(rows_of(0.5), rows_of(1.0), t, 1.0).item() == pytest.approx(0.96875, abs=1e-12)


def test_a_v_prediction_is_split_as_by_hand():
    """x_t = 1 and v = 0.5 at signal 0.6, noise 0.8: x_0 = 0.6 - 0.4 = 0.2 and eps = 0.3 + 0.8 = 1.1."""
    x_0, eps = diffusion.split(toy(V), rows_of(0.5), rows_of(1.0), torch.tensor([1]))
    assert (x_0.item(), eps.item()) == pytest.approx((0.2, 1.1), abs=1e-12)


def test_log_prob_is_what_it_is_by_hand():
    """Four dimensions, each 2 away at sigma 2: 4 * (-1/2 - ln 2 - ln(2 pi)/2) = -8.448...."""
    mean = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    found = diffusion.log_prob(mean, torch.tensor([2.0]), mean + 2)
    assert found.item() == pytest.approx(4 * (-0.5 - math.log(2) - math.log(2 * math.pi) / 2), abs=1e-12)


def test_a_difference_of_log_probs_is_a_difference_of_distances():
    """What step_dpo trains on: ln p - ln q = (|x - q|^2 - |x - p|^2) / (2 sigma^2), kept to a millionth of a millionth."""
    x, p, q = latents(3, 0).float(), latents(3, 1).float(), latents(3, 2).float()
    sigma = torch.tensor([0.1, 0.5, 1.0])
    found = diffusion.log_prob(p, sigma, x) - diffusion.log_prob(q, sigma, x)
    apart = [(x.double() - mean.double()).flatten(1).square().sum(1) for mean in (q, p)]
    assert torch.allclose(found, (apart[0] - apart[1]) / (2 * sigma.double() ** 2), rtol=1e-9, atol=1e-9)


def test_min_snr_weights_are_what_they_are_by_hand():
    """alpha_bar 0.9, 0.5, 0.1 are SNR 9, 1, 1/9. At gamma 5: eps 5/9, 1, 1; v 5/10, 1/2, (1/9)/(10/9) = 1/10."""
    t = torch.arange(3)
    alpha_bar = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    for prediction, wanted in ((EPSILON, [5 / 9, 1, 1]), (V, [1 / 2, 1 / 2, 1 / 10])):
        found = diffusion.min_snr_weight(Ddim(alpha_bar, 1.0, t, prediction), t, 5.0)
        assert found.tolist() == pytest.approx(wanted, abs=1e-12)


@both_predictions
@given(st.floats(0.5, 20))
def test_min_snr_weights_are_shares(prediction, gamma):
    ours = schedule(scheduler(prediction))
    weights = diffusion.min_snr_weight(ours, torch.arange(1000), gamma)
    snr = ours.alpha_bar / (1 - ours.alpha_bar)
    assert (weights > 0).all() and (weights <= 1).all()
    # of the error in x_0 every timestep then counts min(SNR, gamma), whatever is predicted
    scale = snr if prediction == EPSILON else snr + 1
    assert torch.allclose(weights * scale, snr.clamp(max=gamma), rtol=1e-12, atol=0)


@both_predictions
def test_sensitivity_is_how_fast_a_changed_prediction_makes_the_step_unlikely(prediction):
    """At x_prev = mean the log-probability is at its peak; moving every dimension of the prediction by d lowers it by
    sensitivity * d^2 for each dimension. Where sigma is 0 a step is infinitely sensitive."""
    ours = schedule(scheduler(prediction, True, 0))
    t, x_t, predicted = ours.timesteps, latents(10, 0), latents(10, 1)
    mean, sigma = ours.mean(predicted, x_t, t, 1.0), ours.std(t, 1.0)
    moved = ours.mean(predicted + 0.1, x_t, t, 1.0)
    lost = diffusion.log_prob(mean, sigma, mean) - diffusion.log_prob(moved, sigma, mean)
    found = diffusion.sensitivity(ours, t, 1.0)
    assert torch.allclose(found[:-1] * 0.1**2 * x_t[0].numel(), lost[:-1], rtol=1e-9)
    assert torch.isinf(found[-1])


# -- identities


@both_predictions
@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.integers(0, 99))
def test_noise_between_finds_the_noise_that_was_added(prediction, timesteps, seed):
    ours = schedule(scheduler(prediction))
    t = torch.tensor(timesteps)
    x_0, eps = latents(len(t), seed), latents(len(t), seed + 1000)
    x_t = diffusion.add_noise(ours, x_0, eps, t)
    assert torch.allclose(diffusion.noise_between(ours, x_0, x_t, t), eps, rtol=0, atol=1e-9)


@both_predictions
@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.integers(0, 99))
def test_a_perfect_prediction_splits_into_what_was_mixed(prediction, timesteps, seed):
    ours = schedule(scheduler(prediction))
    t = torch.tensor(timesteps)
    x_0, eps = latents(len(t), seed), latents(len(t), seed + 1000)
    x_t = diffusion.add_noise(ours, x_0, eps, t)
    found = diffusion.split(ours, diffusion.target(ours, x_0, eps, t), x_t, t)
    assert torch.allclose(found[0], x_0, rtol=0, atol=1e-9)
    assert torch.allclose(found[1], eps, rtol=0, atol=1e-9)


def test_without_chance_and_with_a_perfect_prediction_every_step_stays_on_the_line():
    """At eta 0 the step from t lands on x_0 and eps mixed at the next timestep's shares."""
    ours = schedule(scheduler(steps=10))
    x_0, eps, t = latents(10, 0), latents(10, 1), ours.timesteps
    mean = ours.mean(eps, diffusion.add_noise(ours, x_0, eps, t), t, 0.0)
    a = ours.after(t)
    wanted = diffusion.wide(a.sqrt(), x_0) * x_0 + diffusion.wide((1 - a).sqrt(), x_0) * eps
    assert torch.allclose(mean, wanted, rtol=0, atol=1e-9)


def test_mixed_timesteps_in_a_batch_are_each_their_own():
    ours = schedule(scheduler(V, steps=50))
    t = ours.timesteps[[3, 49, 0, 20]]
    x_t, predicted = latents(4, 0), latents(4, 1)
    together = ours.mean(predicted, x_t, t, 1.0)
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.equal(together[row], ours.mean(predicted[row], x_t[row], t[row], 1.0))


def test_squared_error_is_a_mean_over_dimensions_of_each_row():
    first, second = rows_of(0.0, 2).expand(2, *SHAPE), torch.cat([rows_of(1.0), rows_of(3.0)]).expand(2, *SHAPE)
    assert diffusion.squared_error(first, second).tolist() == [1.0, 9.0]


def test_squared_error_of_half_precision_is_summed_in_single():
    zero, one = torch.zeros(1, 4, 64, 64, dtype=torch.float16), torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    assert diffusion.squared_error(one, zero).item() == 90_000.0  # above fp16's greatest number


def test_guidance_is_classifier_free_guidance():
    """With weights (s, 1 - s) of prompt and empty prompt: empty + s (prompt - empty).  Ho & Salimans 2022."""
    prompt, empty = latents(2, 0), latents(2, 1)
    found = diffusion.guide(torch.stack([prompt, empty]), torch.tensor([7.5, -6.5]))
    assert torch.allclose(found, empty + 7.5 * (prompt - empty), rtol=0, atol=1e-12)


def test_guidance_takes_any_number_of_branches():
    branches = torch.stack([latents(2, seed) for seed in range(4)])
    found = diffusion.guide(branches, torch.tensor([2.0, 1.0, 0.0, -2.0]))
    assert torch.allclose(found, 2 * branches[0] + branches[1] - 2 * branches[3], rtol=0, atol=1e-12)
