"""What the finished generator draws, as the judge sees it: the share of pictures in which everything is right."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import AutoModelForImageClassification

from fashiondpo_pipeline.demo.garments import ATTRIBUTES, CATEGORIES, COLOURS, PATTERNS, caption, generator, parts, prompted
from fashiondpo_pipeline.demo.judge import by_attribute, prepare

# As shipped; with guidance; with twice the steps, without noise in between.
WAYS = {
    "10 steps, eta 1": {"guidance_scale": 1.0, "num_inference_steps": 10, "eta": 1.0},
    "10 steps, eta 1, guidance 2": {"guidance_scale": 2.0, "num_inference_steps": 10, "eta": 1.0},
    "20 steps, eta 0": {"guidance_scale": 1.0, "num_inference_steps": 20, "eta": 0.0},
}


def draw(pipe: StableDiffusionPipeline, way: dict, seed: int, probe: int) -> Tensor:
    """One picture of each of the prompts: (prompts, 3, 64, 64) in [0, 1]."""
    looks = prompted()
    keys = [generator(seed, "drawing", probe, place) for place in range(len(looks))]
    return pipe([caption(look) for look in looks], generator=keys, output_type="pt", **way).images.cpu()


@torch.no_grad()
def measure(folder: Path, judge: Path, probes: int, seed: int, device: str) -> dict[str, dict]:
    """For each way of drawing: numbers over all prompts, and the share of wholly right pictures by category and pattern."""
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    network = AutoModelForImageClassification.from_pretrained(judge).eval()
    looks = torch.tensor([look.number for look in prompted()]).repeat(probes)
    wanted = dict(zip(ATTRIBUTES, parts(looks), strict=True))
    report = {}
    for name, way in WAYS.items():
        pictures = torch.cat([draw(pipe, way, seed, probe) for probe in range(probes)])  # (prompts probes, 3, 64, 64)
        logits = torch.cat([network(prepare(some)).logits for some in pictures.split(240)])
        said = dict(zip(ATTRIBUTES, by_attribute(logits), strict=True))
        hits = {one: said[one].argmax(1) == wanted[one] for one in ATTRIBUTES}
        right = torch.stack(list(hits.values())).all(0)
        log_p = torch.cat([said[one].log_softmax(1).gather(1, wanted[one][:, None]) for one in ATTRIBUTES], 1).sum(1)
        misnamed = said["colour"].argmax(1) == (wanted["colour"] + 1) % len(COLOURS)
        border = torch.cat([pictures[:, :, (0, -1)].flatten(1), pictures[:, :, :, (0, -1)].flatten(1)], 1)
        report[name] = {
            "all": {
                "pictures": len(pictures),
                "right": share(right),
                **{one: share(own) for one, own in hits.items()},
                "next_colour": share(misnamed),
                "mean_log_p": round(log_p.mean().item(), 4),
                "white_border": share(border > 0.95),
            },
            "right_by_category": {
                category: share(right[wanted["category"] == number]) for number, category in enumerate(CATEGORIES)
            },
            "right_by_pattern": {pattern: share(right[wanted["pattern"] == number]) for number, pattern in enumerate(PATTERNS)},
        }
    return report


def share(hits: Tensor) -> float:
    return round(hits.float().mean().item(), 4)
