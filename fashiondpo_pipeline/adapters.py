"""LoRA adapters on a denoiser: attach, switch, load, fuse. The only file that knows peft."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from fashiondpo_pipeline.errors import UserError

Denoiser = Any  # a diffusers model, whose adapter methods come from a mixin that type checkers do not see
POLICY = "policy"
FILE = "pytorch_lora_weights.safetensors"


def attach(denoiser: Denoiser, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Give `denoiser` a fresh LoRA called "policy" that changes nothing yet (its B is zero); A is drawn from `seed`."""
    detach(denoiser)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            denoiser.add_adapter(config, adapter_name=POLICY)
        except ValueError as problem:
            raise UserError(f"finetune.targets: {targets} fit no module of the denoiser ({problem})") from problem
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # masters in fp32: half-precision AdamW loses small updates


def detach(denoiser: Denoiser) -> None:
    """Take the LoRA off again, if there is one."""
    if getattr(denoiser, "peft_config", None):
        denoiser.delete_adapters([POLICY])
        denoiser.unload_lora()


def parameters(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    """The adapter's trainable tensors by name."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def load(denoiser: Denoiser, folder: Path, targets: list[str] | None = None) -> None:
    """Attach the LoRA saved in `folder` (diffusers' format). Raises UserError if it was made for another denoiser."""
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"there is no LoRA at {file}: run the round that makes it, or name another folder")
    try:
        tensors = load_file(file)
    except SafetensorError as problem:
        raise UserError(f"{file} cannot be read ({problem}): run its round again, or name another folder") from problem
    weights = {name.removeprefix("unet."): tensor for name, tensor in tensors.items() if name.startswith("unet.")}
    rank, alpha, found = _settings(file, weights)
    attach(denoiser, rank, alpha, targets or found, seed=0)
    places = {name.replace(f".{POLICY}.", "."): w.shape for name, w in denoiser.state_dict().items() if "lora_" in name}
    if places != {name: tensor.shape for name, tensor in weights.items()}:
        detach(denoiser)
        fit = f"{len(weights)} tensors, {len(places)} places"
        raise UserError(f"{file} was made for another denoiser ({fit}): use its own model")
    set_peft_model_state_dict(denoiser, weights, adapter_name=POLICY)


def order_header(file: Path) -> None:
    """Same adapter, same bytes: safetensors writes its metadata in an order drawn anew each time; here it is sorted."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def _settings(file: Path, weights: dict[str, torch.Tensor]) -> tuple[int, float, list[str]]:
    with safe_open(file, framework="pt") as opened:
        noted = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    downs = {name: tensor for name, tensor in weights.items() if name.endswith("lora_A.weight")}
    if not downs:
        raise UserError(f"{file} holds no LoRA for a UNet; name another file")
    rank = next(iter(downs.values())).shape[0]
    targets = sorted({name.removesuffix(".lora_A.weight") for name in downs})
    return rank, float(noted.get("unet.lora_alpha", rank)), noted.get("unet.target_modules", targets)


def check_shape(denoiser: Denoiser, rank: int, alpha: float, targets: list[str]) -> None:
    """Raises UserError if the LoRA that a round goes on from is not the one the configuration asks for."""
    config = denoiser.peft_config[POLICY]
    if (config.r, float(config.lora_alpha), sorted(config.target_modules)) != (rank, float(alpha), sorted(targets)):
        raise UserError(
            f"finetune.rank, alpha or targets changed between rounds: the last adapter has rank {config.r}, alpha "
            f"{config.lora_alpha:g}, targets {sorted(config.target_modules)}; keep them for all rounds of a run"
        )


@contextmanager
def disabled(denoiser: Denoiser, really: bool = True) -> Iterator[None]:
    """The denoiser as it was before its LoRA, bit for bit: the base reference. Nothing happens if not `really`."""
    if not really:
        yield
        return
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()
