"""Stable Diffusion 3 and 3.5: a transformer on a rectified flow, two CLIP encoders and T5."""

from typing import Any

from torch import Tensor

from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from fashiondpo_pipeline.sampling import Parts


class StableDiffusion3(DiffusersModel):
    """Esser et al. 2024 (2403.03206). Parts: tokens (b, n, d), pooled (b, d)."""

    pipeline = "StableDiffusion3Pipeline"
    denoiser_part = "transformer"
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    flow = True
    patch = 2

    def encode(self, prompt: str) -> Parts:
        tokens, _, pooled, _ = self.text.encode_prompt(prompt, None, None, self.device, 1, False)
        return {"tokens": tokens[0], "pooled": pooled[0]}

    def layout(self) -> dict[str, tuple[int, ...]]:
        first, second = (self.source.config(name) for name in ("text_encoder", "text_encoder_2"))
        clip = first["max_position_embeddings"]
        t5 = 256 if self.source.index.get("text_encoder_3", [None])[0] else clip  # diffusers fills up to as many
        return {"tokens": (clip + t5, self.source.config("transformer")["joint_attention_dim"]),
                "pooled": (first["projection_dim"] + second["projection_dim"],)}

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        return denoiser(hidden_states=x_t, timestep=t, encoder_hidden_states=parts["tokens"],
                        pooled_projections=parts["pooled"], return_dict=False)[0]
