"""What a finetuning is done on: this round's groups, and earlier rounds' where they are replayed, with their candidates in a store."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from fashiondpo_pipeline import seeds
from fashiondpo_pipeline.config import Finetune
from fashiondpo_pipeline.grid import Chooser
from fashiondpo_pipeline.objectives import signals_of
from fashiondpo_pipeline.pairsets import PairSet
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.store import Store
from fashiondpo_pipeline.training import Batch, Group, Term
from fashiondpo_pipeline.workspace import Output, Step
from stages import pair as pairing
from stages.encode import guidance_of, prompts_of, sampled_of


@dataclass(frozen=True)
class Members:
    """One group: candidate numbers in rising order, its pairs as such numbers, and what the experts say of each member.

    share (p,): preference for each winner, None where all won outright.
    score (n,): normalised; opinions (n, m): logits; NaN where missing, no columns where no objective reads them.
    """

    numbers: np.ndarray
    winner: np.ndarray
    loser: np.ndarray
    share: np.ndarray | None
    score: np.ndarray
    opinions: np.ndarray


class Candidates:
    """The groups that are trained on. Objectives that look at whole groups get every scored candidate, others those in pairs."""

    def __init__(self, session, step: Step, out: Output, knobs: Finetune, terms: list[Term], generator):
        self.seed, self.swapped = step.config["seed"], step.config["swapped"]
        needs = {need for term in terms for need in term.objective.needs}
        self._wants = [name for name in ("score", "opinions") if name in needs]
        self._whole = any(term.objective.per != "pair" for term in terms)
        sampled = sampled_of(step)
        prompts = prompts_of(session, step)

        # the suffix of a group's name tells an earlier round's from this one's
        rounds = {"": ("sample", "pair")} | {f"@{role[5:]}": (f"sample-{role[5:]}", role) for role in step.inputs if role.startswith("pair-")}
        groups = {suffix: self._groups(session, step.inputs[pair], out.input(pair)) for suffix, (_, pair) in rounds.items()}
        for suffix in list(rounds)[1:]:
            groups[suffix] = self._drawn(groups[suffix], len(groups[""]), len(rounds) - 1, knobs.replay, suffix, step.round)

        self.store = Store(generator, sampled, guidance_of(sampled), knobs, signals_of(terms, knobs.signal), self.seed, out.work)
        self.store.say = session.say
        self.store.room(sum(len(members.numbers) for found in groups.values() for members in found.values()))
        generator.encodings = session.encodings(step.inputs["encode"], [*prompts.values(), sampled["negative"], ""])
        self.groups: list[Group] = []
        self._score = np.empty(self.store.rows)
        self._opinions = np.empty((self.store.rows, max(m.opinions.shape[1] for found in groups.values() for m in found.values())))
        for suffix, found in groups.items():
            self._gather(out.input(rounds[suffix][0]), found, prompts, suffix)
        self.store.close()
        generator.encodings = {}
        earlier = [group for group in self.groups if "@" in group.name]
        self.replayed_groups = len(earlier)
        self.replayed = np.array([row for group in earlier for row in group.rows], int)

    def _groups(self, session, pair: Step, out: Output) -> dict[str, Members]:
        """The groups of one round's pairs, by name."""
        shared = pair.config.get("shares", False)
        table = out.table("pairs", ["group", "winner", "loser", *(["share"] if shared else [])]).to_pandas()
        won, lost = ("loser", "winner") if self.swapped else ("winner", "loser")
        pairs = {name: (rows[won].to_numpy(int), rows[lost].to_numpy(int), rows["share"].to_numpy(float) if shared else None)
                 for name, rows in table.groupby("group")}
        opinions = {}
        if pair.stage == "pair" and (self._whole or self._wants):
            opinions = self._opinions_of(session, pair)
        elif pair.stage == "adopt" and self._wants:
            opinions = self._ranks_of(PairSet.open(pair.args["pairs"]))
        nobody = np.empty(0, int), np.empty(0, int), None
        found = {}
        for name in sorted(pairs.keys() | (opinions.keys() if self._whole else set())):
            winner, loser, share = pairs.get(name, nobody)
            score, each = opinions.get(name, (None, None))
            numbers = np.union1d(winner, loser)
            if self._whole and score is not None:
                numbers = np.union1d(numbers, np.flatnonzero(np.isfinite(score)))
            if len(numbers):
                found[name] = Members(numbers, winner, loser, share, np.full(len(numbers), math.nan) if score is None else score[numbers],
                                      np.empty((len(numbers), 0)) if each is None else each[numbers])
        return found

    def _opinions_of(self, session, pair: Step) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Group -> (mixed scores (k,), normalised as the pairs' were; each rewarded expert's logits (k, m)).

        Where control experiments or a negative adapter turn the pairs round, or draw them by a coin, the scores follow.
        """
        rule = {name: value for name, value in pair.config.items() if name != "seed"}
        chooser = Chooser(pairing.grid(session.output(pair), pair), Rule(**rule))
        sign = -1.0 if self.swapped != (rule["labels"] == "swapped") else 1.0
        mixed, each = sign * chooser.mixed, sign * np.stack(list(chooser.logits.values()), -1)  # (g, k), (g, k, m)
        found = {}
        for n, name in enumerate(chooser.grid.groups.to_pylist()):
            random = np.random.default_rng(seeds.key(self.seed, "labels", name))
            order = random.permutation(mixed.shape[1]) if rule["labels"] == "random" else slice(None)
            found[name] = mixed[n][order], each[n][order]
        return found

    def _ranks_of(self, pairs: PairSet) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Group -> (score (k,), the same as one expert's (k, 1)): people's ranking, higher is better; a negative adapter's is turned."""
        found = {}
        for name, ranking in pairs.rankings.items():
            score = np.full(max(ranking or [-1]) + 1, math.nan)
            for number, beaten in (ranking or {}).items():
                score[number] = -beaten if self.swapped else beaten
            found[name] = score, score[:, None]
        return found

    def _drawn(self, groups: dict[str, Members], own: int, rounds: int, share: float, *key: str | int) -> dict[str, Members]:
        """As many of an earlier round's groups as make up its part of the share that is replayed."""
        count = min(len(groups), round(share / (1 - share) * own / rounds))
        names = sorted(groups)
        chosen = np.random.default_rng(seeds.key(self.seed, "replay", *key)).permutation(len(names))[:count]
        return {names[i]: groups[names[i]] for i in sorted(chosen)}

    def _gather(self, sample: Output, groups: dict[str, Members], prompts: dict[str, str], suffix: str) -> None:
        """Put the members of these groups into the store, and the groups in their order behind the others."""
        wanted = {(name, int(number)) for name, members in groups.items() for number in members.numbers}
        tables = (sample.table("trajectories", self.store.columns_read, shard) for shard in sample.shards("trajectories"))
        self.store.gather(tables, wanted, prompts, suffix)
        for name, members in groups.items():
            rows = np.array([self.store.place[name + suffix, int(number)] for number in members.numbers])
            self._score[rows], self._opinions[rows] = members.score, members.opinions
            places = (np.searchsorted(members.numbers, side) for side in (members.winner, members.loser))
            self.groups.append(Group(name + suffix, rows, *places, members.share))

    def scores_at(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What the experts said of a batch's rows, where an objective asks for it."""
        values = {"score": self._score, "opinions": self._opinions}
        return {name: torch.from_numpy(values[name][batch.rows]).to(self.store.device) for name in self._wants}
