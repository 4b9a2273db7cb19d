"""A model comes from a folder, a single file or the hub's cache, and draws the same; what cannot be drawn with is refused in a sentence."""

import json
import pickle
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import whole_runs
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from original_names import joint_transformer, single_file
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.checkpoints import OFFLINE, open_source
from fashiondpo_pipeline.diffusion import add_noise, split
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel, check_answer
from fashiondpo_pipeline.generators.fields import SCHEDULERS
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.sampling import Guidance, sample

ROWS = [{"prompt": "a red dress"}, {"prompt": "a hat"}]


def refused(*arguments, **options):
    with pytest.raises(UserError) as problem:
        text2img(*arguments, **options).denoiser  # noqa: B018 - parts are read when first used
    return str(problem.value)


@torch.no_grad()
def answer(generator):
    """(prediction, pictures) of two prompts."""
    x = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    condition, schedule = generator.condition(ROWS, Guidance()), generator.schedule(2)
    said = generator.denoise(x, schedule.timesteps[:1].repeat(2), condition.branch(0))
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    path = sample(generator.denoise, schedule, condition, noise, generator.latent_shape, eta=0.0)
    return said, generator.decode(path.x_0)[0]


def same(first, second):
    (said, drawn), (also_said, also_drawn) = answer(first), answer(second)
    return torch.equal(said, also_said) and (drawn == also_drawn).all()


def changed(folder, target, part, **values):
    """A copy of a folder with some settings of one part changed ("" for the whole)."""
    shutil.copytree(folder, target)
    names = ("config.json", "scheduler_config.json") if part else ("model_index.json",)
    for path in (target / part / name for name in names if (target / part / name).is_file()):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


# -- single files


@pytest.fixture(scope="module")
def one_file(tiny_sd, tmp_path_factory):
    """Stable Diffusion 1.x as web interfaces trade it."""
    file = tmp_path_factory.mktemp("single") / "sd.safetensors"
    save_file(single_file(tiny_sd, 1, {1}), file)
    return file


def test_a_single_file_is_the_folder_it_was_made_of(tiny_sd, one_file, tmp_path):
    folder = text2img(str(tiny_sd))
    assert same(folder, text2img(str(one_file), config=str(tiny_sd)))
    nested = tmp_path / "sd.ckpt"
    torch.save({"state_dict": load_file(one_file), "global_step": 3}, nested)
    assert same(folder, text2img(str(nested), config=str(tiny_sd)))
    old = tmp_path / "old.ckpt"
    torch.save({"state_dict": load_file(one_file)}, old, _use_new_zipfile_serialization=False)
    assert same(folder, text2img(str(old), config=str(tiny_sd)))


def test_a_single_file_is_read_part_by_part_in_the_type_asked_for(tiny_sd, one_file, capfd):
    generator = text2img(str(one_file), config=str(tiny_sd), dtype="bfloat16")
    assert generator.denoiser.dtype == torch.bfloat16
    assert generator.vae.dtype == torch.float32
    assert "text" not in vars(generator)
    assert same(text2img(str(tiny_sd), dtype="bfloat16"), generator)
    assert "should be kept in float32" not in "".join(capfd.readouterr())


def test_weights_of_the_configuration_are_not_read_where_the_file_has_its_own(tiny_sd, one_file, tmp_path):
    shape = shutil.copytree(tiny_sd, tmp_path / "shape")
    for weights in shape.glob("*/*.safetensors"):
        weights.unlink()
    assert same(text2img(str(tiny_sd)), text2img(str(one_file), config=str(shape)))


@pytest.fixture(scope="module")
def two_widths(tiny_sdxl, tmp_path_factory):
    """A Stable Diffusion XL folder whose second text encoder is twice as wide as its first: a file tells them apart by that."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, local_files_only=True)
    torch.manual_seed(0)
    text = pipe.text_encoder_2.config.to_dict() | {"hidden_size": 32, "projection_dim": 32}
    wide = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(text))
    unet = UNet2DConditionModel.from_config(
        dict(pipe.unet.config) | {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 6 * 8 + 32})
    folder = tmp_path_factory.mktemp("wide") / "sdxl"
    StableDiffusionXLPipeline(**pipe.components | {"text_encoder_2": wide, "unet": unet}, add_watermarker=False).save_pretrained(folder)
    return folder


def test_a_single_file_of_sdxl_is_the_folder_it_was_made_of(two_widths, tmp_path):
    save_file(single_file(two_widths, 2, {0}), tmp_path / "xl.safetensors")
    shape = shutil.copytree(two_widths, tmp_path / "shape")
    for weights in shape.glob("*/*.safetensors"):
        weights.unlink()
    assert same(text2img(str(two_widths)), text2img(str(tmp_path / "xl.safetensors"), config=str(shape)))


def test_parts_that_a_single_file_lacks_are_the_folders(two_widths, tmp_path):
    tensors = single_file(two_widths, 2, {0})
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model")}
    save_file(tensors, tmp_path / "xl.safetensors")
    assert same(text2img(str(two_widths)), text2img(str(tmp_path / "xl.safetensors"), config=str(two_widths)))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_file_with_the_transformer_alone_is_enough(family, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{family}")
    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    tensors = {name: tensor * 1.25 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "transformer.safetensors")
    other = shutil.copytree(folder, tmp_path / "other")
    save_file(tensors, other / "transformer/diffusion_pytorch_model.safetensors")
    size = {"height": 16, "width": 16}
    found = text2img(str(tmp_path / "transformer.safetensors"), config=str(folder), **size)
    assert same(text2img(str(other), **size), found)
    assert not same(text2img(str(folder), **size), found)


def test_a_transformer_of_sd3_in_stabilitys_names_is_the_folders(tiny_sd3, tmp_path):
    tensors = load_file(tiny_sd3 / "transformer/diffusion_pytorch_model.safetensors")
    save_file(joint_transformer(tensors, 2), tmp_path / "sd3.safetensors")
    shape = shutil.copytree(tiny_sd3, tmp_path / "shape")
    (shape / "transformer/diffusion_pytorch_model.safetensors").unlink()
    assert same(text2img(str(tiny_sd3)), text2img(str(tmp_path / "sd3.safetensors"), config=str(shape)))


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("end", ["ckpt", "pt", "bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_its_code_not_run(tiny_sd, tmp_path, end, zipped):
    file, sprung = tmp_path / f"sd.{end}", tmp_path / "sprung"
    torch.save({"state_dict": {}, "callback": Trap(sprung)}, file, _use_new_zipfile_serialization=zipped)
    assert refused(str(file), config=str(tiny_sd)) == (
        f"generator.model: {file} holds something other than weights, and reading such a pickle can run code: "
        "use a .safetensors of the same model")
    assert not sprung.exists()
    torch.load(file, weights_only=False)
    assert sprung.exists(), "the trap should work, or this test shows nothing"


def test_a_bare_pickle_is_refused_and_its_code_not_run(tiny_sd, tmp_path):
    file, sprung = tmp_path / "sd.ckpt", tmp_path / "sprung"
    file.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    assert "holds something other than weights" in refused(str(file), config=str(tiny_sd))
    assert not sprung.exists()


def test_a_single_file_needs_a_configuration(tiny_sd, one_file, tmp_path):
    assert refused(str(one_file)) == (
        f"generator.model: {one_file} is a single file, which holds weights but not the model's configuration: name a diffusers folder "
        "of the same model in generator.config (its weights are read only for parts that the file lacks)")
    assert refused(str(one_file), config=str(tmp_path)) == (
        f"generator.config: {tmp_path} is not a diffusers folder (no model_index.json); name one that is")
    assert refused(str(tiny_sd), config=str(tiny_sd)) == (
        f"generator.config {tiny_sd}: {tiny_sd} is no single file and has its own configuration; take it out")
    assert refused(str(one_file), config=str(tiny_sd), variant="fp16") == (
        f"generator.variant fp16: {one_file} is a single file, which has no variants; take it out")


def test_a_single_file_of_another_model_than_its_configuration(tiny_sd, tiny_sdxl, tiny_sd3, one_file, tmp_path):
    start = f"generator.model: {one_file} does not fit the StableDiffusion"
    assert refused(str(one_file), config=str(tiny_sdxl)).startswith(start)
    wide = changed(tiny_sd, tmp_path / "wide", "unet", block_out_channels=[8, 32])
    assert refused(str(one_file), config=str(wide)).startswith(start)


def test_a_file_that_is_cut_off(tiny_sd, one_file, tmp_path):
    torch.save(load_file(one_file), tmp_path / "whole.ckpt")
    for whole in (one_file, tmp_path / "whole.ckpt"):
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(whole.read_bytes()[:-500])
        told = refused(str(cut), config=str(tiny_sd))
        assert told.startswith(f"generator.model: {cut} is cut off or damaged (")
        assert told.endswith("); get it anew")


def test_a_file_that_is_not_there_or_no_checkpoint(tiny_sd, tmp_path):
    assert refused("no.safetensors", config=str(tiny_sd)) == (
        f"generator.config {tiny_sd}: no.safetensors is no single file and has its own configuration; take it out")
    assert refused("no.safetensors") == (
        "generator.model: there is nothing at no.safetensors; check the path (relative ones start in the working folder)")
    (tmp_path / "a.gguf").touch()
    assert refused(str(tmp_path / "a.gguf"), config=str(tiny_sd)) == (
        f"generator.model: {tmp_path / 'a.gguf'} is neither a folder nor a checkpoint (.safetensors, .ckpt, .pt, .pth, .bin)")


@pytest.mark.parametrize(("part", "word"), [("unet", "middle_block"), ("text_encoder", "mlp.fc1"), ("vae", "decoder.conv_out")])
def test_a_file_that_lacks_weights_of_a_part_is_refused_not_filled_with_chance(tiny_sd, one_file, tmp_path, part, word):
    file = tmp_path / "some.safetensors"
    save_file({name: tensor for name, tensor in load_file(one_file).items() if word not in name}, file)
    with pytest.raises(UserError, match="does not fit the StableDiffusionPipeline of"):
        open_source(str(file), config=str(tiny_sd)).part(part, torch.float32)


def test_a_part_that_is_neither_in_the_file_nor_in_the_folder(tiny_sd, one_file, tmp_path):
    shape = shutil.copytree(tiny_sd, tmp_path / "shape")
    (shape / "vae/diffusion_pytorch_model.safetensors").unlink()
    file = tmp_path / "no-vae.safetensors"
    save_file({name: tensor for name, tensor in load_file(one_file).items() if not name.startswith("first_stage")}, file)
    with pytest.raises(UserError) as problem:
        text2img(str(file), config=str(shape)).vae  # noqa: B018
    assert str(problem.value) == (
        f"generator.model: there is no vae in {file}, and no weights of one in {shape / 'vae'}; "
        "use a checkpoint with all parts, or name a whole folder in generator.config")


def test_a_single_files_identity_follows_file_and_configuration(tiny_sd, tiny_sd_v, one_file, tmp_path):
    first = open_source(str(one_file), config=str(tiny_sd)).identity()
    assert first == open_source(str(shutil.copy(one_file, tmp_path / one_file.name)), config=str(tiny_sd)).identity()
    assert first != open_source(str(one_file), config=str(tiny_sd_v)).identity()
    save_file({"a": torch.zeros(1)}, tmp_path / one_file.name)
    assert first != open_source(str(tmp_path / one_file.name), config=str(tiny_sd)).identity()


# -- the hub, without a network

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture
def cache(tiny_sd, tiny_sd_v, tmp_path, monkeypatch):
    """The cache as the hub's client leaves it: two commits of someone/sd, main at the older one; returns refs/."""
    place = tmp_path / "hub" / "models--someone--sd"
    for commit, folder in ((OLD, tiny_sd), (NEW, tiny_sd_v)):
        shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(OLD)
    (place / "refs/v2").write_text(NEW)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return place / "refs"


def test_a_hub_id_is_drawn_with_from_the_cache(tiny_sd, tiny_sd_v, cache):
    assert same(text2img("someone/sd"), text2img(str(tiny_sd)))
    assert same(text2img("someone/sd", revision=OLD), text2img(str(tiny_sd)))
    assert same(text2img("someone/sd", revision=NEW), text2img(str(tiny_sd_v)))
    assert text2img("someone/sd", revision="v2").prediction == "v_prediction"


def test_a_hub_ids_identity_is_the_commit_and_a_moved_branch_is_another_model(cache):
    assert open_source("someone/sd").identity() == f"someone/sd@{OLD}"
    assert open_source("someone/sd", revision="v2").identity() == open_source("someone/sd", revision=NEW).identity() == f"someone/sd@{NEW}"
    opened = open_source("someone/sd")
    assert opened.index["_class_name"] == "StableDiffusionPipeline"
    (cache / "main").write_text(NEW)
    assert open_source("someone/sd").identity() == f"someone/sd@{NEW}"
    assert opened.part("scheduler", torch.float32).config.prediction_type == "epsilon", "one source is one commit"


def test_a_commit_is_an_identity_without_network_or_cache(cache):
    pinned = open_source("someone/else", revision=NEW)
    assert pinned.identity() == pinned.text_identity() == f"someone/else@{NEW}"
    with pytest.raises(UserError, match="cannot be loaded"):
        open_source("someone/else", revision="main").identity()


def test_a_hub_id_that_is_not_in_the_cache_says_how_to_work_offline(cache):
    told = refused("someone/else")
    assert told.startswith("generator.model: 'someone/else' cannot be loaded (")
    assert told.endswith(f"); it must be {OFFLINE}")
    assert "hf download ID" in OFFLINE and "HF_HOME" in OFFLINE
    assert refused("someone/sd", revision="9" * 40).startswith("generator.model: 'someone/sd' cannot be loaded (")


def test_a_revision_of_what_lies_here_is_refused(tiny_sd, one_file):
    for place in (tiny_sd, one_file):
        assert refused(str(place), revision="main", config=str(tiny_sd)) == (
            f"generator.revision main: {place} lies here, where its files are what they are; take the revision out, "
            "it picks a commit of a hub id")


# -- folders that cannot be drawn with


def test_a_pipeline_without_a_known_denoiser(tiny_sd, tmp_path):
    other = changed(tiny_sd, tmp_path / "sd", "", _class_name="StableDiffusionInpaintPipeline")
    assert refused(str(other)) == (
        f"generator.model: {other} is a 'StableDiffusionInpaintPipeline', for which no denoiser is known here; "
        "did you mean 'StableDiffusionPipeline'?")
    other = changed(tiny_sd, tmp_path / "video", "", _class_name="WanVideo")
    assert refused(str(other)) == (
        f"generator.model: {other} is a 'WanVideo', for which no denoiser is known here; "
        "known: FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline")
    assert "does not say what the model is (_class_name)" in refused(str(changed(tiny_sd, tmp_path / "nobody", "", _class_name=None)))


def test_an_index_that_does_not_fit(tiny_sd, tmp_path):
    lame = changed(tiny_sd, tmp_path / "a", "", unet=5)
    assert refused(str(lame)) == (
        f"generator.model: the model_index.json of {lame} names no unet, which a StableDiffusionPipeline has; get the model anew")
    strange = changed(tiny_sd, tmp_path / "b", "", unet=["somebodys_code", "Net"])
    assert refused(str(strange)) == (
        f"generator.model: {strange} wants code of 'somebodys_code' for its unet; only diffusers' and transformers' own classes are loaded")
    new = changed(tiny_sd, tmp_path / "c", "", unet=["diffusers", "UNetOfTomorrow"])
    assert refused(str(new)) == (
        f"generator.model: {new} wants diffusers's 'UNetOfTomorrow' for its unet, which the installed version does not have; "
        "install a newer diffusers")
    for text in ("[]", "{"):
        (new / "model_index.json").write_text(text)
        assert refused(str(new)).startswith(f"generator.model: {new / 'model_index.json'} is damaged (")


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_missing_or_cut_off_are_refused_not_filled_with_chance(tiny_sd, tmp_path, part):
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    file, name = folder / f"{part}.safetensors", part.partition("/")[0]
    read = lambda: open_source(str(folder)).part(name, torch.float32)  # noqa: E731
    tensors = load_file(file)
    gone = sorted(tensors)[3]
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as problem:
        read()
    assert str(problem.value).startswith(f"generator.model: the {name} of {folder} lacks 1 of its weights (")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        read()
    file.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        read()


# -- a scheduler that contradicts the model


def test_a_flow_scheduler_on_a_unet(tiny_sd, tiny_sd3, tmp_path):
    folder = changed(tiny_sd, tmp_path / "sd", "", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert refused(str(folder)) == (
        f"generator.model: {folder}: its scheduler is a 'FlowMatchEulerDiscreteScheduler', whose meaning is "
        f"not known here (known: "
        f"{', '.join(sorted(SCHEDULERS))}): use another model")


def test_a_diffusion_scheduler_on_a_flow_model(tiny_sd3, tmp_path):
    folder = changed(tiny_sd3, tmp_path / "sd3", "", scheduler=["diffusers", "DDIMScheduler"])
    assert refused(str(folder)) == (
        f"generator.model: {folder}: its scheduler is a 'DDIMScheduler', whose meaning is not known here "
        f"(known: "
        "FlowMatchEulerDiscreteScheduler): use another model")


def test_noise_cannot_be_predicted_where_there_is_nothing_else(tiny_sd, tiny_sd_v, tmp_path):
    folder = changed(tiny_sd, tmp_path / "sd", "scheduler", rescale_betas_zero_snr=True)
    assert refused(str(folder)) == (
        f"the scheduler of {folder} begins with no signal at all (rescale_betas_zero_snr) and yet predicts 'epsilon', which then says "
        "nothing of the picture: correct its scheduler_config.json (such models predict 'v_prediction')")
    text2img(str(changed(tiny_sd_v, tmp_path / "v", "scheduler", rescale_betas_zero_snr=True)))


def test_a_model_that_finds_the_noise_is_not_taken_for_one_that_predicts_v(tmp_path, tiny_sd_v):
    embedded = changed(locate("embedded:fashion_mini/generator"), tmp_path / "v", "scheduler", prediction_type="v_prediction")
    with pytest.raises(UserError) as problem:
        check_answer(text2img(str(embedded)), 4)
    assert str(problem.value) == (
        "the model's scheduler says 'v_prediction', but its denoiser answers pure noise with that noise (correlation 1.00), "
        "as models do that predict 'epsilon': correct its scheduler_config.json")
    check_answer(text2img("embedded:fashion_mini/generator"), 4)
    check_answer(text2img(str(tiny_sd_v)), 4)


def test_a_trained_model_of_v_is_not_taken_for_one_that_finds_the_noise(tmp_path):
    """The embedded model, which predicts eps, made to say v: signal eps - noise x_0."""
    generator = text2img("embedded:fashion_mini/generator")
    finds, walk = generator.denoise, generator.schedule(1)

    def says_v(x, t, parts):
        x_0, eps = split(walk, finds(x, t, parts), x, t)
        return add_noise(walk, eps, -x_0, t)

    generator.denoise, generator.prediction = says_v, "v_prediction"
    check_answer(generator, 4)
    generator.denoise = finds
    with pytest.raises(UserError, match="answers pure noise with that noise"):
        check_answer(generator, 4)


# -- numbers that overflow


def loud(folder, target, part, name, factor):
    """A copy of a folder in which one weight is multiplied."""
    file = shutil.copytree(folder, target) / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * factor}, file, metadata={"format": "pt"})
    return target


def half_vae(self):
    return self.source.part("vae", torch.float16).requires_grad_(False).eval()


def test_a_half_precision_denoiser_that_overflows_stops_the_run(place, tiny_sd):
    loud(tiny_sd, place / "loud", "unet", "conv_out.weight", 1e6)
    told = whole_runs.refused("sample", "--round", "1", "--set", "generator.model=loud", "--set", "generator.dtype=float16")
    assert told == "round 1: all 24 pictures are broken (the latent is not finite): use generator.dtype float32, or bfloat16 on a GPU"


def test_a_half_precision_vae_that_overflows_stops_the_run(place, tiny_sd, monkeypatch):
    loud(tiny_sd, place / "loud", "vae", "decoder.conv_in.weight", 1e6)
    monkeypatch.setattr(DiffusersModel, "vae", property(half_vae))
    told = whole_runs.refused("sample", "--round", "1", "--set", "generator.model=loud")
    assert told == "round 1: all 24 pictures are broken (the picture is not finite): get the model anew"
    monkeypatch.undo()
    monkeypatch.chdir(place)
    whole_runs.works("sample", "--round", "1", "--set", "generator.model=loud")


def test_one_broken_picture_is_set_aside_with_its_reason_and_the_round_goes_on(place, monkeypatch):
    """Of each decoded batch the first latent is loud enough for half precision to overflow."""
    decode = DiffusersModel.decode

    def overflowing(self, x_0):
        loud = torch.cat([x_0[:1] * 1e6, x_0[1:]])
        return decode(self, loud)

    monkeypatch.setattr(DiffusersModel, "vae", property(half_vae))
    monkeypatch.setattr(DiffusersModel, "decode", overflowing)
    told = whole_runs.works("round", "--n", "1")
    assert "round 1: 3 of 24 pictures are broken and take no part (the picture is not finite)" in told.err
    run = place / "runs/t"
    rows = whole_runs.table(whole_runs.folder_of(run, 1, "sample"), "candidates").to_pylist()
    broken = {(row["group"], row["candidate"]) for row in rows if row["fault"]}
    assert len(rows) == 24
    assert len(broken) == 3
    scores = whole_runs.table(whole_runs.folder_of(run, 1, "score-clip_t"), "scores").to_pylist()
    assert {(row["group"], row["candidate"]) for row in scores if row["reason"] == "the picture is not finite"} == broken
    pairs = whole_runs.table(whole_runs.folder_of(run, 1, "pair"), "pairs").to_pylist()
    assert pairs
    assert not {(pair["group"], pair[role]) for pair in pairs for role in ("winner", "loser")} & broken


# -- a LoRA that the run starts from


def test_a_lora_for_another_base(place, tiny_sdxl, tmp_path):
    denoiser = text2img(str(tiny_sdxl)).denoiser
    adapters.attach(denoiser, 2, 2.0, "attention", seed=0)
    adapters.save(denoiser, tmp_path / "xl", StableDiffusionXLPipeline)
    file = tmp_path / "xl" / adapters.FILE
    told = whole_runs.refused("sample", "--round", "1", "--set", f"generator.lora={file}")
    assert re.fullmatch(rf"{file} was made for another base: \d+ of its \d+ tensors fit nowhere in this UNet2DConditionModel "
                        r"\(such as those of down_blocks\.1\.[\w.]+\); use a LoRA made for this model", told)
    assert whole_runs.refused("sample", "--round", "1", "--set", "generator.lora=no.safetensors") == (
        "generator.lora: there is nothing at no.safetensors; check the path (relative ones start in the working folder)")
