"""A small flow model on the embedded default's garments, captions and latents, tuned by the same machinery.

    python tests/bench/bench_flow.py --images /usr/share/datasets/fashion-mnist --keep flow

The model is of Stable Diffusion 3's kind without T5: a transformer of 2.3 million weights on 2 x 2 cells of
the latent, two small CLIP text encoders, and the embedded VAE. It is trained here (rectified flow, Liu et al.
2022, 2209.03003) on what the embedded generator was trained on. Then come rounds of the shipped default with
it, on Flow-GRPO's SDE. Printed are each round's measures of size. Target: after the last round one picture is
as good as the best of 2 of the base. With --keep, what broke off goes on where it stopped.

To see that it works, in a minute: --steps 2 --garments 200 --rounds 1 --set prompts.most_train=4
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import peaks
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline as Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from fashiondpo_pipeline import claims, embedded
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.demo import words
from fashiondpo_pipeline.demo.autoencoder import LATENTS
from fashiondpo_pipeline.demo.denoiser import choose_captions, encode_wardrobe, token_table
from fashiondpo_pipeline.demo.fitting import fit, save
from fashiondpo_pipeline.demo.garments import Wardrobe, generator, wardrobes
from fashiondpo_pipeline.demo.recipe import SHIPPED, Recipe
from fashiondpo_pipeline.generators.stable_diffusion_3 import T5_TOKENS
from fashiondpo_pipeline.identity import fingerprint, hash_path
from stages import Session

WIDTH, LAYERS, HEAD, TEXT = 128, 4, 32, 64
WALKED = ["sample.steps=12", "sample.guidance=1", "sample.eta=0.7"]  # Flow-GRPO's noise level
LEAST = 2.0


class Counted:
    """diffusers' joint attention in which the text's last token counts as T5_TOKENS equal ones.

    So many tokens of zeros stand for a T5 that is not there. They stay equal in every layer, so one will do.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        own, told = hidden_states, encoder_hidden_states  # (b, n, d), (b, m, d)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = [attn.norm_q(heads(attn.to_q(own))), attn.norm_added_q(heads(attn.add_q_proj(told)))]
        key = [attn.norm_k(heads(attn.to_k(own))), attn.norm_added_k(heads(attn.add_k_proj(told)))]
        value = [heads(attn.to_v(own)), heads(attn.add_v_proj(told))]
        query, key, value = (torch.cat(both, 2) for both in (query, key, value))  # (b, heads, n + m, ...)
        count = own.new_zeros(query.shape[2], key.shape[2])
        count[:, -1] = math.log(T5_TOKENS)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=count)
        own, told = found.transpose(1, 2).flatten(2).split([own.shape[1], told.shape[1]], 1)
        return attn.to_out[0](own), told if attn.context_pre_only else attn.to_add_out(told)


class Flow(nn.Module):
    """A transformer of Stable Diffusion 3's kind with its text encoders, joined as diffusers joins them."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=LATENTS, out_channels=LATENTS, pos_embed_max_size=4,
            num_layers=LAYERS, attention_head_dim=HEAD, num_attention_heads=WIDTH // HEAD, qk_norm="rms_norm",
            caption_projection_dim=WIDTH, joint_attention_dim=2 * TEXT, pooled_projection_dim=2 * TEXT,
        )  # fmt: skip
        ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
            num_hidden_layers=2, hidden_size=TEXT, intermediate_size=4 * TEXT, projection_dim=TEXT,
            num_attention_heads=4, **ends,
        )  # fmt: skip
        self.texts = nn.ModuleList(CLIPTextModelWithProjection(text) for _ in range(2))

    def forward(self, x_t: Tensor, share: Tensor, tokens: Tensor, empty: int = 1) -> Tensor:
        """Velocity (b, 4, 8, 8) at x_t, noise shares (b,), tokens (b, length) and `empty` ones for T5's."""
        said = [text(tokens, output_hidden_states=True) for text in self.texts]
        told = torch.cat([one.hidden_states[-2] for one in said], -1)  # (b, length, 2 TEXT)
        pooled = torch.cat([one.text_embeds for one in said], -1)  # (b, 2 TEXT)
        told = F.pad(told, (0, 0, 0, empty))
        return self.transformer(x_t, told, pooled, 1000 * share, return_dict=False)[0]


def trained(
    data: dict[str, Tensor], tokenizer: CLIPTokenizer, recipe: Recipe, options: argparse.Namespace, file: Path
) -> Flow:
    """Predict noise - x_0 on the line between them, in mean squared error; a batch has all noise shares."""
    latents, looks = data["latents"], data["looks"]
    torch.manual_seed(0)
    model, table = Flow(tokenizer).to(options.device), token_table(tokenizer)
    model.transformer.set_attn_processor(Counted())
    batch, started, losses = options.batch, time.monotonic(), deque(maxlen=200)

    def loss_of(step: int) -> Tensor:
        key = generator("flow", step)
        rows = torch.randint(len(latents), (batch,), generator=key)
        tokens = table[choose_captions(looks[rows], recipe, key)]
        noise = torch.randn(batch, *latents.shape[1:], generator=key)
        share = (torch.arange(batch) + torch.rand(batch, generator=key)) / batch
        drawn = (latents[rows].float(), noise, share, tokens)
        clean, noise, share, tokens = (part.to(options.device) for part in drawn)
        s = share.view(-1, 1, 1, 1)
        return (model((1 - s) * clean + s * noise, share, tokens) - (noise - clean)).square().mean()

    def tick(step: int, steps: int, loss: float) -> None:
        losses.append(loss)
        if step % 200 == 0 or step == steps:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step:,} of {steps:,}, loss {fmean(losses):.4f}, {minutes:.1f} minutes", flush=True)

    steps = options.steps
    seconds = fit(model, loss_of, steps=steps, rate=options.rate, checkpoint=file, every=60.0, tick=tick)
    print(f"trained in {seconds / 60:.1f} minutes, {seconds / steps:.3f} s a step of {batch}", flush=True)
    return model


@torch.no_grad()
def write(folder: Path, model: Flow, vae: AutoencoderKL, tokenizer: CLIPTokenizer, latents: Tensor) -> None:
    """A folder of diffusers' StableDiffusion3Pipeline without T5, whole or not at all."""
    model, vae = model.cpu(), vae.cpu()
    asked = latents[:4].float(), torch.full((4,), 0.5), token_table(tokenizer)[:4]
    counted = model(*asked)
    model.transformer.set_attn_processor(JointAttnProcessor2_0())
    apart = float((model(*asked, empty=T5_TOKENS) - counted).abs().max())
    assert apart < 1e-3, f"diffusers' attention says something else than was trained (by {apart:.2g})"
    vae.register_to_config(shift_factor=0.0)
    first, second = model.texts
    aside = folder.with_name(f".{folder.name}.part")
    logging.set_verbosity_error()
    Pipeline(
        vae=vae, transformer=model.transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        text_encoder=first, tokenizer=tokenizer, text_encoder_2=second, tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(aside)  # fmt: skip
    os.replace(aside, folder)


def flow_model(options: argparse.Namespace, keep: Path, work: Path) -> Path:
    """The folder of a trained model: one that was made before with the same options, or a new one."""
    root = embedded.locate("embedded:fashion_mini")
    recipe = replace(SHIPPED, tints=options.tints or SHIPPED.tints)
    where = root / "generator" / "vae"
    seed = json.loads((root / "card.json").read_text(encoding="utf-8"))["seed"]
    seen = [hash_path(where, "the VAE"), options.garments, asdict(recipe), seed]
    name = fingerprint([*seen, WIDTH, LAYERS, HEAD, TEXT, options.steps, options.batch, options.rate])
    if (folder := keep / f"model-{name}").exists():
        return folder
    for place in (keep, work):
        place.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(where).requires_grad_(False).eval().to(options.device)
    file = work / f"latents-{fingerprint(seen)}.pt"
    if not file.exists():
        every = wardrobes(options.images, recipe.sizes, seed)["generator"]
        wardrobe = Wardrobe(every.grey[: options.garments], every.category[: options.garments])
        print(f"encoding {len(wardrobe):,} garments in {recipe.tints} looks each", flush=True)
        latents, looks = encode_wardrobe(vae, wardrobe, recipe, seed)
        save({"latents": latents, "looks": looks}, file)
    data = torch.load(file, map_location="cpu", weights_only=True)
    tokenizer = words.write(work / "tokenizer")
    model = trained(data, tokenizer, recipe, options, work / f"flow-{name}.pt")
    write(folder, model, vae, tokenizer, data["latents"])
    return folder


def tuned(session: Session, rounds: int) -> dict:
    """The last round's measures of size; each round's are printed when it ends."""
    chain, size = session.chain(rounds), {}
    for number in range(rounds + 1):
        session.execute(chain.of(number))
        if number:
            size = session.output(chain.rounds[number].evaluate).manifest["numbers"]["size"]
            seen, kept = (claims.plain(size[one]) for one in ("visible_change", "diversity_at_equal_quality"))
            print(f"round {number}: {claims.with_interval(size['best_of'])}; {claims.gained(size)}")
            print(f"{'':8} visible change {seen}; diversity at equal quality {kept}", flush=True)
    return size


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=Path, required=True, help="Fashion-MNIST's four idx .gz files")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--garments", type=int, help="train on so many of them; else on all the generator's")
    parser.add_argument("--tints", type=int, help="looks of each; else as many as the generator saw")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder that keeps model and run")
    parser.add_argument("--work", type=Path, help="folder for latents and checkpoint; as --keep if left out")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="section.key=value")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    targets = peaks.Targets()
    with tempfile.TemporaryDirectory() as temporary:
        keep = options.keep or Path(temporary)
        model = flow_model(options, keep, options.work or keep)
        config = load(None, [f"generator.model={model.resolve()}", *WALKED, *options.sets])
        best_of = tuned(Session(config, keep / "run", say=lambda text: None), options.rounds)["best_of"]
    reached = claims.known(best_of) and (best_of["value"] is None or best_of["value"] >= LEAST)
    found = claims.with_interval(best_of)
    targets.check(f"round {options.rounds}: best-of-n equivalent", found, f"at least {LEAST:g}", reached)
    targets.end()


if __name__ == "__main__":
    main()
