"""Stable Diffusion 3 and 3.5: a transformer on a rectified flow, two CLIP encoders and T5."""

from functools import cached_property
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators import fields
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from fashiondpo_pipeline.sampling import Parts

T5_TOKENS = 256  # diffusers fills up to as many, with zeros where there is no T5


class StableDiffusion3(DiffusersModel):
    """Esser et al. 2024 (2403.03206). Parts: tokens (b, n, d), pooled (b, d)."""

    pipeline = "StableDiffusion3Pipeline"
    denoiser_part = "transformer"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    flow = True
    pipeline_fields = fields.SD3_PIPELINE
    denoisers = {"SD3Transformer2DModel": fields.SD3}  # noqa: RUF012 - a constant
    vaes = {"AutoencoderKL": fields.VAE | {"shift_factor": fields.READ}}  # noqa: RUF012 - a constant
    schedulers = fields.FLOW_SCHEDULERS
    patch = 2

    @cached_property
    def text(self) -> Any:
        """The pipeline with its text encoders; without T5 diffusers asks the transformer how wide its tokens would be."""
        found = super().text
        if found.text_encoder_3 is None:
            found.transformer = SimpleNamespace(config=SimpleNamespace(**self.configuration("transformer")))
        return found

    def encode(self, prompt: str) -> Parts:
        tokens, _, pooled, _ = self.text.encode_prompt(prompt, None, None, self.device, 1, False)
        return {"tokens": tokens[0], "pooled": pooled[0]}

    def layout(self) -> dict[str, tuple[int, ...]]:
        first, second = (self.source.config(name) for name in ("text_encoder", "text_encoder_2"))
        tokens = first["max_position_embeddings"] + T5_TOKENS
        return {"tokens": (tokens, self.source.config("transformer")["joint_attention_dim"]),
                "pooled": (first["projection_dim"] + second["projection_dim"],)}

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        channels, height, width = super().latent_shape
        most = self.configuration("transformer")["pos_embed_max_size"]
        if max(height, width) > most * self.patch:
            unit = self.vae_factor * self.patch
            raise UserError(f"sample.height and sample.width: {self.name} knows places in pictures up to "
                            f"{most * unit} pixels wide and high "
                            f"(pos_embed_max_size), not "
                            f"{height * self.vae_factor}x{width * self.vae_factor}: draw smaller ones")
        return channels, height, width

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return denoiser(hidden_states=x_t, timestep=t, encoder_hidden_states=parts["tokens"],
                        pooled_projections=parts["pooled"], return_dict=False)[0]
