"""Names to classes, imported only when asked for; strangers come in by the same door as built-ins."""

import inspect
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fashiondpo_pipeline import trust
from fashiondpo_pipeline.errors import UserError

Contract = Callable[[Any], str | None]  # what something lacks to be one of a kind, in words; None where nothing; it calls nothing


def did_you_mean(name: str, known: list[str]) -> str:
    """The tail of a message about an unknown name: the nearest known one, else the whole list."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"


def _installed(group: str) -> list[EntryPoint]:
    """The plug-ins of installed packages: what only lies in the working folder, which `python -m` looks in, nobody has installed."""
    here = Path.cwd().resolve()
    return [entry for entry in entry_points(group=group) if entry.dist is None or Path(str(entry.dist.locate_file(""))).resolve() != here]


class Registry:
    """A table of name -> "module:attribute", widened by an entry-point group and by "module:attribute" in a config.

    A module that only a configuration names is imported if it is trusted (`trust.py`), and what it holds is taken if it keeps `contract`.
    `meant`: what to say of a name that people write and that is none.
    """

    def __init__(self, kind: str, group: str, builtin: dict[str, str], contract: Contract | None = None, meant: dict[str, str] | None = None):
        self.kind, self.group, self.builtin, self.contract, self.meant = kind, group, builtin, contract, meant or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> dict[str, str]:
        """Every known name with where it lives; a plug-in may not take a built-in's name."""
        found = dict(self.builtin)
        for entry in _installed(self.group):
            if found.setdefault(entry.name, entry.value) != entry.value:
                raise UserError(
                    f"the {self.kind} '{entry.name}' is defined twice, by {found[entry.name]} and {entry.value}: "
                    "uninstall one of the packages, or write module:Class in the configuration"
                )
        return found

    def origin(self, name: str) -> str:
        """Who a name comes from: "built in", "package NAME VERSION", or the module of a module:Class."""
        if name in self.builtin:
            return "built in"
        entry = next((entry for entry in _installed(self.group) if entry.name == name), None)
        if entry is None:
            return f"module {name.partition(':')[0]}"
        return f"package {entry.dist.name} {entry.dist.version}" if entry.dist else f"module {entry.value.partition(':')[0]}"

    def module(self, name: str) -> str | None:
        """The module of a plug-in, which is not looked for; None for what is built in, and for what nothing is called."""
        target = name if ":" in name else self.names().get(name, "")
        module = target.partition(":")[0]
        return None if name in self.builtin or not module or module.partition(".")[0] == trust.OWN else module

    def check(self, name: str) -> str:
        """Where `name` lives, without importing it. Raises UserError if nothing is called so, or its module is not trusted."""
        if ":" in name:
            trust.check(name.partition(":")[0], f"the {self.kind} '{name}'")
            return name
        target = self.names().get(name)
        if target is None:
            raise UserError(f"no {self.kind} called '{name}'; {self.meant.get(name) or did_you_mean(name, list(self.names()))}")
        return target

    def find(self, name: str) -> Any:
        """The object called `name`, or a UserError that says which names there are."""
        target = self.check(name)
        module, _, attribute = target.partition(":")
        try:
            found = getattr(trust.load(module), attribute)
        except ModuleNotFoundError as problem:
            raise UserError(
                f"the {self.kind} '{name}' cannot be imported ({problem}): install the package it lives in, or go to its folder"
            ) from problem
        except AttributeError as problem:
            raise UserError(f"the {self.kind} '{name}': {module} has no '{attribute}'") from problem
        if target not in self.builtin.values() and ":" in name and self.contract and (lacking := self.contract(found)):
            raise UserError(f"the {self.kind} '{name}' is none: {lacking}")
        return found


def has(*members: str) -> Contract:
    """The contract of a class with these members; `__call__` is its instances', not that of every class."""

    def contract(found: Any) -> str | None:
        if not inspect.isclass(found):
            return f"it is a {type(found).__name__}, and a class is needed"
        there = {member for kind in found.__mro__ if kind is not object for member in (*vars(kind), *vars(kind).get("__annotations__", ()))}
        lacking = [member for member in members if member not in there]
        return f"the class {found.__name__} has no {', '.join(lacking)}" if lacking else None

    return contract


EXPERTS = Registry(
    "expert",
    "fashiondpo_pipeline.experts",
    {
        "aesthetic": "fashiondpo_pipeline.experts.aesthetic:Aesthetic",
        "attributes": "fashiondpo_pipeline.experts.attributes:Attributes",
        "brightness": "fashiondpo_pipeline.experts.meters:Brightness",
        "classifier": "fashiondpo_pipeline.experts.classifier:Classifier",
        "clip_image": "fashiondpo_pipeline.experts.clip:ClipImage",
        "clip_text": "fashiondpo_pipeline.experts.clip:ClipText",
        "colour_entropy": "fashiondpo_pipeline.experts.meters:ColourEntropy",
        "compatibility": "fashiondpo_pipeline.experts.compatibility:Compatibility",
        "contrast": "fashiondpo_pipeline.experts.meters:Contrast",
        "dark_pixels": "fashiondpo_pipeline.experts.meters:DarkPixels",
        "edge_density": "fashiondpo_pipeline.experts.meters:EdgeDensity",
        "hpsv2": "fashiondpo_pipeline.experts.hpsv2:HPSv2",
        "human": "fashiondpo_pipeline.experts.human:Human",
        "image_reward": "fashiondpo_pipeline.experts.image_reward:ImageReward",
        "off_frame": "fashiondpo_pipeline.experts.meters:OffFrame",
        "personalisation": "fashiondpo_pipeline.experts.personalisation:Personalisation",
        "pickscore": "fashiondpo_pipeline.experts.pickscore:PickScore",
        "saturation": "fashiondpo_pipeline.experts.meters:Saturation",
        "sharpness": "fashiondpo_pipeline.experts.meters:Sharpness",
        "vlm": "fashiondpo_pipeline.experts.vlm:VisionLanguage",
        "vlm_server": "fashiondpo_pipeline.experts.vlm_server:VisionLanguageServer",
        "white_background": "fashiondpo_pipeline.experts.meters:WhiteBackground",
    },
    has("version", "range", "load", "__call__"),
)
GENERATORS = Registry(
    "generator",
    "fashiondpo_pipeline.generators",
    {"text2img": "fashiondpo_pipeline.generators.text2img:text2img"},
    has("schedule", "condition", "denoise", "decode"),
)
FAMILIES = Registry(  # diffusers' pipeline class -> how it is called
    "model family",
    "fashiondpo_pipeline.families",
    {
        "StableDiffusionPipeline": "fashiondpo_pipeline.generators.stable_diffusion:StableDiffusion",
        "StableDiffusionXLPipeline": "fashiondpo_pipeline.generators.stable_diffusion_xl:StableDiffusionXL",
        "StableDiffusion3Pipeline": "fashiondpo_pipeline.generators.stable_diffusion_3:StableDiffusion3",
        "FluxPipeline": "fashiondpo_pipeline.generators.flux:Flux",
    },
)
OBJECTIVES = Registry(
    "objective",
    "fashiondpo_pipeline.objectives",
    {
        name: f"fashiondpo_pipeline.objectives:{name.upper()}"
        for name in ("diffusion_dpo", "step_dpo", "ipo", "hinge", "cdpo", "robust_dpo", "soft_dpo", "margin_dpo", "sft", "winner_rise", "mapo",
                     "dspo", "capo", "anchor", "kto", "nft", "grpo", "plackett_luce", "rankdpo", "dgpo")
    },
    lambda found: None if type(found).__name__ == "Objective" else f"it is a {type(found).__name__}, not an objectives.Objective",
    {"dpo": "write step_dpo (log-probabilities of the steps taken) or diffusion_dpo (errors)"},
)
