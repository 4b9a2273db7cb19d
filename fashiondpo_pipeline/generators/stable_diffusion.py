"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts eps or v."""

from typing import Any

from torch import Tensor

from fashiondpo_pipeline.generators import fields
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from fashiondpo_pipeline.sampling import Parts


class StableDiffusion(DiffusersModel):
    """Rombach et al. 2022 (2112.10752). Parts: tokens (b, n, d)."""

    pipeline = "StableDiffusionPipeline"
    pipeline_fields = fields.STABLE_DIFFUSION_PIPELINE
    denoisers = {"UNet2DConditionModel": fields.UNET}  # noqa: RUF012 - a constant
    # as diffusers' own pipeline does with files from before these fields
    corrected = {"steps_offset": 1, "clip_sample": False}  # noqa: RUF012 - a constant
    _not_needed = ("safety_checker", "feature_extractor")
    _pipeline_options = {"requires_safety_checker": False}  # noqa: RUF012 - a constant

    def encode(self, prompt: str) -> Parts:
        return {"tokens": self.text.encode_prompt(prompt, self.device, 1, False)[0][0]}

    def layout(self) -> dict[str, tuple[int, ...]]:
        text = self.source.config("text_encoder")
        return {"tokens": (text["max_position_embeddings"], text["hidden_size"])}

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return denoiser(x_t, t, parts["tokens"], return_dict=False)[0]
