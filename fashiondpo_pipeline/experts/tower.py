"""A CLIP tower through open_clip's ordinary factory: pictures and texts to unit vectors."""

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fashiondpo_pipeline.embedded import PREFIX, locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.identity import hash_path

LOCAL = "local-dir:"
TILE = 64  # rows in each call, always filled up: kernels round by shape, and a score must not depend on its neighbours


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

    @cached_property
    def _net(self) -> tuple[Any, Any, Any]:
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
        return net.eval().requires_grad_(False), see, read

    def pictures(self, pictures: list[Any]) -> np.ndarray:
        """(b, d) float32 unit vectors of PIL pictures."""
        import torch

        net, see, _ = self._net
        return self._tiled(torch.stack([see(picture) for picture in pictures]), net.encode_image)

    def texts(self, texts: list[str]) -> np.ndarray:
        """(b, d) float32 unit vectors of texts."""
        net, _, read = self._net
        return self._tiled(read(texts), net.encode_text)

    def _tiled(self, inputs: Any, encode: Any) -> np.ndarray:
        from fashiondpo_pipeline.tiles import tiled

        return tiled(lambda tile: encode(tile.to(self.device), normalize=True).float().cpu(), inputs, TILE).numpy()
