"""FLUX.1: a transformer on a rectified flow; 2 x 2 cells of the latent are one token, and guidance is an input."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.flow import Flow
from fashiondpo_pipeline.generators import fields
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from fashiondpo_pipeline.sampling import Condition, Guidance, Parts


class Flux(DiffusersModel):
    """Black Forest Labs 2024. Parts: tokens (b, n, d), pooled (b, d), and guidance (b,) where the model was distilled with it.

    There is one branch: what other models do with a negative prompt, this one was taught to do from a number.
    """

    pipeline = "FluxPipeline"
    denoiser_part = "transformer"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    flow = True
    pipeline_fields = fields.FLUX_PIPELINE
    denoisers = {"FluxTransformer2DModel": fields.FLUX}  # noqa: RUF012 - a constant
    vaes = {"AutoencoderKL": fields.VAE | {"shift_factor": fields.READ}}  # noqa: RUF012 - a constant
    schedulers = fields.FLOW_SCHEDULERS
    patch = 2
    default_size = 128  # the transformer's configuration names no size; diffusers draws 1024 pixels
    _most_shift = 1.15
    branches = 1

    def encode(self, prompt: str) -> Parts:
        tokens, pooled, _ = self.text.encode_prompt(prompt, None, self.device)
        return {"tokens": tokens[0], "pooled": pooled[0]}

    def layout(self) -> dict[str, tuple[int, ...]]:
        tokens = 512, self.source.config("text_encoder_2")["d_model"]  # diffusers fills up to as many
        return {"tokens": tokens, "pooled": (self.source.config("text_encoder")["hidden_size"],)}

    def condition(self, rows: list[dict], guidance: Guidance, negative: str = "") -> Condition:
        wrong = []
        if negative:
            wrong.append(f"sample.negative: {self.name} takes no negative prompt; leave it empty")
        if tuple(guidance.interval) != Guidance.interval:
            wrong.append(f"sample.guidance_interval: {self.name} is told its guidance in every step; leave it at [0, 1]")
        if guidance.rescale:
            wrong.append(f"sample.guidance_rescale: {self.name} has no second branch whose contrast could be taken back; leave it at 0")
        if wrong:
            raise UserError("\n".join(wrong))
        one = super().condition(rows, Guidance())
        if self.source.config("transformer").get("guidance_embeds"):
            one.parts["guidance"] = torch.full((1, len(rows)), guidance.scale, device=self.device)
        elif guidance.scale != 1:
            raise UserError(f"sample.guidance {guidance.scale:g}: {self.name} was distilled without guidance; set it to 1")
        return one

    def _channels(self, config: dict) -> int:
        return config["in_channels"] // 4

    def _flow_schedule(self, steps: int, sigmas: np.ndarray | None = None) -> Flow:
        return super()._flow_schedule(steps, np.linspace(1.0, 1 / steps, steps))

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        b, c, h, w = x_t.shape
        cells = x_t.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2)).permute(0, 2, 4, 1, 3, 5)  # (b, h/2, w/2, c, 2, 2)
        axes = [torch.arange(n, dtype=x_t.dtype, device=x_t.device) for n in (1, h // 2, w // 2)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # (1, h/2, w/2, 3)
        found = denoiser(
            hidden_states=cells.reshape(b, h * w // 4, 4 * c), timestep=t.to(x_t.dtype) / 1000, guidance=parts.get("guidance"),
            pooled_projections=parts["pooled"], encoder_hidden_states=parts["tokens"],
            txt_ids=x_t.new_zeros(parts["tokens"].shape[1], 3), img_ids=places.reshape(-1, 3), return_dict=False,
        )[0]
        return found.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)
