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
    ATTRIBUTES,
    CATEGORIES,
    COLOURS,
    FORMS,
    NO_ACCENT,
    PATTERNS,
    SIZE,
    Look,
    Wardrobe,
    caption,
    generator,
    mirrored,
    noun,
    parts,
    random_looks,
    shifted,
)
from fashiondpo_pipeline.demo.recipe import Recipe

PREPROCESS = {
    "size": SIZE, "mode": "RGB", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip

# Categories that are told apart by their outline's details.
ALIKE = (("t-shirt", "pullover", "dress", "coat", "shirt"), ("sandal", "sneaker", "ankle boot"))


def architecture() -> dict:
    """Pooling "argmax" finds the end token because it has the highest number; padding repeats it, the first counts."""
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIZE, "layers": [2, 2, 1, 1], "width": 12, "head_width": 32},
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
    blurred = F.interpolate(F.avg_pool2d(image, 8), scale_factor=8, mode="bilinear")
    noisy = (image + 0.25 * torch.randn(image.shape, generator=key)).clamp(0, 1)
    way = torch.randint(3, (count, 1, 1, 1), generator=key)
    return torch.where(way == 0, chimera, torch.where(way == 1, blurred, noisy))


def family(looks: Tensor, key: torch.Generator) -> Tensor:
    """Looks that are easily mistaken for these: themselves, colours swapped, another pattern, another accent, two other categories; (6, n).

    The first of the two is of the same shape, where there is one: a coat is no pullover.
    """
    rows = []
    for number in looks.tolist():
        look = Look.of(number)
        patterns = [name for name in PATTERNS if name not in (look.pattern, "plain")]
        accents = [colour for colour in COLOURS if colour not in (look.colour, look.accent)]
        accent = accents[int(torch.randint(len(accents), (), generator=key))]
        pattern = patterns[int(torch.randint(len(patterns), (), generator=key))]
        if look.pattern == "plain":
            variants = [look._replace(colour=accent), look._replace(pattern=pattern, accent=accent)]
        else:
            variants = [look.swapped, look._replace(pattern=pattern)]
        other = next(name for name in patterns if name != pattern) if look.pattern == "plain" else look.pattern
        variants.append(look._replace(pattern=other, accent=accent))
        alike = [name for kin in ALIKE if look.category in kin for name in kin if name != look.category]
        for kinds in (alike or CATEGORIES, CATEGORIES):
            others = [name for name in kinds if name not in (look.category, variants[-1].category)]
            variants.append(look._replace(category=others[int(torch.randint(len(others), (), generator=key))]))
        rows.append([number, *(variant.number for variant in variants)])
    return torch.tensor(rows).T


def train(wardrobe: Wardrobe, recipe: Recipe, *, seed: int, device: str, work: Path, tick: Tick) -> tuple[CLIP, float]:
    """Each batch holds families of looks that differ in one thing, three a category, so that each thing has to be seen."""
    write_tokenizer(work / "clip")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{work / 'clip'}")
    torch.manual_seed(seed)
    network = CLIP(**architecture()).to(device)
    category = torch.arange(len(CATEGORIES)).repeat(recipe.clip_families)
    target = torch.arange(6 * len(category), device=device)

    def loss_of(step: int) -> Tensor:
        key = generator(seed, "clip", step)
        looks = family(random_looks(category, key), key).flatten()  # (b,)
        pictures = mirrored(shifted(wardrobe.dressed(looks, key), key, reach=2), key)
        pictures = torch.cat([pictures, torn(pictures, recipe.clip_torn, key)])  # (b + torn, 3, h, w)
        form = torch.randint(2 * (len(FORMS) - 1), looks.shape, generator=key)
        form = torch.where(form < len(FORMS) - 1, form, 0)
        texts = [caption(Look.of(look), way) for look, way in zip(looks.tolist(), form.tolist(), strict=True)]
        image = network.encode_image(2 * pictures.to(device) - 1, normalize=True)  # (b + torn, 96)
        text = network.encode_text(tokenizer(texts).to(device), normalize=True)  # (b, 96)
        logits = network.logit_scale.exp().clamp(max=100) * text @ image.T  # (b, b + torn)
        # a look that came twice is no mistake
        twin = (looks[:, None] == looks[None]).fill_diagonal_(False).to(device)
        logits = torch.cat([logits[:, : len(looks)].masked_fill(twin, -1e4), logits[:, len(looks) :]], 1)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(looks)].T, target)) / 2

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

    plain = {
        "category": [f"a photo of {noun('', category)}" for category in CATEGORIES],
        "colour": [f"a photo of a {colour} garment" for colour in COLOURS],
    }
    unseen = {name: embed(texts) for name, texts in plain.items()}
    right: dict[str, list[Tensor]] = {}
    for round_ in range(rounds):
        key = generator(seed, "clip test", round_)
        looks = random_looks(torch.arange(len(CATEGORIES)).repeat(12), key)
        image = network.encode_image(2 * wardrobe.dressed(looks, key) - 1, normalize=True)  # (120, 96)
        wanted = dict(zip(ATTRIBUTES, parts(looks), strict=True))
        for name, values in ATTRIBUTES.items():  # which value of one attribute fits best, the others as they are
            texts = [caption(altered(Look.of(look), name, value)) for look in looks.tolist() for value in values]
            said = (image[:, None] * embed(texts).unflatten(0, (len(looks), -1))).sum(-1)  # (120, values)
            asked = possible(looks, name)
            hit = said.masked_fill(~asked, -2).argmax(1) == wanted[name]
            right.setdefault(name, []).append(hit[asked.sum(1) > 1].float())
        patterned = looks[wanted["pattern"] > 0]
        texts = [caption(Look.of(look)) for look in patterned.tolist()] + [caption(Look.of(look).swapped) for look in patterned.tolist()]
        true, swapped = embed(texts).split(len(patterned))
        seen = image[wanted["pattern"] > 0]
        right.setdefault("binding", []).append(((seen * true).sum(1) > (seen * swapped).sum(1)).float())
        for name, vectors in unseen.items():
            right.setdefault(f"{name}_unseen_wording", []).append(((image @ vectors.T).argmax(1) == wanted[name]).float())
    return {name: round(torch.cat(hit).mean().item(), 4) for name, hit in right.items()}


def altered(look: Look, attribute: str, value: str) -> Look:
    """The look with another value of one attribute; a pattern without an accent gets the next colour."""
    look = look._replace(**{attribute: value})
    if look.pattern == "plain":
        return look._replace(accent=NO_ACCENT)
    if look.accent in (NO_ACCENT, look.colour):
        return look._replace(accent=COLOURS[(COLOURS.index(look.colour) + 1) % len(COLOURS)])
    return look


def possible(looks: Tensor, attribute: str) -> Tensor:
    """Which values of an attribute make another look, (n, values): a plain garment has no accent, nobody has two alike."""
    _, colour, pattern, _ = parts(looks)
    values = torch.ones(len(looks), len(ATTRIBUTES[attribute]), dtype=torch.bool)
    if attribute == "accent":
        values[:, 0] = pattern == 0
        values[:, 1:] = (pattern > 0)[:, None] & (torch.arange(len(COLOURS)) != colour[:, None])
    return values
