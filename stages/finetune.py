"""pairs + trajectories (+ last round's adapter) -> an adapter, and tables of its optimiser steps and of its timesteps."""

import math
import time

import pyarrow as pa
import torch

from fashiondpo_pipeline import adapters, budget, diagnosis, schemas, seeds
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.objectives import Evidence
from fashiondpo_pipeline.progress import Progress
from fashiondpo_pipeline.reference import Reference
from fashiondpo_pipeline.terms import AUTO, made_of, terms_of
from fashiondpo_pipeline.training import (
    Batch,
    Predictions,
    Tally,
    Unit,
    accumulate,
    out_of_memory,
    repick,
    schedule_of,
)
from fashiondpo_pipeline.workspace import Output, Step
from stages.encode import sampled_of
from stages.trained import note
from stages.trained_on import Candidates

# How far apart two predictions of one network may be in calls of other shapes, in shares of their length: a hundred
# times what their type rounds by; for float32, which hardly adds up, a thousand times what was measured (6e-7).
# Another prompt, guidance or model moves a prediction by hundredths and more.
ROUNDS = {"float32": 1e-3, "tf32": 0.05, "fp16": 0.05, "float16": 0.05, "bf16": 0.4, "bfloat16": 0.4}


def run(session, step: Step, out: Output) -> None:
    claimed = {name: value for name, value in step.config.items() if name in Finetune.model_fields}
    # How often to write a checkpoint changes no result, so the claim does not hold it; where it says nothing of what is kept, all is.
    knobs = Finetune.model_validate({"kept_later": 1.0} | claimed | {"checkpoint_every": session.config.finetune.checkpoint_every})
    if knobs.options.get("label_smoothing") == AUTO:
        knobs = knobs.model_copy(update={"options": knobs.options | {"label_smoothing": measured_flips(out, step)}})
    terms = terms_of(knobs)
    before, processes = step.inputs.get("adapter"), session.processes
    generator = session.generator(before)
    session.forget_adapter()
    if knobs.checkpointing:
        generator.denoiser.enable_gradient_checkpointing()
    candidates = Candidates(session, step, out, knobs, terms, generator)
    store, groups = candidates.store, candidates.groups

    alpha, seed = knobs.alpha or float(knobs.rank), seeds.key(step.config["seed"], "adapter", step.round)
    if before is None:
        adapters.attach(generator.denoiser, knobs.rank, alpha, knobs.targets, seed, knobs.adapter)
    else:
        adapters.check_shape(generator.denoiser, knobs.rank, alpha, knobs.targets, knobs.adapter)
    weights = adapters.parameters(generator.denoiser)
    first = {name: weight.detach().clone() for name, weight in weights.items()} if before and knobs.kept_later < 1 else {}
    optimiser = torch.optim.AdamW(weights.values(), lr=knobs.learning_rate, weight_decay=knobs.weight_decay)
    scaler = torch.amp.GradScaler(generator.device.type, enabled=knobs.precision == "fp16")
    scaler.scale(torch.zeros((), device=generator.device))  # it is set up by its first use, which a group in pieces does not make
    reference = Reference(knobs, terms, store, candidates.replayed, weights, before is None, processes, generator)

    plan = list(schedule_of(groups, store.columns, knobs.epochs, knobs.groups, min(knobs.timesteps, store.columns),
                            step.config["seed"], "finetune", step.round))
    progress = Progress(knobs.beta, torch.zeros(knobs.epochs, store.columns, 5, dtype=torch.float64))
    checkpoint = out.work / "checkpoint.pt"
    progress.resume(checkpoint, weights, optimiser, scaler, reference, generator.device, session.say)
    started, micro_batch = time.monotonic(), knobs.micro_batch

    start = Start(numerics(generator, knobs.precision)) if reference.is_policy and not progress.rows else None

    def evidence(batch: Batch, predictions: Predictions) -> dict:
        found = store.evidence(batch, predictions, reference.at(batch), candidates.scores_at(batch))
        if start and not progress.rows:
            start.see(found, store.rounding(batch, predictions, ROUNDS[start.numerics]))
        return found

    rates = [rate_at(number, len(plan), knobs.warmup, knobs.decay) for number in range(len(plan))]
    travel = budget.way(rates)
    to_do = list(enumerate(plan))[len(progress.rows):]
    bar = session.track(to_do, f"round {step.round} {step.name}", len(plan), len(progress.rows), "steps", now=lambda: in_words(progress))
    for number, (epoch, units) in bar:
        if knobs.pick == "accuracy":
            units = repick(units, progress.informative(), step.config["seed"], "pick", step.round, number)
        learning_rate = knobs.learning_rate * rates[number]
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        eased = progress.eased if knobs.divergence is not None else 1.0
        while True:
            optimiser.zero_grad(set_to_none=True)
            try:
                tally = accumulate(
                    processes.mine(units), micro_batch, store.predict, evidence, terms, progress.beta, columns=store.columns, counted=units,
                    backward=lambda loss, by=eased: scaler.scale(loss * by).backward(), scale=scaler.get_scale() * eased,
                )
                break
            except (RuntimeError, MemoryError) as problem:
                micro_batch = reference.rows_at_once = _smaller(problem, min(micro_batch, _most_rows(units)), session, step)
        processes.total_gradients(list(weights.values()))
        _total(tally, processes)
        if start and number == 0:
            start.check(step, tally)
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), knobs.max_grad_norm)
        if not torch.isfinite(norm) and knobs.precision != "fp16":
            raise UserError(f"round {step.round} finetune: the gradient is not finite at step {number}: "
                            "lower finetune.learning_rate or finetune.beta")
        scaler.step(optimiser)
        scaler.update()
        reference.follow(weights)
        progress.after(number, epoch, tally, float(norm), learning_rate, knobs, travel[number])
        if session.first and (number + 1) % knobs.checkpoint_every == 0 and number + 1 < len(plan):
            adapters.check_trained(generator.denoiser, f"round {step.round} {step.name}, step {number}")
            progress.save(checkpoint, weights, optimiser, scaler, reference)

    if knobs.checkpointing:
        generator.denoiser.disable_gradient_checkpointing()
    session.wait()
    if not session.first:
        return
    steps, columns = pa.Table.from_pylist(progress.rows, schemas.STEPS), progress.table(store)
    out.write(0, time.monotonic() - started, steps=steps, columns=columns)
    noted = made_of(terms, knobs.signal)
    for finding in diagnosis.of_training(steps, columns, step.config | noted, sampled_of(step)["steps"]):
        if finding.level != "note":
            session.say(f"round {step.round} {step.name}: {finding.level}: {finding.sentence}")
    adapters.check_trained(generator.denoiser, f"round {step.round} {step.name}")
    keep(weights, first, knobs.kept_later)
    generator.save_adapter(out.work / "adapter")
    out.publish("adapter", out.work / "adapter")
    out.finish({
        "objective": knobs.objective, **noted, "pairs": sum(len(g.winner) for g in groups), "groups": len(groups), "steps": len(progress.rows),
        "reference": {"kind": knobs.reference, "hash": reference.hash}, "micro_batch": micro_batch,
        "policy_rows": sum(row["rows"] for row in progress.rows), "replayed_groups": candidates.replayed_groups,
        "reference_rows_in_training": reference.rows_in_training, "reference_rows_before": reference.rows_before,
        "trainable": sum(w.numel() for w in weights.values()), "first_loss": progress.rows[0]["loss"], "last_loss": progress.rows[-1]["loss"],
        "last_accuracy": progress.rows[-1]["accuracy"], "last_beta": progress.beta,
        **({} if progress.divergence is None else {"divergence": progress.divergence}),
        **({"label_smoothing": knobs.options["label_smoothing"]} if step.config["options"].get("label_smoothing") == AUTO else {}),
    }, note(session, step))


@torch.no_grad()
def keep(weights: dict[str, torch.Tensor], first: dict[str, torch.Tensor], share: float) -> None:
    """Take back all but a share of how far weights went from their first values.  Lookahead, Zhang et al. 2019 (1907.08610), eq. 1."""
    for name, before in first.items():
        weights[name].copy_(torch.lerp(before, weights[name], share))


def measured_flips(out: Output, step: Step) -> float:
    """The label flip rate that asking the experts twice has shown, for `label_smoothing: auto`."""
    labels = out.input("pair").manifest["numbers"].get("retest", {}).get("labels")
    if labels is None:
        raise UserError(f"round {step.round} finetune: label_smoothing is auto, but no pair was looked at twice: reward an expert that may answer "
                        "otherwise, raise score.repeat, or give label_smoothing a number")
    if labels["flip_rate"] >= 0.5:
        raise UserError(f"round {step.round} finetune: asked again, the experts order {labels['disagree']:.0%} of {labels['pairs']} pairs the other "
                        "way: such labels teach nothing; give label_smoothing a number, or reward other experts")
    return labels["flip_rate"]


def in_words(progress: Progress) -> str:
    """The last optimiser step's loss and accuracy; nothing before the first."""
    return "loss {loss:.4f} accuracy {accuracy:.0%}".format(**progress.rows[-1]) if progress.rows else ""


def rate_at(number: int, steps: int, warmup: int, decay: str) -> float:
    """Share of the learning rate in one optimiser step: rising over the warm-up (of a third of the steps at most), then constant or linear to 0.

    >>> [rate_at(n, 4, 0, "linear") for n in range(4)], rate_at(0, 6, 2, "none"), rate_at(0, 2, 10, "none")
    ([1.0, 0.75, 0.5, 0.25], 0.5, 1.0)
    """
    warmup = min(warmup, steps // 3)
    if number < warmup:
        return (number + 1) / warmup
    return 1.0 if decay == "none" else (steps - number) / max(steps - warmup, 1)


def _most_rows(units: list[Unit]) -> int:
    return max(sum(len(unit.group.rows) for unit in units), 1)


def _smaller(problem: BaseException, micro_batch: int, session, step: Step) -> int:
    """Half the micro-batch, if memory ran out; the problem itself, if it is another one."""
    if not out_of_memory(problem):
        raise problem
    if micro_batch == 1:
        raise UserError(f"round {step.round} finetune: not even one row fits into memory ({str(problem).splitlines()[0]}): set "
                        "finetune.checkpointing: true, finetune.precision: bf16, or draw smaller pictures") from problem
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    session.say(f"round {step.round} finetune: out of memory with {micro_batch} rows at once; going on with {micro_batch // 2}, to the same result "
                f"(finetune.micro_batch: {micro_batch // 2} says so from the start)")
    return micro_batch // 2


def _total(tally: Tally, processes) -> None:
    """Every process's sums, in every process."""
    if processes.count > 1:
        tally.sums = processes.total_numbers(tally.sums)
        processes.total(tally.by_column)


def numerics(generator, precision: str) -> str:
    """What the forwards round by: a key of ROUNDS."""
    own = str(getattr(generator, "dtype", torch.float32)).removeprefix("torch.") if precision == "no" else precision
    shorter = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if own == "float32" and generator.device.type == "cuda" and shorter else own


class Start:
    """Before the first update the policy is its own reference: gains are 0 but for rounding, or another model drew."""

    def __init__(self, numerics: str):
        self.numerics, self.most = numerics, 0.0

    def see(self, evidence: dict[str, Evidence], rounding: dict[str, torch.Tensor]) -> None:
        """Note how many times what rounding gives any row's gain is."""
        for signal, found in evidence.items():
            gain, most = found.gain.detach().double().abs(), rounding[signal]
            times = gain / most.clamp(min=torch.finfo(torch.float64).tiny)
            self.most = max(self.most, float(times.nan_to_num(nan=math.inf).max()))

    def check(self, step: Step, tally: Tally) -> None:
        if self.most > 1:
            raise UserError(
                f"round {step.round} finetune: at step 0 the policy is its own reference, yet a margin is "
                f"{tally.widest:.3g} instead of 0, as "
                f"predictions differ by {self.most:.2g} times the most that rounding ({self.numerics}) "
                f"gives: these candidates were drawn by another "
                "model, or with other prompts, guidance, dtype, precision or device than finetune uses; draw "
                "and finetune with the same settings, "
                "libraries and device (another --name or seed draws anew)"
            )
