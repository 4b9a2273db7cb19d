"""The sample stage with everything saved against the same pipeline in plain diffusers at the same batch, and against one at a time.

    python tests/bench/bench_sampling.py                                         # the embedded default on a CPU
    python tests/bench/bench_sampling.py --model sd15 --device cuda              # Stable Diffusion 1.5 at 512, random weights
    python tests/bench/bench_sampling.py --bytes-only                            # only what a candidate takes on disk

  plain diffusers      the stock pipeline at our batch, with our encoded prompts, scheduler and steps; pictures as PIL; nothing saved
  ours                 the stage as `fdpo sample` runs it: 8 saved steps with log-probabilities and errors, pictures as PNG, tables
                       written and synced, at 1 file for each batch; models loaded before and kept
  one at a time        as FashionDPO does: the same steps at batch 1, every latent and every branch's input and prediction kept in
                       fp32 in main memory and written as one file at the end

The VAE is in fp32 in all of them; where the denoiser is not, plain diffusers is also shown with its VAE in that type. A flow model's
candidates are drawn by the SDE, the plain pipeline's by the ODE. The idle share of a GPU is the time in which no kernel ran, by its
own profiler; on a CPU it is the share of the stage's time spent outside denoiser and decoder. README.md beside this has a GPU's figures.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peaks
import pyarrow as pa
import torch

from fashiondpo_pipeline import plain_yaml, schemas, terminal, timesteps
from fashiondpo_pipeline.config import validate
from fashiondpo_pipeline.sampling import Condition, Guidance, Trajectory, predict
from fashiondpo_pipeline.workspace import write_parquet
from stages import Session
from stages.sample import trajectory_rows

SAVED, K = 8, 8
LATENT_512, MOST_BYTES = (4, 64, 64), 0.35 * 2**20
BATCH = {"sd15": 32, "sdxl": 8, "sd3": 8, "flux": 4}
CONFIG = """
prompts: {{file: "{prompts}"}}
sample: {{candidates: {k}, steps: {steps}, guidance: {guidance}, eta: {eta}, save: {saved}, tile: {batch}}}
experts: {{brightness: {{use: "fashiondpo_pipeline.testing:Brightness"}}}}
pair: {{weights: {{brightness: 1.0}}}}
evaluate: {{judge: null}}
machine: {{batch: {batch}, shard: {shard}}}
"""


class Bench(Session):
    """A session whose generator is already there, with its prompts encoded."""

    def __init__(self, generator: Any, config: Any, root: Path):
        super().__init__(config, root, say=lambda text: None)
        self.__dict__ |= {"_generator": generator, "source": generator.source}

    def encodings(self, step: Any, prompts: list[str]) -> dict:
        return {prompt: parts for prompt, parts in ENCODED.items() if prompt in prompts}


ENCODED: dict[str, dict] = {}


class Work:
    """A model, its prompts and settings, and the ways to draw `count` candidates with it."""

    def __init__(self, job: dict):
        self.job, self.device, self.batch, self.steps = job, job["device"], job["batch"], job["steps"]
        self.generator = peaks.generator(job["model"], job["device"], job["dtype"], job["size"], compile=job["compile"])
        self.generator.let_go = lambda *parts: None  # between the repeats nothing is loaded anew
        ENCODED.update(self.generator.encodings)
        self.guidance, self.count = Guidance(job["guidance"]), job["batches"] * self.batch
        self.eta = 0.7 if self.generator.flow else 1.0
        prompts = [prompt for prompt in peaks.prompts() for _ in range(-(-self.count // K // 8))]
        self.prompts = prompts[: self.count // K]
        self.rows = [{"prompt": prompt, "group": str(g)} for g, prompt in enumerate(self.prompts) for _ in range(K)]
        self.inside = 0.0
        self.folder = tempfile.TemporaryDirectory()
        self.runs = 0

    def condition(self, rows: list[dict]) -> Condition:
        self.generator.encodings = dict(ENCODED)
        return self.generator.condition(rows, self.guidance)

    def ours(self) -> None:
        """The stage, into a folder of its own."""
        self.runs += 1
        root = Path(self.folder.name) / str(self.runs)
        root.mkdir()
        table = pa.table({"prompt": [*self.prompts, "held out"], "group": [*map(str, range(len(self.prompts))), "held"],
                          "split": ["train"] * len(self.prompts) + ["held-out"]})
        write_parquet(root / "prompts.parquet", table)
        text = CONFIG.format(prompts=root / "prompts.parquet", k=K, steps=self.steps, guidance=self.guidance.scale, eta=self.eta, saved=SAVED,
                             batch=self.batch, shard=max(self.batch // K, 1))
        session = Bench(self.generator, validate(plain_yaml.parse(text, "bench"), "bench"), root)
        session.execute([session.chain(1).rounds[1].sample])

    def plain(self, vae_dtype: torch.dtype = torch.float32) -> list:
        """diffusers' own pipeline; its latents go through the VAE in the type that is asked for."""
        pipeline, generator = self._pipeline, self.generator
        torch.nn.Module.to(generator.vae, vae_dtype)  # diffusers' own `to` warns of nothing
        pictures: list = []
        for start in range(0, self.count, self.batch):
            rows = self.rows[start : start + self.batch]
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(rows))]
            latents = pipeline(**self._asked(rows), num_inference_steps=self.steps, generator=generators, output_type="latent",
                               height=self._side, width=self._side, **self._own).images
            with torch.inference_mode():
                latents = self._unpacked(latents).to(vae_dtype)
                config = generator.vae.config
                pixels = generator.vae.decode(latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0), return_dict=False)[0]
            pictures += pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
        torch.nn.Module.to(generator.vae, torch.float32)
        return pictures

    @property
    def _pipeline(self) -> Any:
        generator = self.generator
        parts = {generator.denoiser_part: generator.denoiser, "vae": generator.vae, "scheduler": self._scheduler()}
        empty = dict.fromkeys((*generator.text_parts, *generator._not_needed))
        pipeline = generator.pipeline_class(**parts, **empty, **generator._pipeline_options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _scheduler(self) -> Any:
        """As our walk: DDIM for diffusion models, the model's own for flows."""
        if self.generator.flow:
            return self.generator.scheduler
        from diffusers import DDIMScheduler

        return DDIMScheduler.from_config(self.generator.scheduler.config)

    @property
    def _side(self) -> int:
        return self.generator.latent_shape[1] * self.generator.vae_factor

    @property
    def _own(self) -> dict:
        """Arguments that not every pipeline takes."""
        return {"guidance_scale": self.guidance.scale} | ({} if self.generator.flow else {"eta": self.eta})

    def _asked(self, rows: list[dict]) -> dict:
        condition, dtype = self.condition(rows), self.generator.dtype
        names = {"tokens": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        found = {names[name]: part[0].to(dtype) for name, part in condition.parts.items() if name in names}
        if len(condition.weights) > 1:
            found |= {f"negative_{names[name]}": part[1].to(dtype) for name, part in condition.parts.items() if name in names}
        return found

    def _unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        if latents.ndim == 4:
            return latents
        return self.generator.pipeline_class._unpack_latents(latents, self._side, self._side, self.generator.vae_factor)

    @torch.inference_mode()
    def one_at_a_time(self, count: int) -> None:
        """Batch 1, everything kept in fp32 in lists, one file at the end."""
        generator, kept = self.generator, {"latents": [], "next_latents": [], "inputs": [], "predictions": []}
        schedule = generator.schedule(self.steps)
        pictures = []
        for number in range(count):
            condition, random = self.condition([self.rows[number]]), torch.Generator().manual_seed(number)
            x = torch.randn(1, *generator.latent_shape, generator=random).to(self.device)
            for timestep in schedule.timesteps.tolist():
                t = torch.full((1,), timestep, device=self.device)
                guided, conditional = predict(generator.denoise, x, t, condition)
                noise = torch.randn(1, *generator.latent_shape, generator=random).to(self.device)
                after = schedule.mean(guided, x, t, self.eta) + schedule.std(t, self.eta).to(x.dtype) * noise
                branches = x.repeat(len(condition.weights), 1, 1, 1)
                for name, value in zip(kept, (x, after, branches, conditional), strict=True):
                    kept[name].append(value.float().cpu())
                x = after
            pictures.append(generator.decode(x)[0])
        np.savez(Path(self.folder.name) / "all.npz", **{name: torch.cat(values).numpy() for name, values in kept.items()})

    def bare(self) -> None:
        """The denoiser's forwards, and nothing else."""
        x = torch.randn(self.batch, *self.generator.latent_shape, device=self.device)
        with torch.inference_mode():
            for start in range(0, self.count, self.batch):
                condition = self.condition(self.rows[start : start + self.batch])
                for timestep in self.generator.schedule(self.steps).timesteps.tolist():
                    predict(self.generator.denoise, x, torch.full((self.batch,), timestep, device=self.device), condition)


# -- idle


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) spans.

    >>> busy([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def idle_share_gpu(call: Callable[[], None], device: str) -> float:
    """Share of a call's time in which no kernel and no copy was running."""
    from torch.profiler import ProfilerActivity, profile

    peaks.settled(device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds = peaks.timed(call, device)
    spans = [(e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return 1 - busy(spans) / 1e6 / seconds


def outside_share(work: Work) -> float:
    """Share of the stage's time spent outside denoiser and decoder; on a CPU, which is never idle for itself."""
    generator, inside = work.generator, 0.0

    def timing(own: Callable) -> Callable:
        def call(*given: Any) -> Any:
            nonlocal inside
            started = time.perf_counter()
            found = own(*given)
            inside += time.perf_counter() - started
            return found
        return call

    names = ("denoise", "decode")
    for name in names:
        setattr(generator, name, timing(getattr(generator, name)))
    seconds = peaks.timed(work.ours, "cpu")
    for name in names:
        delattr(generator, name)
    return 1 - inside / seconds


# -- measuring


def measure(job: dict) -> dict:
    """Seconds and peak memory of each way, in turn, so that a slow moment of the machine hits them all; the first time warms up."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    work, device = Work(job), job["device"]
    few = max(min(job["batch"] // 8, 4), 1)
    ways: dict[str, tuple[Callable, int]] = {"ours": (work.ours, work.count)}
    if not job["compile"]:
        ways = {"plain diffusers": (work.plain, work.count), **ways, "bare forwards": (work.bare, work.count),
                "one at a time": (lambda: work.one_at_a_time(few), few)}
        if work.generator.dtype != torch.float32:
            ways["plain diffusers, its VAE too"] = (lambda: work.plain(work.generator.dtype), work.count)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, int] = {}
    for repeat in range(job["repeats"] + 1):
        for name, (call, count) in ways.items():
            peaks.forget_peak(device)
            taken = peaks.timed(call, device) / count
            memory[name] = max(memory.get(name, 0), peaks.peak_memory(device))
            if repeat:
                spent[name].append(taken)
    found = {name: {"seconds": median(values), "peak": memory[name]} for name, values in spent.items()}
    on_gpu = device.startswith("cuda")
    idle = None if job["compile"] else idle_share_gpu(work.ours, device) if on_gpu else outside_share(work)
    loaded = [part for part in ("denoiser", "vae", "text") if part in work.generator.__dict__]
    flops = {}
    if on_gpu and not job["compile"]:
        flops = {"flops": peaks.flops(work.bare) / work.count, "matrix_peak": peaks.matrix_peak(device)}
    return {"ways": found, "idle": idle, "loaded": loaded, **flops}


def bytes_a_candidate() -> list[tuple[str, float]]:
    """MiB of the trajectory table for a candidate with a 4x64x64 latent and 8 saved steps, as Parquet on disk."""
    count, found, random = 8, [], torch.Generator().manual_seed(0)
    spread, together = timesteps.saved_steps(SAVED, 50), list(range(20, 20 + SAVED))
    for label, save, path in (("neighbouring steps, path true", together, True), ("steps spread out, path false", spread, False),
                              ("steps spread out, path true", spread, True)):
        draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
        drawn = Trajectory(draw(count, *LATENT_512), *(draw(count, SAVED, *LATENT_512) for _ in range(2)),
                           log_prob=draw(count, SAVED).double(), error=draw(count, SAVED))
        batch = [({"group": f"group-{n}"}, n) for n in range(count)]
        rows = trajectory_rows(batch, drawn, save, [float(t) for t in range(50)], {"path": path, "predictions": False})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trajectories.parquet"
            write_parquet(file, pa.Table.from_pylist(rows, schemas.trajectories(*LATENT_512)))
            found.append((label, file.stat().st_size / count / 2**20))
    return found


def main() -> None:
    job = peaks.job_of(sys.argv[1:])
    if job is not None:
        print(json.dumps(measure(job)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peaks.common_options(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="5 where the model has two branches, 3.5 for FLUX; the embedded default's 1")
    parser.add_argument("--batch", type=int, help="rows in each call, both in plain diffusers and in ours")
    parser.add_argument("--batches", type=int, default=4, help="of them: a file each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also with torch.compile; on a GPU if left out")
    parser.add_argument("--bytes-only", action="store_true")
    options = parser.parse_args()
    targets = peaks.Targets()
    show_bytes(targets)
    if options.bytes_only:
        targets.end()
    peaks.settle(options)
    on_gpu = options.device.startswith("cuda")
    options.batch = options.batch or BATCH.get(options.model, 32)
    if options.batch % K:
        options.batch = max(options.batch // K, 1) * K
    options.compile = on_gpu if options.compile is None else options.compile
    if options.guidance is None:
        options.guidance = 1.0 if options.model == "embedded" else 3.5 if "flux" in options.model else 5.0
    print(f"{peaks.describe(options)}, {options.batches} batches of {options.batch}, {options.steps} steps, {SAVED} saved, "
          f"guidance {options.guidance:g}")
    names = ("model", "device", "dtype", "size", "steps", "guidance", "batch", "batches", "repeats", "threads")
    asked = {name: getattr(options, name) for name in names}
    eager = peaks.in_own_process(__file__, asked | {"compile": False})
    compiled = peaks.in_own_process(__file__, asked | {"compile": True}) if options.compile else None
    report(targets, eager, compiled, on_gpu, full_size=options.model in peaks.FULL_SIZE)
    targets.end()


def show_bytes(targets: peaks.Targets) -> None:
    found = bytes_a_candidate()
    terminal.show("a candidate of 512 pixels at 8 saved steps, picture apart", ["", "MiB"], [[label, f"{size:.3f}"] for label, size in found])
    for label, size in found[:2]:
        targets.check(f"a candidate on disk, {label}", f"{size:.3f} MiB", "at most 0.35 MiB", size * 2**20 <= MOST_BYTES)


def report(targets: peaks.Targets, eager: dict, compiled: dict | None, on_gpu: bool, full_size: bool) -> None:
    """The table of all ways, and what was promised of them."""
    if "failed" in eager:
        targets.check("sampling runs", eager["failed"], "it does", False)
        return
    ways = eager["ways"] | ({"ours, torch.compile": compiled["ways"]["ours"]} if compiled and "ways" in compiled else {})
    plain = ways["plain diffusers"]["seconds"]
    rows = []
    for name, way in ways.items():
        share = ""
        if "flops" in eager and "bare" in name:
            share = f"{100 * eager['flops'] / way['seconds'] / eager['matrix_peak']:.0f} %"
        rows.append([name, f"{1 / way['seconds']:.2f}", f"{plain / way['seconds']:.2f}x", terminal.size(way["peak"]), share])
    terminal.show("", ["", "candidates/s", "ratio", "peak", "of matrix peak"], rows)
    print(f"in memory while sampling: {', '.join(eager['loaded'])}; "
          f"{'GPU idle' if on_gpu else 'outside denoiser and decoder'} {100 * eager['idle']:.1f} % of the stage's time; "
          f"ours is {ways['one at a time']['seconds'] / ways['ours']['seconds']:.1f}x one at a time")
    ratio = plain / ways["ours"]["seconds"]
    if full_size:
        targets.check("everything saved, against plain diffusers saving nothing", f"{ratio:.2f}x", "0.95x", ratio >= 0.95)
    else:
        targets.not_here("everything saved, against plain diffusers saving nothing", "0.95x", "needs a model of full size")
    if not (on_gpu and full_size):
        targets.not_here("with torch.compile, against plain diffusers", "1.3x", "needs a GPU and a model of full size")
    elif compiled is None or "ways" not in compiled:
        targets.check("with torch.compile, against plain diffusers", "it does not run", "1.3x", False)
    else:
        ratio = plain / ways["ours, torch.compile"]["seconds"]
        targets.check("with torch.compile, against plain diffusers", f"{ratio:.2f}x", "1.3x", ratio >= 1.3)


if __name__ == "__main__":
    main()
