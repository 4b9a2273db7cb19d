"""Generators by name. A generator turns prompts into conditions, latents into pictures, and lends its denoiser."""

from typing import Any, Protocol

from torch import Tensor, nn

from fashiondpo_pipeline.diffusion import Schedule
from fashiondpo_pipeline.sampling import Condition


class Generator(Protocol):
    """What sampling and finetuning need of a model; they are the same for every generator.

    denoiser: the trainable network, called through `denoise`. latent_shape: (c, h, w).
    """

    denoiser: nn.Module
    latent_shape: tuple[int, int, int]

    def schedule(self, steps: int) -> Schedule: ...

    def condition(self, rows: list[dict], guidance: float, negative: str = "") -> Condition:
        """One row each, on the generator's device."""
        ...

    def denoise(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor: ...

    def decode(self, x_0: Tensor) -> Any:
        """(b, h, w, 3) uint8 array of pictures."""
        ...

    def save_adapter(self, folder: Any) -> None:
        """Write the denoiser's LoRA so that stock diffusers loads it."""
        ...

