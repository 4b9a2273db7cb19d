"""The line, in order: sample -> score -> pair -> finetune -> (held-out sample, score) -> evaluate -> report.

`chain` says, without running anything, which steps make up a run of n rounds and what each one claims to be; whether a step is
done, stale or missing is then a matter of looking whether its folder has a manifest. Stages meet on disk only.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import devices, diagnosis, experts, memory, panel, seeds
from fashiondpo_pipeline.checkpoints import Source, lora_identity, open_source
from fashiondpo_pipeline.config import Config, Finetune, Pair, Setting, settings_of
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import recorded
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.identity import hash_path
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.processes import Processes, alone, rank
from fashiondpo_pipeline.prompts import HELD_OUT, TRAIN, Prompts, open_splits
from fashiondpo_pipeline.registry import OBJECTIVES
from fashiondpo_pipeline.terms import check_fits_candidates, check_fits_pictures
from fashiondpo_pipeline.workspace import Output, Run, Step, read_sealed
from stages.naming import written

STAGES = ("sample", "score", "pair", "finetune", "evaluate", "report")
# Raised by hand when the meaning of a stage's output changes; old results are then stale.
VERSIONS = {"encode": 1, "prepare": 1, "sample": 2, "embed": 1, "score": 1, "pair": 1, "finetune": 2, "evaluate": 4, "latents": 2, "adopt": 2,
            "disturb": 1, "strengthen": 1}
COMPARING = ("dspo", "anchor", "nft")  # objectives that look at the reference's predictions; they import torch
DISTURBED = 128  # pictures by which the judge's noise is measured
# Knobs of `finetune` that change no optimiser step, so that they are in no claim of one.
UNTRAINED = {"checkpoint_every", "negative", "rate_later", "strength", "strengths", "strength_prompts", "strength_pictures", "strength_floor"}
# What is worked out for a round before it pairs.
UNPAIRED = {"margin_later"}
# Knobs that came later -> the value at which a step is what it was before there was the knob: its claim is then the old one.
LATER = {"divergence": None, "guidance": "auto", "kept_later": 1.0, "saturate": None}
SHARED = ("encode", "sample", "embed", "score", "finetune", "latents")  # stages in which several processes each do a share


@dataclass(frozen=True)
class Aside:
    """Pictures beside the held-out draws, and what some experts say of them."""

    sample: Step
    embeddings: dict[str, Step]
    scores: dict[str, Step]

    @property
    def steps(self) -> list[Step]:
        return [self.sample, *self.embeddings.values(), *self.scores.values()]

    def roles(self, role: str) -> dict[str, Step]:
        """What `evaluate` reads of it, by role."""
        return roles_of(role, self.sample, self.embeddings, self.scores)


def roles_of(role: str, sample: Step, embeddings: dict[str, Step], scores: dict[str, Step]) -> dict[str, Step]:
    """Pictures, their embeddings and scores as inputs of `evaluate`."""
    return {role: sample, **{f"{role}-embed-{i}": step for i, step in enumerate(embeddings.values())},
            **{f"{role}-score-{name}": step for name, step in scores.items()}}


@dataclass(frozen=True)
class Watched:
    """Held-out draws and their scores: all there is of round 0, the base. Aside: the same prompts under each of the sampler's other
    settings, and for the base its pictures disturbed, by which the judge's noise is measured."""

    number: int
    held_out: Step
    held_out_embeddings: dict[str, Step]
    held_out_scores: dict[str, Step]
    settings: list[Aside] = field(default_factory=list, kw_only=True)
    disturbed: Aside | None = field(default=None, kw_only=True)

    @property
    def watching(self) -> list[Step]:
        aside = [*([self.disturbed] if self.disturbed else []), *self.settings]
        return [self.held_out, *self.held_out_embeddings.values(), *self.held_out_scores.values(), *(step for one in aside for step in one.steps)]


@dataclass(frozen=True)
class Round(Watched):
    """One round's steps."""

    sample: Step
    embeddings: dict[str, Step]
    scores: dict[str, Step]
    pair: Step
    finetune: Step
    evaluate: Step
    negative: Step | None = None
    strength: Step | None = None  # its adapter is the finetuning's at the strength of `finetune.strength`
    tried: tuple[Step, ...] = ()  # pictures of training prompts at several strengths, and their scores

    @property
    def adapter(self) -> Step:
        """The step whose adapter is the round's."""
        return self.strength or self.finetune

    @property
    def trained(self) -> list[Step]:
        """All that `fdpo finetune` makes of the round's pairs."""
        return [self.finetune, *self.tried, *(step for step in (self.strength, self.negative) if step)]

    @property
    def imported(self) -> bool:
        """Whether its pairs came from elsewhere: then `sample` is their latents, and there are no scores."""
        return self.sample.stage == "latents"

    @property
    def before(self) -> int:
        """The round it went on from: the one before, or under `evaluate.keep: best` the best so far; 0 is the base."""
        return self.evaluate.inputs["before"].round


@dataclass(frozen=True)
class Chain:
    """Every step of a run of some rounds, in the order in which they run."""

    config: Config
    encode: Step
    prepared: dict[str, Step]
    rounds: list[Round]  # rounds[0] is the base, a Watched

    @cached_property
    def steps(self) -> list[Step]:
        """Each step once, after everything it reads."""
        return [step for number in range(len(self.rounds)) for step in self.of(number)]

    def first(self, rounds: int) -> "Chain":
        """The chain of only so many rounds."""
        return replace(self, rounds=self.rounds[: rounds + 1])

    def of(self, number: int) -> list[Step]:
        """The steps of one round; round 0 begins with what the experts prepare."""
        r = self.rounds[number]
        if number == 0:
            return [self.encode, *self.prepared.values(), *r.watching]
        if r.imported:
            return [r.pair, r.finetune.inputs["encode"], r.sample, *r.trained, *r.watching, r.evaluate]
        return [r.sample, *r.embeddings.values(), *r.scores.values(), r.pair, *r.trained, *r.watching, r.evaluate]


class Session:
    """A run being worked on: its configuration, its folder, and the models that are loaded, each once."""

    def __init__(self, config: Config, root: Path | None = None, say: Callable[[str], None] = print, track: Any = None,
                 options: Sequence[str] = (), reading: bool = False):
        """options: --config, --set and --name as they were given, for the commands that are advised. reading: nothing is asked of any
        expert, so that plug-ins are taken as their scores say that they were."""
        self.options, self.reading = list(options), reading
        self.config, self.say = config, say if self.first else lambda text: None
        self.run = Run(root or Path("runs") / config.name)
        if os.path.lexists(self.run.root) and not self.run.root.is_dir():
            raise UserError(f"{self.run.root} is the run's folder, and is a {'link to nothing' if self.run.root.is_symlink() else 'file'}: "
                            "take it away, or use another --name")
        self.track = track if track and self.first else lambda items, *_, **__: items
        standing = partial(recorded.instead, self.run.root, say=self.say)
        self._experts = experts.make_all(config.asked, standing) if reading else experts.make_all(config.asked)
        self.left_out: dict[str, str] | None = None  # expert -> why it is not asked; None until that has been looked at
        self._loaded: tuple[str, Any, Any] | None = None  # name, expert, what shares a tower with it
        self.peaks: dict[str, int] = {}  # folder of a step that was run -> the most memory meanwhile
        self._adapter: Path | None = None

    # -- what the configuration names

    @cached_property
    def prompts(self) -> dict[str, Prompts]:
        section = self.config.prompts
        splits = open_splits(locate(section.file), section.held_out, {TRAIN: section.most_train, HELD_OUT: section.most_held_out})
        if any("reference" in expert.needs for expert in self._experts.values()):
            from fashiondpo_pipeline import references  # which opens pictures: most runs need none of that

            splits = references.filled(splits, locate(section.file))
        for name, found in splits.items():
            if not len(found):
                raise UserError(f"{section.file}: no {name} prompts; add some, or change prompts.held_out")
        return splits

    @cached_property
    def source(self) -> Source:
        """Where the generator's model lies."""
        g = self.config.generator
        return open_source(g.model, g.revision, g.variant, g.config)

    @cached_property
    def generator_identity(self) -> str:
        """A hash of the model that draws, with the LoRA it starts from."""
        lora, scale = self.config.generator.lora, self.config.generator.lora_scale
        return self.source.identity() + (f"+{lora_identity(locate(lora))}x{scale:g}" if lora else "")

    def chain(self, rounds: int, pairs: dict[int, Pair | PairSet] | None = None, asked_again: int | None = None) -> Chain:
        """The steps of `rounds` rounds; `pairs` replaces the pair section of single rounds, or their pictures and pairs by imported ones.

        What grows while a run lives (people's answers) counts as it was when a round was scored, in round `asked_again` as it is now.
        """
        self.settle()
        return _Builder(self, pairs or {}, asked_again).chain(rounds)

    def settle(self) -> None:
        """Leave out the experts that are dropped, and of the embedded default those whose columns the prompts lack, and say so, once.

        Raises UserError if an expert of the person's own lacks a column: now, not after hours of sampling; and if nobody rewarded is left.
        """
        if self.left_out is not None:
            return
        asked = self.config.asked
        have = set.intersection(*(found.columns for found in self.prompts.values())) | {"candidate", "picture", "embedding"}
        lacks = {name: lacking for name in asked if (lacking := [need for need in self.make(name).needs if need not in have])}
        wrong = [f"expert '{name}' needs the column '{need}', which the prompts do not have: add it, or drop the expert "
                 f"(--set experts.{name}=null)" for name, needs in lacks.items() if not panel.is_shipped(name, asked[name]) for need in needs]
        if wrong:
            raise UserError("\n".join(wrong))
        left_out = {name: panel.DROPPED for name in self.config.experts if name not in asked}
        for name, needs in lacks.items():
            left_out[name] = f"the prompts have no column {' or '.join([', '.join(needs[:-1]), needs[-1]] if needs[1:] else needs)}"
        judges = [name for name in asked if name not in left_out and not self.config.pair.weights.get(name) and self._may_judge(name)]
        self.config, said = panel.without(self.config, left_out, judges)
        self.left_out = left_out
        for sentence in said:
            self.say(sentence)

    @property
    def about(self) -> dict:
        """What a manifest says of the session beside the step's claim."""
        return {"left_out": self.left_out} if self.left_out else {}

    def _may_judge(self, name: str) -> bool:
        """Whether an expert that nobody named may decide who wins: one that is asked about held-out draws, and looks at more than pixels."""
        return getattr(self.make(name), "held_out", True) and not getattr(self.make(name), "pixels_only", False)

    def check_objectives(self) -> None:
        """Raises UserError if the candidates of a round will lack what its finetuning needs of them: now, not after hours of sampling."""
        for number in (0, *self.config.by_round):
            config = self.config.of_round(number)
            again = [name for name, weight in config.pair.weights.items() if weight > 0 and getattr(self.make(name), "stochastic", False)]
            check_fits_candidates(config.finetune, config.sample, asked_twice=bool(again) and config.score.repeat > 0)

    def check_model(self) -> None:
        """Raises UserError if the model is not to be had: now, not after the seconds that torch takes to import."""
        self.source.index  # noqa: B018 - a cached property is made by looking at it

    def rewarding(self, section: Pair) -> Pair:
        """A pair section without the experts that are left out."""
        self.settle()
        return section.model_copy(update={"weights": panel.remaining(section.weights, self.left_out or {})})

    def kept(self, chain: Chain) -> int:
        """The round whose adapter is kept of those evaluated so far: the last, or under `evaluate.keep: best` the best; 0 is the base."""
        done = [r for r in chain.rounds[1:] if self.run.done(r.evaluate)]
        if not done or self.config.evaluate.keep == "last":
            return done[-1].number if done else 0
        found = {r.number: self.output(r.evaluate).manifest["numbers"] for r in done}
        return diagnosis.best_round(found, self.config.evaluate.judge or "mix", self.config.evaluate.drift)

    def drawn(self, sample: Step) -> list[dict]:
        """The prompts that a sample step draws: a whole split, so many from a place in it on and round again, or a keyed choice of so many."""
        rows, config = self.prompts[sample.args["split"]].rows, sample.config
        if "prompts" not in config:
            return rows
        if "first" in config:
            chosen = {(config["first"] + place) % len(rows) for place in range(config["prompts"])}
            return [row for place, row in enumerate(rows) if place in chosen]
        keys = {row["group"]: seeds.key(config["seed"], config["stream"], row["group"]) for row in rows}
        keyed = set(sorted(keys, key=lambda group: keys[group])[: config["prompts"]])
        return [row for row in rows if row["group"] in keyed]

    # -- models

    @cached_property
    def device(self) -> str:
        import torch

        wanted = self.config.machine.device
        if self.config.machine.threads:
            torch.set_num_threads(self.config.machine.threads)
        if wanted in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
            return f"cuda:{os.environ['LOCAL_RANK']}"
        return devices.find(wanted, "machine.device")

    @cached_property
    def processes(self) -> Processes:
        """The processes that work on this run together; only one in most runs."""
        return Processes(self.device)

    @cached_property
    def _generator(self) -> Any:
        from fashiondpo_pipeline import generators

        g, s = self.config.generator, self.config.sample
        return generators.make(
            g.use, g.model, revision=g.revision, variant=g.variant, config=g.config, dtype=g.dtype, prediction=g.prediction,
            height=s.height, width=s.width, device=self.device, lora=g.lora and str(locate(g.lora)), lora_scale=g.lora_scale,
            compile=self.config.machine.compile,
        )

    def generator(self, adapter: Step | Path | None = None) -> Any:
        """The generator with the adapter of a finetune step (or of a folder), or without any."""
        from fashiondpo_pipeline import adapters

        folder = self.output(adapter).published("adapter") if isinstance(adapter, Step) else adapter
        if folder != self._adapter:
            adapters.detach(self._generator.denoiser)
            if folder:
                adapters.load(self._generator.denoiser, folder)
            self._adapter = folder
        notes = getattr(self._generator, "notes", [])
        while notes:
            self.say(notes.pop(0))
        return self._generator

    def forget_adapter(self) -> None:
        """After finetuning has changed the denoiser's LoRA: load it afresh from disk next time."""
        self._adapter = Path("changed")

    def expert(self, name: str, prepared: Step | None) -> Any:
        """The expert, loaded; one expert in memory at a time, and the last one's tower if it is on the same."""
        if self._loaded is None or self._loaded[0] != name:
            entry, before = self.config.asked[name], self._loaded and self._loaded[1]
            expert = experts.make(name, entry.use, entry.options)  # another than `make` gives, which stays for the whole run
            if getattr(before, "tower", None) != getattr(expert, "tower", None):
                before = self._loaded = None  # gone before the next one comes
            expert.load(self.device, self.output(prepared).published("prepared") if prepared else None)
            self._loaded = (name, expert, before)
        return self._loaded[1]

    def make(self, name: str) -> Any:
        """The expert, not loaded."""
        return self._experts[name]

    # -- what is advised

    def command(self, *words: object, without: Collection[str] = ()) -> str:
        """`fdpo WORDS` for the same run with the same settings, to be copied into a shell; without --set of some sections."""
        given = zip(self.options[::2], self.options[1::2], strict=True)
        kept = [word for option, value in given if option != "--set" or _section(value) not in without for word in (option, value)]
        return written([*words, *kept])

    def overridden(self, *sections: str) -> list[str]:
        """The --set of this command in these sections."""
        return [value for option, value in zip(self.options[::2], self.options[1::2], strict=True)
                if option == "--set" and _section(value) in sections]

    def adopt(self, config: Config) -> None:
        """Go on under other settings of the same run; nothing must have been loaded yet."""
        self.config = config
        for known in ("source", "generator_identity", "_generator"):
            vars(self).pop(known, None)

    # -- running

    def execute(self, steps: Iterable[Step]) -> list[Step]:
        """Run what is not done yet, in order; returns what was run."""
        ran = []
        for step in steps:
            self.wait()  # so that every process sees the same folders
            out = self.run.output(step)
            if out.done:
                if self.first and out.work.is_dir():
                    shutil.rmtree(out.work)  # it was killed in its last operation
                continue
            if self.first:
                out.open()
            self.wait()
            memory.forget()
            if self.first or step.stage in SHARED:
                import_module(f"stages.{step.stage}").run(self, step, out)
            self.peaks[step.folder] = memory.peak()
            ran.append(step)
        self.wait()
        return ran

    @property
    def first(self) -> bool:
        """Whether this process writes what there is one of."""
        return rank() == 0

    def wait(self) -> None:
        """Wait for the other processes, if there are any."""
        if not alone():
            self.processes.wait()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run, of several processes the first for all; they part at its end."""
        with self.run.lock() if self.first else nullcontext():
            yield
        if not alone():
            self.processes.close()

    def encodings(self, step: Step, prompts: list[str]) -> dict[str, Any]:
        """What the text encoders made of these prompts, from the run's table."""
        from fashiondpo_pipeline import encodings

        out = self.output(step)
        wanted = pa.array(sorted(set(prompts)))
        found: dict[str, Any] = {}
        for shard in out.shards("prompts"):
            table = out.table("prompts", shard=shard)
            found |= encodings.of_table(table.filter(pc.is_in(table["prompt"], wanted)))
        return found

    def output(self, step: Step) -> Output:
        """A done step's folder. Raises UserError if it has not been run."""
        if not self.run.done(step):
            there = max((int(path.name.removeprefix("round-")) for path in self.run.root.glob("round-[0-9]*")), default=0)
            if step.round > there > 0 and "pairs" not in step.args:
                raise UserError(f"there is no round {step.round}: {self.run.root} has {there} round{'' if there == 1 else 's'}; "
                                f"`{self.command('round', '--n', step.round)}` makes more")
            makes = self.command("finetune", "--pairs", step.args["pairs"]) if "pairs" in step.args else self.command("round")
            raise UserError(f"round {step.round}: {step.name} has not been run with these settings; `{makes}` makes it")
        return self.run.output(step)


def _section(override: str) -> str:
    """The section that a --set is in."""
    return re.split("[.=]", override.strip())[0]


def prefix_of(sample: Step) -> str:
    """What the names of steps on a sample step's pictures begin with: nothing for candidates."""
    return next((prefix for prefix in ("held-out-", "strength-") if sample.name.startswith(prefix)), "")


def claimed(section: Finetune | Pair, exclude: Collection[str] = ()) -> dict:
    """What a claim says of a section's knobs."""
    return {name: value for name, value in section.model_dump(exclude=set(exclude)).items() if name not in LATER or value != LATER[name]}


def untrained(adapter: Step | None) -> set[str]:
    """Knobs of `finetune` that are in no claim of a finetuning that goes on from this adapter, or from none."""
    return UNTRAINED | ({"kept_later"} if adapter is None else set())


class _Builder:
    """Turns a configuration into claims. Each knob enters the claim of the stages that it changes, and no other."""

    def __init__(self, session: Session, pairs: dict[int, Pair | PairSet], asked_again: int | None):
        self.session, self.config, self.pairs, self.asked_again = session, session.config, pairs, asked_again
        self._claims: dict[str, tuple[dict, dict]] = {}
        self._towers: dict[tuple, str] = {}
        g = self.config.generator
        self.generator = {"use": g.use, "dtype": g.dtype, "variant": g.variant}
        for number in (0, *self.config.by_round):
            own = self.config.of_round(number)
            for name in [own.finetune.objective] if isinstance(own.finetune.objective, str) else own.finetune.objective:
                if not (self.session.reading and OBJECTIVES.module(name)):
                    OBJECTIVES.check(name)
            if own.sample.candidates < 2:
                raise UserError("sample.candidates is 1: a preference needs at least 2 candidates a prompt; raise it")
        absent = [name for name in self.judges if name not in self.held_out_experts]
        if absent:
            raise UserError(f"evaluate.judge: '{absent[0]}' is not asked about held-out draws; name one of {', '.join(self.held_out_experts)}")

    def chain(self, rounds: int) -> Chain:
        prepared = {name: self.prepare(name) for name in self.config.experts if hasattr(self.session.make(name), "prepare")}
        self.encode = self.encoding()
        chain = Chain(self.config, self.encode, prepared, [cast(Round, self.base(prepared))])
        for number in range(1, rounds + 1):
            self.earlier = chain.rounds[1:]
            best = self.session.kept(chain) if self.config.evaluate.keep == "best" and self.earlier else number - 1
            chain.rounds.append(self.round(number, chain.rounds[best], chain.rounds[0], prepared))
        return chain

    @cached_property
    def drawn_anew(self) -> Callable[[int | None], bool]:
        """Whether an earlier version drew otherwise, by the steps of a walk; looked up once for all rounds."""
        return cache(self.session.source.drawn_anew)

    def base(self, prepared: dict[str, Step]) -> Watched:
        base = self.watched(0, None, prepared)
        config = {"seed": self.config.seed, "candidates": self.disturbed_pictures}
        sample = Step("disturb", "held-out-sample-disturbed", 0, VERSIONS["disturb"], config, {"sample": base.held_out},
                      args={"split": HELD_OUT, "label": "-disturbed"})
        return replace(base, disturbed=self.aside(sample, self.judges, prepared))

    @property
    def rewarded(self) -> list[str]:
        """The experts that any round rewards."""
        weights = [self.config.of_round(number).pair.weights for number in (0, *self.config.by_round)]
        return list(dict.fromkeys(name for each in weights for name, weight in each.items() if weight > 0))

    @property
    def judges(self) -> list[str]:
        """The judge; the rewarded experts where their mix judges."""
        return [self.config.evaluate.judge] if self.config.evaluate.judge else self.rewarded

    @property
    def disturbed_pictures(self) -> int:
        """Pictures a held-out prompt by which the judge's noise is measured: DISTURBED in all, as far as there are so many."""
        return min(self.config.evaluate.pictures, -(-DISTURBED // len(self.session.prompts[HELD_OUT])))

    def aside(self, sample: Step, names: Collection[str], prepared: dict[str, Step]) -> Aside:
        """Pictures with what these experts say of them."""
        embeddings = self.embed(sample, names)
        return Aside(sample, embeddings, self.scores(sample, embeddings, prepared, names))

    def tried(self, number: int, finetune: Step | None, prepared: dict[str, Step]) -> list[Aside]:
        """Held-out prompts under each of the sampler's other settings, before the judge and the rewarded experts."""
        towered = [name for name in self.config.experts if getattr(self.session.make(name), "tower", None)][:1]  # for diversity
        names = [name for name in self.config.experts if name in {*self.judges, *self.rewarded, *towered} and name in self.held_out_experts]
        return [self.aside(self.draw(number, HELD_OUT, finetune, setting), names, prepared) for setting in settings_of(self.config)]

    def encoding(self) -> Step:
        """One step for every prompt of the run, both splits; its readers name model, prompts and negative prompt in their own claims."""
        prompts = {f"prompts-{split}": found.identity for split, found in self.session.prompts.items()}
        config = {"negative": self.config.sample.negative, **self.generator}
        files = {"text": self.session.source.text_identity(), **prompts}
        return Step("encode", "encode", 0, VERSIONS["encode"], config, {}, files, implied=True)

    def round(self, number: int, before: Watched, base: Watched, prepared: dict[str, Step]) -> Round:
        adapter = before.adapter if isinstance(before, Round) else None
        imported = self.pairs.get(number)
        if isinstance(imported, PairSet):
            return self.imported(number, before, base, prepared, imported)
        sample = self.draw(number, TRAIN, adapter)
        embeddings = self.embed(sample)
        scores = self.scores(sample, embeddings, prepared)
        own = self.config.of_round(number)
        section = imported or own.pair
        rewarded = {f"score-{name}": scores[name] for name, weight in section.weights.items() if weight > 0}
        labels = {"seed": self.config.seed} if section.labels == "random" else {}
        pair = Step("pair", "pair", number, VERSIONS["pair"], claimed(section, UNPAIRED) | labels, {"sample": sample, **rewarded})
        finetune = self.finetune(number, sample, pair, adapter)
        negative = self.finetune(number, sample, pair, adapter, negative=True) if own.finetune.negative else None
        strength, tried = self.strength(number, finetune, section, prepared)
        after = self.watched(number, strength or finetune, prepared)
        evaluate = self.evaluate(base, before, after, section, {"pair": pair, "finetune": finetune})
        return Round(**vars(after), sample=sample, embeddings=embeddings, scores=scores, pair=pair, finetune=finetune,
                     evaluate=evaluate, negative=negative, strength=strength, tried=tried)

    def imported(self, number: int, before: Watched, base: Watched, prepared: dict[str, Step], pairs: PairSet) -> Round:
        """A round without a sampler: the pictures and pairs of an imported set, fresh noise on them."""
        mine = self.config.of_round(number)
        s, knobs = mine.sample, mine.finetune.model_copy(update={"noise": "fresh"})
        check_fits_pictures(knobs, pairs)
        files, args = {"pairs": pairs.identity}, {"pairs": pairs.folder}
        encode = Step("encode", "encode-pairs", number, VERSIONS["encode"], {"negative": "", **self.generator}, {},
                      {"text": self.session.source.text_identity(), **files}, args, implied=True)
        version = VERSIONS["latents"] + self.drawn_anew(None)
        latents = Step("latents", "latents", number, version, {"height": s.height, "width": s.width}, {},
                       {"generator": self.session.generator_identity, **files}, args)
        pair = Step("adopt", "pair", number, VERSIONS["adopt"], {"shares": True} if pairs.shares else {}, {}, files, args)
        sampled = {"steps": s.steps, "guidance": 1.0, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0, "eta": 0.0, "negative": ""}
        adapter = before.adapter if isinstance(before, Round) else None
        inputs = {"encode": encode, "sample": latents, "pair": pair, **({"adapter": adapter} if adapter else {})}
        own = claimed(knobs, untrained(adapter))

        def trained(swapped: bool) -> Step:
            config = own | {"seed": self.config.seed, "round": number, "swapped": swapped, "sampled": sampled} | self.generator
            return Step("finetune", "negative" if swapped else "finetune", number, self.trains(adapter is None), config, inputs,
                        {"generator": self.session.generator_identity}, args)

        finetune = trained(False)
        strength, tried = self.strength(number, finetune, mine.pair, prepared)
        after = self.watched(number, strength or finetune, prepared)
        evaluate = self.evaluate(base, before, after, mine.pair, {"pair": pair, "finetune": finetune})
        return Round(**vars(after), sample=latents, embeddings={}, scores={}, pair=pair, finetune=finetune, evaluate=evaluate,
                     negative=trained(True) if knobs.negative else None, strength=strength, tried=tried)

    def strength(self, number: int, finetune: Step, section: Pair, prepared: dict[str, Step]) -> tuple[Step | None, tuple[Step, ...]]:
        """(step that gives the adapter its strength, what it reads of pictures at several); None and nothing where it stays as trained.

        Pictures, embeddings and scores are steps as a round's own are, so that they resume and are planned as those.
        """
        knobs = self.config.of_round(number).finetune
        if knobs.strength is None:
            return None, ()
        if knobs.strength != "auto":
            return Step("strengthen", "strength", number, VERSIONS["strengthen"], {"strength": knobs.strength}, {"adapter": finetune}), ()
        weights = {name: weight for name, weight in section.weights.items() if weight > 0 and name in self.held_out_experts}
        if not weights:
            raise UserError("finetune.strength auto asks the rewarded experts about pictures of training prompts, and none of them is asked "
                            "but about candidates: give it a number, or null")
        sample = self.draw_strengths(number, finetune)
        embeddings = self.embed(sample)
        if knobs.strength_floor is not None and not embeddings:
            raise UserError("finetune.strength_floor is a share of diversity, which is measured in CLIP, and no expert has a CLIP: "
                            "set it to null, or add one")
        scores = {f"score-{name}": step for name, step in self.scores(sample, embeddings, prepared).items() if name in weights}
        config = {"strength": "auto", "floor": knobs.strength_floor, "weights": weights,
                  **({"labels": section.labels, "seed": self.config.seed} if section.labels != "scored" else {})}
        tower = {"embed": next(iter(embeddings.values()))} if knobs.strength_floor is not None else {}
        needed = {step.folder: step for step in [*tower.values(), *(s.inputs["embed"] for s in scores.values() if "embed" in s.inputs)]}
        step = Step("strengthen", "strength", number, VERSIONS["strengthen"], config,
                    {"adapter": finetune, "sample": sample, **tower, **scores})
        return step, (sample, *needed.values(), *scores.values())

    def draw_strengths(self, number: int, finetune: Step) -> Step:
        """Pictures of some training prompts by the base and at each strength that is tried, as the round's candidates are drawn.

        Candidates 0 to n - 1 are the base's, the next n those of the first strength, from the same seeds, and so on.
        """
        own = self.config.of_round(number)
        knobs, s = own.finetune, own.sample
        strengths = [0.0, *sorted(set(knobs.strengths))]
        config = {
            "seed": self.config.seed, "stream": f"strength {number}", "prompts": knobs.strength_prompts, "strengths": strengths,
            "candidates": knobs.strength_pictures * len(strengths), "steps": s.steps, "guidance": s.guidance, "eta": s.eta,
            "guidance_interval": s.guidance_interval, "guidance_rescale": s.guidance_rescale,
            "negative": s.negative, "height": s.height, "width": s.width, "tile": s.tile, **self.generator,
        }
        version = VERSIONS["sample"] + self.drawn_anew(config["steps"])
        return Step("sample", "strength-sample", number, version, config, {"encode": self.encode, "adapter": finetune},
                    {"generator": self.session.generator_identity, "prompts": self.session.prompts[TRAIN].identity}, {"split": TRAIN})

    def watched(self, number: int, finetune: Step | None, prepared: dict[str, Step]) -> Watched:
        """A round's held-out draws and their scores; the base's where nothing was finetuned."""
        held_out = self.draw(number, HELD_OUT, finetune)
        embeddings = self.embed(held_out)
        return Watched(number, held_out, embeddings, self.scores(held_out, embeddings, prepared),
                       settings=self.tried(number, finetune, prepared))

    def draw(self, number: int, split: str, adapter: Step | None, setting: Setting | None = None) -> Step:
        """A split's pictures; of held-out prompts under one of the sampler's other settings, fewer."""
        held_out = split == HELD_OUT
        s, e = (self.config if held_out else self.config.of_round(number)).sample, self.config.evaluate
        config = {
            "seed": self.config.seed,
            # held-out pictures have the same seeds in every round, so that rounds differ by the adapter alone
            "stream": "held-out" if held_out else f"round {number}",
            "candidates": e.pictures if held_out else s.candidates,
            "steps": (e.steps if held_out else None) or s.steps,
            "guidance": e.guidance if held_out and e.guidance is not None else s.guidance,
            "eta": e.eta if held_out and e.eta is not None else s.eta,
            "guidance_interval": s.guidance_interval, "guidance_rescale": s.guidance_rescale,
            "negative": s.negative, "height": s.height, "width": s.width, "tile": s.tile,
            **({} if held_out else {"save": s.save, "path": s.path, "predictions": s.predictions}), **self.generator,
        }
        train = len(self.session.prompts[TRAIN])
        if not held_out and s.prompts and s.prompts < train:
            before = (self.config.of_round(earlier).sample.prompts or train for earlier in range(1, number))
            config |= {"prompts": s.prompts, "first": sum(before) % train}
        label = ""
        if setting:
            config |= {"candidates": e.grid_pictures, **setting.knobs}
            label = "".join(f"-{name.replace('_', '-')}-{value:g}" for name, value in setting.knobs.items())
        version = VERSIONS["sample"] + self.drawn_anew(config["steps"])
        return Step(
            "sample", f"held-out-sample{label}" if held_out else "sample", number, version, config,
            {"encode": self.encode, **({"adapter": adapter} if adapter else {})},
            {"generator": self.session.generator_identity, "prompts": self.session.prompts[split].identity},
            {"split": split, "label": label},
        )

    def prepare(self, name: str) -> Step:
        return Step("prepare", f"prepare-{name}", 0, VERSIONS["prepare"], *self._expert(name), args={"expert": name})

    def _expert(self, name: str) -> tuple[dict, dict, dict]:
        """(config, inputs, files) of an expert's claim, worked out once for all rounds."""
        if name not in self._claims:
            self._claims[name] = self._claim_of(name)
        config, files = self._claims[name]
        return dict(config), {}, dict(files)

    def _claim_of(self, name: str) -> tuple[dict, dict]:
        """(config, files)."""
        expert, entry = self.session.make(name), self.config.asked[name]
        files = {key: hash_path(path, f"experts.{name}") for key, path in getattr(expert, "files", dict)().items()}
        if getattr(expert, "tower", None):
            files["tower"] = self.tower_identity(tuple(expert.tower))
        options = {key: value for key, value in entry.options.items() if key not in getattr(expert, "effort", ())}
        return {"use": entry.use, "options": options, "version": expert.version}, files

    def tower_identity(self, tower: tuple) -> str:
        """A hash of a tower's files, asked once for all rounds."""
        if tower not in self._towers:
            self._towers[tower] = Tower(*tower).identity()
        return self._towers[tower]

    def embed(self, sample: Step, names: Collection[str] | None = None) -> dict[str, Step]:
        """One step for each tower that any of these experts (None: any at all) reads: tower's identity -> step."""
        found = {}
        for name in self.config.experts if names is None else names:
            tower = getattr(self.session.make(name), "tower", None)
            if not tower:
                continue
            identity = self.tower_identity(tuple(tower))
            label = Path(tower[0].rpartition(":")[2]).name
            prefix, which = prefix_of(sample), sample.args.get("label", "")
            found[identity] = Step("embed", f"{prefix}embed-{label}{which}", sample.round, VERSIONS["embed"], {},
                                   {"sample": sample}, {"tower": identity}, {"tower": tower, "label": which})
        return found

    @property
    def held_out_experts(self) -> list[str]:
        """Those who are asked about held-out draws: all but people."""
        return [name for name in self.config.experts if getattr(self.session.make(name), "held_out", True)]

    def scores(self, sample: Step, embeddings: dict[str, Step], prepared: dict[str, Step],
               names: Collection[str] | None = None) -> dict[str, Step]:
        """One step for each of these experts; None: for each who is asked about such pictures."""
        prefix, label = prefix_of(sample), sample.args.get("label", "")
        found = {}
        for name in names if names is not None else self.held_out_experts if prefix else self.config.experts:
            config, inputs, files = self._expert(name)
            if getattr(self.session.make(name), "stochastic", False) and not prefix:
                config["repeat"] = self.config.score.repeat
            inputs = {"sample": sample}
            if "tower" in files:
                inputs["embed"] = embeddings[files["tower"]]
            if name in prepared:
                inputs["prepared"] = prepared[name]
            step = Step("score", f"{prefix}score-{name}{label}", sample.round, VERSIONS["score"], config, inputs, files,
                        {"expert": name, "split": sample.args["split"], "label": label})
            grows = getattr(self.session.make(name), "grows", ())
            found[name] = self.as_scored(step, grows) if grows and sample.round != self.asked_again else step
        return found

    def as_scored(self, step: Step, grows: Collection[str]) -> Step:
        """The score step with the files that grow as they were when it was last finished; as it is where it never was."""
        def rest(claim: dict) -> dict:
            return claim | {"files": {name: value for name, value in claim["files"].items() if name not in grows}}

        there = self.session.run.root.glob(f"round-{step.round:02d}/{step.name}-????????/manifest.json")
        for path in sorted(there, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            claim = read_sealed(path)["claim"]
            if rest(claim) == rest(step.claim):
                return replace(step, files=claim["files"], args=step.args | {"grown": claim["files"] != step.files})
        return step

    def finetune(self, number: int, sample: Step, pair: Step, adapter: Step | None, negative: bool = False) -> Step:
        knobs = self.config.of_round(number).finetune
        config = claimed(knobs, untrained(adapter)) | {"seed": self.config.seed, "round": number, "swapped": negative}
        inputs = {"encode": self.encode, "sample": sample, "pair": pair, **({"adapter": adapter} if adapter else {})}
        if knobs.replay:
            for r in self.earlier:
                inputs |= {f"sample-{r.number}": r.sample, f"pair-{r.number}": r.pair}
        files = {"generator": self.session.generator_identity}
        name = "negative" if negative else "finetune"
        return Step("finetune", name, number, self.trains(adapter is None), config | self.generator, inputs, files)

    def trains(self, first: bool) -> int:
        """The version of a finetuning: raised where earlier ones held it to another model than its settings say.

        Where an objective compares predictions, a mixed reference followed the policy from round 2 on, and predictions
        that were kept stood for candidates whose prompt is dropped.
        """
        knobs = self.config.finetune
        names = {knobs.objective} if isinstance(knobs.objective, str) else knobs.objective.keys()
        compares = any(name in COMPARING or name not in OBJECTIVES.builtin for name in names)
        followed = knobs.reference == "mix" and not first
        kept = self.config.sample.predictions and (knobs.reference == "previous" or (first and knobs.reference != "ema"))
        return VERSIONS["finetune"] + (compares and (followed or (kept and knobs.condition_dropout > 0)))

    def evaluate(self, base: Watched, before: Watched, after: Watched, section: Pair, inputs: dict[str, Step]) -> Step:
        e = self.config.evaluate
        config = {"judge": e.judge, "bootstrap": e.bootstrap, "interval": e.interval, "seed": self.config.seed,
                  "weights": section.weights, "normalise": section.normalise, "over": section.over, "experts": self.held_out_experts}
        assert base.disturbed
        inputs = inputs | base.disturbed.roles("disturbed")
        for role, r in (("base", base), ("before", before), ("after", after)):
            inputs |= roles_of(role, r.held_out, r.held_out_embeddings, r.held_out_scores)
        for role, r in (("base", base), ("after", after)):
            for number, aside in enumerate(r.settings):
                inputs |= aside.roles(f"{role}-setting-{number}")
        return Step("evaluate", "evaluate", after.number, VERSIONS["evaluate"], config, inputs)
