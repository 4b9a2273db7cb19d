"""The two tables of the embedded default: real garments to show and to compare with, and prompts to draw."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from fashiondpo_pipeline.demo.garments import CATEGORIES, COLOURS, COMBOS, Wardrobe, caption, generator, group, held_out

# One garment in five of each colour and category is kept for comparisons only.
TEST_SHARE = 5


def png(picture: Tensor) -> bytes:
    """A picture (3, h, w) in [0, 1] as the bytes of a PNG file."""
    pixels = (picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()  # (h, w, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def catalog(wardrobe: Wardrobe, seed: int) -> pa.Table:
    """Every garment of the wardrobe once; each category is dealt out evenly to the colours."""
    rows = []
    for combo, (colour, category) in enumerate(COMBOS):
        own = torch.nonzero(wardrobe.category == CATEGORIES.index(category)).flatten()
        share = own[COLOURS.index(colour) :: len(COLOURS)]
        dye = torch.full((len(share),), COLOURS.index(colour))
        pictures, _ = wardrobe.dyed(share, dye, generator(seed, "catalog", combo))
        for number, picture in enumerate(pictures):
            item = f"{group(colour, category)}-{number:02d}"
            rows.append(
                {
                    "item": item,
                    "picture": {"bytes": png(picture), "path": f"{item}.png"},
                    "category": category,
                    "colour": colour,
                    "caption": caption(colour, category),
                    "split": "test" if number % TEST_SHARE == TEST_SHARE - 1 else "train",
                }
            )
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.Table.from_pylist(rows, columns(picture=picture, strings=("category", "colour", "caption", "split")))


def columns(picture: pa.DataType, strings: tuple[str, ...]) -> pa.Schema:
    """Schema with the note by which Hugging Face `datasets` knows that `picture` is to be decoded."""
    fields = [("item", pa.string()), ("picture", picture), *((name, pa.string()) for name in strings)]
    features = {name: {"dtype": "string", "_type": "Value"} for name, _ in fields} | {"picture": {"_type": "Image"}}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def prompts() -> pa.Table:
    """The 120 canonical captions: 80 to tune on and 40 held out, all categories and colours in both."""
    return pa.Table.from_pylist(
        [
            {
                "group": group(colour, category),
                "prompt": caption(colour, category),
                "split": "held-out" if held_out(combo) else "train",
                "category": category,
                "colour": colour,
            }
            for combo, (colour, category) in enumerate(COMBOS)
        ]
    )


def write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")
