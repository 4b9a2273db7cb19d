"""Group batching with a cached reference gives the gradients of the plain pair loop with a live one, and evaluates nothing twice.

The plain loop is written out below: for every pair and column, winner and loser each go through the policy and, with the
adapter off, through the reference. In float64 nothing but a mistake can make the two differ.
"""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import adapters, diffusion
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.objectives import BUILTIN, DIFFUSION_DPO, STEP_DPO, Evidence
from fashiondpo_pipeline.sampling import Guidance
from fashiondpo_pipeline.training import (
    Batch,
    Group,
    Tally,
    Term,
    Unit,
    accumulate,
    clipped_pairs,
    holding,
    micro_batches,
    out_of_memory,
    repick,
    schedule_of,
    total_loss,
)

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

    def __init__(self, folder, guidance, dtype=torch.float64):
        self.generator = text2img(str(folder))
        self.generator.dtype, self.denoiser = dtype, self.generator.denoiser
        adapters.attach(self.denoiser, 2, 2.0, TARGETS, seed=0)
        self.denoiser.to(dtype)
        randomise(self.denoiser)
        random = torch.Generator().manual_seed(0)
        shape = (len(GROUPS) * K, COLUMNS, *self.generator.latent_shape)
        self.schedule = self.generator.schedule(COLUMNS)
        self.x_t, self.x_prev = torch.randn(2, *shape, generator=random, dtype=torch.float64).to(dtype)
        self.x_0 = torch.randn(shape[0], *shape[2:], generator=random, dtype=torch.float64).to(dtype)
        self.score = torch.randn(shape[0], generator=random, dtype=torch.float64)
        self.condition = self.generator.condition([{"prompt": f"picture {i // K}"} for i in range(shape[0])], Guidance(guidance))
        self.counts = Counter()
        self.kept = None

    def predict(self, rows, columns):
        """Guided and conditional prediction, written out."""
        t = self.schedule.timesteps[columns]
        branches = [self.generator.denoise(self.x_t[rows, columns], t, {"tokens": tokens[rows]}) for tokens in self.condition.parts["tokens"]]
        self.counts["calls"] += 1
        self.counts["rows"] += len(rows)
        guided = sum(weight * branch for weight, branch in zip(self.condition.weights.tolist(), branches, strict=True))
        return guided, branches[0]

    def wanted(self, rows, columns):
        t = self.schedule.timesteps[columns]
        eps = diffusion.noise_between(self.schedule, self.x_0[rows], self.x_t[rows, columns], t)
        return diffusion.target(self.schedule, self.x_0[rows], eps, t)

    def signal(self, name, rows, columns, predictions):
        """ln p of the step taken, a mean over dimensions, or the squared error."""
        t, x_t = self.schedule.timesteps[columns], self.x_t[rows, columns]
        if name == "error":
            return diffusion.squared_error(predictions[1], self.wanted(rows, columns))
        mean, sigma = self.schedule.mean(predictions[0], x_t, t, 1.0), self.schedule.std(t, 1.0)
        return diffusion.log_prob(mean, sigma, self.x_prev[rows, columns]) / x_t[0].numel()

    def evidence(self, name, reference):
        """What the library asks for: evidence of a batch, with everything that any objective reads."""
        def of(batch, predictions):
            rows, columns = batch.rows, batch.columns
            own = {kind: self.signal(kind, rows, columns, predictions) for kind in ("log_prob", "error")}
            ref = {kind: values[rows, columns] for kind, values in reference.items()}
            gain = own[name] - ref[name] if name == "log_prob" else (ref[name] - own[name]) / 2
            return {name: Evidence(
                gain, batch.winner, batch.loser, batch.unit, score=self.score[rows], opinions=self.score[rows, None], error=own["error"],
                ref_error=ref["error"], prediction=predictions[1], ref_prediction=ref["prediction"], wanted=self.wanted(rows, columns),
            )}

        return of

    def cached(self):
        """What the reference says at every place, gathered once with the adapter off."""
        if self.kept:
            return self.kept
        found = {"log_prob": [], "error": [], "prediction": []}
        with torch.no_grad(), adapters.disabled(self.denoiser):
            for column in range(COLUMNS):
                rows, columns = np.arange(len(self.x_0)), np.full(len(self.x_0), column)
                predictions = self.predict(rows, columns)
                found["prediction"].append(predictions[1])
                for name in ("log_prob", "error"):
                    found[name].append(self.signal(name, rows, columns, predictions))
        self.kept = {name: torch.stack(values, 1) for name, values in found.items()}
        return self.kept

    def gradients(self):
        return {name: weight.grad.clone() for name, weight in adapters.parameters(self.denoiser).items()}


@pytest.fixture(scope="module")
def plain(tiny_sd):
    return Tiny(tiny_sd, 1.0)


@pytest.fixture(scope="module", params=["epsilon", "v guided"])
def tiny(request, plain, tiny_sd_v):
    return plain if request.param == "epsilon" else Tiny(tiny_sd_v, 3.0)


@pytest.fixture(scope="module")
def single(tiny_sd):
    """The same in single precision."""
    return Tiny(tiny_sd, 3.0, torch.float32)


def grouped(tiny, *objectives, micro_batch=64):
    """Gradients as the library makes them: accumulate over groups with a cached reference."""
    terms = [Term(objective) for objective in objectives]
    name = objectives[0].signal if objectives[0].signal != "either" else "log_prob"
    reference = tiny.cached()
    tiny.denoiser.zero_grad()
    tiny.counts.clear()
    tally = accumulate(UNITS, micro_batch, tiny.predict, tiny.evidence(name, reference), terms, BETA, columns=COLUMNS)
    return tiny.gradients(), tally


def pair_by_pair(tiny, objective):
    """Gradients of the plain loop; the losses are written out again, from the papers."""
    def signal(row, at):
        return tiny.signal(objective.signal, row, at, tiny.predict(row, at))

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
        higher = objective.signal == "log_prob"
        loss = -F.logsigmoid(BETA * (change[0] - change[1]) if higher else -BETA / 2 * (change[0] - change[1])).sum()
        (loss / len(pairs)).backward()
        losses.append(loss.item())
    return tiny.gradients(), losses


both_objectives = pytest.mark.parametrize("objective", [STEP_DPO, DIFFUSION_DPO], ids=["step_dpo", "diffusion_dpo"])


def assert_equal_gradients(first, second, tolerance=1e-9):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, second[name], rtol=tolerance, atol=tolerance * gradient.abs().max().item()), name


@both_objectives
def test_grouped_gradients_with_a_cached_reference_are_those_of_the_pair_loop_with_a_live_one(tiny, objective):
    """Thirteen pairs are 52 evaluations in the pair loop; in groups they are the 4 + 4 + 2 + 3 candidates, once each."""
    ours, tally = grouped(tiny, objective)
    assert tiny.counts["rows"] == tally.sums["rows"] == 13
    tiny.counts.clear()
    theirs, losses = pair_by_pair(tiny, objective)
    assert tiny.counts["rows"] == 52
    assert_equal_gradients(ours, theirs)
    assert tally.sums["pairs"] == len(losses) == 13
    assert tally.means()["loss"] == pytest.approx(np.mean(losses), rel=1e-9)


@both_objectives
def test_the_size_of_a_micro_batch_changes_no_gradient(tiny, objective):
    whole, _ = grouped(tiny, objective)
    for micro_batch in (1, 3, 4):
        assert_equal_gradients(whole, grouped(tiny, objective, micro_batch=micro_batch)[0])


@pytest.mark.parametrize("name", BUILTIN)
def test_the_size_of_a_micro_batch_changes_no_objectives_gradient_and_no_figure(plain, name):
    """All but the last piece of a unit go through twice: with 3 rows at once one row of each unit of four, with 1 nine of thirteen rows."""
    whole, tally = grouped(plain, BUILTIN[name])
    for micro_batch, rows in ((1, 13 + 9), (3, 13 + 2)):
        pieces, same = grouped(plain, BUILTIN[name], micro_batch=micro_batch)
        assert plain.counts["rows"] == rows
        assert_equal_gradients(whole, pieces)
        assert same.means() == pytest.approx(tally.means(), rel=1e-9, nan_ok=True)
        assert torch.allclose(same.by_column, tally.by_column, rtol=1e-9)


@pytest.mark.parametrize("name", ["step_dpo", "diffusion_dpo", "dgpo", "nft"])
def test_the_size_of_a_micro_batch_changes_a_gradient_in_single_precision_by_rounding_alone(single, name):
    whole, _ = grouped(single, BUILTIN[name])
    for micro_batch in (1, 3):
        assert_equal_gradients(whole, grouped(single, BUILTIN[name], micro_batch=micro_batch)[0], 1e-2)


def test_a_mix_of_objectives_has_the_sum_of_their_gradients(plain):
    mixed, _ = grouped(plain, STEP_DPO, BUILTIN["sft"], BUILTIN["dgpo"], micro_batch=3)
    parts = [grouped(plain, STEP_DPO)[0]]
    for name in ("sft", "dgpo"):
        both, _ = grouped(plain, STEP_DPO, BUILTIN[name])
        parts.append({key: both[key] - parts[0][key] for key in both})
    assert_equal_gradients(mixed, {key: sum(part[key] for part in parts) for key in mixed})


@pytest.mark.parametrize("name", ["step_dpo", "kto", "dgpo"])
def test_shares_of_a_step_add_up_to_the_whole(plain, name):
    """As several processes do: each takes its units, and divides by what all of them count."""
    terms, reference = [Term(BUILTIN[name])], plain.cached()
    whole, tally = grouped(plain, BUILTIN[name])
    plain.denoiser.zero_grad()
    losses = [
        accumulate(mine, 64, plain.predict, plain.evidence("log_prob", reference), terms, BETA, columns=COLUMNS, counted=UNITS).sums["loss"]
        for mine in (UNITS[::2], UNITS[1::2])
    ]
    assert_equal_gradients(whole, plain.gradients())
    assert sum(losses) == pytest.approx(tally.sums["loss"], rel=1e-9)


def test_checkpointing_recomputes_activations_to_the_same_gradients(plain):
    """A layer behind the adapter runs once in a step without it, and once more in the backward pass with it."""
    calls = []
    hook = plain.denoiser.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    try:
        plain.cached()
        calls.clear()
        whole, _ = grouped(plain, STEP_DPO)
        assert len(calls) == 1
        plain.denoiser.enable_gradient_checkpointing()
        recomputed, _ = grouped(plain, STEP_DPO)
        assert len(calls) == 3
    finally:
        plain.denoiser.disable_gradient_checkpointing()
        hook.remove()
    assert_equal_gradients(whole, recomputed)


def test_a_loss_scale_takes_part_in_every_piece(plain):
    """What a gradient scaler multiplies a loss with must be in each gradient, whichever way the batch went."""
    reference = plain.cached()
    terms, evidence = [Term(STEP_DPO)], plain.evidence("log_prob", reference)
    whole, _ = grouped(plain, STEP_DPO)
    for micro_batch in (64, 3):
        plain.denoiser.zero_grad()
        accumulate(UNITS, micro_batch, plain.predict, evidence, terms, BETA, columns=COLUMNS, backward=lambda loss: (8 * loss).backward(), scale=8.0)
        assert_equal_gradients({name: 8 * gradient for name, gradient in whole.items()}, plain.gradients())


def test_a_whole_step_in_one_micro_batch_is_one_call(plain):
    grouped(plain, STEP_DPO, micro_batch=13)
    assert plain.counts["calls"] == 1


def told(policy, reference, *pairs, objective=STEP_DPO, ratio_clip=None):
    """The tally of one group whose network says these numbers."""
    units = [Unit(group("a", list(range(len(policy))), *pairs), 0)]
    policy = torch.tensor(policy, requires_grad=True)

    def evidence(batch, predictions):
        gain = predictions[0] - reference if objective.signal == "log_prob" else (reference - predictions[0]) / 2
        errors = {"error": predictions[0], "ref_error": reference} if objective.signal == "error" else {}
        return {objective.signal: Evidence(gain, batch.winner, batch.loser, batch.unit, **errors)}

    reference = torch.tensor(reference)
    terms = [Term(objective, options={} if ratio_clip is None else {"ratio_clip": ratio_clip})]
    return accumulate(units, 8, lambda rows, columns: (policy[rows],), evidence, terms, 1.0, columns=1)


def test_the_tally_is_what_it_is_by_hand():
    """One group, gains 2, 0 and 1 over the reference; pairs (0 beats 1), (1 beats 2), (2 beats 2's twin): margins 2, -1, 0."""
    tally = told([2.0, 0.0, 1.0, 1.0], [0.0] * 4, (0, 1), (1, 2), (2, 3), ratio_clip=1.5)
    means = tally.means()
    assert means["margin"] == pytest.approx(1 / 3)
    assert means["accuracy"] == pytest.approx(1.5 / 3)  # one right, one wrong, one tie that counts half
    assert means["winner"] == pytest.approx(1.0) and means["loser"] == pytest.approx(2 / 3)
    assert means["clipped"] == pytest.approx(1 / 3)  # the first winner alone is beyond 1.5
    assert means["factor"] == pytest.approx(sum(1 / (1 + math.exp(margin)) for margin in (2, -1, 0)) / 3)
    wanted = sum(math.log(1 + math.exp(-margin)) for margin in (1.5, -1, 0)) / 3  # the loss sees the first winner clipped
    assert means["loss"] == pytest.approx(wanted, rel=1e-6)
    assert tally.widest == 2.0
    assert tally.by_column.tolist() == [pytest.approx([1.5, 1.0, 3.0, 2.0, 3.0])]


@pytest.mark.parametrize("nats", [0.01, 0.5, 4.0])
def test_divergence_is_told_from_the_log_ratios_of_what_the_reference_drew(nats):
    """Two Gaussians of one spread, `nats` apart: x = mu_ref + sigma z has the log-ratio sqrt(2 nats) z - nats."""
    z = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tally, nobody = Tally(3), torch.empty(0, dtype=torch.int64)
    for part in (slice(0, 50_000), slice(50_000, None)):  # micro-batches add up
        ratio = math.sqrt(2 * nats) * z[part] - nats
        batch = Batch(np.zeros(len(ratio), int), np.zeros(len(ratio), int), torch.zeros(len(ratio), dtype=torch.int64), nobody, nobody)
        tally.add(torch.zeros(()), torch.zeros(0), Evidence(ratio, nobody, nobody, batch.unit, log_ratio=ratio), batch)
    assert tally.divergence == pytest.approx(3 * nats, rel=0.02)  # over three columns
    assert math.isnan(told([1.0, 2.0], [0.0, 0.0], (0, 1), objective=DIFFUSION_DPO).divergence)


def test_a_pair_is_clipped_by_the_signal_of_the_objective_that_clips():
    """Log-ratios 2 and 0 with a limit of 1: the one pair is beyond it, though the gain that the first objective is made of is not."""
    batch = Batch.of([Unit(group("a", [0, 1], (0, 1)), 0)])
    evidence = {name: Evidence(torch.tensor(gain), batch.winner, batch.loser, batch.unit)
                for name, gain in (("error", [0.1, 0.0]), ("log_prob", [2.0, 0.0]))}
    clips = Term(STEP_DPO, options={"ratio_clip": 1.0})
    assert clipped_pairs([Term(DIFFUSION_DPO), clips], evidence).tolist() == [True]
    assert clipped_pairs([Term(DIFFUSION_DPO), Term(STEP_DPO)], evidence) is None


def test_gains_are_half_the_error_that_went_and_rises_are_errors_that_came():
    means = told([1.0, 5.0], [2.0, 4.0], (0, 1), objective=DIFFUSION_DPO).means()
    assert (means["winner"], means["loser"]) == (0.5, -0.5)
    assert (means["winner_error"], means["loser_error"]) == (-1.0, 1.0)


# -- memory, and a reference kept beside the policy


@pytest.mark.parametrize(
    ("problem", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not this"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_mistakes(problem, is_it):
    assert out_of_memory(problem) == is_it


def test_held_weights_stand_in_for_a_while_and_come_back_even_after_an_error():
    weights = {"a": torch.nn.Parameter(torch.tensor([1.0]))}
    own = weights["a"].data
    with pytest.raises(KeyError), holding(weights, {"a": torch.tensor([5.0])}):
        assert weights["a"].item() == 5.0
        raise KeyError
    assert weights["a"].data_ptr() == own.data_ptr() and weights["a"].item() == 1.0
    with holding(weights, None):
        assert weights["a"].item() == 1.0


def test_columns_picked_by_weight_are_those_of_weight_without_repetition_and_keyed():
    units = [Unit(g, column) for g in GROUPS[:2] for column in (0, 1)]
    weights = np.array([0.05, 0.0, 0.5, 0.45])
    picked = [repick(units, weights, 7, "pick", 1, number) for number in range(200)]
    for found in picked:
        assert [u.group.name for u in found] == ["a", "a", "b", "b"]
        assert len({(u.group.name, u.column) for u in found}) == 4
        assert 1 not in {u.column for u in found}
    often = Counter(u.column for found in picked for u in found)
    assert often[2] > often[3] > 3 * often[0]
    assert picked[3] == repick(units, weights, 7, "pick", 1, 3)


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


def test_a_batch_keeps_the_pairs_of_each_unit_among_its_own_rows():
    batch = Batch.of(UNITS)
    found = {(batch.rows[won], batch.rows[lost], batch.columns[won]) for won, lost in zip(batch.winner, batch.loser, strict=True)}
    wanted = {(u.group.rows[won], u.group.rows[lost], u.column)
              for u in UNITS for won, lost in zip(u.group.winner, u.group.loser, strict=True)}
    assert found == wanted
    assert batch.columns.tolist() == [0] * 4 + [2] * 4 + [1] * 2 + [0] * 3


# -- shares of votes


PAIRED = sorted(name for name, objective in BUILTIN.items() if objective.per == "pair")


def shared_evidence(share, gain=None):
    """Four candidates of one prompt in three pairs, and what the people's shares are; with all that any objective of pairs reads."""
    random = torch.Generator().manual_seed(4)
    gain = torch.randn(4, generator=random, dtype=torch.float64).requires_grad_() if gain is None else gain
    pixels = torch.randn(3, 4, 1, 2, 2, generator=random, dtype=torch.float64)
    score = torch.randn(4, generator=random, dtype=torch.float64)
    return Evidence(gain, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.zeros(4, dtype=torch.int64), score=score, opinions=score[:, None],
                    error=-2 * gain, ref_error=torch.zeros(4, dtype=torch.float64), prediction=pixels[0] * gain.reshape(4, 1, 1, 1),
                    ref_prediction=pixels[1], wanted=pixels[2], share=None if share is None else torch.tensor(share, dtype=torch.float64))


@pytest.mark.parametrize("name", PAIRED)
def test_a_share_loses_what_so_many_people_with_labels_of_their_own_lose_in_the_mean(name):
    people = 8  # a pair that 6 of 8 chose is eight pairs, six of them one way round
    gain = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    shares = [6 / people, 5 / people, 1.0]
    one = shared_evidence(shares, gain)
    each = [(w, loser) if n < share * people else (loser, w)
            for share, w, loser in zip(shares, one.winner.tolist(), one.loser.tolist(), strict=True) for n in range(people)]
    winner, loser = (torch.tensor(side) for side in zip(*each, strict=True))
    many = Evidence(**{**vars(one), "winner": winner, "loser": loser, "share": None})
    losses = [total_loss([Term(BUILTIN[name])], {"log_prob": found, "error": found}, 1.5, {"pair": count})[0] for found, count in
              ((one, 3), (many, 3 * people))]
    slopes = [torch.autograd.grad(loss, gain, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_that_all_won_outright_lose_what_they_lose_without_shares(name):
    outright, plain = (total_loss([Term(BUILTIN[name])], {"log_prob": found, "error": found}, 1.5, {"pair": 3})
                       for found in (shared_evidence([1.0] * 3), shared_evidence(None)))
    torch.testing.assert_close(outright, plain)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.9])
def test_a_share_asks_for_the_margin_that_says_so_and_no_wider(share):
    margin = torch.tensor(math.log(share / (1 - share)) if share < 1 else 0.0, dtype=torch.float64)
    gain = torch.stack([margin, torch.zeros((), dtype=torch.float64)]).requires_grad_()
    pair = torch.tensor([0]), torch.tensor([1])
    found = Evidence(gain, *pair, torch.zeros(2, dtype=torch.int64), share=torch.tensor([share], dtype=torch.float64))
    loss, _ = total_loss([Term(DIFFUSION_DPO)], {"error": found}, 1.0, {"pair": 1})
    assert torch.autograd.grad(loss, gain)[0].abs().max() < 1e-12


def test_shares_go_with_their_pairs_into_a_batch_and_a_group_without_any_won_outright():
    soft = Group("s", np.array([0, 1, 2]), np.array([0, 1]), np.array([1, 2]), np.array([0.7, 0.9]))
    assert Batch.of([Unit(soft, 0), Unit(GROUPS[1], 0)]).share.tolist() == [0.7, 0.9, 1.0]
    assert Batch.of([Unit(GROUPS[1], 0)]).share is None


def test_a_pair_turned_round_is_eased_as_such_and_turned_twice_is_itself():
    found = Evidence(torch.zeros(2), torch.tensor([0]), torch.tensor([1]), torch.zeros(2, dtype=torch.int64), slack=torch.tensor([0.2]),
                     turned_slack=torch.tensor([0.6]), share=torch.tensor([0.75]))
    assert (found.turned().slack, found.turned().turned_slack, found.turned().share) == (0.6, found.slack, 0.25)
    twice = found.turned().turned()
    assert all(torch.equal(getattr(twice, name), getattr(found, name)) for name in ("winner", "loser", "slack", "turned_slack", "share"))
