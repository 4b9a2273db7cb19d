"""`fdpo experts`: every kind of expert, and those of the configuration with whether their weights are here."""

import json
from dataclasses import asdict
from typing import Any

from fashiondpo_pipeline import experts
from fashiondpo_pipeline.config import Config
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.listing import Kind, Weights, kinds, weights
from fashiondpo_pipeline.terminal import show, tell


def run(config: Config, as_json: bool) -> None:
    known = kinds(config.asked)
    used = [_used(config, name) for name in config.asked]
    if as_json:
        print(json.dumps({"kinds": [_plain(kind) for kind in known], "experts": used}, indent=1, ensure_ascii=False))
        return
    tell("kinds (`use`)")
    for kind in known:
        tell(_about(kind))
    lines = [row for one in used for row in _lines(one)]
    show(f"experts of {config.name}", ["", "use", "weight", "version", "needs", "reads", ""], lines, right=False)
    for fault in dict.fromkeys([*(kind.fault for kind in known if kind.fault), *(one["fault"] for one in used if "fault" in one)]):
        tell(fault)


def _about(kind: Kind) -> str:
    """One kind in a few lines: what it measures, what it needs, which options it takes."""
    if kind.fault:
        return f"  {kind.name}\n    {kind.origin} · cannot be used: see below"
    facts = [kind.origin, f"version {kind.version}" if kind.version else "", f"needs {', '.join(kind.needs)}", f"range {_range(kind.range)}"]
    options = [f"    options {_options(kind.options)}"] if kind.options else []
    return "\n".join([f"  {kind.name}: {kind.about.rstrip(':')}", f"    {' · '.join(filter(None, facts))}", *options])


def _used(config: Config, name: str) -> dict[str, Any]:
    """One expert of the configuration, and why it cannot be used, where it cannot."""
    entry, weight = config.asked[name], config.pair.weights.get(name, 0.0)
    told: dict[str, Any] = {"name": name, "use": entry.use, "weight": weight, "options": entry.options}
    try:
        expert = experts.make(name, entry.use, entry.options)
    except UserError as problem:
        return told | {"fault": str(problem)}
    told |= {"version": expert.version, "needs": list(expert.needs)}
    try:
        return told | {"reads": [asdict(one) for one in weights(expert)]}
    except UserError as problem:  # what it reads lacks something: the others are told of all the same
        return told | {"fault": str(problem)}


def _lines(one: dict[str, Any]) -> list[list[Any]]:
    """A line for each thing it reads."""
    head = [one["name"], one["use"], f"{one['weight']:g}" if one["weight"] else "watched"]
    if "fault" in one:
        return [[*head, one.get("version", ""), ", ".join(one.get("needs", [])), "", "cannot be used: see below"]]
    reads = [[_of(Weights(**read)), "here" if read["here"] else "NOT HERE"] for read in one["reads"]] or [["", "needs no weights"]]
    rest = [one["version"], ", ".join(one["needs"])]
    return [[*(head + rest if n == 0 else [""] * 5), *read] for n, read in enumerate(reads)]


def _of(read: Weights) -> str:
    return f"{read.role} {read.place}"


def _plain(kind: Kind) -> dict[str, Any]:
    """For JSON: an option's default, or {"required": true}."""
    options = {key: {"required": True} if default is ... else {"default": default} for key, default in kind.options.items()}
    return asdict(kind) | {"options": options}


def _options(options: dict[str, Any]) -> str:
    """
    >>> _options({"head": ..., "model": "ViT-L-14", "column": None})
    'head, [model, column]'
    """
    required, others = [key for key, default in options.items() if default is ...], [key for key, default in options.items() if default is not ...]
    return ", ".join([*required, *([f"[{', '.join(others)}]"] if others else [])])


def _range(bounds: list[float | None]) -> str:
    """
    >>> _range([None, 0.0]), _range([-1.0, 1.0])
    ('..0', '-1..1')
    """
    low, high = ("" if bound is None else f"{bound:g}" for bound in bounds)
    return f"{low}..{high}" if low or high else "any"
