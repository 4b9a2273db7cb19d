"""Prompts as the text encoders understand them, in a table: encoded once a run, read by sampling and finetuning.

One row is one prompt; a column for each part of its condition, as bytes, with shape and type in the schema. fp16 and fp32 are kept
as they are; bfloat16 is widened to fp32, which loses nothing and which every reader knows.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fashiondpo_pipeline.sampling import Parts

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "float32"}


def to_table(encodings: dict[str, Parts]) -> pa.Table:
    """A table of prompts and their parts."""
    first = next(iter(encodings.values()))
    layout: dict[str, Any] = {name: {"shape": list(part.shape), "dtype": _NAMES[part.dtype]} for name, part in first.items()}
    columns: list[Any] = [pa.array(list(encodings))]
    for name, of in layout.items():
        parts = [parts[name].cpu().to(getattr(torch, of["dtype"])).contiguous().numpy().tobytes() for parts in encodings.values()]
        columns.append(pa.array(parts, pa.binary()))
    schema = pa.schema(
        [pa.field("prompt", pa.string()), *(pa.field(name, pa.binary(), metadata={"layout": json.dumps(of)}) for name, of in layout.items())],
        metadata={"about": "one row is one prompt as the text encoders understand it", "layout": json.dumps(layout)},
    )
    return pa.table(columns, schema=schema)


def of_table(table: pa.Table) -> dict[str, Parts]:
    """The prompts of a table made by `to_table`, without copying."""
    layout = json.loads(table.schema.metadata[b"layout"])
    rows = table.to_pylist()
    return {row["prompt"]: {name: _tensor(row[name], **of) for name, of in layout.items()} for row in rows}


def _tensor(data: bytes, shape: list[int], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype).reshape(shape))
