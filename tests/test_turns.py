"""What a person sees at each turn of the studio, without a browser: what is asked, what is said, and what a click costs."""

import json
import sys

import numpy as np
import pytest
from made_runs import GROUPS, PROMPTS, made, session_of  # noqa: F401 - a fixture

from fashiondpo_pipeline import lines, pairsets, sheets
from fashiondpo_pipeline.albums import Album, Desk, of_set
from fashiondpo_pipeline.annotations import VERDICTS, Duel, Notebook
from fashiondpo_pipeline.codecs import encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.preferences import Rule
from fashiondpo_pipeline.studio import Books, Turn, answer, take_back
from stages.studio import of_run

PICTURE = {"bytes": encode_png(np.full((8, 8, 3), 127, np.uint8)), "path": None}


def album(folder, groups: int = 3, each: int = 3) -> Album:
    rows = [{"group": f"g{g}", "candidate": n, "prompt": f"a dress {g}", "picture": PICTURE} for g in range(groups) for n in range(each)]
    pairsets.write(folder, rows, [], {"source": "test", "lineage": {}, "dropped": {}})
    return of_set(folder)


def books(found: Album) -> Books:
    return Books(found, lambda text: None, None)


def click(open_books: Books, verdict: str, turn: Turn, name: str = "ann") -> Turn:
    return open_books.turn(name, "random", answer(verdict, turn.token))


# -- the queue

def test_a_queue_goes_on_from_its_first_open_pair_whatever_is_said_elsewhere_and_taken_back(tmp_path):
    found = album(tmp_path / "set")
    book = Notebook(found.folder, "ann", "set")
    queue = found.queue("random")
    desk, other = Desk(found, book, queue), Desk(found, book, queue[::-1])
    said: list[Duel] = []
    rng = np.random.default_rng(0)
    for _ in range(200):
        what = rng.integers(3)
        if what == 2 and said:
            assert desk.undo().duel == said.pop()
        elif (at := (desk, other)[what % 2]).asked:
            said.append(at.asked)
            assert at.answer(at.token(at.asked), "left")
        assert desk.asked == next((duel for duel in queue if duel not in said), None)
        assert other.asked == next((duel for duel in queue[::-1] if duel not in said), None)
        assert desk.done == other.done == len(set(said)) == len(book)
    book.close()
    assert Desk(found, Notebook(found.folder, "ann", "set"), queue).asked == desk.asked


# -- what is said to people

def test_after_the_last_pair_a_key_is_told_that_all_is_judged_and_nothing_is_kept(tmp_path):
    open_books = books(album(tmp_path / "set", groups=1))
    turn = open_books.turn("ann", "random", lambda desk: None)
    for _ in range(3):
        assert turn.said == ""
        turn = click(open_books, "left", turn)
    ended = "all 3 pairs of this queue are judged: choose other pairs above, or u takes the last answer back"
    assert (turn.duel, turn.token, turn.said, turn.done) == (None, "", ended, 3)
    assert click(open_books, "left", turn).said == ended
    assert len((tmp_path / "set/annotations/ann.jsonl").read_text().splitlines()) == 3
    back = open_books.turn("ann", "random", take_back)
    assert back.said == "taken back: left" and back.duel and back.done == 2
    assert click(open_books, "tie", turn).said == "that was not the pair on the screen", "the screen of before"


@pytest.mark.parametrize(("name", "why"), [("", "write your name above first"), ("Ann Lee", "'Ann Lee' cannot name a file")])
def test_a_name_that_is_none_is_a_sentence(tmp_path, name, why):
    with pytest.raises(UserError, match=why):
        books(album(tmp_path / "set")).turn(name, "random", lambda desk: None)


def test_the_page_tells_which_command_counts_what_is_said_of_its_round(made):  # noqa: F811
    assert of_run(session_of(made), 1).counted.endswith(
        "is of round 1; as a score it is counted by: fdpo score --round 1 --set "
        f'"experts.people={{use: human, options: {{annotations: {made}/runs/made/annotations}}}}"')
    (made / "pipeline.yaml").write_text((made / "pipeline.yaml").read_text().replace(
        "experts:\n", f"experts:\n  people: {{use: human, options: {{annotations: {made}/runs/made/annotations}}}}\n"))
    (made / "runs/made/annotations").mkdir()
    assert of_run(session_of(made), 1).counted.endswith("counted by: fdpo score --round 1")


def test_rounds_names_held_out_prompts_by_their_words(made):  # noqa: F811
    assert of_run(session_of(made), 1).held_out == {"held": PROMPTS["held"]}


# -- other weights

def test_what_a_rule_loses_and_makes_is_shown_with_the_reason(made):  # noqa: F811
    found = of_run(session_of(made), 1)
    rule = found.opinions.rule
    loses = Rule(**vars(rule) | {"margin": 2.0})
    lost = found.reweigh(loses)
    assert lost.change["lost"] > 0 == lost.change["flipped"] == lost.change["new"]
    shown = found.turned(lost, loses, 100)
    assert [len(shown[kind]) for kind in ("flipped", "lost", "new")] == [0, lost.change["lost"], 0]
    assert all("is within the margin 2" in duel.why for duel in shown["lost"])
    wide = [duel.margin for duel in shown["lost"]]
    assert wide == sorted(wide, reverse=True)
    makes = Rule(**vars(rule) | {"margin": 0.0})
    made_new = found.reweigh(makes)
    assert len(found.turned(made_new, makes, 100)["new"]) == made_new.change["new"]
    turns = Rule(**vars(rule) | {"weights": {"other": 1.0}})
    turned = found.turned(found.reweigh(turns), turns, 2)
    assert len(turned["flipped"]) == 2 and not any(duel.why for duel in turned["flipped"])


def test_lost_and_new_pairs_are_on_the_page(made):  # noqa: F811
    found = of_run(session_of(made), 1)
    rule = Rule(**vars(found.opinions.rule) | {"margin": 2.0})
    change = found.reweigh(rule)
    page = str(sheets.pages().get_template("studio.html.j2").module.reweighed(
        change.change | {"before": 1, "after": 0}, 0.1, "1.00", found.turned(change, rule, 2)))
    words = " ".join(page.split())
    assert f"The widest 2 of the {change.change['lost']} pairs that are lost, as they were before" in words
    assert page.count("<article>") == 2 and "is within the margin 2" in words and "No pair changes" not in words


# -- what a click costs

class Counted:
    """How many lines of Python, and calls into C, run meanwhile."""

    def __enter__(self) -> "Counted":
        self.lines = self.calls = 0
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(self._before)

    def _trace(self, frame, event, _):
        self.lines += event == "line"
        return self._trace

    def _profile(self, frame, event, _):
        self.calls += event in ("call", "c_call")


def costs(folder, answers: int) -> list[tuple[int, int]]:
    """(lines, calls) of a click of each kind, where two people have said so much already."""
    found = album(folder, groups=40, each=8)
    (folder / "annotations").mkdir()
    for name in ("ann", "bob"):
        with (folder / f"annotations/{name}.jsonl").open("wb") as file:
            for number in range(answers):
                said = {"of": "set", "group": f"g{number % 20}", "left": number % 3, "right": 7, "verdict": VERDICTS[number % 5]}
                file.write(lines.seal(said | {"pictures": [None, None]}, number))
    open_books = books(found)
    turn = open_books.turn("ann", "random", lambda desk: None)
    turn = click(open_books, "left", turn)  # what is found once, such as what lies in caches, is found
    spent = []
    for verdict in VERDICTS:
        with Counted() as counted:
            turn = click(open_books, verdict, turn)
            open_books.crowd.agreement.kappas(), open_books.crowd.agreement.alpha(), list(open_books.crowd.counts.items())
        spent.append((counted.lines, counted.calls))
    with Counted() as counted:
        turn = open_books.turn("ann", "random", take_back)
    return [*spent, (counted.lines, counted.calls)]


def test_a_click_does_as_much_whether_little_or_much_was_said(tmp_path):
    """Counted, not timed: lines of Python and calls run by a click. 4,000 answers on disk against 200, as many different duels."""
    few, many = costs(tmp_path / "few", 100), costs(tmp_path / "many", 2000)
    for little, much in zip(few, many, strict=True):
        assert abs(much[0] - little[0]) < 100 and abs(much[1] - little[1]) < 60, (few, many)


def test_a_click_reads_no_more_of_the_files_than_was_said_since(tmp_path, monkeypatch):
    found = album(tmp_path / "set")
    open_books = books(found)
    turn = open_books.turn("ann", "random", lambda desk: None)
    read: list[bytes] = []
    unseal = lines.unseal
    monkeypatch.setattr(lines, "unseal", lambda line, place: read.append(line) or unseal(line, place))
    for number in range(5):
        turn = click(open_books, "left", turn)
        assert len(read) == number + 1
    assert [json.loads(line)["verdict"] for line in read] == ["left"] * 5 and len(GROUPS) == 3
