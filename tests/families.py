"""The four tiny families for tests: their stock pipelines, one prediction of their denoisers, one picture."""

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from fashiondpo_pipeline import adapters

PIPELINES = {
    "sd": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
}
PART = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
QUIET = "ignore:__array__ implementation:DeprecationWarning"  # diffusers' Euler scheduler hands torch tensors to numpy


def pipeline(folder, family, **options):
    if family == "sd":
        options |= {"safety_checker": None}
    loaded = PIPELINES[family].from_pretrained(folder, local_files_only=True, **options)
    loaded.set_progress_bar_config(disable=True)
    for part in loaded.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    return loaded


def denoiser_of(loaded):
    return loaded.unet if hasattr(loaded, "unet") else loaded.transformer


def draw(loaded, prompt="a red bag", seed=0):
    random = torch.Generator().manual_seed(seed)
    return loaded(prompt, num_inference_steps=2, height=16, width=16, generator=random, output_type="np").images[0]


def predict(denoiser, family):
    """One prediction (2, ...) from inputs that are the same each time."""
    random = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=random).to(denoiser.dtype)  # noqa: E731
    t = torch.tensor([400, 10])
    if family == "sd":
        return denoiser(noise(2, 4, 8, 8), t, noise(2, 16, 16), return_dict=False)[0]
    if family == "sdxl":
        added = {"text_embeds": noise(2, 16), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 2)}
        return denoiser(noise(2, 4, 8, 8), t, noise(2, 16, 32), added_cond_kwargs=added, return_dict=False)[0]
    if family == "sd3":
        return denoiser(noise(2, 4, 8, 8), noise(2, 12, 32), noise(2, 32), t, return_dict=False)[0]
    places = {"img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)), "txt_ids": torch.zeros(12, 3)}
    guidance = torch.full((2,), 3.5)
    return denoiser(noise(2, 16, 16), noise(2, 12, 32), noise(2, 16), t / 1000, guidance=guidance, return_dict=False, **places)[0]


def say_something(denoiser, seed=1, size=0.2):
    """Weights as after training: none of an adapter's is zero, all of a full denoiser's have moved."""
    random = torch.Generator().manual_seed(seed)
    full = adapters.attached(denoiser) == "full"
    for name, weight in adapters.parameters(denoiser).items():
        moved = size * torch.randn(weight.shape, generator=random)
        weight.data = weight.data + 0.1 * moved if full or "magnitude" in name else moved
    return denoiser
