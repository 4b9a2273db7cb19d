"""Stable Diffusion XL: two text encoders, a pooled embedding, and the picture's size as micro-conditioning."""

from typing import Any

import torch
from torch import Tensor

from fashiondpo_pipeline.generators import fields
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from fashiondpo_pipeline.sampling import Parts


class StableDiffusionXL(DiffusersModel):
    """Podell et al. 2023 (2307.01952). Parts: tokens (b, n, d), pooled (b, d)."""

    pipeline = "StableDiffusionXLPipeline"
    pipeline_fields = fields.SDXL_PIPELINE
    denoisers = {  # noqa: RUF012 - a constant
        "UNet2DConditionModel": fields.UNET | {"addition_embed_type": fields.one_of("text_time")},
    }
    vaes = {  # noqa: RUF012 - a constant
        "AutoencoderKL": fields.VAE | {"latents_mean": fields.READ, "latents_std": fields.READ},
    }
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def encode(self, prompt: str) -> Parts:
        tokens, _, pooled, _ = self.text.encode_prompt(prompt, None, self.device, 1, False)
        return {"tokens": tokens[0], "pooled": pooled[0]}

    def layout(self) -> dict[str, tuple[int, ...]]:
        first, second = (self.source.config(name) for name in ("text_encoder", "text_encoder_2"))
        return {"tokens": (first["max_position_embeddings"], first["hidden_size"] + second["hidden_size"]), "pooled": (second["projection_dim"],)}

    def empty(self) -> Parts | None:
        """Zeros, as the model was trained without a prompt and diffusers draws without a negative one."""
        if not self.source.index.get("force_zeros_for_empty_prompt", True):
            return None
        return {name: torch.zeros_like(part) for name, part in self.encode("").items()}

    def _misfits(self) -> list[str]:
        unet, pooled = self.configuration("unet"), self.layout()["pooled"][0]
        wanted = unet["projection_class_embeddings_input_dim"]
        told = 6 * (unet["addition_time_embed_dim"] or 0) + pooled
        found = super()._misfits()
        if wanted != told:
            found.append(f"generator.model: {self.source.place('unet')}: the denoiser wants {wanted} numbers beside the prompt "
                         "(projection_class_embeddings_input_dim), and six of the picture's size with the pooled prompt are "
                         f"{told}, as for a refiner or another model: use another one")
        return found

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        height, width = (side * self.vae_factor for side in x_t.shape[-2:])
        sizes = x_t.new_tensor([height, width, 0, 0, height, width]).expand(len(x_t), -1)  # original, crop's corner, target
        added = {"text_embeds": parts["pooled"], "time_ids": sizes}
        return denoiser(x_t, t, parts["tokens"], added_cond_kwargs=added, return_dict=False)[0]
