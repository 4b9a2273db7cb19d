"""Group batching with a cached reference gives the gradients of the plain pair loop with a live one, and evaluates nothing twice.

The plain loop is written out below: for every pair and column, winner and loser each go through the policy and, with the
adapter off, through the reference. In float64 nothing but a mistake can make the two differ.
"""

import math
from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import adapters, config, diffusion, seeds
from fashiondpo_pipeline.generators.text2img import Text2Image
from fashiondpo_pipeline.objectives import diffusion_dpo, step_dpo
from fashiondpo_pipeline.training import Batch, Group, Unit, accumulate, groups_of, micro_batches, schedule_of
from stages import Session
from stages.finetune import Store

BETA = 300.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
K, COLUMNS = 4, 3


def group(name, rows, *pairs):
    winner, loser = zip(*pairs, strict=True)
    return Group(name, np.array(rows), np.array(winner), np.array(loser))


GROUPS = [
    group("a", [0, 1, 2, 3], (0, 1), (0, 2), (0, 3), (1, 2), (3, 2)),
    group("b", [4, 6], (1, 0)),
    group("c", [8, 9, 11], (0, 2), (1, 2)),
]
UNITS = [Unit(GROUPS[0], 0), Unit(GROUPS[0], 2), Unit(GROUPS[1], 1), Unit(GROUPS[2], 0)]


def randomise(denoiser, seed=1):
    """An adapter that says something, so that policy and reference differ."""
    random = torch.Generator().manual_seed(seed)
    for weight in adapters.parameters(denoiser).values():
        weight.data = 0.1 * torch.randn(weight.shape, generator=random, dtype=torch.float64).to(weight.dtype)


class Tiny:
    """Twelve candidates with paths of their own on the tiny UNet in float64; counts what goes through the UNet."""

    def __init__(self, folder, guidance):
        self.generator = Text2Image(str(folder))
        self.denoiser = self.generator.denoiser
        adapters.attach(self.denoiser, 2, 2.0, TARGETS, seed=0)
        self.denoiser.double()
        randomise(self.denoiser)
        random = torch.Generator().manual_seed(0)
        shape = (len(GROUPS) * K, COLUMNS, *self.generator.latent_shape)
        self.schedule = self.generator.schedule(COLUMNS)
        self.x_t, self.x_prev = torch.randn(2, *shape, generator=random, dtype=torch.float64)
        self.x_0 = torch.randn(shape[0], *shape[2:], generator=random, dtype=torch.float64)
        self.condition = self.generator.condition([{"prompt": f"picture {i // K}"} for i in range(shape[0])], guidance)
        self.counts = Counter()

    def predict(self, rows, columns):
        """Guided and conditional prediction, written out."""
        t = self.schedule.timesteps[columns]
        x_t = self.x_t[rows, columns]
        branches = [self.generator.denoise(x_t, t, tokens[rows]) for tokens in self.condition.tokens.double()]
        self.counts["calls"] += 1
        self.counts["rows"] += len(rows)
        guided = sum(weight * branch for weight, branch in zip(self.condition.weights.double(), branches, strict=True))
        return guided, branches[0], x_t, t

    def log_prob(self, rows, columns):
        guided, _, x_t, t = self.predict(rows, columns)
        mean, sigma = diffusion.ddim_mean(self.schedule, guided, x_t, t, 1.0), diffusion.ddim_sigma(self.schedule, t, 1.0)
        return diffusion.log_prob(mean, sigma, self.x_prev[rows, columns]) / x_t[0].numel()

    def error(self, rows, columns):
        _, conditional, x_t, t = self.predict(rows, columns)
        eps = diffusion.noise_between(self.schedule, self.x_0[rows], x_t, t)
        return diffusion.squared_error(conditional, diffusion.target(self.schedule, self.x_0[rows], eps, t))

    def cached(self, signal):
        """The reference's signal at every place, gathered once with the adapter off."""
        with torch.no_grad(), adapters.disabled(self.denoiser):
            return torch.stack([signal(np.arange(len(self.x_0)), np.full(len(self.x_0), c)) for c in range(COLUMNS)], 1)

    def gradients(self):
        return {name: weight.grad.clone() for name, weight in adapters.parameters(self.denoiser).items()}


@pytest.fixture(scope="module", params=[("epsilon", 1.0), ("v_prediction", 3.0)], ids=["epsilon", "v guided"])
def tiny(request, tiny_sd, tiny_sd_v):
    prediction, guidance = request.param
    return Tiny(tiny_sd if prediction == "epsilon" else tiny_sd_v, guidance)


def grouped(tiny, objective, micro_batch=64):
    """Gradients as the library makes them: accumulate over groups with a cached reference."""
    name, loss, higher = objective
    signal = getattr(tiny, name)
    reference = tiny.cached(signal)
    tiny.denoiser.zero_grad()
    tiny.counts.clear()
    tally = accumulate(
        UNITS, micro_batch, lambda batch: (signal(batch.rows, batch.columns), reference[batch.rows, batch.columns]),
        partial(loss, beta=BETA), higher,
    )
    return tiny.gradients(), tally


def pair_by_pair(tiny, objective):
    """Gradients of the plain loop; the losses are written out again, from the papers."""
    name, _, higher = objective
    signal = getattr(tiny, name)
    tiny.denoiser.zero_grad()
    pairs = [(unit.group.rows[won], unit.group.rows[lost], unit.column)
             for unit in UNITS for won, lost in zip(unit.group.winner, unit.group.loser, strict=True)]
    losses = []
    for winner, loser, column in pairs:
        at = np.array([column])
        policy = [signal(np.array([row]), at) for row in (winner, loser)]
        with torch.no_grad(), adapters.disabled(tiny.denoiser):
            reference = [signal(np.array([row]), at) for row in (winner, loser)]
        change = [p - r for p, r in zip(policy, reference, strict=True)]
        loss = -F.logsigmoid(BETA * (change[0] - change[1]) if higher else -BETA / 2 * (change[0] - change[1])).sum()
        (loss / len(pairs)).backward()
        losses.append(loss.item())
    return tiny.gradients(), losses


STEP, ERROR = ("log_prob", step_dpo, True), ("error", diffusion_dpo, False)
both_objectives = pytest.mark.parametrize("objective", [STEP, ERROR], ids=["step_dpo", "diffusion_dpo"])


def assert_equal_gradients(first, second, tolerance=1e-9):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, second[name], rtol=tolerance, atol=tolerance * gradient.abs().max().item()), name


@both_objectives
def test_grouped_gradients_with_a_cached_reference_are_those_of_the_pair_loop_with_a_live_one(tiny, objective):
    """Thirteen pairs are 52 evaluations in the pair loop; in groups they are the 4 + 4 + 2 + 3 candidates, once each."""
    ours, tally = grouped(tiny, objective)
    assert tiny.counts["rows"] == tally.rows == 13
    tiny.counts.clear()
    theirs, losses = pair_by_pair(tiny, objective)
    assert tiny.counts["rows"] == 52
    assert_equal_gradients(ours, theirs)
    assert tally.pairs == len(losses) == 13
    assert tally.means()["loss"] == pytest.approx(np.mean(losses), rel=1e-9)


@both_objectives
def test_the_size_of_a_micro_batch_changes_no_gradient(tiny, objective):
    whole, tally = grouped(tiny, objective)
    for micro_batch in (1, 4, 6):
        pieces, same = grouped(tiny, objective, micro_batch)
        assert_equal_gradients(whole, pieces)
        assert same.means() == pytest.approx(tally.means(), rel=1e-9)


def test_a_whole_step_in_one_micro_batch_is_one_call(tiny):
    grouped(tiny, STEP, micro_batch=13)
    assert tiny.counts["calls"] == 1


def test_the_tally_is_what_it_is_by_hand():
    """One group, gains 2, 0 and 1 over the reference; pairs (0 beats 1), (1 beats 2), (2 beats 2's twin): margins 2, -1, 0."""
    units = [Unit(group("a", [0, 1, 2, 3], (0, 1), (1, 2), (2, 3)), 0)]
    policy = torch.tensor([2.0, 0.0, 1.0, 1.0], requires_grad=True)
    tally = accumulate(units, 8, lambda batch: (policy, torch.zeros(4)), partial(step_dpo, beta=1.0), True)
    means = tally.means()
    assert means["margin"] == pytest.approx(1 / 3)
    assert means["accuracy"] == pytest.approx(1.5 / 3)  # one right, one wrong, one tie that counts half
    assert means["winner"] == pytest.approx(1.0) and means["loser"] == pytest.approx(2 / 3)
    wanted = sum(math.log(1 + math.exp(-margin)) for margin in (2, -1, 0)) / 3
    assert means["loss"] == pytest.approx(wanted, rel=1e-6)
    assert tally.widest == 2.0


def test_gains_are_less_error_where_less_is_better():
    units = [Unit(group("a", [0, 1], (0, 1)), 0)]
    policy = torch.tensor([1.0, 5.0], requires_grad=True)
    tally = accumulate(units, 8, lambda batch: (policy, torch.tensor([2.0, 4.0])), partial(diffusion_dpo, beta=1.0), False)
    assert (tally.means()["winner"], tally.means()["loser"]) == (1.0, -1.0)


# -- the stage's own store: what it reads from disk is what the pair loop computes live


CONFIG = """
name: t
generator: {{model: {sd}}}
prompts: {{file: {folder}/prompts.txt, held_out: 0.3}}
sample: {{candidates: 4, steps: 4, tile: 8, guidance: {guidance}}}
experts: {{bright: {{use: "fashiondpo_pipeline.testing:Brightness"}}}}
pair: {{weights: {{bright: 1.0}}}}
finetune: {{epochs: 1, groups: 2, timesteps: 2, beta: {beta}, rank: 2, learning_rate: 0.05, {knobs}}}
evaluate: {{judge: bright, pictures: 2}}
machine: {{device: cpu}}
"""


class Silent:
    """A run on tiny models whose denoiser computes in float64, so that nothing but the rounding of x_t to fp16 is left."""

    def __init__(self, folder, sd, guidance, knobs, rounds):
        (folder / "prompts.txt").write_text("\n".join(f"a {c} {k}" for c in ("red", "blue") for k in ("dress", "boot", "bag")))
        text = CONFIG.format(sd=sd, folder=folder, guidance=guidance, knobs=knobs, beta=BETA)
        self.session = Session(config.load(None, text=text), folder / "run", say=lambda text: None)
        self.session.generator().denoiser.double()
        self.chain = self.session.chain(rounds)
        self.step = self.chain.rounds[rounds].finetune
        done = {step.fingerprint for step in self.chain.of(rounds)}
        steps = [step for step in self.chain.steps if step.fingerprint not in done]
        self.session.execute([*steps, *self.chain.of(rounds)[: self.chain.of(rounds).index(self.step)]])

    def store(self, base):
        generator = self.session.generator(self.step.inputs.get("adapter"))
        out = self.session.run.output(self.step)
        out.open()
        knobs = self.session.config.finetune
        from fashiondpo_pipeline.registry import OBJECTIVES

        store = Store(out, self.step, knobs, OBJECTIVES.find(knobs.objective), generator, self.session)
        return generator, store, store.reference(generator, base=base)


def pair_loop(generator, store, objective, off):
    """As above, with the store's own signal for one row at a time; the reference is live: `off` turns the policy into it."""
    losses = []
    for unit in units_of(store):
        for won, lost in zip(unit.group.winner, unit.group.loser, strict=True):
            at = np.array([unit.column])
            rows = [np.array([row]) for row in (unit.group.rows[won], unit.group.rows[lost])]
            policy = [store.signal(generator, row, at) for row in rows]
            with torch.no_grad(), off():
                reference = [store.signal(generator, row, at) for row in rows]
            gap = (policy[0] - reference[0]) - (policy[1] - reference[1])
            losses.append(-F.logsigmoid(BETA * gap if objective == "step_dpo" else -BETA / 2 * gap).sum())
    torch.stack(losses).mean().backward()
    return {name: weight.grad.clone() for name, weight in adapters.parameters(generator.denoiser).items()}


def units_of(store):
    return [Unit(found, column) for found in store.groups[:2] for column in range(min(store.columns, 2))]


@pytest.mark.parametrize(
    ("objective", "guidance", "knobs"),
    [
        ("step_dpo", 1.0, ""),
        ("step_dpo", 3.0, ""),
        ("step_dpo", 1.0, "step_weight: density"),
        ("diffusion_dpo", 3.0, ""),
        ("diffusion_dpo", 1.0, "min_snr: 5.0"),
        ("diffusion_dpo", 1.0, "noise: fresh, draws: 3, min_snr: 5.0"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_store_caches_the_reference_that_a_live_forward_gives(
    tmp_path, tiny_sd, tiny_sd_v, objective, guidance, knobs, prediction
):
    """Round 1: the candidates' own sampler is the base, so its record is what a forward with the adapter off says."""
    sd = tiny_sd if prediction == "epsilon" else tiny_sd_v
    run = Silent(tmp_path, sd, guidance, f"objective: {objective}, {knobs}", rounds=1)
    generator, store, reference = run.store(base=False)
    assert store.reference_rows == (reference.size if "fresh" in knobs else 0)
    adapters.attach(generator.denoiser, 2, 2.0, TARGETS, seed=0)
    generator.denoiser.double()
    randomise(generator.denoiser)

    def signal(batch):
        return store.signal(generator, batch.rows, batch.columns), torch.from_numpy(reference[batch.rows, batch.columns])

    loss = partial(store.objective.loss, beta=BETA)
    accumulate(units_of(store), 64, signal, loss, objective == "step_dpo")
    ours = {name: weight.grad.clone() for name, weight in adapters.parameters(generator.denoiser).items()}
    generator.denoiser.zero_grad()
    # latents are float32 on their way in and out of the denoiser, hence no more than single precision here
    assert_equal_gradients(ours, pair_loop(generator, store, objective, partial(adapters.disabled, generator.denoiser)), 1e-4)


@pytest.mark.parametrize("base", [True, False])
def test_in_round_two_the_reference_is_the_round_before_or_the_base(tmp_path, tiny_sd, base):
    """`previous` is the sampler's record; `base` costs one pass, and is what the denoiser says with its adapter off."""
    run = Silent(tmp_path, tiny_sd, 1.0, f"reference: {'base' if base else 'previous'}", rounds=2)
    generator, store, reference = run.store(base=base)
    rows = np.concatenate([g.rows for g in store.groups])
    with torch.no_grad():
        policy = torch.stack([store.signal(generator, rows, np.full(len(rows), c)) for c in range(store.columns)], 1)
        with adapters.disabled(generator.denoiser):
            off = torch.stack([store.signal(generator, rows, np.full(len(rows), c)) for c in range(store.columns)], 1)
    assert (policy - off).abs().max() > 1e-3
    assert np.allclose(reference[rows], off if base else policy, rtol=0, atol=1e-6)
    assert store.reference_rows == (len(rows) * store.columns if base else 0)


@pytest.mark.parametrize("weight", ["equal", "density"])
def test_every_step_weighs_alike_unless_the_bare_density_is_asked_for(tmp_path, tiny_sd, weight):
    run = Silent(tmp_path, tiny_sd, 1.0, f"step_weight: {weight}", rounds=1)
    _, store, _ = run.store(base=False)
    sensitivity = diffusion.ddim_sensitivity(store.schedule, torch.from_numpy(store._timesteps), 1.0).numpy()
    size = math.prod(store.generator.latent_shape)
    wanted = np.full(store.columns, np.median(sensitivity)) if weight == "equal" else sensitivity
    assert store._scale * sensitivity * size == pytest.approx(wanted)
    assert sensitivity.max() / sensitivity.min() > 5


# -- the order of things


def many(count):
    return [group(f"g{i}", [2 * i, 2 * i + 1], (0, 1)) for i in range(count)]


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.integers(1, 6))
def test_every_epoch_sees_every_group_once_with_columns_of_its_own(count, columns, epochs, groups_a_step, columns_a_step):
    plan = list(schedule_of(many(count), columns, epochs, groups_a_step, columns_a_step, 7, "finetune", 1))
    assert len(plan) == epochs * math.ceil(count / groups_a_step)
    for epoch in range(epochs):
        seen = [unit for number, units in plan if number == epoch for unit in units]
        assert Counter(unit.group.name for unit in seen) == {f"g{i}": min(columns_a_step, columns) for i in range(count)}
        assert len({(unit.group.name, unit.column) for unit in seen}) == len(seen)
        assert all(0 <= unit.column < columns for unit in seen)


def names(plan):
    return [(epoch, [(unit.group.name, unit.column) for unit in units]) for epoch, units in plan]


def test_the_order_is_its_keys_alone_so_that_a_resumed_training_sees_what_an_uninterrupted_one_saw():
    def plan(*key):
        return schedule_of(many(9), 5, 3, 2, 2, *key)

    straight = names(plan(7, "finetune", 1))
    assert names(plan(7, "finetune", 1)) == straight
    assert names(islice(plan(7, "finetune", 1), 6, None)) == straight[6:]
    assert names(plan(8, "finetune", 1)) != straight
    assert names(plan(7, "finetune", 2)) != straight
    assert straight[0][1] != straight[5][1]  # another order in the second epoch


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_micro_batches_are_whole_units_in_order_and_within_their_limit(sizes, most):
    units = [Unit(group(str(i), list(range(size)), (0, 0)), i) for i, size in enumerate(sizes)]
    parts = list(micro_batches(units, most))
    assert [unit for part in parts for unit in part] == units
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        rows = sum(len(unit.group.rows) for unit in part)
        assert rows <= most or len(part) == 1
        assert after is None or rows + len(after[0].group.rows) > most  # full: the next unit would not have fitted


@st.composite
def pair_tables(draw):
    pairs = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
    return [pair for pair in pairs if pair[1] != pair[2]] or [("a", 0, 1)]


@given(pair_tables())
def test_groups_hold_every_pair_and_each_candidate_once(pairs):
    place = {(name, candidate): 100 * number + candidate for number, name in enumerate("abc") for candidate in range(5)}
    found = groups_of(np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]), np.array([p[2] for p in pairs]), place)
    assert [g.name for g in found] == sorted({p[0] for p in pairs})
    for g in found:
        wanted = sorted((place[n, won], place[n, lost]) for n, won, lost in pairs if n == g.name)
        assert sorted(zip(g.rows[g.winner], g.rows[g.loser], strict=True)) == wanted
        assert len(set(g.rows)) == len(g.rows) and set(g.rows) == {row for pair in wanted for row in pair}


def test_a_batch_keeps_the_pairs_of_each_unit_among_its_own_rows():
    batch = Batch.of(UNITS)
    found = {(batch.rows[won], batch.rows[lost], batch.columns[won]) for won, lost in zip(batch.winner, batch.loser, strict=True)}
    wanted = {(u.group.rows[won], u.group.rows[lost], u.column)
              for u in UNITS for won, lost in zip(u.group.winner, u.group.loser, strict=True)}
    assert found == wanted
    assert batch.columns.tolist() == [0] * 4 + [2] * 4 + [1] * 2 + [0] * 3


def test_fresh_noise_is_shared_within_a_group_and_spread_over_the_timesteps(tmp_path, tiny_sd):
    run = Silent(tmp_path, tiny_sd, 1.0, "objective: diffusion_dpo, noise: fresh, draws: 8", rounds=1)
    _, store, _ = run.store(base=False)
    name, shape = store.groups[0].name, store.generator.latent_shape
    drawn = [store._draw((name, draw), shape) for draw in range(8)]
    edges = [100 + 75 * i for i in range(9)]  # the window leaves out the first 0.3 of the walk and its last 0.1
    assert all(low <= t < high for (_, t), low, high in zip(drawn, edges[:-1], edges[1:], strict=True))
    again = store._draw((name, 3), shape)
    assert torch.equal(drawn[3][0], again[0]) and drawn[3][1] == again[1]
    assert not torch.equal(drawn[3][0], store._draw((store.groups[1].name, 3), shape)[0])
    assert torch.equal(drawn[0][0], torch.randn(shape, generator=seeds.generator(7, "fresh", name, 0)))
