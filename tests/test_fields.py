"""Every field of an accepted model's configuration is read, built into its network, idle here, or refused by name."""

import contextlib
import importlib
import inspect
import json
import shutil
from fractions import Fraction
from pathlib import Path

import diffusers
import families
import numpy as np
import pytest
import torch
from original_names import single_file
from safetensors.torch import save_file
from whole_runs import prepare
from whole_runs import refused as refuses

from fashiondpo_pipeline import diffusion, seeds
from fashiondpo_pipeline.checkpoints import Folder, open_source
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators import fields
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.registry import FAMILIES
from fashiondpo_pipeline.sampling import Guidance, sample

pytestmark = pytest.mark.filterwarnings(families.QUIET, "ignore:__array_wrap__:DeprecationWarning")
SIZE = {"height": 16, "width": 16}
PROMPT = "a red bag"


@pytest.fixture(scope="module")
def folders(tiny_sd, tiny_sd_v, tiny_sdxl, tiny_sd3, tiny_flux):
    return {"sd": tiny_sd, "sd v": tiny_sd_v, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture
def says(monkeypatch):
    """Lets a part's configuration say something else, or lack what is None; "" is model_index.json."""
    config, read = Folder.config, Folder.index.func

    def change(part, values, lacks=()):
        def other(found):
            return {name: value for name, value in (found | values).items() if name not in lacks}

        if part:
            monkeypatch.setattr(
                Folder,
                "config",
                lambda self, asked: other(config(self, asked)) if asked == part else config(self, asked),
            )
        else:
            monkeypatch.setattr(Folder, "index", property(lambda self: other(read(self))))

    return change


def refused(folder, **options):
    with pytest.raises(UserError) as problem:
        generator = text2img(str(folder), **options)
        assert generator.latent_shape
    return str(problem.value).splitlines()


def in_file(folder, part):
    """How a sentence about a part's configuration begins."""
    return f"generator.model: {folder}/{part}/config.json: "


def copy(folder, target, part, **values):
    """A copy of a folder with fields of one part set on disk, where stock diffusers reads them too."""
    shutil.copytree(folder, target)
    path = next(
        path
        for path in (target / part / "config.json", target / part / "scheduler_config.json")
        if path.is_file()
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


# -- the tables are diffusers' own signatures

MODULES = {
    "LMSDiscreteScheduler": "diffusers.schedulers.scheduling_lms_discrete"
}  # which diffusers itself hides where scipy is not there


def class_of(name):
    return getattr(importlib.import_module(MODULES[name]) if name in MODULES else diffusers, name)


def arguments(name):
    found = inspect.signature(class_of(name).__init__).parameters.values()
    return {
        one.name
        for one in found
        if one.name != "self" and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }


def tables():
    """(class, what its fields may be) of everything that any family accepts."""
    for name in FAMILIES.builtin:
        family = FAMILIES.find(name)
        yield name, family.pipeline_fields
        for known in (family.schedulers, family.vaes, family.denoisers):
            yield from known.items()


TABLES = list(tables())


@pytest.mark.parametrize(("name", "table"), TABLES, ids=[name for name, _ in TABLES])
def test_no_field_of_a_class_is_missing(name, table):
    """A new field of a new diffusers fails here and not in a run: look what it does, and put it into the table."""
    assert len(arguments(name)) > 5
    assert arguments(name) - table.keys() == set()


def test_no_field_of_a_table_is_made_up():
    """Those that share a table have its fields between them."""
    for shared in {id(table): table for _, table in TABLES}.values():
        theirs = set().union(*(arguments(name) for name, table in TABLES if table is shared))
        assert shared.keys() - theirs <= fields.ELSEWHERE
    assert not fields.ELSEWHERE & arguments("StableDiffusionXLPipeline")


@pytest.mark.parametrize(("name", "table"), TABLES, ids=[name for name, _ in TABLES])
def test_every_field_says_why_it_is_not_read(name, table):
    for field in table.values():
        assert field.what in ("read", "built", "idle", "refused")
        assert field.why or field.what in ("read", "built")
        assert bool(field.values) or field.what != "refused"


def test_diffusers_own_defaults_are_accepted_but_for_clipping():
    for name, table in TABLES:
        if name in fields.SCHEDULERS and name not in MODULES:
            found = fields.problems("f", {}, table, fields.defaults_of(class_of(name)), name)
            assert len(found) == (fields.defaults_of(class_of(name)).get("clip_sample") is True), found


# -- what is not known is refused, by file, field and value, all at once

BOUNDED = [
    (family, part, name, field.values)
    for family, pipeline in (
        ("sd", "StableDiffusionPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
        ("sd3", "StableDiffusion3Pipeline"),
        ("flux", "FluxPipeline"),
    )
    for kind in [FAMILIES.find(pipeline)]
    for part, known in (
        (kind.denoiser_part, kind.denoisers),
        ("vae", kind.vaes),
        ("scheduler", kind.schedulers),
        ("", {"": kind.pipeline_fields}),
    )
    for name, field in next(iter(known.values())).items()
    if field.values is not None and name not in kind.corrected
]


@pytest.mark.parametrize(
    ("family", "part", "name", "values"), BOUNDED, ids=["-".join(case[:3]) for case in BOUNDED]
)
def test_a_value_that_is_not_known_is_refused_by_name(folders, says, family, part, name, values):
    wrong = (
        not values[0]
        if isinstance(values[0], bool)
        else [0.5] * 4
        if name.startswith("latents")
        else "other"
        if isinstance(values[0], str)
        else 7
    )
    says(part, {name: wrong})
    found = refused(folders[family], **SIZE)
    file = (
        folders[family]
        / part
        / ("scheduler_config.json" if part == "scheduler" else "config.json" if part else "model_index.json")
    )
    assert found[0].startswith(f"generator.model: {file}: {name} is {wrong!r}, and only ")
    assert all(repr(value) in found[0] for value in values)
    assert len(found) == 1 or family == "flux"


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", ""])
def test_a_field_nobody_knows_is_refused_by_name(folders, says, part):
    says(part, {"vibrance": 0.5})
    file = (
        folders["sd"]
        / part
        / ("scheduler_config.json" if part == "scheduler" else "config.json" if part else "model_index.json")
    )
    assert refused(folders["sd"]) == [
        f"generator.model: {file}: the field vibrance (0.5) is not known here, and may change what the model "
        f"means: use another model, or take "
        "it out if it changes nothing"
    ]


def test_everything_is_said_at_once(folders, monkeypatch):
    config = Folder.config
    new = {
        "vae": {"latents_mean": [1.0] * 4, "glow": 1},
        "unet": {"time_cond_proj_dim": 256},
        "scheduler": {"thresholding": True},
    }
    monkeypatch.setattr(Folder, "config", lambda self, part: config(self, part) | new.get(part, {}))
    found = refused(folders["sd"])
    assert len(found) == 4
    for line, (part, name) in zip(
        found,
        [
            ("scheduler", "thresholding"),
            ("vae", "latents_mean"),
            ("vae", "glow"),
            ("unet", "time_cond_proj_dim"),
        ],
        strict=True,
    ):
        assert f"/{part}/" in line and name in line


@pytest.mark.parametrize(
    "kind",
    [
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "DDIMInverseScheduler",
        "CMStochasticIterativeScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "CogVideoXDDIMScheduler",
    ],
)
def test_a_scheduler_of_another_kind_is_refused_by_its_class(folders, tmp_path, kind):
    """As Playground 2.5 and CosXL have them: 900 to 0 would be told where the model knows 1.1 to -1.55."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "m")
    getattr(diffusers, kind)().save_pretrained(folder / "scheduler")
    says = (
        f"generator.model: {folder}: its scheduler is a '{kind}', whose meaning is not known here "
        "(known: DDIMParallelScheduler, "
    )
    assert refused(folder)[0].startswith(says), "the file's own word"
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", kind]}))
    assert refused(folder)[0].startswith(says), "the word of the whole"


def test_it_is_refused_before_anything_is_drawn(folders, tmp_path, tiny_clip):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "m")
    diffusers.EDMEulerScheduler().save_pretrained(folder / "scheduler")
    with contextlib.chdir(prepare(tmp_path / "place", folder, tiny_clip)):
        for command in (("round", "--n", "1"), ("plan",)):
            assert "its scheduler is a 'EDMEulerScheduler', whose meaning is not known here" in refuses(*command)
        assert not list(Path("runs").rglob("*.parquet"))


@pytest.mark.parametrize(
    "kind",
    ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"],
)
def test_a_flow_that_walks_otherwise_is_refused_by_its_class(folders, tmp_path, kind):
    folder = shutil.copytree(folders["sd3"], tmp_path / "m")
    getattr(diffusers, kind)().save_pretrained(folder / "scheduler")
    assert refused(folder) == [
        f"generator.model: {folder}: its scheduler is a '{kind}', whose meaning is not known here (known: "
        "FlowMatchEulerDiscreteScheduler): use another model"
    ]


def test_another_vae_or_denoiser_is_refused_by_its_class(folders, says):
    says("", {"vae": ["diffusers", "AutoencoderTiny"], "unet": ["diffusers", "UNet2DModel"]})
    found = refused(folders["sd"])
    assert [line.partition(" is a ")[2].partition(",")[0] for line in found] == [
        "'AutoencoderTiny'",
        "'UNet2DModel'",
    ]


# -- configurations as they are published are accepted

PUBLISHED = {
    "sd": [
        (
            "PNDMScheduler",
            {
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "clip_sample": False,
                "num_train_timesteps": 1000,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "trained_betas": None,
            },
        ),
        (
            "LMSDiscreteScheduler",
            {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085},
        ),
        (
            "EulerDiscreteScheduler",
            {
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "interpolation_type": "linear",
                "sigma_max": None,
                "timestep_spacing": "trailing",
                "timestep_type": "discrete",
                "use_karras_sigmas": False,
            },
        ),
    ],
    "sdxl": [
        (
            "EulerDiscreteScheduler",
            {
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "clip_sample": False,
                "interpolation_type": "linear",
                "sample_max_value": 1.0,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "timestep_spacing": "leading",
                "trained_betas": None,
                "use_karras_sigmas": False,
            },
        ),
        (
            "DPMSolverMultistepScheduler",
            {
                "algorithm_type": "dpmsolver++",
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "euler_at_final": False,
                "final_sigmas_type": "zero",
                "lambda_min_clipped": float("-inf"),
                "lower_order_final": True,
                "solver_order": 2,
                "use_karras_sigmas": True,
                "variance_type": None,
            },
        ),
        (
            "EulerAncestralDiscreteScheduler",
            {
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "timestep_spacing": "trailing",
                "rescale_betas_zero_snr": False,
            },
        ),
    ],
    "sd3": [("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0})],
    "flux": [
        (
            "FlowMatchEulerDiscreteScheduler",
            {
                "base_image_seq_len": 256,
                "base_shift": 0.5,
                "max_image_seq_len": 4096,
                "max_shift": 1.15,
                "num_train_timesteps": 1000,
                "shift": 3.0,
                "use_dynamic_shifting": True,
            },
        )
    ],
}
CASES = [(family, kind, config) for family, found in PUBLISHED.items() for kind, config in found]


@pytest.mark.parametrize(
    ("family", "kind", "config"), CASES, ids=[f"{family}-{kind}" for family, kind, _ in CASES]
)
def test_a_published_scheduler_is_accepted(folders, tmp_path, family, kind, config):
    folder = shutil.copytree(folders[family], tmp_path / "m")
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": kind, "_diffusers_version": "0.19.0.dev0", **config})
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    assert len(text2img(str(folder), **SIZE).schedule(10).timesteps) == 10


# -- what is read of a noise schedule is read as the model's own class does

NOISES = [
    {},
    {"num_train_timesteps": 500},
    {"beta_start": 0.002},
    {"beta_end": 0.03},
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    {"rescale_betas_zero_snr": True},
    {"prediction_type": "v_prediction"},
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": True},
    {"steps_offset": 3},
    {"steps_offset": 0},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]
KINDS = [name for name in fields.SCHEDULERS if name not in MODULES]


def test_everything_that_is_read_of_a_noise_schedule_is_tried():
    tried = set().union(*NOISES)
    assert tried == {name for name, field in fields.NOISE.items() if field.what == "read"}
    for name, field in fields.NOISE.items():
        if field.what == "read" and field.values:
            assert {noise[name] for noise in NOISES if name in noise} | {"epsilon"} >= set(field.values)


TRIED = [(kind, noise) for kind in KINDS for noise in NOISES if noise.keys() <= arguments(kind)]


@pytest.mark.parametrize(
    ("kind", "noise"), TRIED, ids=[f"{kind}-{json.dumps(noise)[:40]}" for kind, noise in TRIED]
)
def test_the_noise_is_that_of_the_models_own_class_and_the_walk_that_of_ddim(folders, says, kind, noise):
    """A file of this class with this field alone: what it lacks is as its own class takes it."""
    known = arguments(kind)
    noise = noise | ({"prediction_type": "v_prediction"} if "rescale_betas_zero_snr" in noise else {})
    noise = noise | ({"clip_sample": False} if "clip_sample" in known else {})
    every = json.loads((folders["sdxl"] / "scheduler" / "scheduler_config.json").read_text())
    says("scheduler", {"_class_name": kind, **noise}, lacks=every.keys() - noise.keys() - {"_class_name"})
    generator = text2img_as(folders["sdxl"], kind)
    own = class_of(kind)(**noise)
    ours = generator.schedule(10)
    last = (
        slice(0, -1) if noise.get("rescale_betas_zero_snr") else slice(None)
    )  # others put 2^-24 where no signal is left
    assert torch.equal(ours.alpha_bar[last], own.alphas_cumprod.double()[last])
    assert ours.alpha_bar[-1] == pytest.approx(own.alphas_cumprod[-1].item(), abs=1e-7)
    assert ours.prediction == own.config.prediction_type
    walked = diffusers.DDIMScheduler.from_config(
        own.config
    )  # fields that were not set are DDIM's own then, as in stock code
    walked.set_timesteps(10)
    assert ours.timesteps.tolist() == walked.timesteps.tolist()
    if "set_alpha_to_one" in noise:
        assert ours.alpha_bar_end == walked.final_alpha_cumprod.item()


def text2img_as(folder, kind):
    """The generator of a folder whose index names another scheduler."""
    whole = Folder.index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Folder, "index", property(lambda self: whole.func(self) | {"scheduler": ["diffusers", kind]})
        )
        return text2img(str(folder), **SIZE)


# -- each step arrives at the timestep that the next step is told


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 7, 10, 30])
@pytest.mark.parametrize(
    "noise",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
    ids=["epsilon", "v", "ztsnr"],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_step_arrives_where_the_next_one_is_told_to_be(folders, says, spacing, noise, steps, eta):
    """diffusers' own step, told how far it goes: to the next timestep, and from the last one to the end."""
    says("scheduler", {"timestep_spacing": spacing, "clip_sample": False, **noise})
    generator = text2img(str(folders["sd"]))
    ours, theirs = generator.schedule(steps), diffusers.DDIMScheduler.from_config(generator.scheduler.config)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = (
        theirs.alphas_cumprod.double(),
        theirs.final_alpha_cumprod.double(),
    )
    t = ours.timesteps
    random = torch.Generator().manual_seed(0)
    x_t, said, noise = torch.randn(3, len(t), 4, 2, 2, dtype=torch.float64, generator=random)
    mean = ours.mean(said, x_t, t, eta)
    x_prev = mean + diffusion.wide(ours.std(t, eta), mean) * noise
    for i, (now, then) in enumerate(zip(t.tolist(), [*t.tolist()[1:], -1], strict=True)):
        theirs.num_inference_steps = Fraction(
            theirs.config.num_train_timesteps, now - then
        )  # it goes num_train_timesteps // this far
        row = slice(i, i + 1)
        wanted = theirs.step(
            said[row], now, x_t[row], eta=eta, variance_noise=noise[row] if eta else None
        ).prev_sample
        if eta and ours.alpha_bar[now] == 0 and wanted.isnan().all():
            continue  # diffusers' root of 1 - a_prev - (1 - a_prev), where that is rounded below 0
        assert torch.allclose(wanted, x_prev[row], rtol=0, atol=1e-9)


def test_even_steps_arrive_where_they_always_did(folders):
    """The shipped default's walk: 100 timesteps further, bit for bit."""
    ours = text2img(str(folders["sd"])).schedule(10)
    t = ours.timesteps
    assert t.tolist() == list(range(901, 0, -100))
    assert torch.equal(
        ours.after(t),
        torch.cat([ours.alpha_bar[t[:-1] - 100], torch.tensor([ours.alpha_bar_end], dtype=torch.float64)]),
    )


def test_steps_that_the_model_was_not_trained_with_are_refused(folders, says):
    says("scheduler", {"num_train_timesteps": 20})
    generator = text2img(str(folders["sd"]))
    with pytest.raises(
        UserError, match=r"sample\.steps is 21, and .* was trained with 20 timesteps: lower it"
    ):
        generator.schedule(21)
    with pytest.raises(
        UserError,
        match=r"sample\.steps 20: the walk would go from timestep 20 to 1, and .* knows those from 0 to 19: lower",
    ):
        generator.schedule(20)
    assert len(generator.schedule(19).timesteps) == 19


def test_a_noise_schedule_that_cannot_be_made_is_a_sentence(folders, says):
    says("scheduler", {"beta_start": "little"})
    assert refused(folders["sd"])[0].startswith(
        f"generator.model: {folders['sd']}/scheduler/scheduler_config.json makes no scheduler ("
    )


# -- whole pictures are those of the stock pipeline


def latents_of(stock, steps, **options):
    noise = [seeds.generator("test", 0)]
    return stock(
        PROMPT, generator=noise, num_inference_steps=steps, output_type="latent", **SIZE, **options
    ).images


def walked(generator, steps, guidance=1.0):
    condition = generator.condition([{"prompt": PROMPT}], Guidance(guidance))
    return sample(
        generator.denoise,
        generator.schedule(steps),
        condition,
        [seeds.generator("test", 0)],
        generator.latent_shape,
        eta=0.0,
    ).x_0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "outdated",
    [
        {"steps_offset": 0},
        {"clip_sample": True},
        {"steps_offset": 0, "clip_sample": True, "set_alpha_to_one": True},
    ],
)
def test_an_outdated_scheduler_of_stable_diffusion_is_corrected_as_diffusers_does(
    folders, tmp_path, outdated
):
    """Its pipeline overrules these two, also in the midst of a run, when it is shown our scheduler."""
    folder = copy(folders["sd"], tmp_path / "m", "scheduler", **outdated)
    generator, stock = text2img(str(folder)), families.pipeline(folder, "sd")
    before = generator.schedule(4)
    theirs = latents_of(stock, 4, guidance_scale=1.0)
    assert torch.allclose(walked(generator, 4), theirs, atol=1e-4)
    assert torch.equal(generator.schedule(4).timesteps, before.timesteps), (
        "the text encoder's pipeline changed the walk"
    )
    assert before.timesteps.tolist() == [751, 501, 251, 1]


FLOWS = [
    {"shift": 2.0, "use_dynamic_shifting": False},
    {"use_dynamic_shifting": True, "base_shift": 0.3},
    {"use_dynamic_shifting": True, "max_shift": 5.0, "max_image_seq_len": 8},
    {"use_dynamic_shifting": True, "base_image_seq_len": 2},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_dynamic_shifting": False, "time_shift_type": "exponential"},
    {"shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
]


def test_everything_that_is_read_of_a_flow_is_tried():
    assert set().union(*FLOWS) == {name for name, field in fields.FLOW.items() if field.what == "read"}


@pytest.mark.parametrize("flow", FLOWS, ids=[json.dumps(flow) for flow in FLOWS])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_flow_walks_as_its_stock_pipeline_does(folders, tmp_path, family, flow):
    folder = copy(folders[family], tmp_path / "m", "scheduler", **flow)
    generator, stock = text2img(str(folder), **SIZE), families.pipeline(folder, family)
    theirs = latents_of(stock, 4, guidance_scale=1.0)
    if family == "flux":
        theirs = stock._unpack_latents(theirs, 16, 16, stock.vae_scale_factor)
    ours, plain = walked(generator, 4), walked(text2img(str(folders[family]), **SIZE), 4)
    assert torch.allclose(ours, theirs, atol=1e-4)
    changes = flow != {"use_dynamic_shifting": False, "time_shift_type": "exponential"} or family == "flux"
    assert ((ours - plain).abs().max() > 1e-3) == changes


def test_a_flow_of_which_nothing_can_be_made_is_a_sentence(folders, says):
    says("scheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": True})
    assert "scheduler_config.json makes no scheduler (Only one of " in refused(folders["sd3"])[0]


# -- the VAE's own mean and spread

SPREAD = {"latents_mean": [-1.6, 1.4, 0.3, -2.0], "latents_std": [8.4, 5.0, 6.1, 0.7]}


def test_pictures_are_decoded_and_encoded_by_the_vaes_own_mean_and_spread(folders, tmp_path):
    """As Stable Diffusion XL's pipeline decodes: latents std / scaling_factor + mean; encoding is the inverse."""
    folder = copy(folders["sdxl"], tmp_path / "m", "vae", scaling_factor=0.5, **SPREAD)
    generator, stock = text2img(str(folder)), families.pipeline(folder, "sdxl")
    x_0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    decode = stock.vae.decode
    stock.vae.decode = lambda latents, **options: seen.append(latents) or decode(latents, **options)
    stock.scheduler.step = lambda said, t, latents, **options: (x_0,)  # whatever is drawn ends there
    with torch.no_grad():
        theirs = (
            stock([PROMPT] * 2, num_inference_steps=1, guidance_scale=1.0, output_type="np", **SIZE).images
            * 255
        )
    assert torch.allclose(generator._to_vae(x_0), seen[0], atol=1e-5)
    assert np.abs(generator.decode(x_0)[0] - theirs).max() <= 1
    assert np.abs(text2img(str(folders["sdxl"])).decode(x_0)[0].astype(float) - theirs).mean() > 3, (
        "it makes a difference"
    )
    assert torch.allclose(generator._of_vae(generator._to_vae(x_0)), x_0, atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    with torch.no_grad():
        moments = stock.vae.encode(
            torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        ).latent_dist.mode()
    mean, std = (torch.tensor(SPREAD[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    assert torch.allclose(generator.encode_pictures(pixels), (moments - mean) * 0.5 / std, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_without_them_nothing_changes(folders, family):
    generator = text2img(str(folders[family]), **SIZE)
    config, x_0 = generator.vae.config, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(generator._to_vae(x_0), x_0 / config.scaling_factor + (config.shift_factor or 0.0))
    assert (config.shift_factor is None) == (family in ("sd", "sdxl"))


@pytest.mark.parametrize(
    "spread", [{"latents_mean": [0.0] * 4}, {"latents_std": [1.0] * 4}, SPREAD | {"latents_std": [1.0] * 3}]
)
def test_half_a_mean_and_spread_is_refused(folders, says, spread):
    says("vae", spread)
    assert refused(folders["sdxl"]) == [
        in_file(folders["sdxl"], "vae") + "latents_mean and latents_std must both have a number for each of the 4 channels, or both be "
        "null: correct the file"
    ]


# -- parts that do not go together, and sizes


def test_a_denoiser_that_is_told_more_than_the_latent_is_refused(folders, says):
    says("unet", {"in_channels": 9})
    assert refused(folders["sd"]) == [
        in_file(folders["sd"], "unet") + "out_channels is 4 and in_channels 9; a StableDiffusionPipeline has a denoiser that is told the "
        "latent alone and answers in its shape: use another model"
    ]


def test_a_vae_of_another_model_is_refused(folders, says):
    says("vae", {"latent_channels": 16})
    for family in ("sd", "sdxl", "sd3", "flux"):
        assert refused(folders[family], **SIZE) == [
            f"generator.model: the latents of {folders[family]} have 16 channels in its VAE and 4 in its "
            f"denoiser: use another model"
        ]


def test_a_refiner_that_calls_itself_a_base_is_refused(folders, says):
    """It is told five numbers beside the prompt, the last of them how fine the picture should be."""
    says("unet", {"projection_class_embeddings_input_dim": 5 * 8 + 16})
    assert refused(folders["sdxl"]) == [
        in_file(folders["sdxl"], "unet") + "the denoiser wants 56 numbers beside the prompt (projection_class_embeddings_input_dim), and "
        "six of the picture's size with the pooled prompt are 64, as for a refiner or another model: use another one"
    ]


def test_a_size_may_be_two_numbers_or_none(folders, says):
    says("unet", {"sample_size": [8, 12]})
    assert text2img(str(folders["sd"])).latent_shape == (4, 8, 12)
    assert text2img(str(folders["sd"]), height=24).latent_shape == (4, 12, 12)
    says("unet", {"sample_size": None})
    assert text2img(str(folders["sd"]), **SIZE).latent_shape == (4, 8, 8)
    assert refused(folders["sd"], height=16) == [
        f"sample.height and sample.width: {folders['sd']}/unet/config.json does not say how large pictures "
        f"are (sample_size is null); set both"
    ]


def test_a_picture_larger_than_the_places_that_a_model_knows_is_refused(folders):
    assert text2img(str(folders["sd3"]), height=32, width=32).latent_shape == (4, 16, 16)
    assert refused(folders["sd3"], height=32, width=36) == [
        f"sample.height and sample.width: {folders['sd3']} knows places in pictures up to 32 pixels wide and "
        f"high (pos_embed_max_size), not 32x36: "
        "draw smaller ones"
    ]


# -- what a single file says of itself


@pytest.fixture(scope="module")
def tensors(tiny_sd):
    return single_file(tiny_sd, 1, {1})


def mark(*names):
    return {name: torch.zeros(0) for name in names}


def test_a_file_marked_as_v_prediction_is_not_taken_for_epsilon(tensors, tiny_sd, tmp_path):
    file, place = tmp_path / "v.safetensors", tiny_sd / "scheduler/scheduler_config.json"
    save_file(tensors | mark("v_pred", "ztsnr"), file)
    assert refused(file, config=str(tiny_sd)) == [
        f"generator.model: {file} carries the key v_pred, so it predicts 'v_prediction', and {place} says "
        f"'epsilon': set prediction_type to "
        "'v_prediction' there, or name the folder of a model like it in generator.config",
        f"generator.model: {file} carries the key ztsnr, so its noise leaves no signal at the last timestep, "
        f"and {place} says otherwise: set "
        "rescale_betas_zero_snr to true there (and timestep_spacing to trailing, as such models are drawn)",
    ]
    torch.save({"state_dict": tensors | mark("v_pred")}, tmp_path / "v.ckpt")
    assert len(refused(tmp_path / "v.ckpt", config=str(tiny_sd))) == 1


def test_a_file_marked_as_its_folder_says_is_accepted(tensors, tiny_sd_v, tmp_path):
    folder = copy(tiny_sd_v, tmp_path / "m", "scheduler", rescale_betas_zero_snr=True)
    save_file(tensors | mark("v_pred", "ztsnr"), tmp_path / "v.safetensors")
    assert text2img(str(tmp_path / "v.safetensors"), config=str(folder)).prediction == "v_prediction"
    assert text2img(str(tmp_path / "v.safetensors"), config=str(folder)).denoiser is not None


@pytest.mark.parametrize(
    ("noted", "meant"),
    [("epsilon", "epsilon"), ("eps", "epsilon"), ("v", "v_prediction"), ("v_prediction", "v_prediction")],
)
def test_a_file_whose_note_says_another_prediction_is_refused(
    tensors, tiny_sd, tiny_sd_v, tmp_path, noted, meant
):
    file = tmp_path / "noted.safetensors"
    save_file(tensors, file, {"modelspec.prediction_type": noted})
    right, wrong = (tiny_sd, tiny_sd_v) if meant == "epsilon" else (tiny_sd_v, tiny_sd)
    assert text2img(str(file), config=str(right)).prediction == meant
    assert (
        f"carries the note modelspec.prediction_type {noted}, so it predicts '{meant}'"
        in refused(file, config=str(wrong))[0]
    )


@pytest.mark.parametrize(
    "keys", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max",), ("v_pred", "edm_vpred.sigma_min")]
)
def test_a_file_marked_as_trained_on_edms_noise_is_refused(tensors, tiny_sd, tmp_path, keys):
    file = tmp_path / "edm.safetensors"
    save_file(tensors | mark(*keys), file)
    assert "as models do that were trained on EDM's noise levels" in refused(file, config=str(tiny_sd))[0]


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_noise_schedule_beside_the_weights_is_held_against_the_folders(
    tensors, tiny_sd, tmp_path, dtype, ending
):
    """The oldest checkpoints hold it; rounded to half precision it is still the same."""

    def file(name, alpha_bar):
        whole = tensors | {"alphas_cumprod": alpha_bar.to(dtype)}
        path = tmp_path / f"{name}.{ending}"
        save_file(whole, path) if ending == "safetensors" else torch.save({"state_dict": whole}, path)
        return path

    own = text2img(str(tiny_sd)).scheduler.alphas_cumprod
    assert text2img(str(file("same", own)), config=str(tiny_sd)).prediction == "epsilon"
    ends = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    )
    for name, other in (
        ("ends", ends.alphas_cumprod),
        ("linear", diffusers.DDIMScheduler().alphas_cumprod),
        ("short", own[:500]),
    ):
        found = refused(file(name, other), config=str(tiny_sd))
        assert found[0].startswith(
            f"generator.model: {tmp_path / name}.{ending} holds its noise schedule (alphas_cumprod, "
            f"{len(other)} timesteps)"
        )


# -- a family of somebody else's


def test_a_family_may_bring_tables_of_its_own(folders, says):
    """A plug-in's subclass says what it accepts; without a word it accepts what its parent does."""
    from fashiondpo_pipeline import checkpoints
    from fashiondpo_pipeline.generators.diffusers_model import Options
    from fashiondpo_pipeline.generators.stable_diffusion import StableDiffusion

    class Clipped(StableDiffusion):
        vaes = {"AutoencoderKL": fields.VAE | {"glow": fields.READ}}  # noqa: RUF012 - a constant

    says("vae", {"glow": 1})
    assert "glow" in refused(folders["sd"])[0]
    found = Clipped(checkpoints.open_source(str(folders["sd"])), Options())
    assert isinstance(found, DiffusersModel) and found.configuration("vae")["glow"] == 1


# -- what earlier versions drew of such models is made anew, and nothing else


@pytest.mark.parametrize(
    ("family", "part", "values", "steps", "latents"),
    [
        ("sd", "scheduler", {}, False, False),
        ("sd", "scheduler", {"timestep_spacing": "linspace"}, True, False),
        ("sd", "scheduler", {"timestep_spacing": "trailing"}, False, False),  # 10 steps are even ones
        ("sd", "scheduler", {"timestep_spacing": "trailing", "num_train_timesteps": 999}, True, False),
        ("sd", "scheduler", {"steps_offset": 0}, True, False),
        ("sdxl", "scheduler", {"steps_offset": 0}, False, False),
        ("sdxl", "vae", SPREAD, True, True),
        ("sd3", "scheduler", {}, False, False),
        ("flux", "scheduler", {}, False, False),
    ],
)
def test_a_model_that_was_read_otherwise_is_drawn_anew(folders, says, family, part, values, steps, latents):
    says(part, values)
    source = open_source(str(folders[family]))
    assert (source.drawn_anew(10), source.drawn_anew(None)) == (steps, latents)


def test_the_shipped_default_is_not_drawn_anew():
    assert not open_source("embedded:fashion_mini/generator").drawn_anew(10)
    assert not open_source("somebody/some-model", "0" * 40).drawn_anew(10), "nothing of a hub is fetched to be looked at"
