"""A LoRA changes nothing until it is trained, comes off bit for bit, and comes back from disk as it was."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators.text2img import Text2Image

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def generator(tiny_sd):
    return Text2Image(str(tiny_sd))


def attach(generator, rank=4, alpha=4.0, targets=TARGETS, seed=5):
    adapters.attach(generator.denoiser, rank, alpha, targets, seed)


def trained(generator, **options):
    """With an adapter that says something: B is no longer zero."""
    attach(generator, **options)
    random = torch.Generator().manual_seed(1)
    for weight in adapters.parameters(generator.denoiser).values():
        weight.data = 0.2 * torch.randn(weight.shape, generator=random)
    return generator


@torch.no_grad()
def answer(generator):
    random = torch.Generator().manual_seed(0)
    x_t, tokens = torch.randn(2, *generator.latent_shape, generator=random), torch.randn(2, 16, 16, generator=random)
    return generator.denoise(x_t, torch.tensor([400, 10]), tokens)


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as problem:
        call(*arguments, **options)
    return str(problem.value)


def test_a_fresh_adapter_changes_nothing(generator):
    before = answer(generator)
    attach(generator)
    assert torch.equal(answer(generator), before)


def test_a_disabled_adapter_is_the_base_bit_for_bit(generator):
    base = answer(generator)
    tuned = answer(trained(generator))
    assert (tuned - base).abs().max() > 0.01
    with adapters.disabled(generator.denoiser):
        assert torch.equal(answer(generator), base)
    assert torch.equal(answer(generator), tuned)


def test_an_adapter_is_enabled_again_when_something_fails_while_it_was_off(generator):
    tuned = answer(trained(generator))
    with pytest.raises(ZeroDivisionError), adapters.disabled(generator.denoiser):
        1 / 0  # noqa: B018
    assert torch.equal(answer(generator), tuned)


def test_disabling_can_be_switched_off_itself(generator):
    tuned = answer(trained(generator))
    with adapters.disabled(generator.denoiser, really=False):
        assert torch.equal(answer(generator), tuned)


def test_a_detached_adapter_leaves_the_base_bit_for_bit(generator):
    base, names = answer(generator), set(generator.denoiser.state_dict())
    adapters.detach(trained(generator).denoiser)
    assert torch.equal(answer(generator), base)
    assert set(generator.denoiser.state_dict()) == names
    adapters.detach(generator.denoiser)  # nothing there: nothing happens


def test_only_the_adapter_is_trained(generator):
    attach(generator, rank=4)
    found = adapters.parameters(generator.denoiser)
    assert found and all("lora_" in name for name in found)
    # each target is (out, in): rank * (in + out) numbers
    wanted = sum(4 * sum(weight.shape) for name, weight in generator.denoiser.state_dict().items()
                 if name.removesuffix(".base_layer.weight").endswith(tuple(TARGETS)) and name.endswith("base_layer.weight"))
    assert sum(weight.numel() for weight in found.values()) == wanted


def test_an_adapter_is_drawn_from_its_seed_and_from_nothing_else(generator):
    before = torch.random.get_rng_state()
    drawn = []
    for seed in (5, 5, 6):
        attach(generator, seed=seed)
        drawn.append(torch.cat([w.flatten() for n, w in adapters.parameters(generator.denoiser).items() if "lora_A" in n]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_masters_of_a_half_precision_denoiser_are_single(tiny_sd):
    generator = Text2Image(str(tiny_sd), dtype="bfloat16")
    attach(generator)
    assert {weight.dtype for weight in adapters.parameters(generator.denoiser).values()} == {torch.float32}
    assert answer(generator).dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_a_saved_adapter_comes_back_as_it_was(generator, tmp_path, alpha):
    tuned = answer(trained(generator, alpha=alpha))
    weights = {name: weight.clone() for name, weight in adapters.parameters(generator.denoiser).items()}
    generator.save_adapter(tmp_path)
    adapters.detach(generator.denoiser)
    adapters.load(generator.denoiser, tmp_path)
    found = adapters.parameters(generator.denoiser)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert torch.equal(answer(generator), tuned)
    adapters.check_shape(generator.denoiser, 4, alpha, TARGETS)


def test_an_adapter_saved_again_is_the_same_file(generator, tmp_path):
    """Eight times, as safetensors alone would order its two notes by a coin."""
    trained(generator)
    for i in range(8):
        generator.save_adapter(tmp_path / str(i))
    assert len({(tmp_path / str(i) / adapters.FILE).read_bytes() for i in range(8)}) == 1


def test_an_adapter_without_notes_is_read_from_its_tensors(generator, tmp_path):
    """Other trainers leave no metadata: the rank is in the shapes, the targets in the names, and alpha is the rank."""
    tuned = answer(trained(generator))
    generator.save_adapter(tmp_path / "noted")
    with safe_open(tmp_path / "noted" / adapters.FILE, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    (tmp_path / "bare").mkdir()
    save_file(weights, tmp_path / "bare" / adapters.FILE)
    adapters.detach(generator.denoiser)
    adapters.load(generator.denoiser, tmp_path / "bare")
    assert torch.equal(answer(generator), tuned)


def test_another_shape_between_rounds_is_refused(generator):
    attach(generator)
    assert refused(adapters.check_shape, generator.denoiser, 8, 4.0, TARGETS) == (
        "finetune.rank, alpha or targets changed between rounds: the last adapter has rank 4, alpha 4, targets "
        "['to_k', 'to_out.0', 'to_q', 'to_v']; keep them for all rounds of a run"
    )


def test_targets_that_fit_nothing_are_named(generator):
    message = refused(attach, generator, targets=["to_x"])
    assert message.startswith("finetune.targets: ['to_x'] fit no module of the denoiser (")


def test_a_folder_without_an_adapter_is_named(generator, tmp_path):
    assert refused(adapters.load, generator.denoiser, tmp_path) == (
        f"there is no LoRA at {tmp_path / adapters.FILE}: run the round that makes it, or name another folder"
    )


def test_a_file_without_an_adapter_for_a_unet_is_named(generator, tmp_path):
    save_file({"text_encoder.q.lora_A.weight": torch.zeros(4, 4)}, tmp_path / adapters.FILE)
    assert refused(adapters.load, generator.denoiser, tmp_path) == (
        f"{tmp_path / adapters.FILE} holds no LoRA for a UNet; name another file"
    )


def test_an_adapter_of_another_denoiser_is_refused(generator, tmp_path):
    trained(generator).save_adapter(tmp_path)
    with safe_open(tmp_path / adapters.FILE, framework="pt") as file:
        notes, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    some = dict(list(weights.items())[:4])
    save_file(some, tmp_path / adapters.FILE, metadata=notes)
    places = len(adapters.parameters(generator.denoiser))
    assert refused(adapters.load, generator.denoiser, tmp_path) == (
        f"{tmp_path / adapters.FILE} was made for another denoiser (4 tensors, {places} places): use its own model"
    )


def test_an_adapter_of_a_wider_denoiser_is_refused(generator, tmp_path):
    """Same names, other widths: peft alone would end in a traceback."""
    trained(generator).save_adapter(tmp_path)
    with safe_open(tmp_path / adapters.FILE, framework="pt") as file:
        notes, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wider = {name: torch.cat([w, w], 1) if "lora_A" in name else torch.cat([w, w], 0) for name, w in weights.items()}
    save_file(wider, tmp_path / adapters.FILE, metadata=notes)
    message = refused(adapters.load, generator.denoiser, tmp_path)
    assert message.startswith(f"{tmp_path / adapters.FILE} was made for another denoiser")


def test_a_damaged_adapter_file_is_named(generator, tmp_path):
    (tmp_path / adapters.FILE).write_bytes(b"not safetensors")
    message = refused(adapters.load, generator.denoiser, tmp_path)
    assert message.startswith(f"{tmp_path / adapters.FILE} cannot be read (")
