"""Where a model's parts lie: a diffusers folder, a single-file checkpoint, or a hub id. Parts are read one by one; never a pickle's code."""

import importlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fashiondpo_pipeline import hub
from fashiondpo_pipeline.embedded import PREFIX, locate
from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.identity import hash_path
from fashiondpo_pipeline.registry import FAMILIES, did_you_mean

if TYPE_CHECKING:
    import torch  # imported in methods only: `fdpo status` asks what a model is and loads none

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # what else names a model is a path
COMMIT = re.compile(r"[0-9a-f]{40}")
# keys of a checkpoint beside its weights, and what the note modelspec.prediction_type may say
EDM_MARKS = frozenset({"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"})
ALPHA_BAR = "alphas_cumprod"
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
SINGLE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
OFFLINE = ("a diffusers folder, a single-file checkpoint, or a hub id that can be reached (offline: run `hf download ID` where there is "
           "a network, copy the folder here and name it; or copy the hub's cache and set HF_HOME)")


class Unreachable(UserError):
    """A hub that does not answer, and a model that is not in its cache."""


PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors")  # as peft and diffusers name them in a folder


def lora_files(path: Path) -> tuple[Path, Path | None]:
    """(the .safetensors file, peft's configuration or None) of a LoRA: a file, or a folder as peft or diffusers writes it.

    Raises UserError where there is none, or only a pickle.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in LORA_FILES if (path / name).is_file()), path)
        if file == path:
            raise UserError(f"there is no LoRA in the folder {path} ({' or '.join(LORA_FILES)}): name a .safetensors file")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file: others may hold a pickle, which can run code when read; convert it first")
    if not file.is_file():
        raise UserError(f"there is no LoRA at {file}: name a .safetensors file that exists")
    config = file.with_name(PEFT_CONFIG)
    return file, config if file.name == PEFT_FILE and config.is_file() else None


def lora_identity(path: Path) -> str:
    """A hash of a LoRA, with what says beside it how strong it is."""
    file, config = lora_files(path) if path.exists() else (path, None)
    found = hash_path(file, "generator.lora")
    return f"{found}+{hash_path(config, 'generator.lora')}" if config else found


def open_source(model: str, revision: str | None = None, variant: str | None = None, config: str | None = None) -> "Source":
    """The source of a model by its name in the configuration."""
    where = locate(model)
    local = model.startswith(PREFIX) or where.exists() or where.suffix in SINGLE or not HUB_ID.fullmatch(model)
    if local and revision:
        raise UserError(f"generator.revision {revision}: {where} lies here, where its files are what they are; "
                        "take the revision out, it picks a commit of a hub id")
    if config and not where.is_file():
        raise UserError(f"generator.config {config}: {model} is no single file and has its own configuration; take it out")
    if where.is_file():
        if variant:
            raise UserError(f"generator.variant {variant}: {where} is a single file, which has no variants; take it out")
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
        found = self.index.get("_class_name")
        if not isinstance(found, str):
            raise UserError(f"generator.model: the model_index.json of {self.name} does not say what the model is (_class_name); get the model anew")
        if found not in FAMILIES.names():
            raise UserError(f"generator.model: {self.name} is a '{found}', for which no denoiser is known here; "
                            f"{did_you_mean(found, list(FAMILIES.names()))}")
        return found

    def identity(self) -> str:
        """A hash of everything."""
        raise NotImplementedError

    def text_identity(self) -> str:
        """A hash of what turns a prompt into a condition."""
        raise NotImplementedError

    def config(self, part: str) -> dict:
        """A part's configuration; its weights are not read."""
        raise NotImplementedError

    def place(self, part: str) -> str:
        """Where that configuration lies, for the person; "" is the model's own, model_index.json."""
        return f"{self.name}/{_config_file(part)}"

    def contradictions(self, scheduler: dict) -> list[str]:
        """What the weights say of themselves that the scheduler's configuration does not, a sentence each."""
        return []

    def drawn_anew(self, steps: int | None) -> bool:
        """Whether earlier versions drew otherwise with this model, as they passed over fields of its configuration.

        In so many steps, or None: only its latents are asked about. Known of models that lie here; a hub's files
        need not be at hand where a run is only looked at.
        """
        return False

    def alpha_bar(self) -> "torch.Tensor | None":
        """The noise schedule that lies beside the weights, (timesteps,), where one does."""
        return None

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        """One part, loaded; None where the model goes without (a text encoder left out)."""
        raise NotImplementedError

    def class_of(self, name: str) -> Any:
        """diffusers' or transformers' class of a part. Raises UserError if the model names none of theirs."""
        entry = self.index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2):
            raise UserError(f"generator.model: the model_index.json of {self.name} names no {name}, which a {self.family} has; get the model anew")
        library, kind = entry
        if library not in ("diffusers", "transformers"):
            raise UserError(f"generator.model: {self.name} wants code of '{library}' for its {name}; only diffusers' and transformers' own "
                            "classes are loaded")
        try:
            return getattr(importlib.import_module(library), kind)
        except AttributeError:
            raise UserError(f"generator.model: {self.name} wants {library}'s '{kind}' for its {name}, which the installed version does not have; "
                            f"install a newer {library}") from None

    def _refuse(self, problem: Exception) -> UserError:
        return UserError(f"generator.model: '{self.name}' cannot be loaded ({_gist(problem)}); it must be {OFFLINE}")


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

    def identity(self) -> str:
        return hash_path(self.where, "generator.model")

    def text_identity(self) -> str:
        parts = sorted(name for name in self.index if name.startswith(("text_encoder", "tokenizer")))
        return "-".join(hash_path(self.where / part, "generator.model") for part in parts if (self.where / part).exists())

    def config(self, part: str) -> dict:
        return _read_json(self.where / _config_file(part))

    def place(self, part: str) -> str:
        return str(self.where / _config_file(part))

    def drawn_anew(self, steps: int | None) -> bool:
        there = [part for part in ("scheduler", "vae") if (self.where / _config_file(part)).is_file()]
        said = {part: self.config(part) for part in there}
        walk, vae = (said.get(part, {}) for part in ("scheduler", "vae"))
        if vae.get("latents_mean") is not None or steps is None:
            return vae.get("latents_mean") is not None
        spacing, timesteps = walk.get("timestep_spacing", "leading"), walk.get("num_train_timesteps", 1000)
        if spacing != "leading":
            return spacing == "linspace" or (isinstance(timesteps, int) and timesteps % steps > 0)
        return self.index.get("_class_name") == "StableDiffusionPipeline" and walk.get("steps_offset", 0) != 1

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        if self.index.get(name, [None]) in ([None], [None, None]):
            return None
        kind = self.class_of(name)
        import torch
        from safetensors import SafetensorError

        options: dict[str, Any] = {}
        network = issubclass(kind, torch.nn.Module)
        if network:
            options = {"dtype": dtype, "use_safetensors": True, "variant": self.variant, "output_loading_info": True}
        try:
            found = kind.from_pretrained(self._place, subfolder=name, **self._where_options, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
            check_pulled(Path(self._place) / name)
            raise self._refuse(problem) from problem
        if not network:
            return found
        whole, told = found
        lacking = sorted(told["missing_keys"])
        if lacking:  # both libraries would draw them at random, with no more than a warning
            raise UserError(f"generator.model: the {name} of {self.name} lacks {len(lacking)} of its weights ({lacking[0]}); get the model anew")
        return whole

    @property
    def _place(self) -> str | Path:
        return self.where

    @property
    def _where_options(self) -> dict[str, Any]:
        return {"local_files_only": True}


class Hub(Folder):
    """A repository of the model hub; only what is used is downloaded, all of it of the one commit that the revision is now."""

    def __init__(self, name: str, revision: str | None, variant: str | None):
        Source.__init__(self, name)
        self.revision, self.variant = revision, variant

    def _file(self, path: str, revision: str | None) -> Path:
        try:
            return hub.fetch(self.name, path, revision)
        except hub.Unreachable as problem:
            raise Unreachable(str(self._refuse(problem))) from problem
        except (OSError, ValueError) as problem:  # every hub error is one of these
            raise self._refuse(problem) from problem

    @cached_property
    def _index_file(self) -> Path:
        return self._file("model_index.json", self.revision)

    @property
    def commit(self) -> str:
        """What the revision (without one, the main branch) stands for: the hub's cache keeps each commit in a folder of its name.

        A revision that is a commit already needs neither network nor cache: a run can then be looked at and rescored anywhere.
        """
        if self.revision and COMMIT.fullmatch(self.revision):
            return self.revision
        return self._index_file.parent.name

    @cached_property
    def index(self) -> dict:
        return _read_json(self._index_file)

    def identity(self) -> str:
        return f"{self.name}@{self.commit}"

    def text_identity(self) -> str:
        return self.identity()

    def config(self, part: str) -> dict:
        return _read_json(self._file(_config_file(part), self.commit))

    def place(self, part: str) -> str:
        return Source.place(self, part)

    def drawn_anew(self, steps: int | None) -> bool:
        return False

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")  # diffusers says what the hub's client has given up
            return super().part(name, dtype)

    @property
    def _place(self) -> str | Path:
        return self.name

    @property
    def _where_options(self) -> dict[str, Any]:
        return {"revision": self.commit}


class SingleFile(Folder):
    """One file with everything in it, as the web interfaces trade them; `config` is a diffusers folder of the same model.

    Configurations, tokenizers and the scheduler are the folder's, and so are parts that the file leaves out (many hold the
    denoiser alone), if the folder has their weights. A .ckpt is a pickle: it is read with `weights_only`, which runs no code, or refused.
    """

    def __init__(self, name: str, file: Path, config: str | None):
        self.file = file
        if file.suffix not in SINGLE:
            raise UserError(f"generator.model: {file} is neither a folder nor a checkpoint ({', '.join(SINGLE)})")
        if config is None:
            raise UserError(f"generator.model: {file} is a single file, which holds weights but not the model's configuration: name a "
                            "diffusers folder of the same model in generator.config (its weights are read only for parts that the file lacks)")
        shape = locate(config)
        if not (shape / "model_index.json").is_file():
            raise UserError(f"generator.config: {shape} is not a diffusers folder (no model_index.json); name one that is")
        super().__init__(name, shape, None)

    def identity(self) -> str:
        return f"{hash_path(self.file, 'generator.model')}+{super().identity()}"

    def text_identity(self) -> str:
        return f"{hash_path(self.file, 'generator.model')}+{super().text_identity()}"

    def part(self, name: str, dtype: "torch.dtype") -> Any:
        import torch
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        if self.index.get(name, [None]) in ([None], [None, None]):
            return None
        if not issubclass(self.class_of(name), torch.nn.Module):
            return super().part(name, dtype)
        self._check_safe()
        pipeline = getattr(importlib.import_module("diffusers"), self.family)
        others = {other: None for other, entry in self.index.items() if isinstance(entry, list) and other not in (name, "scheduler")}
        try:
            with _quiet():
                whole = pipeline.from_single_file(str(self.file), config=str(self.where), local_files_only=True, dtype=dtype, **others)
        except SingleFileComponentError as problem:
            return self._part_of_folder(name, dtype, problem)
        except NotImplementedError as problem:  # diffusers leaves a weight that it did not find without values, and stumbles over it
            raise self._unfit("weights are missing") from problem
        except (OSError, ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError) as problem:
            raise self._unfit(_gist(problem)) from problem
        found = getattr(whole, name)
        lacking = [weight for weight, values in found.named_parameters() if values.is_meta]
        if lacking:
            raise self._unfit(f"its {name} lacks {len(lacking)} weights, such as {lacking[0]}")
        return found

    def _part_of_folder(self, name: str, dtype: "torch.dtype", problem: Exception) -> Any:
        if not any((self.where / name).glob("*.safetensors*")):
            raise UserError(f"generator.model: there is no {name} in {self.file}, and no weights of one in {self.where / name}; "
                            "use a checkpoint with all parts, or name a whole folder in generator.config") from problem
        return super().part(name, dtype)

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"generator.model: {self.file} does not fit the {self.family} of generator.config ({reason}); "
                         "name a folder of the same model, or get the file anew")

    def contradictions(self, scheduler: dict) -> list[str]:
        """By the keys and notes that trainers leave in a checkpoint."""
        tensors, notes = self._check_safe()
        place = self.place("scheduler")
        if edm := sorted(EDM_MARKS & tensors.keys()):
            return [f"generator.model: {self.file} carries {' and '.join(edm)}, as models do that were "
                    f"trained on EDM's noise levels, which are not "
                    "known here: use another model"]
        found, means = [], scheduler.get("prediction_type", "flow")
        said = {"v_prediction": "the key v_pred"} if "v_pred" in tensors else {}
        note = notes.get("modelspec.prediction_type", "")
        if noted := PREDICTIONS.get(note.lower()):
            said[noted] = f"the note modelspec.prediction_type {note}"
        found += [f"generator.model: {self.file} carries {mark}, so it predicts '{meant}', and {place} says "
                  f"'{means}': set prediction_type to "
                  f"'{meant}' there, or name the folder of a model like it in generator.config"
                  for meant, mark in said.items() if meant != means]
        if "ztsnr" in tensors and not scheduler.get("rescale_betas_zero_snr"):
            found.append(f"generator.model: {self.file} carries the key ztsnr, so its noise leaves no signal "
                         f"at the last timestep, and {place} says "
                         "otherwise: set rescale_betas_zero_snr to true there (and timestep_spacing to "
                         "trailing, as such models are drawn)")
        return found

    def alpha_bar(self) -> "torch.Tensor | None":
        import torch
        from safetensors import safe_open

        if ALPHA_BAR not in self._check_safe()[0]:
            return None
        if self.file.suffix == ".safetensors":
            with safe_open(self.file, framework="pt") as opened:
                return opened.get_tensor(ALPHA_BAR)
        mapped = zipfile.is_zipfile(self.file)
        found = torch.load(self.file, map_location="cpu", weights_only=True, mmap=mapped)
        return found.get("state_dict", found)[ALPHA_BAR]

    def _check_safe(self) -> tuple[dict[str, Any], dict[str, str]]:
        """(its tensors by name, without their values; its notes).

        Raises UserError if the file is damaged, or if reading it could run code.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            if self.file.suffix == ".safetensors":
                with safe_open(self.file, framework="pt") as opened:
                    return dict.fromkeys(opened.keys()), opened.metadata() or {}
            found = torch.load(self.file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(self.file))
        except pickle.UnpicklingError as problem:
            check_pulled(self.file)
            raise UserError(f"generator.model: {self.file} holds something other than weights, and reading such a pickle can run code: "
                            "use a .safetensors of the same model") from problem
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as problem:
            check_pulled(self.file)
            raise UserError(f"generator.model: {self.file} is cut off or damaged ({_gist(problem)}); get it anew") from problem
        tensors = found.get("state_dict", found) if isinstance(found, dict) else {}
        return tensors if isinstance(tensors, dict) else {}, {}


def _config_file(part: str) -> str:
    if not part:
        return "model_index.json"
    return f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"


def _gist(problem: Exception) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' word that no module of a model must stay in float32."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"generator.model: {path} is missing; the model is not whole, get it anew") from None
    except ValueError as problem:
        check_pulled(path)
        raise UserError(f"generator.model: {path} is damaged ({problem}); get the model anew") from problem
    if not isinstance(found, dict):
        raise UserError(f"generator.model: {path} is damaged (no JSON object); get the model anew")
    return found
