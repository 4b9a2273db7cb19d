"""The judge that is only watched: a small ResNet (He et al. 2015) that names colour and category, calibrated."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from fashiondpo_pipeline.demo.fitting import Tick, fit
from fashiondpo_pipeline.demo.garments import COLOURS, LABELS, Wardrobe, generator, shifted
from fashiondpo_pipeline.demo.recipe import Recipe

# ResNet's stem divides by 4, made for 224 pixels: pictures are enlarged first so that 16 x 16 remain to look at.
SIDE = 64


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
        size={"height": SIDE, "width": SIDE}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def prepare(pictures: Tensor) -> Tensor:
    """What `new_processor` does, on tensors in [0, 1]: (b, 3, 32, 32) -> (b, 3, 64, 64)."""
    return 2 * F.interpolate(pictures, size=(SIDE, SIDE), mode="bilinear") - 1


def train(
    wardrobe: Wardrobe, calibration: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick
) -> tuple[ResNetForImageClassification, float]:
    """Cross-entropy over the 120 labels, lightly smoothed; returns the calibrated network and the seconds."""
    torch.manual_seed(seed)
    network = new().to(device)

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "judge", step)
        pictures, combos = wardrobe.draw(recipe.judge_batch, key)
        logits = network(prepare(shifted(pictures, key).to(device))).logits  # (b, 120)
        return F.cross_entropy(logits, combos.to(device), label_smoothing=0.02)

    seconds = fit(
        network, loss_of, steps=recipe.judge_steps, rate=recipe.judge_rate,
        checkpoint=work / "judge.pt", every=recipe.checkpoint_seconds, tick=tick,
    )  # fmt: skip
    temper(network, *logits_of(network, calibration, seed))
    return network, seconds


@torch.no_grad()
def logits_of(network: ResNetForImageClassification, wardrobe: Wardrobe, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (n, 120) and true labels (n,) of every garment, each in one random colour."""
    key = generator(seed, "judged")
    pictures, combos = wardrobe.dyed(
        torch.arange(len(wardrobe)), torch.randint(len(COLOURS), (len(wardrobe),), generator=key), key
    )
    logits = [network(prepare(part.to(network.device))).logits.cpu() for part in pictures.split(256)]
    return torch.cat(logits), combos


@torch.no_grad()
def temper(network: ResNetForImageClassification, logits: Tensor, combos: Tensor) -> None:
    """Temperature scaling (Guo et al. 2017) written into the last layer, so that its softmax means what it says."""
    grid = torch.linspace(0.3, 3, 271)
    temperature = grid[torch.stack([F.cross_entropy(logits / t, combos) for t in grid]).argmin()].to(network.device)
    last = network.classifier[-1]
    last.weight /= temperature
    last.bias /= temperature


def write(folder: Path, network: ResNetForImageClassification) -> None:
    network.save_pretrained(folder)
    new_processor().save_pretrained(folder)


def measure(folder: Path, wardrobe: Wardrobe, seed: int) -> dict[str, float]:
    """Accuracies, negative log-likelihood and expected calibration error (15 bins) on garments never seen."""
    network = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits, combos = logits_of(network, wardrobe, seed)
    sure, guess = logits.softmax(1).max(1)
    hit = (guess == combos).float()
    bins = (sure * 15).long().clamp(max=14)
    gaps = [(sure[bins == b].mean() - hit[bins == b].mean()).abs() * (bins == b).float().mean() for b in bins.unique()]
    numbers = {
        "joint": hit.mean(),
        "category": (guess // len(COLOURS) == combos // len(COLOURS)).float().mean(),
        "colour": (guess % len(COLOURS) == combos % len(COLOURS)).float().mean(),
        "nll": F.cross_entropy(logits, combos),
        "ece": torch.stack(gaps).sum(),
    }
    return {name: round(value.item(), 4) for name, value in numbers.items()}
