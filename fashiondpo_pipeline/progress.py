"""Where a training is: its step table, its moving numbers, and the checkpoint that survives a crash."""

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from fashiondpo_pipeline import budget, schemas
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.reference import Reference
from fashiondpo_pipeline.store import Store
from fashiondpo_pipeline.training import Tally
from fashiondpo_pipeline.workspace import read_hashed, write_hashed

BETA_RANGE = 100.0  # auto_beta stays within this factor of beta
BUDGET_RANGE = 1e4  # and what follows a budget within this one: whoever sets a budget need not know beta
BETA_RATE = 0.1  # auto_beta's change of ln beta for each unit that the gradient factor is off
BUDGET_RATE, BUDGET_NOW = 0.2, 1.0  # a budget's, for each unit that the logarithm of the divergence is off, and is more off than before
ARRIVED = 0.1  # share of the optimiser steps, at the end, that say how far the policy has gone


class Progress:
    """Where a training is: its step table, beta, and what each column has shown, epoch by epoch."""

    def __init__(self, beta: float, by_column: torch.Tensor):
        self.rows: list[dict] = []
        self.beta, self.first_beta, self.by_column = beta, beta, by_column
        self.off: float | None = None  # how far beyond its budget the divergence was

    def after(self, number: int, epoch: int, tally: Tally, norm: float, learning_rate: float, knobs: Finetune, travel: float = 1.0) -> None:
        """Note an optimiser step, and move beta where it follows something.

        travel: share of all learning rates of the training that were spent before this step.
        """
        means = tally.means()
        factor = means.pop("factor")
        self.rows.append({"step": number, "epoch": epoch, **means, "grad_norm": norm, "learning_rate": learning_rate, "beta": self.beta,
                          "divergence": tally.divergence if math.isfinite(tally.divergence) else None,
                          "pairs": int(tally.sums["pairs"]), "rows": int(tally.sums["rows"])})
        self.by_column[epoch] += tally.by_column
        if knobs.auto_beta is not None and factor == factor:
            self._move(BETA_RATE * (factor - knobs.auto_beta), BETA_RANGE)
        if knobs.divergence is not None:
            off = budget.ahead(tally.divergence, float(budget.on_the_way(knobs.divergence, travel)))
            self._move(BUDGET_RATE * off + BUDGET_NOW * (off - (off if self.off is None else self.off)), BUDGET_RANGE)
            self.off = off

    def _move(self, by: float, most: float) -> None:
        """Add to ln beta, which stays within a factor of the first one."""
        self.beta = min(max(self.beta * math.exp(by), self.first_beta / most), self.first_beta * most)

    @property
    def eased(self) -> float:
        """What the loss is multiplied with while a budget moves beta: a pair that is not learnt yet pulls as hard at any beta.

        AdamW remembers how large gradients were: with a beta that falls, and they with it, the policy would stand still.
        """
        return self.first_beta / self.beta

    @property
    def divergence(self) -> float | None:
        """Where the policy ended: mean of the last steps' divergence; None without log-probabilities."""
        last = [row["divergence"] for row in self.rows[-max(round(ARRIVED * len(self.rows)), 1) :]]
        known = [value for value in last if value is not None]
        return sum(known) / len(known) if known else None

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
                 "scaler": scaler.state_dict(), "rows": self.rows, "beta": self.beta, "off": self.off, "by_column": self.by_column,
                 "reference": reference.hash, "moving": reference.start if reference.knobs.reference == "ema" else None}
        torch.save(state, buffer := io.BytesIO())  # in memory first: on a full disk torch says something else
        write_hashed(path, buffer.getvalue())

    def resume(self, path: Path, weights: dict, optimiser, scaler, reference: Reference, device, say: Callable[[str], None] = print) -> None:
        """Put everything back as it was; a checkpoint that is not whole is set aside, which is said, and training begins anew.

        Raises UserError if the reference is another one now.
        """
        if (held := read_hashed(path, say)) is None:
            return
        state = torch.load(io.BytesIO(held), map_location=device, weights_only=True)
        if state["reference"] != reference.hash:
            raise UserError(f"{path}: this finetuning began against another reference ({state['reference']}, now {reference.hash}): "
                            "what it reads was changed; delete the folder it lies in and run the same command again")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state["weights"][name])
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        self.rows, self.beta, self.by_column = state["rows"], state["beta"], state["by_column"].cpu()
        self.off = state.get("off")
        if state["moving"] is not None:
            reference.start = state["moving"]
