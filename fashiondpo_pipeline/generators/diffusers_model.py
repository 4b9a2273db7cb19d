"""What every diffusers text-to-image model has in common: where it lies, its parts one by one, prompts, pictures, LoRA files.

A family (Stable Diffusion, SDXL, SD 3, FLUX) is a subclass in a file of its own: how a prompt becomes parts of a condition, and
how the denoiser is called. Parts are loaded when they are first used and can be let go: text encoders are not in memory while
candidates are drawn, the VAE not while a LoRA is trained.
"""

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fashiondpo_pipeline import adapters, checkpoints
from fashiondpo_pipeline.diffusion import EPSILON, FLOW, Ddim, Schedule, V
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.flow import Flow
from fashiondpo_pipeline.sampling import Condition, Guidance, Parts

DECODED_PIXELS = 2**21  # at once


@dataclass(frozen=True)
class Options:
    """What the configuration says of a model, beside where it lies."""

    dtype: str = "float32"
    prediction: str = "auto"
    height: int | None = None
    width: int | None = None
    device: str = "cpu"
    lora: str | None = None
    lora_scale: float = 1.0
    compile: bool = False


class DiffusersModel:
    """A diffusers pipeline taken apart. Raises UserError where the model does not fit together, or predicts something else than configured."""

    version: ClassVar[int] = 2
    pipeline: ClassVar[str]  # diffusers' class of the whole
    denoiser_part: ClassVar[str] = "unet"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    flow: ClassVar[bool] = False
    patch: ClassVar[int] = 1  # the latent's height and width must be multiples of this
    default_size: ClassVar[int | None] = None  # of the latent, where the denoiser's configuration does not say

    def __init__(self, source: "checkpoints.Source", options: Options):
        self.source, self.options = source, options
        self.name = source.name
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.notes: list[str] = []  # what the person should know of it
        self.encodings: dict[str, Parts] = {}  # prompt -> its parts, each without a batch dimension
        diffusers_logging.disable_progress_bar()  # loading a folder takes a second; our own bars say what takes long
        transformers_logging.disable_progress_bar()
        if options.lora:  # read again where it is fused, but told now what is wrong with it
            from fashiondpo_pipeline.lora_settings import open_lora

            open_lora(Path(options.lora))
        self.scheduler = source.scheduler()
        self._check_prediction(options.prediction)

    # -- parts, loaded when used

    @cached_property
    @torch.inference_mode(False)  # it may be first used while sampling, and is trained later
    def denoiser(self) -> Any:
        denoiser = self.source.part(self.denoiser_part, self.dtype)
        denoiser.requires_grad_(False).eval()
        if self.options.lora:
            from fashiondpo_pipeline import lora_formats

            text = lora_formats.fuse(denoiser, Path(self.options.lora), self.options.lora_scale)
            if text:
                self.notes = [f"{self.options.lora}: its {len(text)} modules of text encoders are left out, only the denoiser's are used"]
        return denoiser.to(self.device)

    @cached_property
    def vae(self) -> Any:
        # fp16 VAEs overflow on bright pictures; fp32 costs little
        return self.source.part("vae", torch.float32).requires_grad_(False).eval().to(self.device)

    @cached_property
    def text(self) -> Any:
        """The pipeline with its text encoders and nothing else."""
        parts = {name: self.source.part(name, self.dtype) for name in self.text_parts}
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to(self.device)
        others = dict.fromkeys(("vae", self.denoiser_part, *self._not_needed))
        return self.pipeline_class(**parts, **others, scheduler=self.scheduler, **self._pipeline_options)

    _not_needed: ClassVar[tuple[str, ...]] = ()
    _pipeline_options: ClassVar[dict[str, Any]] = {}

    @property
    def pipeline_class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.pipeline)

    def load(self, *parts: str) -> None:
        """Have "text", "vae" or "denoiser" in memory now: loading changes torch's defaults for a moment, in every thread."""
        for part in parts:
            getattr(self, part)

    def let_go(self, *parts: str) -> None:
        """Drop "text", "vae" or "denoiser" from memory; it is loaded again when used."""
        for part in parts:
            self.__dict__.pop(part, None)
        if "denoiser" in parts:
            self.__dict__.pop("_compiled", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- the walk

    def _check_prediction(self, wanted: str) -> None:
        config = self.scheduler.config
        found = FLOW if type(self.scheduler).__name__.startswith("FlowMatch") else config.get("prediction_type", EPSILON)
        known = (FLOW,) if self.flow else (EPSILON, V)
        if found not in known:
            raise UserError(f"{self.name} predicts '{found}'; this generator knows {' and '.join(repr(k) for k in known)}: "
                            "use another model, or correct its scheduler_config.json")
        if wanted not in ("auto", found):
            raise UserError(f"generator.prediction is '{wanted}', but the scheduler of {self.name} says '{found}': "
                            "set generator.prediction to auto, or correct the model's scheduler_config.json")
        if found == EPSILON and config.get("rescale_betas_zero_snr"):
            raise UserError(f"the scheduler of {self.name} begins with no signal at all (rescale_betas_zero_snr) and yet predicts 'epsilon', "
                            "which then says nothing of the picture: correct its scheduler_config.json (such models predict 'v_prediction')")
        self.prediction = found

    def schedule(self, steps: int) -> Schedule:
        """The model's own noise schedule in `steps` steps: as diffusers' DDIM walks it, or its flow scheduler."""
        if self.flow:
            return self._flow_schedule(steps)
        from diffusers import DDIMScheduler

        noise = DDIMScheduler.from_config(self.scheduler.config)
        noise.set_timesteps(steps)
        return Ddim(
            alpha_bar=noise.alphas_cumprod.double(),
            alpha_bar_end=float(noise.final_alpha_cumprod),
            timesteps=noise.timesteps.long(),
            stride=noise.config.num_train_timesteps // steps,
            prediction=self.prediction,
        )

    def _flow_schedule(self, steps: int, sigmas: np.ndarray | None = None) -> Flow:
        config = self.scheduler.config
        shift = {}
        if config.get("use_dynamic_shifting"):
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            tokens = self.latent_shape[1] * self.latent_shape[2] // 4  # each is 2 x 2 of the latent
            ends = [config.get(key, default) for key, default in
                    (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", self._most_shift))]
            shift["mu"] = calculate_shift(tokens, *ends)
        self.scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}), **shift)
        return Flow(self.scheduler.sigmas.double().cpu(), self.scheduler.timesteps.float().cpu())

    _most_shift: ClassVar[float] = 1.16
    branches: ClassVar[int] = 2  # that guidance mixes

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w); read from the configurations, no weights are needed."""
        config, factor = self.source.config(self.denoiser_part), self.vae_factor
        size = self.default_size or config["sample_size"]
        unit = factor * self.patch
        height, width = self.options.height or size * factor, self.options.width or size * factor
        if height % unit or width % unit:
            raise UserError(f"sample.height and sample.width must be multiples of {unit} for {self.name}, not {height}x{width}")
        return self._channels(config), height // factor, width // factor

    def _channels(self, config: dict) -> int:
        return config["in_channels"]

    @cached_property
    def vae_factor(self) -> int:
        """Pixels a latent cell, in each direction."""
        return 2 ** (len(self.source.config("vae")["block_out_channels"]) - 1)

    # -- prompts

    def encode(self, prompt: str) -> Parts:
        """The parts of a condition that a prompt gives, each without a batch dimension."""
        raise NotImplementedError

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of those parts, read from the configurations: what the table of prompts will hold."""
        raise NotImplementedError

    def empty(self) -> Parts | None:
        """What stands for no prompt at all, where that is not the encoding of the empty text."""
        return None

    @torch.no_grad()  # not inference_mode: the LoRA's gradients pass through these
    def remember(self, prompts: list[str]) -> None:
        """Each prompt goes through the text encoders once, alone: its parts never depend on its neighbours."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.encodings:
                empty = self.empty() if not prompt else None
                self.encodings[prompt] = {name: part.clone() for name, part in (empty or self.encode(prompt)).items()}

    def condition(self, rows: list[dict], guidance: Guidance, negative: str = "") -> Condition:
        """Parts (k, b, ...): one branch without guidance, else prompt and negative under (scale, 1 - scale)."""
        prompts = [row["prompt"] for row in rows]
        asked = prompts if guidance.scale == 1 else [*prompts, negative]
        self.remember(asked)
        found = [self.encodings[prompt] for prompt in prompts]
        parts = {name: torch.stack([one[name] for one in found]).to(self.device)[None] for name in found[0]}  # (1, b, ...)
        if guidance.scale == 1:
            return Condition(parts, torch.ones(1, device=self.device))
        without = {name: part.to(self.device).expand_as(parts[name][0])[None] for name, part in self.encodings[negative].items()}
        weights = torch.tensor([guidance.scale, 1 - guidance.scale], device=self.device)
        return Condition({name: torch.cat([part, without[name]]) for name, part in parts.items()}, weights, rescale=guidance.rescale)

    # -- networks

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """One forward of the denoiser."""
        raise NotImplementedError

    @property
    def rounds_alike(self) -> bool:
        """Whether sampling and training say the same but for float32's rounding, so that the sampler's record can be the reference.

        Half-precision kernels round by the shape of a batch, compiled code rounds otherwise: times beta that is no longer small.
        """
        return not self.options.compile and self.dtype == torch.float32

    def denoise(self, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """The prediction (b, c, h, w) at x_t; in the denoiser's own type."""
        dtype = self.dtype
        parts = {name: part.to(dtype) if part.is_floating_point() else part for name, part in parts.items()}
        compiled = self.options.compile and torch.is_inference_mode_enabled()  # while sampling only: training's forwards must round alike
        return self.call(self._compiled if compiled else self.denoiser, x_t.to(dtype), t, parts)

    @cached_property
    def _compiled(self) -> Any:
        return torch.compile(self.denoiser, dynamic=False)

    @property
    def decode_rows(self) -> int:
        """How many pictures the VAE takes at once, so that a batch of any size fits: 2^21 pixels of fp32 activations are some 5 GB."""
        _, height, width = self.latent_shape
        return max(1, DECODED_PIXELS // (height * width * self.vae_factor**2))

    @torch.inference_mode()
    def decode(self, x_0: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (b, h, w, 3) uint8 of latents (b, c, h, w), and whether each is made of numbers (b,): fp16 VAEs overflow."""
        if len(x_0) > self.decode_rows:
            found = [self.decode(part) for part in x_0.split(self.decode_rows)]
            return np.concatenate([pixels for pixels, _ in found]), np.concatenate([sound for _, sound in found])
        config = self.vae.config
        latents = x_0.to(self.vae.dtype) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(latents, return_dict=False)[0]  # (b, 3, H, W), -1..1
        sound = torch.isfinite(pixels).flatten(1).all(1).cpu().numpy()
        pixels = (pixels.nan_to_num() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return (pixels * 255).round().astype(np.uint8), sound

    @torch.inference_mode()
    def encode_pictures(self, pixels: np.ndarray) -> Tensor:
        """Latents (b, c, h, w) on the CPU of pictures (b, H, W, 3) uint8: the mean that the VAE's encoder gives, as `decode` takes it."""
        config, found = self.vae.config, []
        for part in torch.from_numpy(pixels).split(self.decode_rows):
            x = part.to(self.device, self.vae.dtype).permute(0, 3, 1, 2) / 127.5 - 1  # (b, 3, H, W), -1..1
            mean = self.vae.encode(x).latent_dist.mode()
            found.append(((mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor).float().cpu())
        return torch.cat(found)

    def save_adapter(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` in `folder`, for `load_lora_weights` of any pipeline of this family."""
        adapters.save(self.denoiser, Path(folder), self.pipeline_class)


@torch.inference_mode()
def check_answer(generator: Any, rows: int) -> None:
    """Raises UserError if a model that is said to predict v answers pure noise with that very noise, as one that predicts eps does.

    Asked once, without a prompt, in a call of `rows` rows. At the noisiest timestep v is little but -x_0, which noise does not tell.
    """
    schedule = generator.schedule(1)
    if schedule.prediction != V:
        return
    x = torch.randn(rows, *generator.latent_shape, generator=torch.Generator().manual_seed(0)).to(generator.device)
    t = torch.full((rows,), schedule.at_share(0), device=generator.device)
    parts = generator.condition([{"prompt": ""}], Guidance()).filled(rows).branch(0)
    said = generator.denoise(x, t, parts).float()
    alike = float(torch.corrcoef(torch.stack([x.flatten(), said.flatten()]))[0, 1])
    if alike > 0.9:
        raise UserError(f"the model's scheduler says 'v_prediction', but its denoiser answers pure noise with that noise "
                        f"(correlation {alike:.2f}), as models do that predict 'epsilon': correct its scheduler_config.json")
