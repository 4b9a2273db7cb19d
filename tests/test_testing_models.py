"""The tiny models are whole pipelines of each family: diffusers loads their folders as they are and draws with them."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from fashiondpo_pipeline import testing

# diffusers' Euler scheduler hands torch tensors to numpy in a way that numpy 2 frowns upon
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FAMILIES = {
    "tiny_sd": (StableDiffusionPipeline, "unet"),
    "tiny_sdxl": (StableDiffusionXLPipeline, "unet"),
    "tiny_sd3": (StableDiffusion3Pipeline, "transformer"),
    "tiny_flux": (FluxPipeline, "transformer"),
}


def load(kind, folder):
    options = {"safety_checker": None} if kind is StableDiffusionPipeline else {}
    pipeline = kind.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt="a red bag", seed=0):
    random = torch.Generator().manual_seed(seed)
    return pipeline(prompt, num_inference_steps=2, height=16, width=16, generator=random, output_type="np").images[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_folder_loads_and_draws(family, request):
    kind, _ = FAMILIES[family]
    folder = request.getfixturevalue(family)
    pipeline = load(kind, folder)
    picture = draw(pipeline)
    assert picture.shape == (16, 16, 3) and np.isfinite(picture).all() and picture.std() > 0
    assert np.array_equal(picture, draw(load(kind, folder)))
    assert not np.array_equal(picture, draw(pipeline, "a blue shoe")), "the prompt makes no difference"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_folder_is_tiny(family, request):
    kind, part = FAMILIES[family]
    pipeline = load(kind, request.getfixturevalue(family))
    total = sum(w.numel() for module in pipeline.components.values() if isinstance(module, torch.nn.Module) for w in module.parameters())
    assert 10_000 < total < 200_000 and hasattr(pipeline, part)


def test_the_folder_itself_says_which_pipeline_it_holds(tiny_flux):
    assert isinstance(DiffusionPipeline.from_pretrained(tiny_flux, local_files_only=True), FluxPipeline)


def test_the_flow_schedules_are_those_of_their_families(tiny_sd3, tiny_flux):
    sd3, flux = load(StableDiffusion3Pipeline, tiny_sd3).scheduler.config, load(FluxPipeline, tiny_flux).scheduler.config
    assert (sd3.shift, sd3.use_dynamic_shifting, flux.use_dynamic_shifting) == (3.0, False, True)


def test_flux_without_embedded_guidance_draws_too(tmp_path):
    pipeline = load(FluxPipeline, testing.tiny_flux(tmp_path, guidance_embeds=False))
    assert pipeline.transformer.config.guidance_embeds is False and np.isfinite(draw(pipeline)).all()


def test_the_same_seed_makes_the_same_folder(tmp_path):
    first, again, other = (load(StableDiffusion3Pipeline, testing.tiny_sd3(tmp_path / name, seed=seed)).transformer.state_dict()
                           for name, seed in (("first", 0), ("again", 0), ("other", 1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_t5_tokenizer_reads_letters_and_ends_with_its_mark(tmp_path):
    tokenizer = testing.tiny_t5_tokenizer(tmp_path)
    # pad 0, end 1, unknown 2, space 3, then '!' is 4: 'b' is 4 + (98 - 33) = 69, 'a' 68, 'g' 74
    assert tokenizer("bag")["input_ids"] == [3, 69, 68, 74, 1]
    assert tokenizer("é")["input_ids"] == [3, 2, 1]
    assert tokenizer.decode([3, 69, 68, 74], skip_special_tokens=True) == "bag"
