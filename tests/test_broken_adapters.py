"""Weights that hold numbers that are none are refused where they are read and not written where they are made; files have the umask's mode."""

import os
import stat

import pytest
import torch
from families import QUIET
from safetensors.torch import load_file, save_file
from whole_runs import fdpo, prepare, refused, sealed_anew, works

from fashiondpo_pipeline import adapters

pytestmark = pytest.mark.filterwarnings(QUIET)
FEW = ("--set", "prompts.most_train=2", "--set", "prompts.most_held_out=1", "--set", "sample.candidates=2", "--set", "sample.steps=4",
       "--set", "evaluate.pictures=1", "--set", "pair.margin=0.0", "--set", "finetune.epochs=1", "--set", "rounds=1")


@pytest.fixture
def place(tmp_path, tiny_sd, tiny_clip, monkeypatch):
    """A working folder, entered."""
    monkeypatch.chdir(prepare(tmp_path, tiny_sd, tiny_clip))
    return tmp_path


def spoil(file, bad=float("nan")):
    """One number of the file is none; the manifest says that it was written so, as earlier versions did."""
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = bad
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    save_file(tensors, file, metadata=notes)
    sealed_anew(file.parent.parent)
    return name


@pytest.mark.parametrize("sets", [(), ("finetune.adapter=full", "finetune.learning_rate=0.0001")], ids=["LoRA", "full"])
def test_an_adapter_of_a_round_with_a_number_that_is_none_is_named_wherever_it_is_read(place, sets):
    asked = (*FEW, *(word for text in sets for word in ("--set", text)))
    works("round", *asked)
    (file,) = place.glob("runs/t/round-01/finetune-*/adapter/*.safetensors")
    name = spoil(file)
    sentence = f"{file.relative_to(place)}: {name} holds numbers that are NaN or infinite; run its round again, or name another folder"
    for command in (["generate", "a red dress"], ["export", "out"], ["round", "-n", "2"]):
        assert refused(*command, *asked).endswith(sentence), command
    assert not (place / "out").exists()
    if not sets:
        assert f"{name} holds numbers that are NaN" in refused("export", "out", "--format", "kohya", *asked)


def test_a_lora_to_start_from_is_refused_before_anything_is_made(place):
    name = "lora_unet_mid_block_resnets_0_conv1.diff"
    save_file({name: torch.full((8, 8, 3, 3), float("inf"))}, place / "style.safetensors")
    assert refused("round", *FEW, "--set", "generator.lora=style.safetensors") == (
        f"style.safetensors: {name} holds numbers that are NaN or infinite; get the file anew, or name another one")
    assert not list(place.glob("runs/t/*/*/parts/*"))


def test_a_training_that_ends_in_such_numbers_keeps_nothing(place, monkeypatch):
    """In the last step, after which no loss would show it: the gradient was sound, and the weight that it led to is not."""
    step = torch.optim.AdamW.step

    def overflowing(self, *arguments, **options):
        found = step(self, *arguments, **options)
        self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    asked = (*FEW, "--set", "finetune.groups=99", "--set", "finetune.timesteps=99")  # one step in all
    told = fdpo("round", *asked)
    assert told.code == 1
    assert "1 of the trained tensors hold numbers that are NaN or infinite (such as " in told.err
    assert "lower finetune.learning_rate or finetune.beta" in told.err
    assert not list(place.glob("runs/t/round-01/finetune-*/adapter*"))
    assert not list(place.glob("runs/t/round-01/finetune-*/manifest.json"))


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_every_file_has_the_mode_that_the_umask_asks_for(place, umask, monkeypatch):
    """The run, what it remembers, exports, pictures, pair sets: a colleague in the group reads all of it."""
    monkeypatch.setenv("FDPO_CACHE", str(place / "cache"))
    before = os.umask(umask)
    try:
        works("round", *FEW)
        works("export", "plain", *FEW)
        works("export", "kohya", "--format", "kohya", *FEW)
        works("generate", "a red dress", "--count", "1", "--out", "drawn", *FEW)
        works("export-pairs", "csv", "pairs", *FEW)
    finally:
        os.umask(before)
    made = [file for folder in ("runs", "plain", "kohya", "drawn", "pairs", "cache") for file in (place / folder).rglob("*") if file.exists()]
    assert sum(file.suffix == ".safetensors" for file in made) == 3
    wrong = {str(file): oct(stat.S_IMODE(file.stat().st_mode)) for file in made
             if stat.S_IMODE(file.stat().st_mode) != (0o777 if file.is_dir() else 0o666) & ~umask}
    assert not wrong


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_whole_denoiser_has_the_umasks_mode_too(tiny_sd, tmp_path):
    from families import denoiser_of, pipeline

    denoiser = denoiser_of(pipeline(tiny_sd, "sd"))
    adapters.attach(denoiser, 2, 2.0, "attention", seed=0, kind="full")
    adapters.save(denoiser, tmp_path / "full", None)
    (tmp_path / "fresh").touch()
    assert {file.stat().st_mode for file in (tmp_path / "full").iterdir()} == {(tmp_path / "fresh").stat().st_mode}
