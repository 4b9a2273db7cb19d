"""`fdpo generate`: pictures of any prompt with a round's adapter, equal to what stock diffusers draws with it."""

from pathlib import Path

import torch

from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.prompts import slug
from fashiondpo_pipeline.sampling import Guidance, sample
from stages import Session
from stages.single import finished


def run(
    session: Session, prompt: str, number: int | None, pairs: str | None, count: int, seed: int,
    steps: int | None, guidance: float | None, eta: float | None, out: Path | None,
) -> None:
    if not prompt.strip():
        raise UserError("the prompt is empty: say what to draw")
    adapter, number = finished(session, number, pairs)
    knobs = session.config.sample
    generator = session.generator(adapter)
    guidance = knobs.guidance if guidance is None else guidance
    row = {"group": "", "prompt": prompt}
    schedule = generator.schedule(steps or knobs.steps)
    asked = Guidance(guidance, tuple(knobs.guidance_interval), knobs.guidance_rescale)
    condition = generator.condition([row] * count, asked, knobs.negative).steered(asked, schedule)
    generator.let_go("text")
    path = sample(
        generator.denoise, schedule, condition,
        [torch.Generator().manual_seed(seed + i) for i in range(count)], generator.latent_shape,
        eta=knobs.eta if eta is None else eta, tile=min(count, knobs.tile), device=generator.device,
    )
    folder = out or session.run.root / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    pictures, sound = generator.decode(path.x_0)
    if not sound.all():
        raise UserError("a picture is not made of numbers: use generator.dtype float32, or bfloat16 on a GPU")
    for i, picture in enumerate(pictures):
        file = folder / f"{slug(prompt)}-round{number}-seed{seed + i}.png"
        file.write_bytes(encode_png(picture))
        print(file)
