"""`fdpo generate`: pictures of any prompts with a round's adapter, equal to what stock diffusers draws with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign import oddity
from fashiondpo_pipeline.later import Later
from fashiondpo_pipeline.prompts import read, slug
from fashiondpo_pipeline.workspace import Step
from stages import Session
from stages.single import finished, section_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fashiondpo_pipeline import adapters, sampling, training
    from fashiondpo_pipeline.sampling import Denoise, Guidance, Parts
else:  # a mistake is told before they are imported
    torch = Later("torch")
    adapters, sampling, training = (Later(f"fashiondpo_pipeline.{name}") for name in ("adapters", "sampling", "training"))


@dataclass(frozen=True)
class Wish:
    """What is to be drawn, and how; None is as in the configuration. negative: guide away from the round's negative LoRA."""

    prompts: list[str]
    count: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    eta: float | None = None
    negative: bool = False


def prompts_of(prompt: str | None, file: Path | None) -> list[str]:
    """The prompts asked for: the one given, or a file's, each once. Raises UserError for none, or both."""
    if (prompt is None) == (file is None):
        raise UserError("say what to draw: a prompt, or --prompts FILE, and not both")
    if file is not None:
        return list(dict.fromkeys(row["prompt"] for split in read(file, 0.0).values() for row in split.rows))
    if not prompt or not prompt.strip():
        raise UserError("the prompt is empty: say what to draw")
    if odd := oddity(prompt):
        raise UserError(f"the prompt holds {odd}: take it out")
    return [prompt]


def run(session: Session, wish: Wish, number: int | None, pairs: str | None, out: Path | None) -> None:
    adapter, number = finished(session, number, pairs)
    knobs = session.config.sample
    scale = knobs.guidance if wish.guidance is None else wish.guidance
    if wish.negative and scale == 1:
        raise UserError("--negative: guidance 1 has no second branch to draw with the negative LoRA; pass --guidance, such as 5")
    against = negative_of(session, number, pairs) if wish.negative else None
    folder = out or session.run.root / "generated"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; name a folder for the pictures")
    guidance = sampling.Guidance(scale, (knobs.guidance_interval[0], knobs.guidance_interval[1]), knobs.guidance_rescale)
    pushed = _weights(session, against) if against else None
    generator = session.generator(adapter)
    generator.remember(wish.prompts)
    branches = generator.condition([{"prompt": wish.prompts[0]}], guidance, knobs.negative).weights
    generator.let_go("text")
    if pushed and len(branches) == 1:
        raise UserError(f"--negative: {session.config.generator.model} takes guidance as a number and has no second branch for a negative LoRA")
    folder.mkdir(parents=True, exist_ok=True)
    broken = 0
    for prompt in wish.prompts:
        for i, picture in enumerate(_draw(generator, prompt, wish, guidance, knobs, pushed)):
            if picture is None:
                broken += 1
                continue
            file = folder / f"{slug(prompt)}-round{number}{'-negative' if pushed else ''}-seed{wish.seed + i}.png"
            file.write_bytes(encode_png(picture))
            print(file)
    if broken:
        raise UserError(f"{broken} of {wish.count * len(wish.prompts)} pictures are not made of numbers and were not written: "
                        "use generator.dtype float32, or bfloat16 on a GPU")


def _draw(generator, prompt: str, wish: Wish, guidance: Guidance, knobs, pushed: dict[str, Tensor] | None) -> Iterator[np.ndarray | None]:
    """A prompt's pictures in the order of their seeds; None for one that is not made of numbers."""
    schedule, tile = generator.schedule(wish.steps or knobs.steps), min(wish.count, knobs.tile)
    denoise = _between(generator, pushed, tile) if pushed else generator.denoise
    for start in range(0, wish.count, tile):
        numbers = range(start, min(start + tile, wish.count))
        condition = generator.condition([{"group": "", "prompt": prompt}] * len(numbers), guidance, knobs.negative).steered(guidance, schedule)
        path = sampling.sample(
            denoise, schedule, condition, [torch.Generator().manual_seed(wish.seed + i) for i in numbers], generator.latent_shape,
            eta=knobs.eta if wish.eta is None else wish.eta, tile=tile, device=generator.device,
        )
        pictures, sound = generator.decode(path.x_0)
        yield from (picture if good else None for picture, good in zip(pictures, sound, strict=True))


def negative_of(session: Session, number: int, pairs: str | None) -> Step:
    """The step that trained a round's negative LoRA. Raises UserError if there is none, or it has not been run."""
    if not number:
        raise UserError("--negative: round 0 is the base: it has no negative LoRA")
    section = {number: section_of(session, number, pairs)} if pairs else None
    step = session.chain(number, section).rounds[number].negative
    if step is None:
        raise UserError(f"--negative: round {number} has no negative LoRA: set finetune.negative to true and run "
                        f"`{session.command('finetune', '--round', number)}`, which trains it beside")
    session.output(step)
    return step


def _weights(session: Session, step: Step) -> dict[str, Tensor]:
    """What a step trained, by name."""
    return {name: weight.detach().clone() for name, weight in adapters.parameters(session.generator(step).denoiser).items()}


def _between(generator, negative: dict[str, Tensor], tile: int) -> Denoise:
    """The conditional branch under the round's own weights, the other under the negative ones: eps_neg + s (eps_pos - eps_neg).

    Diffusion-NPO, Wang et al. 2025 (2505.11245). Their code puts the LoRA trained on swapped pairs on the base, or on a mix of
    base and tuned weights; ours was trained on from where the round began, so what rounds before it learnt is in both branches.
    """
    weights = adapters.parameters(generator.denoiser)

    def denoise(x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        own = generator.denoise(x_t[:tile], t[:tile], {name: part[:tile] for name, part in parts.items()})
        if len(x_t) == tile:  # outside the guidance interval
            return own
        with training.holding(weights, negative):
            other = generator.denoise(x_t[tile:], t[tile:], {name: part[tile:] for name, part in parts.items()})
        return torch.cat([own, other])

    return denoise
