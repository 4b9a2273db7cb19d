"""The small text-to-image denoiser (Ho et al. 2020; guidance: Ho and Salimans 2022), trained with its text encoder."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fashiondpo_pipeline.demo import words
from fashiondpo_pipeline.demo.autoencoder import latents
from fashiondpo_pipeline.demo.fitting import Tick, fit
from fashiondpo_pipeline.demo.garments import COLOURS, COMBOS, FORMS, Wardrobe, caption, generator
from fashiondpo_pipeline.demo.recipe import Recipe

WIDTH = 96


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Ho's linear schedule: it ends in noise alone, where Stable Diffusion's leaves a trace of the white background."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def token_table(tokenizer: CLIPTokenizer) -> Tensor:
    """Token numbers of every caption, and of the empty prompt in the last row: (120 forms + 1, length)."""
    texts = [caption(*combo, form) for combo in COMBOS for form in range(len(FORMS))] + [""]
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def choose_captions(combo: Tensor, dropout: float, key: torch.Generator) -> Tensor:
    """Rows of the token table: half canonical, half any form, and now and then the empty prompt; (b,)."""
    form = torch.randint(2 * len(FORMS), combo.shape, generator=key)
    form = torch.where(form < len(FORMS), form, 0)
    dropped = torch.rand(combo.shape, generator=key) < dropout
    return torch.where(dropped, len(COMBOS) * len(FORMS), combo * len(FORMS) + form)


def spread_steps(count: int, top: int, key: torch.Generator) -> Tensor:
    """Timesteps, one from each of `count` equal strata, so that no batch misses a noise level; (count,)."""
    place = (torch.randperm(count, generator=key) + torch.rand(count, generator=key)) / count
    return (place * top).long().clamp(max=top - 1)


def encode_wardrobe(vae: AutoencoderKL, wardrobe: Wardrobe, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Every garment in `tints` different colours, as scaled latents (n, 4, 8, 8) and combo numbers (n,)."""
    z, combos = [], []
    for round_ in range(recipe.tints):
        key = generator(seed, "encode", round_)
        first = torch.randint(len(COLOURS), (len(wardrobe),), generator=key)
        # Steps through the colours from a random first one: a garment never gets the same twice.
        colour = (first + round_ * (len(COLOURS) // recipe.tints)) % len(COLOURS)
        for rows in torch.arange(len(wardrobe)).split(1000):
            pictures, combo = wardrobe.dyed(rows, colour[rows], key)
            z.append(latents(vae, pictures.to(vae.device)).half())
            combos.append(combo)
    return torch.cat(z) * vae.config.scaling_factor, torch.cat(combos)


def train(
    vae: AutoencoderKL, wardrobe: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick
) -> tuple[UNet2DConditionModel, CLIPTextModel, float]:
    """Predict the noise in mean squared error; returns UNet, text encoder and the seconds."""
    tokenizer = words.write(work / "tokenizer")
    torch.manual_seed(seed)
    both = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokenizer)}).to(device)
    scheduler, table = new_scheduler(), token_table(tokenizer).to(device)
    z, combos = encode_wardrobe(vae, wardrobe, recipe, seed)

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "denoiser", step)
        rows = torch.randint(len(z), (recipe.denoiser_batch,), generator=key)
        clean = z[rows.to(z.device)].float()  # (b, 4, 8, 8)
        noise = torch.randn(clean.shape, generator=key).to(device)
        t = spread_steps(len(rows), scheduler.config.num_train_timesteps, key).to(device)
        tokens = table[choose_captions(combos[rows], recipe.caption_dropout, key).to(device)]  # (b, length)
        words_ = both["text"](tokens).last_hidden_state  # (b, length, 96)
        noisy = scheduler.add_noise(clean, noise, t)
        return (both["unet"](noisy, t, encoder_hidden_states=words_).sample - noise).square().mean()

    seconds = fit(
        both, loss_of, steps=recipe.denoiser_steps, rate=recipe.denoiser_rate,
        checkpoint=work / "denoiser.pt", every=recipe.checkpoint_seconds, tick=tick,
    )  # fmt: skip
    return both["unet"], both["text"], seconds


def write(folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
    """The folder layout of diffusers' StableDiffusionPipeline, without safety checker."""
    vae.save_pretrained(folder / "vae")
    unet.save_pretrained(folder / "unet")
    text.save_pretrained(folder / "text_encoder")
    # transformers 5 writes these names without their prefix and reads both; earlier versions know only the long ones.
    named = {f"text_model.{name.removeprefix('text_model.')}": value.cpu() for name, value in text.state_dict().items()}
    save_file(named, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    new_scheduler().save_pretrained(folder / "scheduler")
    words.write(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
