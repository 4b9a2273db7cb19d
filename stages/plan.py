"""What a run will cost, before anything runs: rows, bytes and denoiser forwards of each step."""

import math
from dataclasses import dataclass

from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.timesteps import in_window, saved_steps
from fashiondpo_pipeline.workspace import Step
from stages import Chain, Session


@dataclass(frozen=True)
class Line:
    """One step's cost. forwards: rows through the denoiser, a backward pass counted as two."""

    step: Step
    done: bool
    rows: int
    bytes: int
    forwards: int


@dataclass(frozen=True)
class Plan:
    lines: list[Line]

    @property
    def total_bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def forwards(self) -> int:
        return sum(line.forwards for line in self.lines if not line.done)


def estimate(session: Session, chain: Chain) -> Plan:
    """Rows are exact; bytes are exact for latents and assume a typical PNG; pairs are counted at most."""
    return Plan([line_of(session, step) for step in chain.steps])


def line_of(session: Session, step: Step) -> Line:
    """What one step will cost."""
    rows, size, forwards = 0, 0, 0
    if step.stage == "sample":
        rows, size, forwards = _sampled(session, step)
    elif step.stage in ("embed", "score"):
        rows = _sampled(session, step.inputs["sample"])[0]
        size = rows * (2048 if step.stage == "embed" else 24)
    elif step.stage == "pair":
        k = session.config.sample.candidates
        rows = len(session.prompts["train"]) * (1 if step.config["select"] == "best_worst" else k * (k - 1) // 2)
        size = rows * 24
    elif step.stage == "finetune":
        f, groups = session.config.finetune, len(session.prompts["train"])
        saved, drawn = _saved(step.inputs["sample"]), step.inputs["sample"].config["steps"]
        columns = f.draws if f.noise == "fresh" and f.objective != "step_dpo" else len(in_window(saved, drawn, f.window))
        rows = f.epochs * math.ceil(groups / f.groups)
        branches = 1 if step.inputs["sample"].config["guidance"] == 1 or f.objective != "step_dpo" else 2
        forwards = 3 * f.epochs * groups * session.config.sample.candidates * min(f.timesteps, columns) * branches
        size = 2_000_000
    return Line(step, session.run.done(step), rows, size, forwards)


def _saved(sample: Step) -> list[int]:
    return saved_steps(sample.config["save"], sample.config["steps"]) if sample.config.get("save") else []


def _sampled(session: Session, step: Step) -> tuple[int, int, int]:
    knobs = step.config
    rows = len(session.prompts[step.args["split"]]) * knobs["candidates"]
    shape = latent_shape(session)
    saved = _saved(step)
    latent = 2 * math.prod(shape)
    picture = math.prod(shape[1:]) * 64 * 3 // 2  # PNG of a photograph: about half of its raw bytes
    kept = latent * latents_kept(knobs, saved) + 24 * len(saved) if saved else 0
    branches = 1 if knobs["guidance"] == 1 else 2
    return rows, rows * (kept + picture + 64), rows * knobs["steps"] * branches


def latents_kept(knobs: dict, saved: list[int]) -> int:
    """Latents a candidate on disk: x_0, each saved x_t, where it led unless that is there already, and the prediction if wanted."""
    leads = sum(step + 1 not in saved and step + 1 < knobs["steps"] for step in saved) if knobs["path"] else 0
    return 1 + len(saved) + leads + (len(saved) if knobs["predictions"] else 0)


def latent_shape(session: Session) -> tuple[int, int, int]:
    """(c, h, w), read from the model's configuration files without loading it."""
    return session._generator.latent_shape


def show_plan(session: Session, chain: Chain) -> None:
    """`fdpo plan`: the estimate as a table."""
    plan = estimate(session, chain)
    rows = [
        [f"round {line.step.round}", line.step.name, "done" if line.done else "to do", f"{line.rows:,}" if line.rows else "",
         size(line.bytes) if line.bytes else "", f"{line.forwards:,}" if line.forwards else ""]
        for line in plan.lines
    ]
    show(f"{session.run.root}", ["", "step", "state", "rows", "bytes", "denoiser rows"], rows)
    todo = sum(line.bytes for line in plan.lines if not line.done)
    session.say(f"to do: {plan.forwards:,} denoiser rows (a backward pass counts two), "
                f"{size(todo)} to write; {size(plan.total_bytes)} in all")
