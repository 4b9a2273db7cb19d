"""`fdpo export`: a round's LoRA as one file for diffusers, and a file that says where it comes from."""

from pathlib import Path

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.workspace import replace_bytes, write_json
from stages import Session
from stages.single import finished


def run(session: Session, folder: Path, number: int | None, pairs: str | None) -> None:
    step, number = finished(session, number, pairs)
    if step is None:
        raise UserError("round 0 is the base: it has no LoRA to export")
    manifest = session.output(step).manifest
    folder.mkdir(parents=True, exist_ok=True)
    for file in (session.run.root / step.folder / "adapter").iterdir():
        replace_bytes(folder / file.name, file.read_bytes())
    lineage = {"base": session.config.generator.model, "base_hash": session.generator_identity, "run": session.config.name,
               "round": number, "finetune": manifest["claim"], "numbers": manifest["numbers"], "versions": manifest["versions"]}
    write_json(folder / "lineage.json", lineage)
    print(folder / "pytorch_lora_weights.safetensors")
    session.say(f'use it: StableDiffusionPipeline.from_pretrained(...).load_lora_weights("{folder}")')
