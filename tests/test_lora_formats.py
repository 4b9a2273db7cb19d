"""LoRA files go out to stock diffusers and kohya's readers, and come in from them, without a change of prediction or picture."""

import json

import pytest
import torch
from families import PART, PIPELINES, QUIET, denoiser_of, draw, pipeline, predict, say_something
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fashiondpo_pipeline import adapters, lora_formats, lora_names
from fashiondpo_pipeline.errors import UserError

pytestmark = pytest.mark.filterwarnings(QUIET)


@pytest.fixture(params=PIPELINES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, request):
    return request.getfixturevalue(f"tiny_{family}")


def adapter(folder, family, out, kind="lora", alpha=8.0, rank=4, targets="attention+mlp", seed=1):
    """A file as a round leaves it, and what its denoiser predicts."""
    denoiser = denoiser_of(pipeline(folder, family))
    adapters.attach(denoiser, rank, alpha, targets, seed=0, kind=kind)
    say_something(denoiser, seed, size=0.1)  # small enough that fp32 rounds fused and unfused sums alike to 1e-5
    adapters.save(denoiser, out, PIPELINES[family])
    return out / adapters.FILE, answer(denoiser, family)


@torch.no_grad()
def answer(denoiser, family):
    return predict(denoiser, family)


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def refused(call, *arguments):
    with pytest.raises(UserError) as problem:
        call(*arguments)
    return str(problem.value)


def loaded(folder, family, file):
    stock = pipeline(folder, family)
    stock.load_lora_weights(file.parent, weight_name=file.name)
    return stock


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_fused_lora_is_the_pipeline_with_that_lora(folder, family, kind, tmp_path):
    file, tuned = adapter(folder, family, tmp_path, kind)
    ours = pipeline(folder, family)
    assert lora_formats.fuse(denoiser_of(ours), file, 1.0) == []
    close(answer(denoiser_of(ours), family), tuned)
    assert abs(draw(ours) - draw(loaded(folder, family, file))).max() < 1e-5


def test_a_lora_is_fused_at_half_strength(folder, family, tmp_path):
    file, tuned = adapter(folder, family, tmp_path)
    stock, ours = loaded(folder, family, file), denoiser_of(pipeline(folder, family))
    stock.set_adapters(stock.get_active_adapters(), [0.5])
    lora_formats.fuse(ours, file, 0.5)
    close(answer(ours, family), answer(denoiser_of(stock), family))
    assert (answer(ours, family) - tuned).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_stock_pipeline_loads_the_export(folder, family, kind, tmp_path):
    file, tuned = adapter(folder, family, tmp_path, kind)
    exported = lora_formats.to_kohya(load_file(file), family, 8.0, rslora=kind == "rslora")
    lora_formats.write(exported, tmp_path / "kohya.safetensors")
    stock = loaded(folder, family, tmp_path / "kohya.safetensors")
    close(answer(denoiser_of(stock), family), tuned)
    assert abs(draw(stock) - draw(loaded(folder, family, file))).max() < 1e-5


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_export_read_back_is_the_adapter(folder, family, kind, tmp_path):
    """DoRA's scales too, which diffusers' loader drops."""
    file, tuned = adapter(folder, family, tmp_path, kind)
    lora_formats.write(lora_formats.to_kohya(load_file(file), family, 8.0, kind == "rslora"), tmp_path / "kohya.safetensors")
    denoiser = denoiser_of(pipeline(folder, family))
    assert lora_formats.fuse(denoiser, tmp_path / "kohya.safetensors") == []
    close(answer(denoiser, family), tuned)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_convolutions_and_embeddings_have_kohya_names_too(folder, family, tmp_path):
    targets = ["conv1", "conv2", "time_emb_proj", "conv_shortcut", "conv", "conv_in", "conv_out", "proj_in", "linear_1", "linear_2", "to_q"]
    file, tuned = adapter(folder, family, tmp_path, targets=targets)
    lora_formats.write(lora_formats.to_kohya(load_file(file), family, 8.0), tmp_path / "kohya.safetensors")
    close(answer(denoiser_of(loaded(folder, family, tmp_path / "kohya.safetensors")), family), tuned)
    denoiser = denoiser_of(pipeline(folder, family))
    lora_formats.fuse(denoiser, tmp_path / "kohya.safetensors")
    close(answer(denoiser, family), tuned)


def test_kohya_names_and_alphas_are_these():
    """rank 4: alpha 8 stays 8; with rsLoRA 8 / sqrt(4) = 4 is the scale, and 16 / 4 is 4 too."""
    pair = {"lora_A.weight": torch.ones(4, 6), "lora_B.weight": torch.ones(5, 4)}
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    unet = {f"unet.{module}.{half}": tensor for half, tensor in pair.items()}
    sd, sdxl = lora_formats.to_kohya(unet, "sd", 8.0), lora_formats.to_kohya(unet, "sdxl", 8.0, rslora=True)
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert sorted(sd) == [f"{stem}.alpha", f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"] and sd[f"{stem}.alpha"] == 8
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    assert sorted(sdxl) == [f"{stem}.alpha", f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"] and sdxl[f"{stem}.alpha"] == 16
    flux = lora_formats.to_kohya({f"transformer.x.{half}": tensor for half, tensor in pair.items()}, "flux", 8.0)
    assert sorted(flux) == ["transformer.x.lora_A.weight", "transformer.x.lora_B.weight"]
    assert torch.equal(flux["transformer.x.lora_B.weight"], torch.full((5, 4), 2.0))


@pytest.mark.parametrize("module, name", [
    ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
    ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("down_blocks.2.resnets.1.time_emb_proj", "input_blocks.8.0.emb_layers.1"),
    ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
    ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("up_blocks.2.resnets.0.conv_shortcut", "output_blocks.6.0.skip_connection"),
])
def test_sdxl_blocks_are_numbered_as_stability_does(module, name):
    """Three inner blocks a level; on the way down the first level follows conv_in and each level ends in its downsampler."""
    assert lora_names.to_sgm(module) == name


def test_a_dora_leaves_with_one_scale_a_row(tiny_sd, tmp_path):
    file, _ = adapter(tiny_sd, "sd", tmp_path, "dora")
    exported = lora_formats.to_kohya(load_file(file), "sd", 8.0)
    scales = {name: tensor for name, tensor in exported.items() if name.endswith(".dora_scale")}
    assert scales and all(tensor.shape == (len(exported[name.replace("dora_scale", "lora_up.weight")]), 1) for name, tensor in scales.items())


def test_a_tensor_that_is_no_lora_is_not_exported():
    message = refused(lora_formats.to_kohya, {"unet.conv_in.weight": torch.zeros(1)}, "sd", 4.0)
    assert message == "unet.conv_in.weight is no tensor of a LoRA for sd; export the adapter that a round of this run made"


def test_two_loras_merge_to_their_sum(folder, family, tmp_path):
    """A style LoRA of rank 2 on some modules, ours of rank 4 on more: fused one after the other, or as one file of rank 6."""
    style, _ = adapter(folder, family, tmp_path / "style", "rslora", alpha=3.0, rank=2, targets="attention", seed=2)
    ours, _ = adapter(folder, family, tmp_path / "ours", seed=3)
    one_by_one = denoiser_of(pipeline(folder, family))
    lora_formats.fuse(one_by_one, style)
    lora_formats.fuse(one_by_one, ours)
    tensors = lora_formats.merged(style, ours, family)
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {6}
    lora_formats.write(tensors, tmp_path / "both" / adapters.FILE)
    close(answer(denoiser_of(loaded(folder, family, tmp_path / "both" / adapters.FILE)), family), answer(one_by_one, family))
    trainable = denoiser_of(pipeline(folder, family))
    adapters.load(trainable, tmp_path / "both")  # and one can train on from it
    close(answer(trainable, family), answer(one_by_one, family))


def test_merging_takes_kohya_files_and_does_not_mind_the_order(tiny_sdxl, tmp_path):
    style, _ = adapter(tiny_sdxl, "sdxl", tmp_path / "style", seed=2)
    ours, _ = adapter(tiny_sdxl, "sdxl", tmp_path / "ours", seed=3)
    lora_formats.write(lora_formats.to_kohya(load_file(style), "sdxl", 8.0), tmp_path / "kohya.safetensors")
    sums = [{name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
             for name in {name.rpartition(".lora_")[0] for name in tensors}}
            for tensors in (lora_formats.merged(tmp_path / "kohya.safetensors", ours, "sdxl"), lora_formats.merged(ours, style, "sdxl"))]
    assert sums[0].keys() == sums[1].keys()
    assert all(torch.allclose(sums[0][name], sums[1][name], atol=1e-5) for name in sums[0])


def test_a_dora_is_not_merged(tiny_sd, tmp_path):
    dora, _ = adapter(tiny_sd, "sd", tmp_path / "dora", "dora")
    plain, _ = adapter(tiny_sd, "sd", tmp_path / "plain")
    assert refused(lora_formats.merged, plain, dora, "sd") == (
        f"{dora} is a DoRA, which rescales whole rows: it cannot be merged exactly; fuse it into the model instead"
    )


def test_each_module_keeps_its_own_alpha(tiny_sd, tmp_path):
    """rank 2: alpha 2 is scale 1, alpha 6 is scale 3."""
    stems = [f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_{name}" for name in ("to_q", "to_k")]
    random = torch.Generator().manual_seed(0)
    downs, ups = torch.randn(2, 2, 8, generator=random), torch.randn(2, 8, 2, generator=random)
    tensors = {}
    for i, alpha in enumerate((2.0, 6.0)):
        tensors |= {f"{stems[i]}.lora_down.weight": downs[i], f"{stems[i]}.lora_up.weight": ups[i], f"{stems[i]}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    denoiser = denoiser_of(pipeline(tiny_sd, "sd"))
    attention = denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    before = [attention.to_q.weight.clone(), attention.to_k.weight.clone()]
    lora_formats.fuse(denoiser, tmp_path / "kohya.safetensors")
    for weight, old, scale, i in ((attention.to_q.weight, before[0], 1, 0), (attention.to_k.weight, before[1], 3, 1)):
        torch.testing.assert_close(weight, old + scale * ups[i] @ downs[i])


def with_text(folder, family, out):
    """A LoRA of denoiser and text encoder, as diffusers' own training scripts write it."""
    stock = pipeline(folder, family)
    for module, names in ((denoiser_of(stock), ["to_q"]), (stock.text_encoder, ["q_proj"])):
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False), "default")
    layers = {f"{PART[family]}_lora_layers": get_peft_model_state_dict(denoiser_of(stock), adapter_name="default"),
              "text_encoder_lora_layers": get_peft_model_state_dict(stock.text_encoder, adapter_name="default")}
    type(stock).save_lora_weights(out, **layers)
    return out / adapters.FILE, stock


def test_text_encoders_are_reported_not_dropped(folder, family, tmp_path):
    file, stock = with_text(folder, family, tmp_path)
    ours = denoiser_of(pipeline(folder, family))
    text = lora_formats.fuse(ours, file)
    wanted = sum(name.endswith("q_proj") for name, _ in pipeline(folder, family).text_encoder.named_modules())
    assert len(text) == wanted > 0 and all(name.startswith("text_encoder.") and name.endswith("q_proj") for name in text)
    close(answer(ours, family), answer(denoiser_of(stock), family))


def test_text_encoders_come_along_when_merging(folder, family, tmp_path):
    """Merged with a LoRA of the denoiser alone, the text encoder's part is the same as before."""
    file, stock = with_text(folder, family, tmp_path / "text")
    other, _ = adapter(folder, family, tmp_path / "other")
    lora_formats.write(lora_formats.merged(file, other, family), tmp_path / "both.safetensors")
    both = loaded(folder, family, tmp_path / "both.safetensors")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        close(both.text_encoder(tokens)[0], stock.text_encoder(tokens)[0])


def test_a_kohya_file_with_text_encoder_is_read(tiny_sd, tmp_path):
    file, _ = adapter(tiny_sd, "sd", tmp_path)
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    text = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2), f"{stem}.alpha": torch.tensor(4.0)}
    save_file(lora_formats.to_kohya(load_file(file), "sd", 8.0) | text, tmp_path / "kohya.safetensors")
    lora = lora_formats.read(tmp_path / "kohya.safetensors", "sd")
    layer = lora.layers["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    assert torch.equal(layer.change.up, torch.full((16, 2), 2.0)) and not lora.strays  # alpha 4 at rank 2


def test_flux_kohya_files_with_joined_queries_are_read(tiny_flux, tmp_path):
    """kohya keeps query, key and value of FLUX in one matrix: (3 * 16, r); diffusers takes it apart."""
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 16, generator=random), torch.randn(48, 4, generator=random)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(8.0)}, tmp_path / "k.safetensors")
    denoiser = denoiser_of(pipeline(tiny_flux, "flux"))
    attention = denoiser.transformer_blocks[0].attn
    before = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    lora_formats.fuse(denoiser, tmp_path / "k.safetensors")
    after = torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])
    torch.testing.assert_close(after, before + 2 * up @ down)


def test_sd3_kohya_files_are_read(tiny_sd3, tmp_path):
    """kohya trains Stability's modules: query, key and value in one matrix, the last block's context norm as shift, scale."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    stems = [f"lora_unet_joint_blocks_{name}" for name in ("0_context_block_attn_qkv", "1_x_block_mlp_fc1", "1_context_block_adaLN_modulation_1")]
    downs, ups = [draw(2, 16) for _ in stems], [draw(48, 2), draw(64, 2), draw(32, 2)]
    tensors = {f"{stem}.alpha": torch.tensor(4.0) for stem in stems}  # rank 2: scale 2
    tensors |= {f"{stem}.lora_down.weight": down for stem, down in zip(stems, downs, strict=True)}
    tensors |= {f"{stem}.lora_up.weight": up for stem, up in zip(stems, ups, strict=True)}
    text = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= {f"{text}.lora_down.weight": draw(2, 16), f"{text}.lora_up.weight": draw(16, 2)}
    save_file(tensors, tmp_path / "k.safetensors")
    denoiser = denoiser_of(pipeline(tiny_sd3, "sd3"))
    first, last = denoiser.transformer_blocks

    def weights():
        joint = torch.cat([first.attn.add_q_proj.weight, first.attn.add_k_proj.weight, first.attn.add_v_proj.weight])
        return [joint, last.ff.net[0].proj.weight.clone(), last.norm1_context.linear.weight.clone()]

    before = weights()
    assert lora_formats.fuse(denoiser, tmp_path / "k.safetensors") == ["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"]
    sums = [2 * up @ down for up, down in zip(ups, downs, strict=True)]
    sums[2] = torch.cat([sums[2][16:], sums[2][:16]])
    for after, old, change in zip(weights(), before, sums, strict=True):
        torch.testing.assert_close(after, old + change)


def test_a_lora_of_another_base_is_refused_and_nothing_has_changed(tiny_sd, tiny_sdxl, tmp_path):
    file, _ = adapter(tiny_sdxl, "sdxl", tmp_path)
    denoiser = denoiser_of(pipeline(tiny_sd, "sd"))
    before = {name: weight.clone() for name, weight in denoiser.state_dict().items()}
    total, message = len(load_file(file)), refused(lora_formats.fuse, denoiser, file)
    start, _, rest = message.partition(" of its ")
    assert start.startswith(f"{file} was made for another base: ") and 0 < int(start.rpartition(" ")[2]) <= total
    assert rest.startswith(f"{total} tensors fit nowhere in this UNet2DConditionModel (such as those of ")
    assert rest.endswith("); use a LoRA made for this model")
    assert all(torch.equal(before[name], weight) for name, weight in denoiser.state_dict().items())


def test_a_lora_of_another_family_fits_nowhere(tiny_sd, tiny_flux, tmp_path):
    file, _ = adapter(tiny_flux, "flux", tmp_path)
    total = len(load_file(file))
    assert refused(lora_formats.fuse, denoiser_of(pipeline(tiny_sd, "sd")), file) == (
        f"{file} was made for another base: {total} of its {total} tensors fit nowhere in this UNet2DConditionModel "
        "(such as those of single_transformer_blocks.0.attn.to_k); use a LoRA made for this model"
    )


def test_pickles_cut_off_and_empty_files_are_refused(tiny_sd, tmp_path):
    denoiser = denoiser_of(pipeline(tiny_sd, "sd"))
    file, _ = adapter(tiny_sd, "sd", tmp_path / "whole")
    pickle, cut, empty, bare = (tmp_path / name for name in ("lora.bin", "cut.safetensors", "empty.safetensors", "bare.safetensors"))
    torch.save(load_file(file), pickle)
    assert refused(lora_formats.fuse, denoiser, pickle) == (
        f"{pickle} is no .safetensors file: others may hold a pickle, which can run code when read; convert it first"
    )
    cut.write_bytes(file.read_bytes()[:-100])
    empty.write_bytes(b"")
    for damaged in (cut, empty):
        message = refused(lora_formats.fuse, denoiser, damaged)
        assert message.startswith(f"{damaged} cannot be read (")
        assert message.endswith("): it is cut off or damaged; fetch it again, or name another file")
    save_file({}, bare)
    assert refused(lora_formats.fuse, denoiser, bare) == f"{bare} holds no tensors; name another file"
    missing = tmp_path / "none.safetensors"
    assert refused(lora_formats.fuse, denoiser, missing) == f"there is no LoRA at {missing}: name a .safetensors file that exists"


def test_a_lora_of_text_encoders_alone_is_refused(tiny_sd, tmp_path):
    file, _ = with_text(tiny_sd, "sd", tmp_path)
    save_file({name: tensor for name, tensor in load_file(file).items() if name.startswith("text_encoder")}, tmp_path / "text.safetensors")
    assert refused(lora_formats.fuse, denoiser_of(pipeline(tiny_sd, "sd")), tmp_path / "text.safetensors") == (
        f"{tmp_path / 'text.safetensors'} holds no LoRA for a denoiser, only for text encoders (1 of their modules); name another file"
    )


def test_a_denoiser_of_no_known_family_is_refused():
    message = refused(lora_formats.family_of, torch.nn.Linear(1, 1))
    assert message == "LoRA files are read for UNet2DConditionModel, SD3Transformer2DModel and FluxTransformer2DModel, not for Linear"


def test_the_notes_of_a_file_say_its_scale(tiny_sd, tmp_path):
    file, _ = adapter(tiny_sd, "sd", tmp_path, "rslora")
    header = file.read_bytes()
    notes = json.loads(json.loads(header[8:8 + int.from_bytes(header[:8], "little")])["__metadata__"]["lora_adapter_metadata"])
    assert (notes["unet.r"], notes["unet.lora_alpha"], notes["unet.use_rslora"], notes["unet.use_dora"]) == (4, 8.0, True, False)
    name = next(name for name in load_file(file) if "lora_B" in name)
    layer = lora_formats.read(file, "sd").layers[name.removesuffix(".lora_B.weight")]
    torch.testing.assert_close(layer.change.up, 4 * load_file(file)[name])  # 8 / sqrt(4)
