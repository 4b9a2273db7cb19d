"""The small text-to-image denoiser (Ho et al. 2020; guidance: Ho and Salimans 2022), trained with its text encoder."""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fashiondpo_pipeline.demo import words
from fashiondpo_pipeline.demo.autoencoder import LATENTS, latents
from fashiondpo_pipeline.demo.fitting import Tick, fit, fit_replayed
from fashiondpo_pipeline.demo.garments import COLOURS, COMBOS, FORMS, STYLES, Look, Wardrobe, asked, caption, generator, random_looks
from fashiondpo_pipeline.demo.recipe import Recipe
from fashiondpo_pipeline.diffusion import guide

WIDTH = 96
OTHERS = len(COLOURS) - 1


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
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
    """Token numbers of every caption, and of the empty prompt in the last row: (4,080 looks x forms + 1, length)."""
    looks = [Look.of(number) for number in range(len(COMBOS) * STYLES)]
    texts = [caption(look, form) for look in looks for form in range(len(FORMS))] + [""]
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@cache
def misnamed(device: torch.device) -> Tensor:
    """Look -> the look that a careless caption says it is, (4,080,), kept on each device: its ground by the name of the colour before.

    Where that is the accent's name the caption stays right.
    """
    looks = [Look.of(number) for number in range(len(COMBOS) * STYLES)]
    said = [look._replace(colour=COLOURS[COLOURS.index(look.colour) - 1]) for look in looks]
    return torch.tensor([(look if one.colour == one.accent else one).number for look, one in zip(looks, said, strict=True)], device=device)


def choose_captions(looks: Tensor, recipe: Recipe, key: torch.Generator | None) -> Tensor:
    """Rows of the token table: half canonical, half any form, and now and then the empty prompt; (b,).

    A share of them is careless: it names the ground by the name of the colour before it in the palette.
    """
    drawn: dict[str, Any] = {"generator": key, "device": looks.device}
    form = torch.randint(2 * len(FORMS), looks.shape, **drawn)
    form = torch.where(form < len(FORMS), form, 0)
    careless = torch.rand(looks.shape, **drawn) < recipe.misnamed
    said = torch.where(careless, misnamed(looks.device)[looks], looks)
    dropped = torch.rand(looks.shape, **drawn) < recipe.caption_dropout
    return torch.where(dropped, len(COMBOS) * STYLES * len(FORMS), said * len(FORMS) + form)


def spread_steps(count: int, top: int, key: torch.Generator | None, device: torch.device | str = "cpu") -> Tensor:
    """Timesteps, one from each of `count` equal strata, so that no batch misses a noise level; (count,)."""
    place = torch.arange(count, device=device) + torch.rand(count, generator=key, device=device)
    return (place / count * top).long().clamp(max=top - 1)


@cache
def wished() -> frozenset[int]:
    """Numbers of the patterned looks that prompts ask for, and of those that a careless caption describes with a prompt's words."""
    looks = {look.number for look in map(asked, range(len(COMBOS))) if look.pattern != "plain"}
    said = misnamed(torch.device("cpu")).tolist()
    return frozenset(looks | {number for number, name in enumerate(said) if name in looks})


def unasked(looks: Tensor) -> Tensor:
    """The looks, but for those that prompts ask for: these get the next colour as accent instead.

    So no picture that a prompt asks for was ever seen by the generator, and no caption was a patterned prompt's.
    """
    out = looks.clone()
    for place, number in enumerate(looks.tolist()):
        while number in wished():
            combo, style = divmod(number, STYLES)
            kind, other = divmod(style - 1, OTHERS)
            number = combo * STYLES + 1 + kind * OTHERS + (other + 1) % OTHERS
        out[place] = number
    return out


def encode_wardrobe(vae: AutoencoderKL, wardrobe: Wardrobe, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """Every garment in `tints` different looks, as scaled latents (n, 4, 8, 8) and look numbers (n,), on the VAE's device."""
    z, all_looks, there = [], [], wardrobe.to(vae.device)
    for round_ in range(recipe.tints):
        key = generator(seed, "encode", round_)
        looks = unasked(random_looks(wardrobe.category, key)).to(vae.device)
        for rows in torch.arange(len(wardrobe), device=vae.device).split(1000):
            z.append(latents(vae, there.worn(rows, looks[rows], key)).half())
        all_looks.append(looks)
    return torch.cat(z) * vae.config.scaling_factor, torch.cat(all_looks)


def train(
    vae: AutoencoderKL, wardrobe: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick
) -> tuple[UNet2DConditionModel, CLIPTextModel, float]:
    """UNet, text encoder and the seconds: first both learn to predict the noise, then the UNet to do so as if guided.

    The second part (Meng et al. 2023, On distillation of guided diffusion models) puts guidance into the weights, so
    that one forward a step draws what two did, as FLUX.1-dev does.
    """
    tokenizer = words.write(work / "tokenizer")
    torch.manual_seed(seed)
    both = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(tokenizer)}).to(device)
    unet, text = both["unet"], both["text"]
    scheduler, table = new_scheduler(), token_table(tokenizer).to(device)
    alpha = scheduler.alphas_cumprod.to(device)
    z, looks = encode_wardrobe(vae, wardrobe, recipe, seed)
    batch = recipe.denoiser_batch

    def drawn(key: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents (b, 4, 8, 8), timesteps (b,), the noise (b, 4, 8, 8) and tokens (b, length)."""
        rows = torch.randint(len(z), (batch,), generator=key, device=device)
        clean = z[rows].float()
        noise = torch.randn(clean.shape, generator=key, device=device)
        t = spread_steps(batch, len(alpha), key, device)
        signal = alpha[t].view(-1, 1, 1, 1)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise, t, noise, table[choose_captions(looks[rows], recipe, key)]

    def loss_of(key: torch.Generator | None) -> Tensor:
        noisy, t, noise, tokens = drawn(key)
        return (predicted(unet, noisy, t, text(tokens).last_hidden_state) - noise).square().mean()

    def fitted(model: nn.Module, loss_of: Callable[[torch.Generator | None], Tensor], name: str, steps: int, rate: float) -> float:
        settings: dict[str, Any] = {
            "steps": steps, "rate": rate, "checkpoint": work / f"{name}.pt", "every": recipe.checkpoint_seconds, "tick": tick,
        }  # fmt: skip
        if torch.device(device).type == "cuda":
            return fit_replayed(model, lambda: loss_of(None), **settings)
        return fit(model, lambda step: loss_of(generator(seed, name, step)), **settings)

    seconds = fitted(both, loss_of, "denoiser", recipe.denoiser_steps, recipe.denoiser_rate)
    text.requires_grad_(False)
    teacher = deepcopy(unet).requires_grad_(False)
    nothing = text(table[-1:]).last_hidden_state  # (1, length, 96)
    shares = torch.tensor([1 - recipe.distilled_guidance, recipe.distilled_guidance], device=device)

    def distilled_loss_of(key: torch.Generator | None) -> Tensor:
        noisy, t, _, tokens = drawn(key)
        asked_for = text(tokens).last_hidden_state  # (b, length, 96)
        with torch.no_grad():
            branches = torch.stack([predicted(teacher, noisy, t, said) for said in (nothing.expand_as(asked_for), asked_for)])
        return (predicted(unet, noisy, t, asked_for) - guide(branches, shares)).square().mean()

    seconds += fitted(unet, distilled_loss_of, "distilled", recipe.distilled_steps, recipe.distilled_rate)
    return unet, text, seconds


def predicted(unet: nn.Module, noisy: Tensor, t: Tensor, said: Tensor) -> Tensor:
    """The noise that the UNet sees in latents; (b, 4, 8, 8)."""
    return unet(noisy, t, encoder_hidden_states=said).sample


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
