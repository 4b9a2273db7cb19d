"""What finetuning reads from disk is what the sampler did; references, replay, memory and resumes change no number they should not."""

import contextlib
import io
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file
from whole_runs import prepare, refused, works

from fashiondpo_pipeline import adapters, diagnosis, diffusion, seeds
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.objectives import BUILTIN
from fashiondpo_pipeline.reference import Reference
from fashiondpo_pipeline.sampling import Guidance, sample
from fashiondpo_pipeline.terms import terms_of
from fashiondpo_pipeline.training import Batch, Unit, accumulate
from fashiondpo_pipeline.workspace import read_hashed, write_hashed
from stages import Session, finetune
from stages import sample as sampling
from stages.trained_on import Candidates

BETA = 100.0
ERRORS = "finetune.objective=diffusion_dpo"


class Workshop:
    """One folder for many finetunings: candidates drawn with the same settings are drawn once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.said: list[str] = []

    def session(self, *sets: str) -> Session:
        base = [f"prompts.file={self.folder / 'prompts.txt'}", "prompts.most_train=4", "pair.margin=0", "experts.clip_t=", "finetune.window=[0, 0.9]",
                "pair.weights={bright: 1}", "finetune.epochs=1", 'experts={bright: {use: "fashiondpo_pipeline.testing:Brightness"}}']
        config = load(self.folder / "pipeline.yaml", [knob for knob in base if knob != "experts.clip_t="] + list(sets))
        return Session(config, self.folder / "runs/t", say=self.said.append)

    def until(self, number: int, *sets: str, stop: str = "finetune") -> tuple[Session, object]:
        """Everything before round `number`'s finetuning has been made; the session and that step."""
        made = self.session(*sets)
        chain = made.chain(number)
        for r in chain.rounds[1:]:
            made.execute([chain.encode, r.sample, *r.embeddings.values(), *r.scores.values(), r.pair])
            if r.number < number:
                made.execute([r.finetune])
        return made, chain.rounds[number].finetune

    def train(self, number: int, *sets: str):
        """The finetuning's output."""
        made, step = self.until(number, *sets)
        made.execute([step])
        return made.output(step)

    def again(self, out, number: int, *sets: str):
        """The same finetuning once more, from nothing."""
        shutil.rmtree(out.folder)
        return self.train(number, *sets)


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_sd, tiny_clip) -> Workshop:
    return Workshop(prepare(tmp_path_factory.mktemp("shop"), tiny_sd, tiny_clip))


@pytest.fixture(scope="module")
def shop_v(tmp_path_factory, tiny_sd_v, tiny_clip) -> Workshop:
    return Workshop(prepare(tmp_path_factory.mktemp("shop_v"), tiny_sd_v, tiny_clip))


def adapter_of(out) -> bytes:
    return (out.folder / "adapter/pytorch_lora_weights.safetensors").read_bytes()


def numbers_of(out) -> dict:
    return out.manifest["numbers"]


def steps_of(out) -> list[dict]:
    return out.table("steps").to_pylist()


class Opened:
    """A finetuning just before its first step: generator, store, groups, reference."""

    def __init__(self, made: Session, step, wide: bool = True):
        self.made, self.step = made, step
        self.generator = made.generator(step.inputs.get("adapter"))
        made.forget_adapter()
        out = made.run.output(step)
        out.open()
        knobs = made.config.finetune
        terms = terms_of(knobs)
        self.candidates = Candidates(made, step, out, knobs, terms, self.generator)
        self.store, self.groups = self.candidates.store, self.candidates.groups
        first = "adapter" not in step.inputs
        if first:
            adapters.attach(self.generator.denoiser, 2, 2.0, knobs.targets, 0)
        self.weights = adapters.parameters(self.generator.denoiser)
        self.terms = terms
        self.reference = Reference(knobs, terms, self.store, self.candidates.replayed, self.weights, first, made.processes, self.generator)

    def units(self) -> list[Unit]:
        return [Unit(found, column) for found in self.groups[:2] for column in range(min(self.store.columns, 2))]

    def gradients(self, beta: float = BETA) -> dict[str, torch.Tensor]:
        """As the stage makes them."""
        def evidence(batch: Batch, predictions):
            return self.store.evidence(batch, predictions, self.reference.at(batch), self.candidates.scores_at(batch))

        accumulate(self.units(), 64, self.store.predict, evidence, self.terms, beta, columns=self.store.columns)
        return {name: weight.grad.clone() for name, weight in self.weights.items()}

    def gain(self, row: int, column: int) -> torch.Tensor:
        """A row's signal, live, with its weight; higher is better."""
        rows, columns = np.array([row]), np.array([column])
        spot = self.store.spot(rows, columns)
        (name,) = self.store.signals
        weight = torch.from_numpy(self.store._scale[name][columns])
        if self.store.fresh and self.store.knobs.min_snr:
            weight = diffusion.min_snr_weight(self.store.schedule, spot.t, self.store.knobs.min_snr)
        value = self.store.signals_of(rows, columns, spot, self.store.predict(rows, columns))[name]
        return weight * (value if name == "log_prob" else -value / 2)


def randomise(weights: dict) -> None:
    random = torch.Generator().manual_seed(1)
    for weight in weights.values():
        weight.data = 0.1 * torch.randn(weight.shape, generator=random)


# -- the pair loop, with everything live


@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("sample.guidance=3",),
        ("sample.guidance=3", "sample.guidance_interval=[0.3, 0.7]", "sample.guidance_rescale=0.5"),
        ("finetune.step_weight=density",),
        (ERRORS, "sample.guidance=3"),
        ("sample.guidance=3", "finetune.guidance=none"),
        ("sample.guidance=3", "finetune.guidance=sampled"),
        (ERRORS, "sample.guidance=3", "finetune.guidance=none"),
        (ERRORS, "sample.guidance=3", "finetune.guidance=sampled"),
        (ERRORS, "sample.guidance=3", "finetune.guidance=sampled", "finetune.noise=fresh", "finetune.draws=3"),
        ("finetune.guidance=sampled",),
        (ERRORS, "finetune.min_snr=5"),
        (ERRORS, "finetune.noise=fresh", "finetune.draws=3", "finetune.min_snr=5"),
        (ERRORS, "finetune.condition_dropout=0.5"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_grouped_gradients_from_disk_are_those_of_a_pair_loop_with_a_live_reference(shop, shop_v, prediction, sets):
    """Round 1: the candidates' own sampler is the base, so its record is what a forward with the adapter off says."""
    opened = Opened(*(shop if prediction == "epsilon" else shop_v).until(1, *sets))
    store = opened.store
    asks = "finetune.noise=fresh" in sets or any("dropout" in knob for knob in sets)
    asks |= "sample.guidance=3" in sets and ("finetune.guidance=sampled" in sets or ("finetune.guidance=none" in sets and ERRORS not in sets))
    assert opened.reference.rows_before == (len(store.names) * store.columns if asks else 0)
    randomise(opened.weights)
    ours = opened.gradients()
    opened.generator.denoiser.zero_grad()
    losses = []
    for unit in opened.units():
        for pair in zip(unit.group.rows[unit.group.winner], unit.group.rows[unit.group.loser], strict=True):
            policy = [opened.gain(row, unit.column) for row in pair]
            with torch.no_grad(), adapters.disabled(opened.generator.denoiser):
                reference = [opened.gain(row, unit.column) for row in pair]
            losses.append(-F.logsigmoid(BETA * ((policy[0] - reference[0]) - (policy[1] - reference[1]))).sum())
    torch.stack(losses).mean().backward()
    for name, weight in opened.weights.items():
        most = weight.grad.abs().max().item()
        assert most > 0
        assert torch.allclose(ours[name], weight.grad, rtol=5e-3, atol=5e-3 * most), name


@pytest.mark.parametrize("signal", ["log_prob", "error"])
@pytest.mark.parametrize(("guidance", "branches"), [("auto", {"log_prob": 2, "error": 1}), ("sampled", {"log_prob": 2, "error": 2}),
                                                    ("none", {"log_prob": 1, "error": 1})])
def test_the_policy_is_the_guided_prediction_or_the_conditional_one_as_asked(shop, signal, guidance, branches):
    """By hand: the branches of the prompt and of none mixed at the sampler's scale, and what each signal is made of."""
    sets = ("sample.guidance=3", f"finetune.guidance={guidance}", *([ERRORS] if signal == "error" else []))
    opened = Opened(*shop.until(1, *sets))
    store, rows, columns = opened.store, np.array([0, 1]), np.array([1, 2])
    calls = []
    denoise = opened.generator.denoise
    opened.generator.denoise = lambda x_t, t, parts: calls.append(len(x_t)) or denoise(x_t, t, parts)
    try:
        with torch.no_grad():
            found = store.predict(rows, columns)[0 if signal == "log_prob" else -1]
    finally:
        del opened.generator.denoise
    assert calls == [2 * branches[signal]]
    spot = store.spot(rows, columns)
    both = opened.generator
    both.encodings = opened.made.encodings(opened.step.inputs["encode"], [*store._prompts, ""])
    conditions = [both.condition([{"prompt": store._prompts[row]}], Guidance(3.0), "") for row in rows]
    with torch.no_grad():
        with_prompt, without = (torch.cat([denoise(spot.x_t[n : n + 1], spot.t[n : n + 1], condition.branch(branch))
                                           for n, condition in enumerate(conditions)]) for branch in (0, 1))
    wanted = without + 3 * (with_prompt - without) if branches[signal] == 2 else with_prompt
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(with_prompt, without + 3 * (with_prompt - without), atol=1e-4)


def test_every_objective_trains_on_the_guided_prediction(shop):
    for name in BUILTIN:
        out = shop.train(1, "sample.guidance=3", "finetune.guidance=sampled", f"finetune.objective={name}")
        assert all(math.isfinite(row["loss"]) for row in steps_of(out)), name


# -- what is read


@pytest.mark.parametrize("save", ["all", "3", "[0, 2, 3]"])
def test_where_each_step_led_is_rebuilt_from_the_next_ones_beginning(shop, save):
    made, step = shop.until(1, f"sample.save={save}", "finetune.window=[0, 1]")
    opened = Opened(made, step)
    store, generator = opened.store, opened.generator
    adapters.detach(generator.denoiser)
    config = step.inputs["sample"].config
    prompts = {row["group"]: row["prompt"] for row in made.prompts["train"].rows}
    (group, number), row = next(iter(store.place.items()))
    path = sample(
        generator.denoise, store.schedule, generator.condition([{"prompt": prompts[group]}], Guidance()),
        [torch.Generator().manual_seed(seeds.key(config["seed"], config["stream"], group, number))], generator.latent_shape,
        eta=1.0, save=store.column_names()[0], tile=config["tile"],
    )
    columns = np.arange(store.columns)
    for name in ("x_t", "x_prev"):
        assert torch.equal(store._tensor(name, np.full(store.columns, row), columns), getattr(path, name)[0]), name
    assert torch.equal(store._tensor("x_0", np.array([row])), path.x_0)
    assert opened.reference.numbers["log_prob"][row] == pytest.approx(path.log_prob[0].numpy())


def test_a_path_that_was_not_kept_is_refused_for_what_needs_it_and_is_enough_for_the_rest(shop):
    sets = ("sample.path=false", "sample.save=[0, 2]")
    made, step = shop.until(1, *sets)
    with contextlib.chdir(shop.folder):
        words = [word for knob in sets for word in ("--set", knob)]
        assert refused("round", "--n", "1", "--name", "pathless", *words) == (
            "finetune.objective step_dpo needs to know where each step led, which sample.path false does not keep: set sample.path to true, use "
            "diffusion_dpo, or set finetune.signal to error")
    with pytest.raises(UserError) as problem:
        made.execute([step])
    assert str(problem.value) == (
        "these candidates were drawn with sample.path false, so where each step led is not known: draw them again with sample.path true, "
        "or use an objective on errors (diffusion_dpo, or finetune.signal: error)")
    assert steps_of(shop.train(1, *sets, ERRORS))[0]["margin"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("window", "kept"), [("[0, 1]", [0, 1, 2, 3]), ("[0.3, 0.9]", [1, 2]), ("[0, 0.4]", [0, 1])])
def test_a_window_restricts_the_columns(shop, window, kept):
    out = shop.train(1, f"finetune.window={window}", "finetune.timesteps=4")
    assert out.table("columns")["step"].to_pylist() == kept
    assert {row["rows"] % len(kept) for row in steps_of(out)} == {0}


def test_fresh_noise_is_shared_within_a_group_spread_over_the_timesteps_and_the_same_again(shop):
    sets = (ERRORS, "finetune.noise=fresh", "finetune.draws=8", "finetune.window=[0.3, 0.9]")
    store = Opened(*shop.until(1, *sets)).store
    name, shape = store.names[0], store.generator.latent_shape
    drawn = [store._draw((name, draw)) for draw in range(8)]
    edges = [700 - 75 * i for i in range(9)]  # the window leaves out the first 0.3 of the walk and its last 0.1
    assert all(low <= t <= high for (_, t), high, low in zip(drawn, edges[:-1], edges[1:], strict=True))
    again = store._draw((name, 3))
    assert torch.equal(drawn[3][0], again[0]) and drawn[3][1] == again[1]
    assert not torch.equal(drawn[3][0], store._draw((store.names[-1], 3))[0])
    assert torch.equal(drawn[0][0], torch.randn(shape, generator=seeds.generator(7, "fresh", name, 0)))
    out = shop.train(1, *sets)
    before = adapter_of(out)
    assert adapter_of(shop.again(out, 1, *sets)) == before


def test_a_dropped_prompt_is_dropped_for_its_whole_group_and_about_as_often_as_asked(shop):
    opened = Opened(*shop.until(1, ERRORS, "finetune.condition_dropout=0.3"))
    store = opened.store
    for group in opened.groups:
        for column in range(store.columns):
            tokens = store.spot(group.rows, np.full(len(group.rows), column)).condition.parts["tokens"][0]
            assert all(torch.equal(one, tokens[0]) for one in tokens)
            nothing = torch.equal(tokens[0], store._nothing.parts["tokens"][0, 0])
            assert nothing == store._dropped(group.name, column)
    share = np.mean([store._dropped(f"group {i}", column) for i in range(400) for column in range(5)])
    assert share == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("sets", [(), ("finetune.objective=plackett_luce",)])
def test_groups_hold_every_pair_of_the_table_and_each_candidate_once(shop, sets):
    opened = Opened(*shop.until(1, *sets))
    number_of = {row: key for key, row in opened.store.place.items()}  # row -> (group, candidate)
    table = opened.made.output(opened.step.inputs["pair"]).table("pairs", ["group", "winner", "loser"]).to_pylist()
    found = [(group.name, number_of[group.rows[won]][1], number_of[group.rows[lost]][1])
             for group in opened.groups for won, lost in zip(group.winner, group.loser, strict=True)]
    assert sorted(found) == sorted((pair["group"], pair["winner"], pair["loser"]) for pair in table) != []
    assert [group.name for group in opened.groups] == sorted({pair["group"] for pair in table})
    rows = np.concatenate([group.rows for group in opened.groups])
    assert len(set(rows)) == len(rows) == opened.store.rows
    assert all(number_of[row][0] == group.name for group in opened.groups for row in group.rows)


def test_a_dropped_prompt_keeps_the_guidance_that_flux_is_told(tmp_path, tiny_flux, tiny_clip):
    shop = Workshop(prepare(tmp_path, tiny_flux, tiny_clip))
    opened = Opened(*shop.until(1, ERRORS, "finetune.condition_dropout=0.5", "sample.guidance=3.5", "sample.height=16", "sample.width=16"))
    assert opened.store._nothing.parts["guidance"].tolist() == [[3.5]]


@pytest.mark.parametrize("weight", ["equal", "density"])
def test_every_step_weighs_alike_unless_the_bare_density_is_asked_for(shop, weight):
    store = Opened(*shop.until(1, f"finetune.step_weight={weight}")).store
    sensitivity = diffusion.sensitivity(store.schedule, store._t, 1.0).numpy()
    size = math.prod(store.generator.latent_shape)
    wanted = np.full(store.columns, np.median(sensitivity)) if weight == "equal" else sensitivity
    assert store._scale["log_prob"] * sensitivity * size == pytest.approx(wanted)
    assert sensitivity.max() / sensitivity.min() > 2


# -- objectives


@pytest.mark.parametrize("name", BUILTIN)
def test_every_objective_trains_from_disk(shop, name):
    """Its loss and its gradient are finite, and something is learnt; two only hold to the reference, and alone leave the policy there."""
    compares = {"prediction", "ref_prediction"} & set(BUILTIN[name].needs)
    outs = [shop.train(1, f"finetune.objective={name}")]
    if compares:
        outs.append(shop.train(1, f"finetune.objective={name}", "sample.predictions=true"))
    for out in outs:
        rows = steps_of(out)
        assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
        assert rows[0]["margin"] == pytest.approx(0, abs=1e-3)
        pushed = sum(row["grad_norm"] for row in rows)
        assert pushed < 0.01 if name in ("winner_rise", "anchor") else pushed > 0  # predictions on disk are rounded to fp16
    if compares:
        live, kept = (numbers_of(out) for out in outs)
        assert live["reference_rows_in_training"] == live["policy_rows"] > 0
        assert kept["reference_rows_in_training"] == kept["reference_rows_before"] == 0
        assert kept["first_loss"] == pytest.approx(live["first_loss"], abs=1e-3)


def test_a_mix_and_its_options_train_from_disk(shop):
    out = shop.train(1, "finetune.objective={cdpo: 1, sft: 0.1, dgpo: 0.5}", "finetune.options={label_smoothing: 0.2}")
    assert all(math.isfinite(row["loss"]) for row in steps_of(out))
    with pytest.raises(UserError, match=r"finetune\.options\.smoothing: step_dpo takes no such option"):
        shop.train(1, "finetune.options={smoothing: 0.2}")


def test_beta_moves_towards_the_factor_asked_for(shop):
    """At margin 0 the gradient factor is 1/2: ln beta moves by 0.1 (0.5 - target) after the first step."""
    up = steps_of(shop.train(1, "finetune.auto_beta=0.3"))
    assert up[0]["beta"] == BETA
    assert up[1]["beta"] == pytest.approx(BETA * math.exp(0.1 * (0.5 - 0.3)), rel=1e-4)
    assert {row["beta"] for row in steps_of(shop.train(1))} == {BETA}
    far = steps_of(shop.train(1, "finetune.auto_beta=0.49", "finetune.beta=20000", "finetune.learning_rate=0.05", "finetune.epochs=6"))
    assert far[-1]["beta"] < max(row["beta"] for row in far), "sharper than asked for, beta comes down again"


LONG = ("finetune.epochs=16", "finetune.learning_rate=0.005", "finetune.timesteps=3", "finetune.groups=2", "prompts.most_train=8",
        "sample.candidates=6")


@pytest.mark.parametrize(("budget", "beta"), [(2, 100), (8, 100), (20, 100), (8, 3000)])
def test_a_policy_ends_near_its_budget_of_divergence_whatever_beta_it_began_with(shop, budget, beta):
    """48 optimiser steps, free ones end at 37: 2.4, 7.6, 20.5 and 8.1 nats were measured. The tolerance is a third."""
    out = shop.train(1, *LONG, f"finetune.divergence={budget}", f"finetune.beta={beta}")
    assert numbers_of(out)["divergence"] == pytest.approx(budget, rel=1 / 3)
    assert steps_of(out)[0]["divergence"] == pytest.approx(0, abs=1e-6)  # but for rounding


def test_without_a_budget_it_ends_elsewhere_and_a_budget_changes_no_first_step(shop):
    free, held = (shop.train(1, *LONG, *more) for more in ((), ("finetune.divergence=8",)))
    assert numbers_of(free)["divergence"] > 30 and {row["beta"] for row in steps_of(free)} == {BETA}
    assert steps_of(free)[0]["grad_norm"] == steps_of(held)[0]["grad_norm"]


def test_errors_have_no_divergence(shop):
    out = shop.train(1, ERRORS)
    assert "divergence" not in numbers_of(out) and {row["divergence"] for row in steps_of(out)} == {None}


# -- what the diagnosis makes of it


def put(table: pa.Table, **curves) -> pa.Table:
    """A table with other numbers in some columns."""
    for name, curve in curves.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(np.broadcast_to(curve, len(table)), table.schema.field(name).type))
    return table


def read_by_diagnosis(shop: Workshop, curves: dict, by_column: dict, *sets: str) -> str:
    """What is said of a real training's tables in which some figures have been changed."""
    made, step = shop.until(1, *sets)
    out = shop.train(1, *sets)
    steps, columns = put(out.table("steps"), pairs=1000, **curves), put(out.table("columns"), pairs=1000, **by_column)
    noted = {name: numbers_of(out)[name] for name in ("signals", "heeds")}
    new, old = (diagnosis.of_training(steps, columns, knobs, made.config.sample.steps) for knobs in (step.config | noted, step.config))
    assert new == old, "a finetuning that did not note what it was made of is read by its objective's name"
    return "\n".join(found.sentence for found in new)


@pytest.mark.parametrize(("sets", "guard"), [((), False), ((ERRORS,), True)])
def test_a_real_trainings_winners_are_judged_by_what_it_was_made_of(shop, sets, guard):
    """Both kinds of training note errors and gains; only one of the two is the objective's."""
    steps = shop.train(1, *sets).table("steps")
    assert np.abs(steps["winner_error"].to_numpy()).max() > 0
    fallen = read_by_diagnosis(shop, {"winner": -0.5, "loser": 0.1, "winner_error": -1e-6, "loser_error": 1e-6}, {}, *sets)
    risen = read_by_diagnosis(shop, {"winner": 0.5, "loser": -0.1, "winner_error": 0.2, "loser_error": -0.1}, {}, *sets)
    assert ("winners themselves become less likely than under the reference, by 0.5" in fallen) == (not guard)
    assert ("the winner's own error rises by 0.2: turn the guard on" in risen) == guard
    assert guard or "guard" not in fallen + risen


def test_real_draws_of_fresh_noise_are_known_as_such_and_placed_in_the_window(shop):
    """Four draws over [0.1, 0.9] are strata of a fifth each; the silent two at the start, the noisiest, end at one half."""
    sets = (ERRORS, "finetune.noise=fresh", "finetune.draws=4", "finetune.timesteps=4", "finetune.window=[0.1, 0.9]")
    timesteps = shop.train(1, *sets).table("columns")["timestep"].to_pylist()
    assert timesteps == sorted(timesteps, reverse=True)
    told = read_by_diagnosis(shop, {"accuracy": 0.9}, {"accuracy": [0.5, 0.5, 0.9, 0.9]}, *sets)
    assert "2 of 4 draws show no more than chance" in told and "finetune.window: [0.5, 0.9] leaves them out" in told


# -- references


def second_round(shop: Workshop, kind: str, *sets: str):
    return shop.train(2, f"finetune.reference={kind}", "finetune.learning_rate=0.02", *sets)


@pytest.mark.parametrize("kind", ["base", "previous", "ema", "mix"])
def test_each_reference_starts_where_it_must_and_says_which_it_was(shop, kind):
    """In round 1 all are the base, so is the policy; in round 2 the policy is where the previous one ended."""
    first = shop.train(1, f"finetune.reference={kind}", "finetune.learning_rate=0.02")
    second = second_round(shop, kind)
    for out in (first, second):
        assert numbers_of(out)["reference"]["kind"] == kind
        assert len(numbers_of(out)["reference"]["hash"]) == 16
    assert steps_of(first)[0]["margin"] == pytest.approx(0, abs=1e-3)
    margin = steps_of(second)[0]["margin"]
    if kind in ("previous", "ema"):
        assert margin == pytest.approx(0, abs=1e-3)
    else:
        assert abs(margin) > 2e-3
    assert numbers_of(second)["reference_rows_in_training"] == (numbers_of(second)["policy_rows"] if kind == "ema" else 0)
    assert bool(numbers_of(second)["reference_rows_before"]) == (kind in ("base", "mix"))


def test_a_mix_goes_from_the_base_to_the_round_before(shop):
    """Share 0 answers as the base, share 1 as the model that drew."""
    numbers = {share: Opened(*shop.until(2, "finetune.reference=mix", f"finetune.reference_mix={share}", "finetune.learning_rate=0.02"))
               for share in (0.0, 1.0)}
    base = Opened(*shop.until(2, "finetune.reference=mix", "finetune.reference_mix=0.25", "finetune.learning_rate=0.02"))
    recorded = {share: opened.store.recorded()["log_prob"] for share, opened in numbers.items()}
    assert numbers[1.0].reference.numbers["log_prob"] == pytest.approx(recorded[1.0], abs=2e-3)
    with torch.no_grad(), adapters.disabled(base.generator.denoiser):
        rows, columns = np.arange(4), np.zeros(4, int)
        live = base.store.signals_of(rows, columns, base.store.spot(rows, columns), base.store.predict(rows, columns))
    # each share is a run of its own, whose round 1 is the same: there the reference is the policy
    assert numbers[0.0].reference.numbers["log_prob"][:4, 0] == pytest.approx(live["log_prob"].numpy(), abs=2e-3)


# -- broken off and gone on


def broken_off(shop: Workshop, out, after: int, number: int, *sets: str) -> tuple[Session, object]:
    """The same finetuning from nothing, interrupted after so many optimiser steps."""
    shutil.rmtree(out.folder)
    made, step = shop.until(number, *sets)
    count, real = [0], finetune.accumulate

    def stops(*arguments, **options):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune, "accumulate", stops)
        made.execute([step])
    assert (out.folder / "work/checkpoint.pt").is_file()
    return made, step


GOING_ON = {
    "step_dpo": (1,),
    "columns by accuracy": (1, "finetune.pick=accuracy", "finetune.timesteps=1"),
    "auto-beta": (1, "finetune.auto_beta=0.3"),
    "a budget of divergence": (1, "finetune.divergence=1", "finetune.learning_rate=0.02"),
    "moving reference": (2, "finetune.reference=ema", "finetune.learning_rate=0.02"),
    "replay": (2, "finetune.replay=0.5", "finetune.learning_rate=0.02"),
    "fresh, prompts dropped": (1, ERRORS, "finetune.noise=fresh", "finetune.draws=3", "finetune.condition_dropout=0.3"),
    "live predictions": (2, "finetune.objective=nft", "finetune.learning_rate=0.02"),
    "dora": (1, "finetune.adapter=dora"),
}


@pytest.mark.parametrize("sets", GOING_ON.values(), ids=GOING_ON)
def test_a_finetuning_that_was_broken_off_ends_with_the_same_bytes(shop, sets):
    number, *sets = sets
    sets = (*sets, "finetune.epochs=2", "finetune.checkpoint_every=3")
    out = shop.train(number, *sets)
    whole, rows = adapter_of(out), steps_of(out)
    assert len(rows) > 5
    made, step = broken_off(shop, out, 4, number, *sets)
    made = shop.session(*sets)
    made.execute([step])
    assert adapter_of(out) == whole
    assert steps_of(out) == rows


def test_replay_adds_groups_of_earlier_rounds_and_asks_the_reference_about_them(shop):
    """At a share of 1/2 as many earlier groups as own ones; their candidates were drawn by another model, so each is asked once."""
    sets = ("finetune.replay=0.5", "finetune.learning_rate=0.02")
    opened = Opened(*shop.until(2, *sets))
    own = [group for group in opened.groups if "@" not in group.name]
    earlier = [group for group in opened.groups if "@" in group.name]
    assert len(earlier) == len(own) == opened.candidates.replayed_groups
    assert {group.name.rpartition("@")[2] for group in earlier} == {"1"}
    rows = sum(len(group.rows) for group in earlier)
    assert opened.reference.rows_before == rows * opened.store.columns
    recorded, asked = opened.store.recorded()["log_prob"], opened.reference.numbers["log_prob"]
    mine = np.concatenate([group.rows for group in own])
    assert np.array_equal(asked[mine], recorded[mine])
    assert np.abs(asked[opened.candidates.replayed] - recorded[opened.candidates.replayed]).max() > 1e-3
    out = shop.train(2, *sets)
    assert steps_of(out)[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert numbers_of(out)["replayed_groups"] == len(own)


def test_going_on_against_another_reference_is_refused(shop):
    sets = ("finetune.checkpoint_every=2", "finetune.beta=77")
    out = shop.train(1, *sets)
    made, step = broken_off(shop, out, 3, 1, *sets)
    checkpoint = out.folder / "work/checkpoint.pt"
    state = torch.load(io.BytesIO(read_hashed(checkpoint, print)), weights_only=True)
    found = state["reference"]
    torch.save(state | {"reference": "0123456789abcdef"}, altered := io.BytesIO())
    write_hashed(checkpoint, altered.getvalue())
    with pytest.raises(UserError) as problem:
        shop.session(*sets).execute([step])
    assert str(problem.value) == (
        f"{checkpoint}: this finetuning began against another reference (0123456789abcdef, now {found}): what it reads was changed; delete the "
        "folder it lies in and run the same command again")
    assert made.run.output(step).folder == out.folder


# -- memory


def close(first: bytes, second: bytes, tmp_path: Path) -> bool:
    files = [tmp_path / name for name in ("one", "other")]
    for file, data in zip(files, (first, second), strict=True):
        file.write_bytes(data)
    ours, theirs = map(load_file, files)
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5) for name in ours)


def test_memory_that_runs_out_once_halves_the_micro_batch_says_so_and_changes_nothing(shop, monkeypatch, tmp_path):
    sets = ("finetune.groups=2", "finetune.timesteps=3", "finetune.micro_batch=64")
    out = shop.train(1, *sets)
    whole, rows = adapter_of(out), max(row["rows"] for row in steps_of(out))
    shutil.rmtree(out.folder)
    shop.said.clear()
    predict, failed = finetune.Candidates, []
    real = predict.scores_at

    def runs_out(self, batch):
        if len(batch.rows) > rows // 2 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(predict, "scores_at", runs_out)
    again = shop.train(1, *sets)
    assert failed
    told = [line for line in shop.said if "out of memory" in line]
    assert len(told) == 1 and told[0].startswith("round 1 finetune: out of memory with ") and "to the same result" in told[0]
    assert numbers_of(again)["micro_batch"] <= rows // 2
    assert close(adapter_of(again), whole, tmp_path)


def test_memory_for_not_even_one_row_is_one_sentence(shop, monkeypatch):
    def never(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetune, "accumulate", never)
    with pytest.raises(UserError, match=r"round 1 finetune: not even one row fits into memory \(CUDA out of memory\): set finetune\.checkpointing"):
        shop.train(1, "finetune.beta=55")


@pytest.mark.parametrize("knob", ["finetune.micro_batch=3", "finetune.micro_batch=1", "finetune.checkpointing=true"])
def test_how_memory_is_saved_changes_no_adapter(shop, tmp_path, knob):
    assert close(adapter_of(shop.train(1)), adapter_of(shop.train(1, knob)), tmp_path)


def test_checkpointing_computes_activations_a_second_time(shop, monkeypatch):
    """All layers but the few between the blocks; so much it costs, and a knob that did nothing would not be seen by its adapter."""
    calls, forward = [], ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *arguments: (calls.append(1), forward(self, *arguments))[1])
    counts = []
    for sets in ((), ("finetune.checkpointing=true",)):
        out = shop.train(1, *sets)
        calls.clear()
        shop.again(out, 1, *sets)
        counts.append(len(calls))
    assert 1.5 * counts[0] < counts[1] <= 2 * counts[0]


def test_a_half_precision_model_is_its_own_reference_only_when_asked_anew(shop):
    """Its kernels round by the shape of a batch, and beta makes that large."""
    out = shop.train(1, "generator.dtype=bfloat16")
    assert numbers_of(out)["reference_rows_before"] > 0 == numbers_of(shop.train(1))["reference_rows_before"]
    assert steps_of(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_memory_that_runs_out_while_drawing_is_one_sentence(shop, monkeypatch):
    def never(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "sample", never)
    with pytest.raises(UserError, match=r"round 1 sample: memory ran out \(CUDA out of memory\): sample\.tile is \d+: lower it"):
        shop.until(1, "sample.eta=0.77")
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "_decode", never)
    with pytest.raises(UserError, match=r"round 1 sample: memory ran out \(CUDA out of memory\): draw smaller pictures"):
        shop.until(1, "sample.eta=0.77")


@pytest.mark.parametrize("micro_batch", [2, 64])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_a_group_at_once_and_in_pieces(shop, precision, micro_batch):
    plain = steps_of(shop.train(1))
    mixed = steps_of(shop.train(1, f"finetune.precision={precision}", f"finetune.micro_batch={micro_batch}"))
    assert mixed[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert mixed[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.1)
    sound = sum(math.isfinite(step["grad_norm"]) for step in mixed)  # fp16's scaler skips a step that overflows, and lowers its scale
    assert len(mixed) == len(plain) and sound >= (len(plain) / 2 if precision == "fp16" else len(plain))


@pytest.mark.parametrize("normalise", ["zscore", "winrate", "minmax", "raw"])
def test_capo_is_given_logits_whatever_pairs_are_made_of(shop, normalise):
    """What is calibrated already must not be calibrated again."""
    opened = Opened(*shop.until(1, "finetune.objective=capo", f"pair.normalise={normalise}"))
    table = opened.made.output(opened.step.inputs["pair"].inputs["score-bright"]).table("scores", ["group", "candidate", "score"]).to_pylist()
    for group in opened.groups:
        scores = np.array([row["score"] for row in sorted((r for r in table if r["group"] == group.name), key=lambda r: r["candidate"])])
        logits = scores if normalise == "winrate" else (scores - scores.mean()) / scores.std()
        number_of = {row: key[1] for key, row in opened.store.place.items()}
        wanted = logits[[number_of[row] for row in group.rows]]
        assert opened.candidates._opinions[group.rows, 0] == pytest.approx(wanted, abs=1e-9)


# -- what is trained


@pytest.mark.parametrize("kind", ["rslora", "dora", "full"])
def test_every_kind_of_adapter_goes_through_two_rounds_and_is_evaluated(tmp_path, tiny_sd, tiny_clip, kind):
    with contextlib.chdir(prepare(tmp_path, tiny_sd, tiny_clip)):
        sets = (f"finetune.adapter={kind}", "prompts.most_train=3", "prompts.most_held_out=2", "sample.candidates=3", "sample.steps=3",
                "pair.margin=0", "finetune.epochs=1", "finetune.window=[0, 1]", "finetune.learning_rate=0.001")
        words = [word for knob in sets for word in ("--set", knob)]
        works("round", "--n", "1", *words)
        works("round", "--n", "2", *words)
        assert "nothing to do" in works("round", "--n", "2", *words).err
        made = Session(load(Path("pipeline.yaml"), list(sets)), say=lambda text: None)
        chain = made.chain(2)
        rounds = [made.output(r.finetune) for r in chain.rounds[1:]]
        for out in rounds:
            assert steps_of(out)[0]["margin"] == pytest.approx(0, abs=1e-3)
        assert 0 <= made.output(chain.rounds[2].evaluate).manifest["numbers"]["against_base"]["win_rate"] <= 1
        files = {path.name for path in (rounds[0].folder / "adapter").iterdir()}
        assert ("diffusion_pytorch_model.safetensors" in files) == (kind == "full")
        lora = numbers_of(rounds[0])["trainable"]
        assert lora > 50_000 if kind == "full" else lora < 50_000


def test_a_share_of_what_a_later_round_changes_is_kept(shop):
    """Between the adapter it began with and the one that training ends at; the first round keeps all."""
    def weights(number: int, share: float) -> dict[str, torch.Tensor]:
        return load_file(shop.train(number, f"finetune.kept_later={share}").folder / "adapter/pytorch_lora_weights.safetensors")

    begun, ended, kept = weights(1, 1.0), weights(2, 1.0), weights(2, 0.25)
    assert all(torch.equal(begun[name], other) for name, other in weights(1, 0.25).items())
    assert sum(not torch.equal(begun[name], ended[name]) for name in begun) > len(begun) / 2
    for name, value in kept.items():
        torch.testing.assert_close(value, torch.lerp(begun[name], ended[name], 0.25))


def test_negative_pairs_train_a_negative_adapter(shop):
    """Swapped, winner and loser change places: what the policy's gradient is at its start, the negative's is with the other sign."""
    made, step = shop.until(1, "finetune.negative=true")
    negative = made.chain(1).rounds[1].negative
    pair: Callable = partial(Opened, made)
    ours = pair(step).gradients()
    swapped = pair(negative).gradients()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, -swapped[name], rtol=1e-3, atol=1e-6 + 1e-4 * gradient.abs().max().item()), name
    made.execute([step, negative])
    out = made.output(negative)
    assert out.folder.name.startswith("negative-")
    pairs = made.output(made.chain(1).rounds[1].pair).table("pairs")
    assert pc.sum(pc.cast(pc.greater(pairs["margin"], 0), pa.int64())).as_py() == len(pairs)
