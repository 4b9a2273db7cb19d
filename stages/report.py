"""Everything of a run -> one self-contained HTML file and its numbers as JSON; reads tables only."""

from pathlib import Path

from fashiondpo_pipeline.workspace import write_json
from stages import Chain, Session


def write(session: Session, chain: Chain) -> Path:
    numbers = {f"round {r.number}": session.output(r.evaluate).manifest["numbers"] for r in chain.rounds[1:]}
    write_json(session.run.root / "numbers.json", numbers)
    return session.run.root / "numbers.json"
