"""What every diffusers text-to-image model has in common: where it lies, its parts one by one, prompts, pictures, LoRA files.

A family (Stable Diffusion, SDXL, SD 3, FLUX) is a subclass in a file of its own: how a prompt becomes parts of a condition, and
how the denoiser is called. Parts are loaded when they are first used and can be let go: text encoders are not in memory while
candidates are drawn, the VAE not while a LoRA is trained.
"""

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fashiondpo_pipeline import adapters, checkpoints
from fashiondpo_pipeline.diffusion import EPSILON, FLOW, Ddim, Schedule, V
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.flow import Flow
from fashiondpo_pipeline.generators import fields
from fashiondpo_pipeline.sampling import Condition, Guidance, Parts

# two noise schedules, in shares of signal: half precision rounds by 0.004, rescaling to no signal moves by 0.03
ALIKE = 0.01
DECODED_PIXELS = 2**21  # at once


@dataclass(frozen=True)
class Options:
    """What the configuration says of a model, beside where it lies."""

    dtype: str = "float32"
    prediction: str = "auto"
    height: int | None = None
    width: int | None = None
    device: str = "cpu"
    lora: str | None = None
    lora_scale: float = 1.0
    compile: bool = False


class DiffusersModel:
    """A diffusers pipeline taken apart. Raises UserError where the model does not fit together, or predicts something else than configured."""

    version: ClassVar[int] = 2
    pipeline: ClassVar[str]  # diffusers' class of the whole
    denoiser_part: ClassVar[str] = "unet"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    flow: ClassVar[bool] = False
    patch: ClassVar[int] = 1  # the latent's height and width must be multiples of this
    default_size: ClassVar[int | None] = None  # of the latent, where the denoiser's configuration does not say
    # what is done about each field of a configuration, by diffusers' class; others are refused
    pipeline_fields: ClassVar[fields.Table]
    denoisers: ClassVar[dict[str, fields.Table]]
    vaes: ClassVar[dict[str, fields.Table]] = {"AutoencoderKL": fields.VAE}
    schedulers: ClassVar[dict[str, fields.Table]] = fields.SCHEDULERS
    corrected: ClassVar[dict[str, Any]] = {}  # fields of the scheduler that diffusers' pipeline overrules

    def __init__(self, source: "checkpoints.Source", options: Options):
        self.source, self.options = source, options
        self.name = source.name
        self.device = torch.device(options.device)
        self.dtype = getattr(torch, options.dtype)
        self.notes: list[str] = []  # what the person should know of it
        self.encodings: dict[str, Parts] = {}  # prompt -> its parts, each without a batch dimension
        diffusers_logging.disable_progress_bar()  # loading a folder takes a second; our own bars say what takes long
        transformers_logging.disable_progress_bar()
        self._check_configurations()
        if options.lora:  # read again where it is fused, but told now what is wrong with it
            from fashiondpo_pipeline import lora_settings

            lora_settings.open_lora(Path(options.lora))
            self.notes += lora_settings.doubts(Path(options.lora))
        self.scheduler = self._scheduler()
        self._check_noise()
        self.prediction = FLOW if self.flow else self.scheduler.config.prediction_type
        self._check_prediction(options.prediction)
        if self.device.type == "cuda":
            self._settle_gpu()

    def _settle_gpu(self) -> None:
        """Kernels by which a step says the same while drawing and while training.

        A float32 network computes in float32: TF32, cuDNN's own default for convolutions, rounds by the batch's
        shape so coarsely that the sampler's record was no reference (a margin of 0.12 at step 0 on an H200).
        Attention is not cuDNN's: its backward pass broke off for FLUX.1 at 4,608 tokens (torch 2.11, H200).
        """
        if self.dtype == torch.float32:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.enable_cudnn_sdp(False)

    # -- parts, loaded when used

    @cached_property
    @torch.inference_mode(False)  # it may be first used while sampling, and is trained later
    def denoiser(self) -> Any:
        denoiser = self.source.part(self.denoiser_part, self.dtype)
        denoiser.requires_grad_(False).eval()
        if self.options.lora:
            from fashiondpo_pipeline import lora_formats

            text = lora_formats.fuse(denoiser, Path(self.options.lora), self.options.lora_scale)
            if text:
                self.notes.append(f"{self.options.lora}: its {len(text)} modules of text encoders are left out, only the denoiser's are used")
        return denoiser.to(self.device)

    @cached_property
    def vae(self) -> Any:
        # fp16 VAEs overflow on bright pictures; fp32 costs little
        return self.source.part("vae", torch.float32).requires_grad_(False).eval().to(self.device)

    @cached_property
    def text(self) -> Any:
        """The pipeline with its text encoders and nothing else."""
        parts = {name: self.source.part(name, self.dtype) for name in self.text_parts}
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval().to(self.device)
        others = dict.fromkeys(("vae", self.denoiser_part, *self._not_needed))
        return self.pipeline_class(**parts, **others, scheduler=self.scheduler, **self._pipeline_options)

    _not_needed: ClassVar[tuple[str, ...]] = ()
    _pipeline_options: ClassVar[dict[str, Any]] = {}

    @property
    def pipeline_class(self) -> Any:
        return getattr(importlib.import_module("diffusers"), self.pipeline)

    def load(self, *parts: str) -> None:
        """Have "text", "vae" or "denoiser" in memory now: loading changes torch's defaults for a moment, in every thread."""
        for part in parts:
            getattr(self, part)

    def let_go(self, *parts: str) -> None:
        """Drop "text", "vae" or "denoiser" from memory; it is loaded again when used."""
        for part in parts:
            self.__dict__.pop(part, None)
        if "denoiser" in parts:
            self.__dict__.pop("_compiled", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- what the configurations say

    def configuration(self, part: str) -> dict[str, Any]:
        """A part's configuration, with what diffusers' class takes for the fields that are not there."""
        return fields.defaults_of(self.source.class_of(part)) | self.source.config(part)

    def _check_configurations(self) -> None:
        """Raises UserError with every class and field that is not known here, before anything is loaded."""
        parts = {"scheduler": self.schedulers, "vae": self.vaes, self.denoiser_part: self.denoisers}
        found = fields.problems(self.source.place(""), self.source.index, self.pipeline_fields)
        for part, known in parts.items():
            found += self._unknown(part, known)
        found = found or [*self._misfits(), *self.source.contradictions(self.configuration("scheduler"))]
        if found:
            raise UserError("\n".join(found))

    def _unknown(self, part: str, known: dict[str, fields.Table]) -> list[str]:
        kind, config = self.source.class_of(part), self.source.config(part)
        if part == "scheduler":
            config = config | self.corrected
        for name in (kind.__name__, config.get("_class_name", kind.__name__)):
            if name not in known:
                return [f"generator.model: {self.name}: its {part} is a '{name}', whose meaning is not known "
                        f"here (known: "
                        f"{', '.join(sorted(known))}): use another model"]
        defaults = fields.defaults_of(kind)
        return fields.problems(self.source.place(part), config, known[kind.__name__], defaults, kind.__name__)

    def _misfits(self) -> list[str]:
        """What of the configurations does not go together, a sentence each."""
        found, denoiser, vae = [], self.configuration(self.denoiser_part), self.configuration("vae")
        channels, out = self._channels(denoiser), denoiser.get("out_channels")
        if out not in (None, denoiser["in_channels"]):
            found.append(f"generator.model: {self.source.place(self.denoiser_part)}: out_channels is {out} "
                         f"and in_channels {denoiser['in_channels']}; "
                         f"a {self.pipeline} has a denoiser that is told the latent alone and answers in its "
                         f"shape: use another model")
        elif channels != vae["latent_channels"]:
            found.append(f"generator.model: the latents of {self.name} have {vae['latent_channels']} "
                         f"channels in its VAE and {channels} in its "
                         "denoiser: use another model")
        given = [name for name in ("latents_mean", "latents_std") if vae.get(name) is not None]
        if len(given) == 1 or any(len(vae[name]) != vae["latent_channels"] for name in given):
            found.append(f"generator.model: {self.source.place('vae')}: latents_mean and latents_std must "
                         f"both have a number for each of the "
                         f"{vae['latent_channels']} channels, or both be null: correct the file")
        scheduler = self.configuration("scheduler")
        if scheduler.get("prediction_type") == EPSILON and scheduler.get("rescale_betas_zero_snr"):
            found.append(f"the scheduler of {self.name} begins with no signal at all "
                         f"(rescale_betas_zero_snr) and yet predicts 'epsilon', "
                         "which then says nothing of the picture: correct its scheduler_config.json (such "
                         "models predict 'v_prediction')")
        return found

    def _scheduler(self) -> Any:
        """diffusers' scheduler that walks as is done here: DDIM on the model's own noise schedule, or the flow's."""
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        kind = FlowMatchEulerDiscreteScheduler if self.flow else DDIMScheduler
        # what noise there is is as the model's own class takes it where the file is silent; how it is walked, as DDIM
        own = fields.defaults_of(self.source.class_of("scheduler"))
        said = {name: own[name] for name in fields.MODELS_OWN if name in own}
        said |= self.source.config("scheduler") | self.corrected
        try:
            return kind(**{name: value for name, value in said.items() if name in fields.defaults_of(kind)})
        except (TypeError, ValueError, RuntimeError) as problem:
            raise UserError(f"generator.model: {self.source.place('scheduler')} makes no scheduler "
                            f"({problem}): correct it, or get the model "
                            "anew") from problem

    def _check_noise(self) -> None:
        """Raises UserError if a noise schedule that lies beside the weights is not the scheduler's."""
        beside = None if self.flow else self.source.alpha_bar()
        if beside is None:
            return
        own = self.scheduler.alphas_cumprod
        apart = float((beside.float() - own).abs().max()) if beside.shape == own.shape else float("nan")
        if not apart < ALIKE:
            raise UserError(f"generator.model: {self.name} holds its noise schedule "
                            f"({checkpoints.ALPHA_BAR}, {len(beside)} timesteps), and that of "
                            f"{self.source.place('scheduler')} is another one (they differ by {apart:.2g}): "
                            f"correct beta_start, beta_end, "
                            "beta_schedule or rescale_betas_zero_snr there, or name the folder of a model "
                            "like it in generator.config")

    def _check_prediction(self, wanted: str) -> None:
        if wanted not in ("auto", self.prediction):
            raise UserError(f"generator.prediction is '{wanted}', but the scheduler of {self.name} says "
                            f"'{self.prediction}': "
                            "set generator.prediction to auto, or correct the model's scheduler_config.json")

    # -- the walk

    def schedule(self, steps: int) -> Schedule:
        """The model's own noise in `steps` steps, at the timesteps of diffusers' DDIM or of its flow scheduler."""
        if self.flow:
            return self._flow_schedule(steps)
        most = self.scheduler.config.num_train_timesteps
        if steps > most:
            raise UserError(f"sample.steps is {steps}, and {self.name} was trained with {most} timesteps: "
                            f"lower it")
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps.long()
        if not 0 <= int(timesteps.min()) <= int(timesteps.max()) < most:
            raise UserError(f"sample.steps {steps}: the walk would go from timestep {timesteps.max()} to "
                            f"{timesteps.min()}, and {self.name} knows those "
                            f"from 0 to {most - 1}: lower it, or correct steps_offset in "
                            f"{self.source.place('scheduler')}")
        alpha_bar, end = self.scheduler.alphas_cumprod.double(), float(self.scheduler.final_alpha_cumprod)
        return Ddim(alpha_bar, end, timesteps, self.prediction)

    def _flow_schedule(self, steps: int, sigmas: np.ndarray | None = None) -> Flow:
        config = self.scheduler.config
        shift = {}
        if config.get("use_dynamic_shifting"):
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            tokens = self.latent_shape[1] * self.latent_shape[2] // 4  # each is 2 x 2 of the latent
            ends = [config.get(key, default) for key, default in
                    (("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", self._most_shift))]
            shift["mu"] = calculate_shift(tokens, *ends)
        self.scheduler.set_timesteps(**({"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}), **shift)
        return Flow(self.scheduler.sigmas.double().cpu(), self.scheduler.timesteps.float().cpu())

    _most_shift: ClassVar[float] = 1.16
    branches: ClassVar[int] = 2  # that guidance mixes

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w); read from the configurations, no weights are needed."""
        config, factor = self.configuration(self.denoiser_part), self.vae_factor
        size = self.default_size or config["sample_size"]
        sides = size if isinstance(size, list | tuple) else (size, size)
        if size is None and not all((self.options.height, self.options.width)):
            raise UserError(f"sample.height and sample.width: {self.source.place(self.denoiser_part)} does "
                            f"not say how large pictures are "
                            "(sample_size is null); set both")
        unit = factor * self.patch
        asked = self.options.height, self.options.width
        height, width = (given or side * factor for given, side in zip(asked, sides, strict=True))
        if height % unit or width % unit:
            raise UserError(f"sample.height and sample.width must be multiples of {unit} for {self.name}, not {height}x{width}")
        return self._channels(config), height // factor, width // factor

    def _channels(self, config: dict) -> int:
        return config["in_channels"]

    @cached_property
    def vae_factor(self) -> int:
        """Pixels a latent cell, in each direction."""
        return 2 ** (len(self.configuration("vae")["block_out_channels"]) - 1)

    # -- prompts

    def encode(self, prompt: str) -> Parts:
        """The parts of a condition that a prompt gives, each without a batch dimension."""
        raise NotImplementedError

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of those parts, read from the configurations: what the table of prompts will hold."""
        raise NotImplementedError

    def empty(self) -> Parts | None:
        """What stands for no prompt at all, where that is not the encoding of the empty text."""
        return None

    @torch.no_grad()  # not inference_mode: the LoRA's gradients pass through these
    def remember(self, prompts: list[str]) -> None:
        """Each prompt goes through the text encoders once, alone: its parts never depend on its neighbours."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.encodings:
                empty = self.empty() if not prompt else None
                self.encodings[prompt] = {name: part.clone() for name, part in (empty or self.encode(prompt)).items()}

    def condition(self, rows: list[dict], guidance: Guidance, negative: str = "") -> Condition:
        """Parts (k, b, ...): one branch without guidance, else prompt and negative under (scale, 1 - scale)."""
        prompts = [row["prompt"] for row in rows]
        asked = prompts if guidance.scale == 1 else [*prompts, negative]
        self.remember(asked)
        found = [self.encodings[prompt] for prompt in prompts]
        parts = {name: torch.stack([one[name] for one in found]).to(self.device)[None] for name in found[0]}  # (1, b, ...)
        if guidance.scale == 1:
            return Condition(parts, torch.ones(1, device=self.device))
        without = {name: part.to(self.device).expand_as(parts[name][0])[None] for name, part in self.encodings[negative].items()}
        weights = torch.tensor([guidance.scale, 1 - guidance.scale], device=self.device)
        return Condition({name: torch.cat([part, without[name]]) for name, part in parts.items()}, weights, rescale=guidance.rescale)

    # -- networks

    def call(self, denoiser: Any, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """One forward of the denoiser."""
        raise NotImplementedError

    @property
    def rounds_alike(self) -> bool:
        """Whether sampling and training say the same but for float32's rounding, so that the sampler's record can be the reference.

        Half-precision kernels round by the shape of a batch, compiled code rounds otherwise: times beta that is no longer small.
        """
        return not self.options.compile and self.dtype == torch.float32

    def denoise(self, x_t: Tensor, t: Tensor, parts: Parts) -> Tensor:
        """The prediction (b, c, h, w) at x_t; in the denoiser's own type."""
        dtype = self.dtype
        parts = {name: part.to(dtype) if part.is_floating_point() else part for name, part in parts.items()}
        compiled = self.options.compile and torch.is_inference_mode_enabled()  # while sampling only: training's forwards must round alike
        return self.call(self._compiled if compiled else self.denoiser, x_t.to(dtype), t, parts)

    @cached_property
    def _compiled(self) -> Any:
        return torch.compile(self.denoiser, dynamic=False)

    @property
    def decode_rows(self) -> int:
        """How many pictures the VAE takes at once, so that a batch of any size fits: 2^21 pixels of fp32 activations are some 5 GB."""
        _, height, width = self.latent_shape
        return max(1, DECODED_PIXELS // (height * width * self.vae_factor**2))

    @torch.inference_mode()
    def decode(self, x_0: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Pictures (b, h, w, 3) uint8 of latents (b, c, h, w), and whether each is made of numbers (b,): fp16 VAEs overflow."""
        if len(x_0) > self.decode_rows:
            found = [self.decode(part) for part in x_0.split(self.decode_rows)]
            return np.concatenate([pixels for pixels, _ in found]), np.concatenate([sound for _, sound in found])
        latents = self._to_vae(x_0.to(self.vae.dtype))
        pixels = self.vae.decode(latents, return_dict=False)[0]  # (b, 3, H, W), -1..1
        sound = torch.isfinite(pixels).flatten(1).all(1).cpu().numpy()
        pixels = (pixels.nan_to_num() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        return (pixels * 255).round().byte().cpu().numpy(), sound  # rounded where they are: a quarter of the bytes to carry

    @torch.inference_mode()
    def encode_pictures(self, pixels: np.ndarray) -> Tensor:
        """Latents (b, c, h, w) on the CPU of pictures (b, H, W, 3) uint8: the mean that the VAE's encoder gives, as `decode` takes it."""
        found = []
        for part in torch.from_numpy(pixels).split(self.decode_rows):
            x = part.to(self.device, self.vae.dtype).permute(0, 3, 1, 2) / 127.5 - 1  # (b, 3, H, W), -1..1
            mean = self.vae.encode(x).latent_dist.mode()
            found.append(self._of_vae(mean).float().cpu())
        return torch.cat(found)

    def _to_vae(self, x_0: Tensor) -> Tensor:
        """Latents as the VAE's decoder takes them, of latents as the denoiser knows them, (b, c, h, w)."""
        config = self.vae.config
        if config.latents_mean is None:
            return x_0 / config.scaling_factor + (config.shift_factor or 0.0)
        mean, std = self._latent_spread(x_0)
        return x_0 * std / config.scaling_factor + mean

    def _of_vae(self, latents: Tensor) -> Tensor:
        """The way back."""
        config = self.vae.config
        if config.latents_mean is None:
            return (latents - (config.shift_factor or 0.0)) * config.scaling_factor
        mean, std = self._latent_spread(latents)
        return (latents - mean) * config.scaling_factor / std

    def _latent_spread(self, like: Tensor) -> tuple[Tensor, Tensor]:
        both = self.vae.config.latents_mean, self.vae.config.latents_std
        mean, std = (like.new_tensor(values).reshape(1, -1, 1, 1) for values in both)
        return mean, std

    def save_adapter(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors` in `folder`, for `load_lora_weights` of any pipeline of this family."""
        adapters.save(self.denoiser, Path(folder), self.pipeline_class)


@torch.inference_mode()
def check_answer(generator: Any, rows: int) -> None:
    """Raises UserError if a model that is said to predict v answers pure noise with that very noise, as one that predicts eps does.

    Asked once, without a prompt, in a call of `rows` rows. At the noisiest timestep v is little but -x_0, which noise does not tell.
    """
    schedule = generator.schedule(1)
    if schedule.prediction != V:
        return
    x = torch.randn(rows, *generator.latent_shape, generator=torch.Generator().manual_seed(0)).to(generator.device)
    t = torch.full((rows,), schedule.at_share(0), device=generator.device)
    parts = generator.condition([{"prompt": ""}], Guidance()).filled(rows).branch(0)
    said = generator.denoise(x, t, parts).float()
    alike = float(torch.corrcoef(torch.stack([x.flatten(), said.flatten()]))[0, 1])
    if alike > 0.9:
        raise UserError(f"the model's scheduler says 'v_prediction', but its denoiser answers pure noise with that noise "
                        f"(correlation {alike:.2f}), as models do that predict 'epsilon': correct its scheduler_config.json")
