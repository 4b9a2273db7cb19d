"""Where to begin with a real model: what `fdpo init --preset NAME` writes, over the defaults. Revisions are pinned: a branch can move.

The settings follow what each model's own pipeline draws with, and the ranges that the literature trains with (beta 2000 to 5000 for
Stable Diffusion, 100 to 2000 for flows; learning rates 1e-5 to 1e-4). None of them was tuned here on real weights.
"""

from typing import Any

_WATCHED = {
    "experts": {
        "clip_t": {"use": "clip_text", "options": {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}},
        "watcher": {"use": "clip_text", "options": {"model": "ViT-L-14", "pretrained": "datacomp_xl_s13b_b90k"}},
    },
    "prompts": {"file": "prompts.txt"},
    "pair": {"weights": {"clip_t": 1.0}, "over": "group", "margin_later": 1.0},
    "evaluate": {"judge": "watcher", "pictures": 4, "keep": "best"},
}
_TUNING = {
    "beta": 3000.0, "learning_rate": 3e-5, "rate_later": 1.0, "kept_later": 1.0, "epochs": 5, "timesteps": 5, "rank": 16, "checkpointing": True,
    "window": [0.0, 0.9],
}
# Eight steps in two runs of neighbours: where a step led is the next one's start, so that a candidate of 512 pixels keeps 11 latents,
# 0.34 MiB; eight steps spread out keep 17.
_OF_30, _OF_20 = [4, 5, 6, 7, 16, 17, 18, 19], [2, 3, 4, 5, 11, 12, 13, 14]
_FLOW = _TUNING | {"beta": 500.0, "targets": "attention"}

PRESETS: dict[str, dict[str, Any]] = {
    "sd15": _WATCHED | {
        "name": "sd15",
        "generator": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "revision": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
                      "dtype": "bfloat16"},
        "sample": {"prompts": None, "candidates": 7, "steps": 30, "guidance": 5.0, "save": _OF_30, "tile": 16},
        "finetune": _TUNING | {"micro_batch": 14},
    },
    "sdxl": _WATCHED | {
        "name": "sdxl",
        "generator": {"model": "stabilityai/stable-diffusion-xl-base-1.0", "revision": "462165984030d82259a11f4367a4eed129e94a7b",
                      "dtype": "bfloat16"},
        "sample": {"prompts": None, "candidates": 7, "steps": 30, "guidance": 5.0, "save": _OF_30, "tile": 8},
        "finetune": _TUNING | {"micro_batch": 7},
    },
    "sd35": _WATCHED | {
        "name": "sd35",
        "generator": {"model": "stabilityai/stable-diffusion-3.5-medium", "revision": "b940f670f0eda2d07fbb75229e779da1ad11eb80",
                      "dtype": "bfloat16"},
        "sample": {"prompts": None, "candidates": 7, "steps": 20, "guidance": 4.5, "eta": 0.7, "save": _OF_20, "tile": 8},
        "finetune": _FLOW | {"micro_batch": 7},
    },
    "flux": _WATCHED | {
        "name": "flux",
        "generator": {"model": "black-forest-labs/FLUX.1-dev", "revision": "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21", "dtype": "bfloat16"},
        "sample": {"prompts": None, "candidates": 7, "steps": 20, "guidance": 3.5, "eta": 0.7, "save": _OF_20, "tile": 4},
        "finetune": _FLOW | {"micro_batch": 2},
    },
}
