"""The two tables of the embedded default: real garments to show and to compare with, and prompts to draw."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from fashiondpo_pipeline.demo.garments import (
    CATEGORIES,
    COLOURS,
    COMBOS,
    Look,
    Wardrobe,
    caption,
    generator,
    group,
    held_out,
    prompted,
)

# One garment in five of each look is kept for comparisons only.
TEST_SHARE = 5


def png(picture: Tensor) -> bytes:
    """A picture (3, h, w) in [0, 1] as the bytes of a PNG file."""
    pixels = (picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()  # (h, w, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def catalog(wardrobe: Wardrobe, seed: int, plain: int, patterned: int) -> pa.Table:
    """Garments to compare with: so many of every colour and category, plain, and so many of every patterned look that is asked for.

    No garment comes twice; each category is dealt out to its looks.
    """
    rows = []
    for category in CATEGORIES:
        own = torch.nonzero(wardrobe.category == CATEGORIES.index(category)).flatten()
        looks = [Look(category, colour) for colour in COLOURS]
        looks += [look for look in prompted() if look.category == category and look.pattern != "plain"]
        for look in looks:
            each = plain if look.pattern == "plain" else patterned
            share, own = own[:each], own[each:]
            key = generator(seed, "catalog", look.number)
            pictures = wardrobe.worn(share, torch.full((len(share),), look.number), key)
            rows += [row(look, number, picture, each) for number, picture in enumerate(pictures)]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.Table.from_pylist(rows, columns(picture=picture, strings=(*Look._fields, "caption", "split")))


def row(look: Look, number: int, picture: Tensor, each: int) -> dict:
    item = f"{group(look)}-{number:02d}"
    return {
        "item": item,
        "picture": {"bytes": png(picture), "path": f"{item}.png"},
        **look._asdict(),
        "caption": caption(look),
        "split": "test" if number >= each - max(1, each // TEST_SHARE) else "train",
    }


def columns(picture: pa.DataType, strings: tuple[str, ...]) -> pa.Schema:
    """Schema with the note by which Hugging Face `datasets` knows that `picture` is to be decoded."""
    fields = [("item", pa.string()), ("picture", picture), *((name, pa.string()) for name in strings)]
    features = {name: {"dtype": "string", "_type": "Value"} for name, _ in fields} | {"picture": {"_type": "Image"}}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def prompts() -> pa.Table:
    """Canonical captions, 264 to tune on and 36 held out: all colours, patterns and categories but shirts in both."""
    return pa.Table.from_pylist(
        [
            {
                "group": group(look),
                "prompt": caption(look),
                "split": "held-out" if held_out(COMBOS.index((look.colour, look.category))) else "train",
                **look._asdict(),
            }
            for look in prompted()
        ]
    )


def write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")
