"""What the policy is held to stays what it is while the policy moves: every objective, reference and round."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from test_store import Opened, Workshop, randomise
from whole_runs import prepare

from fashiondpo_pipeline import adapters, diffusion
from fashiondpo_pipeline.generators.text2img import text2img
from fashiondpo_pipeline.objectives import BUILTIN
from fashiondpo_pipeline.reference import Reference
from fashiondpo_pipeline.sampling import predict
from fashiondpo_pipeline.terms import terms_of
from fashiondpo_pipeline.training import Batch, signal_of
from stages import COMPARING, VERSIONS
from stages.trained_on import Candidates

SHARE, DECAY = 0.25, 0.8
KINDS = ["previous", "base", "ema", "mix"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_sd, tiny_clip):
    return Workshop(prepare(tmp_path_factory.mktemp("references"), tiny_sd, tiny_clip))


@pytest.fixture(scope="module")
def rounds(shop):
    """Finetunings before their first step: of round 1, and of round 2, which begins with a trained adapter."""
    return {number: shop.until(number, "finetune.learning_rate=0.02") for number in (1, 2)}


class Started(Opened):
    """The same candidates under another objective and reference; the policy has then moved three times."""

    def __init__(self, made, step, **changes):
        self.made, self.step, self.generator = made, step, made.generator(step.inputs.get("adapter"))
        made.forget_adapter()
        out = made.run.output(step)
        out.open()
        for kept in out.work.glob("*.npz"):
            kept.unlink()  # what another reference said
        knobs = made.config.finetune.model_copy(update=changes)
        self.terms = terms_of(knobs)
        self.candidates = Candidates(made, step, out, knobs, self.terms, self.generator)
        self.store, self.groups = self.candidates.store, self.candidates.groups
        first = "adapter" not in step.inputs
        if first:
            adapters.attach(self.generator.denoiser, 2, 2.0, knobs.targets, 0)
        self.weights = adapters.parameters(self.generator.denoiser)
        self.began = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.reference = Reference(
            knobs,
            self.terms,
            self.store,
            self.candidates.replayed,
            self.weights,
            first,
            made.processes,
            self.generator,
        )

    def moved(self):
        """The policy's weights after each of three optimiser steps; the reference is told of each."""
        random, found = torch.Generator().manual_seed(3), []
        for _ in range(3):
            for weight in self.weights.values():
                weight.data = weight.data + 0.05 * torch.randn(weight.shape, generator=random)
            self.reference.follow(self.weights)
            found.append({name: weight.detach().clone() for name, weight in self.weights.items()})
        return found

    def batch(self):
        return Batch.of(self.units())

    def loss(self, batch, reference):
        """The objective's values where the policy is now, against what a reference says."""
        with torch.no_grad():
            found = self.store.evidence(
                batch,
                self.store.predict(batch.rows, batch.columns),
                reference,
                self.candidates.scores_at(batch),
            )
            (term,) = self.terms
            return term.objective.loss(found[signal_of(term.objective, found)], beta=1.0, **term.options)[0]


def should_be(kind, first, began, moved):
    """A reference's weights by hand: the policy's from before, no adapter, a share of it, or a slow average."""
    weights = dict(began)
    if kind == "ema":
        for policy in moved:
            weights = {name: DECAY * weight + (1 - DECAY) * policy[name] for name, weight in weights.items()}
    shares = {"base": 0.0, "mix": SHARE}
    share = 1.0 if first else shares.get(kind, 1.0)
    return {name: weight * share if "lora_B" in name else weight for name, weight in weights.items()}


@lru_cache
def copy_of(folder, *targets):
    """Another copy of a model, adapted."""
    other = text2img(folder)
    adapters.attach(other.denoiser, 2, 2.0, list(targets), 0)
    return other


def plainly(opened, weights, batch):
    """What another copy of the model says with these weights: no cache, nothing shared with the policy."""
    targets = adapters.resolve_targets(opened.generator.denoiser, opened.made.config.finetune.targets)
    other = copy_of(str(opened.generator.source.where), *targets)
    for name, weight in adapters.parameters(other.denoiser).items():
        weight.data = weights[name].clone()
    store = opened.store
    spot = store.spot(batch.rows, batch.columns)
    with torch.no_grad():
        guided, conditional = predict(other.denoise, spot.x_t, spot.t, spot.condition)
    mean, sigma = store.schedule.mean(guided, spot.x_t, spot.t, 1.0), store.schedule.std(spot.t, 1.0)
    found = {
        "error": (conditional - spot.wanted).square().flatten(1).mean(1).double(),
        "prediction": conditional,
    }
    if "log_prob" in store.signals:
        found["log_prob"] = diffusion.log_prob(
            mean, sigma, store._tensor("x_prev", batch.rows, batch.columns)
        )
    return found


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILTIN)
def test_every_reference_says_what_a_plain_live_one_says_after_the_policy_has_moved(
    rounds, name, kind, number
):
    opened = Started(
        *rounds[number], objective=name, reference=kind, reference_mix=SHARE, reference_decay=DECAY
    )
    began, batch = opened.began, opened.batch()
    moved = opened.moved()
    wanted = plainly(opened, should_be(kind, number == 1, began, moved), batch)
    said = opened.reference.at(batch)
    for signal in opened.store.signals:
        assert torch.allclose(
            said[signal], wanted[signal], rtol=1e-5, atol=5e-3 if signal == "log_prob" else 1e-5
        ), signal
    compares = "ref_prediction" in BUILTIN[name].needs
    assert ("prediction" in said) == (compares or kind == "ema")
    if "prediction" in said:
        assert torch.allclose(said["prediction"], wanted["prediction"], atol=1e-4)
    assert torch.allclose(opened.loss(batch, said), opened.loss(batch, wanted), rtol=1e-3, atol=1e-4)
    policy = plainly(opened, moved[-1], batch)
    assert (wanted["prediction"] - policy["prediction"]).abs().max() > 0.01, (
        "the policy has moved, so a reference that follows it is seen"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dspo", "anchor", "nft"])
def test_a_reference_is_told_no_prompt_where_the_policy_is_told_none(shop, name, kind):
    """The sampler's kept predictions are of the prompt: they stand for no candidate whose prompt is dropped."""
    made, step = shop.until(1, "sample.predictions=true", "finetune.objective=dspo")
    opened = Started(
        made,
        step,
        objective=name,
        signal="error",
        reference=kind,
        reference_decay=DECAY,
        condition_dropout=0.5,
    )
    began, batch = opened.began, opened.batch()
    wanted = plainly(opened, should_be(kind, True, began, opened.moved()), batch)
    dropped = [
        opened.store._dropped(opened.store.names[row], int(column))
        for row, column in zip(batch.rows, batch.columns, strict=True)
    ]
    assert 0 < np.mean(dropped) < 1
    assert torch.allclose(opened.reference.at(batch)["prediction"], wanted["prediction"], atol=1e-4)


def test_predictions_that_were_kept_are_used_where_they_are_the_references(shop):
    """Without dropout nothing is asked anew; what was kept is half precision."""
    made, step = shop.until(1, "sample.predictions=true", "finetune.objective=dspo")
    opened = Started(made, step, objective="dspo", reference="previous")
    batch, began = opened.batch(), opened.began
    opened.moved()
    assert torch.allclose(
        opened.reference.at(batch)["prediction"], plainly(opened, began, batch)["prediction"], atol=2e-3
    )
    assert opened.reference.rows_in_training == opened.reference.rows_before == 0


def test_the_policy_itself_is_not_disturbed_by_asking(rounds):
    for kind in KINDS:
        opened = Started(*rounds[2], objective="dspo", reference=kind)
        randomise(opened.weights)
        before = {name: weight.detach().clone() for name, weight in opened.weights.items()}
        opened.reference.at(opened.batch())
        assert all(torch.equal(weight, before[name]) for name, weight in opened.weights.items())


@pytest.mark.parametrize(
    ("sets", "raised"),
    [
        ((), [0, 0]),
        (("finetune.reference=mix",), [0, 0]),
        (("finetune.reference=mix", "finetune.objective=nft"), [0, 1]),
        (("finetune.reference=mix", "finetune.objective={step_dpo: 1, anchor: 0.1}"), [0, 1]),
        (("finetune.objective=dspo", "sample.predictions=true"), [0, 0]),
        (("finetune.objective=dspo", "sample.predictions=true", "finetune.condition_dropout=0.1"), [1, 1]),
        (("finetune.objective=dspo", "finetune.condition_dropout=0.1"), [0, 0]),
    ],
)
def test_trainings_that_were_held_to_another_model_are_stale_and_no_others(shop, sets, raised):
    rounds = shop.session(*sets).chain(2).rounds[1:]
    assert [r.finetune.version - VERSIONS["finetune"] for r in rounds] == raised


def test_objectives_that_compare_are_known_by_name():
    assert set(COMPARING) == {name for name, found in BUILTIN.items() if "ref_prediction" in found.needs}
