"""`fdpo studio`: a run's round or a pair set as an album, shown in the browser until the person ends it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pyarrow.compute as pc

from fashiondpo_pipeline import albums, sheets, terminal
from fashiondpo_pipeline.albums import Album
from fashiondpo_pipeline.annotations import Answer
from fashiondpo_pipeline.config import Pair
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.opinions import Opinions
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.workspace import without_pandas
from stages import Session, Watched, pair
from stages.inspecting import Question, Shelf, place
from stages.single import most_rounds


def run(
    session: Callable[[str | None], Session], what: Path | None, number: int | None, pairs: str | None, listed: Path | None, host: str, port: int,
    of_runs: Mapping[str, object]
) -> None:
    """`session` opens the run of a name; of_runs: option -> value of those that say which. Raises UserError if `what` is neither run nor set."""
    without_pandas()
    from fashiondpo_pipeline import studio

    if what and (what / "manifest.json").is_file():
        given = [option for option, value in {"--round": number, "--pairs": pairs, **of_runs}.items() if value]
        if given:
            raise UserError(f"{what} is a pair set, of which {', '.join(given)} says nothing: leave it out")
        album = albums.of_set(what)
        say: Callable[[str], None] = terminal.say
    else:
        if what and of_runs.get("--name"):
            raise UserError(f"--name {of_runs['--name']} and {what} both name a run: leave one out")
        found = session(_name(what) if what else None)
        album, say = of_run(found, number, pairs), found.say
    if listed:
        album.queue("list", listed)  # now, not when somebody has begun
    studio.serve(album, host, port, say, listed)


def _name(what: Path) -> str:
    for folder in (what, Path("runs") / what):
        if folder.is_dir() and folder.resolve().parent == Path("runs").resolve():
            return folder.resolve().name
    raise UserError(f"{what} is neither a run (a name, or a folder in runs/) nor a pair set (a folder with manifest.json)")


def of_run(session: Session, number: int | None, pairs: str | None = None) -> Album:
    """The album of one round: the one named, else the last that has pairs."""
    r, rule = place(session, Question("pairs"), number, pairs)
    shelf = Shelf(session, Question("pairs"), r, rule)
    store = RunStore(session, shelf)
    made: dict[str, list[dict]] = {}
    for row in session.output(r.pair).table("pairs", ["group", "winner", "loser", "margin"]).to_pylist():
        made.setdefault(row["group"], []).append(row)
    rounds = HeldOut(session, rule)
    return Album(store, shelf.opinions, shelf.prompts, made, shelf.reasons(), True, session.config.seed, rounds.prompts, rounds.side_by_side,
                 _counted_by(session, r.number, store))


def _counted_by(session: Session, number: int, store: "RunStore") -> str:
    """What makes a score of what people say of this round, in words."""
    people = f"experts.people={{use: human, options: {{annotations: {store.folder / 'annotations'}}}}}"
    sets = [] if any(entry.use == "human" for entry in session.config.asked.values()) else ["--set", people]
    return f"what is said here is of round {number}; as a score it is counted by: {session.command('score', '--round', number, *sets)}"


class RunStore:
    """One round's pictures; what is decided lies in the run's folder."""

    def __init__(self, session: Session, shelf: Shelf):
        self.session, self.shelf, self.folder = session, shelf, session.run.root
        self.of, self.title = shelf.round.sample.folder, shelf.title
        self._lock = Lock()

    def rows(self, groups: list[str]) -> list[dict]:
        return self.shelf.pictures(pa.array(groups, pa.string())).to_pylist()

    def save_rule(self, rule: Rule) -> str:
        number, in_force = self.shelf.round.number, self.shelf.rule.weights
        weights = {name: round(weight, 6) for name, weight in rule.weights.items() if weight > 0 or name in in_force}
        section = Pair.model_validate(asdict(rule) | {"weights": weights})
        step = self.session.chain(number, {number: section}).rounds[number].pair
        scored = {f"score-{name}": found.fingerprint for name, found in self.shelf.round.scores.items()}
        if any(scored.get(role, found.fingerprint) != found.fingerprint for role, found in step.inputs.items()):
            raise UserError("these candidates were scored again since the page was opened: start `fdpo studio` again")
        if step.folder == self.shelf.round.pair.folder:
            return "these are the settings in force: nothing new was saved"
        with self._lock, self.session.run.lock():
            if not self.session.run.done(step):
                out = self.session.run.output(step)
                out.open()
                pair.run(self.session, step, out)
        return f"saved as pairs {step.fingerprint} · to train on it: " \
            + self.session.command("finetune", "--round", number, "--pairs", step.fingerprint)

    def save_labels(self, name: str, answers: list[Answer]) -> str:
        r = self.shelf.round
        sample = self.session.output(r.sample)
        config = self.session.config
        lineage = {"run": config.name, "round": r.number, "base": config.generator.model, "sample": sample.manifest["claim"]}
        candidates = sample.table("candidates", ["group", "candidate", "prompt"])
        source = f"what people said of round {r.number} of {self.session.run.root}"
        return albums.save_labels(self, candidates, self.folder / "labels" / name, answers, source, lineage)


class HeldOut:
    """What each round drew for held-out prompts from the same seeds, with its scores; tables are read when first asked for."""

    def __init__(self, session: Session, rule: Rule):
        self.session, self.rule = session, rule
        rounds = session.chain(max(most_rounds(session), session.config.rounds)).rounds
        self.rounds: list[Watched] = [r for r in rounds if session.run.done(r.held_out)]
        self._read: dict[int, tuple[pa.Table, Opinions]] = {}

    @property
    def prompts(self) -> dict[str, str]:
        """The held-out prompts by their keys."""
        if not self.rounds:
            return {}
        table = self.session.output(self.rounds[0].held_out).table("candidates", ["group", "prompt"])
        return dict(zip(table["group"].to_pylist(), table["prompt"].to_pylist(), strict=True))

    def side_by_side(self, group: str) -> list[tuple[str, sheets.Section]]:
        """(round, its candidates in the order of their seeds) of one prompt."""
        found = []
        for r in self.rounds:
            table, opinions = self._tables(r)
            out = self.session.output(r.held_out)
            numbers = pc.indices_nonzero(pc.equal(table["group"], group)).to_numpy().astype("int64")
            rows = out.rows("candidates", ["group", "candidate", "prompt", "picture", "fault"], numbers).to_pylist()
            if rows:
                sheet = sheets.Sheet(opinions, {group: rows[0]["prompt"]}, rows)
                found.append((f"round {r.number}" if r.number else "the base", sheet.by_number(group)))
        return found

    def _tables(self, r: Watched) -> tuple[pa.Table, Opinions]:
        if r.number not in self._read:
            scores = {name: self.session.output(step).table("scores") for name, step in r.held_out_scores.items() if self.session.run.done(step)}
            table = self.session.output(r.held_out).table("candidates", ["group", "candidate"])
            self._read[r.number] = table, Opinions(table, scores, self.rule)
        return self._read[r.number]
