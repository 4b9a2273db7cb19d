"""LoRA files as other programs write them: what is fused is what peft's and LyCORIS' own modules add, or the file is refused with what it is."""

import dataclasses
import json

import lycoris.modules as lycoris
import pytest
import torch
from families import QUIET, denoiser_of, pipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from whole_runs import works

from fashiondpo_pipeline import lora_formats, lora_names, lora_settings
from fashiondpo_pipeline.errors import UserError

pytestmark = pytest.mark.filterwarnings(QUIET)

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def unet(tiny_sd):
    return denoiser_of(pipeline(tiny_sd, "sd"))


def random(*shape, seed=0, size=0.3):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def fused(unet, file, name=LINEAR, scale=1.0):
    """What the module of this name gains in weight and bias."""
    module = unet.get_submodule(name)
    before = {part: value.detach().clone() for part, value in module.named_parameters()}
    others = {part: value.detach().clone() for part, value in unet.named_parameters() if not part.startswith(f"{name}.")}
    assert lora_formats.fuse(unet, file, scale) == []
    assert all(torch.equal(others[part], value) for part, value in unet.named_parameters() if part in others), "another module changed"
    return {part: value.detach() - before[part] for part, value in module.named_parameters()}


def refused(unet, file):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(UserError) as problem:
        lora_formats.fuse(unet, file)
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    return str(problem.value)


def close(found, wanted):
    assert wanted.abs().max() > 0.01  # a test of nothing passes anyhow
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def saved(folder, tensors, **options):
    file = folder / "it.safetensors"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file, **options)
    return file


# -- strength

@pytest.mark.parametrize(("metadata", "times"), [
    ({}, 1), ({"lora_alpha": "8", "rank": "4"}, 2), ({"alpha": "2"}, 0.5), ({"lora_alpha": "8", "use_rslora": "true"}, 4),
    ({"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 4})}, 2),
    ({"ss_network_alpha": "2"}, 1),  # what kohya's trainer notes is in its alpha tensors too, and nobody else reads it
])
def test_alpha_counts_where_the_file_says_it(unet, tmp_path, metadata, times):
    a, b = random(4, 8), random(8, 4, seed=1)
    file = saved(tmp_path, {f"unet.{LINEAR}.lora_A.weight": a, f"unet.{LINEAR}.lora_B.weight": b}, metadata=metadata)
    close(fused(unet, file)["weight"], times * b @ a)


def test_a_modules_own_alpha_goes_before_the_files(unet, tmp_path):
    a, b = random(4, 8), random(8, 4, seed=1)
    tensors = {f"{KEY}.lora_down.weight": a, f"{KEY}.lora_up.weight": b, f"{KEY}.alpha": torch.tensor(2.0)}
    close(fused(unet, saved(tmp_path, tensors, metadata={"lora_alpha": "8"}))["weight"], 0.5 * b @ a)


@pytest.mark.parametrize("value", ["eight", "nan", "-1", ""])
def test_an_alpha_that_is_no_number_is_refused(unet, tmp_path, value):
    file = saved(tmp_path, {f"unet.{LINEAR}.lora_A.weight": random(4, 8), f"unet.{LINEAR}.lora_B.weight": random(8, 4)},
                 metadata={"lora_alpha": value})
    assert refused(unet, file) == f"{file}: its lora_alpha is {value!r}, and should be a number above 0; mend it, or take it out"


# -- peft's folder

def peft_folder(unet, folder, config, seed=3):
    """A folder as peft writes it, and what its own merging makes of the weights."""
    model = get_peft_model(unet, config)
    for n, (name, weight) in enumerate(model.named_parameters()):
        if weight.requires_grad:
            weight.data = (weight.data if "magnitude" in name else 0) + random(*weight.shape, seed=seed + n)
    model.save_pretrained(folder)
    return {name: weight.detach().clone() for name, weight in model.merge_and_unload().named_parameters()}


PEFT = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "conv1"]),
    "rslora": LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["to_q"]),
    "patterns": LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2, "mid_block.*to_q": 3},
                           alpha_pattern={"to_k": 3}),
    "dora": LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules=["to_q", "conv1"]),
    "bias of B": LoraConfig(r=4, lora_alpha=16, lora_bias=True, target_modules=["to_out.0"]),
    "loha": LoHaConfig(r=3, alpha=6, target_modules=["to_q", "conv1"]),
    "loha, effective": LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, target_modules=["conv1"]),
    "lokr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "conv1"]),
    "lokr, both": LoKrConfig(r=1, alpha=3, decompose_both=True, use_effective_conv2d=True, target_modules=["to_q", "conv1", "proj"]),
    "lokr, whole": LoKrConfig(r=64, alpha=32, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 16}),
}


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.filterwarnings("ignore:When at least one|Adapter 'default'")  # peft takes the bias of B for a matrix cut short
@pytest.mark.parametrize("named", ["the folder", "its file"])
def test_pefts_folder_is_what_peft_merges(tiny_sd, tmp_path, kind, named):
    wanted = peft_folder(denoiser_of(pipeline(tiny_sd, "sd")), tmp_path / "peft", PEFT[kind])
    ours = denoiser_of(pipeline(tiny_sd, "sd"))
    before = {name: weight.detach().clone() for name, weight in ours.named_parameters()}
    assert lora_formats.fuse(ours, tmp_path / "peft" / ("adapter_model.safetensors" if named == "its file" else "")) == []
    changed = 0
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.detach(), wanted[name], atol=1e-5, rtol=1e-4)
        changed += not torch.equal(weight, before[name])
    assert changed > 1


def test_every_setting_of_peft_is_known():
    """A field that a newer peft adds must be looked at: does it change what the tensors mean?"""
    fields = {field.name for kind in (LoraConfig, LoHaConfig, LoKrConfig) for field in dataclasses.fields(kind)}
    known = [lora_settings.READ, lora_settings.NO_MATTER, lora_settings.REFUSED]
    assert not fields - set.union(*known)
    assert sum(map(len, known)) == len(set.union(*known))


@pytest.mark.parametrize(("changed", "said"), [
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"), ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
    ({"layer_replication": [[0, 1]]}, "layer_replication [[0, 1]]"), ({"of_next_year": 3}, "of_next_year 3"),
])
def test_a_setting_that_changes_the_meaning_is_refused_by_name(unet, tmp_path, changed, said):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4} | changed))
    save_file({f"base_model.model.{LINEAR}.lora_A.weight": random(4, 8), f"base_model.model.{LINEAR}.lora_B.weight": random(8, 4)},
              tmp_path / "adapter_model.safetensors")
    assert said in refused(unet, tmp_path)


def test_a_file_of_pefts_whose_strength_nothing_says_is_told_of(tmp_path):
    file, down_up = tmp_path / "adapter_model.safetensors", {f"base_model.model.{LINEAR}.lora_A.weight": random(4, 8),
                                                             f"base_model.model.{LINEAR}.lora_B.weight": random(8, 4)}
    save_file(down_up, file)
    assert lora_settings.doubts(file) == [f"{file}: no adapter_config.json lies beside it, which says how strong it is: taken as alpha = rank; "
                                          "copy it there, or set generator.lora_scale"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    assert lora_settings.doubts(tmp_path) == lora_settings.doubts(file) == []
    (tmp_path / "adapter_config.json").unlink()
    save_file(down_up, file, {"lora_alpha": "8"})
    assert lora_settings.doubts(file) == []
    save_file(down_up, tmp_path / "kohyas.safetensors")
    assert lora_settings.doubts(tmp_path / "kohyas.safetensors") == []


def test_a_run_says_once_that_nothing_says_how_strong_its_lora_is(place, tiny_sd, tmp_path):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(UNet2DConditionModel.from_pretrained(tiny_sd / "unet"), LoraConfig(r=2, target_modules=["to_q"]))
    net.save_pretrained(tmp_path / "style")
    wanted = "no adapter_config.json lies beside it"
    assert wanted not in works("sample", "--round", "1", "--set", f"generator.lora={tmp_path / 'style'}").err
    (tmp_path / "style/adapter_config.json").unlink()
    assert works("sample", "--round", "1", "--set", f"generator.lora={tmp_path / 'style'}").err.count(wanted) == 1


def test_another_kind_of_peft_is_refused_with_its_name(unet, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": 4}))
    save_file({f"base_model.model.{LINEAR}.vera_lambda_b": random(8)}, tmp_path / "adapter_model.safetensors")
    assert refused(unet, tmp_path) == f"{tmp_path / 'adapter_config.json'}: it is a VERA of peft; LORA, LOHA, LOKR are read: name another one"


def test_the_identity_of_pefts_file_holds_its_settings(tmp_path):
    from fashiondpo_pipeline.checkpoints import lora_identity
    from fashiondpo_pipeline.identity import hash_path

    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "style.safetensors")
    assert lora_identity(tmp_path / "style.safetensors") == hash_path(tmp_path / "style.safetensors", "")
    found = set()
    for alpha in (4, 8):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found |= {lora_identity(tmp_path), lora_identity(tmp_path / "adapter_model.safetensors")}
        assert lora_identity(tmp_path / "style.safetensors") == hash_path(tmp_path / "style.safetensors", "")
    assert len(found) == 2


# -- LyCORIS, whose training forward is what the file means (its own merging multiplies the scale of LoHa and LoKr in twice)

def made(kind, module, **options):
    """A LyCORIS module on a copy of ours: its tensors, and the weight that it trains with."""
    net = kind("it", module, lora_dim=2, alpha=1.0, **options)
    for n, weight in enumerate(net.parameters()):
        if weight.ndim or weight.numel() > 1:
            weight.data += random(*weight.shape, seed=7 + n)
    return net, net.custom_state_dict() if hasattr(net, "custom_state_dict") else net.state_dict()


def answers(module, net, x):
    net.org_forward = module.forward
    with torch.no_grad():
        return net(x)


LYCORIS = {
    "locon": (lycoris.LoConModule, {}), "locon, tucker": (lycoris.LoConModule, {"use_tucker": True}),
    "locon, dora": (lycoris.LoConModule, {"weight_decompose": True}),
    "locon, dora on input": (lycoris.LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (lycoris.LohaModule, {}), "loha, tucker": (lycoris.LohaModule, {"use_tucker": True}),
    "loha, dora": (lycoris.LohaModule, {"weight_decompose": True}), "loha, rs": (lycoris.LohaModule, {"rs_lora": True}),
    "lokr": (lycoris.LokrModule, {"factor": 2}), "lokr, both": (lycoris.LokrModule, {"factor": 8, "decompose_both": True}),
    "lokr, tucker": (lycoris.LokrModule, {"factor": 1, "use_tucker": True}), "lokr, whole": (lycoris.LokrModule, {"full_matrix": True}),
    "lokr, dora": (lycoris.LokrModule, {"weight_decompose": True, "wd_on_out": False}),
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("name", [LINEAR, WIDE, CONV])
@pytest.mark.parametrize("naming", ["kohya", "lycoris", "ComfyUI"])
def test_a_fused_lycoris_file_is_what_its_training_saw(unet, tmp_path, kind, name, naming):
    module = unet.get_submodule(name)
    net, tensors = made(LYCORIS[kind][0], module, **LYCORIS[kind][1])
    x = random(2, 8, 4, 4) if name == CONV else random(2, module.in_features)
    wanted = answers(module, net, x)
    stem = {"kohya": kohya(name), "lycoris": kohya(name).replace("lora_unet", "lycoris"), "ComfyUI": f"diffusion_model.{name}"}[naming]
    file = saved(tmp_path, {f"{stem}.{end}": tensor for end, tensor in tensors.items()})
    plain = module(x)
    lora_formats.fuse(unet, file)
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(module(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_full_differences_are_added_at_the_strength_asked(unet, tmp_path, name):
    module = unet.get_submodule(name)
    tensors = {"diff": random(*module.weight.shape)} | ({"diff_b": random(8, seed=1)} if module.bias is not None else {})
    found = fused(unet, saved(tmp_path, {f"{kohya(name)}.{end}": tensor for end, tensor in tensors.items()}), name, 0.5)
    close(found["weight"], tensors["diff"] / 2)
    if module.bias is not None:
        close(found["bias"], tensors["diff_b"] / 2)


@pytest.mark.parametrize("ends", [("w_norm", "b_norm"), ("diff", "diff_b")])
def test_norms_are_changed_too(unet, tmp_path, ends):
    file = saved(tmp_path, {f"{kohya(NORM)}.{end}": random(8, seed=n) for n, end in enumerate(ends)})
    found = fused(unet, file, NORM)
    close(found["weight"], random(8))
    close(found["bias"], random(8, seed=1))


def test_a_bias_may_stand_beside_a_lora(unet, tmp_path):
    name = LINEAR.replace("to_q", "to_out.0")
    a, b = random(4, 8), random(8, 4, seed=1)
    file = saved(tmp_path, {f"{kohya(name)}.lora_down.weight": a, f"{kohya(name)}.lora_up.weight": b, f"{kohya(name)}.diff_b": random(8)})
    found = fused(unet, file, name)
    close(found["weight"], b @ a)
    close(found["bias"], random(8))


@pytest.mark.parametrize("beside", [{}, {f"{KEY}.lora_down.weight": random(4, 8), f"{KEY}.lora_up.weight": random(8, 4)}], ids=["alone", "LoRA"])
def test_a_bias_for_a_module_without_one_is_said_to_be_that(unet, tmp_path, beside):
    file = saved(tmp_path, {f"{KEY}.diff_b": random(8)} | beside)
    assert refused(unet, file) == (f"{file} changes a bias of 1 modules that have none in this UNet2DConditionModel (such as {LINEAR}): take its "
                                   "biases out, or use a LoRA without them")


# -- names

def modules_of(denoiser):
    return [name for name, module in denoiser.named_modules() if getattr(module, "weight", None) is not None]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_module_of_a_unet_is_found_by_all_its_names(family, request):
    """kohya's underscores, Stability's numbers with dots and with underscores, diffusers', peft's and ComfyUI's prefixes."""
    names = modules_of(denoiser_of(pipeline(request.getfixturevalue(f"tiny_{family}"), family)))
    assert len(names) > 50
    for name in names:
        stems = [f"{prefix}{name}" for prefix in ("", "unet.", "diffusion_model.", "base_model.model.", "base_model.model.unet.")]
        stems += [kohya(name), "lycoris_" + name.replace(".", "_")]
        if "group_norm" not in name and not (name.count(".") == 3 and name.endswith(".norm")):
            sgm = lora_names.to_sgm(name)
            stems += [kohya(sgm), f"diffusion_model.{sgm}", f"model.diffusion_model.{sgm}"]
        assert {place.module for stem in stems for place in lora_names.places(stem, family, 1, 1)} == {f"unet.{name}"}, name


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_every_module_of_a_transformer_is_found_by_diffusers_names(family, request):
    for name in modules_of(denoiser_of(pipeline(request.getfixturevalue(f"tiny_{family}"), family))):
        stems = [f"{prefix}{name}" for prefix in ("transformer.", "diffusion_model.", "base_model.model.")]
        stems += ["lora_transformer_" + name.replace(".", "_"), "lycoris_" + name.replace(".", "_")]
        assert {place.module for stem in stems for place in lora_names.places(stem, family, 1, 1)} == {f"transformer.{name}"}, name


def test_fluxs_own_names_go_where_diffusers_converter_puts_them():
    """Every name that its table of kohya's files has, by the rows that each module gets."""
    from diffusers import FluxPipeline

    stems = [f"lora_unet_double_blocks_3_{side}_{rest}" for side in ("img", "txt") for rest in ("attn_proj", "attn_qkv", "mlp_0", "mlp_2", "mod_lin")]
    stems += [f"lora_unet_single_blocks_5_{rest}" for rest in ("linear1", "linear2", "modulation_lin")]
    stems += ["lora_unet_final_layer_linear", "lora_unet_final_layer_adaLN_modulation_1", "lora_unet_img_in", "lora_unet_txt_in"]
    stems += [f"lora_unet_{part}_in_{side}_layer" for part in ("time", "vector", "guidance") for side in ("in", "out")]
    for stem in stems:
        rows = torch.arange(3 * 3072 + 12288).float()[:, None]
        found = FluxPipeline.lora_state_dict({f"{stem}.lora_down.weight": torch.ones(1, 4), f"{stem}.lora_up.weight": rows})
        theirs = {name.removesuffix(".lora_B.weight").removeprefix("transformer."): tensor for name, tensor in found.items() if "lora_B" in name}
        ours = {place.module.removeprefix("transformer."): place.rows(rows) for place in lora_names.places(stem, "flux", len(rows), 4)}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), stem


@pytest.mark.parametrize("stem", ["double_blocks.0.processor.qkv_lora1", "double_blocks.0.processor.proj_lora2",
                                  "single_blocks.0.processor.qkv_lora"])
def test_xlabs_names_go_where_diffusers_converter_puts_them(stem):
    from diffusers import FluxPipeline

    rows = torch.arange(48.0)[:, None]
    found = FluxPipeline.lora_state_dict({f"{stem}.down.weight": torch.ones(1, 4), f"{stem}.up.weight": rows})
    theirs = {name.removesuffix(".lora_B.weight"): tensor for name, tensor in found.items() if "lora_B" in name}
    assert lora_formats._split(f"{stem}.up.weight") == (stem, "up")
    ours = {place.module: place.rows(rows) for place in lora_names.places(stem, "flux", 48, 4)}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_lokr_of_joined_queries_is_taken_apart(tiny_flux, tmp_path):
    """ComfyUI's names of FLUX's own modules; (4, 2) x (12, 8) is query, key and value of width 16, (48, 16)."""
    flux = denoiser_of(pipeline(tiny_flux, "flux"))
    attention = flux.transformer_blocks[0].attn
    weights = lambda: torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight])  # noqa: E731
    before, first, second = weights(), random(4, 2), random(12, 8, seed=1)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    assert lora_formats.fuse(flux, saved(tmp_path, {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second})) == []
    close(weights() - before, torch.kron(first, second))


def test_old_names_of_attention_processors_are_read(unet, tmp_path):
    a, b = random(4, 8), random(8, 4, seed=1)
    name = LINEAR.replace("to_q", "processor.to_out_lora")
    file = saved(tmp_path, {f"unet.{name}.down.weight": a, f"unet.{name}.up.weight": b})
    close(fused(unet, file, LINEAR.replace("to_q", "to_out.0"))["weight"], b @ a)


# -- what is refused, and what is counted

@pytest.mark.parametrize(("ends", "kind"), [
    (("oft_blocks", "alpha"), "OFT"), (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA"), (("weight", "on_input"), "(IA)^3"),
    (("oft_R.weight",), "OFT"),
])
def test_kinds_that_are_not_read_are_refused_with_what_they_are(unet, tmp_path, ends, kind):
    file = saved(tmp_path, {f"{KEY}.{end}": random(8, 8) if end != "alpha" else torch.tensor(1.0) for end in ends})
    message = refused(unet, file)
    assert message.startswith(f"{file} holds {kind}, which is not read here (") and "another base" not in message


def test_every_tensor_is_read_or_named(unet, tmp_path):
    """Nothing is passed over: half a LoRA, an alpha alone, a core without its partner, a tensor that nobody knows."""
    whole = {f"{KEY}.lora_down.weight": random(4, 8), f"{KEY}.lora_up.weight": random(8, 4)}
    other = KEY.replace("to_q", "to_k")
    for end in ("lora_down.weight", "lora_up.weight", "alpha", "hada_t1", "lokr_w2", "dora_scale", "lora_A.bias", "somewhat"):
        file = saved(tmp_path, whole | {f"{other}.{end}": random(4, 8) if end != "alpha" else torch.tensor(1.0)})
        message = refused(unet, file)
        assert f"(1 of its tensors: {other}.{end})" in message and "another base" not in message


def test_matrices_that_do_not_go_together_are_named(unet, tmp_path):
    ends = {"hada_w1_a": (8, 2), "hada_w1_b": (3, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    file = saved(tmp_path, {f"{KEY}.{end}": random(*shape) for end, shape in ends.items()})
    assert "no LoRA that is read here (4 of its tensors" in refused(unet, file)
    file = saved(tmp_path, {f"{KEY}.lora_down.weight": random(4, 8), f"{KEY}.lora_up.weight": random(8, 3)})
    assert "no LoRA that is read here (2 of its tensors" in refused(unet, file)


def test_text_encoders_are_counted_whatever_their_kind(unet, tmp_path):
    """A LoHa, a kind that is not read for denoisers, taught words, and T5: none is applied, all are told."""
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{KEY}.lora_down.weight": random(4, 8), f"{KEY}.lora_up.weight": random(8, 4)}
    tensors |= {f"{text}.{end}": random(2, 2) for end in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    tensors |= {f"{text.replace('q_proj', 'k_proj')}.oft_blocks": random(2, 2), "bundle_emb.dress.string_to_param.*": random(2, 8)}
    tensors |= {f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.{end}": random(2, 2) for end in ("lora_down.weight", "lora_up.weight")}
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    assert lora_formats.fuse(unet, saved(tmp_path, tensors)) == [
        "text_encoder.bundle_emb.dress.string_to_param.*", f"{layer}.k_proj", f"{layer}.q_proj",
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
    ]


@pytest.mark.parametrize("ends", [("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("diff",), ("diff_b",)])
def test_what_is_no_product_of_two_matrices_is_not_merged(tmp_path, ends):
    file = saved(tmp_path, {f"{KEY}.{end}": random(8, 8) if end != "diff_b" else random(8) for end in ends})
    with pytest.raises(UserError, match="cannot be merged"):
        lora_formats.merged(file, file, "sd")


def test_a_locon_with_a_middle_is_merged_exactly(unet, tmp_path):
    stem = kohya(CONV)
    tensors = {f"{stem}.lora_down.weight": random(2, 8, 1, 1), f"{stem}.lora_mid.weight": random(2, 2, 3, 3),
               f"{stem}.lora_up.weight": random(8, 2, 1, 1), f"{stem}.alpha": torch.tensor(1.0)}
    file = saved(tmp_path, tensors)
    lora_formats.write(lora_formats.merged(file, file, "sd"), tmp_path / "both.safetensors")
    wanted = 2 * 0.5 * torch.einsum("mnkl,im,nj->ijkl", *(tensors[f"{stem}.lora_{part}.weight"].reshape(shape) for part, shape in
                                                           (("mid", (2, 2, 3, 3)), ("up", (8, 2)), ("down", (2, 8)))))
    close(fused(unet, tmp_path / "both.safetensors", CONV)["weight"], wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("end", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_a_number_that_is_none_is_named_with_file_and_tensor(unet, tmp_path, bad, end):
    tensors = {f"{KEY}.lora_down.weight": random(4, 8), f"{KEY}.lora_up.weight": random(8, 4), f"{KEY}.alpha": torch.tensor(4.0)}
    tensors[f"{KEY}.{end}"].view(-1)[0] = bad
    file = saved(tmp_path, tensors)
    assert refused(unet, file) == f"{file}: {KEY}.{end} holds numbers that are NaN or infinite; get the file anew, or name another one"


def test_a_fusion_beyond_the_numbers_of_the_denoiser_is_refused(tiny_sd, tmp_path):
    half = denoiser_of(pipeline(tiny_sd, "sd", dtype=torch.float16))
    file = saved(tmp_path, {f"{KEY}.diff": torch.full((8, 8), 1e5)})
    with pytest.raises(UserError, match=rf"with it {LINEAR} is no longer finite in float16: set generator.dtype to bfloat16"):
        lora_formats.fuse(half, file)
