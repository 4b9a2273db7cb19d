"""For tests, ours and plug-in authors': tiny models built in code, and the contract checks of experts and generators."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fashiondpo_pipeline.experts import Expert

_START, _END = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer of single letters, 16 tokens long."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, **special})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return CLIPTokenizer.from_pretrained(folder)


def tiny_stable_diffusion(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A Stable Diffusion pipeline of some 60,000 random parameters as a diffusers folder: 16x16 pictures from 4x8x8 latents."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer of single letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -4.0) for letter in ("▁", *map(chr, range(33, 127))))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 16, **special}))
    return T5TokenizerFast.from_pretrained(folder)


def tiny_sdxl(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A Stable Diffusion XL pipeline of some 170,000 random parameters as a diffusers folder: 16x16 pictures from 4x8x8 latents."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first, second = tiny_tokenizer(folder / "tokenizer"), tiny_tokenizer(folder / "tokenizer_2")
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), use_linear_projection=True, cross_attention_dim=32,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                       timestep_spacing="leading", prediction_type=prediction)
    StableDiffusionXLPipeline(
        vae=_tiny_vae(4), text_encoder=CLIPTextModel(_tiny_clip_text(first)), tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(_tiny_clip_text(second)), tokenizer_2=second, unet=unet, scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def tiny_sd3(folder: Path, seed: int = 0, t5: bool = True) -> Path:
    """A Stable Diffusion 3.5 pipeline of some 60,000 random parameters as a diffusers folder: 16x16 pictures from 4x8x8 latents.

    t5: whether it has the third text encoder, which many leave out to save memory.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    first, second = tiny_tokenizer(folder / "tokenizer"), tiny_tokenizer(folder / "tokenizer_2")
    third = tiny_t5_tokenizer(folder / "tokenizer_3") if t5 else None
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    StableDiffusion3Pipeline(
        vae=_tiny_vae(4, shift_factor=0.1), text_encoder=CLIPTextModelWithProjection(_tiny_clip_text(first)), tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(_tiny_clip_text(second)), tokenizer_2=second, text_encoder_3=_tiny_t5(third) if third else None,
        tokenizer_3=third, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def tiny_flux(folder: Path, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """A FLUX pipeline of some 60,000 random parameters as a diffusers folder: 16x16 pictures from 4x8x8 latents in 2x2 packs.

    Like all of its kind it draws 128 latents wide unless told the size: ask for height=16, width=16.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    first, second = tiny_tokenizer(folder / "tokenizer"), tiny_t5_tokenizer(folder / "tokenizer_2")
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=8,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 4),
    )
    FluxPipeline(
        vae=_tiny_vae(4, shift_factor=0.1), text_encoder=CLIPTextModel(_tiny_clip_text(first)), tokenizer=first,
        text_encoder_2=_tiny_t5(second), tokenizer_2=second, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    ).save_pretrained(folder)
    return folder


def _tiny_vae(channels: int, **options: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, **options)


def _tiny_clip_text(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tiny_t5(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                   feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()


def tiny_clip(folder: Path, seed: int = 1) -> Path:
    """An open_clip model of random weights as a folder for `local-dir:`."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    tokenizer = tiny_tokenizer(folder)
    size = {"width": 16, "heads": 2, "layers": 1}
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": len(tokenizer), "hf_tokenizer_name": "here", "pool_type": "argmax",
                     **size},
    }
    see = {"size": 16, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
           "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": see}))
    torch.manual_seed(seed)
    save_file(CLIP(**model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """A LLaVA of some 20,000 random parameters as a transformers folder: single letters and digits are its tokens, 16x16 pixels its pictures."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<unk>", "</s>", "<image>"]
    letters = [*special, "\n", *map(chr, range(32, 127))]
    words = Tokenizer(models.WordLevel({text: n for n, text in enumerate(letters)}, unk_token=special[1]))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "unk_token", "eos_token"), special, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens={"image_token": "<image>"}, **names)
    see = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    template = ("{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}"
                "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}{{ '\n' }}A:")
    LlavaProcessor(see, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=template).save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=len(letters), max_position_embeddings=4096, pad_token_id=0, eos_token_id=2, bos_token_id=None, **size)
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **size), text_config=text, image_token_index=3,
                         vision_feature_layer=-1, image_seq_length=4)
    net = LlavaForConditionalGeneration(config)
    net.generation_config.pad_token_id, net.generation_config.eos_token_id = 0, 2
    net.save_pretrained(folder)
    return folder


class Brightness:
    """A toy expert: mean brightness of a picture, in [0, 1]. Needs no weights."""

    version, range, needs = 1, (0.0, 1.0), ("picture",)

    def load(self, device: str, prepared: Path | None) -> None:
        pass

    def __call__(self, rows: list[dict]) -> list[float]:
        return [float(np.asarray(row["picture"]).mean() / 255) for row in rows]


def check_expert(expert: Expert, rows: list[dict], device: str = "cpu", prepared: Path | None = None) -> None:
    """Raises AssertionError, saying which, if an expert breaks its contract on `rows` (two or more, made for its `needs`).

    Hand it over as its constructor left it: with a version, a range and needs, and nothing loaded. Then one score a row, within
    `range`, or (nan, reason); rows stay as they are; a blank picture gives a score or NaN, not an exception. Unless it says that it
    is `stochastic`: the same again, loaded again, whatever rows come with it and in whatever order.
    """
    assert isinstance(expert, Expert), "an expert has version, range, needs, load and __call__"
    assert len(rows) >= 2, "the check needs at least two rows"
    _check_declared(expert)
    _check_nothing_loaded(expert)
    before = [dict(row) for row in rows]
    expert.load(device, prepared)
    opinions = expert(rows)
    assert len(opinions) == len(rows), f"{len(opinions)} scores for {len(rows)} rows: one for each"
    for row, was in zip(rows, before, strict=True):
        assert row.keys() == was.keys() and all(row[key] is was[key] for key in was), "it changes the rows it is handed"
    scores = [_score(opinion) for opinion in opinions]
    low, high = expert.range
    for score, opinion in zip(scores, opinions, strict=True):
        inside = math.isnan(score) or low - 1e-6 <= score <= high + 1e-6
        assert inside, f"score {score} is outside the declared range {expert.range}"
        assert not math.isinf(score), "an infinite score: give (nan, reason) where there is none"
        assert not math.isnan(score) or _reason(opinion), "NaN without a reason: give (nan, reason)"
        assert math.isnan(score) or not getattr(expert, "classifies", False) or (isinstance(opinion, tuple) and type(opinion[-1]) is bool), (
            "it classifies, but does not say whether a picture is right: give (score, None, True or False)")
    steady = not getattr(expert, "stochastic", False)
    if steady:
        again = expert(rows)
        _assert_same(scores, [_score(o) for o in again], "asked twice, it gives other scores")
        assert [_reason(o) for o in again] == [_reason(o) for o in opinions], "asked twice, it gives other reasons"
        _assert_same(scores[::-1], [_score(o) for o in expert(rows[::-1])], "scores depend on the order of rows")
        _assert_same(scores, [_score(expert([row])[0]) for row in rows], "scores depend on the other rows of a batch")
        _assert_same([scores[0]] * 3, [_score(o) for o in expert(rows[:1] * 3)], "the same row three times gives different scores")
    blank = Image.new("RGB", (32, 32), "white")
    expert([{**rows[0], "picture": blank}] if "picture" in expert.needs else rows[:1])
    expert.load(device, prepared)  # as a run of several rounds does
    if steady:
        _assert_same(scores, [_score(o) for o in expert(rows)], "loaded again, it gives other scores")


def _check_declared(expert: Expert) -> None:
    assert type(expert.version) is int and expert.version >= 1, f"version is {expert.version!r}: a whole number from 1"
    assert isinstance(expert.range, tuple) and len(expert.range) == 2 and expert.range[0] < expert.range[1], (
        f"range is {expert.range!r}: (least, greatest)")
    assert isinstance(expert.needs, tuple) and all(isinstance(need, str) for need in expert.needs), f"needs is {expert.needs!r}: a tuple of names"
    tower = getattr(expert, "tower", None)
    assert "embedding" not in expert.needs or (tower and len(tower) == 2), "it needs an embedding, but has no `tower` (model, pretrained)"
    for name, path in getattr(expert, "files", dict)().items():
        assert isinstance(path, Path), f"files()['{name}'] is {path!r}: a Path"


def _check_nothing_loaded(expert: Expert) -> None:
    import torch

    held = [name for name, value in getattr(expert, "__dict__", {}).items() if isinstance(value, torch.nn.Module | torch.Tensor)]
    assert not held, f"its constructor has made `{', '.join(held)}`: `fdpo plan` makes experts too, so load networks in load"


def _score(opinion: Any) -> float:
    return float(opinion[0] if isinstance(opinion, tuple) else opinion)


def _reason(opinion: Any) -> str | None:
    return opinion[1] if isinstance(opinion, tuple) else None


def _assert_same(first: list[float], second: list[float], message: str) -> None:
    assert len(first) == len(second) and np.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True), message


def check_generator(generator: Any, row: dict) -> None:
    """Raises AssertionError, saying which, if a generator breaks its contract on a prompt row.

    Latents, predictions and pictures of the right shapes; guidance weights sum to one; a row's numbers do not depend on
    the rows it is called with; nothing is encoded that `encodings` has; what is let go of comes back the same.
    """
    import torch

    from fashiondpo_pipeline.sampling import Guidance

    c, h, w = generator.latent_shape
    guided = Guidance(2.0) if _takes_guidance(generator, row) else Guidance()
    condition = generator.condition([row, row], guided)
    assert abs(float(condition.weights.sum()) - 1) < 1e-6, "guidance weights must sum to one"
    for name, part in condition.parts.items():
        assert part.shape[:2] == (len(condition.weights), 2), f"the part '{name}' must be (branches, rows, ...)"
    assert len(generator.condition([row], Guidance()).weights) == 1, "without guidance there is one branch"
    assert row["prompt"] in generator.encodings, "an encoded prompt is kept in `encodings`"
    schedule = generator.schedule(4)
    assert len(schedule.timesteps) == 4, "a schedule of 4 steps has 4 timesteps"
    x = torch.randn(2, c, h, w, generator=torch.Generator().manual_seed(0)).to(condition.weights.device)
    t = schedule.timesteps[:1].repeat(2).to(x.device)
    with torch.inference_mode():
        both = generator.denoise(x, t, condition.branch(0))
        swapped = generator.denoise(x.flip(0), t, condition.branch(0))
    assert both.shape == x.shape, "a prediction has the shape of its latent"
    assert torch.allclose(both, swapped.flip(0), atol=1e-4), "a row's prediction depends on its place in the batch"
    pictures, sound = generator.decode(x)
    assert pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[-1] == 3, "decode gives (b, h, w, 3) uint8"
    assert sound.shape == (2,) and sound.dtype == bool, "decode says of each picture whether it is made of numbers"
    generator.let_go("text", "vae")
    assert np.array_equal(generator.decode(x)[0], pictures), "a VAE that was let go of comes back as another one"


def _takes_guidance(generator: Any, row: dict) -> bool:
    from fashiondpo_pipeline.errors import UserError
    from fashiondpo_pipeline.sampling import Guidance

    try:
        generator.condition([row], Guidance(2.0))
    except UserError:
        return False
    return True
