"""The losses against numbers derived by hand, and what must hold for every built-in objective."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.objectives import BUILTIN, Evidence, Objective, winner_guard

NAN = math.nan
LN2 = math.log(2)
NAMES = sorted(BUILTIN)
PAIRED = [n for n in NAMES if BUILTIN[n].per == "pair" and n not in ("sft", "winner_rise", "dspo")]  # both of a pair have a gradient
# Whose loss no gain of the best raises, and those that rest at a certain margin: here at these, for scores one apart.
RISING = ["diffusion_dpo", "step_dpo", "hinge", "robust_dpo", "margin_dpo", "plackett_luce", "rankdpo", "dgpo", "kto", "winner_rise", "grpo"]
SETTLING = {"ipo": 0.5, "cdpo": math.log(9), "soft_dpo": 1.0, "capo": 1 / (1 + math.exp(-1)) - 1 / (1 + math.e)}
SIGNALS = st.lists(st.floats(-1e4, 1e4, width=16), min_size=3, max_size=3)

every_objective = pytest.mark.parametrize("name", NAMES)


def rows(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def index(values):
    return torch.tensor(values, dtype=torch.int64)


def evidence_of(gain, pairs=((0, 1),), unit=None, **more):
    """Gains by themselves, with whatever else a loss reads."""
    winner, loser = (index([pair[side] for pair in pairs]) for side in (0, 1))
    gain = gain if isinstance(gain, torch.Tensor) else rows(gain)
    return Evidence(gain, winner, loser, index(unit or [0] * len(gain)), **more)


def world(prediction, reference, wanted=None, score=(1.0, 0.0, -1.0), pairs=((0, 1), (0, 2), (1, 2)), unit=None, dtype=torch.float64):
    """All of the evidence as one-pixel predictions make it: the only leaf is the prediction, (n,). Two experts of one mind."""
    prediction = prediction if isinstance(prediction, torch.Tensor) else rows(prediction, dtype)
    reference = rows(reference, dtype)
    wanted = torch.zeros_like(reference) if wanted is None else rows(wanted, dtype)
    error, ref_error = (prediction - wanted) ** 2, (reference - wanted) ** 2
    score = rows(score, dtype)
    picture = (-1, 1, 1, 1)
    return evidence_of(
        (ref_error - error) / 2, pairs, unit, score=score, opinions=torch.stack([score, score], 1), error=error, ref_error=ref_error,
        prediction=prediction.reshape(picture), ref_prediction=reference.reshape(picture), wanted=wanted.reshape(picture),
    )


def values_of(name, evidence, beta=2.0, **options):
    return BUILTIN[name].loss(evidence, beta=beta, **options)[0]


def only(evidence, keep):
    """The evidence of some rows (a list of their numbers) and of the pairs among them."""
    place = {row: number for number, row in enumerate(keep)}
    inside = [p for p, pair in enumerate(zip(evidence.winner.tolist(), evidence.loser.tolist(), strict=True)) if set(pair) <= set(place)]
    units = {u: number for number, u in enumerate(sorted({int(evidence.unit[row]) for row in keep}))}
    renamed = {
        "winner": index([place[int(evidence.winner[p])] for p in inside]), "loser": index([place[int(evidence.loser[p])] for p in inside]),
        "unit": index([units[int(evidence.unit[row])] for row in keep]),
    }
    rest = {f.name: getattr(evidence, f.name) for f in fields(Evidence) if f.name not in (*renamed, "slack")}
    slack = None if evidence.slack is None else evidence.slack[inside]
    return Evidence(**renamed, slack=slack, **{name: None if v is None else v[keep] for name, v in rest.items()})


# -- the table


def test_every_objective_reads_nothing_that_it_does_not_name():
    full = world([1.0, 2.0, 3.0], [1.5, 1.5, 1.5])
    optional = [f.name for f in fields(Evidence) if f.default is None]
    for name, objective in BUILTIN.items():
        bare = replace(full, **{field: None for field in optional if field not in objective.needs})
        assert torch.equal(values_of(name, bare), values_of(name, full)), name
        for field in objective.needs:
            with pytest.raises(AssertionError, match=field):
                values_of(name, replace(full, **{field: None}))


@every_objective
def test_options_are_keywords_with_defaults(name):
    first, *others = inspect.signature(BUILTIN[name].loss).parameters.values()
    assert first.name == "evidence" and others[0].name == "beta"
    assert all(o.kind is o.KEYWORD_ONLY for o in others) and all(o.default is not o.empty for o in others[1:])


@every_objective
def test_there_is_one_value_for_each_of_what_an_objective_counts(name):
    found = world([1.0, 2.0, 3.0, 4.0, 5.0], [1.5] * 5, score=(1, 0, -1, 2, 3), unit=[0, 0, 0, 1, 1])
    values, margin = BUILTIN[name].loss(found, beta=2.0)
    assert margin.shape == (3,)
    assert values.shape == ({"pair": 3, "candidate": 5, "unit": 2}[BUILTIN[name].per],)


def test_an_objective_is_a_loss_and_what_it_counts():
    assert Objective(print, "pair") == Objective(print, "pair", "either", ())
    assert {name: o.signal for name, o in BUILTIN.items() if o.signal != "either"} == {
        "diffusion_dpo": "error", "step_dpo": "log_prob", "mapo": "error", "dspo": "error", "nft": "error",
    }


# -- where policy and reference are one

# Three candidates one step apart in score, every prediction 1, every target 0: errors 1, gains 0. Pairs (0, 1), (0, 2), (1, 2).
# Win rates: (sigma(1) + sigma(2)) / 2 = 0.8059281, 1/2 and 0.1940719. Shares of comparisons won: 1, 1/2, 0.
RATE = (1 / (1 + math.e**-1) + 1 / (1 + math.e**-2)) / 2 - 0.5
D1, D2, D3 = 1 / math.log(2), 1 / math.log(3), 1 / math.log(4)
EQUAL = {
    "diffusion_dpo": [LN2] * 3, "step_dpo": [LN2] * 3, "cdpo": [LN2] * 3, "robust_dpo": [LN2] * 3, "soft_dpo": [LN2] * 3,
    "ipo": [0.25] * 3, "hinge": [1.0] * 3, "sft": [1.0] * 3, "winner_rise": [0.0] * 3, "dspo": [1.0] * 3,
    "margin_dpo": [math.log(1 + math.e), math.log(1 + math.e**2), math.log(1 + math.e)],  # -ln sigma(-gap)
    "mapo": [1 + 0.1 * LN2] * 3,
    "capo": [RATE**2, (2 * RATE) ** 2, RATE**2],
    "anchor": [0.0] * 3,
    "kto": [0.5, 0.0, 0.5],  # the middle one wins once and loses once
    "nft": [5.0] * 3,  # clip/strength [r + 1 - r] 1/1
    "plackett_luce": [math.log(6)],  # 1/3 * 1/2 * 1
    "rankdpo": [LN2 * ((2 - math.sqrt(2)) * (D1 - D2) + 1 * (D1 - D3) + (math.sqrt(2) - 1) * (D2 - D3))],
    "dgpo": [LN2],
    "grpo": [-math.sqrt(1.5), 0.0, math.sqrt(1.5)],
}
# Whether a step of the prediction to its target lowers the loss (+), raises it (-) or does nothing (0), for the best, the worst.
PULL = dict.fromkeys(NAMES, (1, -1)) | {"sft": (1, 0), "dspo": (1, 0), "winner_rise": (0, 0), "anchor": (0, 0)}


@every_objective
def test_equal_policy_and_reference_lose_what_the_table_says(name):
    values, margin = BUILTIN[name].loss(world([1.0] * 3, [1.0] * 3), beta=2.0)
    assert margin.tolist() == [0.0] * 3
    assert values.tolist() == pytest.approx(EQUAL[name], abs=1e-9)


@every_objective
def test_the_gradient_pulls_the_best_to_its_target_and_pushes_the_worst_away(name):
    prediction = rows([1.0] * 3).requires_grad_()
    values_of(name, world(prediction, [1.0] * 3)).sum().backward()
    best, _, worst = prediction.grad.tolist()  # above 0: less of the prediction, which is nearer to its target 0, loses less
    assert tuple(0 if abs(g) < 1e-12 else math.copysign(1, g) for g in (best, worst)) == PULL[name]


@pytest.mark.parametrize(("name", "prediction", "pull"), [
    ("winner_rise", 1.2, (1, 0)), ("winner_rise", 0.8, (0, 0)), ("anchor", 1.2, (1, 1)), ("anchor", 0.8, (-1, -1)),
])
def test_what_only_holds_back_pulls_once_the_policy_has_moved(name, prediction, pull):
    """Reference 1, target 0: at 1.2 both are worse than under the reference, at 0.8 better. An anchor draws to 1 from either side."""
    leaf = rows([prediction] * 3).requires_grad_()
    values_of(name, world(leaf, [1.0] * 3)).sum().backward()
    best, _, worst = leaf.grad.tolist()
    assert tuple(0 if g == 0 else math.copysign(1, g) for g in (best, worst)) == pull


# -- by hand, pairs


def test_diffusion_dpo_is_what_it_is_by_hand():
    """The winner's error fell from 0.3 to 0.2, the loser's rose from 0.4 to 0.5: gains 0.05 and -0.05, 0.1 apart.

    With beta 4 the logit is 4 * 0.1 = 0.4, and -ln sigma(0.4) = ln(1 + e^-0.4) = 0.513015...
    """
    loss, margin = BUILTIN["diffusion_dpo"].loss(evidence_of([(0.3 - 0.2) / 2, (0.4 - 0.5) / 2]), beta=4.0)
    assert margin.item() == pytest.approx(0.4, abs=1e-12)
    assert loss.item() == pytest.approx(0.5130152523999526, abs=1e-12)


def test_diffusion_dpo_has_the_gradient_it_has_by_hand():
    """d loss/d margin = -sigma(-margin), and d margin/d gain = +-beta. At margin ln 3, sigma(-ln 3) = 1/4: with beta 4, -1 and 1."""
    gain = rows([0.0, -math.log(3) / 4]).requires_grad_()
    values_of("diffusion_dpo", evidence_of(gain), 4.0).sum().backward()
    assert gain.grad.tolist() == pytest.approx([-1.0, 1.0], abs=1e-12)


def test_step_dpo_is_what_it_is_by_hand():
    """The winner's step became twice as likely, the loser's half as likely: ln 4 apart; sigma(ln 4) = 4/5, loss ln(5/4), slope -1/5."""
    gain = rows([LN2, -LN2]).requires_grad_()
    loss, margin = BUILTIN["step_dpo"].loss(evidence_of(gain), beta=1.0)
    loss.sum().backward()
    assert margin.item() == pytest.approx(math.log(4), abs=1e-12)
    assert loss.item() == pytest.approx(math.log(5 / 4), abs=1e-12)
    assert gain.grad.tolist() == pytest.approx([-0.2, 0.2], abs=1e-12)


def test_step_dpo_with_a_clip_is_what_it_is_by_hand():
    """Both log-ratios of the example above stop at ln 1.5: 2 ln 1.5 = ln 2.25, sigma = 9/13, loss ln(13/9); the margin is told whole."""
    loss, margin = BUILTIN["step_dpo"].loss(evidence_of([LN2, -LN2]), beta=1.0, ratio_clip=math.log(1.5))
    assert margin.item() == pytest.approx(math.log(4), abs=1e-12)
    assert loss.item() == pytest.approx(math.log(13 / 9), abs=1e-12)


@given(st.floats(0.01, 2), st.floats(-10, 10), st.floats(-10, 10))
def test_the_clip_stops_only_who_went_too_far_the_right_way(clip, up, down):
    assume(up != clip and down != -clip)  # the corner has no derivative
    ratio = rows([up, down]).requires_grad_()
    values_of("step_dpo", evidence_of(ratio), 0.1, ratio_clip=clip).sum().backward()
    winner, loser = ratio.grad.tolist()
    assert winner == 0 if up > clip else winner < 0
    assert loser == 0 if down < -clip else loser > 0


def test_a_candidate_is_clipped_as_winner_and_still_pushed_as_loser():
    ratio = rows([5.0, 0.0, 0.0]).requires_grad_()  # candidate 0 wins once and loses once
    values_of("step_dpo", evidence_of(ratio, ((0, 1), (2, 0))), 1.0, ratio_clip=1.0).sum().backward()
    assert ratio.grad[0] > 0.9


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("ipo", {}, (math.log(3) - 0.5) ** 2),
        ("hinge", {}, 0.0),
        ("cdpo", {"label_smoothing": 0.25}, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("robust_dpo", {"label_smoothing": 0.25}, (0.75 * math.log(4 / 3) - 0.25 * math.log(4)) / 0.5),
        # The winner's score is 2 ln 3 higher: p = sigma(ln 3) = 3/4 at tau 2, and an offset of ln 3 at alpha 1/2 leaves margin 0.
        ("soft_dpo", {"tau": 2.0}, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("margin_dpo", {"alpha": 0.5}, LN2),
        ("winner_rise", {}, 0.0),
    ],
)
def test_losses_of_the_margin_are_what_they_are_by_hand(name, options, wanted):
    """Gain 0.1 against 0.1 - ln(3)/10, beta 10: margin ln 3, so that sigma is 3/4, -ln sigma(z) = ln 4/3 and -ln sigma(-z) = ln 4."""
    evidence = evidence_of([0.1, 0.1 - math.log(3) / 10], score=rows([2 * math.log(3), 0.0]))
    loss, margin = BUILTIN[name].loss(evidence, beta=10.0, **options)
    assert margin.item() == pytest.approx(math.log(3), abs=1e-12)
    assert loss.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("name", "options", "margin"), [
    ("ipo", {}, 0.5), ("cdpo", {"label_smoothing": 0.25}, math.log(3)), ("soft_dpo", {"tau": 1 / math.log(3)}, math.log(3)),
    ("capo", {"temperature": 1 / math.log(3)}, 0.5),
])
def test_a_loss_that_wants_a_certain_margin_rests_there(name, options, margin):
    """Scores 1 and 0: sigma(ln 3) = 3/4 is the probability for soft_dpo; win rates 3/4 and 1/4 for capo."""
    gain = rows([margin, 0.0]).requires_grad_()
    score = rows([1.0, 0.0])
    values_of(name, evidence_of(gain, score=score, opinions=score[:, None]), 1.0, **options).sum().backward()
    assert gain.grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_robust_dpo_over_flipped_labels_is_dpo_over_true_ones():
    flipped = [((0, 1),), ((1, 0),)]
    wrong, right = (values_of("robust_dpo", evidence_of([0.7, 0.2], pairs), label_smoothing=0.2) for pairs in reversed(flipped))
    assert (0.8 * right + 0.2 * wrong).item() == pytest.approx(values_of("diffusion_dpo", evidence_of([0.7, 0.2])).item(), abs=1e-12)


def test_who_is_called_the_winner_does_not_matter_to_soft_dpo():
    score = rows([0.3, 1.1])
    one, other = (values_of("soft_dpo", evidence_of([0.7, 0.2], (pair,), score=score)) for pair in ((0, 1), (1, 0)))
    assert one.item() == pytest.approx(other.item(), abs=1e-12)


def test_sft_and_winner_rise_are_what_they_are_by_hand():
    """The winner's error is 3, its reference's 1: gain (1 - 3)/2 = -1, so a rise of beta 2 * 1; weighted, an error of 3 * 0.5."""
    evidence = evidence_of([-1.0, 0.0], error=rows([3.0, 9.0]), scale=rows([0.5, 1.0]))
    assert values_of("sft", evidence).tolist() == [1.5]
    assert values_of("winner_rise", evidence).tolist() == [2.0]


def test_beside_a_margin_an_error_weighs_four_over_beta():
    """Where policy and reference are one, sigma(0) = 1/2 and a gain is half an error: slope beta/4 in the winner's error; sft's is 1."""
    slopes = {}
    for name in ("diffusion_dpo", "sft"):
        error = rows([1.0, 1.0]).requires_grad_()
        values_of(name, evidence_of((1 - error) / 2, error=error), 3000.0).sum().backward()
        slopes[name] = error.grad[0].item()
    assert slopes == pytest.approx({"diffusion_dpo": 750.0, "sft": 1.0}, rel=1e-12)


def test_mapo_is_what_it_is_by_hand():
    """s = 2: s e is ln 2 and ln 3 for e = ln(2)/2 and ln(3)/2, so o is ln 2 / 1 and ln 3 / 2. T = 10: ln 2 - ln 3 / 2 = 0.143841 -> 1.43841."""
    error = rows([LN2 / 2, math.log(3) / 2])
    odds = 10 * (LN2 - math.log(3) / 2)
    found = values_of("mapo", evidence_of([0.0, 0.0], error=error), snr=2.0, timesteps=10.0, weight=0.5)
    assert found.item() == pytest.approx(LN2 / 2 + 0.5 * math.log(1 + math.exp(-odds)), abs=1e-12)


def test_mapos_link_is_smooth_where_its_series_takes_over():
    at = rows([0.999e-3, 1.001e-3]).requires_grad_()
    near, far = (values_of("mapo", evidence_of([0.0] * 2, error=torch.stack([e, e * 0])), snr=1.0, timesteps=1.0, weight=1.0) for e in at)
    (far - near).backward()
    assert (far - near).item() == pytest.approx(2e-6 * 1.25, rel=1e-4)  # slope 1 + sigma(0)/2
    assert at.grad.tolist() == pytest.approx([-1.25, 1.25], rel=1e-3)


def test_dspo_is_what_it_is_by_hand():
    """Winner f = 3, y = 1, ref = 2, errors 4 and 1, so gain -1.5; the loser stays. beta ln(3)/1.5: z = -ln 3, sigma(ln 3) = 3/4.

    pull 0.4: 2 - 0.4 * 3/4 * 1 = 1.7, squared 2.89; slope 2 * 1.7 * (1 - 0.3).
    """
    prediction = rows([3.0, 5.0]).requires_grad_()
    evidence = world(prediction, [2.0, 5.0], [1.0, 1.0], score=(1, 0), pairs=((0, 1),))
    loss = values_of("dspo", evidence, math.log(3) / 1.5, pull=0.4)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2.89, abs=1e-12)
    assert prediction.grad.tolist() == pytest.approx([2 * 1.7 * 0.7, 0.0], abs=1e-12)


def test_capo_averages_win_rates_over_experts():
    """One expert says ln 3 (3/4 against 1/4), the other 0 (1/2 each): rates 5/8 and 3/8, wanted margin 1/4; beta * 0.5 = 1 is 3/4 off."""
    opinions = rows([[math.log(3), 7.0], [0.0, 7.0]])
    assert values_of("capo", evidence_of([0.5, 0.0], opinions=opinions)).item() == pytest.approx(9 / 16, abs=1e-12)


# -- by hand, candidates and units


def test_kto_is_what_it_is_by_hand():
    """Gains 3, 0, 0: kl 1. beta ln(3)/2: desirable sigma(-ln 3) = 1/4 ; undesirable sigma(-ln(3)/2) = 1/(1 + sqrt 3), weighed by 2."""
    found = values_of("kto", evidence_of([3.0, 0.0, 0.0]), math.log(3) / 2, undesirable=2.0)
    assert found.tolist() == pytest.approx([0.25, 2 / (1 + math.sqrt(3)), 0.0], abs=1e-12)


def test_kl_of_kto_is_never_below_zero_and_is_each_units_own():
    found = values_of("kto", evidence_of([-1.0, -3.0, 5.0, 5.0], ((0, 1), (2, 3)), unit=[0, 0, 1, 1]), 1.0)
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(3)), 0.5, 0.5], abs=1e-12)


def test_anchor_is_what_it_is_by_hand():
    """Two pixels off by 1 and 3: (1 + 9)/2 = 5, weighed by 0.2."""
    picture = torch.tensor([[1.0, 3.0]]).reshape(1, 1, 1, 2)
    nobody = index([])
    found = Evidence(torch.zeros(1), nobody, nobody, index([0]), prediction=picture, ref_prediction=picture * 0, scale=torch.tensor([0.2]))
    assert values_of("anchor", found).tolist() == pytest.approx([1.0])


def test_nft_is_what_it_is_by_hand():
    """Scores 1 and -1 are A = 1 and -1; clip 2: r = 3/4 and 1/4. f = 2, ref = 1, y = 0, strength 1/2: f+ = 1.5, f- = 0.5, so

    |f+ - y|^2 / w = 1.5, |f- - y|^2 / w = 0.5; 2 / (1/2) = 4 times 3/4 1.5 + 1/4 0.5 = 1.25, and 1/4 1.5 + 3/4 0.5 = 0.75.
    """
    evidence = world([2.0, 2.0], [1.0, 1.0], score=(1, -1), pairs=((0, 1),))
    assert values_of("nft", evidence, strength=0.5, clip=2.0).tolist() == pytest.approx([5.0, 3.0], abs=1e-12)


@given(st.floats(0.05, 2), st.floats(1.5, 10))
def test_where_policy_and_reference_are_one_nft_weighs_each_candidate_by_its_advantage(strength, clip):
    """A |f - y|^2 / w has slope 2 A (f - y) / w: for f - y = 3 and w = 3, 2 A."""
    prediction = rows([3.0] * 3).requires_grad_()
    values_of("nft", world(prediction, [3.0] * 3), strength=strength, clip=clip).sum().backward()
    assert prediction.grad.tolist() == pytest.approx([2 * math.sqrt(1.5), 0.0, -2 * math.sqrt(1.5)], abs=1e-9)


def test_grpo_is_what_it_is_by_hand():
    """A = 1 and -1. Ratios e^0.1 within 1 +- 0.2, e^0.4 and e^-0.4 beyond: clipped where that is what A asks for, and else not."""
    def values(best, worst):
        return values_of("grpo", evidence_of([best, worst], score=rows([1.0, -1.0])), 2.0, clip=0.2).tolist()

    assert values(0.05, -0.05) == pytest.approx([-math.exp(0.1), math.exp(-0.1)])
    assert values(0.2, -0.2) == pytest.approx([-1.2, 0.8])
    assert values(-0.2, 0.2) == pytest.approx([-math.exp(-0.4), math.exp(0.4)])
    far = values(-5.0, 5.0)
    assert far == pytest.approx([-math.exp(-10), math.exp(3) * (1 + 10 - 3)])


@given(st.floats(-0.6, 0.6), st.floats(-0.6, 0.6), st.sampled_from([0.5, 2.0]))
def test_grpo_has_the_slope_of_finite_differences_and_none_where_it_is_clipped(best, worst, beta):
    edges = [math.log(0.8) / beta, math.log(1.2) / beta]
    assume(all(abs(g - edge) > 1e-3 for g in (best, worst) for edge in edges))
    gain = rows([best, worst]).requires_grad_()
    values_of("grpo", evidence_of(gain, score=rows([1.0, -1.0])), beta).sum().backward()
    step = 1e-6
    for place in (0, 1):
        off = [step if n == place else 0.0 for n in (0, 1)]
        up, down = (values_of("grpo", evidence_of([best + s * off[0], worst + s * off[1]], score=rows([1.0, -1.0])), beta).sum().item()
                    for s in (1, -1))
        assert gain.grad[place].item() == pytest.approx((up - down) / (2 * step), abs=1e-6)
    assert (gain.grad[0] == 0) == (best > edges[1]) and (gain.grad[1] == 0) == (worst < edges[0])


def test_grpo_starts_as_dgpo_does():
    """At one model its slope is -beta A, and dgpo's the same, halved by the sigmoid and meant over the group."""
    one, other = rows([0.0] * 3).requires_grad_(), rows([0.0] * 3).requires_grad_()
    score = rows([3.0, 1.0, 0.0])
    values_of("grpo", evidence_of(one, score=score)).sum().backward()
    values_of("dgpo", evidence_of(other, score=score)).sum().backward()
    assert one.grad.tolist() == pytest.approx((6 * other.grad).tolist())


@given(SIGNALS)
def test_plackett_luce_of_two_is_dpo(gain):
    evidence = evidence_of(gain[:2], score=rows([1.0, 0.0]))
    assert values_of("plackett_luce", evidence).item() == pytest.approx(values_of("diffusion_dpo", evidence).item(), rel=1e-12, abs=1e-9)


def test_plackett_luce_is_what_it_is_by_hand():
    """Rewards ln 3, ln 2 and 0 in the order best, worst, middle: 3/6 * 1/3 * 2/2."""
    evidence = evidence_of([math.log(3), math.log(2), 0.0], score=rows([2.0, 0.0, 1.0]))
    assert values_of("plackett_luce", evidence, 1.0).item() == pytest.approx(math.log(6), abs=1e-12)


def test_ties_make_no_order_in_a_ranking():
    for name in ("plackett_luce", "rankdpo", "dgpo"):
        gain = rows([0.0, 0.0, 0.0]).requires_grad_()
        score = rows([1.0, 1.0, 1.0])
        values_of(name, evidence_of(gain, score=score, opinions=score[:, None])).sum().backward()
        assert gain.grad.tolist() == [0.0] * 3
        score = rows([1.0, 1.0, 0.0])
        one, other = (values_of(name, evidence_of(g, score=score, opinions=score[:, None])) for g in ([0.3, 0.7, 0.1], [0.7, 0.3, 0.1]))
        assert one.item() == pytest.approx(other.item(), abs=1e-12)


def test_rankdpo_is_what_it_is_by_hand():
    """Shares of comparisons won: 1 and 0 of two candidates; weight (2 - 1)(1/ln 2 - 1/ln 3), margin 2 * ln(3)/2."""
    evidence = evidence_of([math.log(3) / 2, 0.0], opinions=rows([[1.0, 5.0], [0.0, 2.0]]))
    assert values_of("rankdpo", evidence).item() == pytest.approx((D1 - D2) * math.log(4 / 3), abs=1e-12)


def test_experts_who_disagree_weigh_less_in_rankdpo():
    agreed, split = (values_of("rankdpo", evidence_of([0.0, 0.0], opinions=rows(o))).item() for o in
                     ([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert split == pytest.approx(agreed * (2 ** (2 / 3) - 2 ** (1 / 3)), abs=1e-12)


def test_dgpo_is_what_it_is_by_hand():
    """Scores 5 and 1 are A = 1 and -1: the logit is beta (gain_0 - gain_1) / 2 = ln 3, the loss ln 4/3."""
    evidence = evidence_of([math.log(3), 0.0], score=rows([5.0, 1.0]))
    assert values_of("dgpo", evidence).item() == pytest.approx(math.log(4 / 3), abs=1e-12)


# -- what holds for every objective


@every_objective
@given(SIGNALS, SIGNALS)
def test_the_margin_is_the_logit_and_swapping_flips_it(name, policy, reference):
    gain = rows(policy) - rows(reference)
    evidence = replace(world([1.0, 2.0, 3.0], [1.5] * 3), gain=gain)
    margin = BUILTIN[name].loss(evidence, beta=3.0)[1]
    flipped = BUILTIN[name].loss(replace(evidence, winner=evidence.loser, loser=evidence.winner), beta=3.0)[1]
    assert margin.tolist() == [3.0 * (gain[w] - gain[x]).item() for w, x in ((0, 1), (0, 2), (1, 2))]
    assert torch.equal(margin, -flipped)


def link(x):
    return x / math.expm1(x)


def sigma(x):
    return 1 / (1 + math.exp(-x))


# What two candidates lose more once the pair between them is turned round, where the reference predicts 1.5 and the target is 0. w, x: the
# winner's and the loser's prediction; z: the margin before, at beta 2, that is x^2 - w^2; g: how much higher the winner's score is. By
# -ln sigma(-z) + ln sigma(z) = z; those that do not look at pairs lose nothing more.
TURNED = {
    "diffusion_dpo": lambda w, x, z, g: z,
    "step_dpo": lambda w, x, z, g: z,
    "ipo": lambda w, x, z, g: 2 * z,
    "hinge": lambda w, x, z, g: max(0, 1 + z) - max(0, 1 - z),
    "cdpo": lambda w, x, z, g: 0.8 * z,
    "robust_dpo": lambda w, x, z, g: z / 0.8,
    "soft_dpo": lambda w, x, z, g: 0,
    "margin_dpo": lambda w, x, z, g: z - g,
    "capo": lambda w, x, z, g: 0,
    "sft": lambda w, x, z, g: x**2 - w**2,
    "winner_rise": lambda w, x, z, g: max(0, x**2 - 2.25) - max(0, w**2 - 2.25),
    "mapo": lambda w, x, z, g: x**2 - w**2 + 100 * (link(w**2 / 2) - link(x**2 / 2)),
    "dspo": lambda w, x, z, g: (x - 0.01 * sigma(z) * (x - 1.5)) ** 2 - (w - 0.01 * sigma(-z) * (w - 1.5)) ** 2,
    # each candidate's sigmoid turns round: v becomes 1 - v; kl is the mean gain, if above 0
    "kto": lambda w, x, z, g: 2 - 2 * (sigma(w**2 - 2.25 + kl(w, x)) + sigma(2.25 - x**2 - kl(w, x))),
    **dict.fromkeys(("anchor", "nft", "grpo", "plackett_luce", "rankdpo", "dgpo"), lambda w, x, z, g: 0),
}


def kl(w, x):
    """beta 2 times the mean of the gains (2.25 - prediction^2) / 2, at least 0."""
    return max(0, (2.25 - w**2 + 2.25 - x**2) / 2)


@every_objective
@given(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3))
def test_turning_a_pair_round_changes_the_loss_by_what_it_does_by_hand(name, winner, loser, gap):
    evidence = world([winner, loser], [1.5, 1.5], score=(gap, 0.0), pairs=((0, 1),))
    before, after = (values_of(name, e).sum().item() for e in (evidence, replace(evidence, winner=evidence.loser, loser=evidence.winner)))
    assert after - before == pytest.approx(TURNED[name](winner, loser, loser**2 - winner**2, gap), rel=1e-9, abs=1e-9)


@every_objective
@given(SIGNALS, SIGNALS, SIGNALS)
def test_values_and_gradients_are_finite_far_out(name, gain, prediction, reference):
    """Gains, predictions and errors of up to ten thousand, beta of five thousand, in single precision."""
    leaves = [rows(v, torch.float32).requires_grad_() for v in (gain, prediction, [abs(p) for p in prediction])]
    far = world(prediction, reference, [-p for p in prediction], dtype=torch.float32)
    far = replace(far, gain=leaves[0], prediction=leaves[1].reshape(-1, 1, 1, 1), error=leaves[2])
    values, margin = BUILTIN[name].loss(far, beta=5000.0)
    (values.sum() + margin.sum()).backward()
    assert torch.isfinite(values).all() and torch.isfinite(margin).all()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


@every_objective
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@given(st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3), st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3))
def test_half_precision_loses_what_the_same_numbers_lose_in_single(name, half, policy, reference):
    narrow = world(policy, reference, dtype=half)
    full = replace(narrow, **{f.name: getattr(narrow, f.name).float() for f in fields(Evidence)
                              if isinstance(getattr(narrow, f.name), torch.Tensor) and getattr(narrow, f.name).is_floating_point()})
    for found, wanted in zip(BUILTIN[name].loss(narrow, beta=5000.0), BUILTIN[name].loss(full, beta=5000.0), strict=True):
        assert found.dtype == torch.float32 and torch.isfinite(found).all()
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", RISING)
@given(SIGNALS, st.floats(0, 100))
def test_a_better_best_or_a_worse_worst_never_raises_the_loss(name, gain, change):
    evidence = replace(world([1.0] * 3, [1.0] * 3), gain=rows(gain))
    before = values_of(name, evidence).sum()
    for row, step in ((0, change), (2, -change)):
        moved = replace(evidence, gain=rows([g + step * (i == row) for i, g in enumerate(gain)]))
        assert values_of(name, moved).sum() <= before + 1e-9 * before.abs()


@pytest.mark.parametrize("name", SETTLING)
@given(st.floats(-20, 20), st.floats(0, 20))
def test_a_margin_nearer_to_where_a_loss_rests_never_raises_it(name, margin, change):
    """Two candidates one score apart: a margin is moved away from the one at which the loss is least, on either side."""
    away = margin + math.copysign(change, margin - SETTLING[name])
    near, far = (values_of(name, evidence_of([m, 0.0], score=rows([1.0, 0.0]), opinions=rows([[1.0], [0.0]])), 1.0).sum() for m in (margin, away))
    assert near <= far + 1e-9 * far.abs()


# Objectives that read errors or predictions themselves, and which of the best (0) and the worst (2) they make better or worse.
BY_PREDICTION = {"sft": (0, 2), "mapo": (0, 2), "nft": (0, 2), "dspo": (0,)}


@pytest.mark.parametrize("name", BY_PREDICTION)
@given(st.lists(st.floats(0, 2), min_size=3, max_size=3), st.floats(0, 1))
def test_a_best_nearer_to_its_target_or_a_worst_farther_off_never_raises_the_loss(name, prediction, share):
    """Target 0, reference 1: up to 2, the target's mirror image in the reference, beyond which nft draws back."""
    before = values_of(name, world(prediction, [1.0] * 3)).sum()
    for row in BY_PREDICTION[name]:
        moved = list(prediction)
        moved[row] = share * prediction[0] if row == 0 else prediction[2] + share * (2 - prediction[2])
        assert values_of(name, world(moved, [1.0] * 3)).sum() <= before + 1e-9 * before.abs()


@given(st.floats(-3, 3), st.floats(1, 3))
def test_an_anchor_holds_the_harder_the_farther_off(off, factor):
    near, far = (values_of("anchor", world([1.0 + d] * 3, [1.0] * 3)).sum() for d in (off, factor * off))
    assert near <= far + 1e-9


def test_every_objective_is_monotone_in_one_of_these_ways():
    assert sorted([*RISING, *SETTLING, *BY_PREDICTION, "anchor"]) == NAMES


@every_objective
@given(st.lists(st.floats(-3, 3), min_size=7, max_size=7), st.lists(st.floats(-3, 3), min_size=7, max_size=7), st.permutations(range(7)))
def test_units_one_by_one_lose_what_they_lose_together(name, policy, score, order):
    """Whole units may be cut into micro-batches in any way, and rows may come in any order."""
    units = [[0, 1, 2], [3, 4], [5, 6]]
    prediction = rows(policy).requires_grad_()
    together = world(prediction, [0.5] * 7, [1.0] * 7, score, ((0, 1), (0, 2), (3, 4), (6, 5)), [0, 0, 0, 1, 1, 2, 2])
    whole = values_of(name, together).sum()
    (slope,) = torch.autograd.grad(whole, prediction, retain_graph=True)
    parts = sum(values_of(name, only(together, unit)).sum() for unit in units)
    (slopes,) = torch.autograd.grad(parts, prediction, retain_graph=True)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-9)
    assert slopes.tolist() == pytest.approx(slope.tolist(), rel=1e-9, abs=1e-9)
    assert values_of(name, only(together, list(order))).sum().item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-9)


@every_objective
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.integers(0, 3))
def test_a_row_without_a_score_is_as_if_it_were_not_there(name, policy, missing):
    """Only where scores are read: the others do not know of them."""
    prediction = rows(policy).requires_grad_()
    pairs = [(w, x) for w in range(4) for x in range(w + 1, 4)]
    evidence = world(prediction, [0.5] * 4, [1.0] * 4, [NAN if i == missing else 3.0 - i for i in range(4)], pairs)
    values = values_of(name, evidence)
    assert torch.isfinite(values).all()
    (slope,) = torch.autograd.grad(values.sum(), prediction, retain_graph=True)
    assert torch.isfinite(slope).all()
    if {"score", "opinions"} & set(BUILTIN[name].needs):
        rest = values_of(name, only(evidence, [i for i in range(4) if i != missing]))
        assert values.sum().item() == pytest.approx(rest.sum().item(), rel=1e-9, abs=1e-9)
        assert slope[missing] == 0


@every_objective
def test_with_no_score_at_all_nothing_is_lost(name):
    if {"score", "opinions"} & set(BUILTIN[name].needs):
        prediction = rows([1.0, 2.0, 3.0]).requires_grad_()
        values = values_of(name, world(prediction, [0.5] * 3, score=(NAN, NAN, NAN)))
        values.sum().backward()
        assert values.abs().sum() == 0 and prediction.grad.abs().sum() == 0


def test_one_experts_silence_is_enough_for_losses_of_opinions():
    opinions = rows([[1.0, 1.0], [0.0, NAN]])
    for name in ("capo", "rankdpo"):
        assert values_of(name, evidence_of([0.5, 0.0], opinions=opinions)).sum() == 0


@pytest.mark.parametrize(("name", "option", "value"), [
    ("cdpo", "label_smoothing", 0.5), ("robust_dpo", "label_smoothing", -0.1), ("soft_dpo", "tau", 0.0), ("dspo", "pull", 1.0),
    ("margin_dpo", "alpha", -1.0), ("capo", "temperature", 0.0), ("nft", "strength", 0.0), ("nft", "clip", 0.0), ("mapo", "snr", 0.0),
    ("grpo", "clip", 1.0), ("grpo", "most", 0.0),
])
def test_an_option_that_makes_no_sense_is_named(name, option, value):
    with pytest.raises(UserError, match=f"option {option} should be"):
        values_of(name, world([1.0] * 3, [1.0] * 3), **{option: value})


# -- which knobs an objective heeds


@every_objective
def test_what_an_objective_says_it_heeds_changes_its_gradient_and_nothing_else_does(name):
    """The winner is drawn worse than by the reference, so that winner_rise has something to say; each knob at two values."""
    def slope(beta, slack):
        prediction = rows([1.1, 1.2, 0.9]).requires_grad_()
        values = values_of(name, replace(world(prediction, [1.0] * 3, score=(0.6, 0.0, -0.5)), slack=rows([slack] * 3)), beta)
        (found,) = torch.autograd.grad(values.sum(), prediction)
        return found

    heeded = {"beta": not torch.allclose(slope(0.3, 1.0), slope(0.5, 1.0)), "slack": not torch.allclose(slope(0.3, 1.0), slope(0.3, 0.5))}
    assert {knob for knob, changed in heeded.items() if changed} == set(BUILTIN[name].heeds)


# -- the winner guard


@pytest.mark.parametrize("name", PAIRED)
@given(st.floats(0, 1))
def test_the_guard_lets_through_its_share_of_the_losers_gradient_and_changes_no_value(name, slack):
    free, held = rows([1.0, 2.0]).requires_grad_(), rows([1.0, 2.0]).requires_grad_()
    one, other = (world(leaf, [1.1, 1.9], score=(0.6, 0.0), pairs=((0, 1),)) for leaf in (free, held))
    other = replace(other, slack=rows([slack]))
    before, after = (BUILTIN[name].loss(e, beta=0.3) for e in (one, other))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    (before[0].sum() + before[1].sum()).backward()
    (after[0].sum() + after[1].sum()).backward()
    assert held.grad.tolist() == pytest.approx([free.grad[0].item(), slack * free.grad[1].item()], rel=1e-9, abs=1e-12)


def test_the_guard_is_what_it_is_by_hand():
    """Winner off by (1, 0). Losers off by (2, 5): product 2, share (1 - 0.5) 1/2; by (0.1, 0): 0.5/0.1, at most 1; by (-1, 0) or (0, 1): 1."""
    off = torch.tensor([[1.0, 0.0], [2.0, 5.0], [0.1, 0.0], [-1.0, 0.0], [0.0, 1.0]]).reshape(5, 1, 1, 2)
    share = winner_guard(off + 3, torch.full_like(off, 3), index([0] * 4), index([1, 2, 3, 4]), 0.5)
    assert share.tolist() == pytest.approx([0.25, 1.0, 1.0, 1.0])


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=8, max_size=8), st.floats(0, 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_with_the_guard_a_step_leaves_no_winner_worse(values, mu, dtype):
    """The step -g_w + share g_l, along g_w, is at most -mu |g_w|^2 wherever the loser would pull the winner with it."""
    off = torch.tensor(values, dtype=dtype).reshape(2, 1, 2, 2)
    share = winner_guard(off, torch.zeros_like(off), index([0]), index([1]), mu)
    assert ((share >= 0) & (share <= 1)).all()
    up, down = off.double().flatten(1)
    change = (-up + share.double() * down) @ up
    rounding = 1e-6 * (up @ up + abs(down @ up))  # the share itself is a float32
    assert change <= -mu * (up @ up) + rounding or down @ up <= 0


def test_the_guard_gives_no_gradient_and_knows_its_range():
    off = torch.ones(2, 1, 1, 1, requires_grad=True)
    assert not winner_guard(off, torch.zeros_like(off), index([0]), index([1]), 0.9).requires_grad
    with pytest.raises(UserError, match="mu should be from 0 to 1"):
        winner_guard(off, off, index([0]), index([1]), 1.5)
