"""pairs + trajectories (+ last round's adapter) -> a LoRA, and a table of its optimiser steps."""

import io
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from fashiondpo_pipeline import adapters, codecs, diffusion, schemas, seeds
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.objectives import Objective
from fashiondpo_pipeline.registry import OBJECTIVES
from fashiondpo_pipeline.sampling import Condition, predict, tracked_error
from fashiondpo_pipeline.timesteps import in_window
from fashiondpo_pipeline.training import Batch, Group, accumulate, groups_of, schedule_of
from fashiondpo_pipeline.workspace import Output, Step, replace_bytes

FRESH_TIMESTEPS = 1000
# How far the first margins may be from 0 where the policy starts as its own reference: rounding, times beta.
FIRST_MARGIN = {"no": 0.05, "fp16": 0.5, "bf16": 2.0}


def run(session, step: Step, out: Output) -> None:
    claimed = {name: value for name, value in step.config.items() if name in Finetune.model_fields}
    # How often to write a checkpoint changes no result, so the claim does not hold it.
    knobs = Finetune.model_validate(claimed | {"checkpoint_every": session.config.finetune.checkpoint_every})
    objective: Objective = OBJECTIVES.find(knobs.objective)
    before = step.inputs.get("adapter")
    generator = session.generator(before)
    session.forget_adapter()
    store = Store(out, step, knobs, objective, generator, session)
    policy_is_reference = knobs.reference == "previous" or before is None
    reference = store.reference(generator, base=not policy_is_reference)

    rank, alpha = knobs.rank, knobs.alpha or float(knobs.rank)
    seed = seeds.key(step.config["seed"], "adapter", step.round)
    if before is None:
        adapters.attach(generator.denoiser, rank, alpha, knobs.targets, seed)
    else:
        adapters.check_shape(generator.denoiser, rank, alpha, knobs.targets)
    weights = adapters.parameters(generator.denoiser)
    optimiser = torch.optim.AdamW(weights.values(), lr=knobs.learning_rate, weight_decay=knobs.weight_decay)
    scaler = torch.amp.GradScaler(generator.device.type, enabled=knobs.precision == "fp16")
    clip = {"ratio_clip": knobs.ratio_clip} if objective.signal == "log_prob" else {}
    loss = partial(objective.loss, beta=knobs.beta, **clip)

    def signal(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(generator.device, knobs.precision):
            policy = store.signal(generator, batch.rows, batch.columns)
        return policy, torch.from_numpy(reference[batch.rows, batch.columns]).to(policy.device)

    plan = list(schedule_of(store.groups, store.columns, knobs.epochs, knobs.groups, min(knobs.timesteps, store.columns),
                            step.config["seed"], "finetune", step.round))
    checkpoint = out.work / "checkpoint.pt"
    rows = _resume(checkpoint, weights, optimiser, scaler, generator.device)
    started, asked_before = time.monotonic(), store.rows_without_gradient
    for number, (epoch, units) in session.track(list(enumerate(plan))[len(rows):], f"round {step.round} finetune", len(plan), len(rows)):
        learning_rate = knobs.learning_rate * rate_at(number, len(plan), knobs.warmup, knobs.decay)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        optimiser.zero_grad(set_to_none=True)
        tally = accumulate(units, knobs.micro_batch, signal, loss, objective.signal == "log_prob", lambda x: scaler.scale(x).backward())
        if number == 0 and policy_is_reference:
            _check_start(step, tally.means()["loss"], tally.widest, knobs.precision)
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), knobs.max_grad_norm)
        if not torch.isfinite(norm) and knobs.precision != "fp16":
            raise UserError(f"round {step.round} finetune: the gradient is not finite at step {number}: "
                            "lower finetune.learning_rate or finetune.beta")
        scaler.step(optimiser)
        scaler.update()
        rows.append({"step": number, "epoch": epoch, **tally.means(), "grad_norm": float(norm),
                     "learning_rate": learning_rate, "pairs": tally.pairs, "rows": tally.rows})
        if (number + 1) % knobs.checkpoint_every == 0 and number + 1 < len(plan):
            # no random state: order, columns and fresh noise are keyed by what they are for
            state = {"weights": {n: w.detach().cpu() for n, w in weights.items()}, "optimiser": optimiser.state_dict(),
                     "scaler": scaler.state_dict(), "rows": rows}
            torch.save(state, buffer := io.BytesIO())  # in memory first: on a full disk torch says something else
            replace_bytes(checkpoint, buffer.getvalue())

    out.write(0, time.monotonic() - started, steps=pa.Table.from_pylist(rows, schemas.STEPS))
    generator.save_adapter(out.work / "adapter")
    out.publish("adapter", out.work / "adapter")
    out.finish({
        "objective": knobs.objective, "pairs": sum(len(g.winner) for g in store.groups), "steps": len(rows),
        "policy_rows": sum(row["rows"] for row in rows),
        "reference_rows_in_training": store.rows_without_gradient - asked_before, "reference_rows_before": store.reference_rows,
        "trainable": sum(w.numel() for w in weights.values()), "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"],
        "last_accuracy": rows[-1]["accuracy"],
    })


def rate_at(number: int, steps: int, warmup: int, decay: str) -> float:
    """Share of the learning rate in one optimiser step: rising over the warm-up, then constant or linear to 0.

    >>> [rate_at(n, 4, 0, "linear") for n in range(4)], rate_at(0, 4, 2, "none")
    ([1.0, 0.75, 0.5, 0.25], 0.5)
    """
    if number < warmup:
        return (number + 1) / warmup
    return 1.0 if decay == "none" else (steps - number) / max(steps - warmup, 1)


class Store:
    """The candidates that are in pairs, as fp16 arrays: what one round trains on is held in memory once.

    Columns are the saved steps that the objective can use, or fresh draws. `signal` is what the objective is a function of.
    """

    def __init__(self, out: Output, step: Step, knobs, objective: Objective, generator, session):
        self.knobs, self.objective, self.generator = knobs, objective, generator
        self.sampled = step.inputs["sample"].config
        self.schedule = generator.schedule(self.sampled["steps"])
        self.reference_rows = 0
        self.rows_without_gradient = 0  # asked of the denoiser: what a live reference would cost
        self.fresh = objective.signal == "error" and knobs.noise == "fresh"
        self._work, self._seed = out.work, step.config["seed"]

        pairs = out.input("pair").table("pairs", ["group", "winner", "loser"])
        names = pairs["group"].to_numpy(zero_copy_only=False)
        wanted = {(name, i) for role in ("winner", "loser") for name, i in zip(names.tolist(), pairs[role].to_pylist(), strict=True)}
        prompts = {row["group"]: row for row in session.prompts["train"].rows}
        place = self._gather(out.input("sample"), wanted)
        self.groups: list[Group] = groups_of(names, pairs["winner"].to_numpy(), pairs["loser"].to_numpy(), place)
        self._conditions = self._embed(prompts)

    def _gather(self, sample: Output, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Copy what the objective needs of every wanted candidate into arrays; (group, candidate) -> row."""
        shape = self.generator.latent_shape
        by_step = [] if self.fresh else ["x_t", "x_prev"] if self.objective.signal == "log_prob" else ["x_t"]
        needed = ["group", "candidate", "steps", "timesteps", "x_0", "log_prob", "error", *by_step]
        place: dict[tuple[str, int], int] = {}
        self._names: list[str] = []
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in ("x_0", "log_prob", "error", *by_step)}
        steps: list[int] = []
        timesteps: list[int] = []
        for shard in sample.shards("trajectories"):
            table = sample.table("trajectories", needed, shard)
            for row in table.to_pylist():
                if (row["group"], row["candidate"]) not in wanted:
                    continue
                place[row["group"], row["candidate"]] = len(place)
                self._names.append(row["group"])
                steps, timesteps = row["steps"], row["timesteps"]
                arrays["x_0"].append(codecs.decode_half([row["x_0"]], shape)[0])
                arrays["log_prob"].append(np.array([math.nan if v is None else v for v in row["log_prob"]]))
                arrays["error"].append(np.array(row["error"], np.float32))
                for name in by_step:
                    arrays[name].append(codecs.decode_half(row[name], shape))
        self._arrays = {name: np.stack(values) for name, values in arrays.items()}
        if self.fresh:
            self.columns = self.knobs.draws
            return place
        usable = in_window(steps, self.sampled["steps"], self.knobs.window)
        if self.objective.signal == "log_prob":
            usable = [i for i in usable if np.isfinite(self._arrays["log_prob"][:, i]).all()]
            if not usable:
                raise UserError(f"finetune.objective {self.knobs.objective} needs log-probabilities, which sample.eta 0 does not give: "
                                "raise sample.eta, or use diffusion_dpo")
        self.columns = len(usable)
        self._timesteps = np.array(timesteps)[usable]
        self._scale = self._scales()  # (columns,)
        for name in ("log_prob", "error", *by_step):
            self._arrays[name] = self._arrays[name][:, usable]
        return place

    def _scales(self) -> np.ndarray:
        """What each step's signal is multiplied with, (columns,) float64."""
        if self.objective.signal == "error":
            t = torch.from_numpy(self._timesteps)
            return np.ones(len(t)) if self.knobs.min_snr is None else diffusion.min_snr_weight(self.schedule, t, self.knobs.min_snr).numpy()
        size = math.prod(self.generator.latent_shape)
        if self.knobs.step_weight == "density":
            return np.full(self.columns, 1 / size)
        weight = diffusion.ddim_sensitivity(self.schedule, torch.from_numpy(self._timesteps), self.sampled["eta"]).numpy()
        return np.median(weight) / weight / size

    def _embed(self, prompts: dict[str, dict]) -> dict[str, Condition]:
        guided = self.sampled["guidance"] if self.objective.signal == "log_prob" else 1.0
        return {g.name: self.generator.condition([prompts[g.name]], guided, self.sampled["negative"]) for g in self.groups}

    def _condition(self, rows: np.ndarray) -> Condition:
        chosen = [self._conditions[self._names[row]] for row in rows]
        return Condition(torch.cat([c.tokens for c in chosen], 1), chosen[0].weights)

    def _latents(self, name: str, rows: np.ndarray, columns: np.ndarray | None = None) -> torch.Tensor:
        values = self._arrays[name][rows] if columns is None else self._arrays[name][rows, columns]
        return torch.from_numpy(values).to(self.generator.device).float()

    def signal(self, generator, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        """What the denoiser as it is now says of (n,) places: log-probability of the step taken, or the error, scaled; (n,)."""
        if not torch.is_grad_enabled():
            self.rows_without_gradient += len(rows)
        condition = self._condition(rows)
        if self.fresh:
            return self._fresh_error(generator, rows, columns, condition)
        return self._saved(generator, rows, columns, condition) * torch.from_numpy(self._scale[columns]).to(generator.device)

    def _saved(self, generator, rows: np.ndarray, columns: np.ndarray, condition: Condition) -> torch.Tensor:
        t = torch.from_numpy(self._timesteps[columns]).to(generator.device)
        x_t = self._latents("x_t", rows, columns)
        guided, conditional = predict(generator.denoise, x_t, t, condition)
        if self.objective.signal == "log_prob":
            eta = self.sampled["eta"]
            mean = diffusion.ddim_mean(self.schedule, guided.float(), x_t, t, eta)
            x_prev = self._latents("x_prev", rows, columns)
            return diffusion.log_prob(mean, diffusion.ddim_sigma(self.schedule, t, eta), x_prev)
        return tracked_error(self.schedule, conditional.float(), self._latents("x_0", rows), x_t, t).double()

    def _fresh_error(self, generator, rows: np.ndarray, columns: np.ndarray, condition: Condition) -> torch.Tensor:
        """Error at x_0 with new noise; a group's candidates share noise and timestep of a draw, so their errors compare."""
        shape = self.generator.latent_shape
        keys = [(self._names[row], int(column)) for row, column in zip(rows, columns, strict=True)]
        drawn = {key: self._draw(key, shape) for key in dict.fromkeys(keys)}
        eps = torch.stack([drawn[key][0] for key in keys]).to(generator.device)
        t = torch.tensor([drawn[key][1] for key in keys], device=generator.device)
        x_0 = self._latents("x_0", rows)
        prediction, _ = predict(generator.denoise, diffusion.add_noise(self.schedule, x_0, eps, t), t, condition)
        error = diffusion.squared_error(prediction.float(), diffusion.target(self.schedule, x_0, eps, t)).double()
        return error if self.knobs.min_snr is None else error * diffusion.min_snr_weight(self.schedule, t, self.knobs.min_snr).to(error)

    def _draw(self, key: tuple[str, int], shape: tuple[int, ...]) -> tuple[torch.Tensor, int]:
        random = seeds.generator(self._seed, "fresh", *key)
        # draws are spread over the window's timesteps, a stratum each; the walk goes from high timesteps to low
        last, first = (1 - share for share in self.knobs.window)
        low, high = (int(FRESH_TIMESTEPS * (first + (last - first) * (key[1] + i) / self.columns)) for i in (0, 1))
        low = min(low, FRESH_TIMESTEPS - 1)
        return torch.randn(shape, generator=random), int(torch.randint(low, max(high, low + 1), (), generator=random))

    def reference(self, generator, base: bool) -> np.ndarray:
        """The reference's signal at every place, (n, columns). From the sampler's own record where it is the reference.

        Else one pass without gradient before training starts, kept in `work/` so that a resume does not repeat it.
        """
        if not base and not self.fresh:
            return self._arrays[self.objective.signal].astype(np.float64) * self._scale
        return self._reference_pass(generator, self._work / "reference.npy", base)

    def _reference_pass(self, generator, path: Path, base: bool) -> np.ndarray:
        places = [(row, column) for g in self.groups for column in range(self.columns) for row in g.rows]
        self.reference_rows = len(places)
        if path.is_file():
            return np.load(path, allow_pickle=False)
        found = np.full((len(self._names), self.columns), np.nan)
        with torch.inference_mode(), adapters.disabled(generator.denoiser, base), autocast(generator.device, self.knobs.precision):
            for start in range(0, len(places), self.knobs.micro_batch):
                rows, columns = np.array(places[start : start + self.knobs.micro_batch]).T
                found[rows, columns] = self.signal(generator, rows, columns).cpu().numpy()

        np.save(buffer := io.BytesIO(), found)
        replace_bytes(path, buffer.getvalue())
        return found


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of the forwards; a no-op for "no"."""
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "no")


def _check_start(step: Step, loss: float, widest: float, precision: str) -> None:
    """Before the first update the policy is its own reference: loss ln 2 and every margin 0, or the cache is not the reference's."""
    if widest > FIRST_MARGIN[precision]:
        raise UserError(
            f"round {step.round} finetune: at step 0 the policy is its own reference, yet a margin is {widest:.3g} and the loss "
            f"{loss:.4f} instead of 0 and {math.log(2):.4f}: the candidates were drawn with other numerics than finetune uses; "
            "draw and finetune with the same dtype, precision and device, or lower finetune.beta"
        )


def _resume(checkpoint: Path, weights: dict, optimiser, scaler, device) -> list[dict]:
    """Put weights and optimiser back as they were; the rows of the step table so far."""
    if not checkpoint.is_file():
        return []
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["weights"][name])
    optimiser.load_state_dict(state["optimiser"])
    scaler.load_state_dict(state["scaler"])
    return state["rows"]
