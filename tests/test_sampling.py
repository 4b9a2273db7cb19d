"""Our sampler draws what stock diffusers draws, never lets rows touch each other, and saves a path that can be recomputed."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from fashiondpo_pipeline import codecs, diffusion, seeds
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.sampling import Condition, Guidance, predict, sample, tracked_error
from fashiondpo_pipeline.tiles import tiled
from fashiondpo_pipeline.timesteps import in_window, saved_steps

PROMPTS = ["a red dress", "a navy boot", "a bag", "a green shirt", "a white coat"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tiny_sd, tiny_sd_v):
    return tiny_sd if request.param == "epsilon" else tiny_sd_v


@pytest.fixture(scope="module")
def generator(folder):
    return text2img(str(folder))


def draw(generator, rows, *, steps=4, guidance=1.0, **options):
    """A walk for some rows of ROWS, each under its own seed."""
    options = {"eta": 1.0, **options}
    condition = generator.condition([ROWS[row] for row in rows], Guidance(guidance))
    return sample(generator.denoise, generator.schedule(steps), condition, [seeds.generator("test", row) for row in rows],
                  generator.latent_shape, **options)


# -- the same pictures as stock diffusers


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_pictures_are_those_of_stock_stable_diffusion(folder, generator, eta, guidance):
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    rows = range(3)
    theirs = stock(
        [PROMPTS[row] for row in rows], generator=[seeds.generator("test", row) for row in rows], num_inference_steps=5,
        eta=eta, guidance_scale=guidance, output_type="np",
    ).images
    ours, sound = generator.decode(draw(generator, rows, steps=5, guidance=guidance, eta=eta, tile=3).x_0)
    assert sound.all()
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 2
    assert ours.std() > 5  # pictures, not a grey field that agrees with anything


def test_a_negative_prompt_is_stock_stable_diffusions(folder, generator):
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    theirs = stock("a bag", negative_prompt="ugly", generator=seeds.generator(1), num_inference_steps=3, guidance_scale=5.0,
                   output_type="np").images
    condition = generator.condition([{"prompt": "a bag"}], Guidance(5.0), "ugly")
    path = sample(generator.denoise, generator.schedule(3), condition, [seeds.generator(1)], generator.latent_shape, eta=0.0)
    assert np.abs(generator.decode(path.x_0)[0].astype(float) - theirs * 255).max() <= 2


# -- rows do not touch


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_row_depends_on_nothing_but_its_prompt_and_seed(generator, guidance):
    """Neighbours, number of rows, place in a tile: bit for bit the same path."""
    options = {"guidance": guidance, "tile": 3, "save": [0, 3]}
    straight = draw(generator, [0, 1, 2, 3, 4], **options)
    for order in ([4, 3, 2, 1, 0], [2], [3, 0], [1, 4, 3, 0]):
        other = draw(generator, order, **options)
        for name in ("x_0", "x_t", "x_prev", "log_prob", "error"):
            assert torch.equal(getattr(other, name), getattr(straight, name)[order]), name


def test_a_tile_is_always_full(generator):
    seen = []

    def denoise(x_t, t, parts):
        seen.append((len(x_t), len(t), len(parts["tokens"])))
        return generator.denoise(x_t, t, parts)

    sample(denoise, generator.schedule(2), generator.condition(ROWS, Guidance()), [seeds.generator(i) for i in range(5)],
           generator.latent_shape, eta=0.0, tile=4)
    assert seen == [(4, 4, 4)] * 4


def test_tiled_calls_are_full_and_their_padding_is_thrown_away():
    seen = []

    def double(rows):
        seen.append(len(rows))
        return rows * 2

    assert tiled(double, torch.arange(5.0), 2).tolist() == [0, 2, 4, 6, 8]
    assert seen == [2, 2, 2]


def test_saving_a_path_leaves_torchs_own_randomness_alone(generator):
    before = torch.random.get_rng_state()
    draw(generator, [0], save=[0])
    assert torch.equal(before, torch.random.get_rng_state())


# -- the saved path


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_saved_log_prob_and_error_can_be_recomputed_from_the_bytes_on_disk(generator, guidance):
    save, shape = [0, 2, 4], generator.latent_shape
    path = draw(generator, range(4), steps=5, guidance=guidance, save=save, tile=4)
    schedule, condition = generator.schedule(5), generator.condition(ROWS[:4], Guidance(guidance))
    on_disk = {name: [[codecs.encode_half(x) for x in row] for row in getattr(path, name)] for name in ("x_t", "x_prev")}
    x_0 = torch.tensor(codecs.decode_half([codecs.encode_half(x) for x in path.x_0], shape)).float()
    assert torch.equal(x_0, path.x_0)
    for column, step in enumerate(save):
        x_t, x_prev = (
            torch.tensor(codecs.decode_half([row[column] for row in on_disk[name]], shape)).float() for name in on_disk
        )
        t = schedule.timesteps[step].repeat(4)
        with torch.inference_mode():
            guided, conditional = predict(generator.denoise, x_t, t, condition)
        density = diffusion.log_prob(
            schedule.mean(guided, x_t, t, 1.0), schedule.std(t, 1.0), x_prev
        )
        assert torch.equal(density, path.log_prob[:, column])
        assert torch.equal(tracked_error(schedule, conditional, x_0, x_t, t), path.error[:, column])


def test_a_saved_path_hangs_together(generator):
    """What one step leaves is what the next begins with, and what the last leaves is x_0."""
    path = draw(generator, range(2), save=[0, 1, 2, 3])
    assert torch.equal(path.x_prev[:, :-1], path.x_t[:, 1:])
    assert torch.equal(path.x_prev[:, -1], path.x_0)


def test_keeping_fewer_steps_keeps_the_same_path(generator):
    every, some = draw(generator, range(3), save=[0, 1, 2, 3]), draw(generator, range(3), save=[1, 3])
    for name in ("x_t", "x_prev", "log_prob", "error"):
        assert torch.equal(getattr(every, name)[:, [1, 3]], getattr(some, name)), name
    assert torch.equal(every.x_0, some.x_0)


def test_a_step_taken_by_chance_is_a_likely_one(generator):
    """(x_prev - mean)/sigma is standard normal noise: its log-density is near -d/2 (1 + ln 2 pi) - d ln sigma."""
    path = draw(generator, range(5), steps=10, save=list(range(10)))
    schedule = generator.schedule(10)
    sigma = schedule.std(schedule.timesteps, 1.0)
    d = path.x_0[0].numel()
    likely = -d * (0.5 + 0.5 * np.log(2 * np.pi) + sigma.log())
    assert torch.allclose(path.log_prob[:, :-1], likely[:-1].expand(5, -1), rtol=0, atol=5 * (d / 2) ** 0.5)


def test_without_chance_there_is_no_density(generator):
    path = draw(generator, [0, 1], eta=0.0, save=[0, 3])
    assert torch.isnan(path.log_prob).all()
    assert torch.isfinite(path.error).all()


def test_the_last_step_has_no_density_where_it_ends_without_noise(generator):
    """With alpha_bar_end 1 the last DDIM step has no variance; its column is NaN and the others are not."""
    schedule = generator.schedule(4)
    ends_clean = type(schedule)(schedule.alpha_bar, 1.0, schedule.timesteps, schedule.prediction)
    path = sample(generator.denoise, ends_clean, generator.condition(ROWS[:1], Guidance()), [seeds.generator(0)],
                  generator.latent_shape, eta=1.0, save=[0, 1, 2, 3])
    assert torch.isfinite(path.log_prob).tolist() == [[True, True, True, False]]


def test_the_error_of_a_perfect_denoiser_is_zero(generator):
    schedule = generator.schedule(4)
    shape, t = generator.latent_shape, schedule.timesteps[[0, 2]]
    x_0, eps = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = diffusion.add_noise(schedule, x_0, eps, t)
    perfect = diffusion.target(schedule, x_0, eps, t)
    assert tracked_error(schedule, perfect, x_0, x_t, t).tolist() == pytest.approx([0, 0], abs=1e-20)


def test_both_branches_of_guidance_go_through_the_denoiser_in_one_call():
    """A denoiser that answers with its tokens: guided = 3 * 2 + (1 - 3) * 1 = 4, conditional = 2."""
    calls = []

    def denoise(x_t, t, parts):
        calls.append(len(x_t))
        return parts["tokens"].mean((1, 2)).reshape(-1, 1, 1, 1).expand_as(x_t)

    tokens = torch.stack([torch.full((5, 3, 2), 2.0), torch.full((5, 3, 2), 1.0)])
    x_t, t = torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    guided, conditional = predict(denoise, x_t, t, Condition({"tokens": tokens}, torch.tensor([3.0, -2.0])))
    assert calls == [10]
    assert guided.unique().tolist() == [4.0]
    assert conditional.unique().tolist() == [2.0]


# -- which steps are kept


@pytest.mark.parametrize(
    ("save", "steps", "kept"),
    [
        ("all", 4, [0, 1, 2, 3]),
        (1, 10, [0]),
        (2, 10, [0, 9]),
        (4, 10, [0, 3, 6, 9]),
        (10, 10, list(range(10))),
        (1, 1, [0]),
        ([8, 2, 8], 10, [2, 8]),
    ],
)
def test_saved_steps_are_all_a_count_or_a_list(save, steps, kept):
    assert saved_steps(save, steps) == kept


def test_a_count_of_saved_steps_is_kept_exactly():
    assert all(len(saved_steps(count, steps)) == count for steps in range(1, 60) for count in range(1, steps + 1))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (11, "sample.save: 11 steps cannot be kept of 10; lower it or raise sample.steps"),
        ([3, 10, 12], "sample.save: [10, 12] is not within the steps 0..9"),
        ([], "sample.save: an empty list is not within the steps 0..9"),
    ],
)
def test_steps_that_are_not_there_cannot_be_saved(save, message):
    with pytest.raises(UserError) as problem:
        saved_steps(save, 10)
    assert str(problem.value) == message


@pytest.mark.parametrize(
    ("kept", "steps", "window", "places"),
    [
        (list(range(10)), 10, [0.0, 1.0], list(range(10))),
        (list(range(10)), 10, [0.3, 0.9], [3, 4, 5, 6, 7, 8]),
        ([1, 4, 9], 10, [0.4, 0.5], [1]),
        ([0], 1, [0.0, 0.5], [0]),
    ],
)
def test_a_window_is_a_part_of_the_walk(kept, steps, window, places):
    assert in_window(kept, steps, window) == places


def test_a_window_without_a_saved_step_is_refused():
    with pytest.raises(UserError) as problem:
        in_window([0, 9], 10, [0.3, 0.9])
    assert str(problem.value) == "finetune.window [0.3, 0.9] holds none of the saved steps [0, 9] of 10: widen it, or save others"
