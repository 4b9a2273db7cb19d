"""Pictures and latents to bytes and back; whatever is not a picture ends in one sentence that names it."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from fashiondpo_pipeline.codecs import decode_half, decode_picture, encode_half, encode_png
from fashiondpo_pipeline.errors import UserError

PICTURES = arrays.arrays(np.uint8, st.tuples(st.integers(1, 8), st.integers(1, 8), st.just(3)))
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)


def refused(data):
    with pytest.raises(UserError) as problem:
        decode_picture(data, "boot/3")
    return str(problem.value)


def saved(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@given(PICTURES)
def test_pixels_come_back_as_they_were_and_give_the_same_bytes_each_time(pixels):
    assert (np.asarray(decode_picture(encode_png(pixels), "it")) == pixels).all()
    assert encode_png(pixels) == encode_png(pixels.copy(order="F"))


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),  # a fifth of black on white
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_with_transparency_on_white(mode, colour, wanted):
    found = decode_picture(saved(Image.new(mode, (3, 2), colour)), "it")
    assert found.mode == "RGB" and found.size == (3, 2)
    assert set(found.getdata() if not hasattr(found, "get_flattened_data") else found.get_flattened_data()) == {wanted}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("orientation", "red"), [
    (1, "left"), (2, "right"), (3, "right"), (4, "left"), (5, "top"), (6, "top"), (7, "bottom"), (8, "bottom")])
def test_a_picture_is_as_its_exif_says_it_is_to_be_held(kind, orientation, red):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :16, 0] = 255  # red on the left as it is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(decode_picture(saved(Image.fromarray(pixels), kind, exif=exif), "it"))
    assert found.shape[:2] == ((16, 48) if orientation < 5 else (48, 16))
    edges = {"left": found[:, 4], "right": found[:, -5], "top": found[4], "bottom": found[-5]}
    assert max(edges, key=lambda side: edges[side][..., 0].mean()) == red and edges[red][..., 0].mean() > 200


def test_exif_that_is_broken_turns_nothing():
    odd = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0"  # orientation 99
    for exif in (b"", b"no TIFF", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 12, odd, odd[:12]):
        exif = b"Exif\0\0" + exif
        assert decode_picture(saved(Image.new("RGB", (16, 8)), "JPEG", exif=exif), "it").size == (16, 8)


def test_a_palettes_transparent_colour_is_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    found = np.asarray(decode_picture(saved(picture, transparency=0), "it"))
    assert found.tolist() == [[[255, 255, 255], [200, 100, 50]]]


def png(samples, depth, colours, **chunks):
    """A PNG of (h, w, c) samples as its specification has it, of any depth; colours: its colour type. Pillow writes few of these."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    bits = np.unpackbits(samples.astype(">u2").reshape(height, -1, 1).view(np.uint8), axis=2)[..., 16 - depth:]  # (h, w c, depth)
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    more = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


@pytest.mark.parametrize("see_through", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth_is_spread_over_eight_bits(depth, see_through):
    """0 is black and the largest number white; of 16 bits a 257th is left. What is to be seen through is white, and nothing else."""
    most = 2**depth - 1
    samples = np.array([0, most, most // 2, most // 3, most // 2 + (depth == 16)]).reshape(1, 5, 1)
    key = most // 2
    found = np.asarray(decode_picture(png(samples, depth, GREY, **({"tRNS": struct.pack(">H", key)} if see_through else {})), "it"))
    wanted = [round(255 * value / most) for value in samples.flatten()]
    if see_through:
        wanted = [255 if value == key else grey for value, grey in zip(samples.flatten(), wanted, strict=True)]
    assert found.tolist() == [[[grey] * 3 for grey in wanted]]


@pytest.mark.parametrize("depth", [8, 16])
def test_the_colour_to_be_seen_through_is_white_and_only_that(depth):
    by = 1 if depth == 8 else 257
    colours = np.array([[10, 20, 30], [10, 20, 31], [10, 21, 30], [255, 0, 0], [0, 0, 0]])[None] * by
    found = decode_picture(png(colours, depth, RGB, tRNS=struct.pack(">3H", *colours[0, 0])), "it")
    assert np.asarray(found).tolist() == [[[255, 255, 255], [10, 20, 31], [10, 21, 30], [255, 0, 0], [0, 0, 0]]]
    assert np.asarray(decode_picture(png(colours, depth, RGB), "it")).tolist() == (colours // by).tolist()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colours", [GREY_ALPHA, RGBA])
def test_an_alpha_channel_lets_white_through(depth, colours):
    most, channels = 2**depth - 1, 1 if colours == GREY_ALPHA else 3
    samples = np.array([[[0] * channels + [alpha] for alpha in (0, most // 5, most)]])
    found = np.asarray(decode_picture(png(samples, depth, colours), "it"))
    assert found.tolist() == [[[255] * 3, [204] * 3, [0] * 3]]  # a fifth of black on white


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_of_every_depth_may_be_seen_through_in_part(depth):
    samples = np.array([[[0], [1]]])
    found = decode_picture(png(samples, depth, PALETTE, PLTE=bytes([10, 20, 30, 200, 0, 0]), tRNS=bytes([51])), "it")
    assert np.asarray(found).tolist() == [[[206, 208, 210], [200, 0, 0]]]


def test_a_16_bit_picture_is_turned_as_its_exif_says():
    samples = np.array([[[0], [65535]]])  # black on the left
    exif = Image.Exif()
    exif[0x0112] = 3
    found = decode_picture(png(samples, 16, GREY, eXIf=exif.tobytes().removeprefix(b"Exif\0\0")), "it")
    assert np.asarray(found)[..., 0].tolist() == [[255, 0]]


def test_inks_become_colours():
    """A JPEG for printers: no ink is white, all of yellow and magenta red."""
    for inks, colour in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))):
        found = decode_picture(saved(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100), "it").getpixel((8, 8))
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_picture_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = decode_picture(saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True), "it")
    assert found.getpixel((4, 4)) == (255, 0, 0)


def test_eight_bit_pictures_are_untouched():
    """What was decoded right before is the same to the bit."""
    for mode in ("RGB", "L"):
        picture = Image.fromarray(PIXELS if mode == "RGB" else PIXELS[..., 0])
        assert np.array_equal(np.asarray(decode_picture(saved(picture), "it")), np.asarray(picture.convert("RGB")))


def test_a_pointer_of_git_lfs_is_said_to_be_one():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    assert refused(pointer) == ("boot/3: a git LFS pointer stands where the picture should be; run `git lfs pull` in the folder that it was "
                                "cloned into")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_kinds_are_read(kind):
    assert decode_picture(saved(Image.new("RGB", (8, 8), "white"), kind), "it").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP"])
def test_kinds_that_nobody_needs_are_not_even_tried(kind):
    assert refused(saved(Image.new("RGB", (8, 8), "white"), kind)).startswith("boot/3: the picture cannot be read (it is none)")


@pytest.mark.parametrize("data", [None, b""])
def test_no_picture_is_named(data):
    assert refused(data) == "boot/3: there is no picture; re-make it or take the row out"


def test_what_is_no_picture_is_named():
    assert refused(b"hello") == "boot/3: the picture cannot be read (it is none); re-make it or take the row out"


def test_a_picture_cut_short_is_refused_unless_every_pixel_is_there():
    whole = encode_png(PIXELS)
    for length in range(1, len(whole) - 20):  # the last 20 bytes are checksums, and say that it ends
        assert refused(whole[:length]).startswith("boot/3: the picture cannot be read (")
    for length in range(len(whole) - 20, len(whole)):
        try:
            assert (np.asarray(decode_picture(whole[:length], "boot/3")) == PIXELS).all()
        except UserError as problem:
            assert str(problem).startswith("boot/3: the picture cannot be read (")


@given(st.integers(0, len(encode_png(PIXELS)) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_read_but_never_a_crash(place, flip):
    data = bytearray(encode_png(PIXELS))
    data[place] ^= flip
    try:
        assert decode_picture(bytes(data), "boot/3").mode == "RGB"
    except UserError as problem:
        assert str(problem).startswith("boot/3: ")


@pytest.mark.parametrize(
    ("side", "sentence"),
    [
        (8001, "its pixels are too many (8001x8001, at most 64,000,000); shrink it"),
        (10_000, "its pixels are too many (10000x10000, at most 64,000,000); shrink it"),  # where Pillow alone would only warn
        (60_000, "the picture cannot be read (Image size (3600000000 pixels) exceeds limit of 178956970 pixels, could be "
                 "decompression bomb DOS attack.); re-make it or take the row out"),
    ],
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side, sentence):
    """A file of a hundred bytes that claims to be `side` pixels wide and high."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert refused(bomb) == f"boot/3: {sentence}"


@given(arrays.arrays(np.float16, (2, 3, 2), elements=st.floats(-60_000, 60_000, width=16)))
def test_latents_come_back_bit_for_bit(values):
    chunks = [encode_half(torch.tensor(row)) for row in values]
    found = decode_half(chunks, (3, 2))
    assert found.dtype == np.float16 and found.tobytes() == values.tobytes()


def test_latents_of_any_type_and_layout_become_half():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16).T
    assert decode_half([encode_half(x.requires_grad_())], (2, 2)).tolist() == [[[1.0, 3.0], [2.0, 4.0]]]


def test_pictures_are_opened_in_one_place():
    """So that experts, VAE, checks, report and studio see the same pixels."""
    root = Path(__file__).parent.parent
    found = [file for folder in ("fashiondpo_pipeline", "stages") for file in (root / folder).rglob("*.py")
             if "Image.open" in file.read_text(encoding="utf-8")]
    assert [file.name for file in found] == ["codecs.py"]
