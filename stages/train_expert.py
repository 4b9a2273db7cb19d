"""`fdpo expert train compatibility`: outfits -> a folder with a trained head and what was measured of it."""

from pathlib import Path

from fashiondpo_pipeline import devices
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import compatibility
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.terminal import say

KINDS = ("compatibility",)


def run(kind: str, out: Path, model: str, pretrained: str | None, outfits: str, items: str, *, epochs: int, seed: int, device: str) -> None:
    if kind not in KINDS:
        raise UserError(f"no expert called '{kind}' can be trained; {did_you_mean(kind, list(KINDS))}")
    if device != "cpu":  # which needs no look, and torch takes seconds to import
        device = devices.find(device, "--device")
    if (out / compatibility.ABOUT).exists():
        raise UserError(f"{out} holds a compatibility expert already: delete the folder, or name another with --out")

    def tick(epoch: int, loss: float, auc: float) -> None:
        say(f"epoch {epoch:3}  loss {loss:.4f}  validation AUC {auc:.3f}")

    about = compatibility.train(out, model, pretrained, outfits, items, seed=seed, device=device,
                                recipe=compatibility.Recipe(epochs=epochs), tick=tick)
    say(compatibility.in_words(about))
    options = [f"model: {model}", *([f"pretrained: {pretrained}"] if pretrained else []), f"weights: {out}", f"outfits: {outfits}", f"items: {items}"]
    say(f"to use it, under experts:  compatibility: {{use: compatibility, options: {{{', '.join(options)}}}}}")
