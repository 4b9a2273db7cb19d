"""Group-batched preference training: each candidate goes through the denoiser once for all pairs it is in.

A unit is one group at one saved step (or draw): its candidates share the timestep, and its pairs are formed from one number
for each of them. An optimiser step takes several units; micro-batches are whole units, so accumulation changes nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fashiondpo_pipeline import seeds


@dataclass(frozen=True)
class Group:
    """One prompt's pairs: rows (k,) into the candidate store, winner and loser (p,) into `rows`."""

    name: str
    rows: np.ndarray
    winner: np.ndarray
    loser: np.ndarray


@dataclass(frozen=True)
class Unit:
    """One group at one column (saved step or draw)."""

    group: Group
    column: int


@dataclass(frozen=True)
class Batch:
    """n rows for the denoiser and the p pairs among them.

    rows, columns (n,): place in the store. winner, loser (p,): into 0..n-1.
    """

    rows: np.ndarray
    columns: np.ndarray
    winner: Tensor
    loser: Tensor

    @classmethod
    def of(cls, units: list[Unit]) -> "Batch":
        starts = np.cumsum([0, *(len(unit.group.rows) for unit in units)])[:-1]
        return cls(
            np.concatenate([unit.group.rows for unit in units]),
            np.concatenate([np.full(len(unit.group.rows), unit.column) for unit in units]),
            torch.from_numpy(np.concatenate([unit.group.winner + start for unit, start in zip(units, starts, strict=True)])),
            torch.from_numpy(np.concatenate([unit.group.loser + start for unit, start in zip(units, starts, strict=True)])),
        )


def groups_of(names: np.ndarray, winner: np.ndarray, loser: np.ndarray, place: dict[tuple[str, int], int]) -> list[Group]:
    """Pairs as groups, in the order of their names. place: (group, candidate) -> row of the store."""
    found = []
    order = np.argsort(names, kind="stable")
    for part in np.split(order, np.flatnonzero(names[order][1:] != names[order][:-1]) + 1):
        name = str(names[part[0]])
        used = np.unique(np.concatenate([winner[part], loser[part]]))
        rows = np.array([place[name, int(candidate)] for candidate in used])
        found.append(Group(name, rows, np.searchsorted(used, winner[part]), np.searchsorted(used, loser[part])))
    return found


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


@dataclass
class Tally:
    """Sums over the pairs of an optimiser step, read off for the step table."""

    loss: float = 0.0
    margin: float = 0.0
    accuracy: float = 0.0
    winner: float = 0.0
    loser: float = 0.0
    pairs: int = 0
    rows: int = 0
    widest: float = 0.0

    def add(self, loss: Tensor, margin: Tensor, gain: Tensor, batch: Batch) -> None:
        """gain (n,): how much better than the reference the policy fits each candidate."""
        self.loss += float(loss.sum())
        self.margin += float(margin.sum())
        self.accuracy += float((margin > 0).sum() + 0.5 * (margin == 0).sum())
        self.winner += float(gain[batch.winner].sum())
        self.loser += float(gain[batch.loser].sum())
        self.pairs += len(loss)
        self.rows += len(batch.rows)
        self.widest = max(self.widest, float(margin.abs().max()))

    def means(self) -> dict[str, float]:
        return {name: getattr(self, name) / self.pairs for name in ("loss", "margin", "accuracy", "winner", "loser")}


def accumulate(
    units: list[Unit],
    micro_batch: int,
    signal: Callable[[Batch], tuple[Tensor, Tensor]],
    loss: Callable[..., tuple[Tensor, Tensor]],
    higher_is_better: bool,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
) -> Tally:
    """One optimiser step's gradient, left in the parameters: the mean loss over every pair and column of `units`.

    signal: batch -> (policy's, reference's) signal, each (n,); the only thing here that calls a network. loss: an objective.
    """
    tally = Tally()
    total = sum(len(unit.group.winner) for unit in units)
    for part in micro_batches(units, micro_batch):
        batch = Batch.of(part)
        policy, reference = signal(batch)
        each, margin = loss(policy, reference, batch.winner.to(policy.device), batch.loser.to(policy.device))  # (p,)
        backward(each.sum() / total)
        gain = (policy - reference) if higher_is_better else (reference - policy)
        tally.add(each.detach(), margin.detach(), gain.detach().cpu(), batch)
    return tally
