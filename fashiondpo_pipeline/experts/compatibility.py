"""Compatibility of a garment with the rest of its outfit: VBPR (He and McAuley 2016, 1510.01784) with the outfit in the user's place."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fashiondpo_pipeline import statistics, wardrobe
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError, check_pulled
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.seeds import key

WEIGHTS, ABOUT = "vbpr.safetensors", "vbpr.json"
FEWEST = 2  # outfits to learn from, to stop by and to test on: the other one's garments are what an outfit's are told from


@dataclass(frozen=True)
class Recipe:
    """How the head is trained. matched: share of negatives of the positive's own category; the others are any garment."""

    hidden: int = 64
    factors: int = 32
    epochs: int = 60
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    matched: float = 0.5
    validation: float = 0.15  # share of the training outfits that decides when to stop
    patience: int = 8  # epochs without a better validation AUC after which it stops
    negatives: int = 10  # for each held-out garment


class Compatibility:
    """Compatibility of a picture with the rest of the outfit that its prompt asks a garment of; higher is better, 0 is no opinion.

    weights: folder that `fdpo expert train compatibility` wrote; it belongs to one tower, and another one is refused. outfits, items:
    tables of outfits and of garments' pictures; the outfit of a prompt is the one with its `group`.
    """

    version, range, needs = 1, (-math.inf, math.inf), ("embedding",)

    def __init__(self, model: str, weights: str, outfits: str, items: str, pretrained: str | None = None):
        self.tower, self.weights = (model, pretrained), weights
        self._files = {"weights": weights, "outfits": outfits, "items": items}

    def files(self) -> dict[str, Path]:
        if not (locate(self.weights) / ABOUT).is_file():
            raise UserError(f"there is no compatibility expert in {locate(self.weights)}: `fdpo expert train compatibility` makes one")
        return {name: locate(path) for name, path in self._files.items()}

    def prepare(self, folder: Path, device: str) -> None:
        """What the head makes of the rest of each prompt's outfit, once."""
        from fashiondpo_pipeline.workspace import write_json

        where = self.files()
        head = load_head(where["weights"], Tower(*self.tower))
        asked, garments = wardrobe.asked(where["outfits"]), wardrobe.Garments(where["items"])
        garments.check([item for one in asked.values() for item in one.items], where["outfits"])
        vectors = garments.embed([item for one in asked.values() for item in one.rest], Tower(*self.tower, device=device))
        contexts = {group: head.rest(np.stack([vectors[item] for item in one.rest])).tolist() for group, one in asked.items() if one.rest}
        write_json(folder / "contexts.json", contexts)

    def load(self, device: str, prepared: Path | None) -> None:
        from fashiondpo_pipeline.workspace import read_json

        self._head = load_head(self.files()["weights"], Tower(*self.tower))
        self._contexts = {group: np.array(context) for group, context in read_json(prepared / "contexts.json").items()} if prepared else {}

    def __call__(self, rows: list[dict]) -> list[float | tuple[float, str]]:
        return [self._one(row) for row in rows]

    def _one(self, row: dict) -> float | tuple[float, str]:
        if row["group"] not in self._contexts:
            return math.nan, f"no outfit is for the prompt '{row['group']}'"
        return float(self._head.scores(self._contexts[row["group"]], row["embedding"][None])[0])


# -- the head


class Head:
    """s(x | rest) = <mean over the rest of f(y), g(x)> + <v, x>; f and g are layers of 2, x and y features of pictures.

    The terms of VBPR that hold an item's own number are left out: a picture just drawn has none.
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}

    def _through(self, layers: str, x: np.ndarray) -> np.ndarray:
        w = self.weights
        hidden = x @ w[f"{layers}.0.weight"].T + w[f"{layers}.0.bias"]
        return np.where(hidden > 0, hidden, 0.01 * hidden) @ w[f"{layers}.2.weight"].T + w[f"{layers}.2.bias"]

    def rest(self, features: np.ndarray) -> np.ndarray:
        """What the rest of an outfit (n, d) asks for: (factors,)."""
        return self._through("rest", np.asarray(features, np.float64)).mean(0)

    def scores(self, rest: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Compatibility of garments (b, d) with it: (b,)."""
        x = np.asarray(features, np.float64)
        return self._through("item", x) @ rest + x @ self.weights["bias.weight"][0]


def load_head(folder: Path, tower: Tower) -> Head:
    """The head in a folder. Raises UserError if it was trained on the features of another tower."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from fashiondpo_pipeline.workspace import read_json

    about = read_json(folder / ABOUT)
    if about["tower"] != tower.identity():
        raise UserError(f"{folder} was trained on the features of another CLIP tower ({about['tower']}, now {tower.identity()}): "
                        "name the tower it was trained with, or train it anew")
    try:
        return Head(load_file(folder / WEIGHTS))
    except (SafetensorError, OSError) as problem:
        check_pulled(folder)
        raise UserError(f"{folder / WEIGHTS} cannot be read ({problem}): get it anew, or train it anew") from problem


# -- training


class Triples:
    """Outfits as arrays of garments' numbers, and what each garment may be confused with: those of `pool`, left out their own."""

    def __init__(
        self, outfits: list[list[str]], garments: wardrobe.Garments, number: dict[str, int], pool: list[list[str]] | None = None,
    ):
        self.most = max(map(len, outfits))
        self.rows = [[number[item] for item in outfit] for outfit in outfits]
        others = sorted({number[item] for outfit in pool or outfits for item in outfit})
        kinds = {n: garments.category[item] for item, n in number.items()}
        self.pool = np.array(others)
        self.of_kind = {kind: np.array([n for n in others if kinds[n] == kind]) for kind in {kinds[n] for n in others}}
        self.kind = kinds

    def places(self) -> list[tuple[int, int]]:
        """(outfit, place) of every garment that has others beside it."""
        return [(row, place) for row, items in enumerate(self.rows) for place in range(len(items)) if len(items) > 1]

    def rest(self, row: int, place: int) -> list[int]:
        """The other garments, filled up with -1."""
        others = self.rows[row][:place] + self.rows[row][place + 1 :]
        return others + [-1] * (self.most - 1 - len(others))

    def negative(self, rng: np.random.Generator, row: int, place: int, matched: bool) -> int | None:
        """A garment that the outfit does not have, of the same category if `matched`; None: there is none."""
        pool = self._candidates(self.rows[row][place], matched)
        for _ in range(20 if len(pool) else 0):
            drawn = int(pool[rng.integers(len(pool))])
            if drawn not in self.rows[row]:
                return drawn
        left = np.setdiff1d(pool, self.rows[row])
        return int(left[rng.integers(len(left))]) if len(left) else None

    def told_apart(self, matched: bool) -> int:
        """How many outfits have a garment with another one, of its category if `matched`, to be told from."""
        return sum(any(len(np.setdiff1d(self._candidates(item, matched), row)) for item in row) for row in self.rows)

    def _candidates(self, item: int, matched: bool) -> np.ndarray:
        return self.of_kind.get(self.kind[item], self.pool[:0]) if matched else self.pool


def train(
    out: Path, model: str, pretrained: str | None, outfits: str, items: str, *, seed: int = 0, device: str = "cpu",
    recipe: Recipe | None = None, tick: Callable[[int, float, float], None] = lambda epoch, loss, auc: None,
) -> dict[str, Any]:
    """Train a head on the outfits of split `train`, measure it on those of split `test`, and write it to the folder `out`.

    BPR: -ln sigmoid(s(garment worn) - s(another)), He and McAuley's eq. 8. Every garment of an outfit is asked for in turn. What was
    measured is returned, and written beside the weights with the identity of the tower. `tick` is called after each epoch.
    """
    from safetensors.numpy import save_file

    from fashiondpo_pipeline.workspace import save_file as replace
    from fashiondpo_pipeline.workspace import write_json

    recipe = recipe or Recipe()
    garments, parts = wardrobe.Garments(locate(items)), _splits(locate(outfits))
    for part in parts.values():
        garments.check([item for outfit in part for item in outfit], locate(outfits))
    tower = Tower(model, pretrained, device)
    vectors = garments.embed([item for part in parts.values() for outfit in part for item in outfit], tower)
    number = {item: n for n, item in enumerate(vectors)}
    features = np.stack(list(vectors.values()))  # (garments, d)

    order = np.random.default_rng(key(seed, "validation")).permutation(len(parts["train"]))
    kept = min(max(int(len(order) * recipe.validation), FEWEST), len(order) - FEWEST)
    stop_by = Triples([parts["train"][n] for n in order[:kept]], garments, number, pool=parts["train"])
    learn = Triples([parts["train"][n] for n in order[kept:]], garments, number)
    held_out, measured = Triples(parts["test"], garments, number), {}
    for what, some, matched in (("to learn from", learn, False), ("that say when to stop", stop_by, True), ("to test on", held_out, True)):
        if (told := some.told_apart(matched)) < FEWEST:
            raise UserError(f"{locate(outfits)}: of the {len(some.rows)} outfits {what} only {told} can be told from others by a garment"
                            f"{' of the same category' if matched else ''}, wanted {FEWEST}; add some that have the same categories")
    weights, epochs = _fit(features, learn, stop_by, recipe, seed, tick)
    for name, matched in (("same category", True), ("any garment", False)):
        won = auc_of_outfits(Head(weights), features, held_out, matched, recipe.negatives, seed)
        won = won[np.isfinite(won).any(1)]
        measured[name] = dict(zip(("auc", "low", "high"), statistics.bootstrap(won, key(seed, "bootstrap", name), 2000, 0.95), strict=True))
    about = {"tower": tower.identity(), "features": features.shape[1], "seed": seed, "recipe": asdict(recipe), "epochs": epochs,
             "outfits": {name: len(part) for name, part in parts.items()}, "held out": measured}
    out.mkdir(parents=True, exist_ok=True)
    replace(out / WEIGHTS, lambda draft: save_file(weights, draft))
    write_json(out / ABOUT, about)
    return about


def _splits(path: Path) -> dict[str, list[list[str]]]:
    """The outfits to learn from and to test on."""
    table = wardrobe.read(path, "items", "split")
    found: dict[str, list[list[str]]] = {"train": [], "test": []}
    for row in table.to_pylist():
        if row["split"] in found and len(row["items"] or []) > 1:
            found[row["split"]].append(row["items"])
    for split, least in (("train", 2 * FEWEST), ("test", FEWEST)):
        if len(found[split]) < least:
            raise UserError(f"{path}: {len(found[split])} outfits of two garments or more in the split '{split}', wanted {least}; add some")
    return found


def _fit(features: np.ndarray, learn: Triples, stop_by: Triples, recipe: Recipe, seed: int, tick: Callable) -> tuple[dict[str, np.ndarray], int]:
    """(the weights of the best epoch by validation AUC, how many epochs that were)."""
    import torch
    from torch import nn
    from torch.nn import functional

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "head") % 2**63)
        width = features.shape[1]
        layers = {name: nn.Sequential(nn.Linear(width, recipe.hidden), nn.LeakyReLU(), nn.Linear(recipe.hidden, recipe.factors))
                  for name in ("rest", "item")}
        net = nn.ModuleDict(layers | {"bias": nn.Linear(width, 1, bias=False)})
    x = torch.from_numpy(np.concatenate([features, np.zeros((1, width), np.float32)]))  # row -1 fills up
    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    places = learn.places()
    best, best_auc, best_epoch = {}, -1.0, 0
    for epoch in range(recipe.epochs):
        rng = np.random.default_rng(key(seed, "epoch", epoch))
        order, total, seen = rng.permutation(len(places)), 0.0, 0
        for start in range(0, len(places), recipe.batch):
            drawn = []
            for row, place in (places[n] for n in order[start : start + recipe.batch]):
                negative = learn.negative(rng, row, place, rng.random() < recipe.matched)
                drawn += [(row, place, negative)] if negative is not None else []
            if not drawn:
                continue
            rest = torch.tensor([learn.rest(row, place) for row, place, _ in drawn])  # (b, n)
            there = (rest >= 0).float()[..., None]
            asked = (net["rest"](x[rest]) * there).sum(1) / there.sum(1)  # (b, factors)
            worn = torch.tensor([learn.rows[row][place] for row, place, _ in drawn])
            other = torch.tensor([negative for *_, negative in drawn])
            gap = (asked * (net["item"](x[worn]) - net["item"](x[other]))).sum(1) + net["bias"](x[worn] - x[other])[:, 0]
            loss = -functional.logsigmoid(gap).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total, seen = total + loss.item() * len(drawn), seen + len(drawn)
        weights = {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}
        auc = float(np.nanmean(auc_of_outfits(Head(weights), features, stop_by, True, recipe.negatives, seed)))
        tick(epoch + 1, total / max(seen, 1), auc)
        if auc > best_auc:
            best, best_auc, best_epoch = weights, auc, epoch + 1
        elif epoch + 1 - best_epoch >= recipe.patience:
            break
    return best, best_epoch


def auc_of_outfits(head: Head, features: np.ndarray, outfits: Triples, matched: bool, negatives: int, seed: int) -> np.ndarray:
    """1 where a garment worn scores above another one, 1/2 at a tie, else 0: (outfits, places times negatives); its mean is the AUC.

    A row is an outfit, for an interval over outfits; NaN where it has fewer garments than others.
    """
    won = np.full((len(outfits.rows), outfits.most * negatives), np.nan)
    for row, items in enumerate(outfits.rows):
        for place, item in enumerate(items):
            rng = np.random.default_rng(key(seed, "negatives", row, place, int(matched)))
            drawn = [outfits.negative(rng, row, place, matched) for _ in range(negatives)]
            others = [one for one in drawn if one is not None]
            if not others or len(items) < 2:
                continue
            rest = head.rest(features[[n for n in outfits.rest(row, place) if n >= 0]])
            scores = head.scores(rest, features[[item, *others]]).round(9)  # equal rows of one product may differ in their last bit
            won[row, place * negatives : place * negatives + len(others)] = statistics.wins(scores[:1], scores[1:])
    return won


def in_words(about: dict[str, Any]) -> str:
    """What was measured, for the person at the terminal."""
    parts = [f"against {name} {m['auc']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for name, m in about["held out"].items()]
    return (f"held-out AUC {', '.join(parts)}; {about['epochs']} epochs, "
            f"{about['outfits']['train']:,} outfits to learn from, {about['outfits']['test']:,} to test on")
