"""The judge that is only watched: a small ResNet (He et al. 2015) that names category, colour, pattern and accent, calibrated."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from fashiondpo_pipeline.demo.fitting import Tick, fit
from fashiondpo_pipeline.demo.garments import ATTRIBUTES, CATEGORIES, LABELS, SIZE, Wardrobe, generator, mirrored, parts, random_looks, shifted
from fashiondpo_pipeline.demo.recipe import Recipe


def new() -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    return ResNetForImageClassification(config)


def new_processor() -> ViTImageProcessor:
    return ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def prepare(pictures: Tensor) -> Tensor:
    """What `new_processor` does, on tensors in [0, 1]: (b, 3, 64, 64) -> (b, 3, 64, 64)."""
    return 2 * pictures - 1


def by_attribute(logits: Tensor) -> tuple[Tensor, ...]:
    """The logits of each attribute's values, which compete with each other alone: (b, 10), (b, 12), (b, 4), (b, 13)."""
    return logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)


def loss(logits: Tensor, looks: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the four attributes together, in nats a picture."""
    return torch.stack([
        F.cross_entropy(some, wanted, label_smoothing=smoothing)
        for some, wanted in zip(by_attribute(logits), parts(looks), strict=True)
    ]).sum()  # fmt: skip


def train(
    wardrobe: Wardrobe, calibration: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick
) -> tuple[ResNetForImageClassification, float]:
    """Cross-entropy over the four attributes, lightly smoothed; returns the calibrated network and the seconds."""
    torch.manual_seed(seed)
    network = new().to(device)

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "judge", step)
        pictures, looks = wardrobe.draw(recipe.judge_batch, key)
        logits = network(prepare(mirrored(shifted(pictures, key, reach=2), key).to(device))).logits  # (b, 39)
        return loss(logits, looks.to(device), smoothing=0.02)

    seconds = fit(
        network, loss_of, steps=recipe.judge_steps, rate=recipe.judge_rate,
        checkpoint=work / "judge.pt", every=recipe.checkpoint_seconds, tick=tick,
    )  # fmt: skip
    temper(network, *logits_of(network, calibration, seed))
    return network, seconds


@torch.no_grad()
def logits_of(network: ResNetForImageClassification, wardrobe: Wardrobe, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (n, 39) and true looks (n,) of every garment, each in one random look."""
    key = generator(seed, "judged")
    looks = random_looks(wardrobe.category, key)
    logits = []
    for rows in torch.arange(len(wardrobe)).split(256):
        pictures = wardrobe.worn(rows, looks[rows], key)
        logits.append(network(prepare(pictures.to(network.device))).logits.cpu())
    return torch.cat(logits), looks


@torch.no_grad()
def temper(network: ResNetForImageClassification, logits: Tensor, looks: Tensor) -> None:
    """Temperature scaling (Guo et al. 2017) of each attribute, written into the last layer: its softmax means what it says."""
    grid, last, row = torch.linspace(0.3, 3, 271), network.classifier[-1], 0
    for some, wanted in zip(by_attribute(logits), parts(looks), strict=True):
        temperature = grid[torch.stack([F.cross_entropy(some / t, wanted) for t in grid]).argmin()].to(network.device)
        last.weight[row : row + some.shape[1]] /= temperature
        last.bias[row : row + some.shape[1]] /= temperature
        row += some.shape[1]


def write(folder: Path, network: ResNetForImageClassification) -> None:
    network.save_pretrained(folder)
    new_processor().save_pretrained(folder)


def measure(folder: Path, wardrobe: Wardrobe, seed: int) -> dict[str, float | dict[str, float]]:
    """Accuracies, negative log-likelihood and expected calibration error (15 bins) on garments never seen.

    `plain` and `patterned` are the shares in which all four attributes are right, by category.
    """
    network = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits, looks = logits_of(network, wardrobe, seed)
    wanted = dict(zip(ATTRIBUTES, parts(looks), strict=True))
    said = dict(zip(ATTRIBUTES, by_attribute(logits), strict=True))
    hits = {name: said[name].argmax(1) == wanted[name] for name in ATTRIBUTES}
    hit = torch.stack(list(hits.values())).all(0)
    sure = torch.stack([some.softmax(1).max(1).values for some in said.values()]).prod(0)
    bins = (sure * 15).long().clamp(max=14)
    gaps = [(sure[bins == b].mean() - hit[bins == b].float().mean()).abs() * (bins == b).float().mean() for b in bins.unique()]
    numbers = {
        "all": hit.float().mean(),
        **{name: own.float().mean() for name, own in hits.items()},
        "nll": loss(logits, looks),
        "ece": torch.stack(gaps).sum(),
    }
    found: dict[str, float | dict[str, float]] = {name: round(value.item(), 4) for name, value in numbers.items()}
    for name, among in (("plain", wanted["pattern"] == 0), ("patterned", wanted["pattern"] > 0)):
        by_category = {kind: hit[among & (wanted["category"] == number)] for number, kind in enumerate(CATEGORIES)}
        found[name] = {kind: round(own.float().mean().item(), 4) for kind, own in by_category.items() if len(own)}
    return found
