"""Every family draws the pictures of its stock diffusers pipeline, row by row, guided in every way, and takes part in whole rounds."""

import contextlib
import gc
import json
import weakref

import families
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import PreTrainedModel
from whole_runs import folder_of, prepare, table, works

from fashiondpo_pipeline import adapters, seeds, testing
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.sampling import Condition, Guidance, predict, sample
from stages import finetune

pytestmark = pytest.mark.filterwarnings(families.QUIET)
PROMPTS = ["a red dress", "a navy boot", "a bag"]
ROWS = [{"prompt": prompt} for prompt in PROMPTS]
FAMILIES = ["sd", "sd v", "sdxl", "sd3", "sd3 without T5", "flux", "flux bare"]
GUIDED = ["sd", "sd v", "sdxl", "sd3", "sd3 without T5"]  # with branches; FLUX is told a number
SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_sd, tiny_sd_v, tiny_sdxl, tiny_sd3, tiny_flux):
    bare = testing.tiny_flux(tmp_path_factory.mktemp("models") / "flux_bare", guidance_embeds=False)
    without = testing.tiny_sd3(tmp_path_factory.mktemp("models") / "sd3_without_t5", t5=False)
    return {"sd": tiny_sd, "sd v": tiny_sd_v, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "sd3 without T5": without, "flux": tiny_flux, "flux bare": bare}


@pytest.fixture(scope="module")
def loaded(folders):
    """Family -> (our generator, the stock pipeline), each loaded once."""
    kept = {}

    def of(family):
        if family not in kept:
            left_out = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if family == "sd3 without T5" else {}
            stock = families.pipeline(folders[family], family.split()[0], **left_out)
            if family in ("sd", "sd v", "sdxl"):
                stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
            kept[family] = text2img(str(folders[family]), **SIZE), stock
        return kept[family]

    return of


def draw(generator, rows=(0, 1, 2), guidance=1.0, *, negative="", eta=0.0, steps=4, interval=(0.0, 1.0), rescale=0.0, **options):
    asked, schedule = Guidance(guidance, interval, rescale), generator.schedule(steps)
    condition = generator.condition([ROWS[row] for row in rows], asked, negative).steered(asked, schedule)
    return sample(options.pop("denoise", generator.denoise), schedule, condition, [seeds.generator("test", row) for row in rows],
                  generator.latent_shape, eta=eta, **options)


def pictures_of(stock, guidance, steps=4, **options):
    return stock(PROMPTS, generator=[seeds.generator("test", row) for row in range(3)], num_inference_steps=steps, guidance_scale=guidance,
                 output_type="np", **SIZE, **options).images * 255


def assert_same_pictures(generator, path, theirs):
    ours, sound = generator.decode(path.x_0)
    assert sound.all()
    assert np.abs(ours.astype(float) - theirs).max() <= 2
    assert ours.std() > 3  # pictures, not a grey field that agrees with anything


# -- the same pictures


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_those_of_the_stock_pipeline(loaded, family, guidance):
    if family == "flux bare" and guidance != 1:
        pytest.skip("it was not distilled with guidance")
    generator, stock = loaded(family)
    assert_same_pictures(generator, draw(generator, guidance=guidance), pictures_of(stock, guidance))


@pytest.mark.parametrize("family", ["sd", "sd v", "sdxl"])
def test_pictures_drawn_by_chance_are_those_of_the_stock_pipeline(loaded, family):
    generator, stock = loaded(family)
    assert_same_pictures(generator, draw(generator, guidance=3.5, eta=1.0), pictures_of(stock, 3.5, eta=1.0))


@pytest.mark.parametrize("family", GUIDED)
def test_a_negative_prompt_is_the_stock_pipelines(loaded, family):
    generator, stock = loaded(family)
    theirs = pictures_of(stock, 3.5, negative_prompt=["ugly"] * 3)
    assert_same_pictures(generator, draw(generator, guidance=3.5, negative="ugly"), theirs)
    assert np.abs(theirs - pictures_of(stock, 3.5)).max() > 1


@pytest.mark.parametrize("family", ["sd", "sd v", "sdxl"])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_rescaled_guidance_is_diffusers_own(loaded, family, share):
    generator, stock = loaded(family)
    theirs = pictures_of(stock, 7.5, guidance_rescale=share)
    assert_same_pictures(generator, draw(generator, guidance=7.5, rescale=share), theirs)
    assert np.abs(theirs - pictures_of(stock, 7.5)).max() > 1


def test_flux_refuses_what_it_cannot_be_told(loaded):
    generator, _ = loaded("flux")
    with pytest.raises(UserError, match="takes no negative prompt; leave it empty"):
        generator.condition(ROWS, Guidance(3.5), "ugly")
    with pytest.raises(UserError, match=r"guidance_interval: .* is told its guidance in every step; leave it at \[0, 1\]"):
        generator.condition(ROWS, Guidance(3.5, (0.2, 0.8)))
    with pytest.raises(UserError, match=r"guidance_rescale: .* has no second branch .*; leave it at 0"):
        generator.condition(ROWS, Guidance(3.5, rescale=0.7))
    with pytest.raises(UserError) as problem:
        generator.condition(ROWS, Guidance(3.5, (0.2, 0.8), 0.7), "ugly")
    assert [line.split(":")[0] for line in str(problem.value).splitlines()] == [
        "sample.negative", "sample.guidance_interval", "sample.guidance_rescale"]
    bare, _ = loaded("flux bare")
    with pytest.raises(UserError, match="was distilled without guidance; set it to 1"):
        bare.condition(ROWS, Guidance(3.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_holds(folders, family):
    testing.check_generator(text2img(str(folders[family]), **SIZE), ROWS[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_become_parts_of_the_shapes_that_are_planned_with(loaded, family):
    generator, _ = loaded(family)
    generator.remember([PROMPTS[0]])
    assert {name: tuple(part.shape) for name, part in generator.encodings[PROMPTS[0]].items()} == generator.layout()


# -- rows do not touch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_depends_on_nothing_but_its_prompt_and_seed(loaded, family):
    """Neighbours, number of rows, place in a tile: bit for bit. Another size of tile: but for rounding.

    Four rows, as torch's kernels round their last few numbers otherwise where a layer of these tiny widths is no multiple of 64.
    """
    generator, _ = loaded(family)
    options = {"guidance": 3.5 if family != "flux bare" else 1.0, "eta": 0.7, "save": [0, 3]}
    straight = draw(generator, (0, 1, 2), tile=4, **options)
    for order in ([2, 1, 0], [1], [0, 2]):
        other = draw(generator, order, tile=4, **options)
        for name in ("x_0", "x_t", "x_prev", "log_prob", "error", "prediction"):
            assert torch.equal(torch.nan_to_num(getattr(other, name)), torch.nan_to_num(getattr(straight, name)[order])), name
    assert torch.allclose(draw(generator, (0, 1, 2), tile=2, **options).x_0, straight.x_0, atol=0.02)


# -- guidance in a part of the walk


@pytest.mark.parametrize("family", GUIDED)
def test_outside_its_interval_guidance_costs_nothing_and_inside_it_is_mixed_by_hand(loaded, family):
    """Five steps at 0, 1/4, 1/2, 3/4 and 1 of the walk: those from 0.2 to 0.6 are two, and these alone run both branches."""
    generator, _ = loaded(family)
    rows = []

    def denoise(x_t, t, parts):
        rows.append(len(x_t))
        return generator.denoise(x_t, t, parts)

    path = draw(generator, guidance=3.5, steps=5, interval=(0.2, 0.6), denoise=denoise)
    assert rows == [3, 6, 6, 3, 3]

    schedule, condition = generator.schedule(5), generator.condition(ROWS, Guidance(3.5))
    x_t = torch.stack([torch.randn(generator.latent_shape, generator=seeds.generator("test", row)) for row in range(3)])
    with torch.inference_mode():
        for step, timestep in enumerate(schedule.timesteps):
            t = timestep.repeat(3)
            prompt, nothing = (generator.denoise(x_t, t, condition.branch(k)) for k in (0, 1))
            x_t = schedule.mean(nothing + 3.5 * (prompt - nothing) if step in (1, 2) else prompt, x_t, t, 0.0)
    assert torch.allclose(path.x_0, x_t, atol=1e-3)


def test_rows_inside_and_outside_the_interval_may_share_a_batch():
    """Told its own timestep, a denoiser says: guided 3 * 2 - 2 * 1 = 4 inside, the conditional 2 outside."""
    def denoise(x_t, t, parts):
        return parts["tokens"].reshape(-1, 1, 1, 1).expand_as(x_t)

    tokens = torch.stack([torch.full((4, 1), 2.0), torch.full((4, 1), 1.0)])
    condition = Condition({"tokens": tokens}, torch.tensor([3.0, -2.0]), acts=(300.0, 600.0))
    guided, conditional = predict(denoise, torch.zeros(4, 1, 1, 1), torch.tensor([900, 600, 300, 0]), condition)
    assert guided.flatten().tolist() == [2, 4, 4, 2]
    assert conditional.flatten().tolist() == [2] * 4


# -- memory


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_what_is_let_go_of_is_really_gone_and_comes_back_the_same(folders, family):
    generator = text2img(str(folders[family]), **SIZE)
    before = draw(generator).x_0
    parts = {
        "text": [part for part in generator.text.components.values() if isinstance(part, torch.nn.Module)],
        "vae": [generator.vae], "denoiser": [generator.denoiser],
    }
    assert parts["text"]
    for name in list(parts):
        gone = [weakref.ref(part) for part in parts.pop(name)]
        generator.let_go(name)
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone), name
    generator.encodings.clear()
    assert torch.equal(draw(generator).x_0, before)


def living(kind):
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


# -- whole rounds

SMALL = ["prompts.most_train=3", "prompts.most_held_out=2", "sample.steps=4", "sample.candidates=3", "sample.eta=0.7", "pair.margin=0",
         "sample.height=16", "sample.width=16", "finetune.learning_rate=0.02", "finetune.window=[0, 0.9]"]


@pytest.mark.parametrize("family", ["sd v", "sdxl", "sd3", "flux"])
def test_a_whole_round_trains_an_adapter_that_the_stock_pipeline_draws_with(folders, loaded, tmp_path, tiny_clip, monkeypatch, family):
    """By steps taken and by errors; while it trains, neither text encoders nor the VAE are in memory."""
    present = living((PreTrainedModel, AutoencoderKL))
    accumulate = finetune.accumulate

    def watched(*arguments, **options):
        monkeypatch.setattr(finetune, "accumulate", accumulate)  # the first time tells
        seen.extend(type(model) for model in living((PreTrainedModel, AutoencoderKL)) if id(model) not in known)
        looked.append(True)
        return accumulate(*arguments, **options)

    known, seen, looked = {id(model) for model in present}, [], []
    monkeypatch.setattr(finetune, "accumulate", watched)
    with contextlib.chdir(prepare(tmp_path, folders[family], tiny_clip)):
        sets = [word for knob in SMALL for word in ("--set", knob)]
        works("round", "--n", "1", *sets)
        works("round", "--n", "1", *sets, "--set", "finetune.objective=diffusion_dpo")
    assert looked and not seen
    trained = sorted((tmp_path / "runs/t").glob("round-01/finetune-*"))
    assert len(trained) == 2
    assert (tmp_path / "runs/t/report.html").is_file()
    generator, stock = loaded(family)
    before = pictures_of(stock, 1.0)
    for folder in trained:
        first = table(folder, "steps").to_pylist()[0]
        assert first["margin"] == pytest.approx(0, abs=1e-3)
        assert np.isfinite(first["grad_norm"]) and first["grad_norm"] > 0
        adapters.load(generator.denoiser, folder / "adapter")
        stock.load_lora_weights(folder / "adapter")
        theirs = pictures_of(stock, 1.0)
        assert_same_pictures(generator, draw(generator), theirs)
        assert np.abs(theirs - before).max() > 1
        stock.unload_lora_weights()
        adapters.detach(generator.denoiser)
    claims = [json.loads((folder / "manifest.json").read_text())["claim"]["config"]["objective"] for folder in trained]
    assert sorted(claims) == ["diffusion_dpo", "step_dpo"]
    assert folder_of(tmp_path / "runs/t", 0, "encode")
