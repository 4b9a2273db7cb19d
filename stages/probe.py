"""`fdpo plan --probe`: a little of each kind of work, done for real and timed. What experts prepare once a run is done whole, and kept."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fashiondpo_pipeline import adapters, codecs, memory
from fashiondpo_pipeline.experts import ask
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.generators.diffusers_model import check_answer
from fashiondpo_pipeline.objectives import signals_of
from fashiondpo_pipeline.sampling import Guidance, predict, sample
from fashiondpo_pipeline.store import autocast
from fashiondpo_pipeline.terms import terms_of
from fashiondpo_pipeline.timesteps import saved_steps
from fashiondpo_pipeline.training import out_of_memory
from fashiondpo_pipeline.workspace import Step
from stages import Chain, Round, Session
from stages.encode import guidance_of
from stages.plan import Costs, Probed, knobs_of
from stages.sample import _decode

LONG = 20.0  # seconds after which no further tile is drawn
TILES = 3
PROMPTS = 4  # encoded


def run(session: Session, chain: Chain) -> Probed:
    """Measure what `chain` is made of. The run is held meanwhile."""
    probe = Probe(session, chain.rounds[1])
    with session.lock():
        session.execute(chain.prepared.values())
        probe.encode(chain.encode)
        pictures = probe.draw()
        probe.train()
        probe.look(pictures)
    return Probed(**probe.found, loading=probe.loading, peaks=probe.peaks)


def named_like(step: Step) -> list[str]:
    """Names of the steps that do the same for other pictures: candidates, held-out ones, those of several strengths."""
    return [step.name, f"held-out-{step.name}", f"strength-{step.name}"]


class Probe:
    """Measurements as they come in: `found` by the names of Probed, `loading` by step, `peaks` by stage."""

    def __init__(self, session: Session, first: Round):
        self.session, self.round, self.generator, self.costs = session, first, session.generator(), Costs(session)
        self.found: dict[str, Any] = {}
        self.loading: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def _timed(self, work: Callable[[], Any]) -> float:
        """Seconds that work takes, the GPU's included."""
        started = time.monotonic()
        work()
        if self.generator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    def encode(self, step: Step) -> None:
        """A few prompts through the text encoders, which are then let go."""
        self.session.say("probe: a few prompts through the text encoders")
        memory.forget()
        rows = self.session.prompts["train"].rows
        some = list(dict.fromkeys(row["prompt"] for row in rows))[:PROMPTS]
        self.loading[step.name] = self._timed(lambda: self.generator.remember(["", step.config["negative"]]))
        self.found["encoding"] = self._timed(lambda: self.generator.remember(some)) / len(some)
        self.generator.let_go("text")
        self.peaks["encode"] = memory.peak()
        self.rows = [row for row in rows if row["prompt"] in some]

    def draw(self) -> list[tuple[dict, Any]]:
        """(prompt, PNG) of a few tiles of candidates: the denoiser's seconds a row, a picture's to decode and pack, and its bytes."""
        step, generator = self.round.sample, self.generator
        knobs, tile, guidance = step.config, step.config["tile"], guidance_of(step.config)
        self.session.say(f"probe: up to {TILES} tiles of {tile} candidates, {knobs['steps']} steps each")
        memory.forget()
        check_answer(generator, tile)

        def walk(steps: int, tile_number: int = 0, save: list[int] | None = None) -> torch.Tensor:
            schedule = generator.schedule(steps)
            asked = [self.rows[i % len(self.rows)] for i in range(tile)]
            condition = generator.condition(asked, guidance, knobs["negative"]).steered(guidance, schedule)
            noise = [torch.Generator().manual_seed(tile_number * tile + i) for i in range(tile)]
            return sample(generator.denoise, schedule, condition, noise, generator.latent_shape,
                          eta=knobs["eta"], save=save or [], tile=tile, device=generator.device).x_0

        _decode(generator, walk(1), tile)  # the first call loads weights and chooses kernels
        generator.let_go("vae")
        self.loading |= dict.fromkeys(named_like(step), self._timed(lambda: generator.vae))
        saved = saved_steps(knobs["save"], knobs["steps"])
        drawn: list[torch.Tensor] = []
        seconds = 0.0
        while len(drawn) < TILES and seconds < LONG:
            number = len(drawn)
            seconds += self._timed(lambda number=number: drawn.append(walk(knobs["steps"], number, saved)))  # type: ignore[misc]
        forwards = sum(self.costs.branches(knobs, number) for number in range(knobs["steps"]))  # of one candidate
        self.found["drawing"] = seconds / len(drawn) / tile / forwards
        pngs: list[bytes] = []

        def picture() -> None:
            for x_0 in drawn:
                pngs.extend(codecs.encode_png(pixels) for pixels in _decode(generator, x_0, tile)[0])

        self.found["picturing"] = self._timed(picture) / len(drawn) / tile
        self.found["picture"] = sum(map(len, pngs)) / len(pngs)
        generator.let_go("vae")
        self.peaks["sample"] = memory.peak()
        return [(self.rows[i % tile % len(self.rows)], png) for i, png in enumerate(pngs)]

    def train(self) -> None:
        """Forward and backward of a micro-batch as finetuning has it, an optimiser step, and the adapter's file."""
        step, generator = self.round.finetune, self.generator
        knobs, sampled = knobs_of(step), self.round.sample.config
        by_steps = "log_prob" in signals_of(terms_of(knobs), knobs.signal)
        guided = knobs.guidance == "sampled" or (knobs.guidance == "auto" and by_steps)
        saved = saved_steps(sampled["save"], sampled["steps"])
        columns = knobs.draws if knobs.noise == "fresh" and not by_steps else len(saved)
        rows = min(knobs.micro_batch, knobs.groups * min(knobs.timesteps, columns) * sampled["candidates"])
        self.session.say(f"probe: forward and backward of {rows} rows, {knobs.adapter}")
        memory.forget()
        adapters.attach(generator.denoiser, knobs.rank, knobs.alpha or float(knobs.rank), knobs.targets, 0, knobs.adapter)
        self.session.forget_adapter()
        if knobs.checkpointing:
            generator.denoiser.enable_gradient_checkpointing()
        weights = list(adapters.parameters(generator.denoiser).values())
        optimiser = torch.optim.AdamW(weights, lr=0.0)
        while True:
            work, passed = self._work(rows, saved[len(saved) // 2], sampled, knobs.precision, guided)
            try:
                work().backward()
                optimiser.step()
                break
            except (RuntimeError, MemoryError) as problem:
                if not out_of_memory(problem) or rows == 1:
                    raise
                rows //= 2
                self.session.say(f"probe: out of memory with {2 * rows} rows at once; going on with {rows}, as finetuning would")
            optimiser.zero_grad()
            self.generator.let_go()
        self.found["training"] = self._timed(lambda: [work().backward() for _ in range(2)]) / 2 / passed
        self.found["updating"] = self._timed(optimiser.step)
        with torch.no_grad():
            self.found["asking"] = self._timed(work) / passed
        self.peaks["finetune"] = memory.peak()
        with tempfile.TemporaryDirectory() as folder:
            generator.save_adapter(Path(folder))
            self.found["adapter"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        if knobs.checkpointing:
            generator.denoiser.disable_gradient_checkpointing()
        adapters.detach(generator.denoiser)
        generator.encodings = {}

    def _work(self, rows: int, number: int, sampled: dict, precision: str, guided: bool) -> tuple[Callable[[], torch.Tensor], int]:
        """(a loss of so many rows at one step of the walk, rows that go through the denoiser for it)."""
        generator, guidance = self.generator, guidance_of(sampled) if guided else Guidance()
        schedule = generator.schedule(sampled["steps"])
        asked = [self.rows[i % len(self.rows)] for i in range(rows)]
        condition = generator.condition(asked, guidance, sampled["negative"]).steered(guidance, schedule)
        x_t = torch.randn(rows, *generator.latent_shape, generator=torch.Generator().manual_seed(0)).to(generator.device)
        t = schedule.timesteps[number].to(generator.device).expand(rows)

        def loss() -> torch.Tensor:
            with autocast(generator.device, precision):
                said, _ = predict(generator.denoise, x_t, t, condition)
            return said.float().square().mean()

        return loss, rows * (self.costs.branches(sampled, number) if guided else 1)

    def look(self, drawn: list[tuple[dict, bytes]]) -> None:
        """Every tower on a batch of the pictures, decoding included, then every expert."""
        batch = [drawn[i % len(drawn)] for i in range(self.session.config.machine.batch)]
        self.found |= {"looking": {}, "widths": {}}
        memory.forget()
        vectors = {identity: self._embed(step, [png for _, png in batch]) for identity, step in self.round.embeddings.items()}
        self.peaks["embed"] = memory.peak()
        memory.forget()
        for name, step in self.round.scores.items():
            self._score(name, step, batch, vectors.get(step.files.get("tower", "")))
        self.peaks["score"] = memory.peak()

    def _embed(self, step: Step, pngs: list[bytes]) -> Any:
        """What a tower makes of the pictures, (n, d)."""
        self.session.say(f"probe: {len(pngs)} pictures through {step.name}")
        found: Any = None

        def see(tower: Tower) -> None:
            nonlocal found
            found = tower.pictures([codecs.decode_picture(png, "probe") for png in pngs])

        see(Tower(*step.args["tower"], self.session.device))  # imports what every later step finds imported
        tower = Tower(*step.args["tower"], self.session.device)
        first, again = self._timed(lambda: see(tower)), self._timed(lambda: see(tower))
        for name in named_like(step):
            self.loading[name], self.found["looking"][name] = max(first - again, 0.0), again / len(pngs)
            self.found["widths"][name] = found.shape[1]
        return found

    def _score(self, name: str, step: Step, batch: list[tuple[dict, bytes]], vectors: Any) -> None:
        self.session.say(f"probe: {len(batch)} pictures before {name}")
        expert = self.session.expert(name, step.inputs.get("prepared"))
        rows = [{**row, "candidate": i, **({} if vectors is None else {"embedding": vectors[i]})} for i, (row, _) in enumerate(batch)]

        def score() -> None:
            opened = [{"picture": codecs.decode_picture(png, "probe")} if "picture" in expert.needs else {} for _, png in batch]
            ask(expert, [row | picture for row, picture in zip(rows, opened, strict=True)])

        score()
        for each in named_like(step):
            self.found["looking"][each] = self._timed(score) / len(batch)
