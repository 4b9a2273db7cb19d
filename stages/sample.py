"""prompts (+ last round's adapter) -> candidates, and the trajectories that finetuning needs."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pyarrow as pa
import torch

from fashiondpo_pipeline import adapters, codecs, schemas, seeds
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators.diffusers_model import check_answer
from fashiondpo_pipeline.sampling import Trajectory, sample
from fashiondpo_pipeline.timesteps import forwards, saved_steps
from fashiondpo_pipeline.training import out_of_memory
from fashiondpo_pipeline.workspace import Output, Step
from stages.encode import guidance_of

Pictures = tuple[np.ndarray, np.ndarray]  # (b, h, w, 3) uint8, and whether each is sound
Drawn = tuple[list, list[int], Trajectory, Pictures | None]  # (row, number) each, seeds, paths, pictures where they are made already


def run(session, step: Step, out: Output) -> None:
    knobs, machine = step.config, session.config.machine
    prompts = session.drawn(step)
    generator = session.generator(step.inputs.get("adapter"))
    schedule, guidance = generator.schedule(knobs["steps"]), guidance_of(knobs)
    save = saved_steps(knobs["save"], knobs["steps"]) if knobs.get("save") else []
    in_flight = -(-machine.batch // knobs["tile"]) * knobs["tile"]
    pictures = knobs["candidates"] // len(knobs.get("strengths", [None]))  # from the same seeds at each strength
    encode = step.inputs["encode"]
    generator.encodings = session.encodings(encode, [""])
    check_answer(generator, knobs["tile"])
    on_cpu = generator.device.type == "cpu"

    def draw(groups: list[dict]) -> list[Drawn]:
        generator.encodings = session.encodings(encode, [*(row["prompt"] for row in groups), knobs["negative"], ""])
        drawn = []
        for strength, batch in batches(groups, knobs, in_flight):
            numbers = [seeds.key(knobs["seed"], knobs["stream"], row["group"], i % pictures) for row, i in batch]
            condition = generator.condition([row for row, _ in batch], guidance, knobs["negative"]).steered(guidance, schedule)
            with fitting(step, f"sample.tile is {knobs['tile']}: lower it"), at_strength(generator.denoiser, strength):
                path = sample(
                    generator.denoise, schedule, condition,
                    [torch.Generator().manual_seed(number) for number in numbers], generator.latent_shape,
                    eta=knobs["eta"], save=save, tile=knobs["tile"], device=generator.device,
                )
            drawn.append((batch, numbers, path, see(path) if on_cpu else None))
        return drawn

    def see(path: Trajectory) -> Pictures:
        with fitting(step, "draw smaller pictures, or fewer at once (machine.batch)"):
            return _decode(generator, path.x_0, knobs["tile"])

    def write(shard: int, drawn: list[Drawn], started: float) -> None:
        candidates = []
        for n, (batch, numbers, path, pictures) in enumerate(drawn):
            pixels, sound = pictures or see(path)
            drawn[n] = batch, numbers, path.cpu(), None
            candidates += _candidates(step, batch, numbers, pixels, sound, path)
        tables = {"candidates": pa.Table.from_pylist(candidates, schemas.CANDIDATES)}
        if save:
            rows = [row for batch, _, path, _ in drawn for row in trajectory_rows(batch, path, save, schedule.timesteps.tolist(), knobs)]
            tables["trajectories"] = pa.Table.from_pylist(rows, schemas.trajectories(*generator.latent_shape))
        out.write(shard, time.monotonic() - started, **tables)

    shards = {i: prompts[start : start + machine.shard] for i, start in enumerate(range(0, len(prompts), machine.shard))}
    mine = session.processes.mine(list(shards.items()))
    # PNG and Parquet of one shard, and on a GPU the pictures, are made in a thread while the denoiser is at the next one; two networks
    # at once on a CPU would only be in each other's way
    generator.load("denoiser", "vae")
    with ThreadPoolExecutor(1) as pen:
        pending: Future | None = None
        each = knobs["candidates"]
        bar = session.track(mine, f"round {step.round} {step.name}", each * sum(len(groups) for _, groups in mine), unit="pictures",
                            size=lambda part: each * len(part[1]))
        for shard, groups in bar:
            if out.has(shard):
                continue
            started = time.monotonic()
            drawn = draw(groups)
            if pending:
                pending.result()
            pending = pen.submit(write, shard, drawn, started)
        if pending:
            pending.result()
    generator.let_go("vae")
    session.wait()
    if session.first:
        _finish(session, step, out, save, getattr(generator, "branches", 2))


def batches(groups: list[dict], knobs: dict, most: int) -> Iterator[tuple[float | None, list[tuple[dict, int]]]]:
    """(strength of the adapter, None as it is; (prompt, candidate number) of at most so many candidates)."""
    strengths = knobs.get("strengths", [None])
    each = knobs["candidates"] // len(strengths)
    for place, strength in enumerate(strengths):
        rows = [(row, i) for row in groups for i in range(place * each, (place + 1) * each)]
        for start in range(0, len(rows), most):
            yield strength, rows[start : start + most]


def at_strength(denoiser, strength: float | None) -> AbstractContextManager:
    """The denoiser with its adapter at a strength: see `adapters.scaled`."""
    return nullcontext() if strength is None else adapters.scaled(denoiser, strength)


@contextmanager
def fitting(step: Step, advice: str) -> Iterator[None]:
    """Running out of memory is said in a sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        gist = (str(problem).splitlines() or ["out of memory"])[0]
        raise UserError(f"round {step.round} {step.name}: memory ran out ({gist}): {advice}") from problem


def _finish(session, step: Step, out: Output, save: list[int], branches: int) -> None:
    faults = [fault for fault in out.table("candidates", ["fault"])["fault"].to_pylist() if fault]
    total = len(session.drawn(step)) * step.config["candidates"]
    if len(faults) == total:
        for shard in out.shards("candidates"):
            out.drop(shard)  # so that the mended model is asked again
        half = "use generator.dtype float32, or bfloat16 on a GPU"
        whole = "get the model anew" + (", or lower finetune.learning_rate and repeat the round before" if "adapter" in step.inputs else "")
        raise UserError(f"round {step.round}: all {total} pictures are broken ({faults[0]}): "
                        + (whole if step.config["dtype"] == "float32" else half))
    if faults:
        session.say(f"round {step.round}: {len(faults)} of {total} pictures are broken and take no part ({faults[0]})")
    out.finish({"candidates": total, "faults": len(faults), "saved_steps": save, "denoiser_rows": total * step.config["steps"],
                "forwards": forwards(step.config, branches)})


def _decode(generator, x_0: torch.Tensor, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of every latent, decoded in full tiles too: a picture must not depend on how many were decoded with it."""
    found, tile = [], min(tile, generator.decode_rows)
    for part in torch.nan_to_num(x_0).split(tile):
        full = torch.cat([part, part[-1:].expand(tile - len(part), *part.shape[1:])]) if len(part) < tile else part
        found.append([values[: len(part)] for values in generator.decode(full)])
    pixels, sound = (np.concatenate(values) for values in zip(*found, strict=True))
    return pixels, sound


def _candidates(step: Step, batch: list, numbers: list[int], pixels: np.ndarray, sound: np.ndarray, path: Trajectory) -> list[dict]:
    finite = torch.isfinite(path.x_0.half()).flatten(1).all(1).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pens:  # zlib lets go of the interpreter: a GPU outruns one core's PNGs
        encoded = list(pens.map(codecs.encode_png, pixels))
    return [
        {
            "group": row["group"], "candidate": i, "prompt": row["prompt"], "round": step.round, "seed": number,
            **{name: step.config[name] for name in ("guidance", "guidance_interval", "guidance_rescale")},
            "picture": {"bytes": png, "path": f"{row['group']}/{i}.png"},
            "fault": "the latent is not finite" if not latent else None if picture_ok else "the picture is not finite",
        }
        for (row, i), number, png, picture_ok, latent in zip(batch, numbers, encoded, sound.tolist(), finite, strict=True)
    ]


def trajectory_rows(batch: list, path: Trajectory, save: list[int], timesteps: list[float], knobs: dict) -> list[dict]:
    """Rows of the trajectory table: one candidate's saved path each."""
    assert path.x_t is not None and path.x_prev is not None and path.log_prob is not None and path.error is not None
    log_prob = path.log_prob.tolist()
    error = path.error.float().tolist()
    # where a step led is kept once: it is the next saved step's x_t, or x_0
    leads = [] if not knobs["path"] else [None if step + 1 in save or step + 1 == len(timesteps) else at for at, step in enumerate(save)]
    return [
        {
            "group": row["group"], "candidate": i, "steps": save, "timesteps": [timesteps[step] for step in save],
            "x_t": [codecs.encode_half(x) for x in path.x_t[n]],
            "x_prev": [None if at is None else codecs.encode_half(path.x_prev[n, at]) for at in leads] or None,
            "x_0": codecs.encode_half(path.x_0[n]),
            "log_prob": [value if value == value else None for value in log_prob[n]],
            "error": error[n],
            "prediction": [codecs.encode_half(x) for x in path.prediction[n]] if knobs["predictions"] and path.prediction is not None else None,
        }
        for n, (row, i) in enumerate(batch)
    ]
