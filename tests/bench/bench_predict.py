"""What a round with each preset will take: memory and FLOPs of the real architectures, counted without weights and without a GPU.

The denoiser is built of fake tensors, which have shapes and no numbers; every operation of a finetuning micro-batch (forward and
backward, with checkpointing as the preset says) runs on them, live storage is added up, and products and attentions are counted.
Predicted, not measured: memory leaves out the allocator's own waste and cuDNN's workspaces; hours suppose a share of the matrix peak.

    python tests/bench/bench_predict.py                  # all presets, 100 prompts, 30 % of 989 TFLOP/s (one H100's dense bf16)
    python tests/bench/bench_predict.py --only sdxl --prompts 1000 --tflops 300
"""

import argparse
import math
import weakref
from contextlib import contextmanager
from typing import Any

import peaks
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fashiondpo_pipeline import adapters, terminal
from fashiondpo_pipeline.config import Config, validate
from fashiondpo_pipeline.presets import PRESETS
from fashiondpo_pipeline.sampling import Guidance
from fashiondpo_pipeline.timesteps import in_window, saved_steps
from stages.plan import latents_kept

ARCHITECTURES = {"sd15": "sd15", "sdxl": "sdxl", "sd35": "sd3", "flux": "flux"}
GIB = 2**30


class Live(TorchDispatchMode):
    """Bytes of storage that operations made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@contextmanager
def staying():
    """Modules stay where they are: fake ones cannot be moved, and need not be."""
    to, torch.nn.Module.to = torch.nn.Module.to, lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.to = to  # type: ignore[method-assign]


def counted(name: str, config: Config) -> dict[str, float]:
    """Bytes of weights, of the adapter with its optimiser, and of activations; FLOPs of a row drawn and of a row trained."""
    knobs = config.finetune
    generator = peaks.generator(ARCHITECTURES[name], "cpu", "bfloat16", None)
    with FakeTensorMode(allow_non_fake_inputs=True), staying():
        denoiser = _fake_denoiser(generator)
        adapters.attach(denoiser, knobs.rank, knobs.alpha or float(knobs.rank), knobs.targets, 0)
        if knobs.checkpointing:
            denoiser.enable_gradient_checkpointing()
        rows = knobs.micro_batch
        condition = generator.condition([{"prompt": peaks.prompts()[0]}] * rows, Guidance()).alone()
        x, t = torch.randn(rows, *generator.latent_shape), torch.full((rows,), 500)
        trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
        with Live() as live:  # by itself: a counter of FLOPs keeps tensors alive
            generator.denoise(x, t, condition.branch(0)).float().square().mean().backward()
        one = {key: part[:1] for key, part in condition.branch(0).items()}
        with FlopCounterMode(display=False) as training:
            generator.denoise(x[:1], t[:1], one).float().square().mean().backward()
        with FlopCounterMode(display=False) as drawing, torch.no_grad():
            generator.denoise(x[:1], t[:1], one)
        weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    return {"weights": weights, "adapter": trained * 4 * 3, "activations": live.peak, "drawn": drawing.get_total_flops(),
            "trained": training.get_total_flops(), "latent": 2 * math.prod(generator.latent_shape)}


def _fake_denoiser(generator: Any) -> Any:
    kind = generator.source.class_of(generator.denoiser_part)
    torch.set_default_dtype(torch.bfloat16)
    try:
        denoiser = kind(**generator.source.config(generator.denoiser_part)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    generator.__dict__["denoiser"] = denoiser
    return denoiser


def row(name: str, config: Config, prompts: int, tflops: float) -> list[str]:
    """One preset's line: a training round of `prompts` prompts, without evaluation."""
    found = counted(name, config)
    sample, knobs = config.sample, config.finetune
    branches = 1 if sample.guidance == 1 or name == "flux" else 2  # FLUX takes guidance as a number
    saved = saved_steps(sample.save, sample.steps)
    columns = min(knobs.timesteps, len(in_window(saved, sample.steps, knobs.window)))
    drawing = prompts * sample.candidates * sample.steps * branches * found["drawn"]
    training = knobs.epochs * prompts * sample.candidates * columns * branches * found["trained"]
    disk = prompts * sample.candidates * found["latent"] * latents_kept(sample.model_dump(), saved)
    memory = (found["weights"] + found["adapter"] + found["activations"] * branches) / GIB
    hours = [flops / (tflops * 1e12) / 3600 for flops in (drawing, training)]
    return [name, f"{found['weights'] / GIB:.1f}", f"{found['activations'] * branches / GIB:.1f}", f"{memory:.1f}", f"{found['drawn'] / 1e12:.2f}",
            f"{found['trained'] / found['drawn']:.2f}", f"{hours[0]:.2f}", f"{hours[1]:.2f}", f"{disk / GIB:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tflops", type=float, default=0.3 * 989, help="what the GPU is supposed to reach")
    options = parser.parse_args()
    rows = [row(name, validate(PRESETS[name], name), options.prompts, options.tflops) for name in options.only]
    heads = ["preset", "weights GiB", "activations", "finetune peak GiB", "TFLOP a row", "trained/drawn", "sample h", "finetune h", "disk GiB"]
    terminal.show(f"predicted: one round of {options.prompts} prompts at {options.tflops:.0f} TFLOP/s", heads, rows)


if __name__ == "__main__":
    main()
