"""What a run will cost, before anything runs: rows, bytes and denoiser forwards of each step, and after a probe seconds and memory.

Bytes are found by packing each kind of table as the stage would, with numbers of chance in place of those to come. A step that is done
costs what it cost.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fashiondpo_pipeline import memory, panel, schemas, seeds, statistics
from fashiondpo_pipeline.checkpoints import Source, Unreachable
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.tower import LOCAL
from fashiondpo_pipeline.objectives import signals_of
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.terms import terms_of
from fashiondpo_pipeline.timesteps import branches_at, in_window, saved_steps
from fashiondpo_pipeline.workspace import MANY, WHOLE, Step, packed_size, read_json, write_sealed
from stages import Chain, Session
from stages.naming import command_for

FILE = "plan.json"  # in the run's folder
A_PICTURE = 0.5  # bytes of a PNG for each of its pixels' bytes, until a probe has drawn some: a photograph's
WIDTH = 768  # of a CLIP embedding, where its model cannot be asked without a network


@dataclass(frozen=True)
class Line:
    """One step's cost. forwards: rows through the denoiser, a backward pass counted as two. peak: bytes of memory."""

    step: Step
    done: bool
    rows: int
    bytes: int
    forwards: int = 0
    seconds: float | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Plan:
    lines: list[Line]

    @property
    def to_do(self) -> list[Line]:
        return [line for line in self.lines if not line.done]

    @property
    def total_bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def forwards(self) -> int:
        return sum(line.forwards for line in self.to_do)

    @property
    def seconds(self) -> float:
        return sum(line.seconds or 0 for line in self.to_do)


@dataclass(frozen=True)
class Probed:
    """What a probe measured. Seconds: of a denoiser row while sampling, of a picture, ...; encoding: of a prompt."""

    picture: float  # bytes of a PNG
    adapter: int  # bytes
    widths: dict[str, int]  # step's name -> numbers in an embedding
    encoding: float
    drawing: float
    picturing: float  # decoding and PNG
    training: float  # forward and backward of a denoiser row
    asking: float  # a forward alone, while finetuning
    updating: float  # an optimiser step's own
    looking: dict[str, float]  # step's name -> of a picture
    loading: dict[str, float]  # step's name -> of what it loads
    peaks: dict[str, int]  # stage -> bytes


def estimate(session: Session, chain: Chain, probed: Probed | None = None) -> Plan:
    """Rows are exact; so are bytes, but for PNGs before a probe; pairs, and what is trained on them, are counted at most."""
    costs = Costs(session, probed)
    return Plan([costs.line(step) for step in chain.steps])


def line_of(session: Session, step: Step) -> Line:
    """What one step will cost."""
    return Costs(session).line(step)


class Costs:
    """Answers of one configuration; what several steps have in common is found once."""

    def __init__(self, session: Session, probed: Probed | None = None):
        self.session, self.config, self.probed = session, session.config, probed
        self._packed: dict[str, int] = {}

    def line(self, step: Step) -> Line:
        if self.session.run.done(step):
            manifest = self.session.output(step).manifest
            rows = manifest["numbers"].get({"pair": "pairs", "finetune": "steps"}.get(step.stage, ""), self.rows(step))
            return Line(step, True, rows, sum(file["bytes"] for file in manifest["files"].values()), seconds=manifest["seconds"])
        line = Line(step, False, self.rows(step), self.bytes(step), self.forwards(step))
        return replace(line, seconds=self.seconds(line), peak=self.probed.peaks.get(step.stage)) if self.probed else line

    # -- rows

    def rows(self, step: Step) -> int:
        """Rows of the step's first table; pairs at most."""
        if step.stage == "encode":
            return len(self._prompts(step))
        if step.stage in ("sample", "disturb"):
            return len(self.session.drawn(step)) * step.config["candidates"]
        if step.stage in ("embed", "score"):
            return self.rows(step.inputs["sample"])
        if step.stage == "pair":
            return self._own(step) * self._pairs_a_group(step)
        if step.stage == "finetune":
            return step.config["epochs"] * math.ceil(self._groups(step) / step.config["groups"])
        return self.rows(step.inputs["after"]) if step.stage == "evaluate" else 0

    def _prompts(self, encode: Step) -> list[str]:
        asked = {row["prompt"] for split in self.session.prompts.values() for row in split.rows}
        return sorted(asked | {encode.config["negative"], ""})

    def _pairs_a_group(self, step: Step) -> int:
        """At most: what the rule chooses of k candidates that all differ."""
        k, rule = step.inputs["sample"].config["candidates"], step.config
        most = {"best_worst": 1, "mirror": k // 2, "median_split": k * k // 4}.get(rule["select"], k * (k - 1) // 2)
        limit = rule["per_group"] or (10 if rule["select"] == "mirror" else None)
        return min(most, limit or most, k * rule["per_candidate"] // 2 if rule["per_candidate"] else most)

    def _own(self, step: Step) -> int:
        """Groups of the round's own."""
        sample = step.inputs["sample"]
        return len(self.session.drawn(sample) if sample.stage == "sample" else self.session.prompts["train"])

    def _groups(self, step: Step) -> int:
        """Groups that a finetuning is done on, replayed ones too, where every group has pairs."""
        own, share = self._own(step), step.config["replay"]
        earlier = sum(role.startswith("pair-") for role in step.inputs)
        return own + (earlier * min(own, round(share / (1 - share) * own / earlier)) if earlier else 0)

    # -- forwards

    def forwards(self, step: Step) -> int:
        """Rows through the denoiser, a backward pass as two."""
        if step.stage == "sample":
            return round(self.rows(step) * sum(self.branches(step.config, n) for n in range(step.config["steps"])))
        if step.stage != "finetune":
            return 0
        passed, asked = self._trained(step)
        return 3 * passed + asked

    def branches(self, sampled: dict, number: int) -> int:
        """Branches that one step of a walk computes."""
        return branches_at(sampled, number, getattr(self.session._generator, "branches", 2))

    def _trained(self, step: Step) -> tuple[int, int]:
        """(rows with a backward pass, rows without) of a finetuning."""
        knobs, sampled = knobs_of(step), step.inputs["sample"].config
        terms = terms_of(knobs)
        signals = signals_of(terms, knobs.signal)
        fresh = knobs.noise == "fresh" and signals == ["error"]
        saved = saved_steps(sampled["save"], sampled["steps"])
        used = [] if fresh else [saved[place] for place in in_window(saved, sampled["steps"], knobs.window)]
        columns = knobs.draws if fresh else len(used)
        guided = knobs.guidance == "sampled" or (knobs.guidance == "auto" and "log_prob" in signals)
        walk = used or [number * sampled["steps"] // columns for number in range(columns)]  # fresh draws are spread over it
        branches = sum(self.branches(sampled, number) for number in walk) / columns if guided else 1.0
        k, groups = sampled["candidates"], self._groups(step)
        passed = round(knobs.epochs * groups * k * min(knobs.timesteps, columns) * branches)
        # of a unit larger than a micro-batch, all but the last piece goes through twice
        asked = round(passed * (k - knobs.micro_batch) / k) if k > knobs.micro_batch else 0
        first = "adapter" not in step.inputs
        as_drawn = knobs.reference in ("previous", "ema") or first
        compares = any("ref_prediction" in term.objective.needs for term in terms)
        replayed = groups - self._own(step)
        if knobs.reference == "ema" or (compares and not (sampled["predictions"] and not fresh and as_drawn and not replayed)):
            asked += passed  # a live reference
        same = knobs.guidance == "auto" or sampled["guidance"] == 1 or (knobs.guidance, signals) == ("none", ["error"])
        recorded = same and as_drawn and not fresh and not knobs.condition_dropout and knobs.precision == "no"
        recorded &= getattr(self.session._generator, "rounds_alike", True)
        asked += round((replayed if recorded else groups) * k * columns * branches)
        return passed, asked

    # -- bytes

    def bytes(self, step: Step) -> int:
        """What `fdpo status` will show: tables, adapter and claim."""
        claim = len(json.dumps(step.claim, indent=1, sort_keys=True, ensure_ascii=False).encode()) + 1
        return claim + getattr(self, f"_bytes_of_{step.stage}", lambda step: 0)(step)

    def _shards(self, rows: list, each: int, pack: Any, *key: Any) -> int:
        """Packed sizes of all shards: the first's for each full one, and the last's."""
        kind = json.dumps([len(rows), each, *key], sort_keys=True)
        if kind not in self._packed:
            shards = math.ceil(len(rows) / each)
            last = pack(rows[(shards - 1) * each :])
            self._packed[kind] = (shards - 1) * pack(rows[:each]) + last if shards > 1 else last
        return self._packed[kind]

    def _whole(self, name: str, rows: list, each: int, table: Any) -> int:
        """What `whole/` adds where there are many shards: the narrow columns of a table once more, in one file."""
        if math.ceil(len(rows) / each) < MANY:
            return 0
        few, more = (table(rows[: each * n]).drop_columns(sorted(WHOLE[name])) for n in (1, 5))
        a_row = (packed_size(more) - packed_size(few)) / (len(more) - len(few))
        return round(packed_size(few) + a_row * (len(table(rows[:1])) * len(rows) - len(few)))

    def _bytes_of_encode(self, step: Step) -> int:
        import torch

        from fashiondpo_pipeline import encodings
        from stages.encode import A_SHARD

        layout = getattr(self.session._generator, "layout", dict)()
        if not layout:
            return 0
        dtype = getattr(torch, step.config["dtype"])
        empty = encodings.to_table({"": {name: torch.empty(shape, dtype=dtype) for name, shape in layout.items()}})
        parts = sum(len(column[0].as_py()) for column in empty.columns[1:])

        def pack(prompts: list[str]) -> int:
            nothing = pa.array([b""] * len(prompts), pa.binary())
            table = pa.table([pa.array(prompts), *[nothing] * len(layout)], schema=empty.schema)
            return packed_size(table) + len(prompts) * parts

        return self._shards(self._prompts(step), A_SHARD, pack, "encode")

    def _bytes_of_disturb(self, step: Step) -> int:
        return self._bytes_of_sample(replace(step, config=step.inputs["sample"].config | step.config))

    def _bytes_of_sample(self, step: Step) -> int:
        knobs, rows, each = step.config, self.session.drawn(step), self.config.machine.shard
        shape = self.session._generator.latent_shape
        saved = _saved(step)
        factor = getattr(self.session._generator, "vae_factor", 8)
        picture = self.probed.picture if self.probed else A_PICTURE * 3 * math.prod(shape[1:]) * factor**2
        latents = latents_kept(knobs, saved) if saved else 0
        seeded = knobs["candidates"] // len(knobs.get("strengths", [None]))  # the same seeds at each strength

        def candidates(some: list[dict]) -> pa.Table:
            return pa.Table.from_pylist([
                {"group": row["group"], "candidate": i, "prompt": row["prompt"], "round": step.round,
                 "seed": seeds.key(knobs["seed"], knobs["stream"], row["group"], i % seeded),
                 "picture": {"bytes": b"", "path": f"{row['group']}/{i}.png"},
                 **{name: knobs[name] for name in ("guidance", "guidance_interval", "guidance_rescale")}, "fault": None}
                for row in some for i in range(knobs["candidates"])], schemas.CANDIDATES)

        def pack(some: list[dict]) -> int:
            paths = packed_size(_paths(some, knobs, saved)) if saved else 0
            count = len(some) * knobs["candidates"]
            return packed_size(candidates(some)) + paths + round(count * (picture + latents * (2 * math.prod(shape) - 2)))

        return self._shards(rows, each, pack, "sample", knobs) + self._whole("candidates", rows, each, candidates)

    def _bytes_of_embed(self, step: Step) -> int:
        width = self.probed.widths[kind_of(step)] if self.probed else _width(step.args["tower"])

        def pack(some: list[dict]) -> int:
            vectors = _numbers(len(some) * step.inputs["sample"].config["candidates"], width).astype(np.float32)
            return packed_size(pa.table([*self._keys(some, step), pa.array(list(vectors), pa.list_(pa.float32()))], schema=schemas.EMBEDDINGS))

        return self._shards(self._drawn(step), self.config.machine.shard, pack, "embed", width, step.inputs["sample"].config)

    def _bytes_of_score(self, step: Step) -> int:
        def table(some: list[dict]) -> pa.Table:
            keys, schema = self._keys(some, step), schemas.scores_of(self.session.make(step.args["expert"]))
            count = len(keys[0])
            more = [pa.array(_numbers(count) > 0) if field.type == pa.bool_() else pa.nulls(count, field.type) for field in list(schema)[4:]]
            return pa.table([*keys, _numbers(count), pa.nulls(count, pa.string()), *more], schema=schema)

        rows, each = self._drawn(step), self.config.machine.shard
        kind = self._shards(rows, each, lambda some: packed_size(table(some)), "score", step.args["expert"], step.inputs["sample"].config)
        return kind + self._whole("scores", rows, each, table)

    def _bytes_of_pair(self, step: Step) -> int:
        from fashiondpo_pipeline.grid import GROUPS_A_PART

        experts = [role for role in step.inputs if role.startswith("score-")]
        many = self._pairs_a_group(step)

        def pack(some: list[dict]) -> int:
            groups = [row["group"] for row in some for _ in range(many)]
            numbers = _numbers(len(groups), 3 + len(experts)).astype(np.float32)
            places = (np.arange(len(groups)) % step.inputs["sample"].config["candidates"]).astype(np.int16)
            columns = [pa.array(groups), places, places[::-1], *numbers.T]
            return packed_size(pa.table(columns, schema=schemas.pairs(experts))) + packed_size(schemas.REJECTS.empty_table())

        rows = self.session.drawn(step.inputs["sample"])
        return self._shards(rows, GROUPS_A_PART, pack, "pair", many, len(experts), step.inputs["sample"].config["candidates"])

    def _bytes_of_finetune(self, step: Step) -> int:
        rows = [dict.fromkeys(schemas.STEPS.names, value) for value in _numbers(self.rows(step)).tolist()]
        whole = ("step", "epoch", "pairs", "rows")
        steps = pa.Table.from_pylist([row | dict.fromkeys(whole, n) for n, row in enumerate(rows)], schemas.STEPS)
        columns = pa.Table.from_pylist([{"step": n} for n in range(len(_saved(step.inputs["sample"])))], schemas.COLUMNS)
        return packed_size(steps) + packed_size(columns) + (self.probed.adapter if self.probed else self._adapter)

    def _bytes_of_strengthen(self, step: Step) -> int:
        return self.probed.adapter if self.probed else self._adapter

    @cached_property
    def _adapter(self) -> int:
        """Bytes of an adapter's file: the denoiser is built without weights and adapted. 0 for a plug-in's generator, until a probe."""
        import torch

        from fashiondpo_pipeline import adapters

        generator, knobs = self.session._generator, self.config.finetune
        if not hasattr(generator, "source"):
            return 0
        with torch.device("meta"):
            denoiser = generator.source.class_of(generator.denoiser_part).from_config(generator.source.config(generator.denoiser_part))
            if knobs.adapter != adapters.FULL:
                adapters.attach(denoiser.requires_grad_(False), knobs.rank, knobs.alpha or float(knobs.rank), knobs.targets, 0, knobs.adapter)
        tensors = {f"{generator.denoiser_part}.{name.replace('.policy', '')}": list(tensor.shape)
                   for name, tensor in adapters.parameters(denoiser).items()}
        header, end = {}, 0
        for name, shape in tensors.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        notes = [name for config in getattr(denoiser, "peft_config", {}).values() for name in sorted(config.target_modules)]
        return end + len(json.dumps(header, separators=(",", ":"))) + len(json.dumps(notes)) + 200  # its other notes

    def _bytes_of_evaluate(self, step: Step) -> int:
        after = step.inputs["after"]

        def pack(some: list[dict]) -> int:
            keys = self._keys(some, step, after)
            return packed_size(pa.table([*keys, *_numbers(len(keys[0]), len(statistics.METERS)).astype(np.float32).T], schema=schemas.METERS))

        rows = self.session.prompts[after.args["split"]].rows
        return self._shards(rows, len(rows), pack, "evaluate", after.config["candidates"])

    def _drawn(self, step: Step) -> list[dict]:
        """The prompts of the pictures that a step reads."""
        return self.session.drawn(step.inputs["sample"])

    def _keys(self, some: list[dict], step: Step, sample: Step | None = None) -> list[pa.Array]:
        """Columns group and candidate of some prompts' pictures."""
        k = (sample or step.inputs["sample"]).config["candidates"]
        return [pa.array([row["group"] for row in some for _ in range(k)]), pa.array(list(range(k)) * len(some), pa.int16())]

    # -- seconds

    def seconds(self, line: Line) -> float | None:
        """By what a probe measured; None for what takes none to speak of."""
        probed, step = self.probed, line.step
        assert probed is not None
        load = probed.loading.get(kind_of(step), 0.0)
        if step.stage == "encode":
            return load + line.rows * probed.encoding
        if step.stage == "sample":
            return load + self._full(step) * (line.forwards * probed.drawing + line.rows * probed.picturing)
        if step.stage in ("embed", "score"):
            return load + line.rows * probed.looking[kind_of(step)]
        if step.stage == "finetune":
            passed, asked = self._trained(step)
            return passed * probed.training + asked * probed.asking + line.rows * probed.updating
        return None

    def _full(self, step: Step) -> float:
        """Rows that go through the networks for each one wanted: tiles are always full."""
        k, tile = step.config["candidates"], step.config["tile"]
        in_flight = math.ceil(self.config.machine.batch / tile) * tile
        prompts, each = len(self.session.drawn(step)), self.config.machine.shard
        shards = [min(each, prompts - start) * k for start in range(0, prompts, each)]
        tiles = sum(math.ceil(min(in_flight, rows - start) / tile) for rows in shards for start in range(0, rows, in_flight))
        return tiles * tile / sum(shards)


def kind_of(step: Step) -> str:
    """A step's name without what tells apart steps that cost alike."""
    return step.name.removesuffix(step.args.get("label", ""))


def knobs_of(step: Step) -> Finetune:
    """The finetune section in a step's claim."""
    return Finetune.model_validate({name: value for name, value in step.config.items() if name in Finetune.model_fields})


def _saved(sample: Step) -> list[int]:
    return saved_steps(sample.config["save"], sample.config["steps"]) if sample.config.get("save") else []


def latents_kept(knobs: dict, saved: list[int]) -> int:
    """Latents a candidate on disk: x_0, each saved x_t, where it led unless that is there already, and the prediction if wanted."""
    leads = sum(step + 1 not in saved and step + 1 < knobs["steps"] for step in saved) if knobs["path"] else 0
    return 1 + len(saved) + leads + (len(saved) if knobs["predictions"] else 0)


def _paths(some: list[dict], knobs: dict, saved: list[int]) -> pa.Table:
    """A table like `trajectories`, its latents one number each."""
    two, each = b"\0\0", range(len(saved))
    leads = [None if step + 1 in saved or step + 1 == knobs["steps"] else two for step in saved] if knobs["path"] else None
    numbers = _numbers(len(some) * knobs["candidates"], 2 * len(saved)).tolist()
    rows = [
        {"group": row["group"], "candidate": i, "steps": saved, "timesteps": [1000.0 / (step + 1) for step in saved], "x_t": [two for _ in each],
         "x_prev": leads, "x_0": two, "log_prob": [None if knobs["eta"] == 0 else value for value in drawn[: len(saved)]],
         "error": drawn[len(saved) :], "prediction": [two for _ in each] if knobs["predictions"] else None}
        for (row, i), drawn in zip(((row, i) for row in some for i in range(knobs["candidates"])), numbers, strict=True)
    ]
    return pa.Table.from_pylist(rows, schemas.trajectories(1, 1, 1))


def _numbers(*shape: int) -> np.ndarray:
    """Numbers that pack as badly as measured ones."""
    return np.random.default_rng(0).normal(size=shape)


def _width(tower: tuple[str, str | None]) -> int:
    """Numbers in an embedding, as the model's configuration says."""
    if tower[0].startswith(LOCAL):
        return read_json(Path(locate(tower[0].removeprefix(LOCAL))) / "open_clip_config.json")["model_cfg"]["embed_dim"]
    import open_clip

    return (open_clip.get_model_config(tower[0]) or {"embed_dim": WIDTH})["embed_dim"]


# -- shown and kept


class Nowhere(Source):
    """In place of a model that cannot be reached: nothing is known of it, and no step of it is found done."""

    def identity(self) -> str:
        return "unreachable"

    text_identity = identity


def show_plan(session: Session, rounds: int, probe: bool = False) -> None:
    """`fdpo plan`: the estimate as a table. With a probe it is kept, for `fdpo round` to compare with what happens.

    Raises UserError where the model cannot be reached, after the counts that do not need it.
    """
    try:
        chain = session.chain(rounds)
        session.check_objectives()
        session.check_model()
        if probe:
            from stages.probe import run  # here, as it needs torch

        plan = estimate(session, chain, run(session, chain) if probe else None)
        if said := panel.judge_warning(session.config):
            session.say(said)
    except Unreachable as problem:
        _show_counts(session, rounds)
        raise UserError(f"{problem}; above is what can be counted without the model") from problem
    if not probe:
        show(f"{session.run.root}", ["", "step", "state", "rows", "bytes", "denoiser rows"], [
            [*_beginning(line), f"{line.forwards:,}" if line.forwards else ""] for line in plan.lines
        ])
        session.say(_total(plan))
        return
    memories = "peak memory (GPU)" if memory.on_gpu() else "peak memory (RSS)"
    show(f"{session.run.root}", ["", "step", "state", "rows", "bytes", "seconds", memories], [
        [*_beginning(line), "" if line.seconds is None else f"{line.seconds:,.1f}", size(line.peak) if line.peak else ""] for line in plan.lines
    ])
    session.say(f"{_total(plan)}; {duration(plan.seconds)} by the probe, for one process on this machine")
    write_sealed(session.run.root / FILE, {
        "memory": memories, "rounds": len(chain.rounds) - 1,
        "steps": {line.step.folder: {name: getattr(line, name) for name in ("rows", "bytes", "seconds", "peak")} for line in plan.to_do},
    })


def _show_counts(session: Session, rounds: int) -> None:
    """The rows of each step, of a model that cannot be reached: what is done is known where a commit pins it."""
    try:
        chain = session.chain(rounds)
    except Unreachable:
        session.source = Nowhere(session.config.generator.model)
        chain = session.chain(rounds)
    costs = Costs(session)
    show(f"{session.run.root}", ["", "step", "state", "rows"],
         [_beginning(Line(step, session.run.done(step), costs.rows(step), 0))[:4] for step in chain.steps])


def _beginning(line: Line) -> list[str]:
    state = "done" if line.done else "to do"
    return [f"round {line.step.round}", line.step.name, state, f"{line.rows:,}" if line.rows else "", size(line.bytes) if line.bytes else ""]


def _total(plan: Plan) -> str:
    todo = sum(line.bytes for line in plan.to_do)
    return f"to do: {plan.forwards:,} denoiser rows (a backward pass counts two), {size(todo)} to write; {size(plan.total_bytes)} in all"


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(8), duration(600), duration(9000)
    ('8 s', '10 min', '2.5 hours')
    """
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def compare(session: Session, chain: Chain) -> None:
    """A table of what a probe predicted against what happened, of the steps that have run since; nothing without a probe."""
    path = session.run.root / FILE
    planned = read_json(path)["steps"] if path.is_file() else {}
    sums: dict[str, dict[str, list[float]]] = {}
    for step in chain.steps:
        if step.folder not in planned or not session.run.done(step):
            continue
        line, manifest = planned[step.folder], session.output(step).manifest
        kinds = sums.setdefault(command_for(step), {"seconds": [0, 0], "bytes": [0, 0], "peak": [0, 0]})
        found = {"seconds": manifest["seconds"], "bytes": sum(file["bytes"] for file in manifest["files"].values())}
        for name, value in found.items():
            kinds[name] = [kinds[name][0] + (line[name] or 0), kinds[name][1] + value]
        kinds["peak"] = [max(kinds["peak"][0], line["peak"] or 0), max(kinds["peak"][1], session.peaks.get(step.folder, 0))]
    if sums:
        show("planned, and what happened", ["", "seconds", "", "bytes", "", "peak memory", ""], [
            [stage, *(f"{value:,.1f}" for value in kinds["seconds"]), *(size(value) for value in kinds["bytes"]),
             *(size(value) if value else "" for value in kinds["peak"])] for stage, kinds in sums.items()
        ])
