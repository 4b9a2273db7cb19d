"""Randomness by key: the same key gives the same numbers in every process, batch, shard and resume."""

import hashlib
import json


def key(*parts: str | int) -> int:
    """A 63-bit seed from what it is for; sha256 of canonical JSON, as `hash` is salted and counters depend on order.

    >>> key(7, "sample", 1, "navy-boot", 0) == key(7, "sample", 1, "navy-boot", 0)
    True
    >>> key("ab", "c") == key("a", "bc")
    False
    """
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: str | int):
    """A CPU torch.Generator for this key; CPU, so that the device never changes a picture."""
    import torch

    return torch.Generator().manual_seed(key(*parts))
