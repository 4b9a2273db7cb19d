"""What a configuration's objectives take, and every knob that they would not heed, each with its sentence."""


import pytest

from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.objectives import BUILTIN
from fashiondpo_pipeline.terms import terms_of


def refused(**knobs) -> str:
    with pytest.raises(UserError) as problem:
        terms_of(Finetune(**knobs))
    return str(problem.value)


def test_a_mix_has_its_weights_and_each_objective_the_options_that_it_takes():
    first, second = terms_of(Finetune(objective={"step_dpo": 1.0, "cdpo": 0.5}, options={"label_smoothing": 0.2}, ratio_clip=0.1))
    assert (first.weight, first.options) == (1.0, {"ratio_clip": 0.1})
    assert (second.weight, second.options) == (0.5, {"label_smoothing": 0.2})


INSTEAD = "use diffusion_dpo, or set finetune.signal to error"
IDLE = [
    ({"objective": "ipo", "ratio_clip": 1e-5}, "finetune.ratio_clip has no effect on ipo: set it to null, or use step_dpo"),
    ({"objective": {"kto": 1.0, "sft": 1.0}, "ratio_clip": 1.0},
     "finetune.ratio_clip has no effect on kto and sft: set it to null, or use step_dpo"),
    ({"guard": 0.9}, f"finetune.guard works on errors: {INSTEAD}"),
    *(({"objective": name, "signal": "error", "guard": 0.9}, f"finetune.guard has no effect on {name}: set it to null, or use diffusion_dpo")
      for name in ("kto", "nft", "rankdpo", "plackett_luce", "sft", "dgpo", "anchor", "winner_rise", "dspo")),
    ({"condition_dropout": 0.1}, f"finetune.condition_dropout works on errors: a step was taken with its prompt; {INSTEAD}"),
    ({"noise": "fresh"}, f"finetune.noise fresh works on errors: a step was taken with the sampler's noise; {INSTEAD}"),
    ({"objective": {"diffusion_dpo": 1.0, "ipo": 1.0}, "noise": "fresh"},
     f"finetune.noise fresh works on errors: a step was taken with the sampler's noise; {INSTEAD}"),
    ({"min_snr": 5.0}, f"finetune.min_snr works on errors: {INSTEAD}"),
    ({"objective": "diffusion_dpo", "step_weight": "density"},
     "finetune.step_weight has no effect on errors, which diffusion_dpo is made of: set it to equal, or use step_dpo"),
    *(({"objective": name, "auto_beta": 0.3},
       f"finetune.auto_beta has no effect on {name}, which beta does not change: set it to null, or use another objective")
      for name in ("mapo", "nft", "sft", "anchor")),
    ({"objective": "diffusion_dpo", "divergence": 2.0},
     "finetune.divergence is measured on log-probabilities, which errors do not give: set it to null, or use step_dpo"),
    ({"objective": "sft", "divergence": 2.0},
     "finetune.divergence has no effect on sft, which beta does not change: set it to null, or use another objective"),
    ({"auto_beta": 0.3, "divergence": 2.0}, "finetune.divergence and finetune.auto_beta both move beta: set one of them to null"),
]


@pytest.mark.parametrize(("knobs", "sentence"), IDLE)
def test_a_knob_without_effect_is_refused(knobs, sentence):
    assert refused(**knobs) == sentence


WRONG = [
    ({"objective": "cdpo", "options": {"label_smoothing": 0.7}},
     "finetune: the objective's option label_smoothing should be from 0 to below 0.5, not 0.7; change it in the configuration"),
    ({"objective": "cdpo", "options": {"label_smoothing": "x"}}, "finetune.options.label_smoothing: should be a number, not 'x'"),
    ({"objective": "cdpo", "options": {"label_smoothing": None}}, "finetune.options.label_smoothing: should be a number, not None"),
    ({"objective": "cdpo", "options": {"label_smoothing": True}}, "finetune.options.label_smoothing: should be a number, not True"),
    ({"options": {"ratio_clip": -3}}, "finetune.options.ratio_clip: this is a knob of its own; write finetune.ratio_clip"),
    ({"options": {"smoothing": 0.1}}, "finetune.options.smoothing: step_dpo takes no such option; it takes none"),
    ({"objective": "json:loads"},
     "the objective 'json:loads' names Python's own module json, which holds none: name a class of yours"),
    ({"objective": "whole_runs:fdpo"}, "the objective 'whole_runs:fdpo' is none: it is a function, not an objectives.Objective"),
]


@pytest.mark.parametrize(("knobs", "sentence"), WRONG)
def test_what_an_objective_does_not_take_is_refused(knobs, sentence):
    assert refused(**knobs) == sentence


@pytest.mark.parametrize("name", BUILTIN)
def test_every_objective_may_be_asked_with_its_defaults(name):
    (term,) = terms_of(Finetune(objective=name))
    assert term.objective is BUILTIN[name]


def test_a_mistake_that_two_objectives_find_is_said_once():
    assert refused(objective={"cdpo": 1.0, "robust_dpo": 1.0}, options={"label_smoothing": 0.7}).count("label_smoothing") == 1


def test_a_knob_that_one_objective_of_a_mix_heeds_is_not_idle():
    terms_of(Finetune(objective={"ipo": 1.0, "step_dpo": 1.0}, ratio_clip=0.1))
    terms_of(Finetune(objective={"sft": 1.0, "ipo": 1.0}, signal="error", auto_beta=0.3, guard=0.9, noise="fresh", condition_dropout=0.1))
    terms_of(Finetune(objective={"diffusion_dpo": 1.0, "ipo": 1.0}, min_snr=5.0, step_weight="density"))


def test_all_knobs_without_effect_are_named_at_once():
    told = refused(guard=0.9, noise="fresh", min_snr=5.0, options={"tau": 1.0}).splitlines()
    assert [line.split(":")[0].split()[0] for line in told] == [
        "finetune.options.tau", "finetune.guard", "finetune.noise", "finetune.min_snr"]
