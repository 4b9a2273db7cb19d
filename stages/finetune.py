"""pairs + trajectories (+ last round's adapter) -> an adapter, and tables of its optimiser steps and of its timesteps."""

import inspect
import io
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fashiondpo_pipeline import adapters, diagnosis, schemas, seeds
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.grid import Chooser
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.registry import OBJECTIVES, did_you_mean
from fashiondpo_pipeline.store import Store, digest
from fashiondpo_pipeline.training import (
    Batch,
    Group,
    Predictions,
    Tally,
    Term,
    Unit,
    accumulate,
    groups_of,
    holding,
    out_of_memory,
    repick,
    schedule_of,
)
from fashiondpo_pipeline.workspace import Output, Step, replace_bytes
from stages import pair as pairing
from stages.encode import guidance_of

# How far the first margins may be from 0 where the policy starts as its own reference: rounding, times beta.
FIRST_MARGIN = {"no": 0.05, "fp16": 0.5, "bf16": 2.0}
BETA_RANGE = 100.0  # auto_beta stays within this factor of beta
BETA_RATE = 0.1  # its change of ln beta for each unit that the gradient factor is off


def run(session, step: Step, out: Output) -> None:
    claimed = {name: value for name, value in step.config.items() if name in Finetune.model_fields}
    # How often to write a checkpoint changes no result, so the claim does not hold it.
    knobs = Finetune.model_validate(claimed | {"checkpoint_every": session.config.finetune.checkpoint_every})
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
    optimiser = torch.optim.AdamW(weights.values(), lr=knobs.learning_rate, weight_decay=knobs.weight_decay)
    scaler = torch.amp.GradScaler(generator.device.type, enabled=knobs.precision == "fp16")
    reference = Reference(knobs, terms, store, candidates.replayed, weights, before is None, processes, generator)

    plan = list(schedule_of(groups, store.columns, knobs.epochs, knobs.groups, min(knobs.timesteps, store.columns),
                            step.config["seed"], "finetune", step.round))
    state = State(knobs.beta, torch.zeros(knobs.epochs, store.columns, 5, dtype=torch.float64))
    checkpoint = out.work / "checkpoint.pt"
    state.resume(checkpoint, weights, optimiser, scaler, reference, generator.device)
    started, micro_batch = time.monotonic(), knobs.micro_batch

    def evidence(batch: Batch, predictions: Predictions) -> dict:
        return store.evidence(batch, predictions, reference.at(batch), candidates.scores_at(batch))

    to_do = list(enumerate(plan))[len(state.rows):]
    for number, (epoch, units) in session.track(to_do, f"round {step.round} {step.name}", len(plan), len(state.rows)):
        if knobs.pick == "accuracy":
            units = repick(units, state.informative(), step.config["seed"], "pick", step.round, number)
        learning_rate = knobs.learning_rate * rate_at(number, len(plan), knobs.warmup, knobs.decay)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        while True:
            optimiser.zero_grad(set_to_none=True)
            try:
                tally = accumulate(
                    processes.mine(units), micro_batch, store.predict, evidence, terms, state.beta, columns=store.columns, counted=units,
                    ratio_clip=knobs.ratio_clip, backward=lambda loss: scaler.scale(loss).backward(), scale=scaler.get_scale(),
                )
                break
            except (RuntimeError, MemoryError) as problem:
                micro_batch = _smaller(problem, min(micro_batch, _most_rows(units)), session, step)
        processes.total_gradients(list(weights.values()))
        _total(tally, processes)
        if number == 0 and reference.is_policy:
            _check_start(step, tally, knobs.precision)
        scaler.unscale_(optimiser)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), knobs.max_grad_norm)
        if not torch.isfinite(norm) and knobs.precision != "fp16":
            raise UserError(f"round {step.round} finetune: the gradient is not finite at step {number}: "
                            "lower finetune.learning_rate or finetune.beta")
        scaler.step(optimiser)
        scaler.update()
        reference.follow(weights)
        state.after(number, epoch, tally, float(norm), learning_rate, knobs)
        if session.first and (number + 1) % knobs.checkpoint_every == 0 and number + 1 < len(plan):
            state.save(checkpoint, weights, optimiser, scaler, reference)

    if knobs.checkpointing:
        generator.denoiser.disable_gradient_checkpointing()
    session.wait()
    if not session.first:
        return
    steps, columns = pa.Table.from_pylist(state.rows, schemas.STEPS), state.table(store)
    out.write(0, time.monotonic() - started, steps=steps, columns=columns)
    for finding in diagnosis.of_training(steps, columns, step.config, step.inputs["sample"].config["steps"]):
        if finding.level != "note":
            session.say(f"round {step.round} {step.name}: {finding.level}: {finding.sentence}")
    generator.save_adapter(out.work / "adapter")
    out.publish("adapter", out.work / "adapter")
    out.finish({
        "objective": knobs.objective, "pairs": sum(len(g.winner) for g in groups), "groups": len(groups), "steps": len(state.rows),
        "reference": {"kind": knobs.reference, "hash": reference.hash}, "micro_batch": micro_batch,
        "policy_rows": sum(row["rows"] for row in state.rows), "replayed_groups": candidates.replayed_groups,
        "reference_rows_in_training": reference.rows_in_training, "reference_rows_before": reference.rows_before,
        "trainable": sum(w.numel() for w in weights.values()), "first_loss": state.rows[0]["loss"], "last_loss": state.rows[-1]["loss"],
        "last_accuracy": state.rows[-1]["accuracy"], "last_beta": state.beta,
    })


# -- objectives


def terms_of(knobs: Finetune) -> list[Term]:
    """The objectives that the configuration mixes. Raises UserError for an option that none of them takes."""
    mix = {knobs.objective: 1.0} if isinstance(knobs.objective, str) else knobs.objective
    found = {name: OBJECTIVES.find(name) for name in mix}
    taken = {name: [key for key, p in inspect.signature(objective.loss).parameters.items() if p.kind is p.KEYWORD_ONLY and key != "beta"]
             for name, objective in found.items()}
    every = sorted({key for keys in taken.values() for key in keys})
    for key in knobs.options:
        if key not in every:
            raise UserError(f"finetune.options.{key}: {' and '.join(mix)} takes no such option; "
                            + (did_you_mean(key, every) if every else "it takes none"))
    options = knobs.options | ({"ratio_clip": knobs.ratio_clip} if knobs.ratio_clip is not None else {})
    terms = [Term(found[name], weight, {key: value for key, value in options.items() if key in taken[name]}) for name, weight in mix.items()]
    signals = signals_of(terms, knobs)
    if knobs.guard is not None and signals != ["error"]:
        raise UserError("finetune.guard works on errors: use diffusion_dpo, or set finetune.signal to error")
    if knobs.condition_dropout and signals != ["error"]:
        raise UserError("finetune.condition_dropout works on errors: a step was taken with its prompt; use diffusion_dpo, or set finetune.signal "
                        "to error")
    return terms


def signals_of(terms: list[Term], knobs: Finetune) -> list[str]:
    """What the gains of these objectives are made of, the first term's first."""
    wanted = [knobs.signal if term.objective.signal == "either" else term.objective.signal for term in terms]
    return list(dict.fromkeys(wanted))


# -- what is trained on


class Candidates:
    """The groups of this round, and of earlier ones where they are replayed, with their candidates in a store."""

    def __init__(self, session, step: Step, out: Output, knobs: Finetune, terms: list[Term], generator):
        self.seed, self.swapped = step.config["seed"], step.config["swapped"]
        sampled = step.inputs["sample"].config
        whole = any(term.objective.per != "pair" for term in terms)
        needs = {need for term in terms for need in term.objective.needs}
        self._wants = [name for name in ("score", "opinions") if name in needs]
        prompts = {row["group"]: row["prompt"] for row in session.prompts["train"].rows}
        rounds = {"": ("sample", "pair")} | {f"@{role.removeprefix('pair-')}": (f"sample-{role.removeprefix('pair-')}", role)
                                            for role in step.inputs if role.startswith("pair-")}
        found = {suffix: self._read(session, step.inputs[pair], out.input(pair), suffix, whole) for suffix, (_, pair) in rounds.items()}
        kept = {suffix: groups if not suffix else self._drawn(groups, len(found[""]), len(found) - 1, knobs.replay, step)
                for suffix, groups in found.items()}
        self.store = Store(generator, sampled, guidance_of(sampled), knobs, signals_of(terms, knobs), self.seed, out.work)
        self.store.room(sum(len(members) for groups in kept.values() for members, *_ in groups.values()))
        self.groups: list[Group] = []
        scores: dict[tuple[str, int], tuple[float, np.ndarray]] = {}
        generator.encodings = session.encodings(step.inputs["encode"], [*prompts.values(), sampled["negative"], ""])
        for suffix, groups in kept.items():
            sample = out.input(rounds[suffix][0])
            wanted = {(name, int(member)) for name, (members, *_) in groups.items() for member in members}
            tables = (sample.table("trajectories", self.store.columns_read, shard) for shard in sample.shards("trajectories"))
            self.store.gather(tables, wanted, prompts, suffix)
            for name, (members, winner, loser, opinions) in groups.items():
                rows = np.array([self.store.place[name + suffix, int(member)] for member in members])
                self.groups.append(Group(name + suffix, rows, np.searchsorted(members, winner), np.searchsorted(members, loser)))
                for member, row in zip(members, rows, strict=True):
                    scores[name, int(row)] = opinions[member]
        self.store.close()
        generator.encodings = {}
        self.replayed = np.array([row for group in self.groups if "@" in group.name for row in group.rows], int)
        self.replayed_groups = sum("@" in group.name for group in self.groups)
        by_row = {row: value for (_, row), value in scores.items()}
        self._scores = np.array([by_row[row][0] for row in range(len(by_row))])
        self._opinions = np.array([by_row[row][1] for row in range(len(by_row))])

    def _read(self, session, pair: Step, out: Output, suffix: str, whole: bool) -> dict[str, tuple]:
        """Group -> (its members' numbers, winners, losers, (score, opinions) of every candidate)."""
        table = out.table("pairs", ["group", "winner", "loser"])
        names, won, lost = (table[name].to_numpy(zero_copy_only=False) for name in ("group", "winner", "loser"))
        if self.swapped:
            won, lost = lost, won
        config = {name: value for name, value in pair.config.items() if name != "seed"}
        chooser = Chooser(pairing.grid(session.output(pair), pair), Rule(**config)) if whole or self._wants else None
        by_name = dict.fromkeys(names.tolist())
        opinions: dict[str, list] = {}
        if chooser:
            sign = -1.0 if self.swapped != (config["labels"] == "swapped") else 1.0
            mixed, each = sign * chooser.mixed, sign * np.stack(list(chooser.normal.values()), -1)  # (g, k), (g, k, m)
            for n, name in enumerate(chooser.grid.groups.to_pylist()):
                order = np.arange(mixed.shape[1])
                if config["labels"] == "random":  # the control experiment of objectives that read scores: anybody's score
                    order = np.random.default_rng(seeds.key(self.seed, "labels", name)).permutation(order)
                opinions[name] = list(zip(mixed[n][order], each[n][order], strict=True))
                if whole:
                    by_name[name] = None
        found = {}
        for group in groups_of_names(names, won, lost):
            found[group[0]] = group[1:]
        result = {}
        for name in sorted(by_name):
            used, winner, loser = found.get(name, (np.empty(0, int), np.empty(0, int), np.empty(0, int)))
            if whole:
                used = np.flatnonzero([math.isfinite(score) for score, _ in opinions[name]])
                used = np.union1d(used, np.concatenate([winner, loser]).astype(int))
            if len(used):
                result[name] = (used, winner, loser, opinions.get(name) or [(math.nan, np.empty(0))] * (int(used.max()) + 1))
        return result

    def _drawn(self, groups: dict, own: int, earlier: int, share: float, step: Step) -> dict:
        """As many of an earlier round's groups as make up its part of the share that is replayed."""
        count = min(len(groups), round(share / (1 - share) * own / earlier))
        random = np.random.default_rng(seeds.key(self.seed, "replay", step.round))
        names = sorted(groups)
        return {names[i]: groups[names[i]] for i in sorted(random.permutation(len(names))[:count])}

    def scores_at(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the experts said of a batch's rows, where an objective asks for it."""
        values = {"score": self._scores, "opinions": self._opinions}
        return {name: torch.from_numpy(values[name][batch.rows]).to(self.store.device) for name in self._wants}


def groups_of_names(names: np.ndarray, winner: np.ndarray, loser: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(name, candidates, winners, losers) of each group with pairs, by candidate number."""
    numbers = sorted({(name, int(c)) for side in (winner, loser) for name, c in zip(names.tolist(), side, strict=True)})
    place = {key: n for n, key in enumerate(numbers)}
    found = []
    for group in groups_of(names, winner, loser, place):
        used = np.array([numbers[row][1] for row in group.rows])
        found.append((group.name, used, used[group.winner], used[group.loser]))
    return found


# -- what the policy is held to


class Reference:
    """What is said of every place by the model that the policy is held to; its hash is in the manifest and checked on resume.

    The sampler's own record where the sampling model is the reference: then no forward is needed. Else one pass before training
    starts; and a forward beside each of the policy's where the reference moves (ema), or an objective compares predictions that
    the sample stage did not keep.
    """

    def __init__(self, knobs: Finetune, terms: list[Term], store: Store, replayed: np.ndarray, weights: dict, first: bool, processes, generator):
        self.knobs, self.store, self.generator, self.first = knobs, store, generator, first
        kind = knobs.reference
        self.is_policy = kind in ("previous", "ema") or first
        self.rows_before = self.rows_in_training = 0
        compares = any("ref_prediction" in term.objective.needs for term in terms)
        kept = store.keeps_predictions and self.is_policy and not len(replayed)
        self.live = kind == "ema" or (compares and not kept)
        self.compares = compares
        self.start = {name: weight.detach().clone() for name, weight in weights.items()} if self.live else None
        self.weights = weights
        # mixed precision rounds otherwise than the sampler did: then even the sampling model is asked anew
        if self.is_policy and not store.fresh and not knobs.condition_dropout and knobs.precision == "no":
            self.numbers = {name: values.copy() for name, values in store.recorded().items()}
            if len(replayed):
                asked = store.ask("replayed.npz", replayed, processes, holding(weights, None))
                for name, values in asked.items():
                    self.numbers[name][replayed] = values[replayed]
        else:
            self.numbers = store.ask("reference.npz", np.arange(len(store.names)), processes, self._model())
        self.rows_before = getattr(store, "asked", 0)
        self.hash = digest(self.numbers)

    def _model(self) -> Any:
        """The context under which the denoiser is the reference."""
        kind = "previous" if self.first else self.knobs.reference
        if kind == "mix":
            return adapters.scaled(self.generator.denoiser, self.knobs.reference_mix)
        return adapters.disabled(self.generator.denoiser, kind == "base")

    def at(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Its signals, and predictions where they are compared, at a batch's places."""
        rows, columns, device = batch.rows, batch.columns, self.store.device
        if not self.live:
            found = {name: torch.from_numpy(np.asarray(values[rows, columns], np.float64)).to(device) for name, values in self.numbers.items()}
            return found | ({"prediction": self.store.kept_predictions(rows, columns)} if self.compares else {})
        asked = self.store.rows_without_gradient
        moving = self.knobs.reference in ("previous", "ema") or self.first
        with torch.no_grad(), holding(self.weights, self.start) if moving else self._model():
            pieces = [slice(start, start + self.knobs.micro_batch) for start in range(0, len(rows), self.knobs.micro_batch)]
            said = [self.store.predict(rows[piece], columns[piece]) for piece in pieces]
            predictions = tuple(torch.cat(parts) for parts in zip(*said, strict=True))
            signals = self.store.signals_of(rows, columns, self.store.spot(rows, columns), predictions)
        self.rows_in_training += self.store.rows_without_gradient - asked
        return signals | {"prediction": predictions[-1].float()}

    def follow(self, weights: dict) -> None:
        """After an optimiser step: a moving reference moves."""
        if self.knobs.reference == "ema" and self.start is not None:
            for name, weight in weights.items():
                self.start[name].lerp_(weight.detach(), 1 - self.knobs.reference_decay)


# -- what survives a crash


class State:
    """Where a training is: its step table, beta, and what each column has shown, epoch by epoch."""

    def __init__(self, beta: float, by_column: torch.Tensor):
        self.rows: list[dict] = []
        self.beta, self.first_beta, self.by_column = beta, beta, by_column

    def after(self, number: int, epoch: int, tally: Tally, norm: float, learning_rate: float, knobs: Finetune) -> None:
        means = tally.means()
        factor = means.pop("factor")
        self.rows.append({"step": number, "epoch": epoch, **means, "grad_norm": norm, "learning_rate": learning_rate, "beta": self.beta,
                          "pairs": int(tally.sums["pairs"]), "rows": int(tally.sums["rows"])})
        self.by_column[epoch] += tally.by_column
        if knobs.auto_beta is not None and factor == factor:
            moved = self.beta * math.exp(BETA_RATE * (factor - knobs.auto_beta))
            self.beta = min(max(moved, self.first_beta / BETA_RANGE), self.first_beta * BETA_RANGE)

    def informative(self) -> np.ndarray:
        """Weight of each column: how far above one half the policy's accuracy on it is, and never nothing."""
        sums = self.by_column.sum(0).numpy()
        accuracy = np.where(sums[:, 4] > 0, sums[:, 0] / np.maximum(sums[:, 4], 1), 1.0)  # an unseen column is tried
        return np.maximum(accuracy - 0.5, 0) + 0.05

    def table(self, store: Store) -> pa.Table:
        """The last pass, column by column."""
        sums = self.by_column[-1].numpy()
        numbers, timesteps = store.column_names()
        pairs = sums[:, 4]
        means = np.divide(sums[:, :4], pairs[:, None], out=np.full((len(sums), 4), np.nan), where=pairs[:, None] > 0)
        rows = [{"step": number, "timestep": t, "pairs": int(count), "accuracy": a, "margin": m, "winner": w, "loser": lost}
                for number, t, count, (a, m, w, lost) in zip(numbers, timesteps, pairs, means, strict=True)]
        return pa.Table.from_pylist(rows, schemas.COLUMNS)

    def save(self, path: Path, weights: dict, optimiser, scaler, reference: Reference) -> None:
        # no random state: order, columns and fresh noise are keyed by what they are for
        state = {"weights": {n: w.detach().cpu() for n, w in weights.items()}, "optimiser": optimiser.state_dict(),
                 "scaler": scaler.state_dict(), "rows": self.rows, "beta": self.beta, "by_column": self.by_column,
                 "reference": reference.hash, "moving": reference.start if reference.knobs.reference == "ema" else None}
        torch.save(state, buffer := io.BytesIO())  # in memory first: on a full disk torch says something else
        replace_bytes(path, buffer.getvalue())

    def resume(self, path: Path, weights: dict, optimiser, scaler, reference: Reference, device) -> None:
        """Put everything back as it was. Raises UserError if the reference is another one now."""
        if not path.is_file():
            return
        state = torch.load(path, map_location=device, weights_only=True)
        if state["reference"] != reference.hash:
            raise UserError(f"{path}: this finetuning began against another reference ({state['reference']}, now {reference.hash}): "
                            "what it reads was changed; delete the folder it lies in and run the same command again")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["weights"][name])
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        self.rows, self.beta, self.by_column = state["rows"], state["beta"], state["by_column"].cpu()
        if state["moving"] is not None:
            reference.start = state["moving"]


def rate_at(number: int, steps: int, warmup: int, decay: str) -> float:
    """Share of the learning rate in one optimiser step: rising over the warm-up, then constant or linear to 0.

    >>> [rate_at(n, 4, 0, "linear") for n in range(4)], rate_at(0, 4, 2, "none")
    ([1.0, 0.75, 0.5, 0.25], 0.5)
    """
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


def _check_start(step: Step, tally: Tally, precision: str) -> None:
    """Before the first update the policy is its own reference: every margin is 0, or the cache is not the reference's."""
    if tally.widest > FIRST_MARGIN[precision]:
        raise UserError(
            f"round {step.round} finetune: at step 0 the policy is its own reference, yet a margin is {tally.widest:.3g} and the loss "
            f"{tally.means()['loss']:.4f} instead of a margin of 0: the candidates were drawn with other numerics than finetune uses; "
            "draw and finetune with the same dtype, precision and device, or lower finetune.beta"
        )
