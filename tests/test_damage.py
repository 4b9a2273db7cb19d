"""Every file of a finished run, damaged in every way: each is found and named, and what is read is checked before it is used."""

import hashlib
import itertools
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from whole_runs import Process, fdpo, folder_of, refused, results, session, works

from fashiondpo_pipeline import annotations, lines, remembered
from fashiondpo_pipeline.annotations import Notebook
from fashiondpo_pipeline.progress import Progress
from fashiondpo_pipeline.workspace import read_hashed, write_hashed, write_json


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_early(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 7] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replace(path: Path) -> None:
    path.write_text('{"claim": {}, "numbers": {}, "files": {}}\n')


def list_instead(path: Path) -> None:
    path.write_text("[1]\n")


def edit(path: Path) -> None:
    """A number put in by hand, the file as good JSON as before."""
    if path.suffix != ".json":
        return flip(path)
    found = json.loads(path.read_text())
    found[next(iter(found))] = 7.0
    path.write_text(json.dumps(found))


WAYS = [flip, flip_early, cut, empty, zero, Path.unlink, replace, list_instead, edit]
OF_A_KIND = 3  # files that are alike: the first is damaged in every way, the others in one each
NOTHING_IN_THEM = ("run.lock", "run.owner")


@pytest.fixture
def whole(finished):
    """A finished run in which somebody said something."""
    run = finished / "runs/t"
    of = next(run.glob("round-01/sample-*")).relative_to(run).as_posix()
    for name in ("ann", "bob"):
        book = Notebook(run / "annotations", name, of)
        for number in range(3):
            book.add("a red dress", number, number + 1, "left")
        book.close()
    return run


def files(run: Path) -> list[Path]:
    return [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in NOTHING_IN_THEM and path.suffix != ".lock"]


def test_every_file_damaged_in_every_way_is_named(whole, monkeypatch):
    """One by one: all damaged at once could hide behind one another."""
    assert works("status", "--verify").err.endswith("every file is as it was written\n")
    monkeypatch.setattr("stages.status._table", lambda _: (None, []))  # it is the same each time, and slow
    unseen, met, kinds = [], files(whole), Counter()
    assert len(met) > 100 and {path.suffix for path in met} >= {".parquet", ".json", ".jsonl", ".html", ".safetensors", ".tally"}
    for number, path in enumerate(met):
        data = path.read_bytes()
        kind = re.sub(r"[0-9a-f]{8}|[0-9]+", "", f"{path.parent.name}/{path.name}")
        ways = [WAYS[number % len(WAYS)]] if kinds[kind] else WAYS
        kinds[kind] += 1
        if kinds[kind] > OF_A_KIND:
            continue
        for harm in ways:
            harm(path)
            told = fdpo("status", "--verify")
            named = str(path.relative_to(whole.parent.parent)) in told.err
            if not named or "Traceback" in told.err or told.code != 1:
                unseen.append((harm.__name__, str(path.relative_to(whole)), told.code, told.err[-300:]))
            path.write_bytes(data)
    assert not unseen
    assert works("status", "--verify").err.endswith("every file is as it was written\n")


def test_all_damage_at_once_is_repaired_and_made_again_to_the_byte(whole):
    """Each file in another way than its neighbours."""
    before, said = results(whole), annotations.read_all(whole / "annotations")
    harms = itertools.cycle([flip, Path.unlink, replace, empty])
    for path in files(whole):
        if path.suffix in (".json", ".html", ".safetensors") or path.name.endswith("00000.parquet"):
            next(harms)(path)
    told = works("status", "--repair")
    assert "dropped: `fdpo round` makes what is missing again" in told.err
    works("round")
    assert results(whole) == before
    assert annotations.read_all(whole / "annotations") == said
    assert works("status", "--verify").err.endswith("every file is as it was written\n")


def test_a_broken_answer_is_set_aside_and_its_neighbours_are_kept(whole):
    path = whole / "annotations/ann.jsonl"
    flip(path)
    shown = path.relative_to(whole.parent.parent)
    told = refused("status", "--verify")
    assert told == "answers that cannot be made again: `fdpo status --repair` sets broken lines aside and keeps all others"
    assert f"{shown}, line 2: this is no whole line" in fdpo("status", "--verify").err
    told = works("status", "--repair").err
    assert f"{shown}: what was broken is in {shown.with_suffix('.broken')}, the other 3 lines are kept" in told
    assert [answer.number for answer in annotations.read(path)] == [0, 2]
    assert works("status", "--verify").err.endswith("every file is as it was written\n")


def test_answers_are_not_mended_under_a_studio_that_is_at_work(whole):
    book = Notebook(whole / "annotations", "ann", "here")
    flip(book.path)
    assert refused("status", "--repair").endswith("ann.jsonl is in use by a studio: close that, then repair again")
    book.close()


def test_the_report_is_made_anew_and_that_is_said(whole):
    page, numbers = whole / "report.html", whole / "numbers.json"
    data = numbers.read_bytes()
    numbers.write_text(numbers.read_text().replace("0.", "1.", 1))
    assert fdpo("status", "--verify").err.splitlines()[0] == f"{numbers.relative_to(whole.parent.parent)}: altered"
    told = works("status", "--repair").err
    assert f"made anew: {page.relative_to(whole.parent.parent)}, numbers.json" in told
    assert numbers.read_bytes() == data


def test_a_report_that_is_gone_with_its_numbers_is_told_and_made_anew(whole):
    page, numbers = whole / "report.html", whole / "numbers.json"
    data = numbers.read_bytes()
    page.unlink()
    numbers.unlink()
    told = works("status", "--verify").err
    assert f"{page.relative_to(whole.parent.parent)}: not there, nor are its numbers: `fdpo report` writes them" in told
    works("status", "--repair")
    assert page.is_file() and numbers.read_bytes() == data
    assert works("status", "--verify").err.endswith("every file is as it was written\n")


def test_a_tally_that_is_gone_is_named_and_begun_anew(whole):
    tally = whole / ".annotations-ann.tally"
    data = tally.read_bytes()
    tally.unlink()
    told = fdpo("status", "--verify")
    assert told.code == 1 and f"{tally.relative_to(whole.parent.parent)}: missing, so that nothing shows whether the end" in told.err
    works("status", "--repair")
    assert tally.read_bytes() == data


def test_a_studio_in_which_nothing_was_said_leaves_nothing_damaged(whole):
    Notebook(whole / "annotations", "eve", "here").close()
    assert works("status", "--verify").err.endswith("every file is as it was written\n")


def test_files_of_an_earlier_version_are_accepted_and_that_is_said(whole):
    for path in whole.glob("round-*/*/*.json"):
        found = json.loads(path.read_text())
        if found.pop("sum", None):
            write_json(path, found)
    line = (whole / "annotations/ann.jsonl").read_bytes().splitlines()[0]
    said, _ = lines.unseal(line, 0)
    (whole / "annotations/old.jsonl").write_text(json.dumps(said) + "\n")
    told = works("status", "--verify").err
    assert "manifests are of an earlier version: nothing shows whether their numbers are as they were written" in told
    assert "annotations/old.jsonl: 1 lines are of an earlier version, and carry nothing that shows them whole" in told
    assert told.endswith("every file that carries a hash is as it was written\n")
    works("round")


# -- what is read is checked

OTHER, AGAIN = "{use: 'fashiondpo_pipeline.testing:Brightness'}", "{use: clip_text, options: {model: 'MODEL'}}"
READ = {
    "round-03/finetune-*/adapter/*.safetensors": ["generate", "a red dress"],
    "round-03/finetune-*/adapter/*.safetensors ": ["export", "out"],
    "round-01/finetune-*/adapter/*.safetensors": ["sample", "--round", "2"],
    "round-01/sample-*/parts/candidates-00001.parquet": ["score", "--round", "1", "--set", f"experts.other={OTHER}"],
    "round-01/sample-*/parts/trajectories-00001.parquet": ["finetune", "--round", "1", "--set", "finetune.beta=50"],
    "round-00/encode-*/parts/prompts-00000.parquet": ["finetune", "--round", "1", "--set", "finetune.beta=50"],
    "round-01/embed-*/parts/embeddings-00001.parquet": ["score", "--round", "1", "--set", f"experts.again={AGAIN}"],
    "round-01/score-clip_t-*/parts/scores-00001.parquet": ["pair", "--round", "1", "--set", "pair.margin=0.1"],
    "round-02/score-clip_t-*/parts/scores-00000.parquet": ["inspect", "scores", "--round", "2"],
    "round-01/pair-*/parts/pairs-00000.parquet": ["finetune", "--round", "1", "--set", "finetune.beta=50"],
    "round-03/evaluate-*/manifest.json": ["report"],
}


@pytest.mark.parametrize("pattern", READ)
def test_one_flipped_bit_in_what_a_command_reads_stops_it_with_a_sentence(whole, tiny_clip, pattern):
    (path,) = whole.glob(pattern.strip())
    flip(path)
    if READ[pattern][0] == "sample":
        shutil.rmtree(folder_of(whole, 2, "sample"))
    command = [word.replace("MODEL", f"local-dir:{tiny_clip}") for word in READ[pattern]]
    told = fdpo(*command)
    assert told.code == 1, told
    sentence = told.err.splitlines()[-1]
    assert sentence.startswith(f"fdpo: {path.relative_to(whole.parent.parent)} "), sentence
    assert " is damaged (" in sentence if path.suffix == ".json" else "it is not as it was written" in sentence
    assert sentence.endswith("`fdpo status --verify --repair` names and re-makes it")


def test_a_file_is_hashed_once_while_it_stays_as_it_is(whole, monkeypatch):
    made = session()
    out = made.output(made.chain(1).rounds[1].sample)
    hashed = []
    monkeypatch.setattr("fashiondpo_pipeline.workspace.hash_file", lambda path: hashed.append(path.name) or
                        hashlib.sha256(path.read_bytes()).hexdigest())
    later = time.time() + 10
    monkeypatch.setattr(remembered.time, "time", lambda: later)
    for _ in range(3):
        out.table("candidates", ["group"])
    assert len(hashed) == len(set(hashed)) == len(out.shards("candidates"))
    remembered.keep_all()
    monkeypatch.setattr(remembered, "_folders", {})  # another process
    out.table("candidates", ["group"])
    assert len(hashed) == len(set(hashed))
    shutil.copy(path := out.parts / "candidates-00000.parquet", path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)  # as a restored backup: looked at again, and found whole
    out.table("candidates", ["group"])
    assert len(hashed) == len(set(hashed)) + 1


def test_a_stray_table_is_not_read_and_is_named(whole):
    folder = folder_of(whole, 1, "pair")
    stray = folder / "parts/pairs-00077.parquet"
    shutil.copy(folder / "parts/pairs-00000.parquet", stray)
    made = session()
    assert made.output(made.chain(1).rounds[1].pair).shards("pairs") == [0]
    assert f"{stray.relative_to(whole.parent.parent)}: no file of this step" in fdpo("status", "--verify").err


# -- a checkpoint


def zero_end(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.fixture(scope="module")
def killed_place(finished_place, tmp_path_factory) -> Path:
    """That run, of which the first finetuning was killed after its first checkpoint; not to be changed."""
    folder = tmp_path_factory.mktemp("killed") / "here"
    shutil.copytree(finished_place, folder)
    shutil.rmtree(folder_of(folder / "runs/t", 1, "finetune"))
    with Process(folder, "finetune", "--round", "1", pause="finetune-*/work/checkpoint.pt") as process:
        process.wait_paused()
    return folder


@pytest.fixture
def checkpoint(place, killed_place) -> Path:
    """The checkpoint of a copy of it, which is entered."""
    shutil.copytree(killed_place / "runs", place / "runs")
    return folder_of(place / "runs/t", 1, "finetune") / "work/checkpoint.pt"


@pytest.mark.parametrize("harm", [flip, empty])
def test_a_broken_checkpoint_is_set_aside_with_a_sentence_and_training_ends_as_if_nothing_had_been(place, finished_place, checkpoint, harm):
    harm(checkpoint)
    told = works("finetune", "--round", "1").err
    assert f"{checkpoint.relative_to(place)} is not as it was written: it is set aside as checkpoint.pt.broken" in told
    assert results(place / "runs/t") == results(finished_place / "runs/t")


@pytest.mark.parametrize("harm", [flip, flip_early, cut, empty, zero, zero_end, list_instead])
def test_a_checkpoint_broken_in_any_way_is_none(checkpoint, harm):
    whole, said = read_hashed(checkpoint, [].append), []
    assert whole
    harm(checkpoint)
    assert read_hashed(checkpoint, said.append) is None and "checkpoint.pt.broken" in said[0]


def test_a_whole_checkpoint_is_gone_on_from(place, finished_place, checkpoint, monkeypatch):
    numbers = []
    after = Progress.after
    monkeypatch.setattr(Progress, "after", lambda self, number, *rest: numbers.append(number) or after(self, number, *rest))
    assert "set aside" not in works("finetune", "--round", "1").err
    assert numbers[0] == 3 and results(place / "runs/t") == results(finished_place / "runs/t")


def test_what_a_reference_said_is_asked_anew_where_its_file_is_broken(tmp_path):
    path, said = tmp_path / "reference.npz", []
    write_hashed(path, b"numbers")
    assert read_hashed(path, said.append) == b"numbers" and not said
    flip(path)
    assert read_hashed(path, said.append) is None and "reference.npz.broken" in said[0]
    assert read_hashed(path, said.append) is None and len(said) == 1 and path.with_name("reference.npz.broken").is_file()


# -- reading while a run goes on


def test_commands_that_read_work_while_a_run_goes_on(finished):
    with Process(finished, "round", "--n", "4", pause="round-04/sample-*/parts/00000.json") as process:
        process.wait_paused()
        for command in (["report"], ["status"], ["status", "--verify"], ["inspect", "pairs"], ["plan"], ["clean"],
                        ["export", "out", "--round", "1"], ["export-pairs", "csv", "csv", "--round", "1"]):
            told = fdpo(*command)
            assert told.code == 0, (command, told.err)


# -- tables as others open them


def test_every_table_opens_in_pandas_and_duckdb(finished):
    import duckdb
    import pandas

    kinds = {}
    for path in (finished / "runs/t").glob("round-*/*/*/*.parquet"):
        kinds.setdefault(path.name.partition("-")[0], path)
    assert kinds.keys() >= {"candidates", "trajectories", "embeddings", "scores", "pairs", "rejects", "steps", "columns", "meters", "prompts"}
    for name, path in kinds.items():
        rows = len(pandas.read_parquet(path))
        assert duckdb.sql(f"SELECT * FROM read_parquet('{path}')").fetchall().__len__() == rows, name
    latents = pandas.read_parquet(kinds["trajectories"])
    assert isinstance(latents["x_t"][0][0], bytes) and len(latents["x_t"][0][0]) == len(latents["x_0"][0])


# -- a path that is no run


@pytest.mark.parametrize("command", [["status"], ["round"], ["report"], ["inspect", "pairs"], ["clean"], ["status", "--repair"], ["export", "out"],
                                     ["sample"], ["studio"], ["plan"], ["generate", "a dress"], ["rescore", "--weights", "clip_t=1"]])
@pytest.mark.parametrize("what", ["a file", "a dangling link", "below a file"])
def test_a_runs_path_that_is_none_is_a_sentence(place, command, what):
    (place / "runs").mkdir()
    if what == "a file":
        (place / "runs/t").write_text("in the way")
    elif what == "below a file":
        (place / "runs").rmdir()
        (place / "runs").write_text("in the way")
    else:
        (place / "runs/t").symlink_to("nowhere")
    told = fdpo(*command)
    assert told.code == 1 and "Traceback" not in told.err
    assert told.err.splitlines()[-1] == {
        "a file": "fdpo: runs/t is a file, where a run's folder should be: move it away, or use another --name",
        "below a file": "fdpo: runs is a file, where the folder of runs should be: move it away",
        "a dangling link": "fdpo: runs/t is a link to nowhere, where nothing is: bring back what it names, or take the link away",
    }[what]


# -- pair sets


@pytest.mark.parametrize("harm", [flip, flip_early, cut, empty, Path.unlink, edit])
def test_every_file_of_a_pair_set_within_a_run_is_named(finished, harm):
    works("export-pairs", "csv", "given", "--round", "1")
    run = finished / "runs/t"
    works("import", "csv", "given", "--out", run / "labels/mine")
    for path in (path for path in sorted((run / "labels/mine").iterdir()) if path.stat().st_size):
        data = path.read_bytes()
        harm(path)
        told = fdpo("status", "--verify")
        if (path.name, harm) != ("manifest.json", cut):  # its last byte is a line's end
            shown = path.parent if (path.name, harm) == ("manifest.json", Path.unlink) else path
            assert told.code == 1 and str(shown.relative_to(finished)) in told.err, (path, told)
        path.write_bytes(data)
