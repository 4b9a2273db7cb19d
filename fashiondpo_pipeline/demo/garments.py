"""Garments of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) as small colour product photos with captions."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.later import Later

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = Later("torch")

SIZE = 32

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
LABELS = tuple(f"{colour} {category}" for colour, category in COMBOS)

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


def noun(colour: str, category: str) -> str:
    """Colour and category with the article English wants: "an orange bag", "a pair of navy trousers", "a dress"."""
    words = f"{colour} {category}".strip()
    if category == "trousers":
        return f"a pair of {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(colour: str, category: str, form: int = 0) -> str:
    """One way to say what a picture shows; form 0 is canonical."""
    return FORMS[form].format(noun=noun(colour, category), plain=noun("", category), bare=f"{colour} {category}")


def group(colour: str, category: str) -> str:
    return f"{colour} {category}".replace(" ", "-")


def held_out(combo: int) -> bool:
    """A third of the combos, spread so that each category lacks 4 colours and each colour 3 or 4 categories."""
    category, colour = divmod(combo, len(COLOURS))
    return (category + colour) % 3 == 2


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


def tones(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage in [0, 1] and light in [-1, 1] around each garment's own middle tone, both padded to 32 x 32."""
    # 28 -> 32 with empty rows; in Fashion-MNIST 0 is the background and dark cloth has high values.
    grey = torch.nn.functional.pad(grey.float(), (2, 2, 2, 2))  # (b, 32, 32)
    middle = grey.masked_fill(grey == 0, float("nan")).flatten(1).nanmedian(1).values.nan_to_num()  # (b,)
    cover = (grey / 40).clamp(max=1)  # anti-aliased outlines keep a soft edge
    return cover, (middle[:, None, None] - grey) / 255


def tint(grey: Tensor, colour: Tensor, jitter: Tensor | None = None) -> Tensor:
    """Dye garments: their middle tone takes the named colour, folds stay lighter and darker; (b, 3, 32, 32) in [0, 1].

    `colour` (b,) counts in COLOURS; `jitter` (b, 3), standard normal, varies the dye a little as shops' photos do.
    """
    dye = torch.tensor(list(PALETTE.values()))[colour] / 255  # (b, 3)
    if jitter is not None:
        dye = (dye + 0.02 * jitter).clamp(0, 1)
    cover, light = (tone[:, None] for tone in tones(grey))  # (b, 1, 32, 32)
    dye = dye[:, :, None, None]
    cloth = dye + light.clamp(min=0) * 0.9 * (1 - dye) + light.clamp(max=0) * 0.9 * dye
    return 1 - cover * (1 - cloth)


def shifted(pictures: Tensor, key: torch.Generator, reach: int = 1) -> Tensor:
    """Each picture moved by up to `reach` pixels, white coming in from the border; (b, 3, h, w)."""
    height, width = pictures.shape[2:]
    wide = torch.nn.functional.pad(pictures, (reach,) * 4, value=1.0)
    down, right = torch.randint(2 * reach + 1, (2, len(pictures)), generator=key).tolist()
    moved = [image[:, y : y + height, x : x + width] for image, y, x in zip(wide, down, right, strict=True)]
    return torch.stack(moved)


@dataclass(frozen=True)
class Wardrobe:
    """Grey garments of one split, to be dyed afresh whenever they are drawn."""

    grey: Tensor  # (n, 28, 28)
    category: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.category)

    def draw(self, count: int, key: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random garments in random colours: pictures (count, 3, 32, 32) and combo numbers (count,)."""
        rows = torch.randint(len(self), (count,), generator=key)
        return self.dyed(rows, torch.randint(len(COLOURS), (count,), generator=key), key)

    def each_combo(self, key: torch.Generator) -> tuple[Tensor, Tensor]:
        """One garment for each of the 120 combos, in order."""
        rows = []
        for number in range(len(CATEGORIES)):
            own = torch.nonzero(self.category == number).flatten()
            rows.append(own[torch.randint(len(own), (len(COLOURS),), generator=key)])
        return self.dyed(torch.cat(rows), torch.arange(len(COMBOS)) % len(COLOURS), key)

    def dyed(self, rows: Tensor, colour: Tensor, key: torch.Generator) -> tuple[Tensor, Tensor]:
        jitter = torch.randn(len(rows), 3, generator=key)
        return tint(self.grey[rows], colour, jitter), self.category[rows] * len(COLOURS) + colour


def wardrobes(images: Path, sizes: dict[str, int], seed: int) -> dict[str, Wardrobe]:
    """Disjoint splits of the official training garments, and `test`: all official test garments."""
    official = load(images)
    grey, category = official["train"]
    parts = {name: Wardrobe(grey[rows], category[rows]) for name, rows in splits(category, sizes, seed).items()}
    return {**parts, "test": Wardrobe(*official["test"])}
