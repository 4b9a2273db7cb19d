"""What an expert does once a run, before it scores: reference embeddings, features, fitted heads."""

from fashiondpo_pipeline.workspace import Output, Step


def run(session, step: Step, out: Output) -> None:
    name = step.args["expert"]
    draft = out.work / "prepared"
    draft.mkdir(exist_ok=True)
    session.say(f"prepare {name}")
    session.make(name).prepare(draft, session.device)
    out.publish("prepared", draft)
    out.finish()
