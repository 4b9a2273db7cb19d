"""The names that Stability's own code gives the tensors of Stable Diffusion 1.x and XL: what single-file checkpoints hold."""

import re

from safetensors.torch import load_file

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
         "add_embedding.linear_2": "label_emb.0.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name, layers, attending):
    """layers: resnets a level on the way down. attending: levels on the way up that have attentions."""
    module, _, end = name.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{end}"
    side, level, kind, inner, rest = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name).groups()
    level, inner, each = int(level or 0), int(inner), layers + 1
    if kind == "resnets":
        rest = f"{_RESNET[rest.rpartition('.')[0]]}.{end}"
    if side is None:
        return f"middle_block.{2 * inner if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{each * level + each}.0.op.{end}"
    if kind == "upsamplers":
        return f"output_blocks.{each * level + layers}.{2 if level in attending else 1}.conv.{end}"
    number = f"input_blocks.{each * level + inner + 1}" if side == "down" else f"output_blocks.{each * level + inner}"
    return f"{number}.{0 if kind == 'resnets' else 1}.{rest}"


def vae_name(name, levels):
    found = re.fullmatch(r"(encoder|decoder)\.(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return name.replace("conv_norm_out", "norm_out")
    side, way, level, kind, inner, rest = found.groups()
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if way is None:
        module, _, end = rest.rpartition(".")
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[module]}.{end}" if kind == "attentions" else f"{side}.mid.block_{int(inner) + 1}.{rest}"
    level = int(level) if way == "down" else levels - 1 - int(level)
    return f"{side}.{way}.{level}.block.{inner}.{rest}" if kind == "resnets" else f"{side}.{way}.{level}.{way}sample.{rest}"


def single_file(folder, layers, attending, text=True):
    """The tensors of a diffusers folder (of two levels) as one file holds them; text: with Stable Diffusion 1.x's encoder."""
    read = lambda part, name="diffusion_pytorch_model": load_file(folder / part / f"{name}.safetensors")  # noqa: E731
    found = {f"model.diffusion_model.{unet_name(name, layers, attending)}": tensor for name, tensor in read("unet").items()}
    for name, tensor in read("vae").items():
        theirs = vae_name(name, 2)
        convolution = ".attn_1." in theirs and tensor.ndim == 2  # a linear layer there is a 1 x 1 convolution here
        found[f"first_stage_model.{theirs}"] = tensor[:, :, None, None] if convolution else tensor
    if text:
        for name, tensor in read("text_encoder", "model").items():
            found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}
