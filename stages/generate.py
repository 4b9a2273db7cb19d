"""`fdpo generate`: pictures of any prompt with a round's adapter, equal to what stock diffusers draws with it."""

from pathlib import Path

import torch

from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.prompts import slug
from fashiondpo_pipeline.sampling import sample
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
    condition = generator.condition([row] * count, guidance, knobs.negative)
    path = sample(
        generator.denoise, generator.schedule(steps or knobs.steps), condition,
        [torch.Generator().manual_seed(seed + i) for i in range(count)], generator.latent_shape,
        eta=knobs.eta if eta is None else eta, tile=min(count, knobs.tile), device=generator.device,
    )
    folder = out or session.run.root / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(generator.decode(path.x_0)):
        file = folder / f"{slug(prompt)}-round{number}-seed{seed + i}.png"
        file.write_bytes(encode_png(picture))
        print(file)
