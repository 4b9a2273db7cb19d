"""Group-batched preference training: each candidate goes through the denoiser once for all pairs it is in.

A unit is one group at one saved step (or draw): its candidates share the timestep, and its pairs are formed from one number
for each of them. An optimiser step takes several units; micro-batches are whole units, so accumulation changes nothing.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fashiondpo_pipeline import seeds
from fashiondpo_pipeline.objectives import Evidence, Objective, Term


@dataclass(frozen=True)
class Group:
    """One prompt's pairs: rows (k,) into the candidate store, winner and loser (p,) into `rows`.

    share (p,): preference for each winner, 0.5 to 1; None where all won outright.
    """

    name: str
    rows: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    share: np.ndarray | None = None


@dataclass(frozen=True)
class Unit:
    """One group at one column (saved step or draw)."""

    group: Group
    column: int


@dataclass(frozen=True)
class Batch:
    """n rows for the denoiser and the p pairs among them.

    rows, columns (n,): place in the store. unit (n,): number of the unit. winner, loser (p,): into 0..n-1.
    share (p,): preference for each winner, None where all won outright.
    """

    rows: np.ndarray
    columns: np.ndarray
    unit: Tensor
    winner: Tensor
    loser: Tensor
    share: Tensor | None = None

    @classmethod
    def of(cls, units: list[Unit]) -> "Batch":
        starts = np.cumsum([0, *(len(unit.group.rows) for unit in units)])[:-1]
        return cls(
            np.concatenate([unit.group.rows for unit in units]),
            np.concatenate([np.full(len(unit.group.rows), unit.column) for unit in units]),
            torch.from_numpy(np.repeat(np.arange(len(units)), [len(unit.group.rows) for unit in units])),
            torch.from_numpy(np.concatenate([unit.group.winner + start for unit, start in zip(units, starts, strict=True)])),
            torch.from_numpy(np.concatenate([unit.group.loser + start for unit, start in zip(units, starts, strict=True)])),
            _shares([unit.group for unit in units]),
        )


def _shares(groups: list[Group]) -> Tensor | None:
    if all(group.share is None for group in groups):
        return None
    return torch.from_numpy(np.concatenate([np.ones(len(group.winner)) if group.share is None else group.share for group in groups]))


def schedule_of(
    groups: list[Group], columns: int, epochs: int, groups_a_step: int, columns_a_step: int, *key: str | int
) -> Iterator[tuple[int, list[Unit]]]:
    """(epoch, units) of each optimiser step: groups in a new order each epoch, each with its own draw of columns.

    The order depends on the key alone, so a resumed training sees what an uninterrupted one would have seen.
    """
    for epoch in range(epochs):
        rng = np.random.default_rng(seeds.key(*key, epoch))
        order = rng.permutation(len(groups))
        for start in range(0, len(order), groups_a_step):
            units = []
            for number in order[start : start + groups_a_step]:
                chosen = rng.permutation(columns)[:columns_a_step]
                units += [Unit(groups[number], int(column)) for column in np.sort(chosen)]
            yield epoch, units


def micro_batches(units: list[Unit], most_rows: int) -> Iterator[list[Unit]]:
    """Whole units, together at most `most_rows` rows; a larger single unit comes alone."""
    batch: list[Unit] = []
    rows = 0
    for unit in units:
        if batch and rows + len(unit.group.rows) > most_rows:
            yield batch
            batch, rows = [], 0
        batch.append(unit)
        rows += len(unit.group.rows)
    if batch:
        yield batch


def repick(units: list[Unit], weights: np.ndarray, *key: str | int) -> list[Unit]:
    """The same groups at columns drawn by weight, without repetition; the draw depends on key and weights alone."""
    rng = np.random.default_rng(seeds.key(*key))
    chosen = []
    for group in dict.fromkeys(unit.group.name for unit in units):
        own = [unit for unit in units if unit.group.name == group]
        columns = rng.choice(len(weights), len(own), replace=False, p=weights / weights.sum())
        chosen += [Unit(own[0].group, int(column)) for column in np.sort(columns)]
    return chosen


_COUNTS = ("accuracy", "margin", "winner", "loser", "pairs")  # what is summed for each column


class Tally:
    """Sums over an optimiser step's pairs, read off for the step table. Sums of several processes add up."""

    def __init__(self, columns: int):
        self.sums = dict.fromkeys(("loss", "margin", "accuracy", "winner", "loser", "winner_error", "loser_error", "clipped", "factor",
                                   "pairs", "rows", "square"), 0.0)
        self.by_column = torch.zeros(columns, len(_COUNTS), dtype=torch.float64)
        self.widest = 0.0

    def add(self, loss: Tensor, margin: Tensor, evidence: Evidence, batch: Batch, clipped: Tensor | None = None) -> None:
        """loss: this part's share of the step's mean. margin (p,): the pairs' logits. clipped (p,) bool: see `clipped_pairs`."""
        gain, winner, loser = (x.detach().cpu() for x in (evidence.gain, evidence.winner, evidence.loser))
        margin = margin.detach().double().cpu()
        right = (margin > 0).double() + 0.5 * (margin == 0)
        found = {"margin": margin, "accuracy": right, "winner": gain[winner].double(), "loser": gain[loser].double(),
                 "factor": torch.sigmoid(-margin)}
        if evidence.error is not None and evidence.ref_error is not None:
            rise = (evidence.error - evidence.ref_error).detach().cpu().double()
            found |= {"winner_error": rise[winner], "loser_error": rise[loser]}
        if clipped is not None:
            found["clipped"] = clipped.double().cpu()
        for name, values in found.items():
            self.sums[name] += float(values.sum())
        self.sums["loss"] += float(loss.detach())
        self.sums["pairs"] += len(margin)
        self.sums["rows"] += len(batch.rows)
        self.sums["square"] += math.nan if evidence.log_ratio is None else float((evidence.log_ratio.double() ** 2).sum())
        if len(margin):
            self.widest = max(self.widest, float(margin.abs().max()))
        columns = torch.from_numpy(batch.columns)[winner]
        rows = torch.stack([found["accuracy"], found["margin"], found["winner"], found["loser"], torch.ones_like(margin)], 1)
        self.by_column.index_add_(0, columns, rows)

    def means(self) -> dict[str, float]:
        """Of every pair; NaN where there is none. The loss is a mean already."""
        pairs = self.sums["pairs"] or float("nan")
        others = ("loss", "pairs", "rows", "square")
        return {"loss": self.sums["loss"]} | {name: value / pairs for name, value in self.sums.items() if name not in others}

    @property
    def divergence(self) -> float:
        """Divergence from the reference over the steps that are trained on, nats a picture; NaN without log-probabilities.

        For a Gaussian step that the reference took, of divergence k, the log-ratio has mean square 2k + k^2; so k is estimated as
        sqrt(1 + mean square) - 1, which needs no forward of the reference, and is added up over the columns.
        """
        square = self.sums["square"] / self.sums["rows"] if self.sums["rows"] else math.nan
        return (math.sqrt(1 + square) - 1) * len(self.by_column)


Predictions = tuple[Tensor, ...]  # what the network says of n places, each (n, c, h, w)


def accumulate(
    units: list[Unit],
    micro_batch: int,
    predict: Callable[[np.ndarray, np.ndarray], Predictions],
    evidence: Callable[[Batch, Predictions], dict[str, Evidence]],
    terms: list[Term],
    beta: float,
    *,
    columns: int,
    counted: Iterable[Unit] | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    scale: float = 1.0,
) -> Tally:
    """One optimiser step's gradient, left in the parameters: each term's mean over what it counts, in all of `counted`.

    predict: the network at (rows, columns) of the store, with gradient. evidence: signal -> what a batch's predictions say.
    counted: the step's units over all processes; `units` where there is one. A unit that is larger than a micro-batch goes through
    the network in pieces, all but the last of them twice: first without gradient, to know the loss's slope at every prediction; then
    with it. `backward` starts the backward pass of a loss; `scale` is what it multiplies losses with.
    """
    everything = list(counted) if counted is not None else units
    totals = {"pair": sum(len(u.group.winner) for u in everything), "candidate": sum(len(u.group.rows) for u in everything), "unit": len(everything)}
    tally = Tally(columns)

    def lose(batch: Batch, predictions: Predictions) -> Tensor:
        found = evidence(batch, predictions)
        value, margin = total_loss(terms, found, beta, totals)
        tally.add(value, margin, main_evidence(terms, found), batch, clipped_pairs(terms, found))
        return value

    for part in micro_batches(units, micro_batch):
        batch = Batch.of(part)
        if len(batch.rows) <= micro_batch:
            backward(lose(batch, predict(batch.rows, batch.columns)))
        else:
            _in_pieces(batch, micro_batch, predict, lose, scale)
    return tally


def _in_pieces(batch: Batch, rows: int, predict: Callable, lose: Callable, scale: float) -> None:
    count = len(batch.rows)
    *early, last = [slice(max(stop - rows, 0), stop) for stop in range(count, 0, -rows)][::-1]  # the first may be short
    with torch.no_grad():
        found = [predict(batch.rows[piece], batch.columns[piece]) for piece in early]
    live = predict(batch.rows[last], batch.columns[last])
    found.append(tuple(output.detach() for output in live))
    leaves = tuple(torch.cat(parts).to(torch.promote_types(parts[0].dtype, torch.float32)).requires_grad_() for parts in zip(*found, strict=True))
    (lose(batch, leaves) * scale).backward()
    for piece in [last, *early]:
        again = live if piece is last else predict(batch.rows[piece], batch.columns[piece])
        live = ()  # its graph goes before the next one comes
        slopes = [(output, leaf.grad[piece].to(output.dtype)) for output, leaf in zip(again, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([output for output, _ in slopes], [slope for _, slope in slopes])


def main_evidence(terms: list[Term], evidence: dict[str, Evidence]) -> Evidence:
    """What the first term is made of: the step table is about it."""
    return evidence[signal_of(terms[0].objective, evidence)]


def clipped_pairs(terms: list[Term], evidence: dict[str, Evidence]) -> Tensor | None:
    """Which pairs (p,) have a candidate beyond the `ratio_clip` of the first term that clips; None where none does."""
    for term in terms:
        limit = term.options.get("ratio_clip")
        if limit is not None:
            own = evidence[signal_of(term.objective, evidence)]
            return (own.gain[own.winner] > limit) | (own.gain[own.loser] < -limit)
    return None


def signal_of(objective: Objective, evidence: dict[str, Evidence]) -> str:
    """What an objective's gain is made of: its own kind, else the first there is."""
    return objective.signal if objective.signal != "either" else next(iter(evidence))


def total_loss(terms: list[Term], evidence: dict[str, Evidence], beta: float, totals: dict[str, int]) -> tuple[Tensor, Tensor]:
    """(weighted sum of the terms' means, margin (p,) of the first)."""
    value, margins = torch.zeros((), dtype=torch.float64), []
    for term in terms:
        own = evidence[signal_of(term.objective, evidence)]
        values, margin = _expected(term, own, beta)
        value = value.to(values.device) + term.weight * values.sum() / max(totals[term.objective.per], 1)
        margins.append(margin)
    return value, margins[0]


def _expected(term: Term, evidence: Evidence, beta: float) -> tuple[Tensor, Tensor]:
    """A term's values and margin. Where a share p of people chose a pair's winner, p of its value and 1 - p of that of the pair turned round.

    That is the mean over the people's own labels, whatever the loss of a pair is.
    """
    values, margin = term.objective.loss(evidence, beta=beta, **term.options)
    if evidence.share is None or term.objective.per != "pair":
        return values, margin
    turned, _ = term.objective.loss(evidence.turned(), beta=beta, **term.options)
    share = evidence.share.to(values.dtype)
    return share * values + (1 - share) * turned, margin


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(problem) or "can't allocate memory" in str(problem)


def holding(weights: dict[str, Any], values: dict[str, Tensor] | None) -> Any:
    """For a while, the trained weights are these values: a reference kept beside the policy. Nothing happens for None."""
    return _Holding(weights, values) if values is not None else nullcontext()


class _Holding:
    def __init__(self, weights: dict[str, Any], values: dict[str, Tensor]):
        self.weights, self.values = weights, values

    def __enter__(self) -> None:
        self.own = {name: weight.data for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.data = self.values[name]

    def __exit__(self, *_: object) -> None:
        for name, weight in self.weights.items():
            weight.data = self.own[name]
