"""What people agree on, kept up to date label by label: the figures are those of everything counted anew."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fashiondpo_pipeline import annotations
from fashiondpo_pipeline.agreement import Agreement, cohen_kappa, krippendorff_alpha
from fashiondpo_pipeline.annotations import Answer, Duel, Notebook
from fashiondpo_pipeline.crowd import Crowd

LABELS = st.sampled_from(["first", "second", "tie", None])


@given(st.lists(st.tuples(st.sampled_from(["ann", "bob", "eve"]), st.integers(0, 5), LABELS), max_size=60))
def test_labels_put_one_at_a_time_give_the_figures_of_all_at_once(said):
    kept, found = Agreement(), {}
    for name, item, label in said:
        kept.put(name, item, label)
        found.setdefault(name, {})[item] = label
    found = {name: {item: label for item, label in labels.items() if label} for name, labels in found.items()}
    assert kept.alpha() == krippendorff_alpha(found.values()) or (math.isnan(kept.alpha()) and math.isnan(krippendorff_alpha(found.values())))
    two = {(one, other): found[one].keys() & found[other].keys() for one in found for other in found if one < other}
    assert [line[:3] for line in kept.kappas()] == [(*names, len(both)) for names, both in sorted(two.items()) if both]
    for one, other, _, kappa in kept.kappas():
        assert kappa == pytest.approx(cohen_kappa(found[one], found[other]), nan_ok=True)


def counted(folder, of: str) -> tuple:
    """The same figures as a crowd's, of files that are read whole."""
    found: dict[tuple, Answer] = {(a.annotator, a.duel): a for path in sorted(folder.glob("*.jsonl")) for a in annotations.read(path) if a.of == of}
    labels: dict[str, dict[Duel, str]] = {}
    for (name, duel), answer in found.items():
        if answer.label is not None:
            labels.setdefault(name, {})[duel] = answer.label
    counts = {name: sum(key[0] == name for key in found) for name in sorted({key[0] for key in found})}
    return counts, Agreement.of(labels).kappas(), Agreement.of(labels).alpha()


CLICKS = st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from(["here", "there"]), st.integers(0, 3),
                            st.sampled_from([*annotations.VERDICTS, "undo"])), max_size=30)


@given(CLICKS)
def test_a_crowd_that_reads_on_knows_what_is_in_the_files(tmp_path_factory, clicks):
    folder = tmp_path_factory.mktemp("crowd") / "annotations"
    crowd = Crowd(folder, "here")
    crowd.look()
    assert crowd.counts == {}
    for name, of, group, verdict in clicks:
        book = Notebook(folder, name, of, say=lambda text: None)
        if verdict == "undo":
            book.undo()
        else:
            book.add(f"g{group}", 0, 1, verdict)
        book.close()
        crowd.look()
        wanted = counted(folder, "here")
        assert crowd.counts == wanted[0] and crowd.complaints == []
        assert repr((crowd.agreement.kappas(), crowd.agreement.alpha())) == repr(wanted[1:])


def said(folder, name: str, *verdicts: str) -> Notebook:
    book = Notebook(folder, name, "here")
    for number, verdict in enumerate(verdicts):
        book.add(f"g{number}", 0, 1, verdict)
    return book


def test_a_file_that_is_mended_or_gone_is_read_anew(tmp_path):
    folder = tmp_path / "annotations"
    book = said(folder, "ann", "left", "left", "tie")
    said(folder, "bob", "left", "right").close()
    crowd = Crowd(folder, "here")
    crowd.look()
    assert crowd.counts == {"ann": 3, "bob": 2} and crowd.agreement.kappas()[0][:3] == ("ann", "bob", 2)
    lines = book.path.read_bytes().splitlines(keepends=True)
    (folder / "draft").write_bytes(b"".join(lines[:1]))
    (folder / "draft").replace(book.path)
    crowd.look()
    assert crowd.counts == {"ann": 1, "bob": 2} and crowd.agreement.kappas()[0][:3] == ("ann", "bob", 1)
    (folder / "bob.jsonl").unlink()
    crowd.look()
    assert crowd.counts == {"ann": 1} and crowd.agreement.kappas() == []


def test_a_line_that_is_being_written_is_read_when_it_is_whole_and_a_broken_one_costs_itself_alone(tmp_path):
    folder = tmp_path / "annotations"
    book = said(folder, "ann", "left", "tie")
    book.close()
    first, second = book.path.read_bytes().splitlines(keepends=True)
    crowd = Crowd(folder, "here")
    book.path.write_bytes(first + second[:20])
    crowd.look()
    assert crowd.counts == {"ann": 1}
    with book.path.open("ab") as file:
        file.write(second[20:] + b'{"of": 3}\n')
        file.write(b'{"of": "here", "group": "h", "left": 0, "right": 1, "verdict": "tie", "pictures": [null, null]}\n')
    crowd.look()
    assert crowd.counts == {"ann": 3} and len(crowd.complaints) == 1 and "ann.jsonl, line 3: this is no answer" in crowd.complaints[0]
