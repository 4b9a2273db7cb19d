"""The generator keeps its contract, refuses folders it cannot draw with, and writes LoRAs that stock diffusers loads."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from fashiondpo_pipeline import adapters, testing
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators import diffusers_model
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.sampling import Guidance, sample

ROW = {"prompt": "a red dress"}


def refused(*arguments, **options):
    with pytest.raises(UserError) as problem:
        generator = text2img(*arguments, **options)
        assert generator.latent_shape and generator.denoiser
    return str(problem.value)


def changed(folder, target, part, **values):
    """A copy of a folder with some settings of one part changed."""
    shutil.copytree(folder, target)
    for name in ("config.json", "scheduler_config.json"):
        path = target / part / name
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_contract_holds(tiny_sd, tiny_sd_v, dtype):
    for folder in (tiny_sd, tiny_sd_v):
        testing.check_generator(text2img(str(folder), dtype=dtype), ROW)


def test_the_contract_check_finds_a_row_that_leaks_into_its_neighbour(tiny_sd):
    generator = text2img(str(tiny_sd))
    honest = generator.denoise
    generator.denoise = lambda x, t, parts: honest(x, t, parts) + x[:1].mean()
    with pytest.raises(AssertionError, match="depends on its place in the batch"):
        testing.check_generator(generator, ROW)


@pytest.mark.parametrize(("wanted", "found"), [("auto", "epsilon"), ("epsilon", "epsilon"), ("auto", "v_prediction")])
def test_the_prediction_is_the_schedulers(tiny_sd, tiny_sd_v, wanted, found):
    folder = tiny_sd if found == "epsilon" else tiny_sd_v
    assert text2img(str(folder), prediction=wanted).schedule(2).prediction == found


def test_another_prediction_than_configured_is_refused(tiny_sd):
    assert refused(str(tiny_sd), prediction="v_prediction") == (
        f"generator.prediction is 'v_prediction', but the scheduler of {tiny_sd} says 'epsilon': "
        "set generator.prediction to auto, or correct the model's scheduler_config.json"
    )


def test_a_prediction_nobody_knows_is_refused(tiny_sd, tmp_path):
    folder = changed(tiny_sd, tmp_path / "sd", "scheduler", prediction_type="sample")
    assert refused(str(folder)) == (
        f"generator.model: {folder}/scheduler/scheduler_config.json: prediction_type is 'sample', and only "
        f"'epsilon' or 'v_prediction' is known "
        "here: use another model, or set it to 'epsilon' or 'v_prediction' if the model was made so"
    )


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    assert refused(str(tmp_path)) == (
        f"generator.model: {tmp_path} is not a diffusers folder (no model_index.json); name one that is"
    )


def test_an_embedded_model_that_is_not_there_is_refused():
    assert refused("embedded:fashion_mini/nothing").startswith("generator.model: there is nothing at ")


def test_a_pipeline_without_its_weights_is_refused(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    message = refused(str(tmp_path / "sd"))
    assert message.startswith(f"generator.model: '{tmp_path / 'sd'}' cannot be loaded (")
    assert message.endswith(
        "); it must be a diffusers folder, a single-file checkpoint, or a hub id that can be reached (offline: run `hf download ID` where "
        "there is a network, copy the folder here and name it; or copy the hub's cache and set HF_HOME)"
    )


def test_a_folder_with_cut_off_weights_is_refused(tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    weights = tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refused(str(tmp_path / "sd")).startswith(f"generator.model: '{tmp_path / 'sd'}' cannot be loaded (")


def test_a_hub_id_that_cannot_be_reached_is_refused():
    message = refused("somebody/some-model")
    assert message.startswith("generator.model: 'somebody/some-model' cannot be loaded (")


def test_a_picture_size_that_is_no_multiple_is_refused(tiny_sd):
    assert refused(str(tiny_sd), height=33, width=32) == (
        f"sample.height and sample.width must be multiples of 2 for {tiny_sd}, not 33x32"
    )


def test_pictures_come_in_the_size_asked_for(tiny_sd):
    generator = text2img(str(tiny_sd), height=24, width=16)
    assert generator.latent_shape == (4, 12, 8)
    assert generator.decode(torch.zeros(1, 4, 12, 8))[0].shape == (1, 24, 16, 3)


def test_prompts_are_embedded_once_and_as_stock_diffusers_does(tiny_sd):
    generator = text2img(str(tiny_sd))
    calls = []
    embed = generator.text.encode_prompt
    generator.text.encode_prompt = lambda prompt, *rest: calls.append(prompt) or embed(prompt, *rest)
    condition = generator.condition([ROW, {"prompt": "a bag"}, ROW], Guidance(3.0), "ugly")
    generator.condition([ROW], Guidance())
    assert calls == ["a red dress", "a bag", "ugly"]
    tokens = condition.parts["tokens"]
    assert tokens.shape == (2, 3, 16, 16) and condition.weights.tolist() == [3.0, -2.0]
    wanted, negative = embed("a bag", "cpu", 1, True, "ugly")
    assert torch.equal(tokens[0, 1], wanted[0]) and torch.equal(tokens[1, 1], negative[0])
    assert not tokens.is_inference()  # gradients must pass


def test_a_prompt_longer_than_the_text_encoder_is_cut_not_refused(tiny_sd):
    assert text2img(str(tiny_sd)).condition([{"prompt": "a very long prompt " * 20}], Guidance()).parts["tokens"].shape == (1, 1, 16, 16)


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_a_saved_adapter_draws_the_same_in_stock_diffusers(tiny_sd, tmp_path, alpha):
    generator = text2img(str(tiny_sd))
    adapters.attach(generator.denoiser, 4, alpha, ["to_q", "to_v"], seed=0)
    random = torch.Generator().manual_seed(1)
    for weight in adapters.parameters(generator.denoiser).values():
        weight.data = 0.2 * torch.randn(weight.shape, generator=random)
    generator.save_adapter(tmp_path)

    stock = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, local_files_only=True)
    x, tokens = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 16, 16, generator=random)
    t = torch.tensor([500, 3])
    with torch.no_grad():
        before = stock.unet(x, t, tokens).sample
        stock.load_lora_weights(tmp_path)
        after, ours = stock.unet(x, t, tokens).sample, generator.denoise(x, t, {"tokens": tokens})
    assert (after - before).abs().max() > 0.01
    assert torch.allclose(after, ours, atol=1e-6)


def test_pixels_are_rounded_to_the_nearest_not_cut(tiny_sd):
    generator = text2img(str(tiny_sd))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = generator.vae.decode(x / generator.vae.config.scaling_factor).sample
    wanted = ((pixels / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    assert np.abs(generator.decode(x)[0] - wanted).max() <= 0.5


def test_many_pictures_are_decoded_a_few_at_a_time(tiny_sd, monkeypatch):
    generator = text2img(str(tiny_sd))
    height, width = (side * generator.vae_factor for side in generator.latent_shape[1:])
    monkeypatch.setattr(diffusers_model, "DECODED_PIXELS", 2 * height * width)
    x = torch.randn(5, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    x[3] = torch.nan
    seen, whole = [], generator.vae.decode
    monkeypatch.setattr(generator.vae, "decode", lambda z, **options: seen.append(len(z)) or whole(z, **options))
    pictures, sound = generator.decode(x)
    assert seen == [2, 2, 1] and sound.tolist() == [True, True, True, False, True]
    alone = np.concatenate([generator.decode(one[None])[0] for one in x])
    assert pictures.shape == (5, height, width, 3) and np.abs(pictures.astype(int) - alone).max() <= 1


@pytest.mark.parametrize("dtype, exact", [("float32", True), ("bfloat16", False)])
def test_a_gpu_computes_float32_in_float32_and_never_takes_cudnn_s_attention(tiny_sd, monkeypatch, dtype, exact):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    said = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", said.append)
    text2img(str(tiny_sd), device="cuda", dtype=dtype)  # its parts are loaded when used, and none is here
    assert torch.backends.cudnn.allow_tf32 is not exact
    assert said == [False]


def test_a_compiled_denoiser_draws_the_same_and_is_not_trained(tiny_sd):
    drawn = []
    for compiled in (False, True):
        generator = text2img(str(tiny_sd), compile=compiled)
        condition = generator.condition([ROW, ROW], Guidance())
        noise = [torch.Generator().manual_seed(i) for i in range(2)]
        drawn.append(sample(generator.denoise, generator.schedule(2), condition, noise, generator.latent_shape, eta=0.0, tile=2).x_0)
        assert ("_compiled" in vars(generator)) == compiled
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4
    assert not generator.rounds_alike
    x = torch.zeros(1, *generator.latent_shape)
    said = generator.denoise(x, torch.tensor([500]), generator.condition([ROW], Guidance()).branch(0))
    plain = text2img(str(tiny_sd)).denoise(x, torch.tensor([500]), condition.take(slice(0, 1)).branch(0))
    assert torch.equal(said, plain), "training's forwards are not compiled"
