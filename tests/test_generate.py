"""`fdpo generate` draws what it is asked for, and guides away from a round's negative LoRA as the formula says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from whole_runs import prepare, refused, session, works

from fashiondpo_pipeline.sampling import Guidance

NEGATIVE = ("--set", "finetune.negative=true")
ONE = ("--set", "rounds=1", "--set", "prompts.most_train=3", "--set", "finetune.learning_rate=0.05")


def pictures(told):
    return [np.asarray(Image.open(file)).astype(float) for file in told.out.split()]


def make(*sets):
    """One round that has a negative LoRA too."""
    for stage in ("sample", "score", "pair", "finetune"):
        works(stage, "--round", "1", *NEGATIVE, *ONE, *sets)


def by_hand(seed, scale=3.0, acting=(0, 1, 2, 3), sets=()):
    """The walk with both LoRAs as one would write it down: two models, one formula."""
    made = session(*NEGATIVE[1::2], *ONE[1::2], *sets[1::2])
    r = made.chain(1).rounds[1]

    def says(step, x, t, prompt):
        generator = made.generator(step)
        return generator.denoise(x, t, generator.condition([{"prompt": prompt}], Guidance()).branch(0))

    generator = made.generator()
    walk = generator.schedule(4)
    x = torch.randn(1, *generator.latent_shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        for step, t in enumerate(walk.timesteps[:, None]):
            wanted, unwanted = says(r.finetune, x, t, "a red dress"), says(r.negative, x, t, "")
            x = walk.mean(unwanted + scale * (wanted - unwanted) if step in acting else wanted, x, t, eta=0.0)
    return generator.decode(x)[0][0].astype(float)


def test_the_negative_lora_is_the_branch_that_guidance_leads_away_from(place):
    make()
    asked = ("generate", "a red dress", "--count", "3", "--seed", "7", "--guidance", "3", "--eta", "0", *NEGATIVE, *ONE)
    told = works(*asked, "--negative")
    assert all("-round1-negative-seed" in file for file in told.out.split())
    for i, drawn in enumerate(pictures(told)):
        assert np.abs(drawn - by_hand(7 + i)).max() <= 1
    plain = works(*asked)
    assert not set(plain.out.split()) & set(told.out.split()), "neither overwrites the other"
    assert max(np.abs(a - b).max() for a, b in zip(pictures(told), pictures(plain), strict=True)) > 5


def test_the_negative_lora_leaves_no_trace(place):
    make()
    asked = ("generate", "a red dress", "--count", "1", "--guidance", "3", *NEGATIVE, *ONE)
    before = pictures(works(*asked))
    works(*asked, "--negative")
    assert np.array_equal(before, pictures(works(*asked)))


def test_outside_the_guidance_interval_the_negative_lora_says_nothing(place):
    late = ("--set", "sample.guidance_interval=[0.5, 1.0]")  # of four steps the last two
    make(*late)
    told = works("generate", "a red dress", "--count", "1", "--guidance", "3", "--eta", "0", "--negative", *NEGATIVE, *ONE, *late)
    assert np.abs(pictures(told)[0] - by_hand(0, acting=(2, 3), sets=late)).max() <= 1
    assert np.abs(pictures(told)[0] - by_hand(0, sets=late)).max() > 1


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_every_kind_of_adapter_can_be_led_away_from(place, kind):
    kind = ("--set", f"finetune.adapter={kind}", "--set", "finetune.learning_rate=0.005")
    make(*kind)
    asked = ("generate", "a red dress", "--count", "1", "--guidance", "3", "--eta", "0", *NEGATIVE, *ONE, *kind)
    plain, away = works(*asked), works(*asked, "--negative")
    assert np.abs(pictures(plain)[0] - pictures(away)[0]).max() > 1


def test_what_cannot_be_led_away_from(finished, tiny_flux, tiny_clip):
    assert refused("generate", "a hat", "--negative", "--guidance", "3") == (
        "--negative: round 3 has no negative LoRA: set finetune.negative to true and run `fdpo finetune --round 3`, which trains it beside")
    assert refused("generate", "a hat", "--negative", "--guidance", "3", "--round", "0") == (
        "--negative: round 0 is the base: it has no negative LoRA")
    assert refused("generate", "a hat", "--negative") == (
        "--negative: guidance 1 has no second branch to draw with the negative LoRA; pass --guidance, such as 5")
    assert "negative" in refused("generate", "a hat", "--negative", "--guidance", "3", *NEGATIVE), "it has not been trained yet"


def test_a_model_whose_guidance_is_a_number_has_no_second_branch(tmp_path, tiny_flux, tiny_clip, monkeypatch):
    monkeypatch.chdir(prepare(tmp_path, tiny_flux, tiny_clip))
    small = ("--set", "sample.height=16", "--set", "sample.width=16")
    make(*small)
    assert refused("generate", "a hat", "--negative", "--guidance", "3", *NEGATIVE, *ONE, *small) == (
        f"--negative: {tiny_flux} takes guidance as a number and has no second branch for a negative LoRA")


def test_every_prompt_of_a_file_is_drawn_as_if_it_were_alone(finished):
    (finished / "wanted.txt").write_text("a red dress\na hat\n")
    together = works("generate", "--prompts", "wanted.txt", "--count", "2", "--out", "a").out.split()
    alone = [works("generate", prompt, "--count", "2", "--out", "b").out.split() for prompt in ("a red dress", "a hat")]
    assert [Path(file).name for file in together] == [Path(file).name for files in alone for file in files]
    for file in together:
        assert Path(file).read_bytes() == (Path("b") / Path(file).name).read_bytes()


def test_more_pictures_than_a_tile_are_those_of_their_seeds(finished):
    many = works("generate", "a hat", "--count", "10", "--seed", "3", "--out", "many").out.split()  # the tile is 8
    assert [Path(file).stem.rpartition("seed")[2] for file in many] == [str(seed) for seed in range(3, 13)]
    late = works("generate", "a hat", "--count", "8", "--seed", "5", "--out", "late").out.split()
    for file in late:
        assert Path(file).read_bytes() == (Path("many") / Path(file).name).read_bytes()


def test_a_prompt_or_a_file_and_not_both(finished):
    (finished / "wanted.txt").write_text("a hat\n")
    both = "say what to draw: a prompt, or --prompts FILE, and not both"
    assert refused("generate") == both
    assert refused("generate", "a hat", "--prompts", "wanted.txt") == both
    assert refused("generate", "  ") == "the prompt is empty: say what to draw"
    assert refused("generate", "--prompts", "no.txt").endswith("there is no file no.txt; check the path (relative ones start in the working folder)")


def test_a_broken_picture_is_not_written_and_the_others_are(finished, monkeypatch):
    from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel

    decode = DiffusersModel.decode
    monkeypatch.setattr(DiffusersModel, "decode", lambda self, x: decode(self, torch.cat([x[:1] * torch.nan, x[1:]])))
    assert refused("generate", "a hat", "--count", "3", "--out", "some") == (
        "1 of 3 pictures are not made of numbers and were not written: use generator.dtype float32, or bfloat16 on a GPU")
    assert len(list((finished / "some").glob("*.png"))) == 2
