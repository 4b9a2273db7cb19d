"""Experts without weights: one number from the pixels. Good to watch (weight 0), as what they measure is not what one wants more of."""

import math
from pathlib import Path

import numpy as np

from fashiondpo_pipeline import pixels


class Meter:
    """A number from the pixels as an expert; where there is none, `nothing` says why."""

    version, needs, pixels_only = 1, ("picture",), True
    range: tuple[float, float] = (0.0, 1.0)
    nothing = ""

    def load(self, device: str, prepared: Path | None) -> None:
        pass

    def __call__(self, rows: list[dict]) -> list[float | tuple[float, str]]:
        return [self._one(np.asarray(row["picture"])) for row in rows]

    def _one(self, picture: np.ndarray) -> float | tuple[float, str]:
        value = self.measure(picture)
        return (math.nan, self.nothing) if math.isnan(value) else value

    def measure(self, picture: np.ndarray) -> float:
        raise NotImplementedError


class Brightness(Meter):
    """Mean luminance, 0..1."""

    def measure(self, picture: np.ndarray) -> float:
        return pixels.brightness(picture)


class Contrast(Meter):
    """Standard deviation of luminance, 0..0.5."""

    range = (0.0, 0.5)

    def measure(self, picture: np.ndarray) -> float:
        return pixels.contrast(picture)


class Saturation(Meter):
    """Mean saturation (HSV's) over pixels, 0..1."""

    def measure(self, picture: np.ndarray) -> float:
        return pixels.saturation(picture)


class Sharpness(Meter):
    """Variance of the Laplacian over the variance of luminance, from 0; a chessboard has 64. Pictures of one size compare."""

    range = (0.0, math.inf)
    nothing = "the picture is of one brightness, or less than 3 pixels high or wide"

    def measure(self, picture: np.ndarray) -> float:
        return pixels.sharpness(picture)


class EdgeDensity(Meter):
    """Share of pixels on an edge, 0..1: how much is drawn."""

    def measure(self, picture: np.ndarray) -> float:
        return pixels.edge_density(picture)


class ColourEntropy(Meter):
    """Shannon's entropy of the colours in 512 classes, 0..9 bits: how many kinds of colour there are."""

    range = (0.0, 9.0)

    def measure(self, picture: np.ndarray) -> float:
        return pixels.colour_entropy(picture)


class DarkPixels(Meter):
    """Share of pixels whose luminance is below 0.2, 0..1."""

    def measure(self, picture: np.ndarray) -> float:
        return pixels.dark_pixels(picture)


class WhiteBackground(Meter):
    """Share of the pixels near the border that are white, 0..1; `border` is how near, as a share of the shorter side."""

    def __init__(self, border: float = 1 / 16):
        self.border = border

    def measure(self, picture: np.ndarray) -> float:
        return pixels.white_background(picture, self.border)


class OffFrame(Meter):
    """Minus the share of the garment's outline that lies on the picture's border, -1..0: below 0 it is cut off."""

    range = (-1.0, 0.0)
    nothing = "all is white: there is no garment"

    def measure(self, picture: np.ndarray) -> float:
        return -pixels.off_frame(picture)
