"""What the benchmarks share: models of full size with random weights, time, memory, FLOPs, the device's matrix peak, and targets.

Random weights cost what trained ones cost, and need no download. Configurations are those of the published models; parameters are
counted in `PARAMETERS`, so that a slip in one of them shows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.utils import logging
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fashiondpo_pipeline import terminal, testing
from fashiondpo_pipeline.checkpoints import Source
from fashiondpo_pipeline.generators.diffusers_model import Options
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.registry import FAMILIES

_SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
}
_VAE_16 = _VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}

# name -> pipeline, scheduler, denoiser and VAE as published; parts of a prompt's encoding; picture's usual size; parameters of the denoiser
FULL_SIZE: dict[str, dict[str, Any]] = {
    "sd15": {
        "pipeline": "StableDiffusionPipeline", "scheduler": ("DDIMScheduler", _SD_NOISE | {"set_alpha_to_one": False}),
        "denoiser": ("unet", "UNet2DConditionModel", {
            "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "attention_head_dim": 8,
        }),
        "vae": _VAE, "parts": {"tokens": (77, 768)}, "size": 512, "parameters": 859_520_964,
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline", "scheduler": ("DDIMScheduler", _SD_NOISE | {"set_alpha_to_one": False}),
        "denoiser": ("unet", "UNet2DConditionModel", {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20), "use_linear_projection": True, "cross_attention_dim": 2048,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        }),
        "vae": _VAE | {"scaling_factor": 0.13025}, "parts": {"tokens": (77, 2048), "pooled": (1280,)}, "size": 1024,
        "parameters": 2_567_463_684,
    },
    "sd3": {
        "pipeline": "StableDiffusion3Pipeline", "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        "denoiser": ("transformer", "SD3Transformer2DModel", {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        }),
        "vae": _VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}, "parts": {"tokens": (333, 4096), "pooled": (2048,)},
        "size": 1024, "parameters": 2_028_328_000,
    },
    "flux": {
        "pipeline": "FluxPipeline",
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}),
        "denoiser": ("transformer", "FluxTransformer2DModel", {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        }),
        "vae": _VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}, "parts": {"tokens": (512, 4096), "pooled": (768,)},
        "size": 1024, "parameters": 11_901_408_320,
    },
}
TINY: dict[str, Callable[[Path], Path]] = {
    "tiny": testing.tiny_stable_diffusion, "tiny-sdxl": testing.tiny_sdxl, "tiny-sd3": testing.tiny_sd3, "tiny-flux": testing.tiny_flux,
}
MODELS = (*TINY, "embedded", *FULL_SIZE)


# -- models


class Invented(Source):
    """A published model's configurations with random weights, drawn on the device that will use them, in their own type."""

    def __init__(self, name: str, device: str):
        super().__init__(f"{name} with random weights")
        self.of, self.device = FULL_SIZE[name], device

    @cached_property
    def index(self) -> dict:
        part, kind, _ = self.of["denoiser"]
        return {"_class_name": self.of["pipeline"], part: ["diffusers", kind], "vae": ["diffusers", "AutoencoderKL"],
                "scheduler": ["diffusers", self.of["scheduler"][0]]}

    def identity(self, *parts: str) -> str:
        return self.name

    def text_identity(self) -> str:
        return f"{self.name}, texts"

    def config(self, part: str) -> dict:
        return self.of["vae"] if part == "vae" else self.of["scheduler"][1] if part == "scheduler" else self.of["denoiser"][2]

    def part(self, name: str, dtype: torch.dtype) -> Any:
        kind = self.class_of(name)
        if not issubclass(kind, torch.nn.Module):
            return kind(**self.config(name))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a second copy in fp32 would not fit for the largest
        try:
            with torch.device(self.device):
                torch.manual_seed(0)
                return torch.nn.Module.to(kind(**self.config(name)), self.device, dtype)  # buffers too
        finally:
            torch.set_default_dtype(before)


def generator(model: str, device: str, dtype: str, size: int | None, compile: bool = False) -> Any:
    """A generator to measure, with encodings of `prompts()` in place of its text encoders."""
    options = {"device": device, "dtype": dtype, "compile": compile}
    if model in FULL_SIZE:
        side = size or FULL_SIZE[model]["size"]
        source = Invented(model, device)
        made = FAMILIES.find(source.family)(source, Options(**options, height=side, width=side))
        random = torch.Generator().manual_seed(1)
        for prompt in ("", *prompts()):
            made.encodings[prompt] = {name: torch.randn(shape, generator=random) for name, shape in FULL_SIZE[model]["parts"].items()}
        return made
    if model == "embedded":
        made = text2img("embedded:fashion_mini/generator", **options)
        made.remember(["", *prompts()])
        made.let_go("text")
        return made
    side = size or (16 if model == "tiny-flux" else None)
    place = tempfile.TemporaryDirectory()
    logging.disable_progress_bar()
    made = text2img(str(TINY[model](Path(place.name) / "model")), **options, height=side, width=side)
    made.kept_folder = place  # lives as long as the generator, which reads parts and configurations when it needs them
    made.remember(["", *prompts()])
    made.let_go("text")
    return made


def prompts(count: int = 8) -> list[str]:
    colours = ("red", "navy", "green", "black", "white", "brown", "grey", "pink")
    return [f"a {colour} bag" for colour in colours[:count]]


def needs_size(model: str, size: int | None) -> int | None:
    """The side of a picture in pixels where it is known."""
    return size or (FULL_SIZE[model]["size"] if model in FULL_SIZE else None)


# -- measures


def settled(device: str) -> None:
    """Return once the device has done everything it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    settled(device)
    started = clock()
    call()
    settled(device)
    return clock() - started


def seconds(call: Callable[[], Any], device: str, at_least: float = 2.0, most: int = 20) -> float:
    """Median seconds of a call, after one that warms up; with one CPU thread the process's own, which neighbours do not stretch."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    call()
    found: list[float] = []
    while not found or (sum(found) < at_least and len(found) < most):
        found.append(timed(call, device, clock))
    return median(found)


def forget_peak(device: str) -> None:
    """Peak memory counts from here; on a CPU the system counts a process's whole life."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str) -> int:
    """Bytes: what the allocator held on a GPU, its own waste included; of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Live(TorchDispatchMode):
    """Bytes of all tensors made under it and not yet freed, at most at one time: exact, where a CPU process's size is not."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._add, found)
        return found

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known or not size:
            return

        def gone(_: Any) -> None:
            self.known.pop(key, None)
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def tensor_peak(call: Callable[[], Any], *networks: torch.nn.Module | None) -> int:
    """Bytes of these networks, and of the most tensors that lived at once during a call."""
    kept = {}
    for network in filter(None, networks):
        for tensor in (*network.parameters(), *network.buffers()):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    with Live() as live:
        live.known = {key: weakref.ref(storage) for key, storage in kept.items()}  # views of weights are not new
        call()
    return sum(storage.nbytes() for storage in kept.values()) + live.peak


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call's products and attentions, a multiplication and an addition two; recomputed ones count again."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_peak(device: str) -> float:
    """FLOP/s of the best square product that we measure: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.startswith("cuda")
    best = 0.0
    for side in (4096, 8192, 12288) if on_gpu else (512, 1024):
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32) for _ in range(2))
        best = max(best, 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device, at_least=0.5, most=200))
    return best


def in_own_process(file: str, job: dict) -> dict:
    """What this benchmark measures of one job in a fresh process, so that peak memory and compiled code are its own."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, file, "--job", json.dumps(job)], stdout=subprocess.PIPE, text=True)
    found = {"failed": f"exit {done.returncode}"} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    what = {name: job[name] for name in ("way", "signal", "micro_batch", "checkpointing", "compile") if name in job}
    print(f"{time.perf_counter() - started:.0f} s  {json.dumps(what)}  {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def job_of(arguments: list[str]) -> dict | None:
    """The job that `in_own_process` handed over; None in the process that the person started."""
    return json.loads(arguments[1]) if arguments[:1] == ["--job"] else None


# -- targets


class Targets:
    """What was promised, what was found, and whether it holds; a target that does not apply says why."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.failed = 0

    def check(self, what: str, found: str, wanted: str, holds: bool) -> None:
        self.rows.append([what, found, wanted, "pass" if holds else "FAIL"])
        self.failed += not holds

    def not_here(self, what: str, wanted: str, why: str) -> None:
        self.rows.append([what, "", wanted, f"not measured: {why}"])

    def end(self) -> None:
        """Print them all; exits 1 if one that applies fails."""
        if self.rows:
            terminal.show("targets", ["", "found", "wanted", ""], self.rows)
        raise SystemExit(1 if self.failed else 0)


def common_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of a model takes."""
    parser.add_argument("--model", choices=MODELS, default="embedded", help="tiny*, embedded: as shipped; others: full size, random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="pixels of a side; the model's own if left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the denoiser's weights; bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, help="CPU threads")


def describe(options: argparse.Namespace) -> str:
    """One line: what is measured on what."""
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    side = needs_size(options.model, options.size)
    return f"{options.model}{f' at {side}' if side else ''}, {options.dtype}, {device}, torch {torch.__version__}"


def settle(options: argparse.Namespace) -> None:
    """Fill in what depends on the device."""
    options.dtype = options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")
    if options.threads:
        torch.set_num_threads(options.threads)
