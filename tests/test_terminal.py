"""What is shown while something runs: how far, of what, and what else is worth knowing at the moment."""

import io
import json

import pytest
from rich.console import Console
from whole_runs import works

from fashiondpo_pipeline import terminal
from stages import report


@pytest.fixture
def lines(monkeypatch):
    """What is said, where there is no terminal and every moment is a new half minute."""
    said = []
    monkeypatch.setattr(terminal, "EVERY", -1.0)
    monkeypatch.setattr(terminal, "stderr", Console(file=io.StringIO(), force_terminal=False))
    monkeypatch.setattr(terminal, "say", said.append)
    return said


def test_units_are_counted_and_not_items_and_what_else_is_known_is_told(lines):
    seen = []
    for item in terminal.track([10, 2000], "round 1 sample", 2020, 10, "pictures", size=lambda item: item, now=lambda: f"loss {len(seen)}"):
        seen.append(item)
    assert lines == ["round 1 sample: 10 of 2,020 pictures loss 0", "round 1 sample: 20 of 2,020 pictures loss 1"]


def test_a_bar_on_a_terminal_holds_the_unit_and_what_is_known(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "stderr", Console(file=screen, force_terminal=True, width=120))
    for _ in terminal.track(range(3), "round 1 finetune", 3, unit="steps", now=lambda: "loss 0.6931"):
        pass
    assert "loss 0.6931" in screen.getvalue() and "steps" in screen.getvalue() and "3/3" in screen.getvalue()


def test_finetuning_tells_its_loss_and_sampling_counts_pictures(place, monkeypatch):
    told = {}

    def track(items, text, total, done=0, unit="", size=lambda item: 1, now=str):
        counted = done
        for item in items:
            yield item
            counted += size(item)
            told[text] = (counted, total, unit, now())

    monkeypatch.setattr(terminal, "track", track)
    works("round", "-n", "1")
    assert told["round 1 sample"] == (24, 24, "pictures", "") and told["round 0 held-out-sample"] == (12, 12, "pictures", "")
    counted, total, unit, now = told["round 1 finetune"]
    assert (counted, total, unit) == (12, 12, "steps") and now.startswith("loss 0.") and "accuracy" in now


def test_the_report_is_there_after_every_round(place, monkeypatch):
    written, write = [], report.write

    def noted(session, chain):
        path = write(session, chain)
        written.append((len(chain.rounds) - 1, sorted(json.loads((place / "runs/t/numbers.json").read_text())), path.is_file()))
        return path

    monkeypatch.setattr(report, "write", noted)
    err = works("round", "-n", "2").err
    assert written == [(1, ["round 1"], True), (2, ["round 1", "round 2"], True)]
    assert err.index("report   runs/t/report.html, written anew after every round") < err.index("round 2  sample")
    written.clear()
    works("round", "-n", "2")
    assert written == [(2, ["round 1", "round 2"], True)]
