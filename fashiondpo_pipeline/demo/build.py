"""Makes all of `data/fashion_mini` from the files of Fashion-MNIST; stopped at any time, it goes on when called."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers.utils import logging as transformers_logging

from fashiondpo_pipeline import devices
from fashiondpo_pipeline.demo import autoencoder, clip, denoiser, drawings, judge, tables
from fashiondpo_pipeline.demo.fitting import Tick
from fashiondpo_pipeline.demo.garments import CATEGORIES, PALETTE, Wardrobe, wardrobes
from fashiondpo_pipeline.demo.recipe import SHIPPED, Recipe
from fashiondpo_pipeline.errors import UserError

NOTICE = (
    "The MIT License (MIT) Copyright © 2017 Zalando SE, https://tech.zalando.com. Permission is hereby granted, free "
    "of charge, to any person obtaining a copy of this software and associated documentation files (the "
    "“Software”), to deal in the Software without restriction, including without limitation the rights to use, "
    "copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons "
    "to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and "
    "this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS "
    "PROVIDED “AS IS”, WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE "
    "WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE "
    "AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF "
    "CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS "
    "IN THE SOFTWARE."
)



@dataclass(frozen=True)
class Bench:
    """What every part is made from."""

    out: Path
    work: Path
    split: dict[str, Wardrobe]
    recipe: Recipe
    seed: int
    device: str
    bar: Progress

    def tick(self, name: str) -> Tick:
        """A line of the progress display, as the function that a training loop calls after each step."""
        line = self.bar.add_task(name, total=None, loss="")

        def tick(step: int, steps: int, loss: float) -> None:
            self.bar.update(line, completed=step, total=steps, loss=f"loss {loss:.4f}")

        return tick

    def training(self, name: str) -> dict:
        return {"seed": self.seed, "device": self.device, "work": self.work, "tick": self.tick(name)}


# Each maker writes one part to `target` and returns what it measured.


def make_prompts(bench: Bench, target: Path) -> dict:
    table = tables.prompts()
    tables.write(table, target)
    return {"rows": table.num_rows}


def make_catalog(bench: Bench, target: Path) -> dict:
    table = tables.catalog(bench.split["catalog"], bench.seed, bench.recipe.catalog_each, bench.recipe.catalog_patterned)
    tables.write(table, target)
    return {"rows": table.num_rows}


def make_generator(bench: Bench, target: Path) -> dict:
    wardrobe = bench.split["generator"]
    vae, first = autoencoder.train(wardrobe, bench.recipe, **bench.training("autoencoder"))
    unet, text, second = denoiser.train(vae, wardrobe, bench.recipe, **bench.training("denoiser"))
    denoiser.write(target, vae, unet, text)
    return {
        "seconds": {"autoencoder": round(first, 1), "denoiser": round(second, 1)},
        "parameters": {"vae": count(vae), "unet": count(unet), "text_encoder": count(text)},
        "measured": {"vae_psnr_db": autoencoder.psnr(vae, bench.split["test"], bench.seed)},
    }


def make_clip(bench: Bench, target: Path) -> dict:
    network, seconds = clip.train(bench.split["clip"], bench.recipe, **bench.training("clip"))
    clip.write(target, network)
    return {
        "seconds": {"clip": round(seconds, 1)},
        "parameters": count(network),
        "measured": clip.measure(target, bench.split["test"], bench.seed),
    }


def make_judge(bench: Bench, target: Path) -> dict:
    wardrobe, calibration = bench.split["judge"], bench.split["calibration"]
    network, seconds = judge.train(wardrobe, calibration, bench.recipe, **bench.training("judge"))
    judge.write(target, network)
    return {
        "seconds": {"judge": round(seconds, 1)},
        "parameters": count(network),
        "measured": judge.measure(target, bench.split["test"], bench.seed),
    }


def make_drawings(bench: Bench, target: Path) -> dict:
    generator, watching = bench.out / "generator", bench.out / "judge"
    if not (generator.exists() and watching.exists()):
        raise UserError(f"{bench.out} lacks generator or judge, so nothing can be drawn and judged: build them first.")
    measured = drawings.measure(generator, watching, bench.recipe.probes, bench.seed, bench.device)
    target.write_text(json.dumps(measured, indent=2) + "\n")
    return {"measured": {way: numbers["all"] for way, numbers in measured.items()}}


MAKERS: dict[str, Callable[[Bench, Path], dict]] = {
    # Quick parts first: whoever watches sees early that the images are right.
    "prompts.parquet": make_prompts,
    "catalog.parquet": make_catalog,
    "generator": make_generator,
    "clip": make_clip,
    "judge": make_judge,
    "drawings.json": make_drawings,
}


def build(
    images: Path,
    out: Path,
    *,
    work: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    only: list[str] | None = None,
    recipe: Recipe = SHIPPED,
) -> None:
    """Make each part that `out` lacks, and note in `card.json` what was measured and how long it took.

    A part appears whole or not at all. Checkpoints of unfinished training lie in `work` (beside `out` unless told)
    and go when their part is done. A part made with another recipe or seed is made anew.
    """
    unknown = sorted(set(only or ()) - set(MAKERS))
    if unknown:
        raise UserError(f"There is no part {unknown[0]!r} to build: choose among {', '.join(MAKERS)}.")
    out, fingerprint = Path(out), identity(recipe, seed)
    work = (Path(work) if work else out.with_name(f".{out.name}.work")) / fingerprint
    device = devices.find(device, "--device")
    split = wardrobes(images, recipe.sizes, seed)
    out.mkdir(parents=True, exist_ok=True)
    parts = read_parts(out)
    with progress() as bar:
        for name in only or MAKERS:
            if (out / name).exists() and parts.get(name, {}).get("identity") == fingerprint:
                bar.console.print(f"{name}: already there")
                continue
            bench = Bench(out, work / name, split, recipe, seed, device, bar)
            parts[name] = {"identity": fingerprint, **make(name, bench)}
            write_card(out, parts, recipe, seed)
            discard(bench.work)
            bar.console.print(f"{name}: done")
    for folder in (work, work.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def make(name: str, bench: Bench) -> dict:
    """One part, made beside its place and then put there in one move."""
    bench.work.mkdir(parents=True, exist_ok=True)
    target = bench.out / f".{name}.part"
    discard(target)
    started = time.monotonic()
    numbers = MAKERS[name](bench, target)
    discard(bench.out / name)
    os.replace(target, bench.out / name)
    return {"seconds": {"all": round(time.monotonic() - started, 1)}, "device": device_name(bench.device)} | numbers


def discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def identity(recipe: Recipe, seed: int) -> str:
    return hashlib.sha256(json.dumps([asdict(recipe), seed]).encode()).hexdigest()[:12]


def count(network: nn.Module) -> int:
    return sum(weights.numel() for weights in network.parameters())


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def progress() -> Iterator[Progress]:
    """One display for all of the training; the libraries' own bars for loading and saving keep silent meanwhile."""
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    try:
        with Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        ) as bar:
            yield bar
    finally:
        for logging in (diffusers_logging, transformers_logging):
            logging.enable_progress_bar()


def read_parts(out: Path) -> dict:
    card = out / "card.json"
    return json.loads(card.read_text(encoding="utf-8"))["parts"] if card.exists() else {}


def write_card(out: Path, parts: dict, recipe: Recipe, seed: int) -> None:
    """Where everything comes from, its licence, and every number measured while it was made."""
    card = {
        "name": "fashion_mini",
        "about": "Real garments of Fashion-MNIST, dyed and patterned in two named colours, with a small generator, CLIP and judge.",
        "source": {
            "data": "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms (Xiao, Rasul "
            "and Vollgraf 2017, arXiv:1708.07747), 70,000 grey pictures of 28 x 28",
            "package": "Debian dataset-fashion-mnist",
            "changes": "enlarged to 64 x 64, white background, garments dyed and patterned; networks trained on the result",
            "licence": "MIT",
            "notice": NOTICE,
        },
        "palette": {name: "#{:02x}{:02x}{:02x}".format(*rgb) for name, rgb in PALETTE.items()},
        "categories": list(CATEGORIES),
        "seed": seed,
        "recipe": asdict(recipe),
        "made_with": {name: version(name) for name in ("torch", "diffusers", "transformers", "open_clip_torch")},
        "bytes": {name: size(out / name) for name in MAKERS if (out / name).exists()},
        "parts": {name: parts[name] for name in MAKERS if name in parts},
    }
    temporary = out / "card.json.part"
    temporary.write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, out / "card.json")


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
