"""What pixels alone say of a picture: pure functions of an (h, w, 3) uint8 array, or of its luminance where that is all they read."""

import numpy as np

WHITE = 0.95  # a channel above this is white
DARK = 0.2  # a luminance below this is dark: black cloth and deep shadow, not navy in daylight
EDGE = 0.05  # a step of luminance above this is an edge: 13 of 255 levels, more than a decoder's noise makes
SHADES = 8  # of each channel, that a colour is counted in: 512 colours, so that noise of some levels makes none


def luminance(pixels: np.ndarray) -> np.ndarray:
    """Rec. 709's, without gamma, (h, w) float32, 0..1; luminance itself stays as it is."""
    return pixels if pixels.ndim == 2 else pixels.astype(np.float32) / 255 @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def brightness(pixels: np.ndarray) -> float:
    """Mean luminance, 0..1."""
    return float(luminance(pixels).mean())


def contrast(pixels: np.ndarray) -> float:
    """Standard deviation of luminance, 0..0.5."""
    return float(luminance(pixels).std())


def saturation(pixels: np.ndarray) -> float:
    """Mean of (max - min) / max over pixels, 0..1; black counts as 0."""
    rgb = pixels.astype(np.float32) / 255
    high, low = rgb.max(-1), rgb.min(-1)
    return float(np.where(high > 0, (high - low) / np.maximum(high, 1e-6), 0).mean())


def edges(pixels: np.ndarray) -> float:
    """Mean absolute luminance difference of neighbours, 0..1."""
    light = luminance(pixels)
    return float((np.abs(np.diff(light, axis=0)).mean() + np.abs(np.diff(light, axis=1)).mean()) / 2)


def edge_density(pixels: np.ndarray) -> float:
    """Share of pixels on an edge, 0..1: whose luminance differs by more than EDGE from that of the pixel to
    the right or below.

    How high an edge is does not count, as it does for `edges`. No smoothing: stripes of one pixel are edges
    too.
    """
    light = luminance(pixels)
    across = np.abs(np.diff(light, axis=1, append=light[:, -1:])) > EDGE
    down = np.abs(np.diff(light, axis=0, append=light[-1:])) > EDGE
    return float((across | down).mean())


def colour_entropy(pixels: np.ndarray) -> float:
    """Shannon's entropy of a picture's colours in bits, each channel in SHADES shades: 0 (one colour) to 9,
    or log2 of its pixels.
    """
    shades = pixels.astype(np.int64) * SHADES // 256
    count = np.bincount((shades @ np.array([SHADES**2, SHADES, 1])).ravel())
    share = count[count > 0] / count.sum()
    return max(0.0, float(-(share * np.log2(share)).sum()))  # not -0


def dark_pixels(pixels: np.ndarray) -> float:
    """Share of pixels whose luminance is below DARK, 0..1."""
    return float((luminance(pixels) < DARK).mean())


def sharpness(pixels: np.ndarray) -> float:
    """Variance of the Laplacian over the variance of luminance (Pech-Pacheco et al. 2000, free of contrast); NaN for a flat picture.

    The Laplacian is up + down + left + right - 4 x middle, without the outermost pixels. 0 is a slope; white noise has 20, a
    chessboard of single pixels 64. A picture drawn twice as large is less sharp: compare pictures of one size.
    """
    light = luminance(pixels).astype(np.float64)
    spread = light.var()
    if min(light.shape) < 3 or spread < 1e-12:
        return float("nan")
    middle = light[1:-1, 1:-1]
    return float((light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * middle).var() / spread)


def is_white(pixels: np.ndarray) -> np.ndarray:
    """(h, w) bool: where every channel is above WHITE."""
    return np.all(pixels > 255 * WHITE, axis=-1)


def white_background(pixels: np.ndarray, border: float = 1 / 16) -> float:
    """Share of the pixels near the border that are white, 0..1; near is `border` of the shorter side, at least one pixel."""
    white = is_white(pixels)
    width = max(1, round(border * min(white.shape)))
    near = np.ones(white.shape, bool)
    near[width:-width, width:-width] = False
    return float(white[near].mean())


def off_frame(pixels: np.ndarray) -> float:
    """Share of the garment's outline that lies on the picture's border, 0..1: above 0 it is cut off; NaN where all is white.

    The garment is what is not white; its outline, those of its pixels with white, or with no pixel, on one of four sides.
    """
    garment = ~is_white(pixels)
    if not garment.any():
        return float("nan")
    padded = np.pad(garment, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    outline = garment & ~inside
    outline[1:-1, 1:-1], whole = False, int(outline.sum())
    return float(outline.sum() / whole)
