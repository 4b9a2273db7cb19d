"""Pictures and latents to bytes and back: the only place that knows byte layouts."""

import io
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fashiondpo_pipeline.errors import PULL, UserError, is_pointer

MOST_PIXELS = 64_000_000  # a decompression bomb is refused before it is decoded
KINDS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}  # what is read; Pillow knows more, some of it by way of other programs

_BROKEN = (OSError, EOFError, SyntaxError, ValueError, IndexError, OverflowError, struct.error)  # Pillow has no one error for broken bytes
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}  # Exif 2.32, tag 0x0112


class BadPicture(UserError):
    """`where: kind (detail); what to do`; the kind is the same for all pictures with the same fault."""

    def __init__(self, where: str, kind: str, detail: object = "", remedy: str = "re-make it or take the row out"):
        super().__init__(f"{where}: {kind}{f' ({detail})' if detail else ''}; {remedy}")
        self.kind, self.detail = kind, str(detail)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of an (h, w, 3) uint8 picture; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def decode_picture(data: bytes | None, where: str) -> Image.Image:
    """The RGB picture in `data` (PNG, JPEG, WebP), as a browser shows it: upright as its Exif says, on white where it is transparent.

    Of an animation it is the first picture. 16 bits a colour become 8. Every part of the package that looks at pixels does it through here.
    `where` names the picture in an error.
    """
    picture = _opened(data, where, lambda picture: picture.load())
    depth = data[24] if data and picture.format == "PNG" else 8  # bits a colour, in its first chunk
    return _opaque(_upright(picture), depth)


def check_kind(data: bytes | None, where: str = "") -> None:
    """Raises BadPicture for what does not begin as a picture, or says that it is too large; its pixels are not looked at."""
    _opened(data, where, lambda picture: None)


def _opened(data: bytes | None, where: str, then: Callable[[Image.Image], Any]) -> Image.Image:
    if not data:
        raise BadPicture(where, "there is no picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, for which our own limit is lower, and an error; of Exif, which says nothing then
            picture: Image.Image = Image.open(io.BytesIO(data), formats=list(KINDS))
        if picture.width * picture.height > MOST_PIXELS:
            raise BadPicture(where, "its pixels are too many", f"{picture.width}x{picture.height}, at most {MOST_PIXELS:,}", "shrink it")
        then(picture)
    except (*_BROKEN, Image.DecompressionBombError) as problem:
        if is_pointer(data):
            raise BadPicture(where, "a git LFS pointer stands where the picture should be", remedy=PULL) from problem
        # Pillow names the buffer by its address, and what a table says must not change from run to run
        detail = "it is none" if isinstance(problem, UnidentifiedImageError) else problem
        raise BadPicture(where, "the picture cannot be read", detail) from problem
    return picture


def _opaque(picture: Image.Image, depth: int) -> Image.Image:
    """In RGB, on white where it is transparent: by an alpha channel, a palette, or the one colour that a PNG says is to be seen through."""
    key = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow alone would cut off at 255
        values = np.asarray(picture).astype(np.uint32)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        if isinstance(key, int):
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "P"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    # not Pillow's own convert("RGBA"), which takes the colour for one of 8 bits whatever it was written in
    if isinstance(key, int) and picture.mode in ("1", "L"):
        colour: Any = key * 255 // (2**depth - 1)
    elif isinstance(key, tuple) and picture.mode == "RGB":
        colour = [value >> (depth - 8) for value in key]  # of 16 bits Pillow keeps the upper 8
    else:
        return picture.convert("RGB")
    pixels = np.array(picture.convert("RGB"))
    pixels[(pixels == np.array(colour)).all(-1)] = 255
    return Image.fromarray(pixels)


def _upright(picture: Image.Image) -> Image.Image:
    """As its Exif says that it is to be held; Exif that cannot be read says nothing, as in browsers."""
    # not ImageOps.exif_transpose, which writes the rest of the Exif anew and fails where that is odd
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN:
        return picture
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def kind_of(data: bytes) -> str:
    """The usual ending of a file with this picture in it: .png, .jpg or .webp. Only the first bytes are looked at.

    >>> kind_of(b"\\xff\\xd8\\xff rest"), kind_of(b"RIFF1234WEBP"), kind_of(b"\\x89PNG")
    ('.jpg', '.webp', '.png')
    """
    return ".jpg" if data[:3] == b"\xff\xd8\xff" else ".webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ".png"


def encode_half(tensor: Any) -> bytes:
    """fp16 bytes, C order, of a torch tensor. Never bf16 on disk: its rounding is a visible share of a step's noise."""
    return tensor.detach().to("cpu").half().contiguous().numpy().tobytes()


def decode_half(chunks: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    """(n, *shape) float16 from n byte strings made by `encode_half`."""
    return np.frombuffer(b"".join(chunks), dtype=np.float16).reshape(len(chunks), *shape)
