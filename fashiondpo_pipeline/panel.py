"""Whom of a configuration's experts a run asks: those who are dropped, or cannot be asked, are left out, and what names them follows."""

from collections.abc import Mapping

from fashiondpo_pipeline.config import Config, Expert, Pair, shipped_experts
from fashiondpo_pipeline.errors import UserError

DROPPED = "dropped"


def is_shipped(name: str, expert: Expert) -> bool:
    """Whether an expert is the embedded default's, as it came: it may then be left out where prompts lack what it reads."""
    return shipped_experts().get(name) == expert


def without(config: Config, left_out: Mapping[str, str], judges: list[str]) -> tuple[Config, list[str]]:
    """(the configuration without some experts, what follows from that in sentences).

    left_out: name -> why. judges: who may judge in place of one that is left out, the best first; the mix does where there is none.
    The rewarded experts that stay share the weights of those that go. Raises UserError if none of them stays.
    """
    if not left_out:
        return config, []
    pair = config.pair.model_copy(update={"weights": remaining(config.pair.weights, left_out)})
    said = ["left out: " + ", ".join(f"{name} ({why})" for name, why in left_out.items())]
    if pair.weights != config.pair.weights:
        said.append(f"pair.weights is now {weights_in_words(pair)}")
    by_round = {number: own.model_copy(update={"pair": own.pair | {"weights": remaining(own.pair["weights"], left_out)}})
                if "weights" in own.pair else own for number, own in config.by_round.items()}
    judge = config.evaluate.judge
    if judge in left_out:
        judge = judges[0] if judges else None
        said.append(f"evaluate.judge is now {judge}" if judge else
                    f"the mix ({weights_in_words(pair)}) judges, and it is what was rewarded, which flatters: "
                    "better name an expert that is only watched in evaluate.judge")
    asked = {name: expert for name, expert in config.experts.items() if name not in left_out}
    evaluate = config.evaluate.model_copy(update={"judge": judge})
    return config.model_copy(update={"experts": asked, "pair": pair, "by_round": by_round, "evaluate": evaluate}), said


def remaining(weights: Mapping[str, float], left_out: Mapping[str, str]) -> dict[str, float]:
    """Weights without some experts, with the sum that they had.

    >>> remaining({"clip_i": 0.6, "clip_t": 0.3, "other": 0.1}, {"clip_i": "dropped"})
    {'clip_t': 0.75, 'other': 0.25}
    """
    stay = {name: weight for name, weight in weights.items() if name not in left_out}
    if len(stay) == len(weights):
        return dict(weights)
    whole, rest = sum(weights.values()), sum(stay.values())
    if not rest:
        gone = ", ".join(f"{name} ({left_out[name]})" for name in weights if name in left_out)
        raise UserError(f"no rewarded expert is left: {gone}; give the prompts what they need, or reward another expert in pair.weights")
    return {name: round(weight * whole / rest, 6) for name, weight in stay.items()}


def weights_in_words(pair: Pair) -> str:
    """Whom the mix rewards, and how much."""
    return ", ".join(f"{name} {weight:g}" for name, weight in pair.weights.items() if weight > 0)


def judge_warning(config: Config) -> str | None:
    """What to know, before anything is drawn, of a judge that is rewarded; None where it is only watched."""
    judge = config.evaluate.judge
    if judge and not config.pair.weights.get(judge):
        return None
    who = f"{judge} is rewarded (pair.weights) and judges (evaluate.judge)" if judge else "the rewarded experts' own mix judges"
    return f"warning: {who}: its win rate will show that the reward went up, not that pictures got better; name an expert without a weight"
