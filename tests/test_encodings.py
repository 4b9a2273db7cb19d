"""Prompts go through the text encoders once a run, into a table that keeps every number and is keyed by what made it."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import PROMPTS, folder_of, session, works

from fashiondpo_pipeline import encodings
from fashiondpo_pipeline.generators.stable_diffusion import StableDiffusion
from fashiondpo_pipeline.generators.text2img import text2img


def parts(dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    return {"tokens": torch.randn(3, 4, generator=random).to(dtype), "pooled": torch.randn(5, generator=random).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_gives_back_every_number(tmp_path, dtype):
    """bfloat16 comes back as float32, which holds each of its numbers."""
    kept = {"a red dress": parts(dtype), "": parts(dtype, 1)}
    pq.write_table(encodings.to_table(kept), tmp_path / "prompts.parquet")
    found = encodings.of_table(pq.read_table(tmp_path / "prompts.parquet"))
    assert list(found) == list(kept)
    for prompt, own in kept.items():
        for name, part in own.items():
            assert found[prompt][name].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
            assert torch.equal(found[prompt][name].to(dtype), part)


def test_others_can_read_the_table():
    table = encodings.to_table({"a red dress": parts(torch.float16)})
    assert table.schema.names == ["prompt", "tokens", "pooled"]
    layout = json.loads(table.schema.field("tokens").metadata[b"layout"])
    assert layout == {"shape": [3, 4], "dtype": "float16"}
    assert len(table["tokens"][0].as_py()) == 3 * 4 * 2


def test_a_part_of_the_table_is_a_table():
    table = encodings.to_table({"a": parts(seed=0), "b": parts(seed=1)})
    found = encodings.of_table(table.filter(pa.array([False, True])))
    assert list(found) == ["b"] and torch.equal(found["b"]["tokens"], parts(seed=1)["tokens"])


# -- in a run


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The prompts that have gone through the text encoders."""
    asked, encode = [], StableDiffusion.encode

    def counted(self, prompt):
        asked.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(StableDiffusion, "encode", counted)
    return asked


def test_each_prompt_is_encoded_once_for_all_rounds(place, encoded, tiny_sd):
    quick = [word for knob in ("sample.guidance=2", "sample.negative=ugly", "sample.candidates=2", "sample.steps=2", "pair.margin=0",
                               "finetune.window=[0, 1]", "finetune.epochs=1") for word in ("--set", knob)]
    works("round", "--n", "2", *quick)
    assert sorted(encoded) == sorted([*PROMPTS, "ugly", ""])
    works("round", "--n", "2", *quick, "--set", "finetune.beta=50")
    works("round", "--n", "2", *quick, "--set", "finetune.objective=diffusion_dpo", "--set", "finetune.condition_dropout=0.2")
    assert len(encoded) == len(PROMPTS) + 2, "other pairs, rounds and objectives read the same table"

    made = session("sample.negative=ugly")
    found = made.encodings(made.chain(1).encode, ["a red bag", "ugly"])
    generator = text2img(str(tiny_sd))
    generator.remember(["a red bag", "ugly"])
    assert found.keys() == {"a red bag", "ugly"}
    assert all(torch.equal(found[prompt]["tokens"], generator.encodings[prompt]["tokens"]) for prompt in found)


def test_a_broken_off_encoding_goes_on(place, encoded, monkeypatch):
    made, write = session(), []
    monkeypatch.setattr("stages.encode.A_SHARD", 5)
    step = made.chain(1).encode
    counted = StableDiffusion.encode

    def stops(self, prompt):
        if len(encoded) == 7:
            raise KeyboardInterrupt
        return counted(self, prompt)

    with monkeypatch.context() as once:
        once.setattr(StableDiffusion, "encode", stops)
        with pytest.raises(KeyboardInterrupt):
            made.execute([step])
    assert not made.run.done(step)
    write += encoded
    made.execute([step])
    assert sorted(set(encoded)) == sorted([*PROMPTS, ""])
    assert encoded[7:] == [prompt for prompt in sorted([*PROMPTS, ""]) if prompt not in write[:5]], "the first shard was whole"
    assert json.loads((folder_of(place / "runs/t", 0, "encode") / "manifest.json").read_text())["numbers"] == {"prompts": 13}


def changed(folder, target, part, file):
    """A copy of a model with one number of one part's weights changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / part / file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, target / part / file, metadata={"format": "pt"})
    return target


def test_other_text_encoders_make_it_stale_and_another_denoiser_does_not(place, tiny_sd, tmp_path):
    def claim(*sets):
        return session(*sets).chain(1).encode.fingerprint

    other_text = changed(tiny_sd, tmp_path / "text", "text_encoder", "model.safetensors")
    other_unet = changed(tiny_sd, tmp_path / "unet", "unet", "diffusion_pytorch_model.safetensors")
    before = claim()
    assert claim(f"generator.model={other_unet}") == before
    assert claim(f"generator.model={other_text}") != before
    assert claim("sample.negative=ugly") != before
    assert claim("generator.dtype=bfloat16") != before
    assert session(f"generator.model={other_unet}").chain(1).rounds[1].sample.fingerprint != session().chain(1).rounds[1].sample.fingerprint
