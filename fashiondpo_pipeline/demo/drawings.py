"""What the finished generator draws, as the judge sees it: the share of right colours and categories."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import AutoModelForImageClassification

from fashiondpo_pipeline.demo.garments import CATEGORIES, COLOURS, COMBOS, caption, generator
from fashiondpo_pipeline.demo.judge import prepare

# The plain way to draw, and the way candidates are drawn for preference tuning: few steps, unguided, stochastic.
WAYS = {
    "guidance 3, 20 steps": {"guidance_scale": 3.0, "num_inference_steps": 20, "eta": 0.0},
    "guidance 1, 10 steps, eta 1": {"guidance_scale": 1.0, "num_inference_steps": 10, "eta": 1.0},
}


def draw(pipe: StableDiffusionPipeline, way: dict, seed: int, probe: int) -> Tensor:
    """One picture of each of the 120 prompts: (120, 3, 32, 32) in [0, 1]."""
    keys = [generator(seed, "drawing", probe, combo) for combo in range(len(COMBOS))]
    return pipe([caption(*combo) for combo in COMBOS], generator=keys, output_type="pt", **way).images.cpu()


@torch.no_grad()
def measure(folder: Path, judge: Path, probes: int, seed: int, device: str) -> dict[str, dict]:
    """For each way of drawing: numbers over all prompts, and the share of wholly right pictures by category."""
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    network = AutoModelForImageClassification.from_pretrained(judge).eval()
    combos = torch.arange(len(COMBOS)).repeat(probes)
    report = {}
    for name, way in WAYS.items():
        pictures = torch.cat([draw(pipe, way, seed, probe) for probe in range(probes)])  # (120 probes, 3, 32, 32)
        said = network(prepare(pictures)).logits.log_softmax(1)  # (120 probes, 120)
        guess = said.argmax(1)
        kind, colour = guess // len(COLOURS) == combos // len(COLOURS), guess % len(COLOURS) == combos % len(COLOURS)
        border = torch.cat([pictures[:, :, (0, -1)].flatten(1), pictures[:, :, :, (0, -1)].flatten(1)], 1)
        report[name] = {
            "all": {
                "pictures": len(pictures),
                "joint": share(kind & colour),
                "category": share(kind),
                "colour": share(colour),
                "mean_log_p": round(said.gather(1, combos[:, None]).mean().item(), 4),
                "white_border": share(border > 0.95),
            },
            "joint_by_category": {
                category: share((kind & colour)[combos // len(COLOURS) == number])
                for number, category in enumerate(CATEGORIES)
            },
        }
    return report


def share(hits: Tensor) -> float:
    return round(hits.float().mean().item(), 4)
