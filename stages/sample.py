"""prompts (+ last round's adapter) -> candidates, and the trajectories that finetuning needs."""

import time

import numpy as np
import pyarrow as pa
import torch

from fashiondpo_pipeline import codecs, schemas, seeds
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.sampling import Trajectory, sample
from fashiondpo_pipeline.timesteps import saved_steps
from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    knobs, machine = step.config, session.config.machine
    prompts = session.prompts[step.args["split"]].rows
    generator = session.generator(step.inputs.get("adapter"))
    schedule = generator.schedule(knobs["steps"])
    save = saved_steps(knobs["save"], knobs["steps"]) if knobs["save"] else []
    in_flight = -(-machine.batch // knobs["tile"]) * knobs["tile"]

    shards = {i: prompts[start : start + machine.shard] for i, start in enumerate(range(0, len(prompts), machine.shard))}
    for shard, groups in session.track(shards.items(), f"round {step.round} {step.name}", len(shards)):
        if out.has(shard):
            continue
        started = time.monotonic()
        rows = [(row, i) for row in groups for i in range(knobs["candidates"])]
        candidates, trajectories = [], []
        for start in range(0, len(rows), in_flight):
            batch = rows[start : start + in_flight]
            numbers = [seeds.key(knobs["seed"], knobs["stream"], row["group"], i) for row, i in batch]
            condition = generator.condition([row for row, _ in batch], knobs["guidance"], knobs["negative"])
            path = sample(
                generator.denoise, schedule, condition,
                [torch.Generator().manual_seed(number) for number in numbers], generator.latent_shape,
                eta=knobs["eta"], save=save, tile=knobs["tile"], device=generator.device,
            )
            candidates += _candidates(step, batch, numbers, _decode(generator, path.x_0, knobs["tile"]), path)
            if save:
                trajectories += _trajectories(batch, path, save, schedule.timesteps[save].tolist())
        tables = {"candidates": pa.Table.from_pylist(candidates, schemas.CANDIDATES)}
        if save:
            tables["trajectories"] = pa.Table.from_pylist(trajectories, schemas.trajectories(*generator.latent_shape))
        out.write(shard, time.monotonic() - started, **tables)

    faults = sum(1 for fault in out.table("candidates", ["fault"])["fault"].to_pylist() if fault)
    total = len(prompts) * knobs["candidates"]
    if faults == total:
        raise UserError(f"round {step.round}: all {total} pictures are broken (the latents are not finite): use dtype float32")
    if faults:
        session.say(f"round {step.round}: {faults} of {total} pictures are broken and take no part (latents not finite)")
    out.finish({"candidates": total, "faults": faults, "saved_steps": save, "denoiser_rows": total * knobs["steps"]})


def _decode(generator, x_0: torch.Tensor, tile: int) -> np.ndarray:
    """Pictures of every latent, decoded in full tiles too: a picture must not depend on how many were decoded with it."""
    pictures = []
    for part in torch.nan_to_num(x_0).split(tile):
        full = torch.cat([part, part[-1:].expand(tile - len(part), *part.shape[1:])]) if len(part) < tile else part
        pictures.append(generator.decode(full)[: len(part)])
    return np.concatenate(pictures)


def _candidates(step: Step, batch: list, numbers: list[int], pixels: np.ndarray, path: Trajectory) -> list[dict]:
    sound = torch.isfinite(path.x_0).flatten(1).all(1).tolist()
    return [
        {
            "group": row["group"], "candidate": i, "prompt": row["prompt"], "round": step.round, "seed": number,
            "guidance": step.config["guidance"],
            "picture": {"bytes": codecs.encode_png(picture), "path": f"{row['group']}/{i}.png"},
            "fault": None if ok else "the latent is not finite",
        }
        for (row, i), number, picture, ok in zip(batch, numbers, pixels, sound, strict=True)
    ]


def _trajectories(batch: list, path: Trajectory, save: list[int], timesteps: list[int]) -> list[dict]:
    assert path.x_t is not None and path.x_prev is not None and path.log_prob is not None and path.error is not None
    log_prob = path.log_prob.cpu().tolist()
    error = path.error.float().cpu().tolist()
    return [
        {
            "group": row["group"], "candidate": i, "steps": save, "timesteps": timesteps,
            "x_t": [codecs.encode_half(x) for x in path.x_t[n]],
            "x_prev": [codecs.encode_half(x) for x in path.x_prev[n]],
            "x_0": codecs.encode_half(path.x_0[n]),
            "log_prob": [value if value == value else None for value in log_prob[n]],
            "error": error[n],
        }
        for n, (row, i) in enumerate(batch)
    ]
