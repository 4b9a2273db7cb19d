"""What pixels alone say, by numbers worked out by hand; the same functions as experts."""

import math

import numpy as np
import pytest
from PIL import Image

from fashiondpo_pipeline import experts, pixels, schemas, statistics, testing
from fashiondpo_pipeline.experts import meters

RED, WHITE, BLACK, GREY = (255, 0, 0), (255, 255, 255), (0, 0, 0), (102, 102, 102)


def plain(colour, height=8, width=8):
    return np.full((height, width, 3), colour, np.uint8)


def garment(size, box, colour=RED):
    """White, with a rectangle (top, bottom, left, right)."""
    picture = plain(WHITE, size, size)
    top, bottom, left, right = box
    picture[top:bottom, left:right] = colour
    return picture


def chessboard(size=8, low=0, high=255):
    return np.where((np.indices((size, size)).sum(0) % 2)[..., None], high, low).astype(np.uint8).repeat(3, -1)


def test_brightness_is_mean_luminance():
    assert pixels.brightness(plain(RED)) == pytest.approx(0.2126)
    half = garment(8, (0, 4, 0, 8), BLACK)
    assert pixels.brightness(half) == pytest.approx(0.5) and pixels.contrast(half) == pytest.approx(0.5)
    assert pixels.brightness(plain(GREY)) == pytest.approx(0.4) and pixels.contrast(plain(GREY)) == pytest.approx(0, abs=1e-6)


def test_saturation_is_how_far_colours_are_from_grey():
    assert pixels.saturation(plain((200, 100, 150))) == pytest.approx(0.5)
    assert [pixels.saturation(plain(colour)) for colour in (RED, GREY, BLACK)] == pytest.approx([1, 0, 0])


def test_the_meters_of_evaluation_are_these_functions():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert statistics.meters(picture) == tuple(measure(picture) for measure in statistics.METERS.values())
    assert list(statistics.METERS) == ["brightness", "contrast", "saturation", "sharpness", "edge_density", "colour_entropy", "dark_pixels"]
    assert schemas.METERS.names == ["group", "candidate", *statistics.METERS]
    assert pixels.edges(chessboard()) == pytest.approx(1) and pixels.edges(plain(RED)) == 0


def test_sharpness_is_64_for_a_chessboard_whatever_its_contrast_and_0_for_a_slope():
    assert pixels.sharpness(chessboard()) == pytest.approx(64)  # every Laplacian is +-4 x the difference: 16 d^2 / (d^2 / 4)
    assert pixels.sharpness(chessboard(low=100, high=120)) == pytest.approx(64, rel=1e-4)
    slope = np.arange(0, 240, 10, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, -1)
    assert pixels.sharpness(slope) == pytest.approx(0, abs=1e-8)
    assert math.isnan(pixels.sharpness(plain(GREY))) and math.isnan(pixels.sharpness(chessboard(2)))


def test_sharpness_of_one_dot_is_worked_out_by_hand():
    dot = plain(BLACK, 5, 5)
    dot[2, 2] = 255
    # Laplacians of the 3x3 inside: -4 once, +1 four times, 0 four times: mean 0, variance 20/9; luminance: mean 1/25, variance 24/625
    assert pixels.sharpness(dot) == pytest.approx((20 / 9) / (24 / 625), rel=1e-5)


def test_blur_takes_sharpness_away():
    picture = Image.fromarray(garment(32, (8, 24, 8, 24)))
    from PIL import ImageFilter

    sharp, soft, softer = (pixels.sharpness(np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))) for radius in (0, 1, 3))
    assert sharp > soft > softer > 0


def test_white_background_is_the_white_share_of_the_border():
    assert pixels.white_background(garment(16, (4, 12, 4, 12))) == 1
    # a border of one pixel has 60; the garment reaches over the top row in 4 of them
    assert pixels.white_background(garment(16, (0, 12, 4, 8))) == pytest.approx(56 / 60)
    # a quarter of 16 is 4: the border is all but the middle 8x8, 192 pixels, of which the garment has 2 rows of 4
    assert pixels.white_background(garment(16, (2, 12, 4, 8)), border=0.25) == pytest.approx(1 - 8 / 192)
    assert pixels.white_background(plain((243, 243, 243))) == 1 and pixels.white_background(plain((255, 242, 255))) == 0


def test_off_frame_is_the_share_of_the_outline_on_the_border():
    assert pixels.off_frame(garment(16, (4, 12, 4, 12))) == 0
    assert pixels.off_frame(plain(RED)) == 1
    # 4x4 in the corner: outline 12, of which 7 lie on the border
    assert pixels.off_frame(garment(16, (0, 4, 0, 4))) == pytest.approx(7 / 12)
    assert math.isnan(pixels.off_frame(plain(WHITE)))


def test_edge_density_is_the_share_of_pixels_beside_a_step():
    assert pixels.edge_density(plain(RED)) == 0
    assert pixels.edge_density(garment(8, (0, 8, 0, 4), BLACK)) == pytest.approx(1 / 8)  # the column left of the step
    # a 4 x 4 square: the row above it, the column left of it, its own last row and column, which share a corner
    assert pixels.edge_density(garment(16, (6, 10, 6, 10), BLACK)) == pytest.approx((4 + 4 + 7) / 256)
    assert pixels.edge_density(chessboard()) == pytest.approx(63 / 64), "the finest pattern there is; the last corner has no neighbour"
    assert pixels.edge_density(plain(RED, 1, 1)) == 0, "there is no smallest picture"


def test_an_edge_is_a_step_of_more_than_a_twentieth_however_high():
    def stepped(height):
        return pixels.edge_density(np.tile(np.repeat([0.5, 0.5 + height], 4), (8, 1)).astype(np.float32))

    assert [stepped(height) for height in (0.049, 0.051, -0.5)] == [0, 0.125, 0.125]


def test_colour_entropy_counts_kinds_of_colour_in_bits():
    assert pixels.colour_entropy(plain(RED)) == 0
    assert pixels.colour_entropy(chessboard()) == pytest.approx(1)
    quarters = np.concatenate([plain(colour, 4, 8) for colour in (RED, WHITE, BLACK, (0, 255, 0))])
    assert pixels.colour_entropy(quarters) == pytest.approx(2)
    # three quarters of one, a quarter of another
    assert pixels.colour_entropy(garment(8, (0, 4, 0, 4), BLACK)) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))
    every = (np.indices((8, 8, 8)).reshape(3, -1).T * 32).astype(np.uint8).reshape(16, 32, 3)
    assert pixels.colour_entropy(every) == pytest.approx(9), "as much as there is"


def test_colour_entropy_hears_no_noise_within_a_shade():
    noisy = np.random.default_rng(0).integers(97, 126, (16, 16, 3), dtype=np.uint8)  # a shade is 96 to 127
    assert pixels.colour_entropy(noisy) == 0


def test_dark_pixels_are_those_below_a_fifth_of_the_luminance():
    assert pixels.dark_pixels(garment(8, (0, 2, 0, 8), BLACK)) == pytest.approx(0.25)
    assert [pixels.dark_pixels(plain((grey, grey, grey))) for grey in (50, 52)] == [1, 0]
    assert pixels.dark_pixels(plain((0, 0, 255))) == 1 and pixels.dark_pixels(plain(RED)) == 0


def test_a_garment_whose_pattern_is_wiped_out_loses_structure_and_keeps_its_saturation():
    """What a reward of colour alone makes of stripes."""
    striped, flat = garment(32, (4, 28, 8, 24)), garment(32, (4, 28, 8, 24))
    striped[4:28:4, 8:24] = (0, 0, 255)
    assert pixels.edge_density(flat) < 0.5 * pixels.edge_density(striped)
    assert pixels.colour_entropy(flat) < pixels.colour_entropy(striped)
    assert pixels.saturation(flat) == pixels.saturation(striped)


METERS = ("brightness", "contrast", "saturation", "sharpness", "edge_density", "colour_entropy", "dark_pixels", "white_background", "off_frame")


@pytest.mark.parametrize("name", METERS)
def test_each_is_an_expert_that_keeps_the_contract(name):
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (12, 10, 3), dtype=np.uint8), garment(16, (0, 4, 0, 4)), plain(GREY), chessboard()]
    rows = [{"group": f"g{n}", "candidate": 0, "prompt": "x", "picture": Image.fromarray(picture)} for n, picture in enumerate(pictures)]
    testing.check_expert(experts.make("it", name, {}), rows)


def test_what_cannot_be_said_has_a_reason():
    def said(expert, picture):
        ((score, reason),) = experts.ask(expert, [{"picture": Image.fromarray(picture)}])
        assert math.isnan(score)
        return reason

    assert said(meters.OffFrame(), plain(WHITE)) == "all is white: there is no garment"
    assert said(meters.Sharpness(), plain(RED)) == "the picture is of one brightness, or less than 3 pixels high or wide"


def test_higher_is_better_of_a_garment_within_the_frame():
    inside, cut = (meters.OffFrame()([{"picture": Image.fromarray(garment(16, box))}])[0] for box in ((4, 12, 4, 12), (0, 4, 0, 4)))
    assert inside == 0 > cut == pytest.approx(-7 / 12)


def test_how_near_the_border_is_may_be_chosen():
    picture = {"picture": Image.fromarray(garment(16, (2, 12, 4, 8)))}
    assert experts.make("it", "white_background", {"border": 0.25})([picture]) == pytest.approx([1 - 8 / 192])
