"""Before its first step a policy is its own reference: rounding passes at any beta, another model at none."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_store import Workshop
from whole_runs import prepare

from fashiondpo_pipeline import adapters
from fashiondpo_pipeline.config import load
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.store import Store
from stages import Session, finetune

ERRORS = "finetune.objective=diffusion_dpo"
LITTLE, MUCH = "finetune.beta=1e-3", "finetune.beta=1e6"


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_sd, tiny_clip):
    return Workshop(prepare(tmp_path_factory.mktemp("start"), tiny_sd, tiny_clip))


@pytest.fixture
def starts(monkeypatch):
    """What each check found: (times what rounding gives, widest margin)."""
    found, check = [], finetune.Start.check

    def noted(self, step, tally):
        found.append((self.most, tally.widest))
        check(self, step, tally)

    monkeypatch.setattr(finetune.Start, "check", noted)
    return found


def test_a_sound_run_whose_steps_are_few_is_not_refused(tmp_path, starts):
    """Four steps of the shipped default, two of them saved: rounding alone gives margins above a twentieth.

    Calls of three rows round otherwise than the tiles of eight in which the candidates were drawn.
    """
    repository = Path(__file__).parents[1]
    config = load(
        repository / "pipeline.yaml",
        [
            "sample.steps=4",
            "sample.save=[1,2]",
            "prompts.most_train=4",
            "prompts.most_held_out=2",
            "finetune.epochs=1",
            "finetune.beta=3e4",
            "finetune.micro_batch=3",
        ],
    )
    made = Session(config, tmp_path)
    r = made.chain(1).rounds[1]
    made.execute(
        [step for step in made.chain(1).steps if step.round == 0 and step.stage in ("encode", "prepare")]
    )
    made.execute([r.sample, *r.embeddings.values(), *r.scores.values(), r.pair, r.finetune])
    ((times, margin),) = starts
    assert margin > 0.05 and times < 0.01


@pytest.mark.parametrize("beta", [LITTLE, MUCH])
@pytest.mark.parametrize(
    "sets",
    [
        (),
        ("sample.guidance=3",),
        ("sample.guidance=3", "sample.guidance_rescale=0.5"),
        (ERRORS,),
        (ERRORS, "finetune.min_snr=5"),
        ("finetune.step_weight=density",),
        ("sample.eta=0.1",),
        ("finetune.objective={step_dpo: 1, sft: 0.1, diffusion_dpo: 1}",),
        ("sample.steps=40", "sample.save=[1, 20, 38]"),
        ("generator.dtype=bfloat16",),
        ("finetune.precision=bf16",),
    ],
)
def test_rounding_passes_at_any_beta(shop, starts, sets, beta):
    shop.train(1, *sets, beta)
    ((times, margin),) = starts
    assert times < (0.1 if "bf" in str(sets) else 0.02)
    assert margin < 1e-6 or beta == MUCH


def other_prompts(monkeypatch):
    condition = Store._condition
    monkeypatch.setattr(
        Store,
        "_condition",
        lambda self, rows, columns: condition(self, (rows + 4) % len(self.names), columns),
    )


def other_model(monkeypatch):
    """By three hundredths of what it says."""
    attach = adapters.attach

    def changed(denoiser, *arguments):
        attach(denoiser, *arguments)
        denoiser.conv_out.weight.data = denoiser.conv_out.weight.data * 1.03

    monkeypatch.setattr(adapters, "attach", changed)


def other_guidance(monkeypatch):
    close = Store.close

    def changed(self):
        close(self)
        for name, condition in self._conditions.items():
            self._conditions[name] = replace(condition, weights=torch.tensor([2.9, -1.9]))

    monkeypatch.setattr(Store, "close", changed)


GUIDED = "sample.guidance=3"
WRONG = [
    (change, sets)
    for change in (other_prompts, other_model)
    for sets in ((), (GUIDED,), (ERRORS,), ("finetune.step_weight=density",), ("sample.eta=0.1",))
]


@pytest.mark.parametrize("beta", ["finetune.beta=1e-2", "finetune.beta=3000"])
@pytest.mark.parametrize(("change", "sets"), [*WRONG, (other_guidance, (GUIDED,))])
def test_what_did_not_draw_the_candidates_is_noticed_at_any_beta(shop, monkeypatch, change, sets, beta):
    made, step = shop.until(1, *sets, beta)
    change(monkeypatch)
    with pytest.raises(UserError) as problem:
        made.execute([step])
    assert "at step 0 the policy is its own reference, yet a margin is " in str(problem.value)
    assert "times the most that rounding (float32) gives" in str(problem.value)
