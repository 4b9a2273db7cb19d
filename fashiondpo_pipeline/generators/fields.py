"""Every field that an accepted model's configurations may have, and what is done about each: read, or refused by name.

A field that changes what a model means, and that nobody reads, gives other pictures without a word. So a field that is
not in these tables is refused, and a test holds them against the signatures of diffusers' own classes.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Field:
    """What is done about one field.

    what: "read" here; "built": heeded by diffusers' own network, which is called as it is; "idle": it changes nothing
    here, for the reason `why`; "refused": only `values` change nothing, and `why` says what any other would need.
    values: all that is accepted, of a field that is read too; None where there is no such bound.
    """

    what: Literal["read", "built", "idle", "refused"]
    why: str = ""
    values: tuple | None = None

    def accepts(self, value: Any) -> bool:
        return self.values is None or (tuple(value) if isinstance(value, list) else value) in self.values


Table = dict[str, Field]
READ, BUILT = Field("read"), Field("built")


def one_of(*values: Any) -> Field:
    """A field that is read, and known with these values."""
    return Field("read", values=values)


def idle(why: str) -> Field:
    return Field("idle", why)


def only(*values: Any, why: str) -> Field:
    """A field that is not read: refused with any other value."""
    return Field("refused", why, values)


def _all(field: Field, names: str) -> Table:
    return dict.fromkeys(names.split(), field)


_SOLVER = idle(
    "it is how another solver than DDIM walks the same noise schedule, and DDIM is what draws here"
)
_UNCLIPPED = idle("it bounds what clip_sample or thresholding cut, and neither is done")
_NO_FLOW = (
    "the scheduler then walks a rectified flow, which Stable Diffusion 3 and FLUX alone are known to predict"
)

NOISE: Table = {
    **_all(
        READ,
        "num_train_timesteps beta_start beta_end trained_betas set_alpha_to_one steps_offset "
        "rescale_betas_zero_snr",
    ),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": one_of("epsilon", "v_prediction"),
    "timestep_spacing": one_of("leading", "trailing", "linspace"),
    "clip_sample": only(
        False, None, why="the walk here cuts nothing off, and latents are not between -1 and 1"
    ),
    "thresholding": only(
        False, None, why="the walk here cuts nothing off, and latents are not between -1 and 1"
    ),
    **_all(_UNCLIPPED, "clip_sample_range sample_max_value dynamic_thresholding_ratio"),
    "variance_type": Field(
        "refused",
        "the denoiser then predicts a variance too, and only what it predicts of the noise is known here",
        (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    ),
    "timestep_type": only("discrete", why="the denoiser is then told something else than a timestep"),
    **_all(
        only(None, why="the walk here begins and ends where the noise schedule does"), "sigma_min sigma_max"
    ),
    **_all(only(False, None, why=_NO_FLOW), "use_flow_sigmas use_dynamic_shifting"),
    "shift_terminal": only(None, why=_NO_FLOW),
    **_all(
        idle("it counts under use_flow_sigmas or use_dynamic_shifting alone"), "flow_shift time_shift_type"
    ),
    **_all(
        _SOLVER,
        "use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas interpolation_type "
        "final_sigmas_type lambda_min_clipped skip_prk_steps solver_order solver_type solver_p "
        "algorithm_type lower_order_final euler_at_final predict_x0 disable_corrector",
    ),
}
FLOW: Table = {
    "num_train_timesteps": only(1000, why="denoisers of flows are told 1000 times the share of noise"),
    **_all(
        READ,
        "shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len "
        "shift_terminal use_karras_sigmas use_exponential_sigmas",
    ),
    "time_shift_type": one_of("exponential", "linear"),
    "use_beta_sigmas": only(
        False, None, why="that spacing needs scipy, which is not installed with this package"
    ),
    "invert_sigmas": only(False, None, why="the walk here goes from noise to the picture"),
    "stochastic_sampling": only(False, None, why="chance comes from sample.eta here, with known densities"),
}
SCHEDULERS: dict[str, Table] = dict.fromkeys(
    (
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ),
    NOISE,
)
FLOW_SCHEDULERS: dict[str, Table] = {"FlowMatchEulerDiscreteScheduler": FLOW}
MODELS_OWN = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)

_RGB = only(3, why="pictures have three channels")
VAE: Table = {
    **_all(READ, "scaling_factor block_out_channels latent_channels"),
    **_all(_RGB, "in_channels out_channels"),
    "shift_factor": only(None, 0, why="diffusers' pipeline of this family does not use it"),
    **_all(only(None, why="diffusers' pipeline of this family does not use it"), "latents_mean latents_std"),
    **_all(
        BUILT,
        "down_block_types up_block_types layers_per_block act_fn norm_num_groups use_quant_conv "
        "use_post_quant_conv mid_block_add_attention",
    ),
    "sample_size": idle(
        "it is the size of the pictures that it was trained on, and that of tiles, which are not used"
    ),
    "force_upcast": idle("it runs in float32 always"),
}
UNET: Table = {
    **_all(
        READ,
        "sample_size in_channels out_channels addition_time_embed_dim projection_class_embeddings_input_dim",
    ),
    **_all(
        BUILT,
        "cross_attention_dim center_input_sample flip_sin_to_cos freq_shift down_block_types "
        "mid_block_type up_block_types only_cross_attention block_out_channels layers_per_block "
        "downsample_padding mid_block_scale_factor act_fn norm_num_groups norm_eps "
        "transformer_layers_per_block reverse_transformer_layers_per_block encoder_hid_dim "
        "attention_head_dim num_attention_heads dual_cross_attention use_linear_projection "
        "upcast_attention resnet_time_scale_shift resnet_skip_time_act resnet_out_scale_factor "
        "time_embedding_type time_embedding_dim time_embedding_act_fn timestep_post_act conv_in_kernel "
        "conv_out_kernel mid_block_only_cross_attention cross_attention_norm "
        "addition_embed_type_num_heads",
    ),
    "dropout": idle("nothing is dropped: the network stays in evaluation mode, in training too"),
    "encoder_hid_dim_type": only(
        None, "text_proj", why="the denoiser then wants to be told a picture beside the prompt"
    ),
    **_all(
        only(None, why="the denoiser then wants to be told a class beside the prompt"),
        "class_embed_type num_class_embeds",
    ),
    "class_embeddings_concat": idle("it counts with a class_embed_type alone"),
    "addition_embed_type": only(None, why="the denoiser then wants to be told more than the prompt"),
    "time_cond_proj_dim": only(
        None,
        why="the denoiser then wants to be told the guidance's scale, as those distilled for few steps do",
    ),
    "attention_type": only("default", why="the denoiser then wants to be told places in the picture"),
}
SD3: Table = {
    **_all(READ, "sample_size in_channels out_channels joint_attention_dim pos_embed_max_size"),
    "patch_size": Field("read", values=(2,)),
    **_all(
        BUILT,
        "num_layers attention_head_dim num_attention_heads caption_projection_dim pooled_projection_dim "
        "dual_attention_layers qk_norm",
    ),
}
FLUX: Table = {
    **_all(READ, "in_channels out_channels guidance_embeds"),
    "patch_size": only(1, why="tokens here are 2 x 2 cells of the latent"),
    **_all(
        BUILT,
        "num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim "
        "pooled_projection_dim axes_dims_rope",
    ),
}

_PART = Field("built", "a part, loaded by its name")
_UNUSED = idle("nothing is drawn from a picture")
_TWO_TEXTS = _all(_PART, "vae text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler") | _all(
    _UNUSED, "image_encoder feature_extractor"
)
STABLE_DIFFUSION_PIPELINE: Table = {
    **_all(_PART, "vae text_encoder tokenizer unet scheduler"),
    **_all(_UNUSED, "image_encoder"),
    **_all(idle("no picture is checked"), "safety_checker feature_extractor requires_safety_checker"),
}
SDXL_PIPELINE: Table = {
    **_TWO_TEXTS,
    "unet": _PART,
    "force_zeros_for_empty_prompt": READ,
    "add_watermarker": idle("no picture is marked"),
    "requires_aesthetics_score": only(
        False, why="the denoiser then wants to be told a score, as a refiner does"
    ),
}
SD3_PIPELINE: Table = {**_TWO_TEXTS, **_all(_PART, "transformer text_encoder_3 tokenizer_3")}
FLUX_PIPELINE: Table = {**_TWO_TEXTS, "transformer": _PART}
# What a pipeline's file may say though its class takes no such argument, as classes for the same weights do.
ELSEWHERE = {"requires_aesthetics_score"}


def problems(
    file: str,
    config: Mapping[str, Any],
    table: Table,
    defaults: Mapping[str, Any] | None = None,
    of: str = "",
) -> list[str]:
    """A sentence for each field of a configuration that is not in its table, or has a value that is not known.

    defaults: what `of`, diffusers' class, takes for fields that are not there. Names that begin with _ are its notes.
    """
    found = []
    for name, value in (dict(defaults or {}) | dict(config)).items():
        field = table.get(name)
        if (
            name.startswith("_")
            or (field and field.accepts(value))
            or (field is None and value == [None, None])
        ):
            continue
        if field is None:
            found.append(
                f"generator.model: {file}: the field {name} ({value!r}) is not known here, and may change "
                f"what the model means: "
                "use another model, or take it out if it changes nothing"
            )
            continue
        known = " or ".join(repr(one) for one in field.values or ())
        why = f"; {field.why}" if field.why else ""
        says = f"is {value!r}" if name in config else f"is not there, and {of} takes it for {value!r}"
        found.append(
            f"generator.model: {file}: {name} {says}, and only {known} is known here{why}: use another "
            f"model, or set it to {known} "
            "if the model was made so"
        )
    return found


def defaults_of(kind: Any) -> dict[str, Any]:
    """What diffusers' class takes for the fields that a file leaves out."""
    return {
        name: one.default
        for name, one in inspect.signature(kind.__init__).parameters.items()
        if one.default is not one.empty
    }
