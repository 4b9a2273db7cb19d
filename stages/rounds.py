"""`fdpo round`: brings a run to n rounds, says what it finds done, and ends with the table, the report and the adapter."""

from fashiondpo_pipeline import diagnosis, effect_size, panel
from fashiondpo_pipeline.statistics import percent
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Step
from stages import Chain, Session
from stages.naming import command_for
from stages.plan import compare, estimate


def run(session: Session, n: int | None) -> None:
    n = n or session.config.rounds
    chain = session.chain(n)
    with session.lock():
        todo = [step for step in chain.steps if not session.run.done(step)]
        if todo:
            session.check_objectives()
            session.check_model()
        _announce(session, chain, todo, n)
        todo_from = max(todo[0].round, 1) if todo else n  # the first round that is made now
        for number in range(n + 1):
            ran = session.execute(chain.of(number))
            if ran and session.config.evaluate.keep == "best":
                chain = session.chain(n)  # what the next round starts from depends on how this one did
            if ran and number:
                session.say(_sentence(session, chain, number))
            if session.first and number and (ran or number == n):
                from stages import report  # here, as its charts take longer to import than a mistake takes to be told

                path = report.write(session, chain.first(number))
                if number == todo_from and number < n:
                    session.say(f"report   {path}, written anew after every round")
    if not session.first:
        return
    _table(session, chain)
    compare(session, chain)
    found = {r.number: session.output(r.evaluate).manifest["numbers"] for r in chain.rounds[1:]}
    judge, drift = session.config.evaluate.judge or "mix", session.config.evaluate.drift
    last = session.output(chain.rounds[-1].finetune)
    evidence = diagnosis.of_evidence(last.manifest["numbers"]["pairs"], last.table("steps"), found[n])
    for finding in [*evidence, *diagnosis.of_size(found[n], chain.rounds[n].finetune.config)]:
        session.say(f"{finding.level}  {finding.sentence}")
    for alarm in diagnosis.of_rounds(found, drift):
        session.say(f"alarm    {alarm.sentence}")
    session.say(diagnosis.best_in_words(found, judge, drift))
    kept = session.kept(chain)
    session.say(f"report   {path}")
    session.say(f"adapter  {session.run.root / chain.rounds[kept].adapter.folder / 'adapter'}" if kept else "adapter  none, as the base is kept")
    best = diagnosis.best_round(found, judge, drift)  # what is offered is what was just said to be the one to keep
    session.say(f"next: {session.command('generate', session.prompts['held-out'].rows[0]['prompt'], '--round', best)}")


def _announce(session: Session, chain: Chain, todo: list[Step], n: int) -> None:
    root = session.run.root
    if not todo:
        session.say(f"{root} has {n} round{'' if n == 1 else 's'} already: nothing to do")
        return
    cost = estimate(session, chain)
    found = len(chain.steps) - len(todo)
    going_on = f" · {found} of {len(chain.steps)} steps are done, going on with round {todo[0].round} {todo[0].name}" if found else ""
    sample, prompts = session.config.sample, len(session.prompts["train"])
    some = f"{sample.prompts} of {prompts}" if sample.prompts and sample.prompts < prompts else prompts
    session.say(
        f"run {session.config.name} · {session.config.generator.model} · {some} prompts x {sample.candidates} "
        f"candidates · {n} round{'' if n == 1 else 's'} · about {size(cost.total_bytes)} on disk, {cost.forwards:,} denoiser rows{going_on}"
    )
    if said := panel.judge_warning(session.config):
        session.say(said)


def _sentence(session: Session, chain: Chain, number: int) -> str:
    r = chain.rounds[number]
    seconds = seconds_by_stage(session, chain, number)
    pair, finetune, evaluate = (session.output(step).manifest["numbers"] for step in (r.pair, r.finetune, r.evaluate))
    strength = f", strength {session.output(r.strength).manifest['numbers']['strength']:g}," if r.strength else ""
    return (
        f"round {number}  sample {seconds['sample']:.0f} s · score {seconds['score']:.0f} s · pair {pair['pairs']:,} pairs, "
        f"{pair['rejected']} groups without · finetune {finetune['steps']} steps{strength} {seconds['finetune']:.0f} s · "
        f"evaluate {seconds['evaluate']:.0f} s\n         held-out: {in_words(evaluate, r.before)}"
    )


def seconds_by_stage(session: Session, chain: Chain, number: int) -> dict[str, float]:
    """Seconds that each stage of a round took when it ran: as the person knows them, not step by step."""
    found = dict.fromkeys(("sample", "score", "pair", "finetune", "evaluate"), 0.0)
    for step in chain.of(number):
        found[command_for(step)] += session.output(step).manifest["seconds"]
    return found


def in_words(numbers: dict, before: int) -> str:
    """One round's result as a sentence. before: the round it went on from, 0 for the base."""
    base, previous = numbers["against_base"], numbers["against_previous"]
    text = f"{numbers['judge']} prefers it to the base in {percent(base)}" + (f" ({100 * base['ties']:.0f} % ties)" if base["ties"] else "")
    if before:
        text += f", to round {before} in {percent(previous)}"
    return " · ".join([*effect_size.in_words(numbers["size"]), text])


def _table(session: Session, chain: Chain) -> None:
    """Round by round: how much was gained, what each expert says, and how long each stage took."""
    experts = list(session.output(chain.rounds[-1].evaluate).manifest["numbers"]["experts"])
    results, times = [], []
    for r in chain.rounds[1:]:
        numbers = session.output(r.evaluate).manifest["numbers"]
        size = numbers["size"]
        if r.number == 1:
            right = f"{100 * size['right']['base']['value']:.1f} %" if size["right"] else ""
            results.append(["base", "1", right, "1.00", "0.00", "", *_figures(numbers, experts, "base"), ""])
        results.append([f"round {r.number}", *_sizes(size), percent(numbers["against_base"]), *_figures(numbers, experts, "after"),
                        f"{numbers['pairs']:,}"])
        times.append([f"round {r.number}", *(f"{s:.1f}" for s in seconds_by_stage(session, chain, r.number).values())])
    heads = [name if session.config.pair.weights.get(name) else f"{name} (watched)" for name in experts]
    columns = ["", "as best of", "right" if size["right"] else "mean, sd of base", "diversity at equal quality", "visible change", "win rate"]
    show("held-out prompts, same seeds: one picture is as good as the best of n of the base; means", [*columns, *heads, "diversity", "pairs"],
         results)
    show("seconds", ["", "sample", "score", "pair", "finetune", "evaluate"], times)


def _sizes(size: dict) -> list[str]:
    """A round's measures of size as cells of the table."""
    right = f"{100 * size['right']['after']['value']:.1f} %" if size["right"] else _figure(size["shift"]["value"], "+.2f")
    worth = size["best_of"]
    unbounded = "-" if worth["low"] is None else f"> {worth['most']}"
    ends = ", ".join("more" if worth[end] is None else f"{worth[end]:.2f}" for end in ("low", "high"))
    value = unbounded if worth["value"] is None else f"{worth['value']:.2f}"
    return [value if worth["low"] is None else f"{value} [{ends}]", right,
            _figure(size["diversity_at_equal_quality"]["value"], ".2f"), _figure(size["visible_change"]["value"], ".2f")]


def _figures(numbers: dict, experts: list[str], role: str) -> list[str]:
    return [*(_figure(numbers["experts"][name][role]) for name in experts), _figure(numbers["diversity"][role])]


def _figure(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
