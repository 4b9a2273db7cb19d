"""Garments of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) as small product photos in two colours, with captions.

A look is what a caption says of a garment: its category, its colour (the ground), its pattern and the pattern's colour
(the accent). Looks are counted: `combo * STYLES + style`, where a combo is colour and category, style 0 is plain, and
the others are a pattern in one of the eleven other colours.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import numpy as np

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.later import Later

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Later("torch")

SIZE = 64

# In the order of Fashion-MNIST's labels 0..9.
CATEGORIES = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

# No white: a white garment on a white background cannot be seen.
PALETTE = {
    "black": (26, 26, 28),
    "grey": (132, 134, 138),
    "brown": (112, 66, 32),
    "red": (206, 26, 36),
    "orange": (244, 126, 16),
    "yellow": (242, 204, 24),
    "green": (34, 140, 52),
    "teal": (16, 150, 150),
    "blue": (40, 96, 220),
    "navy": (22, 32, 88),
    "purple": (124, 48, 160),
    "pink": (244, 130, 178),
}
COLOURS = tuple(PALETTE)
COMBOS = tuple((colour, category) for category, colour in product(CATEGORIES, COLOURS))

# Name -> what captions call it. The accent covers less than half of the cloth, so that ground and accent can be told apart.
PATTERNS = {"plain": "", "striped": "stripes", "checked": "checks", "dotted": "dots"}
STYLES = 1 + (len(PATTERNS) - 1) * (len(COLOURS) - 1)
NO_ACCENT = "none"
# Two colours of a prompt differ by at least so much, of 255 in red, green and blue together: others are hard to tell apart.
APART = 200
# Categories with too little cloth for a pattern to be seen on.
BARE = ("sandal",)

# What a judge can say of a picture, attribute by attribute.
ATTRIBUTES = {
    "category": CATEGORIES, "colour": COLOURS, "pattern": tuple(PATTERNS), "accent": (NO_ACCENT, *COLOURS),
}  # fmt: skip
LABELS = tuple(f"{attribute}: {value}" for attribute, values in ATTRIBUTES.items() for value in values)

# Ways to say what a picture shows. The first is canonical: the words of the prompts and of the catalogue.
FORMS = (
    "a photo of {noun}, on white background",
    "a photo of {noun}",
    "an image of {noun}",
    "{noun}",
    "{bare}",
    "a photo of {plain}, on white background",  # names no colour: for training the generator only
)

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def generator(*key: object) -> torch.Generator:
    """A CPU generator that depends on nothing but its key, so that work can stop anywhere and go on the same."""
    return torch.Generator().manual_seed(crc32(repr(key).encode()))


# ---------------------------------------------------------------------------------------------- words


class Look(NamedTuple):
    """What a caption says of a garment; `accent` is "none" where the pattern is plain."""

    category: str
    colour: str
    pattern: str = "plain"
    accent: str = NO_ACCENT

    @property
    def swapped(self) -> Look:
        """The same with ground and accent exchanged; a plain one as it is."""
        return self if self.pattern == "plain" else self._replace(colour=self.accent, accent=self.colour)

    @property
    def number(self) -> int:
        combo = COMBOS.index((self.colour, self.category))
        if self.pattern == "plain":
            return combo * STYLES
        other = (COLOURS.index(self.accent) - COLOURS.index(self.colour)) % len(COLOURS) - 1
        return combo * STYLES + 1 + (list(PATTERNS).index(self.pattern) - 1) * (len(COLOURS) - 1) + other

    @classmethod
    def of(cls, number: int) -> Look:
        """The look of a number.

        >>> Look.of(Look("dress", "red", "striped", "blue").number)
        Look(category='dress', colour='red', pattern='striped', accent='blue')
        """
        category, colour, pattern, accent = (int(part) for part in parts(torch.tensor(number)))
        return cls(CATEGORIES[category], COLOURS[colour], tuple(PATTERNS)[pattern], ATTRIBUTES["accent"][accent])


def parts(looks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Category, colour, pattern and accent of look numbers, counted as in ATTRIBUTES (accent 0 is none)."""
    combo, style = looks // STYLES, looks % STYLES
    category, colour = combo // len(COLOURS), combo % len(COLOURS)
    pattern, other = 1 + (style - 1) // (len(COLOURS) - 1), (style - 1) % (len(COLOURS) - 1)
    plain, accent = style == 0, (colour + 1 + other) % len(COLOURS) + 1
    return category, colour, pattern.masked_fill(plain, 0), accent.masked_fill(plain, 0)


def assembled(category: Tensor, colour: Tensor, pattern: Tensor, other: Tensor) -> Tensor:
    """Look numbers of categories, colours, patterns and accents; `other` 0..10 counts the colours after the ground's."""
    style = torch.where(pattern == 0, 0, 1 + (pattern - 1) * (len(COLOURS) - 1) + other)
    return (category * len(COLOURS) + colour) * STYLES + style


def noun(colour: str, category: str) -> str:
    """Colour and category with the article English wants: "an orange bag", "a pair of navy trousers", "a dress"."""
    words = f"{colour} {category}".strip()
    if category == "trousers":
        return f"a pair of {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(look: Look, form: int = 0) -> str:
    """One way to say what a picture shows; form 0 is canonical.

    >>> caption(Look("dress", "red", "striped", "blue"))
    'a photo of a red dress with blue stripes, on white background'
    """
    detail = "" if look.pattern == "plain" else f" with {look.accent} {PATTERNS[look.pattern]}"
    named = noun(look.colour, look.category) + detail
    return FORMS[form].format(noun=named, plain=noun("", look.category), bare=f"{look.colour} {look.category}{detail}")


def group(look: Look) -> str:
    """Name of a look in tables and files: "red-dress-blue-stripes", "navy-ankle-boot"."""
    detail = "" if look.pattern == "plain" else f" {look.accent} {PATTERNS[look.pattern]}"
    return f"{look.colour} {look.category}{detail}".replace(" ", "-")


def asked(combo: int, again: int = 0) -> Look:
    """The look that a combo's first prompt asks for, or a later one: of four in a row one is plain, the others in the three patterns.

    So are of the first looks of all combos a quarter plain, of the second ones another, and so on.
    """
    category, place = divmod(combo, len(COLOURS))
    colour = COLOURS[place]
    pattern = list(PATTERNS)[((place + category) // 3 + (0, 2, 1, 3)[again]) % len(PATTERNS)]
    if pattern == "plain" or CATEGORIES[category] in BARE:
        return Look(CATEGORIES[category], colour)
    far = [other for other in COLOURS if apart(colour, other) >= 150]  # among which the accent is drawn; one that is too near goes on
    key = " ".join(["accent", str(combo), *["again"] * again])
    start = COLOURS.index(far[crc32(key.encode()) % len(far)])
    accent = next(other for other in COLOURS[start:] + COLOURS[:start] if apart(colour, other) >= APART)
    return Look(CATEGORIES[category], colour, pattern, accent)


def apart(one: str, other: str) -> int:
    """How far two colours' dyes are apart in red, green and blue together."""
    return sum(abs(a - b) for a, b in zip(PALETTE[one], PALETTE[other], strict=True))


def held_out(combo: int) -> bool:
    """A third of the combos, spread so that each category lacks 4 colours and each colour 3 or 4 categories."""
    category, colour = divmod(combo, len(COLOURS))
    return (category + colour) % 3 == 2


def prompted() -> list[Look]:
    """What the prompts ask for, in their order: one look of every combo, then three more of each that is not held out, of all a second one first.

    More prompts teach more than more pictures of each. Nobody asks for a shirt, which the judge itself often takes for a pullover or a coat.
    """
    combos = [combo for combo, (_, category) in enumerate(COMBOS) if category != "shirt"]
    again = [asked(combo, time) for time in (1, 2, 3) for combo in combos if not held_out(combo)]
    return list(dict.fromkeys([*map(asked, combos), *again]))


# ---------------------------------------------------------------------------------------------- pictures


def read_idx(path: Path) -> np.ndarray:
    """A gzipped file in LeCun's idx format: two zeros, type 8 (bytes), rank, big-endian sizes, the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise _missing(path) from None
    except (EOFError, OSError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): fetch the file again.") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise UserError(f"{path} is not an idx file of bytes (it begins with {raw[:4].hex()}): fetch the file again.")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4) if len(raw) >= 4 + 4 * raw[3] else (len(raw),)
    body = np.frombuffer(raw, np.uint8, offset=min(len(raw), 4 + 4 * raw[3]))
    if body.size != np.prod(shape):
        raise UserError(
            f"{path} holds {body.size} bytes where {' x '.join(map(str, shape))} were promised: fetch the file again."
        )
    return body.reshape(shape)


def check(folder: Path) -> None:
    """Raises UserError if one of the files is missing."""
    for path in (Path(folder) / name for names in FILES.values() for name in names):
        if not path.is_file():
            raise _missing(path)


def _missing(path: Path) -> UserError:
    return UserError(f"{path} is missing: install the Debian package dataset-fashion-mnist (or unpack it with dpkg-deb -x) "
                     "and give its folder share/datasets/fashion-mnist as --images.")


def load(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Official split -> grey pictures (n, 28, 28) as bytes, and their category numbers (n,)."""
    official = {}
    for split, names in FILES.items():
        pictures, labels = (read_idx(Path(folder) / name) for name in names)
        if pictures.ndim != 3 or pictures.shape[1:] != (28, 28) or labels.shape != pictures.shape[:1]:
            raise UserError(
                f"{Path(folder) / names[0]} and {names[1]} do not fit: {pictures.shape} pictures, {labels.shape} "
                f"labels, wanted (n, 28, 28) and (n,); fetch both files again."
            )
        official[split] = torch.tensor(pictures), torch.tensor(labels, dtype=torch.long)
    return official


def splits(labels: Tensor, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Name -> row numbers: `sizes[name]` garments of every category each, disjoint, in shuffled order."""
    wanted = sum(sizes.values())
    parts: dict[str, list[Tensor]] = {name: [] for name in sizes}
    for number, category in enumerate(CATEGORIES):
        rows = torch.nonzero(labels == number).flatten()
        if len(rows) < wanted:
            raise UserError(
                f"The images hold {len(rows)} of category {category!r} where the recipe wants {wanted}: "
                f"give the whole of Fashion-MNIST as --images."
            )
        rows = rows[torch.randperm(len(rows), generator=generator(seed, "split", number))]
        for name, chosen in zip(sizes, rows[:wanted].split(list(sizes.values())), strict=True):
            parts[name].append(chosen)
    return {
        name: torch.cat(chosen)[torch.randperm(len(CATEGORIES) * sizes[name], generator=generator(seed, name))]
        for name, chosen in parts.items()
    }


def enlarged(grey: Tensor) -> Tensor:
    """Grey pictures (b, 28, 28) of 0..255 at twice the size with an empty border: (b, 64, 64)."""
    twice = torch.nn.functional.interpolate(grey.float()[:, None], scale_factor=2, mode="bicubic", align_corners=False)
    border = (SIZE - twice.shape[-1]) // 2
    return torch.nn.functional.pad(twice[:, 0].clamp(0, 255), (border,) * 4)


def tones(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage in [0, 1] and light in [-1, 1] around each garment's own middle tone, (b, 64, 64) each."""
    # In Fashion-MNIST 0 is the background and dark cloth has high values.
    middle = grey.float().masked_fill(grey == 0, float("nan")).flatten(1).nanmedian(1).values.nan_to_num()  # (b,)
    large = enlarged(grey)
    cover = (large / 40).clamp(max=1)  # anti-aliased outlines keep a soft edge
    return cover, (middle[:, None, None] - large) / 255


def woven(pattern: Tensor, key: torch.Generator) -> Tensor:
    """How much of each pixel is the accent's, in [0, 1]: (b, 64, 64) for pattern numbers (b,).

    Lines are 16 pixels apart, two cells of the latent grid, and run through the middle of a cell: which of the two, and for
    stripes the direction, are drawn by key. Stripes cover 32 % of the cloth, checks (lines that cross) 36 %, dots 28 %.
    """
    count, device = len(pattern), pattern.device
    period = 16.0
    place = (4 + 8 * torch.randint(2, (2, count, 1, 1), generator=key)).to(device)
    across = (torch.rand(count, 1, 1, generator=key) < 0.5).expand(count, SIZE, SIZE).to(device)
    pixel = torch.arange(SIZE, device=device) + 0.5
    # signed distance in pixels to the middle of the nearest line, down and across
    down, along = (
        (line + start + period / 2) % period - period / 2 for line, start in zip((pixel[:, None], pixel[None, :]), place, strict=True)
    )
    down, along = down.expand(count, SIZE, SIZE), along.expand(count, SIZE, SIZE)

    def inside(distance: Tensor, reach: float) -> Tensor:
        return (reach - distance + 0.5).clamp(0, 1)  # anti-aliased

    stripes = inside(torch.where(across, along, down).abs(), period * 0.16)
    checks = torch.maximum(inside(down.abs(), period * 0.1), inside(along.abs(), period * 0.1))
    dots = inside((down**2 + along**2).sqrt(), period * 0.3)
    drawn = torch.stack([torch.zeros_like(stripes), stripes, checks, dots])  # (4, b, 64, 64)
    return drawn[pattern, torch.arange(count, device=device)]


def dyed(grey: Tensor, colour: Tensor, accent: Tensor, weave: Tensor, jitter: Tensor | None = None) -> Tensor:
    """Garments in two colours: their middle tone takes the named one, folds stay lighter and darker; (b, 3, 64, 64) in [0, 1].

    `colour` and `accent` (b,) count in COLOURS; `weave` (b, 64, 64) is the accent's share of each pixel; `jitter`
    (2, b, 3), standard normal, varies the dyes a little as shops' photos do.
    """
    table = torch.tensor(list(PALETTE.values()), device=grey.device) / 255
    dyes = torch.stack([table[colour], table[accent]])  # (2, b, 3)
    if jitter is not None:
        dyes = (dyes + 0.02 * jitter.to(dyes.device)).clamp(0, 1)
    cover, light = (tone[:, None] for tone in tones(grey))  # (b, 1, 64, 64)
    ground, over = dyes[..., None, None]
    dye = ground + weave[:, None] * (over - ground)  # (b, 3, 64, 64)
    cloth = dye + light.clamp(min=0) * 0.9 * (1 - dye) + light.clamp(max=0) * 0.9 * dye
    return 1 - cover * (1 - cloth)


def shifted(pictures: Tensor, key: torch.Generator, reach: int = 1) -> Tensor:
    """Each picture moved by up to `reach` pixels, white coming in from the border; (b, 3, h, w)."""
    height, width = pictures.shape[2:]
    wide = torch.nn.functional.pad(pictures, (reach,) * 4, value=1.0)
    down, right = torch.randint(2 * reach + 1, (2, len(pictures)), generator=key).tolist()
    moved = [image[:, y : y + height, x : x + width] for image, y, x in zip(wide, down, right, strict=True)]
    return torch.stack(moved)


def mirrored(pictures: Tensor, key: torch.Generator) -> Tensor:
    """Each picture as it is or with left and right exchanged, by chance; (b, 3, h, w)."""
    turned = torch.rand(len(pictures), 1, 1, 1, generator=key) < 0.5
    return torch.where(turned, pictures.flip(-1), pictures)


@dataclass(frozen=True)
class Wardrobe:
    """Grey garments of one split, to be dyed afresh whenever they are drawn."""

    grey: Tensor  # (n, 28, 28)
    category: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.category)

    def to(self, device: torch.device | str) -> Wardrobe:
        """The same on a device, where the pictures are then made; what is drawn by key stays the same."""
        return Wardrobe(self.grey.to(device), self.category.to(device))

    def draw(self, count: int, key: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random garments in random looks: pictures (count, 3, 64, 64) and look numbers (count,)."""
        rows = torch.randint(len(self), (count,), generator=key)
        looks = random_looks(self.category[rows], key)
        return self.worn(rows, looks, key), looks

    def of_category(self, category: Tensor, key: torch.Generator) -> Tensor:
        """Row numbers of random garments of these categories, (n,)."""
        rows = torch.empty_like(category)
        for number in range(len(CATEGORIES)):
            own, places = (torch.nonzero(of == number).flatten() for of in (self.category, category))
            rows[places] = own[torch.randint(len(own), (len(places),), generator=key)] if len(places) else rows[places]
        return rows

    def dressed(self, looks: Tensor, key: torch.Generator) -> Tensor:
        """A random garment in each of these looks: (n, 3, 64, 64)."""
        return self.worn(self.of_category(parts(looks)[0], key), looks, key)

    def worn(self, rows: Tensor, looks: Tensor, key: torch.Generator) -> Tensor:
        """These garments in these looks: (n, 3, 64, 64)."""
        _, colour, pattern, accent = parts(looks)
        jitter = torch.randn(2, len(rows), 3, generator=key)
        return dyed(self.grey[rows], colour, (accent - 1).clamp(min=0), woven(pattern, key), jitter)


def random_looks(category: Tensor, key: torch.Generator) -> Tensor:
    """Look numbers of these categories: any colour, the four patterns alike, any other colour as accent; (n,)."""
    shape = category.shape
    colour = torch.randint(len(COLOURS), shape, generator=key)
    pattern = torch.randint(len(PATTERNS), shape, generator=key)
    return assembled(category, colour, pattern, torch.randint(len(COLOURS) - 1, shape, generator=key))


def wardrobes(images: Path, sizes: dict[str, int], seed: int) -> dict[str, Wardrobe]:
    """Disjoint splits of the official training garments, and `test`: all official test garments."""
    official = load(images)
    grey, category = official["train"]
    parts = {name: Wardrobe(grey[rows], category[rows]) for name, rows in splits(category, sizes, seed).items()}
    return {**parts, "test": Wardrobe(*official["test"])}
