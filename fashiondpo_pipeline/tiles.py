"""Calls of one shape: rows go through a network in tiles that are always full, so a row's numbers never depend on others."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.inference_mode()
def tiled(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """function(rows) computed `size` rows at a time, the last tile filled up with copies of its last row; (n, ...)."""
    results = []
    for tile in rows.split(size):
        full = torch.cat([tile, tile[-1:].expand(size - len(tile), *tile.shape[1:])]) if len(tile) < size else tile
        results.append(function(full)[: len(tile)])
    return torch.cat(results)
