"""Stable Diffusion and its relatives: prompt to picture through diffusers' own folders."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.diffusion import EPSILON, Schedule, V
from fashiondpo_pipeline.embedded import PREFIX, locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.sampling import Condition


class Text2Image:
    """A StableDiffusionPipeline taken apart: text encoder, denoiser, VAE and noise schedule.

    model: diffusers folder, `embedded:NAME`, or hub id. prediction: "auto", or what the model's scheduler must say.
    Raises UserError if the folder does not hold such a pipeline, or predicts something else than `prediction`.
    """

    version = 1

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        prediction: str = "auto",
        height: int | None = None,
        width: int | None = None,
        device: str = "cpu",
    ):
        self.pipeline = _load(model, revision, variant, getattr(torch, dtype))
        self.device = torch.device(device)
        self.pipeline.to(self.device)
        self.pipeline.vae.float()  # fp16 VAEs overflow on bright pictures; fp32 costs little
        for part in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            part.requires_grad_(False).eval()
        self.denoiser = self.pipeline.unet
        self._noise = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self._check_prediction(model, prediction)
        factor = self.pipeline.vae_scale_factor
        size = self.denoiser.config.sample_size
        height, width = height or size * factor, width or size * factor
        if height % factor or width % factor:
            raise UserError(f"sample.height and sample.width must be multiples of {factor} for {model}, not {height}x{width}")
        self.latent_shape = (self.denoiser.config.in_channels, height // factor, width // factor)
        self._tokens: dict[str, Tensor] = {}

    def _check_prediction(self, model: str, wanted: str) -> None:
        found = self._noise.config.prediction_type
        if found not in (EPSILON, V):
            raise UserError(f"{model} predicts '{found}'; this generator knows '{EPSILON}' and '{V}': use another model")
        if wanted not in ("auto", found):
            raise UserError(
                f"generator.prediction is '{wanted}', but the scheduler of {model} says '{found}': "
                "set generator.prediction to auto, or correct the model's scheduler_config.json"
            )

    def schedule(self, steps: int) -> Schedule:
        """The model's own noise schedule, walked in `steps` steps as diffusers' DDIM walks it."""
        self._noise.set_timesteps(steps)
        return Schedule(
            alpha_bar=self._noise.alphas_cumprod.double(),
            alpha_bar_end=float(self._noise.final_alpha_cumprod),
            timesteps=self._noise.timesteps.long(),
            stride=self._noise.config.num_train_timesteps // steps,
            prediction=self._noise.config.prediction_type,
        )

    def condition(self, rows: list[dict], guidance: float, negative: str = "") -> Condition:
        """Tokens (k, b, n, d): one branch without guidance, else prompt and negative under (guidance, 1 - guidance)."""
        prompts = [row["prompt"] for row in rows]
        self._embed([*prompts, negative] if guidance != 1 else prompts)
        positive = torch.stack([self._tokens[prompt] for prompt in prompts])  # (b, n, d)
        if guidance == 1:
            return Condition(positive[None], torch.ones(1, device=self.device))
        empty = self._tokens[negative].expand_as(positive)
        return Condition(torch.stack([positive, empty]), torch.tensor([guidance, 1 - guidance], device=self.device))

    @torch.no_grad()  # not inference_mode: the LoRA's gradients pass through these tokens
    def _embed(self, prompts: list[str]) -> None:
        """Each prompt goes through the text encoder once, alone: its tokens never depend on its neighbours."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._tokens:
                self._tokens[prompt] = self.pipeline.encode_prompt(prompt, self.device, 1, False)[0][0].clone()

    def denoise(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        dtype = self.denoiser.dtype
        return self.denoiser(x_t.to(dtype), t, tokens.to(dtype), return_dict=False)[0]

    @torch.inference_mode()
    def decode(self, x_0: Tensor) -> np.ndarray:
        """(b, h, w, 3) uint8 pictures from latents (b, c, h, w)."""
        vae = self.pipeline.vae
        pixels = vae.decode(x_0.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]  # (b, 3, H, W), -1..1
        pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return (pixels * 255).round().astype(np.uint8)

    def save_adapter(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` in `folder`, for `load_lora_weights` of any Stable Diffusion pipeline."""
        from peft.utils import get_peft_model_state_dict

        config = self.denoiser.peft_config[adapters.POLICY]
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(self.denoiser, adapter_name=adapters.POLICY),
            unet_lora_adapter_metadata={"r": config.r, "lora_alpha": config.lora_alpha,
                                        "target_modules": sorted(config.target_modules)},
        )
        adapters.order_header(Path(folder) / adapters.FILE)


def _load(model: str, revision: str | None, variant: str | None, dtype: torch.dtype) -> StableDiffusionPipeline:
    where = locate(model)
    local = model.startswith(PREFIX) or where.exists()
    if local and not (where / "model_index.json").is_file():
        raise UserError(f"generator.model: {where} is not a diffusers folder (no model_index.json); name one that is")
    diffusers_logging.disable_progress_bar()  # loading a folder takes a second; our own bars say what takes long
    transformers_logging.disable_progress_bar()
    options = {"dtype": dtype, "use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
    try:
        if local:
            return StableDiffusionPipeline.from_pretrained(where, variant=variant, local_files_only=True, **options)
        return StableDiffusionPipeline.from_pretrained(model, revision=revision, variant=variant, **options)
    except (OSError, ValueError) as problem:
        raise UserError(
            f"generator.model: '{model}' cannot be loaded ({str(problem).splitlines()[0]}); it must be a diffusers folder, "
            "or a hub id that can be reached (offline: download it elsewhere and name its folder)"
        ) from problem
