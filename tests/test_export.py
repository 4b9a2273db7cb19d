"""What leaves a run draws in stock diffusers what `fdpo generate` draws, in every family and format."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from families import PART, PIPELINES, QUIET, denoiser_of, pipeline, say_something
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from whole_runs import prepare, refused, works

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.generators.text2img import text2img

TWO = "ignore:Already found a `peft_config`:UserWarning"  # two LoRAs in one pipeline, as meant
pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.filterwarnings(TWO)]
CHEAP = ("finetune.epochs=1", "finetune.signal=error", "finetune.objective=diffusion_dpo", "finetune.learning_rate=0.05", "pair.margin=0.0",
         "sample.candidates=2", "sample.steps=2", "sample.height=16", "sample.width=16", "sample.tile=4", "evaluate.pictures=1", "rounds=1",
         "prompts.most_train=2", "prompts.most_held_out=1", "sample.eta=0", "finetune.window=[0.0, 1.0]")
PROMPT, SEED, STEPS = "a red dress", 11, 2
GUIDANCE = {"sd": 3.0, "sdxl": 3.0, "sd3": 3.0, "flux": 3.5}


def knobs(*sets):
    return tuple(word for text in (*CHEAP, *sets) for word in ("--set", text))


def made(folder, family, request, monkeypatch, *sets):
    """A working folder, entered, with one round of a family."""
    model = request.getfixturevalue(f"tiny_{family}")
    monkeypatch.chdir(prepare(folder, model, request.getfixturevalue("tiny_clip")))
    asked = knobs(f"sample.guidance={GUIDANCE[family]}", *sets)
    for stage in ("sample", "score", "pair", "finetune"):
        works(stage, "--round", "1", *asked)
    return model, asked


def ours(asked, *more):
    told = works("generate", PROMPT, "--count", "2", "--seed", str(SEED), *more, *asked)
    return [np.asarray(Image.open(file)).astype(float) for file in told.out.split()]


def stock(pipe, family):
    if family in ("sd", "sdxl"):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    seeds = [torch.Generator().manual_seed(SEED + i) for i in range(2)]
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE[family], "height": 16, "width": 16, "output_type": "np"}
    return list(pipe([PROMPT] * 2, generator=seeds, **options).images * 255)


def alike(first, second, most=2):
    return max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) <= most


def style_of(model, family, folder):
    """A LoRA of somebody else, for the denoiser."""
    denoiser = denoiser_of(pipeline(model, family))
    adapters.attach(denoiser, 3, 6.0, "attention+mlp", seed=5)
    adapters.save(say_something(denoiser, seed=3, size=0.2), folder, PIPELINES[family])
    return folder / adapters.FILE


@pytest.mark.parametrize("family", PIPELINES)
def test_a_rounds_lora_draws_the_same_in_stock_diffusers(family, tmp_path, request, monkeypatch):
    model, asked = made(tmp_path, family, request, monkeypatch)
    drawn = ours(asked)
    told = works("export", "plain", *asked)
    assert told.out == "plain/pytorch_lora_weights.safetensors\n"
    assert told.err == f'use it: {PIPELINES[family].__name__}.from_pretrained(...).load_lora_weights("plain")\n'
    assert works("export", "kohya", "--format", "kohya", *asked).out == "kohya/t-round1.safetensors\n"
    bare = stock(pipeline(model, family), family)
    assert not alike(bare, drawn, 5), "the LoRA should change something, or this test shows nothing"
    for folder, name in (("plain", adapters.FILE), ("kohya", "t-round1.safetensors")):
        pipe = pipeline(model, family)
        pipe.load_lora_weights(tmp_path / folder, weight_name=name)
        assert alike(stock(pipe, family), drawn)
    names = list(load_file(tmp_path / "kohya/t-round1.safetensors"))
    assert all(name.startswith("lora_unet_" if PART[family] == "unet" else "transformer.") for name in names)


@pytest.mark.parametrize("family", PIPELINES)
def test_the_style_a_run_started_from_and_its_round_leave_as_one_file(family, tmp_path, request, monkeypatch):
    style = style_of(request.getfixturevalue(f"tiny_{family}"), family, tmp_path / "style")
    model, asked = made(tmp_path, family, request, monkeypatch, f"generator.lora={style}", "generator.lora_scale=0.5")
    drawn = ours(asked)
    for form, name in (("diffusers", adapters.FILE), ("kohya", "t-round1.safetensors")):
        told = works("export", form, "--format", form, "--merge", *asked)
        assert "goes on top" not in told.err
        pipe = pipeline(model, family)
        pipe.load_lora_weights(tmp_path / form, weight_name=name)
        assert alike(stock(pipe, family), drawn)
    told = works("export", "alone", *asked)
    assert told.err.endswith(f"it goes on top of {style} at 0.5, which the run started from: fuse that first, or export with --merge\n")
    pipe = pipeline(model, family)
    pipe.load_lora_weights(tmp_path / "alone")
    assert not alike(stock(pipe, family), drawn, 5), "without the style it is another model"
    pipe.unload_lora_weights()
    pipe.load_lora_weights(style.parent, adapter_name="style")
    pipe.load_lora_weights(tmp_path / "alone", adapter_name="round")
    pipe.set_adapters(["style", "round"], [0.5, 1.0])
    assert alike(stock(pipe, family), drawn)
    lineage = json.loads((tmp_path / "diffusers/lineage.json").read_text())
    assert (lineage["lora"], lineage["lora_scale"], lineage["merged"], lineage["format"]) == (str(style), 0.5, True, "diffusers")


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_other_adapters_leave_as_what_they_are(kind, tmp_path, request, monkeypatch):
    model, asked = made(tmp_path, "sd", request, monkeypatch, f"finetune.adapter={kind}", "finetune.alpha=4.0")
    drawn = ours(asked)
    works("export", "plain", *asked)
    works("export", "kohya", "--format", "kohya", *asked)
    pipe = pipeline(model, "sd")
    pipe.load_lora_weights(tmp_path / "plain")
    assert alike(stock(pipe, "sd"), drawn)
    with safe_open(tmp_path / "kohya/t-round1.safetensors", "pt") as file:
        scales = [name for name in file.keys() if name.endswith(".dora_scale")]  # noqa: SIM118 - safe_open is no dict
    assert bool(scales) == (kind == "dora")
    again = ("--set", f"generator.lora={tmp_path / 'kohya/t-round1.safetensors'}")
    assert alike(ours((*asked, *again), "--round", "0", "--out", "back"), drawn), "fused into the base it is the tuned model"


def test_a_fully_tuned_denoiser_leaves_whole(tmp_path, request, monkeypatch):
    style = style_of(request.getfixturevalue("tiny_sd"), "sd", tmp_path / "style")
    model, asked = made(tmp_path, "sd", request, monkeypatch, "finetune.adapter=full", "finetune.learning_rate=0.002", f"generator.lora={style}")
    told = works("export", "whole", *asked)
    assert told.out == "whole/diffusion_pytorch_model.safetensors\n"
    assert told.err == 'use it: StableDiffusionPipeline.from_pretrained(..., unet=UNet2DConditionModel.from_pretrained("whole"))\n'
    pipe = pipeline(model, "sd", unet=UNet2DConditionModel.from_pretrained(tmp_path / "whole"))
    drawn = ours(asked)
    assert alike(stock(pipe, "sd"), drawn), "the style is in its weights"
    assert not alike(stock(pipeline(model, "sd"), "sd"), drawn, 5)
    assert refused("export", "k", "--format", "kohya", *asked) == (
        "--format kohya is for LoRAs, and this round tuned the whole denoiser (finetune.adapter: full): export it as diffusers")


def test_the_negative_lora_leaves_too(tmp_path, request, monkeypatch):
    _, asked = made(tmp_path, "sd", request, monkeypatch, "finetune.negative=true")
    assert works("export", "k", "--negative", "--format", "kohya", *asked).out == "k/t-round1-negative.safetensors\n"
    works("export", "plain", "--negative", *asked)
    works("export", "tuned", *asked)
    (trained,) = (tmp_path / "runs/t/round-01").glob("negative-*/adapter/*.safetensors")
    assert (tmp_path / "plain" / adapters.FILE).read_bytes() == trained.read_bytes()
    assert (tmp_path / "tuned" / adapters.FILE).read_bytes() != trained.read_bytes()
    assert json.loads((tmp_path / "plain/lineage.json").read_text())["finetune"]["config"]["swapped"] is True


def test_what_cannot_be_exported(finished, tiny_sd):
    assert refused("export", "x", "--format", "kohia") == "--format: there is no 'kohia'; did you mean 'kohya'?"
    assert refused("export", "x", "--merge") == (
        "--merge: the run started from the bare model (generator.lora is null): export without --merge")
    assert not (finished / "x").exists()


def test_a_dora_style_is_not_merged(tmp_path, request, monkeypatch):
    denoiser = text2img(str(request.getfixturevalue("tiny_sd"))).denoiser
    adapters.attach(denoiser, 2, 2.0, "attention", seed=0, kind="dora")
    adapters.save(say_something(denoiser), tmp_path / "style", PIPELINES["sd"])
    file = tmp_path / "style" / adapters.FILE
    _, asked = made(tmp_path, "sd", request, monkeypatch, f"generator.lora={file}")
    assert refused("export", "x", "--merge", *asked) == (
        f"{file} is a DoRA, which rescales whole rows: it cannot be merged exactly; export without --merge and fuse it first")
    assert not (tmp_path / "x").exists()
