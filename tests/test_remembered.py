"""Answers about files are kept while the files are as they were, and nothing depends on their being kept."""

import json
import os

import pytest

from fashiondpo_pipeline import remembered as cache
from fashiondpo_pipeline.remembered import remembered


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_answers", {})
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_text("one")
    monkeypatch.setattr(cache.time, "time", lambda: path.stat().st_ctime + 10)  # long ago
    return path


def asked(file, answer="hash", question="sha256") -> tuple[str, int]:
    """(what was answered, how often it had to be worked out)"""
    calls = []
    return remembered(file, question, lambda: calls.append(1) or answer), len(calls)


def another_process(monkeypatch) -> None:
    monkeypatch.setattr(cache, "_answers", {})


def test_an_answer_is_worked_out_once_by_whatever_process(file, monkeypatch):
    assert asked(file) == ("hash", 1)
    assert asked(file) == ("hash", 0)
    another_process(monkeypatch)
    assert asked(file) == ("hash", 0)


def test_another_question_or_file_is_worked_out(file, tmp_path):
    asked(file)
    assert asked(file, "words", "prompts") == ("words", 1)
    (tmp_path / "other").write_text("one")
    assert asked(tmp_path / "other") == ("hash", 1)


@pytest.mark.parametrize("change", ["content", "same size, time put back", "replaced by a copy"])
def test_a_changed_file_is_worked_out_again(file, change):
    asked(file)
    old = file.stat()
    if change == "content":
        file.write_text("other")
    else:
        draft = file.with_name("draft") if "copy" in change else file
        draft.write_text("two")
        os.utime(draft, ns=(old.st_atime_ns, old.st_mtime_ns))
        draft.replace(file)
    assert asked(file, "new") == ("new", 1)


def test_what_was_changed_just_now_is_not_kept(file, monkeypatch):
    monkeypatch.setattr(cache.time, "time", lambda: file.stat().st_ctime + 1)
    assert [asked(file)[1], asked(file)[1]] == [1, 1]


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": 1}', '{"a": {"stamp": 1}}'])
def test_a_damaged_cache_costs_time_only(file, folder, monkeypatch, damage):
    folder.mkdir()
    (folder / "files.json").write_text(damage)
    assert asked(file) == ("hash", 1)
    another_process(monkeypatch)
    assert asked(file) == ("hash", 0)


def test_a_cache_that_cannot_be_written_costs_time_only(file, folder, monkeypatch):
    folder.write_text("a file where the folder should be")
    assert asked(file) == ("hash", 1)
    another_process(monkeypatch)
    assert asked(file) == ("hash", 1)


def test_the_oldest_answers_go_first_and_no_draft_is_left(file, folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST", 2)
    for question in "abc":
        asked(file, question, question)
    assert [key[0] for key in json.loads((folder / "files.json").read_text())] == ["b", "c"]
    assert [path.name for path in folder.iterdir()] == ["files.json"]
