"""What one round trains on: candidates' saved latents as arrays, what the reference says of them, and evidence of what the policy says."""

import hashlib
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fashiondpo_pipeline import codecs, diffusion, seeds
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.objectives import Evidence, winner_guard
from fashiondpo_pipeline.processes import rank
from fashiondpo_pipeline.sampling import Condition, Guidance, predict
from fashiondpo_pipeline.timesteps import in_window
from fashiondpo_pipeline.training import Batch, Predictions
from fashiondpo_pipeline.workspace import read_hashed, write_hashed

IN_MEMORY = 4 << 30  # bytes; more than this of one kind lies in a file that is mapped into memory
SUMS = 2.0**-20  # how far off a sum of a few terms in float32 may be, in shares of it
Place = tuple[str, int]  # (group, candidate)


@dataclass(frozen=True)
class Spot:
    """n places of the store as the network meets them."""

    x_t: Tensor
    t: Tensor
    x_0: Tensor
    wanted: Tensor  # the perfect prediction
    condition: Condition


class Store:
    """Candidates that take part in a training. Columns are the saved steps that it uses, or fresh draws.

    generator: its denoiser, schedule and conditions. sampled: the sample step's configuration. signals: "log_prob", "error" or
    both, what the objectives are made of. folder: for what must survive a crash.
    """

    def __init__(self, generator: Any, sampled: dict, guidance: Guidance, knobs: Finetune, signals: list[str], seed: int, folder: Path):
        self.generator, self.sampled, self.guidance, self.knobs, self.signals = generator, sampled, guidance, knobs, signals
        self.seed, self.folder = seed, folder
        self.say: Callable[[str], None] = print
        self.device = generator.device
        self.schedule = generator.schedule(sampled["steps"])
        self.fresh = knobs.noise == "fresh" and signals == ["error"]
        self.rows_without_gradient = 0  # asked of the denoiser: what a live reference costs
        self.place: dict[Place, int] = {}
        self.names: list[str] = []
        self._prompts: list[str] = []
        self._arrays: dict[str, np.ndarray] = {}
        self._conditions: dict[str, Condition] = {}
        self._nothing: Condition | None = None

    # -- filling

    def room(self, rows: int) -> None:
        """Say how many candidates there will be."""
        self.rows = rows

    def gather(self, tables: Iterable[pa.Table], wanted: set[Place], prompts: dict[str, str], suffix: str = "") -> None:
        """Copy what is wanted of some trajectory tables; `suffix` tells the groups of an earlier round from this one's."""
        for table in tables:
            keys = zip(table["group"].to_pylist(), table["candidate"].to_pylist(), strict=True)
            rows = [n for n, key in enumerate(keys) if key in wanted]
            for row in table.take(pa.array(rows, pa.int64())).to_pylist():
                self._add(row, prompts[row["group"]], suffix)

    @property
    def columns_read(self) -> list[str]:
        """The columns of a trajectory table that `gather` reads."""
        by_step = [] if self.fresh else ["x_t", *(["x_prev"] if "log_prob" in self.signals else [])]
        kept = ["prediction"] if self.keeps_predictions else []
        return ["group", "candidate", "steps", "timesteps", "x_0", "log_prob", "error", *by_step, *kept]

    @property
    def keeps_predictions(self) -> bool:
        """Whether the sample stage kept its predictions, which are conditional, and they are of use here."""
        return bool(self.sampled.get("predictions")) and not self.fresh and (self.knobs.guidance != "sampled" or not self.steers)

    @property
    def steers(self) -> bool:
        """Whether guided and conditional predictions differ."""
        return self.guidance.scale != 1

    @property
    def guided(self) -> bool:
        """Whether the denoiser is asked about every branch of the guidance."""
        return self.knobs.guidance == "sampled" or (self.knobs.guidance == "auto" and "log_prob" in self.signals)

    @property
    def as_recorded(self) -> bool:
        """Whether the policy is what the sampler recorded: guided log-probabilities, conditional errors."""
        return self.knobs.guidance == "auto" or not self.steers or (self.knobs.guidance, self.signals) == ("none", ["error"])

    def _add(self, row: dict, prompt: str, suffix: str) -> None:
        shape, n = self.generator.latent_shape, len(self.names)
        if not self._arrays:
            self._steps = [] if self.fresh else in_window(row["steps"], self.sampled["steps"], self.knobs.window)  # places in row["steps"]
            self._numbers = [row["steps"][at] for at in self._steps]
            self._timesteps = np.array([row["timesteps"][at] for at in self._steps])
            self._make("x_0", shape, np.float16)
            for name in self.columns_read:
                if name in ("x_t", "x_prev", "prediction"):
                    self._make(name, (len(self._steps), *shape), np.float16)
            for name in ("log_prob", "error"):
                self._make(name, (len(self._steps),), np.float64)
        self.place[row["group"] + suffix, row["candidate"]] = n
        self.names.append(row["group"] + suffix)
        self._prompts.append(prompt)
        self._arrays["x_0"][n] = codecs.decode_half([row["x_0"]], shape)[0]
        for i, at in enumerate(self._steps):
            self._arrays["log_prob"][n, i] = math.nan if row["log_prob"][at] is None else row["log_prob"][at]
            self._arrays["error"][n, i] = row["error"][at]
            self._arrays["x_t"][n, i] = codecs.decode_half([row["x_t"][at]], shape)[0]
            if "x_prev" in self._arrays:
                self._arrays["x_prev"][n, i] = codecs.decode_half([_led_to(row, at)], shape)[0]
            if "prediction" in self._arrays:
                self._arrays["prediction"][n, i] = codecs.decode_half([row["prediction"][at]], shape)[0]

    def _make(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        shape = (self.rows, *shape)
        if math.prod(shape) * np.dtype(dtype).itemsize > IN_MEMORY:
            file = self.folder / f"{name}-{rank()}.npy"  # one for each process: making it would cut another's short
            self._arrays[name] = np.lib.format.open_memmap(file, "w+", dtype, shape)
        else:
            self._arrays[name] = np.empty(shape, dtype)

    def close(self) -> None:
        """Everything has been gathered: which columns are used, and how each is weighed."""
        if self.fresh:
            self.columns = self.knobs.draws
        else:
            self._use = np.arange(len(self._steps))
            if "log_prob" in self.signals:
                self._use = np.flatnonzero(np.isfinite(self._arrays["log_prob"]).all(0))
                if not len(self._use):
                    raise UserError("finetune.objective needs log-probabilities, which sample.eta 0 does not give: raise sample.eta, "
                                    "use diffusion_dpo, or set finetune.signal to error")
            self.columns = len(self._use)
            t = torch.from_numpy(self._timesteps[self._use])
            self._t = t.long() if float(t.sum()) == float(t.long().sum()) else t.float()
        self._scale = {signal: self._scales(signal) for signal in self.signals}  # (columns,) each
        guidance = self.guidance if self.guided else Guidance(self.guidance.scale)
        for prompt in dict.fromkeys(self._prompts):
            condition = self.generator.condition([{"prompt": prompt}], guidance, self.sampled["negative"])
            self._conditions[prompt] = condition.steered(guidance, self.schedule) if self.guided else condition.alone()
        if self.knobs.condition_dropout:
            self._nothing = self.generator.condition([{"prompt": ""}], guidance, self.sampled["negative"]).alone()

    def _scales(self, signal: str) -> np.ndarray:
        """What each column's signal is multiplied with, (columns,) float64."""
        if self.fresh:
            return np.ones(self.columns)
        if signal == "error":
            gamma = self.knobs.min_snr
            return np.ones(self.columns) if gamma is None else diffusion.min_snr_weight(self.schedule, self._t, gamma).numpy()
        size = math.prod(self.generator.latent_shape)
        if self.knobs.step_weight == "density":
            return np.full(self.columns, 1 / size)
        weight = diffusion.sensitivity(self.schedule, self._t, self.sampled["eta"]).numpy()
        return np.median(weight) / weight / size

    def column_names(self) -> tuple[list[int], list[float]]:
        """(number of the saved step or draw, its timestep) of each column."""
        if self.fresh:
            return list(range(self.columns)), [self.schedule.at_share(sum(self._stratum(c)) / 2) for c in range(self.columns)]
        return [self._numbers[i] for i in self._use], self._t.float().tolist()

    # -- what the network meets

    def spot(self, rows: np.ndarray, columns: np.ndarray) -> Spot:
        """The places (n,) as tensors on the device."""
        x_0 = self._tensor("x_0", rows)
        if self.fresh:
            eps, t = self._fresh_noise(rows, columns)
            x_t = diffusion.add_noise(self.schedule, x_0, eps, t)
        else:
            t = self._t[columns].to(self.device)
            x_t = self._tensor("x_t", rows, columns)
            eps = diffusion.noise_between(self.schedule, x_0, x_t, t)
        return Spot(x_t, t, x_0, diffusion.target(self.schedule, x_0, eps, t), self._condition(rows, columns))

    def _tensor(self, name: str, rows: np.ndarray, columns: np.ndarray | None = None) -> Tensor:
        values = self._arrays[name][rows] if columns is None else self._arrays[name][rows, self._use[columns]]
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device).float()

    def _condition(self, rows: np.ndarray, columns: np.ndarray) -> Condition:
        chosen = [self._conditions[self._prompts[row]] for row in rows]
        if self._nothing is not None:
            dropped = [self._dropped(self.names[row], int(column)) for row, column in zip(rows, columns, strict=True)]
            chosen = [self._nothing if drop else one for drop, one in zip(dropped, chosen, strict=True)]
        return Condition.cat(chosen)

    def _dropped(self, name: str, column: int) -> bool:
        """Whether a group is shown without its prompt at a column; the same for all its candidates, whose errors are compared."""
        return seeds.key(self.seed, "dropout", name, column) % 1_000_003 < self.knobs.condition_dropout * 1_000_003

    def _fresh_noise(self, rows: np.ndarray, columns: np.ndarray) -> tuple[Tensor, Tensor]:
        """New noise and timesteps; a group's candidates share those of a draw, so their errors compare."""
        keys = [(self.names[row], int(column)) for row, column in zip(rows, columns, strict=True)]
        drawn = {key: self._draw(key) for key in dict.fromkeys(keys)}
        t = torch.tensor([drawn[key][1] for key in keys], device=self.device)
        return torch.stack([drawn[key][0] for key in keys]).to(self.device), t

    def _draw(self, key: Place) -> tuple[Tensor, float]:
        random = seeds.generator(self.seed, "fresh", *key)
        low, high = self._stratum(key[1])
        eps = torch.randn(self.generator.latent_shape, generator=random)
        return eps, self.schedule.at_share(low + (high - low) * float(torch.rand((), generator=random)))

    def _stratum(self, column: int) -> tuple[float, float]:
        """The part of the walk that one draw's timesteps come from: draws are spread over the window."""
        low, high = self.knobs.window
        return tuple(low + (high - low) * (column + i) / self.columns for i in (0, 1))  # type: ignore[return-value]

    # -- what is said

    def predict(self, rows: np.ndarray, columns: np.ndarray) -> Predictions:
        """(prediction for log-probabilities, for errors) of the denoiser as it is now; one tensor where they are one.

        The guided and the conditional one, unless `finetune.guidance` says that the policy is one of them.
        """
        if not torch.is_grad_enabled():
            self.rows_without_gradient += len(rows)
        spot = self.spot(rows, columns)
        with autocast(self.device, self.knobs.precision):
            guided, conditional = predict(self.generator.denoise, spot.x_t, spot.t, spot.condition)
        return (guided,) if guided is conditional or self.knobs.guidance == "sampled" else (guided, conditional)

    def signals_of(self, rows: np.ndarray, columns: np.ndarray, spot: Spot, predictions: Predictions) -> dict[str, Tensor]:
        """ln p of the step taken summed over dimensions, and the mean squared error, (n,) float64 each, unweighted."""
        found = {}
        if "log_prob" in self.signals:
            eta = self.sampled["eta"]
            mean = self.schedule.mean(predictions[0].float(), spot.x_t, spot.t, eta)
            found["log_prob"] = diffusion.log_prob(mean, self.schedule.std(spot.t, eta), self._tensor("x_prev", rows, columns))
        found["error"] = diffusion.squared_error(predictions[-1].float(), spot.wanted).double()
        return found

    def _weights(self, batch: Batch) -> dict[str, Tensor]:
        """What each row's signal is multiplied with: signal -> (n,) float64."""
        return {signal: torch.from_numpy(by_column[batch.columns]).to(self.device) for signal, by_column in self._scale.items()}

    def rounding(self, batch: Batch, predictions: Predictions, share: float) -> dict[str, Tensor]:
        """How far rounding may move each row's gain, if it moves a prediction by `share` of its length: signal -> (n,).

        A step's log-probability moves by z . d / sigma, with z the standard normal noise of the step and d how far its
        mean moves: some |d| / sigma, whatever the number of dimensions. An error moves by 2/dimensions times the product
        of two lengths at most. A gain in these units depends on neither beta, nor a step's weight, nor its noise.
        """
        spot, found = self.spot(batch.rows, batch.columns), {}
        scale = self._weights(batch)
        if "log_prob" in self.signals:
            eta, guided = self.sampled["eta"], _length(predictions[0])
            sensitivity = diffusion.sensitivity(self.schedule, spot.t.cpu(), eta).to(self.device)
            slope = (2 * sensitivity).sqrt()  # of mean / sigma in the prediction
            branches = float(spot.condition.weights.abs().sum())  # guidance enlarges the rounding of each
            sums = SUMS * _length(spot.x_t) / self.schedule.std(spot.t, eta)
            found["log_prob"] = scale["log_prob"] * (slope * share * branches * guided + sums)
        moved, off = share * _length(predictions[-1]), _length(predictions[-1] - spot.wanted)
        found["error"] = scale.get("error", 1) * (moved * (off + moved) + SUMS * off**2) / spot.x_t[0].numel()
        return {signal: found[signal] for signal in self.signals}

    def evidence(self, batch: Batch, predictions: Predictions, reference: dict[str, Tensor], scores: dict[str, Tensor]) -> dict[str, Evidence]:
        """signal -> what these predictions say, against the reference's signals (n,) and, where kept, predictions.

        scores: `score` (n,) and `opinions` (n, m) of the rows, where an objective asks for them.
        """
        spot = self.spot(batch.rows, batch.columns)
        own = self.signals_of(batch.rows, batch.columns, spot, predictions)
        winner, loser, unit = (x.to(self.device) for x in (batch.winner, batch.loser, batch.unit))
        scale = self._weights(batch)
        if self.fresh and self.knobs.min_snr is not None:
            scale["error"] = diffusion.min_snr_weight(self.schedule, spot.t, self.knobs.min_snr).to(self.device)
        slack = turned = None
        if self.knobs.guard is not None:
            slack = winner_guard(predictions[-1].float(), spot.wanted, winner, loser, self.knobs.guard)
            if batch.share is not None:
                turned = winner_guard(predictions[-1].float(), spot.wanted, loser, winner, self.knobs.guard)
        common: dict[str, Any] = {
            "winner": winner, "loser": loser, "unit": unit, "error": own["error"], "ref_error": reference["error"],
            "prediction": predictions[-1].float(), "ref_prediction": reference.get("prediction"), "wanted": spot.wanted,
            "scale": scale.get("error"), "slack": slack, "turned_slack": turned,
            "share": None if batch.share is None else batch.share.to(self.device), **scores,
        }
        gains = {}
        if "log_prob" in self.signals:
            ratio = own["log_prob"] - reference["log_prob"]
            common["log_ratio"] = ratio.detach()
            gains["log_prob"] = ratio * scale["log_prob"]
        if "error" in self.signals:
            gains["error"] = (reference["error"] - own["error"]) / 2 * scale["error"]
        return {signal: Evidence(gain=gains[signal], **common) for signal in self.signals}

    # -- what the reference says

    def recorded(self) -> dict[str, np.ndarray]:
        """The sampler's own record of every place, (n, columns) each: the reference where the sampling model is it."""
        names = ["error", *(["log_prob"] if "log_prob" in self.signals else [])]
        return {name: self._arrays[name][: len(self.names)][:, self._use] for name in names}

    def ask(self, file: str, rows: np.ndarray, processes: Any, model: Any) -> dict[str, np.ndarray]:
        """What the model under the context `model` says of these rows at every column, kept so that a resume does not ask again.

        (n, columns) each, NaN for other rows; several processes ask a share each.
        """
        path, names = self.folder / file, ["error", *(["log_prob"] if "log_prob" in self.signals else [])]
        self.asked = getattr(self, "asked", 0) + len(rows) * self.columns
        if (held := read_hashed(path, self.say)) is not None:
            with np.load(io.BytesIO(held), allow_pickle=False) as kept:
                return {name: kept[name] for name in names}
        found = {name: torch.zeros(len(self.names), self.columns, dtype=torch.float64) for name in names}
        places = [(row, column) for column in range(self.columns) for row in rows]
        batches = [places[start : start + self.knobs.micro_batch] for start in range(0, len(places), self.knobs.micro_batch)]
        with torch.no_grad(), model:
            for some in processes.mine(batches):
                at, columns = np.array(some).T
                said = self.signals_of(at, columns, self.spot(at, columns), self.predict(at, columns))
                for name in names:
                    found[name][at, columns] = said[name].cpu()
        numbers = {name: processes.total(values).numpy() for name, values in found.items()}
        others = np.setdiff1d(np.arange(len(self.names)), rows)
        for values in numbers.values():
            values[others] = np.nan
        if processes.first:
            np.savez(buffer := io.BytesIO(), **numbers)  # type: ignore[arg-type]
            write_hashed(path, buffer.getvalue())
        return numbers

    def kept_predictions(self, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """The sampling model's predictions, which the sample stage kept: see `keeps_predictions`."""
        return self._tensor("prediction", rows, columns)


def _length(x: Tensor) -> Tensor:
    """Euclidean length of each row, (n,) float64."""
    return x.detach().double().flatten(1).norm(dim=1)


def _led_to(row: dict, at: int) -> bytes:
    """Where a saved step led: kept by itself, or as the next saved step's x_t, or as x_0."""
    if row["x_prev"] is None:
        raise UserError("these candidates were drawn with sample.path false, so where each step led is not known: draw them again with "
                        "sample.path true, or use an objective on errors (diffusion_dpo, or finetune.signal: error)")
    if row["x_prev"][at] is not None:
        return row["x_prev"][at]
    following = at + 1 < len(row["steps"]) and row["steps"][at + 1] == row["steps"][at] + 1
    return row["x_t"][at + 1] if following else row["x_0"]


def digest(numbers: dict[str, np.ndarray]) -> str:
    """A hash of what a reference says: that it may not change under a training that goes on."""
    found = hashlib.sha256()
    for name in sorted(numbers):
        found.update(name.encode() + np.ascontiguousarray(numbers[name]).tobytes())
    return found.hexdigest()[:16]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision of the forwards; a no-op for "no"."""
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "no")
