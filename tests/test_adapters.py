"""What is trained changes nothing until it is trained, comes off bit for bit, and comes back from disk as it was."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from families import PART, PIPELINES, QUIET, denoiser_of, draw, pipeline, predict, say_something
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.errors import UserError

pytestmark = pytest.mark.filterwarnings(QUIET)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
KINDS = ["lora", "rslora", "dora", "full"]


@pytest.fixture
def denoiser(tiny_sd):
    return denoiser_of(pipeline(tiny_sd, "sd"))


@pytest.fixture(params=PIPELINES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, request):
    return request.getfixturevalue(f"tiny_{family}")


@pytest.fixture
def model(folder, family):
    """A denoiser of each family."""
    return denoiser_of(pipeline(folder, family))


def attach(denoiser, rank=4, alpha=4.0, targets=TARGETS, seed=5, kind="lora"):
    adapters.attach(denoiser, rank, alpha, targets, seed, kind)
    return denoiser


def trained(denoiser, **options):
    return say_something(attach(denoiser, **options))


def save(denoiser, folder, kind=StableDiffusionPipeline):
    adapters.save(denoiser, folder, kind)


@torch.no_grad()
def answer(denoiser, family="sd"):
    return predict(denoiser, family)


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as problem:
        call(*arguments, **options)
    return str(problem.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(model, family, kind):
    before = answer(model, family)
    attach(model, targets="attention", kind=kind)
    assert torch.equal(answer(model, family), before)
    assert adapters.attached(model) == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_disabled_adapter_is_the_base_bit_for_bit(model, family, kind):
    base = answer(model, family)
    tuned = answer(trained(model, targets="attention", kind=kind), family)
    assert (tuned - base).abs().max() > 0.01
    with adapters.disabled(model):
        assert torch.equal(answer(model, family), base)
    assert torch.equal(answer(model, family), tuned)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_enabled_again_when_something_fails_while_it_was_off(denoiser, kind):
    tuned = answer(trained(denoiser, kind=kind))
    with pytest.raises(ZeroDivisionError), adapters.disabled(denoiser):
        1 / 0  # noqa: B018
    assert torch.equal(answer(denoiser), tuned)


def test_disabling_can_be_switched_off_itself(denoiser):
    tuned = answer(trained(denoiser))
    with adapters.disabled(denoiser, really=False):
        assert torch.equal(answer(denoiser), tuned)


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_adapter_leaves_the_base_bit_for_bit(model, family, kind):
    base, names = answer(model, family), set(model.state_dict())
    adapters.detach(trained(model, targets="attention", kind=kind))
    assert torch.equal(answer(model, family), base)
    assert set(model.state_dict()) == names
    assert not adapters.parameters(model) and adapters.attached(model) is None
    adapters.detach(model)  # nothing there: nothing happens


@pytest.mark.parametrize("kind", KINDS)
def test_asking_the_reference_does_not_disturb_the_gradient(denoiser, kind):
    """Between a forward and its backward the weights may be swapped out and in again, also where nothing is recorded."""
    gradients = []
    for ask in (False, True):
        trained(denoiser, kind=kind)
        loss = predict(denoiser, "sd").square().mean()
        if ask:
            with torch.inference_mode(), adapters.disabled(denoiser):
                predict(denoiser, "sd")
        loss.backward()
        gradients.append({name: weight.grad.clone() for name, weight in adapters.parameters(denoiser).items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_every_weight_of_a_full_denoiser_trains_in_single_precision(tiny_sd):
    half = denoiser_of(pipeline(tiny_sd, "sd", dtype=torch.bfloat16))
    before = {name: weight.clone() for name, weight in half.state_dict().items()}
    attach(half, kind="full")
    assert adapters.parameters(half).keys() == before.keys()
    assert {weight.dtype for weight in half.parameters()} == {torch.float32}
    fresh = answer(half)
    with adapters.disabled(half):
        assert torch.equal(answer(half), fresh)  # the reference computes as the policy does: margin 0 at the first step
    adapters.detach(say_something(half))
    after = half.state_dict()
    assert all(torch.equal(after[name], weight) and after[name].dtype == torch.bfloat16 for name, weight in before.items())


def test_a_preset_names_the_modules_of_its_family(model, family):
    names = {part: adapters.resolve_targets(model, part) for part in ("attention", "attention+mlp")}
    found = {part: adapters._matching(adapters._modules(model), targets) for part, targets in names.items()}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found["attention"] == {name for name in linear if ".attn" in name}
    more = found["attention+mlp"] - found["attention"]
    assert more == {name for name in linear if ".ff" in name or "proj_mlp" in name or ("single" in name and "proj_out" in name)}
    assert more and "proj_out" not in more


def test_the_attention_preset_of_a_unet_is_the_list_of_old(denoiser):
    drawn = []
    for targets in (TARGETS, "attention"):
        attach(denoiser, targets=targets)
        drawn.append({name: weight.clone() for name, weight in adapters.parameters(denoiser).items()})
    assert drawn[0].keys() == drawn[1].keys() and all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_a_list_of_names_stays_a_list(denoiser):
    assert adapters.resolve_targets(denoiser, ["to_q", "conv1"]) == ["to_q", "conv1"]


def test_a_preset_for_an_unknown_denoiser_is_refused(denoiser):
    other = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    assert refused(adapters.resolve_targets, other, "attention") == (
        "finetune.targets: 'attention' is known for UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel, not for "
        "AutoencoderKL: name its modules in a list"
    )
    assert refused(adapters.resolve_targets, denoiser, "attn") == (
        "finetune.targets: no preset called 'attn'; use attention or attention+mlp, or a list of module names"
    )


def test_an_unknown_kind_is_refused(denoiser):
    assert refused(attach, denoiser, kind="lokr") == "finetune.adapter: there is no 'lokr'; use one of lora, rslora, dora, full"


@pytest.mark.parametrize("kind, scale", [("lora", 2.0), ("rslora", 4.0)])
def test_rank_stabilised_lora_divides_alpha_by_the_root_of_the_rank(denoiser, kind, scale):
    """rank 4, alpha 8: 8 / 4 = 2, and 8 / sqrt(4) = 4."""
    attach(denoiser, rank=4, alpha=8.0, kind=kind)
    found = {module.scaling["policy"] for module in denoiser.modules() if hasattr(module, "scaling")}
    assert found == {scale}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_comes_back_as_it_was(model, family, kind, tmp_path):
    tuned = answer(trained(model, targets="attention+mlp", alpha=8.0, kind=kind), family)
    weights = {name: weight.clone() for name, weight in adapters.parameters(model).items()}
    save(model, tmp_path, PIPELINES[family])
    adapters.detach(model)
    adapters.load(model, tmp_path)
    found = adapters.parameters(model)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert torch.equal(answer(model, family), tuned)
    adapters.check_shape(model, 4, 8.0, "attention+mlp", kind)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_the_stock_pipeline_loads_what_was_saved(folder, model, family, kind, tmp_path):
    tuned = answer(trained(model, targets="attention+mlp", alpha=8.0, kind=kind), family)
    save(model, tmp_path, PIPELINES[family])
    assert all(name.startswith(f"{PART[family]}.") for name in load_file(tmp_path / adapters.FILE))
    stock, ours = pipeline(folder, family), pipeline(folder, family)
    plain = draw(stock)
    stock.load_lora_weights(tmp_path, weight_name=adapters.FILE)
    torch.testing.assert_close(answer(denoiser_of(stock), family), tuned, atol=1e-5, rtol=0)
    adapters.load(denoiser_of(ours), tmp_path)
    assert abs(draw(stock) - draw(ours)).max() < 1e-5 and abs(draw(stock) - plain).max() > 1e-3


def test_the_stock_class_loads_a_full_denoiser(folder, model, family, tmp_path):
    tuned = answer(trained(model, kind="full"), family)
    save(model, tmp_path, PIPELINES[family])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", adapters.FULL_FILE]
    assert torch.equal(answer(type(model).from_pretrained(tmp_path, local_files_only=True), family), tuned)


def test_only_the_adapter_is_trained(denoiser):
    attach(denoiser, rank=4)
    found = adapters.parameters(denoiser)
    assert found and all("lora_" in name for name in found)
    # each target is (out, in): rank * (in + out) numbers
    wanted = sum(4 * sum(weight.shape) for name, weight in denoiser.state_dict().items()
                 if name.removesuffix(".base_layer.weight").endswith(tuple(TARGETS)) and name.endswith("base_layer.weight"))
    assert sum(weight.numel() for weight in found.values()) == wanted


def test_an_adapter_is_drawn_from_its_seed_and_from_nothing_else(denoiser):
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (5, 5, 6):
        attach(denoiser, seed=seed)
        drawn.append(torch.cat([w.flatten() for n, w in adapters.parameters(denoiser).items() if "lora_A" in n]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_masters_of_a_half_precision_denoiser_are_single(tiny_sd):
    denoiser = denoiser_of(pipeline(tiny_sd, "sd", dtype=torch.bfloat16))
    attach(denoiser)
    assert {weight.dtype for weight in adapters.parameters(denoiser).values()} == {torch.float32}
    assert answer(denoiser).dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_a_saved_adapter_comes_back_as_it_was(denoiser, tmp_path, alpha):
    tuned = answer(trained(denoiser, alpha=alpha))
    weights = {name: weight.clone() for name, weight in adapters.parameters(denoiser).items()}
    save(denoiser, tmp_path)
    adapters.detach(denoiser)
    adapters.load(denoiser, tmp_path)
    found = adapters.parameters(denoiser)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert torch.equal(answer(denoiser), tuned)
    adapters.check_shape(denoiser, 4, alpha, TARGETS)


def test_an_adapter_saved_again_is_the_same_file(denoiser, tmp_path):
    """Eight times, as safetensors alone would order its two notes by a coin."""
    trained(denoiser)
    for i in range(8):
        save(denoiser, tmp_path / str(i))
    assert len({(tmp_path / str(i) / adapters.FILE).read_bytes() for i in range(8)}) == 1


def test_an_adapter_without_notes_is_read_from_its_tensors(denoiser, tmp_path):
    """Other trainers leave no metadata: the rank is in the shapes, the targets in the names, and alpha is the rank."""
    tuned = answer(trained(denoiser))
    save(denoiser, tmp_path / "noted")
    with safe_open(tmp_path / "noted" / adapters.FILE, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    (tmp_path / "bare").mkdir()
    save_file(weights, tmp_path / "bare" / adapters.FILE)
    adapters.detach(denoiser)
    adapters.load(denoiser, tmp_path / "bare")
    assert torch.equal(answer(denoiser), tuned)


def test_another_shape_between_rounds_is_refused(denoiser):
    attach(denoiser)
    assert refused(adapters.check_shape, denoiser, 8, 4.0, TARGETS) == (
        "finetune.rank, alpha or targets changed between rounds: the last adapter has rank 4, alpha 4, targets "
        "['to_k', 'to_out.0', 'to_q', 'to_v']; keep them for all rounds of a run"
    )


def test_another_kind_between_rounds_is_refused(denoiser):
    attach(denoiser, kind="rslora")
    assert refused(adapters.check_shape, denoiser, 4, 4.0, TARGETS, "dora") == (
        "finetune.adapter changed between rounds: the last one is 'rslora', not 'dora'; keep it for all rounds of a run"
    )
    attach(denoiser, kind="full")
    adapters.check_shape(denoiser, 64, 1.0, "attention", "full")  # rank, alpha and targets say nothing of full fine-tuning


def test_targets_that_fit_nothing_are_named(denoiser):
    """Also beside others that fit: a misspelt name is not passed over."""
    message = refused(attach, denoiser, targets=["to_x"])
    assert message.startswith("finetune.targets: ['to_x'] fit no module of the denoiser (its modules end in act, attentions, attn1, ")
    assert refused(attach, denoiser, targets=["to_q", "to_x"]).startswith("finetune.targets: ['to_x'] fit no module")
    assert refused(attach, denoiser, targets=["attn1"]).startswith("finetune.targets: ['attn1'] cannot be adapted (")
    assert adapters.attached(denoiser) is None


def test_a_folder_without_an_adapter_is_named(denoiser, tmp_path):
    assert refused(adapters.load, denoiser, tmp_path) == (
        f"there is no LoRA at {tmp_path / adapters.FILE}: run the round that makes it, or name another folder"
    )


def test_a_file_without_an_adapter_for_a_denoiser_is_named(denoiser, tmp_path):
    save_file({"text_encoder.q.lora_A.weight": torch.zeros(4, 4)}, tmp_path / adapters.FILE)
    assert refused(adapters.load, denoiser, tmp_path) == (
        f"{tmp_path / adapters.FILE} holds no LoRA for a denoiser; name another file"
    )


def test_an_adapter_of_another_denoiser_is_refused(denoiser, tmp_path):
    save(trained(denoiser), tmp_path)
    with safe_open(tmp_path / adapters.FILE, framework="pt") as file:
        notes, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    some = dict(list(weights.items())[:4])
    save_file(some, tmp_path / adapters.FILE, metadata=notes)
    places = len(adapters.parameters(denoiser))
    assert refused(adapters.load, denoiser, tmp_path) == (
        f"{tmp_path / adapters.FILE} was made for another denoiser (4 tensors, {places} places): use its own model"
    )


def test_an_adapter_of_a_wider_denoiser_is_refused(denoiser, tmp_path):
    """Same names, other widths: peft alone would end in a traceback."""
    save(trained(denoiser), tmp_path)
    with safe_open(tmp_path / adapters.FILE, framework="pt") as file:
        notes, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wider = {name: torch.cat([w, w], 1) if "lora_A" in name else torch.cat([w, w], 0) for name, w in weights.items()}
    save_file(wider, tmp_path / adapters.FILE, metadata=notes)
    message = refused(adapters.load, denoiser, tmp_path)
    assert message.startswith(f"{tmp_path / adapters.FILE} was made for another denoiser")


def test_a_damaged_adapter_file_is_named(denoiser, tmp_path):
    (tmp_path / adapters.FILE).write_bytes(b"not safetensors")
    message = refused(adapters.load, denoiser, tmp_path)
    assert message.startswith(f"{tmp_path / adapters.FILE} cannot be read (")


def test_a_unet_adapter_is_refused_by_a_transformer(denoiser, tiny_flux, tmp_path):
    save(trained(denoiser), tmp_path)
    flux = denoiser_of(pipeline(tiny_flux, "flux"))
    message = refused(adapters.load, flux, tmp_path)
    assert message.startswith(f"{tmp_path / adapters.FILE} was made for another denoiser (")
    assert adapters.attached(flux) is None


def test_a_full_denoiser_of_another_shape_is_refused(denoiser, tmp_path):
    save(attach(denoiser, kind="full"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    other = UNet2DConditionModel.from_config({**config, "cross_attention_dim": 32})
    message = refused(adapters.load, other, tmp_path)
    places = len(other.state_dict())
    assert message == f"{tmp_path / adapters.FULL_FILE} was made for another denoiser ({places} tensors, {places} places): use its own model"


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_scaled_adapter_lies_between_the_base_and_itself(denoiser, kind):
    base, tuned = answer(denoiser), answer(trained(denoiser, kind=kind))
    for share, wanted in ((0.0, base), (1.0, tuned)):
        with adapters.scaled(denoiser, share):
            assert torch.equal(answer(denoiser), wanted)
    with pytest.raises(ZeroDivisionError), adapters.scaled(denoiser, 0.5):
        1 / 0  # noqa: B018
    assert torch.equal(answer(denoiser), tuned)


@pytest.mark.parametrize("kind", ["dora", "full"])
def test_only_a_lora_can_be_scaled(denoiser, kind):
    def half():
        with adapters.scaled(attach(denoiser, kind=kind), 0.5):
            pass

    assert refused(half).startswith("finetune.reference mix and finetune.strength need a plain LoRA")
