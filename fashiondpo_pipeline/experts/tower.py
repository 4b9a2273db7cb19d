"""A CLIP tower through open_clip's ordinary factory: pictures and texts to unit vectors."""

import logging
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from fashiondpo_pipeline.embedded import PREFIX, locate
from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.experts.texts import TILE, Texts
from fashiondpo_pipeline.identity import hash_path

LOCAL = "local-dir:"


@dataclass(eq=False)
class _Loaded:
    """A network, what is done to a picture before it, and its texts: each is encoded once for all experts on the tower."""

    net: Any
    see: Any
    texts: Texts


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

    def found(self) -> bool:
        """Whether its weights are on this disk; the network is not asked."""
        if self.model.startswith(LOCAL):
            return locate(self.model.removeprefix(LOCAL)).is_dir()
        if self.pretrained and Path(self.pretrained).is_file():
            return True
        from huggingface_hub import try_to_load_from_cache

        if self.model.startswith("hf-hub:"):
            at = self.model.removeprefix("hf-hub:") + "/"
        else:
            from open_clip import get_pretrained_cfg

            public = get_pretrained_cfg(self.model, self.pretrained or "")
            at = public.get("hf_hub", "")
            if not at:
                return bool(public.get("url")) and (Path("~/.cache/clip").expanduser() / Path(public["url"]).name).is_file()
        repository, _, file = at.rpartition("/")
        names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)

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
        from safetensors import SafetensorError

        quick = open_clip.get_pretrained_cfg(self.name, self.pretrained or "").get("quick_gelu", False)
        if quick and not (open_clip.get_model_config(self.name) or {}).get("quick_gelu", False):  # open_clip warns only, and scores all the same
            raise UserError(f"CLIP weights '{self.pretrained}' were trained with QuickGELU, and '{self.model}' is the model without it: "
                            f"name {self.model}-quickgelu")
        logging.getLogger().setLevel(logging.WARNING)  # open_clip reports each step of loading to the root logger
        try:
            net, see = open_clip.create_model_from_pretrained(self.name, self.pretrained, device=self.device)
            read = open_clip.get_tokenizer(self.name)
        except (RuntimeError, OSError, ValueError, SafetensorError, pickle.UnpicklingError) as problem:
            if self.model.startswith(LOCAL) or self.pretrained:
                check_pulled(Path(self.name.removeprefix(LOCAL) if self.model.startswith(LOCAL) else self.pretrained or ""))
            detail = str(problem).splitlines()[0]
            raise UserError(
                f"CLIP model '{self.model}' with weights '{self.pretrained}' cannot be loaded ({detail}): "
                "check both names, or name a folder with local-dir:PATH"
            ) from problem
        net.eval().requires_grad_(False)
        device = self.device  # not self, which holds what holds this function

        def encode(texts: list[str]) -> np.ndarray:
            from fashiondpo_pipeline.tiles import tiled

            return tiled(lambda tile: net.encode_text(tile.to(device), normalize=True).float().cpu(), read(texts), TILE).numpy()

        return _Loaded(net, see, Texts(encode))

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

    def texts(self, texts: list[str], coming: Iterator[str] = iter(())) -> np.ndarray:  # noqa: B008 - nothing is taken from an empty one
        """(b, d) float32 unit vectors of texts; a tile that is not full is filled up with what is `coming`."""
        return self._loaded.texts(texts, coming)

    @property
    def preprocessing(self) -> str:
        """What is done to a picture before the network sees it."""
        return re.sub(r"\s+", " ", re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(self._loaded.see)))
