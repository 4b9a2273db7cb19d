"""pipeline.yaml as frozen pydantic models: every knob with its default, unit and usual range; all mistakes at once."""

import copy
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, WrapValidator, field_validator, model_validator

from fashiondpo_pipeline import plain_yaml
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.foreign import seen
from fashiondpo_pipeline.registry import did_you_mean


def _only(wanted: str) -> WrapValidator:
    """One sentence that says what is wanted, for a type that pydantic would explain in several or by a regular expression."""

    def check(value: Any, accept: Any) -> Any:
        try:
            return accept(value)
        except ValidationError:
            raise ValueError(f"should be {wanted}, not {_shown(value)}") from None

    return WrapValidator(check)


def _rising(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError
    return pair


Name = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100),  # it names a folder
    _only("text of at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit"),
]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$"), _only("auto, cpu, mps, cuda or cuda:N")]
SavedSteps = Annotated[
    Literal["all"] | Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]],
    _only("all, a count from 1, or a list of step numbers from 0"),
]
Targets = Annotated[str | list[str], _only("attention, attention+mlp, or a list of module names")]
Objectives = Annotated[
    str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)],
    _only("an objective's name, or a mix of them with weights above 0, such as {step_dpo: 1, sft: 100}"),
]


def _storable(value: Any) -> Any:
    """Options as they can be written down. Raises ValueError for a key that is no text, and for numbers that are none."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"should be finite numbers, not {value}")
    for key, inner in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise ValueError(f"a key must be text, not {_shown(key)}; put it in quotes")
        _storable(inner)
    for inner in value if isinstance(value, list | tuple) else ():
        _storable(inner)
    return value


Options = Annotated[dict[str, Any], AfterValidator(_storable)]
Strength = Annotated[
    Literal["auto"] | Annotated[float, Field(gt=0)] | None, _only("auto, a number above 0, or null")
]
Share = Annotated[float, Field(ge=0, lt=1)]
Window = Annotated[
    list[Annotated[float, Field(ge=0, le=1)]],
    Field(min_length=2, max_length=2),
    AfterValidator(_rising),
    _only("two numbers from 0 to 1, the lower first"),
]


MOST, MOST_PIXELS = 1_000_000, 16_384  # of anything that is counted, and of a side: more is a slip of the hand
LARGEST, SMALLEST = 1e9, 1e-12  # of what is measured, beside 0: beyond them fp32 has no number for what is made of it


def _no_absurd_number(value: Any) -> None:
    """Raises ValueError for a number, also within a list or a section, that nobody means."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _no_absurd_number(inner)
    if type(value) is float and value and not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"should be at most {LARGEST:g} and, if it is not 0, at least {SMALLEST:g}, not {_shown(value)}")


class Section(BaseModel):
    """A part of the configuration: frozen, nothing unknown, nothing converted behind one's back."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    overlays: ClassVar[bool] = False  # whether its values are laid over another section's later, which then looks at them

    @field_validator("*")
    @classmethod
    def _no_absurd_count(cls, value: Any, about: ValidationInfo) -> Any:
        most = MOST_PIXELS if about.field_name in ("height", "width") else MOST
        if type(value) is int and value > most and about.field_name != "seed":
            raise ValueError(f"should be at most {most:,}, not {_shown(value)}")
        if about.field_name != "options" and not cls.overlays:  # whose owner knows what they may be
            _no_absurd_number(value)
        return value


class Generator(Section):
    """The model that draws, and that finetuning adapts."""

    use: str = Field("text2img", description="kind of generator: a built-in, a plug-in's name, or module:Class")
    model: str = Field(
        "embedded:fashion_mini/generator",
        description="diffusers folder, hub id, or single-file checkpoint (with config); embedded:NAME travels with the package",
    )
    config: str | None = Field(
        None, description="a single-file checkpoint's configuration: a diffusers folder of the same model, also for parts it lacks"
    )
    revision: str | None = Field(None, description="commit or tag of a hub id; pin it, a branch can move")
    variant: str | None = Field(None, description="weights' variant in the folder, such as fp16")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="type the denoiser's weights are loaded in; half is for GPUs"
    )
    prediction: Literal["auto", "epsilon", "v_prediction", "flow"] = Field(
        "auto", description="what the denoiser predicts; auto reads the model's scheduler, a name must agree with it"
    )
    lora: str | None = Field(
        None, description="a LoRA to start from (.safetensors, diffusers' or kohya's format), fused into the weights: the base is "
        "then the styled model"
    )
    lora_scale: float = Field(1.0, description="its strength")


class Prompts(Section):
    """What to draw: training prompts, and held-out ones that only evaluate ever draws."""

    file: str = Field(
        "embedded:fashion_mini/prompts.parquet",
        description=".txt (one prompt a line), .csv, .tsv, .jsonl or .parquet with a column `prompt`",
    )
    held_out: Share = Field(0.2, description="share held out, by a hash of the prompt, where the file has no column `split`")
    most_train: int | None = Field(None, ge=1, description="use only so many training prompts; null: all")
    most_held_out: int | None = Field(None, ge=1, description="use only so many held-out prompts; null: all")


class Sample(Section):
    """How candidates are drawn."""

    candidates: int = Field(8, ge=1, le=1000, description="pictures a prompt (K); pairs need at least 2, usual 4 to 20")
    prompts: int | None = Field(
        132, ge=1, description="training prompts drawn in a round; each round goes on in the file where the one before ended, so that it "
        "meets others; null: all of them"
    )
    steps: int = Field(10, ge=1, le=1000, description="denoising steps; 10 to 50")
    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance; 1 is none (half the cost), Stable Diffusion's usual is 5 to 7.5; "
        "FLUX takes it as an input, 3.5"
    )
    guidance_interval: Window = Field(
        [0.0, 1.0], description="the part of the walk in which guidance acts, from 0 (noise) to 1 (picture); outside it costs half"
    )
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="share of the contrast that guidance adds which is taken back; 0 none, 0.7 where pictures are burnt"
    )
    eta: float = Field(
        1.0, ge=0, le=1, description="noise in each step: 0 draws the same path each time and has no log-probabilities; diffusion: DDIM's, "
        "1 is DDPM-like; flow: Flow-GRPO's noise level, 0.7"
    )
    negative: str = Field("", description="negative prompt; used only where guidance is not 1")
    height: int | None = Field(None, ge=8, description="pixels; null: the model's own")
    width: int | None = Field(None, ge=8, description="pixels; null: the model's own")
    save: SavedSteps = Field(
        "all",
        description="steps whose x_t is kept for finetuning: all, a count spread evenly, or a list of step numbers from 0",
    )
    path: bool = Field(
        True, description="also keep where each saved step led (x_prev), which log-probabilities need; free where neighbours are saved, "
        "false halves the bytes of steps spread out"
    )
    predictions: bool = Field(
        False, description="also keep the denoiser's predictions at the saved steps, for objectives that compare with them (dspo, anchor, nft)"
    )
    tile: int = Field(
        32, ge=1, description="rows in each call of a network, always filled up; part of the claim, as kernels round by shape"
    )


class Expert(Section):
    """One opinion on pictures. `options` go to the expert's constructor."""

    use: str = Field(..., description="kind of expert: a built-in, a plug-in's name, or module:Class")
    options: Options = Field(default_factory=dict, description="what the expert's constructor takes")


class Score(Section):
    """How experts are asked."""

    repeat: Share = Field(
        0.05, description="share of the training prompts about which experts that may answer otherwise are asked a second time; their agreement "
        "with themselves is in the report, and `finetune.options: {label_smoothing: auto}` uses it; 0: never"
    )


class Pair(Section):
    """How scores become preferences. Trying new values here takes seconds: `fdpo rescore`."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {"clip_i": 0.6, "clip_t": 0.4}, description="rewarded experts and their weights; every other expert is only watched"
    )
    normalise: Literal["zscore", "minmax", "rank", "winrate", "raw"] = Field(
        "zscore", description="brings experts to one scale before they are mixed; winrate: expected share of the group beaten (CaPO); "
        "raw: as they are, so that a margin means the same in every round"
    )
    over: Literal["group", "all"] = Field(
        "all", description="normalise within each prompt's candidates (group); or over all of them, so that prompts with much to gain give most pairs"
    )
    saturate: float | None = Field(
        None, gt=0, lt=1, description="each expert's scores above this quantile of all its candidates' count as that quantile, so that pictures "
        "which are good already are equal: 0.8 leaves a fifth alone; best with `over: all`; null: none are"
    )
    select: Literal["all", "best_worst", "mirror", "median_split", "pareto"] = Field(
        "all",
        description="all pairs beyond the margin; best against worst; mirror: best-worst, second-second worst and so on "
        "(FashionDistill); median_split: above against below the median of everything (FashionDPO); "
        "pareto: best front against worst front of all experts (CaPO); `margin` and `agree` apply to each",
    )
    margin: float = Field(
        0.5, ge=0, description="least gap of the mixed score, in its unit (standard deviations for zscore); 0 rejects only ties"
    )
    margin_later: float = Field(
        3.0, ge=0, description="times margin, from round 2 on: where candidates have become alike, a standard deviation of them is less; "
        "a margin under by_round is taken as it is"
    )
    agree: float | None = Field(
        None, ge=0,
        description="least gap that every rewarded expert by itself must see, in the unit of margin; 0: none may disagree; "
        "null: only the mix counts",
    )
    per_group: int | None = Field(None, ge=1, description="at most so many pairs a prompt, widest first; mirror: 10 if null")
    per_candidate: int | None = Field(None, ge=1, description="at most so many pairs with the same candidate, widest first")
    labels: Literal["scored", "swapped", "random"] = Field(
        "scored", description="scored; swapped and random are control experiments: they must lose, and change nothing"
    )

    @property
    def rule(self) -> dict[str, Any]:
        """What pairs are chosen by: the fields of `preferences.Rule`."""
        return self.model_dump(exclude={"margin_later"})

    @model_validator(mode="after")
    def _some_weight(self) -> "Pair":
        if sum(self.weights.values()) <= 0:
            raise ValueError("at least one expert needs a weight above 0")
        return self


class Finetune(Section):
    """Preference tuning on the pairs, group-batched: each candidate goes through the denoiser once for all its pairs."""

    objective: Objectives = Field(
        "step_dpo", description="step_dpo (log-probabilities of the steps taken), diffusion_dpo (errors), another by name (README), "
        "or a mix: {step_dpo: 1, sft: 100}; sft is a bare error: at the start diffusion_dpo pulls a winner beta/4 times as hard; beside "
        "mapo, dspo or nft, which are made of errors too, its weight is 0.1 to 1"
    )
    options: Options = Field(
        default_factory=dict, description="what the objective takes beside beta, such as {label_smoothing: 0.1} (cdpo, robust_dpo; auto: the flip "
        "rate measured by score.repeat)"
    )
    signal: Literal["log_prob", "error"] = Field(
        "log_prob", description="what an objective that can take either is made of: log-probabilities of the steps taken, or errors"
    )
    beta: float = Field(
        300.0, gt=0, description="sharpness of the preference on mean-reduced quantities; larger stays nearer; 500 to 5000 for Stable Diffusion"
    )
    auto_beta: float | None = Field(
        None, gt=0, lt=0.5, description="move beta so that the mean gradient factor stays near this; 0.2 to 0.45; null: beta stays as it is"
    )
    divergence: float | None = Field(
        None, gt=0, description="budget of divergence from the reference that beta follows, so that training ends near it: nats a picture over the "
        "steps that are trained on, see the table of optimiser steps for what there was; log-probabilities alone; null: none"
    )
    reference: Literal["previous", "base", "ema", "mix"] = Field(
        "previous", description="what the policy is held to: the model that drew the candidates (cached), the untuned one, a moving "
        "average of the policy, or a mix of previous and base"
    )
    reference_decay: float = Field(0.99, gt=0, lt=1, description="ema: share of the reference kept in each optimiser step")
    reference_mix: float = Field(0.5, ge=0, le=1, description="mix: share of the previous model's change over the base")
    guard: float | None = Field(
        None, gt=0, lt=1, description="winner guard of Diffusion-SDPO on errors: least share of the winner's own progress that no loser takes away; "
        "0.9 for Stable Diffusion 1.5, 0.6 for SDXL; null: none"
    )
    replay: Share = Field(0.0, description="share of the groups that come from earlier rounds' pairs; with ratio_clip")
    guidance: Literal["auto", "sampled", "none"] = Field(
        "auto", description="what the policy is where sample.guidance is not 1: sampled: the guided prediction, for log-probabilities and errors "
        "(two forwards a row where there are two branches, and one pass of the reference); none: the conditional one alone (one forward a "
        "row; for log-probabilities one pass of the reference); auto: guided for log-probabilities, as the steps were taken, conditional for errors"
    )
    condition_dropout: Share = Field(0.0, description="share of the places of error objectives trained without the prompt; 0 to 0.2")
    noise: Literal["tracked", "fresh"] = Field(
        "tracked", description="x_t of diffusion_dpo: as the sampler saved it, or x_0 with new noise keyed by (group, draw)"
    )
    draws: int = Field(8, ge=1, description="fresh noise: draws a candidate, each with its own timestep; 8 or more")
    min_snr: float | None = Field(
        None, gt=0, description="diffusion_dpo: weight errors by min(SNR, this)/SNR; usual 5; null: 1"
    )
    step_weight: Literal["equal", "density"] = Field(
        "equal",
        description="step_dpo: equal scales each step's log-ratio to the median step's sensitivity; density is the bare "
        "log-ratio (D3PO), in which the steps of least noise outweigh all others"
    )
    ratio_clip: float | None = Field(
        None, gt=0, description="step_dpo: stop pushing a candidate whose mean log-ratio is beyond this; null: never"
    )
    epochs: int = Field(3, ge=1, description="passes over the groups")
    groups: int = Field(2, ge=1, description="groups an optimiser step")
    window: Window = Field(
        [0.1, 0.7],
        description="the part of the walk that is trained on, from 0 (noise) to 1 (picture): its middle decides most; [0, 1]: all",
    )
    timesteps: int = Field(3, ge=1, description="saved steps (or draws) of each group used in an optimiser step")
    pick: Literal["uniform", "accuracy"] = Field(
        "uniform", description="which of them: all alike, or more often those on which the policy learns to tell winner from loser"
    )
    micro_batch: int = Field(
        64, ge=1, description="rows through the denoiser at once; gradients accumulate to the same result; smaller than a group costs "
        "most rows a second forward; halved by itself when memory runs out"
    )
    checkpointing: bool = Field(False, description="recompute activations in the backward pass: a third more time, a fraction of the memory")
    learning_rate: float = Field(3e-3, gt=0, description="AdamW; 1.0e-5 to 1.0e-4 for Stable Diffusion, some 1.0e-3 for tiny models")
    rate_later: float = Field(
        0.6, gt=0, description="times learning_rate, from round 2 on, which has less to learn; a rate under by_round is taken as it is"
    )
    kept_later: float = Field(
        0.3, gt=0, le=1, description="share of what a round changes in the adapter's weights that is kept, from round 2 on (a step of Lookahead): "
        "few pairs point the right way, and training on them goes too far"
    )
    warmup: int = Field(10, ge=0, description="optimiser steps in which the learning rate rises from 0; a third of them at most")
    decay: Literal["none", "linear"] = Field(
        "linear", description="of the learning rate after warm-up: none, or linear to 0 at the end"
    )
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's, on what is trained")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    adapter: Literal["lora", "rslora", "dora", "full"] = Field(
        "lora", description="what is trained: a LoRA, rank-stabilised (scale alpha/sqrt(rank)), weight-decomposed, or the whole denoiser"
    )
    rank: int = Field(8, ge=1, description="of the LoRA; 4 to 32")
    alpha: float | None = Field(None, gt=0, description="LoRA scale is alpha/rank; null: alpha = rank")
    targets: Targets = Field(
        "attention", description="attention, attention+mlp, or a list of module names (or their ends) that get an adapter"
    )
    precision: Literal["no", "fp16", "bf16"] = Field("no", description="mixed precision (autocast) of the policy's forwards")
    strength: Strength = Field(
        None, description="what the LoRA's change over the base is multiplied with once it is trained, for good: a number, or auto: of "
        "`strengths` the one whose pictures of training prompts the rewarded experts like best; null: as it was trained"
    )
    strengths: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(
        [0.5, 1.0, 1.5, 2.0, 3.0], description="strength auto: those that are tried, beside the base"
    )
    strength_prompts: int = Field(32, ge=1, description="strength auto: training prompts that are drawn at each")
    strength_pictures: int = Field(4, ge=2, le=1000, description="strength auto: pictures of each of them, from the same seeds at each strength")
    strength_floor: float | None = Field(
        0.7, ge=0, description="strength auto: least diversity, as a share of the base's; null: none (without CLIP it cannot be measured)"
    )
    negative: bool = Field(
        False, description="also train a negative LoRA on swapped pairs (Diffusion-NPO), for `fdpo generate --negative`"
    )
    checkpoint_every: int = Field(20, ge=1, description="optimiser steps between checkpoints inside the stage")

    @model_validator(mode="after")
    def _a_mix_can_be_made(self) -> "Finetune":
        if self.reference == "mix" and self.adapter not in ("lora", "rslora"):
            raise ValueError(f"reference mix needs a plain LoRA (adapter: lora or rslora), as the change that {self.adapter} makes cannot "
                             "be divided; set one or the other")
        return self

    @model_validator(mode="after")
    def _a_strength_can_be_set(self) -> "Finetune":
        if self.strength is not None and self.adapter not in ("lora", "rslora"):
            raise ValueError(f"strength needs a plain LoRA (adapter: lora or rslora), as the change that {self.adapter} makes cannot be "
                             "multiplied; set strength to null")
        return self


class Setting(Section):
    """A setting of the sampler: what it says is other than held-out pictures are drawn with."""

    guidance: float | None = Field(None, ge=0, description="guidance")
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps")
    eta: float | None = Field(None, ge=0, le=1, description="noise in each step")
    guidance_rescale: float | None = Field(None, ge=0, le=1, description="share of guidance's contrast taken back")

    @property
    def knobs(self) -> dict[str, float]:
        """What it says."""
        return self.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _says_something(self) -> "Setting":
        if not self.knobs:
            raise ValueError("says nothing; write {guidance: 1.5}, {steps: 20} or both")
        return self


SETTINGS = [Setting(guidance=1.5, steps=5), Setting(guidance=1.5), Setting(steps=20)]  # for the embedded default's generator


class Evaluate(Section):
    """Held-out prompts, drawn by the base and by each round from the same seeds."""

    pictures: int = Field(16, ge=1, le=1000, description="pictures a held-out prompt")
    judge: str | None = Field("judge", description="expert that decides who wins; best one that is not rewarded; null: the mix")
    steps: int | None = Field(None, ge=1, le=1000, description="denoising steps; null: as in sample")
    guidance: float | None = Field(None, ge=0, description="guidance; null: as in sample")
    eta: float | None = Field(None, ge=0, le=1, description="noise in each step, as sample.eta; null: as in sample")
    drift: float | None = Field(
        1.0, gt=0, description="alarm where a meter or diversity moves more than so many standard deviations of the base's; null: never"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="what the next round starts from, and export and generate take: the last round, or the best one without an alarm"
    )
    grid: list[Setting] | None = Field(
        None, description="settings of the sampler that the base and every round are also drawn with, such as [{guidance: 1.5}, {guidance: 2, "
        "steps: 20}]: what a setting gives for nothing is no gain of tuning; null: a few for the embedded default's generator, none for "
        "another, which knows its own"
    )
    grid_pictures: int = Field(
        4, ge=1, le=1000, description="pictures a held-out prompt with each of them; drawn once for the base, and once in every round"
    )
    bootstrap: int = Field(4000, ge=100, description="resamplings of the prompts for intervals that no formula gives")
    interval: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="coverage of each interval")


class Report(Section):
    """The HTML report."""

    prompts: int = Field(8, ge=1, le=200, description="held-out prompts shown before and after")
    pictures: int = Field(4, ge=1, le=20, description="pictures shown for each")
    pairs: int = Field(12, ge=0, le=200, description="widest and narrowest pairs shown")


class Machine(Section):
    """Where it runs; in no fingerprint: only device, threads and compile can change a number, and only by rounding."""

    device: Device = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    batch: int = Field(64, ge=1, description="candidates in flight at once, and rows handed to an expert")
    shard: int = Field(16, ge=1, description="prompts a file: what a crash can cost, and what resumes")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: torch's choice")
    compile: bool = Field(False, description="torch.compile the denoiser while sampling: a minute at the start, then faster on a GPU")


class OfRound(Section):
    """What one round does otherwise: knobs of these sections, laid over the run's."""

    overlays = True
    sample: dict[str, Any] = Field(default_factory=dict)
    pair: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)


# What a round cannot have for itself, and why.
_OF_THE_RUN = {
    "sample": dict.fromkeys(("negative", "height", "width", "tile"), "held-out pictures are compared over all rounds"),
    "pair": {"margin_later": "it tells how rounds differ"},
    "finetune": dict.fromkeys(("adapter", "rank", "alpha", "targets"), "one adapter goes through all rounds")
    | {"checkpoint_every": "it changes no result", "rate_later": "it tells how rounds differ",
       "kept_later": "it tells how rounds differ"},
}


def may_differ(override: str) -> bool:
    """Whether a round may have a knob of its own: section.key, or section.key=value."""
    section, _, key = override.partition("=")[0].strip().partition(".")
    return section in OfRound.model_fields and key not in _OF_THE_RUN.get(section, {})


def shipped_experts() -> dict[str, Expert | None]:
    """The experts of the embedded default, which read the columns of its prompts."""
    clip = {"model": "local-dir:embedded:fashion_mini/clip"}
    catalog = {"references": "embedded:fashion_mini/catalog.parquet", "match": ["category", "colour", "pattern", "accent"]}
    judge = {"model": "embedded:fashion_mini/judge", "label": [f"{name}: {{{name}}}" for name in ("category", "colour", "pattern", "accent")]}
    return {
        "clip_i": Expert(use="clip_image", options=clip | catalog),
        "clip_t": Expert(use="clip_text", options=clip),
        "judge": Expert(use="classifier", options=judge),
    }


class Config(Section):
    """One run."""

    name: Name = Field("demo", description="the run's folder is runs/NAME under the working folder")
    seed: int = Field(7, ge=0, lt=2**53, description="the only source of randomness; another seed is another run")
    rounds: int = Field(3, ge=1, le=1000, description="what `fdpo round` makes when --n is not given")
    generator: Generator = Field(default_factory=Generator)
    prompts: Prompts = Field(default_factory=Prompts)
    sample: Sample = Field(default_factory=Sample)
    experts: dict[Name, Expert | None] = Field(default_factory=shipped_experts)
    score: Score = Field(default_factory=Score)
    pair: Pair = Field(default_factory=Pair)
    finetune: Finetune = Field(default_factory=Finetune)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    report: Report = Field(default_factory=Report)
    machine: Machine = Field(default_factory=Machine)
    by_round: dict[Annotated[int, Field(ge=1, le=MOST)], OfRound] = Field(
        default_factory=dict, description="what single rounds do otherwise, such as {3: {finetune: {epochs: 1}, pair: {margin: 0.3}}}: knobs of "
        "sample, pair and finetune; other rounds stay what they are, those that follow go on from what comes out"
    )

    @property
    def asked(self) -> dict[str, Expert]:
        """The experts that are not dropped (null)."""
        return {name: expert for name, expert in self.experts.items() if expert is not None}

    def of_round(self, number: int) -> "Config":
        """The configuration as one round has it."""
        own = self.by_round.get(number) or OfRound()
        later = self._later if number > 1 else {}
        knobs = {name: later.get(name, {}) | getattr(own, name) for name in OfRound.model_fields}
        sections = {name: _overlaid(getattr(self, name), changed) for name, changed in knobs.items() if changed}
        return self.model_copy(update=sections) if sections else self

    @property
    def _later(self) -> dict[str, dict[str, Any]]:
        """What rounds from the second on do otherwise, where they do not name it themselves."""
        pair, finetune = self.pair, self.finetune
        margin = {} if pair.margin_later == 1 else {"margin": pair.margin * pair.margin_later}
        rate = {} if finetune.rate_later == 1 else {"learning_rate": finetune.learning_rate * finetune.rate_later}
        return {"pair": margin, "finetune": rate}

    @model_validator(mode="after")
    def _rounds_fit(self) -> "Config":
        wrong = [line for number, own in self.by_round.items() for name in OfRound.model_fields
                 for line in _unfit(f"by_round.{number}.{name}", getattr(self, name), getattr(own, name), _OF_THE_RUN.get(name, {}))]
        if wrong:
            raise ValueError("\n".join(wrong))
        if any(own.sample for own in self.by_round.values()) and any(self.of_round(n).finetune.replay for n in (0, *self.by_round)):
            raise ValueError("by_round: finetune.replay mixes the candidates of several rounds, which then have one `sample`: "
                             "take by_round's out, or set replay to 0")
        return self

    @model_validator(mode="after")
    def _experts_exist(self) -> "Config":
        asked = dict.fromkeys(self.pair.weights, "pair.weights")
        for number, own in self.by_round.items():
            weights = own.pair.get("weights")
            asked |= dict.fromkeys(weights if isinstance(weights, dict) else (), f"by_round.{number}.pair.weights")
        if self.evaluate.judge is not None:
            asked.setdefault(self.evaluate.judge, "evaluate.judge")
        wrong = [f"{where}: no expert called '{name}'; {did_you_mean(name, list(self.experts))}"
                 for name, where in asked.items() if name not in self.experts]
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


def settings_of(config: Config) -> list[Setting]:
    """The sampler's settings that are tried beside the one held-out pictures are drawn with, each once."""
    grid = config.evaluate.grid
    if grid is None:
        grid = SETTINGS if config.generator.model == Generator().model else []
    s, e = config.sample, config.evaluate
    usual = {"guidance": s.guidance if e.guidance is None else e.guidance, "steps": e.steps or s.steps,
             "eta": s.eta if e.eta is None else e.eta, "guidance_rescale": s.guidance_rescale}
    found = {tuple((usual | setting.knobs).items()): setting for setting in reversed(grid) if usual | setting.knobs != usual}
    return list(reversed(found.values()))


def _overlaid(section: Section, own: dict[str, Any]) -> Section:
    """The section with some of its knobs changed. Raises pydantic's ValidationError if they do not fit."""
    return type(section).model_validate(section.model_dump() | own) if own else section


def _unfit(place: str, section: Section, own: dict[str, Any], refused: dict[str, str]) -> list[str]:
    """What is wrong with a round's own knobs, in words."""
    wrong = [f"{place}.{key}: {why}, so no round has its own; take it out" for key, why in refused.items() if key in own]
    try:
        _overlaid(section, {key: value for key, value in own.items() if key not in refused})
    except ValidationError as problem:
        for error in problem.errors():
            wrong += _describe(error, place, [*type(section).model_fields])
    return wrong


def load(path: Path | None, overrides: Sequence[str] = (), *, text: str | None = None) -> Config:
    """The configuration in a file (defaults where `path` is None) with `section.key=value` overrides laid over it.

    Raises UserError with every problem at once, each with its place and, for an unknown key, the nearest known one.
    """
    where = str(path) if path else "the defaults"
    if path is not None and text is None:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(plain_yaml.MOST_LETTERS + 1)  # more is refused, and a device has no end
        except FileNotFoundError:
            raise UserError(f"there is no {path}: `fdpo init` writes one, --config names another") from None
        except OSError as problem:
            raise UserError(f"{path} cannot be read ({problem.strerror}): --config names a file") from None
        except UnicodeDecodeError as problem:
            raise UserError(f"{path} is not UTF-8 (byte {problem.start}): save it as UTF-8") from None
    values = plain_yaml.parse(text, where) if text else {}
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected sections such as `sample:`, found {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    emptied = {name for name, field in Config.model_fields.items() if field.default_factory and values.get(name, ...) is None}
    return validate({name: value for name, value in values.items() if name not in emptied}, where)


def validate(values: dict, where: str) -> Config:
    """The checked configuration, or one UserError that lists every problem."""
    try:
        return Config.model_validate(values)
    except ValidationError as problem:
        lines = [line for error in problem.errors() for line in _describe(error)]
        lines = list(dict.fromkeys(lines))
        head = f"{where}: " + ("this does not fit" if len(lines) == 1 else f"these {len(lines)} things do not fit")
        raise UserError("\n".join([head, *(f"  {line}" for line in lines)])) from None


def _override(values: dict, text: str) -> None:
    path, equals, value = text.partition("=")
    keys: list[Any] = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {text}: write section.key=value, such as --set finetune.beta=500")
    if keys[0] == "by_round" and len(keys) > 1 and keys[1].isdecimal() and len(keys[1]) < 10:
        keys[1] = int(keys[1])  # as YAML reads it
    whole = values
    for depth, key in enumerate(keys[:-1]):
        if values.get(key) is None:
            values[key] = _default_of(keys[: depth + 1], whole)
        values = values[key]
        if not isinstance(values, dict):
            raise UserError(f"--set {text}: {'.'.join(map(str, keys[:depth + 1]))} is not a section")
    values[keys[-1]] = plain_yaml.parse(value, f"--set {text}")


def _default_of(keys: list[Any], values: dict) -> dict:
    """What a section that the file leaves out holds, so that one override keeps its neighbours; of a round, what a knob is in the run."""
    if keys[0] == "by_round":
        return _found(values, keys[2:]) or _found(Config().model_dump(mode="json"), keys[2:]) if len(keys) > 3 else {}
    return _found(Config().model_dump(mode="json"), keys)


def _found(values: Any, keys: list[Any]) -> dict:
    """What lies at a place, a copy; nothing where no section does."""
    for key in keys:
        values = values.get(key, {}) if isinstance(values, dict) else {}
    return copy.deepcopy(values) if isinstance(values, dict) else {}


def _describe(error: Any, below: str = "", known: list[str] | None = None) -> list[str]:
    """pydantic's error as our sentence(s): place, what is wrong, what would be right. below: the place of what was checked, and its keys."""
    keys = [*([below] if below else []), *(str(part) for part in error["loc"] if part != "[key]")]
    place = ".".join(keys)
    kind, value = error["type"], _shown(error["input"])
    if kind == "extra_forbidden":
        return [f"{place}: unknown key; {did_you_mean(keys[-1], known or _known(keys[:-1]))}"]
    if kind == "invalid_key":
        return [f"{'.'.join([*keys[:-1], value])}: a key must be text; put it in quotes"]
    if kind == "value_error":
        lines = str(error["ctx"]["error"]).split("\n")
        return [f"{place}: {line}" if place else line for line in lines]
    if kind == "missing":
        return [f"{place}: missing; add it"]
    return [f"{place}: {in_words(error)}"]


def in_words(error: Any) -> str:
    """What pydantic says of one value, in ours."""
    wanted = _WANTED.get(error["type"]) or error["msg"].removeprefix("Input should be ")
    return f"should be {wanted}, not {_shown(error['input'])}"


_WANTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number", "string_type": "text",
    "bool_type": "true or false", "list_type": "a list", "dict_type": "a section with keys", "model_type": "a section with keys",
}


def _shown(value: Any) -> str:
    """A value as people write it in YAML."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else seen(repr(value), 80)


def _known(keys: list[str]) -> list[str]:
    """The keys that fit below a place in the configuration."""
    model: Any = Config
    for key in keys:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[key].annotation if key in model.model_fields else None
        elif typing.get_origin(model) is dict:
            model = next(kind for kind in (typing.get_args(model)[1], *typing.get_args(typing.get_args(model)[1])) if isinstance(kind, type))
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


LINE = 110  # letters of a comment


def template(config: Config | None = None, width: int | None = None) -> str:
    """pipeline.yaml as text: every knob of `config` (the defaults if None) under a comment that says what it does.

    width: of a terminal that it is to fit.
    """
    config, most, width = config or Config(), width or 10_000, min(width or LINE, LINE)
    lines = _comment("One run of `fdpo round`. Every knob is here with its default; delete what you do not change.", "", width, "# ")
    lines += _comment("`fdpo config` prints what is in force; `--set section.key=value` overrides one knob.", "", width, "# ")
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Section):
            lines += ["", *_headed(name, _first_line(type(value)), most), *_knobs(value, "  ", width)]
        elif name == "experts":
            about = "name -> kind and options, or null for none; `pair.weights` says which are rewarded, the rest is watched"
            lines += ["", *_headed(name, about, most)]
            for expert, section in value.items():
                lines += [f"  {expert}:", *_plain(section.model_dump(mode="json"), "    ")] if section else [f"  {expert}: null"]
        else:
            plain = config.model_dump(exclude_defaults=True)["by_round"] if name == "by_round" and value else value
            lines += ["", *_comment(field.description, "", width), f"{name}: {_scalar(plain)}"]
    return "\n".join(lines) + "\n"


def _first_line(model: type) -> str:
    return (model.__doc__ or "").splitlines()[0]


def _headed(name: str, about: str, width: int) -> list[str]:
    """A section's head, with what it is behind it, or above it where there is no place."""
    line = f"{name}:  # {about}"
    return [line] if len(line) <= width else [*_comment(about, "", min(width, LINE)), f"{name}:"]


def _knobs(section: Section, indent: str, width: int) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = section.model_dump(mode="json")[name]
        lines += [*_comment(field.description or "", indent, width), f"{indent}{name}: {_scalar(value)}"]
    return lines


def _comment(text: str | None, indent: str, width: int, more: str = "#   ") -> list[str]:
    import textwrap

    return textwrap.wrap(text or "", width, initial_indent=f"{indent}# ", subsequent_indent=indent + more, break_long_words=False)


def _plain(value: dict, indent: str) -> list[str]:
    text = yaml.dump(value, Dumper=plain_yaml.Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True)
    return [indent + line for line in text.splitlines()]


def _scalar(value: Any) -> str:
    text = yaml.dump(value, Dumper=plain_yaml.Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")
