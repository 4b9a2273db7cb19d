"""Where an expert's weights lie: on this disk, or at one commit of the model hub. They are read without running code.

A place is a path, or `hf://OWNER/NAME@COMMIT` with `/FILE` where one file is meant. The commit is part of it, as a branch can move
under an expert whose scores are kept.
"""

import pickle
import re
import struct
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashiondpo_pipeline import hub
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError, check_pulled

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "hf://"
_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?:/(?P<file>[^/].*))?")
_BARE = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SIGNS = ["config.json", "preprocessor_config.json", "tokenizer_config.json"]  # of a network, what makes pictures fit it, a tokenizer
DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, AssertionError, TypeError, AttributeError, ArithmeticError, struct.error,
           zipfile.BadZipFile)  # what torch's reader says, by where the damage is
OFFLINE = "offline, get it where there is a network and name the local path, or copy the hub's cache and set HF_HOME"


@dataclass(frozen=True)
class Place:
    """A file or folder as a configuration names it; `option` says where, for errors. Making one looks at no disk.

    revision: of a bare OWNER/NAME, which is looked for in the hub's cache where there is no such path; who takes such names loads them.
    """

    name: str
    option: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.on_hub and not _HUB.fullmatch(self.name):
            raise UserError(f"{self.option} '{self.name}': write hf://OWNER/NAME@COMMIT, with /FILE for one file; COMMIT is all 40 digits, "
                            "as a branch or tag can move")

    @property
    def on_hub(self) -> bool:
        return self.name.startswith(PREFIX)

    @cached_property
    def _hub(self) -> dict[str, Any]:
        found = _HUB.fullmatch(self.name)
        assert found
        return found.groupdict()

    def files(self, role: str) -> dict[str, Path]:
        """For an expert's `files()`: what is on this disk is known by its content, what is on the hub by the commit in its name."""
        return {} if self.on_hub else {role: locate(self.name)}

    def found(self) -> Path | None:
        """Where it is on this disk, None if it is not; the network is not asked. Of a whole repository one of its configurations tells."""
        if not self.on_hub and ((path := locate(self.name)).exists() or not _BARE.fullmatch(self.name)):
            return path if path.exists() else None
        from huggingface_hub import try_to_load_from_cache

        hub: dict[str, Any] = self._hub if self.on_hub else {"repository": self.name, "commit": self.revision, "file": None}
        files = [hub["file"]] if hub["file"] else _SIGNS
        kept = (try_to_load_from_cache(hub["repository"], file, revision=hub["commit"]) for file in files)
        return next((Path(at) for at in kept if isinstance(at, str)), None)

    def file(self) -> Path:
        """The one file, fetched from the hub if need be. Raises UserError if it cannot be had."""
        if not self.on_hub:
            path = self._path()
            if not path.is_file():
                raise UserError(f"{self.option}: {path} is a folder; name the file with the weights in it")
            return path
        if not self._hub["file"]:
            raise UserError(f"{self.option} '{self.name}': name the file too, {self.name}/FILE")
        try:
            return hub.fetch(self._hub["repository"], self._hub["file"], self._hub["commit"])
        except (OSError, ValueError) as problem:  # every hub error is one of these
            raise self.refuse(problem) from problem

    def source(self) -> tuple[str, dict[str, Any]]:
        """(name, options) that transformers' `from_pretrained` takes."""
        if self.on_hub:
            return self._hub["repository"], {"revision": self._hub["commit"]}
        return str(self._path()), {"local_files_only": True}

    def _path(self) -> Path:
        path = locate(self.name)
        if not path.exists():
            raise UserError(f"{self.option}: there is nothing at {path}; check the path (relative ones start in the working folder), "
                            "or name a place on the hub as hf://OWNER/NAME@COMMIT")
        return path

    def refuse(self, problem: Exception) -> UserError:
        """What to tell the person whose model cannot be loaded."""
        return UserError(f"{self.option} '{self.name}' cannot be loaded ({gist(problem)})" + (f"; {OFFLINE}" if self.on_hub else ""))


def read_weights(place: Place) -> "dict[str, Tensor]":
    """Name -> tensor of a .safetensors file, or of a pickled state dict (.pt, .pth, .bin, .ckpt) read with `weights_only`.

    A wrapping {"state_dict": ...} and the prefix that parallel training leaves are taken off. Raises UserError for anything else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = place.file()
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as problem:
        check_pulled(path)
        raise UserError(f"{place.option}: {path} holds something other than weights, and reading such a pickle can run code: "
                        "use a .safetensors, or a file of plain tensors") from problem
    except (SafetensorError, *DAMAGED) as problem:
        check_pulled(path)
        raise UserError(f"{place.option}: {path} is cut off or damaged ({gist(problem)}); get it anew") from problem
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not (isinstance(found, dict) and found and all(isinstance(value, torch.Tensor) for value in found.values())):
        raise UserError(f"{place.option}: {path} is no state dict (names with tensors); save the model's state_dict()")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def check_names(place: Place, found: "dict[str, Tensor]", wanted: "dict[str, Tensor]", what: str) -> None:
    """Raises UserError, with an example of each kind, unless exactly the wanted names are there in the wanted shapes."""
    lacking, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name].shape != found[name].shape]
    faults = [f"{len(names)} {kind}, such as {names[0]}" for kind, names in (("missing", lacking), ("not known", extra)) if names]
    if wrong:
        faults.append(f"{wrong[0]} is {_size(found[wrong[0]])} instead of {_size(wanted[wrong[0]])}")
    if faults:
        raise UserError(f"{place.option}: the weights in '{place.name}' are not those of {what} ({'; '.join(faults)})")


def _size(tensor: "Tensor") -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def gist(problem: Exception) -> str:
    """The first line of what a library says."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def pretrained(kind: Any, place: Place, **options: Any) -> Any:
    """kind.from_pretrained of a place, in evaluation mode. Raises UserError if it cannot be loaded, or if weights are missing.

    transformers alone would fill in random numbers and go on.
    """
    from safetensors import SafetensorError

    source, where = place.source()
    network = hasattr(kind, "config_class")
    try:
        found = kind.from_pretrained(source, **where, **options, **({"output_loading_info": True} if network else {}))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as problem:
        check_pulled(Path(source))
        raise place.refuse(problem) from problem
    if not network:
        return found
    net, told = found
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise UserError(f"{place.option} '{place.name}' is not a whole {kind.__name__}: {len(lacking)} weights are missing, such as {lacking[0]}")
    return net.eval().requires_grad_(False)
