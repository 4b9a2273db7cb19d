"""`fdpo export`: what a round trained as one file, for diffusers or kohya's readers, and a file that says where it comes from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.later import Later
from fashiondpo_pipeline.registry import did_you_mean
from fashiondpo_pipeline.workspace import replace_bytes, write_json
from stages import Session
from stages.generate import negative_of
from stages.single import finished

if TYPE_CHECKING:
    from torch import Tensor

    from fashiondpo_pipeline import adapters, lora_formats, lora_layers, lora_settings
else:  # a mistake is told before they are imported
    _HEAVY = ("adapters", "lora_formats", "lora_layers", "lora_settings")
    adapters, lora_formats, lora_layers, lora_settings = (Later(f"fashiondpo_pipeline.{name}") for name in _HEAVY)

FORMATS = ("diffusers", "kohya")


def run(
    session: Session, folder: Path, number: int | None, pairs: str | None, form: str = "diffusers", merge: bool = False, negative: bool = False,
) -> None:
    if form not in FORMATS:
        raise UserError(f"--format: there is no '{form}'; {did_you_mean(form, list(FORMATS))}")
    step, number = finished(session, number, pairs)
    if step is None:
        raise UserError("round 0 is the base: it has no LoRA to export")
    step = negative_of(session, number, pairs) if negative else step
    adapter = session.output(step).published("adapter")
    scaled = {"strength": session.output(step).manifest["numbers"]["strength"]} if step.stage == "strengthen" else {}
    manifest = session.output(step.inputs["adapter"] if scaled else step).manifest
    style = session.config.generator.lora
    if merge and not style:
        raise UserError("--merge: the run started from the bare model (generator.lora is null): export without --merge")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to export to")
    adapters.check_file(adapter)
    if (adapter / adapters.FULL_FILE).is_file():
        file, use = _denoiser(session, adapter, folder, form)
    elif form == "kohya" or merge:
        file, use = _rewritten(session, adapter / adapters.FILE, folder, f"round{number}{'-negative' if negative else ''}", form, merge)
    else:
        _copy(adapter, folder)
        file, use = folder / adapters.FILE, f'{session.source.family}.from_pretrained(...).load_lora_weights("{folder}")'
    g = session.config.generator
    lineage = {"base": g.model, "base_hash": session.generator_identity, "lora": style, "lora_scale": g.lora_scale if style else None,
               "format": form, "merged": merge, "negative": negative, "run": session.config.name, "round": number, "finetune": manifest["claim"],
               **scaled,
               "numbers": manifest["numbers"], "versions": manifest["versions"]}
    write_json(folder / "lineage.json", lineage)
    print(file)
    session.say(f"use it: {use}")
    if style and not merge and file.name != adapters.FULL_FILE:
        session.say(f"it goes on top of {style} at {g.lora_scale:g}, which the run started from: fuse that first, or export with --merge")


def _denoiser(session: Session, adapter: Path, folder: Path, form: str) -> tuple[Path, str]:
    """A fully tuned denoiser, whole; a LoRA that the run started from is in it."""
    if form == "kohya":
        raise UserError("--format kohya is for LoRAs, and this round tuned the whole denoiser (finetune.adapter: full): export it as diffusers")
    _copy(adapter, folder)
    part, kind = next((name, entry[1]) for name, entry in session.source.index.items() if name in adapters.PARTS)
    return folder / adapters.FULL_FILE, f'{session.source.family}.from_pretrained(..., {part}={kind}.from_pretrained("{folder}"))'


def _copy(adapter: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        replace_bytes(folder / file.name, file.read_bytes())


def _rewritten(session: Session, adapter: Path, folder: Path, label: str, form: str, merge: bool) -> tuple[Path, str]:
    """One file in another format, or with the LoRA that the run started from in it."""
    family = next((name for name, kind in lora_formats.FAMILIES.items() if kind.__name__ == session.source.family), None)
    if family is None:
        raise UserError(f"LoRA files of a {session.source.family} are not known here; export without --merge, as diffusers")
    tensors = _merged(session, adapter, family) if merge else _tensors(lora_formats.read(adapter, family))
    if form == "kohya":
        rank = len(next(tensor for name, tensor in tensors.items() if "lora_A" in name))
        tensors = lora_formats.to_kohya(tensors, family, alpha=rank)  # the scale is in the tensors
        file = folder / f"{session.config.name}-{label}.safetensors"
        use = f"put {file} into ComfyUI's models/loras"
    else:
        file, use = folder / adapters.FILE, f'{session.source.family}.from_pretrained(...).load_lora_weights("{folder}")'
    lora_formats.write(tensors, file)
    return file, use


def _merged(session: Session, adapter: Path, family: str) -> dict[str, Tensor]:
    """The LoRA that the run started from, at its strength, and the round's as one.

    Of the former only what changes the denoiser: the run draws with the text encoders as they are.
    """
    g = session.config.generator
    file = locate(g.lora or "")
    for doubt in lora_settings.doubts(file):
        session.say(doubt)
    style = lora_formats.read(file, family)
    denoisers = lora_formats.Lora({name: layer for name, layer in style.layers.items() if name.startswith(adapters.PARTS)}, style.strays, {})
    lora_formats.check_plain(file, denoisers, "export without --merge and fuse it first")
    with tempfile.TemporaryDirectory() as place:
        lora_formats.write(_tensors(denoisers, g.lora_scale), Path(place) / "style.safetensors")
        return lora_formats.merged(Path(place) / "style.safetensors", adapter, family)


def _tensors(lora: lora_formats.Lora, scale: float = 1.0) -> dict[str, Tensor]:
    """In diffusers' format, the strength multiplied into B: alpha is then the rank."""
    found = {}
    for name, layer in lora.layers.items():
        assert isinstance(layer.change, lora_layers.LowRank)  # what a round trains
        found |= {f"{name}.lora_A.weight": layer.change.down.contiguous(), f"{name}.lora_B.weight": (layer.change.up * scale).contiguous()}
        if layer.magnitude is not None:
            found[f"{name}.lora_magnitude_vector"] = layer.magnitude.flatten()
    return found
