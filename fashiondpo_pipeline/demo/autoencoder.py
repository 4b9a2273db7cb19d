"""The small AutoencoderKL (Rombach et al. 2022): 64 x 64 pictures to 8 x 8 x 4 latents and back."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fashiondpo_pipeline.demo.fitting import Tick, fit
from fashiondpo_pipeline.demo.garments import SIZE, Wardrobe, generator
from fashiondpo_pipeline.demo.recipe import Recipe

# Nats per latent number against mean absolute error per pixel: enough to bound the latents, too little to blur.
KL_WEIGHT = 1e-4


LATENTS = 4
COUNTED = 2048  # pictures of which the latents are given mean 0 and deviation 1
WIDTHS = (16, 32, 64, 96)


def new() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def mismatch(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of pixels and of differences between neighbours: the second keeps seams and laces."""
    error = drawn - wanted  # (b, 3, h, w)
    return error.abs().mean() + error.diff(dim=2).abs().mean() / 2 + error.diff(dim=3).abs().mean() / 2


def train(
    wardrobe: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick
) -> tuple[AutoencoderKL, float]:
    """Reconstruction plus a little KL; returns the network, standardised, and the seconds."""
    torch.manual_seed(seed)
    network = new().to(device)

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "autoencoder", step)
        pictures, _ = wardrobe.draw(recipe.autoencoder_batch, key)
        pictures = 2 * pictures.to(device) - 1  # (b, 3, 64, 64)
        posterior = network.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=key).to(device)
        redrawn = network.decode(posterior.mean + posterior.std * noise).sample
        return mismatch(redrawn, pictures) + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    seconds = fit(
        network, loss_of, steps=recipe.autoencoder_steps, rate=recipe.autoencoder_rate,
        checkpoint=work / "autoencoder.pt", every=recipe.checkpoint_seconds, tick=tick,
    )  # fmt: skip
    pictures, _ = wardrobe.draw(COUNTED, generator(seed, "standardise"))
    standardise(network, pictures.to(device))
    return network, seconds


@torch.no_grad()
def latents(network: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """Means of the posterior, unscaled: (n, 3, 64, 64) in [0, 1] -> (n, 4, 8, 8)."""
    return torch.cat([network.encode(2 * part - 1).latent_dist.mean for part in pictures.split(batch)])


@torch.no_grad()
def standardise(network: AutoencoderKL, pictures: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1 by rewriting the two 1 x 1 convolutions at the bottleneck.

    Stable Diffusion's pipeline knows one scale for all channels and no shift, but white backgrounds would move the
    means far from 0. `scaling_factor` then says what is left to scale.
    """
    z = latents(network, pictures)
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))  # (4,)
    into, out = network.quant_conv, network.post_quant_conv
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    into.weight[:LATENTS] /= std[:, None, None, None]
    into.bias[:LATENTS] = (into.bias[:LATENTS] - mean) / std
    into.bias[LATENTS:] -= 2 * std.log()
    network.register_to_config(scaling_factor=round(1 / latents(network, pictures).std().item(), 4))


@torch.no_grad()
def psnr(network: AutoencoderKL, wardrobe: Wardrobe, seed: int, count: int = 1000) -> float:
    """Peak signal-to-noise ratio in dB of pictures that went through the latents and back."""
    pictures, _ = wardrobe.draw(count, generator(seed, "psnr"))
    z = latents(network, pictures.to(network.device))  # (count, 4, 8, 8)
    redrawn = torch.cat([network.decode(part).sample.cpu() for part in z.split(250)])
    error = ((redrawn / 2 + 0.5).clamp(0, 1) - pictures).square().mean()
    return round(-10 * error.log10().item(), 2)
