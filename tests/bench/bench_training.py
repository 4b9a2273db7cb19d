"""Group-batched finetuning on the cached reference against the loops over pairs that peers write: K = 7, all 21 pairs.

    python tests/bench/bench_training.py                                        # the embedded default on a CPU
    python tests/bench/bench_training.py --model sd15 --device cuda             # Stable Diffusion 1.5 at 512, random weights
    python tests/bench/bench_training.py --model sdxl --device cuda --checkpointing

Two baselines, each with its own guidance and its own loss, and ours beside each with the same ones and the same gradient:

  diffusers' example   one pair at a time, winner and loser in one batch; the reference is the same network with its adapter off;
                       no guidance; Diffusion-DPO on errors. What it also does at each step (encoding pictures and prompts) is left out.
  D3PO                 one pair at a time, winner and loser apart, each with guidance 5 (two branches); the reference is a deep copy
                       of the network; four forwards; DPO on the step's log-probability.

All run with the same LoRA, precision and checkpointing, accumulate the gradient over the same pairs, and take no optimiser step. Ours
is shown with a whole group at once, and with as few rows at once as the baseline has, where most rows cost a second forward; with
checkpointing where the baselines have none; and with four groups at once, which fills a large GPU. Peak memory is each one's own
process's: on a GPU what its allocator held, on a CPU the most bytes of tensors that lived at once. The targets hold for the fastest
of ours that takes no more memory than its baseline. README.md beside this has a GPU's figures.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import peaks
import pyarrow as pa
import torch
import torch.nn.functional as F

from fashiondpo_pipeline import adapters, diffusion, schemas, terminal
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.objectives import DIFFUSION_DPO, STEP_DPO
from fashiondpo_pipeline.sampling import Guidance, predict, sample
from fashiondpo_pipeline.store import Store, autocast
from fashiondpo_pipeline.training import Group, Term, Unit, accumulate
from stages.sample import trajectory_rows

K, STEPS = 7, 4
BETA = 100.0  # speed does not depend on it; a larger one multiplies the rounding of a reference that was computed in another batch
PAIRS = list(combinations(range(K), 2))  # all 21: the lower number wins
LOSSES = {"error": DIFFUSION_DPO, "log_prob": STEP_DPO}
MOST_MEMORY = {("sd15", 512): 12e9, ("sdxl", 1024): 24e9}


class Work:
    """A model with an adapter, candidates drawn with it, and the units of one optimiser step."""

    def __init__(self, job: dict):
        self.job, self.device, self.eta = job, job["device"], 1.0
        self.generator = peaks.generator(job["model"], job["device"], job["dtype"], job["size"])
        self.eta = 0.7 if self.generator.flow else 1.0
        guidance = Guidance(job["guidance"])
        self.knobs = Finetune(objective="diffusion_dpo" if job["signal"] == "error" else "step_dpo", signal=job["signal"],
                              step_weight="density", window=[0.0, 1.0], precision=job["precision"], micro_batch=job["micro_batch"])
        self.folder = tempfile.TemporaryDirectory()
        self.store = self._store(guidance)
        self.copied = copy.deepcopy(self.generator.denoiser) if job["way"] == "d3po" else None
        adapters.attach(self.generator.denoiser, job["rank"], float(job["rank"]), "attention", seed=0)
        if job["checkpointing"]:
            self.generator.denoiser.enable_gradient_checkpointing()
        winner, loser = (np.array(side) for side in zip(*PAIRS, strict=True))
        groups = [Group(str(g), np.arange(g * K, (g + 1) * K), winner, loser) for g in range(job["groups"])]
        self.units = [Unit(group, column) for group in groups for column in range(self.store.columns)]
        self.pair_steps = len(self.units) * len(PAIRS)

    def _store(self, guidance: Guidance) -> Store:
        """Candidates drawn by the model itself, as the sample stage keeps them."""
        job, generator = self.job, self.generator
        rows = [({"prompt": prompt, "group": str(g)}, i) for g, prompt in enumerate(peaks.prompts(job["groups"])) for i in range(K)]
        schedule = generator.schedule(STEPS)
        save = [1, 2][: job["columns"]]
        condition = generator.condition([row for row, _ in rows], guidance)
        path = sample(generator.denoise, schedule, condition, [torch.Generator().manual_seed(i) for i in range(len(rows))],
                      generator.latent_shape, eta=self.eta, save=save, tile=K, device=generator.device).cpu()
        kept = {"path": True, "predictions": False}
        table = pa.Table.from_pylist(trajectory_rows(rows, path, save, schedule.timesteps.tolist(), kept),
                                     schemas.trajectories(*generator.latent_shape))
        sampled = {"steps": STEPS, "eta": self.eta, "negative": "", "predictions": False}
        store = Store(generator, sampled, guidance, self.knobs, [job["signal"]], 0, Path(self.folder.name))
        store.room(len(rows))
        store.gather([table], {(row["group"], i) for row, i in rows}, {row["group"]: row["prompt"] for row, _ in rows})
        store.close()
        return store

    def clear(self) -> None:
        for weight in adapters.parameters(self.generator.denoiser).values():
            weight.grad = None

    def gradient_norm(self) -> float:
        weights = adapters.parameters(self.generator.denoiser).values()
        return float(torch.stack([w.grad.float().norm() for w in weights]).norm())


# -- three ways to one gradient


def group_batch(work: Work) -> None:
    """Ours: every candidate once; the reference is what the sampler recorded, or in half precision one forward of each."""
    store, kept = work.store, reference_of(work)

    def evidence(batch, predictions):
        said = {name: torch.from_numpy(values[batch.rows, batch.columns]).to(work.device) for name, values in kept.items()}
        return store.evidence(batch, predictions, said, {})

    accumulate(work.units, work.knobs.micro_batch, store.predict, evidence, [Term(LOSSES[work.job["signal"]])], BETA, columns=store.columns)


def reference_of(work: Work) -> dict[str, np.ndarray]:
    """As `finetune` has it: the record, where the numerics are the sampler's. Asked anew it counts in full, though epochs share it."""
    store, rows = work.store, work.knobs.micro_batch
    kept = {name: values.copy() for name, values in store.recorded().items()}
    if work.knobs.precision == "no" and work.generator.rounds_alike:
        return kept
    places = np.argwhere(np.ones((store.rows, store.columns), bool))
    with torch.no_grad(), adapters.disabled(work.generator.denoiser):
        for start in range(0, len(places), rows):
            at, columns = places[start : start + rows].T
            said = store.signals_of(at, columns, store.spot(at, columns), store.predict(at, columns))
            for name in kept:
                kept[name][at, columns] = said[name].cpu().numpy()
    return kept


def diffusers_loop(work: Work) -> None:
    """One pair at a time, both in one batch; the reference is the network with its adapter off."""
    denoiser = work.generator.denoiser
    for spot in pair_spots(work):
        def error(spot=spot):
            with autocast(work.generator.device, work.knobs.precision):
                said = work.generator.denoise(spot.x_t, spot.t, spot.condition.branch(0))
            return (said.float() - spot.wanted).square().mean(dim=(1, 2, 3))

        winner, loser = error()
        with torch.no_grad(), adapters.disabled(denoiser):
            ref_winner, ref_loser = error()
        inside = -BETA / 2 * ((winner - ref_winner) - (loser - ref_loser))
        (-F.logsigmoid(inside) / work.pair_steps).backward()


def d3po_loop(work: Work) -> None:
    """One pair at a time, winner and loser apart, each with both branches of guidance; the reference is a copy of the network."""
    store, schedule = work.store, work.store.schedule

    def frozen(x_t, t, parts):
        dtype = work.generator.dtype
        halves = {name: part.to(dtype) if part.is_floating_point() else part for name, part in parts.items()}
        return work.generator.call(work.copied, x_t.to(dtype), t, halves)

    def log_prob(denoise, spot, x_prev):
        with autocast(work.generator.device, work.knobs.precision):
            guided, _ = predict(denoise, spot.x_t, spot.t, spot.condition)
        mean = schedule.mean(guided.float(), spot.x_t, spot.t, work.eta)
        return diffusion.log_prob(mean, schedule.std(spot.t, work.eta), x_prev)[0] / x_prev[0].numel()

    for rows, columns in pair_places(work):
        ratios = []
        for one in (slice(0, 1), slice(1, 2)):
            spot, x_prev = store.spot(rows[one], columns[one]), store._tensor("x_prev", rows[one], columns[one])
            policy = log_prob(work.generator.denoise, spot, x_prev)
            with torch.no_grad():
                ratios.append((policy, log_prob(frozen, spot, x_prev)))
        (winner, ref_winner), (loser, ref_loser) = ratios
        (-F.logsigmoid(BETA * ((winner - ref_winner) - (loser - ref_loser))) / work.pair_steps).backward()


def pair_places(work: Work):
    """(rows, columns) of each pair of each unit."""
    for unit in work.units:
        for pair in PAIRS:
            yield unit.group.rows[list(pair)], np.full(2, unit.column)


def pair_spots(work: Work):
    for rows, columns in pair_places(work):
        yield work.store.spot(rows, columns)


WAYS: dict[str, Callable[[Work], None]] = {"ours": group_batch, "diffusers": diffusers_loop, "d3po": d3po_loop}


# -- measuring


def measure(job: dict) -> dict:
    """One way, in a process of its own."""
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    work, device = Work(job), job["device"]
    step = WAYS[job["way"]]
    peaks.forget_peak(device)
    work.clear()
    step(work)  # the first one warms up, and its gradient is the one that is compared
    norm = work.gradient_norm()
    seconds = peaks.seconds(lambda: step(work), device, at_least=job["seconds"], most=5 if job["way"] != "ours" else 20)
    on_gpu = device.startswith("cuda")
    work.clear()
    peak = peaks.peak_memory(device) if on_gpu else peaks.tensor_peak(lambda: step(work), work.generator.denoiser, work.copied)
    found = {"speed": work.pair_steps / seconds, "seconds": seconds, "peak": peak, "norm": norm}
    loaded = [part for part in ("denoiser", "vae", "text") if part in work.generator.__dict__]
    if job["way"] == "ours" and (on_gpu or job["count"]):
        found |= {"flops": peaks.flops(lambda: step(work)), "matrix_peak": peaks.matrix_peak(device)}
    return found | {"loaded": loaded}


def jobs_of(options: argparse.Namespace) -> dict[str, list[tuple[str, dict]]]:
    """Baseline -> rows (label, job): the baseline itself first."""
    common = {name: getattr(options, name) for name in ("model", "device", "dtype", "size", "precision", "rank", "groups", "columns", "threads",
                                                        "seconds", "count")}
    found = {}
    baselines = (("diffusers", "diffusers' loop over pairs", "error", 1.0), ("d3po", "D3PO's loop over pairs", "log_prob", 5.0))
    for way, label, signal, guidance in baselines:
        base = common | {"signal": signal, "guidance": guidance, "checkpointing": options.checkpointing, "micro_batch": K}
        rows = [(label, base | {"way": way}), ("ours, a group at once", base | {"way": "ours"}),
                ("ours, two rows at once", base | {"way": "ours", "micro_batch": 2})]
        if not options.checkpointing:
            rows.append(("ours, a group, checkpointing", base | {"way": "ours", "checkpointing": True}))
        rows.append(("ours, 4 groups, checkpointing", base | {"way": "ours", "checkpointing": True, "micro_batch": 4 * K}))
        found[way] = rows
    return {way: rows for way, rows in found.items() if way in options.against}


def main() -> None:
    job = peaks.job_of(sys.argv[1:])
    if job is not None:
        print(json.dumps(measure(job)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peaks.common_options(parser)
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), help="autocast; bf16 on a GPU, else no")
    parser.add_argument("--checkpointing", action="store_true", help="in the baselines too")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--groups", type=int, default=2, help="prompts in the optimiser step")
    parser.add_argument("--columns", type=int, default=2, choices=(1, 2), help="timesteps of each")
    parser.add_argument("--against", nargs="+", choices=("diffusers", "d3po"), default=["diffusers", "d3po"])
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each way at least")
    parser.add_argument("--count", action="store_true", help="count FLOPs and measure the matrix peak on a CPU too (fp32 there)")
    options = parser.parse_args()
    peaks.settle(options)
    options.precision = options.precision or ("bf16" if options.device.startswith("cuda") else "no")
    print(f"{peaks.describe(options)}, precision {options.precision}, rank {options.rank}, "
          f"K = {K}, {len(PAIRS)} pairs, {options.groups * options.columns} units a step")
    targets, rows, best_share, least_peak = peaks.Targets(), [], 0.0, float("inf")
    for way, asked in jobs_of(options).items():
        found = [(label, job, peaks.in_own_process(__file__, job)) for label, job in asked]
        rows += lines(found)
        ran = [(job, result) for _, job, result in found[1:] if "failed" not in result]
        check(targets, way, found[0][2], ran, on_gpu=options.device.startswith("cuda"))
        shares = [share_of(result) for _, result in ran]
        best_share = max([best_share, *shares])
        least_peak = min([least_peak, *(result["peak"] for job, result in ran if job["checkpointing"])])
    heads = ["", "guidance", "pair-steps/s", "ratio", "peak", "gradient norm", "of matrix peak", "in memory"]
    terminal.show("", heads, rows)
    check_device(targets, options, best_share, least_peak)
    targets.end()


def share_of(result: dict) -> float:
    """Share of the measured matrix peak, recomputed FLOPs included; 0 where it was not counted."""
    return result["flops"] / result["seconds"] / result["matrix_peak"] if "flops" in result else 0.0


def lines(found: list[tuple[str, dict, dict]]) -> list[list[str]]:
    base, rows = found[0][2], []
    for label, job, result in found:
        if "failed" in result:
            rows.append([label, f"{job['guidance']:g}", result["failed"], *[""] * 5])
            continue
        ratio = f"{result['speed'] / base['speed']:.1f}x" if "speed" in base else ""
        share = f"{100 * share_of(result):.0f} %" if share_of(result) else ""
        rows.append([label, f"{job['guidance']:g}", f"{result['speed']:.1f}", ratio, terminal.size(result["peak"]), f"{result['norm']:.6g}", share,
                     ", ".join(result["loaded"])])
    return rows


def check(targets: peaks.Targets, way: str, base: dict, ran: list[tuple[dict, dict]], on_gpu: bool) -> None:
    """At least six times as fast at no more memory, with the same gradient."""
    if "failed" in base or not ran:
        targets.check(f"{way}: runs", "it does not", "it does", False)
        return
    fits = [result for _, result in ran if result["peak"] <= base["peak"]]
    speed = max((result["speed"] for result in fits), default=0.0) / base["speed"]
    targets.check(f"{way}: pair-steps/s, at no more memory", f"{speed:.1f}x" if fits else "none fits", "6x", speed >= 6)
    apart = max(abs(result["norm"] / base["norm"] - 1) for _, result in ran)
    most = 1e-3 if base["norm"] and not on_gpu else 0.05
    targets.check(f"{way}: the same gradient norm", f"{apart:.1e} apart", f"{most:g}", apart <= most)


def check_device(targets: peaks.Targets, options: argparse.Namespace, share: float, peak: float) -> None:
    """What is promised of a GPU and a model of full size."""
    on_gpu, size = options.device.startswith("cuda"), peaks.needs_size(options.model, options.size)
    if on_gpu and options.model in peaks.FULL_SIZE:
        targets.check("share of the measured bf16 matrix peak", f"{100 * share:.0f} %", "30 %, better 45 %", share >= 0.3)
    else:
        targets.not_here("share of the measured bf16 matrix peak", "30 %, better 45 %", "needs a GPU and a model of full size")
    for (model, side), most in MOST_MEMORY.items():
        wanted = f"at most {terminal.size(most)}"
        if on_gpu and (options.model, size, options.rank) == (model, side, 16):
            targets.check(f"peak memory of {model} at {side}, checkpointing", terminal.size(peak), wanted, peak <= most)
        else:
            targets.not_here(f"peak memory of {model} at {side}, checkpointing", wanted, f"--model {model} on a GPU, rank 16")


if __name__ == "__main__":
    main()
