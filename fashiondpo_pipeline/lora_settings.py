"""A LoRA file as it is on disk: its tensors, and what it says of its own strength (alpha, rank, rsLoRA) inside or beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fashiondpo_pipeline.checkpoints import PEFT_CONFIG, PEFT_FILE, lora_files
from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.lora_layers import strength

KINDS = ("LORA", "LOHA", "LOKR")  # peft's, that are read
# peft's settings: those that say how strong a change is, those that the tensors show or that concern training alone, and all others, which
# change what the tensors mean: they are refused by name unless they are off.
READ = {"peft_type", "r", "lora_alpha", "alpha", "alpha_pattern", "use_rslora"}
NO_MATTER = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "rank_pattern", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "use_dora", "runtime_config",
    "lora_bias", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "init_weights", "bias", "modules_to_save", "megatron_core", "ensure_weight_tying", "qalora_group_size",
}
REFUSED = {
    "fan_in_fan_out", "megatron_config", "trainable_token_indices", "corda_config", "lora_ga_config", "velora_config",
    "alora_invocation_tokens", "use_qalora", "monteclora_config", "layer_replication", "target_parameters", "use_bdlora", "arrow_config",
    "kasa_config", "init_lora_weights",
}
_PLAIN_START = {True, False, "gaussian", "eva", "orthogonal", "default"}  # the base stays as it is; PiSSA, OLoRA, CorDA and LoftQ change it


@dataclass(frozen=True)
class Settings:
    """What a file says of its strength: by part of the pipeline ("unet", "text_encoder"), or under "" for all of it."""

    by_part: dict[str, dict[str, Any]]

    def strength(self, part: str, module: str, rank: int | None) -> float:
        """alpha / rank (or its root) of a module, by peft's pattern where one fits its name; 1 where nothing is said."""
        said = self.by_part.get(part) or self.by_part.get("") or {}
        alpha = said.get("lora_alpha", said.get("alpha"))
        if alpha is None:
            return 1.0
        if rank is None:  # peft divides by it even where no matrix shows it
            rank = _by_pattern(said.get("rank_pattern"), module, said.get("r"))
        alpha = _by_pattern(said.get("alpha_pattern"), module, alpha)
        return strength(alpha, rank, bool(said.get("use_rslora"))) if rank else 1.0


def _by_pattern(patterns: dict | None, module: str, otherwise: Any) -> Any:
    return (patterns or {}).get(get_pattern_key(list(patterns or {}), module), otherwise)


def open_lora(path: Path) -> tuple[dict[str, Tensor], Settings]:
    """(tensors in fp32, settings) of a .safetensors file or of peft's folder. Raises UserError where either cannot be read or trusted."""
    file, config = lora_files(path)
    tensors, notes = _open(file)
    check_finite(file, tensors, "get the file anew, or name another one")
    if config is not None:
        return tensors, Settings({"": _checked(config, _json(config, config.read_text(encoding="utf-8")))})
    if "lora_adapter_metadata" in notes:
        return tensors, Settings(_parts(file, _json(file, notes["lora_adapter_metadata"])))
    return tensors, Settings({"": _plain(file, notes)})


def doubts(path: Path) -> list[str]:
    """What a person should know of how strong a LoRA is, in words: that nothing says so of peft's, which keeps that in another file."""
    file, config = lora_files(path)
    tensors, notes = _open(file)
    said = config is not None or notes.keys() & {"lora_adapter_metadata", "lora_alpha", "alpha"} or any(name.endswith(".alpha") for name in tensors)
    if file.name != PEFT_FILE or said:
        return []
    return [f"{file}: no {PEFT_CONFIG} lies beside it, which says how strong it is: taken as alpha = rank; copy it there, or set "
            "generator.lora_scale"]


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            notes = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - safe_open is no dict
    except SafetensorError as problem:
        check_pulled(file)
        raise _damaged(file, problem) from problem
    if not tensors:
        raise UserError(f"{file} holds no tensors; name another file")
    return tensors, notes


def _damaged(file: Path, problem: Exception) -> UserError:
    return UserError(f"{file} cannot be read ({problem}): it is cut off or damaged; fetch it again, or name another file")


def check_finite(file: Path, tensors: dict[str, Tensor], remedy: str) -> None:
    """Raises UserError that names the file and its tensors with a number that is NaN or infinite."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        more = f" and {len(broken) - 1} more of its {len(tensors)} tensors" if len(broken) > 1 else ""
        raise UserError(f"{file}: {broken[0]}{more} holds numbers that are NaN or infinite; {remedy}")


def _json(file: Path, text: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise _damaged(file, problem) from problem
    if not isinstance(found, dict):
        raise _damaged(file, ValueError("its settings are no JSON object"))
    return found


def _parts(file: Path, notes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """diffusers' notes, whose keys begin with the part of the pipeline."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in notes.items():
        part, _, name = key.partition(".")
        found.setdefault(part, {})[name] = value
    return {part: _checked(file, said) for part, said in found.items()}


def _checked(file: Path, said: dict[str, Any]) -> dict[str, Any]:
    """peft's settings. Raises UserError for those that change what the tensors mean in a way that is not read here."""
    kind = said.get("peft_type") or KINDS[0]
    if kind not in KINDS:
        raise UserError(f"{file}: it is a {kind} of peft; {', '.join(KINDS)} are read: name another one")
    odd = [f"{name} {value!r}" for name, value in said.items() if name not in READ | NO_MATTER and not _off(name, value)]
    if odd:
        raise UserError(f"{file}: {', '.join(odd)} gives its tensors a meaning that is not read here; merge it into the model with peft, and "
                        "name the whole model in generator.model")
    for name in ("lora_alpha", "alpha", "r"):
        if said.get(name) is not None:
            said = said | {name: _number(file, name, said[name])}
    return said


def _off(name: str, value: Any) -> bool:
    if name == "init_lora_weights":
        return isinstance(value, bool | str) and (value in _PLAIN_START)
    return not value


def _plain(file: Path, notes: dict[str, str]) -> dict[str, Any]:
    """alpha as a number of its own in a file's metadata, as scripts write it that save with safetensors alone."""
    found: dict[str, Any] = {name: _number(file, name, notes[name]) for name in ("lora_alpha", "alpha") if name in notes}
    return found | {"use_rslora": notes.get("use_rslora", "").lower() == "true"}


def _number(file: Path, name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not 0 < found < float("inf"):
        raise UserError(f"{file}: its {name} is {value!r}, and should be a number above 0; mend it, or take it out")
    return found
