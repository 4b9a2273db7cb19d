"""The names that Stability's own code gives the tensors of Stable Diffusion 1.x and XL: what single-file checkpoints hold."""

import re

import torch
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


_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
_OPEN_CLIP_ENDS = {"embeddings.token_embedding.weight": "token_embedding.weight", "embeddings.position_embedding.weight": "positional_embedding",
                   "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}


def open_clip(tensors):
    """A text encoder of transformers as open_clip holds it: query, key and value in one, the projection the other way round."""
    found = {"text_projection": tensors["text_projection.weight"].T}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in _OPEN_CLIP_ENDS:
            found[_OPEN_CLIP_ENDS[name]] = tensor
        elif layer and layer[2] in _OPEN_CLIP:
            found[f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP[layer[2]]}.{layer[3]}"] = tensor
        elif layer and layer[2] == "self_attn.q_proj":
            three = [tensors[f"text_model.{name.replace('q_proj', part)}"] for part in ("q_proj", "k_proj", "v_proj")]
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(three)
    return found


def single_file(folder, layers, attending):
    """The tensors of a diffusers folder (of two levels) as one file holds them."""
    read = lambda part, name="diffusion_pytorch_model": load_file(folder / part / f"{name}.safetensors")  # noqa: E731
    found = {f"model.diffusion_model.{unet_name(name, layers, attending)}": tensor for name, tensor in read("unet").items()}
    for name, tensor in read("vae").items():
        theirs = vae_name(name, 2)
        convolution = ".attn_1." in theirs and tensor.ndim == 2  # a linear layer there is a 1 x 1 convolution here
        found[f"first_stage_model.{theirs}"] = tensor[:, :, None, None] if convolution else tensor
    two = (folder / "text_encoder_2").is_dir()
    place = "conditioner.embedders.0" if two else "cond_stage_model"
    for name, tensor in read("text_encoder", "model").items():
        found[f"{place}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    if two:
        found |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in open_clip(read("text_encoder_2", "model")).items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


_JOINT_ENDS = {
    "pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0", "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}
_JOINT = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj", "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k", "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}
_THREE = {
    "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    "attn2.to_q": ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    "attn.add_q_proj": ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
}


def joint_transformer(tensors, blocks):
    """The transformer of Stable Diffusion 3 as Stability's code names it: query, key and value in one, some shifts before scales."""
    found = {"pos_embed": tensors["pos_embed.pos_embed"]}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        swapped = module in ("norm_out.linear", f"transformer_blocks.{blocks - 1}.norm1_context.linear")
        tensor = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
        if module in _JOINT_ENDS:
            found[f"{_JOINT_ENDS[module]}.{end}"] = tensor
        elif block and block[2] in _JOINT:
            found[f"joint_blocks.{block[1]}.{_JOINT[block[2]]}.{end}"] = tensor
        elif block and block[2] in _THREE:
            one, three = _THREE[block[2]]
            parts = [tensors[f"transformer_blocks.{block[1]}.{part}.{end}"] for part in three]
            found[f"joint_blocks.{block[1]}.{one}.{end}"] = torch.cat(parts)
    return {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in found.items()}
