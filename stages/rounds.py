"""`fdpo round`: brings a run to n rounds, says what it finds done, and ends with the table, the report and the adapter."""

from fashiondpo_pipeline.terminal import show, size
from fashiondpo_pipeline.workspace import Step
from stages import Chain, Session, report
from stages.plan import estimate


def run(session: Session, n: int | None) -> None:
    n = n or session.config.rounds
    chain = session.chain(n)
    with session.run.lock():
        todo = [step for step in chain.steps if not session.run.done(step)]
        _announce(session, chain, todo, n)
        for number in range(n + 1):
            ran = session.execute(chain.of(number))
            if ran and number:
                session.say(_sentence(session, chain, number, ran))
        path = report.write(session, chain)
    _table(session, chain)
    last = chain.rounds[-1]
    session.say(f"report   {path}")
    session.say(f"adapter  {session.run.root / last.finetune.folder / 'adapter'}")
    session.say(f'next: fdpo generate "{session.prompts["held-out"].rows[0]["prompt"]}" --round {n}')


def _announce(session: Session, chain: Chain, todo: list[Step], n: int) -> None:
    root = session.run.root
    if not todo:
        session.say(f"{root} has {n} rounds already: nothing to do")
        return
    cost = estimate(session, chain)
    found = len(chain.steps) - len(todo)
    going_on = f" · {found} of {len(chain.steps)} steps are done, going on with round {todo[0].round} {todo[0].name}" if found else ""
    sample = session.config.sample
    session.say(
        f"run {session.config.name} · {session.config.generator.model} · {len(session.prompts['train'])} prompts x {sample.candidates} "
        f"candidates · {n} rounds · about {size(cost.total_bytes)} on disk, {cost.forwards:,} denoiser rows{going_on}"
    )


def _sentence(session: Session, chain: Chain, number: int, ran: list[Step]) -> str:
    numbers = session.output(chain.rounds[number].evaluate).manifest["numbers"]
    seconds = sum(session.output(step).manifest["seconds"] for step in ran)
    return f"round {number} done in {seconds:.0f} s · held-out: {in_words(numbers, number)}"


def in_words(numbers: dict, number: int) -> str:
    """One round's result as a sentence."""
    base, previous = numbers["against_base"], numbers["against_previous"]
    text = f"{numbers['judge']} prefers it to the base in {percent(base)}"
    if number > 1:
        text += f", to round {number - 1} in {percent(previous)}"
    if numbers["diversity"]["after"] is not None:
        text += f" · diversity {numbers['diversity']['after'] / numbers['diversity']['base']:.2f} of the base's"
    return text


def percent(rate: dict) -> str:
    """A win rate with its interval."""
    return f"{100 * rate['win_rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _table(session: Session, chain: Chain) -> None:
    experts = list(session.config.experts)
    rows = []
    for done in chain.rounds[1:]:
        numbers = session.output(done.evaluate).manifest["numbers"]
        seconds = {step.name: session.output(step).manifest["seconds"] for step in chain.of(done.number)}
        if done.number == 1:
            rows.append(["base", "", *(_figure(numbers["experts"][e]["base"]) for e in experts), _figure(numbers["diversity"]["base"]), "", "", "", ""])
        rows.append([
            f"round {done.number}", percent(numbers["against_base"]),
            *(_figure(numbers["experts"][e]["after"]) for e in experts), _figure(numbers["diversity"]["after"]), f"{numbers['pairs']:,}",
            f"{seconds['sample']:.0f}", f"{seconds['finetune']:.0f}", f"{sum(seconds.values()) - seconds['sample'] - seconds['finetune']:.0f}",
        ])
    rewarded = session.config.pair.weights
    heads = [f"{name}{'' if rewarded.get(name) else ' (watched)'}" for name in experts]
    show("held-out prompts, same seeds", ["", "win rate over base", *heads, "diversity", "pairs", "sample s", "finetune s", "rest s"], rows)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
