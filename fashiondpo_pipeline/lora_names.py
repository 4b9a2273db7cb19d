"""Where a name in a LoRA file points: kohya's, LyCORIS', ComfyUI's, peft's, XLabs' and diffusers' names as modules of a diffusers model.

Stability and Black Forest Labs join some matrices that diffusers keeps apart (query, key, value), so one name may be rows of several
modules. diffusers' own converters drop, or stumble over, every tensor that is not the down or up of a LoRA: hence these tables.
"""

import re
from dataclasses import dataclass

from torch import Tensor, cat

from fashiondpo_pipeline.errors import UserError

TEXT = "text_encoder"
UNETS = ("sd", "sdxl")


@dataclass(frozen=True)
class Place:
    """A module of the pipeline ("unet.mid_block...", "text_encoder..."), and which rows of a file's matrix are its own."""

    module: str
    first: int = 0
    last: int = 1
    of: int = 1  # rows first/of to last/of
    swapped: bool = False  # the halves change places: shift, scale there, scale, shift here

    @property
    def part(self) -> str:
        return self.module.partition(".")[0]

    def rows(self, matrix: Tensor) -> Tensor:
        """Its own rows of an (out, ...) tensor of the file."""
        if self.swapped:
            return cat(matrix.chunk(2)[::-1])
        if self.of == 1:
            return matrix
        return matrix[len(matrix) * self.first // self.of : len(matrix) * self.last // self.of]


# Names of modules that hold an underscore of their own: kohya writes every dot as one too.
_WORD = re.compile(
    r"(?:^|(?<=_))("
    r"down_blocks|mid_block|up_blocks|transformer_blocks|time_embedding|add_embedding|linear_1|linear_2"
    r"|conv_in|conv_out|conv_norm_out|proj_in|proj_out|to_q|to_k|to_v|to_out|time_emb_proj|conv_shortcut"
    r"|input_blocks|middle_block|output_blocks|time_embed|label_emb|in_layers|out_layers|emb_layers"
    r"|skip_connection|single_transformer_blocks|to_add_out|add_q_proj|add_k_proj|add_v_proj|ff_context"
    r"|norm1_context|norm_q|norm_k|norm_added_q|norm_added_k|proj_mlp|x_embedder|context_embedder"
    r"|time_text_embed|timestep_embedder|guidance_embedder|text_embedder|norm_out|pos_embed|text_model"
    r"|self_attn|q_proj|k_proj|v_proj|out_proj|layer_norm1|layer_norm2|final_layer_norm|layer_norm"
    r"|token_embedding|position_embedding|text_projection|wi_0|wi_1"
    r")(?=_|$)"
)
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "lora_unet_", "lora_transformer_",
             "lycoris_")
_TEXTS = {
    "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": f"{TEXT}_2", "lora_te3_": f"{TEXT}_3", "text_encoders.clip_l.transformer.": TEXT,
    "text_encoders.clip_g.transformer.": f"{TEXT}_2", "text_encoders.t5xxl.transformer.": f"{TEXT}_3", "cond_stage_model.transformer.": TEXT,
    "bundle_emb.": f"{TEXT}.bundle_emb",  # words that kohya's trainers taught the text encoder beside
}


def places(stem: str, family: str, rows: int, columns: int) -> list[Place]:
    """Where the change called `stem`, (rows, columns) in all, belongs. Names that nobody knows stay as they are, and fit nowhere."""
    for prefix, part in _TEXTS.items():
        if stem.startswith(prefix):
            return [Place(f"{part}.{_dotted(stem.removeprefix(prefix))}")]
    name = stem
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith(TEXT):
        return [Place(re.sub(r"to_(q|k|v|out)_lora$", r"\1_proj", name).removesuffix(".lora_linear_layer"))]
    if name.startswith("text_model."):
        return [Place(f"{TEXT}.{name}")]
    name = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora$", lambda found: "." + found[1] + (".0" if found[1] == "to_out" else ""), name)
    name = name if "." in name else _dotted(name)
    if family in UNETS:
        return [Place(f"unet.{_of_unet(name)}")]
    joined = (_of_sd3 if family == "sd3" else _of_flux)(name.replace(".", "_"), rows, columns)
    return joined or [Place(f"transformer.{name}")]


def _dotted(name: str) -> str:
    """kohya's name with its dots again: `mid_block_attentions_0_to_q` is mid_block.attentions.0.to_q."""
    if "." in name:
        return name
    parts = _WORD.split(name)  # every second one is a word
    return "".join(part if n % 2 else part.replace("_", ".") for n, part in enumerate(parts))


# -- Stable Diffusion's UNets: Stability's numbers, three inner blocks a level

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}
_SGM_NAMES = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}
_OF_RESNET = {there: here for here, there in _RESNET.items()}
_OF_SGM = {there: here for here, there in _SGM_NAMES.items()}


def to_sgm(module: str) -> str:
    """The name that Stability's SDXL gives a module of diffusers' UNet (three inner blocks a level, numbered through).

    >>> to_sgm("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    'input_blocks.4.1.transformer_blocks.0.attn1.to_q'
    """
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if not found:
        if module not in _SGM_NAMES:
            raise UserError(f"{module} has no name in SDXL's own numbering; leave it out of finetune.targets, or use the adapter's own file")
        return _SGM_NAMES[module]
    side, level, kind, inner, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.2.conv"
    rest = _RESNET.get(rest, rest)
    if side is None:
        return f"middle_block.{2 * inner if kind == 'resnets' else 1}.{rest}"
    number = f"input_blocks.{3 * level + inner + 1}" if side == "down" else f"output_blocks.{3 * level + inner}"
    return f"{number}.{0 if kind == 'resnets' else 1}.{rest}"


def _of_unet(name: str) -> str:
    """A UNet's module by diffusers' name; by Stability's it is translated.

    >>> _of_unet("input_blocks.4.1.transformer_blocks.0.attn1.to_q"), _of_unet("output_blocks.2.1.conv")
    ('down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q', 'up_blocks.0.upsamplers.0.conv')
    """
    if name in _OF_SGM:
        return _OF_SGM[name]
    found = re.fullmatch(r"middle_block\.([012])\.(.+)", name)
    if found:
        return "mid_block.attentions.0." + found[2] if found[1] == "1" else f"mid_block.resnets.{int(found[1]) // 2}.{_inner(found[2])}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if not found:
        return name
    down, inner, rest = found[1] == "input", found[3], found[4]
    level, number = divmod(int(found[2]) - down, 3)
    block = f"{'down' if down else 'up'}_blocks.{level}"
    if down and rest == "op":
        return f"{block}.downsamplers.0.conv"
    if not down and rest == "conv":
        return f"{block}.upsamplers.0.conv"
    return f"{block}.resnets.{number}.{_inner(rest)}" if inner == "0" else f"{block}.attentions.{number}.{rest}"


def _inner(rest: str) -> str:
    return _OF_RESNET.get(rest, rest)


# -- transformers: Stability's and Black Forest Labs' modules, all dots as underscores

_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_SD3_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block_attn_qkv": _QKV,
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": _ADDED,
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_SD3_OTHERS = {
    "x_embedder_proj": "pos_embed.proj", "final_layer_linear": "proj_out", "final_layer_adaLN_modulation_1": "norm_out.linear",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1", "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1", "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
}
_FLUX_BLOCK: dict[str, tuple[str, ...]] = {
    "img_attn_qkv": _QKV,
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": _ADDED,
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
    "processor_qkv_lora1": _QKV,  # XLabs'
    "processor_proj_lora1": ("attn.to_out.0",),
    "processor_qkv_lora2": _ADDED,
    "processor_proj_lora2": ("attn.to_add_out",),
}
_FLUX_SINGLE: dict[str, tuple[str, ...]] = {
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "processor_qkv_lora": _QKV,
    "processor_proj_lora": ("proj_out",),
}
_FLUX_OTHERS = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out", "final_layer_adaLN_modulation_1": "norm_out.linear",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1", "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1", "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
}


def _of_sd3(name: str, rows: int, columns: int) -> list[Place]:
    found = re.fullmatch(r"joint_blocks_(\d+)_(.+)", name)
    if found and found[2] in _SD3_BLOCK:
        # the last block's context is only scaled and shifted: shift, scale there
        short = found[2] == "context_block_adaLN_modulation_1" and rows == 2 * columns
        return _shared(f"transformer.transformer_blocks.{found[1]}", _SD3_BLOCK[found[2]], short)
    return [Place(f"transformer.{_SD3_OTHERS[name]}", swapped="adaLN" in name)] if name in _SD3_OTHERS else []


def _of_flux(name: str, rows: int, columns: int) -> list[Place]:
    found = re.fullmatch(r"double_blocks_(\d+)_(.+)", name)
    if found and found[2] in _FLUX_BLOCK:
        return _shared(f"transformer.transformer_blocks.{found[1]}", _FLUX_BLOCK[found[2]])
    found = re.fullmatch(r"single_blocks_(\d+)_(.+)", name)
    if found:
        block = f"transformer.single_transformer_blocks.{found[1]}"
        if found[2] == "linear1":  # query, key, value, and an MLP of four times their width
            return [*(Place(f"{block}.{module}", n, n + 1, 7) for n, module in enumerate(_QKV)), Place(f"{block}.proj_mlp", 3, 7, 7)]
        if found[2] in _FLUX_SINGLE:
            return _shared(block, _FLUX_SINGLE[found[2]])
    return [Place(f"transformer.{_FLUX_OTHERS[name]}", swapped="adaLN" in name)] if name in _FLUX_OTHERS else []


def _shared(block: str, modules: tuple[str, ...], swapped: bool = False) -> list[Place]:
    """Equal shares of the rows."""
    return [Place(f"{block}.{module}", n, n + 1, len(modules), swapped) for n, module in enumerate(modules)]
