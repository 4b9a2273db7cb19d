"""LoRA files of other programs: read one, fuse it into a denoiser, merge two, write ours as kohya and ComfyUI read it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor

from fashiondpo_pipeline import lora_layers
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.lora_layers import Layer, LowRank
from fashiondpo_pipeline.lora_names import TEXT, UNETS, Place, places, to_sgm
from fashiondpo_pipeline.lora_settings import Settings, open_lora
from fashiondpo_pipeline.workspace import save_file as replace

FAMILIES: dict[str, Any] = {
    "sd": StableDiffusionPipeline,  # 1.x and 2.x
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,  # 3.0 and 3.5
    "flux": FluxPipeline,
}
# How a tensor's name ends, and what it then is; before it stands the name of the module.
_DEFAULT = r"(?:\.default)?"  # peft's name of an adapter, where the state of a whole model was saved
_ENDS = [(re.compile(end + "$"), what) for end, what in (
    (rf"\.(?:lora_down|lora_A{_DEFAULT}|lora\.down)\.weight", "down"),
    (rf"\.(?:lora_up|lora_B{_DEFAULT}|lora\.up)\.weight", "up"),
    (r"(?<=_lora|lora1|lora2|layer)\.down\.weight", "down"),  # of attention processors
    (r"(?<=_lora|lora1|lora2|layer)\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (rf"\.lora_B{_DEFAULT}\.bias", "up_bias"),
    (rf"\.lora_magnitude_vector{_DEFAULT}(?:\.weight)?", "magnitude"),  # one a row, in any shape
    (r"\.dora_scale", "dora_scale"),  # (out, 1...), or (1, in, 1...)
    (r"\.alpha", "alpha"),
    (rf"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2){_DEFAULT}", ""),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
)]
_OTHERS = {  # what else travels as a LoRA, by what stands in its names
    "oft_": "OFT", "boft_": "BOFT", "on_input": "(IA)^3", "ia3_l": "(IA)^3", ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA", ".bm.weight": "GLoRA", "vera_lambda": "VeRA", "hra_u": "HRA", "lora_embedding": "a LoRA of an embedding",
    "reshape_weight": "weights of another shape", "set_weight": "whole weights", "rescale": "OFT", "lllite": "ControlNet-LLLite",
    "hypernet": "a hypernetwork", "ip_adapter": "an IP-Adapter",
}
_HALVES = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_magnitude_vector": "magnitude",
           ".lora_magnitude_vector.weight": "magnitude", ".dora_scale": "magnitude"}  # as a round's adapter has them


@dataclass(frozen=True)
class Lora:
    """A LoRA file: its layers by the module they change ("unet.mid_block...", "text_encoder..."), and tensors that are none, by name.

    counts: how many of the file's tensors a layer is made of.
    """

    layers: dict[str, Layer]
    strays: list[str]
    counts: dict[str, int]


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
    """The LoRA in a .safetensors file, or in peft's folder, its scale (alpha, rank, rsLoRA) in the layers.

    As diffusers, peft, kohya, LyCORIS, ComfyUI and XLabs name and write it. Every tensor is in a layer or a stray. Raises UserError if the
    file is a pickle, damaged or empty, if a number in it is NaN or infinite, or a setting beside it changes what it means in another way.
    """
    tensors, settings = open_lora(Path(file))
    parts: dict[str, dict[str, Tensor]] = {}
    names: dict[str, list[str]] = {}
    layers: dict[str, Layer] = {}
    counts: dict[str, int] = {}
    strays = []
    for name, tensor in tensors.items():
        stem, what = _split(name)
        if what is None or what in parts.get(stem, {}):
            found = places(name.partition(".")[0] if name.startswith("lora_") else name, family, 0, 0)[0]
            if found.module.startswith(TEXT):
                layers[found.module], counts[found.module] = Layer(), 1
            else:
                strays.append(name)
            continue
        parts.setdefault(stem, {})[what] = tensor
        names.setdefault(stem, []).append(name)
    for stem, own in parts.items():
        made = _layers(stem, own, family, settings)
        if made is None or any(module in layers for module in made):
            strays += names[stem]
            continue
        layers |= made
        counts |= {module: len(names[stem]) for module in made}
    return Lora(layers, strays, counts)


def _split(name: str) -> tuple[str, str | None]:
    """(module, what this is of it); (name, None) for a tensor of no kind that is read here."""
    for pattern, what in _ENDS:
        found = pattern.search(name)
        if found:
            return name[: found.start()], what or found[1]
    return name, None


def _layers(stem: str, own: dict[str, Tensor], family: str, settings: Settings) -> dict[str, Layer] | None:
    """The layers that the tensors of one name make, by module; None where they make none."""
    extra = {name: own.pop(name) for name in ("alpha", "magnitude", "dora_scale", "diff_b", "up_bias") if name in own}
    try:
        whole = lora_layers.change_of(own, None)
        rows, columns = whole.size if whole else (len(extra.get("diff_b", ())), 0)
        found = places(stem, family, rows, columns)
        scale = _scale(found[0], lora_layers.rank_of(own), extra.get("alpha"), settings)
        change = lora_layers.change_of(own, scale)
        if change is not None:
            change.matrix(torch.device("meta"), 1.0)
    except (RuntimeError, IndexError, ValueError):  # matrices that do not go together
        return None
    bias = extra.get("diff_b")
    magnitude = extra["magnitude"].flatten()[:, None] if "magnitude" in extra else extra.get("dora_scale")
    if change is None and (own or magnitude is not None or bias is None):
        return None
    if "up_bias" in extra:
        if bias is not None or not isinstance(change, LowRank):
            return None
        bias = extra["up_bias"] * scale
    if magnitude is not None:
        magnitude = magnitude.reshape(len(magnitude), -1)
        if len(magnitude) == 1 and rows > 1 and (len(found) > 1 or found[0].swapped):
            return None  # the length of inputs over all of the modules' rows
    return {place.module: Layer(change and change.at(place), _own(place, magnitude), _own(place, bias)) for place in found}


def _own(place: Place, tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or len(tensor) == 1 else place.rows(tensor)


def _scale(place: Place, rank: int | None, alpha: Tensor | None, settings: Settings) -> float:
    """What a module's change is multiplied with: by its own alpha, else as the file's settings say, else 1."""
    if alpha is not None:
        return float(alpha) / rank if rank else 1.0
    return settings.strength(place.part, place.module.partition(".")[2], rank)


def fuse(denoiser: Any, file: Path, scale: float = 1.0) -> list[str]:
    """Add a LoRA file to the denoiser's own weights, for good, before any adapter is attached.

    Returns the modules of text encoders that the file would change too: they are left as they are. Raises UserError,
    with nothing changed, if a tensor for the denoiser fits nowhere.
    """
    family, modules = family_of(denoiser), dict(denoiser.named_modules())
    lora = read(file, family)
    part = "unet." if family in UNETS else "transformer."
    text = [name for name in lora.layers if name.startswith(TEXT)]
    layers = {name.removeprefix(part): layer for name, layer in lora.layers.items() if not name.startswith(TEXT)}
    _check_known(file, lora)
    lost = [name for name, layer in layers.items() if not _fits(modules.get(name), layer)]
    bare = [name for name in lost if layers[name].bias is not None and name in modules and getattr(modules[name], "bias", None) is None]
    if lost and bare == lost:
        raise UserError(f"{file} changes a bias of {len(bare)} modules that have none in this {type(denoiser).__name__} (such as {bare[0]}): "
                        "take its biases out, or use a LoRA without them")
    if lost:
        sizes = {name.removeprefix(part): count for name, count in lora.counts.items() if not name.startswith(TEXT)}
        raise UserError(
            f"{file} was made for another base: {sum(sizes[name] for name in lost)} of its {sum(sizes.values())} tensors fit nowhere in this "
            f"{type(denoiser).__name__} (such as those of {lost[0]}); use a LoRA made for this model"
        )
    if not layers:
        raise UserError(f"{file} holds no LoRA for a denoiser, only for text encoders ({len(text)} of their modules); name another file")
    with torch.no_grad():
        for name, layer in layers.items():
            _change(file, name, modules[name], layer, scale)
    return sorted(text)


def _check_known(file: Path, lora: Lora) -> None:
    """Raises UserError if there are tensors that are no change that is read here, with what they are."""
    if not lora.strays:
        return
    kinds = dict.fromkeys(kind for name in lora.strays for mark, kind in _OTHERS.items() if mark in name)
    what = f"holds {' and '.join(kinds)}, which is not read here" if kinds else "holds tensors that are no LoRA that is read here"
    shown = ", ".join(lora.strays[:3]) + (", ..." if len(lora.strays) > 3 else "")
    raise UserError(f"{file} {what} ({len(lora.strays)} of its tensors: {shown}); LoRA, LoCon, DoRA, LoHa, LoKr and full differences are: "
                    "name a file of one of these kinds")


def _fits(module: Any, layer: Layer) -> bool:
    return layer.fits(getattr(module, "weight", None), getattr(module, "bias", None))


def _change(file: Path, name: str, module: Any, layer: Layer, scale: float) -> None:
    if layer.change is not None:
        module.weight.copy_(layer.fused(module.weight, scale))
    if layer.bias is not None:
        module.bias.copy_(module.bias.float() + scale * layer.bias.to(module.bias.device))
    if not all(torch.isfinite(tensor).all() for tensor in (module.weight, module.bias) if tensor is not None):
        raise UserError(f"{file}: with it {name} is no longer finite in {str(module.weight.dtype).removeprefix('torch.')}: set "
                        "generator.dtype to bfloat16 or float32, or lower generator.lora_scale")


def merged(first: Path, second: Path, family: str) -> dict[str, Tensor]:
    """Two LoRA files as the tensors of one, exactly their sum: [up1 up2] [down1; down2], in diffusers' format.

    Every module gets the same rank, the largest sum there is, filled with zeros, so that alpha is the rank and needs no
    note. Text encoders' layers come along. Raises UserError for what is no product of two matrices.
    """
    loras = [read(file, family) for file in (first, second)]
    for file, lora in zip((first, second), loras, strict=True):
        check_plain(file, lora)
    stacks = {module: [_low_rank(lora.layers[module]) for lora in loras if module in lora.layers] for lora in loras for module in lora.layers}
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


def check_plain(file: Path, lora: Lora, remedy: str = "fuse it into the model instead") -> None:
    """Raises UserError for what a LoRA of two matrices a module cannot hold exactly."""
    _check_known(file, lora)
    if any(layer.magnitude is not None for layer in lora.layers.values()):
        raise UserError(f"{file} is a DoRA, which rescales whole rows: it cannot be merged exactly; {remedy}")
    other = next((layer for layer in lora.layers.values() if not isinstance(layer.change, LowRank) or layer.bias is not None), None)
    if other is not None:
        kind = other.kind if other.bias is None else "change of biases"
        raise UserError(f"{file} holds a {kind}, which two matrices of a LoRA cannot hold exactly: it cannot be merged; {remedy}")


def _low_rank(layer: Layer) -> LowRank:
    assert isinstance(layer.change, LowRank)
    return layer.change


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
        kohya = "lora_unet_" + (to_sgm(module.removeprefix(part)) if family == "sdxl" else module.removeprefix(part)).replace(".", "_")
        exported[kohya + {"down": ".lora_down.weight", "up": ".lora_up.weight", "magnitude": ".dora_scale"}[half]] = tensor.contiguous()
        exported[f"{kohya}.alpha"] = torch.tensor(float(strength))
    return exported


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """Tensors as a .safetensors file with torch's usual mark; the same tensors make the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, lambda draft: save_file(tensors, draft, metadata={"format": "pt"}))
