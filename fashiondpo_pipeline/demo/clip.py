"""The small CLIP (Radford et al. 2021) in open_clip's form: does this picture show what the caption says?"""

import json
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fashiondpo_pipeline.demo import words
from fashiondpo_pipeline.demo.fitting import Tick, fit
from fashiondpo_pipeline.demo.garments import (
    CATEGORIES,
    COLOURS,
    COMBOS,
    FORMS,
    SIZE,
    Wardrobe,
    caption,
    generator,
    noun,
    shifted,
)
from fashiondpo_pipeline.demo.recipe import Recipe

PREPROCESS = {
    "size": SIZE, "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip


def architecture() -> dict:
    """Pooling "argmax" finds the end token because it has the highest number; padding repeats it, the first counts."""
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIZE, "patch_size": 4, "layers": 4, "width": 96, "head_width": 32},
        "text_cfg": {
            "context_length": words.LENGTH,
            "vocab_size": words.VOCABULARY,
            "hf_tokenizer_name": "this folder",
            "pool_type": "argmax",
            "width": 96,
            "heads": 3,
            "layers": 2,
        },
    }


def torn(pictures: Tensor, count: int, key: torch.Generator) -> Tensor:
    """Spoilt pictures that fit no caption: halves of two garments, blurred ones and noisy ones; (count, 3, h, w).

    A contrast between clean pictures alone says nothing of workmanship; these give the text side something to mind.
    """
    first = torch.randint(len(pictures), (count,), generator=key)
    second = (first + torch.randint(1, len(pictures), (count,), generator=key)) % len(pictures)  # never the same
    image, other = pictures[first], pictures[second]
    chimera = torch.cat([image[:, :, : SIZE // 2], other[:, :, SIZE // 2 :]], dim=2)
    blurred = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4, mode="bilinear")
    noisy = (image + 0.25 * torch.randn(image.shape, generator=key)).clamp(0, 1)
    way = torch.randint(3, (count, 1, 1, 1), generator=key)
    return torch.where(way == 0, chimera, torch.where(way == 1, blurred, noisy))


def caption_tokens(tokenizer: open_clip.tokenizer.HFTokenizer) -> Tensor:
    """Token numbers of every caption that names a colour: (120, forms - 1, length)."""
    return torch.stack([tokenizer([caption(*combo, form) for form in range(len(FORMS) - 1)]) for combo in COMBOS])


def train(wardrobe: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick) -> tuple[CLIP, float]:
    """Each batch holds each of the 120 colour and category pairs once, so that no pair is wrongly called different."""
    write_tokenizer(work / "clip")
    table = caption_tokens(open_clip.get_tokenizer(f"local-dir:{work / 'clip'}"))
    torch.manual_seed(seed)
    network = CLIP(**architecture()).to(device)
    target = torch.arange(len(COMBOS), device=device)

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "clip", step)
        pictures, _ = wardrobe.each_combo(key)
        pictures = shifted(pictures, key)
        pictures = torch.cat([pictures, torn(pictures, recipe.clip_torn, key)])  # (120 + torn, 3, h, w)
        form = torch.randint(2 * table.shape[1], (len(COMBOS),), generator=key)
        tokens = table[torch.arange(len(COMBOS)), torch.where(form < table.shape[1], form, 0)]
        image = network.encode_image(2 * pictures.to(device) - 1, normalize=True)  # (120 + torn, 96)
        text = network.encode_text(tokens.to(device), normalize=True)  # (120, 96)
        logits = network.logit_scale.exp().clamp(max=100) * text @ image.T  # (120, 120 + torn)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(COMBOS)].T, target)) / 2

    seconds = fit(
        network, loss_of, steps=recipe.clip_steps, rate=recipe.clip_rate,
        checkpoint=work / "clip.pt", every=recipe.checkpoint_seconds, tick=tick,
    )  # fmt: skip
    return network, seconds


def write_tokenizer(folder: Path) -> None:
    words.write(folder)
    config = {"model_cfg": architecture(), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write(folder: Path, network: CLIP) -> None:
    """What open_clip loads as `local-dir:FOLDER`, tokenizer included."""
    write_tokenizer(folder)
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def measure(folder: Path, wardrobe: Wardrobe, seed: int, rounds: int = 10) -> dict[str, float]:
    """Zero-shot accuracies and retrieval on garments never seen, through the files as a user would load them."""
    network, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def embed(texts: list[str]) -> Tensor:
        return network.encode_text(tokenizer(texts), normalize=True)

    joint = embed([caption(*combo) for combo in COMBOS])
    kind = embed([f"a photo of {noun('', category)}" for category in CATEGORIES])
    colour = embed([f"a photo of a {colour} garment" for colour in COLOURS])
    right: dict[str, list[Tensor]] = {}
    for round_ in range(rounds):
        pictures, combos = wardrobe.each_combo(generator(seed, "clip test", round_))
        image = network.encode_image(2 * pictures - 1, normalize=True)  # (120, 96)
        guess = (image @ joint.T).argmax(1)
        hits = {
            "zero_shot_joint": guess == combos,
            "zero_shot_category": guess // len(COLOURS) == combos // len(COLOURS),
            "zero_shot_colour": guess % len(COLOURS) == combos % len(COLOURS),
            "zero_shot_category_unseen_wording": (image @ kind.T).argmax(1) == combos // len(COLOURS),
            "zero_shot_colour_unseen_wording": (image @ colour.T).argmax(1) == combos % len(COLOURS),
            "picture_of_caption_recall_at_1": (joint @ image.T).argmax(1) == combos,
        }
        for name, hit in hits.items():
            right.setdefault(name, []).append(hit.float())
    return {name: round(torch.cat(hit).mean().item(), 4) for name, hit in right.items()}
