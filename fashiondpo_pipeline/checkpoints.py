"""Where a model's parts lie: a diffusers folder, a single-file checkpoint, or a hub id. Parts are read one by one; never a pickle's code."""

import importlib
import json
import pickle
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashiondpo_pipeline.embedded import PREFIX, locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.identity import hash_path
from fashiondpo_pipeline.registry import FAMILIES, did_you_mean

if TYPE_CHECKING:
    import torch  # imported in methods only: `fdpo status` asks what a model is and loads none

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # what else names a model is a path
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
OFFLINE = ("a diffusers folder, a single-file checkpoint, or a hub id that can be reached (offline: run `hf download ID` where there is "
           "a network, copy the folder here and name it; or copy the hub's cache and set HF_HOME)")


def open_source(model: str, revision: str | None = None, variant: str | None = None, config: str | None = None) -> "Source":
    """The source of a model by its name in the configuration."""
    where = locate(model)
    local = model.startswith(PREFIX) or where.exists() or not HUB_ID.fullmatch(model)
    if local and where.is_file():
        return SingleFile(model, where, config)
    if local:
        return Folder(model, where, variant)
    return Hub(model, revision, variant)


class Source:
    """Parts of a diffusers pipeline by name."""

    def __init__(self, name: str):
        self.name = name

    @cached_property
    def index(self) -> dict:
        """model_index.json."""
        raise NotImplementedError

    @property
    def family(self) -> str:
        """diffusers' class of the pipeline. Raises UserError if no family reads it."""
        found = self.index.get("_class_name", "")
        if found not in FAMILIES.names():
            raise UserError(f"generator.model: {self.name} is a '{found}', for which no denoiser is known here; "
                            f"{did_you_mean(found, list(FAMILIES.names()))}")
        return found

    @property
    def text_parts(self) -> list[str]:
        """Names of what turns a prompt into a condition."""
        return sorted(name for name in self.index if name.startswith(("text_encoder", "tokenizer")))

    def identity(self, *parts: str) -> str:
        """A hash of these parts, or of everything."""
        raise NotImplementedError

    def config(self, part: str) -> dict:
        """A part's configuration; its weights are not read."""
        raise NotImplementedError

    def scheduler(self) -> Any:
        """The noise schedule."""
        import torch

        return self.part("scheduler", torch.float32)

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        """One part, loaded; None where the model goes without (a text encoder left out)."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Drop what is held of parts that nobody has asked for."""

    def _class(self, name: str) -> Any:
        library, kind = self.index[name]
        if library not in ("diffusers", "transformers"):
            raise UserError(f"generator.model: {self.name} wants code of '{library}' for its {name}; only diffusers' and transformers' own "
                            "classes are loaded")
        return getattr(importlib.import_module(library), kind)

    def _refuse(self, problem: Exception) -> UserError:
        return UserError(f"generator.model: '{self.name}' cannot be loaded ({str(problem).splitlines()[0]}); it must be {OFFLINE}")


class Folder(Source):
    """A folder as `save_pretrained` writes it."""

    def __init__(self, name: str, where: Path, variant: str | None):
        super().__init__(name)
        self.where, self.variant = where, variant
        if not (where / "model_index.json").is_file():
            if not where.exists():
                raise UserError(f"generator.model: there is nothing at {where}; check the path (relative ones start in the working folder)")
            raise UserError(f"generator.model: {where} is not a diffusers folder (no model_index.json); name one that is")

    @cached_property
    def index(self) -> dict:
        return _read_json(self.where / "model_index.json")

    def identity(self, *parts: str) -> str:
        if not parts:
            return hash_path(self.where, "generator.model")
        return "-".join(hash_path(self.where / part, "generator.model") for part in parts if (self.where / part).exists())

    def config(self, part: str) -> dict:
        return _read_json(self.where / part / "config.json")

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        if self.index.get(name, [None])[0] is None:
            return None
        kind = self._class(name)
        import torch

        options: dict[str, Any] = {}
        if issubclass(kind, torch.nn.Module):
            options = {"dtype": dtype, "use_safetensors": True, "variant": self.variant}
        try:
            return kind.from_pretrained(self._place, subfolder=name, **self._where_options, **options)
        except (OSError, ValueError, RuntimeError) as problem:
            raise self._refuse(problem) from problem

    @property
    def _place(self) -> str | Path:
        return self.where

    @property
    def _where_options(self) -> dict[str, Any]:
        return {"local_files_only": True}


class Hub(Folder):
    """A repository of the model hub; only what is used is downloaded."""

    def __init__(self, name: str, revision: str | None, variant: str | None):
        Source.__init__(self, name)
        self.revision, self.variant = revision, variant

    def _file(self, path: str) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.name, path, revision=self.revision))
        except (OSError, ValueError) as problem:  # every hub error is one of these
            raise self._refuse(problem) from problem

    @cached_property
    def index(self) -> dict:
        return _read_json(self._file("model_index.json"))

    def identity(self, *parts: str) -> str:
        return f"{self.name}@{self.revision or 'main'}"

    def config(self, part: str) -> dict:
        return _read_json(self._file(f"{part}/config.json"))

    @property
    def _place(self) -> str | Path:
        return self.name

    @property
    def _where_options(self) -> dict[str, Any]:
        return {"revision": self.revision}


class SingleFile(Source):
    """One file with everything in it, as the web interfaces trade them; `config` is a diffusers folder with its configurations.

    Without `config` diffusers fetches the configuration from the hub. A .ckpt is a pickle: it is read with `weights_only`, which
    runs no code, or refused.
    """

    def __init__(self, name: str, where: Path, config: str | None):
        super().__init__(name)
        self.where = where
        self.shape = locate(config) if config else None
        if where.suffix not in SINGLE:
            raise UserError(f"generator.model: {where} is neither a folder nor a checkpoint ({', '.join(SINGLE)})")
        if self.shape is None:
            raise UserError(f"generator.model: {where} is a single file, which holds weights but not the model's configuration: name a "
                            "diffusers folder of the same model in generator.config (its weights are not read)")
        if not (self.shape / "model_index.json").is_file():
            raise UserError(f"generator.config: {self.shape} is not a diffusers folder (no model_index.json); name one that is")

    @cached_property
    def index(self) -> dict:
        assert self.shape is not None
        return _read_json(self.shape / "model_index.json")

    def identity(self, *parts: str) -> str:
        return hash_path(self.where, "generator.model")

    def config(self, part: str) -> dict:
        assert self.shape is not None
        return _read_json(self.shape / part / "config.json")

    def scheduler(self) -> Any:
        return self._class("scheduler").from_pretrained(self.shape, subfolder="scheduler", local_files_only=True)

    @cached_property
    def _whole(self) -> Any:
        import torch

        pipeline = getattr(importlib.import_module("diffusers"), self.family)
        try:
            return pipeline.from_single_file(str(self._safe()), config=str(self.shape), local_files_only=True, dtype=torch.float32)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError) as problem:
            raise UserError(f"generator.model: {self.where} does not fit the model of generator.config ({str(problem).splitlines()[0]})") from problem

    def _safe(self) -> Path:
        """The file, once it is sure that reading it runs no code."""
        import torch

        if self.where.suffix != ".safetensors":
            try:
                torch.load(self.where, map_location="meta", weights_only=True, mmap=True)
            except (pickle.UnpicklingError, RuntimeError) as problem:
                raise UserError(f"generator.model: {self.where} is a pickle that holds more than weights ({str(problem).splitlines()[0]}): "
                                "reading it could run code; use a .safetensors of the same model") from problem
        return self.where

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        import torch

        found = getattr(self._whole, name, None)
        return found.to(dtype) if isinstance(found, torch.nn.Module) else found

    def let_go(self) -> None:
        self.__dict__.pop("_whole", None)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"generator.model: {path} is missing; the model is not whole") from None
    except ValueError as problem:
        raise UserError(f"generator.model: {path} is damaged ({problem}); get the model anew") from problem
