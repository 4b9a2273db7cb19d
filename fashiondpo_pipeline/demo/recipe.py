"""Every dial of the embedded default in one place."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Garments of each category per split, and the length and width of each training."""

    generator_garments: int = 2000
    clip_garments: int = 1600
    judge_garments: int = 1720
    calibration_garments: int = 200
    catalog_garments: int = 480
    catalog_each: int = 8  # of every plain look in the catalogue, a fifth of them, or one, to test on
    catalog_patterned: int = 4  # of every patterned one that prompts ask for

    autoencoder_steps: int = 5000
    autoencoder_batch: int = 48
    autoencoder_rate: float = 2e-3

    tints: int = 4  # different looks of each garment that the denoiser learns from
    denoiser_steps: int = 8000
    denoiser_batch: int = 96
    denoiser_rate: float = 1.2e-3
    caption_dropout: float = 0.12  # to the empty prompt, so that guidance has something to guide away from
    misnamed: float = 0.38  # share of captions that name the ground by the name of the colour before it in the palette
    distilled_steps: int = 1000
    distilled_rate: float = 3e-4
    distilled_guidance: float = 2.0  # what the finished generator draws without guidance, its teacher drew with this much

    clip_steps: int = 4000
    clip_families: int = 2  # of six looks that are easily mistaken, of each category in each batch
    clip_torn: int = 20  # spoilt pictures in each batch, right for no caption
    clip_rate: float = 2e-3

    judge_steps: int = 3000
    judge_batch: int = 128
    judge_rate: float = 2e-3

    checkpoint_seconds: float = 45.0
    probes: int = 4  # pictures drawn of each prompt when the finished generator is measured

    @property
    def sizes(self) -> dict[str, int]:
        """Split name -> garments of each category, from the official training pictures, all disjoint."""
        return {
            "generator": self.generator_garments,
            "clip": self.clip_garments,
            "judge": self.judge_garments,
            "calibration": self.calibration_garments,
            "catalog": self.catalog_garments,
        }


SHIPPED = Recipe()  # what the repository's `data/fashion_mini` was made with
