"""`fdpo round`: brings a run to n rounds, says what it finds done, and ends with the table, the report and the adapter."""

from fashiondpo_pipeline import diagnosis
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.statistics import percent
from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Step
from stages import Chain, Session
from stages.naming import command_for
from stages.plan import compare, estimate


def run(session: Session, n: int | None) -> None:
    from stages import report  # here, as its charts take longer to import than `fdpo status` runs

    n = n or session.config.rounds
    chain = session.chain(n)
    with session.lock():
        todo = [step for step in chain.steps if not session.run.done(step)]
        if todo:
            _check_objective(session)
        _announce(session, chain, todo, n)
        for number in range(n + 1):
            ran = session.execute(chain.of(number))
            if ran and session.config.evaluate.keep == "best":
                chain = session.chain(n)  # what the next round starts from depends on how this one did
            if ran and number:
                session.say(_sentence(session, chain, number))
        path = report.write(session, chain) if session.first else None
    if not session.first:
        return
    _table(session, chain)
    compare(session, chain)
    found = {r.number: session.output(r.evaluate).manifest["numbers"] for r in chain.rounds[1:]}
    judge, drift = session.config.evaluate.judge or "mix", session.config.evaluate.drift
    last = session.output(chain.rounds[-1].finetune)
    for finding in diagnosis.of_evidence(last.manifest["numbers"]["pairs"], last.table("steps"), found[n]):
        session.say(f"{finding.level}  {finding.sentence}")
    for alarm in diagnosis.of_rounds(found, drift):
        session.say(f"alarm    {alarm.sentence}")
    session.say(diagnosis.best_in_words(found, judge, drift))
    kept = session.kept(chain)
    session.say(f"report   {path}")
    session.say(f"adapter  {session.run.root / chain.rounds[kept].finetune.folder / 'adapter'}" if kept else "adapter  none, as the base is kept")
    best = diagnosis.best_round(found, judge, drift)  # what is offered is what was just said to be the one to keep
    session.say(f'next: fdpo generate "{session.prompts["held-out"].rows[0]["prompt"]}" --round {best}')


def _check_objective(session: Session) -> None:
    """Raises UserError if the candidates will lack what finetuning needs of them: now, not after hours of sampling."""
    from fashiondpo_pipeline.terms import terms_of
    from fashiondpo_pipeline.training import signals_of  # here, as torch takes longer to import than `fdpo status` runs

    knobs, sample = session.config.finetune, session.config.sample
    if knobs.options.get("label_smoothing") == "auto":
        asked = [name for name, weight in session.config.pair.weights.items() if weight > 0 and getattr(session.make(name), "stochastic", False)]
        if not asked or not session.config.score.repeat:
            raise UserError("finetune.options.label_smoothing is auto, which needs a rewarded expert that may answer otherwise when asked again, "
                            "and score.repeat above 0: give it a number")
    if "log_prob" in signals_of(terms_of(knobs), knobs.signal):
        if sample.eta == 0:
            raise UserError(f"finetune.objective {knobs.objective} needs log-probabilities, which sample.eta 0 does not give: "
                            "raise sample.eta, use diffusion_dpo, or set finetune.signal to error")
        if not sample.path:
            raise UserError(f"finetune.objective {knobs.objective} needs to know where each step led, which sample.path false does not keep: "
                            "set sample.path to true, use diffusion_dpo, or set finetune.signal to error")


def _announce(session: Session, chain: Chain, todo: list[Step], n: int) -> None:
    root = session.run.root
    if not todo:
        session.say(f"{root} has {n} round{'' if n == 1 else 's'} already: nothing to do")
        return
    cost = estimate(session, chain)
    found = len(chain.steps) - len(todo)
    going_on = f" · {found} of {len(chain.steps)} steps are done, going on with round {todo[0].round} {todo[0].name}" if found else ""
    sample = session.config.sample
    session.say(
        f"run {session.config.name} · {session.config.generator.model} · {len(session.prompts['train'])} prompts x {sample.candidates} "
        f"candidates · {n} rounds · about {size(cost.total_bytes)} on disk, {cost.forwards:,} denoiser rows{going_on}"
    )


def _sentence(session: Session, chain: Chain, number: int) -> str:
    r = chain.rounds[number]
    seconds = seconds_by_stage(session, chain, number)
    pair, finetune, evaluate = (session.output(step).manifest["numbers"] for step in (r.pair, r.finetune, r.evaluate))
    return (
        f"round {number}  sample {seconds['sample']:.0f} s · score {seconds['score']:.0f} s · pair {pair['pairs']:,} pairs, "
        f"{pair['rejected']} groups without · finetune {finetune['steps']} steps {seconds['finetune']:.0f} s · "
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
    text = f"{numbers['judge']} prefers it to the base in {percent(base)}"
    if before:
        text += f", to round {before} in {percent(previous)}"
    if numbers["diversity"]["after"] is not None and numbers["diversity"]["base"]:
        text += f" · diversity {numbers['diversity']['after'] / numbers['diversity']['base']:.2f} of the base's"
    return text


def _table(session: Session, chain: Chain) -> None:
    """Round by round: who wins, what each expert says, and how long each stage took."""
    experts = list(session.output(chain.rounds[-1].evaluate).manifest["numbers"]["experts"])
    results, times = [], []
    for r in chain.rounds[1:]:
        numbers = session.output(r.evaluate).manifest["numbers"]
        if r.number == 1:
            results.append(["base", "", *_figures(numbers, experts, "base"), ""])
        results.append([f"round {r.number}", percent(numbers["against_base"]), *_figures(numbers, experts, "after"), f"{numbers['pairs']:,}"])
        times.append([f"round {r.number}", *(f"{s:.1f}" for s in seconds_by_stage(session, chain, r.number).values())])
    heads = [name if session.config.pair.weights.get(name) else f"{name} (watched)" for name in experts]
    show("held-out prompts, same seeds: win rate over the base, means", ["", "win rate", *heads, "diversity", "pairs"], results)
    show("seconds", ["", "sample", "score", "pair", "finetune", "evaluate"], times)


def _figures(numbers: dict, experts: list[str], role: str) -> list[str]:
    return [*(_figure(numbers["experts"][name][role]) for name in experts), _figure(numbers["diversity"][role])]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
