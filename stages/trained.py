"""What was trained on imported pairs is named once: by their path, or by the training's id. Its settings are taken up from there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fashiondpo_pipeline.config import Config, validate
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.workspace import Run, Step, read_sealed
from stages import Session

TAKEN = ("seed", "generator", "sample", "finetune", "by_round")  # sections that say how something was trained
SHOWN = 3  # differences that are told


@dataclass(frozen=True)
class Training:
    """A finetuning on imported pairs. id: its fingerprint. pairs: the set's folder when it was trained on; settings: `TAKEN` by name."""

    id: str
    round: int
    pairs: Path
    identity: str
    settings: dict[str, Any]


def note(session: Session, step: Step) -> dict[str, Any]:
    """What the manifest of a finetuning on imported pairs keeps for `trainings` to find; nothing of another one."""
    if "pairs" not in step.args:
        return {}
    settings = session.config.model_dump(mode="json", include=set(TAKEN))
    return {"pairs": str(step.args["pairs"]), "identity": step.inputs["pair"].files["pairs"], "settings": settings}


def trainings(run: Run) -> list[Training]:
    """Every finished training on imported pairs, the latest first."""
    found = sorted(run.root.glob("round-*/finetune-????????/manifest.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    made = [(path.parent, read_sealed(path)) for path in found]
    return [Training(folder.name[-8:], int(folder.parent.name.removeprefix("round-")), Path(manifest["pairs"]),
                     manifest["identity"], manifest["settings"])
            for folder, manifest in made if "settings" in manifest]


def named(session: Session, pairs: str) -> Training | None:
    """The training whose id --pairs is."""
    return next((one for one in trainings(session.run) if one.id == pairs), None)


def take_up(session: Session, number: int, pairs: PairSet, id: str | None = None) -> None:
    """Take up the settings of what was trained on these pairs in this round, the training of that id or else the latest, and say so.

    Settings of this command (--set) stand: only a training that had them is meant. So do those in force where a training was done with them.
    """
    asked = {".".join(text.partition("=")[0].strip().split(".")[:2]) for text in session.overridden(*TAKEN)}
    made = {one.id: one for one in trainings(session.run) if one.identity == pairs.identity and one.round == number and id in (None, one.id)}
    told_of = {key: differences(session.config, one) for key, one in made.items()}
    fits = [key for key, told in told_of.items() if not asked & {text.partition("=")[0] for text in told}]
    if not fits or any(not told for told in told_of.values()):
        return
    chosen, told, others = made[fits[0]], told_of[fits[0]], fits[1:]
    session.adopt(taken(session.config, chosen))
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    session.say(f"with the settings of training {chosen.id}: {', '.join(told[:SHOWN])}{more}"
                + (f"; there are others on these pairs, named by --pairs {' or '.join(others)}" if others else ""))


def taken(config: Config, training: Training) -> Config:
    """The configuration with a training's settings."""
    settings = training.settings | {"by_round": {int(number): own for number, own in training.settings["by_round"].items()}}
    others = config.model_dump(exclude=set(TAKEN))
    made = validate(others | settings, f"the settings of training {training.id}")
    return config.model_copy(update={name: getattr(made, name) for name in TAKEN})


def differences(config: Config, training: Training) -> list[str]:
    """What a training's settings have other than the configuration, as --set would say it."""
    own = config.model_dump(mode="json", include=set(TAKEN))
    found = []
    for name, value in training.settings.items():
        if isinstance(value, dict) and isinstance(own[name], dict) and name != "by_round":
            found += [f"{name}.{key}={each}" for key, each in value.items() if own[name].get(key) != each and key != "checkpoint_every"]
        elif own[name] != value:
            found.append(f"{name}={value}")
    return found
