"""What is trained on a denoiser, LoRA or all of it: attach, switch, save, load. The only file that knows peft."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.lora_settings import check_finite
from fashiondpo_pipeline.workspace import as_umask_asks

Denoiser = Any  # a diffusers model, whose adapter methods come from a mixin that type checkers do not see
POLICY = "policy"
FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "diffusion_pytorch_model.safetensors"
PARTS = ("unet", "transformer")  # a pipeline's denoiser is one of these, and its LoRA's tensors begin with that name

KINDS: dict[str, dict[str, bool]] = {
    "lora": {},
    "rslora": {"use_rslora": True},  # alpha / sqrt(rank), https://arxiv.org/abs/2312.03732
    "dora": {"use_dora": True},  # https://arxiv.org/abs/2402.09353
}
FULL = "full"

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_MLP = ["ff.net.0.proj", "ff.net.2"]
_JOINT = [*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_JOINT_MLP = [*_MLP, "ff_context.net.0.proj", "ff_context.net.2"]
# FLUX's single blocks end in one projection of attention and MLP; the denoiser's own last layer has the same name
_SINGLE_MLP = ["proj_mlp", "single_transformer_blocks.*.proj_out"]
PRESETS = {
    "UNet2DConditionModel": {"attention": _ATTENTION, "attention+mlp": [*_ATTENTION, *_MLP]},
    "SD3Transformer2DModel": {"attention": _JOINT, "attention+mlp": [*_JOINT, *_JOINT_MLP]},
    "FluxTransformer2DModel": {"attention": _JOINT, "attention+mlp": [*_JOINT, *_JOINT_MLP, *_SINGLE_MLP]},
}


def resolve_targets(denoiser: Denoiser, targets: list[str] | str) -> list[str]:
    """Names of modules to adapt, as peft matches them (whole or after a dot): a list as it is, a preset by the denoiser's class."""
    if not isinstance(targets, str):
        return list(targets)
    family = type(denoiser).__name__
    if family not in PRESETS:
        raise UserError(
            f"finetune.targets: '{targets}' is known for {', '.join(PRESETS)}, not for {family}: name its modules in a list"
        )
    if targets not in PRESETS[family]:
        raise UserError(f"finetune.targets: no preset called '{targets}'; use {' or '.join(PRESETS[family])}, or a list of module names")
    modules = _modules(denoiser)
    names = []
    for target in PRESETS[family][targets]:
        names += [name for name in modules if fnmatchcase(name, target)] if "*" in target else [target]
    return [name for name in names if _matching(modules, [name])]


def _modules(denoiser: Denoiser) -> list[str]:
    """Names of the denoiser's own modules, without those that an adapter added."""
    added = (".base_layer", ".lora_")
    return [name for name, _ in denoiser.named_modules() if name and not any(part in name for part in added)]


def _matching(modules: list[str], targets: list[str]) -> set[str]:
    return {name for name in modules if name in targets or name.endswith(tuple(f".{target}" for target in targets))}


def attach(denoiser: Denoiser, rank: int, alpha: float, targets: list[str] | str, seed: int, kind: str = "lora") -> None:
    """Give `denoiser` something to train that changes nothing yet: a LoRA called "policy", or with kind "full" all its weights.

    A LoRA's B is zero and its A drawn from `seed`. "full" needs no rank, alpha or targets; the weights become fp32, and
    the base's stay beside them in main memory, as they were.
    """
    detach(denoiser)
    if kind == FULL:
        _free(denoiser)
        return
    if kind not in KINDS:
        raise UserError(f"finetune.adapter: there is no '{kind}'; use one of {', '.join([*KINDS, FULL])}")
    names = resolve_targets(denoiser, targets)
    modules = _modules(denoiser)
    idle = [name for name in names if not _matching(modules, [name])]
    if idle or not names:
        ends = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
        raise UserError(f"finetune.targets: {idle} fit no module of the denoiser (its modules end in {', '.join(ends)})")
    try:
        _inject(denoiser, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian", **KINDS[kind]), seed)
    except ValueError as problem:
        raise UserError(f"finetune.targets: {targets} cannot be adapted ({problem}); name linear layers or convolutions") from problem


def _inject(denoiser: Denoiser, config: LoraConfig, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(config, adapter_name=POLICY)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()  # masters in fp32: half-precision AdamW loses small updates


def _free(denoiser: Denoiser) -> None:
    denoiser._base_weights = {name: weight.detach().to("cpu", copy=True) for name, weight in denoiser.named_parameters()}
    for weight in denoiser.parameters():
        weight.data = weight.data.float()
        weight.requires_grad_(True)


def _base(denoiser: Denoiser) -> dict[str, Tensor] | None:
    """The weights from before full fine-tuning, or None."""
    return denoiser.__dict__.get("_base_weights")


def detach(denoiser: Denoiser) -> None:
    """Take the LoRA off again, or put the base's weights back, bit for bit; nothing happens if nothing is attached."""
    if getattr(denoiser, "peft_config", None):
        denoiser.delete_adapters([POLICY])
        denoiser.unload_lora()
    base = _base(denoiser)
    if base is not None:
        for name, weight in denoiser.named_parameters():
            weight.grad = None
            weight.data = base[name].to(weight.device)
            weight.requires_grad_(False)
        del denoiser._base_weights


def parameters(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    """The trainable tensors by name: the adapter's, or all of the denoiser's."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def save(denoiser: Denoiser, folder: Path, pipeline_class: Any) -> None:
    """What was trained, in `folder`, as stock diffusers reads it.

    A LoRA is `pytorch_lora_weights.safetensors` for `load_lora_weights` of `pipeline_class`; a full denoiser is one fp32
    file and its config.json for `from_pretrained` of its own class.
    """
    folder = Path(folder)
    if _base(denoiser) is not None:
        denoiser.save_pretrained(folder, safe_serialization=True, max_shard_size="100TB")
        as_umask_asks(folder)
        return
    part = next(part for part in PARTS if part in pipeline_class._lora_loadable_modules)
    config = denoiser.peft_config[POLICY]
    notes = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules),
             "use_rslora": config.use_rslora, "use_dora": config.use_dora}
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name=POLICY)}
    pipeline_class.save_lora_weights(folder, **layers, **{f"{part}_lora_adapter_metadata": notes})
    order_header(folder / FILE)
    as_umask_asks(folder)


def load(denoiser: Denoiser, folder: Path, targets: list[str] | None = None) -> None:
    """Attach what was saved in `folder` (diffusers' format). Raises UserError if it was made for another denoiser."""
    file, full = Path(folder) / FILE, Path(folder) / FULL_FILE
    if not file.is_file() and full.is_file():
        _load_full(denoiser, full)
        return
    if not file.is_file():
        raise UserError(f"there is no LoRA at {file}: run the round that makes it, or name another folder")
    tensors = _read(file)
    part = next((part for part in PARTS if any(name.startswith(f"{part}.") for name in tensors)), PARTS[0])
    weights = {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    settings = _settings(file, weights, part)
    if targets:
        settings["target_modules"] = targets
    detach(denoiser)
    try:
        _inject(denoiser, LoraConfig(**settings, init_lora_weights="gaussian"), seed=0)
        places = {name: tensor.shape for name, tensor in get_peft_model_state_dict(denoiser, adapter_name=POLICY).items()}
    except ValueError:  # peft found no module of these names
        places = {}
    if places != {name: tensor.shape for name, tensor in weights.items()}:
        detach(denoiser)
        raise _other_denoiser(file, len(weights), len(places))
    set_peft_model_state_dict(denoiser, weights, adapter_name=POLICY)


def strengthened(folder: Path, target: Path, strength: float) -> None:
    """The LoRA in `folder` with its change over the base multiplied by `strength`, saved in `target`. Raises UserError for another kind."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise UserError(f"{file} is not there: finetune.strength needs a plain LoRA (finetune.adapter: lora or rslora)")
    tensors = _read(file)
    if any("lora_magnitude_vector" in name for name in tensors):
        raise UserError(f"{file} is weight-decomposed, which no strength multiplies: finetune.strength needs finetune.adapter lora or rslora")
    with safe_open(file, framework="pt") as opened:
        notes = opened.metadata()
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: t * strength if "lora_B" in name else t for name, t in tensors.items()}, target / FILE, notes)
    order_header(target / FILE)
    as_umask_asks(target)


def _load_full(denoiser: Denoiser, file: Path) -> None:
    detach(denoiser)
    tensors, places = _read(file), denoiser.state_dict()
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in places.items()}:
        raise _other_denoiser(file, len(tensors), len(places))
    _free(denoiser)
    denoiser.load_state_dict(tensors)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        found = load_file(file)
    except SafetensorError as problem:
        check_pulled(file)
        raise UserError(f"{file} cannot be read ({problem}): run its round again, or name another folder") from problem
    check_finite(file, found, "run its round again, or name another folder")
    return found


def check_file(folder: Path) -> None:
    """Raises UserError if what was saved in `folder` cannot be read, or holds a number that is NaN or infinite."""
    _read(next(file for file in (Path(folder) / FILE, Path(folder) / FULL_FILE) if file.is_file()))


def check_trained(denoiser: Denoiser, where: str) -> None:
    """Raises UserError if a number of what is trained is NaN or infinite; `where` says in which training."""
    broken = [name for name, weight in parameters(denoiser).items() if not torch.isfinite(weight).all()]
    if broken:
        raise UserError(f"{where}: {len(broken)} of the trained tensors hold numbers that are NaN or infinite (such as {broken[0]}), so nothing "
                        "was kept of it: lower finetune.learning_rate or finetune.beta, or set finetune.precision to bf16 or no")


def _other_denoiser(file: Path, tensors: int, places: int) -> UserError:
    return UserError(f"{file} was made for another denoiser ({tensors} tensors, {places} places): use its own model")


def order_header(file: Path) -> None:
    """Same adapter, same bytes: safetensors writes its metadata in an order drawn anew each time; here it is sorted."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def _settings(file: Path, weights: dict[str, Tensor], part: str) -> dict[str, Any]:
    """LoraConfig's arguments: as noted in the file, else as its tensors show them (alpha is then the rank)."""
    with safe_open(file, framework="pt") as opened:
        noted = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    downs = {name: tensor for name, tensor in weights.items() if name.endswith("lora_A.weight")}
    if not downs:
        raise UserError(f"{file} holds no LoRA for a denoiser; name another file")
    rank = next(iter(downs.values())).shape[0]
    seen = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.removesuffix(".lora_A.weight") for name in downs),
        "use_rslora": False,
        "use_dora": any("lora_magnitude_vector" in name for name in weights),
    }
    return {key: noted.get(f"{part}.{key}", value) for key, value in seen.items()} | {"r": rank}


def attached(denoiser: Denoiser) -> str | None:
    """Which kind `denoiser` carries: "lora", "rslora", "dora", "full", or None."""
    if _base(denoiser) is not None:
        return FULL
    if not getattr(denoiser, "peft_config", None):
        return None
    config = denoiser.peft_config[POLICY]
    return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"


def check_shape(denoiser: Denoiser, rank: int, alpha: float, targets: list[str] | str, kind: str = "lora") -> None:
    """Raises UserError if what a round goes on from is not what the configuration asks for."""
    found = attached(denoiser)
    if found != kind:
        raise UserError(f"finetune.adapter changed between rounds: the last one is '{found}', not '{kind}'; keep it for all rounds of a run")
    if kind == FULL:
        return
    config = denoiser.peft_config[POLICY]
    adapted = {name for name, module in denoiser.named_modules() if isinstance(module, BaseTunerLayer)}
    wanted = _matching(_modules(denoiser), resolve_targets(denoiser, targets))  # by modules: peft shortens long lists of names
    if (config.r, float(config.lora_alpha), adapted) != (rank, float(alpha), wanted):
        raise UserError(
            f"finetune.rank, alpha or targets changed between rounds: the last adapter has rank {config.r}, alpha "
            f"{config.lora_alpha:g}, targets {sorted(config.target_modules)}; keep them for all rounds of a run"
        )


@contextmanager
def disabled(denoiser: Denoiser, really: bool = True) -> Iterator[None]:
    """The denoiser as it was before its training, bit for bit: the base reference. Nothing happens if not `really`.

    Full fine-tuning copies the base's weights from main memory to the device each time, in fp32 as the trained ones, so
    that at the first step both give the same numbers.
    """
    if not really:
        yield
        return
    base = _base(denoiser)
    if base is None:
        denoiser.disable_adapters()
        try:
            yield
        finally:
            denoiser.enable_adapters()
        return
    trained = {name: weight.data for name, weight in denoiser.named_parameters()}
    with torch.inference_mode(False):  # a copy made for inference alone could not stand in for a parameter
        for name, weight in denoiser.named_parameters():
            weight.data = base[name].to(weight.device, weight.dtype)
    try:
        yield
    finally:
        for name, weight in denoiser.named_parameters():
            weight.data = trained[name]


@contextmanager
def scaled(denoiser: Denoiser, share: float) -> Iterator[None]:
    """For a while, `share` times the LoRA's change over the base: base + share x (adapted - base), exactly, as the change is linear in B."""
    if attached(denoiser) not in ("lora", "rslora"):
        raise UserError("finetune.reference mix and finetune.strength need a plain LoRA (finetune.adapter: lora or rslora): the others' change "
                        "cannot be divided")
    ups = {name: weight for name, weight in denoiser.named_parameters() if "lora_B" in name}
    whole = {name: weight.data for name, weight in ups.items()}
    for name, weight in ups.items():
        weight.data = whole[name] * share
    try:
        yield
    finally:
        for name, weight in ups.items():
            weight.data = whole[name]
