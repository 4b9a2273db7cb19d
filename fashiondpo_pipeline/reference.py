"""What the policy is held to while it is trained, and what that says of every candidate."""

from typing import Any

import numpy as np
import torch

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.store import Store, digest
from fashiondpo_pipeline.training import Batch, Term, holding


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
        self.rows_at_once = knobs.micro_batch  # less where memory has run out
        compares = any("ref_prediction" in term.objective.needs for term in terms)
        # what the sample stage kept was said with the prompt, by the model that drew
        kept = store.keeps_predictions and self.is_policy and not (len(replayed) or knobs.condition_dropout)
        self.live = kind == "ema" or (compares and not kept)
        self.compares = compares
        self.weights = weights
        self.start = self._beginning() if self.live and (kind != "base" or first) else None
        # mixed precision and compiled code round otherwise: then even the model that drew the candidates is asked anew
        alike = knobs.precision == "no" and getattr(generator, "rounds_alike", True) and store.as_recorded
        if self.is_policy and not store.fresh and not knobs.condition_dropout and alike:
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
        """The context under which the denoiser is the reference: the base at any time, others before the policy moves."""
        kind = "previous" if self.first else self.knobs.reference
        if kind == "mix":
            return adapters.scaled(self.generator.denoiser, self.knobs.reference_mix)
        return adapters.disabled(self.generator.denoiser, kind == "base")

    def _beginning(self) -> dict[str, torch.Tensor]:
        """The weights that are the reference before the first optimiser step, apart from the policy's, which move."""
        with self._model():
            return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def at(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Its signals, and predictions where they are compared, at a batch's places."""
        rows, columns, device = batch.rows, batch.columns, self.store.device
        if not self.live:
            found = {name: torch.from_numpy(np.asarray(values[rows, columns], np.float64)).to(device) for name, values in self.numbers.items()}
            return found | ({"prediction": self.store.kept_predictions(rows, columns)} if self.compares else {})
        asked = self.store.rows_without_gradient
        with torch.no_grad(), self._model() if self.start is None else holding(self.weights, self.start):
            pieces = [slice(start, start + self.rows_at_once) for start in range(0, len(rows), self.rows_at_once)]
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
