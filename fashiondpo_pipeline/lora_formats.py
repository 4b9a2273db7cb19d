"""LoRA files of other programs: read one, fuse it into a denoiser, merge two, write ours as kohya and ComfyUI read it."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fashiondpo_pipeline.errors import UserError

FAMILIES: dict[str, Any] = {
    "sd": StableDiffusionPipeline,  # 1.x and 2.x
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,  # 3.0 and 3.5
    "flux": FluxPipeline,
}
_TEXT = "text_encoder"
_SGM = SimpleNamespace(layers_per_block=2)  # all that diffusers asks of a UNet's config to renumber Stability's block names
_HALVES = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_magnitude_vector": "magnitude",
           ".lora_magnitude_vector.weight": "magnitude", ".dora_scale": "magnitude"}
_UPS = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")


@dataclass(frozen=True)
class Layer:
    """What a LoRA does to one weight W (out, in...): W + up @ down; with a magnitude (DoRA), each row then has that length."""

    down: Tensor  # (r, in...)
    up: Tensor  # (out, r...)
    magnitude: Tensor | None = None  # (out, 1)

    def fits(self, weight: Tensor) -> bool:
        right = self.up.shape[0] == weight.shape[0] and self.down[0].numel() == weight[0].numel()
        return right and len(self.down) == self.up[0].numel() and (self.magnitude is None or len(self.magnitude) == len(weight))

    def fused(self, weight: Tensor, scale: float) -> Tensor:
        """The weight with the LoRA in it, computed in fp32 where the weight lies."""
        rows = weight.float().flatten(1)  # (out, in)
        rows = rows + scale * self.up.to(weight.device).flatten(1) @ self.down.to(weight.device).flatten(1)
        if self.magnitude is not None:
            rows = rows * (self.magnitude.to(weight.device) / rows.norm(dim=1, keepdim=True))
        return rows.view_as(weight).to(weight.dtype)


@dataclass(frozen=True)
class Lora:
    """A LoRA file: its layers by the module they change ("unet.mid_block...", "text_encoder..."), and names that are no layer."""

    layers: dict[str, Layer]
    strays: list[str]


def family_of(denoiser: Any) -> str:
    """"sd", "sdxl", "sd3" or "flux", by the denoiser's class; a UNet that is told the picture's size is SDXL's."""
    kind = type(denoiser).__name__
    if kind == "UNet2DConditionModel":
        return "sdxl" if denoiser.config.addition_embed_type == "text_time" else "sd"
    found = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}.get(kind)
    if found is None:
        raise UserError(f"LoRA files are read for UNet2DConditionModel, SD3Transformer2DModel and FluxTransformer2DModel, not for {kind}")
    return found


def read(file: Path, family: str) -> Lora:
    """The LoRA in a .safetensors file, diffusers', peft's or kohya's, its scale (alpha, rank, rsLoRA) folded into `up`.

    Names are translated by diffusers' own loaders. Raises UserError if the file is a pickle, damaged or empty.
    """
    tensors, notes = _open(Path(file))
    scales = {stem.removesuffix(".dora_scale"): tensor for stem, tensor in tensors.items() if stem.endswith(".dora_scale")}
    tensors = _without_alphas({name: tensor for name, tensor in tensors.items() if not name.endswith(".dora_scale")})
    named = _translated(file, tensors, family) | _translated_scales(file, scales, family)
    parts: dict[str, dict[str, Tensor]] = {}
    strays = []
    for name, tensor in named.items():
        end = next((end for end in _HALVES if name.endswith(end)), None)
        if end is None:
            strays.append(name)
        else:
            parts.setdefault(name.removesuffix(end), {})[_HALVES[end]] = tensor
    layers = {}
    for module, halves in parts.items():
        if "down" in halves and "up" in halves:
            magnitude = halves.get("magnitude")
            up = halves["up"] * _scale(module, len(halves["down"]), notes)
            layers[module] = Layer(halves["down"], up, magnitude.reshape(len(magnitude), -1) if magnitude is not None else None)
        else:
            strays += [f"{module}.{half}" for half in halves]
    return Lora(layers, strays)


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file: others may hold a pickle, which can run code when read; convert it first")
    if not file.is_file():
        raise UserError(f"there is no LoRA at {file}: name a .safetensors file that exists")
    try:
        with safe_open(file, framework="pt") as opened:
            notes = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - safe_open is no dict
        if not tensors:
            raise UserError(f"{file} holds no tensors; name another file")
        return tensors, json.loads(notes)
    except (SafetensorError, json.JSONDecodeError) as problem:
        raise UserError(f"{file} cannot be read ({problem}): it is cut off or damaged; fetch it again, or name another file") from problem


def _without_alphas(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """kohya's `alpha` multiplied in as alpha / rank: diffusers keeps one alpha for all modules where it cannot tell them apart."""
    folded = dict(tensors)
    for name in [name for name in tensors if name.endswith(".alpha")]:
        up = next((up for end in _UPS if (up := name.removesuffix(".alpha") + end) in folded), None)
        if up is not None:
            folded[up] = folded[up] * (float(folded.pop(name)) / folded[up].shape[1])
    return folded


def _translated(file: Path, tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    options = {"unet_config": _SGM} if family in ("sd", "sdxl") else {}
    try:
        if family == "sd3":  # whose loader knows no kohya names; those of CLIP are SDXL's
            text = {name: tensor for name, tensor in tensors.items() if name.startswith("lora_te")}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in text}
            tensors = _joint_names(tensors) | (FAMILIES["sdxl"].lora_state_dict(text)[0] if text else {})
        found = FAMILIES[family].lora_state_dict(dict(tensors), **options)
    except (ValueError, KeyError, AssertionError, IndexError) as problem:  # what diffusers' converters end in on unknown names or sizes
        reason = (str(problem).splitlines() or [type(problem).__name__])[0].strip().rstrip(":")
        raise UserError(f"{file} holds no LoRA that diffusers can read for {family} ({reason}); name another file") from problem
    named = found[0] if isinstance(found, tuple) else found
    text = {name: tensor for name, tensor in named.items() if name.startswith(_TEXT)}
    other = {name: tensor for name, tensor in named.items() if name not in text}
    # names that are peft's already pass through both unchanged
    return convert_unet_state_dict_to_peft(convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD) | other)


def _translated_scales(file: Path, scales: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """DoRA's scales under diffusers' names. diffusers drops them, so they go through its loader in the place of a LoRA of rank 1."""
    plain = {f"{stem}.dora_scale": scale for stem, scale in scales.items() if not stem.startswith("lora_")}
    rows = {stem: scale.reshape(len(scale), -1) for stem, scale in scales.items() if stem.startswith("lora_")}
    ups = {f"{stem}.lora_up.weight": scale for stem, scale in rows.items()}
    downs = {f"{stem}.lora_down.weight": torch.zeros(1, 1) for stem in rows}
    named = _translated(file, ups | downs, family) if rows else {}
    ends = ".lora_B.weight"
    return plain | {name.removesuffix(ends) + ".dora_scale": scale for name, scale in named.items() if name.endswith(ends)}


_JOINT_LAYERS = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}


def _joint_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """kohya's names of SD3's blocks (Stability's own modules) as diffusers': query, key and value come apart, others keep their rows."""
    named = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"lora_unet_joint_blocks_(\d+)_(.+)\.lora_(down|up)\.weight", name)
        if not found or found[2] not in _JOINT_LAYERS:
            named[name] = tensor
            continue
        modules = [f"transformer.transformer_blocks.{found[1]}.{module}" for module in _JOINT_LAYERS[found[2]]]
        if found[3] == "down":
            named |= {f"{module}.lora_A.weight": tensor for module in modules}
            continue
        rows = list(tensor.chunk(len(modules)))
        width = tensors[name.replace(".lora_up.", ".lora_down.")].shape[-1]
        if "context_block_adaLN" in name and len(tensor) == 2 * width:  # the last block's: shift, scale; diffusers: scale, shift
            rows = [torch.cat(tensor.chunk(2)[::-1])]
        named |= {f"{module}.lora_B.weight": part for module, part in zip(modules, rows, strict=True)}
    return named


def _scale(module: str, rank: int, notes: dict[str, Any]) -> float:
    """alpha / rank as peft's notes in a diffusers file say it, by module where they do; 1 without notes."""
    part, _, name = module.partition(".")
    if f"{part}.lora_alpha" not in notes:
        return 1.0
    patterns = notes.get(f"{part}.alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), notes[f"{part}.lora_alpha"])
    return alpha / (math.sqrt(rank) if notes.get(f"{part}.use_rslora") else rank)


def fuse(denoiser: Any, file: Path, scale: float = 1.0) -> list[str]:
    """Add a LoRA file to the denoiser's own weights, for good, before any adapter is attached.

    Returns the modules of text encoders that the file would change too: they are left as they are. Raises UserError,
    with nothing changed, if a tensor for the denoiser fits nowhere.
    """
    lora, modules = read(file, family_of(denoiser)), dict(denoiser.named_modules())
    part = "unet." if "unet" in FAMILIES[family_of(denoiser)]._lora_loadable_modules else "transformer."
    text = [name for name in lora.layers if name.startswith(_TEXT)]
    layers = {name.removeprefix(part): layer for name, layer in lora.layers.items() if not name.startswith(_TEXT)}
    fitting = {name for name, layer in layers.items() if _fits(modules.get(name), layer)}
    sizes = {name: 2 if layer.magnitude is None else 3 for name, layer in layers.items()}
    lost = len(lora.strays) + sum(size for name, size in sizes.items() if name not in fitting)
    if lost:
        total = len(lora.strays) + sum(sizes.values())
        raise UserError(
            f"{file} was made for another base: {lost} of its {total} tensors fit nowhere in this {type(denoiser).__name__}; "
            f"use a LoRA made for this model"
        )
    if not layers:
        raise UserError(f"{file} holds no LoRA for a denoiser, only for text encoders ({len(text)} of their modules); name another file")
    with torch.no_grad():
        for name, layer in layers.items():
            modules[name].weight.copy_(layer.fused(modules[name].weight, scale))
    return sorted(text)


def _fits(module: Any, layer: Layer) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and layer.fits(module.weight)


def merged(first: Path, second: Path, family: str) -> dict[str, Tensor]:
    """Two LoRA files as the tensors of one, exactly their sum: [up1 up2] [down1; down2], in diffusers' format.

    Every module gets the same rank, the largest sum there is, filled with zeros, so that alpha is the rank and needs no
    note. Text encoders' layers come along. Raises UserError for a DoRA, which is no sum.
    """
    loras = [read(file, family) for file in (first, second)]
    for file, lora in zip((first, second), loras, strict=True):
        if lora.strays:
            raise UserError(f"{file} has {len(lora.strays)} tensors that are no LoRA (such as {lora.strays[0]}): it cannot be merged exactly")
        if any(layer.magnitude is not None for layer in lora.layers.values()):
            raise UserError(f"{file} is a DoRA, which rescales whole rows: it cannot be merged exactly; fuse it into the model instead")
    stacks = {module: [lora.layers[module] for lora in loras if module in lora.layers] for lora in loras for module in lora.layers}
    rank = max(sum(len(layer.down) for layer in stack) for stack in stacks.values())
    tensors = {}
    for module, stack in sorted(stacks.items()):
        if len({(layer.up.shape[0], *layer.down.shape[1:]) for layer in stack}) > 1:
            raise UserError(f"{first} and {second} were made for different models: {module} has two shapes; merge LoRAs of one base")
        down = torch.cat([layer.down for layer in stack])  # (r1 + r2, in...)
        up = torch.cat([layer.up for layer in stack], dim=1)  # (out, r1 + r2...)
        tensors[f"{module}.lora_A.weight"] = torch.cat([down, down.new_zeros(rank - len(down), *down.shape[1:])])
        tensors[f"{module}.lora_B.weight"] = torch.cat([up, up.new_zeros(len(up), rank - up.shape[1], *up.shape[2:])], dim=1)
    return tensors


def to_kohya(tensors: dict[str, Tensor], family: str, alpha: float, rslora: bool = False) -> dict[str, Tensor]:
    """Our LoRA's tensors (diffusers' format) under names that other programs read.

    SD 1/2 and SDXL: kohya's `lora_unet_...lora_down.weight`, `.lora_up.weight` and `.alpha`, SDXL with Stability's block
    numbers, read by kohya's sd-scripts, ComfyUI, AUTOMATIC1111 and diffusers. rsLoRA's alpha becomes alpha * sqrt(rank),
    as these divide by the rank. SD3 and FLUX: diffusers' own `transformer....lora_A.weight`, which ComfyUI maps itself,
    with the scale folded into B, as nothing in such a file says alpha. DoRA's magnitude becomes `dora_scale` (out, 1):
    LyCORIS means the same by it; ComfyUI divides by the base's row lengths instead of the sum's, so its pictures differ
    a little; stock diffusers drops it, so give it the adapter's own file.
    """
    part = "unet." if family in ("sd", "sdxl") else "transformer."
    exported = {}
    for name, tensor in tensors.items():
        end = next((end for end in _HALVES if name.endswith(end)), None)
        if end is None or not name.startswith(part):
            raise UserError(f"{name} is no tensor of a LoRA for {family}; export the adapter that a round of this run made")
        module, half = name.removesuffix(end), _HALVES[end]
        if half == "magnitude":
            tensor = tensor.reshape(-1, *[1] * (tensors[f"{module}.lora_A.weight"].ndim - 1))  # (out, 1...)
        rank = len(tensors[f"{module}.lora_A.weight"])
        strength = alpha * math.sqrt(rank) if rslora else alpha
        if part == "transformer.":
            tensor = tensor * (strength / rank) if half == "up" else tensor
            exported[f"{module}.dora_scale" if half == "magnitude" else name] = tensor.contiguous()
            continue
        kohya = "lora_unet_" + (_sgm(module.removeprefix(part)) if family == "sdxl" else module.removeprefix(part)).replace(".", "_")
        exported[kohya + {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"}[half]] = tensor.contiguous()
        exported[f"{kohya}.alpha"] = torch.tensor(float(strength))
    return exported


_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
_SGM_NAMES = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}


def _sgm(module: str) -> str:
    """The name that Stability's SDXL gives a module of diffusers' UNet (three inner blocks a level, numbered through).

    >>> _sgm("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    'input_blocks.4.1.transformer_blocks.0.attn1.to_q'
    """
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if not found:
        if module not in _SGM_NAMES:
            raise UserError(f"{module} has no name in SDXL's own numbering; leave it out of finetune.targets, or use the adapter's own file")
        return _SGM_NAMES[module]
    side, level, kind, inner, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.2.conv"
    rest = _RESNET.get(rest, rest)
    if side is None:
        return f"middle_block.{2 * inner if kind == 'resnets' else 1}.{rest}"
    number = f"input_blocks.{3 * level + inner + 1}" if side == "down" else f"output_blocks.{3 * level + inner}"
    return f"{number}.{0 if kind == 'resnets' else 1}.{rest}"


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """Tensors as a .safetensors file with torch's usual mark; the same tensors make the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={"format": "pt"})
