"""A CLIP tower through open_clip's ordinary factory: pictures and texts to unit vectors."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from fashiondpo_pipeline.embedded import PREFIX, locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.identity import hash_path

LOCAL = "local-dir:"
TILE = 64  # rows in each call, always filled up: kernels round by shape, and a score must not depend on its neighbours


@dataclass(eq=False)
class _Loaded:
    """A network, what it does to a picture, and what it does to texts."""

    net: Any
    see: Any
    read: Any


_SHARED: WeakValueDictionary[tuple, _Loaded] = WeakValueDictionary()  # several experts on one tower hold the same network


class Tower:
    """model, pretrained: as open_clip.create_model_from_pretrained takes them; `local-dir:PATH` for a folder.

    Raises UserError when loading if the model is unknown or has no weights (open_clip alone would score with random ones).
    """

    def __init__(self, model: str, pretrained: str | None = None, device: str = "cpu"):
        self.model, self.pretrained, self.device = model, pretrained, device

    @property
    def name(self) -> str:
        """What open_clip is given."""
        return LOCAL + str(locate(self.model.removeprefix(LOCAL)).resolve()) if self.model.startswith(LOCAL) else self.model

    def identity(self) -> str:
        """Hash of the folder's files, or the name of public weights."""
        if self.model.startswith(LOCAL):
            return hash_path(locate(self.model.removeprefix(LOCAL)), f"CLIP model '{self.model}'")
        if self.pretrained and Path(self.pretrained).is_file():
            return hash_path(Path(self.pretrained), "CLIP weights")
        if self.model.startswith(PREFIX) or not (self.pretrained or self.model.startswith("hf-hub:")):
            weights = "name its weights too (pretrained: laion2b_s34b_b79k)"
            raise UserError(f"CLIP model '{self.model}': {weights}, or a {LOCAL}PATH")
        return f"{self.model}/{self.pretrained}"

    def load(self) -> None:
        """Have the network in memory: at once, as several threads must not each load it."""
        self._loaded  # noqa: B018 - a cached property is made by looking at it

    @cached_property
    def _loaded(self) -> _Loaded:
        key = self.name, self.identity(), self.device
        found = _SHARED.get(key) or self._load()
        _SHARED[key] = found
        return found

    def _load(self) -> _Loaded:
        import open_clip

        logging.getLogger().setLevel(logging.WARNING)  # open_clip reports each step of loading to the root logger
        try:
            net, see = open_clip.create_model_from_pretrained(self.name, self.pretrained, device=self.device)
            read = open_clip.get_tokenizer(self.name)
        except (RuntimeError, OSError, ValueError) as problem:
            detail = str(problem).splitlines()[0]
            raise UserError(
                f"CLIP model '{self.model}' with weights '{self.pretrained}' cannot be loaded ({detail}): "
                "check both names, or name a folder with local-dir:PATH"
            ) from problem
        return _Loaded(net.eval().requires_grad_(False), see, read)

    def see(self, picture: Any) -> Any:
        """What the tower sees of a PIL picture: (3, h, w) float32, on the CPU; safe to call in several threads."""
        return self._loaded.see(picture)

    def encode(self, seen: list[Any]) -> Any:
        """(b, d) float32 unit vectors, on the device, of at most TILE pictures that `see` has seen; a GPU may still be at it."""
        import torch

        tile = torch.stack([*seen, *seen[-1:] * (TILE - len(seen))])  # (TILE, 3, h, w)
        if self.device.startswith("cuda"):
            tile = tile.pin_memory()
        with torch.inference_mode():
            return self._loaded.net.encode_image(tile.to(self.device, non_blocking=True), normalize=True).float()[: len(seen)]

    def pictures(self, pictures: list[Any]) -> np.ndarray:
        """(b, d) float32 unit vectors of PIL pictures."""
        tiles = [pictures[start : start + TILE] for start in range(0, len(pictures), TILE)]
        return np.concatenate([self.encode([self.see(picture) for picture in tile]).cpu().numpy() for tile in tiles])

    def texts(self, texts: list[str]) -> np.ndarray:
        """(b, d) float32 unit vectors of texts."""
        from fashiondpo_pipeline.tiles import tiled

        own = self._loaded
        return tiled(lambda tile: own.net.encode_text(tile.to(self.device), normalize=True).float().cpu(), own.read(texts), TILE).numpy()
